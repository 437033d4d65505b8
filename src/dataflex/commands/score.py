"""``dataflex score``: starts the scoring that a request describes."""

from __future__ import annotations

from typing import Any

from dataflex.config.args import data_set_names
from dataflex.console import show_log
from dataflex.ending import release_groups
from dataflex.errors import UnsupportedError
from dataflex.offline.request import score_request


def score(*, methods: str, arguments: list[str], **options: Any) -> str | int:
    """Score on as many ranks as the environment asks for; return what to print, or an exit code.

    ``methods`` are names with commas, ``arguments`` all options as typed, the others go to ``score_request``.
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
