"""Rules between keys of the ``dynamic`` block: keys that a method needs, and keys that would have no effect.

Keys whose effect depends on LLaMA-Factory's keys are reported by ``check.notes``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields

from dataflex.config.needs import unmet
from dataflex.config.schema import DynamicConfig, MethodConfig, SignalsConfig, block_keys
from dataflex.errors import ConfigError
from dataflex.method import DomainWeighter, Mixer
from dataflex.plan.proportions import Floors, Written, check_numbers, read_proportions
from dataflex.registry import KINDS

_OF_SUBSETS = "keep_ratio repeat exclude_seen max_repeats candidate_batches signals.pool_fraction".split()
"""Keys that have no effect without a selector that leaves rows out."""
_OF_DECISIONS = ("interval_steps", "freeze_gate", "resume_plan", "on_change", "signals.max_age_steps", "signals.store")
"""Keys that have no effect, or would change the training, where a stock run is recorded."""
_OF_MIXERS = ("initial_proportions", "max_epochs", "min_proportion", "unit", "interleave")


def rule_problems(dynamic: DynamicConfig, unread: Collection[str] = ()) -> Iterator[str]:
    """Yield one line per rule that the configuration breaks.

    Args:
        dynamic: The configuration, without the keys that could not be read.
        unread: Those keys; no rule complains that they are missing.
    """
    methods_unread = any(kind in unread for kind in KINDS)
    beside = any(getattr(dynamic, key) is not None or key in unread for key in ("ledger", "average_weights"))
    given = _given(dynamic)
    if not dynamic.methods and not methods_unread and not beside:
        if not dynamic.record and "record" not in unread:
            yield (
                "dynamic: names no method (selector, mixer, orderer or weighter) and no ledger; name one, write "
                "'record: true' to record a stock run, or remove the block"
            )
            return
        yield from _idle(given, _OF_DECISIONS, "in a run that is only recorded;")
        if "seed" in given and dynamic.domain_clusters is None:
            yield from _idle(given, ["seed"], "in a run that is only recorded, where nothing is drawn;")
    else:
        yield from _idle(
            given, ["record"], "here: every run that something is decided or accounted for in is recorded;"
        )
    yield from unmet(dynamic, unread=unread)
    yield from _domain_rules(dynamic, unread)
    if "selector" not in unread:
        yield from _selector_rules(dynamic, given, unread)
    if "mixer" not in unread:
        yield from _mixer_rules(dynamic, given, unread)
    if dynamic.orderer is not None and not methods_unread:
        yield from _orderer_rules(dynamic, dynamic.orderer, unread)
    if not methods_unread:
        yield from _idle_keys(dynamic, given, unread)


def _given(dynamic: DynamicConfig) -> set[str]:
    """Return the keys whose values are not the defaults."""
    signals, usual = dynamic.signals, DynamicConfig()
    return {
        *(key for key in block_keys() if getattr(dynamic, key) != getattr(usual, key)),
        *(f"signals.{f.name}" for f in fields(SignalsConfig) if getattr(signals, f.name) != f.default),
    }


def _idle(given: Collection[str], keys: Collection[str], why: str) -> Iterator[str]:
    return (f"dynamic.{key}: has no effect {why} remove the key" for key in keys if key in given)


def _idle_keys(dynamic: DynamicConfig, given: Collection[str], unread: Collection[str]) -> Iterator[str]:
    """Yield the keys that have no effect with these methods."""
    followers = [
        each
        for each in dynamic.methods
        if (each.warmup_steps is None if each.decides else hasattr(each.params, "warmup_steps"))
    ]
    if "warmup_steps" in given and not followers:
        yield (
            "dynamic.warmup_steps: has no effect without a mixer, an orderer, a weighter, or a selector that leaves "
            "rows out, that has no warmup_steps of its own; remove the key"
        )
    own = [each.every for each in dynamic.methods if each.decides]
    if "interval_steps" in given and own and None not in own:
        yield "dynamic.interval_steps: has no effect, as each method that decides has its own 'every'; remove the key"
    if "interleave" in given and dynamic.mixer is not None and dynamic.selector is not None and dynamic.selects_subset:
        yield (
            f"dynamic.interleave: has no effect beside the {dynamic.selector.name} selector, whose rows fill each "
            f"interval's quotas in random order; remove the key"
        )
    capped = dynamic.mixer is not None and (dynamic.max_epochs is not None or "max_epochs" in unread)
    if "at_cap" in given and not capped:
        yield "dynamic.at_cap: has no effect without a mixer and max_epochs; add what is missing, or remove the key"
    if "signals.store_gb" in given and dynamic.signals.store is None:
        yield "dynamic.signals.store_gb: has no effect without a store; add 'store', or remove the key"
    if dynamic.on_change == "extend" and dynamic.resume_plan == "ignore":
        yield "dynamic.on_change: has no effect with 'resume_plan: ignore', which forgets what was served; remove one"
    if "leakage" in given and not dynamic.targets and "ledger" not in unread:
        yield f"dynamic.leakage: '{dynamic.leakage}' has no effect without targets; remove the key"


def _domain_rules(dynamic: DynamicConfig, unread: Collection[str]) -> Iterator[str]:
    given = [key for key in ("domain_column", "domain_path", "domain_clusters") if getattr(dynamic, key) is not None]
    if len(given) > 1:
        yield f"dynamic.{given[1]}: defines the domains, and so does {given[0]}; remove one of the two"
    clusters, encoder = (
        getattr(dynamic, key) is not None or key in unread for key in ("domain_clusters", "domain_encoder")
    )
    if clusters and not encoder:
        yield "dynamic.domain_encoder: missing; name a model (folder or hub id) whose embeddings are clustered"
    if encoder and not clusters:
        yield "dynamic.domain_encoder: has no effect without domain_clusters; add it, or remove the key"
    if dynamic.domain_path is not None and "*" not in dynamic.domain_path:
        yield f"dynamic.domain_path: {dynamic.domain_path!r} has no '*' that could match a domain's name"


def _selector_rules(dynamic: DynamicConfig, given: Collection[str], unread: Collection[str]) -> Iterator[str]:
    selector, mixer = dynamic.selector, dynamic.mixer
    screened = "signals.screen_fraction" in given
    if "signals.screen_by" in given and not screened:
        yield "dynamic.signals.screen_by: has no effect without screen_fraction below 1; add one, or remove the key"
    for key in ("signals.explore", "signals.explore_by"):
        if key in given and dynamic.signals.budget is None:
            yield f"dynamic.{key}: has no effect without budget; add one, or remove the key"
    asked = "in_run_scores" in dynamic.requires.signals or any(kind in unread for kind in KINDS)
    if "signals.in_run_rank" in given and not asked:
        yield "dynamic.signals.in_run_rank: no method asks for scores of training steps; remove the key"
    if selector is None:
        yield from _idle(given, (*_OF_SUBSETS, "signals.screen_fraction"), "without a selector; add one, or")
        return
    if screened and not selector.targets:
        yield (
            "dynamic.signals.screen_fraction: rows are screened by their similarity to targets, and the "
            f"{selector.name} selector has none; remove the key, or use a selector with targets"
        )
    if not dynamic.selects_subset:
        yield from _idle(given, _OF_SUBSETS, f"with the {selector.name} selector, which keeps every row;")
        return
    if dynamic.exclude_seen and mixer is not None:
        yield (
            "dynamic.exclude_seen: does not work with a mixer: a domain without unseen rows could not fill its quota; "
            "remove one of the two (a mixer alone serves every row of a domain once before any twice)"
        )
    if dynamic.candidate_batches is not None:
        yield from _candidate_rules(dynamic, selector, given)
    for key in ("exclude_seen", "candidate_batches"):
        if key in given and getattr(selector.params, "checkpoints", 1) > 1:
            yield (
                f"dynamic.{key}: the {selector.name} selector averages scores of several intervals over the same rows; "
                f"set checkpoints to 1, or remove {key}"
            )
    if mixer is not None and dynamic.keep_ratio is None and "keep_ratio" not in unread:
        yield (
            f"dynamic.keep_ratio: missing; beside a mixer, the {selector.name} selector narrows the pool that the "
            f"{mixer.name} mixer draws from, so set the share of the rows that is kept (0 < keep_ratio <= 1)"
        )


def _candidate_rules(dynamic: DynamicConfig, selector: MethodConfig, given: Collection[str]) -> Iterator[str]:
    key = "dynamic.candidate_batches"
    if dynamic.every(selector) is None and not selector.requires.needs_interval:  # else it is told already
        yield f"{key}: candidates are those of an interval, so interval_steps must be given (for example 1)"
    if dynamic.mixer is not None:
        yield f"{key}: does not work with a mixer: a batch of candidates may not fill its quotas; remove one of the two"
    for other in ("exclude_seen", "signals.pool_fraction", "signals.screen_fraction"):
        if other in given:
            told = f"defines the rows that the {selector.name} selector chooses from, and so does {other}"
            yield f"{key}: {told}; remove one of the two"


def _mixer_rules(dynamic: DynamicConfig, given: Collection[str], unread: Collection[str]) -> Iterator[str]:
    mixer, weighter, selector = dynamic.mixer, dynamic.weighter, dynamic.selector
    if mixer is None:
        yield from _idle(given, _OF_MIXERS, "without a mixer; add one, or")
        return
    if dynamic.min_proportion is not None:
        yield from _floor_rules(dynamic.min_proportion, mixer)
    method = mixer.build()
    assert isinstance(method, Mixer)
    if isinstance(method, DomainWeighter):
        if weighter is not None and not getattr(weighter.cls, "neutral", False) and method.loss_normalizer == "domain":
            way = "set its 'normalizer: weight_sum', or use" if hasattr(mixer.params, "normalizer") else "use"
            yield (
                f"dynamic.weighter: the {mixer.name} mixer's loss is a weighted sum of domains' mean losses, "
                f"which leaves no place for the {weighter.name} weighter; {way} one of the two methods"
            )
        if dynamic.max_epochs is not None:
            yield (
                f"dynamic.max_epochs: the {mixer.name} mixer corrects its weights by the proportions that it "
                "samples in, which a cap would change; remove it"
            )
    if dynamic.max_epochs is not None and selector is not None and dynamic.selects_subset:
        yield (
            f"dynamic.max_epochs: has no effect beside the {selector.name} selector, which decides anew in "
            "every interval what is served; remove one of the two"
        )
    if dynamic.initial_proportions is not None:
        try:
            check_numbers(dynamic.initial_proportions, "dynamic.initial_proportions")
        except ValueError as error:
            yield str(error)
        if dynamic.warmup("mixer") == 0 and "warmup_steps" not in unread:
            yield (
                "dynamic.initial_proportions: hold during warm-up, and warmup_steps is 0; set warmup_steps, or "
                "remove the key"
            )


def _orderer_rules(dynamic: DynamicConfig, orderer: MethodConfig, unread: Collection[str]) -> Iterator[str]:
    """Yield why rows cannot be put in order, or why their order would not matter."""
    key, selector, name = "dynamic.orderer", dynamic.selector, orderer.name
    if selector is not None and dynamic.selects_subset:
        if dynamic.every(selector) == 1:
            yield (
                f"{key}: has no effect where the {selector.name} selector chooses the rows of one step: they are "
                "summed up in any order; let the selector decide less often, or remove the orderer"
            )
        if dynamic.paces:
            yield (
                f"{key}: {name} says which rows are available, and so does the {selector.name} selector; remove one of "
                "the two"
            )
    elif dynamic.paces and dynamic.mixer is not None and dynamic.every(orderer) is None:
        if "interval_steps" not in unread and not orderer.requires.needs_interval:
            yield (
                f"dynamic.interval_steps: missing; beside a mixer, {name} makes more rows available at each decision, "
                "so say after how many optimizer steps (for example 'interval_steps: 100')"
            )


def _floor_rules(floors: Floors, mixer: MethodConfig) -> Iterator[str]:
    key = "dynamic.min_proportion"
    if issubclass(mixer.cls, DomainWeighter):
        yield (
            f"{key}: the {mixer.name} mixer serves the domains as its 'sampling' says and moves their weights in the "
            f"loss, whose floor is 'smoothing' / number of domains; set these, or remove the key"
        )
        return
    if isinstance(floors, Mapping):
        total = math.fsum(floors.values())
        if total > 1.0 + 1e-9:
            yield f"{key}: the floors sum to {total:.6g}, and proportions to 1; lower them"
    for place, written in _written_proportions(mixer.params):
        items = written.items() if isinstance(written, Mapping) else ((str(i), n) for i, n in enumerate(written))
        for name, number in items:
            floor = floors.get(name) if isinstance(floors, Mapping) else floors
            if number == 0 and floor is not None:
                yield (
                    f"{key}: dynamic.mixer.{place} says 0 for {name}, which means never, and so it cannot have a floor "
                    f"of {floor:g}; give floors by name and leave it out"
                )
                return


def _written_proportions(params: object) -> Iterator[tuple[str, Written]]:
    """Yield place and values of the proportions among a mixer's parameters, and of the file that they name."""
    for place in ("proportions", "initial"):
        written = getattr(params, place, None)
        if isinstance(written, dict | tuple):
            yield place, written
    for i, stage in enumerate(getattr(params, "stages", ())):
        yield f"stages[{i}].proportions", stage.proportions
    file = getattr(params, "from_file", None)
    if file is not None:
        with suppress(ConfigError):  # one that cannot be read is told where it is needed
            yield f"from ({file})", read_proportions(file).by_name
