"""Gradients of weighted answers: what a policy gradient says the model should be trained towards.

A group is a set of answers, usually those sampled for one prompt, whose vector is the sum of weight times the gradient
of -log p(answer | prompt), summed over the answer's tokens. A task's vector is the mean over its groups, or over their
directions. Each group's gradient is held once, so that its length is exact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dataflex import comm
from dataflex.console import progress
from dataflex.errors import DataError
from dataflex.signals.gradients.consume import WeightedSums
from dataflex.signals.gradients.engine import GradientEngine
from dataflex.signals.gradients.vectors import TargetVectors
from dataflex.signals.model_access import ModelAccess
from dataflex.signals.specs import WeightedAnswer
from dataflex.signals.sweep import bucketed

__all__ = ["answers_digest", "policy_vectors"]

_IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Answers whose gradients are added up: the task they belong to, and batches of them."""

    task: int
    batches: tuple[tuple[WeightedAnswer, ...], ...]


def answers_digest(answers: Sequence[WeightedAnswer]) -> str:
    """Return a hash of everything that a task's answers say."""
    digest = hashlib.blake2b(digest_size=16)
    for one in answers:
        digest.update(repr((tuple(one.prompt), tuple(one.answer), one.group, float(one.weight))).encode())
    return digest.hexdigest()


def policy_vectors(
    engine: GradientEngine, handle: ModelAccess, tasks: Sequence[Sequence[WeightedAnswer]], *, normalize_groups: bool
) -> TargetVectors:
    """Return one vector per task, equal on every rank (collective).

    Args:
        engine: Of the model; its loss is a row's token mean.
        handle: Collates, and says where batches go and how large they may be.
        tasks: The answers of each task; those of equal ``group`` are added up.
        normalize_groups: Mean over the groups' directions instead of over their gradients.

    Raises:
        DataError: A task without answers, or an answer without tokens.
    """
    groups = [group for task, answers in enumerate(tasks) for group in _groups(task, answers, handle.token_budget)]
    device = next(iter(engine.parameters.values())).device
    sums = TargetVectors.zeros(len(tasks), engine.shapes, device)
    world, rank = comm.world(), comm.rank()
    with engine.observing(), progress("gradients of graded answers", len(groups)) as told:
        for first in range(0, len(groups), world):
            turn = groups[first : first + world]
            # A rank without a group repeats the last one in vain: partitioned parameters need equal numbers of passes.
            mine = turn[rank] if rank < len(turn) else turn[-1]
            whole = TargetVectors.zeros(1, engine.shapes, device)
            sink = WeightedSums(whole)
            for number in range(max(len(group.batches) for group in turn)):
                batch = mine.batches[min(number, len(mine.batches) - 1)]
                counts = number < len(mine.batches) and rank < len(turn)
                sink.weights = torch.tensor([[one.weight * len(one.answer) * counts for one in batch]])
                engine.run(_collated(batch, handle), [sink])
            norm = float(whole.norms())
            scale = (1.0 / norm if norm > 0 else 0.0) if normalize_groups else 1.0
            for name, tensor in sums.tensors.items():
                tensor[mine.task].add_(whole.tensors[name][0], alpha=scale)
            told(min(first + world, len(groups)))
    for name, tensor in sums.tensors.items():
        sums.tensors[name] = comm.gather_sum(tensor)
    sizes = np.bincount([group.task for group in groups], minlength=len(tasks))
    return sums.scale_(torch.from_numpy(1.0 / sizes))


def _groups(task: int, answers: Sequence[WeightedAnswer], token_budget: int) -> list[_Group]:
    by_group: dict[int, list[WeightedAnswer]] = {}
    for one in answers:
        if not len(one.prompt) or not len(one.answer):
            raise DataError(f"answers: one of group {one.group} has no prompt or no tokens")
        by_group.setdefault(one.group, []).append(one)
    if not by_group:
        raise DataError(f"answers: task {task} has none")
    found = []
    for members in by_group.values():
        lengths = np.array([len(one.prompt) + len(one.answer) for one in members], dtype=np.int64)
        batches = tuple(tuple(members[i] for i in batch) for batch in bucketed(lengths, token_budget))
        found.append(_Group(task=task, batches=batches))
    return found


def _collated(answers: Sequence[WeightedAnswer], handle: ModelAccess) -> dict[str, Any]:
    features = []
    for one in answers:
        prompt, answer = [int(token) for token in one.prompt], [int(token) for token in one.answer]
        ids = prompt + answer
        labels = [_IGNORE] * len(prompt) + answer
        features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    batch = handle.collate(features)
    return {key: value.to(handle.device) if torch.is_tensor(value) else value for key, value in batch.items()}
