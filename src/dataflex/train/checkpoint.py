"""What DataFlex adds to a checkpoint.

``checkpoint-N/dataflex/`` holds the plan in progress, the state of the methods and a description of the
run they belong to. ``core.sealed`` tells which checkpoints count.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.core.plan import DataPlan
from dataflex.core.redact import redacted
from dataflex.core.sealed import FOLDER
from dataflex.core.state import load_state, save_state
from dataflex.errors import CheckpointError
from dataflex.train.row_space import RowSpace

__all__ = ["Identity", "load", "save"]

_RUN = "run.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What must be the same for a saved plan to mean the same rows.

    Attributes:
        space: The row space's description.
        global_batch: Sequences of an optimizer step.
        seed: Seed of all decisions.
        methods: Resolved name, parameters and targets by kind.
        schedule: Warm-up and interval steps. The total may change: a finished run can be made longer.
    """

    space: dict[str, Any]
    global_batch: int
    seed: int
    methods: dict[str, Any]
    schedule: dict[str, Any]

    @classmethod
    def of(
        cls, config: DynamicConfig, space: RowSpace, *, global_batch: int, seed: int, schedule: dict[str, Any]
    ) -> Identity:
        """Describe a run."""
        return cls(
            space=space.describe(),
            global_batch=global_batch,
            seed=seed,
            methods={
                "selector": _method(config.selector),
                "mixer": _method(config.mixer),
                "weighter": _method(config.weighter),
            },
            schedule=schedule,
        )

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """Say in words how a saved identity differs from this one; empty when it does not."""
        problems = []
        if saved["space"]["fingerprint"] != self.space["fingerprint"]:
            problems.append(f"row space changed ({_changed_sources(saved['space'], self.space)})")
        if saved["global_batch"] != self.global_batch:
            problems.append(f"global batch changed ({saved['global_batch']} -> {self.global_batch} sequences)")
        if saved["seed"] != self.seed:
            problems.append(f"seed changed ({saved['seed']} -> {self.seed})")
        for kind, method in self.methods.items():
            before = saved["methods"].get(kind)
            if before != method:
                problems.append(f"{kind} changed ({_say(before)} -> {_say(method)})")
        for key, value in self.schedule.items():
            if saved["schedule"].get(key) != value:
                problems.append(f"{key} changed ({saved['schedule'].get(key)} -> {value})")
        return problems


def _method(config: MethodConfig | None) -> dict[str, Any] | None:
    if config is None:
        return None
    params = redacted(json.loads(json.dumps(asdict(config.params), default=str)))
    return {"name": config.name, "params": params, "targets": list(config.targets)}


def _say(method: dict[str, Any] | None) -> str:
    if method is None:
        return "none"
    params = ", ".join(f"{key}={value}" for key, value in method["params"].items())
    return f"{method['name']}({params})"


def _changed_sources(before: dict[str, Any], now: dict[str, Any]) -> str:
    changes = [
        f"source {name!r}: {before['sources'].get(name, 0):,} -> {now['sources'].get(name, 0):,} rows"
        for name in dict.fromkeys([*before["sources"], *now["sources"]])
        if before["sources"].get(name) != now["sources"].get(name)
    ]
    return "; ".join(changes) or "same numbers of rows, other content or another tokenizer"


def save(checkpoint: Path, identity: Identity, plan: DataPlan | None, state: dict[str, Any], step: int) -> None:
    """Write ``checkpoint/dataflex`` (rank 0 only); it counts once the checkpoint is sealed."""
    folder = checkpoint / FOLDER
    meta = {
        "format": _FORMAT,
        "step": step,
        "space": identity.space,
        "global_batch": identity.global_batch,
        "seed": identity.seed,
        "methods": identity.methods,
        "schedule": identity.schedule,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _RUN).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        save_state(folder, "methods", state)
        if plan is not None:
            np.savez(folder / "plan.npz", **plan.to_arrays())  # type: ignore[arg-type]
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error


def load(checkpoint: Path, identity: Identity) -> tuple[DataPlan | None, dict[str, Any]]:
    """Read back what ``save`` wrote into a checkpoint that was found to be whole.

    Returns:
        The plan in progress, or None if none was made yet, and the state of the methods.

    Raises:
        CheckpointError: No DataFlex state, a broken file, or another run's state.
    """
    folder = checkpoint / FOLDER
    if not (folder / _RUN).is_file():
        raise CheckpointError(
            f"resume: {checkpoint} has no '{FOLDER}' folder: it was not written by a run with a dynamic block, or "
            "with 'save_only_model: true'. Start fresh with 'dynamic.resume_plan: ignore', or from another checkpoint."
        )
    meta = json.loads((folder / _RUN).read_text(encoding="utf-8"))
    if meta.get("format") != _FORMAT:
        raise CheckpointError(f"resume: {folder} has format {meta.get('format')!r}; this version reads {_FORMAT}")
    problems = identity.differences(meta)
    if problems:
        raise CheckpointError(
            "".join(f"resume: {problem}\n" for problem in problems)
            + "The saved plan would point at other samples. Restore what changed, or start fresh with "
            "'dynamic.resume_plan: ignore'."
        )
    plan = None
    if (folder / "plan.npz").exists():
        with np.load(folder / "plan.npz", allow_pickle=False) as arrays:
            plan = DataPlan.from_arrays(dict(arrays))
    return plan, load_state(folder, "methods")
