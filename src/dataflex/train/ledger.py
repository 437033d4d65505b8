"""The ledger: how much each domain, and each row, lowered or raised each target's loss.

By domain it is exact in the optimizer's update (``train.updates``): between two looks at a target, the part of a line
in the change of its loss is the mean of the target's gradient along the straight way between them times what the line
moved. The mean is that of both ends, and where this leaves too much of the measured change unexplained, one of points
between them too. By row credits are of first order, -lr c <G_i, P q> with the newest gradient q, and sums of them
overstate what happened.

Sources: shares of one step by gradients, TracIn (arXiv 2002.08484) and In-Run Data Shapley (arXiv 2406.11011); with the
second moment held fixed, arXiv 2602.00329; means along a straight way, integrated gradients (arXiv 1703.01365).
"""

from __future__ import annotations

import io
import logging
import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex import comm
from dataflex.clock import PhaseClock
from dataflex.config.schema import LedgerConfig
from dataflex.errors import UnsupportedError
from dataflex.method import Benefit, Rows
from dataflex.rng import uniforms
from dataflex.signals.gradients.consumers import TargetVectors, inner_products, total
from dataflex.signals.gradients.engine import GradientEngine
from dataflex.signals.gradients.in_run import capturable
from dataflex.signals.gradients.scorers import GradientScorers, targets_seen
from dataflex.signals.gradients.shares import StepShares
from dataflex.signals.model_access import ModelAccess
from dataflex.signals.specs import GradientSpec
from dataflex.signals.sweep import Sweep, preserve_state
from dataflex.state import State
from dataflex.train.loader import ROWS, by_rows
from dataflex.train.row_space import RowSpace
from dataflex.train.updates import OTHERS, Updates, packed, unpack, whole

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]

_MOST_STEPS = 64
"""Steps between two looks at the targets that ``refresh_steps: auto`` goes up to."""
_MOST_HALVED = 3
"""How often a segment is halved where much of it is unexplained: its inside is looked at 1, 3 or 7 times."""
_SMALL_SEGMENTS = 32
"""Changes below this part of the largest one are not told more exactly than it."""


@dataclass(kw_only=True)
class Ledger:
    """Accounts for the targets' losses. All but what a micro-batch does is collective."""

    access: ModelAccess
    space: RowSpace
    options: LedgerConfig
    seed: int
    clock: PhaseClock = field(default_factory=PhaseClock)

    def __post_init__(self) -> None:
        num_targets, num_rows = len(self.options.targets), self.space.num_rows
        lines = len(self.domains) + len(OTHERS)
        self.changes = np.zeros((lines, num_targets))  # of the targets' losses by line, up to the last look
        self.moved = np.zeros(num_targets)  # the same by everything that moved
        self.first: Floats | None = None  # losses at the first look
        self.last = np.zeros(num_targets)  # losses at the last look
        self.credits = np.zeros((num_rows, num_targets))  # by row
        self.times = np.zeros(num_rows, dtype=np.int64)  # each row was trained on, up to the last look
        self.looks = 0
        self.every = 1 if self.options.refresh_steps == "auto" else self.options.refresh_steps
        self._looked_at = 0  # step of the last look
        self._largest = np.zeros(num_targets)  # distance of the losses from the first ones
        self._given: tuple[Floats, NDArray[np.int64]] | None = None  # changes and tokens at the last decision
        self._gradients: TargetVectors | None = None  # of the targets, at the last look
        self._values: TargetVectors | None = None  # of the parameters, at the last look
        self._directions: TargetVectors | None = None  # of the step in progress
        self._rows: Rows | None = None
        self._products: list[tuple[Rows, torch.Tensor]] = []  # of the step in progress
        self._pending: list[tuple[int, Rows, Floats]] = []  # step, rows, credits
        self._step = 0
        self._scorers: GradientScorers | None = None
        self._updates: Updates | None = None
        self._shares: StepShares | None = None
        self._state: State | None = None  # buffers of a resumed run, until the model is known

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains."""
        return self.space.domains.names

    # -- while a step is trained ----------------------------------------------------------------------

    def begin(self, batch: dict[str, Any], device: torch.device) -> None:
        """Listen to the forward and backward pass of a micro-batch."""
        assert self._updates is not None
        assert self._shares is not None
        assert self._gradients is not None
        if self._directions is None:
            self._updates.begin()
            self._products = []
            self._directions = self._updates.directions(self._gradients)
        (apart, joined), shape = by_rows(batch, device), batch["input_ids"].shape
        self._rows = apart[ROWS]
        domains = torch.from_numpy(self.space.domains.domain_of[self._rows].astype(np.int64)).to(device)
        self._shares.begin((int(shape[0]), int(shape[1])), domains, self._directions, joined)

    def take(self, step: int) -> None:
        """Keep what was seen of the micro-batch whose backward pass is over."""
        if self._rows is not None and self._shares is not None:
            self._products.append((self._rows, self._shares.take()))
        self._rows, self._step = None, step

    def end_step(self) -> None:
        """Stop listening until the next step; gradients are summed up, and not clipped yet."""
        if self._updates is not None and self._shares is not None:
            self._shares.end()
            self._updates.summed()
            self._directions = None

    def _take_credits(self, factor: float) -> None:
        """Credit the rows of the step that the optimizer takes now; under DeepSpeed the last backward pass makes it."""
        self.take(self._step)
        self._pending += [(self._step, rows, -factor * found.cpu().numpy()) for rows, found in self._products]
        self._products = []

    def gather(self) -> None:
        """Bring together what the ranks have seen."""
        mine, self._pending = self._pending, []
        everyone = [part for parts in comm.gather_objects(mine) for part in parts]
        if everyone:
            steps = np.concatenate([np.full(len(rows), step) for step, rows, _ in everyone])
            rows, credits = (np.concatenate([part[i] for part in everyone]) for i in (1, 2))
            order = np.lexsort((rows, steps))
            np.add.at(self.credits, rows[order], credits[order])
            np.add.at(self.times, rows, 1)
        if self._updates is not None:
            self._updates.bring_together()

    # -- between steps ----------------------------------------------------------------------------------

    def before(self, step: int, *, decides: bool) -> None:
        """Look at the targets before step ``step`` if it is time, or if a mixer ``decides`` by the ledger."""
        with self.clock.phase("ledger"), preserve_state(self.access.model):
            self._open()
            if self._gradients is None or step - self._looked_at >= self.every or (decides and step > self._looked_at):
                self._look(step)

    def settle(self, step: int) -> bool:
        """Look at the targets for the last time, after ``step`` steps; return whether that was still to be done."""
        if self._updates is None or not self._updates.is_open:
            return False
        with self.clock.phase("ledger"), preserve_state(self.access.model):
            if step > self._looked_at:
                self._look(step)
            self.gather()
        self.close()
        return True

    def close(self) -> None:
        """Stop listening to the optimizer."""
        if self._updates is not None:
            self._updates.close()

    def _open(self) -> None:
        """Find the layers, and listen to the optimizer."""
        if self._updates is not None:
            return
        self._scorers = GradientScorers(self.access, GradientSpec(precondition="none"))
        engine, wanted = self._scorers.engine, self.options.parameters
        units, left_out = capturable(self.access.model, engine.units, whole=True)
        if wanted is not None:
            chosen = []
            for unit in units:
                unwanted = [name for name in unit.parameters.values() if not re.search(wanted, name)]
                left_out |= dict.fromkeys(unwanted, "not among the ledger's parameters")
                own = {local: name for local, name in unit.parameters.items() if name not in unwanted}
                chosen += [replace(unit, parameters=own)] if own else []
            units = chosen
        if not units:
            raise UnsupportedError(f"dynamic.ledger.parameters: {wanted!r} matches no trained layer")
        names = {name for unit in units for name in unit.parameters.values()}
        parameters = {name: p for name, p in engine.parameters.items() if name in names}
        if left_out:
            told = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
            logger.info("ledger: %d parameters are the line 'other' (%s)", len(left_out), told)
        self._updates = Updates(parameters, len(self.domains))
        self._updates.taken = self._take_credits
        self._updates.open(self.access.optimizer(), afresh=self._state is None)
        self._shares = StepShares(units, self._updates.shares)
        if self._state is not None:
            self._updates.load_state_dict(self._state["updates"])
            self._gradients, self._values = self._whole(len(self.options.targets)), self._whole(1)
            unpack(self._state["gradients"], self._gradients)
            unpack(self._state["values"], self._values)
            self._state = None

    def _whole(self, num: int) -> TargetVectors:
        return TargetVectors.zeros(num, self._engine.shapes, self._engine.device)

    def _sweeps(self) -> dict[str, Sweep]:
        sweeps = {}
        for name in self.options.targets:
            rows, most = np.arange(len(self.access.corpus(name).lengths)), self.options.target_rows
            if most is not None:
                drawn = np.argsort(uniforms(self.seed, f"ledger target {name}", 0, rows))
                rows = np.sort(drawn[:most]).astype(np.int64)
            sweeps[name] = self.access.target_sweep(name, rows)
        return sweeps

    def _look(self, step: int) -> None:
        """Take the targets' gradients and losses, and account for what moved since the last look."""
        assert self._updates is not None
        before, values = self._gradients, self._whole(1)
        for name, parameter in self._engine.parameters.items():
            values.tensors[name][0].copy_(whole(parameter.detach()))
        after, losses = self._seen()
        if before is None or self._values is None:
            self.first = losses
        else:
            for name, tensor in self._values.tensors.items():  # from here on what moved, and no longer where from
                tensor.sub_(values.tensors[name]).neg_()
            mean, inside = self._mean_gradient(before, after, self._values, losses - self.last)
            moved = self._updates.moved
            self.changes += comm.gather_sum(_products(moved, mean)).cpu().numpy()
            self.moved += _products(self._values, mean).cpu().numpy()[0]
            for tensor in moved.tensors.values():
                tensor.zero_()
            if self.options.refresh_steps == "auto":
                self.every = max(self.every // 2, 1) if inside else min(self.every * 2, _MOST_STEPS)
        self._gradients, self._values, self.last = after, values, losses
        self._looked_at = step

    @property
    def _engine(self) -> GradientEngine:
        assert self._scorers is not None
        return self._scorers.engine

    def _seen(self) -> tuple[TargetVectors, Floats]:
        """Return the targets' gradients and losses under the parameters of now."""
        self.looks += 1
        seen = targets_seen(self._engine, self._sweeps(), normalize_rows=False)
        return seen.finish(), np.asarray(seen.losses().cpu().numpy())

    def _mean_gradient(
        self, before: TargetVectors, after: TargetVectors, moved: TargetVectors, measured: Floats
    ) -> tuple[TargetVectors, int]:
        """Return the mean of the targets' gradients along the straight way of a segment, and how often it was halved.

        It begins as the mean of both ends. While more than the stated share of the ``measured`` changes [T] is left
        unexplained, the targets are looked at in the middle of each part too (Simpson's rule). ``before`` is changed.
        """
        assert self.first is not None
        self._largest = np.maximum(self._largest, np.abs(self.last + measured - self.first))
        allowed = self.options.unexplained * np.maximum(np.abs(measured), self._largest / _SMALL_SEGMENTS)
        inner = TargetVectors(tensors={name: torch.zeros_like(tensor) for name, tensor in before.tensors.items()})
        odd, halved = inner, 0
        for name, tensor in before.tensors.items():
            tensor.add_(after.tensors[name])
        while True:
            parts = 2**halved
            scale = (0.5, 0.0) if not halved else (1 / (3 * parts), 4 / (3 * parts))
            mean = TargetVectors(
                tensors={
                    name: tensor * scale[0] + odd.tensors[name] * scale[1] + inner.tensors[name] * (2 * scale[0])
                    for name, tensor in before.tensors.items()
                }
            )
            left = np.abs(measured - _products(moved, mean).cpu().numpy()[0])
            if halved == _MOST_HALVED or (left <= allowed).all():
                return mean, halved
            if halved:
                for name, tensor in inner.tensors.items():
                    tensor.add_(odd.tensors[name])
            odd, halved = self._between(moved, [(2 * k + 1) / (2 * parts) for k in range(parts)]), halved + 1

    def _between(self, moved: TargetVectors, places: list[float]) -> TargetVectors:
        """Return the sum of the targets' gradients at places of a segment: 0 is its start, 1 its end."""
        summed = self._whole(len(self.options.targets))
        kept = {name: parameter.detach().clone() for name, parameter in self._engine.parameters.items()}
        try:
            for place in places:
                for name, parameter in self._engine.parameters.items():
                    back = _like(moved.tensors[name][0], parameter)
                    parameter.data.copy_(kept[name].float().sub(back, alpha=1 - place))
                self._reshard()
                for name, tensor in self._seen()[0].tensors.items():
                    summed.tensors[name].add_(tensor)
        finally:
            for name, parameter in self._engine.parameters.items():
                parameter.data.copy_(kept[name])
            self._reshard()
        return summed

    def _reshard(self) -> None:
        """Have the next pass gather the parameters anew, which FSDP2 may hold whole since the last one."""
        for module in self.access.model.modules():
            if hasattr(module, "reshard"):
                module.reshard()

    # -- what it says -------------------------------------------------------------------------------------

    @property
    def unexplained(self) -> Floats:
        """Measured changes of the targets' losses without those of all lines [T]."""
        assert self.first is not None
        return np.asarray(self.last - self.first - self.moved)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Tokens trained on up to the last look or checkpoint, by domain [K]."""
        of_rows = (self.times * self.space.lengths).astype(np.float64)
        return np.bincount(self.space.domains.domain_of, weights=of_rows, minlength=len(self.domains)).astype(np.int64)

    def benefit(self) -> Benefit | None:
        """Return what the domains did since the last call; None before the first segment (collective)."""
        self.gather()
        if self.looks < 2:
            return None
        changes, tokens = self.changes[: len(self.domains)].copy(), self.tokens
        before = self._given or (np.zeros_like(changes), np.zeros_like(tokens))
        self._given = (changes, tokens)
        return Benefit(targets=self.options.targets, changes_KT=changes - before[0], tokens_K=tokens - before[1])

    def described(self) -> dict[str, Any]:
        """Return the accounts up to the last look as JSON values, for the record."""
        if self.first is None:
            return {}
        targets = {}
        parts = self.moved - self.changes[: len(self.domains) + 2].sum(axis=0)
        for k, name in enumerate(self.options.targets):
            own = dict(zip(OTHERS, self.changes[len(self.domains) :, k].tolist(), strict=True))
            clipping = own.pop("clipping")
            targets[name] = {
                "before": float(self.first[k]),
                "now": float(self.last[k]),
                "domains": dict(zip(self.domains, self.changes[: len(self.domains), k].tolist(), strict=True)),
                "others": {**own, "other": float(parts[k])},
                "unexplained": float(self.unexplained[k]),
                "clipping": clipping,
                "rows": float(self.credits[:, k].sum()),
            }
        return {
            "looked_at": self._looked_at,
            "looks": self.looks,
            "refresh_steps": self.every,
            "tokens": dict(zip(self.domains, self.tokens.tolist(), strict=True)),
            "targets": targets,
        }

    def table(self) -> bytes:
        """Return the rows that were trained on, as a Parquet file: row, domain, times, tokens, credit by target."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = np.flatnonzero(self.times).astype(np.int64)
        names = np.asarray(self.domains, dtype=object)[self.space.domains.domain_of[rows]]
        columns = {
            "row": pa.array(rows),
            "domain": pa.array(names.tolist(), type=pa.string()),
            "times": pa.array(self.times[rows]),
            "tokens": pa.array(self.times[rows] * self.space.lengths[rows]),
            **{f"credit_{name}": pa.array(self.credits[rows, k]) for k, name in enumerate(self.options.targets)},
        }
        told = {"fingerprint": self.space.fingerprint, "caveat": "first order: sums of credits overstate the changes"}
        file = io.BytesIO()
        pq.write_table(pa.table(columns).replace_schema_metadata(told), file)
        return file.getvalue()

    # -- state ------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """Return everything that a resumed run needs; ``gather`` comes first."""
        if self._gradients is None or self._values is None or self._updates is None or self.first is None:
            return {}
        given = None if self._given is None else {"changes": self._given[0], "tokens": self._given[1]}
        served = np.flatnonzero(self.times)
        return {
            "updates": self._updates.state_dict(),
            "gradients": packed(self._gradients),
            "values": packed(self._values),
            "changes": self.changes,
            "moved": self.moved,
            "first": self.first,
            "last": self.last,
            "largest": self._largest,
            "rows": served,
            "times": self.times[served],
            "credits": self.credits[served],
            "given": given,
            "looks": self.looks,
            "every": self.every,
            "looked_at": self._looked_at,
        }

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        if not state:
            return
        self._state = state
        self.changes, self.moved, self.first = (np.array(state[key]) for key in ("changes", "moved", "first"))
        self.last, self._largest = np.array(state["last"]), np.array(state["largest"])
        self.times[state["rows"]], self.credits[state["rows"]] = state["times"], state["credits"]
        given = state["given"]
        self._given = None if given is None else (np.array(given["changes"]), np.array(given["tokens"]))
        self.looks, self.every, self._looked_at = (int(state[key]) for key in ("looks", "every", "looked_at"))


def _like(whole_one: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return a tensor sharded as FSDP2 shards ``parameter`` (collective there); else as it is."""
    if not hasattr(parameter, "device_mesh"):
        return whole_one
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole_one, parameter.device_mesh, parameter.placements)


def _products(a: TargetVectors, b: TargetVectors) -> torch.Tensor:
    """Return inner products over the parameters of ``a``, float64 [len(a), len(b)]."""
    return total([part for name in a.tensors for part in inner_products(a.flat(name), b.flat(name))])
