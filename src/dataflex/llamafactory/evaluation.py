"""Held-out losses by token: of each evaluation set, and over all of them.

The Trainer's own evaluation loss is a mean over batches. Here token losses are added up over batches and
ranks, so that the perplexity of a set is what its name says. Upstream names relied upon, each asserted by
``tests/upstream``: of the Trainer ``compute_loss``, ``compute_loss_func``, ``evaluate``, ``evaluation_loop``,
``predict``, ``model_accepts_loss_kwargs``; of LLaMA-Factory's trainers ``save_predictions``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from datasets import concatenate_datasets

from dataflex import comm
from dataflex.train.loss import balance_loss
from dataflex.train.session import Session

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

_IGNORE = -100


def perplexity(loss: float) -> float:
    """Return exp(loss), infinite where it is too large."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class HeldOut(dict[str, Any]):
    """Evaluation rows by domain.

    Args:
        parts: A data set for each domain.
        whole: All the rows as one data set, in the order in which LLaMA-Factory has them.
    """

    def __init__(self, parts: Mapping[str, Any], whole: Any) -> None:
        super().__init__(parts)
        self.whole = whole


def undivided(dataset: Any) -> Any:
    """Return one data set where several are evaluated by name; whatever else is given as it is."""
    if isinstance(dataset, HeldOut):
        return dataset.whole
    return concatenate_datasets([*dataset.values()]) if isinstance(dataset, dict) else dataset


class EvaluationSums:
    """Sums over the batches of one evaluation loop."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def add(self, loss: torch.Tensor, labels: torch.Tensor, num_items: Any) -> None:
        """Take in one batch.

        Args:
            loss: Sum of this rank's token losses divided by ``num_items``; a token mean where it is None.
            labels: [B, T].
            num_items: Tokens that the Trainer divided by, or None.
        """
        tokens = labels[:, 1:].ne(_IGNORE).sum().double()
        over = tokens if num_items is None else torch.as_tensor(num_items, device=loss.device).double()
        pair = torch.stack([loss.detach().double() * over, tokens.to(loss.device)])
        self._sums = pair if self._sums is None else self._sums + pair

    def take(self, device: torch.device) -> tuple[float, float]:
        """Return the sum of token losses and the tokens over all ranks, and start anew (collective)."""
        sums = torch.zeros(2, dtype=torch.float64, device=device) if self._sums is None else self._sums
        self._sums = None
        loss, tokens = comm.gather_sum(sums).tolist()
        return loss, tokens


def totals(found: dict[str, tuple[float, float]], prefix: str) -> dict[str, float]:
    """Return the losses over all sets: micro (every token counts alike) and macro (every set does).

    Args:
        found: Sum of token losses and tokens of each set that has any.
        prefix: What names begin with.
    """
    if not found:
        return {}
    micro = sum(loss for loss, _ in found.values()) / sum(tokens for _, tokens in found.values())
    macro = sum(loss / tokens for loss, tokens in found.values()) / len(found)
    return {
        f"{prefix}_loss": micro,
        f"{prefix}_micro_loss": micro,
        f"{prefix}_macro_loss": macro,
        f"{prefix}_micro_perplexity": perplexity(micro),
        f"{prefix}_macro_perplexity": perplexity(macro),
    }


class EvaluationMixin(_Trainer):
    """Evaluates as the Trainer class that follows it in the MRO, and adds what losses are by token."""

    dataflex: Session
    compute_loss_func: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sums, self._evaluated = EvaluationSums(), {}  # type: tuple[EvaluationSums, dict[str, tuple[float, float]]]

    def held_out_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the stock loss of a batch that is not trained on."""
        labels = inputs.get("labels")
        usual = self.compute_loss_func  # LLaMA-Factory's own where nothing is weighed
        if self.dataflex.weighs:
            self.compute_loss_func = None
        try:
            found = super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.compute_loss_func = usual
        if self.dataflex.setup.stage in ("pt", "sft") and labels is not None:
            loss, outputs = found if isinstance(found, tuple) else (found, None)
            num_items = kwargs.get("num_items_in_batch") if self.model_accepts_loss_kwargs else None
            if num_items is not None and self.args.average_tokens_across_devices:
                loss = loss / comm.world()
            balance = None if outputs is None else balance_loss(outputs, self.model.config)
            if balance is not None:  # no part of what a token costs
                loss = loss - balance.to(loss.device)
            self._sums.add(loss, labels, num_items)
        return found

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """Evaluate as stock, noting the time; over several sets add the losses over all of them."""
        several = isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict)
        if several:
            self._evaluated.clear()
        with self.dataflex.clock.phase("evaluate"):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        overall = totals(self._evaluated, metric_key_prefix) if several else {}
        if overall:
            self.log(dict(overall))
        return {**metrics, **overall}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one set as stock, and add its loss by token and its perplexity."""
        prefix = kwargs.get("metric_key_prefix", "eval")
        output = super().evaluation_loop(*args, **kwargs)
        total, tokens = self._sums.take(self.args.device)
        if tokens > 0:
            self._evaluated[prefix] = (total, tokens)
            output.metrics[f"{prefix}_token_loss"] = total / tokens
            output.metrics[f"{prefix}_perplexity"] = perplexity(total / tokens)
        return output

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict rows that are evaluated by domain as one set, in file order, as LLaMA-Factory does without us."""
        with self.dataflex.clock.phase("predict"):
            return super().predict(undivided(test_dataset), *args, **kwargs)

    def save_predictions(self, *args: Any, **kwargs: Any) -> Any:
        """Save the predictions of ``predict``; some of LLaMA-Factory's trainers are given the rows again."""
        return super().save_predictions(*map(undivided, args), **kwargs)
