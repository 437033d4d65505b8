"""Embeddings: hidden states of one forward, pooled into a vector per row; by this model or another."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dataflex.errors import ConfigError, UnsupportedError
from dataflex.plan.domains import Rows
from dataflex.signals.losses import IGNORE, model_inputs, real_tokens
from dataflex.signals.model_access import Corpus
from dataflex.signals.model_parts import capture_hidden, model_parts, narrow_head
from dataflex.signals.other_models import LoadError, loading
from dataflex.signals.passes import watch_other
from dataflex.signals.specs import EmbeddingSpec
from dataflex.signals.sweep import Sweep, bucketed, padded, preserve_state
from dataflex.signals.texts import row_texts
from dataflex.version import install

_MAX_TOKENS = 512  # of a text that an encoder reads; the rest is cut off
_TOKEN_BUDGET = 16384  # largest number of padded tokens in an encoder's batch
_MISSING = f"sentence-transformers models need an optional package: {install('encoders')}"


def pool(
    hidden_BTD: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor | None, spec: EmbeddingSpec
) -> torch.Tensor:
    """Return one vector per row of hidden states [B, T, D], fp32 [B, D]; NaN where a row has nothing to pool.

    RDS+ (arXiv 2503.01807) and ADAPT (arXiv 2605.05227): e = sum_t w_t h_t with w_t = t / sum(t). The mask [B, T] is 0
    on padding, on whichever side; None means no padding. ``labels`` [B, T] are used under ``completion_only`` only.
    """
    kept_BT = hidden_BTD.new_ones(hidden_BTD.shape[:2], dtype=torch.bool)
    if attention_mask is not None:
        kept_BT = attention_mask.ne(0)
    if spec.completion_only:
        assert labels is not None, "completion_only needs labels"
        kept_BT = kept_BT & labels.ne(IGNORE)
    place_BT = kept_BT.long().cumsum(dim=1) * kept_BT  # 1, 2, ... over the kept tokens, 0 elsewhere
    raw_BT = {
        "weighted_mean": place_BT,
        "mean": kept_BT,
        "last": kept_BT & place_BT.eq(kept_BT.sum(dim=1, keepdim=True)),
        "first": place_BT.eq(1),
    }[spec.pooling].long()
    weights_BT = raw_BT.float() / raw_BT.sum(dim=1, keepdim=True).float()
    # Padding may hold anything, NaN included, and 0 x NaN is NaN.
    clean_BTD = hidden_BTD.float().masked_fill(~kept_BT[:, :, None], 0.0)
    vectors_BD = torch.bmm(weights_BT[:, None, :], clean_BTD)[:, 0]
    if not spec.normalize:
        return vectors_BD
    norms = vectors_BD.norm(dim=1, keepdim=True)
    return torch.where(norms.eq(0), vectors_BD, vectors_BD / norms)


def pool_documents(
    hidden_BTD: torch.Tensor, documents_BT: torch.Tensor, labels: torch.Tensor | None, spec: EmbeddingSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one vector per packed document, as in ``pool``, fp32 [m, D], and (row, document) int64 [m, 2].

    ``documents_BT`` is the document of each token in its row, -1 for padding; see ``losses.document_ids``.
    """
    row, column = documents_BT.ge(0).nonzero(as_tuple=True)
    pairs = torch.stack([row, documents_BT[row, column]], dim=1)
    keys, which = torch.unique(pairs, dim=0, return_inverse=True)
    # Each document becomes a row of its own, so that there is one definition of pooling.
    sizes = torch.bincount(which, minlength=len(keys))
    order = torch.argsort(which, stable=True)
    row, column, which = row[order], column[order], which[order]
    offset = torch.arange(len(which), device=row.device) - (sizes.cumsum(0) - sizes)[which]
    width = int(sizes.max()) if len(sizes) else 0

    def spread(values: torch.Tensor, fill: float) -> torch.Tensor:
        out = values.new_full((len(keys), width, *values.shape[2:]), fill)
        out[which, offset] = values[row, column]
        return out

    mask = spread(torch.ones_like(documents_BT), 0)
    return pool(spread(hidden_BTD, 0.0), mask, None if labels is None else spread(labels, IGNORE), spec), keys


@torch.no_grad()
def hidden_states(model: nn.Module, batch: dict[str, Any], layer: int) -> torch.Tensor:
    """Return the hidden states [B, T, D] of one layer; call it in eval mode and in the trainer's autocast.

    The outermost module runs, as partitioned parameters need it; its head sees one position per row.
    """
    parts = model_parts(model)
    with narrow_head(parts), capture_hidden(parts, layer) as seen:
        parts.root(**model_inputs(batch), use_cache=False)
    if len(seen) != 1 or seen[0].shape[:2] != batch["input_ids"].shape:
        shapes = [tuple(tensor.shape) for tensor in seen]
        raise UnsupportedError(
            f"embeddings: {type(parts.lm).__name__} gave hidden states {shapes} for input_ids of shape "
            f"{tuple(batch['input_ids'].shape)}; expected one [B, T, D]"
        )
    return seen[0]


def embed_batch(model: nn.Module, batch: dict[str, Any], spec: EmbeddingSpec) -> torch.Tensor:
    """Return one vector per row of a collated batch, fp32 [B, D], as in ``pool``; packed rows are pooled as a whole."""
    return pool(hidden_states(model, batch, spec.layer), real_tokens(batch), batch.get("labels"), spec)


class TextEncoder:
    """Turns texts into vectors on one device."""

    device: torch.device
    dimension: int

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return one vector per text, float32 [n, dimension]; NaN for a text without tokens."""
        out = np.full((len(texts), self.dimension), np.nan, dtype=np.float32)
        items, lengths = self._measured(list(texts)) if len(texts) else ([], np.zeros(0, dtype=np.int64))
        for positions in bucketed(lengths, _TOKEN_BUDGET):
            with preserve_state(), torch.no_grad():
                out[positions] = self._vectors([items[position] for position in positions])
        return out

    def score(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the vectors of a batch of ``text_sweep``, fp32 [b, dimension]."""
        return torch.from_numpy(self.encode(batch["texts"])).to(self.device)

    def _measured(self, texts: list[str]) -> tuple[list[Any], NDArray[np.int64]]:
        """Return what is read of each text, and its number of tokens."""
        raise NotImplementedError

    def _vectors(self, items: list[Any]) -> NDArray[np.float32]:
        raise NotImplementedError


def load_encoder(model: str, *, spec: EmbeddingSpec | None = None, device: torch.device | None = None) -> TextEncoder:
    """Load an encoder by folder or hub id, in float32; it reads the first 512 tokens of a text.

    A transformers model's hidden states are pooled by ``spec`` (default: RDS+, ``weighted_mean`` of the last layer,
    normalized). A folder with ``modules.json`` is a sentence-transformers model, which pools by its own rules: only
    ``normalize`` may be chosen. The device is the CPU if left out.

    Raises:
        ConfigError: A spec that the encoder cannot follow.
        LoadError: The model cannot be loaded, or an optional package is missing.
    """
    place, spec = device or torch.device("cpu"), spec or EmbeddingSpec()
    if not (Path(model) / "modules.json").is_file():
        return TransformersEncoder(model, spec, place)
    if {**asdict(spec), "encoder": None} != asdict(EmbeddingSpec(normalize=spec.normalize)):
        raise ConfigError(
            f"encoder {model}: a sentence-transformers model pools by its own rules; only normalize may be set"
        )
    return SentenceEncoder(model, spec.normalize, place)


class TransformersEncoder(TextEncoder):
    """A causal or encoder model read by ``AutoModel``; see ``load_encoder``."""

    def __init__(self, model: str, spec: EmbeddingSpec, device: torch.device) -> None:
        from transformers import AutoModel, AutoTokenizer

        if spec.completion_only:
            raise ConfigError(f"encoder {model}: completion_only needs labels, but an encoder reads plain text")
        with loading(f"encoder {model}: cannot be loaded as a transformers model"):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
            body: Any = AutoModel.from_pretrained(model)
        if body.config.is_encoder_decoder:
            body = body.get_encoder()
        self._body = body.to(device, torch.float32).eval().requires_grad_(False)
        watch_other(self._body)
        self._spec, self.device = spec, device
        self.dimension = int(body.config.get_text_config().hidden_size)

    def _measured(self, texts: list[str]) -> tuple[list[Any], NDArray[np.int64]]:
        ids = self._tokenizer(texts, truncation=True, max_length=_MAX_TOKENS, padding=False)["input_ids"]
        return ids, np.array([len(row) for row in ids], dtype=np.int64)

    def _vectors(self, items: list[Any]) -> NDArray[np.float32]:
        tokens = padded([row or [0] for row in items], 0).to(self.device)
        mask = padded([[1] * len(row) or [0] for row in items], 0).to(self.device)
        with capture_hidden(model_parts(self._body), self._spec.layer) as seen:
            self._body(input_ids=tokens, attention_mask=mask)
        return pool(seen[0], mask, None, self._spec).cpu().numpy()


class SentenceEncoder(TextEncoder):
    """A sentence-transformers model, with its own pooling; see ``load_encoder``."""

    def __init__(self, model: str, normalize: bool, device: torch.device) -> None:
        if importlib.util.find_spec("sentence_transformers") is None:
            raise LoadError(f"encoder {model}: {_MISSING}")
        from sentence_transformers import SentenceTransformer

        with loading(f"encoder {model}: cannot be loaded as a sentence-transformers model"):
            self._model: Any = SentenceTransformer(model, device=str(device))
        self._model.to(torch.float32).eval()
        own = self._model.max_seq_length
        self._model.max_seq_length = _MAX_TOKENS if own is None else min(own, _MAX_TOKENS)
        self._normalize, self.device = normalize, device
        with preserve_state():  # the method that tells the dimension has another name in each major version
            self.dimension = int(self._model.encode(["a"], show_progress_bar=False).shape[1])

    def _measured(self, texts: list[str]) -> tuple[list[Any], NDArray[np.int64]]:
        # Two characters a token is a cautious guess: the batch must fit, not be full.
        guessed = np.array([len(text) // 2 + 2 for text in texts], dtype=np.int64)
        return texts, np.minimum(guessed, self._model.max_seq_length)

    def _vectors(self, items: list[Any]) -> NDArray[np.float32]:
        options = {"normalize_embeddings": self._normalize, "convert_to_numpy": True, "show_progress_bar": False}
        return np.asarray(self._model.encode(items, batch_size=len(items), **options), dtype=np.float32)


class _Texts:
    """Texts by row id."""

    def __init__(self, dataset: Any, tokenizer: Any) -> None:
        self._dataset, self._tokenizer = dataset, tokenizer

    def __getitems__(self, ids: list[int]) -> list[str]:
        return row_texts(self._dataset, np.array(ids, dtype=np.int64), self._tokenizer)


def text_sweep(corpus: Corpus, rows: Rows, tokenizer: Any, *, token_budget: int, device: torch.device) -> Sweep:
    """Return a pass over the text of rows [n], which ``tokenizer`` decodes, for ``score`` of an encoder."""
    return Sweep(
        dataset=_Texts(corpus.dataset, tokenizer),
        rows=rows,
        lengths=corpus.lengths[rows],
        collate=lambda texts: {"texts": texts},
        token_budget=token_budget,
        device=device,
        what="embeddings by another model",
    )
