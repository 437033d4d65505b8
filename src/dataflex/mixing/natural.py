"""Sizes of the domains, which the natural mix is proportional to."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataflex.config.data import count_bytes, count_rows, find_sources
from dataflex.config.split import Split
from dataflex.errors import ConfigError, DataError, did_you_mean
from dataflex.plan.proportions import read_proportions

__all__ = ["Natural", "given_sizes", "natural_of", "numbers_by_name"]

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
