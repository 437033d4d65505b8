"""Everything that can be found wrong with a configuration without loading LLaMA-Factory or a model.

The checks never stop at the first problem: a user mends a configuration once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dataflex.config.args import LlamaFactoryArgs, env_enabled, env_processes
from dataflex.config.check_data import (
    by_domain_problems,
    column_problems,
    data_set_problems,
    domain_problems,
    target_problems,
)
from dataflex.config.data import Source
from dataflex.config.needs import optimizer_without_moments, unmet
from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.method import STAGES, DomainWeighter, Mixer, RunFacts, Weighter

_REFUSED: dict[str, str] = {
    "group_by_length": "the plan decides the order of rows, so batches cannot be grouped by length; remove it",
    "auto_find_batch_size": "the plan is cut for one batch size, which this changes in the middle; set the batch size",
    "use_unsloth": "it replaces the training loop that the plan is served through; remove it",
    "use_mca": "Megatron has its own training loop, which cannot be served a plan; remove it",
    "use_hyper_parallel": "it has its own training loop, which cannot be served a plan; remove it",
    "ignore_data_skip": "a resumed run continues the saved plan at its step, by itself; remove it",
}

_LOSS_OF_ITS_OWN = "it is a loss of its own, and so is the one that the {method} makes; keep one of the two"
_FUSED = "its fused loss gives no loss per token, which the {method} needs; remove it or the {kind}"

_REFUSED_WITH_TOKEN_LOSSES: dict[str, str] = {
    "use_dft_loss": _LOSS_OF_ITS_OWN,
    "use_asft_loss": _LOSS_OF_ITS_OWN,
    "use_eaft_loss": _LOSS_OF_ITS_OWN,
    "enable_liger_kernel": _FUSED,
    "use_liger_kernel": _FUSED,
}

_PARALLEL_KEYS = (
    "sequence_parallel_size",
    "context_parallel_size",
    "cp_size",
    "sp_size",
    "ulysses_degree",
    "ulysses_size",
)


def stage_problems(dynamic: DynamicConfig, lf: LlamaFactoryArgs) -> Iterator[str]:
    """Yield what speaks against the stage, the back end, and methods under them."""
    stage = lf.stage
    if stage == "ppo":
        yield (
            "stage: ppo is not supported: the policy writes its own training batches, so there are no fixed rows to "
            f"decide about; use one of {', '.join(STAGES)}"
        )
        return
    yield from unmet(dynamic, RunFacts(stage=stage, partitioned=_partitioned(lf)))


def _weighs(cls: type[Any]) -> bool:
    return issubclass(cls, Weighter) and not cls.neutral


def _partitioned(lf: LlamaFactoryArgs) -> str:
    """Return what partitions the parameters, or an empty string."""
    if lf.fsdp:
        return "fsdp"
    config = lf.deepspeed
    if isinstance(config, str) and Path(config).is_file():
        try:
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        except ValueError:
            return ""
    zero = config.get("zero_optimization") if isinstance(config, Mapping) else None
    return "DeepSpeed ZeRO-3" if isinstance(zero, Mapping) and zero.get("stage") == 3 else ""


def setting_problems(dynamic: DynamicConfig, lf: LlamaFactoryArgs) -> Iterator[str]:
    """Yield the settings that cannot be honoured, each with the reason."""
    if not lf.do_train:
        yield "do_train: is not on, so nothing is trained and 'dynamic' has no effect; set 'do_train: true'"
    for key, reason in _REFUSED.items():
        if lf.on(key):
            yield f"{key}: {reason}"
    yield from _streaming_problems(dynamic, lf)
    yield from unmet(dynamic, RunFacts(optimizer=optimizer_without_moments(lf)))
    if env_enabled("USE_MCA"):
        yield f"USE_MCA (environment): {_REFUSED['use_mca']}"
    order = lf.train_sampling_strategy
    if order == "group_by_length":
        yield f"train_sampling_strategy: {_REFUSED['group_by_length']}"
    elif order == "sequential":
        yield "train_sampling_strategy: the plan decides the order of rows; for file order set 'disable_shuffling'"
    if lf.mix_strategy != "concat":
        yield (
            f"mix_strategy: {lf.mix_strategy} is not supported: data sets are kept apart as domains; remove it and "
            "give proportions to a mixer (such as 'mixer: uniform')"
        )
    if lf.interleave_probs is not None:
        yield (
            "interleave_probs: data sets are kept apart as domains; remove it and give proportions to a mixer (such as "
            "'mixer: static')"
        )
    yield from _parallel(lf)
    taker = _takes_token_losses(dynamic)
    if taker is not None:
        method = f"{taker.name} {taker.kind}"
        for key, reason in _REFUSED_WITH_TOKEN_LOSSES.items():
            if lf.on(key):
                yield f"{key}: {reason.format(method=method, kind=taker.kind)}"
        if lf.label_smoothing_factor > 0:
            yield (
                f"label_smoothing_factor: smoothing replaces the loss that the {method} looks at; remove it or the "
                f"{taker.kind}"
            )


def _streaming_problems(dynamic: DynamicConfig, lf: LlamaFactoryArgs) -> Iterator[str]:
    """Yield what cannot be done with rows that are tokenized when they are served."""
    if not lf.streaming:
        return
    stage = lf.stage
    if stage not in ("pt", "sft"):
        yield f"streaming: rows of stage {stage} are not tokenized one by one; remove it"
    if stage == "sft" and lf.packed:
        yield "packing: samples are packed after all of them were tokenized, which streaming does not do; remove one"
    if lf.tokenized_path:
        yield "streaming: rows that are tokenized when served make no tokenized copy (tokenized_path); remove one"
    if dynamic.leakage != "warn" and dynamic.targets:
        yield "dynamic.leakage: rows that are tokenized when they are served are not compared with targets; remove it"


def _takes_token_losses(dynamic: DynamicConfig) -> MethodConfig | None:
    """Return the method that makes the training loss itself: a weighter, or a mixer that observes or weighs it."""
    weighter, mixer = dynamic.weighter, dynamic.mixer
    if weighter is not None and _weighs(weighter.cls):
        return weighter
    if (
        mixer is not None
        and issubclass(mixer.cls, Mixer)
        and (mixer.cls.observes or issubclass(mixer.cls, DomainWeighter))
    ):
        return mixer
    return None


def _parallel(lf: LlamaFactoryArgs) -> Iterator[str]:
    reason = "one row would be spread over several ranks, and the plan deals out whole rows; remove it"
    for key in _PARALLEL_KEYS:
        if _above_one(lf.value(key)):
            yield f"{key}: {reason}"
    config = lf.parallelism_config
    if isinstance(config, Mapping) and any(_above_one(config.get(key)) for key in _PARALLEL_KEYS):
        yield f"parallelism_config: {reason}"


def model_problems(lf: LlamaFactoryArgs) -> Iterator[str]:
    """Yield what is wrong with the model's and the back end's paths."""
    model = lf.model_name_or_path
    if not model:
        yield "model_name_or_path: missing; give a model's folder or its name on a hub"
    elif str(model).startswith(("/", "./", "../", "~")) and not Path(str(model)).expanduser().exists():
        yield f"model_name_or_path: no such folder: {model}"
    deepspeed = lf.deepspeed
    if isinstance(deepspeed, str) and deepspeed.endswith(".json") and not Path(deepspeed).is_file():
        yield f"deepspeed: no such file: {deepspeed}"


def output_problems(lf: LlamaFactoryArgs) -> Iterator[str]:
    """Yield what speaks against the output folder and the checkpoint to resume from."""
    output = lf.output_dir
    if not output:
        yield "output_dir: missing; checkpoints, plans and the record of the run go there"
        return
    folder = Path(str(output))
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        yield f"output_dir: {above} is a file, not a folder"
    elif not os.access(above, os.W_OK | os.X_OK):
        yield f"output_dir: {above} cannot be written to; choose another folder or change its permissions"
    resume = lf.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() not in ("true", "false", "none", ""):
        if not Path(resume).is_dir():
            yield f"resume_from_checkpoint: no such folder: {resume}"
    elif resume in (True, "true", "True") and not _checkpoints(folder):
        yield (
            f"resume_from_checkpoint: {folder} holds no checkpoint-<step> folder; remove the key to start "
            "afresh (later starts go on from the newest complete checkpoint by themselves, unless "
            "'overwrite_output_dir' is on)"
        )


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name)]


def found_problems(dynamic: DynamicConfig | None, lf: LlamaFactoryArgs, base_dir: Path) -> list[str]:
    """Return all that is wrong with a configuration, its data and its surroundings, one line each.

    Args:
        dynamic: What is decided during training; None for a stock run, of which only LLaMA-Factory's keys, the model
            and the data sets are looked at.
        lf: LLaMA-Factory's keys.
        base_dir: Folder of the configuration file.
    """
    sources: list[Source] = []
    if dynamic is None:
        if not lf.do_train:
            return []  # evaluation and prediction are LLaMA-Factory's own business
        return told_once(lf, [*model_problems(lf), *data_set_problems(lf, base_dir, sources)])
    of_stage = [*stage_problems(dynamic, lf)]
    # One mistake is told once: with a wrong stage it does not matter whether the data sets are meant for it.
    staged = replace(lf, stage="") if of_stage or "stage" in map(key_of_problem, lf.problems) else lf
    found = [
        *of_stage,
        *setting_problems(dynamic, lf),
        *model_problems(lf),
        *unmet(dynamic, RunFacts(), models=True),
        *output_problems(lf),
        *data_set_problems(staged, base_dir, sources),
        *target_problems(dynamic, staged, base_dir),
        *column_problems(dynamic, lf, sources),
        *by_domain_problems(dynamic, lf),
        *domain_problems(dynamic, lf, sources),
    ]
    return told_once(lf, found)


def told_once(lf: LlamaFactoryArgs, found: Iterable[str]) -> list[str]:
    """Return the problems of LLaMA-Factory's keys and those ``found``, of each key what tells most."""
    told = [*lf.problems]
    if env_enabled("FORCE_TORCHRUN") and "WORLD_SIZE" not in os.environ:
        told += env_processes()[1]
    for more in (found, lf.doubts):
        keys = {key_of_problem(line) for line in told}
        told += [line for line in more if key_of_problem(line) not in keys]
    return told


def key_of_problem(line: str) -> str:
    """Return the key that a problem is about."""
    return line.partition(":")[0]


def _above_one(value: Any) -> bool:
    return isinstance(value, int | float) and value > 1
