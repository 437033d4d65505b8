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
from dataflex.signals.specs import Part
from dataflex.signals.sweep import Sweep

IGNORE = -100
_TOKENS, _LABELS, _MASK = "input_ids", "labels", "attention_mask"
_CHUNK_ROWS = 1000

TokenRow = tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]
"""Tokens, whether each is supervised, and the number of its document, without padding."""


def token_rows(dataset: Any, rows: Rows) -> Iterator[TokenRow]:
    """Yield what is known of the tokens of each row, in the order asked for.

    Args:
        dataset: Tokenized rows (``datasets.Dataset``, or anything with ``__getitems__``).
        rows: Row ids [n]; may repeat.
    """
    names = getattr(dataset, "column_names", None)
    if names is not None:  # images and the like are left where they are
        wanted = [name for name in names if name.removeprefix("chosen_") in (_TOKENS, _LABELS, _MASK)]
        dataset = dataset.select_columns(wanted)
    for start in range(0, len(rows), _CHUNK_ROWS):
        for feature in dataset.__getitems__(rows[start : start + _CHUNK_ROWS].tolist()):
            yield _token_row(feature)


def _token_row(feature: dict[str, Any]) -> TokenRow:
    prefix = "" if _TOKENS in feature else "chosen_"
    ids = np.asarray(feature[prefix + _TOKENS], dtype=np.int64)
    labels, mask = feature.get(prefix + _LABELS), feature.get(prefix + _MASK)
    supervised = np.ones(len(ids), dtype=np.bool_) if labels is None else np.asarray(labels, dtype=np.int64) != IGNORE
    if mask is None or len(mask) != len(ids):
        return ids, supervised, np.zeros(len(ids), dtype=np.int64)
    documents = np.asarray(mask, dtype=np.int64)  # neat_packing numbers documents from 1; 0 is padding
    real = documents != 0
    return ids[real], supervised[real], documents[real]


def row_tokens(dataset: Any, rows: Rows, part: Part = "all") -> list[NDArray[np.int64]]:
    """Return the tokens of each row: all, those of the prompt, or the supervised ones; int64, may be empty."""
    found = []
    for ids, supervised, _ in token_rows(dataset, rows):
        found.append(ids if part == "all" else ids[supervised if part == "completion" else ~supervised])
    return found


def row_texts(dataset: Any, rows: Rows, tokenizer: Any, part: Part = "all") -> list[str]:
    """Return the text of each row or of a part of it: its tokens decoded, special ones left out."""
    texts: list[str] = []
    for start in range(0, len(rows), _CHUNK_ROWS):
        tokens = row_tokens(dataset, rows[start : start + _CHUNK_ROWS], part)
        texts += tokenizer.batch_decode([ids.tolist() for ids in tokens], skip_special_tokens=True)
    return texts


_MEDIA = ("images", "videos", "audios")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How sequences are made.

    Attributes:
        alone: One sequence for each response, without what comes before it; else whole documents.
        prefix_tokens: Tokens directly before a response that it keeps when alone.
        leave_out_first: Leave out a response's first token where, alone, nothing would come before it.
        start: Token that every sequence begins with, as one that the tokenizer puts there itself; or none.
        limit: Tokens of a document at most, those beyond are scored neither way; or None.
        translate: Turns tokens into those of another model; or None.
    """

    alone: bool = False
    prefix_tokens: int = 0
    leave_out_first: bool = True
    start: tuple[int, ...] = ()
    limit: int | None = None
    translate: Callable[[list[int]], list[int]] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that sequences depend on, besides the data set and the other model."""
        settings = {key: value for key, value in vars(self).items() if key != "translate"}
        return {**settings, "start": list(self.start), "translate": self.translate is not None}


@dataclass(kw_only=True)
class Segments:
    """The sequences of some rows, made when asked for.

    Attributes:
        dataset: Tokenized rows.
        rows: Row ids [n].
        cut: How they are made.
        places: Place in ``rows`` of each sequence, ascending [P].
        lengths: Tokens of each sequence, about [P] (before translation).
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
        places, numbers, lengths = [], [], []
        for place, row in enumerate(token_rows(self.dataset, self.rows)):
            for number, length in enumerate(self._lengths(row)):
                places.append(place)
                numbers.append(number)
                lengths.append(length + len(self.cut.start))
        self.places, self._numbers, self.lengths = (
            np.array(values, dtype=np.int64) for values in (places, numbers, lengths)
        )

    def __len__(self) -> int:
        return len(self.places)

    def __getitems__(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """Return ``input_ids`` and ``labels`` of sequences."""
        rows = token_rows(self.dataset, self.rows[self.places[list(ids)]])
        return [self._sequences(row)[int(self._numbers[i])] for i, row in zip(ids, rows, strict=True)]

    def _lengths(self, row: TokenRow) -> list[int]:
        """Return the length of each sequence of a row without making them."""
        found = []
        for stretches in _documents(row):
            responses = [len(ids) for supervised, ids in stretches if supervised]
            if self.cut.alone:
                found += [length + self.cut.prefix_tokens for length in responses]
            elif responses:
                found.append(sum(len(ids) for _, ids in stretches))
        return found

    def _sequences(self, row: TokenRow) -> list[dict[str, Any]]:
        found = []
        for stretches in _documents(row):
            if not any(supervised for supervised, _ in stretches):
                continue
            if self.cut.translate is not None:
                stretches = [(supervised, self.cut.translate(ids)) for supervised, ids in stretches]
            found += self._alone(stretches) if self.cut.alone else [self._given(stretches)]
        return found

    def _start(self, stretches: list[tuple[bool, list[int]]]) -> list[int]:
        """Return what is put before a document, unless it begins with it already."""
        first = next((ids[0] for _, ids in stretches if ids), None)
        return [] if (first,) == self.cut.start else list(self.cut.start)

    def _given(self, stretches: list[tuple[bool, list[int]]]) -> dict[str, Any]:
        tokens = self._start(stretches)
        labels = [IGNORE] * len(tokens)
        for supervised, ids in stretches:
            hidden = not self.cut.start and self.cut.prefix_tokens == 0 and self.cut.leave_out_first
            first = [IGNORE if hidden else ids[0]] if ids else []
            labels += [*first, *ids[1:]] if supervised else [IGNORE] * len(ids)
            tokens += ids
        return _feature(tokens[: self.cut.limit], labels[: self.cut.limit])

    def _alone(self, stretches: list[tuple[bool, list[int]]]) -> list[dict[str, Any]]:
        found, before = [], self._start(stretches)
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


def _documents(row: TokenRow) -> list[list[tuple[bool, list[int]]]]:
    """Return the stretches of each document: whether supervised, and the tokens."""
    ids, supervised, documents = row
    if not len(ids):
        return []
    new = np.flatnonzero((np.diff(supervised.astype(np.int8)) != 0) | (np.diff(documents) != 0)) + 1
    bounds = [0, *new.tolist(), len(ids)]
    found: list[list[tuple[bool, list[int]]]] = []
    for start, stop in pairwise(bounds):
        if start == 0 or documents[start] != documents[start - 1]:
            found.append([])
        found[-1].append((bool(supervised[start]), ids[start:stop].tolist()))
    return found


def _feature(tokens: list[int], labels: list[int]) -> dict[str, Any]:
    """Return a sequence; one without tokens gets one that is not scored."""
    return {"input_ids": tokens or [0], "labels": labels or [IGNORE]}


def collate_segments(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad sequences on the right: ``input_ids``, ``attention_mask`` and ``labels``, int64 [B, T]."""
    shape = (len(features), max(len(feature["input_ids"]) for feature in features))
    batch = {"input_ids": torch.zeros(shape), "attention_mask": torch.zeros(shape), "labels": torch.full(shape, IGNORE)}
    batch = {name: values.long() for name, values in batch.items()}
    for i, feature in enumerate(features):
        length = len(feature["input_ids"])
        batch["input_ids"][i, :length] = torch.tensor(feature["input_ids"])
        batch["attention_mask"][i, :length] = 1
        batch["labels"][i, :length] = torch.tensor(feature["labels"])
    return batch


def segment_sweep(whole: Sweep, cut: Cut) -> Sweep:
    """Return a pass over the segments of the rows of another one.

    Values of the pass are sums of losses and numbers of tokens of segments [P, 2]; they are combined to the means of
    rows [n], NaN where nothing was scored.
    """
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
        collate=collate_segments,
        combine=means,
    )
