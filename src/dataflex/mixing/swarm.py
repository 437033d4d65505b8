"""``dataflex mix swarm``: draws a swarm of mixtures around the natural one, for one small run each.

Sources: RegMix (Liu et al., ICLR 2025, arXiv 2407.01492), data sampling; Olmix (Chen et al., arXiv
2602.12237), which found the untempered natural prior better, and caps better left to the proposal.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dataflex.config.args import LlamaFactoryArgs, data_set_names
from dataflex.config.data import count_bytes, count_rows, find_sources
from dataflex.config.load import load_mapping
from dataflex.config.schema import DynamicConfig
from dataflex.config.split import resolve
from dataflex.errors import ConfigError, DataError
from dataflex.mixing.options import check_names
from dataflex.mixing.reuse import collapsed_domains, expanded
from dataflex.mixing.runs import (
    RATIOS,
    Natural,
    Table,
    configuration,
    digest_of_runs,
    finished,
    given_sizes,
    say,
    train_unfinished,
    without_mixer,
    write_configurations,
    write_table,
)
from dataflex.plan.domains import Floats
from dataflex.plan.proportions import provenance
from dataflex.printable import Answer, file_name_problem, left_out_note, passing_on, plain, redacted
from dataflex.record.text import columns
from dataflex.rng import stream
from dataflex.state import read_json, write_json

SWARM = "swarm.json"

_FORMAT = 1
_BATCH = 1024
_MOST_BATCHES = 2000
_MOST_RUNS = 100_000  # each is a file and a training

Drawer = Callable[[np.random.Generator, int], Floats]
"""Takes a stream and a number of draws, gives mixtures [at most as many, K]."""


@dataclass(frozen=True, kw_only=True)
class SwarmSettings:
    """How mixtures are drawn."""

    runs: int  # number of mixtures
    seed: int = 0  # of all draws; the first mixtures of a larger swarm are those of a smaller one
    least_strength: float = 0.1  # smallest concentration of the Dirichlet draws
    most_strength: float = 5.0  # largest concentration
    strengths: int = 15  # number of concentrations, evenly spaced in logarithm
    prior_power: float = 1.0  # the prior is proportional to the natural shares to this power
    max_ratio: float | None = None  # largest multiple of its natural share that a domain may get, at least 1
    min_weight: float = 2e-4  # shares below it become 0
    step: float = 2e-4  # shares are rounded to multiples of it
    distance: float = 1e-5  # mixtures at most this far apart (L1) count as one
    oversample: int = 100  # maximum number of candidates drawn per mixture

    def __post_init__(self) -> None:
        low, high, ratio = self.least_strength, self.most_strength, self.max_ratio
        rules = (
            (1 <= self.runs <= _MOST_RUNS, f"--runs: must be from 1 to {_MOST_RUNS:,}, found {self.runs:,}"),
            (0 < low <= high, f"--strengths: must be 0 < least <= most, found {low:g} and {high:g}"),
            (
                1 <= self.strengths <= _MOST_RUNS,
                f"--strengths: their number must be from 1 to {_MOST_RUNS:,}, found {self.strengths:,}",
            ),
            (self.prior_power >= 0, f"--prior-power: must be at least 0, found {self.prior_power:g}"),
            (
                ratio is None or ratio >= 1,
                f"--max-ratio: a cap of {ratio or 0:g} times the natural share cannot be met, since the caps then sum "
                "to less than 1; give at least 1",
            ),
            (0 <= self.min_weight < 1, f"--min-weight: must be at least 0 and below 1, found {self.min_weight:g}"),
            (0 <= self.step <= 0.5, f"--round: must be from 0 (no rounding) to 0.5, found {self.step:g}"),
        )
        problems = [told for kept, told in rules if not kept]
        if problems:
            raise ConfigError(problems)


def settings_of(style: Literal["regmix", "olmix"], runs: int, seed: int, **changes: object) -> SwarmSettings:
    """Return the settings of a paper with those ``changes`` that are not None.

    ``regmix``: prior ~ share^0.5, at most 15 times the natural share. ``olmix``: the natural prior, no cap.
    """
    paper = {"prior_power": 0.5, "max_ratio": 15.0} if style == "regmix" else {}
    changed = {key: value for key, value in changes.items() if value is not None}
    return replace(SwarmSettings(runs=runs, seed=seed), **{**paper, **changed})  # type: ignore[arg-type]


def prior_of(sizes_K: Floats, power: float) -> Floats:
    """Return the prior [K]: natural shares to ``power``, renormalized; a domain of size 0 stays at 0."""
    prior = np.where(sizes_K > 0, np.power(np.maximum(sizes_K, 1e-300) / sizes_K.max(), power), 0.0)
    return prior / prior.sum()


def dirichlet(rng: np.random.Generator, alpha_BK: Floats) -> Floats:
    """Draw one mixture per row of concentrations [B, K] >= 0; exact also where these are far below 1.

    A Gamma(a) variable is a Gamma(a + 1) variable times U^(1/a); in logarithms nothing underflows.
    """
    with np.errstate(divide="ignore"):
        logs = np.log(rng.standard_gamma(alpha_BK + 1.0)) + np.log1p(-rng.random(alpha_BK.shape)) / alpha_BK
    logs -= logs.max(axis=1, keepdims=True)
    weights = np.exp(logs)
    return weights / weights.sum(axis=1, keepdims=True)


def sample_swarm(sizes_K: Floats, settings: SwarmSettings) -> Floats:
    """Draw the mixtures of a swarm.

    Each candidate is a draw from Dirichlet(strength x prior) with one of the strengths at random. A candidate
    above the caps is dropped. Small shares become 0; the others are renormalized, rounded and renormalized again.
    A candidate that repeats an earlier mixture is dropped.

    Args:
        sizes_K: Natural sizes in any unit [K], >= 0.
        settings: How to draw.

    Returns:
        float64 [runs, K], rows on the simplex; the same for the same sizes, settings and seed.

    Raises:
        ConfigError: Fewer than two domains have a size, or too few distinct mixtures meet the settings.
    """
    sizes_K = np.asarray(sizes_K, dtype=np.float64)
    if not np.isfinite(sizes_K).all() or (sizes_K < 0).any() or (sizes_K > 0).sum() < 2:
        raise ConfigError("--natural: sizes must be finite numbers of at least 0, two of them above 0")
    draw = drawer(sizes_K, settings)
    kept = np.empty((settings.runs, len(sizes_K)))
    num_kept = num_accepted = batch = 0
    while num_kept < settings.runs and num_accepted < settings.oversample * settings.runs and batch < _MOST_BATCHES:
        mixtures = draw(stream(settings.seed, "mixing.swarm", batch), _BATCH)
        batch += 1
        for mixture in mixtures:
            num_accepted += 1
            if num_kept and np.abs(kept[:num_kept] - mixture).sum(axis=1).min() <= settings.distance:
                continue
            kept[num_kept] = mixture
            num_kept += 1
            if num_kept == settings.runs:
                return kept
    raise ConfigError(
        f"--runs: only {num_kept} of {settings.runs} distinct mixtures were found in {batch * _BATCH:,} draws; "
        "ask for fewer runs, raise --max-ratio, or lower --min-weight and --round"
    )


def drawer(sizes_K: Floats, settings: SwarmSettings) -> Drawer:
    """Return what draws candidates for mixtures: of a number of draws those within the caps, tidied [B, K]."""
    natural = sizes_K / sizes_K.sum()
    prior = prior_of(sizes_K, settings.prior_power)
    caps = np.ones_like(natural) if settings.max_ratio is None else np.minimum(settings.max_ratio * natural, 1.0)
    strengths = np.geomspace(settings.least_strength, settings.most_strength, settings.strengths)

    def draw(rng: np.random.Generator, num_draws: int) -> Floats:
        drawn = dirichlet(rng, strengths[rng.integers(len(strengths), size=num_draws), None] * prior)
        return _tidied(drawn[(drawn <= caps).all(axis=1)], caps, settings)

    return draw


def _tidied(drawn_BK: Floats, caps_K: Floats, settings: SwarmSettings) -> Floats:
    """Zero small shares, renormalize, round, renormalize; drop mixtures that are then empty or above a cap."""
    weights = np.where(drawn_BK < settings.min_weight, 0.0, drawn_BK)
    weights = weights[weights.sum(axis=1) > 0]
    weights /= weights.sum(axis=1, keepdims=True)
    if settings.step > 0:
        weights = np.round(weights / settings.step) * settings.step
        weights = weights[weights.sum(axis=1) > 0]
        weights /= weights.sum(axis=1, keepdims=True)
    return weights[(weights <= caps_K).all(axis=1)]


@dataclass(frozen=True, kw_only=True)
class Swarm:
    """A swarm of runs."""

    folder: Path
    names: tuple[str, ...]  # domains [K]
    sizes: Floats  # their natural sizes [K]
    unit: str  # of the sizes: "rows", "bytes", "shares" or "given"
    settings: SwarmSettings
    runs: tuple[str, ...]  # names of the runs [R]
    mixtures: Floats  # [R, K]
    held_out: tuple[str, ...]  # held-out sets that the runs evaluate; "eval" is an unnamed one
    config_digest: str  # of the user's configuration, and of the data and models that it names
    provenance: Mapping[str, Any]
    kept: Mapping[str, float] = field(default_factory=dict)  # shares of the domains in the virtual one of 'mix reuse'

    def config(self, run: str) -> Path:
        """Path of a run's configuration."""
        return self.folder / "configs" / f"{run}.yaml"

    def output_dir(self, run: str) -> Path:
        """Folder that a run writes to."""
        return self.folder / "runs" / run

    def finished(self, run: str) -> bool:
        """Whether a run has finished and evaluated every held-out set."""
        return finished(self.output_dir(run), self.held_out)

    def unfinished(self) -> list[str]:
        """Names of the runs that have not finished."""
        return [run for run in self.runs if not self.finished(run)]


def read_swarm(folder: Path) -> Swarm:
    """Read the swarm in a folder; ``DataError`` if there is none, or its file is damaged."""
    path = folder / SWARM
    if not path.is_file():
        raise DataError(f"{folder} holds no {SWARM}; make a swarm with 'dataflex mix swarm CONFIG --out {folder}'")
    try:
        body = read_json(path)
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
            kept=body.get("kept", {}),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}") from error


# ---- natural sizes of the domains


_OR_GIVE = "give sizes by name such as 'web=900,code=100', or the output_dir of a run with the same data"


def natural_of(asked: str | None, lf: LlamaFactoryArgs, dynamic: DynamicConfig, base_dir: Path) -> Natural:
    """Return the domains of a configuration and their sizes.

    ``asked`` is "rows" (that the run loads), "bytes" (of these rows, to which tokens are roughly proportional), or
    what ``given_sizes`` reads. None means rows, or bytes for packed rows and ``unit: tokens``.
    """
    names = lf.train_sets
    if asked is not None and asked not in ("rows", "bytes"):
        sizes, unit = given_sizes(asked)
        if not dynamic.domains_are_sources:
            return sizes, unit
        check_names("--natural", sizes, names, every=True)
        return {name: sizes[name] for name in names}, unit
    if not dynamic.domains_are_sources:
        raise ConfigError(
            f"--natural: domains come from the rows, so their sizes are not known from the files; {_OR_GIVE}"
        )
    sources, problems = find_sources(names, lf, "dataset", base_dir)
    if problems:
        raise ConfigError(problems)
    tokens = dynamic.unit == "tokens" or (lf.packed and dynamic.unit == "sequences")
    unit = asked or ("bytes" if tokens else "rows")
    count = count_rows if unit == "rows" else count_bytes
    counts = {source.name: None if lf.tokenized else count(source, lf) for source in sources}
    unknown = [name for name, size in counts.items() if size is None]
    if unknown:
        raise ConfigError(f"--natural: the {unit} of {', '.join(unknown)} are not quick to count; {_OR_GIVE}")
    return {name: size for name, size in counts.items() if size is not None}, unit


# ---- the swarm on disk


def write_swarm(
    mapping: Mapping[str, Any],
    base_dir: Path,
    folder: Path,
    settings: SwarmSettings,
    natural: str | None,
    *,
    reuse: Path | None = None,
    changed: Sequence[str] = (),
    added_RK: Floats | None = None,
) -> Swarm:
    """Draw the mixtures, check the first run's configuration, and write everything; ``swarm.json`` comes last.

    Runs keep the user's configuration except its mixer. A swarm that is there already is extended when it was made
    from the same configuration and settings; its runs stay as they are. Another one is refused. With the proportions
    file ``reuse``, what is drawn are shares of the ``changed`` domains, of new ones, and of all others together. The
    mixtures ``added_RK`` of later rounds (``mix climb``) follow those that are drawn.
    """
    written = mapping.get("dynamic") or {}
    for key in ("initial_proportions", "min_proportion"):
        if isinstance(written, Mapping) and written.get(key) is not None:
            raise ConfigError(f"dynamic.{key}: a run of a swarm keeps one mixture throughout; remove the key")
    lf, dynamic = without_mixer(mapping, base_dir)
    by_name, unit = natural_of(natural, lf, dynamic, base_dir)
    kept: dict[str, float] = {}
    if reuse is not None:
        by_name, kept = collapsed_domains(reuse, tuple(by_name), by_name, changed)
    names, sizes = tuple(by_name), np.asarray(list(by_name.values()), dtype=np.float64)
    mixtures = sample_swarm(sizes, settings)
    unseen = np.flatnonzero((mixtures.max(axis=0) == 0) & (sizes > 0))
    if len(unseen):
        told = ", ".join(f"{names[k]} (natural share {sizes[k] / sizes.sum():.2g})" for k in unseen)
        raise ConfigError(
            f"--runs: in none of the {len(mixtures)} mixtures is there any of {told}, so that nothing could be learned "
            "about it; ask for more runs, set --prior-power 0.5 (smaller domains get more), lower --min-weight, or "
            "merge small domains"
        )
    if added_RK is not None:
        mixtures = np.concatenate([mixtures, added_RK])
    swarm = Swarm(
        folder=folder,
        names=names,
        sizes=sizes,
        unit=unit,
        settings=settings,
        runs=tuple(f"run-{number:04d}" for number in range(1, len(mixtures) + 1)),
        mixtures=mixtures,
        held_out=lf.eval_sets or (("eval",) if lf.val_size > 0 else ()),
        config_digest=digest_of_runs(mapping, dynamic.plugins),
        provenance=provenance("dataflex mix swarm", settings={"natural": natural, **dataclasses.asdict(settings)}),
        kept=kept,
    )
    _check_earlier(swarm)
    evaluation = {"do_eval": True, "eval_on_each_dataset": True} if lf.eval_sets else {"do_eval": True}
    base, configs = {**mapping, **(evaluation if swarm.held_out else {})}, {}
    for run, mixture in zip(swarm.runs, mixtures, strict=True):
        drawn = dict(zip(names, mixture.tolist(), strict=True))
        mixer = {"name": "static", "proportions": expanded(drawn, kept) if kept else drawn}
        block = {**written, "mixer": mixer}
        configs[swarm.config(run)] = configuration(base, swarm.output_dir(run), run, block, dynamic.plugins)
    resolve(configs[swarm.config(swarm.runs[0])], base_dir)
    write_configurations(folder, configs)
    write_table(folder / RATIOS, Table(runs=swarm.runs, columns=names, values=mixtures))
    body = {key: value for key, value in dataclasses.asdict(swarm).items() if key != "folder"}
    write_json(folder / SWARM, redacted(plain({"format": _FORMAT, **body})))
    return swarm


def _check_earlier(swarm: Swarm) -> None:
    """Raise if the folder holds another swarm than a beginning of this one."""
    if not (swarm.folder / SWARM).is_file():
        return
    old = read_swarm(swarm.folder)
    other_sizes = old.names != swarm.names or not np.array_equal(old.sizes, swarm.sizes)
    differences = (
        (old.config_digest != swarm.config_digest, "another configuration (or other overrides, data or models)"),
        (other_sizes, "other natural sizes"),
        (dict(old.kept) != dict(swarm.kept), "other shares of the domains that are kept"),
        (replace(old.settings, runs=swarm.settings.runs) != swarm.settings, "other settings of the draws"),
        (len(old.runs) > len(swarm.runs), f"{len(old.runs)} runs, more than the {len(swarm.runs)} asked for"),
    )
    problems = [told for differs, told in differences if differs]
    if not problems and not np.array_equal(old.mixtures, swarm.mixtures[: len(old.runs)]):
        problems.append("other mixtures (of other rounds, or drawn by another version)")
    if problems:
        raise ConfigError(
            f"--out: {swarm.folder} holds a swarm with {', '.join(problems)}; name another folder, or move that away"
        )


def few_runs_note(num_runs: int, num_domains: int) -> list[str]:
    """Return a note if there are fewer runs than Olmix advises."""
    wanted = 3 * (num_domains + 1)
    note = (
        f"{num_runs} runs for {num_domains} domains; Olmix advises at least 3 (domains + 1) = {wanted}, so trust the "
    )
    return [f"{note}held-out correlation before the proposal"] if num_runs < wanted else []


def _strengths(text: str | None) -> dict[str, float]:
    if text is None:
        return {}
    try:
        low, high, count = text.split(",")
        return {"least_strength": float(low), "most_strength": float(high), "strengths": int(count)}
    except ValueError as error:
        raise ConfigError(f"--strengths: expected LEAST,MOST,COUNT such as 0.1,5,15, found {text!r}") from error


def asked_swarm(
    options: argparse.Namespace, mapping: Mapping[str, Any], num_runs: int, added_RK: Floats | None = None
) -> Swarm:
    """Write the swarm that the options of a step ask for, with ``num_runs`` drawn mixtures and those that are added."""
    settings = settings_of(
        options.style,
        num_runs,
        options.seed,
        **_strengths(options.strengths),
        prior_power=options.prior_power,
        max_ratio=options.max_ratio,
        min_weight=options.min_weight,
        step=options.round,
    )
    changed = data_set_names(options.changed)
    if changed and options.reuse is None:
        raise ConfigError("--changed: has no effect without --reuse, the proportions before")
    return write_swarm(
        mapping,
        options.config.absolute().parent,
        options.out,
        settings,
        options.natural,
        reuse=options.reuse,
        changed=changed,
        added_RK=added_RK,
    )


def train_swarm(swarm: Swarm, mapping: Mapping[str, Any], without: Sequence[str] = ()) -> int:
    """Train the runs that are not finished, one after another, and return the exit code; not those in ``without``."""
    with passing_on(mapping):
        for run in swarm.runs:
            if run in without:
                continue
            code = train_unfinished(run, swarm.config(run), swarm.output_dir(run), partial(swarm.finished, run))
            if code:
                return code
    return 0


def swarm_step(options: argparse.Namespace) -> Answer | int:
    """Write a swarm, run it if asked to, and return what to print or an exit code."""
    mapping = load_mapping(options.config, options.overrides)
    swarm = asked_swarm(options, mapping, options.runs)
    natural = swarm.sizes / swarm.sizes.sum()
    table = [["domain", f"natural ({swarm.unit})", "least", "mean", "most"]]
    for k in np.argsort(-natural, kind="stable")[:32]:
        drawn = swarm.mixtures[:, k]
        table.append([swarm.names[k], *(f"{x:.4f}" for x in (natural[k], drawn.min(), drawn.mean(), drawn.max()))])
    lines = [f"{len(swarm.runs)} mixtures of {len(swarm.names)} domains in {swarm.folder}", *columns(table)]
    lines += [f"note: {note}" for note in few_runs_note(len(swarm.runs), len(swarm.names))]
    lines += left_out_note(mapping)
    if not swarm.held_out:
        lines.append(
            "note: the configuration has no 'eval_dataset', so the runs measure no held-out losses; add one data set "
            "per domain, or give 'mix fit' your own --metrics"
        )
    if not options.run:
        lines += [
            f"{len(swarm.unfinished())} of them are not run yet: dataflex train {swarm.config(swarm.runs[0])} and so "
            "on, on any machine, or the same command with --run",
            f"then: dataflex mix fit {swarm.folder}",
        ]
        return Answer("\n".join(lines), values_of(swarm))
    say("\n".join(lines))
    code = train_swarm(swarm, mapping)
    return code or Answer(f"all runs are finished; next: dataflex mix fit {swarm.folder}", values_of(swarm))


def values_of(swarm: Swarm) -> dict[str, Any]:
    """Return what was written for JSON."""
    runs = [
        {
            "run": run,
            "config": swarm.config(run),
            "output_dir": swarm.output_dir(run),
            "finished": swarm.finished(run),
            "proportions": dict(zip(swarm.names, shares.tolist(), strict=True)),
        }
        for run, shares in zip(swarm.runs, swarm.mixtures, strict=True)
    ]
    natural = dict(zip(swarm.names, (swarm.sizes / swarm.sizes.sum()).tolist(), strict=True))
    return {"out": swarm.folder, "natural": natural, "unit": swarm.unit, "runs": runs}
