"""Weights of rows: a column of the data, the row's domain, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import CheckpointError
from dataflex.method import BatchView, Card, Context, Requires, Rows, Weighter, WeighterParams, param
from dataflex.method import Params as BaseParams
from dataflex.plan.domains import WANTED_WEIGHTS, Floats
from dataflex.plan.proportions import exponentiated

if TYPE_CHECKING:
    import torch


_NAMES = {"row": "sample_weight", "turn": "loss_weight", "token": "loss_weights"}


class Column(Weighter):
    """Weigh each row, turn or token by a number of the data.

    - ``level: row``: a numeric column of the data set.
    - ``level: turn``: a key of the messages (formats sharegpt and openai, whose contents may be lists of text parts, as
      LLaMA-Factory v1 has them), 1 where a message has none. The weight of a message is that of the tokens it becomes,
      through template, ``cutoff_len``, packing and ``mask_history``; the end of an answer belongs to the answer.
      Messages that are not trained on have no effect, whatever they weigh.
    - ``level: token``: a column of a tokenized copy (``tokenized_path``) with a number for each token of ``input_ids``.

    A weight of 0 trains nothing. It refuses to guess: a row without a weight, a negative one, or text in the column is
    told before the first step.
    """

    name = "column"
    card = Card(
        summary="Weighs each row, turn or token by a number of the data.",
        paper="baseline (importance weights)",
        cost="none",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(WeighterParams):
        level: Literal["row", "turn", "token"] = param("row", "what has a weight of its own")
        column: str | None = param(
            None,
            "name of the column, or of the messages' key, that holds the weights; null: sample_weight (row), "
            "loss_weight (turn), loss_weights (token)",
        )
        normalizer: Literal["weight_sum", "num_tokens"] = param(
            "weight_sum", "weight_sum: weighted mean, only ratios matter; num_tokens: size matters too"
        )

        def __post_init__(self) -> None:
            if self.column == "":
                raise ValueError("column: must name a column of the data set")

    params: Params

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.normalizer, self.by_token = params.normalizer, params.level != "row"

    @property
    def _column(self) -> str:
        return self.params.column or _NAMES[self.params.level]

    def requires(self) -> Requires:
        level = self.params.level
        if level == "row":
            return Requires(stages=("pt", "sft"), columns=(self._column,))
        return Requires(stages=("sft",) if level == "turn" else ("pt", "sft"), token_weights=(level, self._column))

    def refused_values(self, name: str, values: NDArray[Any]) -> tuple[NDArray[np.bool_], str]:
        """Return which values are no weights: missing, not finite, negative, or text."""
        weights = _weights(values)
        return ~np.isfinite(weights) | (weights < 0), WANTED_WEIGHTS

    def static_weights(self, rows: Rows, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        return _weights(columns[self._column][rows])

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return the weights of tokens, as a factor of a product [R, T]."""
        assert batch.token_weights_BT is not None, "weights of rows are static"
        return batch.token_weights_BT


def _weights(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return weights in fp32; what is missing or text becomes NaN, what is too large for fp32 infinite."""
    if values.dtype.kind not in "biuf":
        values = np.array([value if isinstance(value, int | float) else np.nan for value in values.tolist()], float)
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


class NoWeights(Weighter):
    """Every token counts the same, as without DataFlex.

    The stock loss is left alone.
    """

    name = "none"
    neutral: ClassVar[bool] = True
    Params: ClassVar[type[BaseParams]] = BaseParams
    card = Card(summary="Leaves the stock loss alone.", paper="baseline", cost="none")

    def requires(self) -> Requires:
        return Requires()

    def static_weights(self, rows: Rows, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        return np.ones(len(rows), dtype=np.float32)


def domain_weights(rows: NDArray[np.integer], strategy: str, *, power: float = 1.0, beta: float = 0.999) -> Floats:
    """Return the weight of each domain [K], with a mean of one over the training rows; ``rows`` of each, 1 or more."""
    sizes = np.asarray(rows, dtype=np.float64)
    if strategy == "inverse_frequency":
        raw = sizes**-power
    else:
        raw = np.ones_like(sizes) if beta == 0.0 else (1.0 - beta) / -np.expm1(sizes * np.log(beta))
    return np.asarray(raw * sizes.sum() / (raw * sizes).sum())


class GroupWeighter(Weighter):
    """Weigh sequences by their domain: rare ones count more, or those of the largest loss.

    - ``inverse_frequency``: w_d = 1 / n_d ^ power, n_d the training rows of domain d.
    - ``class_balanced``: w_d = (1 - beta) / (1 - beta ^ n_d), one over the effective number of rows (Cui et al.).
    - ``group_dro``: q_d is multiplied by exp(eta (L_d + C / sqrt(n_d))) in every micro-batch, L_d the mean token loss
      of the domain there (0 where absent), and normalized; the loss is sum_d q_d L_d (Sagawa et al.). With gradient
      accumulation every micro-batch is a batch of the paper's; the ``group_dro`` mixer updates once per step instead.

    The first two are importance weights of the weighted token mean: only ratios matter. They are scaled to a mean of
    one over the training rows.
    """

    name = "group"
    saved = ("domains", "log_weights")
    card = Card(
        summary="Weighs sequences by their domain: rare domains count more, or those of the largest loss.",
        paper="Class-Balanced Loss, CVPR 2019, arXiv 1901.05555; Group DRO, ICLR 2020, arXiv 1911.08731",
        cost="none; group_dro one gather of two numbers per domain and micro-batch",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(WeighterParams):
        strategy: Literal["inverse_frequency", "class_balanced", "group_dro"] = param(
            "inverse_frequency", "how the weight of a domain is made"
        )
        power: float = param(1.0, "exponent of inverse_frequency", minimum=0.0)
        beta: float = param(0.999, "beta of class_balanced; towards 1 it becomes the inverse frequency", minimum=0.0)
        eta: float = param(0.01, "step size of group_dro", above=0.0)
        adjustment: float = param(0.0, "C of group_dro's adjustment C / sqrt(rows of the domain), nats", minimum=0.0)

        def __post_init__(self) -> None:
            if self.beta >= 1.0:
                raise ValueError("beta: must be below 1")

    params: Params
    domains: tuple[str, ...] = ()
    log_weights: Floats = np.zeros(0)  # logarithms of q [K], under ``group_dro``
    _sizes: NDArray[np.integer] | None = None  # number of training rows of each domain [K]; None before ``prepare``
    _known: NDArray[np.float32] | None = None
    """Weight of every training row [N]; None under ``group_dro``, and before ``prepare``."""

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        if params.strategy == "group_dro":
            self.normalizer = "num_sequences"

    def requires(self) -> Requires:
        return Requires(domains=2, stages=("pt", "sft"))

    def due(self, step: int) -> bool:
        return self._sizes is None

    def prepare(self, ctx: Context, rows: Rows) -> None:
        """Note the domains, and refuse saved weights of other ones."""
        names, p = ctx.domains.names, self.params
        self._sizes = np.asarray(ctx.domains.num_rows)
        if p.strategy != "group_dro":
            by_domain = domain_weights(self._sizes, p.strategy, power=p.power, beta=p.beta)
            self._known = by_domain[ctx.domains.domain_of].astype(np.float32)
        elif not self.domains:
            self.domains, self.log_weights = names, np.full(len(names), -np.log(len(names)))
        elif self.domains != names:
            raise CheckpointError(
                f"group weighter: the saved weights are of {', '.join(self.domains)}, "
                f"but the data has {', '.join(names)}"
            )

    def static_weights(self, rows: Rows, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.float32] | None:
        return None if self._known is None else self._known[rows]

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Update q and return q_d n_i / n_d [B], n_i tokens of the sequence, n_d of its domain (collective)."""
        import torch

        from dataflex import comm

        assert self._sizes is not None, "the domains were not prepared"
        tokens = batch.tokens_B.cpu().double()
        which = torch.from_numpy(batch.domains_B.astype(np.int64))
        sums = torch.zeros(2, len(self.domains), dtype=torch.float64)
        sums.index_add_(1, which, torch.stack([batch.loss_B.cpu().double() * tokens, tokens]))
        loss_K, tokens_K = comm.gather_sum(sums.to(batch.loss_B.device)).cpu().numpy()
        known = (tokens_K > 0) & np.isfinite(loss_K)  # one step without a finite loss leaves the weights finite
        means = np.divide(loss_K, tokens_K, out=np.zeros_like(loss_K), where=known)
        scores = means + self.params.adjustment / np.sqrt(self._sizes)
        self.log_weights = exponentiated(self.log_weights, scores, eta=self.params.eta)
        per_token = np.divide(np.exp(self.log_weights), tokens_K, out=np.zeros_like(tokens_K), where=tokens_K > 0)
        return (torch.from_numpy(per_token)[which] * tokens).to(batch.loss_B)
