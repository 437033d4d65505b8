"""``dataflex score``, and its index: the request, read and checked before anything heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from dataflex.checkpoints import broken_reason
from dataflex.config.args import LlamaFactoryArgs, env_enabled
from dataflex.config.build import load_plugins, method_block, method_class, takes_targets, target_list
from dataflex.config.check import (
    data_sets,
    facts_of,
    model_problems,
    partitioned_by,
    setting_problems,
    stage_problems,
    target_problems,
    told_once,
)
from dataflex.config.data import Source, find_entries
from dataflex.config.load import ENDINGS, load_mapping, merged
from dataflex.config.mappings import plain, values
from dataflex.config.needs import FSDP2, ZERO3, unmet, wants_moments
from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.config.split import split
from dataflex.errors import ConfigError, did_you_mean
from dataflex.method import RunFacts
from dataflex.offline.index import WORK, index_problems
from dataflex.printable import without_secrets
from dataflex.registry import KINDS, names
from dataflex.score_table import is_scores
from dataflex.signals.specs import PRECISIONS, Precision
from dataflex.storage import place_problem

_DROPPED = (
    "auto_find_batch_size do_eval do_predict early_stopping_steps eval_dataset eval_on_start eval_steps eval_strategy "
    "evaluation_strategy group_by_length ignore_data_skip load_best_model_at_end mix_strategy plot_loss "
    "predict_with_generate push_to_hub save_steps streaming train_sampling_strategy val_size"
).split()
"""Keys that only training and evaluation look at."""
INDEX_SIZE = 512
"""Numbers of a row in an index where ``sketch_size`` is not given."""
_STORE_GB = 1e6  # nothing that a pass needs is dropped while it runs
FIXED: dict[str, Any] = dict(
    do_train=True, neat_packing=False, overwrite_output_dir=True, packing=False, report_to="none", save_strategy="no"
)


def _tidy(lf: dict[str, Any], problems: list[str]) -> list[str]:
    """Take out what only training needs; return notes on what is done otherwise."""
    notes: list[str] = []
    args = LlamaFactoryArgs.read(lf)
    if args.tokenized_path:
        problems.append("tokenized_path: a tokenized copy does not say which row of a file it came from; remove it")
    if args.packed:
        notes.append("packing is off: every sample is scored by itself")
    if args.streaming:
        notes.append("streaming is off: all rows are tokenized first")
    partitioned = partitioned_by(args)
    if not partitioned and lf.pop("deepspeed", None) is not None:
        notes.append("deepspeed is left out: nothing is trained")
    if args.fsdp and partitioned != FSDP2:
        problems.append("fsdp: scoring partitions parameters by FSDP2 alone; add 'fsdp_config: {fsdp_version: 2}'")
    if env_enabled("USE_RAY"):
        problems.append("USE_RAY (environment): is for training; scoring on a cluster is asked for by '--engine ray'")
    held = [key for key in ("val_size", "eval_dataset") if args.on(key)]
    if held:
        notes.append(f"{', '.join(held)} left out: no row is held out")
    if args.max_samples is not None:
        notes.append(f"max_samples: at most the first {args.max_samples:,} rows of each data set are scored")
    for key in _DROPPED:
        lf.pop(key, None)
    return notes


def _checkpoints_of(lf: dict[str, Any], problems: list[str], *, several: bool) -> tuple[Path, ...]:
    """Take out the checkpoints whose weights and optimizer states are to be used; at most one unless ``several``."""
    asked = lf.pop("resume_from_checkpoint", None)
    if asked in (None, False, "false", "False"):
        return ()
    if asked in (True, "true", "True"):
        problems.append(
            "resume_from_checkpoint: name the checkpoint's folder whose weights and optimizer are to be used"
        )
        return ()
    partitioned = partitioned_by(LlamaFactoryArgs.read(lf))
    state = "optimizer.pt" if not partitioned else "global_step*" if partitioned == ZERO3 else "optimizer*"
    folders = tuple(Path(str(one)) for one in (asked if isinstance(asked, list | tuple) else [asked]))
    if len(folders) > 1 and not several:
        problems.append("resume_from_checkpoint: scores are those of one checkpoint; an index (--index) takes several")
    if len(set(folders)) < len(folders):
        problems.append("resume_from_checkpoint: names a folder twice")
    for folder in folders:
        if (reason := broken_reason(folder)) is not None:
            problems.append(f"resume_from_checkpoint: {folder} cannot be used: {reason}")
        elif not any(folder.glob(state)):
            problems.append(f"resume_from_checkpoint: {folder} holds no state of an optimizer ({state})")
    return folders


def _checked(
    lf: dict[str, Any], config: DynamicConfig, base_dir: Path, moments: bool, problems: list[str]
) -> tuple[Source, ...]:
    """Note what is wrong with stage, settings, model, data and targets; return the data sets.

    ``moments``: whether a checkpoint gives the moments of a run's Adam; without training there are no others.
    """
    view = LlamaFactoryArgs.read({**lf, **FIXED})
    problems += told_once(view, ())
    problems += [
        problem.replace("dynamic.selector: ", "--method: ", 1)
        for problem in (*stage_problems(config, view), *setting_problems(config, view))
    ]
    problems += model_problems(view)
    for method in config.methods:
        alone = DynamicConfig(selector=method)
        found = (
            *unmet(alone, RunFacts(partitioned=partitioned_by(view)), models=True),
            *target_problems(alone, view, base_dir),
        )
        problems += [problem.replace("dynamic.selector.", f"{method.name}.", 1) for problem in found]
        for place, kind in () if moments else wants_moments(method.requires):
            key = f"{method.name}.{place}"
            problems.append(
                f"{key}: {kind} needs the moments of a run's Adam, and without training there are none; write "
                f"'{key}=none', or name a checkpoint of the run: 'resume_from_checkpoint=saves/run/checkpoint-100'"
            )
    sources, found_data = data_sets(view, base_dir)
    problems += [*found_data, *unmet(config, facts_of(config, view, sources))]
    for source in sources:
        if source.num_samples is not None:
            problems.append(
                f"dataset: {source.name!r} has num_samples in dataset_info.json, which draws rows anew in every load; "
                "remove it, and draw with 'dataflex select --budget'"
            )
    return tuple(sources)


def score_out_problems(out: Path) -> list[str]:
    """Return why scores could not be written there."""
    if out.suffix != ".parquet":
        return [f"--out: {out} must end in .parquet"]
    return out_problems(out, "dataflex score", is_scores)


def out_problems(out: Path, command: str, wrote: Callable[[Path], bool]) -> list[str]:
    """Return why a file could not be written there; one that is there is replaced if ``command`` ``wrote`` it."""
    if out.is_dir():
        return [f"--out: {out} is a folder"]
    if os.path.lexists(out) and not wrote(out):
        return [f"--out: {out} is there, and '{command}' did not write it; name another file, or move it away"]
    told = place_problem(out)
    return [f"--out: {told}"] if told else []


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
    """One run of ``dataflex score``."""

    lf: dict[str, Any]  # LLaMA-Factory's keys, those of training left out
    config: OfflineConfig  # methods, plugins, seed, domains and signals
    out: Path  # the file to write, or the folder of the index
    work: Path  # folder of unfinished passes, removed at the end
    checkpoints: tuple[Path, ...]  # whose weights and optimizer states are taken; an index alone has several
    budget: int | None  # number of rows that every method is asked for; None: all
    sources: tuple[Source, ...]  # the data sets
    entries: Mapping[str, Any]  # their entries in dataset_info.json
    notes: tuple[str, ...] = ()  # differences from a training run, one line each
    precision: Precision | None = None  # of an index; None: scores are written

    @property
    def checkpoint(self) -> Path | None:
        """The one checkpoint of scores, if any."""
        return self.checkpoints[0] if self.checkpoints else None


def score_request(
    data: str | Mapping[str, Any],
    overrides: Sequence[str],
    *,
    methods: Sequence[str],
    out: Path | None = None,
    index: Path | None = None,
    precision: str | None = None,
    targets: str | None = None,
    budget: int | None = None,
    store: str | None = None,
    moments: bool = False,
) -> ScoreRequest:
    """Read and check what ``dataflex score`` is asked for; ``ConfigError`` with all problems.

    Args:
        data: A LLaMA-Factory YAML or JSON file, the names of data sets, or a mapping as such a file holds it.
        overrides: ``key=value`` texts; ``METHOD.key=value`` sets a method's parameter.
        methods: Names of selectors.
        out: The parquet file to write.
        index: The folder of an index to write instead.
        precision: How an index keeps a row; None: int8.
        targets: Data sets for the methods that need targets and have none of their own.
        budget: Number of rows that every method is asked for; None: all.
        store: Folder for finished passes, kept; None: one beside ``out``, removed at the end.
        moments: Whether the model is trained before it is asked, so that there are an optimizer's moments.
    """
    problems: list[str] = []
    ours = [text for text in overrides if text.partition("=")[0].partition(".")[0] in methods and "." in text]
    theirs = [text for text in overrides if text not in ours]
    for text in theirs:
        method, dot, _ = text.partition("=")[0].partition(".")
        if dot and method in names("selector"):
            problems.append(f"{text}: {method} is not among the methods asked for ({', '.join(methods)})")
    base_dir = Path.cwd()
    if isinstance(data, str) and data.lower().endswith(ENDINGS):
        base_dir, mapping = Path(data).absolute().parent, load_mapping(data, theirs)
    else:
        mapping = merged({"dataset": data} if isinstance(data, str) else data, theirs)
    given = merged({}, ours)
    lf, config = _parts(mapping, base_dir, problems)
    indexes = index is not None
    if indexes:
        problems += _beside_index(methods, out=out, targets=targets, budget=budget, store=store)
        scorers = _indexed(given, config, problems)
        if lf.get("stage") == "dpo":
            problems.append("stage: an index holds gradients of token losses, not of pairs; write scores (--out)")
    else:
        if out is None:
            problems.append("--out: name the file to write, or the folder of an index with --index")
        if precision is not None:
            problems.append("--precision: says how an index keeps rows, and has no effect without --index; remove it")
        scorers = _scorers(methods, given, config, targets, problems)
    if precision is not None and precision not in PRECISIONS:
        meant = did_you_mean(precision, PRECISIONS)
        problems.append(f"--precision: unknown {precision!r}{meant} (known: {', '.join(PRECISIONS)})")
    notes = _tidy(lf, problems)
    if indexes:
        try:
            without_secrets(lf)  # an index keeps these keys
        except ConfigError as error:
            problems += error.problems
    checkpoints = _checkpoints_of(lf, problems, several=indexes)
    place = index or out or Path("scores.parquet")
    work = place / WORK if indexes else place.with_name(f"{place.name}.work")
    signals = replace(config.signals, store=store or config.signals.store or str(work / "store"), store_gb=_STORE_GB)
    config = replace(config, scorers=scorers, signals=signals, selector=None, mixer=None, weighter=None)
    sources = _checked(lf, config, base_dir, moments or bool(checkpoints), problems)
    problems += index_problems(place) if indexes else score_out_problems(place) if out is not None else []
    if budget is not None and budget < 1:
        problems.append(f"--budget: {budget} rows; ask for at least 1, or leave it out for all")
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    lf.update(FIXED, output_dir=str(work / "run"))
    return ScoreRequest(
        lf=lf,
        config=config,
        out=place,
        work=work,
        checkpoints=checkpoints,
        budget=budget,
        sources=sources,
        entries=find_entries([source.name for source in sources], LlamaFactoryArgs.read(lf)),
        notes=tuple(notes),
        precision=cast(Precision, precision or PRECISIONS[0]) if indexes else None,
    )


def _beside_index(methods: Sequence[str], **options: Any) -> list[str]:
    """Return the options that do not go with an index."""
    told = {
        "out": "an index is queried for scores later; leave out --out or --index",
        "targets": "an index is made for any target; name targets in 'dataflex query'",
        "budget": "an index holds every row; remove it",
        "store": "an index keeps its own passes; remove it",
    }
    problems = [f"--{name}: {told[name]}" for name, value in options.items() if value is not None]
    if list(methods) != ["less"]:
        problems.append(f"--method: an index holds the gradients of 'less' alone, found {', '.join(methods) or 'none'}")
    return problems


def _indexed(given: Mapping[str, Any], config: OfflineConfig, problems: list[str]) -> tuple[MethodConfig, ...]:
    """Return LESS as an index holds it: for any target, of one decision."""
    own = config.selector
    base = plain(own) if own is not None and own.name == "less" else {}
    block = {"sketch_size": INDEX_SIZE, **base, "name": "less", **(given.get("less") or {}), "checkpoints": 1}
    if block["sketch_size"] is None:
        block["sketch_size"] = INDEX_SIZE
    if block.get("precondition") == "ekfac":
        problems.append(
            "less.precondition: an index knows no curvature, by which ekfac turns targets; score without one"
        )
    method = method_block("selector", {**block, "targets": ["any"]}, "less", problems)
    return () if method is None else (replace(method, targets=()),)


def _parts(mapping: dict[str, Any], base_dir: Path, problems: list[str]) -> tuple[dict[str, Any], OfflineConfig]:
    """Return LLaMA-Factory's keys and ours; the rules between keys of a training run do not apply."""
    block, rest = mapping.get("dynamic"), {key: value for key, value in mapping.items() if key != "dynamic"}
    if block is None:
        parts = split(rest, base_dir)
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
    return rest, OfflineConfig(**kept)


def _scorers(
    asked: Sequence[str], given: Mapping[str, Any], config: OfflineConfig, targets: str | None, problems: list[str]
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
        base = plain(own) if own is not None and own.name == name else {}
        block = {**base, "name": name, **(given.get(name) or {})}
        if aims and (targets is not None or "targets" not in block) and takes_targets(cls, block):
            block["targets"] = (given.get(name) or {}).get("targets", list(aims))
        method = method_block("selector", block, name, problems)
        if method is not None and method.requires.within_batch:
            problems.append(
                f"--method: {name} chooses within the candidates of a training step, and scores no data set"
            )
        elif method is not None:
            built.append(method)
    return tuple(built)
