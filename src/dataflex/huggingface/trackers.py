"""Where our numbers go: grouped for the trackers of ``report_to``, without those of single domains for the terminal.

Upstream names relied upon, each asserted by ``tests/upstream``: ``rewrite_logs`` of
``transformers.integrations.integration_utils``, which the callbacks of TensorBoard, W&B, SwanLab, Trackio and others
look up when they log, and ``on_log`` of ``transformers.trainer_callback.ProgressCallback`` and ``PrinterCallback``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from transformers.integrations import integration_utils
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dataflex.console import verbose
from dataflex.huggingface.loop import replaced

_OURS, _STANDING = "dataflex/", "dataflex/nominal/"


def grouping() -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return what names numbers as trackers group them: ``dataflex_mix/web``, ``dataflex/interval``.

    Those that are not ours are named as by transformers: ``train/loss``, ``eval/loss``. Nominal shares are left out
    from the second log on, as long as they are what they were at first.
    """
    rewrite: Callable[[dict[str, Any]], dict[str, Any]] = integration_utils.rewrite_logs
    first: dict[str, tuple[Any, Any]] = {}  # value of a number that never changed, and the epoch of its log

    def grouped(logs: Mapping[str, Any]) -> dict[str, Any]:
        found = rewrite({name: value for name, value in logs.items() if not name.startswith(_OURS)})
        for name, value in logs.items():
            if not name.startswith(_OURS):
                continue
            if name.startswith(_STANDING):
                told, epoch = first.setdefault(name, (value, logs.get("epoch")))
                if told == value and epoch != logs.get("epoch"):
                    continue
                first[name] = (told if told == value else None, epoch)
            what, slash, domain = name.removeprefix(_OURS).partition("/")
            found[f"dataflex_{what}/{domain}" if slash else name] = value
        return found

    return grouped


def _brief(on_log: Callable[..., Any]) -> Callable[..., Any]:
    def shown(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:
        kept = {name: value for name, value in (logs or {}).items() if verbose() or name.count("/") < 2}
        return on_log(self, args, state, control, logs=kept, **kwargs)

    return shown


def shown_apart() -> AbstractContextManager[None]:
    """Group our numbers for trackers, and print none of single domains without ``--verbose``, while inside."""
    return replaced(
        (integration_utils, "rewrite_logs", grouping()),
        (ProgressCallback, "on_log", _brief(ProgressCallback.on_log)),
        (PrinterCallback, "on_log", _brief(PrinterCallback.on_log)),
    )
