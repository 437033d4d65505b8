"""What ``mixmin`` and ``chameleon`` ask of models: log-likelihoods of short pieces of text, and mean hidden states.

Loads transformers' models from folders, on the GPU where there is one, in float32, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError

if TYPE_CHECKING:
    import torch

__all__ = ["log_likelihoods", "mean_states"]

Floats = NDArray[np.float64]


def log_likelihoods(
    models: Mapping[str, str], texts: Sequence[str], *, piece_tokens: int = 64, batch_size: int = 16
) -> tuple[Floats, Floats]:
    """Return the log-likelihood of every piece under every model [N, K], and the tokens predicted in each piece [N].

    Texts are cut into pieces of at most ``piece_tokens`` tokens, since whole long texts make the best
    proxy of each text take all. A piece begins with the tokenizer's beginning-of-text token; without
    one, its first token is not predicted.

    Args:
        models: Domain -> folder of the model trained on it.
        texts: The target.
        piece_tokens: Most tokens of a piece, at least 2.
        batch_size: Segments per forward pass.

    Raises:
        DataError: A model cannot be loaded, tokenizers differ, or a likelihood is not finite.
    """
    pieces: list[list[int]] = []
    columns: list[Floats] = []
    identity, first = None, ""
    for name, folder in models.items():
        model, tokenizer = _loaded(folder, name, "AutoModelForCausalLM")
        own = (tokenizer.get_vocab(), tokenizer.bos_token_id)
        if piece_tokens >= _most_positions(model):
            raise DataError(f"--piece-tokens: {piece_tokens} are more than {name} has positions for")
        if identity is None:
            identity, first = own, name
            pieces = _pieces(tokenizer, texts, piece_tokens)
        elif own != identity:
            raise DataError(
                f"--models: {name} and {first} have different tokenizers, so that their likelihoods are of different "
                "pieces; train all proxies from one tokenizer"
            )
        columns.append(np.concatenate([_scored(model, batch) for batch in _batches(pieces, batch_size)]))
        if not np.isfinite(columns[-1]).all():
            raise DataError(f"--models: {name} ({folder}) gives likelihoods that are not finite")
        del model
    lengths = np.asarray([len(piece) - 1 for piece in pieces], dtype=np.float64)
    return np.stack(columns, axis=1), lengths


def _pieces(tokenizer: Any, texts: Sequence[str], piece_tokens: int) -> list[list[int]]:
    head = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    pieces = []
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        for start in range(0, len(ids), piece_tokens):
            piece = [*head, *ids[start : start + piece_tokens]]
            if len(piece) >= 2:
                pieces.append(piece)
    if not pieces:
        raise DataError("--target: holds no piece of at least two tokens")
    return pieces


def _scored(model: Any, pieces: list[list[int]]) -> Floats:
    """Return the summed log-probability of each piece's tokens after its first [B], float64."""
    import torch

    ids, mask = _padded(pieces, model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        picked = torch.gather(torch.log_softmax(logits, dim=-1), 2, ids[:, 1:, None])[:, :, 0]
        summed: Floats = (picked.double() * mask[:, 1:]).sum(dim=1).cpu().numpy()
    return summed


def mean_states(folder: str, texts: Sequence[str], *, most_tokens: int = 512, batch_size: int = 16) -> Floats:
    """Return the mean hidden state of the middle layer over each text's first tokens [N, E].

    The middle layer is number floor(L / 2) of L, counted from 1; texts without a token are left out.

    Args:
        folder: The model.
        texts: Texts of one domain.
        most_tokens: Tokens of each text that are read.
        batch_size: Texts per forward pass.

    Raises:
        DataError: The model cannot be loaded, or a state is not finite.
    """
    import torch

    model, tokenizer = _loaded(folder, "--model", "AutoModel")
    most = min(most_tokens, _most_positions(model))
    pieces = [piece for piece in tokenizer(list(texts), truncation=True, max_length=most)["input_ids"] if piece]
    found = []
    for batch in _batches(pieces, batch_size):
        padded, mask = _padded(batch, model.device)
        with torch.inference_mode():
            states = model(input_ids=padded, attention_mask=mask, output_hidden_states=True).hidden_states
            middle = states[max(1, (len(states) - 1) // 2)].double()  # number 0 is the embedding of the tokens
            means = (middle * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        found.append(means.cpu().numpy())
    if not found:
        raise DataError("no text has a token")
    result = np.concatenate(found)
    if not np.isfinite(result).all():
        raise DataError(f"--model: {folder} gives hidden states that are not finite")
    return result


def _most_positions(model: Any) -> int:
    most = getattr(model.config, "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else 1 << 30


def _loaded(folder: str, name: str, kind: str) -> tuple[Any, Any]:
    import torch
    import transformers

    if not Path(folder).expanduser().is_dir():
        raise DataError(f"{name}: no such folder: {folder}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{name}: {folder} cannot be loaded as a model: {str(error).splitlines()[0]}") from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _batches(pieces: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    for start in range(0, len(pieces), size):
        yield pieces[start : start + size]


def _padded(pieces: list[list[int]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask [B, T], padded on the right with 0, which the mask hides."""
    import torch

    width = max(len(piece) for piece in pieces)
    ids = torch.zeros((len(pieces), width), dtype=torch.long)
    mask = torch.zeros((len(pieces), width), dtype=torch.long)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece)] = torch.tensor(piece)
        mask[row, : len(piece)] = 1
    return ids.to(device), mask.to(device)
