"""Starts one process per device with torchrun, on the same conditions as LLaMA-Factory's launcher.

LLaMA-Factory is not imported: the processes that are started do so, which would otherwise take its time twice.
Read from the environment: ``FORCE_TORCHRUN``, ``NPROC_PER_NODE``, ``NNODES``, ``NODE_RANK``, ``MASTER_ADDR``,
``MASTER_PORT``, ``OPTIM_TORCH``, ``TORCH_ELASTIC_SHUTDOWN_TIMEOUT``; for elastic jobs ``RDZV_ID``, ``MIN_NNODES``,
``MAX_NNODES``, ``MAX_RESTARTS``.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping

from dataflex.clock import LAUNCHED
from dataflex.config.args import env_enabled
from dataflex.ending import run_child

_SHUTDOWN_SECONDS = "600"


def wants_torchrun() -> bool:
    """Whether this run is to be started under torchrun, and is not already inside it."""
    if "LOCAL_RANK" in os.environ and "RANK" in os.environ:
        return False
    if env_enabled("FORCE_TORCHRUN"):
        return True
    return not env_enabled("USE_RAY") and not env_enabled("USE_KT") and device_count() > 1


def device_count() -> int:
    """Return the number of accelerators that torch sees."""
    import torch

    return getattr(torch, "accelerator", torch.cuda).device_count()  # torch 2.5 has no torch.accelerator


def unused_port() -> int:
    """Return a port of this machine that nothing listens at now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def torchrun_command(args: list[str], env: Mapping[str, str], *, devices: int, free_port: int) -> list[str]:
    """Return the torchrun command line under which every rank runs ``dataflex ARGS``.

    ``devices`` and ``free_port`` are the defaults of NPROC_PER_NODE and MASTER_PORT.
    """
    nnodes = env.get("NNODES", "1")
    per_node = env.get("NPROC_PER_NODE", str(max(devices, 1)))
    address, port = env.get("MASTER_ADDR", "127.0.0.1"), env.get("MASTER_PORT", str(free_port))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", per_node]
    rendezvous = env.get("RDZV_ID")
    if rendezvous is not None:
        if "MIN_NNODES" in env and "MAX_NNODES" in env:
            nnodes = f"{env['MIN_NNODES']}:{env['MAX_NNODES']}"
        command += ["--nnodes", nnodes, "--rdzv-id", rendezvous, "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", f"{address}:{port}", "--max-restarts", env.get("MAX_RESTARTS", "0")]
    else:
        command += ["--nnodes", nnodes, "--node-rank", env.get("NODE_RANK", "0")]
        command += ["--master-addr", address, "--master-port", port]
    return [*command, "-m", "dataflex", *args]


def with_torchrun(args: list[str], began: float | None = None) -> int:
    """Run ``dataflex ARGS`` in one process per device and return the exit code; its time is counted from ``began``."""
    env = dict(os.environ)
    if began is not None:
        env[LAUNCHED] = repr(began)
    if env_enabled("OPTIM_TORCH", "1"):
        env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        env["TORCH_NCCL_AVOID_RECORD_STREAMS"] = "1"
    devices = device_count()
    if devices == 0:
        # Without it a rank maps checkpoints to the device 'cpu:1', which torch cannot restore to.
        env.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    # On SIGTERM torchrun kills ranks that have not ended by then; one that saves needs time for its step and its disk.
    env.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN_SECONDS)
    return run_child(torchrun_command(args, env, devices=devices, free_port=unused_port()), env)
