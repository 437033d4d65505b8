"""Rows that are tokenized when they are served, for corpora whose tokens should not lie on disk or in memory.

Under ``streaming: true`` LLaMA-Factory loads local files as memory-mapped tables and maps them on the fly.
Here the tables stay random-access, so that plans, mixtures, caps and exact resume work as for any data: one
pass over the corpus counts the tokens of each row (kept by the ``datasets`` cache), and the rows themselves
are the ones that LLaMA-Factory would have made beforehand, in the same order.

Upstream names relied upon, each asserted by ``tests/upstream``: ``llamafactory.data.loader._get_preprocessed_dataset``
(replaced while training data is loaded), ``_get_dataset_processor``, the processors' ``preprocess_dataset``, and how
``PretrainDatasetProcessor`` builds texts and blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from datasets import Dataset
from llamafactory.data import loader as lf_loader
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.train.row_space import Measures

_IGNORE = -100


def _tokens(features: dict[str, list[Any]], place: int) -> tuple[list[int], list[int] | None]:
    labels = features.get("labels")
    return features["input_ids"][place], None if labels is None else labels[place]


class _Counter:
    """Counts tokens of raw rows; an object of a class, so that the ``datasets`` cache can name its work."""

    def __init__(self, processor: Any, whole: bool) -> None:
        self.processor, self.whole = processor, whole

    def __call__(self, examples: dict[str, list[Any]]) -> dict[str, list[int]]:
        lengths, supervised, digests = [], [], []
        for place in range(len(next(iter(examples.values())))):
            single = {key: [values[place]] for key, values in examples.items()}
            made = _texts(self.processor, single) if self.whole else self.processor.preprocess_dataset(single)
            if not made.get("input_ids"):
                lengths.append(-1)
                supervised.append(0)
                digests.append(0)
                continue
            ids, labels = _tokens(made, 0)
            lengths.append(len(ids))
            supervised.append(len(ids) if labels is None else sum(label != _IGNORE for label in labels))
            content = np.asarray([*ids, _IGNORE, *(labels or ())], dtype=np.int64).tobytes()
            digests.append(int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "big"))
        return {"length": lengths, "supervised": supervised, "digest": digests}


def _texts(processor: Any, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Tokenize whole documents as ``PretrainDatasetProcessor`` does before it cuts them into blocks."""
    eos = "<|end_of_text|>" if processor.data_args.template == "llama3" else processor.tokenizer.eos_token
    texts = [messages[0]["content"] + eos for messages in examples["_prompt"]]
    tokenized: dict[str, list[Any]] = processor.tokenizer(texts, add_special_tokens=False)
    return tokenized


class _ByRow:
    """Rows one by one, for classes that give several at once."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.__getitems__([row])[0]


class ServedRows(_ByRow):
    """A data set of rows that are tokenized on access; row r is what stock preprocessing gives as row r.

    Args:
        raw: Rows in LLaMA-Factory's own columns.
        processor: LLaMA-Factory's processor of the stage.
        block: Tokens of a block for packed pre-training text; None keeps rows as they are.
        group: Raw rows that stock preprocessing cuts into blocks together.
        num_proc: Processes that count tokens.
    """

    def __init__(
        self, raw: Dataset, processor: Any, *, block: int | None, group: int, num_proc: int | None = None
    ) -> None:
        self._raw, self._processor, self._block, self._group = raw, processor, block, group
        counted = raw.map(
            _Counter(processor, block is not None),
            batched=True,
            batch_size=group,
            remove_columns=raw.column_names,
            num_proc=num_proc,
            desc="Counting tokens",
        ).with_format("arrow")[:]
        lengths, supervised, digests = (
            counted.column(name).to_numpy().astype(np.int64) for name in ("length", "supervised", "digest")
        )
        self.raw_rows: NDArray[np.int64] = np.flatnonzero(lengths >= 0)
        """Raw row of each row; empty for blocks, which have none of their own."""
        self._lengths, self._supervised = lengths[self.raw_rows], supervised[self.raw_rows]
        self._digest = hashlib.blake2b(digests.tobytes() + lengths.tobytes(), digest_size=8)
        if block is not None:
            self._ends = np.cumsum(np.maximum(lengths, 0))
            self._find_blocks(len(raw), block, group)
            self.raw_rows = np.zeros(0, dtype=np.int64)

    def _find_blocks(self, num_raw: int, block: int, group: int) -> None:
        starts = np.arange(0, num_raw, group)
        stops = np.minimum(starts + group, num_raw)
        first = np.where(starts > 0, self._ends[starts - 1], 0)
        counts = (self._ends[stops - 1] - first) // block
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        self._starts = np.repeat(first, counts) + number * block
        """First token of each block in the text of all raw rows."""
        self._lengths = np.full(len(self._starts), block, dtype=np.int64)
        self._supervised = self._lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        if not len(rows):
            return []
        if self._block is not None:
            return [self._cut(int(row)) for row in rows]
        made = self._processor.preprocess_dataset(self._raw[self.raw_rows[np.asarray(rows)].tolist()])
        if len(made["input_ids"]) != len(rows):
            raise DataError("a row that had tokens when they were counted has none now; the files have changed")
        return [{key: values[place] for key, values in made.items()} for place in range(len(rows))]

    def _cut(self, row: int) -> dict[str, Any]:
        assert self._block is not None
        start = int(self._starts[row])
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, start + self._block, side="left"))
        made = _texts(self._processor, self._raw[list(range(first, last + 1))])
        offset = start - (int(self._ends[first - 1]) if first else 0)
        features = {}
        for key, values in made.items():
            whole = [value for part in values for value in part]
            features[key] = whole[offset : offset + self._block]
        if len(features["input_ids"]) != self._block:
            raise DataError("a document has other tokens than when they were counted; the files have changed")
        if getattr(self._processor.tokenizer, "add_bos_token", False):
            features["input_ids"][0] = self._processor.tokenizer.bos_token_id
        return features

    def measures(self) -> Measures:
        """Return lengths, supervised tokens and the fingerprint, as ``measure`` does for tokenized rows."""
        return Measures(lengths=self._lengths, supervised=self._supervised, fingerprint=self._digest.hexdigest())


class JoinedRows(_ByRow):
    """Several data sets of served rows, one after the other."""

    def __init__(self, parts: Sequence[ServedRows]) -> None:
        self._parts = list(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        offsets = np.cumsum([0, *(len(part._raw) for part in parts)])
        self.raw_rows = np.concatenate([part.raw_rows + at for part, at in zip(parts, offsets[:-1], strict=True)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        ids = np.asarray(rows, dtype=np.int64)
        of = np.searchsorted(self._starts, ids, side="right") - 1
        found: list[dict[str, Any]] = [{}] * len(ids)
        for part in np.unique(of):
            places = np.flatnonzero(of == part)
            for place, row in zip(
                places, self._parts[part].__getitems__((ids[places] - self._starts[part]).tolist()), strict=True
            ):
                found[place] = row
        return found

    def measures(self) -> Measures:
        """Return lengths, supervised tokens and the fingerprint of the whole."""
        parts = [part.measures() for part in self._parts]
        digest = hashlib.blake2b("".join(part.fingerprint for part in parts).encode(), digest_size=8)
        return Measures(
            lengths=np.concatenate([part.lengths for part in parts]),
            supervised=np.concatenate([part.supervised for part in parts]),
            fingerprint=digest.hexdigest(),
        )


def joined(parts: Sequence[ServedRows]) -> JoinedRows:
    """Return data sets of served rows as one."""
    return JoinedRows(parts)


@contextmanager
def tokenized_when_served(active: bool) -> Iterator[None]:
    """While inside, LLaMA-Factory's loader leaves training rows raw and hands out ``ServedRows``."""
    if not active:
        yield
        return
    original = lf_loader._get_preprocessed_dataset

    def serve(
        dataset: Any,
        data_args: Any,
        training_args: Any,
        stage: Any,
        template: Any,
        tokenizer: Any,
        processor: Any = None,
        is_eval: bool = False,
    ) -> Any:
        if dataset is None or is_eval:
            return original(dataset, data_args, training_args, stage, template, tokenizer, processor, is_eval)
        maker = lf_loader._get_dataset_processor(data_args, stage, template, tokenizer, processor)
        return ServedRows(
            dataset,
            maker,
            block=data_args.cutoff_len if stage == "pt" and data_args.packing else None,
            group=data_args.preprocessing_batch_size,
            num_proc=data_args.preprocessing_num_workers,
        )

    lf_loader._get_preprocessed_dataset = serve
    try:
        yield
    finally:
        lf_loader._get_preprocessed_dataset = original
