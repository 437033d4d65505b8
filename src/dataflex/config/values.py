"""Reads single values of LLaMA-Factory's keys the way its parser would, without it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

__all__ = ["env_enabled", "number", "truthy"]


def truthy(lf: Mapping[str, Any], key: str) -> bool:
    """Whether a switch is on."""
    value = lf.get(key)
    return value.strip().lower() in ("true", "yes", "1") if isinstance(value, str) else bool(value)


def number(lf: Mapping[str, Any], key: str, default: float) -> float:
    """Return a number, also when it is written as text; the default where it is absent or no number."""
    value = lf.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return default
    try:
        return float(value)
    except ValueError:
        return default


def env_enabled(name: str) -> bool:
    """Whether an environment variable is on, as LLaMA-Factory reads it."""
    return os.getenv(name, "0").lower() in ("true", "y", "1")
