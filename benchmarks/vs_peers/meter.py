"""What a pass costs, and what exact scores are; for the drivers, each of which runs in a system's own environment."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MB = 1e6


def _cpu() -> float:
    """Return user and system seconds of this process and of the workers that it waited for."""
    both = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def _field(file: str, name: str) -> int:
    lines = Path(file).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class Meter:
    """Adds up what is spent inside ``measure``."""

    def __init__(self) -> None:
        self.passes, self.cpu, self.peak_mb, self.disk_mb = 0, 0.0, 0.0, 0.0

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Measure a pass: CPU seconds, largest resident memory of the process meanwhile, and bytes written to disk."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        disk, cpu = _field("/proc/self/io", "write_bytes"), _cpu()
        yield
        self.cpu += _cpu() - cpu
        self.disk_mb += (_field("/proc/self/io", "write_bytes") - disk) / MB
        self.peak_mb = max(self.peak_mb, _field("/proc/self/status", "VmHWM") * 1024 / MB)
        self.passes += 1

    def result(self) -> dict[str, float]:
        """Return all of it, CPU seconds by pass."""
        each = self.cpu / max(self.passes, 1)
        return {"passes": self.passes, "cpu": each, "peak_mb": self.peak_mb, "disk_mb": self.disk_mb}


def spread(count: int, wanted: int) -> list[int]:
    """Return evenly spaced positions, at most ``wanted`` of ``count``."""
    return [i * count // wanted for i in range(wanted)] if wanted < count else list(range(count))


def row_batch(row: Any) -> dict[str, Any]:
    """Return a batch of one tokenized row."""
    import torch

    return {key: torch.tensor([list(row[key])]) for key in ("input_ids", "attention_mask", "labels")}


def row_gradient(model: Any, row: Any) -> Any:
    """Return the gradient [P] of a row's mean loss, by autograd, with the row as the whole batch."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(model(**row_batch(row)).loss, trained)])


def losses_oracle(model: Any, rows: Sequence[Any]) -> list[float]:
    """Return the mean loss of each row."""
    import torch

    with torch.no_grad():
        return [float(model(**row_batch(row)).loss) for row in rows]


def adam(model: Any, state: Any, *, corrected: bool) -> Callable[[Any], Any]:
    """Return what turns a gradient [P] into Adam's direction with the moments of ``state`` held (LESS, section 3.1).

    ``corrected``: with Adam's correction of the moments' bias. The peer leaves it out.
    """
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first, second = (torch.cat([state[p][key].reshape(-1) for p in trained]) for key in ("exp_avg", "exp_avg_sq"))
    step = int(state[trained[0]]["step"]) + 1
    whole, root = (1 - 0.9**step, 1 - 0.999**step) if corrected else (1.0, 1.0)

    def direction(gradient: Any) -> Any:
        square = (0.999 * second + 0.001 * gradient.square()) / root
        return (0.9 * first + 0.1 * gradient) / whole / (square.sqrt() + 1e-8)

    return direction


def cosines_oracle(model: Any, rows: Sequence[Any], targets: Sequence[Any], direction: Callable[[Any], Any]) -> Any:
    """Return the cosine of each row's direction with each target's gradient [rows, targets]."""
    import torch

    unit = torch.nn.functional.normalize
    aims = unit(torch.stack([row_gradient(model, row) for row in targets]))
    return torch.stack([aims @ unit(direction(row_gradient(model, row)), dim=0) for row in rows])


def agreement(scores: Sequence[float], exact: Sequence[float]) -> dict[str, float]:
    """Return Spearman's correlation and the largest difference, relative to the largest exact value."""
    import numpy as np
    from scipy.stats import spearmanr

    a, b = np.asarray(scores, dtype=float), np.asarray(exact, dtype=float)
    return {
        "spearman": float(spearmanr(a.ravel(), b.ravel()).statistic),
        "error": float(abs(a - b).max() / abs(b).max()),
    }


def one_thread() -> None:
    """Keep torch to one thread."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
