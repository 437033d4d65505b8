"""``dataflex score``, ``query`` and ``eval``: start what a request describes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dataflex.config.args import data_set_names
from dataflex.console import others_aside, show_log
from dataflex.ending import release_groups
from dataflex.errors import ConfigError, DataError
from dataflex.offline.evaluation import also, as_text, eval_request, evaluated
from dataflex.offline.query import query_request
from dataflex.offline.request import score_request
from dataflex.printable import Answer
from dataflex.state import refusals, write_json


def score(
    *, methods: str, arguments: list[str], engine: str = "ranks", workers: int | None = None, **options: Any
) -> str | int:
    """Score on as many ranks as the environment asks for, or on Ray's workers; return what to print, or an exit code.

    ``methods`` are names with commas, ``arguments`` all options as typed, the others go to ``score_request``.
    """
    options["methods"] = data_set_names(methods)
    request = score_request(**options)
    if engine == "ray":
        if request.precision is not None:
            raise ConfigError("--engine ray: writes scores (--out); an index is made by ranks (FORCE_TORCHRUN=1)")
        if request.lf.get("deepspeed") or request.lf.get("fsdp"):
            raise ConfigError(
                "--engine ray: every worker keeps the whole model; remove deepspeed and fsdp, or use ranks"
            )
        from dataflex.offline.cluster import scored_by_ray
        from dataflex.offline.scoring import finished

        show_log()
        return finished(request, *scored_by_ray(options, workers))
    if workers is not None:
        raise ConfigError("--workers: is for --engine ray; ranks are counted by NPROC_PER_NODE")
    ended = _elsewhere("score", arguments)
    if ended is not None:
        return ended
    from dataflex.offline.indexing import run_index
    from dataflex.offline.scoring import run_score

    show_log()
    with others_aside():
        told = run_score(request) if request.precision is None else run_index(request)
    release_groups()
    return told


def query(*, index: Path, arguments: list[str], **options: Any) -> str | int:
    """Score the rows of an index towards targets; options as ``query_request`` takes them."""
    request = query_request(index, **options)
    ended = _elsewhere("query", arguments)
    if ended is not None:
        return ended
    from dataflex.offline.querying import run_query

    show_log()
    with others_aside():
        told = run_query(request)
    release_groups()
    return told


def evaluate(*, model: str, overrides: list[str], out: Path | None, arguments: list[str], **options: Any) -> str | int:
    """Evaluate a model, and write the values to ``out``; ``options`` are those of ``eval_request``."""
    with TemporaryDirectory(prefix="dataflex-eval-") as work:
        request = eval_request(model, overrides, work=Path(work), out=out, **options)
        # LLaMA-Factory prints an example and logs to the stdout that it finds; here stdout is for what was asked.
        with others_aside():
            ended = _elsewhere("eval", arguments)
            if ended is not None:
                return ended
            from dataflex import comm
            from dataflex.offline.scoring import scored_table

            show_log()
            scored, table = scored_table(request.score, partial(also, request))
            found = evaluated(request, table, *scored.also)
        told = ""
        if comm.rank() == 0:
            if out is not None:
                with refusals(out, DataError, key="--out"):
                    out.parent.mkdir(parents=True, exist_ok=True)
                write_json(out, found)
            told = Answer(as_text(found), found)
        comm.barrier()
    release_groups()
    return told


def _elsewhere(command: str, arguments: list[str]) -> int | None:
    """Run the command under torchrun where the environment asks for it, and return its exit code; else None."""
    from dataflex.llamafactory.launch import wants_torchrun, with_torchrun

    return with_torchrun([command, *arguments]) if wants_torchrun() else None
