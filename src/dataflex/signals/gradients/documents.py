"""Documents of packed rows as samples of their own.

Where a row's documents cannot see one another (``neat_packing``), the gradient at a token's position
belongs to its own document's loss alone, so one backward pass serves all of them: a layer's inputs and
output gradients are laid out anew, one document a sample. Where attention crosses documents (plain
``packing``), a later document's loss reaches back into earlier ones, and there is no telling them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dataflex.errors import UnsupportedError
from dataflex.signals.gradients.narrow import TokenLoss
from dataflex.signals.packing import document_ids, real_tokens

__all__ = ["Documents", "document_losses"]


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The documents of a batch, ordered by row and place in it.

    Attributes:
        row: Row of each document in the batch, int64 [D].
        number: Its number in that row, counted from 0, int64 [D].
        sample: Index in [0, D) of every token's document, -1 for padding, int64 [B, T].
        tokens: Flat positions row * T + t of each document's tokens, int64 [D, L], 0 where there is none.
        real: Whether there is a token, bool [D, L].
    """

    row: torch.Tensor
    number: torch.Tensor
    sample: torch.Tensor
    tokens: torch.Tensor
    real: torch.Tensor

    @classmethod
    def of(cls, batch: dict[str, Any]) -> Documents:
        """Find the documents of a collated batch.

        Raises:
            UnsupportedError: The documents of a row can see one another.
        """
        ids = document_ids(batch)
        mask = batch.get("attention_mask")
        if mask is not None and mask.dim() == 2 and bool(ids.gt(0).any()):
            raise UnsupportedError(
                "gradients by document: the documents of a packed row see one another here, so that their gradients "
                "cannot be told apart; set neat_packing: true"
            )
        places = torch.arange(ids.numel(), device=ids.device)
        inside = ids.flatten().ge(0) & real_tokens(batch).flatten()
        keys = (places // ids.shape[1] * (ids.shape[1] + 1) + ids.flatten())[inside]
        found, which, counts = torch.unique(keys, return_inverse=True, return_counts=True)
        sample = torch.full_like(places, -1)
        sample[inside] = which
        order = which.argsort(stable=True)
        at = torch.arange(len(order), device=ids.device) - (counts.cumsum(0) - counts)[which[order]]
        tokens = places.new_zeros(len(found), int(counts.max()) if len(counts) else 0)
        real = torch.zeros_like(tokens, dtype=torch.bool)
        tokens[which[order], at] = places[inside][order]
        real[which[order], at] = True
        return cls(
            row=found // (ids.shape[1] + 1),
            number=found % (ids.shape[1] + 1),
            sample=sample.view_as(ids),
            tokens=tokens,
            real=real,
        )

    def __len__(self) -> int:
        return len(self.row)

    def apart(self, tensor: torch.Tensor) -> torch.Tensor:
        """Lay [B, T, ...] out as [D, L, ...], zero where a document has no token.

        Raises:
            UnsupportedError: The tensor has no position for every token.
        """
        if tensor.shape[:2] != self.sample.shape:
            raise UnsupportedError(
                f"gradients by document: a layer holds {tuple(tensor.shape)} for rows of {self.sample.shape[1]} tokens"
            )
        laid = tensor.flatten(0, 1)[self.tokens]
        return laid.masked_fill(~self.real.view(*self.real.shape, *([1] * (laid.dim() - 2))), 0)


def document_losses(tokens: TokenLoss) -> Callable[[dict[str, Any], Documents], torch.Tensor]:
    """Return a function from a batch and its documents to token-mean losses [D], NaN without labels.

    A token that is predicted from another document's last one counts for neither.
    """

    def losses(batch: dict[str, Any], documents: Documents) -> torch.Tensor:
        row, before, values = tokens(batch)
        whose = documents.sample[row, before + 1]
        own = whose.ge(0) & whose.eq(documents.sample[row, before])
        sums = torch.zeros(len(documents), dtype=torch.float32, device=values.device)
        return sums.index_add(0, whose[own], values[own]) / torch.bincount(whose[own], minlength=len(documents))

    return losses
