"""Adds up the token losses of one optimizer step by domain, on the device, with one reduction at its end."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex import comm
from dataflex.plan.domains import SUMS

__all__ = ["DomainSums"]


class DomainSums:
    """Sums of one optimizer step.

    Args:
        num_domains: K.
    """

    def __init__(self, num_domains: int) -> None:
        self._num_domains = num_domains
        self._sums: torch.Tensor | None = None

    def add(
        self,
        loss_RT: torch.Tensor,
        mask_RT: torch.Tensor,
        domains_R: NDArray[np.int64],
        reference_RT: torch.Tensor | None = None,
    ) -> None:
        """Take in one micro-batch of this rank.

        Args:
            loss_RT: Plain token losses, detached, 0 where ``mask_RT`` is False.
            mask_RT: Supervised positions.
            domains_R: Domain of each row.
            reference_RT: Token losses of the reference model, 0 where ``mask_RT`` is False.
        """
        loss = loss_RT.detach().double()
        tokens = mask_RT.sum(dim=1).double()
        columns = [loss.sum(dim=1), loss.square().sum(dim=1)]
        if reference_RT is None:
            columns += [torch.zeros_like(tokens)] * 2
        else:
            excess = (loss - reference_RT.double()).clamp(min=0.0)
            columns += [excess.sum(dim=1), excess.gt(0.0).sum(dim=1).double()]
        columns += [tokens, tokens.gt(0).double()]
        which = torch.from_numpy(domains_R).to(loss.device)
        sums = loss.new_zeros(len(SUMS), self._num_domains)
        sums[:-1].index_add_(1, which, torch.stack(columns))
        sums[-1] = sums[SUMS.index("tokens")].gt(0).double()
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self, device: torch.device) -> NDArray[np.float64]:
        """Return the sums over all ranks [len(SUMS), K] and start anew (collective)."""
        sums = self._sums
        if sums is None:
            sums = torch.zeros(len(SUMS), self._num_domains, dtype=torch.float64, device=device)
        self._sums = None
        return comm.gather_sum(sums).cpu().numpy()
