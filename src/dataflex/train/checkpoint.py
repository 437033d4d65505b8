"""What DataFlex adds to a checkpoint.

``checkpoint-N/dataflex/`` holds the plan in progress, the state of the methods and a description of the
run they belong to. ``checkpoints`` tells which checkpoints count.
"""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.checkpoints import FOLDER
from dataflex.errors import CheckpointError, DataFlexError
from dataflex.plan.plan import DataPlan
from dataflex.state import load_state, save_state
from dataflex.train.identity import Identity

__all__ = ["decisions", "load", "save"]

logger = logging.getLogger(__name__)

_RUN = "run.json"
_FORMAT = 1


def save(checkpoint: Path, identity: Identity, plan: DataPlan | None, state: dict[str, Any], step: int) -> None:
    """Write ``checkpoint/dataflex`` (rank 0 only); it counts once the checkpoint is sealed."""
    folder = checkpoint / FOLDER
    meta = {"format": _FORMAT, "step": step, **identity.describe()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _RUN).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        save_state(folder, "methods", state)
        if plan is not None:
            np.savez(folder / "plan.npz", **plan.to_arrays())  # type: ignore[arg-type]
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error


def load(checkpoint: Path, identity: Identity) -> tuple[DataPlan | None, dict[str, Any]]:
    """Read back what ``save`` wrote into a checkpoint that was found to be whole.

    Returns:
        The plan in progress, or None if none was made yet, and the state of the methods.

    Raises:
        CheckpointError: No DataFlex state, a broken file, or another run's state.
    """
    folder = checkpoint / FOLDER
    if not (folder / _RUN).is_file():
        raise CheckpointError(
            f"resume: {checkpoint} has no '{FOLDER}' folder: it was not written by a run with a dynamic block, or "
            "with 'save_only_model: true'. Start fresh with 'dynamic.resume_plan: ignore', or from another checkpoint."
        )
    meta = json.loads((folder / _RUN).read_text(encoding="utf-8"))
    if meta.get("format") != _FORMAT:
        raise CheckpointError(f"resume: {folder} has format {meta.get('format')!r}; this version reads {_FORMAT}")
    problems, told = identity.differences(meta)
    if problems:
        raise CheckpointError(
            "".join(f"resume: {problem}\n" for problem in problems)
            + "The saved plan and states would mean something else. Restore what changed, or decide afresh from here "
            "on with 'dynamic.resume_plan: ignore'."
        )
    for line in told:
        logger.info("resume: %s", line)
    return _plan(folder), load_state(folder, "methods")


def decisions(checkpoint: Path) -> int:
    """Return how many decisions a checkpoint's run had made, 0 where it does not tell."""
    try:
        plan = _plan(checkpoint / FOLDER)
    except (DataFlexError, OSError, ValueError, zipfile.BadZipFile):
        return 0
    return 0 if plan is None else plan.interval.index + 1


def _plan(folder: Path) -> DataPlan | None:
    """Read the plan in progress, if there is one."""
    if not (folder / "plan.npz").exists():
        return None
    with np.load(folder / "plan.npz", allow_pickle=False) as arrays:
        return DataPlan.from_arrays(dict(arrays))
