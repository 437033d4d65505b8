"""Checks of the data: data sets, targets, what is held out, columns, domains and their proportions, number of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.convert import shown
from dataflex.config.data import Source, columns_of, count_rows, empty_names, find_sources, target_data_sets, train_rows
from dataflex.config.forecast import Forecast, forecast
from dataflex.config.needs import too_few_domains, unmet
from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.errors import ConfigError, DataError, UnsupportedError, did_you_mean
from dataflex.method import Mixer, RunFacts
from dataflex.plan.domains import Domains
from dataflex.plan.proportions import floors_by_domain
from dataflex.plan.schedule import Interval


def held_out_problems(lf: LlamaFactoryArgs, base_dir: Path) -> Iterator[str]:
    """Yield what is wrong with what is held out, and what asks for held-out rows where there are none."""
    named, share = lf.eval_sets, lf.val_size
    if named and share > 1e-6:
        yield "val_size: cannot be given together with eval_dataset; remove one of the two"
    if share < 0 or (share >= 1 and share != int(share)):
        yield f"val_size: expected a share below 1 or a whole number of rows, found {shown(lf.val_size)}"
    sources, problems = find_sources(named, lf, "eval_dataset", base_dir)
    yield from (problem for problem in problems if not problem.startswith("dataset_dir:") or lf.tokenized)
    for source in sources:
        if source.path is not None and count_rows(source, lf) == 0:
            yield f"eval_dataset: {source.name!r} has no rows ({source.path})"
    if lf.eval_dataset or share > 1e-6 or lf.tokenized:
        return
    for key in ("eval_strategy", "do_eval", "do_predict", "eval_on_start"):
        if getattr(lf, key) not in ("no", False):
            yield f"{key}: no rows are held out; name an 'eval_dataset', set 'val_size', or remove the key"


def by_domain_problems(dynamic: DynamicConfig, lf: LlamaFactoryArgs) -> Iterator[str]:
    """Yield why held-out rows cannot be told apart by domain, or split from several data sets."""
    several, share = len(lf.train_sets) > 1, lf.val_size
    if lf.tokenized:
        return
    if several and share > 1e-6:
        for key in ("predict_with_generate", "streaming"):
            if lf.on(key):
                yield f"val_size: with {key} over several data sets there is no split; name an 'eval_dataset' instead"
    if not dynamic.eval_by_domain or lf.eval_dataset:
        return
    if share <= 1e-6:
        yield "dynamic.eval_by_domain: no rows are held out; name an 'eval_dataset', or set 'val_size'"
    elif dynamic.domain_column is None and not several:
        yield (
            "dynamic.eval_by_domain: the held-out rows are of one data set; name a 'domain_column', or several data "
            "sets"
        )


def data_set_problems(lf: LlamaFactoryArgs, base_dir: Path, found: list[Source]) -> Iterator[str]:
    """Yield what is wrong with ``dataset`` and ``eval_dataset``; put the data sets that are there into ``found``."""
    for key in ("dataset", "eval_dataset"):
        problem = empty_names(getattr(lf, key))
        if problem:
            yield f"{key}: {problem}"
    yield from held_out_problems(lf, base_dir)
    if lf.tokenized:
        found += [Source(name=name) for name in lf.train_sets]
        return
    names = lf.train_sets
    if not names:
        yield "dataset: missing; name one or more data sets of dataset_info.json, with commas between them"
        return
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        yield f"dataset: names {', '.join(twice)} twice; to see rows more often, use a mixer or more epochs"
    sources, problems = find_sources(list(dict.fromkeys(names)), lf, "dataset", base_dir)
    yield from problems
    for source in sources:
        if source.path is not None and count_rows(source, lf) == 0:
            yield f"dataset: {source.name!r} has no rows ({source.path})"
        if lf.streaming and source.path is None:
            yield f"streaming: {source.name!r} is not in local files, which alone can be read at any row; download it"
    if not problems:
        found += sources
        counts = [count_rows(source, lf) for source in sources]
        if any(counts) and train_rows(counts, lf) == 0:
            yield f"val_size: {shown(lf.val_size)} sets aside all {sum(filter(None, counts)):,} rows; lower it"


def column_problems(dynamic: DynamicConfig, lf: LlamaFactoryArgs, sources: Sequence[Source] = ()) -> Iterator[str]:
    """Yield why data columns, or the paths of files, cannot ride along with the rows."""
    columns = (*dynamic.columns, *(["domain_path"] if dynamic.domain_path else []))
    if not columns:
        return
    asked = f"'{', '.join(columns)}'"
    if lf.packed:
        pt = " (pre-training packs unless told otherwise)" if lf.packing is None and "stage" in lf else ""
        yield (
            f"packing: rows hold several samples{pt}, so the column {asked} has no single value in a row; "
            "set 'packing: false', or do without the column"
        )
    if lf.tokenized_path:
        yield f"tokenized_path: a tokenized copy does not keep the column {asked}; remove it"
    if lf.packed or lf.tokenized_path:
        return
    for key, name in dynamic.columns_by_key:
        for source in sources:
            known = None if source.path is None else columns_of(source.path)
            if known is not None and name not in known:
                near, found = did_you_mean(name, sorted(known)), ", ".join(sorted(known))
                yield f"{key}: the data set {source.name!r} has no column {name!r}{near} (columns found: {found})"


def domain_problems(dynamic: DynamicConfig, lf: LlamaFactoryArgs, sources: list[Source]) -> Iterator[str]:
    """Yield what is wrong with the domains, their proportions, and the number of rows."""
    names = [source.name for source in sources]
    if names and dynamic.domains_are_sources:
        copied = len(names) > 1 and bool(lf.tokenized_path)
        found = 1 if copied else len(names)
        lacking = [line for each in dynamic.methods for line in too_few_domains(dynamic, each, found, copied=copied)]
        yield from lacking
        if lacking:
            return
    if not names:
        return
    if dynamic.unit == "documents" and lf.packed and not dynamic.domains_are_sources:
        yield (
            "dynamic.unit: rows hold several documents under packing, which are counted by data set only; let the data "
            "sets be the domains, or set 'packing: false'"
        )
    if dynamic.mixer is not None and dynamic.domain_column is not None:
        yield from _unread_file(dynamic.mixer)
    view = forecast(dynamic, lf, sources)
    if dynamic.mixer is not None and dynamic.domains_are_sources:
        yield from _mixture_problems(dynamic, view, names)
    yield from _too_few_rows(dynamic, view)
    yield from unmet(dynamic, RunFacts(total_steps=view.steps, num_rows=view.rows))


def _unread_file(mixer: MethodConfig) -> Iterator[str]:
    """Yield why the proportions file of a mixer cannot be read, where its domains are not known yet."""
    from dataflex.plan.proportions import read_proportions

    file = getattr(mixer.params, "from_file", None)
    if file is not None:
        try:
            read_proportions(file, "dynamic.mixer.from")
        except ConfigError as error:
            yield from error.problems


def _mixture_problems(dynamic: DynamicConfig, view: Forecast, names: list[str]) -> Iterator[str]:
    """Ask the mixer itself; where sizes are not known, one row stands for each domain to check the names."""
    from dataflex.plan.proportions import by_domain, refuse_strangers

    domains = view.domains or Domains.from_sizes(names, [1] * len(names))
    written = dynamic.initial_proportions
    if written is not None:
        try:
            by_domain(written, domains.names, "dynamic.initial_proportions")
        except ConfigError as error:
            yield from error.problems
    if isinstance(dynamic.max_epochs, Mapping):
        try:
            refuse_strangers(dynamic.max_epochs, names, "dynamic.max_epochs")
        except ConfigError as error:
            yield from error.problems
    try:
        floors_by_domain(dynamic.min_proportion, names)
    except ConfigError as error:
        if not isinstance(dynamic.min_proportion, Mapping) or "sum to" not in str(error):  # told by the rules
            yield from error.problems
        return
    from dataflex.plan.validate import check_mix

    assert dynamic.mixer is not None
    mixer = dynamic.mixer.build()
    assert isinstance(mixer, Mixer)
    interval = view.first_decision or Interval(index=0, kind="dynamic", start_step=0, stop_step=1)
    try:
        check_mix(mixer, mixer.mix(view.context(interval, domains)), domains.names)
        yield from _too_small_domains(dynamic, view, mixer)
    except ConfigError as error:
        yield from error.problems
    except DataError as error:
        if view.domains is not None and view.steps is not None and dynamic.unit != "tokens":
            yield f"dynamic.mixer: {error}"
    except UnsupportedError:
        return  # it looks at the model: what it will say is not known yet


def _too_few_rows(dynamic: DynamicConfig, view: Forecast) -> Iterator[str]:
    selector, first = dynamic.selector, view.first_decision
    if selector is None or not dynamic.narrows or dynamic.mixer is not None or view.rows is None or first is None:
        return
    if dynamic.candidate_batches is not None:
        looked_at = dynamic.candidate_batches * first.steps * view.batch.size
        if looked_at > view.rows:
            yield (
                f"dynamic.candidate_batches: {dynamic.candidate_batches} x {first.steps:,} steps x {view.batch.size:,} "
                f"rows are {looked_at:,} candidates, and the data sets hold {view.rows:,} rows; lower it, or "
                "interval_steps"
            )
        return
    replaces = dataclasses.asdict(selector.params).get("replacement") is True
    if dynamic.repeat or dynamic.keep_ratio is not None or replaces:
        return
    wanted, pool = first.steps * view.batch.size, view.pool
    if pool is not None and wanted > pool.left:
        fitting = pool.left // view.batch.size
        narrowed = "pool_fraction and screen_fraction leave"
        left = f", of which dynamic.signals.{narrowed} {pool.left:,}" if pool.left < pool.rows else ""
        way = "Set" if dynamic.interval_steps is None else "Lower"
        advice = f"{way} interval_steps to {fitting:,} or less, or set" if fitting else "Use smaller batches, or set"
        yield (
            f"dynamic.interval_steps: an interval of {first.steps:,} steps wants {wanted:,} rows, and the data sets "
            f"hold {view.rows:,}{left}. {advice} 'repeat: true'."
        )


def _too_small_domains(dynamic: DynamicConfig, view: Forecast, mixer: Mixer) -> Iterator[str]:
    """Yield the domains that cannot fill their share of an interval, since a narrowed pool is served once."""
    first, domains = view.first_decision, view.domains
    if not dynamic.narrows or dynamic.repeat or dynamic.unit == "tokens" or domains is None or first is None:
        return
    pool = view.pool
    kept = max(1, round((dynamic.keep_ratio or 1.0) * (len(domains.domain_of) if pool is None else pool.left)))
    stretches = [(first.steps, view.mixed(mixer, first), kept)]
    if dynamic.warmup_steps:
        stretches.append((dynamic.warmup_steps, view.warmup_shares(domains, mixer), len(domains.domain_of)))
    for steps, shares, most in stretches:
        for name, share, rows in zip(domains.names, shares, domains.num_rows, strict=True):
            wanted, there = int(steps * view.batch.size * share), min(int(rows), most)
            if wanted > there:
                yield (
                    f"dynamic.mixer: {steps:,} steps want {wanted:,} rows of domain {name!r}, and at most {there:,} of "
                    "it are left by the selector. Lower interval_steps (or warmup_steps) or set 'repeat: true'."
                )


def _data_sets(method: MethodConfig) -> list[str]:
    return [name for target in method.targets for name in target_data_sets(target)]


def target_problems(dynamic: DynamicConfig, lf: LlamaFactoryArgs, base_dir: Path) -> Iterator[str]:
    """Yield the targets that are not defined, whose files are missing, or that have no rows."""
    for method in dynamic.methods:
        key = f"dynamic.{method.kind}.targets"
        sources, problems = find_sources(_data_sets(method), lf, key, base_dir)
        for problem in problems:
            if not problem.startswith("dataset_dir:"):  # told once, for the training data
                yield problem
        for source in sources:
            if source.path is not None and count_rows(source, LlamaFactoryArgs()) == 0:
                yield f"{key}: {source.name!r} has no rows ({source.path})"
    if dynamic.leakage == "error":
        for key, name, other in targets_in_training(dynamic, lf, base_dir):
            same = "is also trained on" if name == other else f"has the file of {other!r}, which is trained on"
            yield f"{key}: {name!r} {same}, and dynamic.leakage is 'error'; remove it from one of the two"


def targets_in_training(dynamic: DynamicConfig, lf: LlamaFactoryArgs, base_dir: Path) -> Iterator[tuple[str, str, str]]:
    """Yield key and name of each target that is a training data set too, and the name of that data set."""
    trained, _ = find_sources(lf.train_sets, lf, "dataset", base_dir)
    names = {source.name: source.name for source in trained}
    files = {source.path.resolve(): source.name for source in trained if source.path is not None}
    for method in dynamic.methods:
        for source in find_sources(_data_sets(method), lf, "", base_dir)[0]:
            same_file = None if source.path is None else files.get(source.path.resolve())
            other = names.get(source.name, same_file)
            if other is not None:
                yield f"dynamic.{method.kind}.targets", source.name, other
