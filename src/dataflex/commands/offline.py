"""What ``dataflex score`` and ``dataflex select`` do: scores without training, and subsets by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dataflex.config.mappings import plain
from dataflex.console import show_log
from dataflex.ending import release_groups
from dataflex.errors import UnsupportedError
from dataflex.offline.files import FileRecord
from dataflex.offline.request import names_of, score_request
from dataflex.offline.subset import Budget, chosen_rows, rule_of, score_column, write_subset
from dataflex.offline.table import read_scores
from dataflex.printable import redacted
from dataflex.version import __version__


def score(
    data: str,
    overrides: Sequence[str],
    *,
    methods: str,
    out: Path,
    targets: str | None,
    budget: int | None,
    store: str | None,
    arguments: list[str],
) -> str | int:
    """Score on as many ranks as the environment asks for; return what to print, or an exit code.

    Args:
        data: Configuration file, or names of data sets.
        overrides: ``key=value`` texts.
        methods: Names of selectors, with commas.
        out: Parquet file to write.
        targets: Names of target data sets, with commas.
        budget: Rows that every method is asked for.
        store: Folder for finished passes.
        arguments: All of the above as typed, for torchrun.

    Raises:
        ConfigError: All problems of the request, before anything is loaded.
    """
    request = score_request(
        data, overrides, methods=names_of(methods), out=out, targets=targets, budget=budget, store=store
    )
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
    overwrite: bool = False,
) -> str:
    """Write the subset and return what to print.

    Args:
        scores: A file that ``dataflex score`` wrote.
        column: Column to select by; None: that of the only method.
        budget: A share, a number of rows or of tokens, as text.
        rule: Name of a subset rule.
        overrides: ``key=value`` texts, its parameters.
        prefer: "high" or "low" scores; None: high, and low for ranks.
        order: "source" or "preference".
        seed: Of rules that draw.
        out: File to write, or a folder.
        overwrite: Whether to replace what no earlier subset wrote.

    Raises:
        ConfigError: Something asked for does not exist or does not fit.
        DataError: The budget exceeds the rows, or the source changed.
    """
    table = read_scores(scores)
    name = score_column(table, column)
    wanted = Budget.read(budget, table.num_rows)
    how = rule_of(rule, overrides, wanted)
    rows = chosen_rows(table, name, wanted, how, prefer=prefer, seed=seed)
    provenance = {
        "scores": asdict(FileRecord.of(scores)),
        "column": name,
        "budget": budget,
        "rule": {"name": how.name, **plain(how.params)},
        "prefer": prefer,
        "order": order,
        "seed": seed,
        "dataflex": __version__,
        "scored": dict(table.provenance),
    }
    provenance = redacted(provenance)
    written = write_subset(table, rows, out, order=order, provenance=provenance, overwrite=overwrite)
    lines = [f"{file.rows:,} rows ({file.tokens:,} tokens) of {file.dataset} -> {file.path}" for file in written]
    if wanted.rows is not None and len(rows) < wanted.rows:
        lines.append(f"{how.name} chose {len(rows):,} rows of the {wanted.rows:,} wanted")
    if len(np.unique(rows)) < len(rows):
        lines.append(f"{len(rows) - len(np.unique(rows)):,} rows are there more than once (drawn with replacement)")
    return "\n".join(lines)
