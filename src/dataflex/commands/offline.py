"""What ``dataflex score`` and ``dataflex select`` do: scores without training, and subsets by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.config.args import data_set_names
from dataflex.config.mappings import plain
from dataflex.console import show_log
from dataflex.ending import release_groups
from dataflex.errors import UnsupportedError
from dataflex.offline.files import FileRecord
from dataflex.offline.request import score_request
from dataflex.offline.subset import Budget, chosen_rows, rule_of, score_column, write_subset
from dataflex.offline.table import read_scores
from dataflex.printable import redacted
from dataflex.version import __version__


def score(*, methods: str, arguments: list[str], **options: Any) -> str | int:
    """Score on as many ranks as the environment asks for; return what to print, or an exit code.

    Args:
        methods: Names of selectors, with commas.
        arguments: All options as typed, for torchrun.
        options: The others, as ``score_request`` takes them.

    Raises:
        ConfigError: All problems of the request, before anything is loaded.
    """
    request = score_request(methods=data_set_names(methods), **options)
    try:
        from dataflex.llamafactory.launch import wants_torchrun, with_torchrun
    except ImportError as error:
        raise UnsupportedError(f"score: LLaMA-Factory cannot be imported: {error}") from error
    if wants_torchrun():
        return with_torchrun(["score", *arguments])
    from dataflex.offline.scoring import run_score

    show_log()
    told = run_score(request)
    release_groups()
    return told


def select(
    scores: Path,
    *,
    column: str | None,
    budget: str,
    rule: str,
    overrides: Sequence[str],
    prefer: str | None,
    order: str,
    seed: int,
    out: Path,
    overwrite: bool,
) -> str:
    """Write the subset that the options of ``dataflex select`` describe and return what to print.

    Raises:
        ConfigError: Something asked for does not exist or does not fit.
        DataError: The budget exceeds the rows, or the source changed.
    """
    table = read_scores(scores)
    column = score_column(table, column)
    wanted = Budget.read(budget, table.num_rows)
    how = rule_of(rule, overrides, wanted)
    rows = chosen_rows(table, column, wanted, how, prefer=prefer, seed=seed)
    provenance = {
        "scores": asdict(FileRecord.of(scores)),
        "column": column,
        "budget": budget,
        "rule": {"name": how.name, **plain(how.params)},
        "prefer": prefer,
        "order": order,
        "seed": seed,
        "dataflex": __version__,
        "scored": dict(table.provenance),
    }
    parts = write_subset(table, rows, out, order=order, provenance=redacted(provenance), overwrite=overwrite)
    lines = [f"{len(part.rows):,} rows ({part.tokens:,} tokens) of {part.name} -> {part.path}" for part in parts]
    if wanted.rows is not None and len(rows) < wanted.rows:
        lines.append(f"{how.name} chose {len(rows):,} rows of the {wanted.rows:,} wanted")
    repeated = len(rows) - len(np.unique(rows))
    if repeated:
        lines.append(f"{repeated:,} rows are there more than once (drawn with replacement)")
    return "\n".join(lines)
