"""What of an event can be relied on: values of the kind that the reader expects, within bounds, not nested without end.

A record may be damaged, written by another version, or made to harm. Readers are given only what passes here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["sound", "sound_numbers", "sound_weights"]

_MOST = 1e15
_LARGEST = 3.5e38
_LAST_SECOND = 253_402_300_799  # the year 9999
_DEPTH = 16
_BAD = object()

Check = Callable[[Any], Any]
"""Returns the value, what is left of it, or ``_BAD``."""


def _number(value: Any, least: float, most: float) -> Any:
    good = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    return value if good else _BAD


def _count(value: Any) -> Any:
    return _number(value, 0, _MOST) if isinstance(value, int) else _BAD


def _index(value: Any) -> Any:
    return _number(value, -1, _MOST) if isinstance(value, int) else _BAD


def _seconds(value: Any) -> Any:
    return _number(value, 0, _MOST)


def _moment(value: Any) -> Any:
    return _number(value, 0, _LAST_SECOND)


def _real(value: Any) -> Any:
    return _number(value, -_LARGEST, _LARGEST)


def _share(value: Any) -> Any:
    return _number(value, 0, _LARGEST)


def _text(value: Any) -> Any:
    return value if isinstance(value, str) else _BAD


def _texts(value: Any) -> Any:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else _BAD


def _each(check: Check) -> Check:
    """Return the check of a mapping from names to such values; a null stands for nothing."""

    def checked(value: Any) -> Any:
        if not isinstance(value, Mapping) or not all(
            item is None or check(item) is not _BAD for item in value.values()
        ):
            return _BAD
        return dict(value)

    return checked


def _counts(value: Any) -> Any:
    return {name: count or 0 for name, count in value.items()} if _each(_count)(value) is not _BAD else _BAD


def _spent(value: Any) -> Any:
    return {name: seconds or 0.0 for name, seconds in value.items()} if _each(_seconds)(value) is not _BAD else _BAD


def _settings(value: Any) -> Any:
    return _shallow(value, 0) if isinstance(value, Mapping) else _BAD


def _shallow(value: Any, depth: int) -> Any:
    if isinstance(value, Mapping | list) and depth > _DEPTH:
        return "..."
    if isinstance(value, Mapping):
        return {key: _shallow(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_shallow(item, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and abs(value) > _LARGEST:
        return "..."
    return value


def _metrics(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return _BAD
    return {key: None if _real(item) is _BAD else item for key, item in value.items()}  # null: not finite


def _schedule(value: Any) -> Any:
    value = _settings(value)
    return _BAD if value is _BAD or _count(value.get("total_steps") or 0) is _BAD else value


def _space(value: Any) -> Any:
    value = _settings(value)
    if value is _BAD:
        return _BAD
    checks: dict[str, Check] = {"domains": _counts, "sources": _counts, "fingerprint": _text}
    checks["tokens"] = _counts if isinstance(value.get("tokens"), Mapping) else _count
    good = {key: checks[key](item) for key, item in value.items() if key in checks and item is not None}
    return _BAD if any(item is _BAD for item in good.values()) else {**value, **good}


_REQUIRED: dict[str, dict[str, Check]] = {
    "": {"event": _text, "step": _count, "time": _moment},
    "planned": {"interval": _count, "kind": _text, "start_step": _count, "stop_step": _count, "rows": _count},
    "evaluated": {"metrics": _metrics},
    "resumed": {"checkpoint": _text},
}
_OPTIONAL: dict[str, dict[str, Check]] = {
    "": {"nonfinite": _texts, "spent": _spent},
    "run_started": {
        "config": _settings,
        "schedule": _schedule,
        "row_space": _space,
        "versions": _settings,
        "world": _count,
        "global_batch": _count,
        "run": _text,
    },
    "planned": {
        "domain_counts": _counts,
        "proportions": _each(_share),
        "scores": _each(_real),
        "served_scores": _each(_real),
        "seconds": _each(_seconds),
        "reason": _text,
        "plan": _text,
        "digest": _text,
        "decided_at_step": _count,
    },
    "stepped": {"seconds": _seconds, "loss": _real},
    "checkpointed": {"seconds": _seconds, "path": _text},
    "finished": {"metrics": _metrics, "seconds": _each(_seconds)},
}


def sound(event: Any) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the event with what can be relied on, and the keys left out; None where it says nothing without them."""
    if not isinstance(event, dict):
        return None, ["not an object"]
    kind: str = event["event"] if isinstance(event.get("event"), str) else ""
    for key, check in {**_REQUIRED[""], **_REQUIRED.get(kind, {})}.items():
        if key not in event or check(event[key]) is _BAD:
            return None, [key]
    if kind == "planned" and event["stop_step"] < event["start_step"]:
        return None, ["stop_step"]
    checks = {**_OPTIONAL[""], **_REQUIRED.get(kind, {}), **_OPTIONAL.get(kind, {})}
    if kind == "stepped":
        checks |= {key: _real for key in event if key.startswith("dataflex/")}
    kept, left_out = {}, []
    for key, value in event.items():
        found = _shallow(value, 0) if key not in checks or value is None else checks[key](value)
        if found is _BAD:
            left_out.append(key)
        else:
            kept[key] = found
    return kept, left_out


def sound_numbers(value: Any) -> dict[str, float]:
    """Return what is a number in a mapping from names to numbers; nothing of anything else."""
    found = _metrics(value)
    return {} if found is _BAD else found


def sound_weights(stored: Any) -> dict[str, Any] | None:
    """Return what ``RunRecorder.weighed`` stored, or None where it is anything else."""
    checks: dict[str, Check] = {"row": _index, "times": _count, "domain": _text, "text": _text}
    if not isinstance(stored, dict) or any(_count(stored.get(key)) is _BAD for key in ("step", "rows")):
        return None
    for part in ("most", "least"):
        if not isinstance(stored.get(part), list):
            return None
        for entry in stored[part]:
            if not isinstance(entry, dict) or any(check(entry.get(key)) is _BAD for key, check in checks.items()):
                return None
            if "weight" not in entry or (entry["weight"] is not None and _real(entry["weight"]) is _BAD):
                return None
    return stored
