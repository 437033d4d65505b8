"""``dataflex train``: one mapping in, ours split from LLaMA-Factory's, checked, launched, trained."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from dataflex.config.args import env_enabled
from dataflex.config.load import load_mapping
from dataflex.config.split import Split, resolve
from dataflex.console import show_log
from dataflex.ending import release_groups
from dataflex.errors import CheckpointError
from dataflex.record.clock import PhaseClock, launch_time
from dataflex.storage import StorageError, storage_problem

logger = logging.getLogger(__name__)


def _is_config(args: list[str]) -> bool:
    return bool(args) and args[0].endswith((".yaml", ".yml", ".json"))


def train(args: list[str]) -> int:
    """Train as the arguments say and return the exit code.

    Args:
        args: A YAML or JSON file and ``key=value`` overrides; or LLaMA-Factory's own ``--key value`` flags,
            which always mean a stock run.
    """
    began = time.time()
    config = _read(args) if _is_config(args) else None  # tells mistakes before LLaMA-Factory is imported
    from dataflex.llamafactory.launch import wants_torchrun, with_torchrun

    if wants_torchrun():
        return with_torchrun(args, began=began)
    return train_here(args, began, config)


def _read(args: list[str]) -> tuple[dict[str, Any], Split]:
    """Return the mapping of a file and overrides, and its two parts, checked."""
    mapping = load_mapping(args[0], args[1:])
    return mapping, resolve(mapping, _folder(args))


def _folder(args: list[str]) -> Path:
    return Path(args[0]).resolve().parent


def train_here(args: list[str], began: float | None = None, read: tuple[dict[str, Any], Split] | None = None) -> int:
    """Train in this process (one rank) and return 0.

    Args:
        args: As for ``train``.
        began: Unix seconds at which the command began; by default when the launcher did, or now.
        read: The configuration, where it was read before.
    """
    clock = PhaseClock(launch_time() if began is None else began)
    if not _is_config(args):
        from llamafactory.train.tuner import run_exp

        run_exp(_flags(args))
        release_groups()
        return 0
    mapping, parts = _read(args) if read is None else read
    lf, config = dict(parts.lf), parts.dynamic
    show_log()
    for note in parts.notes:
        logger.info("%s", note)
    if config is not None:
        resume(lf)
    from dataflex.llamafactory.swap import run

    try:
        if config is not None and env_enabled("USE_RAY"):
            from dataflex.llamafactory.launch import ray_workers

            with ray_workers(mapping, _folder(args), lf.get("stage", "sft")):
                run(lf, config, parts.early_stopping_min_delta)
        else:
            run(lf, config, parts.early_stopping_min_delta, clock)
    except Exception as error:
        told = storage_problem(error, Path(str(lf["output_dir"])))
        if told is None:
            raise
        raise StorageError(told) from error
    release_groups()
    return 0


def _flags(args: list[str]) -> list[str]:
    # LLaMA-Factory reads sys.argv itself when asked for help; give it what the user typed.
    sys.argv = [sys.argv[0], *args]
    return args


def resume(lf: dict[str, Any]) -> None:
    """Settle which checkpoint a dynamic run goes on from, so that an incomplete one is never loaded.

    A path must be whole; ``true``, or nothing with an output folder that holds checkpoints (where
    LLaMA-Factory would resume by itself), means the newest whole one of the run that the folder belongs to.
    A fresh start takes the folder over at once, so that no later start goes on from an older run's.

    Raises:
        CheckpointError: The named checkpoint is not whole, or there is none to go on from.
    """
    from dataflex import checkpoints

    asked = lf.get("resume_from_checkpoint")
    if isinstance(asked, str):
        asked = {"true": True, "false": False, "none": None, "": None}.get(asked.lower(), asked)
    output_dir = Path(str(lf["output_dir"]))
    if isinstance(asked, str):
        reason = checkpoints.broken_reason(Path(asked))
        if reason is not None:
            raise CheckpointError(f"resume_from_checkpoint: {asked} cannot be resumed from: {reason}")
        return
    passed_over: list[str] = []
    if asked or (asked is None and not lf.get("overwrite_output_dir")):
        newest, passed_over = checkpoints.find_resumable(output_dir)
        for line in passed_over:
            logger.warning("not resuming from %s", line)
        if newest is not None:
            lf["resume_from_checkpoint"] = str(newest)
            return
    if asked:
        told = "".join(f"\n  {line}" for line in passed_over)
        raise CheckpointError(
            f"resume_from_checkpoint: {output_dir} holds no complete checkpoint of this run. Remove the key to start "
            "afresh (without 'overwrite_output_dir' later starts then go on from the newest complete checkpoint by "
            f"themselves), or name the folder of a checkpoint{told and '. Not resuming from:' + told}"
        )
    if passed_over:
        lf["overwrite_output_dir"] = True
    if os.environ.get("RANK", "0") == "0" and any(output_dir.glob("checkpoint-*")):
        checkpoints.begin_run(output_dir, checkpoints.new_run())
