"""The reference model that token losses are compared with: its folder, its tokenizer, its weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from dataflex.errors import ConfigError
from dataflex.signals.causal import ADAPTER, LOAD_ERRORS, differing_tokens, holds_model, largest_id, load_causal
from dataflex.signals.fingerprint import Fingerprint
from dataflex.signals.identity import inputs_identity, model_identity, precision, tokenizer_identity

__all__ = ["KEY", "check_folder", "check_tokenizer", "load_reference", "losses_key"]

KEY = "reference"
"""The parameter that names the folder, for messages."""


def check_folder(folder: str | Path) -> Path:
    """Return the folder of a reference model.

    Raises:
        ConfigError: It is not there, or holds no model.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigError(f"{KEY}: no such folder: {folder} (the model to compare losses with; train it first)")
    if not holds_model(path):
        raise ConfigError(f"{KEY}: {folder} holds no model (neither config.json nor {ADAPTER})")
    return path


def check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Refuse a reference whose tokens are not those of the run.

    Raises:
        ConfigError: The folder has no tokenizer, or one with another vocabulary.
    """
    from transformers import AutoTokenizer

    try:
        other = AutoTokenizer.from_pretrained(folder)
    except LOAD_ERRORS as error:
        raise ConfigError(f"{KEY}: {folder} has no tokenizer that can be loaded: {error}") from error
    differing = differing_tokens(tokenizer, other)
    if not differing:
        return
    token, ours, theirs = differing[0], tokenizer.get_vocab(), other.get_vocab()
    raise ConfigError(
        f"{KEY}: the tokenizer of {folder} is not that of the run: {len(theirs):,} tokens against {len(ours):,}, "
        f"{len(differing):,} differ (such as {token!r}: id {theirs.get(token)} there, {ours.get(token)} here). Losses "
        "of different tokens cannot be compared; take a reference with the tokenizer of the run"
    )


def load_reference(folder: Path, tokenizer: Any, device: torch.device) -> torch.nn.Module:
    """Return the model of a folder (or the adapter on its base model), whole, frozen, in eval mode.

    Raises:
        ConfigError: It cannot be loaded, or has fewer embeddings than the tokenizer has ids.
    """
    from dataflex.llamafactory.whole import loading_whole

    try:
        with loading_whole():
            model: Any = load_causal(folder, "auto", device)
    except LOAD_ERRORS as error:
        raise ConfigError(f"{KEY}: {folder} cannot be loaded as a language model: {error}") from error
    rows = model.get_input_embeddings().weight.shape[0]
    largest = largest_id(tokenizer)
    if largest >= rows:
        raise ConfigError(f"{KEY}: {folder} knows {rows:,} tokens, and the tokenizer has ids up to {largest:,}")
    return model


def losses_key(
    model: torch.nn.Module,
    *,
    tokenizer: Any,
    data: str,
    dataset: Any,
    num_rows: int,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Fingerprint:
    """Name token losses by weights, data, tokenizer, precision, and how rows become batches (collective).

    Args:
        model: The reference.
        tokenizer: The run's.
        data: Fingerprint of the rows' tokens and labels.
        dataset: Features by row id; some rows are collated, since masks and positions tell how the documents
            of a packed row are kept apart.
        num_rows: N.
        collate: Features to a batch.
        autocast: The trainer's mixed-precision context.
    """
    return Fingerprint(
        model=model_identity(model),
        data=data,
        method="reference-losses",
        parameters={
            "tokenizer": tokenizer_identity(tokenizer),
            "inputs": inputs_identity(dataset, num_rows, collate),
            **precision(autocast, next(model.parameters()).device),
        },
    )
