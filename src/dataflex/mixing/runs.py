"""From one configuration to the runs of a swarm: sizes of domains, configurations, running those that are missing."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.config.data import count_bytes, count_rows, find_sources
from dataflex.config.split import Split, resolve, split
from dataflex.errors import ConfigError, DataError, did_you_mean
from dataflex.mixing.swarm import SWARM, Swarm, SwarmSettings, finished, read_swarm, sample_swarm, save_swarm
from dataflex.plan.proportions import digest_of, provenance, read_proportions

Natural = tuple[tuple[str, ...], NDArray[np.float64], str]
"""Names of the domains [K], their sizes [K], and the unit of these."""

KEY = "--natural"


def natural_of(asked: str | None, parts: Split, base_dir: Path) -> Natural:
    """Return the domains of a configuration and their sizes.

    Args:
        asked: "rows" (that the run loads), "bytes" (of these rows, which tokens are roughly proportional to), or
            what ``given_sizes`` reads. None: rows, or bytes where rows are not what proportions are of (packed
            rows, ``unit: tokens``).
        parts: The configuration.
        base_dir: Its folder.

    Raises:
        ConfigError: Sizes cannot be found out, or are of other domains.
    """
    dynamic = parts.dynamic
    by_column = dynamic is not None and not dynamic.domains_are_sources
    names = parts.lf.train_sets
    if asked not in (None, "rows", "bytes"):
        assert asked is not None
        given = given_sizes(asked)
        if not by_column:
            _same_names(given[0], names)
            order = [given[0].index(name) for name in names]
            given = (names, given[1][order], given[2])
        return given
    if by_column:
        raise ConfigError(
            f"{KEY}: domains come from the rows, so their sizes are not known from the files; give the output_dir of "
            "a run with the same data, or sizes by name such as 'web=900,code=100'"
        )
    sources, problems = find_sources(names, parts.lf, "dataset", base_dir)
    if problems:
        raise ConfigError(problems)
    counted = "sequences" if dynamic is None else dynamic.unit
    tokens = counted == "tokens" or (parts.lf.packed and counted == "sequences")
    unit = asked or ("bytes" if tokens else "rows")
    count = count_rows if unit == "rows" else count_bytes
    sizes = [None if parts.lf.tokenized else count(source, parts.lf) for source in sources]
    unknown = [source.name for source, size in zip(sources, sizes, strict=True) if size is None]
    if unknown:
        raise ConfigError(
            f"{KEY}: the {unit} of {', '.join(unknown)} are not quick to count; give sizes by name such as "
            "'web=900,code=100', or the output_dir of a run with the same data"
        )
    return names, np.asarray(sizes, dtype=np.float64), unit


def _same_names(given: tuple[str, ...], names: tuple[str, ...]) -> None:
    problems = [f"{KEY}: {name}: no such domain{did_you_mean(name, names)}" for name in given if name not in names]
    problems += [f"{KEY}: {name}: its size is missing" for name in names if name not in given]
    if problems:
        raise ConfigError([f"{problem} (domains: {', '.join(names)})" for problem in problems])


def given_sizes(asked: str) -> Natural:
    """Return sizes from the output_dir of a run (its rows), a proportions file, or text such as ``web=9,code=1``.

    Raises:
        ConfigError: It is none of these, or a number is not a size.
    """
    path = Path(asked).expanduser()
    if path.is_dir():
        return _of_run(path)
    if path.suffix == ".json":
        content = read_proportions(path, KEY)
        return content.names, np.asarray(content.proportions), "shares"
    if "=" not in asked:
        raise ConfigError(
            f"{KEY}: {asked!r} is neither 'rows' nor 'bytes', nor a folder, a .json file or sizes by name such as "
            "'web=900,code=100'"
        )
    sizes = numbers_by_name(asked, KEY)
    return tuple(sizes), np.asarray(list(sizes.values())), "given"


def numbers_by_name(text: str, key: str) -> dict[str, float]:
    """Return ``web=9,code=1`` as a mapping.

    Raises:
        ConfigError: An entry is not ``name=number`` with a finite number of at least 0, or a name is there twice.
    """
    numbers: dict[str, float] = {}
    for entry in text.split(","):
        name, equals, number = (part.strip() for part in entry.rpartition("="))
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not equals or not name or not math.isfinite(value) or value < 0:
            raise ConfigError(f"{key}: {entry.strip()!r} is not name=number with a number of at least 0")
        if name in numbers:
            raise ConfigError(f"{key}: {name} is there twice")
        numbers[name] = value
    return numbers


def _of_run(folder: Path) -> Natural:
    from dataflex.record.read import read_events

    try:
        events = read_events(folder)
    except DataError as error:
        raise ConfigError(f"{KEY}: {error}") from error
    spaces = [event["row_space"] for event in events if event["event"] == "run_started"]
    domains = spaces[-1].get("domains") if spaces else None
    if not domains:
        raise ConfigError(f"{KEY}: the record in {folder} does not say how many rows each domain has")
    return tuple(domains), np.asarray(list(domains.values()), dtype=np.float64), "rows"


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
