"""From proportions and chosen rows to the rows that each rank serves; no torch, no model.

The package is a function too, ``dataflex.plan(trainer)``, since its name is the one that ``dataflex`` gives it.
"""

import sys
from types import ModuleType
from typing import Any


class _Plan(ModuleType):
    def __call__(self, trainer: Any) -> str:
        """Return what the run of a trainer of ``dataflex.wrap`` would do and cost, as ``dataflex plan`` tells it."""
        from dataflex.errors import UnsupportedError

        if not hasattr(trainer, "dataflex_setup"):
            raise UnsupportedError(f"plan: {type(trainer).__name__} is no trainer of a class that dataflex.wrap made")
        return str(trainer.plan())


sys.modules[__name__].__class__ = _Plan
