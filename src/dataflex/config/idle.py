"""Keys of the ``dynamic`` block that would have no effect beside the others: those of the block alone.

``rules`` tells the ones that stand for a missing method; here are those that the named methods leave without a
purpose. Keys whose effect depends on LLaMA-Factory's are told by ``notes``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from dataflex.config.schema import DynamicConfig, SignalsConfig
from dataflex.registry import KINDS


def idle_keys(dynamic: DynamicConfig, unread: Collection[str]) -> Iterator[str]:
    """Yield one line per key that was given and would change nothing.

    Args:
        dynamic: The configuration.
        unread: Keys that could not be read; nothing is said of what depends on them.
    """
    selector, mixer, signals = dynamic.selector, dynamic.mixer, dynamic.signals
    if any(kind in unread for kind in KINDS):
        return
    narrows = dynamic.narrows
    if selector is not None and not narrows:
        for key, given in (("keep_ratio", dynamic.keep_ratio is not None), ("repeat", dynamic.repeat)):
            if given:
                yield (
                    f"dynamic.{key}: has no effect with the {selector.name} selector, which keeps every row; remove "
                    "the key"
                )
    if dynamic.max_repeats != DynamicConfig().max_repeats and not narrows:
        yield "dynamic.max_repeats: has no effect without a selector that leaves rows out; add one, or remove the key"
    if signals.pool_fraction < 1.0 and not narrows and not (selector is None and signals.screen_fraction < 1.0):
        yield (
            "dynamic.signals.pool_fraction: has no effect without a selector that leaves rows out; add one, or remove "
            "the key"
        )
    if dynamic.warmup_steps and mixer is None and not narrows:
        burn_in = "; 'burn_in_steps' of the weighter are steps of plain loss" if dynamic.weighter is not None else ""
        yield (
            "dynamic.warmup_steps: has no effect without a mixer, or a selector that leaves rows out; remove the "
            f"key{burn_in}"
        )
    if dynamic.interleave != "shuffled" and mixer is not None and narrows:
        assert selector is not None
        yield (
            f"dynamic.interleave: has no effect beside the {selector.name} selector, whose rows fill each interval's "
            "quotas in random order; remove the key"
        )
    if dynamic.at_cap != "redistribute" and (mixer is None or dynamic.max_epochs is None):
        yield "dynamic.at_cap: has no effect without a mixer and max_epochs; add what is missing, or remove the key"
    if signals.store is None and signals.store_gb != SignalsConfig().store_gb:
        yield "dynamic.signals.store_gb: has no effect without a store; add 'store', or remove the key"
