"""Loads a second model whole on every rank, also in a run whose own model is partitioned as it loads.

Upstream names relied upon, of ``transformers.integrations.deepspeed``: ``_hf_deepspeed_config_weak_ref`` and
``unset_hf_deepspeed_config`` (``from_pretrained`` partitions under ZeRO-3 while they name a configuration);
of the environment: ``FSDP_CPU_RAM_EFFICIENT_LOADING`` (with which only rank 0 would read the weights).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["loading_whole"]

_FSDP = "FSDP_CPU_RAM_EFFICIENT_LOADING"


@contextmanager
def loading_whole() -> Iterator[None]:
    """While inside, ``from_pretrained`` gives every rank a whole model."""
    from transformers.integrations import deepspeed

    kept, efficient = deepspeed._hf_deepspeed_config_weak_ref, os.environ.pop(_FSDP, None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept
        if efficient is not None:
            os.environ[_FSDP] = efficient
