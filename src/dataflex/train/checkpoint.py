"""What DataFlex adds to a checkpoint, and which checkpoints may be resumed from.

``checkpoint-N/dataflex/`` holds the plan in progress, the state of the methods and a description of the
run they belong to. It is written aside and renamed, its manifest last. A checkpoint counts as complete when
that folder verifies and ``trainer_state.json``, which the Trainer writes last of all, can be read.
"""

from __future__ import annotations

import json
import logging
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.core.plan import DataPlan
from dataflex.core.state import load_state, save_state, verify_directory, write_directory
from dataflex.errors import CheckpointError, DataFlexError
from dataflex.train.identity import Identity

__all__ = ["FOLDER", "decisions", "find_resumable", "incomplete_reason", "load", "save"]

logger = logging.getLogger(__name__)

FOLDER = "dataflex"
_TRAINER_STATE = "trainer_state.json"
_FORMAT = 1


def save(checkpoint: Path, identity: Identity, plan: DataPlan | None, state: dict[str, Any], step: int) -> None:
    """Write ``checkpoint/dataflex`` as a whole or not at all (rank 0 only)."""

    def fill(folder: Path) -> None:
        meta = {"format": _FORMAT, "step": step, **identity.describe()}
        (folder / "run.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        save_state(folder, "methods", state)
        if plan is not None:
            np.savez(folder / "plan.npz", **plan.to_arrays())  # type: ignore[arg-type]

    write_directory(checkpoint / FOLDER, fill)


def load(checkpoint: Path, identity: Identity) -> tuple[DataPlan | None, dict[str, Any]]:
    """Read back what ``save`` wrote.

    Returns:
        The plan in progress, or None if none was made yet, and the state of the methods.

    Raises:
        CheckpointError: No DataFlex state, a broken file, or another run's state.
    """
    folder = checkpoint / FOLDER
    if not folder.is_dir():
        raise CheckpointError(
            f"resume: {checkpoint} has no '{FOLDER}' folder: it was not written by a run with a dynamic block, or "
            "with 'save_only_model: true'. Start fresh with 'dynamic.resume_plan: ignore', or from another checkpoint."
        )
    verify_directory(folder)
    meta = json.loads((folder / "run.json").read_text(encoding="utf-8"))
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


def incomplete_reason(checkpoint: Path) -> str | None:
    """Say why a checkpoint cannot be resumed from, or None if it can."""
    try:
        state = json.loads((checkpoint / _TRAINER_STATE).read_text(encoding="utf-8"))
        int(state["global_step"])
    except FileNotFoundError:
        return f"{_TRAINER_STATE} is missing: it was not written to the end"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{_TRAINER_STATE} cannot be read: it was not written to the end"
    if (checkpoint / FOLDER).is_dir():
        try:
            verify_directory(checkpoint / FOLDER)
        except DataFlexError as error:
            return str(error)
    return None


def find_resumable(output_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint of a run, and why newer ones were passed over."""
    found = []
    if output_dir.is_dir():
        for entry in output_dir.iterdir():
            match = re.fullmatch(r"checkpoint-(\d+)", entry.name)
            if match and entry.is_dir():
                found.append((int(match[1]), entry))
    passed_over: list[str] = []
    for _, checkpoint in sorted(found, reverse=True):
        reason = incomplete_reason(checkpoint)
        if reason is None:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint.name}: {reason}")
    return None, passed_over
