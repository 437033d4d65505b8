"""Configurations of LLaMA-Factory v1: told by their keys, and read as the keys of v0 that mean the same.

Checks, forecasts, the record and resuming know v0's keys, so a v1 file is translated for them; what v1 cannot do, and
what is not served under it, is refused here. Nothing of LLaMA-Factory is imported: v1's keys are read from its source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dataflex.config.args import LlamaFactoryArgs, convert, env_enabled
from dataflex.config.data import INFO_FILE, contents_of
from dataflex.config.forecast import batch_of
from dataflex.config.mappings import shown
from dataflex.config.needs import elsewhere
from dataflex.config.schema import DynamicConfig
from dataflex.config.table import table, v1_table
from dataflex.errors import did_you_mean
from dataflex.state import loads_json, read_json
from dataflex.version import install

_TOLD = ("model", "train_dataset")
"""Keys that v1 has and v0 has not."""
_V0 = ("model_name_or_path", "dataset")
_NAMES = {
    "model_name_or_path": "model",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size",
    "dataset_dir": "train_dataset",
    "dataset": "train_dataset",
    "deepspeed": "dist_config",
    "fsdp": "dist_config",
}
"""Keys of v0, and those of v1 that are told in their place."""
_SAME = (
    "cutoff_len learning_rate num_train_epochs max_steps max_grad_norm seed output_dir save_steps save_total_limit "
    "logging_steps"
).split()
_FORMATS: Mapping[str | None, dict[str, Any]] = {
    None: {"formatting": "sharegpt", "columns": {"messages": "messages"}},
    "alpaca": {"columns": {"response": "output"}},
    "sharegpt": {"formatting": "sharegpt", "columns": {"messages": "conversations"}},
}
"""v1's converters of single answers, as v0 would describe their files."""
_PAIRS: Mapping[str | None, dict[str, Any]] = {
    converter: {
        **{"formatting": "sharegpt", "ranking": True},
        "columns": {"messages": f"chosen{more}", "chosen": f"chosen{more}", "rejected": f"rejected{more}"},
    }
    for converter, more in ((None, "_messages"), ("pair", ""))
}
"""The same of pairs of answers, each of which v1 keeps as a whole conversation."""
_EVALUATES = (
    "do_eval do_predict eval_delay eval_on_start eval_steps eval_strategy load_best_model_at_end "
    "per_device_eval_batch_size predict_with_generate val_size"
).split()
SERVED = ("sft", "rm")
"""Stages with a trainer in v1, which has no such key: there the command names it (``llamafactory-cli rm``)."""
_STAGES = {
    "pt": "v1 has no pre-training",
    "dpo": "v1's own trainer of preferences is not written yet ('llamafactory-cli dpo' says so)",
    "kto": "v1 has no such trainer",
    "ppo": "v1 has no such trainer",
}
_INSTEAD = "remove it, or use the keys of LLaMA-Factory v0"
SEES_BOTH = (
    "stage: in LLaMA-Factory v1's trainer of reward models a rejected answer sees the chosen one before it, since its "
    "mask of documents is one of padding to transformers 5; v0's trainer keeps the two apart"
)
"""A fault of v1, told of every run that it concerns."""


def is_v1(mapping: Mapping[str, Any]) -> bool:
    """Whether a configuration is LLaMA-Factory v1's, by its keys or by ``USE_V1``."""
    return env_enabled("USE_V1") or (any(key in mapping for key in _TOLD) and not any(key in mapping for key in _V0))


def named(line: str) -> str:
    """Return a problem or a note with v1's names of keys."""
    key, colon, told = line.partition(":")
    for ours, theirs in _NAMES.items():
        told = told if ours == "dataset" else re.sub(rf"\b{ours}\b", theirs, told)
    told = told.replace(INFO_FILE, "the data sets of train_dataset and eval_dataset")
    return f"{_NAMES.get(key, key)}{colon}{told}"


def translated(mapping: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a v1 configuration by v0's keys, the ``dynamic`` block as it is, and all problems of v1's keys."""
    ours = {"dynamic": mapping["dynamic"]} if "dynamic" in mapping else {}
    if not v1_table():
        return ours, [f"model: LLaMA-Factory v1 is not installed: {install('llamafactory')}"]
    given, problems = _checked(mapping)
    pairs = str(mapping.get("stage")) in ("rm", "dpo")
    lf: dict[str, Any] = {"stage": str(mapping["stage"]) if pairs else "sft", "do_train": True}
    lf["model_name_or_path"] = given["model"]
    lf |= {key: given[key] for key in _SAME if given.get(key) is not None}
    lf["save_strategy"] = "no" if given.get("save_steps") is None else "steps"
    if str(given.get("resume_from_checkpoint") or "auto") != "auto":
        lf["resume_from_checkpoint"] = given["resume_from_checkpoint"]
    peft = given.get("peft_config")
    lf["finetuning_type"] = "full" if not peft else "freeze" if _name(peft) == "freeze" else "lora"
    micro, whole = given["micro_batch_size"], given.get("global_batch_size")
    ranks = batch_of(LlamaFactoryArgs()).world
    if whole is not None and whole % max(micro * ranks, 1):
        told = f"must be a multiple of micro_batch_size x processes ({micro} x {ranks}), found {whole}"
        problems.append(f"global_batch_size: {told}")
    lf["per_device_train_batch_size"] = micro
    lf["gradient_accumulation_steps"] = 1 if whole is None else max(1, whole // max(micro * ranks, 1))
    sharded, of_shards = _sharded(given.get("dist_config"))
    lf, problems = {**lf, **sharded}, [*problems, *of_shards]
    train, of_train = _entries("train_dataset", given, _PAIRS if pairs else _FORMATS)
    other, of_other = _entries("eval_dataset", given, _PAIRS if pairs else _FORMATS)
    both = ", ".join(name for name in other if name in train and other[name] != train[name])
    problems += [*of_train, *of_other, *([f"eval_dataset: {both}: of this name is a training set too"] if both else [])]
    lf["dataset_dir"] = {**other, **train}
    if train:
        lf["dataset"] = [*train]
    return {**lf, **ours}, problems


def _checked(mapping: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return v1's keys with its defaults, those of unusable values too, and the problems of what is written."""
    known, given, problems = v1_table(), {}, []
    for key, value in mapping.items():
        if key == "dynamic" or (key == "stage" and value in SERVED):
            continue
        if key == "stage":
            told = _STAGES.get(str(value), f"there is no stage {shown(value)}")
            problems.append(f"stage: LLaMA-Factory v1 trains {' and '.join(SERVED)}, and {told}; {_INSTEAD}")
        elif key in _EVALUATES or (key.startswith("eval_") and key != "eval_dataset"):
            problems.append(f"{key}: LLaMA-Factory v1 evaluates nothing during training; {_INSTEAD}")
        elif key not in known:
            theirs = f"; in v1 it is '{_NAMES[key]}'" if key in _NAMES else did_you_mean(key, ["dynamic", *known])
            theirs = theirs or (" (it is one of v0's)" if key in table() else "")
            problems.append(f"{key}: LLaMA-Factory v1 has no such key{theirs}")
        else:
            given[key], problem = convert(key, value, known[key])
            if problem:
                problems.append(problem)
                del given[key]
    written = {key: value for key, value in given.items() if value is not None}
    return {**{key: entry.default for key, entry in known.items()}, "output_dir": None, **written}, problems


def _plugin(value: Any) -> Mapping[str, Any]:
    """Return the settings of a plugin, which may be written as JSON."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = loads_json(value)
        except ValueError:
            return {}
    return value if isinstance(value, Mapping) else {}


def _name(plugin: Any) -> str:
    return str(_plugin(plugin).get("name", "")) or str(plugin)


def _sharded(plugin: Any) -> tuple[dict[str, Any], list[str]]:
    """Return by v0's keys what shards the model, and problems; DeepSpeed's precision is what v1 makes of it."""
    if not plugin:
        return {}, []
    if _name(plugin) == "fsdp2":
        return {"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2}}, []
    if _name(plugin) != "deepspeed":
        return {}, [f"dist_config: LLaMA-Factory v1 has fsdp2 and deepspeed, not {_name(plugin)}"]
    file = _plugin(plugin).get("config_file")
    if not isinstance(file, str) or not file:
        return {}, ["dist_config: deepspeed needs a 'config_file'"]
    try:
        config = read_json(Path(file))
    except OSError:
        return {}, [f"dist_config: no such file: {file}"]
    except ValueError as error:
        return {}, [f"dist_config: {file} cannot be read: {str(error).splitlines()[0]}"]
    if not isinstance(config, dict):
        return {}, [f"dist_config: {file} must hold a mapping"]
    given = [str(_enabled(config, key)).lower() for key in ("bf16", "fp16")]
    return {"deepspeed": {**config, "bf16": {"enabled": given[0] == "true" or "false" not in given}}}, []


def _enabled(config: Mapping[str, Any], key: str) -> Any:
    part = config.get(key)
    return part.get("enabled", "auto") if isinstance(part, Mapping) else "auto"


def _entries(
    key: str, given: Mapping[str, Any], formats: Mapping[str | None, dict[str, Any]]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the data sets that a key names, as ``dataset_info.json`` would describe them, and problems."""
    import yaml

    path = given.get(key)
    if not path:
        return {}, []
    infos: Any = {"default": {"path": path, "source": "local"} if Path(path).exists() else {"path": path}}
    if path.endswith(".yaml"):
        if not Path(path).is_file():
            told = f"no such file: {path} (relative to the working directory {Path.cwd()})"
            return {}, [] if path.count("/") == 2 and path[0] not in "./~" else [f"{key}: {told}"]  # a hub's
        try:
            infos = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            return {}, [f"{key}: {path} cannot be read: {str(error).splitlines()[0]}"]
    if not isinstance(infos, Mapping) or not infos:
        return {}, [f"{key}: {path} must map names of data sets to their description"]
    found, problems = {}, []
    for name, info in infos.items():
        if not isinstance(info, Mapping) or not isinstance(info.get("path"), str):
            problems.append(f"{key}: {name!r} in {path} must be a mapping with a 'path'")
        elif info.get("streaming"):
            problems.append(f"{key}: {name!r} is streamed, and rows must be read in any order; remove 'streaming'")
        elif info.get("converter") not in formats:
            others = ", ".join(str(each) for each in formats if each)
            wanted = "pairs of answers, which stage rm takes" if formats is _PAIRS else "answers to train on"
            told = f"has the converter {info['converter']!r}, whose rows are not {wanted} (known: {others})"
            problems.append(f"{key}: {name!r} {told}")
        else:
            converter = info.get("converter")
            found[str(name)] = {**_entry(info), **formats[converter], "converter": converter}
    return found, problems


def _entry(info: Mapping[str, Any]) -> dict[str, Any]:
    local = info.get("source", "hf_hub") == "local"
    entry = {"file_name" if local else "hf_hub_url": info["path"], "split": str(info.get("split") or "train")}
    size, weight = info.get("size"), info.get("weight")
    if weight is not None and size is None and local and Path(info["path"]).exists():
        counts = [each.rows for each in contents_of(Path(info["path"])).values()]
        size = sum(count or 0 for count in counts)
    if size is not None:
        entry["num_samples"] = int(size * (1 if weight is None else weight))
    return entry


def refused(dynamic: DynamicConfig | None, mapping: Mapping[str, Any]) -> Iterator[str]:
    """Yield what of a v1 configuration is not served with a ``dynamic`` block; None where that is broken."""
    if mapping.get("eval_dataset") and dynamic is not None and not dynamic.targets:
        yield (
            "eval_dataset: LLaMA-Factory v1 evaluates nothing, and no method names a target, which would be looked up "
            "there; remove it"
        )
    for key, usual in (("batching_strategy", "normal"), ("model_class", "llm")):
        if (value := mapping.get(key)) not in (None, usual) and (key, mapping.get("stage")) != ("model_class", "rm"):
            yield f"{key}: {shown(value)} is not served: a plan deals out rows of a language model; remove it"
    if str(size := _plugin(mapping.get("dist_config")).get("cp_size", 1)) != "1":
        yield f"dist_config: cp_size: {shown(size)} is not served: every rank must be a data-parallel one; remove it"
    if mapping.get("stage") == "rm" and (peft := mapping.get("peft_config")) and _name(peft) != "freeze":
        yield (
            "peft_config: LLaMA-Factory v1 makes an adapter for a model that writes text, which a reward model is not "
            "(it ends with AttributeError); remove it, or use the keys of LLaMA-Factory v0"
        )
    for line in () if dynamic is None else elsewhere(dynamic):
        yield f"{line.partition(':')[0]}: has no effect under LLaMA-Factory v1; remove it"
    if dynamic is not None and dynamic.requires.token_weights is not None:
        what = dynamic.requires.token_weights[0]
        yield (
            f"dynamic.weighter: weights of single {what}s are v1's own: give messages a 'loss_weight', and remove the "
            "weighter"
        )
