"""Scores of training rows from the backward pass of their own training step.

For a matrix W with inputs a and output gradients g, row i's inner product with a direction V is
<G_i, V> = sum_t g_it' V a_it, so it needs neither G_i nor a second pass: hooks project a in the forward pass and g in
the backward pass, and the step itself is untouched. A large V is factored, V = U W', and its rank is the cost; where
one side is narrow, as an adapter's is, G_i itself is formed, one layer at a time, which costs less. What a
row's tokens count in the loss is read as the gradient of the token losses themselves, so the score is that of the
row's own mean loss, whatever denominators, weights, loss scales and accumulation were applied.

Sources: inner products without gradients by row, In-Run Data Shapley (arXiv 2406.11011); a fixed Adam scale,
arXiv 2602.00329; randomized factorization, Halko et al. 2011 (arXiv 0909.4061).

Legend: B rows of the micro-batch, T positions, K targets, m and n output and input width, r rank.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from dataflex.errors import UnsupportedError
from dataflex.sequences import Joined
from dataflex.signals.gradients.consumers import TargetVectors
from dataflex.signals.gradients.factors import Factors
from dataflex.signals.gradients.parameters import Unit, shape_of
from dataflex.signals.gradients.precondition import Moments, OptimizerState
from dataflex.signals.model_parts import model_parts
from dataflex.state import State, blake2b

logger = logging.getLogger(__name__)

FLOOR = 1e-3
"""Roots of second moments count as at least this share of their mean over the parameter."""
_OVERSAMPLING = 8
_NARROW = 64
"""Rows' gradients of a matrix are formed where one of its sides is no wider, as an adapter's is, if that is cheaper."""
MATRICES = frozenset({"linear", "conv1d"})
"""Kinds of layers whose weights are matrices used on tokens."""


def generator(seed: int, *names: object) -> torch.Generator:
    """Return a generator on the CPU that depends on its arguments alone."""
    digest = blake2b(repr((seed, *names)).encode(), size=8)
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def adam_scale(moments: Moments) -> torch.Tensor:
    """Return what Adam multiplies a gradient by, 1 / (sqrt(v / (1 - beta2^t)) + eps), fp32, the parameter's shape.

    0 where v is 0 (a coordinate that no gradient has reached); small roots are raised to ``FLOOR`` times their mean.
    Ones before the optimizer's first step.
    """
    if moments.step == 0:
        return torch.ones_like(moments.second)
    root = (moments.second / (1 - moments.betas[1] ** moments.step)).sqrt()
    scale = 1 / (root.clamp_min(FLOOR * float(root.mean())) + moments.eps)
    return scale.masked_fill_(moments.second == 0, 0.0)


def scaled(gradients: torch.Tensor, state: OptimizerState) -> torch.Tensor:
    """Return gradients [K, *shape] in the optimizer's scale: Adam's, or Muon's of a matrix."""
    if isinstance(state, Moments):
        return gradients * adam_scale(state).to(gradients.device)
    return state.scaled(gradients)


def factored(matrix: torch.Tensor, rank: int, *, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return U [m, r] and W [n, r] with U W' near ``matrix`` [m, n], and the share of its squared norm that they keep.

    A randomized singular value decomposition with one power iteration (arXiv 0909.4061, algorithm 4.4); both factors
    get the roots of the singular values, so that they have equal norms.
    """
    rows, columns = matrix.shape
    width = min(rank + _OVERSAMPLING, rows, columns)
    start = torch.randn(columns, width, generator=draw).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    kept = float(values[:rank].double().square().sum() / matrix.double().square().sum().clamp_min(1e-300))
    return (basis @ left[:, :rank]) * root, right[:rank].T * root, min(kept, 1.0)


@dataclass(frozen=True, kw_only=True)
class _Side:
    """How one side of a matrix parameter's gradient, inputs or output gradients, is projected.

    Attributes:
        projection: [direction + sketch, width], or None.
        direction: Columns for the directions; 0: the side itself.
        sketch: Columns for sketches of rows' gradients; 0: the side itself.
        width: Numbers of the side.
    """

    projection: torch.Tensor | None
    direction: int
    sketch: int
    width: int

    @property
    def columns(self) -> int:
        """Columns of the projection."""
        return self.direction + self.sketch

    def sketched(self) -> torch.Tensor | None:
        """Return the part of the projection that sketches, or None for the side itself."""
        return self.projection[self.direction :].T if self.projection is not None and self.sketch else None

    def of(self, tokens: torch.Tensor, found: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what directions and what norms need of ``tokens`` [B, T, width], ``found`` being their projection."""
        if self.projection is None:
            return tokens, tokens
        if found is None:
            found = F.linear(tokens, self.projection.to(tokens.dtype))  # 8 columns take half the time in this layout
        if not self.direction:
            return tokens, found
        return (
            found[..., : self.direction] if self.direction else tokens,
            found[..., self.direction :] if self.sketch else tokens,
        )


@dataclass(frozen=True, kw_only=True)
class _Matrix:
    """How a matrix parameter is looked at.

    Attributes:
        name: Of the parameter.
        inputs: The side of the layer's inputs.
        outputs: That of the gradients of its outputs.
        vectors: Directions [K, narrow x wide] where rows' gradients are formed, narrow side first; None where they
            are not.
    """

    name: str
    inputs: _Side
    outputs: _Side
    vectors: torch.Tensor | None

    @cached_property
    def widened(self) -> bool:
        """Whether the outputs are the narrow side."""
        return self.outputs.width <= self.inputs.width

    @property
    def sides(self) -> tuple[_Side, _Side]:
        """The narrow and the wide side."""
        return (self.outputs, self.inputs) if self.widened else (self.inputs, self.outputs)

    def formed(self, tokens: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Return rows' gradients, narrow side first (half the time of the other way), fp32 [B, narrow, wide]."""
        gradient = gradient.to(tokens.dtype)
        narrow, wide = (gradient, tokens) if self.widened else (tokens, gradient)
        return torch.bmm(narrow.transpose(1, 2), wide).float()

    def sketch(self, formed: torch.Tensor) -> torch.Tensor:
        """Return sketches of what ``formed`` returned [B, outputs, inputs]."""
        narrow, wide = self.sides
        if (drawn := wide.sketched()) is not None:
            formed = formed @ drawn
        if (drawn := narrow.sketched()) is not None:
            formed = drawn.T @ formed
        return formed if self.widened else formed.transpose(1, 2)


def _matrix(name: str, part: Part, right: _Side, left: _Side, *, swapped: bool) -> _Matrix:
    """Return how a matrix is looked at; ``swapped``: it is stored as [inputs, outputs]."""
    inputs, outputs = (left, right) if swapped else (right, left)
    matrix = _Matrix(name=name, inputs=inputs, outputs=outputs, vectors=None)
    narrow, wide = matrix.sides
    if isinstance(part, torch.Tensor) and narrow.width <= min(wide.columns, _NARROW):
        matrix = replace(matrix, vectors=(part if narrow is left else part.transpose(1, 2)).flatten(1))
    return matrix


@dataclass(kw_only=True)
class _Waiting:
    """Layers that were called with the same inputs, which are projected for all of them together.

    Attributes:
        tokens: The inputs [B, T, width].
        sides: Of each layer's matrix.
        found: What directions and what norms need, by layer; empty until the projection is made.
    """

    tokens: torch.Tensor | None
    sides: list[_Side]
    found: list[tuple[torch.Tensor, torch.Tensor]]

    @staticmethod
    def key(tokens: torch.Tensor) -> tuple[Any, ...]:
        """Return what the same inputs have in common, as long as one of them is alive."""
        return tokens.data_ptr(), tokens._version, tokens.shape, tokens.stride()

    def project(self, known: dict[tuple[int, ...], torch.Tensor]) -> None:
        """Make the projection, reading the inputs once, and let go of them; ``known`` keeps matrices put together."""
        tokens, sides = self.tokens, self.sides
        if tokens is None:
            return
        if len(sides) == 1:
            self.found = [sides[0].of(tokens)]
        else:
            key = tuple(id(side) for side in sides)
            if key not in known:
                known[key] = torch.cat([side.projection for side in sides if side.projection is not None])
            both, start = F.linear(tokens, known[key].to(tokens.dtype)), 0
            for side in sides:
                stop = start + side.columns
                self.found.append(side.of(tokens, both[..., start:stop]))
                start = stop
        self.tokens = None


Part: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""Directions in one parameter: whole, fp32 [K, *shape], or as factors U [K, m, r] and W [K, n, r]."""


@dataclass(frozen=True, kw_only=True)
class Directions:
    """What rows' gradients are compared with: K directions, each of length 1 over the captured parameters.

    Attributes:
        parts: By parameter name.
        lengths: Lengths before [K]; a product times it is that with the target's gradient in the optimizer's scale.
        coverage: Share of <q, V> in the captured parameters, q being the target's gradient [K].
        captured: Share of the squared norm that low ranks keep [K].
    """

    parts: dict[str, Part]
    lengths: torch.Tensor
    coverage: torch.Tensor
    captured: torch.Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device) -> Directions:
        """Return them with their parts on a device."""
        parts: dict[str, Part] = {}
        for name, part in self.parts.items():
            parts[name] = (part[0].to(device), part[1].to(device)) if isinstance(part, tuple) else part.to(device)
        return replace(self, parts=parts)

    def state_dict(self) -> State:
        """Return everything as arrays."""
        told = {name: getattr(self, name).numpy() for name in ("lengths", "coverage", "captured")}
        parts = {
            name: [each.cpu().numpy() for each in (part if isinstance(part, tuple) else (part,))]
            for name, part in self.parts.items()
        }
        return {**told, "parts": parts}

    @classmethod
    def from_state(cls, state: State) -> Directions:
        """Return what ``state_dict`` was called on."""
        told = {name: torch.tensor(state[name]) for name in ("lengths", "coverage", "captured")}
        parts: dict[str, Part] = {}
        for name, arrays in state["parts"].items():
            part = tuple(torch.tensor(each) for each in arrays)
            parts[name] = (part[0], part[1]) if len(part) == 2 else part[0]
        return cls(parts=parts, **told)

    @classmethod
    def none(cls, layers: Sequence[Unit]) -> Directions:
        """Return no direction, for norms alone."""
        parts: dict[str, Part] = {
            name: torch.zeros(0, *shape_of(unit.module.get_parameter(local)))
            for unit in layers
            for local, name in unit.parameters.items()
        }
        return cls(parts=parts, lengths=torch.zeros(0), coverage=torch.zeros(0), captured=torch.zeros(0))


def checkpointed(model: nn.Module) -> bool:
    """Return whether autograd lets go of layers' inputs and calls layers again for them."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def capturable(model: nn.Module, units: Iterable[Unit], *, whole: bool = False) -> tuple[list[Unit], dict[str, str]]:
    """Return the layers whose rows' gradients a step's own hooks see, and the parameters that are left out.

    Embeddings and the head are left out, since their directions are as large as the vocabulary; experts, since their
    inputs are tokens of several rows; layers without a formula; norms under activation checkpointing, which would
    have to keep their inputs.

    Args:
        model: The inner module, not the engine around it.
        units: Who answers for the trained parameters, after a pass over the target has tried their formulas.
        whole: Whether gradients are formed and inputs are kept: all layers with a formula are taken then.

    Returns:
        The layers, and parameter -> reason.

    Raises:
        UnsupportedError: No layer is left.
    """
    head = model_parts(model).head
    spared = set() if head is None else {id(parameter) for parameter in head.parameters()}
    recomputed = checkpointed(model)
    layers: list[Unit] = []
    left_out: dict[str, str] = {}
    for unit in units:
        kind, reason = unit.kind, ""
        if kind is None:
            reason = f"no formula for {type(unit.module).__name__}"
        elif whole:
            pass
        elif any(id(unit.module.get_parameter(local)) in spared for local in unit.parameters):
            reason = "of the head, as large as the vocabulary"
        elif kind.name == "embedding":
            reason = "an embedding, as large as the vocabulary"
        elif recomputed and kind.name not in MATRICES:
            reason = "activation checkpointing does not keep its inputs"
        if reason:
            left_out |= dict.fromkeys(unit.parameters.values(), reason)
        else:
            layers.append(unit)
    # A tied parameter counts wherever it is used, or nowhere.
    layers = [unit for unit in layers if not set(unit.parameters.values()) & set(left_out)]
    if not layers:
        told = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:5])
        raise UnsupportedError(f"scores from the training step: no trained layer can be captured: {told}")
    return layers, left_out


def directions(
    gradients: TargetVectors,
    moments: Mapping[str, OptimizerState] | None,
    layers: Sequence[Unit],
    *,
    rank: int | None,
    seed: int,
) -> Directions:
    """Return what the hooks of a step compare rows with: the targets' gradients in the optimizer's scale.

    Args:
        gradients: Mean gradient q of each target, over all trained parameters.
        moments: Of the optimizer, to scale q by; None: q itself.
        layers: From ``capturable``.
        rank: Rank of the factors of matrices for which that is cheaper than the whole; None: all whole.
        seed: Of the factorization.
    """
    num = len(gradients)
    matrices = {
        name: unit.kind is not None and unit.kind.name in MATRICES and local == "weight"
        for unit in layers
        for local, name in unit.parameters.items()
    }
    inside, everywhere, squares, kept = (torch.zeros(num, dtype=torch.float64) for _ in range(4))
    parts: dict[str, Part] = {}
    for name, gradient in gradients.tensors.items():
        vector = gradient if moments is None else scaled(gradient, moments[name])
        product = (gradient.flatten(1).double() * vector.flatten(1).double()).sum(dim=1).cpu()
        everywhere += product
        if name not in matrices:
            continue
        inside += product
        square = vector.flatten(1).double().square().sum(dim=1).cpu()
        squares += square
        if matrices[name] and rank is not None and rank * sum(vector.shape[1:]) < vector[0].numel():
            made = [factored(matrix.float(), rank, draw=generator(seed, name, k)) for k, matrix in enumerate(vector)]
            parts[name] = (torch.stack([one[0] for one in made]), torch.stack([one[1] for one in made]))
            kept += square * torch.tensor([one[2] for one in made], dtype=torch.float64)
        else:
            parts[name] = vector.float()
            kept += square
    lengths = squares.sqrt().clamp_min(1e-30)
    for name, part in parts.items():
        if isinstance(part, tuple):  # each factor has half of the length
            root = lengths.sqrt().to(part[0])[:, None, None]
            parts[name] = (part[0] / root, part[1] / root)
        else:
            parts[name] = part / lengths.to(part).view(-1, *([1] * (part.dim() - 1)))
    return Directions(
        parts=parts,
        lengths=lengths.float(),
        coverage=(inside / everywhere.clamp_min(1e-300)).float(),
        captured=(kept / squares.clamp_min(1e-300)).float(),
    )


def _sides(part: Part, draw: torch.Generator, sketch: int) -> tuple[_Side, _Side]:
    """Return the projections of a matrix gradient's columns and rows."""
    right = left = None
    if isinstance(part, tuple):
        left, right = (factor.permute(1, 0, 2).flatten(1) for factor in part)
        m, n = len(left), len(right)
    else:
        num, m, n = part.shape
        if not num:
            pass
        elif n >= m:  # the wider side is projected, the narrower one stays as it is
            right = part.permute(2, 0, 1).reshape(n, num * m)
        else:
            left = part.permute(1, 0, 2).reshape(m, num * n)

    def side(direction: torch.Tensor | None, width: int, device: torch.device) -> _Side:
        made = [] if direction is None else [direction]
        size = sketch if width > 4 * sketch else 0  # a narrow side is its own sketch, without an error
        if size:
            made.append((torch.randn(width, size, generator=draw) / size**0.5).to(device))
        return _Side(
            projection=torch.cat(made, dim=1).T.contiguous() if made else None,
            direction=0 if direction is None else direction.shape[1],
            sketch=size,
            width=width,
        )

    device = (part[0] if isinstance(part, tuple) else part).device
    return side(right, n, device), side(left, m, device)


class Taken(NamedTuple):
    """What was seen of the rows of a micro-batch; NaN where nothing counted."""

    scores: torch.Tensor  # fp32 [rows, K]: products of the gradient of each one's mean loss with the directions
    norms: torch.Tensor | None  # fp32 [rows]: lengths of those gradients, estimated
    sketches: torch.Tensor | None  # fp32 [rows, D]: products with those of ``sketch_of`` estimate products of gradients


class StepHooks:
    """Hooks on a model in training that see what each layer's parameters get from the rows of a micro-batch.

    Outputs get hooks that return nothing, so the step's numbers are what they were. Under activation checkpointing of
    either kind each hook acts once; a forward pass without gradients keeps nothing.

    Args:
        layers: From ``capturable``.
    """

    def __init__(self, layers: Sequence[Unit]) -> None:
        self.layers = layers
        self._handles: list[RemovableHandle] = []
        self._odd: set[str] = set()
        self._shape = (0, 0)
        self._joined: Joined | None = None
        self._listening = False

    def _listen(self, shape: tuple[int, int], joined: Joined | None = None) -> None:
        """Listen to the forward and backward pass of a micro-batch of ``shape`` (B, T).

        ``joined`` says where its B rows lie in one sequence of T tokens, where they do.
        """
        if not self._handles:
            self._handles = [
                unit.module.register_forward_hook(self._hook(unit), with_kwargs=True) for unit in self.layers
            ]
        self._shape, self._joined, self._listening = shape, joined, True

    def end(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._listening = [], False

    def _keep(self, unit: Unit, kept: tuple[torch.Tensor, ...]) -> Any:
        """Return what is kept of a call for the backward pass, given what the formula needs of it [B, T, ...]."""
        return kept

    def _see(self, unit: Unit, kept: Any, gradient: torch.Tensor) -> None:
        """Take the gradient of a layer's output [B, T, n], and what was kept of the call."""
        raise NotImplementedError

    def _miss(self, unit: Unit) -> None:
        """Take note of a layer that is called with something else than the positions of the rows."""
        raise UnsupportedError(
            f"scores from the training step: {unit} is not called with the positions of the rows; leave it out by the "
            "option parameters"
        )

    def _hook(self, unit: Unit) -> Any:
        kind = unit.kind
        assert kind is not None
        matrix = kind.name in MATRICES and "weight" in unit.parameters

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self._listening or not torch.is_grad_enabled() or not output.requires_grad:
                return
            if not unit.checked or self._odd:
                with torch.no_grad():
                    if not self._holds(unit, module, args, kwargs, output):
                        return
            kept: tuple[torch.Tensor | None, ...]
            if matrix:  # its input, without a gradient
                tokens = self._tokens((args[0] if args else next(iter(kwargs.values()))).detach())
                kept, fits = (tokens,), tokens is not None and tokens.dim() == 3
            else:
                with torch.no_grad():
                    kept = tuple(self._tokens(tensor.detach()) for tensor in kind.keep(module, args, kwargs, output))
                fits = all(tensor is not None for tensor in kept)
            held = self._keep(unit, kept) if fits else None
            del kept

            def take(gradient: torch.Tensor) -> None:  # autograd calls it without recording
                if not fits:  # a call that takes no part in the loss, as DoRA makes, does not matter
                    self._miss(unit)
                    return
                found = self._tokens(gradient)
                assert found is not None
                self._see(unit, held, found)

            output.register_hook(take)

        return record

    def _holds(self, unit: Unit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
        """Look at a layer's first call; one whose formula does not hold is left out."""
        assert unit.kind is not None
        if not unit.checked and unit.kind.check is not None:
            kept = tuple(tensor.detach() for tensor in unit.kind.keep(module, args, kwargs, output))
            reason = unit.kind.check(module, kept, output.detach())
            if reason is not None and str(unit) not in self._odd:
                self._odd.add(str(unit))
                logger.info("scores from the training step leave out %s: %s", unit, reason)
        unit.checked = True
        return str(unit) not in self._odd

    def _tokens(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """View what a layer was called with as [B, T, ...]; None if it is something else than the rows' positions."""
        B, T = self._shape
        if tensor.shape[:2] != self._shape or (tensor.dim() < 3 and tensor.is_floating_point()):
            if tensor.dim() != 2 or len(tensor) != B * T:
                return None
            tensor = tensor.view(B, T, -1)
        return tensor if self._joined is None else self._joined.split(tensor)


def _evened(counts_BT: torch.Tensor, mask_BT: torch.Tensor, documents_BT: torch.Tensor) -> torch.Tensor:
    """Return factors of output gradients, fp32 [B, T], after which all tokens of a row count alike.

    A position passes on what its document's losses count, so documents must not see one another. Factors keep the sum
    of what a row's tokens count. A token's loss is of its own document, the position before it of the one before.
    """
    own = documents_BT.clamp(min=0)
    predicted = F.pad(own[:, 1:], (0, 1))
    empty = counts_BT.new_zeros(len(own), int(own.max()) + 1)
    weights = empty.scatter_add(1, predicted, counts_BT)
    tokens = empty.scatter_add(1, predicted, mask_BT.to(counts_BT.dtype)) * (weights != 0)
    mean = weights.sum(dim=1, keepdim=True) / tokens.sum(dim=1, keepdim=True).clamp_min(1)
    return (mean * tokens / weights).nan_to_num(0.0).gather(1, own)


class StepCapture(StepHooks):
    """Hooks that score the rows of micro-batches.

    What the forward pass keeps of a matrix's inputs is their projection, or what autograd keeps of them anyway.

    Args:
        layers: From ``capturable``.
        sketch: Numbers per side of a matrix's sketch; 0: neither norms nor sketches.
        seed: Of the sketches.
        held: Whether autograd keeps layers' inputs for their weights' gradients, so that keeping them costs nothing.
    """

    def __init__(self, layers: Sequence[Unit], *, sketch: int = 0, seed: int = 0, held: bool = True) -> None:
        super().__init__(layers)
        self._held = held
        self._matrices: dict[str, _Matrix] = {}  # by the name of the layer
        self.norms = sketch > 0
        self._sketch, self._seed, self._num = sketch, seed, 0
        self._vectors: dict[str, torch.Tensor] = {}
        self._sides: dict[str, tuple[_Side, _Side]] = {}
        self._dots: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None
        self._factors: torch.Tensor | None = None  # of output gradients by position, fp32 [B, T]
        self._parts: dict[str, torch.Tensor] = {}
        self._waiting: _Waiting | None = None
        self._together: dict[tuple[int, ...], torch.Tensor] = {}
        self._folds: dict[str, torch.Tensor | None] = {}

    def aim(self, directions: Directions) -> None:
        """Compare rows with these directions from the next micro-batch on."""
        self._num, self._vectors, self._sides, self._together = len(directions), {}, {}, {}
        self._matrices = {}
        for unit in self.layers:
            assert unit.kind is not None
            for local, name in unit.parameters.items():
                part = directions.parts[name]
                if unit.kind.name in MATRICES and local == "weight":
                    right, left = _sides(part, generator(self._seed, "norms", name), self._sketch)
                    swapped = unit.kind.name == "conv1d"
                    self._sides[name] = right, left
                    self._matrices[unit.name] = _matrix(name, part, right, left, swapped=swapped)
                else:
                    assert isinstance(part, torch.Tensor)
                    self._vectors[name] = part.flatten(1)
                    size, most = part[0:1].numel() if len(part) else part.shape[1:].numel(), self._sketch**2
                    self._folds[name] = None
                    if size > 4 * most > 0:
                        drawn = torch.randn(size, most, generator=generator(self._seed, "norms", name))
                        self._folds[name] = drawn / self._sketch

    def sketch_of(self, vectors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return sketches of vectors fp32 [K, *shape] by parameter, as those of rows' gradients, fp32 [K, D]."""
        parts = []
        for unit in self.layers:
            assert unit.kind is not None
            for name in unit.parameters.values():
                vector = vectors[name].float()
                if name in self._sides:
                    right, left = (side.sketched() for side in self._sides[name])
                    vector = vector if right is None else vector @ right.to(vector)
                    vector = vector if left is None else left.T.to(vector) @ vector
                    vector = vector.transpose(1, 2) if unit.kind.name == "conv1d" else vector
                elif (fold := self._folds[name]) is not None:
                    vector = vector @ fold.to(vector)
                parts.append(vector.flatten(1) * (str(unit) not in self._odd))
        return torch.cat(parts, dim=1)

    def _sketches(self, rows: int, device: torch.device) -> torch.Tensor:
        parts = []
        for unit in self.layers:
            for name in unit.parameters.values():
                part = self._parts.get(name)
                if part is None:  # it took no part in the loss
                    part = torch.zeros(rows, self._sizes(name), device=device)
                parts.append(part.flatten(1))
        return torch.cat(parts, dim=1)

    @property
    def size(self) -> int:
        """Numbers of a sketch, D."""
        return sum(self._sizes(name) for unit in self.layers for name in unit.parameters.values())

    def _sizes(self, name: str) -> int:
        """Return the numbers of a parameter's sketch."""
        if name in self._sides:
            right, left = self._sides[name]
            return (right.sketch or right.width) * (left.sketch or left.width)
        fold = self._folds[name]
        return self._vectors[name].shape[1] if fold is None else fold.shape[1]

    def cost(self, model: nn.Module) -> float:
        """Return what the hooks cost a token relative to its forward pass: numbers of their matrices to the model's."""
        sides = [side.projection for pair in self._sides.values() for side in pair if side.projection is not None]
        return sum(each.numel() for each in sides) / max(sum(shape_of(p).numel() for p in model.parameters()), 1)

    def begin(self, shape: tuple[int, int], device: torch.device, joined: Joined | None = None) -> None:
        """Listen to the forward and backward pass of a micro-batch; arguments are those of ``_listen``."""
        self._forget()
        self._listen(shape, joined)
        rows = shape[0] if joined is None else len(joined.rows_R)
        self._dots = torch.zeros(rows, self._num, dtype=torch.float32, device=device)

    def watch(self, loss_BT: torch.Tensor, mask_BT: torch.Tensor, documents_BT: torch.Tensor | None = None) -> None:
        """Read what each supervised token's loss counts in the scalar that is differentiated.

        Args:
            loss_BT: Token losses.
            mask_BT: Positions whose next token is supervised.
            documents_BT: Document of each position in its row, int64, -1 for none, where documents may be weighed
                differently; None: a row's tokens count as they are weighed.
        """

        def take(gradient: torch.Tensor) -> None:
            self._counts = gradient.detach().float() * mask_BT
            if documents_BT is not None:
                self._factors = _evened(self._counts, mask_BT, documents_BT)

        loss_BT.register_hook(take)

    def end(self) -> None:
        """Remove the hooks."""
        super().end()
        self._forget()

    def _forget(self) -> None:
        self._dots, self._counts, self._factors, self._parts, self._waiting = None, None, None, {}, None

    def take(self, *, weights_B: torch.Tensor | None = None) -> Taken:
        """Return what was seen of the micro-batch whose backward pass is over, and forget it.

        Rows count with the mean loss over their tokens, weighted as those are in training; weights of documents are
        undone, and documents of weight 0 are left out. Where no token losses were watched, ``weights_B`` is what each
        row's mean loss counts.
        """
        assert self._dots is not None
        counts = self._counts if self._counts is not None else self._dots.new_zeros(len(self._dots), 1)
        if weights_B is not None:
            counts = weights_B.to(counts)[:, None]
        weight = counts.sum(dim=1)
        known = weight != 0
        safe = torch.where(known, weight, torch.ones_like(weight))
        scores = (self._dots / safe[:, None]).masked_fill(~known[:, None], torch.nan)
        norms = sketches = None
        if self.norms:
            sketches = self._sketches(len(safe), safe.device) / safe[:, None]
            sketches = sketches.masked_fill(~known[:, None], torch.nan)
            norms = sketches.norm(dim=1)
        self._forget()
        self._listening = False
        return Taken(scores, norms, sketches)

    def _keep(self, unit: Unit, kept: tuple[torch.Tensor, ...]) -> Any:
        matrix = self._matrices.get(unit.name)
        if matrix is None:
            return kept
        tokens, side = kept[0], matrix.inputs
        # For sketches alone wide inputs are projected at once, together with those of other layers and still in the
        # processor's cache; with directions there are as many columns as the narrow side has, and more.
        if matrix.vectors is not None and (not matrix.widened or (self._num and self._holds_inputs(tokens))):
            return tokens
        return side.of(tokens) if side.projection is None else self._wait(tokens, side)

    def _holds_inputs(self, tokens: torch.Tensor) -> bool:
        """Return whether autograd keeps these inputs, and not a copy in lower precision."""
        return self._held and not torch.is_autocast_enabled(tokens.device.type)

    def _wait(self, tokens: torch.Tensor, side: _Side) -> tuple[_Waiting, int]:
        """Return what inputs wait in for the layers after this one that are called with the same, and the place."""
        waiting = self._waiting
        if waiting is None or waiting.tokens is None or waiting.key(waiting.tokens) != waiting.key(tokens):
            if waiting is not None:
                waiting.project(self._together)
            waiting = self._waiting = _Waiting(tokens=tokens, sides=[], found=[])
        waiting.sides.append(side)
        return waiting, len(waiting.sides) - 1

    def _see(self, unit: Unit, kept: Any, gradient: torch.Tensor) -> None:
        if self._factors is not None:
            gradient = gradient * self._factors[..., None].to(gradient.dtype)
        matrix = self._matrices.get(unit.name)
        if matrix is not None:
            if isinstance(kept, torch.Tensor):
                self._add_formed(matrix, kept, gradient)
            else:
                self._add_matrix(matrix, kept, gradient)
        if matrix is None or len(unit.parameters) > 1:
            others = {local: name for local, name in unit.parameters.items() if name not in self._sides}
            self._add_others(unit.module, unit.kind, others, () if matrix is not None else kept, gradient)

    def _add_formed(self, matrix: _Matrix, tokens: torch.Tensor, gradient: torch.Tensor) -> None:
        assert self._dots is not None
        assert matrix.vectors is not None
        formed = matrix.formed(tokens, gradient)
        if self._num:
            self._dots += formed.flatten(1) @ matrix.vectors.T.to(formed)
        if self.norms:
            self._add_part(matrix.name, matrix.sketch(formed))

    def _add_matrix(self, matrix: _Matrix, inputs: Any, gradient: torch.Tensor) -> None:
        assert self._dots is not None
        outputs = matrix.outputs.of(gradient)
        if isinstance(inputs[0], _Waiting):
            waiting, place = inputs
            waiting.project(self._together)
            inputs = waiting.found[place]
        if num := self._num:
            into, out = (
                part.unflatten(-1, (num if side.direction else 1, -1))
                for part, side in zip((inputs[0], outputs[0]), (matrix.inputs, matrix.outputs), strict=True)
            )
            self._dots += (into * out).sum(dim=(1, 3), dtype=torch.float32)
        if self.norms:
            part = torch.bmm(outputs[1].transpose(1, 2).to(inputs[1].dtype), inputs[1])
            self._add_part(matrix.name, part.float())

    def _add_others(self, module: nn.Module, kind: Any, own: Mapping[str, str], kept: Any, gradient: Any) -> None:
        """Add biases and the weights of norms, whose gradients by row are small."""
        assert self._dots is not None
        by_row = kind.sample(module, kept or (gradient,), gradient, frozenset(own))
        for local, name in own.items():
            found = by_row[local]
            assert not isinstance(found, Factors)
            part = found.flatten(1)
            if self._num:
                self._dots += part.float() @ self._vectors[name].to(part.device).T
            if self.norms:
                fold = self._folds[name]
                self._add_part(name, part if fold is None else part @ fold.to(part))

    def _add_part(self, name: str, part: torch.Tensor) -> None:
        # Sketches are linear: the uses of a parameter are added up before the norm is taken.
        self._parts[name] = self._parts[name] + part if name in self._parts else part
