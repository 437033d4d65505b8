"""Domains that neither a data set nor a column names: by the files' paths, or by clusters of embeddings.

Upstream name relied upon: ``llamafactory.data.loader.load_dataset`` (wrapped while loading, so that each row
knows the file that it came from).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from datasets import concatenate_datasets
from llamafactory.data import loader as lf_loader
from numpy.typing import NDArray

from dataflex.core.cluster import kmeans
from dataflex.core.rng import stream
from dataflex.errors import ConfigError
from dataflex.signals.encoded import encoded_rows
from dataflex.signals.encoders import load_encoder
from dataflex.signals.handle import Corpus

__all__ = ["FILE_COLUMN", "cluster_labels", "file_numbers", "path_labels"]

FILE_COLUMN = "dataflex_file"
_SAMPLE = 100_000
_BLOCK = 65_536


@contextmanager
def file_numbers(active: bool, files: list[str]) -> Iterator[None]:
    """While inside, rows that LLaMA-Factory loads from files carry the number of their file, see ``files``."""
    if not active:
        yield
        return
    original = lf_loader.load_dataset

    def load(*args: Any, data_files: Any = None, **kwargs: Any) -> Any:
        if not isinstance(data_files, list) or kwargs.get("streaming"):
            return original(*args, data_files=data_files, **kwargs)
        parts = []
        for file in data_files:
            part = original(*args, data_files=[file], **kwargs)
            parts.append(part.add_column(FILE_COLUMN, np.full(len(part), len(files), dtype=np.int32)))
            files.append(str(file))
        return concatenate_datasets(parts)

    lf_loader.load_dataset = load
    try:
        yield
    finally:
        lf_loader.load_dataset = original


def _expression(pattern: str) -> re.Pattern[str]:
    """Return the expression of a glob whose first ``*`` is the domain's name; ``*`` stays within a folder."""
    parts = pattern.split("*")
    text = re.escape(parts[0]) + "([^/]*?)" + "[^/]*".join(re.escape(part) for part in parts[1:])
    return re.compile(f"(?:^|/){text}$")


def path_labels(numbers: NDArray[np.int32], files: Sequence[str], pattern: str) -> NDArray[np.object_]:
    """Return the domain of each row [N].

    Args:
        numbers: File of each row.
        files: Paths.
        pattern: A glob for the end of the path; what its first ``*`` stands for is the domain.

    Raises:
        ConfigError: A file that the pattern does not fit.
    """
    expression, names = _expression(pattern), []
    for file in files:
        match = expression.search(Path(file).as_posix())
        if match is None:
            raise ConfigError(f"dynamic.domain_path: {pattern!r} does not fit the file {file}")
        names.append(match.group(1))
    return np.array(names, dtype=object)[numbers]


def cluster_labels(
    dataset: Any, lengths: NDArray[np.int64], tokenizer: Any, *, clusters: int, encoder: str, seed: int, device: Any
) -> NDArray[np.object_]:
    """Return the cluster of each row's embedding, ``cluster_00``, ``cluster_01``, ... [N] (collective).

    k-means on at most 100,000 rows drawn by the seed; the rest go to the nearest centre. Rows without text
    are a domain of their own, ``cluster_none``.

    Raises:
        ConfigError: No row has a text, or scikit-learn is missing.
        EncoderError: The encoder cannot be loaded.
    """
    rows = np.arange(len(lengths), dtype=np.int64)
    model = load_encoder(encoder, device=device)
    corpus = Corpus(dataset=dataset, lengths=lengths)
    vectors = encoded_rows(model, corpus, rows, tokenizer, token_budget=16384, device=device)
    known = np.flatnonzero(np.isfinite(vectors).all(axis=1))
    if not len(known):
        raise ConfigError("dynamic.domain_clusters: no row has a text that could be embedded")
    rng = stream(seed, "domain clusters", 0)
    drawn = known if len(known) <= _SAMPLE else np.sort(rng.choice(known, size=_SAMPLE, replace=False))
    _, centres = kmeans(vectors[drawn], clusters, rng)
    labels = np.full(len(rows), "cluster_none", dtype=object)
    names = np.array([f"cluster_{k:02d}" for k in range(len(centres))], dtype=object)
    squares = (centres**2).sum(axis=1)
    for start in range(0, len(known), _BLOCK):
        part = known[start : start + _BLOCK]
        labels[part] = names[np.argmin(squares - 2.0 * vectors[part] @ centres.T, axis=1)]
    return labels
