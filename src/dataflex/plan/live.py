"""A pool that changes on purpose while a run goes on: which rows are known, and which of them were served already.

Rows are known by their domain and content (a key of tokens and labels). Copies of one content are told apart by their
number alone: of m copies, as many count as served as the content was served.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dataflex.plan.domains import Domains, Rows
from dataflex.state import State, blake2b

Keys = NDArray[np.uint64]
"""A hash of the tokens and labels of each row."""


class Served:
    """Which rows each domain has served in its epoch in progress, which ends when every row was served.

    Rows and domains that left the pool are remembered, so that they are not served again too early when they return.
    """

    def __init__(self, domains: Domains) -> None:
        self._domains = domains
        self.marks: NDArray[np.bool_] = np.zeros(len(domains.domain_of), dtype=np.bool_)  # served in this epoch [N]
        self.left: NDArray[np.int64] = domains.num_rows.copy()  # rows that were not [K]
        self.epochs: NDArray[np.int64] = np.zeros(len(domains.names), dtype=np.int64)  # whole epochs served [K]
        self._away: dict[str, Keys] = {}  # served rows of the epoch in progress that left the pool, by domain
        self._gone: dict[str, int] = {}  # whole epochs of domains that left the pool

    def count(self, rows: Rows) -> None:
        """Count rows in the order in which they were served."""
        if not len(rows):
            return
        labels = self._domains.domain_of[rows]
        order = np.argsort(labels, kind="stable")
        which, starts = np.unique(labels[order], return_index=True)
        for k, mine in zip(which.tolist(), np.split(rows[order], starts[1:]), strict=True):
            place = 0
            while place < len(mine):
                part = mine[place : place + int(self.left[k])]  # no fewer rows can end the epoch
                place += len(part)
                fresh = np.unique(part[~self.marks[part]])
                self.marks[fresh] = True
                self.left[k] -= len(fresh)
                self._end_epoch(k)

    def _end_epoch(self, k: int) -> None:
        """Begin the next epoch of a domain of which nothing is left."""
        if self.left[k] == 0:
            self.marks[self._domains.rows(k) if len(self.left) > 1 else slice(None)] = False
            self.left[k] = self._domains.num_rows[k]
            self.epochs[k] += 1
            self._away.pop(self._domains.names[k], None)

    def carried(self, keys: Keys, domains: Domains, new_keys: Keys) -> tuple[Served, NDArray[np.int64]]:
        """Return what was served of another pool [M], and the old row of each of its rows [M], -1 for new ones.

        ``keys`` [N] are those of this pool. Rows are looked for in the domain of the same name first, then in all.
        """
        away = [name for name, gone in self._away.items() for _ in range(len(gone))]
        old = np.concatenate([keys, *self._away.values()])
        marks = np.concatenate([self.marks, np.ones(len(away), dtype=np.bool_)])
        names = [*self._domains.names, *self._away]
        numbers = {name: len(self._domains.names) + i for i, name in enumerate(self._away)}
        name_of = np.concatenate([self._domains.domain_of, np.array([numbers[name] for name in away], dtype=np.int32)])
        found = _paired(old ^ _tags(names)[name_of], new_keys ^ _tags(domains.names)[domains.domain_of], marks)
        new, free = np.flatnonzero(found < 0), np.setdiff1d(np.arange(len(old)), found)
        elsewhere = _paired(old[free], new_keys[new], marks[free])
        found[new] = np.where(elsewhere >= 0, free[elsewhere] if len(free) else -1, -1)

        served = Served(domains)
        known = found >= 0
        served.marks[known] = marks[found[known]]
        served.left = domains.num_rows - domains.counts(np.flatnonzero(served.marks))
        epochs = {**self._gone, **dict(zip(self._domains.names, self.epochs.tolist(), strict=True))}
        served.epochs = np.array([epochs.get(name, 0) for name in domains.names], dtype=np.int64)
        served._gone = {name: epoch for name, epoch in epochs.items() if name not in domains.names}
        marks[found[known]] = False
        left_out = np.flatnonzero(marks)
        for number in np.unique(name_of[left_out]).tolist():
            gone = old[left_out[name_of[left_out] == number]]
            served._away[names[number]] = np.concatenate([served._away.get(names[number], gone[:0]), gone])
        for k in range(len(domains.names)):
            served._end_epoch(k)
        return served, np.where(found < len(keys), found, -1)

    def state_dict(self) -> State:
        """Return marks, epochs, and what left the pool."""
        return {
            "domains": list(self._domains.names),
            "marks": np.packbits(self.marks),
            "epochs": self.epochs,
            "away": dict(self._away),
            "gone": dict(self._gone),
        }

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self.marks = np.unpackbits(state["marks"], count=len(self.marks)).astype(np.bool_)
        self.left = self._domains.num_rows - self._domains.counts(np.flatnonzero(self.marks))
        self.epochs = np.array(state["epochs"])
        self._away = {name: np.array(keys, dtype=np.uint64) for name, keys in state["away"].items()}
        self._gone = {name: int(epoch) for name, epoch in state["gone"].items()}


def whole(num_rows: int) -> Domains:
    """Return all rows as one domain: what is exhausted as a whole where no mixer keeps domains apart."""
    return Domains.from_sizes(["all rows"], [num_rows])


def _tags(names: Sequence[str]) -> Keys:
    return np.array([int.from_bytes(blake2b(name.encode(), size=8), "little") for name in names], dtype=np.uint64)


def _paired(old: Keys, new: Keys, first: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the place in ``old`` of each of ``new`` [n], -1 for none; equal ones pair off, ``first`` ones first."""
    order = np.lexsort((~first, old))
    by_key = np.argsort(new, kind="stable")
    ranked, wanted = old[order], new[by_key]
    place = np.searchsorted(ranked, wanted) + np.arange(len(wanted)) - np.searchsorted(wanted, wanted)
    inside = np.flatnonzero(place < len(ranked))
    hit = inside[ranked[place[inside]] == wanted[inside]]
    found = np.full(len(new), -1, dtype=np.int64)
    found[by_key[hit]] = order[place[hit]]
    return found


def by_name(before: Sequence[str], values: NDArray[np.int64], now: Sequence[str]) -> NDArray[np.int64]:
    """Return numbers of domains in the order of other ones [len(now)], 0 for new ones."""
    known: Mapping[str, int] = dict(zip(before, values.tolist(), strict=True))
    return np.array([known.get(name, 0) for name in now], dtype=np.int64)
