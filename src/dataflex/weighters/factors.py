"""The weighters of a product: which can be named, and which cannot be multiplied."""

from __future__ import annotations

from dataclasses import dataclass

from dataflex.errors import ConfigError, did_you_mean
from dataflex.method import Params, Weighter
from dataflex.parts import Part
from dataflex.registry import find, names

__all__ = ["Factor", "combination_problems"]

_NO_FACTORS = ("none", "product")


@dataclass(frozen=True)
class Factor(Part):
    """A weighter with its parameters, as one of several."""

    what = "weighter"

    @classmethod
    def known(cls) -> list[str]:
        """Return the names of the weighters that can be factors."""
        return [name for name in names("weighter") if name not in _NO_FACTORS]

    @classmethod
    def params_of(cls, name: str) -> type[Params]:
        """Return a weighter's parameters.

        Raises:
            ConfigError: There is no such weighter, or it cannot be a factor.
        """
        known = cls.known()
        if name not in known:
            raise ConfigError(f"unknown factor {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})")
        return find("weighter", name).Params

    def build(self) -> Weighter:
        """Return a new instance."""
        method = find("weighter", self.name)(self.params)
        assert isinstance(method, Weighter)
        return method


def combination_problems(factors: list[Weighter]) -> list[str]:
    """Return why these weighters cannot be multiplied."""
    if len(factors) < 2:
        return ["of: takes at least two weighters; write a single one without 'product'"]
    problems = []
    by_sequences = [each.name for each in factors if each.normalizer == "sample"]
    by_token = [each.name for each in factors if each.by_token]
    if by_sequences and by_token:
        problems.append(
            f"of: {by_sequences[0]} divides the loss by sequences, which leaves no place for the weights of tokens "
            f"that {by_token[0]} gives"
        )
    needs = [(each.name, each.requires()) for each in factors]
    references = {each.reference.folder: name for name, each in needs if each.reference is not None}
    if len(references) > 1:
        problems.append(
            f"of: one run has one reference model, but {' and '.join(references.values())} name different ones"
        )
    specs = [(name, each.embedding) for name, each in needs if each.embedding is not None]
    for name, spec in specs[1:]:
        if spec != specs[0][1]:
            problems.append(
                f"of: {specs[0][0]} and {name} embed sequences differently; give both the same layer and pooling"
            )
    return problems
