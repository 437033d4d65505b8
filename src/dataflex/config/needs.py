"""What methods require, against what a run has: the one place that enforces ``Requires``, for every kind of method."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from dataflex.config.args import LlamaFactoryArgs, env_enabled
from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.errors import did_you_mean
from dataflex.method import Requires, RunFacts, Weighter

_NO_MOMENTS: tuple[str, ...] = (
    "adafactor",
    "adagrad",
    "ademamix",
    "apollo",
    "badam",
    "galore",
    "lion",
    "lomo",
    "muon",
    "rmsprop",
    "schedule_free",
    "sgd",
    "stable_adamw",
)
_MOMENT_FLAGS: tuple[str, ...] = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")
_PRECONDITIONS: tuple[str, ...] = ("true_adam", "paper_repo", "adam_scale")

_CAUSAL = ("pt", "sft")
_STAGES_OF_SIGNALS: dict[str, tuple[str, ...]] = {
    "losses": ("pt", "sft", "dpo", "kto"),
    "gradients": _CAUSAL,
    "logits": _CAUSAL,
    "generate": _CAUSAL,
    "gates": _CAUSAL,
}
_TAKERS: dict[str, tuple[str, ...]] = {
    "needs_interval": ("selector", "mixer"),
    "within_batch": ("selector",),
    "reference": ("mixer", "weighter"),
    "pure_micro_batches": ("mixer",),
    "embedding": ("weighter",),
    "entropy": ("weighter",),
}
"""Fields of ``Requires`` that only methods of these kinds are given."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_DESCRIPTIONS = ("config.json", "adapter_config.json", "modules.json")


def unmet(
    dynamic: DynamicConfig, run: RunFacts | None = None, *, unread: Collection[str] = (), models: bool = False
) -> Iterator[str]:
    """Yield what the methods require and the run does not have, one line each.

    Args:
        dynamic: The methods, and the block that they stand in.
        run: What is known of the run beside the block, and is to be held against it; None for the block itself.
        unread: Keys of the block that could not be read; no line says that they are missing.
        models: Whether other models must be there already.
    """
    for method in dynamic.methods:
        needs = method.requires
        if run is None:
            yield from _kind(method, needs)
            yield from _block(dynamic, method, needs, unread)
            continue
        if run.stage is not None:
            yield from _stage(method, needs, run.stage)
        if run.partitioned and needs.whole_parameters:
            yield (
                f"dynamic.{method.kind}: {method.name} does not work with partitioned parameters ({run.partitioned}); "
                "use DeepSpeed ZeRO-2 or less, or plain data parallelism"
            )
        if run.optimizer:
            yield from _moments(method, needs, run.optimizer)
        if run.num_domains is not None:
            yield from too_few_domains(dynamic, method, run.num_domains)
        if models:
            yield from _models(method, needs)
            yield from _by_target(method, needs)
        for problem in method.build().check(run):
            yield f"dynamic.{method.kind}{'.' if problem.key else ''}{problem.key}: {problem.text}"
    if run is None:
        yield from _references(dynamic)
    elif dynamic.signals.screen_by == "pilot":
        if run.stage is not None and run.stage not in _CAUSAL:
            yield (
                f"dynamic.signals.screen_by: a pilot looks at gradients, which there are none of under stage "
                f"{run.stage}; use embeddings, or stage pt or sft"
            )
        if run.optimizer:
            yield f"dynamic.signals.screen_by: a pilot {_without(run.optimizer)}; use embeddings, or an AdamW optimizer"


def _kind(method: MethodConfig, needs: Requires) -> Iterator[str]:
    """Yield what methods of this kind are never given."""
    usual = Requires()
    for name, kinds in _TAKERS.items():
        if method.kind not in kinds and getattr(needs, name) != getattr(usual, name):
            yield (
                f"dynamic.{method.kind}: {method.name} requires {name}, which only a {' or a '.join(kinds)} is given; "
                "leave it out of requires()"
            )


def _block(dynamic: DynamicConfig, method: MethodConfig, needs: Requires, unread: Collection[str]) -> Iterator[str]:
    """Yield keys of the block that are missing or contradict what is required."""
    if needs.needs_interval and dynamic.interval_steps is None and "interval_steps" not in unread:
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
    selector = dynamic.selector
    if needs.pure_micro_batches and selector is not None and dynamic.narrows:
        yield (
            f"dynamic.{method.kind}: {method.name} wants micro-batches of one domain each, which the {selector.name} "
            "selector cannot give; use one of the two"
        )


def _references(dynamic: DynamicConfig) -> Iterator[str]:
    """Yield that two methods name different reference models, since a run loads one."""
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
    elif stage not in needs.stages:
        yield f"{where}{method.name} does not work under stage {stage} (works under: {', '.join(needs.stages)})"
    else:
        for signal in sorted(needs.signals):
            known = _STAGES_OF_SIGNALS.get(signal)
            if known is not None and stage not in known:
                yield (
                    f"{where}{method.name} asks for {signal}, which there are none of under stage {stage} "
                    f"(there are under: {', '.join(known)})"
                )


def too_few_domains(dynamic: DynamicConfig, method: MethodConfig, found: int, *, copied: bool = False) -> Iterator[str]:
    """Yield that a method needs more domains than there are.

    Args:
        dynamic: What the domains are.
        method: The method.
        found: Number of domains.
        copied: Whether the data sets are one because they come from a tokenized copy.
    """
    least = max(method.requires.domains, 2 if method.kind == "mixer" else 1)
    if least <= found:
        return
    needs = f"{method.name} needs at least {'two' if least == 2 else least} domains"
    if copied:
        yield (
            "tokenized_path: a tokenized copy does not say which data set a row is from, so that all rows are one "
            f"domain, and dynamic.{method.kind}: {needs}; remove it"
        )
        return
    way = "list several data sets in 'dataset', or name a 'domain_column'"
    if not dynamic.domains_are_sources:
        keys = ("domain_column", "domain_path", "domain_clusters")
        way = f"every row has the same one by {next(key for key in keys if getattr(dynamic, key) is not None)}"
    yield f"dynamic.{method.kind}: {needs}, found {found}; {way}"


def optimizer_without_moments(lf: LlamaFactoryArgs) -> str:
    """Return the key and value that name an optimizer without Adam's moments, or an empty text."""
    name = lf.optim or "adamw_torch"
    flag = next((flag for flag in _MOMENT_FLAGS if lf.on(flag)), "")
    return flag or (f"optim: {name}" if any(word in name for word in _NO_MOMENTS) else "")


def wants_moments(needs: Requires) -> Iterator[tuple[str, str]]:
    """Yield parameter and value of each precondition that is made from the moments of the run's optimizer."""
    return ((key, value) for key, value in needs.preconditions.items() if value in _PRECONDITIONS)


def _without(optimizer: str) -> str:
    return f"needs Adam's moments for each element, which the run's optimizer ({optimizer}) does not keep"


def _moments(method: MethodConfig, needs: Requires, optimizer: str) -> Iterator[str]:
    for key, value in wants_moments(needs):
        yield (
            f"dynamic.{method.kind}.{key}: {value} {_without(optimizer)}; write 'precondition: none' or 'sign', or use "
            "an AdamW optimizer"
        )


def _by_target(method: MethodConfig, needs: Requires) -> Iterator[str]:
    """Yield what is wrong with numbers by target: they are for all targets and no others."""
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


def _models(method: MethodConfig, needs: Requires) -> Iterator[str]:
    """Yield the models that are neither a folder nor, perhaps, on a hub; and encoders whose package is missing."""
    if needs.reference is not None:
        folder = needs.reference.folder
        key, path = f"dynamic.{method.kind}.reference", Path(folder).expanduser()
        if not path.is_dir():
            near = did_you_mean(path.name, _folders_beside(path))
            yield f"{key}: no such folder: {folder}{near} (the reference model is trained before this run)"
        elif not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            yield f"{key}: {folder} holds no model (neither config.json nor adapter_config.json)"
    for key, name in needs.models.items():
        if name is None:
            continue
        problem = _model_problem(name) or (_package_problem(name) if key.rpartition(".")[2] == "encoder" else "")
        if problem:
            yield f"dynamic.{method.kind}.{key}: {problem}"


def _folders_beside(path: Path) -> list[str]:
    return [each.name for each in path.parent.iterdir() if each.is_dir()] if path.parent.is_dir() else []


def _model_problem(name: str) -> str:
    if not name.strip():
        return "is empty; give a model's folder or its name on a hub"
    folder = Path(name).expanduser()
    if folder.is_dir():
        if any((folder / file).is_file() for file in _DESCRIPTIONS):
            return ""
        return f"{name} holds no model (none of {', '.join(_DESCRIPTIONS)})"
    near = did_you_mean(folder.name, _folders_beside(folder))
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        return f"no such folder: {name}{near}"
    if (env_enabled("HF_HUB_OFFLINE") or env_enabled("TRANSFORMERS_OFFLINE")) and not _cached(name):
        return f"no such folder: {name}{near}; nor is it in the local cache of the hub, and HF_HUB_OFFLINE is set"
    return ""


def _package_problem(name: str) -> str:
    if not (Path(name).expanduser() / "modules.json").is_file():
        return ""
    if importlib.util.find_spec("sentence_transformers") is not None:
        return ""
    return (
        f"{name} is a model of sentence-transformers, which is not installed; install the extra: "
        "pip install 'dataflex[encoders]'"
    )


def _cached(name: str) -> bool:
    """Return whether a hub's model was downloaded before."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub")
    return (cache / f"models--{name.replace('/', '--')}").is_dir()
