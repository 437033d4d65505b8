"""Runs several configurations one after another on every rank of one torchrun job (imports are paid once).

Usage: torchrun ... driver.py JOBS.json, where JOBS is a list of configuration files. A job that fails is
noted in ``<file>.error`` with the error's type and text, and the next one goes on.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path


def main() -> None:
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from dataflex.run import train_here

    # Every job meets at a port of its own, hosted by rank 0: torchrun's own store still holds the last job's keys.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    jobs = json.loads(Path(sys.argv[1]).read_text())
    for config, port in jobs:
        os.environ["MASTER_PORT"] = str(port)
        try:
            train_here([config])
        except Exception as error:  # noqa: BLE001 (the test reads what happened)
            Path(f"{config}.rank{os.environ['RANK']}.error").write_text(f"{type(error).__name__}: {error}")
            traceback.print_exc()
        if dist.is_initialized():
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        GradientState._reset_state()


if __name__ == "__main__":
    main()
