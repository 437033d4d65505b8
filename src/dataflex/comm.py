"""The collectives that DataFlex needs: all ranks call them, in the same order. Un-initialized, there is one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from dataflex.errors import AgreementError, ComponentError, DataFlexError

T = TypeVar("T")


def _up() -> bool:
    return dist.is_available() and dist.is_initialized()


def world() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if _up() else 1


def rank() -> int:
    """Return this process's rank."""
    return dist.get_rank() if _up() else 0


def barrier() -> None:
    """Wait until every rank is here."""
    if world() > 1:
        dist.barrier()


def gather_rows(local: torch.Tensor, *, equal: bool = False) -> tuple[torch.Tensor, slice]:
    """Concatenate tensors over ranks.

    Args:
        local: [n, ...]; n may differ between ranks, the rest may not.
        equal: Whether n is known to be the same on every rank; nothing is read from the device then.

    Returns:
        The tensors of all ranks in rank order [sum n, ...] and the slice that is this rank's.
    """
    if world() == 1:
        return local, slice(0, len(local))
    sizes = [len(local)] * world()
    if not equal:
        counts = [torch.zeros(1, dtype=torch.int64, device=local.device) for _ in sizes]
        dist.all_gather(counts, torch.tensor([len(local)], dtype=torch.int64, device=local.device))
        sizes = [int(count) for count in counts]
    padded = torch.cat([local, local.new_zeros((max(sizes) - len(local), *local.shape[1:]))])
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    start = sum(sizes[: rank()])
    whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return whole, slice(start, start + sizes[rank()])


def gather_sum(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of ``values`` over ranks, added in rank order so that every rank gets the same bits."""
    if world() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world())]
    dist.all_gather(parts, values.contiguous())
    return torch.stack(parts).sum(dim=0)


def ratio_of_sums(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """Return the sum of one scalar over ranks divided by that of another, float64; 0 unless the latter is > 0."""
    total, part = gather_sum(torch.stack([above.double(), below.double()])).unbind()
    return torch.where(part > 0, total / part, torch.zeros_like(total))


def broadcast_object(value: T) -> T:
    """Return rank 0's ``value`` on every rank."""
    if world() == 1:
        return value
    box: list[T] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Return the ``value`` of every rank, in rank order, on every rank."""
    if world() == 1:
        return [value]
    seen: list[T] = [value] * world()
    dist.all_gather_object(seen, value)
    return seen


def agree(what: str, value: str) -> None:
    """Raise AgreementError on every rank unless all hold the same short string; it names those that differ."""
    seen = gather_objects(value)
    odd = [index for index, other in enumerate(seen) if other != seen[0]]
    if odd:
        raise AgreementError(f"{what}: ranks {odd} differ from rank 0 ({seen}); the ranks would train on other data")


def on_one_rank(what: str, compute: Callable[[], T], told: type[DataFlexError] = ComponentError) -> T:
    """Run ``compute`` on rank 0 alone and return its value on every rank.

    Where it fails, rank 0 raises its own error and the others ``told``; ``what`` names it in errors.
    """
    outcome: tuple[str, T] = (f"{what} failed on rank 0", cast(T, None))
    if rank() != 0:
        failed, value = broadcast_object(outcome)
        if failed:
            raise told(failed)
        return value
    try:
        outcome = ("", compute())
        return outcome[1]
    except DataFlexError as error:
        outcome = (str(error), cast(T, None))
        raise
    finally:
        broadcast_object(outcome)
