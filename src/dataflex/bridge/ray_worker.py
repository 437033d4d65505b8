"""LLaMA-Factory's Ray worker with our trainer in it.

The worker class is pickled by reference, and LLaMA-Factory hands every worker the driver's environment;
the configuration travels there, under ``DATAFLEX_RUN``. Upstream names relied upon:
``llamafactory.train.tuner.Worker`` and its ``_training_function``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamafactory.train import tuner

__all__ = ["ENVIRONMENT_KEY", "RayWorker", "ray_workers"]

ENVIRONMENT_KEY = "DATAFLEX_RUN"


class RayWorker(tuner.Worker):
    """Runs LLaMA-Factory's training function with our trainer swapped in."""

    def _training_function(self, config: dict[str, Any]) -> None:
        from dataflex.bridge.swap import least_gain, swapped
        from dataflex.config.split import split

        given = json.loads(os.environ[ENVIRONMENT_KEY])
        parts = split(given["mapping"], Path(given["base_dir"]))
        assert parts.dynamic is not None
        with least_gain(parts.early_stopping_min_delta), swapped(given["stage"], parts.dynamic, parts.lf):
            super()._training_function(config)


@contextmanager
def ray_workers(mapping: dict[str, Any], base_dir: Path, stage: str) -> Iterator[None]:
    """Make LLaMA-Factory start ``RayWorker``s while inside."""
    before = tuner.Worker
    os.environ[ENVIRONMENT_KEY] = json.dumps({"mapping": mapping, "base_dir": str(base_dir), "stage": stage})
    tuner.Worker = RayWorker
    try:
        yield
    finally:
        tuner.Worker = before
        del os.environ[ENVIRONMENT_KEY]
