"""What every line that goes to a terminal or a log passes through: no control characters, no secrets."""

from __future__ import annotations

import logging
from typing import TextIO

from dataflex.core.printable import printable
from dataflex.core.redact import redacted_text

__all__ = ["LogFormatter", "shown"]


def shown(text: str, stream: TextIO | None = None) -> str:
    """Return ``text`` without secrets, control characters written out, and what ``stream`` cannot encode as well."""
    text = printable(redacted_text(text))
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class LogFormatter(logging.Formatter):
    """Writes a record as ``shown`` has it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return shown(super().format(record))
