"""The files of ``checkpoint-N/dataflex/``: plan in progress, states of the methods, and the run that they belong to."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.checkpoints import FOLDER
from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.mappings import key_of, shown
from dataflex.config.resuming import FIXED, ON_RESUME, settings_of
from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.errors import CheckpointError, DataFlexError
from dataflex.plan.domains import Domains
from dataflex.plan.plan import BatchShape, DataPlan
from dataflex.printable import redacted
from dataflex.registry import KINDS
from dataflex.state import load_state, read_json, refusals, replacing, save_state
from dataflex.train.row_space import RowSpace

logger = logging.getLogger(__name__)

_RUN = "run.json"
_ROWS = "rows.npz"
_FORMAT = 2  # of the states, whose keys a test lists


class Identity:
    """What must be the same for a saved plan to mean the same rows, and for saved states to mean the same decisions.

    The micro-batch size may change unless the mixer wants micro-batches of one domain each, and the number of ranks as
    long as the global batch and the rows of an epoch do not. ``lf`` are LLaMA-Factory's keys as they were written;
    ``described`` is the JSON form that goes into the checkpoint, whose ``settings`` are the keys of
    ``config.resuming``.
    """

    def __init__(
        self, config: DynamicConfig, space: RowSpace, lf: Mapping[str, Any], *, shape: BatchShape, seed: int
    ) -> None:
        self.described: dict[str, Any] = {
            "space": space.describe(),
            "global_batch": shape.global_batch,
            "micro_batch_size": shape.micro_batch_size,
            "world": shape.world,
            "seed": seed,
            "methods": {kind: _method(getattr(config, kind)) for kind in KINDS},
            "settings": settings_of(config, LlamaFactoryArgs.read(lf)),
        }
        self._pure, self._flat = config.requires.pure_micro_batches, config.flat
        self._drops = shape.drop_last and not config.full_steps
        self._num_rows = space.num_rows

    def changed(self, saved: dict[str, Any]) -> dict[str, str]:
        """Return a line for each key whose value differs from that of a saved identity."""
        before = _compared(saved)
        return {
            key: f"{self._named(key)} changed ({_said(before[key])} -> {_said(now)})"
            for key, now in _compared(self.described).items()
            if before[key] != now
        }

    def differences(self, saved: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Return lines on how a saved identity differs from this one: what is refused, and what is only told."""
        mine, before = self.described, _compared(saved)
        lines: dict[str, list[str]] = {"refused": [], "told": [], "rows": [], "batch": []}
        block = "dynamic.warmup_steps"
        warmup = before.get(block), mine["settings"][block]
        for key, now in _compared(mine).items():
            change = ON_RESUME[key]
            for path, was, is_now in _leaves(before.get(key), now, self._named(key)):
                if key == "dynamic.weighter" and path.endswith(".warmup_steps") and (was, is_now) == warmup:
                    continue  # a weighter has the block's, whose change is told
                line = f"{path} changed ({_said(was)} -> {_said(is_now)})"
                lines[change.kind].append(f"{line}: {change.note}" if change.note else line)
        refused, told = lines["refused"], lines["told"]
        component = self._flat and bool(refused)  # a component brings a seed of its own
        seed = [] if component else self._seed_line(saved)
        refused += seed
        refused += self._batch_line(saved, lines["batch"])
        if saved["space"]["fingerprint"] != mine["space"]["fingerprint"]:
            what = f"row space changed ({_changed_rows(saved['space'], mine['space'])})"
            causes = [line for line in lines["rows"] if not (seed and line.startswith("seed "))]
            refused += [f"{line}: {what}" for line in causes] or ([] if seed else [what])
        else:
            told += [f"{line}: the rows are the same" for line in lines["rows"] if not line.startswith("seed ")]
        return refused, told

    def same_rows(self, checkpoint: Path) -> bool:
        """Whether a checkpoint holds our state, and that of the same rows."""
        try:
            meta = read_json(checkpoint / FOLDER / _RUN)
        except (OSError, ValueError):
            return False
        return bool(meta.get("format") == _FORMAT and meta.get("space") == self.described["space"])

    def _named(self, key: str) -> str:
        """Return a key as it was written."""
        flat = ON_RESUME[key].flat if self._flat else None
        return flat or key

    def _seed_line(self, saved: dict[str, Any]) -> list[str]:
        if saved["seed"] == self.described["seed"]:
            return []
        before, now = saved["settings"], self.described["settings"]
        key = next(key for key in ("dynamic.seed", "seed") if before[key] != now[key])
        return [f"{self._named(key)} changed ({_said(before[key])} -> {_said(now[key])})"]

    def _batch_line(self, saved: dict[str, Any], changed: list[str]) -> list[str]:
        mine, world = self.described, saved["world"]
        if saved["global_batch"] != mine["global_batch"]:
            what = f"global batch changed ({saved['global_batch']} -> {mine['global_batch']} sequences)"
        elif self._pure and saved["micro_batch_size"] != mine["micro_batch_size"]:
            what = f"the mixer's micro-batches of one domain each changed (to {mine['micro_batch_size']} sequences)"
        elif self._drops and (before := self._epoch_rows(saved)) != (now := self._epoch_rows(mine)):
            what = f"the rows of an epoch changed ({before:,} -> {now:,}, by dataloader_drop_last)"
        else:
            return []
        causes = changed + ([f"ranks changed ({world} -> {mine['world']})"] if world != mine["world"] else [])
        return [": ".join(filter(None, ("; ".join(causes), what)))]

    def _epoch_rows(self, described: dict[str, Any]) -> int:
        """Return the rows that an epoch serves where micro-batches that are not full on every rank are dropped."""
        return self._num_rows - self._num_rows % (described["world"] * described["micro_batch_size"])


def _method(config: MethodConfig | None) -> dict[str, Any] | None:
    if config is None:
        return None
    values = redacted(json.loads(json.dumps(asdict(config.params), default=str)))
    params = {key_of(field): values[field.name] for field in fields(config.params)}
    cadence = {"every": config.every, "warmup_steps": config.warmup_steps} if config.decides else {}
    return {"name": config.name, "params": params, "targets": list(config.targets), **cadence}


def _compared(described: dict[str, Any]) -> dict[str, Any]:
    """Return methods and settings by key, without the seed, which has a line of its own."""
    found = {f"dynamic.{kind}": method for kind, method in described["methods"].items()} | described["settings"]
    return {key: value for key, value in found.items() if key != "dynamic.seed"}


def _leaves(before: Any, now: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the innermost values that differ, with their paths; a method or part of another name is one value."""
    if before == now:
        return
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
        if before.get("name") == now.get("name"):
            for key in now:
                yield from _leaves(before[key], now[key], path if key == "params" else f"{path}.{key}")
            return
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now) and isinstance(now[0], dict):
        for place, pair in enumerate(zip(before, now, strict=True)):
            yield from _leaves(*pair, f"{path}[{place}]")
        return
    yield path, before, now


def _said(value: Any) -> str:
    """Return a value as a user writes it."""
    if value is None:
        return "not given"
    if isinstance(value, dict) and "name" in value:
        return str(value["name"])
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value) or "none"
    return value if isinstance(value, str) else shown(value)


def _changed_rows(before: dict[str, Any], now: dict[str, Any]) -> str:
    sources, found = before["sources"], now["sources"]
    changes = [
        f"source {name!r}: {sources.get(name, 0):,} -> {found.get(name, 0):,} rows"
        for name in dict.fromkeys([*sources, *found])
        if sources.get(name) != found.get(name)
    ]
    lines = ([line for bad in space.get("bad_shards", {}).values() for line in bad] for space in (before, now))
    was, is_now = (", ".join(each) or "none" for each in lines)
    if was != is_now:
        changes.append(f"left out: {was} -> {is_now}")
    if not changes and list(sources) != list(found):
        return f"the data sets are in another order: {', '.join(sources)} -> {', '.join(found)}"
    return "; ".join(changes) or "same numbers of rows, other content or another tokenizer"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What ``save`` wrote into a checkpoint, and what is another thing now."""

    folder: Path  # of a checkpoint
    described: dict[str, Any]  # identity of the run
    plan: DataPlan | None  # the plan in progress, if one was made
    state: dict[str, Any]
    changes: list[str]  # what changed on purpose; the state is to be carried over where there is any

    def rows(self) -> tuple[Domains, NDArray[np.uint64]]:
        """Return domains and keys of the rows."""
        try:
            with np.load(self.folder / _ROWS, allow_pickle=False) as arrays:
                return Domains(names=tuple(self.described["space"]["domains"]), domain_of=arrays["domain_of"]), arrays[
                    "keys"
                ]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"resume: {self.folder / _ROWS} cannot be read ({error}), so that 'dynamic.on_change: extend' cannot "
                "know the rows again; checkpoints of earlier versions have none. Restore what changed, or decide "
                "afresh with 'dynamic.resume_plan: ignore'."
            ) from error


def write_rows(folder: Path, space: RowSpace) -> Path:
    """Write what rows are known by, for all checkpoints of this process, and return the file."""
    domain_of = space.domains.domain_of.astype(np.min_scalar_type(len(space.domains.names)))
    with replacing(folder / _ROWS) as file:
        np.savez(file, keys=space.keys, domain_of=domain_of)
    return folder / _ROWS


def save(
    checkpoint: Path,
    identity: Identity,
    plan: DataPlan | None,
    state: dict[str, Any],
    step: int,
    rows: Path | None = None,
) -> None:
    """Write ``checkpoint/dataflex`` (rank 0 only); it counts once the checkpoint is sealed.

    ``rows`` is what ``write_rows`` wrote, of which the checkpoint has a link, or a copy where there are none.
    """
    folder = checkpoint / FOLDER
    meta = {"format": _FORMAT, "step": step, **identity.described}
    with refusals(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _RUN).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        save_state(folder, "methods", state)
        if plan is not None:
            np.savez(folder / "plan.npz", **plan.to_arrays())  # type: ignore[arg-type]
        if rows is not None:
            try:
                os.link(rows, folder / _ROWS)
            except OSError:
                shutil.copyfile(rows, folder / _ROWS)


def load(checkpoint: Path, identity: Identity | None, *, extend: bool = False) -> Found:
    """Return what ``save`` wrote into a whole checkpoint; with ``extend`` also that of another pool or other settings.

    The run must be that of ``identity``; None: any run.

    Raises:
        CheckpointError: No DataFlex state, a broken file, or another run's state.
    """
    folder = checkpoint / FOLDER
    if not (folder / _RUN).is_file():
        raise CheckpointError(
            f"resume: {checkpoint} has no '{FOLDER}' folder: it was not written by a run with a dynamic block, or "
            "with 'save_only_model: true'. Start fresh with 'dynamic.resume_plan: ignore', or from another checkpoint."
        )
    meta = read_json(folder / _RUN)
    if meta.get("format") != _FORMAT:
        raise CheckpointError(
            f"resume: {folder} was written by another version of DataFlex (its format is {meta.get('format')!r}, and "
            f"this version reads {_FORMAT}). Go on with that version, or decide afresh from here on with "
            "'dynamic.resume_plan: ignore'."
        )
    problems, told = ([], []) if identity is None else identity.differences(meta)
    refused = problems
    if extend and identity is not None:
        refused = [line for key, line in identity.changed(meta).items() if key in FIXED]
    if refused:
        way = "" if extend else ", go on with the changes by 'dynamic.on_change: extend'"
        raise CheckpointError(
            "".join(f"resume: {problem}\n" for problem in refused)
            + f"The saved plan and states would mean something else. Restore what changed{way}, or decide afresh from "
            "here on with 'dynamic.resume_plan: ignore'."
        )
    for line in told:
        logger.info("resume: %s", line)
    state = load_state(folder, "methods")
    return Found(folder=folder, described=meta, plan=_plan(folder), state=state, changes=problems)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer steps done at a checkpoint; CheckpointError if it does not tell."""
    try:
        return int(read_json(checkpoint / FOLDER / _RUN)["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"resume: {checkpoint} does not tell its step: {error}") from error


def decisions(checkpoint: Path) -> int:
    """Return how many decisions a checkpoint's run had made, 0 where it does not tell."""
    try:
        plan = _plan(checkpoint / FOLDER)
    except (DataFlexError, OSError, ValueError, zipfile.BadZipFile):
        return 0
    return 0 if plan is None else plan.interval.index + 1


def _plan(folder: Path) -> DataPlan | None:
    """Read the plan in progress, if there is one."""
    if not (folder / "plan.npz").exists():
        return None
    with np.load(folder / "plan.npz", allow_pickle=False) as arrays:
        return DataPlan.from_arrays(dict(arrays))
