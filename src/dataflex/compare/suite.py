"""Reads a suite: a base configuration, arms that change it, seeds, budgets, evaluations, and claims fixed beforehand.

Everything is checked before anything trains; each arm by the checks of ``dataflex plan``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataflex.config.args import data_set_names
from dataflex.config.copies import SETTINGS
from dataflex.config.load import load_mapping
from dataflex.config.mappings import shown, values
from dataflex.config.resuming import TOKENIZES
from dataflex.config.split import Split, resolve
from dataflex.errors import ConfigError, did_you_mean
from dataflex.method import param
from dataflex.mixing.runs import configuration
from dataflex.offline.evaluation import eval_request
from dataflex.printable import file_name_problem
from dataflex.rng import stream

AT = ("steps", "compute")
BETTER = ("less", "more")
_OURS = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "seed", "max_steps", "num_train_epochs")
_SAME = (
    *SETTINGS,
    *TOKENIZES,
    *(
        "eval_dataset dataset_dir media_dir tokenized_path eval_on_start eval_strategy eval_steps do_eval "
        "eval_on_each_dataset per_device_eval_batch_size compute_accuracy predict_with_generate logging_steps "
        "bf16_full_eval fp16_full_eval "
        "tokenizer_path tokenizer_name add_tokens add_special_tokens resize_vocab use_fast_tokenizer "
        "split_special_tokens"
    ).split(),
)
"""Keys that decide what is measured, or what a token is: no arm may have others than the base."""
_OF_THE_SPLIT = "dataset mix_strategy interleave_probs streaming buffer_size".split()
"""Keys that decide which rows ``val_size`` holds out."""
_OF_THE_LOSS = (
    "label_smoothing_factor use_dft_loss use_asft_loss use_eaft_loss asft_alpha moe_aux_loss_coef pref_loss pref_beta "
    "pref_bco_weight pref_ftx simpo_gamma dpo_label_smoothing kto_chosen_weight kto_rejected_weight ref_model "
    "ref_model_adapters ref_model_quantization_bit"
).split()
"""Keys that decide which loss is trained on, and with it what the Trainer's own evaluation measures."""

_SCHEDULE = ("lr_scheduler_type", "warmup_ratio", "warmup_steps")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What is claimed beforehand about an arm."""

    claim: str = param(help="the claim, as a sentence")
    arm: str = param(help="the arm that it is about")
    metric: str = param(help="name of a metric")
    better: str = param(help="which values are better", choices=BETTER)
    than: str | None = param(None, help="the arm that it is compared with; the baseline if not given")
    at: str = param("steps", help="what is equal", choices=AT)
    by: float = param(0.0, help="how much better at least, in the metric's unit; below 0: how much worse at most")
    alpha: float = param(0.05, help="level of the test", above=0.0, maximum=0.5)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What ``dataflex eval`` is asked of every run's model."""

    data: str | None = param(None, help="data sets")
    choices: str | None = param(None, help="files of questions with choices")
    length: str = param("mean", help="what choices are compared by")
    answers: str | None = param(None, help="files of questions with answers")
    max_new_tokens: int = param(256, help="longest generated answer", minimum=1)
    after: str = param("", help="mark that the compared part of an answer follows")
    mix: str | None = param(None, help="shares of domains")
    tasks: str | None = param(None, help="task files of lm-eval")

    def options(self) -> list[str]:
        """Return the command's options."""
        given = {key.replace("_", "-"): value for key, value in vars(self).items() if value not in (None, "")}
        return [part for key, value in given.items() for part in (f"--{key}", str(value))]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of a suite, those of blocks excluded."""

    suite: str = param(help="its name")
    about: str = param("", help="what it asks, in a sentence")
    baseline: str | None = param(None, help="the arm that others are compared with; the first if not given")
    steps: int | None = param(None, help="optimizer steps of every arm; the base's max_steps if not given", minimum=1)
    baseline_steps: tuple[int, ...] = param((), help="further numbers of steps that the baseline is trained for")
    metrics: tuple[str, ...] = param((), help="metrics that the tables show; those found if not given")
    out: str | None = param(None, help="folder of the suite's runs; runs/compare/SUITE if not given")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of a suite."""

    arm: str
    seed: int
    steps: int
    mapping: Mapping[str, Any]  # configuration, without output_dir
    parts: Split

    @property
    def title(self) -> str:
        """How it is told of."""
        return f"{self.arm}, {self.steps} steps, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A suite that was checked."""

    settings: Settings
    path: Path
    overrides: tuple[str, ...]
    out: Path
    arms: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    steps: int
    baseline: str
    evaluation: Evaluation | None
    claims: tuple[Claim, ...]
    runs: tuple[Run, ...]
    constant: bool  # whether the learning rate does not depend on the number of steps
    notes: tuple[str, ...] = field(default=())

    @property
    def lengths(self) -> tuple[int, ...]:
        """Numbers of steps that the baseline is trained for."""
        return tuple(sorted({self.steps, *self.settings.baseline_steps}))


def read_suite(path: Path, overrides: Sequence[str] = (), *, work: Path) -> Suite:
    """Read and check a suite.

    Args:
        path: A YAML or JSON file.
        overrides: ``key=value`` texts over the suite's keys.
        work: An empty folder for what the check of the evaluation writes.

    Raises:
        ConfigError: All problems of the suite and of every arm.
    """
    mapping = load_mapping(path, overrides)
    problems: list[str] = []
    blocks = ("base", "arms", "seeds", "evaluate", "protocol")
    given = values(Settings, mapping, "", problems, subject="a suite", extra=blocks)
    settings = Settings(**{"suite": "", **given})
    if "suite" in given and (told := file_name_problem(settings.suite)):
        problems.append(f"suite: the name {told}")
    base, base_dir = base_of(mapping.get("base"), path, problems)
    if not base:
        raise ConfigError(problems)  # all that follows would be told of keys that the base has
    arms = _arms(mapping.get("arms"), problems)
    seeds = _seeds(mapping.get("seeds"), problems)
    steps = settings.steps or base.get("max_steps")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        if mapping.get("steps") is None:
            problems.append("steps: missing; the number of optimizer steps of every arm (or max_steps in the base)")
        steps = 1
    baseline = settings.baseline or next(iter(arms), "")
    if arms and baseline not in arms:
        problems.append(f"baseline: no arm {baseline!r}{did_you_mean(baseline, list(arms))} (arms: {', '.join(arms)})")
    evaluation = None
    if mapping.get("evaluate") is not None:
        known = values(Evaluation, mapping["evaluate"], "evaluate", problems)
        evaluation = Evaluation(**known)
    measures = _measures(base, mapping.get("evaluate"))
    claims = _claims(mapping.get("protocol"), arms, baseline, measures, problems)
    for at, metric in enumerate(settings.metrics):
        if told := _unmeasured(metric, measures):
            problems.append(f"metrics[{at}]: {told}")
    problems += _comparable(base, arms)
    runs: list[Run] = []
    for arm, patch in arms.items():
        lengths = {steps, *(settings.baseline_steps if arm == baseline else ())}
        for length in sorted(lengths):
            given = {**_evaluating(base, steps), **patched(base, patch), "max_steps": length}
            runs += _resolved(arm, given, seeds, base_dir, problems)
    if evaluation is not None and runs and not problems:
        problems += _evaluation_problems(runs[0], evaluation, work)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return Suite(
        settings=settings,
        path=path,
        overrides=tuple(overrides),
        out=Path(settings.out or f"runs/compare/{settings.suite}"),
        arms=arms,
        seeds=seeds,
        steps=steps,
        baseline=baseline,
        evaluation=evaluation,
        claims=claims,
        runs=tuple(runs),
        constant=_constant(base) and not any(key in patch for patch in arms.values() for key in _SCHEDULE),
        notes=tuple(_stated(arms, runs)),
    )


def _constant(base: Mapping[str, Any]) -> bool:
    """Whether the learning rate at a step does not depend on the number of steps."""
    schedule, steps = base.get("lr_scheduler_type", "cosine"), base.get("warmup_steps") or 0
    whole = not base.get("warmup_ratio") and isinstance(steps, int | float) and float(steps).is_integer()
    return schedule == "constant" or (schedule == "constant_with_warmup" and whole)


def base_of(found: Any, path: Path, problems: list[str]) -> tuple[dict[str, Any], Path]:
    """Return the base configuration and the folder that its plugins are looked for in."""
    if isinstance(found, str):
        file = path.parent / found
        try:
            return load_mapping(file), file.resolve().parent
        except ConfigError as error:
            problems += [f"base: {problem}" for problem in error.problems]
            return {}, path.resolve().parent
    if not isinstance(found, Mapping) or not found:
        told = "missing" if found is None else f"expected a configuration or the path of one, found {shown(found)}"
        problems.append(f"base: {told}")
        found = {}
    return dict(found), path.resolve().parent


def _arms(found: Any, problems: list[str]) -> dict[str, Mapping[str, Any]]:
    if not isinstance(found, Mapping) or len(found) < 2:
        problems.append("arms: expected two or more, each a name and the keys that it changes ({} for none)")
        return {}
    arms: dict[str, Mapping[str, Any]] = {}
    for name, patch in found.items():
        if told := file_name_problem(name):
            problems.append(f"arms: the name {shown(name)} {told}")
        elif patch is not None and not isinstance(patch, Mapping):
            problems.append(f"arms.{name}: expected keys and values, found {shown(patch)}")
        else:
            arms[str(name)] = patch or {}
    return arms


def _seeds(found: Any, problems: list[str]) -> tuple[int, ...]:
    seeds = list(range(1, found + 1)) if type(found) is int and found > 0 else found
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        problems.append(f"seeds: expected a list of integers from 0 on, or how many, found {shown(found)}")
        return ()
    if len(set(seeds)) < len(seeds):
        problems.append("seeds: one is named twice")
    return tuple(seeds)


def _unmeasured(metric: str, measures: Mapping[str, str]) -> str:
    """Return why no run will have a metric, or ""; ``measures`` says why where there is no such evaluation."""
    kind = metric if metric in measures else metric.partition("/")[0]
    if kind not in measures and not (metric.startswith("eval_") and measures.get("eval_...") == ""):
        return f"unknown {metric!r}{did_you_mean(kind, list(measures))} (known: {', '.join(measures)})"
    return f"{metric} {measures[kind]}" if measures.get(kind) else ""


def _measures(base: Mapping[str, Any], evaluation: Any) -> dict[str, str]:
    """Return the names of metrics, and why there is none of that name in this suite."""
    asked = evaluation if isinstance(evaluation, Mapping) else {}
    trainer = "" if base.get("eval_dataset") is not None or base.get("val_size") else "needs eval_dataset in the base"
    parts = {"data": ("loss", "macro_loss", "domain_loss"), "mix": ("mix_loss",), "answers": ("exact_match",)}
    parts |= {"choices": ("accuracy", "margin", "bits_per_byte"), "tasks": ("task",)}
    found = {name: "" if asked.get(key) else f"needs evaluate.{key}" for key, names in parts.items() for name in names}
    found |= dict.fromkeys(("eval_loss", "eval_token_loss", "eval_perplexity"), trainer)
    sets = data_set_names(base.get("eval_dataset"))
    block = base.get("dynamic")
    by_domain = isinstance(block, Mapping) and block.get("eval_by_domain")
    if len(sets) > 1:
        held = ["eval_macro_loss", "eval_micro_loss", "eval_macro_perplexity", "eval_micro_perplexity"]
        held += [f"eval_{name}_{what}" for name in sets for what in ("loss", "token_loss", "perplexity")]
        each = by_domain or base.get("eval_on_each_dataset")
        told = "needs eval_on_each_dataset: true in the base, which evaluates its sets as one"
        found |= dict.fromkeys(held, "" if each else told)
    others = base.get("stage", "sft") not in ("sft", "pt") or by_domain
    others = others or base.get("compute_accuracy") or base.get("predict_with_generate")
    return {**found, **({"eval_...": trainer} if others else {})}


def _claims(
    found: Any, arms: Mapping[str, Any], baseline: str, measures: Mapping[str, str], problems: list[str]
) -> tuple[Claim, ...]:
    claims: list[Claim] = []
    if found is not None and not isinstance(found, list):
        problems.append(f"protocol: expected a list of claims, found {shown(found)}")
        return ()
    for at, block in enumerate(found or ()):
        before, path = len(problems), f"protocol[{at}]"
        given = values(Claim, block, path, problems)
        for key in ("arm", "than"):
            name = given.get(key)
            if name is not None and name not in arms:
                problems.append(f"{path}.{key}: no arm {name!r}{did_you_mean(name, list(arms))}")
        if given.get("arm") is not None and given["arm"] == (given.get("than") or baseline):
            problems.append(f"{path}.arm: {given['arm']} is compared with itself")
        if "metric" in given and (told := _unmeasured(given["metric"], measures)):
            problems.append(f"{path}.metric: {told}")
        if len(problems) == before:
            claims.append(Claim(**given))
    return tuple(claims)


def _comparable(base: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield keys by which arms would differ in what is measured."""
    for arm, patch in arms.items():
        for key in dict.fromkeys(str(key).split(".")[0] for key in patch):
            if key in _OURS:
                yield f"arms.{arm}.{key}: set by the suite for every arm (seeds, steps, out); remove it"
            elif key in _SAME:
                yield f"arms.{arm}.{key}: decides what is measured, which must be equal in all arms; set it in the base"
            elif key in _OF_THE_SPLIT and base.get("val_size"):
                yield (
                    f"arms.{arm}.{key}: decides what is measured, since the base's val_size holds out a part of the "
                    "training data; give the base an eval_dataset in its place"
                )


def _stated(arms: Mapping[str, Mapping[str, Any]], runs: Sequence[Run]) -> Iterator[str]:
    """Yield what a reader must know about arms that differ in more than their methods."""
    seen: dict[str, str] = {}
    for arm, patch in arms.items():
        changed = [key for key in dict.fromkeys(str(key).split(".")[0] for key in patch) if key != "dynamic"]
        if changed:
            yield f"{arm} differs from the base beyond its dynamic block: {', '.join(changed)}"
        if other := [key for key in changed if key in _OF_THE_LOSS]:
            yield f"the Trainer's eval_loss of {arm} is another one than the base's ({', '.join(other)}); ask evaluate"
        mapping = next((dict(run.mapping) for run in runs if run.arm == arm), {})
        mapping.pop("run_name", None)
        text = json.dumps(mapping, sort_keys=True, default=str)
        if text in seen:
            yield f"{arm} and {seen[text]} are the same configuration, so that their runs are equal seed by seed"
        seen.setdefault(text, arm)


def patched(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the keys of ``patch`` replaced; dotted keys reach into blocks, null removes a key."""
    found: dict[str, Any] = json.loads(json.dumps(base, default=str))
    for path, value in patch.items():
        *blocks, key = str(path).split(".")
        inside = found
        for block in blocks:
            if not isinstance(inside.get(block), dict):
                inside[block] = {"name": inside[block]} if isinstance(inside.get(block), str) else {}
            inside = inside[block]
        if value is None:
            inside.pop(key, None)
        else:
            inside[key] = value
    return found


def _evaluating(base: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return the keys by which a run with held-out data is evaluated ten times, unless the base says when."""
    found: dict[str, Any] = {"save_strategy": "no"}
    evaluates = base.get("eval_dataset") is not None or base.get("val_size")
    if evaluates and not {"eval_strategy", "evaluation_strategy"} & base.keys():
        every = max(steps // 10, 1)
        found |= {"do_eval": True, "eval_on_start": True, "eval_strategy": "steps", "eval_steps": every}
        found |= {"logging_steps": every}  # where passes are recorded
    return found


def _resolved(
    arm: str, mapping: dict[str, Any], seeds: Sequence[int], base_dir: Path, problems: list[str]
) -> Iterator[Run]:
    """Yield the runs of an arm, checked."""
    mapping = {key: value for key, value in mapping.items() if key != "num_train_epochs"}
    if mapping.get("dynamic") is None:
        mapping["dynamic"] = {"record": True}  # recorded, and otherwise LLaMA-Factory's own run
    try:
        parts = resolve({**mapping, "output_dir": "unused"}, base_dir, check_stock=True)
    except ConfigError as error:
        problems += [f"arms.{arm}: {problem}" for problem in error.problems]
        return
    assert parts.dynamic is not None
    plugins = parts.dynamic.plugins
    for seed in seeds:
        given = {**mapping, "seed": seed, **_drawn(mapping, ("data_seed",), seed)}
        block = {**mapping["dynamic"], **_drawn(mapping["dynamic"], ("seed",), seed)}
        whole = configuration(given, Path(), f"{arm}-{seed}", block, plugins)
        whole.pop("output_dir")
        yield Run(arm=arm, seed=seed, steps=mapping["max_steps"], mapping=whole, parts=parts)


def _drawn(block: Mapping[str, Any], keys: Sequence[str], seed: int) -> dict[str, int]:
    """Return seeds of draws, which are others for each of the suite's: else its runs would be the same one again."""
    found = {key: block[key] for key in keys if block.get(key) is not None}
    return {key: int(stream(value, "suite", seed).integers(1 << 31)) for key, value in found.items()}


ADAPTS = ("lora", "oft")


def trained_model(mapping: Mapping[str, Any], folder: Path | str) -> list[str]:
    """Return the ``key=value`` texts by which the model that a run left in ``folder`` is loaded.

    LLaMA-Factory trains the last adapter of ``adapter_name_or_path`` further, or with ``create_new_adapter`` a new one;
    the others are part of the model that it is trained on, and are no part of what it saves.
    """
    kind = mapping.get("finetuning_type", "lora")
    if kind in ADAPTS:
        before = data_set_names(mapping.get("adapter_name_or_path"))
        kept = before if mapping.get("create_new_adapter") else before[:-1]
        new = ["create_new_adapter=false"] if mapping.get("create_new_adapter") else []
        return [f"adapter_name_or_path={','.join([*kept, str(folder)])}", *new]
    # All parameters are saved, of those that were frozen too.
    whole = ["finetuning_type=full", "use_llama_pro=false"] if kind == "freeze" else []
    return [f"model_name_or_path={folder}", *whole]


def _evaluation_problems(run: Run, evaluation: Evaluation, work: Path) -> list[str]:
    """Return what is wrong with the evaluation of the runs' models."""
    file, model = work / "run.json", work / "adapter"
    file.write_text(json.dumps({**run.mapping, "output_dir": str(work / "never")}), encoding="utf-8")
    if run.mapping.get("finetuning_type", "lora") not in ADAPTS:
        model = run.mapping.get("model_name_or_path") or model
    try:
        eval_request(str(file), trained_model(run.mapping, model), work=work, **vars(evaluation))
    except ConfigError as error:
        return [f"evaluate.{problem.removeprefix('--')}" for problem in error.problems]
    return []
