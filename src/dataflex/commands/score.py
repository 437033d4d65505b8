"""``dataflex score``: scores of every row of a data set, without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dataflex.console import show_log
from dataflex.ending import release_groups
from dataflex.errors import UnsupportedError
from dataflex.offline.request import names_of, score_request

__all__ = ["score"]


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
        return with_torchrun(["score", *arguments], module="dataflex")
    from dataflex.offline.scoring import run_score

    show_log()
    told = run_score(request)
    release_groups()
    return told
