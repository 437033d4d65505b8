"""What ``dataflex score`` and ``dataflex select`` do: scores without training, and subsets by them."""

from __future__ import annotations

import argparse
from dataclasses import asdict

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


def score(options: argparse.Namespace) -> str | int:
    """Score on as many ranks as the environment asks for; return what to print, or an exit code.

    Raises:
        ConfigError: All problems of the request, before anything is loaded.
    """
    request = score_request(
        options.data,
        options.overrides,
        methods=data_set_names(options.method),
        out=options.out,
        targets=options.targets,
        budget=options.budget,
        store=options.store,
    )
    try:
        from dataflex.llamafactory.launch import wants_torchrun, with_torchrun
    except ImportError as error:
        raise UnsupportedError(f"score: LLaMA-Factory cannot be imported: {error}") from error
    if wants_torchrun():
        return with_torchrun(["score", *options.arguments], module="dataflex")
    from dataflex.offline.scoring import run_score

    show_log()
    told = run_score(request)
    release_groups()
    return told


def select(options: argparse.Namespace) -> str:
    """Write the subset and return what to print.

    Raises:
        ConfigError: Something asked for does not exist or does not fit.
        DataError: The budget exceeds the rows, or the source changed.
    """
    table = read_scores(options.scores)
    column = score_column(table, options.score)
    budget = Budget.read(options.budget, table.num_rows)
    rule = rule_of(options.rule, options.overrides, budget)
    rows = chosen_rows(table, column, budget, rule, prefer=options.prefer, seed=options.seed)
    provenance = {
        "scores": asdict(FileRecord.of(options.scores)),
        "column": column,
        "budget": options.budget,
        "rule": {"name": rule.name, **plain(rule.params)},
        "prefer": options.prefer,
        "order": options.order,
        "seed": options.seed,
        "dataflex": __version__,
        "scored": dict(table.provenance),
    }
    parts = write_subset(
        table, rows, options.out, order=options.order, provenance=redacted(provenance), overwrite=options.overwrite
    )
    lines = [f"{len(part.rows):,} rows ({part.tokens:,} tokens) of {part.name} -> {part.path}" for part in parts]
    if budget.rows is not None and len(rows) < budget.rows:
        lines.append(f"{rule.name} chose {len(rows):,} rows of the {budget.rows:,} wanted")
    repeated = len(rows) - len(np.unique(rows))
    if repeated:
        lines.append(f"{repeated:,} rows are there more than once (drawn with replacement)")
    return "\n".join(lines)
