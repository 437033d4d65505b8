"""Scorers of rows by their gradients, and the vectors that they compare with: of targets, weighted responses, rows.

A batch's per-sample gradients are compared with one mean gradient per target as they come, so that nothing of size
rows x parameters is kept (LESS, arXiv 2402.04333, without its projection).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex import comm
from dataflex.console import progress
from dataflex.errors import ConfigError, DataError, UnsupportedError, without_loss
from dataflex.signals.gradients.consumers import (
    Consumer,
    Dots,
    Norms,
    RowVectors,
    Sketch,
    TargetVectors,
    WeightedSums,
    inner_products,
)
from dataflex.signals.gradients.ekfac import Curvature, curvature
from dataflex.signals.gradients.engine import GradientEngine, supervised_sums
from dataflex.signals.gradients.parameters import choose_parameters
from dataflex.signals.gradients.precondition import (
    Moments,
    OptimizerState,
    Precondition,
    Preconditioner,
    moments_of,
    preconditioner,
)
from dataflex.signals.identity import state_identity
from dataflex.signals.losses import IGNORE
from dataflex.signals.model_access import ModelAccess
from dataflex.signals.specs import GradientSpec, WeightedResponse
from dataflex.signals.sweep import Sweep, Turn, bucketed, row_pass, to_device
from dataflex.state import blake2b

_HELD_NUMBERS = 2**28
"""Size of rows' gradients that are held together at most: 1 GiB in fp32."""

_LEAST_ROOT = 0.01
"""Roots of second moments count as at least this share of their mean in the weights of a sketch."""

Score = Callable[[dict[str, Any]], torch.Tensor]


class GradientScorers:
    """Opens scorers on the model under training, as one ``GradientSpec`` asks for them (collective).

    A scorer takes a collated batch on the device and gives fp32 [b, ...], NaN for rows without a loss. Many batches
    go inside ``engine.observing()``.

    Raises:
        ConfigError: Unknown preset, or no trainable parameter is left; forward mode with cosines, preconditioning or
            sketches.
        UnsupportedError: Rows are pairs, and the gradient of the run's loss is not known for a pair by itself.
    """

    def __init__(self, access: ModelAccess, spec: GradientSpec) -> None:
        self._access, self._spec = access, spec
        self._kind = replace(Precondition.preset(spec.precondition), include_momentum=spec.include_momentum)
        if spec.forward_mode and (spec.normalize or self._kind.kind != "none" or spec.sketch_size is not None):
            raise ConfigError("gradients: forward mode knows plain inner products only, no cosines or preconditioning")
        device, pairs = access.device.type, access.preferences
        chosen = choose_parameters(access.model, pattern=spec.parameters, last_blocks=spec.last_blocks)
        if pairs is not None and pairs.loss.unknown:
            raise UnsupportedError(pairs.loss.unknown)
        self.engine = GradientEngine(
            access.model,
            loss=None if pairs is None else pairs.losses(supervised_sums(access.model, chosen.values())),
            autocast=(lambda: torch.autocast(device, dtype=torch.bfloat16)) if spec.bf16 else access.autocast,
            parameters=chosen,
            release=access.release,
        )
        self.mean_of_cosines = spec.normalize and spec.mean_of_cosines
        """Whether targets' vectors are means of directions."""

    def of(self, consumer: Consumer) -> Score:
        """Return the scorer that gives a consumer's main result."""
        precondition = self.precondition()
        return lambda batch: self.engine.run(batch, [consumer], precondition=precondition)[consumer.name]

    def towards(self, targets: TargetVectors) -> Score:
        """Return the scorer [b, M] that compares rows with M vectors (collective)."""
        spec, engine = self._spec, self.engine
        if self._kind.kind == "ekfac":
            targets = self._curvature().inverse(targets, spec.ekfac_damping)
        if spec.forward_mode:
            return lambda batch: torch.stack([engine.jvp(batch, targets.one(i)) for i in range(len(targets))], dim=1)
        if spec.sketch_size is None:
            how: Literal["none", "row", "both"] = "row" if spec.mean_of_cosines else "both"
            return self.of(Dots(targets, normalize=how if spec.normalize else "none"))
        sketch, precondition = Sketch(size=spec.sketch_size, seed=spec.sketch_seed), self.precondition()
        wanted = sketch.of(targets)
        if spec.normalize and not spec.mean_of_cosines:
            wanted = wanted / targets.norms().to(wanted.device).clamp_min(1e-30).unsqueeze(1)

        def score(batch: dict[str, Any]) -> torch.Tensor:
            found = engine.run(batch, [sketch], precondition=precondition)
            scores = found["sketch"] @ wanted.to(found["sketch"].device).t()
            return scores / found["sketch.norms"].clamp_min(1e-30).unsqueeze(1) if spec.normalize else scores

        return score

    def _curvature(self) -> Curvature:
        """Return the model's curvature, measured once in a decision (collective)."""
        spec, known = self._spec, self._access.for_decision
        key = repr(("ekfac", spec.parameters, spec.last_blocks, spec.ekfac_rows))
        if key not in known:
            known[key] = curvature(self._access, self.engine, spec.ekfac_rows)
        found: Curvature = known[key]
        return found

    def norms(self) -> Score:
        """Return the scorer [b] of gradients' norms."""
        return self.of(Norms())

    def sketches(self, *, dim: int, seed: int) -> Score:
        """Return the scorer [b, dim] of sketches of length one; ``dim`` is even."""
        sketched = self.of(Sketch(size=dim, seed=seed))

        def score(batch: dict[str, Any]) -> torch.Tensor:
            found = sketched(batch)
            return found / found.norm(dim=1, keepdim=True).clamp_min(1e-30)

        return score

    def wide_sketch(self, *, size: int, seed: int) -> Sketch:
        """Return the sketch of rows that an index is made of, and of vectors compared with them (collective)."""
        moments = self.moments() if self._kind.kind == "adam" else {}
        adam = {name: kept for name, kept in moments.items() if isinstance(kept, Moments)}
        weights = sketch_weights(adam) if adam and len(adam) == len(moments) else None  # Muon's scales are alike
        return Sketch(size=size, seed=seed, weights=weights)

    def moments_identity(self) -> str:
        """Name the moments that scores depend on; "" where they depend on none (collective)."""
        if self._kind.kind != "adam":
            return ""
        return state_identity(
            (f"{name} {which}", tensor)
            for name, kept in self.moments().items()
            for which in ("first", "second", "buffer")
            if (tensor := getattr(kept, which, None)) is not None
        )

    def precondition(self) -> Preconditioner | None:
        """Return what turns gradients into directions, with the optimizer's moments of now (collective)."""
        return preconditioner(self._kind, self.moments() if self._kind.kind == "adam" else None)

    def moments(self) -> dict[str, OptimizerState]:
        """Return the optimizer's moments of now (collective)."""
        return moments_of(self._access.optimizer(), self.engine.parameters, self._access.backend)


def sketch_weights(moments: Mapping[str, Moments]) -> dict[str, torch.Tensor]:
    """Return weights of a sketch that compares Adam's directions with plain gradients, by parameter name.

    Coordinates of directions are about alike and those of gradients differ: the fourth root of the second moment is the
    root of how much. All are relative to the mean root, and those of coordinates without a gradient have a floor.
    """
    roots = {name: kept.second.sqrt() for name, kept in moments.items()}
    total = sum(float(root.double().sum()) for root in roots.values())
    mean = total / max(1, sum(root.numel() for root in roots.values())) or 1.0
    return {name: (root / mean).clamp_min(_LEAST_ROOT).sqrt() for name, root in roots.items()}


class TargetBuilder:
    """Collects the mean of plain (SGD) gradients of each target over batches.

    With ``normalize_rows`` each row counts with its unit vector, so that a product of a unit vector with the result is
    the mean of the cosines with the target's rows (what LESS's code computes); this takes a second pass over the batch.
    Without it, it is the target's mean gradient (the paper's text).
    """

    def __init__(self, engine: GradientEngine, names: Sequence[str], *, normalize_rows: bool = True) -> None:
        self.engine, self.names, self.normalize_rows = engine, names, normalize_rows
        self._sums = WeightedSums(TargetVectors.zeros(len(names), engine.shapes, engine.device))
        self._counts = torch.zeros(len(names), dtype=torch.float64, device=engine.device)
        self._losses, self._labelled = torch.zeros_like(self._counts), torch.zeros_like(self._counts)

    def add(self, batch: dict[str, Any], targets: torch.Tensor) -> None:
        """Add a batch whose rows belong to ``targets`` [b], -1 for one that does not count."""
        weights = (targets.cpu().unsqueeze(0) == torch.arange(len(self._counts)).unsqueeze(1)).float()
        counts = weights.double()
        if self.normalize_rows:
            norms = self.engine.run(batch, [Norms()])["norms"].cpu().nan_to_num(0.0)
            weights = torch.where(norms > 0, weights / norms, 0.0)
        self._sums.weights = weights
        losses = self.engine.run(batch, [self._sums])["losses"].cpu().double()
        finite = torch.isfinite(losses)
        labelled = batch["labels"][:, 1:].ne(IGNORE).reshape(len(losses), -1).any(dim=1).cpu()  # pairs are two rows
        self._counts += (counts * finite).sum(dim=1).to(self._counts.device)
        self._labelled += (counts * labelled).sum(dim=1).to(self._counts.device)
        self._losses += (counts * losses.masked_fill(~finite, 0.0)).sum(dim=1).to(self._counts.device)

    def losses(self) -> torch.Tensor:
        """Return the mean of the losses of each target's rows, float64 [num_targets] (collective)."""
        return comm.gather_sum(self._losses) / comm.gather_sum(self._counts)

    def finish(self) -> TargetVectors:
        """Return the means over all ranks' batches, equal on every rank; DataError for a target without a loss."""
        vectors, (counts, labelled) = self._sums.vectors, comm.gather_sum(torch.stack([self._counts, self._labelled]))
        vectors.add_up()
        if (counts == 0).any():
            lost = int(counts.argmin())
            raise without_loss(f"target {self.names[lost]!r}", labelled=bool(labelled[lost] > 0))
        return vectors.scale_(1 / counts)


def target_vectors(engine: GradientEngine, targets: Mapping[str, Sweep], *, normalize_rows: bool) -> TargetVectors:
    """Return one mean gradient per target, or mean unit vector (collective); see ``TargetBuilder``."""
    return targets_seen(engine, targets, normalize_rows=normalize_rows).finish()


def targets_seen(
    engine: GradientEngine,
    targets: Mapping[str, Sweep],
    *,
    normalize_rows: bool,
    around: Callable[[int, Turn], AbstractContextManager[None]] = lambda _number, _turn: nullcontext(),
) -> TargetBuilder:
    """Return a builder that has seen all rows of the targets (collective).

    ``around`` is entered for the passes of a batch, given the target's number and the batch.
    """
    builder = TargetBuilder(engine, [*targets], normalize_rows=normalize_rows)
    with engine.observing():
        for number, sweep in enumerate(targets.values()):
            for turn in sweep.turns():
                # A rank that only keeps step with the others adds nothing.
                with around(number, turn):
                    builder.add(turn.batch, torch.full((len(turn.positions),), number if turn.mine else -1))
    return builder


def responses_digest(responses: Sequence[WeightedResponse]) -> str:
    """Return a hash of everything that a task's responses say."""
    said = ((tuple(one.prompt), tuple(one.response), one.group, float(one.weight)) for one in responses)
    return blake2b(*(repr(each).encode() for each in said)).hex()


def policy_vectors(
    engine: GradientEngine, access: ModelAccess, tasks: Sequence[Sequence[WeightedResponse]], *, normalize_groups: bool
) -> TargetVectors:
    """Return what a policy gradient says the model should be trained towards, one vector per task (collective).

    The vector of a group (usually the responses sampled for one prompt) is the sum of weight times the gradient of
    -log p(response | prompt), summed over the response's tokens; that of a task is the mean over its groups, or with
    ``normalize_groups`` over their directions. Each group's gradient is held once, so that its length is exact.
    """
    groups = [
        (task, batches)
        for task, responses in enumerate(tasks)
        for batches in _batches_of_groups(task, responses, access.gradient_budget)
    ]
    sums = TargetVectors.zeros(len(tasks), engine.shapes, engine.device)
    world, rank = comm.world(), comm.rank()
    with engine.observing(), progress("gradients of graded responses", len(groups)) as told:
        for first in range(0, len(groups), world):
            turn = groups[first : first + world]
            # A rank without a group repeats the last one in vain: partitioned parameters need equal numbers of passes.
            task, batches = turn[rank] if rank < len(turn) else turn[-1]
            whole = TargetVectors.zeros(1, engine.shapes, engine.device)
            sink = WeightedSums(whole)
            for number in range(max(len(others) for _, others in turn)):
                batch = batches[min(number, len(batches) - 1)]
                counts = number < len(batches) and rank < len(turn)
                sink.weights = torch.tensor([[one.weight * len(one.response) * counts for one in batch]])
                engine.run(_collated(batch, access), [sink])
            norm = float(whole.norms())
            scale = (1.0 / norm if norm > 0 else 0.0) if normalize_groups else 1.0
            for name, tensor in sums.tensors.items():
                tensor[task].add_(whole.tensors[name][0], alpha=scale)
            told(min(first + world, len(groups)))
    sums.add_up()
    sizes = np.bincount([task for task, _ in groups], minlength=len(tasks))
    return sums.scale_(torch.from_numpy(1.0 / sizes))


def _batches_of_groups(
    task: int, responses: Sequence[WeightedResponse], token_budget: int
) -> Iterator[list[list[WeightedResponse]]]:
    by_group: dict[int, list[WeightedResponse]] = {}
    for one in responses:
        if not len(one.prompt) or not len(one.response):
            raise DataError(f"responses: one of group {one.group} has no prompt or no tokens")
        by_group.setdefault(one.group, []).append(one)
    if not by_group:
        raise DataError(f"responses: task {task} has none")
    for members in by_group.values():
        lengths = np.array([len(one.prompt) + len(one.response) for one in members], dtype=np.int64)
        yield [[members[i] for i in batch] for batch in bucketed(lengths, token_budget)]


def _collated(responses: Sequence[WeightedResponse], access: ModelAccess) -> dict[str, Any]:
    features = []
    for one in responses:
        prompt, response = [int(token) for token in one.prompt], [int(token) for token in one.response]
        ids, labels = prompt + response, [IGNORE] * len(prompt) + response
        features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return to_device(access.collate(features), access.device)


def row_products(
    engine: GradientEngine, sweep: Sweep, aims: TargetVectors | None, precondition: Preconditioner | None = None
) -> NDArray[np.float32]:
    """Return inner products of rows' directions with m vectors and with one another (collective).

    Rows' own gradients are held, about 1 GiB of them at a time; those that are held together take one pass over
    themselves and one over the rest. The result is float32 [n, m + n], equal on every rank; NaN in the rows and columns
    of rows without a loss.
    """
    at_once = max(1, _HELD_NUMBERS // max(1, sum(shape.numel() for shape in engine.shapes.values())))
    num, num_aims = len(sweep.rows), 0 if aims is None else len(aims)
    out, known = np.full((num, num_aims + num), np.nan, dtype=np.float32), np.zeros(num, dtype=bool)
    gram = out[:, num_aims:]
    with engine.observing():
        for start in range(0, num, at_once):
            block, rest = slice(start, min(start + at_once, num)), slice(start + at_once, num)
            vectors, finite = _held_rows(engine, _part(sweep, block), precondition)
            known[block] = finite.cpu().numpy()
            if aims is not None:
                out[block, :num_aims] = _products(vectors, aims).cpu().numpy()
            gram[block, block] = _products(vectors, vectors).cpu().numpy()
            if rest.start < num:
                dots = Dots(vectors, normalize="none")

                def score(batch: dict[str, Any], dots: Dots = dots) -> torch.Tensor:
                    return engine.run(batch, [dots], precondition=precondition)["dots"]

                gram[rest, block] = row_pass(_part(sweep, rest), score, (len(vectors),))
                gram[block, rest] = gram[rest, block].T
    out[~known] = np.nan
    gram[:, ~known] = np.nan
    return out


def _held_rows(
    engine: GradientEngine, sweep: Sweep, precondition: Preconditioner | None
) -> tuple[TargetVectors, torch.Tensor]:
    """Return every row's gradient, zero for rows without a loss, and which rows have one, bool [n] (collective)."""
    consumer = RowVectors(TargetVectors.zeros(len(sweep.rows), engine.shapes, engine.device))
    known = torch.zeros(len(sweep.rows), dtype=torch.int64, device=engine.device)
    for turn in sweep.turns():
        places = torch.from_numpy(turn.positions)
        # A rank that only keeps step with the others keeps nothing.
        consumer.places = places if turn.mine else torch.full_like(places, -1)
        losses = engine.run(turn.batch, [consumer], precondition=precondition)["losses"]
        if turn.mine:
            known[places.to(engine.device)] = torch.isfinite(losses).to(engine.device, torch.int64)
    consumer.vectors.add_up()  # each row is zero on all ranks but one
    return consumer.vectors, comm.gather_sum(known).bool()


def _products(a: TargetVectors, b: TargetVectors) -> torch.Tensor:
    """Return all inner products of two sets of vectors, float64 [len(a), len(b)]."""
    device = next(iter(a.tensors.values())).device
    out = torch.zeros(len(a), len(b), dtype=torch.float64, device=device)
    for name in a.tensors:
        for part in inner_products(a.flat(name), b.flat(name).to(device)):
            out += part
    return out


def _part(sweep: Sweep, which: slice) -> Sweep:
    return replace(sweep, rows=sweep.rows[which], lengths=sweep.lengths[which])
