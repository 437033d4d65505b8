"""Values of LLaMA-Factory's keys that its parser takes as they are, and that end in a traceback where they are used."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping
from typing import Any

from dataflex.config.convert import shown
from dataflex.config.values import truthy

__all__ = ["number_problems", "package_problems"]

_WHOLE: dict[str, int] = {
    "buffer_size": 1,
    "cutoff_len": 1,
    "eval_num_beams": 1,
    "gradient_accumulation_steps": 1,
    "max_samples": 1,
    "max_steps": -1,
    "per_device_eval_batch_size": 1,
    "per_device_train_batch_size": 1,
    "preprocessing_batch_size": 1,
    "preprocessing_num_workers": 1,
    "seed": 0,
}
"""Keys that take a whole number, with the least that makes sense."""
_NUMBERS: tuple[str, ...] = ("learning_rate", "num_train_epochs", "val_size")
_METRICS: tuple[str, ...] = ("jieba", "nltk", "rouge_chinese")


def number_problems(lf: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys that hold text, a fraction or too small a number where a number is expected."""
    for key, least in _WHOLE.items():
        value = lf.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value != math.floor(value):
            yield f"{key}: expected a whole number, found {_told(value)}"
        elif value < least:
            yield f"{key}: must be at least {least}, found {shown(value)}"
    for key in _NUMBERS:
        value = lf.get(key)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
        ):
            yield f"{key}: expected a number, found {_told(value)}"


def _told(value: Any) -> str:
    quoted = isinstance(value, str) and value.strip().replace(".", "", 1).isdigit()
    return f"the text {value!r}; write it without quotes" if quoted else shown(value)


def package_problems(lf: Mapping[str, Any]) -> Iterator[str]:
    """Yield the packages that generated answers are measured with and that are not installed."""
    if not truthy(lf, "predict_with_generate"):
        return
    missing = [name for name in _METRICS if importlib.util.find_spec(name) is None]
    if missing:
        told = ", ".join(name.replace("_", "-") for name in missing)
        yield f"predict_with_generate: LLaMA-Factory measures answers with {told}, which are not installed"
