"""Near-duplicates among the rows of a data set's files, by MinHash (datasketch, the extra ``dedup``).

Two rows are near where the estimated Jaccard similarity of their sets of five neighbouring words is at least a share
(Lee et al., "Deduplicating Training Data Makes Language Models Better", arXiv 2107.06499, section 4.2, compare so).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import UnsupportedError
from dataflex.select.words import letter_runs
from dataflex.state import blake2b
from dataflex.version import install

_WORDS = 5
_PERMUTATIONS = 128
# Above it no two bands fit the permutations, which the library refuses; rows that it finds are compared anyway.
_MOST_THRESHOLD = 0.97


def near_duplicates(rows: Iterable[bytes], share: float) -> NDArray[np.bool_]:
    """Return which rows are near one before them that is no near-duplicate itself [N].

    Args:
        rows: Rows as they stand in their files, the preferred ones first.
        share: Similarity in (0, 1] from which rows are near.

    Raises:
        UnsupportedError: datasketch is not installed.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise UnsupportedError(f"--near-duplicates: {error}; install the extra: {install('dedup')}") from error
    # Bands are kept as short hashes: rows that share one by chance are told apart by their sketches.
    kept = MinHashLSH(threshold=min(share, _MOST_THRESHOLD), num_perm=_PERMUTATIONS, hashfunc=partial(blake2b, size=8))
    sketches, found = dict[int, Any](), list[bool]()
    for number, row in enumerate(rows):
        sketch = MinHash(num_perm=_PERMUTATIONS, seed=1)
        sketch.update_batch(list(_shingles(row)))
        near = any((sketch.hashvalues == sketches[other]).mean() >= share for other in kept.query(sketch))
        found.append(near)
        if not near:
            sketches[number] = sketch.hashvalues
            kept.insert(number, sketch)
    return np.array(found, dtype=np.bool_)


def _shingles(row: bytes) -> set[bytes]:
    """Return the runs of neighbouring words of a row's texts; all words where they are fewer, without any the row."""
    try:
        texts = list(_texts(json.loads(row)))
    except ValueError:
        texts = [row.decode("utf-8", "replace")]
    words = letter_runs(" ".join(texts))
    if not words:
        return {row}
    runs = range(max(1, len(words) - _WORDS + 1))
    return {" ".join(words[start : start + _WORDS]).encode() for start in runs}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
