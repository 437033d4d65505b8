"""Other causal language models that score rows: a small scorer, a reference model, checkpoints of a proxy.

A model with the tokenizer of the run is fed the rows as they are trained on; any other reads their text in its
own tokens. It is loaded for a pass and let go after it, so that only one is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dataflex.errors import DataFlexError, UnsupportedError
from dataflex.signals.causal import LOAD_ERRORS, base_model, load_causal, shares_tokens
from dataflex.signals.encoders import model_identity
from dataflex.signals.passes import preserved

__all__ = ["Scorer", "ScorerError", "start_tokens"]


class ScorerError(DataFlexError):
    """A model that scores rows could not be loaded."""


class Scorer:
    """A causal language model by folder (an adapter's too) or hub id, its weights not loaded yet.

    Args:
        name: Folder or hub id.
        tokenizer: The tokenizer of the run, which made the rows.

    Attributes:
        identity: Changes when the model's answers may change.
        same_tokens: Whether the rows' tokens mean the same to it.

    Raises:
        ScorerError: There is no such model, or it has no tokenizer.
    """

    def __init__(self, name: str, tokenizer: Any) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.name = name
        base = base_model(name)
        with preserved():
            try:
                self._config: Any = AutoConfig.from_pretrained(base or name)
                self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
            except LOAD_ERRORS as error:
                raise ScorerError(f"model {name}: cannot be loaded to score rows: {error}") from error
        self._theirs = tokenizer
        text, commit = self._config.get_text_config(), getattr(self._config, "_commit_hash", None)
        self.identity = model_identity(name, commit, base and model_identity(base, commit), "causal")
        self.same_tokens = shares_tokens(tokenizer, self._tokenizer, int(text.vocab_size))
        self.limit: int | None = getattr(text, "max_position_embeddings", None)
        """Tokens of a sequence at most, or None."""

    @property
    def start(self) -> tuple[int, ...]:
        """Token that its sequences begin with, or none."""
        return start_tokens(self._tokenizer)

    def translate(self, ids: list[int]) -> list[int]:
        """Return its tokens of the text of the run's tokens ``ids``; special tokens are left out."""
        text = self._theirs.decode(ids, skip_special_tokens=True)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    @contextmanager
    def loaded(self, device: torch.device) -> Iterator[nn.Module]:
        """Give the model in float32 and eval mode, frozen, for the length of a block.

        Raises:
            ScorerError: The weights cannot be loaded as those of a causal language model.
            UnsupportedError: Parameters are partitioned over ranks (ZeRO-3, FSDP), this model's would be too.
        """
        from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

        if is_deepspeed_zero3_enabled() or is_fsdp_enabled():
            raise UnsupportedError(
                f"model {self.name}: another model cannot score rows while parameters are partitioned over ranks "
                "(ZeRO-3, FSDP); use ZeRO-2 or less, or the model under training"
            )
        with preserved():  # a model may draw random numbers while it is built
            try:
                model = load_causal(self.name, torch.float32, device)
            except LOAD_ERRORS as error:
                raise ScorerError(f"model {self.name}: is not a causal language model: {error}") from error
        yield model


def start_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Return the token that a tokenizer puts before every text by itself, or none."""
    bos = tokenizer.bos_token_id
    first = tokenizer("a")["input_ids"][:1]
    return (int(bos),) if bos is not None and first == [bos] else ()
