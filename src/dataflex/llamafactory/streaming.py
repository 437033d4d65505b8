"""Rows that are tokenized when they are served, for corpora whose tokens should not lie on disk or in memory.

Tables stay random-access, so that plans, mixtures and exact resume work as for any data: one pass counts the tokens of
each row, and rows and their order are those that LLaMA-Factory would make beforehand. Upstream names relied upon:
``llamafactory.data.loader._get_preprocessed_dataset`` and ``_get_dataset_processor``, the processors'
``preprocess_dataset``, how ``PretrainDatasetProcessor`` builds blocks, and how ``PackedSupervisedDatasetProcessor``
takes rows from the end of those of one length (``greedy_knapsack``).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from llamafactory.data import loader as lf_loader
from llamafactory.data.processor.processor_utils import greedy_knapsack
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.llamafactory.turns import NumberedProcessor
from dataflex.state import blake2b
from dataflex.train.loader import PADDING, PIECES, SAME
from dataflex.train.row_space import Measures

_IGNORE = -100


class _Counter:
    """Counts tokens of raw rows; an object of a class, so that the ``datasets`` cache can name and keep its work."""

    def __init__(self, processor: Any, whole: bool, packs: bool) -> None:
        self.processor, self.whole, self.packs = processor, whole, packs

    def __call__(self, examples: dict[str, list[Any]]) -> dict[str, list[int]]:
        counted: dict[str, list[int]] = {"length": [], "supervised": [], "digest": []}
        for place in range(len(next(iter(examples.values())))):
            single = {key: [values[place]] for key, values in examples.items()}
            for name, value in zip(counted, self._of_row(single), strict=True):
                counted[name].append(value)
        return counted

    def _of_row(self, single: dict[str, list[Any]]) -> tuple[int, int, int]:
        made = _texts(self.processor, single) if self.whole else self.processor.preprocess_dataset(single)
        if not made.get("input_ids"):  # a row that LLaMA-Factory drops
            return -1, 0, 0
        row = {key: values[0] for key, values in made.items()}
        ids, labels = row["input_ids"], row.get("labels")
        supervised = len(ids) if labels is None else sum(label != _IGNORE for label in labels)
        length = max(row["position_ids"]) + 1 if self.packs else len(ids)  # a pack of one row is padded
        return length, supervised, _digest(row)


def _digest(row: Mapping[str, Any]) -> int:
    """Return a hash of the tokens and labels of a tokenized row."""
    content = np.asarray([*row["input_ids"], _IGNORE, *(row.get("labels") or ())], dtype=np.int64).tobytes()
    return int.from_bytes(blake2b(content, size=7), "big")


def _texts(processor: Any, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Tokenize whole documents as ``PretrainDatasetProcessor`` does before it cuts them into blocks."""
    eos = "<|end_of_text|>" if processor.data_args.template == "llama3" else processor.tokenizer.eos_token
    texts = [messages[0]["content"] + eos for messages in examples["_prompt"]]
    tokenized: dict[str, list[Any]] = processor.tokenizer(texts, add_special_tokens=False)
    return tokenized


class ServedRows:
    """A data set of rows that are tokenized on access; row r is what stock preprocessing gives as row r.

    Args:
        raw: Rows in LLaMA-Factory's own columns.
        processor: LLaMA-Factory's processor of the stage.
        block: Tokens of a block for packed pre-training text; None keeps rows as they are.
        group: Raw rows that stock preprocessing cuts into blocks, or packs, together.
        pack: Tokens that instructions are packed into; None keeps rows as they are.
        whole: Whether rows are texts of pre-training as they are before they are cut into blocks.
        num_proc: Processes that count tokens.
    """

    raw_rows: NDArray[np.int64]
    """Raw row of each row; empty for blocks and packs, which have none of their own."""

    def __init__(
        self,
        raw: Dataset,
        processor: Any,
        *,
        block: int | None,
        group: int,
        pack: int | None = None,
        whole: bool = False,
        num_proc: int | None = None,
    ) -> None:
        self.raw, self._processor, self._block = raw, processor, block
        self._packs: NDArray[np.int64] | None = None  # raw rows, pack after pack
        self._tokenize = partial(_texts, processor) if whole else processor.preprocess_dataset
        counted = raw.map(
            _Counter(processor, whole or block is not None, pack is not None),
            batched=True,
            batch_size=group,
            remove_columns=raw.column_names,
            num_proc=num_proc,
            desc="Counting tokens",
        ).with_format("arrow")[:]
        lengths, supervised, digests = (
            counted.column(name).to_numpy().astype(np.int64) for name in ("length", "supervised", "digest")
        )
        self._fingerprint = blake2b(digests.tobytes(), lengths.tobytes(), size=8).hex()
        self._digests = digests
        if pack is not None:
            self.raw_rows = np.zeros(0, dtype=np.int64)
            packs = list(_packed(lengths, pack, group))
            self._packs = np.concatenate([np.zeros(0, dtype=np.int64), *packs])
            self._ends = np.cumsum([0, *map(len, packs)])
            self._lengths = np.full(len(packs), pack + 1, dtype=np.int64)  # one longer, as there
            self._supervised = np.add.reduceat(supervised[self._packs], self._ends[:-1]) if packs else self._lengths
        elif block is None:
            self.raw_rows = np.flatnonzero(lengths >= 0)
            self._lengths, self._supervised = lengths[self.raw_rows], supervised[self.raw_rows]
        else:
            self.raw_rows = np.zeros(0, dtype=np.int64)
            self._ends = np.cumsum(np.maximum(lengths, 0))
            self._starts = self._block_starts(block, group)
            self._lengths = self._supervised = np.full(len(self._starts), block, dtype=np.int64)

    def _block_starts(self, block: int, group: int) -> NDArray[np.int64]:
        """Return the first token of each block in the concatenated text of all raw rows."""
        starts = np.arange(0, len(self._ends), group)
        stops = np.minimum(starts + group, len(self._ends))
        first = np.where(starts > 0, self._ends[starts - 1], 0)
        counts = (self._ends[stops - 1] - first) // block
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.asarray(np.repeat(first, counts) + number * block)

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        if not len(rows):
            return []
        if self._block is not None:
            return [self._cut(int(row), self._block) for row in rows]
        if self._packs is not None:
            return list(map(partial(self._pack, self._packs), rows))
        made = self._tokenize(self.raw[self.raw_rows[np.asarray(rows)].tolist()])
        if len(made["input_ids"]) != len(rows):
            raise DataError("a row that had tokens when they were counted has none now; the files have changed")
        return [{key: values[place] for key, values in made.items()} for place in range(len(rows))]

    def _pack(self, packs: NDArray[np.int64], row: int) -> dict[str, Any]:
        members = packs[self._ends[row] : self._ends[row + 1]].tolist()
        made = self._processor.preprocess_dataset(self.raw[members])  # which puts them into one pack, in the same order
        if len(made["input_ids"]) != 1:
            raise DataError("a row has other tokens than when they were counted; the files have changed")
        return {key: values[0] for key, values in made.items()}

    def _cut(self, row: int, block: int) -> dict[str, Any]:
        start = int(self._starts[row])
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, start + block, side="left"))
        made = _texts(self._processor, self.raw[list(range(first, last + 1))])
        offset = start - (int(self._ends[first - 1]) if first else 0)
        features = {}
        for key, values in made.items():
            whole = [value for part in values for value in part]
            features[key] = whole[offset : offset + block]
        if len(features["input_ids"]) != block:
            raise DataError("a document has other tokens than when they were counted; the files have changed")
        if getattr(self._processor.tokenizer, "add_bos_token", False):
            features["input_ids"][0] = self._processor.tokenizer.bos_token_id
        return features

    def documents(self) -> pa.ListArray | None:
        """Return the raw rows that each block or pack has tokens of [N]; None where rows have one each."""
        if self._packs is not None:
            return pa.ListArray.from_arrays(self._ends.astype(np.int32), self._packs)
        if self._block is None:
            return None
        firsts = np.searchsorted(self._ends, self._starts, side="right")
        counts = np.searchsorted(self._ends, self._starts + self._block, side="left") + 1 - firsts
        ends = np.cumsum([0, *counts])
        rows = np.arange(ends[-1]) + np.repeat(firsts - ends[:-1], counts)
        return pa.ListArray.from_arrays(ends.astype(np.int32), rows)

    def measures(self) -> Measures:
        """Return lengths, supervised tokens and the fingerprint, as ``measure`` does for tokenized rows."""
        return Measures(lengths=self._lengths, supervised=self._supervised, fingerprint=self._fingerprint)

    def row_keys(self) -> NDArray[np.uint64]:
        """Return a hash of the tokens and labels of each row, of a block that of its documents and its place [N]."""
        if self._packs is not None:
            packs = np.split(self._digests[self._packs], self._ends[1:-1]) if len(self) else []
            return np.frombuffer(b"".join(blake2b(pack.tobytes(), size=8) for pack in packs), dtype="<u8")
        if self._block is None:
            return self._digests[self.raw_rows].astype(np.uint64)
        stops = np.searchsorted(self._ends, self._starts + self._block, side="left") + 1
        firsts = np.searchsorted(self._ends, self._starts, side="right")
        begins = np.where(firsts > 0, self._ends[firsts - 1], 0)
        found = [
            blake2b(self._digests[first:stop].tobytes(), (start - begin).tobytes(), size=8)
            for first, stop, start, begin in zip(firsts, stops, self._starts, begins, strict=True)
        ]
        return np.frombuffer(b"".join(found), dtype="<u8")

    def rows_of(self, features: Sequence[Mapping[str, Any]]) -> NDArray[np.int64]:
        """Return the rows that have these tokens and labels [B], of packed ones their documents as ``ROWS`` has them.

        Of equal rows it is the first.

        Raises:
            DataError: No row has them.
        """
        if PIECES not in features[0]:
            return self._with_digests([_digest(feature) for feature in features])
        widths = [len(feature["input_ids"]) for feature in features]
        found = np.full((len(features), max(widths)), PADDING, dtype=np.int64)
        for place, feature in enumerate(features):
            digests, counts = np.reshape(feature[PIECES], (-1, 2)).T
            ends = np.cumsum(counts)
            rows = self._with_digests(np.where(digests < 0, ~digests, digests))
            found[place, : ends[-1]] = SAME
            found[place, ends - counts] = np.where(digests < 0, ~rows, rows)
        return found

    def _with_digests(self, digests: Any) -> NDArray[np.int64]:
        keys, order = self._known
        asked = np.asarray(digests, dtype=np.uint64)
        places = np.minimum(np.searchsorted(keys, asked), max(len(keys) - 1, 0))
        if not len(keys) or not np.array_equal(keys[places], asked):
            raise DataError("the stream has a row that was not there when rows were counted; the files have changed")
        return order[places]

    @cached_property
    def _known(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """The hashes of all rows, ascending, and the rows that have them."""
        keys = self.row_keys()
        order = np.argsort(keys, kind="stable")
        return keys[order], order


class PieceProcessor(NumberedProcessor):
    """Tokenizes converted examples as ``processor``, which packs them, does, and gives ``PIECES``."""

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return LLaMA-Factory's columns, and that of this class."""
        self._digests: list[int] = []
        return super().preprocess_dataset(examples)

    def _encode(self, **given: Any) -> tuple[list[int], list[int], dict[str, list[Any]]]:
        ids, labels, _ = super()._encode(**given)
        self._digests.append(_digest({"input_ids": ids, "labels": labels}))
        return ids, labels, {PIECES: [len(self._digests) - 1] * len(ids)}

    def _of_tokens(self, name: str, marks: list[Any]) -> list[Any]:
        """Return the pieces of a row."""
        counts = Counter(place for place in marks if place != _IGNORE)
        return [number for place, count in counts.items() for number in (self._digests[place], count)]

    def _of_blocks(
        self, examples: dict[str, list[Any]], ids: list[list[int]], parts: list[list[tuple[int, int]]]
    ) -> dict[str, list[Any]]:
        """Return the pieces of blocks."""
        digests, begun, pieces = [_digest({"input_ids": each}) for each in ids], -1, []
        for part in parts:
            pieces.append([n for k, count in part for n in (digests[k] if k > begun else ~digests[k], count)])
            begun = part[-1][0]
        return {PIECES: pieces}


def _packed(lengths: NDArray[np.int64], size: int, group: int) -> Iterator[NDArray[np.int64]]:
    """Yield the raw rows of each pack, ascending, of rows of these lengths [N]; a length below 0 is of no row."""
    for start in range(0, len(lengths), group):
        own = lengths[start : start + group]
        rows_of: dict[int, list[int]] = {}
        for row in np.flatnonzero(own >= 0).tolist():
            rows_of.setdefault(int(own[row]), []).append(start + row)
        for pack in greedy_knapsack(own[own >= 0].tolist(), size):
            yield np.sort([rows_of[length].pop() for length in pack])


def joined_documents(parts: Sequence[Any], offsets: Sequence[int]) -> pa.ListArray | None:
    """Return lists of numbers, one data set's after the other, each's numbers counted from its offset."""
    if any(part is None for part in parts):
        return None
    counts = [pc.list_value_length(part) for part in parts]
    numbers = [pc.add(pc.list_flatten(part), at) for part, at in zip(parts, offsets, strict=True)]
    ends = np.cumsum(np.concatenate([[0], *(count.to_numpy() for count in counts)]))
    return pa.ListArray.from_arrays(ends.astype(np.int32), np.concatenate([each.to_numpy() for each in numbers]))


class JoinedRows(ServedRows):
    """Several data sets of served rows, one after the other."""

    def __init__(self, parts: Sequence[ServedRows]) -> None:
        self._parts = list(parts)
        self._ends = np.cumsum([0, *(len(part) for part in parts)])
        offsets = np.cumsum([0, *(len(part.raw) for part in parts)])
        self.raw_rows = np.concatenate([part.raw_rows + at for part, at in zip(parts, offsets[:-1], strict=True)])
        self._offsets = offsets[:-1].tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        ids = np.asarray(rows, dtype=np.int64)
        part_of = np.searchsorted(self._ends, ids, side="right") - 1
        found: list[dict[str, Any]] = [{}] * len(ids)
        for part in np.unique(part_of):
            places = np.flatnonzero(part_of == part)
            served = self._parts[part].__getitems__((ids[places] - self._ends[part]).tolist())
            for place, row in zip(places, served, strict=True):
                found[place] = row
        return found

    def documents(self) -> pa.ListArray | None:
        """Return the raw rows of each block or pack, counted over all data sets [N]."""
        found = [part.documents() for part in self._parts]
        return joined_documents(found, self._offsets)

    def row_keys(self) -> NDArray[np.uint64]:
        """Return the hashes of the rows of all data sets [N]."""
        return np.concatenate([part.row_keys() for part in self._parts])

    def measures(self) -> Measures:
        """Return lengths, supervised tokens and the fingerprint of the whole."""
        parts = [part.measures() for part in self._parts]
        return Measures(
            lengths=np.concatenate([part.lengths for part in parts]),
            supervised=np.concatenate([part.supervised for part in parts]),
            fingerprint=blake2b(*(part.fingerprint.encode() for part in parts), size=8).hex(),
        )


_preprocessed = lf_loader._get_preprocessed_dataset


def serve(
    dataset: Any,
    data_args: Any,
    training_args: Any,
    stage: Any,
    *rest: Any,
    is_eval: bool = False,
    by_document: bool = False,
) -> Any:
    """Stand in for ``_get_preprocessed_dataset``: training rows stay raw and are tokenized when they are served.

    ``rest``: template, tokenizer and processor. ``by_document``: rows are those that would be packed.
    """
    if dataset is None or is_eval:
        return _preprocessed(dataset, data_args, training_args, stage, *rest, is_eval=is_eval)
    whole = by_document and stage == "pt" and data_args.packing
    if by_document:
        data_args = copy.copy(data_args)
        data_args.packing = data_args.neat_packing = False
    return ServedRows(
        dataset,
        lf_loader._get_dataset_processor(data_args, stage, *rest),
        block=data_args.cutoff_len if stage == "pt" and data_args.packing else None,
        group=data_args.preprocessing_batch_size,
        pack=data_args.cutoff_len if stage == "sft" and data_args.packing else None,
        whole=whole,
        num_proc=data_args.preprocessing_num_workers,
    )
