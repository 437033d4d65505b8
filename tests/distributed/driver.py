"""Runs configurations one after another on every rank of one torchrun job (imports are paid once).

Usage: torchrun ... driver.py FOLDER. The ranks wait for ``batch-0.json``, ``batch-1.json``, ... in FOLDER: lists of
configuration files, or null for the end. A file that holds a ``command`` is one of ``dataflex``, as a list of words.
A job that fails is noted in ``<file>.rank<r>.error`` with the error's type and text, and the next one goes on; what is
alive when the product is done with one lies in ``<file>.alive<r>``. ``batch-<n>.done<r>`` says that rank r is through.

Three things that only a machine without accelerators needs are patched here, never in the package:
accelerate makes FSDP of several ranks on GPU-like devices only, DeepSpeed would compile a
shared-memory operator for a minute, and LLaMA-Factory v1 waits for an accelerator after every step.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any


def fsdp_on_cpu() -> None:
    from accelerate import state
    from accelerate.utils import DistributedType

    original = state.AcceleratorState.__init__

    def patched(self: Any, *args: Any, **kwargs: Any) -> None:
        plugin = kwargs.get("fsdp_plugin")
        original(self, *args, **kwargs)
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = plugin

    state.AcceleratorState.__init__ = patched


def deepspeed_without_compiling() -> None:
    try:
        import deepspeed
    except ImportError:
        return
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def meeting_port(file: Path) -> str:
    """Rank 0 finds a port that is free now and leaves it in ``file`` for the others."""
    if os.environ["RANK"] == "0":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        aside = file.with_suffix(".aside")
        aside.write_text(str(port))
        aside.rename(file)
    while not file.exists():
        time.sleep(0.01)
    return file.read_text()


def main() -> int:
    import torch
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from dataflex.cli import main as run
    from dataflex.run import train_here

    fsdp_on_cpu()
    deepspeed_without_compiling()
    if not torch.accelerator.is_available():
        torch.accelerator.synchronize = lambda *_: None
    # Every job meets at a port of its own, hosted by rank 0: torchrun's own store still holds the last job's keys.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    environment, rank, linear = dict(os.environ), os.environ["RANK"], torch.nn.functional.linear
    for number in itertools.count():
        batch = Path(sys.argv[1], f"batch-{number}.json")
        while not batch.exists():
            time.sleep(0.05)
        configs = json.loads(batch.read_text())
        if configs is None:
            return 0
        for config in configs:
            gc.collect()
            gc.freeze()  # each job collects, which would take as long as its steps
            os.environ.clear()
            os.environ.update(environment)
            os.environ["MASTER_PORT"] = meeting_port(Path(f"{config}.port"))
            try:
                command = json.loads(Path(config).read_text()).get("command") if config.endswith(".json") else None
                if command:
                    code = run(command)
                    assert code == 0, f"exit code {code}"
                else:
                    train_here([config])
                Path(f"{config}.alive{rank}").write_text(json.dumps(alive()))
            except Exception as error:  # noqa: BLE001 (the test reads what happened)
                Path(f"{config}.rank{rank}.error").write_text(f"{type(error).__name__}: {error}")
                traceback.print_exc()
            if dist.is_initialized():
                dist.destroy_process_group()
            forget_engines()
            torch.nn.functional.linear = linear  # ZeRO-3 puts a function of its own there, for good
            AcceleratorState._reset_state(reset_partial_state=True)
            PartialState._reset_state()
            GradientState._reset_state()
        sys.stdout.flush()
        batch.with_suffix(f".done{rank}").touch()


def alive() -> dict[str, Any]:
    """What the end of the interpreter could trip over."""
    return {
        "group": sys.modules["torch.distributed"].is_initialized(),
        "native": sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")),
        "python": [thread.name for thread in threading.enumerate() if not thread.daemon],
    }


def forget_engines() -> None:
    """Drop what DeepSpeed and transformers remember of the last job."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    module = sys.modules.get("deepspeed.comm.comm")
    if module is not None:
        module.cdb = None
    v1 = sys.modules.get("llamafactory.v1.accelerator.interface")
    if v1 is not None:
        v1.DistributedInterface._instance = None
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is not None:
        for name, value in vars(groups).items():
            if name.startswith("_") and name.isupper() and (value is None or "GROUP" in name):
                setattr(groups, name, {} if isinstance(value, dict) else None)


if __name__ == "__main__":
    from dataflex.ending import leave

    leave(main)
