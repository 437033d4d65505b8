"""Rules between keys of the ``dynamic`` block: what a method needs beside it, and what would have no effect."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

from dataflex.config.idle import idle_keys
from dataflex.config.needs import unmet
from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.method import DomainWeighter, Mixer, Selector
from dataflex.plan.proportions import Floors, Written, check_numbers
from dataflex.registry import KINDS


def rule_problems(dynamic: DynamicConfig, unread: Collection[str] = ()) -> Iterator[str]:
    """Yield one line per rule that the configuration breaks.

    Args:
        dynamic: The configuration, without the keys that could not be read.
        unread: Those keys; no rule complains that they are missing.
    """
    if not dynamic.methods and not any(kind in unread for kind in KINDS):
        yield "dynamic: names no method (selector, mixer or weighter); name one, or remove the block"
        return
    yield from unmet(dynamic, unread=unread)
    yield from _domain_rules(dynamic)
    if "selector" not in unread:
        yield from _selector_rules(dynamic, unread)
    if "mixer" not in unread:
        yield from _mixer_rules(dynamic, unread)
    yield from idle_keys(dynamic, unread)
    if dynamic.leakage != "warn" and not dynamic.targets and not any(kind in unread for kind in KINDS):
        yield f"dynamic.leakage: '{dynamic.leakage}' has no effect without targets; remove the key"


def _domain_rules(dynamic: DynamicConfig) -> Iterator[str]:
    given = [key for key in ("domain_column", "domain_path", "domain_clusters") if getattr(dynamic, key) is not None]
    if len(given) > 1:
        yield f"dynamic.{given[1]}: says what domains are, and so does {given[0]}; remove one of the two"
    if dynamic.domain_clusters is not None and dynamic.domain_encoder is None:
        yield "dynamic.domain_encoder: missing; name a model (folder or hub id) whose embeddings are clustered"
    if dynamic.domain_encoder is not None and dynamic.domain_clusters is None:
        yield "dynamic.domain_encoder: has no effect without domain_clusters; add it, or remove the key"
    if dynamic.domain_path is not None and "*" not in dynamic.domain_path:
        yield f"dynamic.domain_path: {dynamic.domain_path!r} has no '*' that could stand for a domain's name"


def _selector_rules(dynamic: DynamicConfig, unread: Collection[str]) -> Iterator[str]:
    selector, mixer = dynamic.selector, dynamic.mixer
    if dynamic.signals.screen_by != "embeddings" and dynamic.signals.screen_fraction == 1.0:
        yield "dynamic.signals.screen_by: has no effect without screen_fraction below 1; add one, or remove the key"
    if selector is None:
        if dynamic.keep_ratio is not None:
            yield "dynamic.keep_ratio: has no effect without a selector; add one, or remove the key"
        if dynamic.signals.screen_fraction < 1.0:
            yield "dynamic.signals.screen_fraction: has no effect without a selector; add one, or remove the key"
        if dynamic.repeat:
            yield "dynamic.repeat: has no effect without a selector; add one, or remove the key"
        if dynamic.exclude_seen:
            yield "dynamic.exclude_seen: has no effect without a selector; add one, or remove the key"
        if dynamic.max_repeats != DynamicConfig().max_repeats:
            yield "dynamic.max_repeats: has no effect without a selector; add one, or remove the key"
        if dynamic.candidate_batches is not None:
            yield "dynamic.candidate_batches: has no effect without a selector; add one, or remove the key"
        return
    cls = selector.cls
    assert issubclass(cls, Selector)
    if dynamic.signals.screen_fraction < 1.0 and not selector.targets:
        yield (
            f"dynamic.signals.screen_fraction: rows are screened by their likeness to targets, and the {selector.name} "
            "selector has none; remove the key, or use a selector with targets"
        )
    if dynamic.max_repeats != DynamicConfig().max_repeats and not cls.selects_subset:
        yield (
            f"dynamic.max_repeats: has no effect with the {selector.name} selector, which keeps every row; "
            "remove the key"
        )
    if dynamic.exclude_seen:
        yield from _unseen_rules(dynamic, cls)
    if "candidate_batches" not in unread:
        yield from _candidate_rules(dynamic, cls)
    if mixer is not None and cls.selects_subset and dynamic.keep_ratio is None and "keep_ratio" not in unread:
        yield (
            f"dynamic.keep_ratio: missing; beside a mixer, the {selector.name} selector narrows the pool that the "
            f"{mixer.name} mixer draws from, so say to which share of its rows (0 < keep_ratio <= 1)"
        )


def _candidate_rules(dynamic: DynamicConfig, cls: type[Selector]) -> Iterator[str]:
    assert dynamic.selector is not None
    name, key = dynamic.selector.name, "dynamic.candidate_batches"
    if dynamic.candidate_batches is None:
        return
    if not cls.selects_subset:
        yield f"{key}: has no effect with the {name} selector, which keeps every row; remove the key"
        return
    if dynamic.interval_steps is None and not dynamic.selector.requires.needs_interval:  # else it is told already
        yield f"{key}: candidates are those of an interval, so interval_steps must be given (for example 1)"
    if dynamic.mixer is not None:
        yield f"{key}: works without a mixer, whose quotas a batch of candidates may not fill; remove one of the two"
    others = {
        "exclude_seen": dynamic.exclude_seen,
        "signals.pool_fraction": dynamic.signals.pool_fraction < 1.0,
        "signals.screen_fraction": dynamic.signals.screen_fraction < 1.0,
    }
    for other in (other for other, given in others.items() if given):
        yield f"{key}: says which rows the {name} selector chooses from, and so does {other}; remove one of the two"
    if getattr(dynamic.selector.params, "checkpoints", 1) > 1:
        yield (
            f"{key}: the {name} selector averages scores of several intervals over the same rows; set checkpoints to "
            "1, or remove candidate_batches"
        )


def _unseen_rules(dynamic: DynamicConfig, cls: type[Selector]) -> Iterator[str]:
    assert dynamic.selector is not None
    name = dynamic.selector.name
    if not cls.selects_subset:
        yield f"dynamic.exclude_seen: has no effect with the {name} selector, which keeps every row; remove the key"
    if dynamic.mixer is not None:
        yield (
            "dynamic.exclude_seen: works without a mixer, whose quotas a domain without unseen rows could not fill; "
            "remove one of the two (a mixer alone serves every row of a domain once before any twice)"
        )
    if getattr(dynamic.selector.params, "checkpoints", 1) > 1:
        yield (
            f"dynamic.exclude_seen: the {name} selector averages scores of several intervals over the same rows; "
            "set checkpoints to 1, or remove exclude_seen"
        )


def _mixer_rules(dynamic: DynamicConfig, unread: Collection[str]) -> Iterator[str]:
    if dynamic.mixer is None:
        given = {
            "initial_proportions": dynamic.initial_proportions is not None,
            "max_epochs": dynamic.max_epochs is not None,
            "min_proportion": dynamic.min_proportion is not None,
            "unit": dynamic.unit != "sequences",
            "interleave": dynamic.interleave != "shuffled",
        }
        for key in (key for key, there in given.items() if there):
            yield f"dynamic.{key}: has no effect without a mixer; add one, or remove the key"
        return
    if dynamic.min_proportion is not None:
        yield from _floor_rules(dynamic.min_proportion, dynamic.mixer)
    mixer = dynamic.mixer.cls
    assert issubclass(mixer, Mixer)
    weighter = dynamic.weighter
    if weighter is not None and not getattr(weighter.cls, "neutral", False) and issubclass(mixer, DomainWeighter):
        if mixer(dynamic.mixer.params).loss_normalizer == "domain":
            way = "set its 'normalizer: weight_sum', or use" if hasattr(dynamic.mixer.params, "normalizer") else "use"
            yield (
                f"dynamic.weighter: the {dynamic.mixer.name} mixer's loss is a weighted sum of domains' mean losses, "
                f"which leaves no place for the {weighter.name} weighter; {way} one of the two methods"
            )
    if issubclass(mixer, DomainWeighter) and dynamic.max_epochs is not None:
        yield (
            f"dynamic.max_epochs: the {dynamic.mixer.name} mixer corrects its weights by the proportions that it "
            "samples in, which a cap would change; remove it"
        )
    if dynamic.max_epochs is not None and dynamic.selector is not None:
        if dynamic.narrows:
            yield (
                f"dynamic.max_epochs: has no effect beside the {dynamic.selector.name} selector, which decides anew in "
                "every interval what is served; remove one of the two"
            )
    if dynamic.initial_proportions is not None:
        try:
            check_numbers(dynamic.initial_proportions, "dynamic.initial_proportions")
        except ValueError as error:
            yield str(error)
    if dynamic.initial_proportions is not None and dynamic.warmup_steps == 0 and "warmup_steps" not in unread:
        yield (
            "dynamic.initial_proportions: hold during warm-up, and warmup_steps is 0; "
            "set warmup_steps, or remove the key"
        )


def _floor_rules(floors: Floors, mixer: MethodConfig) -> Iterator[str]:
    cls, key = mixer.cls, "dynamic.min_proportion"
    if issubclass(cls, DomainWeighter):
        yield (
            f"{key}: the {mixer.name} mixer serves the domains as its 'sampling' says and moves their weights in the "
            "loss, whose floor is 'smoothing' / number of domains; set these, or remove the key"
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
    """Yield place and numbers of the proportions that a user wrote among a mixer's parameters."""
    for place in ("proportions", "initial"):
        written = getattr(params, place, None)
        if isinstance(written, dict | tuple):
            yield place, written
    for i, stage in enumerate(getattr(params, "stages", ())):
        yield f"stages[{i}].proportions", stage.proportions
