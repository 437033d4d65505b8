"""``python -m dataflex`` is the command ``dataflex``."""

from dataflex.ending import leave
from dataflex_llm import main

if __name__ == "__main__":
    leave(main)
