"""``dataflex train``: one mapping in, ours split from LLaMA-Factory's, checked, launched, trained."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

from dataflex.config.load import load_mapping
from dataflex.config.split import resolve
from dataflex.core.shown import LogFormatter
from dataflex.errors import CheckpointError

__all__ = ["show_progress", "train", "train_here"]

logger = logging.getLogger(__name__)


def _is_config(args: list[str]) -> bool:
    return bool(args) and args[0].endswith((".yaml", ".yml", ".json"))


def train(args: list[str]) -> int:
    """Train as the arguments say and return the exit code.

    Args:
        args: A YAML or JSON file and ``key=value`` overrides; or LLaMA-Factory's own ``--key value`` flags,
            which always mean a stock run.
    """
    if _is_config(args):  # tell mistakes before LLaMA-Factory is imported
        resolve(load_mapping(args[0], args[1:]), Path(args[0]).resolve().parent)
    from dataflex.bridge.launch import wants_torchrun, with_torchrun

    if wants_torchrun():
        return with_torchrun(args)
    return train_here(args)


def train_here(args: list[str]) -> int:
    """Train in this process (one rank) and return 0."""
    if not _is_config(args):
        from llamafactory.train.tuner import run_exp

        run_exp(_flags(args))
        return 0
    base_dir = Path(args[0]).resolve().parent
    mapping = load_mapping(args[0], args[1:])
    parts = resolve(mapping, base_dir)
    lf, config = dict(parts.lf), parts.dynamic
    show_progress()
    for note in parts.notes:
        logger.info("%s", note)
    if config is not None:
        resume(lf)
    from dataflex.bridge.swap import run

    if config is not None and _uses_ray():
        from dataflex.bridge.ray_worker import ray_workers

        with ray_workers(mapping, base_dir, lf.get("stage", "sft")):
            run(lf, config, parts.early_stopping_min_delta)
    else:
        run(lf, config, parts.early_stopping_min_delta)
    return 0


def _flags(args: list[str]) -> list[str]:
    # LLaMA-Factory reads sys.argv itself when asked for help; give it what the user typed.
    sys.argv = [sys.argv[0], *args]
    return args


def _uses_ray() -> bool:
    return os.environ.get("USE_RAY", "0").lower() in {"true", "y", "1"}


def show_progress() -> None:
    """Show our own log lines on stderr, on rank 0."""
    ours = logging.getLogger("dataflex")
    if not ours.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(LogFormatter("[dataflex] %(message)s"))
        ours.addHandler(handler)
        ours.propagate = False
    ours.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)


def resume(lf: dict[str, Any]) -> None:
    """Settle which checkpoint a dynamic run goes on from, so that an incomplete one is never loaded.

    A path must be complete; ``true``, or nothing with an output folder that holds checkpoints (where
    LLaMA-Factory would resume by itself), means the newest complete one.

    Raises:
        CheckpointError: The named checkpoint is incomplete or foreign, or none is complete.
    """
    from dataflex.train.checkpoint import find_resumable, incomplete_reason

    asked = lf.get("resume_from_checkpoint")
    if isinstance(asked, str) and asked.lower() in {"true", "false"}:
        asked = asked.lower() == "true"
    if isinstance(asked, str):
        reason = incomplete_reason(Path(asked))
        if reason is not None:
            raise CheckpointError(f"resume_from_checkpoint: {asked} cannot be resumed from: {reason}")
        return
    if asked is False or (asked is None and lf.get("overwrite_output_dir")):
        return
    output_dir = Path(str(lf["output_dir"]))
    newest, passed_over = find_resumable(output_dir)
    for line in passed_over:
        logger.warning("not resuming from %s", line)
    if newest is not None:
        lf["resume_from_checkpoint"] = str(newest)
    elif asked:
        raise CheckpointError(f"resume_from_checkpoint: {output_dir} holds no complete checkpoint")
    elif passed_over:
        lf["overwrite_output_dir"] = True
