"""An equal-weight average of the model's weights over the last steps of a run.

An order of the data gains little under a learning rate that decays: the rows that come last move the model least. With
a rate that stays, an average over the last steps takes the place of the decay (Luo et al., arXiv 2511.18903).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dataflex.config.schema import AverageConfig
from dataflex.state import State

logger = logging.getLogger(__name__)


class WeightAverage:
    """The mean, in fp32, of the trainable parameters after every ``every``-th of the last ``last_steps`` steps.

    Each rank must hold the same whole parameters.
    """

    def __init__(self, model: torch.nn.Module, options: AverageConfig, total_steps: int) -> None:
        self._model, self._options, self._total = model, options, total_steps
        self._mean: dict[str, torch.Tensor] = {}
        self._last = 0  # step that was taken last
        self.count = 0  # steps that were taken

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: each for name, each in self._model.named_parameters() if each.requires_grad}

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Add the weights after the optimizer's ``step``-th update (counted from 1), if it is one of the last."""
        left = self._total - step
        if left >= self._options.last_steps or left % self._options.every or step == self._last:
            return
        self.count, self._last = self.count + 1, step
        for name, parameter in self._parameters().items():
            value = parameter.detach().float()
            if name in self._mean:
                self._mean[name] += (value - self._mean[name]) / self.count
            else:
                self._mean[name] = value.clone()

    def found(self) -> WeightAverage | None:
        """Return this, or None with a warning where the run ended before the steps that are averaged."""
        if not self.count:
            logger.warning("average_weights: the run ended before its last %d steps", self._options.last_steps)
        return self if self.count else None

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Give the model the average while inside."""
        parameters = self._parameters()
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.copy_(self._mean[name])
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.copy_(before[name])

    def state_dict(self) -> State:
        """Return the average so far, by number of the parameter; nothing before the first step of it."""
        if not self.count:
            return {}
        mean = {str(number): value.cpu().numpy() for number, value in enumerate(self._mean.values())}
        return {"window": self._window(), "count": self.count, "last": self._last, "mean": mean}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave, unless the run has other last steps now."""
        if not state:
            return
        if state["window"] != self._window():
            logger.info("resume: the run has other last steps now, so that their average begins anew")
            return
        self.count, self._last = int(state["count"]), int(state["last"])
        parameters = self._parameters()
        self._mean = {
            name: torch.from_numpy(state["mean"][str(number)].copy()).to(parameter.device)
            for number, (name, parameter) in enumerate(parameters.items())
        }

    def _window(self) -> list[int]:
        return [self._options.last_steps, self._options.every, self._total]
