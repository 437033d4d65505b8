"""Trains as a rank does and writes what is alive when the product is done: torchrun ... rank.py FOLDER CONFIG."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from dataflex.ending import leave
from dataflex.run import train_here


def native_threads() -> list[str]:
    return sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))


def main() -> int:
    code = train_here(sys.argv[2:])
    import torch.distributed as dist

    alive = {
        "group": dist.is_initialized(),
        "native": native_threads(),
        "python": [thread.name for thread in threading.enumerate() if not thread.daemon],
    }
    (Path(sys.argv[1]) / f"alive-{os.environ['RANK']}.json").write_text(json.dumps(alive))
    return code


if __name__ == "__main__":
    leave(main)
