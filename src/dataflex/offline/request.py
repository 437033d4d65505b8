"""What ``dataflex score`` is asked for, read and checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataflex.config.build import load_plugins
from dataflex.config.collect import collect, values
from dataflex.config.data import Source, data_sets
from dataflex.config.load import ENDINGS, load_mapping, merged
from dataflex.config.methods import method_block, method_class, target_list
from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.config.show import plain
from dataflex.config.split import split
from dataflex.core.protocols import Method
from dataflex.core.registry import KINDS, names
from dataflex.errors import ConfigError
from dataflex.offline.checks import FIXED, adam_problems, checked, checkpoint_of, entries_of, out_problems, tidy

__all__ = ["OfflineConfig", "ScoreRequest", "names_of", "score_request"]

_STORE_GB = 1e6  # nothing that a pass needs is dropped while it runs


@dataclass(frozen=True, kw_only=True)
class OfflineConfig(DynamicConfig):
    """A configuration whose methods are several selectors, each asked once about every row."""

    scorers: tuple[MethodConfig, ...] = ()

    @property
    def methods(self) -> tuple[MethodConfig, ...]:
        """The selectors asked."""
        return self.scorers


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """One run of ``dataflex score``.

    Attributes:
        lf: LLaMA-Factory's keys, those of training left out.
        config: Methods, plugins, seed, domains and signals.
        out: The file to write.
        work: Folder for what is not finished yet, removed at the end.
        checkpoint: Checkpoint whose weights and optimizer state are taken, or None.
        budget: Rows that every method is asked for; None: all.
        sources: The data sets, with their files where these are local.
        entries: What ``dataset_info.json`` says about each data set.
        notes: What is done differently from a training run, one line each.
    """

    lf: dict[str, Any]
    config: OfflineConfig
    out: Path
    work: Path
    checkpoint: Path | None
    budget: int | None
    sources: tuple[Source, ...]
    entries: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def score_request(
    data: str,
    overrides: Sequence[str],
    *,
    methods: Sequence[str],
    out: Path,
    targets: str | None = None,
    budget: int | None = None,
    store: str | None = None,
) -> ScoreRequest:
    """Read and check what is to be scored.

    Args:
        data: A LLaMA-Factory YAML or JSON file, or the names of data sets.
        overrides: ``key=value`` texts; ``METHOD.key=value`` sets a method's parameter.
        methods: Names of selectors.
        out: The parquet file to write.
        targets: Data sets for the methods that need targets and have none of their own.
        budget: Rows that every method is asked for; None: all.
        store: Folder for finished passes, kept; None: one beside ``out``, removed at the end.

    Raises:
        ConfigError: All problems, one line each.
    """
    problems: list[str] = []
    ours = [text for text in overrides if text.partition("=")[0].partition(".")[0] in methods and "." in text]
    theirs = [text for text in overrides if text not in ours]
    for text in theirs:
        method, dot, _ = text.partition("=")[0].partition(".")
        if dot and method in names("selector"):
            problems.append(f"{text}: {method} is not among the methods asked for ({', '.join(methods)})")
    is_file = data.lower().endswith(ENDINGS)
    base_dir = Path(data).absolute().parent if is_file else Path.cwd()
    mapping = load_mapping(data, theirs) if is_file else merged({"dataset": data}, theirs)
    given = merged({}, ours)
    lf, config = _parts(mapping, base_dir, problems)
    scorers = _scorers(methods, given, config, targets, problems)
    notes = tidy(lf, problems)
    checkpoint = checkpoint_of(lf, problems)
    work = out.with_name(f"{out.name}.work")
    signals = replace(config.signals, store=store or config.signals.store or str(work / "store"), store_gb=_STORE_GB)
    config = replace(config, scorers=scorers, signals=signals, selector=None, mixer=None, weighter=None)
    sources = checked(lf, config, base_dir, problems)
    problems += out_problems(out)
    if budget is not None and budget < 1:
        problems.append(f"--budget: {budget} rows; ask for at least 1, or leave it out for all")
    if checkpoint is None:
        problems += adam_problems(scorers)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    lf.update(FIXED, output_dir=str(work / "run"))
    return ScoreRequest(
        lf=lf,
        config=config,
        out=out,
        work=work,
        checkpoint=checkpoint,
        budget=budget,
        sources=tuple(sources),
        entries=entries_of(lf, [source.name for source in sources]),
        notes=tuple(notes),
    )


def _parts(mapping: dict[str, Any], base_dir: Path, problems: list[str]) -> tuple[dict[str, Any], OfflineConfig]:
    """Return LLaMA-Factory's keys and ours; the rules between keys of a training run do not apply."""
    block = mapping.get("dynamic")
    if block is None:
        parts = split({key: value for key, value in mapping.items() if key != "dynamic"}, base_dir)
        dynamic = parts.dynamic or DynamicConfig()
        return dict(parts.lf), OfflineConfig(selector=dynamic.selector, seed=dynamic.seed, signals=dynamic.signals)
    if not isinstance(block, Mapping):
        raise ConfigError("dynamic: expected a mapping")
    given = values(DynamicConfig, block, "dynamic", problems, skip=KINDS)
    ours = ("seed", "signals", "domain_column", "domain_path", "unit")
    kept: dict[str, Any] = {key: given[key] for key in ours if key in given}
    kept["plugins"] = load_plugins(given.get("plugins", ()), base_dir, problems)
    if block.get("selector") is not None:
        kept["selector"] = method_block("selector", block["selector"], "dynamic.selector", problems)
    return {key: value for key, value in mapping.items() if key != "dynamic"}, OfflineConfig(**kept)


def _scorers(
    asked: Sequence[str],
    given: Mapping[str, Any],
    config: OfflineConfig,
    targets: str | None,
    problems: list[str],
) -> tuple[MethodConfig, ...]:
    """Return the methods: parameters of the configuration's own selector of that name, then those given."""
    if not asked:
        problems.append("--method: name one or more selectors, with commas between them (see 'dataflex methods')")
    twice = [name for name in dict.fromkeys(asked) if list(asked).count(name) > 1]
    if twice:
        problems.append(f"--method: names {', '.join(twice)} twice")
    own = config.selector
    aims = target_list(targets, "--targets", problems) if targets is not None else ()
    if not aims and own is not None:
        aims = own.targets
    built = []
    for name in dict.fromkeys(asked):
        cls = method_class("selector", name, "--method", problems)
        if cls is None:
            continue
        if getattr(cls, "online", False):
            problems.append(
                f"--method: {name} chooses within the candidates of a training step, and scores no data set"
            )
            continue
        base = plain(own) if own is not None and own.name == name else {}
        block = {**base, "name": name, **(given.get(name) or {})}
        if aims and (targets is not None or "targets" not in block) and _takes_targets(cls, block):
            block["targets"] = (given.get(name) or {}).get("targets", list(aims))
        method = method_block("selector", block, name, problems)
        if method is not None:
            built.append(method)
    return tuple(built)


def _takes_targets(cls: type[Method], block: Mapping[str, Any]) -> bool:
    """Return whether a method takes targets, which for some depends on the parameters."""
    rest = {key: value for key, value in block.items() if key not in ("name", "targets")}
    params = collect(cls.Params, rest, "", [])
    return (cls if params is None else cls.variant(params)).needs.targets


def names_of(text: str) -> tuple[str, ...]:
    """Return names given with commas between them."""
    return data_sets(text)
