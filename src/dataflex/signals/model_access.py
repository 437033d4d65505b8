"""What passes are given: the model under training and the rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Corpus", "ModelAccess"]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A tokenized data set that rows can be taken from.

    Attributes:
        dataset: Features by row id.
        lengths: Tokens of each row.
        identity: Fingerprint of its content.
    """

    dataset: Any
    lengths: NDArray[np.int64]
    identity: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelAccess:
    """How passes reach the model under training.

    Attributes:
        model: The module to call; not the DDP or DeepSpeed engine around it.
        collate: Features to a batch for scoring.
        autocast: The Trainer's mixed-precision context.
        device: Where batches go.
        token_budget: Padded tokens of a scoring batch at most.
        tokenizer: For generation.
        optimizer: Gives the Trainer's optimizer, whose moments precondition gradients.
        learning_rate: Gives the learning rate of the next step.
        backend: "zero" under DeepSpeed, else "plain".
        release: Lets go of parameters that a pass left gathered under ZeRO-3.
    """

    model: torch.nn.Module
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    autocast: Callable[[], AbstractContextManager[Any]]
    device: torch.device
    token_budget: int
    tokenizer: Any = None
    optimizer: Callable[[], Any] = lambda: None
    learning_rate: Callable[[], float] = lambda: 0.0
    backend: str = "plain"
    release: Callable[[], None] | None = None
