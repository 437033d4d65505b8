"""For authors of methods: stand-ins for what a run provides. Nothing here is used while training."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataflex import validate
from dataflex.config.mappings import collect
from dataflex.contract import class_problems, refuse_answer
from dataflex.errors import DataFlexError
from dataflex.method import (
    IN_RUN,
    BatchView,
    Benefit,
    Context,
    DomainWeighter,
    Method,
    Mixer,
    Orderer,
    Rows,
    Selection,
    Selector,
    Weighter,
)
from dataflex.plan.domains import Domains, DomainStats
from dataflex.plan.rollouts import RolloutStats
from dataflex.plan.schedule import Interval
from dataflex.rng import rademacher, uniforms
from dataflex.signals import kinds
from dataflex.signals.kinds import Signal
from dataflex.signals.specs import Generation, GenerationSpec, Part, WeightedResponse

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_TARGET = np.array([1.0, 1.25, 1.5], dtype=np.float32)  # losses of a target that was left out


@dataclass(frozen=True, kw_only=True)
class Call:
    """One question that a method asked of the signals."""

    signal: str  # which of Requires.signals it belongs to
    rows: Rows  # rows asked about
    asked: Signal | None = None  # the signal; None for tokens, texts and generations
    options: Mapping[str, Any] = field(default_factory=dict)  # every other argument, the signal's fields among them


Given = ArrayLike | Callable[[Any, Rows, str | None], ArrayLike]
"""Values of every training row [N, ...], or (signal, rows, target) -> values of the rows."""


class FakeSignals:
    """Signals made from arrays, which remember what was asked.

    Args:
        losses: Loss of every training row [N].
        targets: Losses of every row of each target data set, by name; 1, 1.25 and 1.5 for a target that is left out.
        gradients: Gradient of every training row [N, P]; made of the losses if left out.
        target_rows: Gradient of every row of each target [m, P], by name; about ones if left out.
        values: What is returned for a type of signal instead, by the type: values of every training row, or a function
            of (signal, rows, target). A type that is not known here has values made of the losses.
    """

    def __init__(
        self,
        losses: ArrayLike,
        *,
        targets: Mapping[str, ArrayLike] | None = None,
        gradients: ArrayLike | None = None,
        target_rows: Mapping[str, ArrayLike] | None = None,
        values: Mapping[type[Signal], Given] | None = None,
    ) -> None:
        self._losses = np.asarray(losses, dtype=np.float32)
        self._targets = {name: np.asarray(values, dtype=np.float32) for name, values in (targets or {}).items()}
        known = np.where(np.isfinite(self._losses), self._losses, np.nan)
        made = np.stack([known, np.cos(7 * known)], axis=1)
        self._gradients = np.asarray(made if gradients is None else gradients, dtype=np.float64)
        self._rows = {name: np.asarray(values, dtype=np.float64) for name, values in (target_rows or {}).items()}
        self._given: dict[type[Signal], Given] = {
            kinds.TokenLoss: self._token_loss,
            kinds.ResponseLoss: lambda signal, rows, target: (
                self._of(target)[rows] if signal.conditioned else 1.25 * self._of(target)[rows] + 0.1
            ),
            kinds.PreferenceLogps: self._preference_logps,
            kinds.AdaptedLoss: self._losses * np.float32(0.9),
            kinds.PerturbedLoss: self._perturbed_loss,
            kinds.EL2N: lambda _, rows, target: np.tanh(self._finite(rows, target)),
            kinds.Embedding: lambda _, rows, target: _circle(self._finite(rows, target)),
            kinds.LogitFeatures: self._logit_features,
            kinds.InRun: self._in_run,
            kinds.GateLoads: self._gate_loads,
            kinds.GradientScores: self._gradient_scores,
            kinds.GradientNorms: lambda _, rows, target: np.linalg.norm(self._gradients_of(target)[rows], axis=1),
            kinds.GradientSketches: self._gradient_sketches,
            kinds.GradientProducts: self._gradient_products,
            kinds.ResponseGradientScores: self._response_gradient_scores,
            **(values or {}),
        }
        self.calls: list[Call] = []

    @property
    def asked(self) -> frozenset[str]:
        """The signals that were asked for, to be compared with ``Requires.signals``."""
        return frozenset(call.signal for call in self.calls)

    def __call__(self, signal: Signal, rows: Rows, *, target: str | None = None) -> NDArray[np.float32]:
        """Return the values for the type of ``signal``, float32 [len(rows), ...]."""
        options = {**vars(signal), "target": target}
        self.calls.append(Call(signal=signal.needs, rows=rows, asked=signal, options=options))
        given = self._given.get(type(signal), self._of_ones_own)
        return np.asarray(given(signal, rows, target) if callable(given) else np.asarray(given)[rows], dtype=np.float32)

    def tokens(self, rows: Rows, *, target: str | None = None, part: Part = "all") -> list[NDArray[np.int64]]:
        """Tokens made of the losses, those of the prompt below 100; none where the loss is not finite."""
        self.calls.append(Call(signal="texts", rows=rows, options={"target": target, "part": part}))
        return [_tokens(float(loss), part) for loss in self._of(target)[rows]]

    def texts(self, rows: Rows, *, target: str | None = None, part: Part = "all") -> list[str]:
        """Return one word per token; see ``tokens``."""
        return [" ".join(f"word{token}" for token in row) for row in self.tokens(rows, target=target, part=part)]

    def num_rows(self, target: str | None = None) -> int:
        """Return the number of rows of the training set, or of the named target."""
        return len(self._rows[target]) if target in self._rows else len(self._of(target))

    def generate(
        self, prompts: Sequence[Sequence[int]], spec: GenerationSpec, *, ids: Rows | None = None
    ) -> list[Generation]:
        """Sample the response of the target row that has the prompt, or one other token, by fair draws."""
        names = np.arange(len(prompts), dtype=np.int64) if ids is None else ids
        self.calls.append(Call(signal="generate", rows=names, options={"spec": spec}))
        known = [loss for losses in (_TARGET, *self._targets.values()) for loss in losses.tolist()]
        right = {tuple(_tokens(loss, "prompt").tolist()): _tokens(loss, "completion").tolist() for loss in known}
        made = []
        for place, (prompt, name) in enumerate(zip(prompts, names.tolist(), strict=True)):
            draws = uniforms(spec.seed, "fake generate", name, np.arange(spec.num_samples))
            for sample, draw in enumerate(draws.tolist()):
                tokens = right.get(tuple(int(token) for token in prompt)) if draw < 0.5 else None
                tokens = [int(1000 * draw)] if tokens is None else tokens
                text = " ".join(f"word{token}" for token in tokens)
                made.append(Generation(prompt=place, sample=sample, token_ids=tuple(tokens), text=text, finished=True))
        return made

    def on_one_rank(self, what: str, compute: Callable[[], T]) -> T:
        """Return what ``compute`` returns."""
        return compute()

    def response_gradient(self, response: WeightedResponse) -> NDArray[np.float64]:
        """Gradient of a response [P], made of its tokens; meant to be overridden."""
        places = 1.0 + np.arange(self._gradients.shape[1])
        return np.asarray(np.sin(np.outer(np.asarray(response.response, dtype=np.float64), places)).sum(axis=0))

    def _of_ones_own(self, signal: Signal, rows: Rows, target: str | None) -> ArrayLike:
        """Return the losses; where a row has several values, as many different ones."""
        config = SimpleNamespace(hidden_size=4, vocab_size=8, num_hidden_layers=2)
        access: Any = SimpleNamespace(model=SimpleNamespace(config=config))
        try:
            tail = signal.tail(access)
        except AttributeError as error:
            told = f"FakeSignals: {type(signal).__name__}.tail asks for more than there is here ({error})"
            raise AssertionError(f"{told}; give values={{{type(signal).__name__}: ...}}") from error
        losses = self._finite(rows, target)
        if not tail:
            return losses
        return np.sin(losses[:, None] + np.arange(math.prod(tail))).reshape(len(rows), *tail)

    def _token_loss(self, signal: kinds.TokenLoss, rows: Rows, target: str | None) -> ArrayLike:
        """Return the losses, half of them under another model."""
        return (self._of(target) / np.float32(1 if signal.model is None else 2))[rows]

    def _preference_logps(self, signal: kinds.PreferenceLogps, rows: Rows, target: str | None) -> ArrayLike:
        """Return answers of three and of two tokens, of which the policy prefers the first the more, the larger a loss.

        The reference prefers none.
        """
        moved = self._finite(rows, target) if signal.of != "reference" else 0.0 * self._finite(rows, target)
        sums = np.stack([moved - 10.0, -8.0 + 0.0 * moved], axis=1)
        return np.stack([sums, np.broadcast_to([3.0, 2.0], sums.shape)], axis=2)

    def _perturbed_loss(self, signal: kinds.PerturbedLoss, rows: Rows, target: str | None) -> ArrayLike:
        """Return functions that are linear with the rows' gradients."""
        gradients = self._gradients_of(target)[rows]
        signs = rademacher(signal.seed, "fake", signal.direction, gradients.shape[1])
        base = self._losses[rows] if target is None else 1.0
        return np.asarray(base + signal.epsilon * (gradients @ signs))

    def _logit_features(self, signal: kinds.LogitFeatures, rows: Rows, target: str | None) -> ArrayLike:
        losses = self._finite(rows, target)
        return np.column_stack([np.float32(10) * losses, 100 * _circle(losses)])

    def _in_run(self, signal: kinds.InRun, rows: Rows, target: str | None) -> ArrayLike:
        """Answer for even rows, served at the step of their number; NaN for odd ones."""
        asked: dict[str, Signal] = {
            "losses": kinds.TokenLoss(),
            "norms": kinds.GradientNorms(),
            "scores": kinds.GradientScores(targets=signal.targets, normalize=signal.normalize),
            "embeddings": kinds.Embedding(),
        }
        values = asked[signal.what]
        given = self._given[type(values)]
        found = np.asarray(given(values, rows, target) if callable(given) else np.asarray(given)[rows])
        shown = np.column_stack([found, rows]).astype(np.float64)
        shown[rows % 2 == 1] = np.nan
        return shown

    def _gate_loads(self, signal: kinds.GateLoads, rows: Rows, target: str | None) -> ArrayLike:  # [n, 1 layer, 2]
        share = np.nan_to_num(np.abs(np.sin(self._of(target)[rows])))
        return np.stack([share, 1.0 - share], axis=1)[:, None, :]

    def _gradient_scores(self, signal: kinds.GradientScores, rows: Rows, target: str | None) -> ArrayLike:
        return self._compared(rows, np.stack([self._mean(name) for name in signal.targets]), signal.normalize)

    def _gradient_sketches(self, signal: kinds.GradientSketches, rows: Rows, target: str | None) -> ArrayLike:
        """Fill up with zeros, or project where ``dim`` is too small."""
        whole = self._gradients_of(target)[rows]
        width = whole.shape[1]
        matrix = np.eye(width, signal.dim)
        if signal.dim < width:
            matrix = np.random.default_rng(0).choice([-1.0, 1.0], size=(width, signal.dim))
        return _unit(whole @ matrix)

    def _gradient_products(self, signal: kinds.GradientProducts, rows: Rows, target: str | None) -> ArrayLike:
        own, drawn = self._gradients[rows], signal.target_rows
        aims = [
            self._gradients_of(name)[drawn[name]].mean(axis=0) if name in drawn else self._mean(name)
            for name in signal.targets
        ]
        scores = own @ np.stack(aims).T if aims else np.zeros((len(rows), 0))
        return np.concatenate([scores, own @ own.T], axis=1)

    def _response_gradient_scores(
        self, signal: kinds.ResponseGradientScores, rows: Rows, target: str | None
    ) -> ArrayLike:
        """Compare with weighted sums of ``response_gradient``."""
        given = signal.responses.values()
        aims = np.stack([sum(one.weight * self.response_gradient(one) for one in responses) for responses in given])
        return self._compared(rows, aims, signal.normalize)

    def _compared(self, rows: Rows, aims: NDArray[np.float64], cosines: bool) -> ArrayLike:
        ours = self._gradients[rows]
        return _unit(ours) @ _unit(aims).T if cosines else ours @ aims.T

    def _mean(self, target: str) -> NDArray[np.float64]:
        return np.nanmean(self._rows.get(target, np.ones((1, self._gradients.shape[1]))), axis=0)

    def _gradients_of(self, target: str | None) -> NDArray[np.float64]:
        if target is None:
            return self._gradients
        if target in self._rows:
            return self._rows[target]
        mean = self._mean(target)
        leaning = 0.1 * np.linalg.norm(mean) * np.eye(len(mean))[np.arange(self.num_rows(target)) % len(mean)]
        return np.asarray(mean + leaning - leaning.mean(axis=0))

    def _of(self, target: str | None) -> NDArray[np.float32]:
        return self._losses if target is None else self._targets.get(target, _TARGET)

    def _finite(self, rows: Rows, target: str | None) -> NDArray[np.float32]:
        losses = self._of(target)[rows]
        return np.where(np.isfinite(losses), losses, np.float32(np.nan))


def _circle(angles: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.stack([np.sin(angles), np.cos(angles)], axis=1)


def _tokens(loss: float, part: Part) -> NDArray[np.int64]:
    if not np.isfinite(loss):
        return np.zeros(0, dtype=np.int64)
    number = round(100 * loss)
    prompt = [number % size for size in (2, 3, 5)] + [number % 7] * (1 + number % 3)
    completion = [100 + number % 11] * 5
    return np.array({"all": prompt + completion, "prompt": prompt, "completion": completion}[part], dtype=np.int64)


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-30))


def example_context(
    sizes: Mapping[str, int] | None = None,
    *,
    lengths: ArrayLike | None = None,
    index: int = 0,
    start_step: int = 0,
    stop_step: int = 10,
    kind: Literal["warmup", "dynamic"] = "dynamic",
    **given: Any,
) -> Context:
    """Return a context as a method meets it at an interval; the global batch is 4.

    ``sizes`` is the number of rows of each domain (web 40, code 20 and math 4 if left out), ``lengths`` the number of
    tokens of each row [N] (10 each). ``given`` are fields of ``Context`` (``signals``, ``targets``, ``seed``, ...); the
    losses are 1, 1.01, ..., the one target is ``target``, and 100 tokens of each domain took 0.1, 0.05, 0.033, ... off
    its loss if they are left out.
    """
    sizes = {"web": 40, "code": 20, "math": 4} if sizes is None else sizes
    rows = np.arange(sum(sizes.values()))
    lengths_N = np.full(len(rows), 10) if lengths is None else np.asarray(lengths)
    falls = 0.1 / np.arange(1, len(sizes) + 1)
    benefit = Benefit(targets=("target",), changes_KT=-falls[:, None], tokens_K=np.full(len(sizes), 100))
    usual: dict[str, Any] = {
        "seed": 0,
        "targets": ("target",),
        "total_sequences": 100,
        "global_batch": 4,
        "learning_rate": 1e-3,
        "benefit": benefit,
    }
    return Context(
        interval=Interval(index=index, kind=kind, start_step=start_step, stop_step=stop_step),
        domains=Domains.from_sizes(tuple(sizes), tuple(sizes.values()), lengths_N.astype(np.int64)),
        **{"signals": FakeSignals(1.0 + 0.01 * rows), **usual, **given},
    )


def example_stats(
    losses: Sequence[float],
    tokens: Sequence[float] | None = None,
    *,
    names: Sequence[str] = ("web", "code", "math"),
    excess: Sequence[float] | None = None,
    proportions: Sequence[float] | None = None,
    step: int = 0,
) -> DomainStats:
    """Return the numbers of step ``step`` of 100 for K domains.

    ``losses`` is the mean token loss of each, ``tokens`` its number of supervised tokens (10 each if left out, 0 for an
    absent domain), ``excess`` the mean clipped excess of its tokens over the reference (0), ``proportions`` its
    sampling proportion (equal ones).
    """
    num_domains = len(losses)
    tokens_K = np.full(num_domains, 10.0) if tokens is None else np.array(tokens, float)
    excess_K = np.zeros(num_domains) if excess is None else np.array(excess, float)
    return DomainStats(
        names=tuple(names),
        step=step,
        total_steps=100,
        loss_sum=np.where(tokens_K > 0, losses, 0.0) * tokens_K,
        excess_sum=excess_K * tokens_K,
        excess_tokens=np.where(excess_K > 0, tokens_K, 0.0),
        tokens=tokens_K,
        sequences=np.ceil(tokens_K / 10.0),
        micro_batches=(tokens_K > 0).astype(np.float64),
        proportions=np.full(num_domains, 1 / num_domains) if proportions is None else np.array(proportions, float),
        learning_rate=1e-3,
    )


def example_rollouts(
    rewards: ArrayLike,
    *,
    rows: Sequence[int] | None = None,
    domains: Sequence[int] | None = None,
    names: Sequence[str] = ("web", "code", "math"),
    num_rows: int = 64,
    step: int = 0,
) -> RolloutStats:
    """Return one generation, without a model.

    Args:
        rewards: Reward of each answer [P, G], NaN for none.
        rows: Row of each group's prompt [P]; by default 0, 1, 2, ...
        domains: Domain of each group's prompt [P]; by default all of the first.
        names: Names of the domains.
        num_rows: Prompts of the training set.
        step: Generation, counted from 0.
    """
    rewards_PG = np.asarray(rewards, dtype=np.float64)
    count = len(rewards_PG)
    return RolloutStats(
        rows=np.asarray(range(count) if rows is None else rows, dtype=np.int64),
        rewards_PG=rewards_PG,
        lengths_PG=np.ones(rewards_PG.shape, dtype=np.int64),
        truncated_PG=np.zeros(rewards_PG.shape, dtype=np.bool_),
        domains_P=np.asarray([0] * count if domains is None else domains, dtype=np.int64),
        names=tuple(names),
        num_rows=num_rows,
        step=step,
    )


def example_batch(
    losses: Sequence[float], tokens: Sequence[int] | None = None, *, rank: int = 0, world: int = 1, step: int = 0
) -> BatchView:
    """Return the micro-batch of step ``step`` of 100 that ``rank`` of ``world`` sees.

    ``losses`` is the token-mean loss of every sequence of all ranks [M], in rank order, ``tokens`` its number of
    supervised tokens [M] (4 each if left out). Every token has its sequence's loss; sequence i is of domain i modulo 3.
    The reference's losses are half of the losses, entropies are equal to the losses, and embeddings are those of
    ``FakeSignals``.
    """
    import torch

    counts = [4] * len(losses) if tokens is None else list(tokens)
    size = len(losses) // world
    local = slice(rank * size, (rank + 1) * size)
    loss_M = torch.tensor(list(losses), dtype=torch.float32)
    tokens_M = torch.tensor(counts, dtype=torch.int64)
    mask_BT = torch.arange(max(counts)) < tokens_M[local, None]
    loss_BT = torch.where(mask_BT, loss_M[local, None], 0.0)
    rows_B = np.arange(len(losses), dtype=np.int64)[local]
    return BatchView(
        rows_B=rows_B,
        domains_B=rows_B % 3,
        loss_B=loss_M[local],
        tokens_B=tokens_M[local],
        loss_BT=loss_BT,
        mask_BT=mask_BT,
        loss_M=loss_M,
        tokens_M=tokens_M,
        local=local,
        step=step,
        total_steps=100,
        reference_BT=loss_BT / 2,
        entropy_BT=loss_BT.clone(),
        embeddings_BH=torch.stack([loss_M[local].sin(), loss_M[local].cos()], dim=1),
    )


def example_values(signal: Signal, logits: ArrayLike, labels: ArrayLike) -> NDArray[np.float32]:
    """Return what a signal makes of one batch of a model whose logits are given [b, *tail].

    ``logits`` is [b, T, V]; ``labels`` [b, T] lie at the tokens that they name, -100 where there is no supervised one.
    """
    import torch

    from dataflex.signals.model_access import Corpus, ModelAccess

    class Model(torch.nn.Module):
        def forward(self, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.as_tensor(np.asarray(logits, dtype=np.float32)))

    labels_BT = torch.as_tensor(np.asarray(labels, dtype=np.int64))
    access = ModelAccess(
        model=Model().eval(),
        collate=lambda features: {},
        autocast=nullcontext,
        device=torch.device("cpu"),
        token_budget=labels_BT.numel(),
        train=Corpus(dataset=(), lengths=np.full(len(labels_BT), labels_BT.shape[1])),
    )
    batch = {"input_ids": labels_BT.clamp(min=0), "attention_mask": torch.ones_like(labels_BT), "labels": labels_BT}
    with torch.no_grad(), signal.open(access) as scorer:
        values = scorer(batch)
    wanted = (len(labels_BT), *signal.tail(access))
    if tuple(values.shape) != wanted:
        raise AssertionError(f"{signal.name}: values {tuple(values.shape)}, expected {wanted}; see Signal.tail")
    return np.asarray(values.float().numpy())


@contextmanager
def global_random_state_untouched() -> Iterator[None]:
    """Raise ``AssertionError`` if the block moves a global random stream (Python's, numpy's, torch's CPU one)."""

    def snapshot() -> tuple[object, ...]:
        torch = sys.modules.get("torch")
        state = np.random.get_state(legacy=False)
        return random.getstate(), repr(state), None if torch is None else torch.get_rng_state().numpy().tobytes()

    before = snapshot()
    yield
    for stream, was, now in zip(("Python's", "numpy's", "torch's"), before, snapshot(), strict=True):
        if was is not None and was != now:
            raise AssertionError(f"{stream} global random state was moved; draw from ctx.rng(name) instead")


_ROWS = 64  # of example_context
_STEPS = [{"index": i, "start_step": 10 * i, "stop_step": 10 * i + 10} for i in range(14)]


def decision(method: Method, *, columns: Mapping[str, NDArray[Any]] | None = None, **context: Any) -> Any:
    """Ask a method once, let it see what follows a decision, and return its answer as plain Python, for comparing.

    ``columns`` are those that it requires, over the 64 rows of ``example_context``, which ``context`` is given to.
    """
    columns = dict(columns or {})
    ctx = example_context(columns=columns, **context)
    rows, step, needs = np.arange(_ROWS, dtype=np.int64), ctx.interval.start_step, method.requires()
    names = ctx.domains.names
    if isinstance(method, Selector):
        selection = method.select(rows, 16, ctx)
        _check_kept(method, selection, rows, 16)
        if "rollouts" in needs.signals:
            method.observe_rollouts(_rollouts(selection.rows, ctx))
        return selection.rows.tolist(), None if selection.scores is None else selection.scores.tolist()
    if isinstance(method, Orderer):
        keys = validate.check_sort_keys(method, method.sort_keys(rows, ctx), rows)
        return keys.tolist(), method.ranks(_ROWS, ctx.rng("ranks")).tolist(), method.available(3, 9)
    if isinstance(method, Mixer):
        mix = method.mix(replace(ctx, targets=names if needs.targets else ()))
        proportions = validate.check_mix(method, mix, names).tolist()
        weights = method.loss_weights().tolist() if isinstance(method, DomainWeighter) else None
        if "rollouts" in needs.signals:
            method.observe_rollouts(_rollouts(rows[:6], ctx))
        if method.observes:
            losses = [2.0 + 0.1 * k + math.cos(step + k) for k in range(len(names))]
            absent = [0.0 if k == 1 and step % 20 else 10.0 for k in range(len(names))]
            excess = [max(loss - 2.0, 0.0) for loss in losses]
            told = example_stats(losses, absent, names=names, excess=excess, proportions=proportions, step=step)
            method.observe(told)
        return proportions, weights
    assert isinstance(method, Weighter)
    if method.due(step):
        method.prepare(ctx, rows[:8])
    static = validate.check_static_weights(method, rows, columns)
    if static is not None:
        return static.tolist()
    return _weights(method, example_batch([1.0, 2.0, 3.0, 0.5], step=ctx.interval.index)).tolist()


def _rollouts(rows: Rows, ctx: Context) -> RolloutStats:
    """Return rewards of rows, some of them all equal, and of one row none."""
    rewards = (rows[:, None] * np.array([1, 3, 5, 7]) // 4 % 3 > 0).astype(float)
    rewards[rows % 16 == 5] = math.nan
    names = ctx.domains.names
    domains, step = (rows % len(names)).tolist(), ctx.interval.start_step
    return example_rollouts(rewards, rows=rows.tolist(), domains=domains, names=names, step=step)


def contract(cls: type[Method], params: Mapping[str, Any] | None = None, **columns: NDArray[Any]) -> None:
    """Check a method of one's own by what every built-in method holds; call it in a test.

    It builds from ``params`` and says what it is; the same seed gives the same answer; global random streams and the
    pool are left alone; its state goes through a checkpoint, and a foreign one is refused; it asks for the signals that
    it requires; rows come from the pool within the budget and none without a finite loss, proportions are a point of
    the simplex, ranks a permutation, weights finite and not negative.

    Args:
        cls: The method's class.
        params: Parameters that have no default, or others to check with, as a configuration has them.
        columns: Columns that it requires, over 64 rows.

    Raises:
        AssertionError: One of them does not hold, with what was found.
        ComponentError: An answer that a run refuses.
    """
    problems = class_problems(cls.kind, cls)
    assert not problems, "; ".join(problems)

    made = collect(cls.Params, params or {}, cls.name, problems)
    assert made is not None, "; ".join(problems)

    def build() -> Method:
        return cls(made)

    def ask(method: Method, **context: Any) -> Any:
        return decision(method, columns=columns, **context)

    for each in fields(cls.Params):
        assert 0 < len(each.metadata.get("help", "")) <= 140, f"{cls.name}.{each.name}: give it a help text"
    with global_random_state_untouched():
        assert ask(build(), seed=3) == ask(build(), seed=3), f"{cls.name}: the same seed gave two answers"
    check_state(build, ask)
    signals = FakeSignals(1.0 + 0.01 * np.arange(_ROWS))
    method = build()
    ask(method, signals=signals)
    stated = method.requires().signals - {"rollouts"}  # which are observed
    assert signals.asked == stated, f"{cls.name}: asked for {sorted(signals.asked)}, requires {sorted(stated)}"
    check_answers(build(), (math.nan,), **columns)


def check_state(build: Callable[[], Method], ask: Callable[..., Any]) -> None:
    """Check that a method goes on from its state as if it had not stopped, and refuses a state that is not its own."""
    straight, resumed = build(), build()
    for step in _STEPS[:4]:
        ask(straight, **step)
    state = straight.state_dict()
    assert _is_plain(state), f"state_dict: must hold plain values and arrays, found {state!r}"
    resumed.load_state_dict(state)
    went_on = [ask(straight, **step) for step in _STEPS[4:]]
    assert [ask(resumed, **step) for step in _STEPS[4:]] == went_on, "a resumed method decides otherwise"
    try:
        build().load_state_dict({"nonsense": 1})
    except (ValueError, DataFlexError):
        return
    raise AssertionError("load_state_dict: a foreign state was taken")


def check_answers(method: Method, absent: Sequence[float] = (math.nan,), **columns: NDArray[Any]) -> None:
    """Check the answers of a method over the pools, domains and batches that are hard to get right.

    ``absent`` are the losses of rows that must not be selected by their loss.
    """
    rows = np.arange(_ROWS, dtype=np.int64)
    if isinstance(method, Selector):
        for num_pool, budget in ((64, 16), (64, 64), (64, 0), (64, 1000), (1, 1), (1, 5), (0, 0), (0, 5)):
            pool = np.random.default_rng(0).permutation(rows)[:num_pool]
            before = pool.copy()
            check_selection(method, method.select(pool, budget, example_context(columns=columns)), pool, budget)
            assert pool.tolist() == before.tolist(), "the pool was changed"
        for bad in absent:
            signals = FakeSignals(np.where(rows % 2, 1.0 + 0.01 * rows, bad))
            selection = method.select(rows, 48, example_context(columns=columns, signals=signals))
            check_selection(method, selection, rows, 48)
            if method.requires().signals - {"rollouts", *IN_RUN}:  # which tell nothing of rows that were not served
                assert (selection.rows % 2 == 1).all(), f"rows with a loss of {bad} were selected"
    elif isinstance(method, Mixer):
        names = ("web", "code", "math")
        mix = method.mix(example_context(targets=names if method.requires().targets else ()))
        validate.check_mix(method, mix, names)
        assert _one_line(mix.reason), f"{method.name}: a reason is one line, found {mix.reason!r}"
    elif isinstance(method, Orderer):
        for count in range(70):
            validate.check_ranks(method, method.ranks(count, np.random.default_rng(count)), count)
        signals = FakeSignals(np.where(rows % 3, 1.0, math.nan))
        keys = method.sort_keys(rows[5:], example_context(columns=columns, signals=signals))
        validate.check_sort_keys(method, keys, rows[5:])
        shares = [method.available(step, 100) for step in range(100)]
        assert all(0 < share <= 1 for share in shares), f"{method.name}: available gives a share, above 0 and at most 1"
        assert shares == sorted(shares), "the available share falls"
        told = f"{method.name}: paced is {method.paced}, and available gives {sorted(set(shares))}"
        assert (shares != [1.0] * 100) == method.paced, told
        assert _one_line(method.reason), f"{method.name}: a reason is one line, found {method.reason!r}"
    elif isinstance(method, Weighter):
        _check_weights(method, columns)


def check_selection(selector: Selector, selection: Selection, pool: Rows, budget: int) -> None:
    """Check a selector's answer: rows of the pool, each once, within the budget, with scores that are numbers."""
    name, rows, scores = selector.name, selection.rows, selection.scores
    _check_kept(selector, selection, pool, budget)
    assert len(set(rows.tolist())) == len(rows), f"{name}: a row twice"
    if not selector.selects_subset:
        assert rows.tolist() == pool.tolist(), f"{name}: selects_subset is False, and rows are not those of the pool"
    found = "none" if scores is None else "some"
    assert (found == "some") == selector.gives_scores, f"{name}: gives_scores is {selector.gives_scores}, found {found}"
    if scores is not None:
        assert np.issubdtype(scores.dtype, np.floating), f"{name}: scores are {scores.dtype}, expected floating point"
        position = {row: i for i, row in enumerate(pool.tolist())}
        assert not any(math.isnan(scores[position[row]]) for row in rows.tolist()), f"{name}: rows whose score is NaN"
    assert _one_line(selection.reason), f"{name}: a reason is one line, found {selection.reason!r}"


def _check_kept(selector: Selector, selection: Selection, pool: Rows, budget: int) -> None:
    """Check what a run checks, which stops where no row is kept."""
    refuse_answer(selector, "select", selection)
    if len(selection.rows):
        validate.check_selection(selector, selection, pool, budget if selector.selects_subset else len(pool))


def _check_weights(weighter: Weighter, columns: Mapping[str, NDArray[Any]]) -> None:
    assert weighter.normalizer in ("weight_sum", "num_tokens", "num_sequences")
    assert weighter.active(99_999, 100_000) is True, f"{weighter.name}: not active at the end of a run"
    ctx = example_context(columns=dict(columns))
    if weighter.due(ctx.interval.start_step):
        weighter.prepare(ctx, np.arange(8))
    static = validate.check_static_weights(weighter, np.array([63, 0, 5, 5], dtype=np.int64), dict(columns))
    if static is not None:
        assert (np.isfinite(static) & (static >= 0)).all(), f"{weighter.name}: weights {static.tolist()}"
        return
    for losses, tokens in (([1.0, 2.0, 3.0, 9.0], [3, 1, 0, 8]), ([1.0], [4]), ([0.0, 0.0], [0, 0])):
        _weights(weighter, example_batch(losses, tokens))


def _weights(weighter: Weighter, batch: BatchView) -> torch.Tensor:
    """Return the weights of a batch that holds what the weighter requires and no more, checked."""
    needs = weighter.requires()
    given = {"reference_BT": needs.reference, "entropy_BT": needs.entropy, "embeddings_BH": needs.embedding}
    left_out: dict[str, Any] = {name: None for name, asked in given.items() if not asked}
    w = weighter.weigh(replace(batch, **left_out))
    validate.check_weights(weighter, w, (tuple(batch.loss_B.shape), tuple(batch.loss_BT.shape)))
    assert not w.requires_grad, f"{weighter.name}: weights are constants: no_grad, or detach()"
    assert bool((w.isfinite() & (w >= 0)).all()), (
        f"{weighter.name}: weights {w.tolist()} of losses {batch.loss_B.tolist()}"
    )
    return w


def _one_line(text: str) -> bool:
    return bool(text) and "\n" not in text


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | np.ndarray)


def oracle_row_gradients(
    loss: Callable[[dict[str, Any]], torch.Tensor],
    batch: Mapping[str, Any],
    row: int,
    parameters: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return the gradient of one row's loss by autograd, fp32; zeros for parameters that it does not use.

    ``loss`` gives the losses of the rows of a collated batch [b]; ``parameters`` must require gradients. Use it in eval
    mode, on a model whose parameters are whole; ``.grad`` is not touched.
    """
    import torch

    rows = len(batch["input_ids"])
    one = {
        key: value[row : row + 1] if torch.is_tensor(value) and value.dim() and len(value) == rows else value
        for key, value in batch.items()
    }
    with torch.enable_grad():
        total = loss(one).sum()
    gradients: tuple[torch.Tensor | None, ...] = (None,) * len(parameters)
    if total.requires_grad:
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros(parameter.shape) if gradient is None else gradient.float()
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }
