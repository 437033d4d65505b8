"""What every example served and how its loss went: a rebuild that keeps both changed nothing that counts.

``trajectories.json`` is renewed on purpose, whole, with

    DATAFLEX_WRITE_GOLDEN=1 python -m pytest tests/examples tests/distributed/test_trajectories.py

Row ids are equal everywhere, but for ``_ROUNDING_DECIDES``. Losses are equal to the bit on the machine and with the
packages that wrote the file, and elsewhere to 1e-6: other kernels round otherwise.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.record.read import load_plan, read_events

__all__ = ["check", "trajectory"]

FILE = Path(__file__).with_name("trajectories.json")
ELSEWHERE = 1e-6
_ROUNDING_DECIDES = ("select_coincide.yaml", "select_cluster_less.yaml")
"""Clusters of few rows of an untrained model change with the last bits: these are compared on the machine alone."""
_KERNELS = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "OMP_NUM_THREADS",
    "OPENBLAS_CORETYPE",
)


def machine() -> dict[str, Any]:
    """Return what decides the last bits of a loss: processor, packages, kernels asked for."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.is_file() else []
    told = [line for line in lines if line.startswith(("model", "flags", "vendor_id", "cpu family", "stepping"))]
    processor = "\n".join(sorted(set(told))) or platform.processor()
    return {
        "processor": hashlib.sha256(processor.encode()).hexdigest()[:16],
        "packages": {name: version(name) for name in ("numpy", "torch", "transformers", "llamafactory")},
        "kernels": {name: os.environ.get(name, "") for name in _KERNELS},
    }


def trajectory(folder: Path) -> dict[str, Any]:
    """Return the digest of the row ids that a run served, in order, and its logged losses."""
    served = hashlib.sha256()
    for event in read_events(folder):
        if event["event"] == "planned":
            served.update(np.asarray(load_plan(folder, event["interval"]).rows, dtype="<i8").tobytes())
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {"ids": served.hexdigest(), "losses": [entry["loss"] for entry in history if "loss" in entry]}


def check(name: str, folder: Path) -> None:
    """Compare a run with what is written of it, or write that with ``DATAFLEX_WRITE_GOLDEN=1``."""
    found = trajectory(folder)
    golden = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {"machine": {}, "runs": {}}
    if os.environ.get("DATAFLEX_WRITE_GOLDEN") == "1":
        runs = dict(sorted({**golden["runs"], name: found}.items()))
        FILE.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n", encoding="utf-8")
        return
    before, here = golden["runs"][name], golden["machine"] == machine()
    if here or name not in _ROUNDING_DECIDES:
        assert found["ids"] == before["ids"], f"{name} serves other rows, or in another order"
    if here:
        assert found["losses"] == before["losses"]
    elif name not in _ROUNDING_DECIDES:
        np.testing.assert_allclose(found["losses"], before["losses"], rtol=ELSEWHERE, atol=ELSEWHERE)
