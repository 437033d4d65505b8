"""A swarm on disk: the configurations of its runs, the table of mixtures, and what was asked for.

``DIR/swarm.json`` names everything; ``DIR/ratios.csv`` holds the mixtures; ``DIR/configs/run-0001.yaml``
is a complete configuration; ``DIR/runs/run-0001`` is that run's output_dir.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.core.file_names import file_name_problem
from dataflex.core.redact import redacted, without_secrets
from dataflex.errors import ConfigError, DataError
from dataflex.mixing.swarm import SwarmSettings
from dataflex.mixing.tables import RATIOS, Table, finished, write_table

__all__ = ["SWARM", "Swarm", "read_swarm", "save_swarm"]

SWARM = "swarm.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Swarm:
    """A swarm of runs.

    Attributes:
        folder: Where it lies.
        names: Domains [K].
        sizes: Their natural sizes [K].
        unit: What sizes count: "rows", "bytes", "shares" or "given".
        settings: How mixtures were drawn.
        runs: Names of the runs [R].
        mixtures: float64 [R, K].
        held_out: Names of the held-out sets that the runs evaluate; ``eval`` is an unnamed one.
        config_digest: Digest of the configuration that they are made from.
        provenance: Where it is from.
    """

    folder: Path
    names: tuple[str, ...]
    sizes: NDArray[np.float64]
    unit: str
    settings: SwarmSettings
    runs: tuple[str, ...]
    mixtures: NDArray[np.float64]
    held_out: tuple[str, ...]
    config_digest: str
    provenance: Mapping[str, Any]

    def config(self, run: str) -> Path:
        """Path of a run's configuration."""
        return self.folder / "configs" / f"{run}.yaml"

    def output_dir(self, run: str) -> Path:
        """Folder that a run writes to."""
        return self.folder / "runs" / run

    def unfinished(self) -> list[str]:
        """Names of the runs that have not come to their end."""
        return [run for run in self.runs if not finished(self.output_dir(run), self.held_out)]


def save_swarm(swarm: Swarm, configs: Sequence[Mapping[str, Any]]) -> None:
    """Write a swarm and the configurations of its runs; ``swarm.json`` comes last.

    Raises:
        ConfigError: The folder cannot be written.
    """
    import yaml

    from dataflex.record.values import plain, replacing

    try:
        (swarm.folder / "configs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {swarm.folder} cannot be written: {error.strerror or error}") from error
    for run, config in zip(swarm.runs, configs, strict=True):
        with replacing(swarm.config(run)) as file:
            file.write(yaml.safe_dump(without_secrets(config), sort_keys=False, allow_unicode=True).encode())
    write_table(swarm.folder / RATIOS, Table(runs=swarm.runs, columns=swarm.names, values=swarm.mixtures))
    body = {
        "format": _FORMAT,
        "names": list(swarm.names),
        "sizes": swarm.sizes.tolist(),
        "unit": swarm.unit,
        "settings": dataclasses.asdict(swarm.settings),
        "runs": list(swarm.runs),
        "mixtures": swarm.mixtures.tolist(),
        "held_out": list(swarm.held_out),
        "config_digest": swarm.config_digest,
        "provenance": swarm.provenance,
    }
    with replacing(swarm.folder / SWARM) as file:
        file.write(json.dumps(redacted(plain(body)), indent=1).encode() + b"\n")


def read_swarm(folder: Path) -> Swarm:
    """Read the swarm in a folder.

    Raises:
        DataError: There is none, or its file is damaged.
    """
    path = folder / SWARM
    if not path.is_file():
        raise DataError(f"{folder} holds no {SWARM}; make a swarm with 'dataflex mix swarm CONFIG --out {folder}'")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        for run in body["runs"]:
            if problem := file_name_problem(run):
                raise ValueError(f"the name of a run {str(run)[:80]!r} {problem}, and cannot name a folder")
        return Swarm(
            folder=folder,
            names=tuple(body["names"]),
            sizes=np.asarray(body["sizes"], dtype=np.float64),
            unit=body["unit"],
            settings=SwarmSettings(**body["settings"]),
            runs=tuple(body["runs"]),
            mixtures=np.asarray(body["mixtures"], dtype=np.float64),
            held_out=tuple(body["held_out"]),
            config_digest=body["config_digest"],
            provenance=body["provenance"],
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
