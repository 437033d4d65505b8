"""LLaMA-Factory's keys of a run, converted to their types, with every problem noted.

LLaMA-Factory takes a value as YAML gave it. Values that it would misread are corrected here and passed on: YAML's
``no`` (false) for a text, text for a switch, 1e3 for a whole number, a number for a text, null for a default.
"""

from __future__ import annotations

import base64
import errno
import glob
import importlib.util
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dataflex.config.mappings import is_number, shown
from dataflex.config.table import Key, accelerator_keys, defaults, table
from dataflex.errors import did_you_mean
from dataflex.state import loads_json, read_json
from dataflex.version import install, version_of

_ON, _OFF = ("true", "yes", "on", "1"), ("false", "no", "off", "0", "")
_EXPECTED = {
    **{"bool": "true or false", "int": "a whole number", "float": "a number"},
    **{"str": "text", "list": "a list", "dict": "a mapping"},
}
_ALSO: dict[str, tuple[str, ...]] = {
    "dataset_dir": ("dict",),
    "fsdp": ("bool",),
    "resume_from_checkpoint": ("bool",),
    "logging_dir": ("bool",),
}
"""Types that LLaMA-Factory and the Trainer accept in addition to the declared ones."""
_PATHS = (
    "adapter_name_or_path cache_dir dataset_dir logging_dir media_dir model_name_or_path output_dir "
    "resume_from_checkpoint tokenized_path"
).split()
_MOST = 2**63 - 1
_MOST_STEPS = 2**31 - 1
_RANGES: dict[str, tuple[float, float]] = {
    key: (least, most)
    for least, most, keys in (
        (0, 1, "adam_beta1 adam_beta2 label_smoothing_factor lora_dropout warmup_ratio"),
        (0, math.inf, "adam_epsilon learning_rate max_grad_norm warmup_steps weight_decay"),
        (0, 2**15, "dataloader_num_workers"),
        (0, 2**32 - 1, "seed"),
        (0, _MOST_STEPS, "num_train_epochs"),
        (-1, _MOST_STEPS, "max_steps"),
        (1, _MOST_STEPS, "gradient_accumulation_steps per_device_eval_batch_size per_device_train_batch_size"),
        (1, 2**15, "preprocessing_num_workers ray_num_workers"),
        (1, _MOST, "buffer_size cutoff_len dataloader_prefetch_factor early_stopping_steps eval_accumulation_steps"),
        (1, _MOST, "eval_num_beams lora_rank max_samples preprocessing_batch_size torch_empty_cache_steps"),
    )
    for key in keys.split()
}
"""Smallest and largest value with which a run works; LLaMA-Factory itself declares none."""
_MAY_BE_INFINITE = ("max_grad_norm",)
_PACKAGES = {
    "enable_liger_kernel": ("liger_kernel",),
    "predict_with_generate": ("jieba", "nltk", "rouge_chinese"),
    **{f"use_{name}": (name,) for name in ("adam_mini", "badam", "swanlab", "unsloth")},
    **{f"use_{name}": (f"{name}_torch",) for name in ("apollo", "galore")},
    "mixture_of_depths": ("MoD",),
    "use_kt": ("kt_kernel",),
}
_TRACKERS = {
    **{"azure_ml": ("azureml",), "dagshub": ("dagshub", "mlflow"), "flyte": ("flytekit",)},
    **{"tensorboard": ("tensorboard or tensorboardX",), "none": (), "all": (), "kubeflow": ()},
}
"""Packages that a tracker of ``report_to`` needs, where it is not the one of its name."""
_OF_NUMBERS = ("interleave_probs",)
_WORKS_WITH: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "finetuning_type",
        ("lora",),
        ("adapter_name_or_path", "loraplus_lr_ratio", "use_rslora", "use_dora", "pissa_init"),
    ),
    ("finetuning_type", ("lora", "oft"), ("quantization_bit",)),
    ("finetuning_type", ("lora", "oft", "freeze"), ("use_llama_pro",)),
    ("finetuning_type", ("full", "oft", "freeze"), ("use_galore", "use_apollo", "use_badam")),
    ("stage", ("sft",), ("predict_with_generate", "neat_packing", "train_on_prompt", "mask_history")),
    ("mix_strategy", ("interleave_under", "interleave_over", "interleave_once"), ("interleave_probs",)),
)
"""A key, its values, and the keys that work with these values only."""
_APART = (
    ("use_apollo", "use_galore"),
    ("use_badam", "use_galore"),
    ("use_badam", "use_apollo"),
    ("mask_history", "train_on_prompt"),
    ("compute_accuracy", "predict_with_generate"),
    ("max_samples", "streaming"),
    ("bf16", "fp16"),
    ("bf16_full_eval", "fp16_full_eval"),
    *[(key, "quantization_bit") for key in ("pissa_init", "resize_vocab", "create_new_adapter", "fp8")],
)
_ONE_OF = dict.fromkeys(("ref_model_quantization_bit", "reward_model_quantization_bit"), (4, 8))
_SCHEDULE_KEYS: Mapping[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("min_lr", "min_lr_rate", "num_cycles"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate", "num_cycles", "warmup_lr_rate"),
    "warmup_stable_decay": (
        "num_decay_steps",
        "num_stable_steps",
        "warmup_type",
        "decay_type",
        "min_lr_ratio",
        "num_cycles",
    ),
}
"""What ``lr_scheduler_kwargs`` may hold; others take anything, or do not look at it."""
_MAY_BE_NULL = ("timescale", "min_lr", "min_lr_rate", "warmup_lr_rate", "num_stable_steps")
_DEBUG = ("underflow_overflow", "tpu_metrics_debug")
_SHAPES = ("linear", "cosine", "1-sqrt")
_FILES = ("new_special_tokens_config",)
"""Keys whose texts are paths of files."""
_SETTINGS = {
    **dict.fromkeys(("accelerator_config", "deepspeed", "fsdp_config"), True),
    **dict.fromkeys(("gradient_checkpointing_kwargs", "lr_scheduler_kwargs", "ray_init_kwargs"), False),
}
"""Keys that hold a mapping or its JSON, and whether their texts may be paths of JSON files."""
_DEVICES = ("/dev/nvidia[0-9]* /dev/dxg /dev/kfd /dev/dri/renderD* /dev/davinci* /dev/accel* /dev/neuron*").split()
_OTHER_DEVICES = ("torch_npu", "torch_musa", "torch_mlu", "torch_xla", "habana_frameworks")


def env_enabled(name: str, default: str = "0") -> bool:
    """Whether an environment variable is on, as LLaMA-Factory reads it."""
    return os.getenv(name, default).lower() in ("true", "y", "1")


def data_set_names(value: str | list[str] | None) -> tuple[str, ...]:
    """Return the names of data sets given as a list, or as text with commas."""
    given = value.split(",") if isinstance(value, str) else value or ()
    return tuple(str(name).strip() for name in given if str(name).strip())


@dataclass(frozen=True, eq=False, kw_only=True)
class LlamaFactoryArgs(Mapping[str, Any]):
    """LLaMA-Factory's keys. The mapping holds what was written; attributes, one for each, what applies in a run."""

    given: Mapping[str, Any] = field(default_factory=dict)  # keys that were written, converted
    problems: Mapping[str, str] = field(default_factory=dict)  # keys with a value that they do not take, and why
    doubts: tuple[str, ...] = ()  # unknown keys, and those that LLaMA-Factory or the Trainer refuses beside others

    @classmethod
    def read(cls, mapping: Mapping[str, Any]) -> LlamaFactoryArgs:
        """Return the keys of a configuration without its ``dynamic`` block; those already read as they are."""
        if isinstance(mapping, LlamaFactoryArgs):
            return mapping
        known = table()
        extra = env_enabled("ALLOW_EXTRA_ARGS") or env_enabled("USE_MCA") or not known
        given: dict[str, Any] = {}
        problems: dict[str, str] = {}
        unknown: list[str] = []
        for key, value in mapping.items():
            if key == "dynamic":
                continue
            entry = known.get(key)
            if entry is None and not extra:
                near = did_you_mean(key, ["dynamic", *known])
                unknown.append(f"{key}: unknown key{near} (neither LLaMA-Factory's nor 'dynamic')")
            elif entry is not None:
                value, problem = convert(key, value, entry)
                if problem:
                    problems[key] = problem
                elif value is None and not entry.nullable:
                    continue
            given[key] = value
        read = cls(given=given, problems=problems)
        return replace(read, doubts=(*unknown, *read._together()))

    def __getattr__(self, key: str) -> Any:
        """Return what applies in the run: the default of a key without a value that it takes."""
        if key.startswith("_") or (key not in self.given and key not in defaults()):
            raise AttributeError(f"LLaMA-Factory has no key {key!r}")
        # A misplaced null means the default, as for LLaMA-Factory's own parser.
        given = None if key in self.problems else self.given.get(key)
        return defaults().get(key) if given is None else given

    def __getitem__(self, key: str) -> Any:
        return self.given[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)

    def on(self, key: str) -> bool:
        """Whether a switch is on; one that this version of LLaMA-Factory does not have is off."""
        return bool(getattr(self, key, False))

    def settings(self, key: str) -> Mapping[str, Any]:
        """Return the mapping that one of ``_SETTINGS`` holds or names the file of; empty without a readable one."""
        return self._settings(key)[0]

    def _settings(self, key: str) -> tuple[Mapping[str, Any], str]:
        """Return that mapping, and what is wrong with the key or an empty text."""
        given = found = getattr(self, key)
        if isinstance(given, str):
            try:
                found = _settings_of(given, files=_SETTINGS[key])
            except OSError as error:
                return {}, f"{error.strerror or error}: {given}"
            except ValueError as error:
                told = f"{shown(given)} ({error})" if _SETTINGS[key] or given.startswith("{") else shown(given)
                return {}, f"expected a mapping, found {told}"
        if isinstance(found, Mapping):
            return found, ""
        return {}, "" if found is None else f"expected a mapping, found {shown(found)}"

    def of_any_stage(self) -> LlamaFactoryArgs:
        """Return the same without a stage, for checks where that is wrong itself."""
        problems = {key: told for key, told in self.problems.items() if key != "stage"}
        return replace(self, given={**self.given, "stage": ""}, problems=problems)

    @property
    def train_sets(self) -> tuple[str, ...]:
        """Names in ``dataset``."""
        return data_set_names(self.dataset)

    @property
    def eval_sets(self) -> tuple[str, ...]:
        """Names in ``eval_dataset``."""
        return data_set_names(self.eval_dataset)

    @property
    def packed(self) -> bool:
        """Whether several samples share a row; pre-training packs unless told otherwise."""
        return self.neat_packing or (self.stage == "pt" if self.packing is None else self.packing)

    @property
    def tokenized(self) -> bool:
        """Whether the run reads a tokenized copy instead of the data sets."""
        path = self.tokenized_path
        return isinstance(path, str) and os.path.isdir(path) and bool(os.listdir(path))

    @property
    def bare_copy(self) -> bool:
        """Whether that copy was made by LLaMA-Factory alone: nothing tells where its rows are from."""
        return self.tokenized and not os.path.isfile(os.path.join(self.tokenized_path, "dataflex", "copy.json"))

    @property
    def evaluates(self) -> bool:
        """Whether held-out rows are evaluated during training."""
        return self.eval_strategy != "no" or self.do_eval or self.eval_on_start

    def _together(self) -> Iterator[str]:
        """Yield combinations of valid keys that LLaMA-Factory or the Trainer refuses."""
        for other, allowed, keys in _WORKS_WITH:
            found = getattr(self, other)
            if found not in allowed:
                told = f"works with {other} {' or '.join(allowed)} only, found {found}"
                yield from (f"{key}: {told}" for key in keys if self.on(key))
        for key, other in _APART:
            if self.on(key) and self.on(other):
                yield f"{key}: does not work together with {other}; remove one of the two"
        yield from self._of_stage_and_data()
        yield from self._of_the_model()
        yield from self._of_the_trainer()
        for key, packages in _PACKAGES.items():
            if self.on(key):
                yield from _not_installed(f"{key}:", packages)
        yield from self._of_trackers()

    def _of_trackers(self) -> Iterator[str]:
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        for name in names:
            if name in ("all", "none") and len(names) > 1:
                yield f"report_to: {name!r} stands alone; remove it, or the others"
            if name == "kubeflow" and "KUBEFLOW_TRAINER_SERVER_URL" not in os.environ:
                yield "report_to: kubeflow needs the environment variable KUBEFLOW_TRAINER_SERVER_URL"
            yield from _not_installed(f"report_to: {name}", _TRACKERS.get(name, (name,)))

    def _of_stage_and_data(self) -> Iterator[str]:
        if self.stage == "dpo" and self.pref_loss != "sigmoid" and self.on("dpo_label_smoothing"):
            yield "dpo_label_smoothing: works with pref_loss sigmoid only"
        if self.streaming and self.max_steps < 1:
            yield "streaming: the length of the run must be given; set 'max_steps'"
        if self.streaming and 1e-6 < self.val_size < 1:
            yield "val_size: with streaming it must be a whole number of rows"
        for key in ("image", "video"):
            least, most = getattr(self, f"{key}_min_pixels"), getattr(self, f"{key}_max_pixels")
            if None not in (least, most) and most < least:
                yield f"{key}_max_pixels: must be at least {key}_min_pixels ({least}), found {most}"
        if self.stage == "sft" and self.do_predict and not self.predict_with_generate:
            yield "do_predict: at stage sft it needs 'predict_with_generate: true'"
        shares = len(data_set_names(self.interleave_probs))
        for key, names in (("dataset", self.train_sets), ("eval_dataset", self.eval_sets)):
            if shares and self.mix_strategy != "concat" and names and len(names) != shares:
                yield f"interleave_probs: expected {len(names)} numbers, one for each name in {key}, found {shares}"

    def _of_the_model(self) -> Iterator[str]:
        for key, values in _ONE_OF.items():
            if getattr(self, key) not in (None, *values):
                yield f"{key}: must be {' or '.join(map(str, values))}, found {getattr(self, key)}"
        frozen = self.finetuning_type == "freeze" or self.on("use_llama_pro")
        if frozen and self.freeze_trainable_layers == 0 and not self.freeze_extra_modules:
            yield "freeze_trainable_layers: with 0 nothing is trained; give a number of layers"
        if self.infer_backend not in (None, "huggingface"):
            yield f"infer_backend: training works with huggingface only, found {self.infer_backend}"
        if self.flash_attn == "fa3":
            yield "flash_attn: LLaMA-Factory fails with fa3, which it sets itself where a model has it; use fa2 or auto"
        if self.quantization_device_map == "auto":
            yield "quantization_device_map: is for inference, not for training; remove it"
        if self.export_quantization_bit is not None and self.export_quantization_dataset is None:
            yield "export_quantization_bit: needs 'export_quantization_dataset'"
        referring = self.stage == "dpo" and self.pref_loss not in ("orpo", "simpo")
        if self.on("pissa_init") and (self.stage in ("ppo", "kto") or referring):
            yield f"pissa_init: does not work with stage {self.stage}, whose reference is the model without adapter"
        for key in _FILES:
            path = getattr(self, key)
            if isinstance(path, str) and not os.path.isfile(path):
                yield f"{key}: no such file: {path}"
        for key in _SETTINGS:
            if problem := self._settings(key)[1]:
                yield f"{key}: {problem}"
        if (given := self.settings("accelerator_config")) and (known := accelerator_keys()):
            for key in sorted(set(given) - set(known)):
                yield f"accelerator_config.{key}: unknown key{did_you_mean(key, known)}"
        zero = self.settings("deepspeed").get("zero_optimization")
        if isinstance(zero, Mapping):
            if isinstance(zero.get("stage"), bool) or zero.get("stage", 0) not in (0, 1, 2, 3):
                yield f"deepspeed.zero_optimization.stage: expected 0, 1, 2 or 3, found {shown(zero['stage'])}"
        elif self.settings("deepspeed"):
            told = "missing" if zero is None else f"expected a mapping, found {shown(zero)}"
            yield f"deepspeed.zero_optimization: {told}; write it as in '{{stage: 2}}'"

    def _of_the_trainer(self) -> Iterator[str]:
        for name in ("logging", "eval", "save"):
            steps, strategy = getattr(self, f"{name}_steps"), getattr(self, f"{name}_strategy")
            if strategy == "steps" and isinstance(steps, int | float):
                if steps > 1 and steps != int(steps):
                    yield f"{name}_steps: must be a whole number or a share of the run below 1, found {shown(steps)}"
                elif steps < 0 or (steps == 0 and name == "logging"):
                    yield f"{name}_steps: must be above 0, found {shown(steps)}"
        for key in ("bf16", "bf16_full_eval", "pure_bf16"):
            if self.on(key) and (not self.use_cpu or key == "pure_bf16") and not _device_is_possible():
                way = "train in fp32" if key == "pure_bf16" else "set 'use_cpu: true' to train in bf16 on the CPU"
                yield f"{key}: this machine has no device that computes in bf16; {way}, or remove the key"
        for key in ("fp16", "tf32"):
            if self.on(key) and (self.use_cpu or not _device_is_possible()):
                yield f"{key}: needs a GPU; remove the key"
        if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy") and self.eval_strategy == "no":
            yield f"lr_scheduler_type: {self.lr_scheduler_type} goes by evaluation losses; set 'eval_strategy'"
        yield from self._of_the_schedule()
        for name in self.debug.split() if isinstance(self.debug, str) else self.debug:
            if name not in _DEBUG:
                yield f"debug: {name!r} is none of {', '.join(_DEBUG)}{did_you_mean(str(name), _DEBUG)}"
        best = self.on("load_best_model_at_end")
        if best and self.stage == "rm":
            yield "load_best_model_at_end: does not work with stage rm"
        elif best and self.save_strategy not in ("best", self.eval_strategy):
            yield (
                f"load_best_model_at_end: needs save_strategy and eval_strategy to be the same, found "
                f"{self.save_strategy} and {self.eval_strategy}"
            )
        elif best and self.eval_strategy == "steps" and self.save_strategy == "steps":
            evaluated, saved = self.eval_steps or self.logging_steps, self.save_steps
            if (round(saved * 1_000_000) % max(round(evaluated * 1_000_000), 1)) or (saved < 1) != (evaluated < 1):
                yield f"save_steps: load_best_model_at_end needs a multiple of eval_steps ({shown(evaluated)})"
        if self.early_stopping_steps is not None:
            if self.eval_strategy == "no":
                yield "early_stopping_steps: nothing is evaluated; set 'eval_strategy'"
            if not self.given.get("metric_for_best_model") and not best:
                yield "early_stopping_steps: needs 'metric_for_best_model' or 'load_best_model_at_end: true'"
        if self.dataloader_prefetch_factor is not None and not self.on("dataloader_num_workers"):
            yield "dataloader_prefetch_factor: needs 'dataloader_num_workers' of at least 1"

    def _of_the_schedule(self) -> Iterator[str]:
        key, given, name = "lr_scheduler_kwargs", self.settings("lr_scheduler_kwargs"), str(self.lr_scheduler_type)
        known = _SCHEDULE_KEYS.get(name, tuple(given))
        for each in given:
            if each not in known:
                listed = f"takes {', '.join(known)}" if known else "takes none"
                yield f"{key}.{each}: unknown key{did_you_mean(str(each), known)} (lr_scheduler_type {name} {listed})"
            elif name in _SCHEDULE_KEYS and (problem := _schedule_problem(each, given[each])):
                yield f"{key}.{each}: {problem}, found {shown(given[each])}"
        if name == "polynomial" and not {each for each in given if _schedule_problem(each, given[each])}:
            if (least := given.get("lr_end", 1e-7)) >= self.learning_rate:
                yield f"{key}.lr_end: must be below learning_rate ({self.learning_rate:g}), found {least:g}"
        if name.endswith("with_min_lr") and (given.get("min_lr") is None) == (given.get("min_lr_rate") is None):
            yield f"{key}: lr_scheduler_type {name} needs one of min_lr and min_lr_rate, as in '{{min_lr_rate: 0.1}}'"


def _schedule_problem(key: str, value: Any) -> str:
    """Return what a schedule expects in place of a value of ``lr_scheduler_kwargs``, or an empty text."""
    if key.endswith("_type"):
        return "" if value in _SHAPES else f"expected {', '.join(_SHAPES[:-1])} or {_SHAPES[-1]}"
    if value is None and key in _MAY_BE_NULL:
        return ""
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MOST
    if key.endswith("_steps"):
        return "" if number and value >= 0 and value == int(value) else "expected a number of steps"
    return "" if number else "expected a number"


def _settings_of(text: str, *, files: bool) -> Any:
    """Return what a text holds that is JSON, JSON in base64 or the path of a JSON file; the last two ``files`` only.

    Raises:
        OSError: A file cannot be read.
        ValueError: It is nothing of these.
    """
    if text.startswith("{"):
        return loads_json(text)
    if not files:
        raise ValueError("it is no JSON")
    if os.path.exists(text):
        return read_json(Path(text))
    try:
        return loads_json(base64.urlsafe_b64decode(text).decode())
    except ValueError as error:
        raise FileNotFoundError(errno.ENOENT, "no such file") from error


def _not_installed(what: str, packages: Sequence[str]) -> Iterator[str]:
    """Yield which packages are missing, of which ``a or b`` is one of either name."""
    missing = [each for each in packages if not any(importlib.util.find_spec(name) for name in each.split(" or "))]
    if missing:
        told = ", ".join(missing).replace("_", "-")
        yield f"{what} needs {told}, which {'is' if len(missing) == 1 else 'are'} not installed"


def convert(key: str, value: Any, entry: Key) -> tuple[Any, str]:
    """Return the value to pass to LLaMA-Factory, and what is wrong with it or an empty text."""
    types = (*entry.types, *_ALSO.get(key, ()))
    if value is None or not entry.types:
        return value, ""
    if key == "eval_dataset" and value in ([], ()):
        return None, ""  # LLaMA-Factory would join no data sets to one
    if value is False and "bool" not in types:
        if off := next((text for text in ("no", "none") if text in (entry.choices or ())), ""):
            return off, ""
        if entry.nullable and "str" in types and entry.choices is None:
            return value, ""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if "bool" in types and "str" not in types and (isinstance(value, str) or number):
        text = str(value).strip().lower()
        if text in (*_ON, *_OFF):
            return text in _ON, ""
    if number and {"int", "float"} & set(types):
        return _number(key, value, types)
    if number and types == ("str",) and entry.choices is None:
        value = str(value)
    shapes: dict[str, Any] = {"bool": bool, "str": str, "list": list | tuple, "dict": Mapping}
    if not any(isinstance(value, shapes[name]) for name in types if name in shapes):
        quoted = isinstance(value, str) and is_number(value) and {"int", "float"} & set(types)
        told = f"the text {shown(value)}; write it without quotes" if quoted else shown(value)
        return value, f"{key}: expected {' or '.join(_EXPECTED[name] for name in types)}, found {told}"
    items = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
    shape, what = (str | int | float, "numbers") if key in _OF_NUMBERS else (str, "texts")
    for item in items:
        if not isinstance(item, shape):
            return value, f"{key}: expected a list of {what}, found {shown(item)} in it"
        if entry.choices is not None and item not in entry.choices:
            near = did_you_mean(item, entry.choices)
            listed = "" if len(entry.choices) > 30 else f" (choices: {', '.join(entry.choices)})"
            return value, f"{key}: {shown(item)} is not one of the {len(entry.choices)} choices{near}{listed}"
    problem = path_problem(value) if key in _PATHS and isinstance(value, str) else ""
    return value, f"{key}: {problem}" if problem else ""


def _number(key: str, value: float, types: tuple[str, ...]) -> tuple[Any, str]:
    least, most = _RANGES.get(key, (-_MOST, _MOST))
    infinite_ok = key in _MAY_BE_INFINITE
    whole = "float" not in types
    if math.isnan(value) or (math.isinf(value) and not infinite_ok) or (whole and value != math.floor(value)):
        return value, f"{key}: expected a {'whole number' if whole else 'number'}, found {shown(value)}"
    value = int(value) if whole else value
    if value < least:
        return value, f"{key}: must be at least {least:g}, found {shown(value)}"
    if value > most and not (infinite_ok and math.isinf(value)):
        return value, f"{key}: must be at most {most:,}, found {shown(value)}"
    return (float(value) if key.startswith("adam_beta") else value), ""  # torch takes a 0.0 and no 0


def path_problem(path: str) -> str:
    """Return why no file can have this path, or an empty text."""
    if "\0" in path:
        return "holds a NUL character, which no path may"
    longest = max(path.split("/"), key=len)
    if len(longest.encode(errors="surrogatepass")) > 255:
        return f"holds a name of {len(longest):,} characters, and a file system takes at most 255"
    return "is longer than 4,095 characters" if len(path) > 4095 else ""


def _device_is_possible() -> bool:
    """Whether this machine may have a device that computes in bf16; False only where it certainly has none."""
    if sys.platform != "linux" or any(importlib.util.find_spec(name) for name in _OTHER_DEVICES):
        return True
    torch = version_of("torch")
    return torch is None or (not torch.endswith("+cpu") and any(glob.glob(pattern) for pattern in _DEVICES))


def env_processes() -> tuple[int, list[str]]:
    """Return the number of processes that the environment requests from torchrun, and problems of these variables."""
    total, problems = 1, []
    for name, words in (("NPROC_PER_NODE", ("auto", "cpu", "gpu", "xpu")), ("NNODES", ())):
        text = os.environ.get(name, "1")
        if text in words or (name == "NNODES" and all(part.isdigit() for part in text.split(":", 1))):
            total *= int(text.partition(":")[0]) if text not in words else 1
        elif text.isdigit() and 0 < int(text) < 2**15:
            total *= int(text)
        else:
            problems.append(f"{name} (environment): expected a whole number of at least 1, found {shown(text)}")
    return total, problems


def ray_problems() -> list[str]:
    """Return why ``USE_RAY`` cannot start training from this machine.

    Without an accelerator LLaMA-Factory asks Ray for ten processors for each processor of the cluster, and waits.
    """
    missing = _not_installed("USE_RAY (environment)", ("ray",))
    problems = [f"{told}; install the extra: {install('ray')}" for told in missing]
    if not _device_is_possible():
        way = "start it on a machine with one, or use FORCE_TORCHRUN=1"
        problems.append(f"USE_RAY (environment): LLaMA-Factory's workers need an accelerator, and here is none; {way}")
    return problems
