"""``python -m dataflex`` is the command ``dataflex``."""

from dataflex.cli import main
from dataflex.ending import leave

if __name__ == "__main__":
    leave(main)
