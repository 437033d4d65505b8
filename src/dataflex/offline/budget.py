"""How much of a data set is wanted: a share of its rows, a number of rows, or a number of tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dataflex.errors import ConfigError

__all__ = ["Budget"]

_FORM = re.compile(r"(?P<number>\d[\d_]*(\.\d*)?|\.\d+)\s*(?P<unit>[a-z]*)", re.IGNORECASE)
_EXPECTED = "expected a share of the rows (0.1), a number of rows (500) or a number of tokens (200000tokens)"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What was asked for, one of the two.

    Attributes:
        rows: Number of rows.
        tokens: Tokens of the chosen rows together, at most.
    """

    rows: int | None = None
    tokens: int | None = None

    @classmethod
    def read(cls, text: str, num_rows: int) -> Budget:
        """Read a budget; a number with a point is a share of ``num_rows``.

        Raises:
            ConfigError: Not of such a form, or nothing at all.
        """
        match = _FORM.fullmatch(text.strip())
        if match is None or match["unit"].lower() not in ("", "row", "rows", "token", "tokens"):
            raise ConfigError(f"--budget: {text!r}: {_EXPECTED}")
        number, unit = match["number"].replace("_", ""), match["unit"].lower()
        if "." in number:
            share = float(number)
            if unit or not 0.0 < share <= 1.0:
                raise ConfigError(f"--budget: {text!r}: a share lies above 0 and is at most 1.0; {_EXPECTED}")
            return cls(rows=max(1, round(share * num_rows)))
        if int(number) == 0:
            raise ConfigError(f"--budget: {text!r} is nothing; {_EXPECTED}")
        return cls(tokens=int(number)) if unit.startswith("token") else cls(rows=int(number))
