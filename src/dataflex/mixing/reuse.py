"""``dataflex mix reuse``: proportions carried over to a set of domains of which some were added, removed or revised.

Olmix (Chen et al., arXiv 2602.12237), mixture reuse, from notes on the paper. Domains that did not change keep their
relative proportions p and are one virtual domain v of what is mixed anew: from proportions r of v and the changed
domains, an unchanged domain j gets r_v p_j. So a swarm takes 3 (changed + 2) runs instead of 3 (domains + 1).
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from dataflex.config.args import data_set_names
from dataflex.errors import ConfigError
from dataflex.mixing.options import KEPT, check_names, given, numbers_by_name, write_result
from dataflex.plan.domains import Floats
from dataflex.plan.proportions import normalized, provenance, read_proportions
from dataflex.printable import Answer


def kept_shares(old: Mapping[str, float], kept: Collection[str]) -> dict[str, float]:
    """Return the relative proportions p of the domains ``kept``, which sum to 1.

    Raises:
        ConfigError: A name that is no domain, or none of them has a proportion above 0.
    """
    check_names("--keep", kept, list(old), every=False)
    shares = np.array([old[name] for name in kept])
    if not shares.any():
        raise ConfigError(f"--keep: none of {', '.join(kept) or 'all domains'} has a proportion above 0; mix all anew")
    return dict(zip(kept, normalized(shares).tolist(), strict=True))


def expanded(shares: Mapping[str, float], kept: Mapping[str, float]) -> dict[str, float]:
    """Return proportions q of all domains from those of the virtual domain and the changed ones, which sum to 1."""
    whole = {name: shares[KEPT] * share for name, share in kept.items()}
    return {**whole, **{name: share for name, share in shares.items() if name != KEPT}}


def most_of_kept(kept: Mapping[str, float], sizes: Mapping[str, float], budget: float, max_epochs: float) -> float:
    """Return the largest share of the virtual domain under which no domain has more than ``max_epochs`` epochs.

    It is min_j k N_j / (R p_j), which may be above 1; ``sizes`` N and ``budget`` R have one unit.
    """
    return min(max_epochs * sizes[name] / (budget * share) for name, share in kept.items() if share > 0)


def collapsed_domains(
    old: Path, names: Sequence[str], sizes: Mapping[str, float], changed: Collection[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return sizes of the virtual domain and the changed ones, and relative proportions of those that are kept.

    ``names`` are the domains now; those in the file ``old`` and not in ``changed`` are kept.
    """
    check_names("--changed", changed, names, every=False)
    before = read_proportions(old, "--reuse").by_name
    kept = [name for name in names if name in before and name not in changed]
    if not kept:
        told = f"none of the domains in {old} ({', '.join(before)}) is one of the run's ({', '.join(names)})"
        raise ConfigError(f"--reuse: {told} and not in --changed, so that none is kept; mix all anew")
    if KEPT in names:
        raise ConfigError(f"--reuse: a domain is called {KEPT!r}, the name of all that are kept; rename it")
    if len(kept) == len(names):
        raise ConfigError("--reuse: every domain is kept, so there is nothing to mix anew; name some with --changed")
    shares = kept_shares(before, kept)
    rest = {name: sizes[name] for name in names if name not in kept}
    return {KEPT: sum(sizes[name] for name in kept), **rest}, shares


def _new_shares(options: argparse.Namespace) -> dict[str, float]:
    """Return the proportions of the virtual domain and the changed ones; the former alone without ``--shares``."""
    text = options.shares
    if text is None:
        return {KEPT: 1.0}
    found = numbers_by_name(text, "--shares") if "=" in text else read_proportions(text, "--shares").by_name
    if KEPT not in found:
        raise ConfigError(f"--shares: lacks {KEPT!r}, the share of all domains that are kept together")
    total = sum(found.values())
    if total <= 0:
        raise ConfigError("--shares: all are 0")
    return {name: share / total for name, share in found.items()}


def reuse_step(options: argparse.Namespace) -> Answer:
    """Write the proportions of all domains and return what to print."""
    from dataflex.mixing.runs import given_sizes

    old, shares = read_proportions(options.old, "FILE").by_name, _new_shares(options)
    changed = [name for name in shares if name != KEPT]
    kept_names = data_set_names(options.keep) or [name for name in old if name not in changed]
    if both := [name for name in kept_names if name in changed]:
        raise ConfigError(f"--keep: {', '.join(both)} is there, and a changed domain of --shares; take one of the two")
    if options.shares is None and not options.keep:
        raise ConfigError("--shares: missing; give it, or name the domains that are left with --keep")
    kept = kept_shares(old, kept_names)
    found = expanded(shares, kept)
    notes, caps = [], None
    if options.budget is None and (options.natural or options.max_epochs is not None):
        raise ConfigError("--natural and --max-epochs: have no effect without --budget, what the large run uses")
    if options.budget is not None:
        epochs = 4.0 if options.max_epochs is None else options.max_epochs
        if not options.budget > 0 or not epochs > 0:
            raise ConfigError("--budget and --max-epochs: must be above 0")
        if options.natural is None:
            raise ConfigError("--natural: missing; --budget needs the sizes of the domains in its unit")
        sizes, unit = given_sizes(options.natural)
        if unit == "shares":
            raise ConfigError("--budget: sizes are known as shares only; give --natural with sizes in a unit")
        lacks = [f"--natural: {name}: missing; every domain needs a size" for name in found if name not in sizes]
        if lacks:
            raise ConfigError(lacks)
        most = most_of_kept(kept, sizes, options.budget, epochs)
        caps = np.array([min(epochs * sizes[name] / options.budget, 1.0) for name in found])
        if shares[KEPT] > most * (1 + 1e-9):
            raise ConfigError(
                f"--shares: {KEPT} has {shares[KEPT]:.4g}, and above {most:.4g} one of its domains is served for more "
                f"than {epochs:g} epochs; propose with '--cap {KEPT}={most:.4g}'"
            )
        over = [name for name, cap in zip(found, caps, strict=True) if found[name] > cap * (1 + 1e-9)]
        if over:
            raise ConfigError(f"--shares: {', '.join(over)} would be served for more than {epochs:g} epochs; lower it")
        notes.append(f"at most {min(most, 1.0):.4g} for {KEPT} within {epochs:g} epochs of each of its domains")
    notes.append(
        "it holds where kept and changed domains act on different held-out sets; where they do not, mix all anew"
        if changed
        else "domains were left out only; a swarm over those that are left may do better"
    )
    source = provenance(
        "dataflex mix reuse",
        inputs=[path for path in (options.old, Path(options.shares or "")) if path.is_file()],
        settings=given(options, "shares", "keep", "natural", "budget", "max_epochs"),
    )
    values: Floats = np.array(list(found.values()))
    told = write_result(
        options.out,
        tuple(found),
        values / values.sum(),
        method="reuse",
        source=source,
        details={"kept": kept, "shares": shares},
        caps=caps,
    )
    return Answer("\n".join([told, *(f"note: {note}" for note in notes)]), {**told.values, "notes": notes})
