"""Target vectors: for each task, the mean of its rows' gradients, or of their directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dataflex.errors import DataError
from dataflex.signals.gradients.consume import Norms, WeightedSums
from dataflex.signals.gradients.engine import GradientEngine
from dataflex.signals.gradients.vectors import TargetVectors

__all__ = ["TargetBuilder"]


class TargetBuilder:
    """Collects per-task means of plain (SGD) gradients over batches.

    With ``normalize_rows`` each row counts with its unit vector, so that a product of a unit vector
    with the result is the mean of the cosines with the task's rows (what LESS's code computes); this
    takes a second pass over the batch. Without it, it is the task's mean gradient (the paper's text).

    Args:
        engine: Of the model.
        num_tasks: Tasks M.
        normalize_rows: As above.
        device: Where the vectors are kept; "cpu" if they are too big for the model's device.
    """

    def __init__(
        self,
        engine: GradientEngine,
        *,
        num_tasks: int,
        normalize_rows: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        where = device if device is not None else next(iter(engine.parameters.values())).device
        self.engine, self.normalize_rows = engine, normalize_rows
        self._sums = WeightedSums(TargetVectors.zeros(num_tasks, engine.shapes, where))
        self._counts = torch.zeros(num_tasks, dtype=torch.float64, device=where)

    def add(self, batch: dict[str, Any], tasks: torch.Tensor) -> dict[str, torch.Tensor]:
        """Add a batch whose rows belong to ``tasks`` [b]; a task of -1 means the row does not count.

        Returns:
            "losses" [b] of the rows.
        """
        known = torch.arange(len(self._counts)).unsqueeze(1)
        weights = (tasks.cpu().unsqueeze(0) == known).float()
        counts = weights.double()
        if self.normalize_rows:
            found = self.engine.run(batch, [Norms()])
            norms = found["norms"].cpu().nan_to_num(0.0)
            weights = torch.where(norms > 0, weights / norms, 0.0)
        self._sums.weights = weights
        found = self.engine.run(batch, [self._sums])
        supervised = torch.isfinite(found["losses"].cpu())
        self._counts += (counts * supervised).sum(dim=1).to(self._counts.device)
        return {"losses": found["losses"]}

    def finish(self, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None) -> TargetVectors:
        """Return the means.

        Args:
            reduce: Adds a tensor up over ranks (``comm.gather_sum``); every rank ends with the same vectors.

        Raises:
            DataError: A task without any row that has a loss.
        """
        vectors, counts = self._sums.vectors, self._counts
        if reduce is not None:
            counts = reduce(counts)
            for name, tensor in vectors.tensors.items():
                vectors.tensors[name] = reduce(tensor)
        if (counts == 0).any():
            empty = counts.eq(0).nonzero().flatten().tolist()
            raise DataError(f"gradients: tasks {empty} of the target have no row with a supervised token")
        return vectors.scale_(1 / counts)
