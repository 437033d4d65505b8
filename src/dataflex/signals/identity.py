"""The identity of a model's state, for naming stored answers: equal states give equal names on any number of ranks.

A full hash of billions of parameters would cost more than some passes; two moments and a sample of
every tensor tell states of a training run apart, since an optimizer step moves all of a tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist

from dataflex.dist import comm

__all__ = ["state_identity"]

_SAMPLED = 64


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a parameter that this rank holds: all of it unless ZeRO-3 or FSDP partitions it."""
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor.detach()
    if hasattr(tensor, "to_local"):
        return tensor.to_local().detach()
    return tensor.detach()


def state_identity(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return 32 hex digits that name the values of tensors (collective).

    Args:
        named: Names and tensors, in the same order on every rank.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in named:
        flat = _local(tensor).reshape(-1)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if not flat.numel():
            continue
        wide = flat.double()
        numbers = [wide.sum(), (wide * wide).sum(), *wide[:: max(1, wide.numel() // _SAMPLED)][:_SAMPLED]]
        digest.update(torch.stack(numbers).cpu().numpy().tobytes())
    mine = digest.hexdigest()
    if comm.world() == 1:
        return mine
    all_ranks: list[str] = [""] * comm.world()
    dist.all_gather_object(all_ranks, mine)
    # Ranks that hold whole parameters agree; parts are named by all of them together.
    return (
        mine if len(set(all_ranks)) == 1 else hashlib.blake2b("".join(all_ranks).encode(), digest_size=16).hexdigest()
    )
