"""Embeddings of raw text from another model: a transformers model or a sentence-transformers model.

Texts are batched by length under a token budget and come back in the order given. The same texts give
the same vectors; random states of the run are left alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.errors import ConfigError, DataFlexError
from dataflex.signals.anatomy import anatomy, capture_hidden
from dataflex.signals.passes import bucketed, preserved
from dataflex.signals.pooling import pool
from dataflex.signals.specs import EmbeddingSpec

__all__ = ["EncoderError", "SentenceEncoder", "TextEncoder", "TransformersEncoder", "load_encoder", "model_identity"]

_WEIGHTS = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja")
_MISSING = "sentence-transformers models need an optional package: pip install dataflex[encoders]"


class EncoderError(DataFlexError):
    """An encoder could not be loaded."""


class TextEncoder(Protocol):
    """Turns texts into vectors."""

    dimension: int
    identity: str
    """Changes when the encoder's vectors may change; goes into fingerprints."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return one vector per text, float32 [n, dimension]; NaN for a text without tokens."""
        ...


def load_encoder(
    model: str,
    *,
    spec: EmbeddingSpec | None = None,
    kind: Literal["auto", "transformers", "sentence_transformers"] = "auto",
    max_length: int = 512,
    token_budget: int = 16384,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> TextEncoder:
    """Load an encoder from a local folder or by its hub id.

    Args:
        model: Folder or hub id.
        spec: How a transformers model's hidden states are pooled (default: RDS+, ``weighted_mean`` of the
            last layer, normalized). A sentence-transformers model pools by its own rules: only
            ``normalize`` may be chosen.
        kind: ``auto`` takes a folder with ``modules.json`` as a sentence-transformers model.
        max_length: Tokens of a text at most; the rest is cut off.
        token_budget: Padded tokens of a batch at most.
        device: Where the model runs; the CPU if left out.
        dtype: Type of the weights.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ConfigError: A spec that the encoder cannot follow.
        EncoderError: The model cannot be loaded, or an optional package is missing.
    """
    place = device or torch.device("cpu")
    if kind == "auto":
        kind = "sentence_transformers" if (Path(model) / "modules.json").is_file() else "transformers"
    if kind == "sentence_transformers":
        if spec is not None and spec != EmbeddingSpec(normalize=spec.normalize):
            raise ConfigError(
                f"encoder {model}: a sentence-transformers model pools by its own rules; only normalize may be set"
            )
        return SentenceEncoder(
            model,
            normalize=True if spec is None else spec.normalize,
            max_length=max_length,
            token_budget=token_budget,
            device=place,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
    return TransformersEncoder(
        model,
        spec=spec or EmbeddingSpec(),
        max_length=max_length,
        token_budget=token_budget,
        device=place,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )


class TransformersEncoder:
    """A causal or encoder model read by ``AutoModel``; arguments as in ``load_encoder``."""

    def __init__(
        self,
        model: str,
        *,
        spec: EmbeddingSpec,
        max_length: int,
        token_budget: int,
        device: torch.device,
        dtype: torch.dtype,
        trust_remote_code: bool,
    ) -> None:
        from transformers import AutoModel, AutoTokenizer

        if spec.completion_only:
            raise ConfigError(f"encoder {model}: completion_only needs labels, but an encoder reads plain text")
        with preserved():  # a model may draw random numbers while it is built
            try:
                self._tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
                body: Any = AutoModel.from_pretrained(model, trust_remote_code=trust_remote_code)
            except (OSError, ValueError, KeyError) as error:
                raise EncoderError(f"encoder {model}: cannot be loaded as a transformers model: {error}") from error
        if body.config.is_encoder_decoder:
            body = body.get_encoder()
        self._body = body.to(device, dtype).eval().requires_grad_(False)
        self._spec, self._device = spec, device
        self._max_length, self._token_budget = max_length, token_budget
        self.dimension = int(body.config.get_text_config().hidden_size)
        self.identity = model_identity(model, getattr(body.config, "_commit_hash", None), spec, max_length, dtype)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return one vector per text, float32 [n, dimension]; NaN for a text without tokens."""
        out = np.full((len(texts), self.dimension), np.nan, dtype=np.float32)
        if not len(texts):
            return out
        ids = self._tokenizer(list(texts), truncation=True, max_length=self._max_length, padding=False)["input_ids"]
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        parts = anatomy(self._body)
        for positions in bucketed(lengths, self._token_budget):
            width = max(int(lengths[positions].max()), 1)
            tokens = torch.zeros(len(positions), width, dtype=torch.int64)
            mask = torch.zeros_like(tokens)
            for row, position in enumerate(positions):
                tokens[row, : lengths[position]] = torch.tensor(ids[position], dtype=torch.int64)
                mask[row, : lengths[position]] = 1
            tokens, mask = tokens.to(self._device), mask.to(self._device)
            with preserved(self._body), capture_hidden(parts, self._spec.layer) as seen:
                self._body(input_ids=tokens, attention_mask=mask)
            out[positions] = pool(seen[0], mask, None, self._spec).cpu().numpy()
        return out


class SentenceEncoder:
    """A sentence-transformers model, with its own pooling; arguments as in ``load_encoder``."""

    def __init__(
        self,
        model: str,
        *,
        normalize: bool,
        max_length: int,
        token_budget: int,
        device: torch.device,
        dtype: torch.dtype,
        trust_remote_code: bool,
    ) -> None:
        if importlib.util.find_spec("sentence_transformers") is None:
            raise EncoderError(f"encoder {model}: {_MISSING}")
        from sentence_transformers import SentenceTransformer

        with preserved():
            try:
                self._model: Any = SentenceTransformer(model, device=str(device), trust_remote_code=trust_remote_code)
            except (OSError, ValueError, KeyError) as error:
                raise EncoderError(
                    f"encoder {model}: cannot be loaded as a sentence-transformers model: {error}"
                ) from error
        self._model.to(dtype).eval()
        own = self._model.max_seq_length
        self._model.max_seq_length = max_length if own is None else min(own, max_length)
        self._normalize, self._token_budget = normalize, token_budget
        with preserved():  # the method that tells the dimension has another name in each major version
            self.dimension = int(self._model.encode(["a"], show_progress_bar=False).shape[1])
        commits = [
            getattr(part.config, "_commit_hash", None) for part in self._model.modules() if hasattr(part, "config")
        ]
        self.identity = model_identity(model, str(commits[:1]), normalize, self._model.max_seq_length, dtype)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return one vector per text, float32 [n, dimension]."""
        out = np.full((len(texts), self.dimension), np.nan, dtype=np.float32)
        # Two characters a token is a cautious guess: the batch must fit, not be full.
        guessed = np.array([len(text) // 2 + 2 for text in texts], dtype=np.int64)
        for positions in bucketed(np.minimum(guessed, self._model.max_seq_length), self._token_budget):
            with preserved(), torch.no_grad():
                out[positions] = self._model.encode(
                    [texts[position] for position in positions],
                    batch_size=len(positions),
                    normalize_embeddings=self._normalize,
                    convert_to_numpy=True,
                    show_progress_bar=False,
                ).astype(np.float32)
        return out


def model_identity(model: str, commit: str | None, *settings: Any) -> str:
    """Return a hash of what another model's answers depend on: its files (or hub commit) and its settings."""
    digest = hashlib.blake2b(repr(settings).encode("utf-8"), digest_size=16)
    folder = Path(model)
    if folder.is_dir():
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in _WEIGHTS:
                digest.update(path.relative_to(folder).as_posix().encode("utf-8"))
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest())
    else:
        digest.update(f"{model}@{commit}".encode())
    return digest.hexdigest()
