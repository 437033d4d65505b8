"""The steps of ``dataflex mix doremi``, one after another or one alone; each looks at the disk for what is done."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dataflex.config.load import load_mapping
from dataflex.config.values import truthy
from dataflex.errors import ConfigError, DataError
from dataflex.mixing.doremi_plan import CHANGE, DoremiPlan, Round, run_finished
from dataflex.mixing.proportions_file import (
    ProportionsFile,
    file_digest,
    provenance,
    read_proportions,
    write_proportions,
)
from dataflex.record.text import table

__all__ = ["Steps", "table_of"]


def table_of(content: ProportionsFile) -> list[str]:
    """Return the proportions found beside those of the reference, largest first, and what is wrong with them."""
    before: Mapping[str, float] = content.details.get("reference_proportions") or {}
    rows = [["domain", "found", "reference"]]
    for name, share in sorted(content.by_name.items(), key=lambda item: -item[1]):
        rows.append([name, f"{share:.4f}", f"{before[name]:.4f}" if name in before else "-"])
    warning = content.details.get("warning")
    return [*table(rows, "<>>"), *([f"warning: {warning}"] if warning else [])]


class Steps:
    """Runs steps of a plan.

    Args:
        plan: The runs.
        train: Trains one configuration in a process of its own and returns its exit code.
        tell: Takes one line per step.
    """

    def __init__(self, plan: DoremiPlan, train: Callable[[Path], int], tell: Callable[[str], None]) -> None:
        self.plan, self._train, self._tell = plan, train, tell

    def all(self) -> int:
        """Run every step that is not finished, until the proportions settle, and return an exit code."""
        for at in self.plan.rounds:
            code = self.reference(at) or self.proxy(at)
            if code:
                return code
            if self.proportions(at) < CHANGE:
                break
        return self.final()

    def one(self, step: str, number: int) -> int:
        """Run one step of one round and return an exit code."""
        if step == "final":
            return self.final()
        at = self.plan.rounds[number - 1]
        if step == "proportions":
            self.proportions(at)
            return 0
        return self.reference(at) if step == "reference" else self.proxy(at)

    def reference(self, at: Round) -> int:
        """Train the reference model of a round, unless it was given."""
        if not at.trains_reference:
            self._tell(f"round {at.number}, reference: {at.reference}, as given")
            return 0
        if at.number > 1 and not self.plan.rounds[at.number - 2].proportions.is_file():
            raise ConfigError(f"--step reference: round {at.number - 1} has not found its proportions yet")
        return self._run(f"round {at.number}, reference", at.folder / "reference.yaml", at.reference)

    def proxy(self, at: Round) -> int:
        """Train the proxy model of a round."""
        if at.trains_reference and not run_finished(at.reference):
            raise ConfigError(f"--step proxy: the reference of round {at.number} ({at.reference}) is not trained yet")
        return self._run(f"round {at.number}, proxy", at.folder / "proxy.yaml", at.proxy)

    def proportions(self, at: Round) -> float:
        """Write what the proxy of a round found, and return how far it is from the reference proportions."""
        if not run_finished(at.proxy):
            raise ConfigError(f"--step proportions: the proxy of round {at.number} ({at.proxy}) is not trained yet")
        found = read_proportions(at.found, "--step proportions")
        before = self._reference_proportions(at, found)
        change = max(abs(share - before[name]) for name, share in found.by_name.items())
        content = ProportionsFile(
            names=found.names,
            proportions=found.proportions,
            method="doremi",
            details={
                **found.details,
                "round": at.number,
                "reference_proportions": before,
                "largest_change": change,
                "settled": change < CHANGE,
            },
            provenance={
                **provenance(
                    "dataflex mix doremi",
                    inputs=[at.found],
                    settings={**dataclasses.asdict(self.plan.settings), **found.provenance.get("settings", {})},
                    packages=("torch", "transformers", "llamafactory"),
                    config_digest=self.plan.config_digest,
                ),
                "reference": _model(at.reference),
                "proxy": _model(at.proxy),
            },
        )
        self._publish(at.proportions, content)
        last = [other for other in self.plan.rounds if other.proportions.is_file()][-1]
        latest = read_proportions(last.proportions)
        self._check_final(latest)
        self._publish(self.plan.proportions, latest)
        self._tell(f"round {at.number}, proportions: {at.proportions}")
        for line in table_of(content):
            self._tell(line)
        self._tell(f"  largest change {change:.2g}" + ("; settled" if change < CHANGE else ""))
        return change

    def final(self) -> int:
        """Train the final model with the proportions found last."""
        if not self.plan.proportions.is_file():
            raise ConfigError(f"--step final: {self.plan.proportions} is not there yet; run the steps before")
        return self._run("final", self.plan.folder / "final.yaml", self.plan.final)

    def _run(self, what: str, config: Path, output_dir: Path) -> int:
        evaluates = truthy(load_mapping(config), "do_eval")
        if run_finished(output_dir, evaluates=evaluates):
            self._tell(f"{what}: finished before ({output_dir})")
            return 0
        self._tell(f"{what}: training ({config})")
        code = self._train(config)
        if code != 0:
            self._tell(
                f"{what}: ended with exit code {code}; its messages are above. The same command goes on from here."
            )
            return code
        if not run_finished(output_dir, evaluates=evaluates):
            raise DataError(f"{what}: ended well, but {output_dir} holds no record of a finished run")
        return 0

    def _reference_proportions(self, at: Round, found: ProportionsFile) -> dict[str, float]:
        mix = self.plan.settings.reference_mix
        if at.number > 1:
            return read_proportions(self.plan.rounds[at.number - 2].proportions).by_name
        if mix == "uniform":
            return dict.fromkeys(found.names, 1.0 / len(found.names))
        if mix == "size":
            sizes = found.details["sizes"]
            total = sum(sizes.values())
            return {name: sizes[name] / total for name in found.names}
        given = read_proportions(mix, "--reference-mix").by_name
        missing = [name for name in found.names if name not in given]
        if missing:
            raise ConfigError(f"--reference-mix: {mix} has no proportion of {', '.join(missing)}")
        return given

    def _publish(self, path: Path, content: ProportionsFile) -> None:
        """Write a proportions file, unless one with the same numbers is there."""
        if path.is_file():
            before = read_proportions(path)
            if before.by_name == content.by_name and before.details.get("round") == content.details["round"]:
                return
        write_proportions(path, content)

    def _check_final(self, content: ProportionsFile) -> None:
        path, final = self.plan.proportions, self.plan.final
        started = final.is_dir() and any(final.iterdir())
        if started and path.is_file() and read_proportions(path).by_name != content.by_name:
            raise ConfigError(
                f"--out: {final} was trained with other proportions than those of round {content.details['round']}; "
                "move it away to train it anew"
            )


def _model(folder: Path) -> dict[str, Any]:
    """Return what tells a model apart: its folder, parameters, vocabulary, and a digest of its tokenizer."""
    tokenizer = folder / "tokenizer.json"
    return {
        "folder": str(folder),
        "parameters": _parameters(folder),
        "vocabulary": _config(folder).get("vocab_size"),
        "tokenizer": file_digest(tokenizer) if tokenizer.is_file() else None,
    }


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _parameters(folder: Path) -> int | None:
    """Count the numbers in a folder's safetensors files from their headers; None where there are none."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                count = 1
                for side in entry["shape"]:
                    count *= side
                total += count
    return total or None
