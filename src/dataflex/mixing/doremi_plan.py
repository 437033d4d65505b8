"""What lies where in one ``dataflex mix doremi``: its settings, its rounds, and whether a run is finished."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dataflex.mixing.tables import finished as record_finished

__all__ = ["CHANGE", "DoremiPlan", "Round", "Settings", "run_finished"]

CHANGE = 1e-3
"""Rounds end when no proportion is further than this from the one that the reference was trained on."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked for.

    Attributes:
        rounds: Rounds at most.
        reference: Folder of a reference model that is there already, for the first round.
        reference_mix: What the reference of the first round is (or was) trained on: "size", "uniform", or
            a proportions file.
    """

    rounds: int = 1
    reference: str | None = None
    reference_mix: str = "size"


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round on disk.

    Attributes:
        number: Counted from 1.
        folder: Where it lies.
        reference: Folder of its reference model.
        trains_reference: Whether that is trained here.
    """

    number: int
    folder: Path
    reference: Path
    trains_reference: bool

    @property
    def proxy(self) -> Path:
        """Folder of the proxy run."""
        return self.folder / "proxy"

    @property
    def found(self) -> Path:
        """What the proxy run found, as the mixer writes it."""
        return self.proxy / "dataflex" / "doremi.json"

    @property
    def proportions(self) -> Path:
        """Proportions file of the round."""
        return self.folder / "proportions.json"


@dataclass(frozen=True, kw_only=True)
class DoremiPlan:
    """All runs of one ``dataflex mix doremi``.

    Attributes:
        folder: Where everything lies.
        settings: What was asked for.
        rounds: The rounds.
        config_digest: Digest of the configurations that the runs are made from.
    """

    folder: Path
    settings: Settings
    rounds: tuple[Round, ...]
    config_digest: str

    @property
    def final(self) -> Path:
        """Folder of the final run."""
        return self.folder / "final"

    @property
    def proportions(self) -> Path:
        """Proportions that the final run is trained with."""
        return self.folder / "proportions.json"


def run_finished(output_dir: Path, *, evaluates: bool = False) -> bool:
    """Whether a training run has come to its end and saved its model."""
    saved = (output_dir / "train_results.json").is_file()  # written after the model
    return saved and record_finished(output_dir, evaluates=evaluates)
