"""The identity of computed numbers: what model, data, method, parameters and packages they came from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import metadata
from typing import Any

from dataflex.errors import ComponentError

__all__ = ["Fingerprint", "package_versions"]

_PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "dataflex",
    "flash-attn",
    "kernels",
    "liger-kernel",
    "llamafactory",
    "numpy",
    "peft",
    "sentence-transformers",
    "tokenizers",
    "torch",
    "transformers",
)


@lru_cache(maxsize=1)
def package_versions() -> dict[str, str]:
    """Return the versions of the packages that computed numbers depend on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Everything that an array's numbers depend on.

    Attributes:
        model: Identity of the model (values, architecture, adapters).
        data: Identity of the rows (row space fingerprint, which rows, tokenizer and template).
        method: What was computed, as in ``embeddings``.
        parameters: How: JSON values.
        versions: Packages that computed it.

    Raises:
        ComponentError: Parameters that are not JSON.
    """

    model: str
    data: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=lambda: dict(package_versions()))

    def __post_init__(self) -> None:
        try:
            plain = json.loads(json.dumps([dict(self.parameters), dict(self.versions)], allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ComponentError(f"fingerprint of {self.method!r}: parameters must be JSON values: {error}") from error
        object.__setattr__(self, "parameters", plain[0])
        object.__setattr__(self, "versions", plain[1])

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return asdict(self)

    @property
    def name(self) -> str:
        """Folder name: the method and 32 hex digits."""
        text = json.dumps(self.to_json(), sort_keys=True)
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()
        return f"{re.sub(r'[^a-z0-9]+', '-', self.method.lower()).strip('-') or 'array'}-{digest}"
