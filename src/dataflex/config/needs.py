"""Compares what methods require with what a run has: ``unmet`` enforces ``Requires`` for all kinds of methods."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from dataflex.config.args import LlamaFactoryArgs, env_enabled
from dataflex.config.schema import AverageConfig, DynamicConfig, LedgerConfig, MethodConfig
from dataflex.errors import DataError, did_you_mean
from dataflex.method import IN_RUN, STAGES, DomainWeighter, Method, Requires, RunFacts, Selector, Weighter
from dataflex.registry import one_of
from dataflex.version import install

FSDP2 = "FSDP2"
"""What partitions parameters that keep their shapes."""
ZERO3 = "DeepSpeed ZeRO-3"
"""What partitions parameters into parts that have no shape of their own."""
_NO_MOMENTS = (
    "adafactor adagrad ademamix apollo badam galore lion lomo muon rmsprop schedule_free sgd stable_adamw"
).split()
_MUON = "use_muon"
"""LLaMA-Factory's Muon: matrices have a momentum to go by, other parameters Adam's moments."""
_MOMENT_FLAGS: tuple[str, ...] = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", _MUON)
_PRECONDITIONS: tuple[str, ...] = ("true_adam", "paper_repo", "adam_scale")

_CAUSAL = ("pt", "sft")
_PAIRS = ("dpo",)
_STAGES_OF_SIGNALS: dict[str, tuple[str, ...]] = {
    "losses": ("pt", "sft", "dpo", "kto"),
    "preference_logps": _PAIRS,
    "gradients": (*_CAUSAL, *_PAIRS),
    **dict.fromkeys(("logits", "generate", "gates", *IN_RUN), _CAUSAL),
    **dict.fromkeys(("embeddings", "texts"), tuple(stage for stage in STAGES if stage != "rl")),
    "rollouts": ("rl",),
}
_TAKERS: dict[str, tuple[str, ...]] = {
    "needs_interval": ("selector", "mixer", "orderer"),
    "within_batch": ("selector",),
    "reference": ("mixer", "weighter"),
    "pure_micro_batches": ("mixer",),
    "ledger": ("mixer",),
    "selector_scores": ("orderer",),
    "score_files": ("orderer",),
    "embedding": ("weighter",),
    "entropy": ("weighter",),
    "token_weights": ("weighter",),
    "row_weights": ("selector",),
}
"""Fields of ``Requires`` that are provided to these kinds of methods only."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_REFERENCE_FILES = ("config.json", "adapter_config.json")
_MODEL_FILES = (*_REFERENCE_FILES, "modules.json")


def unmet(
    dynamic: DynamicConfig, run: RunFacts | None = None, *, unread: Collection[str] = (), models: bool = False
) -> Iterator[str]:
    """Yield what the methods require and the run does not provide, one line each.

    Args:
        dynamic: The methods, and the block that they stand in.
        run: What is known of the run beside the block; None for the block itself.
        unread: Keys of the block that could not be read; no line says that they are missing.
        models: Whether other models are looked for, and numbers by target compared with the targets.
    """
    for method in dynamic.methods:
        needs, place = method.requires, f"dynamic.{method.kind}"
        if run is None:
            yield from _kind(method, needs)
            yield from _block(dynamic, method, needs, unread)
            continue
        if run.stage is not None:
            yield from _stage(method, needs, run.stage)
        if run.partitioned and needs.whole_parameters:
            others = ", ".join(key for key, name in needs.models.items() if name is not None)
            why = f", since it scores rows by other models ({others})" if others else ""
            yield (
                f"{place}: {method.name} does not work with partitioned parameters ({run.partitioned}){why}; use "
                "DeepSpeed ZeRO-2 or less, or plain data parallelism"
            )
        if run.optimizer not in (None, "", _MUON) and "in_run_scores" in needs.signals:
            yield f"{place}: {method.name} {_without_moments(run.optimizer)}; use an AdamW optimizer"
        for key, value in wants_moments(needs) if run.optimizer else ():
            if run.optimizer == _MUON and value != "paper_repo":
                continue
            yield (
                f"{place}.{key}: {value} {_without_moments(run.optimizer)}; write 'precondition: none' or 'sign', or "
                "use an AdamW optimizer"
            )
        yield from _domains(dynamic, method, needs, run)
        yield from _token_weights(method, needs, run)
        if models:
            yield from _reference(method, needs)
            yield from _models(method, needs)
            yield from _by_target(method, needs)
            yield from _score_files(method, needs)
        for problem in method.build().check(run):
            yield f"{place}{'.' if problem.key else ''}{problem.key}: {problem.text}"
    if dynamic.signals.budget is not None and "selector" not in unread:
        yield from _budget(dynamic, run)
    if dynamic.ledger is not None:
        yield from _ledger(dynamic, dynamic.ledger, run)
    if dynamic.average_weights is not None and run is not None:
        yield from _average(dynamic.average_weights, run)
    if run is None:
        yield from _one_reference(dynamic)
        yield from _row_weights(dynamic)
    else:
        yield from _columns(dynamic, run)
        yield from _pilot(dynamic, run)


def without_targets(cls: type[Method]) -> str:
    """Return the message about a method that requires a target and has none."""
    summary = cls.card.summary.rstrip(".")
    return f"{cls.name} needs a target: add 'targets: [<data set>]' (it {summary[:1].lower()}{summary[1:]})"


def optimizer_without_moments(lf: LlamaFactoryArgs) -> str:
    """Return the key and value that name an optimizer other than Adam, or an empty text."""
    name = lf.optim or "adamw_torch"
    flag = next((flag for flag in _MOMENT_FLAGS if lf.on(flag)), "")
    if flag == _MUON and lf.deepspeed:  # which parts matrices
        flag = f"{_MUON} under deepspeed"
    return flag or (f"optim: {name}" if any(word in name for word in _NO_MOMENTS) else "")


def wants_moments(needs: Requires) -> Iterator[tuple[str, str]]:
    """Yield parameter and value of each precondition that uses the moments of the run's optimizer."""
    return ((key, value) for key, value in needs.preconditions.items() if value in _PRECONDITIONS)


def _without_moments(optimizer: str | None) -> str:
    return f"needs Adam's moments for each element, which the run's optimizer ({optimizer}) does not keep"


def _kind(method: MethodConfig, needs: Requires) -> Iterator[str]:
    """Yield requirements that are not provided to methods of this kind."""
    usual = Requires()
    if getattr(needs.embedding, "encoder", None) is not None:
        yield (
            f"dynamic.{method.kind}: {method.name} requires embeddings by another model, but those of a step "
            "are by the model under training; leave encoder out of requires()"
        )
    for name, kinds in _TAKERS.items():
        if name == "embedding" and "in_run_embeddings" in needs.signals:
            continue
        listed = " or ".join(map(one_of, kinds))
        if method.kind not in kinds and getattr(needs, name) != getattr(usual, name):
            yield (
                f"dynamic.{method.kind}: {method.name} requires {name}, which only {listed} is given; "
                "leave it out of requires()"
            )


def _block(dynamic: DynamicConfig, method: MethodConfig, needs: Requires, unread: Collection[str]) -> Iterator[str]:
    """Yield keys of the block that are missing or conflict with the requirements."""
    if needs.targets and not method.targets:
        yield f"dynamic.{method.kind}: {without_targets(method.cls)}"
    if needs.needs_interval and dynamic.every(method) is None and "interval_steps" not in unread:
        yield (
            f"dynamic.interval_steps: missing; the {method.name} {method.kind} decides from the model as it is at "
            "that moment, so say after how many optimizer steps it decides again "
            f"(for example 'interval_steps: {1 if needs.within_batch else 100}')"
        )
    if needs.within_batch and dynamic.candidate_batches is None and "candidate_batches" not in unread:
        yield (
            f"dynamic.candidate_batches: missing; the {method.name} selector chooses within a batch of candidates, so "
            "say how many times the rows of an interval are looked at (for example 'candidate_batches: 2' with "
            "'interval_steps: 1')"
        )
    if needs.ledger and method.kind == "mixer" and dynamic.ledger is None and "ledger" not in unread:
        yield f"dynamic.ledger: missing; the {method.name} mixer decides by it: add 'ledger: {{targets: [<data set>]}}'"
    selector = dynamic.selector
    if needs.selector_scores and method.kind == "orderer":
        built = selector.build() if selector is not None else None
        if not isinstance(built, Selector) or not dynamic.selects_subset:
            told = "goes by a selector's scores, and no selector chooses rows; add one, or order by something else"
            yield f"dynamic.{method.kind}: {method.name} {told}"
        elif not built.gives_scores:
            yield (
                f"dynamic.{method.kind}: {method.name} goes by the selector's scores, and the {built.name} selector "
                "gives none; order by something else, or use a selector that scores rows"
            )
    if needs.pure_micro_batches and selector is not None and dynamic.selects_subset:
        yield (
            f"dynamic.{method.kind}: {method.name} requires micro-batches of one domain each, which the "
            f"{selector.name} selector cannot provide; use one of the two"
        )


def _row_weights(dynamic: DynamicConfig) -> Iterator[str]:
    """Yield what leaves no place for the weights that a selector gives its rows."""
    selector, weighter, mixer = dynamic.selector, dynamic.weighter, dynamic.mixer
    if selector is None or selector.requires.row_weights is None:
        return
    told = f"the {selector.name} selector gives rows weights in the loss"
    built = None if weighter is None else weighter.build()
    if isinstance(built, Weighter) and built.normalizer == "num_sequences":
        yield (
            f"dynamic.weighter: {told}, and {built.name} divides each micro-batch's weights by their sum, which undoes "
            "them; use one of the two"
        )
    method = None if mixer is None else mixer.build()
    if isinstance(method, DomainWeighter) and method.loss_normalizer == "domain":
        yield (
            f"dynamic.mixer: {told}, and the {method.name} mixer's loss is a weighted sum of domains' mean losses; use "
            "one of the two"
        )
    if dynamic.signals.budget is not None:
        yield f"dynamic.signals.budget: {told}, and a budget adds rows that it did not choose; remove it"


_IDLE_WITHIN_BUDGET = ("bf16", "include_momentum", "sketch_size", "target_gradient", "target_rows")
"""Parameters of passes that no run with a budget makes."""


def _budget(dynamic: DynamicConfig, run: RunFacts | None) -> Iterator[str]:
    """Yield why decisions cannot be made within a budget."""
    selector, key = dynamic.selector, "dynamic.signals.budget"
    if run is None and (selector is None or not selector.requires.budget):
        who = "a run without a selector" if selector is None else f"the {selector.name} selector"
        if getattr(getattr(selector, "params", None), "interaction", "scaled") != "scaled":
            who += ", with an interaction that needs the size of gradients,"
        if getattr(getattr(selector, "params", None), "precondition", "") == "ekfac":
            who += ", preconditioned by ekfac,"
        others = "less, icons, grad_norm, loss, or greats or opus with 'interaction: scaled'"
        yield f"{key}: {who} has no scores that training steps give; use {others}, or remove it"
    elif run is None and selector is not None:
        for each in fields(selector.params):
            if each.name in _IDLE_WITHIN_BUDGET and getattr(selector.params, each.name) != each.default:
                yield f"dynamic.selector.{each.name}: has no effect beside {key}; remove one of the two"
    if run is None and dynamic.orderer is not None and dynamic.orderer.requires.signals - {"texts"}:
        yield f"{key}: the {dynamic.orderer.name} orderer makes a pass that no budget pays for; order by something else"
    if run is None and dynamic.signals.screen_fraction < 1.0:
        yield f"{key}: screening makes a pass over the pool that no budget pays for; remove screen_fraction"
    if run is not None and run.stage is not None and run.stage not in _CAUSAL:
        yield f"{key}: rows are scored in the steps of stages pt and sft, not of {run.stage}; remove it"


def _average(options: AverageConfig, run: RunFacts) -> Iterator[str]:
    """Yield why the weights of the last steps cannot be averaged."""
    key, total = "dynamic.average_weights", run.total_steps
    if run.partitioned:
        yield f"{key}: needs whole parameters, and {run.partitioned} partitions them; use plain data parallelism"
    if run.stage == "rm":
        yield f"{key}: a reward model's head is saved apart by LLaMA-Factory (v0), from the model as it is; remove it"
    if total is not None and options.last_steps > total:
        yield f"{key}.last_steps: the run has {total:,} steps, fewer than the {options.last_steps:,} asked for"


def _ledger(dynamic: DynamicConfig, ledger: LedgerConfig, run: RunFacts | None) -> Iterator[str]:
    """Yield why there can be no account of the targets' losses."""
    key, mixer = "dynamic.ledger", dynamic.mixer
    if run is None:
        if not ledger.targets:
            yield f"{key}.targets: names no data set; name one, as 'targets: [<data set>]'"
        if mixer is not None and mixer.requires.ledger and (more := set(mixer.targets) - set(ledger.targets)):
            told = ", ".join(sorted(more))
            yield f"dynamic.mixer.targets: the ledger has no account of {told}; add it to {key}.targets"
        return
    if run.stage is not None and run.stage not in _CAUSAL:
        yield f"{key}: rows are seen in the steps of stages pt and sft, not of {run.stage}; remove it"
    if run.partitioned and run.partitioned != FSDP2:
        told = "use plain data parallelism, FSDP2 (fsdp_version: 2), or ZeRO-1 or 2"
        yield f"{key}: needs parameters that keep their shapes, and {run.partitioned} partitions them; {told}"
    if run.optimizer and run.optimizer != "optim: sgd":
        yield (
            f"{key}: an update is split by domain under AdamW and SGD, not under the run's optimizer "
            f"({run.optimizer}); use AdamW"
        )


def _one_reference(dynamic: DynamicConfig) -> Iterator[str]:
    named = {
        f"dynamic.{method.kind}.reference": method.requires.reference.folder
        for method in dynamic.methods
        if method.requires.reference is not None
    }
    if len(set(named.values())) > 1:
        told = ", ".join(f"{key}: {folder}" for key, folder in named.items())
        yield f"{next(iter(named))}: one run has one reference model, but two are named ({told})"


def _stage(method: MethodConfig, needs: Requires, stage: str) -> Iterator[str]:
    where = f"dynamic.{method.kind}: "
    if issubclass(method.cls, Weighter) and not method.cls.neutral and stage not in _CAUSAL:
        yield (
            f"{where}reweighting needs per-token losses of a causal LM, and stage {stage} trains on a loss of "
            "its own; remove the weighter, or train with stage pt or sft"
        )
    elif needs.row_weights is not None and stage not in _CAUSAL:
        yield f"{where}{method.name} gives rows weights, and stage {stage} trains on a loss of its own; use pt or sft"
    elif stage not in needs.stages:
        single = needs.stages == _PAIRS and stage != "rm"
        why = ", whose rows are no pairs of a chosen and a rejected answer" if single else ""
        yield f"{where}{method.name} does not work under stage {stage}{why} (works under: {', '.join(needs.stages)})"
    else:
        for signal in sorted(needs.signals):
            known = _STAGES_OF_SIGNALS.get(signal, (stage,))
            if signal == "rollouts" and stage not in known:
                told = "or give it a 'column' of pass rates" if hasattr(method.params, "column") else ""
                yield (
                    f"{where}{method.name} learns from rewards of answers that the model generates in training, and "
                    f"stage {stage} generates none; use it with TRL's GRPOTrainer or RLOOTrainer (dataflex.wrap)"
                    f"{told and ', '}{told}"
                )
            elif stage not in known:
                yield (
                    f"{where}{method.name} asks for {signal}, which a model under stage {stage} does not give "
                    f"(given under: {', '.join(known)})"
                )


def _domains(dynamic: DynamicConfig, method: MethodConfig, needs: Requires, run: RunFacts) -> Iterator[str]:
    """Yield that a method needs more domains than there are."""
    least = max(needs.domains, 2 if method.kind == "mixer" else 1)
    if run.num_domains is None or least <= run.num_domains:
        return
    lacks = f"dynamic.{method.kind}: {method.name} needs at least {'two' if least == 2 else least} domains"
    way = "list several data sets in 'dataset', or name a 'domain_column'"
    if not dynamic.domains_are_sources:
        keys = ("domain_column", "domain_path", "domain_clusters")
        way = f"every row has the same one by {next(key for key in keys if getattr(dynamic, key) is not None)}"
    elif run.copied:
        yield (
            "tokenized_path: a copy made by LLaMA-Factory alone does not say which data set a row is from, so that all "
            f"rows are one domain, and {lacks}; name a folder that is not there yet to make one that does"
        )
        return
    yield f"{lacks}, found {run.num_domains}; {way}"


def _token_weights(method: MethodConfig, needs: Requires, run: RunFacts) -> Iterator[str]:
    """Yield why weights of turns or tokens cannot be had of these rows."""
    if needs.token_weights is None or run.copied is None:
        return
    level, name = needs.token_weights
    if level == "turn" and run.copied:
        yield (
            f"tokenized_path: a tokenized copy does not keep the {name!r} of messages, which the {method.name} "
            f"{method.kind} reads; remove it, or give it a column of weights and write 'level: token'"
        )
    if level == "token" and not run.copied:
        yield (
            f"dynamic.{method.kind}.level: weights of tokens are read from a tokenized copy; give its "
            "'tokenized_path', or weigh rows or turns"
        )


def _columns(dynamic: DynamicConfig, run: RunFacts) -> Iterator[str]:
    """Yield why data columns, or the paths of files, cannot be loaded with the rows."""
    columns = (*dynamic.columns, *(["domain_path"] if dynamic.domain_path else []))
    if not columns:
        return
    asked = f"'{', '.join(columns)}'"
    if run.packed:
        told = " (pre-training packs unless told otherwise)" if run.stage == "pt" else ""
        yield (
            f"packing: rows hold several samples{told}, so the column {asked} has no single value in a row; "
            "set 'packing: false', or do without the column"
        )
    if run.copied:
        yield (
            f"tokenized_path: a copy made by LLaMA-Factory alone does not keep the column {asked}; name a folder that "
            "is not there yet to make one that does"
        )
    if run.packed or run.copied or run.columns is None:
        return
    for key, name in dynamic.columns_by_key:
        for data_set, known in run.columns.items():
            if name not in known:
                near, found = did_you_mean(name, sorted(known)), ", ".join(sorted(known)) or "none"
                yield f"{key}: the data set {data_set!r} has no column {name!r}{near} (columns found: {found})"


def _pilot(dynamic: DynamicConfig, run: RunFacts) -> Iterator[str]:
    """Yield what the pilot that screens rows requires, as a method that uses gradients does."""
    if dynamic.signals.screen_by != "pilot":
        return
    if run.stage is not None and run.stage not in _CAUSAL:
        yield (
            f"dynamic.signals.screen_by: a pilot looks at gradients, which a model under stage {run.stage} does not "
            "give; use embeddings, or stage pt or sft"
        )
    if run.optimizer not in (None, "", _MUON):
        lacks = _without_moments(run.optimizer)
        yield f"dynamic.signals.screen_by: a pilot {lacks}; use embeddings, or an AdamW optimizer"


def _by_target(method: MethodConfig, needs: Requires) -> Iterator[str]:
    """Yield problems of numbers by target: there must be one for each target."""
    for key, value in needs.by_target.items():
        if value is None:
            continue
        path = f"dynamic.{method.kind}.{key}"
        if method.kind == "selector" and "." in key:
            yield f"{path}: a selector in {key.rpartition('.')[0]} is asked about one target at a time; remove the key"
            continue
        for name in value:
            if name not in method.targets:
                near = did_you_mean(str(name), method.targets)
                yield f"{path}.{name}: no such target{near} (targets: {', '.join(method.targets)})"
        missing = [name for name in method.targets if name not in value]
        if missing:
            yield f"{path}: {', '.join(missing)} missing; name every target"


def _reference(method: MethodConfig, needs: Requires) -> Iterator[str]:
    if needs.reference is None:
        return
    if problem := model_folder_problem(needs.reference.folder):
        yield f"dynamic.{method.kind}.reference: {problem} (the reference model is trained before this run)"


def model_folder_problem(name: str, files: Sequence[str] = _REFERENCE_FILES) -> str:
    """Return why a path is no folder with one of a model's ``files``, or an empty text."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        beside = [each.name for each in folder.parent.iterdir() if each.is_dir()] if folder.parent.is_dir() else []
        return f"no such folder: {name}{did_you_mean(folder.name, beside)}"
    if any((folder / file).is_file() for file in files):
        return ""
    return f"{name} holds no model: none of {', '.join(files)}"


def _score_files(method: MethodConfig, needs: Requires) -> Iterator[str]:
    """Yield files of scores that cannot be read or lack a column."""
    from dataflex.score_table import read_scores, score_column

    for wanted in needs.score_files:
        try:
            score_column(read_scores(Path(wanted.file).expanduser()), wanted)
        except DataError as error:
            yield f"dynamic.{method.kind}: {error}"


def _models(method: MethodConfig, needs: Requires) -> Iterator[str]:
    """Yield models that are neither a folder nor possibly on a hub, and encoders whose package is missing."""
    for key, name in needs.models.items():
        problem = "" if name is None else _model_problem(name)
        if name is not None and not problem and key.rpartition(".")[2] == "encoder":
            described = (Path(name).expanduser() / "modules.json").is_file()
            if described and importlib.util.find_spec("sentence_transformers") is None:
                problem = (
                    f"{name} is a model of sentence-transformers, which is not installed; install the extra: "
                    f"{install('encoders')}"
                )
        if problem:
            yield f"dynamic.{method.kind}.{key}: {problem}"


def _model_problem(name: str) -> str:
    if not name.strip():
        return "is empty; give a model's folder or its name on a hub"
    problem = model_folder_problem(name, _MODEL_FILES)
    if not problem or Path(name).expanduser().is_dir() or not _HUB_ID.fullmatch(name) or name.startswith("."):
        return problem
    if (env_enabled("HF_HUB_OFFLINE") or env_enabled("TRANSFORMERS_OFFLINE")) and not _cached(name):
        return f"{problem}; nor is it in the local cache of the hub, and HF_HUB_OFFLINE is set"
    return ""


def _cached(name: str) -> bool:
    """Return whether a hub's model was downloaded before."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub")
    return (cache / f"models--{name.replace('/', '--')}").is_dir()


_LOADING = {
    "domain_path": "data sets' files are read by LLaMA-Factory's door alone",
    "domain_clusters": "rows are clustered by LLaMA-Factory's door alone",
    "domain_encoder": "rows are clustered by LLaMA-Factory's door alone",
    "eval_by_domain": "evaluation sets are the loop's: give it one for each domain",
    "leakage": "target rows in the training set are told; remove them before",
    "early_stopping_min_delta": "it is LLaMA-Factory's early stopping that is changed; use the loop's own",
}
"""Keys of the block that act while LLaMA-Factory loads data or trains, and what other loops do instead."""


def elsewhere(config: DynamicConfig) -> Iterator[str]:
    """Yield keys of the block that have no effect outside LLaMA-Factory."""
    for each in fields(config):
        if each.name in _LOADING and getattr(config, each.name) != each.default:
            yield f"dynamic.{each.name}: {_LOADING[each.name]}; remove it"
