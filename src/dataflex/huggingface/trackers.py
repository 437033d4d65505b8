"""Where our numbers go: grouped for the trackers of ``report_to``, without those of single domains for the terminal.

At the end of training, trackers also get the report's figures and tables, each as it takes them.

Upstream names relied upon, each asserted by ``tests/upstream``: ``rewrite_logs`` of
``transformers.integrations.integration_utils``, which the callbacks of TensorBoard, W&B, SwanLab, Trackio and others
look up when they log, and ``on_log`` of ``transformers.trainer_callback.ProgressCallback`` and ``PrinterCallback``.
Where a callback has what it logs with is asserted too: ``tb_writer``, ``_wandb``, ``_trackio``, ``_swanlab``.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from transformers.integrations import integration_utils
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dataflex.console import verbose
from dataflex.huggingface.loop import replaced

logger = logging.getLogger(__name__)

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


# ---- figures and tables

Figures = Mapping[str, tuple[Any, str]]  # an image of PIL's and its headline, by name
Tables = Mapping[str, tuple[list[str], list[list[Any]]]]  # names of the columns, and lines, by name


def _to_tensorboard(callback: Any, figures: Figures, tables: Tables, step: int) -> None:
    writer = callback.tb_writer
    for name, (image, _) in figures.items():
        writer.add_image(name, np.asarray(image), step, dataformats="HWC")
    for name, (columns, lines) in tables.items():
        cells = [columns, ["---"] * len(columns), *lines]
        text = [
            ["-" if cell is None else str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in cells
        ]
        writer.add_text(name, "\n".join(f"| {' | '.join(row)} |" for row in text), step)


def _to_wandb(callback: Any, figures: Figures, tables: Tables, step: int) -> None:
    wandb = callback._wandb
    images = {name: wandb.Image(image, caption=told) for name, (image, told) in figures.items()}
    found = {
        name: wandb.Table(columns=columns, data=lines, allow_mixed_types=True)
        for name, (columns, lines) in tables.items()
    }
    wandb.log({**images, **found, "train/global_step": step})


def _to_trackio(callback: Any, figures: Figures, tables: Tables, step: int) -> None:
    import pandas

    trackio = callback._trackio
    images = {name: trackio.Image(image, caption=told) for name, (image, told) in figures.items()}
    found = {
        name: trackio.Table(dataframe=pandas.DataFrame(lines, columns=columns))
        for name, (columns, lines) in tables.items()
    }
    trackio.log({**images, **found, "train/global_step": step})


def _to_swanlab(callback: Any, figures: Figures, tables: Tables, step: int) -> None:
    swanlab = getattr(callback, "_swanlab", None) or sys.modules["swanlab"]  # LLaMA-Factory's is SwanLab's own
    found = {name: swanlab.Image(image, caption=told) for name, (image, told) in figures.items()}
    for name, (columns, lines) in tables.items():
        found[name] = swanlab.echarts.Table()
        found[name].add(columns, lines)
    swanlab.log(found, step=step)


_TRACKERS: dict[str, Callable[[Any, Figures, Tables, int], None]] = {
    "TensorBoardCallback": _to_tensorboard,
    "WandbCallback": _to_wandb,
    "TrackioCallback": _to_trackio,
    "SwanLabCallback": _to_swanlab,
}


def send_report(callbacks: Iterable[Any], record: Path, step: int) -> None:
    """Send the figures and tables of a run's report to the trackers among ``callbacks``; of one process alone.

    Texts of rows stay here. What a tracker does not take is told and left out: no training ends for it.
    """
    told = [
        (each, _TRACKERS[kind.__name__])
        for each in callbacks
        for kind in type(each).__mro__
        if kind.__name__ in _TRACKERS
    ]
    if not told:
        return
    try:
        figures, tables = _of_report(record)
    except Exception as error:  # noqa: BLE001 - whatever it is, the training is done and its model is to be saved
        logger.warning("trackers get no figures and tables: %s: %s", type(error).__name__, error)
        return
    for callback, send in told:
        try:
            send(callback, figures, tables, step)
        except Exception as error:  # noqa: BLE001 - each tracker has errors of its own
            name = type(callback).__name__
            logger.warning("%s took no figures and tables: %s: %s", name, type(error).__name__, error)


def _of_report(record: Path) -> tuple[Figures, Tables]:
    from PIL import Image

    from dataflex.record.charts import charts
    from dataflex.record.plots import draw
    from dataflex.record.recorded import recorded
    from dataflex.record.sections import report_of
    from dataflex.record.text import middle

    runs = [recorded(record)]
    made = charts(runs)
    figures = {
        f"dataflex_figures/{name.removesuffix('.png')}": (
            Image.open(io.BytesIO(content)).convert("RGB"),
            made[name.removesuffix(".png")].headline,
        )
        for name, content in draw(made).items()
    }
    tables = {
        f"dataflex_tables/{middle(table['caption'], 60)}": (
            [each["name"] or "name" for each in table["columns"]],
            table["rows"],
        )
        for section in report_of(runs, made, {"notes": []})["sections"]
        for table in section["tables"]
    }
    return figures, tables
