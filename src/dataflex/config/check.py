"""Checks of a configuration and its data that need neither LLaMA-Factory nor a model.

The checks never stop at the first problem, so that a user corrects a configuration once. Keys that are valid but have
no effect, or another effect than expected, are reported by ``notes``.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.config.args import LlamaFactoryArgs, env_enabled, env_processes
from dataflex.config.copies import described, stale
from dataflex.config.data import (
    Source,
    columns_of,
    count_rows,
    find_sources,
    loaded_values,
    rows_problem,
    target_data_sets,
    train_rows,
    turn_weights,
)
from dataflex.config.forecast import Forecast, forecast, labelled_rows
from dataflex.config.mappings import shown
from dataflex.config.needs import FSDP2, ZERO3, optimizer_without_moments, unmet
from dataflex.config.rates import Rate
from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.errors import ConfigError, DataError, UnsupportedError, did_you_mean
from dataflex.method import STAGES, DomainWeighter, Mixer, RunFacts, Weighter
from dataflex.plan.domains import WANTED_LABELS, Domains, unusable_labels
from dataflex.plan.proportions import by_domain, floors_by_domain, read_proportions, refuse_strangers, whole_part
from dataflex.plan.schedule import Interval
from dataflex.signals.specs import losses_unknown
from dataflex.state import read_json
from dataflex.storage import place_problem
from dataflex.validate import check_mix
from dataflex.version import version_of

_REFUSED: dict[str, str] = {
    "group_by_length": "the plan decides the order of rows, so batches cannot be grouped by length; remove it",
    "auto_find_batch_size": "a plan is made for one batch size, and this changes it during the run; set the batch size",
    "use_unsloth": "it replaces the training loop that the plan is served through; remove it",
    "use_mca": "Megatron has its own training loop, which cannot be served a plan; remove it",
    "use_hyper_parallel": "it has its own training loop, which cannot be served a plan; remove it",
    "ignore_data_skip": "a resumed run continues the saved plan at its step, by itself; remove it",
}

_ADAPTED = ("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj embed_tokens lm_head").split()
"""Layers of a decoder of Llama's kind that may have adapters."""
_LOOPS = ("use_mca", "use_hyper_parallel")
"""Those without LLaMA-Factory's trainer, in which nothing can be recorded either."""

_LOSS_OF_ITS_OWN = "it computes a loss of its own, and so does the {method}; keep one of the two"
_NO_PARTS = (
    "dataloader_num_workers: LLaMA-Factory cuts a local data set that it streams into this number of parts, and 0 hold "
    "no row; write 1, or name a method"
)
_FUSED = "its fused loss gives no loss per token, which the {method} needs; remove it or the {kind}"

_REFUSED_WITH_TOKEN_LOSSES: dict[str, str] = {
    **dict.fromkeys(("use_dft_loss", "use_asft_loss", "use_eaft_loss"), _LOSS_OF_ITS_OWN),
    **dict.fromkeys(("enable_liger_kernel", "use_liger_kernel"), _FUSED),
    "label_smoothing_factor": "smoothing replaces the loss that the {method} looks at; remove it or the {kind}",
}

_QUANTIZED: dict[str, tuple[str, tuple[int, ...]]] = {
    "bnb": ("bitsandbytes", (4, 8)),
    "hqq": ("hqq", (1, 2, 3, 4, 5, 6, 8)),
    "eetq": ("eetq", (8,)),
}
"""Methods that quantize a model as it is loaded: the package of each, and the bits that it has."""

_PARALLEL_KEYS = ("sequence_parallel_size context_parallel_size cp_size sp_size ulysses_degree ulysses_size").split()
_KEPT_APART = "data sets are kept apart as domains; remove it and give proportions to a mixer (such as"
_NOT_HELD_OUT = 1e-6
"""Largest ``val_size`` that holds no rows out."""


def found_problems(dynamic: DynamicConfig | None, lf: LlamaFactoryArgs, base_dir: Path) -> list[str]:
    """Return all problems of a configuration, its data and its environment, one line each.

    Args:
        dynamic: What is decided during training; None for a stock run, of which only LLaMA-Factory's keys, the model
            and the data sets are looked at.
        lf: LLaMA-Factory's keys.
        base_dir: Folder of the configuration file.
    """
    if dynamic is None:
        if not lf.do_train:
            return []  # evaluation and prediction are LLaMA-Factory's own business
        sources, found = data_sets(lf, base_dir)
        if lf.streaming and not lf.on("dataloader_num_workers") and any(source.path is not None for source in sources):
            found = [*found, _NO_PARTS]
        if lf.stage == "ppo" and lf.reward_model is None:
            found = [*found, "reward_model: missing; stage ppo needs one"]
        return told_once(lf, [*model_problems(lf), *found])
    skip = dynamic.on_bad_shard == "skip"
    of_stage = [*stage_problems(dynamic, lf)]
    # One mistake is reported once: with a wrong stage, data sets are not compared with the stage.
    staged = lf.of_any_stage() if of_stage or "stage" in lf.problems else lf
    sources, of_data = data_sets(staged, base_dir, skip=skip)
    found = [
        *of_stage,
        *setting_problems(dynamic, lf),
        *(_stream_problems(dynamic, lf, base_dir) if dynamic.stock else ()),
        *_margins_at_the_start(dynamic, lf),
        *model_problems(lf),
        *unmet(dynamic, RunFacts(), models=True),
        *_output_problems(lf),
        *of_data,
        *target_problems(dynamic, staged, base_dir),
        *_by_domain_problems(dynamic, lf),
        *_shard_problems(dynamic, lf, base_dir),
        *_domain_problems(dynamic, lf, sources, replace(facts_of(dynamic, lf, sources), stage=staged.stage or None)),
    ]
    return told_once(lf, found)


def told_once(lf: LlamaFactoryArgs, found: Iterable[str]) -> list[str]:
    """Return the problems of LLaMA-Factory's keys and those ``found``, for each key the first kind of these."""
    told = [*lf.problems.values()]
    if env_enabled("FORCE_TORCHRUN") and "WORLD_SIZE" not in os.environ:
        told += env_processes()[1]
    return first_told(first_told(told, found), lf.doubts)


def first_told(told: Iterable[str], more: Iterable[str]) -> list[str]:
    """Return the lines ``told``, and those of ``more`` that concern other keys."""
    told = [*told]
    keys = {key_of_problem(line) for line in told}
    return [*told, *(line for line in more if key_of_problem(line) not in keys)]


def key_of_problem(line: str) -> str:
    """Return the key that a problem is about."""
    return line.partition(":")[0]


# -- LLaMA-Factory's keys beside the block --------------------------------------------------------


def stage_problems(dynamic: DynamicConfig, lf: LlamaFactoryArgs) -> Iterator[str]:
    """Yield problems of the stage and of partitioned parameters, and of methods that do not work with them."""
    if lf.stage == "ppo":
        yield (
            "stage: ppo is not supported: the policy writes its own training batches, so there are no fixed rows to "
            f"decide about; use one of {', '.join(stage for stage in STAGES if stage != 'rl')}"
        )
        return
    yield from unmet(dynamic, RunFacts(stage=lf.stage, partitioned=partitioned_by(lf)))


def partitioned_by(lf: LlamaFactoryArgs) -> str:
    """Return what partitions the parameters, or an empty string."""
    if lf.fsdp:
        config = lf.settings("fsdp_config")
        return FSDP2 if str(config.get("fsdp_version", config.get("version"))) == "2" else "fsdp"
    return ZERO3 if zero_options(lf).get("stage") == 3 else ""


def zero_options(lf: LlamaFactoryArgs) -> Mapping[str, Any]:
    """Return DeepSpeed's settings of ZeRO; empty without DeepSpeed."""
    zero = lf.settings("deepspeed").get("zero_optimization")
    return zero if isinstance(zero, Mapping) else {}


def _unsplit(lf: LlamaFactoryArgs) -> str:
    """Return what a ledger cannot account for under DeepSpeed's settings, or an empty string; ZeRO-3 is told apart."""
    zero, bf16 = zero_options(lf), lf.settings("deepspeed").get("bf16")
    if zero.get("stage") not in (1, 2, 3):
        return "the ledger reads what ZeRO-1 and 2 step, and this is neither; set zero_optimization.stage to 1 or 2"
    if zero.get("offload_optimizer"):
        return "the ledger does not read gradients that are offloaded; remove offload_optimizer, or the ledger"
    if zero["stage"] == 1 and (lf.on("bf16") or (isinstance(bf16, Mapping) and bf16.get("enabled") is True)):
        return "ZeRO-1 with bf16 has an optimizer of its own, which the ledger does not read; use ZeRO-2"
    if (lf.optim or "").startswith("sgd"):
        return "the ledger reads Adam's moments of DeepSpeed, not SGD's; use AdamW, or plain data parallelism"
    return ""


def setting_problems(dynamic: DynamicConfig, lf: LlamaFactoryArgs) -> Iterator[str]:
    """Yield the settings that a run with a ``dynamic`` block cannot follow, each with the reason."""
    if not lf.do_train:
        yield "do_train: is not on, so nothing is trained and 'dynamic' has no effect; set 'do_train: true'"
    for key, reason in _REFUSED.items():
        if lf.on(key) and (not dynamic.stock or key in _LOOPS):
            yield f"{key}: {reason}"
    if env_enabled("USE_MCA"):
        yield f"USE_MCA (environment): {_REFUSED['use_mca']}"
    if dynamic.stock:
        return
    yield from _streaming_problems(dynamic, lf)
    yield from unmet(dynamic, RunFacts(optimizer=optimizer_without_moments(lf)))
    if dynamic.ledger is not None and lf.deepspeed and not lf.fsdp and (reason := _unsplit(lf)):
        yield f"deepspeed: {reason}"
    if lf.freeze_vision_tower is False and (who := _takes_gradients(dynamic)) and _sees_images(lf):
        yield (
            f"freeze_vision_tower: {who} asks for gradients by row, and an image encoder runs on patches, not on rows; "
            "leave it frozen, or name the language model's parameters"
        )
    order = lf.train_sampling_strategy
    if order == "group_by_length":
        yield f"train_sampling_strategy: {_REFUSED['group_by_length']}"
    elif order == "sequential":
        yield "train_sampling_strategy: the plan decides the order of rows; for file order set 'disable_shuffling'"
    if lf.mix_strategy != "concat":
        yield f"mix_strategy: {lf.mix_strategy} is not supported: {_KEPT_APART} 'mixer: uniform')"
    if lf.interleave_probs is not None:
        yield f"interleave_probs: {_KEPT_APART} 'mixer: static')"
    spread = "one row would be spread over several ranks, and the plan deals out whole rows; remove it"
    config = lf.parallelism_config
    yield from (f"{key}: {spread}" for key in _PARALLEL_KEYS if _above_one(getattr(lf, key, None)))
    if isinstance(config, Mapping) and any(_above_one(config.get(key)) for key in _PARALLEL_KEYS):
        yield f"parallelism_config: {spread}"
    if lf.stage == "dpo":
        yield from _preference_problems(dynamic, lf)
    taker = takes_token_losses(dynamic)
    for key, reason in _REFUSED_WITH_TOKEN_LOSSES.items() if taker is not None else ():
        if taker is not None and lf.on(key):
            yield f"{key}: {reason.format(method=f'{taker.name} {taker.kind}', kind=taker.kind)}"


def _preference_problems(dynamic: DynamicConfig, lf: LlamaFactoryArgs) -> Iterator[str]:
    """Yield why the loss of stage dpo has no gradients by pair, or no reference model to compare with."""
    for method in dynamic.methods:
        needs = method.requires
        if "gradients" in needs.signals:
            given = {key: getattr(lf, key) for key in ("pref_loss", "pref_bco_weight", "ld_alpha")}
            for problem in losses_unknown(given):
                yield f"{problem}, and the {method.name} {method.kind} asks for such gradients"
        if "preference_logps" in needs.signals and needs.models.get("reference") is None:
            if lf.pref_loss in ("orpo", "simpo"):
                yield (
                    f"pref_loss: {lf.pref_loss} has no reference model, which {method.name} compares with; name the "
                    f"folder of one: 'reference' of the {method.kind}"
                )


def _margins_at_the_start(dynamic: DynamicConfig, lf: LlamaFactoryArgs) -> Iterator[str]:
    """Yield that margins are asked for while the policy still is its reference, so that all of them are 0."""
    for method in dynamic.methods if lf.stage == "dpo" else ():
        needs = method.requires
        own = "preference_logps" in needs.signals and needs.needs_interval  # not by a model that stays
        if (
            own
            and not needs.models.get("reference")
            and not dynamic.warmup(method.kind)
            and not lf.adapter_name_or_path
            and not lf.ref_model
        ):
            yield (
                f"dynamic.warmup_steps: missing; at step 0 the policy is its own reference, so {method.name} would "
                "find every margin 0. Train a while first (for example 'warmup_steps: 100'), or name the folder of a "
                f"model that was trained on preferences: 'policy' of the {method.kind}"
            )


def _takes_gradients(dynamic: DynamicConfig) -> str:
    """Return who asks for gradients by row of all that is trained, or an empty string."""
    for method in dynamic.methods:
        limited = any(getattr(method.params, key, None) is not None for key in ("parameters", "last_blocks"))
        if not limited and method.requires.signals & {"gradients", "in_run_norms", "in_run_scores"}:
            return f"the {method.name} {method.kind}"
    return "the ledger" if dynamic.ledger is not None and dynamic.ledger.parameters is None else ""


def _sees_images(lf: LlamaFactoryArgs) -> bool:
    """Whether the model's configuration, if it lies here, has an image encoder."""
    return "vision_config" in _of_model(lf)


def _above_one(value: Any) -> bool:
    return isinstance(value, int | float) and value > 1


def _stream_problems(dynamic: DynamicConfig, lf: LlamaFactoryArgs, base_dir: Path) -> Iterator[str]:
    """Yield why the rows of LLaMA-Factory's own stream cannot be told, from which a stock run trains."""
    if not lf.streaming:
        return
    if lf.stage not in ("pt", "sft"):
        yield f"streaming: rows of stage {lf.stage} are not told apart by their tokens; remove it"
    if lf.tokenized_path:
        yield "streaming: the rows of a tokenized copy are mapped into memory; remove one of the two"
    if dynamic.eval_by_domain:
        yield "dynamic.eval_by_domain: rows that LLaMA-Factory holds out of its stream are not told apart; remove it"
    sources, _ = find_sources(lf.train_sets, lf, "dataset", base_dir)
    if not lf.on("dataloader_num_workers") and any(source.path is not None for source in sources):
        yield _NO_PARTS


def _streaming_problems(dynamic: DynamicConfig, lf: LlamaFactoryArgs) -> Iterator[str]:
    """Yield settings that do not work with streaming, where rows are tokenized when they are served."""
    if not lf.streaming:
        return
    if lf.stage not in ("pt", "sft"):
        yield f"streaming: rows of stage {lf.stage} are not tokenized one by one; remove it"
    if lf.tokenized_path and not lf.tokenized:
        yield (
            "streaming: rows that are tokenized when served make no tokenized copy (tokenized_path); remove one of the "
            "two"
        )
    if dynamic.requires.token_weights is not None:
        yield "streaming: weights of turns and tokens are not read from streamed rows; remove it"
    if dynamic.leakage != "warn" and dynamic.targets:
        yield "dynamic.leakage: rows that are tokenized when they are served are not compared with targets; remove it"


def _shard_problems(dynamic: DynamicConfig, lf: LlamaFactoryArgs, base_dir: Path) -> Iterator[str]:
    """Yield why no shard could be left out."""
    if dynamic.on_bad_shard != "skip":
        return
    key = "dynamic.on_bad_shard"
    if lf.tokenized_path:
        yield f"{key}: a tokenized copy (tokenized_path) is made of whole data sets; remove one of the two"
        return
    sources = _all_sources(dynamic, lf, base_dir)
    if sources and all(source.path is not None and source.path.is_file() for source in sources):
        yield f"{key}: has no effect, since each data set is one file; remove it"


def _all_sources(dynamic: DynamicConfig, lf: LlamaFactoryArgs, base_dir: Path) -> list[Source]:
    """Return the data sets to train on, those to evaluate and the targets, without bad shards."""
    targets = target_data_sets(*dynamic.targets)
    names = list(dict.fromkeys([*lf.train_sets, *lf.eval_sets, *targets]))
    return find_sources(names, lf, "dataset", base_dir, skip=True)[0]


def takes_token_losses(dynamic: DynamicConfig) -> MethodConfig | None:
    """Return a method for which the training loss is made here: it weighs losses, or they tell it of its data."""
    weighter, mixer = dynamic.weighter, dynamic.mixer
    if weighter is not None and issubclass(weighter.cls, Weighter) and not weighter.cls.neutral:
        return weighter
    if mixer is not None and issubclass(mixer.cls, Mixer):
        if mixer.cls.observes or issubclass(mixer.cls, DomainWeighter):
            return mixer
    return dynamic.watches or next((each for each in dynamic.methods if each.requires.row_weights is not None), None)


def model_problems(lf: LlamaFactoryArgs) -> Iterator[str]:
    """Yield problems of the path of the model, and of an optimizer under FSDP2."""
    model = lf.model_name_or_path
    if not model:
        yield "model_name_or_path: missing; give a model's folder or its name on a hub"
    elif str(model).startswith(("/", "./", "../", "~")) and not Path(str(model)).expanduser().exists():
        yield f"model_name_or_path: no such folder: {model}"
    yield from _quantization_problems(lf)
    yield from _adapter_problems(lf)
    if lf.on("shift_attn") and _of_model(lf).get("model_type") == "llama":
        yield "shift_attn: LLaMA-Factory has it for transformers below 4.48, and asks for newer ones; remove the key"
    if lf.on("use_muon") and partitioned_by(lf) == FSDP2:
        told = "LLaMA-Factory's Muon loses its state where FSDP2 replaces the parameters, and fails in the first step"
        yield f"use_muon: {told}; use plain data parallelism, or an AdamW optimizer"


def _adapter_problems(lf: LlamaFactoryArgs) -> Iterator[str]:
    if lf.finetuning_type not in ("lora", "oft") or _of_model(lf).get("model_type") not in (
        "llama",
        "mistral",
        "qwen2",
    ):
        return
    given = getattr(lf, f"{lf.finetuning_type}_target")
    names = given if isinstance(given, list | tuple) else [name.strip() for name in str(given).split(",")]
    if not {name.rsplit(".", 1)[-1] for name in names} & {"all", *_ADAPTED}:
        near = next((found for name in names if (found := did_you_mean(name, _ADAPTED))), "")
        yield f"{lf.finetuning_type}_target: the model has no layer {' or '.join(map(repr, names))}{near}"


def _of_model(lf: LlamaFactoryArgs) -> Mapping[str, Any]:
    """Return the configuration of a model in a folder; empty where it is not known."""
    try:
        found = read_json(Path(str(lf.model_name_or_path)).expanduser() / "config.json")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _quantization_problems(lf: LlamaFactoryArgs) -> Iterator[str]:
    """Yield problems of quantizing a model as it is loaded; one that is quantized already stays as it is."""
    bits, method = lf.quantization_bit, lf.quantization_method or "bnb"
    if bits is None or method not in _QUANTIZED or "quantization_config" in _of_model(lf):
        return
    package, allowed = _QUANTIZED[method]
    if bits not in allowed:
        yield f"quantization_bit: {method} has {', '.join(map(str, allowed))}, found {bits}"
    elif version_of(package) is None:
        yield f"quantization_bit: {method} needs {package}, which is not installed"


def _output_problems(lf: LlamaFactoryArgs) -> Iterator[str]:
    """Yield problems of the output folder and of the checkpoint to resume from."""
    if not lf.output_dir:
        yield "output_dir: missing; checkpoints, plans and the record of the run go there"
        return
    folder = Path(str(lf.output_dir))
    if told := place_problem(folder / "file"):
        yield f"output_dir: {told}"
    resume = lf.resume_from_checkpoint
    inside = folder.iterdir() if folder.is_dir() else ()
    if isinstance(resume, str) and resume.lower() not in ("true", "false", "none", ""):
        if not Path(resume).is_dir():
            yield f"resume_from_checkpoint: no such folder: {resume}"
    elif resume in (True, "true", "True"):
        if not any(path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name) for path in inside):
            yield (
                f"resume_from_checkpoint: {folder} holds no checkpoint-<step> folder; remove the key to start "
                "afresh (later starts go on from the newest complete checkpoint by themselves, unless "
                "'overwrite_output_dir' is on)"
            )


# -- data sets ------------------------------------------------------------------------------------


def data_sets(lf: LlamaFactoryArgs, base_dir: Path, *, skip: bool = False) -> tuple[list[Source], list[str]]:
    """Return the data sets to train on (none if one of them is missing), and the problems of all that are named.

    ``skip``: whether shards that cannot be read are left out.
    """
    problems = [f"{key}: {told}" for key in ("dataset", "eval_dataset") if (told := _empty_name(getattr(lf, key)))]
    problems += _held_out_problems(lf, base_dir, skip)
    names = lf.train_sets
    if lf.tokenized:
        return [Source(name=name) for name in names], [*problems, *stale(lf, base_dir)]
    if not names:
        told = "dataset: missing; name one or more data sets of dataset_info.json, with commas between them"
        return [], [*problems, told]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        problems.append(f"dataset: names {', '.join(twice)} twice; to see rows more often, use a mixer or more epochs")
    sources, missing = find_sources(list(dict.fromkeys(names)), lf, "dataset", base_dir, skip=skip)
    problems += [*missing, *_without_rows(sources, lf, "dataset", lf.stage)]
    if missing:
        return [], problems
    counts = [count_rows(source, lf) for source in sources]
    if any(counts) and train_rows(counts, lf) == 0:
        problems.append(f"val_size: {shown(lf.val_size)} sets aside all {sum(filter(None, counts)):,} rows; lower it")
    return sources, problems


def _empty_name(value: Any) -> str:
    """Return why a value cannot be read as names of data sets, or an empty text."""
    given = value.split(",") if isinstance(value, str) else value
    if given is None:
        return ""
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        return f"expected the names of data sets, with commas between them, found {shown(value)}"
    if all(name.strip() for name in given):
        return ""
    return f"a name is empty in {shown(value)}; write one comma between two names"


def _without_rows(sources: Sequence[Source], lf: LlamaFactoryArgs, key: str, stage: str | None) -> Iterator[str]:
    for source in sources:
        if source.path is not None and count_rows(source, lf) == 0:
            yield f"{key}: {source.name!r} has no rows ({source.path})"
        else:
            whole = source.split == "train" and source.num_samples is None and lf.max_samples is None
            told = rows_problem(source, stage, every=whole)
            yield from [f"{key}: {source.name!r} {told}"] if told else []


def _held_out_problems(lf: LlamaFactoryArgs, base_dir: Path, skip: bool) -> Iterator[str]:
    """Yield problems of the held-out rows, and keys that need held-out rows where there are none."""
    named, share = lf.eval_sets, lf.val_size
    if named and share > _NOT_HELD_OUT:
        yield "val_size: cannot be given together with eval_dataset; remove one of the two"
    if share < 0 or (share >= 1 and share != int(share)):
        yield f"val_size: expected a share below 1 or a whole number of rows, found {shown(lf.val_size)}"
    sources, problems = find_sources(named, lf, "eval_dataset", base_dir, skip=skip) if named else ([], [])
    yield from (problem for problem in problems if not problem.startswith("dataset_dir:") or lf.tokenized)
    # Generation needs no response.
    yield from _without_rows(sources, lf, "eval_dataset", "" if lf.on("predict_with_generate") else lf.stage)
    if lf.eval_dataset or share > _NOT_HELD_OUT or lf.tokenized:
        return
    for key in ("eval_strategy", "do_eval", "do_predict", "eval_on_start"):
        if getattr(lf, key) not in ("no", False):
            yield f"{key}: no rows are held out; name an 'eval_dataset', set 'val_size', or remove the key"


def _by_domain_problems(dynamic: DynamicConfig, lf: LlamaFactoryArgs) -> Iterator[str]:
    """Yield why held-out rows cannot be told apart by domain, or split from several data sets."""
    several, share = len(lf.train_sets) > 1, lf.val_size
    if lf.tokenized:
        return
    if several and share > _NOT_HELD_OUT and not dynamic.stock:
        for key in ("predict_with_generate", "streaming"):
            if lf.on(key):
                yield f"val_size: with {key} over several data sets there is no split; name an 'eval_dataset' instead"
    if not dynamic.eval_by_domain or lf.eval_dataset:
        return
    if share <= _NOT_HELD_OUT:
        yield "dynamic.eval_by_domain: no rows are held out; name an 'eval_dataset', or set 'val_size'"
    elif dynamic.domain_column is None and not several:
        yield (
            "dynamic.eval_by_domain: the held-out rows are of one data set; name a 'domain_column', or several data "
            "sets"
        )


def target_problems(dynamic: DynamicConfig, lf: LlamaFactoryArgs, base_dir: Path) -> Iterator[str]:
    """Yield the targets that are not defined, whose files are missing, or that have no rows."""
    for key, targets in dynamic.targets_by_key.items():
        named, skip = _data_sets_of(key, targets, dynamic), dynamic.on_bad_shard == "skip"
        sources, problems = find_sources(named, lf, key, base_dir, skip=skip)
        # That there is no dataset_dir is told once, for the training data.
        yield from (problem for problem in problems if not problem.startswith("dataset_dir:"))
        yield from _without_rows(sources, LlamaFactoryArgs(), key, lf.stage)
    if dynamic.leakage == "error":
        for key, name, other in _targets_in_training(dynamic, lf, base_dir):
            same = "is also trained on" if name == other else f"has the file of {other!r}, which is trained on"
            yield f"{key}: {name!r} {same}, and dynamic.leakage is 'error'; remove it from one of the two"


def _data_sets_of(key: str, targets: Iterable[str], dynamic: DynamicConfig) -> list[str]:
    """Return the data sets of a key's targets; those of the ledger that a method has too are told once."""
    told = {name for method in dynamic.methods for name in method.targets} if key == "dynamic.ledger.targets" else ()
    return [*target_data_sets(*(target for target in targets if target not in told))]


def _targets_in_training(
    dynamic: DynamicConfig, lf: LlamaFactoryArgs, base_dir: Path
) -> Iterator[tuple[str, str, str]]:
    """Yield key and name of each target that is a training data set too, and the name of that data set."""
    trained, _ = find_sources(lf.train_sets, lf, "dataset", base_dir)
    names = {source.name: source.name for source in trained}
    files = {source.path.resolve(): source.name for source in trained if source.path is not None}
    for key, targets in dynamic.targets_by_key.items():
        for source in find_sources(_data_sets_of(key, targets, dynamic), lf, "", base_dir)[0]:
            same_file = None if source.path is None else files.get(source.path.resolve())
            other = names.get(source.name, same_file)
            if other is not None:
                yield key, source.name, other


# -- domains and rows -----------------------------------------------------------------------------


def recorded_by_document(dynamic: DynamicConfig, lf: LlamaFactoryArgs) -> bool:
    """Return whether the record of a stock run tells the documents of its packed rows apart."""
    if not dynamic.stock or not lf.packed or lf.stage not in ("pt", "sft"):
        return False
    several = len(lf.train_sets) > 1 or not dynamic.domains_are_sources
    return lf.streaming or (several and not lf.tokenized_path and not dynamic.eval_by_domain)


def facts_of(dynamic: DynamicConfig, lf: LlamaFactoryArgs, sources: Sequence[Source]) -> RunFacts:
    """Return what is known about the rows of a run before they are loaded."""
    copied, copy = lf.bare_copy, described(lf)
    columns = {source.name: columns_of(source.path) for source in sources if source.path is not None}
    if copy is not None:
        columns = {f"tokenized copy {lf.tokenized_path}": frozenset(copy["columns"])}
    labelled = labelled_rows(dynamic, lf, sources)
    num_domains = None if labelled is None else len(labelled)
    if sources and dynamic.domains_are_sources:
        num_domains = 1 if copied else len(sources)
    return RunFacts(
        packed=lf.packed and not recorded_by_document(dynamic, lf),
        copied=copied,
        columns={name: known for name, known in columns.items() if known is not None},
        num_domains=num_domains,
    )


def _turn_problems(dynamic: DynamicConfig, lf: LlamaFactoryArgs, sources: Sequence[Source]) -> Iterator[str]:
    """Yield that messages have no weights, or the first that cannot be used, where local JSON Lines show it."""
    asked = dynamic.requires.token_weights
    if asked is None or asked[0] != "turn" or lf.bare_copy:
        return
    if lf.tokenized_path:
        yield f"tokenized_path: a tokenized copy does not keep the {asked[1]!r} of messages; remove it"
        return
    name, found = asked[1], [turn_weights(source, asked[1]) for source in sources]
    yield from (f"dynamic.weighter: {told}" for _, told in found if told)
    if found and all(there is False for there, _ in found):
        listed = ", ".join(repr(source.name) for source in sources)
        yield f"dynamic.weighter.column: no message of {listed} has a {name!r}; give its messages one, or name another"


def _domain_problems(
    dynamic: DynamicConfig, lf: LlamaFactoryArgs, sources: list[Source], facts: RunFacts
) -> Iterator[str]:
    """Yield problems of the columns, the domains, their proportions, and the number of rows."""
    lacking = [*unmet(dynamic, facts)]
    yield from lacking
    if not sources:
        return
    if not lacking and not lf.packed and not lf.tokenized:
        yield from _value_problems(dynamic, lf, sources)
        yield from _score_problems(dynamic, sources)
    yield from _turn_problems(dynamic, lf, sources)
    if dynamic.unit == "documents" and lf.packed and not dynamic.domains_are_sources:
        yield (
            "dynamic.unit: rows hold several documents under packing, which are counted by data set only; let the data "
            "sets be the domains, or set 'packing: false'"
        )
    try:
        view = forecast(dynamic, lf, sources)
    except DataError as error:
        yield f"per_device_train_batch_size: {error}"
        return
    if dynamic.mixer is not None and facts.num_domains is not None:
        if facts.num_domains < max(2, dynamic.requires.domains):
            return  # told already
        yield from _mixture_problems(dynamic, view, [*(view.labelled or view.counts)])
    elif dynamic.mixer is not None and dynamic.domain_column is not None:
        file = getattr(dynamic.mixer.params, "from_file", None)
        yield from () if file is None else _raised(lambda: read_proportions(file, "dynamic.mixer.from"))
    yield from _too_few_rows(dynamic, view)
    yield from _too_small_budget(dynamic, view)
    yield from unmet(dynamic, RunFacts(total_steps=view.steps, num_rows=view.rows))


def _value_problems(dynamic: DynamicConfig, lf: LlamaFactoryArgs, sources: Sequence[Source]) -> Iterator[str]:
    """Yield the first value of a column that a method cannot use, where the rows that are trained on are known."""
    if lf.val_size > _NOT_HELD_OUT:
        return
    asked: list[tuple[str, str, Callable[[str, NDArray[Any]], tuple[NDArray[np.bool_], str] | None]]] = [
        (f"dynamic.{method.kind}", name, method.build().refused_values)
        for method in dynamic.methods
        for name in method.requires.columns
    ]
    if dynamic.domain_column is not None:
        asked.append(("dynamic.domain_column", dynamic.domain_column, _refused_labels))
    for key, name, refuses in asked:
        for source in sources:
            found = loaded_values(source, lf, name)
            if not found:
                continue
            values = np.empty(len(found), dtype=object)
            values[:] = [value for _, value in found]
            refused = refuses(name, values)
            if refused is None or not refused[0].any():
                continue
            bad, wanted = refused
            place, value = found[int(np.flatnonzero(bad)[0])]
            others = f" (and {int(bad.sum()) - 1:,} more rows)" if bad.sum() > 1 else ""
            yield f"{key}: data set {source.name!r}, {place}, has {name} = {shown(value)}{others}; {wanted}"


def _refused_labels(_: str, labels: NDArray[Any]) -> tuple[NDArray[np.bool_], str]:
    return unusable_labels(labels), WANTED_LABELS


def _score_problems(dynamic: DynamicConfig, sources: Sequence[Source]) -> Iterator[str]:
    """Yield files of scores that are of other data sets or files; whether rows are the same is known once loaded."""
    from dataflex.config.files import file_records
    from dataflex.score_table import read_scores

    names = [source.name for source in sources]
    for method in dynamic.methods:
        for wanted in method.requires.score_files:
            try:
                scored = read_scores(Path(wanted.file).expanduser()).provenance["data"]["sources"]
            except DataError:
                continue  # told already
            place = f"dynamic.{method.kind}: scores in {wanted.file}"
            if (of := [record["name"] for record in scored]) != names:
                yield f"{place}: they are of the rows of {', '.join(of)}, and {', '.join(names)} is trained on"
                continue
            for source, record in zip(sources, scored, strict=True):
                files = [(file.size, file.blake2b) for file in file_records(source.path)]
                if files and files != [(file["size"], file["blake2b"]) for file in record["files"]]:
                    yield f"{place}: {source.path} of {source.name!r} is another file than was scored; score it again"


def _raised(check: Callable[[], object]) -> list[str]:
    """Return the problems that a function raises."""
    try:
        check()
    except ConfigError as error:
        return error.problems
    return []


def _mixture_problems(dynamic: DynamicConfig, view: Forecast, names: list[str]) -> Iterator[str]:
    """Yield what the mixer itself finds wrong; where sizes are unknown, each domain counts as one row."""
    domains = view.domains or Domains.from_sizes(names, [1] * len(names))
    written, caps, least = dynamic.initial_proportions, dynamic.max_epochs, dynamic.min_proportion
    if written is not None:
        yield from _raised(lambda: by_domain(written, domains.names, "dynamic.initial_proportions"))
    if isinstance(caps, Mapping):
        yield from _raised(lambda: refuse_strangers(caps, names, "dynamic.max_epochs"))
    of_floors = _raised(lambda: floors_by_domain(least, names))
    if of_floors:
        if not isinstance(least, Mapping) or not any("sum to" in line for line in of_floors):  # told by the rules
            yield from of_floors
        return
    assert dynamic.mixer is not None
    mixer = dynamic.mixer.build()
    assert isinstance(mixer, Mixer)
    interval = view.first_decision("mixer") or Interval(index=0, kind="dynamic", start_step=0, stop_step=1)
    try:
        check_mix(mixer, mixer.mix(view.context(interval, domains)), domains.names)
        yield from _too_small_domains(dynamic, view, mixer)
    except ConfigError as error:
        yield from error.problems
    except DataError as error:
        if view.domains is not None and view.steps is not None and dynamic.unit != "tokens":
            yield f"dynamic.mixer: {error}"
    except UnsupportedError:
        return  # it looks at the model: what it will say is not known yet


def _too_few_rows(dynamic: DynamicConfig, view: Forecast) -> Iterator[str]:
    """Yield that a selector without a mixer cannot fill an interval."""
    selector, first = dynamic.selector, view.first_decision("selector")
    if (
        selector is None
        or not dynamic.selects_subset
        or dynamic.mixer is not None
        or view.rows is None
        or first is None
    ):
        return
    size, pool = view.batch.global_batch, view.pool
    wanted = first.steps * size
    if dynamic.candidate_batches is not None:
        looked_at = dynamic.candidate_batches * wanted
        if looked_at > view.rows:
            yield (
                f"dynamic.candidate_batches: {dynamic.candidate_batches} x {first.steps:,} steps x {size:,} "
                f"rows are {looked_at:,} candidates, and the data sets hold {view.rows:,} rows; lower it, or "
                "interval_steps"
            )
        return
    replaces = asdict(selector.params).get("replacement") is True
    if dynamic.repeat or dynamic.keep_ratio is not None or replaces or pool is None or wanted <= pool.left:
        return
    fitting = pool.left // size
    narrowed = "pool_fraction and screen_fraction leave"
    left = f", of which dynamic.signals.{narrowed} {pool.left:,}" if pool.left < pool.rows else ""
    own, fixed = selector.every is not None, dynamic.every(selector) is not None
    way, key = "Lower" if fixed else "Set", "every" if own else "interval_steps"
    advice = f"{way} {key} to {fitting:,} or less, or set" if fitting else "Use smaller batches, or set"
    yield (
        f"dynamic.{'selector.' * own}{key}: an interval of {first.steps:,} steps wants {wanted:,} rows, and the data "
        f"sets hold {view.rows:,}{left}. {advice} 'repeat: true'."
    )


def _too_small_budget(dynamic: DynamicConfig, view: Forecast) -> Iterator[str]:
    """Yield that a budget does not pay for one row of each target in the whole run."""
    budget, selector = dynamic.signals.budget, dynamic.selector
    if budget is None or selector is None or not view.sequences or "gradients" not in selector.requires.signals:
        return
    paid, asked = budget * view.sequences, len(selector.targets)
    if paid < asked:
        rows = "one target row" if asked == 1 else f"one row of each of {asked} targets"
        yield (
            f"dynamic.signals.budget: {budget:g} of {view.sequences:,} sequences pays for {paid:.2g} rows, and the run "
            f"looks at {rows} at least; raise it to {math.ceil(1000 * asked / view.sequences) / 1000:g} or more"
        )


def _too_small_domains(dynamic: DynamicConfig, view: Forecast, mixer: Mixer) -> Iterator[str]:
    """Yield the domains that cannot fill their share of an interval: a selected row is served once."""
    first, domains, pool = view.first_decision("selector"), view.domains, view.pool
    if not dynamic.selects_subset or dynamic.repeat or dynamic.unit == "tokens" or domains is None or first is None:
        return
    total = len(domains.domain_of)
    kept = max(1, round((dynamic.keep_ratio or 1.0) * (total if pool is None else pool.left)))
    stretches = [(first.steps, view.mixed(mixer, first), kept)]
    if warmup := dynamic.warmup("mixer"):
        stretches.append((warmup, view.warmup_shares(domains, mixer), total))
    for steps, shares, most in stretches:
        for name, share, rows in zip(domains.names, shares, domains.num_rows, strict=True):
            wanted, there = whole_part(share, steps * view.batch.global_batch), min(int(rows), most)
            if wanted > there:
                yield (
                    f"dynamic.mixer: {steps:,} steps want {wanted:,} rows of domain {name!r}, and at most {there:,} of "
                    "it are left by the selector. Lower interval_steps (or warmup_steps) or set 'repeat: true'."
                )


# -- notes ----------------------------------------------------------------------------------------


def notes(dynamic: DynamicConfig, lf: LlamaFactoryArgs, base_dir: Path) -> Iterator[str]:
    """Yield what ``plan``, and ``train`` at its start, report about a configuration without problems, one line each."""
    if not ({"LOCAL_RANK", "WORLD_SIZE"} & set(os.environ) or env_enabled("FORCE_TORCHRUN")):
        for key in ("deepspeed", "ddp_backend"):
            if lf.on(key):
                told = "it needs FORCE_TORCHRUN=1 in the environment of 'dataflex train'"
                yield f"{key}: with one device, or none, {told}"
    yield from _notes_on_data(dynamic, lf, base_dir)
    yield from _notes_on_the_block(dynamic, lf)
    yield from _note_on_the_rate(dynamic, lf)
    if dynamic.stock:
        yield from _notes_on_a_record(dynamic, lf)
        return
    beside = "no effect beside 'dynamic'"
    for key in ("data_seed", "dataloader_persistent_workers"):
        if lf.on(key):
            yield f"{key}: {beside}, which serves the rows itself ('seed' draws them)"
    config = lf.accelerator_config if isinstance(lf.accelerator_config, Mapping) else {}
    for key, usual in (("split_batches", False), ("dispatch_batches", None), ("even_batches", True)):
        if config.get(key, usual) != usual:
            yield f"accelerator_config.{key}: {beside}, which deals out the rows itself"
    sources, _ = find_sources(lf.train_sets, lf, "dataset", base_dir) if lf.streaming else ([], [])
    for name in (source.name for source in sources if source.path is None):
        yield f"streaming: the files of {name!r} are fetched first, whole: its rows are read at any place"
    if lf.streaming and lf.tokenized:
        yield "streaming: no effect on a tokenized copy, whose rows are mapped into memory"
    if "buffer_size" in lf and lf.streaming:
        yield f"buffer_size: {beside}: streamed rows are read at any place, so all can be shuffled"
    if lf.dataloader_drop_last and dynamic.full_steps:
        yield "dataloader_drop_last: no effect here: every step is full"


def _note_on_the_rate(dynamic: DynamicConfig, lf: LlamaFactoryArgs) -> Iterator[str]:
    """Yield a note where rows are ordered and the rate has all but fallen when the last of them come."""
    if dynamic.orderer is None or dynamic.orderer.name == "shuffle":
        return
    share = Rate.of(lf).late_share()
    if share < 0.125:
        yield (
            f"lr_scheduler_type: under {lf.lr_scheduler_type} the last quarter of the steps has {share:.1%} of the "
            "learning rate, so that rows that the order puts last move the model little; 'cosine_with_min_lr' with "
            "'lr_scheduler_kwargs: {min_lr_rate: 0.33}' gives it 13.7%, 'constant' 25%"
        )


def _notes_on_the_block(dynamic: DynamicConfig, lf: LlamaFactoryArgs) -> Iterator[str]:
    mixer, signals = dynamic.mixer, dynamic.signals
    decides_once = not dynamic.requires.needs_interval and not (dynamic.paces and mixer is not None)
    if not dynamic.selects_subset and decides_once:
        own = next((each for each in (mixer, dynamic.orderer) if each is not None and each.every is not None), None)
        if dynamic.interval_steps is not None or own is not None:
            key = "interval_steps" if dynamic.interval_steps is not None or own is None else f"{own.kind}.every"
            alone = mixer is None and dynamic.selector is None
            alone = alone and dynamic.orderer is None
            told = "a weighter alone" if alone else "methods that decide once for all"
            yield f"dynamic.{key}: no effect with {told}"
        if dynamic.warmup("mixer") and mixer is not None and dynamic.initial_proportions is None:
            yield f"dynamic.warmup_steps: no effect, since the {mixer.name} mixer has the same proportions throughout"
    asks = dynamic.requires.signals - {"texts"} or signals.screen_fraction < 1.0
    for key, given in (("max_age_steps", signals.max_age_steps > 0), ("store", signals.store is not None)):
        if given and not asks:
            yield f"dynamic.signals.{key}: no effect, since no method says that it asks the model about rows"
    if dynamic.unit == "documents" and not lf.packed:
        yield "dynamic.unit: no effect without packing, where every row is one document"
    if dynamic.leakage != "warn" and lf.packed and not lf.tokenized:
        yield "dynamic.leakage: no effect under packing, where no row is equal to a target row"
    if dynamic.early_stopping_min_delta > 0 and not lf.early_stopping_steps:
        yield "dynamic.early_stopping_min_delta: no effect without LLaMA-Factory's 'early_stopping_steps'"
    if dynamic.eval_by_domain and not lf.evaluates:
        yield "dynamic.eval_by_domain: no effect, since nothing is evaluated; set 'eval_strategy' or 'do_eval'"


def _notes_on_a_record(dynamic: DynamicConfig, lf: LlamaFactoryArgs) -> Iterator[str]:
    """Yield what the record of a stock run will lack."""
    lacks = "the record of this run has no losses by domain"
    if lf.stage not in ("pt", "sft"):
        yield f"stage: rows of stage {lf.stage} have no token losses, so {lacks}"
    for key in ("enable_liger_kernel", "use_liger_kernel"):
        if lf.on(key):
            yield f"{key}: its fused loss keeps no token losses, so {lacks}"
    mixed = lf.packed and not recorded_by_document(dynamic, lf) and not lf.tokenized
    if mixed and len(lf.train_sets) > 1 and dynamic.domains_are_sources:
        yield (
            f"packing: a packed row may hold samples of several of {', '.join(lf.train_sets)}, so in the record they "
            "are one domain, 'all'"
        )


def _notes_on_data(dynamic: DynamicConfig, lf: LlamaFactoryArgs, base_dir: Path) -> Iterator[str]:
    then = {
        "warn": "what is selected towards it is, in part, the target itself",
        "error": "the run would end",
        "drop": "all its rows leave the training set ('leakage: drop')",
    }[dynamic.leakage]
    for key, name, other in _targets_in_training(dynamic, lf, base_dir):
        same = "" if name == other else f" (its file is that of {other!r})"
        yield f"{key}: {name!r} is also trained on{same}; {then}"
    for source in _all_sources(dynamic, lf, base_dir) if dynamic.on_bad_shard == "skip" else ():
        yield from (f"dataset: {source.name!r} {bad}; it is left out" for bad in source.bad)
    names = lf.train_sets
    for name in lf.eval_sets:
        if name in names:
            yield f"eval_dataset: {name!r} is also trained on; its loss is not one of held-out rows"
    if lf.bare_copy and len(names) > 1 and dynamic.domains_are_sources:
        listed = ", ".join(names)
        yield (
            f"tokenized_path: a copy made by LLaMA-Factory alone does not say which of {listed} a row is from: all are "
            "one domain, 'all'; name a folder that is not there yet to make one that does"
        )
    if lf.max_samples is not None and dynamic.targets:
        yield f"max_samples: cuts training and evaluation sets; targets ({', '.join(dynamic.targets)}) are taken whole"
