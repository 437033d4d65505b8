"""Another causal language model than the one under training: its folder, tokens and weights. No torch at import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = [
    "ADAPTER",
    "LOAD_ERRORS",
    "base_model",
    "differing_tokens",
    "holds_model",
    "largest_id",
    "load_causal",
    "shares_tokens",
]

ADAPTER = "adapter_config.json"
"""File of a folder that holds a PEFT adapter instead of a whole model."""

LOAD_ERRORS = (OSError, ValueError, KeyError)
"""What ``from_pretrained`` raises for a folder or hub id that it cannot make sense of."""


def holds_model(folder: Path) -> bool:
    """Return whether a folder looks like that of a model, or of an adapter."""
    return any((folder / name).is_file() for name in ("config.json", ADAPTER))


def base_model(name: str | Path) -> str | None:
    """Return the base model of a folder that holds an adapter, or None."""
    file = Path(name) / ADAPTER
    if not file.is_file():
        return None
    return str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"])


def load_causal(name: str | Path, dtype: torch.dtype | str, device: torch.device) -> torch.nn.Module:
    """Return a model by folder or hub id, or an adapter on its base model, frozen and in eval mode.

    Args:
        name: Folder or hub id.
        dtype: Of the weights; "auto" takes them as they are stored.
        device: Where the model goes.

    Raises:
        OSError, ValueError, KeyError: It cannot be loaded as a causal language model (``LOAD_ERRORS``).
    """
    if (Path(name) / ADAPTER).is_file():
        from peft import AutoPeftModelForCausalLM as Loader
    else:
        from transformers import AutoModelForCausalLM as Loader
    model: Any = Loader.from_pretrained(name, dtype=dtype)
    loaded: torch.nn.Module = model.to(device).eval().requires_grad_(False)
    return loaded


def largest_id(tokenizer: Any) -> int:
    """Return the largest id that a tokenizer gives; 0 without tokens."""
    return max(tokenizer.get_vocab().values(), default=0)


def differing_tokens(ours: Any, theirs: Any) -> list[str]:
    """Return the tokens that two tokenizers do not both have under the same id, in order."""
    a, b = ours.get_vocab(), theirs.get_vocab()
    return sorted(token for token in a.keys() | b.keys() if a.get(token) != b.get(token))


def shares_tokens(ours: Any, theirs: Any, embeddings: int) -> bool:
    """Return whether each token of ``ours`` has the same id in ``theirs``, below the number of ``embeddings``."""
    return largest_id(ours) < embeddings and ours.get_vocab().items() <= theirs.get_vocab().items()
