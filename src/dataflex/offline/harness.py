"""Tasks of lm-eval (the extra of that name) in ``dataflex eval``: local task files, asked of the model as loaded."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dataflex.errors import DataError
from dataflex.record.text import number, table
from dataflex.version import install


def task_problems(paths: Sequence[Path]) -> list[str]:
    """Return why task files cannot be run here; imports nothing of lm-eval."""
    found = [f"--tasks: no such file: {path}" for path in paths if not path.is_file()]
    if paths and importlib.util.find_spec("lm_eval") is None:
        found.append(f"--tasks: lm-eval is not installed; install the extra: {install('lm-eval')}")
    return found


def run_tasks(paths: Sequence[Path], model: Any, tokenizer: Any, batch_size: int) -> list[dict[str, Any]]:
    """Return ``task``, ``questions`` and ``metrics`` of every task and group (``lm_eval.simple_evaluate``).

    Prompts are those of the task files, without the template. Every rank runs all of them.

    Raises:
        DataError: A task cannot be loaded or run.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    given = {"task_manager": TaskManager(include_defaults=False), "bootstrap_iters": 0, "log_samples": False}
    reader = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = simple_evaluate(reader, tasks=[str(path) for path in paths], **given)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        NotImplementedError,
    ) as error:  # all that a file may cause
        raise DataError(f"--tasks: lm-eval ended with {type(error).__name__}: {error}") from error
    counts = found["n-samples"]
    return [
        {"task": name, "questions": counts.get(name, {}).get("effective"), "metrics": _metrics(values)}
        for name, values in found["results"].items()
    ]


def _metrics(values: Mapping[str, Any]) -> dict[str, float | None]:
    """Return metrics by name, those of a filter as ``METRIC,FILTER``; None where there is no number."""
    kept = {key: value for key, value in values.items() if "," in key and "_stderr," not in key}
    return {
        key.removesuffix(",none"): float(value) if math.isfinite(value) else None
        for key, value in kept.items()
        if isinstance(value, int | float)
    }


def task_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the tasks as a table."""
    rows: list[tuple[str, ...]] = [("lm-eval", "questions", "metric", "value")]
    for each in found:
        count = f"{each['questions']:,}" if each["questions"] is not None else ""
        rows += [(each["task"], count, name, number(value)) for name, value in each["metrics"].items()]
    return table(rows, "<><>")
