"""Weights of tokens by a function of their log-probability, the entropy of the prediction and a reference.

Named functions: ``dft`` (p), ``focal`` ((1 - p) ^ gamma), ``entropy`` ((H / 3) ^ power), ``clip_quantile`` (0 above a
quantile of the loss), ``excess`` (sigmoid of the excess over a reference); or a function of one's own,
``module:function`` or ``file.py:function``, which takes any of ``logp``, ``entropy``, ``reference`` by name (tensors of
the supervised tokens of the micro-batch over all ranks [S]) and returns weights [S].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from dataflex.errors import ComponentError
from dataflex.method import BatchView, Card, Normalizer, Reference, Requires, Weighter, WeighterParams
from dataflex.weighters import token_functions
from dataflex.weighters.sequences import reference_losses

if TYPE_CHECKING:
    import torch

__all__ = ["TokenWeighter"]


class TokenWeighter(Weighter):
    """Weigh each token by a function of what the model thinks of it."""

    name = "token"
    by_token: ClassVar[bool] = True
    card = Card(
        summary="Weighs each token by a function of its log-probability, the entropy and a reference model.",
        paper="On the Generalization of SFT (DFT), arXiv 2508.05629, and others",
        cost="none; with entropy one more product per logit; with a reference as slm",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(WeighterParams):
        """Parameters of the token weighter."""

        function: str = field(
            default="dft",
            metadata={"help": "dft, focal, entropy, clip_quantile, excess, or module:function (file.py:function)"},
        )
        normalizer: Literal["count", "token"] = field(
            default="count",
            metadata={"help": "count: divided by the tokens, as DFT is; token: weighted mean, only ratios matter"},
        )
        gamma: float = field(default=2.0, metadata={"help": "exponent of focal", "minimum": 0.0})
        power: float = field(default=1.0, metadata={"help": "exponent of entropy", "minimum": 0.0})
        quantile: float = field(
            default=0.9,
            metadata={"help": "quantile of clip_quantile; above it tokens are left out", "above": 0.0, "maximum": 1.0},
        )
        reference: str | None = field(
            default=None, metadata={"help": "folder of a reference model, for functions that take one"}
        )
        reference_cache: bool = field(
            default=True,
            metadata={
                "help": "score a row with the reference once, when first served, and keep that; else in every step"
            },
        )

        def __post_init__(self) -> None:
            try:
                taken = token_functions.asked(token_functions.load(self.function))
            except ValueError as error:
                raise ValueError(f"function: {error}") from error
            if "reference" in taken and not (self.reference or "").strip():
                raise ValueError(f"reference: missing; {self.function} compares with a reference model")
            if "reference" not in taken and self.reference is not None:
                raise ValueError(f"reference: {self.function} does not look at it; remove the key")

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        p = self.params
        taken = token_functions.asked(token_functions.load(p.function))
        reference = None if p.reference is None else Reference(p.reference, p.reference_cache)
        return Requires(stages=("pt", "sft"), reference=reference, entropy="entropy" in taken)

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self._function = token_functions.load(
            params.function, gamma=params.gamma, power=params.power, quantile=params.quantile
        )
        self._taken = token_functions.asked(self._function)

    @property
    def normalizer(self) -> Normalizer:
        """The denominator asked for."""
        return self.params.normalizer

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return weights [R, T], 0 where nothing is supervised (collective unless each token is for itself).

        Raises:
            ComponentError: The function returned something else than a weight for each token.
        """
        values = {"logp": -batch.loss_BT}
        if "reference" in self._taken:
            values["reference"] = -reference_losses(self.name, batch)
        if "entropy" in self._taken:
            if batch.entropy_BT is None:
                raise ComponentError(f"{self.name}: the micro-batch carries no entropies")
            values["entropy"] = batch.entropy_BT
        values = {key: value for key, value in values.items() if key in self._taken}
        mask = batch.mask_BT
        if self.params.function in token_functions.BY_TOKEN:
            weights: torch.Tensor = self._function(**values)
            return weights.masked_fill(~mask, 0.0)
        out = batch.loss_BT.new_zeros(mask.shape)
        out[mask] = self._over_ranks({key: value[mask] for key, value in values.items()}).to(out)
        return out

    def _over_ranks(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the weights of this rank's tokens, by the function over the tokens of all ranks (collective)."""
        import torch

        from dataflex import comm

        tokens, local = comm.gather_rows(torch.stack(list(values.values()), dim=1))
        found = self._function(**dict(zip(values, tokens.unbind(dim=1), strict=True)))
        if getattr(found, "shape", None) != tokens.shape[:1]:
            raise ComponentError(
                f"{self.name}: {self.params.function} returned {getattr(found, 'shape', type(found).__name__)}, "
                f"expected a tensor of shape ({len(tokens)},)"
            )
        weights: torch.Tensor = found.detach()[local]
        return weights
