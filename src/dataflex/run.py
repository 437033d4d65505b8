"""``dataflex train``: one mapping in, ours split from LLaMA-Factory's, checked, launched, trained."""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dataflex.clock import PhaseClock, launch_time
from dataflex.config.args import LlamaFactoryArgs, env_enabled, ray_problems
from dataflex.config.load import load_mapping
from dataflex.config.split import Split, resolve
from dataflex.console import show_log
from dataflex.ending import release_groups
from dataflex.errors import CheckpointError, ConfigError, UnsupportedError
from dataflex.storage import StorageError, storage_problem

logger = logging.getLogger(__name__)


def _is_config(args: list[str]) -> bool:
    """Whether a file is named; else LLaMA-Factory reads its own flags."""
    return bool(args) and (not args[0].startswith("-") or args[0].endswith((".yaml", ".yml", ".json")))


def train(args: list[str]) -> int:
    """Train on as many ranks as the environment asks for, and return the exit code.

    ``args``: a YAML or JSON file and ``key=value`` overrides; or LLaMA-Factory's own ``--key value`` flags, for a stock
    run.
    """
    began = time.time()
    config = _read(args) if _is_config(args) else None  # reports mistakes before LLaMA-Factory is imported
    from dataflex.llamafactory.launch import wants_torchrun, with_torchrun

    if wants_torchrun():
        return with_torchrun(["train", *args], began)
    alone = "LOCAL_RANK" not in os.environ and not env_enabled("USE_RAY")
    if config is not None and config[1].lf.get("deepspeed") and alone:
        raise UnsupportedError("deepspeed: LLaMA-Factory runs it under torchrun only; set FORCE_TORCHRUN=1")
    return train_here(args, began, config)


def _read(args: list[str]) -> tuple[dict[str, Any], Split]:
    """Return the mapping of a file and overrides, and its two parts, checked."""
    mapping = load_mapping(args[0], args[1:])
    parts = resolve(mapping, Path(args[0]).resolve().parent)
    if parts.v1 is None and env_enabled("USE_RAY") and (problems := ray_problems()):
        raise UnsupportedError("\n".join(problems))
    return mapping, parts


def train_here(args: list[str], began: float | None = None, read: tuple[dict[str, Any], Split] | None = None) -> int:
    """Train in this process, one rank, and return 0.

    Args:
        args: As for ``train``.
        began: Unix seconds at which the command began, where no launcher tells it; None: now.
        read: The configuration, where it was read before.
    """
    clock = PhaseClock(launch_time() or began)
    if not _is_config(args):
        sys.argv[1:] = args  # LLaMA-Factory reads them itself when it is asked for help
        if env_enabled("USE_V1"):
            from llamafactory.v1.trainers.sft_trainer import run_sft as run_exp
        else:
            from llamafactory.train.tuner import run_exp

        run_exp(args)
        release_groups()
        return 0
    mapping, parts = read or _read(args)
    lf, config = dict(parts.lf), parts.dynamic
    show_log()
    for note in parts.notes:
        logger.info("%s", note)
    if config is not None and not config.stock and parts.v1 is None:
        resume(lf)
    if parts.v1 is None:
        refuse_finished(lf)
    ray = config is not None and parts.v1 is None and env_enabled("USE_RAY")
    base_dir = Path(args[0]).resolve().parent
    try:
        if parts.v1 is not None:
            from dataflex.llamafactory.v1 import run as run_v1

            run_v1(parts, clock)
        else:
            from dataflex.llamafactory.swap import ray_workers, run

            with ray_workers(mapping, base_dir) if ray else nullcontext():
                run(lf, config, parts.early_stopping_min_delta, clock)
    except Exception as error:
        told = storage_problem(error, Path(str(parts.lf.output_dir)))
        if told is None:
            raise
        raise StorageError(told) from error
    release_groups()
    return 0


WEIGHTS = frozenset(
    f"{name}{ending}" for name in ("model.safetensors", "pytorch_model.bin") for ending in ("", ".index.json")
) | {"adapter_model.safetensors", "adapter_model.bin"}
"""Names of a finished run's files, LLaMA-Factory's ``CHECKPOINT_NAMES``."""


def refuse_finished(lf: dict[str, Any]) -> None:
    """Raise ConfigError where LLaMA-Factory would refuse the folder, once all else is loaded: it holds a model."""
    view = LlamaFactoryArgs.read(lf)
    output_dir = Path(str(view.output_dir))
    goes_on = lf.get("resume_from_checkpoint") is not None or any(output_dir.glob("checkpoint-*"))
    never = view.stage == "rm" and view.finetuning_type in ("full", "freeze")  # LLaMA-Factory begins these anew
    if goes_on or never or view.on("overwrite_output_dir") or not view.on("do_train"):
        return
    for name in sorted(WEIGHTS):
        if (output_dir / name).is_file():
            raise ConfigError(
                f"output_dir: {output_dir} holds the model of an earlier run ({name}), and no checkpoint to go on "
                "from; name another folder, or replace it with 'overwrite_output_dir: true'"
            )


def resume(lf: dict[str, Any]) -> None:
    """Set the checkpoint that a dynamic run resumes from, so that an incomplete one is never loaded.

    A path must hold a complete checkpoint. ``true``, or nothing where the output folder holds checkpoints (from which
    LLaMA-Factory would resume by itself), means the newest complete one of the run that the folder belongs to.
    A fresh start marks the folder as its own at once, so that no later start resumes from an older run.

    Raises:
        CheckpointError: The named checkpoint is not complete, there is none to resume from, or a run of another process
            writes into the folder.
    """
    from dataflex import checkpoints

    output_dir = Path(str(lf["output_dir"]))
    if os.environ.get("RANK", "0") == "0":
        checkpoints.refuse_busy(output_dir)
    asked = lf.get("resume_from_checkpoint")
    if isinstance(asked, str):
        asked = {"true": True, "false": False, "none": None, "": None}.get(asked.lower(), asked)
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
        checkpoints.begin_run(output_dir)
