"""Parameters of methods that compare with the token losses of a reference model."""

from __future__ import annotations

from dataclasses import dataclass, field

from dataflex.core.protocols import Params

__all__ = ["ReferenceParams"]


@dataclass(frozen=True, kw_only=True)
class ReferenceParams(Params):
    """Base of the parameters of a method that does not work without a reference model."""

    reference: str = field(metadata={"help": "folder of the reference model, with the tokenizer of the run"})
    reference_cache: bool = field(
        default=True,
        metadata={"help": "score a row with the reference once, when first served, and keep that; else in every step"},
    )
