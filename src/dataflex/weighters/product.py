"""Several weighters at once: their weights multiply before one normalization.

What the product is divided by follows from the factors. If one of them divides by sequences (``loss``, ``rho``,
``joint_update_aware``, ``meta``, ``presence``, ``group_dro``), so does the product, whose sum over the micro-batch of
all ranks is then that of those factors; weights of tokens have no place there. Else, if one of them changes the size of
the step (``adapt``, ``focal``, ``token``), the product is divided by the number of tokens, and factors of which only
ratios matter are first made 1 in their mean over the micro-batch's tokens. Else it is a weighted mean.

Each factor keeps its own ``warmup_steps``; before that its weights are equal. Targets are given once, for all factors.
A list, ``weighter: [column, {name: slm, ...}]``, is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import CheckpointError, ConfigError
from dataflex.method import (
    BatchView,
    Card,
    Context,
    Normalizer,
    Problem,
    Requires,
    Rows,
    RunFacts,
    State,
    Weighter,
    WeighterParams,
    param,
)
from dataflex.method import Params as BaseParams
from dataflex.parts import Part
from dataflex.registry import find, names
from dataflex.sequences import Sequences

if TYPE_CHECKING:
    import torch

_PRECEDENCE: tuple[Normalizer, ...] = ("num_sequences", "num_tokens", "weight_sum")


@dataclass(frozen=True)
class Factor(Part):
    """A weighter with its parameters, as one of several."""

    what = "factor"

    @classmethod
    def known(cls) -> list[str]:
        return [name for name in names("weighter") if name not in ("none", "product")]

    @classmethod
    def listed(cls, name: str) -> type[BaseParams]:
        return find("weighter", name).Params

    def build(self) -> Weighter:
        method = find("weighter", self.name)(self.params)
        assert isinstance(method, Weighter)
        return method


class OfSelection(Weighter):
    """Weigh rows as the selector did that chose them (``Selection.weights``)."""

    name = "of_selection"
    card = Card(summary="Weighs rows as the selector did that chose them.", paper="baseline", cost="none")

    def __init__(self, normalizer: Normalizer, weights_of: Callable[[Rows], NDArray[np.float64]]) -> None:
        super().__init__(WeighterParams())
        self.normalizer, self._weights_of = normalizer, weights_of

    def static_weights(self, rows: Rows, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        return self._weights_of(rows).astype(np.float32)


class Product(Weighter):
    """Multiply the weights of several weighters."""

    name = "product"
    card = Card(
        summary="Multiplies the weights of several weighters before one normalization.",
        paper="baseline",
        cost="that of its factors",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        of: tuple[Factor, ...] = param(help="the weighters, by name or as mappings with their parameters")

        def __post_init__(self) -> None:
            if len(self.of) < 2:
                raise ConfigError("of: takes at least two weighters; write a single one without 'product'")
            factors, problems = [factor.build() for factor in self.of], []
            by_sequences = [each.name for each in factors if each.normalizer == "num_sequences"]
            by_token = [each.name for each in factors if each.by_token]
            if by_sequences and by_token:
                problems.append(
                    f"of: {by_sequences[0]} divides the loss by sequences, which leaves no place for the weights of "
                    f"tokens that {by_token[0]} gives"
                )
            needs = [(each.name, each.requires()) for each in factors]
            if len({each.token_weights for _, each in needs if each.token_weights is not None}) > 1:
                problems.append("of: one run reads weights of turns or tokens from one place, but two are named")
            references = {each.reference.folder: name for name, each in needs if each.reference is not None}
            if len(references) > 1:
                problems.append(
                    f"of: one run has one reference model, but {' and '.join(references.values())} name different ones"
                )
            specs = [(name, each.embedding) for name, each in needs if each.embedding is not None]
            problems += [
                f"of: {specs[0][0]} and {name} embed sequences differently; give both the same layer and pooling"
                for name, spec in specs[1:]
                if spec != specs[0][1]
            ]
            if problems:
                raise ConfigError(problems)

    params: Params

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self._take([factor.build() for factor in params.of])

    @classmethod
    def joined(cls, *factors: Weighter) -> Product:
        """Return the product of weighters that are built already."""
        product = cls.__new__(cls)
        product._take(list(factors))
        return product

    def _take(self, factors: list[Weighter]) -> None:
        given = {factor.normalizer for factor in factors}
        self.factors, self.normalizer = factors, next(kind for kind in _PRECEDENCE if kind in given)

    @property
    def _by_place(self) -> dict[str, Weighter]:
        return {f"{place}-{factor.name}": factor for place, factor in enumerate(self.factors)}

    def requires(self) -> Requires:
        needs = [(factor, factor.requires()) for factor in self.factors]
        merged = Requires.merged({f"of[{place}]": each for place, (_, each) in enumerate(needs)})
        told = "; ".join(f"{factor.name}: {each.passes.told or factor.card.cost}" for factor, each in needs)
        return replace(merged, passes=replace(merged.passes, told=told))

    def check(self, run: RunFacts) -> Iterator[Problem]:
        for place, factor in enumerate(self.factors):
            for problem in factor.check(run):
                yield Problem(f"of[{place}].{problem.key}", problem.text)

    def refused_values(self, name: str, values: NDArray[Any]) -> tuple[NDArray[np.bool_], str] | None:
        """Return what the first factor refuses that refuses anything."""
        asked = (factor.refused_values(name, values) for factor in self.factors if name in factor.requires().columns)
        return next((found for found in asked if found is not None and found[0].any()), None)

    def warmup(self, total_steps: int) -> int:
        return min(factor.warmup(total_steps) for factor in self.factors)

    def due(self, step: int) -> bool:
        return any(factor.due(step) for factor in self.factors)

    def prepare(self, ctx: Context, rows: Rows) -> None:
        step, total = ctx.interval.start_step, ctx.total_sequences // ctx.global_batch
        for factor in self.factors:
            if factor.due(step) and factor.active(step, total):
                factor.prepare(ctx, rows)

    def static_weights(self, rows: Rows, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.float32] | None:
        """Return products [len(rows)] where all factors are known from the rows and are of one kind; else None."""
        alike = {(factor.normalizer, factor.warmup(0)) for factor in self.factors}
        found = [factor.static_weights(rows, columns) for factor in self.factors] if len(alike) == 1 else [None]
        known = [weights for weights in found if weights is not None]
        if len(known) < len(found):
            return None
        if any(weights.ndim > 1 for weights in known):
            known = [weights if weights.ndim > 1 else weights[:, None] for weights in known]
        product = known[0]
        for weights in known[1:]:
            product = product * weights
        return np.asarray(product, dtype=np.float32)

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return products [B], or [R, T] with a factor that weighs tokens (collective)."""
        import torch

        from dataflex import comm

        kept = self.normalizer
        product = batch.loss_B.new_ones(len(batch.rows_B))
        sequences = Sequences(rows_B=batch.rows_B, index_BT=batch.sequence_BT)
        sums: list[torch.Tensor] = []
        for factor in self.factors:
            weights = self._weights(factor, batch)
            if kept == "num_sequences" and factor.normalizer == "num_sequences":
                sums.append(weights.double().sum())
            elif kept == "num_tokens" and factor.normalizer == "weight_sum":
                counted = weights * (batch.tokens_B if weights.dim() == 1 else batch.mask_BT)
                scale = comm.ratio_of_sums(batch.mask_BT.sum(), counted.double().sum())
                weights = weights * scale.to(weights.dtype)  # whose mean over the tokens is 1
            if weights.dim() > product.dim():
                product = sequences.spread(product)
            elif weights.dim() < product.dim():
                weights = sequences.spread(weights)
            product = product * weights
        product = product.masked_fill(~batch.mask_BT if product.dim() > 1 else batch.tokens_B == 0, 0.0)
        if kept != "num_sequences":
            return product
        *before, after = comm.gather_sum(torch.stack([*sums, product.double().sum()])).unbind()
        scale = torch.stack(before).prod() / after
        return product * torch.where(after > 0, scale, torch.zeros_like(after)).to(product.dtype)

    def _weights(self, factor: Weighter, batch: BatchView) -> torch.Tensor:
        """Return the weights of one factor, equal ones during its warm-up."""
        if not factor.active(batch.step, batch.total_steps):
            equal = (batch.tokens_B > 0).to(batch.loss_B.dtype)
            return equal / (batch.tokens_M > 0).sum().clamp(min=1) if factor.normalizer == "num_sequences" else equal
        from dataflex.validate import check_static_weights, check_weights

        known = None if factor.requires().token_weights else check_static_weights(factor, batch.rows_B, batch.columns)
        found: torch.Tensor = factor.weigh(batch) if known is None else batch.loss_B.new_tensor(known)
        check_weights(factor, found, [tuple(batch.loss_B.shape), tuple(batch.loss_BT.shape)])
        return found.detach().to(batch.loss_B)

    def state_dict(self) -> State:
        states = {key: factor.state_dict() for key, factor in self._by_place.items()}
        return {key: state for key, state in states.items() if state}

    def load_state_dict(self, state: State) -> None:
        factors = self._by_place
        strange = sorted(set(state) - set(factors))
        if strange:
            raise CheckpointError(f"product keeps states of {', '.join(factors)}, but was given {', '.join(strange)}")
        for key, factor in factors.items():
            factor.load_state_dict(state.get(key, {}))
