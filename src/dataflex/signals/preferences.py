"""Pairs of a chosen and a rejected answer: how they are fed, what a model gives them, and the loss of a pair.

A batch of n pairs has 2n sequences, each chosen answer followed by its rejected one, with their prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from dataflex.signals.losses import row_sums
from dataflex.signals.specs import PreferenceLoss

Batch = dict[str, Any]
Sums = Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]
"""Batch -> sums of the sequences' token losses [2n], and numbers of their supervised tokens [2n]."""
_LENGTHS = (("chosen_input_ids", "rejected_input_ids"), ("chosen_ids", "rejected_ids"))
"""Columns of the answers, as LLaMA-Factory and TRL name them; TRL keeps a pair's prompt apart."""
_PROMPTS = ("prompt_ids", "prompt_input_ids")


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """What stage dpo has beside the rows: how pairs become batches, the reference model, and the loss."""

    collate: Callable[[list[Any]], Batch]  # features of n pairs to a batch of 2n sequences
    reference: Callable[[], AbstractContextManager[nn.Module]]  # gives the reference model, in eval mode
    identity: Callable[[], str]  # names the reference's values (collective)
    loss: PreferenceLoss  # what the run trains on

    def losses(self, policy: Sums) -> Callable[[Batch], torch.Tensor]:
        """Return a function from a batch of n pairs to their losses [n], NaN where an answer has no supervised token.

        Gradients go through ``policy`` alone.
        """

        def of(batch: Batch) -> torch.Tensor:
            reference = None
            if self.loss.compares:  # before the policy: switching adapters off touches what is to be differentiated
                with torch.no_grad(), self.reference() as model:
                    reference = -row_sums(model, batch)[0].view(-1, 2)
            sums, tokens = policy(batch)
            return pair_loss(self.loss, -sums.view(-1, 2), tokens.view(-1, 2), reference)

        return of


def pair_loss(
    loss: PreferenceLoss, policy_P2: torch.Tensor, tokens_P2: torch.Tensor, reference_P2: torch.Tensor | None
) -> torch.Tensor:
    """Return the loss of each pair [P], NaN where an answer has no supervised token.

    ``sigmoid`` is DPO (arXiv 2305.18290, eq. 7, with smoothed labels), ``hinge`` SLiC (2305.10425), ``ipo`` with means
    over tokens (2310.12036, eq. 17), ``orpo`` (2403.07691, eq. 6 and 7), ``simpo`` (2405.14734, eq. 6).

    Args:
        loss: Which loss.
        policy_P2: Log-probabilities of the chosen and rejected answers under the policy, summed over tokens [P, 2].
        tokens_P2: Numbers of the answers' tokens [P, 2].
        reference_P2: The same sums under the reference; None for ``orpo`` and ``simpo``.
    """
    known = tokens_P2.gt(0).all(dim=1)
    counts = tokens_P2.clamp(min=1).to(policy_P2.dtype)
    means = policy_P2 / counts
    if reference_P2 is None:
        apart = means[:, 0] - means[:, 1]
        if loss.kind == "simpo":
            found = -F.logsigmoid(loss.beta * apart - loss.gamma)
        else:
            odds = apart - (torch.log1p(-means[:, 0].exp()) - torch.log1p(-means[:, 1].exp()))
            found = -means[:, 0] - loss.beta * F.logsigmoid(odds)
    else:
        ratios = policy_P2 - reference_P2
        if loss.kind == "ipo":
            ratios = ratios / counts
        margin = ratios[:, 0] - ratios[:, 1]
        if loss.kind == "ipo":
            found = (margin - 1 / (2 * loss.beta)).square()
        elif loss.kind == "hinge":
            found = torch.relu(1 - loss.beta * margin)
        else:
            m, eps = loss.beta * margin, loss.label_smoothing
            found = -(1 - eps) * F.logsigmoid(m) - eps * F.logsigmoid(-m)
    if loss.sft:
        found = found - loss.sft * means[:, 0]
    return torch.where(known, found, torch.nan)


def pair_lengths(dataset: Any, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the padded tokens of each pair alone [N]: twice its longer sequence.

    ``lengths`` are taken for both where the data set cannot be looked into.
    """
    names = getattr(dataset, "column_names", ())
    answers = next((pair for pair in _LENGTHS if all(name in names for name in pair)), None)
    if answers is None or not hasattr(dataset, "select_columns"):
        return 2 * lengths
    prompt = next((name for name in _PROMPTS if name in names), None)

    def of(name: str) -> NDArray[np.int64]:
        column = dataset.select_columns([name]).with_format("arrow")[:].column(name)
        return np.asarray(pc.list_value_length(column).to_numpy(), dtype=np.int64)

    before = 0 if prompt is None else of(prompt)
    return np.asarray(2 * (np.maximum(of(answers[0]), of(answers[1])) + before))
