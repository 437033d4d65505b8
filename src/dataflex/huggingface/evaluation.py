"""Held-out losses by token: of each evaluation set, and over all of them.

The Trainer's own loss is a mean over batches, of whatever is minimized; sums of token losses give the true perplexity
of a set. Upstream names relied upon, each asserted by ``tests/upstream``: the Trainer's methods overridden here,
``compute_loss_func``, ``accelerator``; ``save_predictions`` of LLaMA-Factory's trainers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from datasets import concatenate_datasets

from dataflex import comm
from dataflex.errors import DataError
from dataflex.huggingface.fused import Once, fuses
from dataflex.huggingface.loop import replaced
from dataflex.train.loss import token_losses
from dataflex.train.session import Session

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class HeldOut(dict[str, Any]):
    """Evaluation rows by domain.

    Args:
        parts: A data set for each domain.
        whole: All the rows as one data set, in LLaMA-Factory's order.
    """

    def __init__(self, parts: Mapping[str, Any], whole: Any) -> None:
        super().__init__(parts)
        self.whole = whole


def _undivided(dataset: Any) -> Any:
    """Return one data set where several are evaluated by name; anything else is returned unchanged."""
    if isinstance(dataset, HeldOut):
        return dataset.whole
    return concatenate_datasets([*dataset.values()]) if isinstance(dataset, dict) else dataset


def _totals(found: dict[str, tuple[float, float]], prefix: str) -> dict[str, float]:
    """Return mean losses over all sets by token (micro) and by set (macro), from the loss sum and tokens of each."""
    if not found:
        return {}
    micro = sum(loss for loss, _ in found.values()) / sum(tokens for _, tokens in found.values())
    macro = sum(loss / tokens for loss, tokens in found.values()) / len(found)
    return {
        f"{prefix}_loss": micro,
        f"{prefix}_micro_loss": micro,
        f"{prefix}_macro_loss": macro,
        f"{prefix}_micro_perplexity": _perplexity(micro),
        f"{prefix}_macro_perplexity": _perplexity(macro),
    }


def _sums_by_row(outputs: Any, labels: torch.Tensor) -> torch.Tensor | None:
    """Return the sum of each row's token losses, whatever the loss of the outputs, and its tokens, float64 [R, 2].

    From their logits, or from TRL's ``log_probs`` where they have none; None where they have neither of these labels.
    """
    given: Any = outputs if isinstance(outputs, Mapping) else getattr(outputs, "__dict__", {})
    logits, log_p = given.get("logits"), given.get("log_probs")
    if torch.is_tensor(logits) and logits.dim() == 3 and logits.shape[:2] == labels.shape:
        with torch.no_grad():
            found = token_losses(logits.detach(), labels)
        loss, mask = found.loss_BT, found.mask_BT
    elif torch.is_tensor(log_p) and len(log_p) == len(labels):
        loss, mask = -log_p.detach(), given["label_mask"]
    else:
        return None
    return torch.stack([loss.double().sum(dim=1), mask.sum(dim=1).double()], dim=1)


class EvaluationMixin(_Trainer):
    """Evaluates as the Trainer class that follows it in the MRO, and adds losses by token."""

    dataflex: Session
    compute_loss_func: Any
    accelerator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sums: torch.Tensor | None = None  # sum of token losses and tokens of the set in progress, over all ranks
        self._evaluated: dict[str, tuple[float, float]] = {}  # the same by prefix of the set

    def held_out_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the stock loss of a batch that is not trained on."""
        labels = inputs.get("labels")
        usual = None if self.dataflex.weighs else self.compute_loss_func  # LLaMA-Factory's own, not ours
        once = Once(model, labels) if fuses(self) else None
        with replaced((self, "compute_loss_func", usual)):
            found = super().compute_loss(model if once is None else once, inputs, *args, **kwargs)
        if self._sums is not None and labels is not None:
            outputs = found[1] if isinstance(found, tuple) else None
            self._take(outputs if once is None else once.outputs, labels)
        return found

    def _take(self, outputs: Any, labels: torch.Tensor) -> None:
        """Add a batch's token losses, without the rows that fill up the last batch of several ranks (collective)."""
        assert self._sums is not None
        rows = _sums_by_row(outputs, labels)
        if rows is None:
            self._sums = None  # not to be told of this set
        elif self.dataflex.setup.joined:  # one row of several ranks' each
            self._sums = self._sums + comm.gather_sum(rows.sum(dim=0))
        else:
            self._sums = self._sums + self.accelerator.gather_for_metrics(rows).sum(dim=0)

    def refuse_unseen(self) -> None:
        """Raise DataError for an evaluation set of which ``dataloader_drop_last`` leaves no batch, so no loss."""
        args, found = self.args, self.eval_dataset
        if not args.dataloader_drop_last or found is None or not (args.do_eval or args.eval_strategy != "no"):
            return
        size = args.eval_batch_size * comm.world()
        for rows in found.values() if isinstance(found, dict) else (found,):
            if hasattr(rows, "__len__") and len(rows) < size:
                raise DataError(
                    f"dataloader_drop_last leaves nothing of {len(rows):,} evaluation rows: {comm.world()} ranks x "
                    f"{args.eval_batch_size} sequences need {size:,}. Use a smaller per_device_eval_batch_size."
                )

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """Evaluate as stock; over several sets add the losses over all of them."""
        several = isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict)
        if several:
            self._evaluated.clear()
        with self.dataflex.clock.phase("evaluate"):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        overall = _totals(self._evaluated, metric_key_prefix) if several else {}
        if overall:
            self.log(dict(overall))
        return {**metrics, **overall}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one set as stock, and add its loss by token and its perplexity."""
        prefix = kwargs.get("metric_key_prefix", "eval")
        if self.dataflex.setup.stage in ("pt", "sft"):
            self._sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        try:
            output = super().evaluation_loop(*args, **kwargs)
            total, tokens = (0.0, 0.0) if self._sums is None else self._sums.tolist()
        finally:
            self._sums = None
        if tokens > 0:
            self._evaluated[prefix] = (total, tokens)
            output.metrics[f"{prefix}_token_loss"] = total / tokens
            output.metrics[f"{prefix}_perplexity"] = _perplexity(total / tokens)
        return output

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict rows that are evaluated by domain as one set, in file order, as LLaMA-Factory does alone."""
        with self.dataflex.clock.phase("predict"):
            return super().predict(_undivided(test_dataset), *args, **kwargs)

    def save_predictions(self, *args: Any, **kwargs: Any) -> Any:
        """Save the predictions of ``predict``; some of LLaMA-Factory's trainers are given the rows again."""
        return super().save_predictions(*map(_undivided, args), **kwargs)
