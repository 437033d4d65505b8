"""From one configuration to the runs of a swarm, and running those that are missing."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.config.split import Split, resolve, split
from dataflex.errors import ConfigError, DataError
from dataflex.mixing.natural import natural_of
from dataflex.mixing.swarm import SWARM, Swarm, SwarmSettings, read_swarm, sample_swarm, save_swarm
from dataflex.mixing.tables import finished
from dataflex.plan.proportions import digest_of, provenance

__all__ = ["run_missing", "write_swarm"]


def write_swarm(
    mapping: Mapping[str, Any], base_dir: Path, folder: Path, settings: SwarmSettings, natural: str | None
) -> Swarm:
    """Draw the mixtures, check the first run's configuration, and write everything.

    A swarm that is there already is taken up when it was made from the same configuration and
    settings; more runs may be asked for, which leaves the first ones as they are.

    Args:
        mapping: The user's configuration; its mixer is replaced, everything else is kept.
        base_dir: Folder of the configuration file.
        folder: Where to write.
        settings: How to draw mixtures.
        natural: Where natural sizes come from, see ``natural_of``.

    Raises:
        ConfigError: Anything wrong with the configuration or the settings, or another swarm is there.
    """
    parts = _parts(mapping, base_dir)
    names, sizes, unit = natural_of(natural, parts, base_dir)
    mixtures = sample_swarm(sizes, settings)
    _every_domain_seen(names, sizes, mixtures)
    runs = tuple(f"run-{number:04d}" for number in range(1, settings.runs + 1))
    swarm = Swarm(
        folder=folder,
        names=names,
        sizes=sizes,
        unit=unit,
        settings=settings,
        runs=runs,
        mixtures=mixtures,
        held_out=_held_out(parts),
        config_digest=digest_of({key: value for key, value in mapping.items() if key != "output_dir"}),
        provenance=provenance("dataflex mix swarm", settings={"natural": natural, **dataclasses.asdict(settings)}),
    )
    _same_as_before(swarm)
    configs = [_configuration(mapping, parts, swarm, run, mixture) for run, mixture in zip(runs, mixtures, strict=True)]
    resolve(configs[0], base_dir)
    save_swarm(swarm, configs)
    return swarm


def _parts(mapping: Mapping[str, Any], base_dir: Path) -> Split:
    """Split the configuration with a mixer in it that asks for nothing."""
    block = mapping.get("dynamic")
    if block is not None and not isinstance(block, Mapping):
        raise ConfigError("dynamic: expected a mapping")
    dynamic = {**(block or {}), "mixer": "size"}
    if dynamic.pop("initial_proportions", None) is not None:
        raise ConfigError("dynamic.initial_proportions: a run of a swarm keeps one mixture throughout; remove the key")
    if dynamic.pop("min_proportion", None) is not None:
        raise ConfigError("dynamic.min_proportion: a run of a swarm keeps the mixture drawn for it; remove the key")
    return split({**mapping, "dynamic": dynamic}, base_dir)


def _held_out(parts: Split) -> tuple[str, ...]:
    """Return the names of the held-out sets that a run evaluates."""
    return parts.lf.eval_sets or (("eval",) if parts.lf.val_size > 0 else ())


def _every_domain_seen(names: tuple[str, ...], sizes: NDArray[np.float64], mixtures: NDArray[np.float64]) -> None:
    unseen = np.flatnonzero((mixtures.max(axis=0) == 0) & (sizes > 0))
    if len(unseen):
        shares = sizes / sizes.sum()
        told = ", ".join(f"{names[k]} (natural share {shares[k]:.2g})" for k in unseen)
        raise ConfigError(
            f"--runs: in none of the {len(mixtures)} mixtures is there any of {told}, so that nothing could be learned "
            "about it; ask for more runs, set --prior-power 0.5 (smaller domains get more), lower --min-weight, or "
            "merge small domains"
        )


def _configuration(
    mapping: Mapping[str, Any], parts: Split, swarm: Swarm, run: str, mixture: NDArray[np.float64]
) -> dict[str, Any]:
    """Return the configuration of one run."""
    result: dict[str, Any] = copy.deepcopy(dict(mapping))
    for key in ("overwrite_output_dir", "resume_from_checkpoint"):  # a run that was killed must go on
        result.pop(key, None)
    result["output_dir"] = str(swarm.output_dir(run))
    if parts.lf.eval_sets:
        result.update({"do_eval": True, "eval_on_each_dataset": True})
    elif swarm.held_out:
        result["do_eval"] = True
    if result.get("run_name"):
        result["run_name"] = f"{result['run_name']}-{run}"
    proportions = dict(zip(swarm.names, mixture.tolist(), strict=True))
    dynamic = {**(result.pop("dynamic", None) or {}), "mixer": {"name": "static", "proportions": proportions}}
    if parts.dynamic is not None and parts.dynamic.plugins:
        dynamic["plugins"] = list(parts.dynamic.plugins)  # absolute by now
    return {**result, "dynamic": dynamic}


def _same_as_before(swarm: Swarm) -> None:
    if not (swarm.folder / SWARM).is_file():
        return
    old = read_swarm(swarm.folder)
    problems = []
    if old.config_digest != swarm.config_digest:
        problems.append("another configuration (or other overrides)")
    if old.names != swarm.names or not np.array_equal(old.sizes, swarm.sizes):
        problems.append("other natural sizes")
    if dataclasses.replace(old.settings, runs=swarm.settings.runs) != swarm.settings:
        problems.append("other settings of the draws")
    if len(old.runs) > len(swarm.runs):
        problems.append(f"{len(old.runs)} runs, more than the {len(swarm.runs)} asked for")
    common = min(len(old.runs), len(swarm.runs))
    if not problems and not np.array_equal(old.mixtures[:common], swarm.mixtures[:common]):
        problems.append("other mixtures (another version drew them)")
    if problems:
        raise ConfigError(
            f"--out: {swarm.folder} holds a swarm with {', '.join(problems)}; name another folder, or move that away"
        )


def run_missing(swarm: Swarm, train: Callable[[Path], int], tell: Callable[[str], None]) -> int:
    """Run what has not come to its end, one after another, and return the first exit code that is not 0, else 0.

    A run that was killed goes on from its newest complete checkpoint, or starts anew without one.

    Args:
        swarm: The swarm.
        train: Trains one configuration and returns an exit code.
        tell: Takes one line per run.
    """
    missing = swarm.unfinished()
    for run in swarm.runs:
        if run not in missing:
            tell(f"{run}: finished before")
            continue
        tell(f"{run}: training ({swarm.output_dir(run)})")
        code = train(swarm.config(run))
        if code != 0:
            tell(f"{run}: ended with exit code {code}; its messages are above. The same command goes on from here.")
            return code
        if not finished(swarm.output_dir(run), swarm.held_out):
            raise DataError(f"{run}: ended well, but {swarm.output_dir(run)} holds no record of a finished run")
    return 0
