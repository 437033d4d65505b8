"""``dataflex audit``: whether scores of rows predict what leaving rows out does to targets' losses.

Three experiments, of a configuration that is trained again and again without some of its rows: the linear datamodeling
score (Park et al., TRAK, arXiv 2303.14186), leave one out (Koh and Liang, arXiv 1703.04730), and brittleness,
which leaves out the rows of the highest scores (Ilyas et al., arXiv 2202.00622). The runs are made by
``compare.removal``; here suites are read and judged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.compare.running import fingerprint
from dataflex.compare.suite import Run, base_of
from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.data import target_data_sets
from dataflex.config.inputs import inputs_of
from dataflex.config.load import load_mapping
from dataflex.config.mappings import plain, values
from dataflex.config.schema import LedgerConfig, MethodConfig
from dataflex.config.split import resolve
from dataflex.errors import ConfigError
from dataflex.offline.request import ScoreRequest, score_request
from dataflex.parts import param
from dataflex.printable import file_name_problem
from dataflex.record.text import signed
from dataflex.rng import stream
from dataflex.state import blake2b

Floats = NDArray[np.float64]

LEDGER = "ledger"
FORMAT = 1
_RESAMPLES = 2000
_FEWEST = 4  # pairs from which there is an interval


@dataclass(frozen=True, kw_only=True)
class Subsets:
    """Trainings on random subsets of the rows."""

    count: int = param(100, help="subsets", minimum=2)
    fraction: float = param(0.5, help="share of the rows in each", above=0.0, maximum=0.99)


@dataclass(frozen=True, kw_only=True)
class Brittleness:
    """Trainings without the rows of the highest scores, and without random ones."""

    rows: int = param(help="rows left out", minimum=1)
    random: int = param(5, help="random sets of as many rows, whose mean is compared with", minimum=1)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of a suite, those of blocks excluded."""

    suite: str = param(help="its name")
    about: str = param("", help="what it asks, in a sentence")
    targets: tuple[str, ...] = param(help="data sets whose losses are looked at")
    score_after: int | None = param(
        None, help="optimizer steps on all rows after which rows are scored; half of all if not given", minimum=1
    )
    leave_one_out: int = param(0, help="rows each of which is left out alone", minimum=0)
    out: str | None = param(None, help="folder of the suite; runs/audit/SUITE if not given")


@dataclass(frozen=True, kw_only=True)
class Audit:
    """A suite that was checked."""

    settings: Settings
    path: Path
    overrides: tuple[str, ...]
    subsets: Subsets | None
    brittleness: Brittleness | None
    request: ScoreRequest  # base and targets; its scorers are those of ``methods``
    methods: Mapping[str, MethodConfig]  # by the score's name
    columns: Mapping[str, Floats]  # scores read from files, by name [N]
    ledger: bool  # whether the ledger's credits are audited too
    out: Path
    fingerprint: str  # of all that the runs are made of
    inputs: Mapping[str, Any]  # by the score's name, hashes of the files, models and targets that the selector has

    @property
    def names(self) -> list[str]:
        """Names of the scores."""
        return [*self.methods, *([LEDGER] if self.ledger else []), *self.columns]

    def score_key(self, name: str, after: int) -> str:
        """Return what a selector's scores are kept by: its parameters and inputs, and the steps before it is asked."""
        return f"score {blake2b(repr((name, self.methods[name], self.inputs[name], after)).encode()).hex()}"


def read_audit(path: Path, overrides: Sequence[str] = ()) -> Audit:
    """Read and check a suite; ``ConfigError`` with all problems.

    Args:
        path: A YAML or JSON file.
        overrides: ``key=value`` texts over the suite's keys.
    """
    mapping, problems = load_mapping(path, overrides), list[str]()
    blocks = ("base", "scores", "subsets", "brittleness")
    given = values(Settings, mapping, "", problems, subject="an audit", extra=blocks)
    settings = Settings(**{"suite": "", "targets": (), **given})
    if "suite" in given and (told := file_name_problem(settings.suite)):
        problems.append(f"suite: the name {told}")
    base, base_dir = base_of(mapping.get("base"), path, problems)
    sizes = _sizes(mapping, problems)
    if not any(sizes.values()) and not settings.leave_one_out:
        problems.append("subsets: name at least one experiment: subsets, leave_one_out, brittleness")
    scores = mapping.get("scores")
    if not isinstance(scores, Mapping) or not scores:
        problems.append("scores: expected one or more, each a name and the parameters of a selector ({} for none)")
        scores = {}
    if base.get("stage", "sft") not in ("sft", "pt"):
        problems.append(f"base.stage: an audit trains sft and pt, found {base['stage']}")
    block = {"ledger": {"targets": list(settings.targets or ("-",)), "refresh_steps": 1}}
    kept = {key: base["dynamic"][key] for key in ("domain_column", "plugins") if key in (base.get("dynamic") or {})}
    base = {**base, "dynamic": {**kept, **block}}
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    try:
        parts = resolve({**base, "output_dir": "unused"}, base_dir)
    except ConfigError as error:
        raise ConfigError([f"base: {told}" for told in error.problems]) from error
    run = Run(arm="audit", seed=0, steps=0, mapping=base, parts=parts)
    removal = Path(__file__).with_name("removal.py")
    made = blake2b(fingerprint(run).encode(), removal.read_bytes()).hex()[:8]
    out = Path(settings.out or f"runs/audit/{settings.suite}")
    plugins = parts.dynamic.plugins if parts.dynamic is not None else ()
    scored = {**base, "dynamic": {**kept, "plugins": list(plugins)}}
    request = _request(scored, "random", {}, settings, out, problems)
    methods, columns = _scores(scores, scored, settings, out, problems)
    if problems or request is None:
        raise ConfigError(dict.fromkeys(problems))
    # Rows' credits alone, for which no look between two steps is needed; it makes the targets known, whoever asks.
    ledger = LedgerConfig(targets=settings.targets, refresh_steps=1, unexplained=1.0)
    config = replace(request.config, scorers=tuple(methods.values()), ledger=ledger)
    return Audit(
        settings=settings,
        path=path,
        overrides=tuple(overrides),
        subsets=sizes.get("subsets"),
        brittleness=sizes.get("brittleness"),
        request=replace(request, config=config),
        methods=methods,
        columns=columns,
        ledger=LEDGER in scores,
        out=out,
        fingerprint=made,
        inputs={name: _inputs(method, parts.lf) for name, method in methods.items()},
    )


def _sizes(mapping: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the blocks of experiments by key, None where there is none."""
    found: dict[str, Any] = {}
    for key, cls in (("subsets", Subsets), ("brittleness", Brittleness)):
        before, block = len(problems), mapping.get(key)
        given = {} if block is None else values(cls, block, key, problems)
        found[key] = None if block is None or len(problems) > before else cls(**given)
    return found


def _scores(
    asked: Mapping[str, Any], base: Mapping[str, Any], settings: Settings, out: Path, problems: list[str]
) -> tuple[dict[str, MethodConfig], dict[str, Floats]]:
    """Return the selectors that give scores, and the scores read from files, by name."""
    methods: dict[str, MethodConfig] = {}
    columns: dict[str, Floats] = {}
    for name, params in asked.items():
        found, at = dict(params) if isinstance(params, Mapping) else {}, f"scores.{name}"
        if params is not None and not isinstance(params, Mapping):
            problems.append(f"{at}: expected parameters, found {params!r}")
        elif name == LEDGER:
            problems += [f"{at}.{key}: the ledger's credits take no parameters" for key in found]
        elif "file" in found:
            columns[name] = _column(found, at, problems)
        else:
            method = str(found.pop("name", name))
            read = _request(base, method, found, settings, out, problems, at)
            methods |= {} if read is None else {name: read.config.scorers[0]}
    return methods, columns


def _request(
    base: Mapping[str, Any],
    method: str,
    params: Mapping[str, Any],
    settings: Settings,
    out: Path,
    problems: list[str],
    at: str = "scores",
) -> ScoreRequest | None:
    """Return what ``dataflex score`` would be asked for one method."""
    texts = [f"{method}.{key}={json.dumps(value)}" for key, value in params.items()]
    targets = None if "targets" in params else ",".join(settings.targets)
    try:
        return score_request(
            base, texts, methods=(method,), out=out / "work" / "scores.parquet", targets=targets, moments=True
        )
    except ConfigError as error:
        problems += [f"{at}: {told}" for told in error.problems]
        return None


def _inputs(method: MethodConfig, lf: LlamaFactoryArgs) -> dict[str, Any]:
    """Return hashes of what a selector reads beside what the runs are made of: its targets, models and files."""
    return inputs_of(plain(method), target_data_sets(*method.targets), lf)


def _column(block: Mapping[str, Any], at: str, problems: list[str]) -> Floats:
    """Return a column of a parquet file as scores."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file, column = str(block["file"]), str(block.get("column", ""))
    try:
        known = pq.read_schema(file).names
        if column in known:
            return np.asarray(pq.read_table(file, columns=[column])[column].to_numpy(), dtype=np.float64)
        problems.append(f"{at}.column: {file} has no column {column!r} (columns: {', '.join(known)})")
    except FileNotFoundError:
        problems.append(f"{at}.file: no such file: {file}")
    except (OSError, pa.ArrowException, ValueError, TypeError) as error:
        problems.append(f"{at}: expected file (parquet) and column (numbers): {error}")
    return np.zeros(0)


# -- statistics -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A rank correlation, or a mean, with its 95 % bootstrap interval."""

    value: float | None  # None: nothing varies
    low: float | None
    high: float | None
    n: int


def spearman(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> Agreement:
    """Return Spearman's rank correlation of pairs [n], ties at their mean rank, resampled by pairs (percentiles)."""
    from scipy.stats import rankdata

    pairs = np.array([a, b], dtype=np.float64)
    n = pairs.shape[1]
    value = float(_correlations(rankdata(pairs, axis=1)[:, None])[0]) if n > 1 else np.nan
    if not np.isfinite(value):
        return Agreement(value=None, low=None, high=None, n=n)
    if n < _FEWEST:
        return Agreement(value=value, low=None, high=None, n=n)
    places = stream(0, "audit bootstrap", n).integers(0, n, size=(_RESAMPLES, n))
    resampled = _correlations(rankdata(pairs[:, places], axis=2))
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    return Agreement(value=value, low=float(low), high=float(high), n=n)


def _correlations(ranks: Floats) -> Floats:
    """Return the correlation of each pair of rows of ranks [2, m, n] -> [m]; NaN where nothing varies."""
    a, b = ranks - ranks.mean(axis=2, keepdims=True)
    scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.divide((a * b).sum(axis=1), scale, out=np.full(len(a), np.nan), where=scale > 0)


def mean_of(found: Floats) -> Agreement:
    """Return the mean of values [n], resampled."""
    n = len(found)
    low = high = None
    if n >= _FEWEST:
        places = stream(0, "audit bootstrap", n).integers(0, n, size=(_RESAMPLES, n))
        low, high = map(float, np.quantile(found[places].mean(axis=1), [0.025, 0.975]))
    return Agreement(value=float(found.mean()), low=low, high=high, n=n)


def filled(scores: Floats) -> Floats:
    """Return scores with those that are unknown at the lowest known one."""
    known = np.isfinite(scores)
    return np.where(known, scores, scores[known].min() if known.any() else 0.0)


def judged(scores: Floats, measured: Mapping[str, Any]) -> dict[str, Agreement]:
    """Return what a score [N] predicts of each experiment that was made.

    Args:
        scores: More is better for the targets.
        measured: ``subsets``: kept rows [m, N] and target losses [m]; ``leave_one_out``: rows [n] and how much the
            loss rose without each [n].
    """
    found = {}
    if "subsets" in measured:
        kept, losses = measured["subsets"]
        found["subsets"] = spearman(kept.astype(np.float64) @ scores, -np.asarray(losses))
    if "leave_one_out" in measured:
        rows, rises = measured["leave_one_out"]
        found["leave_one_out"] = spearman(scores[rows], rises)
    return found


# -- what is written --------------------------------------------------------------------------------------------------

TITLES = {"subsets": "subsets (LDS)", "leave_one_out": "leave one out", "brittleness": "rise without the top rows"}


def as_markdown(told: Mapping[str, Any]) -> str:
    """Return the table of what ``audited`` found."""
    made = [key for key in TITLES if any(key in line for line in told["scores"].values())]
    head = ["score"]
    for key in made:
        head += [f"{TITLES[key]}: {'nats' if key == 'brittleness' else 'Spearman'}", "95 % interval", "n"]
    lines = [[name, *(part for key in made for part in _cells(line.get(key)))] for name, line in told["scores"].items()]
    rows = [f"| {' | '.join(cells)} |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *lines)]
    about = [told["about"], ""] if told["about"] else []
    return "\n".join([f"### {told['suite']}", "", *about, f"{told['sizes']} By `{told['command']}`.", "", *rows, ""])


def _cells(found: Mapping[str, Any] | None) -> list[str]:
    if found is None or found["value"] is None:
        return ["-", "-", "-" if found is None else str(found["n"])]
    ends = "-" if found["low"] is None else f"{signed(found['low'], 3)} to {signed(found['high'], 3)}"
    return [signed(found["value"], 3), ends, str(found["n"])]
