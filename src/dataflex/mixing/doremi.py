"""``dataflex mix doremi``: reference model, proxy, averaged proportions, final model; in rounds if asked for.

Xie et al., arXiv 2305.10429. Everything lies in one folder:

- ``round-1/reference.yaml`` and ``round-1/reference``: a small model trained on the reference proportions;
- ``round-1/proxy.yaml`` and ``round-1/proxy``: the run of the ``doremi`` mixer;
- ``round-1/proportions.json``: the mean of its weights, which are the reference proportions of round 2;
- ``proportions.json``: those of the last round; ``final.yaml`` and ``final``: the model trained with them.

All configurations are written before anything is trained, so that another machine can run them too. The files show
what is done: a finished step is not repeated, a killed run goes on.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.build import method_block
from dataflex.config.load import load_mapping
from dataflex.config.schema import FLAT_KEYS
from dataflex.config.split import resolve
from dataflex.errors import ConfigError
from dataflex.mixing.runs import (
    configuration,
    digest_of_runs,
    finished,
    refuse_another,
    say,
    train_unfinished,
    without_mixer,
    write_configurations,
)
from dataflex.plan.proportions import ProportionsFile, file_digest, provenance, read_proportions, write_proportions
from dataflex.printable import Answer, left_out_note, passing_on, redacted
from dataflex.record.text import table
from dataflex.state import write_json

CHANGE = 1e-3
"""Rounds end when every proportion is closer than this to the one that the reference was trained on."""

_RECORD = "doremi.json"
_FORMAT = 1
# What belongs to the final run alone: nothing but the mixer decides in the small runs.
_NOT_FOR_PROXIES = (
    "selector weighter orderer keep_ratio repeat exclude_seen max_repeats candidate_batches warmup_steps "
    "interval_steps min_proportion initial_proportions max_epochs at_cap signals ledger"
).split()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked for."""

    rounds: int  # maximum number of rounds
    reference: str | None  # folder of an existing reference model for the first round
    reference_mix: str  # what that is (or was) trained on: "size", "uniform", or a proportions file


@dataclass(frozen=True)
class Round:
    """One round on disk."""

    number: int  # from 1
    folder: Path
    reference: Path  # folder of its reference model
    trains_reference: bool  # whether that is trained here
    mix: str  # what it is trained on: that of the settings, or the proportions file of the round before

    @property
    def proxy(self) -> Path:
        """Folder of the proxy run."""
        return self.folder / "proxy"

    @property
    def proportions(self) -> Path:
        """Proportions file of the round."""
        return self.folder / "proportions.json"


class Doremi:
    """All runs of one ``dataflex mix doremi``, and the steps from one to the next.

    ``mapping`` is the configuration of the final run. Its mixer, if it has one, must be ``doremi`` and holds the
    parameters of the proxy runs. ``small`` are the keys that differ in the reference and proxy runs.
    """

    def __init__(
        self, mapping: Mapping[str, Any], small: Mapping[str, Any], base_dir: Path, folder: Path, settings: Settings
    ) -> None:
        flat = [key for key in mapping if key in FLAT_KEYS]
        if flat:
            raise ConfigError(f"{flat[0]}: flat keys cannot be used here; write a 'dynamic' block, or none")
        if "dynamic" in small:
            raise ConfigError("--small: holds a 'dynamic' block; write it into the configuration of the final run")
        params, named = _proxy_params(mapping.get("dynamic") or {})
        self.folder, self.final, self.proportions_file = folder, folder / "final", folder / "proportions.json"
        self.settings = settings = replace(settings, reference=settings.reference or named)
        self.rounds: list[Round] = []
        for number in range(1, settings.rounds + 1):
            here, given = folder / f"round-{number}", settings.reference if number == 1 else None
            reference = here / "reference" if given is None else Path(given)
            mix = str(self.rounds[-1].proportions) if self.rounds else settings.reference_mix
            self.rounds.append(Round(number, here, reference, given is None, mix))
        self.config_digest = digest_of_runs(
            mapping, small=dict(small), reference=settings.reference, reference_mix=settings.reference_mix
        )
        configs = self._configurations(mapping, small, base_dir, params)
        self._check(configs, base_dir)
        what = "runs of another configuration, reference or overrides, or of other data or models"
        refuse_another(folder / _RECORD, self.config_digest, what)
        write_configurations(folder, configs)
        record = {"format": _FORMAT, "config_digest": self.config_digest, **asdict(settings)}
        write_json(folder / _RECORD, redacted(record))

    def _configurations(
        self, mapping: Mapping[str, Any], small: Mapping[str, Any], base_dir: Path, params: Mapping[str, Any]
    ) -> dict[Path, dict[str, Any]]:
        """Return the configuration of every run by the path of its file."""
        plugins = without_mixer(mapping, base_dir)[1].plugins
        block = mapping.get("dynamic") or {}
        domains = {key: value for key, value in block.items() if key not in _NOT_FOR_PROXIES}
        configs = {}

        def add(path: Path, keys: Mapping[str, Any], output_dir: Path, block: Mapping[str, Any], mixer: Any) -> None:
            name = output_dir.relative_to(self.folder).as_posix()
            configs[path] = configuration(keys, output_dir, name, {**block, "mixer": mixer}, plugins)

        keys = {**mapping, **small}
        for at in self.rounds:
            if at.trains_reference:
                mixer = at.mix if at.mix in ("size", "uniform") else {"name": "static", "from": at.mix}
                add(at.folder / "reference.yaml", keys, at.reference, domains, mixer)
            proxy = {"name": "doremi", "reference": str(at.reference), **params}
            add(at.folder / "proxy.yaml", keys, at.proxy, domains, proxy)
        final = {"name": "static", "from": str(self.proportions_file)}
        add(self.folder / "final.yaml", mapping, self.final, block, final)
        return configs

    def _check(self, configs: Mapping[Path, dict[str, Any]], base_dir: Path) -> None:
        """Check the configurations as far as that can be done before their models and proportions are there."""
        problems: list[str] = []
        for path, config in configs.items():
            mixer = config["dynamic"]["mixer"]
            kind = mixer["name"] if isinstance(mixer, Mapping) else mixer
            awaited = kind == "doremi" and mixer["reference"] != self.settings.reference
            if kind == "static" and mixer["from"] != self.settings.reference_mix:
                mixer = "size"  # the file is not written yet
            try:
                resolve({**config, "dynamic": {**config["dynamic"], "mixer": mixer}}, base_dir)
            except ConfigError as error:
                problems += [
                    f"{path.name}: {line}"
                    for line in error.problems
                    if not (awaited and line.startswith("dynamic.mixer.reference: "))
                ]
            if not LlamaFactoryArgs.read(config).do_train:
                problems.append(f"{path.name}: do_train: is not on")
        if problems:
            raise ConfigError(dict.fromkeys(problems))

    def all(self) -> int:
        """Run every step that is not finished, until the proportions settle, and return an exit code."""
        for at in self.rounds:
            code = self.reference(at) or self.proxy(at)
            if code:
                return code
            if self.proportions(at) < CHANGE:
                break
        return self.final_run()

    def one(self, step: str, number: int) -> int:
        """Run one step of one round and return an exit code."""
        at = self.rounds[number - 1]
        if step == "proportions":
            self.proportions(at)
            return 0
        return self.final_run() if step == "final" else self.reference(at) if step == "reference" else self.proxy(at)

    def reference(self, at: Round) -> int:
        """Train the reference model of a round, unless it was given."""
        if not at.trains_reference:
            say(f"round {at.number}, reference: {at.reference}, as given")
            return 0
        if at.number > 1 and not Path(at.mix).is_file():
            raise ConfigError(f"--step reference: round {at.number - 1} has not found its proportions yet")
        return _train(f"round {at.number}, reference", at.folder / "reference.yaml", at.reference)

    def proxy(self, at: Round) -> int:
        """Train the proxy model of a round."""
        if at.trains_reference and not _finished(at.reference):
            raise ConfigError(f"--step proxy: the reference of round {at.number} ({at.reference}) is not trained yet")
        return _train(f"round {at.number}, proxy", at.folder / "proxy.yaml", at.proxy)

    def proportions(self, at: Round) -> float:
        """Write what the proxy of a round found, and return the largest change from the reference proportions."""
        if not _finished(at.proxy):
            raise ConfigError(f"--step proportions: the proxy of round {at.number} ({at.proxy}) is not trained yet")
        path = at.proxy / "dataflex" / "doremi.json"  # the mixer writes it
        found = read_proportions(path, "--step proportions")
        before = _reference_proportions(at.mix, found)
        change = max(abs(share - before[name]) for name, share in found.by_name.items())
        details = {"round": at.number, "reference_proportions": before, "largest_change": change}
        source = provenance(
            "dataflex mix doremi",
            inputs=[path],
            settings={**asdict(self.settings), **found.provenance.get("settings", {})},
            packages=("torch", "transformers", "llamafactory"),
            config_digest=self.config_digest,
        )
        content = ProportionsFile(
            names=found.names,
            proportions=found.proportions,
            method="doremi",
            details={**found.details, **details, "settled": change < CHANGE},
            provenance={**source, "reference": _model(at.reference), "proxy": _model(at.proxy)},
        )
        _publish(at.proportions, content)
        latest = read_proportions([other.proportions for other in self.rounds if other.proportions.is_file()][-1])
        started = self.final.is_dir() and any(self.final.iterdir())
        if started and self.proportions_file.is_file():
            if read_proportions(self.proportions_file).by_name != latest.by_name:
                raise ConfigError(
                    f"--out: {self.final} was trained with other proportions than those of round "
                    f"{latest.details['round']}; move it away to train it anew"
                )
        _publish(self.proportions_file, latest)
        lines = [f"round {at.number}, proportions: {at.proportions}", *_table(content)]
        say("\n".join([*lines, f"  largest change {change:.2g}" + ("; settled" if change < CHANGE else "")]))
        return change

    def final_run(self) -> int:
        """Train the final model with the proportions found last."""
        if not self.proportions_file.is_file():
            raise ConfigError(f"--step final: {self.proportions_file} is not there yet; run the steps before")
        return _train("final", self.folder / "final.yaml", self.final)


def _proxy_params(block: Any) -> tuple[dict[str, Any], str | None]:
    """Return the doremi mixer's parameters without the reference, and the reference if one is named."""
    mixer = block.get("mixer") if isinstance(block, Mapping) else None
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


def _reference_proportions(mix: str, found: ProportionsFile) -> dict[str, float]:
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


def _finished(output_dir: Path, *, evaluates: bool = False) -> bool:
    """Whether a run has finished and saved its model."""
    saved = (output_dir / "train_results.json").is_file()  # written after the model
    return saved and finished(output_dir, evaluates=evaluates)


def _train(what: str, config: Path, output_dir: Path) -> int:
    evaluates = LlamaFactoryArgs.read(load_mapping(config)).do_eval
    return train_unfinished(what, config, output_dir, partial(_finished, output_dir, evaluates=evaluates))


def _publish(path: Path, content: ProportionsFile) -> None:
    """Write a proportions file, unless one with the same numbers is there."""
    if path.is_file():
        before = read_proportions(path)
        if before.by_name == content.by_name and before.details.get("round") == content.details["round"]:
            return
    write_proportions(path, content)


def _table(content: ProportionsFile) -> list[str]:
    """Return the proportions found beside those of the reference, largest first, and a warning about them."""
    before: Mapping[str, float] = content.details.get("reference_proportions") or {}
    rows = [["domain", "found", "reference"]]
    for name, share in sorted(content.by_name.items(), key=lambda item: -item[1]):
        rows.append([name, f"{share:.4f}", f"{before[name]:.4f}" if name in before else "-"])
    warning = content.details.get("warning")
    return [*table(rows, "<>>"), *([f"warning: {warning}"] if warning else [])]


def _model(folder: Path) -> dict[str, Any]:
    """Return what identifies a model: its folder, parameters, vocabulary, and a digest of its tokenizer.

    Of an adapter, its own folder and tokenizer, and parameters and vocabulary of its ``base``.
    """
    from safetensors import safe_open

    from dataflex.signals.other_models import base_model, sizes_of

    base, parameters, tokenizer = base_model(folder), 0, folder / "tokenizer.json"
    whole = folder if base is None else Path(base)
    for path in sorted(whole.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            parameters += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    try:
        vocabulary = sizes_of(folder).get("vocab_size")
    except (OSError, ValueError, KeyError, TypeError):
        vocabulary = None
    return {
        "folder": str(folder),
        **({} if base is None else {"base": base}),
        "parameters": parameters or None,
        "vocabulary": vocabulary,
        "tokenizer": file_digest(tokenizer) if tokenizer.is_file() else None,
    }


def doremi_step(options: argparse.Namespace) -> Answer | int:
    """Run the steps that are not done yet and return what to print, or the exit code of a run that failed."""
    if options.rounds < 1:
        raise ConfigError(f"--rounds: must be at least 1, found {options.rounds}")
    if options.part is None and options.number is not None:
        raise ConfigError("--round: has no effect without --step")
    number = 1 if options.number is None else options.number
    if not 1 <= number <= options.rounds:
        raise ConfigError(f"--round: must be from 1 to {options.rounds} (--rounds), found {number}")
    mapping = load_mapping(options.config, options.overrides)
    small = {} if options.small is None else load_mapping(options.small)
    folder = options.out or mapping.get("output_dir")
    if not folder:
        raise ConfigError("--out: missing, and the configuration has no output_dir; name a folder for all runs")
    settings = Settings(rounds=options.rounds, reference=options.reference, reference_mix=options.reference_mix)
    runs = Doremi(mapping, small, options.config.absolute().parent, Path(folder), settings)
    if options.write:
        lines = ["written, in the order in which they can be run:"]
        for at in runs.rounds:
            lines += [f"dataflex train {at.folder / 'reference.yaml'}"] if at.trains_reference else []
            lines.append(f"dataflex train {at.folder / 'proxy.yaml'}")
        lines.append("(after each proxy: the same command with --step proportions --round N instead of --write)")
        lines.append(f"dataflex train {runs.folder / 'final.yaml'}")
        configs = [line.removeprefix("dataflex train ") for line in lines if line.startswith("dataflex train ")]
        return Answer("\n".join([*lines, *left_out_note(mapping)]), {"out": runs.folder, "configs": configs})
    with passing_on({**mapping, **small}):
        code = runs.all() if options.part is None else runs.one(options.part, number)
    if code or options.part is not None:
        return code
    lines = [
        f"the final model is in {runs.final}, its proportions in {runs.proportions_file}",
        f"  use them with 'mixer: {{name: static, from: {runs.proportions_file}}}'",
    ]
    found = read_proportions(runs.proportions_file)
    values = {"out": runs.folder, "final": runs.final, "file": runs.proportions_file, "proportions": found.by_name}
    return Answer("\n".join([*lines, *_table(found)]), values)
