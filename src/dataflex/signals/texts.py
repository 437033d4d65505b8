"""Tokens and text of rows, and the segments cut out of them to score responses with their context or without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.errors import UnsupportedError
from dataflex.plan.domains import Rows
from dataflex.signals.losses import IGNORE
from dataflex.signals.specs import Part
from dataflex.signals.sweep import Sweep, mask_of, padded

_TOKENS, _LABELS, _MASK = "input_ids", "labels", "attention_mask"
SIZES = "seq_lengths"
"""Column of TRL's packed rows: the tokens of each document."""
_MEDIA = ("images", "videos", "audios")
_CHUNK_ROWS = 1000

TokenRow = tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]
"""Tokens, whether each is supervised, and the number of its document, without padding."""
_Stretch = tuple[bool, list[int]]
"""Consecutive tokens of a document: whether they are supervised, and the tokens."""


def token_rows(dataset: Any, rows: Rows) -> Iterator[TokenRow]:
    """Yield the tokens of each row [n] of a ``datasets.Dataset``, or of anything with ``__getitems__``."""
    names = getattr(dataset, "column_names", None)
    if names is not None:  # images and the like are left where they are
        wanted = [name for name in names if name.removeprefix("chosen_") in (_TOKENS, _LABELS, _MASK, SIZES)]
        dataset = dataset.select_columns(wanted)
    for start in range(0, len(rows), _CHUNK_ROWS):
        for feature in dataset.__getitems__(rows[start : start + _CHUNK_ROWS].tolist()):
            prefix = "" if _TOKENS in feature else "chosen_"
            ids = np.asarray(feature[prefix + _TOKENS], dtype=np.int64)
            labels, mask = feature.get(prefix + _LABELS), feature.get(prefix + _MASK)
            supervised = np.full(len(ids), labels is None)
            if labels is not None:
                supervised = np.asarray(labels, dtype=np.int64) != IGNORE
            documents = np.ones(len(ids), dtype=np.int64)
            if mask is not None and len(mask) == len(ids):
                documents = np.asarray(mask, dtype=np.int64)  # neat_packing numbers documents from 1; 0 is padding
            if (sizes := feature.get(SIZES)) is not None:
                documents = np.repeat(np.arange(1, len(sizes) + 1), sizes)
            real = documents != 0
            yield ids[real], supervised[real], documents[real]


def row_tokens(dataset: Any, rows: Rows, part: Part = "all") -> list[NDArray[np.int64]]:
    """Return the tokens of each row: all, those of the prompt, or the supervised ones; int64, may be empty."""
    found = []
    for ids, supervised, _ in token_rows(dataset, rows):
        found.append(ids if part == "all" else ids[supervised if part == "completion" else ~supervised])
    return found


def row_texts(dataset: Any, rows: Rows, tokenizer: Any, part: Part = "all") -> list[str]:
    """Return the text of each row or of a part of it: its tokens decoded, without special ones."""
    texts: list[str] = []
    for start in range(0, len(rows), _CHUNK_ROWS):
        tokens = row_tokens(dataset, rows[start : start + _CHUNK_ROWS], part)
        texts += tokenizer.batch_decode([ids.tolist() for ids in tokens], skip_special_tokens=True)
    return texts


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How rows are cut into sequences."""

    alone: bool = False  # one sequence for each response, without what comes before it; else whole documents
    prefix_tokens: int = 0  # number of tokens directly before a response that it keeps when alone
    leave_out_first: bool = True  # leave out a response's first token where, alone, nothing would come before it
    start: tuple[int, ...] = ()  # token that every sequence begins with, or none
    limit: int | None = None  # largest number of tokens of a document, those beyond are scored neither way; or None
    translate: Callable[[list[int]], list[int]] | None = None  # turns tokens into those of another model; or None

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that sequences depend on, besides the data set and the other model."""
        return {**vars(self), "start": list(self.start), "translate": self.translate is not None}


@dataclass(kw_only=True)
class Segments:
    """The sequences of some rows, made when asked for.

    ``places`` are the places in ``rows`` of each sequence, ascending [P]; ``lengths`` their tokens before translation.
    """

    dataset: Any
    rows: Rows
    cut: Cut
    places: NDArray[np.int64] = field(init=False)
    lengths: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        features = getattr(self.dataset, "features", None) or {}
        media = [name for name in _MEDIA if name in features and getattr(features[name], "dtype", None) != "null"]
        if media:
            raise UnsupportedError(f"responses are scored as text, but the rows hold {', '.join(media)}")
        found = [
            (place, number, length + len(self.cut.start))
            for place, row in enumerate(token_rows(self.dataset, self.rows))
            for number, length in enumerate(self._lengths(row))
        ]
        self.places, self._numbers, self.lengths = np.array(found, dtype=np.int64).reshape(-1, 3).T

    def __len__(self) -> int:
        return len(self.places)

    def __getitems__(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """Return ``input_ids`` and ``labels`` of sequences."""
        rows = token_rows(self.dataset, self.rows[self.places[list(ids)]])
        return [self._sequences(row)[int(self._numbers[i])] for i, row in zip(ids, rows, strict=True)]

    def _lengths(self, row: TokenRow) -> list[int]:
        """Return the length of each sequence of a row without making them."""
        if not self.cut.alone:
            return [sum(len(ids) for _, ids in stretches) for stretches in _documents(row)]
        kept = self.cut.prefix_tokens
        return [kept + len(ids) for stretches in _documents(row) for supervised, ids in stretches if supervised]

    def _sequences(self, row: TokenRow) -> list[dict[str, Any]]:
        found = []
        for stretches in _documents(row):
            if self.cut.translate is not None:
                stretches = [(supervised, self.cut.translate(ids)) for supervised, ids in stretches]
            first = next((ids[0] for _, ids in stretches if ids), None)
            start = [] if (first,) == self.cut.start else list(self.cut.start)
            found += self._alone(stretches, start) if self.cut.alone else [self._given(stretches, start)]
        return found

    def _given(self, stretches: list[_Stretch], start: list[int]) -> dict[str, Any]:
        tokens, labels = list(start), [IGNORE] * len(start)
        hides_first = not self.cut.start and self.cut.prefix_tokens == 0 and self.cut.leave_out_first
        for supervised, ids in stretches:
            tokens += ids
            labels += ids if supervised else [IGNORE] * len(ids)
            if supervised and ids and hides_first:
                labels[-len(ids)] = IGNORE
        return _feature(tokens[: self.cut.limit], labels[: self.cut.limit])

    def _alone(self, stretches: list[_Stretch], before: list[int]) -> list[dict[str, Any]]:
        found = []
        for supervised, ids in stretches:
            if supervised:
                fits = len(ids) if self.cut.limit is None else max(0, self.cut.limit - len(before))
                # Without the line below, ``before[-0:]`` would be all of it.
                prefix = before[-self.cut.prefix_tokens :] if self.cut.prefix_tokens else []
                start = [] if tuple(prefix[: len(self.cut.start)]) == self.cut.start else list(self.cut.start)
                context = start + prefix
                found.append(_feature(context + ids[:fits], [IGNORE] * len(context) + ids[:fits]))
            before = before + ids
        return found


def _documents(row: TokenRow) -> list[list[_Stretch]]:
    """Return the stretches of each document that has a response."""
    ids, supervised, documents = row
    if not len(ids):
        return []
    new = np.flatnonzero((np.diff(supervised.astype(np.int8)) != 0) | (np.diff(documents) != 0)) + 1
    found: list[list[_Stretch]] = []
    for start, stop in pairwise([0, *new.tolist(), len(ids)]):
        if start == 0 or documents[start] != documents[start - 1]:
            found.append([])
        found[-1].append((bool(supervised[start]), ids[start:stop].tolist()))
    return [stretches for stretches in found if any(supervised for supervised, _ in stretches)]


def _feature(tokens: list[int], labels: list[int]) -> dict[str, Any]:
    """Return a sequence; one without tokens gets one that is not scored."""
    return {_TOKENS: tokens or [0], _LABELS: labels or [IGNORE]}


def _collated(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    tokens, labels = ([feature[name] for feature in features] for name in (_TOKENS, _LABELS))
    return {_TOKENS: padded(tokens, 0), _MASK: mask_of(tokens), _LABELS: padded(labels, IGNORE)}


def segment_sweep(whole: Sweep, cut: Cut) -> Sweep:
    """Return a pass over the segments of rows; sums and numbers of tokens [P, 2] become the rows' means [n]."""
    segments = Segments(dataset=whole.dataset, rows=whole.rows, cut=cut)

    def means(sums_P2: NDArray[np.float32]) -> NDArray[np.float32]:
        sums, counts = (
            np.bincount(segments.places, weights=sums_P2[:, column], minlength=len(whole.rows)) for column in (0, 1)
        )
        return np.divide(sums, counts, out=np.full(len(whole.rows), np.nan), where=counts > 0).astype(np.float32)

    return replace(
        whole,
        dataset=segments,
        rows=np.arange(len(segments), dtype=np.int64),
        lengths=segments.lengths,
        collate=_collated,
        combine=means,
    )
