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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dataflex.config.flat import FLAT_KEYS
from dataflex.config.methods import method_block
from dataflex.config.show import as_yaml
from dataflex.config.split import resolve, split
from dataflex.config.values import truthy
from dataflex.core.redact import redacted, without_secrets
from dataflex.errors import ConfigError, DataError
from dataflex.mixing.doremi_plan import DoremiPlan, Round, Settings
from dataflex.mixing.proportions_file import digest_of

__all__ = ["make_plan"]

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
        if not truthy(config, "do_train"):
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
    from dataflex.record.values import replacing

    try:
        for path, config in configs.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(as_yaml(without_secrets(config)).encode())
    except OSError as error:
        raise ConfigError(f"--out: {plan.folder} cannot be written: {error.strerror or error}") from error
    record = {"format": _FORMAT, "config_digest": plan.config_digest, **dataclasses.asdict(plan.settings)}
    with replacing(plan.folder / _RECORD) as file:
        file.write(json.dumps(redacted(record), indent=1).encode() + b"\n")
