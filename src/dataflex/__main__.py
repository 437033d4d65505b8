"""``python -m dataflex`` is the command ``dataflex``."""

import sys

from dataflex.cli import main

if __name__ == "__main__":
    sys.exit(main())
