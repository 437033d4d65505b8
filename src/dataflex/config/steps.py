"""How long a run is and how it is cut, as far as that is known before anything is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dataflex.config.schema import DynamicConfig
from dataflex.config.values import env_enabled, number, truthy
from dataflex.plan.schedule import Schedule

__all__ = ["Batch", "batch_of", "schedule_of", "total_steps"]

_DEFAULT_BATCH = 8  # of the Hugging Face Trainer
_DEFAULT_EPOCHS = 3.0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The global batch: sequences of one optimizer step over all processes."""

    per_device: int
    accumulation: int
    world: int

    @property
    def size(self) -> int:
        """Sequences per optimizer step."""
        return self.per_device * self.accumulation * self.world


def batch_of(lf: Mapping[str, Any]) -> Batch:
    """Return the global batch that the keys and the environment ask for.

    Processes are counted from ``WORLD_SIZE`` (under torchrun), from ``NPROC_PER_NODE`` and ``NNODES``
    when ``FORCE_TORCHRUN`` is on, or from ``ray_num_workers`` when ``USE_RAY`` is on; else there is one.
    """
    if os.getenv("WORLD_SIZE", "").isdigit():
        world = int(os.environ["WORLD_SIZE"])
    elif env_enabled("USE_RAY"):
        world = int(number(lf, "ray_num_workers", 1))
    elif env_enabled("FORCE_TORCHRUN"):
        world = int(number(os.environ, "NPROC_PER_NODE", 1)) * int(number(os.environ, "NNODES", 1))
    else:
        world = 1
    return Batch(
        per_device=max(1, int(number(lf, "per_device_train_batch_size", _DEFAULT_BATCH))),
        accumulation=max(1, int(number(lf, "gradient_accumulation_steps", 1))),
        world=max(1, world),
    )


def total_steps(lf: Mapping[str, Any], rows: int | None) -> int | None:
    """Return the optimizer steps of the run as the Trainer counts them, or None when rows are not known."""
    fixed = int(number(lf, "max_steps", -1))
    if fixed > 0:
        return fixed
    if not rows:
        return None
    batch = batch_of(lf)
    if truthy(lf, "dataloader_drop_last"):
        micro_batches = rows // batch.per_device // batch.world
    else:
        micro_batches = math.ceil(rows / (batch.per_device * batch.world))
    steps_per_epoch = max(1, math.ceil(micro_batches / batch.accumulation))
    return math.ceil(number(lf, "num_train_epochs", _DEFAULT_EPOCHS) * steps_per_epoch)


def schedule_of(dynamic: DynamicConfig, total: int) -> Schedule:
    """Return the intervals of a run of ``total`` optimizer steps; without ``interval_steps`` there is one decision.

    Raises:
        ConfigError: The numbers do not fit together.
    """
    return Schedule(
        warmup_steps=dynamic.warmup_steps,
        interval_steps=dynamic.interval_steps or max(1, total - dynamic.warmup_steps),
        total_steps=total,
        cycle_steps=dynamic.cycle_steps,
    )
