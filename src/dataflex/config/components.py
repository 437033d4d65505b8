"""The components file of existing DataFlex: ``selectors | mixers | weighters: NAME: {name, params}``.

A component becomes one of our methods. Parameters that had no bearing on what is trained (cache
folders, scoring batch sizes) are dropped and noted; those that we spell otherwise are renamed;
every other one must be a parameter of our method, else it is told as unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataflex.config.collect import collect
from dataflex.config.convert import shown
from dataflex.config.legacy_mixers import mixer_params
from dataflex.config.legacy_selectors import Surroundings, by_task, selector_params
from dataflex.config.legacy_weighters import weighter_params
from dataflex.config.load import load_mapping
from dataflex.config.methods import half_read, method_class
from dataflex.config.schema import MethodConfig
from dataflex.errors import ConfigError, did_you_mean

_WITHOUT_EFFECT = ("cache_dir", "save_interval", "score_batch_size", "score_num_workers")

# What existing DataFlex ships in the file that its examples name, for the components that we offer.
_SHIPPED_FILE = "configs/components.yaml"
_SHIPPED: dict[str, dict[str, Any]] = {
    "selectors": {
        "loss": {"name": "loss", "params": {"focus": "medium"}},
        "random": {"name": "random", "params": {"seed": 42, "replacement": False}},
        "less": {"name": "less", "params": {"gradient_type": "adam", "seed": 123}},
        "icons": {"name": "icons", "params": {"gradient_type": "adam", "seed": 123}},
        "cluster_less": {
            "name": "cluster_less",
            "params": {"gradient_type": "adam", "proj_dim": 4096, "seed": 42, "samples_per_cluster": 4},
        },
        "coincide": {"name": "coincide", "params": {"seed": 42, "num_clusters": 10_000, "temperature": 1.0}},
        "delta_loss": {"name": "delta_loss", "params": {"window_size": 0.2}},
        "nice": {
            "name": "nice",
            "params": {"gradient_type": "adam", "seed": 123, "reward_model_backend": "local_vllm"},
        },
        "near": {"name": "near", "params": {}},
        "tsds": {"name": "tsds", "params": {}},
    },
    "mixers": {
        "random": {"name": "random", "params": {"seed": 42}},
        "static": {"name": "static", "params": {"proportions": [0.5, 0.5]}},
        "doremi": {"name": "doremi", "params": {"reweight_eta": 0.1, "reweight_eps": 0.01}},  # a placeholder's path
        "odm": {
            "name": "odm",
            "params": {"alpha": 0.9, "warmup_steps": 2000, "reward_scale": 15.0, "min_exploration_rate": 0.03},
        },
        "dynamic_moe": {
            "name": "dynamic_moe",
            "params": {"eta": 10.0, "c": 0.05, "collect_steps": 5, "eval_samples": 1000, "eval_batch_size": 32},
        },
    },
    "weighters": {
        "loss": {"name": "loss", "params": {"strategy": "linupper", "delta": 1.0}},
        "adapt": {"name": "adapt", "params": {"tau": 1.0, "refresh_interval": 50}},
        "joint_update_aware": {
            "name": "joint_update_aware",
            "params": {"beta": 0.1, "tau": 0.05, "target_update_step": 50, "pooling": "last_token"},
        },
    },
}


@dataclass(frozen=True, kw_only=True)
class Component:
    """One component, translated.

    Attributes:
        method: Our method with its parameters.
        seed: The seed that the component carried, if it did.
    """

    method: MethodConfig
    seed: int | None = None


def read_component(
    *,
    kind: str,
    name: str | None,
    file: str,
    base_dir: Path,
    targets: tuple[str, ...],
    num_domains: int,
    burn_in_steps: int,
    updates: int,
    model: str | None,
    problems: list[str],
    notes: list[str],
) -> Component | None:
    """Return the component ``name`` of the components file, or None after noting why not.

    Args:
        kind: "selector", "mixer" or "weighter".
        name: The component's key in its section.
        file: Path as written; looked up from the working directory, then from ``base_dir``.
        base_dir: Folder of the configuration file.
        targets: Data sets for a method that needs targets; for selectors and weighters they are one target.
        num_domains: Number of data sets.
        burn_in_steps: Steps of plain loss before a weighter acts.
        updates: Decisions of a selector after each warm-up.
        model: ``model_name_or_path``.
        problems: Takes one line per problem.
        notes: Takes one line per parameter that is dropped or means something else here.
    """
    if name is None:
        problems.append(f"component_name: missing; name a {kind} of the components file")
        return None
    try:
        content = _file(file, base_dir, notes)
    except ConfigError as error:
        problems += [f"components_cfg_file: {problem}" for problem in error.problems]
        return None
    section = content.get(f"{kind}s") or {}
    where = f"components_cfg_file: {kind}s.{name}"
    if not isinstance(section, Mapping) or name not in section:
        known = [str(key) for key in section] if isinstance(section, Mapping) else []
        problems.append(
            f"component_name: {name!r} is not among the {kind}s of {file}{did_you_mean(name, known)} "
            f"(known: {', '.join(known) or 'none'})"
        )
        return None
    entry = section[name]
    params = entry.get("params") or {} if isinstance(entry, Mapping) else None
    if not isinstance(params, Mapping):
        problems.append(f"{where}: expected a mapping with 'name' and 'params', found {shown(entry)}")
        return None
    method_name = str(entry.get("name") or name)
    given = dict(params)
    if (kind, method_name) == ("mixer", "random"):
        method_name, given = "static", _drawn(given, num_domains, where, problems, notes)
    method_name, given, seed = _renamed(kind, method_name, given, burn_in_steps, where, notes)
    before = len(problems)
    if kind != "mixer" and len(targets) > 1 and not by_task(method_name, given):
        targets = (" + ".join(targets),)
        notes.append(f"{where}: the data sets of eval_dataset are one target, as there: {targets[0]!r}")
    if kind == "selector":
        around = Surroundings(updates=updates, targets=targets, model=model)
        given = selector_params(method_name, given, around, where, problems, notes)
    elif kind == "mixer":
        method_name, given = mixer_params(method_name, given, num_domains, where, problems, notes)
    else:
        given = weighter_params(method_name, given, where, notes)
    component = _built(kind, method_name, given, seed, targets, where, problems)
    return component if len(problems) == before else None


def _file(file: str, base_dir: Path, notes: list[str]) -> dict[str, Any]:
    for path in (Path(file), base_dir / file):
        if path.is_file():
            return load_mapping(path)
    if Path(file).as_posix().endswith(_SHIPPED_FILE):
        notes.append(f"components_cfg_file: {file} is not there; the presets that existing DataFlex ships are used")
        return _SHIPPED
    raise ConfigError(f"{file} is neither in the working directory ({Path.cwd()}) nor beside the configuration")


def _renamed(
    kind: str, name: str, given: dict[str, Any], burn_in_steps: int, where: str, notes: list[str]
) -> tuple[str, dict[str, Any], Any]:
    """Return our method's name, its parameters in our spelling, and the component's seed."""
    for key in _WITHOUT_EFFECT:
        if key in given:
            notes.append(f"{where}.params.{key}: no effect here")
            del given[key]
    if (kind, name) == ("mixer", "static") and given.get("proportions") is None:
        return "uniform", {key: value for key, value in given.items() if key != "proportions"}, None
    if (kind, name) == ("weighter", "loss"):
        if given.get("strategy") == "uniform":
            notes.append(f"{where}.params.strategy: what 'uniform' computes there is called softmax_loss here")
            given["strategy"] = "softmax_loss"
    if kind == "weighter":
        said = burn_in_steps > 0 or name == "loss"  # whose default is a burn-in of many steps
        return name, {"burn_in_steps": burn_in_steps, **given} if said else given, None
    seed = given.pop("seed", None) if kind == "selector" else None
    if seed is not None:
        notes.append(f"{where}.params.seed: becomes the seed of all decisions")
    return name, given, seed


def _drawn(
    given: Mapping[str, Any], num_domains: int, where: str, problems: list[str], notes: list[str]
) -> dict[str, Any]:
    """Return what existing DataFlex's random mixer amounts to: shares drawn once from its seed, which then stay."""
    rest = {key: value for key, value in given.items() if key != "seed"}
    seed = given.get("seed")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        problems.append(f"{where}.params.seed: expected a whole number from 0 to 2**32 - 1, found {shown(seed)}")
        return {"proportions": [1.0], **rest}
    import numpy as np

    notes.append(f"{where}: proportions drawn once from its seed, as there; this is a static mixer")
    raw = np.random.RandomState(seed).random_sample(max(1, num_domains))
    return {"proportions": [float(share) for share in raw / raw.sum()], **rest}


def _built(
    kind: str, name: str, given: dict[str, Any], seed: Any, targets: tuple[str, ...], where: str, problems: list[str]
) -> Component | None:
    before = len(problems)
    cls = method_class(kind, name, where, problems)
    if cls is None:
        return None
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        problems.append(f"{where}.params.seed: expected a whole number of at least 0, found {shown(seed)}")
    params = collect(cls.Params, given, f"{where}.params", problems, subject=f"{name} {kind}")
    method = None if params is None else MethodConfig(kind=kind, name=name, params=params)
    needs = half_read(cls, given) if method is None else method.requires
    if needs is not None and needs.targets and not targets:
        key = "mixer_eval_dataset" if kind == "mixer" else "eval_dataset"
        problems.append(f"{where}: {cls.name} needs a target; flat keys take it from {key}: name a data set there")
    if method is None or len(problems) > before:
        return None
    return Component(method=replace(method, targets=targets if method.requires.targets else ()), seed=seed)
