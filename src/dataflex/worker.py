"""What torchrun starts on every rank: ``python -m dataflex.worker CONFIG [key=value ...]``."""

from __future__ import annotations

import sys

from dataflex.ending import leave  # first: it ends after whatever else is imported

from dataflex.cli import guarded  # isort: skip
from dataflex.run import train_here  # isort: skip

__all__: list[str] = []

if __name__ == "__main__":
    leave(lambda: guarded(lambda: train_here(sys.argv[1:])))
