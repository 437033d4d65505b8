"""Which domain each row belongs to, and proportions of tokens against proportions of sequences.

A domain is a named part of the training rows, and has at least one. Arrays only: nothing here holds a Python object
per row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataflex.errors import ComponentError, DataError

Unit = Literal["sequences", "tokens", "documents"]

Rows = NDArray[np.int64]
"""Positions in the training row space, 0 <= r < N."""

Floats = NDArray[np.float64]


def check_proportions(proportions: ArrayLike, names: Sequence[str]) -> NDArray[np.float64]:
    """Return proportions as float64 [K], exactly as given unless their sum is off by rounding.

    Raises:
        ComponentError: Wrong length, a negative or non-finite number, or a sum that is not 1.
    """
    values = np.array(proportions, dtype=np.float64)
    if values.shape != (len(names),):
        raise ComponentError(f"proportions: {values.size} numbers for {len(names)} domains ({', '.join(names)})")
    bad = np.flatnonzero(~np.isfinite(values) | (values < 0))
    if bad.size:
        raise ComponentError(f"proportions: {names[bad[0]]!r} is {values[bad[0]]}; must be finite and >= 0")
    total = float(values.sum())
    if abs(total - 1.0) > 1e-6:
        raise ComponentError(f"proportions: sum is {total:.6g}, must be 1")
    # Dividing by a sum that is 1 up to the last bit would move ties between domains.
    return values if abs(total - 1.0) < 1e-12 else values / total


WANTED_WEIGHTS = "weights must be finite numbers, 0 or more"


def unusable_weight(value: Any) -> bool:
    """Whether a value is no weight: missing, text, not finite, or negative."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return not number or not math.isfinite(value) or value < 0


WANTED_LABELS = "every row's must be text, the domain's name"


def unusable_labels(labels: Iterable[Any]) -> NDArray[np.bool_]:
    """Return which labels are empty or not text [N]."""
    return np.fromiter((not isinstance(label, str) or not label.strip() for label in labels), dtype=np.bool_)


def _read_only(values: NDArray[Any]) -> NDArray[Any]:
    view = values.view()
    view.flags.writeable = False
    return view


@dataclass(frozen=True, kw_only=True, eq=False)
class Domains:
    """The domain of every training row.

    Raises:
        DataError: A domain without rows, a name given twice, or arrays that do not fit together.
    """

    names: tuple[str, ...]  # names [K], distinct
    domain_of: NDArray[np.int32]  # domain index of each row, int32 [N]
    lengths: NDArray[np.int64] | None = None  # tokens of each row, int64 [N], or None when not counted
    documents_per_row: NDArray[np.float64] | None = None  # mean number of samples in a packed row of each domain [K]

    def __post_init__(self) -> None:
        names = tuple(self.names)
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise DataError(f"domain {twice[0]!r} is given twice; give every source its own name")
        domain_of = np.asarray(self.domain_of, dtype=np.int32)
        if not names or domain_of.ndim != 1:
            raise DataError("no domains: the training set is empty")
        assert not domain_of.size or 0 <= domain_of.min() <= domain_of.max() < len(names), "indices beyond the names"
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "domain_of", _read_only(domain_of))
        if self.lengths is not None:
            lengths = np.asarray(self.lengths, dtype=np.int64)
            if lengths.shape != domain_of.shape:
                raise DataError(f"{lengths.size} row lengths for {domain_of.size} rows")
            object.__setattr__(self, "lengths", _read_only(lengths))
        empty = [names[k] for k in np.flatnonzero(self.num_rows == 0)]
        if empty:
            raise DataError(f"domain {empty[0]!r} has no rows" + (f" (nor have {empty[1:]})" if empty[1:] else ""))

    @classmethod
    def from_sizes(cls, names: Sequence[str], sizes: Sequence[int], lengths: ArrayLike | None = None) -> Domains:
        """Return domains that are consecutive ranges of ``sizes`` [K] rows; ``lengths`` are tokens of each row."""
        assert len(names) == len(sizes), f"{len(names)} domain names for {len(sizes)} sizes"
        domain_of = np.repeat(np.arange(len(names), dtype=np.int32), np.asarray(sizes, dtype=np.int64))
        return cls(names=tuple(names), domain_of=domain_of, lengths=None if lengths is None else np.asarray(lengths))

    @classmethod
    def from_labels(cls, labels: Iterable[str], lengths: ArrayLike | None = None) -> Domains:
        """Return domains of one label per row; names in order of first appearance.

        Raises:
            DataError: A row without a label, or with one that is not text.
        """
        known: dict[str, int] = {}

        def numbered() -> Iterable[int]:
            for row, label in enumerate(labels):
                if not isinstance(label, str):
                    raise DataError(f"row {row} has no domain: its label is {label!r}, must be text")
                yield known.setdefault(label, len(known))

        domain_of = np.fromiter(numbered(), dtype=np.int32)
        names = tuple(map(str, known))
        return cls(names=names, domain_of=domain_of, lengths=None if lengths is None else np.asarray(lengths))

    @cached_property
    def num_rows(self) -> NDArray[np.int64]:
        """Number of rows of each domain, int64 [K]."""
        return _read_only(np.bincount(self.domain_of, minlength=len(self.names)).astype(np.int64))

    @cached_property
    def num_tokens(self) -> NDArray[np.int64]:
        """Tokens of each domain, int64 [K].

        Raises:
            DataError: The rows' lengths were not counted.
        """
        if self.lengths is None:
            raise DataError("sizes in tokens need the token count of every row, which this data set does not give")
        # Sums of integers below 2**53 are exact in the float64 that bincount works in.
        sums = np.bincount(self.domain_of, weights=self.lengths, minlength=len(self.names))
        return _read_only(np.rint(sums).astype(np.int64))

    @cached_property
    def _grouped(self) -> list[Rows]:
        # 16-bit labels make numpy's stable sort a radix sort.
        labels = self.domain_of.astype(np.uint16) if len(self.names) <= 1 << 16 else self.domain_of
        order = _read_only(np.argsort(labels, kind="stable").astype(np.int64, copy=False))
        return np.split(order, np.cumsum(self.num_rows)[:-1])

    def rows(self, k: int) -> Rows:
        """Return the rows of domain ``k``, ascending; a read-only view."""
        return self._grouped[k]

    def sizes(self, unit: Unit) -> NDArray[np.float64]:
        """Return the size of each domain in ``unit``, float64 [K]."""
        if unit == "documents" and self.documents_per_row is not None:
            return self.num_rows * self.documents_per_row
        return (self.num_tokens if unit == "tokens" else self.num_rows).astype(np.float64)

    def sequence_proportions(self, proportions: ArrayLike, unit: Unit) -> NDArray[np.float64]:
        """Convert proportions [K] of tokens or documents to proportions of sequences.

        For tokens q_k is proportional to p_k / (mean tokens of a row of domain k), so that the
        expected tokens served follow p; for documents the same with their mean number in a row.

        Raises:
            ComponentError: Malformed proportions.
            DataError: Tokens were not counted, or a domain with a share has none.
        """
        values = check_proportions(proportions, self.names)
        if unit == "documents" and self.documents_per_row is not None:
            weighted = values / self.documents_per_row
        elif unit == "tokens":
            for k in np.flatnonzero((self.num_tokens == 0) & (values > 0)):
                raise DataError(f"domain {self.names[k]!r} has no tokens, so it cannot have a proportion of tokens")
            weighted = values * (self.num_rows / np.maximum(self.num_tokens, 1))
        else:
            return values
        return np.asarray(weighted / weighted.sum(), dtype=np.float64)

    def unit_proportions(self, sequences: NDArray[np.float64], unit: Unit) -> NDArray[np.float64]:
        """Convert proportions [K] of sequences to those of ``unit``, as ``sequence_proportions`` the other way."""
        if unit == "documents" and self.documents_per_row is not None:
            weighted = sequences * self.documents_per_row
        elif unit == "tokens":
            weighted = sequences * (self.num_tokens / self.num_rows)
        else:
            return sequences
        return np.asarray(weighted / weighted.sum(), dtype=np.float64)

    def counts(self, rows: Rows) -> NDArray[np.int64]:
        """Count ``rows`` by domain, int64 [K]; -1 ("no row" in a plan) is not counted."""
        return np.bincount(self.domain_of[rows[rows >= 0]], minlength=len(self.names)).astype(np.int64)


SUMS: tuple[str, ...] = ("loss_sum", "excess_sum", "excess_tokens", "tokens", "sequences", "micro_batches")
"""The fields of ``DomainStats`` that are summed over ranks and micro-batches."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DomainStats:
    """Sums of one optimizer step by domain; every array is float64 [K], in the order of ``names``."""

    names: tuple[str, ...]  # names of the domains
    step: int  # optimizer step, counted from 0
    total_steps: int  # optimizer steps of the run
    loss_sum: NDArray[np.float64]  # sum of token losses, nats
    excess_sum: NDArray[np.float64]  # sum of max(loss - reference loss, 0) over tokens; 0 without a reference
    excess_tokens: NDArray[np.float64]  # tokens whose loss is above the reference's
    tokens: NDArray[np.float64]  # supervised tokens
    sequences: NDArray[np.float64]  # sequences with a supervised token; packed rows count once
    micro_batches: NDArray[np.float64]  # micro-batches (of all ranks) that held a supervised token of the domain
    proportions: NDArray[np.float64]  # sampling proportions of sequences under which the step was drawn
    learning_rate: float = 0.0  # learning rate of the step

    @classmethod
    def of(cls, sums: NDArray[np.float64], *, names: Sequence[str], **rest: Any) -> DomainStats:
        """Return the statistics of ``sums`` [len(SUMS), K]; a domain with a sum that is not finite counts as absent."""
        assert sums.shape == (len(SUMS), len(names)), f"{sums.shape} sums for {len(names)} domains"
        sums = np.where(np.isfinite(sums).all(axis=0), sums, 0.0)
        return cls(names=tuple(names), **dict(zip(SUMS, sums, strict=True)), **rest)

    @property
    def present(self) -> NDArray[np.bool_]:
        """Which domains had a supervised token in the step [K]."""
        return self.tokens > 0

    def mean_loss(self) -> NDArray[np.float64]:
        """Return the mean token loss of each domain [K]; NaN where it was absent."""
        return self._over_tokens(self.loss_sum)

    def mean_excess(self) -> NDArray[np.float64]:
        """Return the mean of the clipped token excess of each domain [K]; NaN where it was absent."""
        return self._over_tokens(self.excess_sum)

    def _over_tokens(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.divide(sums, self.tokens, out=np.full(len(self.names), np.nan), where=self.present)
