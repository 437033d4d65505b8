"""DoReMi from end to end: reference model, proxy, averaged proportions, final model; in rounds if asked for.

Xie et al., arXiv 2305.10429. Everything lies in one folder:

- ``round-1/reference.yaml`` and ``round-1/reference``: a small model trained on the reference proportions;
- ``round-1/proxy.yaml`` and ``round-1/proxy``: the run of the ``doremi`` mixer;
- ``round-1/proportions.json``: the mean of its weights, which are the reference proportions of round 2;
- ``proportions.json``: those of the last round; ``final.yaml`` and ``final``: the model trained with them.

All configurations are written before anything is trained, so that another machine can run them too. What
a step needs is what lies there: a finished step is not done again, a killed run goes on where it was.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.build import method_block
from dataflex.config.load import load_mapping
from dataflex.config.mappings import as_yaml
from dataflex.config.schema import FLAT_KEYS
from dataflex.config.split import resolve, split
from dataflex.errors import ConfigError, DataError
from dataflex.mixing.swarm import finished as record_finished
from dataflex.plan.proportions import (
    ProportionsFile,
    digest_of,
    file_digest,
    provenance,
    read_proportions,
    write_proportions,
)
from dataflex.printable import redacted, without_secrets
from dataflex.record.text import table
from dataflex.state import replacing, write_json

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


_RECORD = "doremi.json"
_FORMAT = 1
# What belongs to the final run alone: the small runs have a mixer and nothing else that decides.
_NOT_FOR_PROXIES = (
    "selector",
    "weighter",
    "keep_ratio",
    "repeat",
    "warmup_steps",
    "interval_steps",
    "min_proportion",
    "initial_proportions",
)


def make_plan(
    mapping: Mapping[str, Any], small: Mapping[str, Any], base_dir: Path, folder: Path, settings: Settings
) -> DoremiPlan:
    """Check everything, and write the configurations of all runs.

    Args:
        mapping: Configuration of the final run. Its mixer, if it has one, must be ``doremi``: those are the
            parameters of the proxy runs.
        small: Keys that differ in the reference and proxy runs.
        base_dir: Folder of the configuration file.
        folder: Where to write.
        settings: What was asked for.

    Raises:
        ConfigError: Anything wrong with the configurations or settings, or other runs lie there.
    """
    flat = [key for key in mapping if key in FLAT_KEYS]
    if flat:
        raise ConfigError(f"{flat[0]}: flat keys cannot be used here; write a 'dynamic' block, or none")
    block = mapping.get("dynamic")
    if block is not None and not isinstance(block, Mapping):
        raise ConfigError("dynamic: expected a mapping")
    params, given = _proxy_params(block or {})
    settings = dataclasses.replace(settings, reference=settings.reference or given)
    if "dynamic" in small:
        raise ConfigError("--small: holds a 'dynamic' block; write it into the configuration of the final run")
    plan = DoremiPlan(
        folder=folder,
        settings=settings,
        rounds=tuple(_round(folder, number, settings) for number in range(1, settings.rounds + 1)),
        config_digest=digest_of(
            {
                "config": {key: value for key, value in mapping.items() if key != "output_dir"},
                "small": dict(small),
                "reference": settings.reference,
                "reference_mix": settings.reference_mix,
            }
        ),
    )
    plugins = _plugins(mapping, base_dir)
    configs = _configurations(plan, mapping, small, params, plugins)
    _check(configs, base_dir, settings)
    _same_as_before(plan)
    _write(plan, configs)
    return plan


def _proxy_params(block: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return the doremi mixer's parameters without the reference, and the reference if one is named."""
    mixer = block.get("mixer")
    if mixer is None:
        return {}, None
    written = {"name": mixer} if isinstance(mixer, str) else dict(mixer) if isinstance(mixer, Mapping) else {}
    if written.pop("name", None) != "doremi":
        raise ConfigError(
            "dynamic.mixer: this command finds the proportions of the final run, so its mixer is replaced; leave the "
            "mixer out, or give the parameters of the proxy runs as 'mixer: {name: doremi, ...}'"
        )
    reference = written.pop("reference", None)
    problems: list[str] = []
    method_block("mixer", {"name": "doremi", "reference": "folder", **written}, "dynamic.mixer", problems)
    if problems:
        raise ConfigError(problems)
    return written, None if reference is None else str(reference)


def _round(folder: Path, number: int, settings: Settings) -> Round:
    here = folder / f"round-{number}"
    given = settings.reference if number == 1 else None
    return Round(
        number=number,
        folder=here,
        reference=here / "reference" if given is None else Path(given),
        trains_reference=given is None,
    )


def _plugins(mapping: Mapping[str, Any], base_dir: Path) -> list[str]:
    block = {**(mapping.get("dynamic") or {}), "mixer": "size"}
    parts = split({**mapping, "dynamic": block}, base_dir)
    return list(parts.dynamic.plugins) if parts.dynamic is not None else []  # absolute by now


def _configurations(
    plan: DoremiPlan,
    mapping: Mapping[str, Any],
    small: Mapping[str, Any],
    params: Mapping[str, Any],
    plugins: Sequence[str],
) -> dict[Path, dict[str, Any]]:
    """Return the configuration of every run by the path of its file."""
    base: dict[str, Any] = copy.deepcopy(dict(mapping))
    block = base.pop("dynamic", None) or {}
    for key in ("overwrite_output_dir", "resume_from_checkpoint"):  # a run that was killed must go on
        base.pop(key, None)
    if plugins:
        block["plugins"] = list(plugins)
    domains = {key: value for key, value in block.items() if key not in _NOT_FOR_PROXIES}

    def made(top: Mapping[str, Any], output_dir: Path, dynamic: Mapping[str, Any], mixer: Any) -> dict[str, Any]:
        name = output_dir.relative_to(plan.folder).as_posix()
        renamed = {"run_name": f"{top['run_name']}-{name}"} if top.get("run_name") else {}
        return {**top, **renamed, "output_dir": str(output_dir), "dynamic": {**dynamic, "mixer": mixer}}

    configs = {}
    for at in plan.rounds:
        if at.trains_reference:
            mix = plan.settings.reference_mix if at.number == 1 else str(plan.rounds[at.number - 2].proportions)
            mixer: Any = mix if mix in ("size", "uniform") else {"name": "static", "from": mix}
            configs[at.folder / "reference.yaml"] = made({**base, **small}, at.reference, domains, mixer)
        proxy = {"name": "doremi", "reference": str(at.reference), **params}
        configs[at.folder / "proxy.yaml"] = made({**base, **small}, at.proxy, domains, proxy)
    final = {"name": "static", "from": str(plan.proportions)}
    configs[plan.folder / "final.yaml"] = made(base, plan.final, block, final)
    return configs


def _check(configs: Mapping[Path, dict[str, Any]], base_dir: Path, settings: Settings) -> None:
    """Check the configurations as far as that can be done before their models and proportions are there."""
    problems: list[str] = []
    for path, config in configs.items():
        dynamic = dict(config["dynamic"])
        mixer = dynamic["mixer"]
        awaited = []
        if isinstance(mixer, Mapping) and mixer["name"] == "static" and mixer["from"] != settings.reference_mix:
            dynamic["mixer"] = "size"  # the file is yet to be made
        if isinstance(mixer, Mapping) and mixer["name"] == "doremi" and mixer["reference"] != settings.reference:
            awaited = ["dynamic.mixer.reference: "]
        try:
            resolve({**config, "dynamic": dynamic}, base_dir)
        except ConfigError as error:
            found = [line for line in error.problems if not any(line.startswith(start) for start in awaited)]
            problems += [f"{path.name}: {line}" for line in found]
        if not LlamaFactoryArgs.read(config).do_train:
            problems.append(f"{path.name}: do_train: is not on")
    if problems:
        raise ConfigError(dict.fromkeys(problems))


def _same_as_before(plan: DoremiPlan) -> None:
    path = plan.folder / _RECORD
    if not path.is_file():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["config_digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if before != plan.config_digest:
        raise ConfigError(
            f"--out: {plan.folder} holds runs of another configuration, reference or overrides; name another folder, "
            "or move that away"
        )


def _write(plan: DoremiPlan, configs: Mapping[Path, dict[str, Any]]) -> None:
    try:
        for path, config in configs.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(as_yaml(without_secrets(config)).encode())
    except OSError as error:
        raise ConfigError(f"--out: {plan.folder} cannot be written: {error.strerror or error}") from error
    record = {"format": _FORMAT, "config_digest": plan.config_digest, **dataclasses.asdict(plan.settings)}
    write_json(plan.folder / _RECORD, redacted(record))


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
        evaluates = LlamaFactoryArgs.read(load_mapping(config)).do_eval
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
