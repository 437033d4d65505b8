"""The mixture stream: which row comes next when domains are served in proportions that may change.

The state is an append-only log of segments and the number of rows read of each domain; the rest is a function of
(seed, segment, block) and (seed, domain name, epoch). So the stream is the same however it is cut into calls, and a
resumed run goes on at any sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataflex.errors import CheckpointError, DataError
from dataflex.plan.domains import Domains, Rows, check_proportions
from dataflex.plan.orders import Keys, Order, OrderedEpochs
from dataflex.plan.planner import ShuffledEpochs
from dataflex.rng import keys
from dataflex.state import State


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """One entry of the log: proportions of sequences [K] from sequence ``start`` on, decided at an optimizer step."""

    start: int
    proportions: NDArray[np.float64]
    decided_at_step: int
    reason: str = ""


Interleave = Literal["shuffled", "even"]


_FEW_DOMAINS = 16


def block_counts(
    proportions: NDArray[np.float64], block: int, residual: NDArray[np.float64], num: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Count the sequences of each domain in ``num`` consecutive blocks by residual carry.

    need = proportions * block + residual; every domain gets floor(need), clipped at 0; what is missing goes to the
    largest remainders, ties by index; residual = need - count. So the cumulative count of a domain stays within about
    one sequence of its share, whatever its size. A domain of proportion 0 must have residual 0 and gets nothing.

    Returns:
        Counts int64 [num, K], and residuals float64 [num + 1, K], row b before block b.
    """
    active = np.flatnonzero(proportions > 0)
    shares, rest = proportions[active] * block, residual[active]
    counts, rests = np.empty((num, active.size)), np.empty((num + 1, active.size))
    rests[0] = rest
    few = active.size <= _FEW_DOMAINS
    if few:
        counts[:], rests[1:] = _of_few(shares.tolist(), rest.tolist(), block, num)
    for b in range(0 if few else num):
        need = shares + rest
        base = np.maximum(np.floor(need), 0.0)
        rest = need - base
        short = block - int(base.sum())
        if short > 0:
            # The remainders sum to `short` and each is below 1: at least `short` of them are positive, so
            # that handing out one at a time would pick none twice.
            order = np.argsort(-rest, kind="stable")[:short]
            rest[order] -= 1.0
            base[order] += 1.0
        for _ in range(-short):  # clipping at 0 gave out too many
            k = np.argmin(np.where(base > 0, rest, np.inf))
            rest[k] += 1.0
            base[k] -= 1.0
        counts[b], rests[b + 1] = base, rest
    all_counts = np.zeros((num, proportions.size), dtype=np.int64)
    all_rests = np.zeros((num + 1, proportions.size))
    all_counts[:, active], all_rests[:, active] = counts, rests
    return all_counts, all_rests


def _of_few(
    shares: list[float], rest: list[float], block: int, num: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Run the loop of ``block_counts`` for few domains, for which plain Python takes half the time; the same bits."""
    counts, rests = [], []
    for _ in range(num):
        need = [share + left for share, left in zip(shares, rest, strict=True)]
        base = [int(value) if value > 0.0 else 0 for value in need]
        rest = [value - whole for value, whole in zip(need, base, strict=True)]
        short = block - sum(base)
        for _ in range(short):
            k = rest.index(max(rest))
            base[k], rest[k] = base[k] + 1, rest[k] - 1.0
        for _ in range(-short):
            k = min((k for k in range(len(base)) if base[k] > 0), key=rest.__getitem__)
            base[k], rest[k] = base[k] - 1, rest[k] + 1.0
        counts.append(base)
        rests.append(rest)
    size = (num, len(shares))
    return np.array(counts, dtype=np.float64).reshape(size), np.array(rests).reshape(size)


def evenly(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the domains of one block as evenly spread as whole sequences allow, given the counts of each [K].

    Place n goes to the domain that is furthest behind, argmax of share x max(n, 1) - given so far, the first
    of equal ones, as in Megatron-Core's blending.
    """
    block = int(counts.sum())
    shares, given = counts / max(block, 1), np.zeros(counts.size)
    labels = np.empty(block, dtype=np.int64)
    for place in range(block):
        behind = np.where(given < counts, shares * max(place, 1) - given, -np.inf)
        labels[place] = k = int(np.argmax(behind))
        given[k] += 1
    return labels


AtCap = Literal["error", "redistribute", "stop"]

_NO_LIMIT = np.iinfo(np.int64).max


def cap_limits(sizes: NDArray[np.int64], max_epochs: ArrayLike | None, unit: int = 1) -> NDArray[np.int64]:
    """Return how many sequences each domain may serve in all, int64 [K], given the most epochs of each or of all.

    Fractions are allowed; NaN and inf mean no cap, and give a very large number. ``unit`` sequences are served at once:
    what is left of them at a cap is not.
    """
    limits = np.full(sizes.size, _NO_LIMIT)
    if max_epochs is not None:
        caps = np.broadcast_to(np.asarray(max_epochs, dtype=np.float64), sizes.shape)
        assert not (caps < 0).any(), f"max_epochs {caps.tolist()}"
        finite = np.isfinite(caps)
        # The small addend keeps 0.29 epochs of 100 rows at 29.
        limits[finite] = np.floor(caps[finite] * sizes[finite] + 1e-6).astype(np.int64)
    return limits - limits % unit


def without(proportions: NDArray[np.float64], closed: NDArray[np.bool_]) -> NDArray[np.float64] | None:
    """Return proportions in which the others have taken over the share of closed domains; None if there is no other."""
    left = np.where(closed, 0.0, proportions)
    total = float(left.sum())
    return left / total if total > 0 else None


def expected_epochs(
    sizes: NDArray[np.int64],
    proportions: NDArray[np.float64],
    total: int,
    max_epochs: ArrayLike | None = None,
    at_cap: AtCap = "error",
    drawn: NDArray[np.int64] | None = None,
    *,
    unit: int = 1,
) -> NDArray[np.float64]:
    """Return the epochs of each domain [K] after ``total`` more sequences at fixed proportions of sequences.

    ``drawn`` are the sequences drawn before [K]. With ``at_cap: error`` the caps ``max_epochs`` (as in ``cap_limits``)
    are ignored, so that the result shows by how much they would be exceeded.
    """
    sequences = np.zeros(sizes.size) if drawn is None else drawn.astype(np.float64)
    limits = cap_limits(sizes, None if at_cap == "error" else max_epochs, unit).astype(np.float64)
    left = float(total)
    closed = sequences >= limits
    while left > 0:
        shares = without(proportions, closed)
        if shares is None or (at_cap == "stop" and (closed & (proportions > 0)).any()):
            break
        active = np.flatnonzero(shares > 0)
        steps = (limits - sequences)[active] / shares[active]
        step = min(left, float(steps.min()))
        sequences = np.minimum(sequences + step * shares, limits)
        left -= step
        # The domains that bounded the step are full, whatever rounding says.
        full = active[steps <= step]
        sequences[full] = limits[full]
        closed[full] = True
    return sequences / sizes


_CHUNK_IDS = 1 << 19  # ids made at a time
_KEPT_SEGMENTS = 64  # the stream needs the last one only
_CHUNK_CELLS = 1 << 21  # block x domain cells made at a time
_FIXED = ("names", "sizes", "seed", "block", "unit", "interleave")  # what a resumed stream must have in common


class MixtureSampler:
    """Yields row ids so that domains follow proportions, block by block, without replacement.

    - Counts in a block (usually the global batch) follow the proportions by residual carry (``block_counts``).
    - The order within a block is a permutation keyed by (seed, segment, block), or ``evenly``; with ``unit``, that many
      consecutive sequences are of one domain (a domain-pure micro-batch).
    - Each domain is read in epochs of its own (``ShuffledEpochs``, or ``OrderedEpochs`` with an ``order``, which
      ``order`` gives its keys): every row once before any twice.
    - A segment may end inside a block; what was owed and not served is carried on, so that deviations do not add up.
      Where a segment ends, no domain is ahead of its share by more than one ``unit`` and its share of a block.

    At the first sequence of the first ``unit`` past a domain's cap, of ``max_epochs`` [K], ``error`` raises and leaves
    the sampler as it was before the call; ``redistribute`` ends the segment and appends one in which the others share
    its proportion; ``stop`` returns fewer rows than asked, and none until a segment without that domain is appended.
    """

    def __init__(
        self,
        domains: Domains,
        seed: int,
        block: int,
        max_epochs: ArrayLike | None = None,
        at_cap: AtCap = "error",
        *,
        unit: int = 1,
        interleave: Interleave = "shuffled",
        shuffle: bool = True,
        order: Order | None = None,
    ) -> None:
        assert block >= 1, f"block {block}"
        assert block % unit == 0, f"block {block}, unit {unit}"
        assert at_cap in get_args(AtCap), f"at_cap {at_cap!r}"
        self.names = domains.names
        self.sizes = domains.num_rows
        self.seed = int(seed)
        self.block = int(block)
        self.unit = int(unit)
        self.interleave: Interleave = interleave
        self.at_cap: AtCap = at_cap
        self.limits = cap_limits(self.sizes, max_epochs)
        self.segments: list[Segment] = []
        self.position = 0
        self.drawn = np.zeros(len(self.names), dtype=np.int64)
        self.stopped_by: tuple[str, ...] = ()
        self._forgotten = 0  # number of earlier segments
        self._residual = np.zeros(len(self.names), dtype=np.float64)  # before the current block
        self._begun: tuple[NDArray[np.int64], NDArray[np.bool_]] | None = None  # epochs [K] and rows served [N]
        self._streams: list[ShuffledEpochs | OrderedEpochs] = [
            ShuffledEpochs(domains.rows(k), name, self.seed, shuffle=shuffle)
            if order is None
            else OrderedEpochs(domains.rows(k), name, self.seed, order)
            for k, name in enumerate(self.names)
        ]
        self._domain_of = domains.domain_of

    def go_on(self, epochs: NDArray[np.int64], served: NDArray[np.bool_], before: State | None) -> None:
        """Begin inside epochs in progress [K] of which rows were served [N], after the stream of another pool."""
        self._begin(epochs, served)
        self.drawn = epochs * self.sizes + np.bincount(self._domain_of[served], minlength=len(self.names))
        if before is not None:  # no segment's order is used again
            self._forgotten = int(before["forgotten"]) + len(before["segments"]["start"])

    def _begin(self, epochs: NDArray[np.int64], served: NDArray[np.bool_]) -> None:
        self._begun = epochs, served
        rows = np.flatnonzero(served)
        labels = self._domain_of[rows]
        ends = np.cumsum(np.bincount(labels, minlength=len(self.names)))[:-1]
        parts = np.split(rows[np.argsort(labels, kind="stable")], ends)
        for stream, epoch, part in zip(self._streams, epochs.tolist(), parts, strict=True):
            stream.begin(epoch, part)

    @property
    def _ordered(self) -> list[tuple[OrderedEpochs, int]]:
        """Streams in an orderer's order, and how far each was read."""
        read = zip(self._streams, self.drawn.tolist(), strict=True)
        return [(stream, drawn) for stream, drawn in read if isinstance(stream, OrderedEpochs)]

    def wanted(self, count: int) -> Rows:
        """Return the rows whose keys the next ``count`` ids may depend on."""
        return np.sort(np.concatenate([stream.wanted(drawn, count) for stream, drawn in self._ordered]))

    def order(self, keys: Keys, step: int, total_steps: int) -> None:
        """Read each domain from here on in the order of keys [N] of a decision at ``step``."""
        for stream, drawn in self._ordered:
            stream.decide(drawn, keys, lambda _: step, total_steps)

    def append(
        self, proportions: ArrayLike, start: int, decided_at_step: int, reason: str = "", *, go_on: bool = False
    ) -> None:
        """Start a segment: from sequence ``start``, the next one to be drawn, serve proportions of sequences [K].

        ``decided_at_step`` and ``reason`` are for the record. ``go_on``: the decision completes one that was cut short:
        with the same proportions the last segment goes on, so that the stream is that of a run which was never cut.

        Raises:
            ComponentError: Malformed proportions.
            DataError: All domains with a share are at their caps.
        """
        shares = check_proportions(proportions, self.names)
        if not self.segments:
            self.position = int(start)
        assert start == self.position, f"segment starts at {start}, but the next sequence is {self.position}"
        closed = self._closed(shares) if self.at_cap == "redistribute" else np.zeros(shares.size, dtype=np.bool_)
        if go_on and self.segments:
            left = without(shares, closed)
            if left is not None and np.allclose(left, self.segments[-1].proportions, rtol=0.0, atol=1e-12):
                return
        if len(self.segments) >= 2 * _KEPT_SEGMENTS:
            self._forgotten += len(self.segments) - _KEPT_SEGMENTS
            del self.segments[:-_KEPT_SEGMENTS]
        self._open(shares, decided_at_step, reason)
        if closed.any():
            self._redistribute()

    @property
    def never(self) -> tuple[str, ...]:
        """Domains whose caps leave them less than a unit, though not nothing."""
        return tuple(name for name, most in zip(self.names, self.limits.tolist(), strict=True) if 0 < most < self.unit)

    @property
    def _left(self) -> NDArray[np.int64]:
        """Sequences that the caps leave to each domain, in whole units [K]."""
        left = np.maximum(self.limits - self.drawn, 0)  # a cap may be lower now than when the rows were drawn
        return left - left % self.unit

    def _closed(self, shares: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which domains with a share are at their caps [K]."""
        return (self._left == 0) & (shares > 0)

    def _open(self, shares: NDArray[np.float64], decided_at_step: int, reason: str) -> None:
        if self.segments:
            last = self.segments[-1]
            number, used = divmod(self.position - last.start, self.block)
            if used:
                served = np.bincount(self._labels(number, 0, used)[0], minlength=shares.size)
                self._residual = self._residual + (last.proportions * used - served) / self.unit
        # A domain without a share keeps no residual; those of the others must still sum to 0.
        residual = np.where(shares > 0, self._residual, 0.0)
        self._residual = residual - residual.sum() * shares
        self.segments.append(
            Segment(start=self.position, proportions=shares, decided_at_step=int(decided_at_step), reason=reason)
        )

    def _redistribute(self) -> None:
        last = self.segments[-1]
        closed = self._closed(last.proportions)
        shares = without(last.proportions, closed)
        told = ", ".join(f"{self.names[k]!r} at {self.drawn[k]:,} rows" for k in np.flatnonzero(closed))
        if shares is None:
            raise DataError(
                f"after {self.position:,} sequences every domain with a share is at its max_epochs ({told}). "
                "Raise max_epochs or train for fewer steps."
            )
        self._open(shares, last.decided_at_step, f"share of domains at their cap redistributed: {told}")

    def draw(self, count: int, whole: int = 1) -> Rows:
        """Return the next ``count`` row ids, fewer only where ``at_cap`` is ``stop``: then a multiple of ``whole``.

        Raises:
            DataError: A cap is passed and the policy is ``error``, or no domain is left.
        """
        assert self.segments, "append proportions before drawing"
        before, num_segments = (self.position, self._residual, self.drawn), len(self.segments)
        out, done = np.empty(count, dtype=np.int64), 0
        try:
            while done < count:
                rows, blocked = self._serve(count - done)
                out[done : done + rows.size] = rows
                done += rows.size
                if blocked is None:
                    continue
                if self.at_cap == "stop":
                    self.stopped_by = tuple(self.names[k] for k in np.flatnonzero(self._left == 0))
                    if done % whole:
                        self.position, self._residual, self.drawn = before
                        return self.draw(done - done % whole)
                    break
                if self.at_cap == "error":
                    raise DataError(
                        f"domain {self.names[blocked]!r} is used up after {self.position:,} sequences: max_epochs "
                        f"allows {self.limits[blocked]:,} draws of its {self.sizes[blocked]:,} rows. Raise "
                        "max_epochs, lower its proportion, or set 'at_cap: redistribute'."
                    )
                self._redistribute()
        except DataError:
            self.position, self._residual, self.drawn = before
            del self.segments[num_segments:]
            raise
        return out[:done]

    def _serve(self, count: int) -> tuple[Rows, int | None]:
        """Draw at most ``count`` rows of the current segment; the domain whose cap is next, if it cut them."""
        first, offset = divmod(self.position - self.segments[-1].start, self.block)
        labels, rests = self._labels(first, offset, count)
        used = np.bincount(labels, minlength=len(self.names))
        left = self._left
        over = np.flatnonzero(used > left)
        blocked: int | None = None
        if over.size:
            # The first sequence past a cap is that domain's occurrence number left.
            cuts = [int(np.flatnonzero(labels == k)[left[k]]) for k in over]
            blocked = int(over[np.argmin(cuts)])
            labels = labels[: min(cuts)]
            used = np.bincount(labels, minlength=len(self.names))
        by_domain = [self._streams[k].take(int(self.drawn[k]), int(used[k])) for k in np.flatnonzero(used).tolist()]
        rows = np.empty(labels.size, dtype=np.int64)
        rows[np.argsort(labels, kind="stable")] = np.concatenate([rows[:0], *by_domain])
        self.drawn = self.drawn + used
        self.position += labels.size
        self._residual = rests[(offset + labels.size) // self.block]
        return rows, blocked

    def _labels(self, first: int, offset: int, count: int) -> tuple[NDArray[np.unsignedinteger], NDArray[np.float64]]:
        """Return domains of the next sequences [<= count], and residuals, from block ``first`` of the segment on."""
        shares, block = self.segments[-1].proportions, self.block
        active = shares > 0
        # Blocks far beyond the nearest cap would be thrown away.
        to_cap = (((self.limits - self.drawn)[active] + 1.0) / (shares[active] * block)).min() + 2
        most = max(1, min(_CHUNK_IDS // block, _CHUNK_CELLS // len(self.names), int(min(to_cap, 1e9))))
        num = min(-(-(offset + count) // block), most)
        counts, rests = block_counts(shares, block // self.unit, self._residual, num)
        # 16-bit labels make numpy's stable sort a radix sort, here and in ``_serve``.
        labels: NDArray[np.unsignedinteger]
        numbers: NDArray[np.unsignedinteger] = np.arange(
            shares.size, dtype=np.uint16 if shares.size <= 1 << 16 else np.uint64
        )
        if self.interleave == "even":
            labels = np.concatenate([evenly(row) for row in counts]).astype(numbers.dtype)
        else:
            in_order = np.repeat(np.tile(numbers, num), counts.ravel()).reshape(num, -1)
            places = np.arange(in_order.size, dtype=np.int64).reshape(in_order.shape) + first * in_order.shape[1]
            segment = self._forgotten + len(self.segments) - 1
            order = np.argsort(keys(self.seed, "mixture", segment, places), axis=1)
            labels = np.take_along_axis(in_order, order, axis=1).reshape(-1)
        return np.repeat(labels, self.unit)[offset : offset + count], rests

    def state_dict(self) -> State:
        """Return everything that a resumed run needs: the log, positions and the residual."""
        log = self.segments
        return {
            **{key: getattr(self, key) for key in _FIXED},
            "names": list(self.names),
            "forgotten": self._forgotten,
            "position": self.position,
            "drawn": self.drawn,
            "residual": self._residual,
            "order": {str(k): stream.state_dict(drawn) for k, (stream, drawn) in enumerate(self._ordered)},
            "begun": None if self._begun is None else {"epochs": self._begun[0], "rows": np.packbits(self._begun[1])},
            "segments": {
                "start": [segment.start for segment in log],
                "proportions": np.array([segment.proportions for segment in log]).reshape(-1, len(self.names)),
                "decided_at_step": [segment.decided_at_step for segment in log],
                "reason": [segment.reason for segment in log],
            },
        }

    def load_state_dict(self, state: State) -> None:
        """Go on where ``state_dict`` was taken; caps and their policy may have changed.

        Raises:
            CheckpointError: Other domains, sizes, seed or block.
        """
        for key in _FIXED:
            found, mine = state[key], getattr(self, key)
            if not np.array_equal(np.asarray(found), np.asarray(mine)):
                raise CheckpointError(
                    f"resume: {key} of the mixture's domains changed ({found} -> {mine}); the stream would go on "
                    "with other samples. Restore the data and settings, or start fresh with 'resume_plan: ignore'."
                )
        log = state["segments"]
        self.segments = [
            Segment(start=start, proportions=shares, decided_at_step=step, reason=reason)
            for start, shares, step, reason in zip(
                log["start"], log["proportions"], log["decided_at_step"], log["reason"], strict=True
            )
        ]
        self.position, self._forgotten = int(state["position"]), int(state["forgotten"])
        self.drawn, self._residual = state["drawn"], state["residual"]
        if begun := state.get("begun"):
            served = np.unpackbits(begun["rows"], count=len(self._domain_of)).astype(np.bool_)
            self._begin(np.asarray(begun["epochs"]), served)
        for k, (stream, _) in enumerate(self._ordered):
            stream.load_state_dict(state["order"][str(k)])
