"""What torchrun starts on every rank: ``python -m dataflex.worker CONFIG [key=value ...]``."""

from __future__ import annotations

import sys

from dataflex.cli import guarded
from dataflex.ending import leave
from dataflex.run import train_here

if __name__ == "__main__":
    leave(lambda: guarded(lambda: train_here(sys.argv[1:])))
