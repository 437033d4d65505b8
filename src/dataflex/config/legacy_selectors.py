"""Parameters of existing DataFlex's selector components in our spelling.

What only steered memory, caches or an approximation that is exact here is dropped with a note; files of scores that
were computed beforehand are not read, since the same is computed here from the targets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex.config.convert import shown

_PRECONDITION = {"adam": "true_adam", "sgd": "none"}
_PICK = {
    "random": ("random", "rand"),
    "nearest": ("nearest", "nearest_to_centroid", "center", "centroid"),
    "farthest": ("farthest", "farthest_from_centroid", "boundary"),
    "mixed": ("mixed", "mixed_center_boundary", "center_boundary"),
}
_FEW_UPDATES = 10**9  # updates that never end: the window stays where it starts

# What the components mean where they leave a parameter out, and we have another default.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "icons": {"gradient_type": "adam"},
    "cluster_less": {"representative_strategy": "random"},
    "coincide": {"num_clusters": 10_000, "temperature": 1.0, "clustering_max_iter": 10},
    "nice": {"mc_samples": 4, "max_new_tokens": 512, "generation_temperature": 0.7},
}
_RENAMED: dict[str, dict[str, str]] = {
    "less": {"gradient_type": "precondition"},
    "icons": {"gradient_type": "precondition"},
    "nice": {"gradient_type": "precondition", "mc_samples": "samples", "generation_temperature": "temperature"},
    "cluster_less": {
        "gradient_type": "precondition",
        "num_clusters": "clusters",
        "samples_per_cluster": "representatives",
        "representative_strategy": "pick",
        "proj_dim": "sketch_size",
        "embedding_layer": "layer",
    },
    "coincide": {
        "num_clusters": "clusters",
        "clustering_max_iter": "iterations",
        "embedding_layers": "layers",
        "embedding_model_name_or_path": "encoder",
    },
}
_EXACT = "gradients are compared as they are here, without a projection; 'sketch_size' brings a sparse one"
_IDLE = "no effect here"
_DROPPED: dict[str, dict[str, str]] = {
    "less": {"proj_dim": _EXACT},
    "icons": {"proj_dim": _EXACT},
    "nice": {
        "proj_dim": _EXACT,
        "policy_model_path": "is not read; answers are sampled from the model under training",
        "max_prompt_length": "prompts are those of the target as cutoff_len leaves them",
        "prompt_template": "is not read; prompts are those of the target as 'template' writes them",
    },
    "cluster_less": dict.fromkeys(
        ("clustering_batch_size", "clustering_max_iter", "assignment_chunk_size", "embedding_model_dtype"), _IDLE
    ),
    "coincide": dict.fromkeys(
        (
            "clustering_batch_size",
            "clustering_num_workers",
            "clustering_device",
            "assignment_chunk_size",
            "density_chunk_size",
            "embedding_model_dtype",
        ),
        _IDLE,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the meaning of a component depends on beside its parameters.

    Attributes:
        updates: Decisions after each warm-up (``update_times``).
        targets: The method's targets.
        model: ``model_name_or_path``.
    """

    updates: int
    targets: tuple[str, ...]
    model: str | None


def by_task(name: str, given: Mapping[str, Any]) -> bool:
    """Return whether the data sets of ``eval_dataset`` stay apart: the tasks of ``icons``, where it names any."""
    return name == "icons" and bool(given.get("task_boundaries"))


def selector_params(
    name: str, given: Mapping[str, Any], around: Surroundings, where: str, problems: list[str], notes: list[str]
) -> dict[str, Any]:
    """Return the parameters of our selector ``name``.

    Args:
        name: The component's method.
        given: Its parameters, those of no effect anywhere already removed; null means not given.
        around: What else their meaning depends on.
        where: Path of the component, for messages.
        problems: Takes one line per parameter that cannot be followed.
        notes: Takes one line per parameter that is dropped or means something else here.
    """
    params = {**_DEFAULTS.get(name, {}), **{key: value for key, value in given.items() if value is not None}}
    for key, why in _DROPPED.get(name, {}).items():
        if params.pop(key, None) is not None:
            notes.append(f"{where}.params.{key}: {why}")
    special = _SPECIAL.get(name)
    if special is not None:
        special(params, around, where, problems, notes)
    translated = {}
    for key, value in params.items():
        if key == "gradient_type":
            value = _choice(value, _PRECONDITION, f"{where}.params.{key}", problems)
        translated[_RENAMED.get(name, {}).get(key, key)] = value
    return translated


def _choice(value: Any, choices: Mapping[str, str], path: str, problems: list[str]) -> Any:
    found = choices.get(str(value).lower())
    if found is None:
        problems.append(f"{path}: {shown(value)} is not a choice (choices: {', '.join(choices)})")
    return found


def _delta_loss(
    params: dict[str, Any], around: Surroundings, where: str, problems: list[str], notes: list[str]
) -> None:
    updates = around.updates
    if updates < 1:
        notes.append(f"{where}: without update_times the window stays where it starts, as there")
    params.setdefault("updates", max(1, updates - 1) if updates >= 1 else _FEW_UPDATES)


def _precomputed(
    params: dict[str, Any], around: Surroundings, where: str, problems: list[str], notes: list[str]
) -> None:
    """Refuse a file of rows or probabilities that is there: it would be left aside for others computed here."""
    for key in ("indices_path", "probs_path"):
        file = params.pop(key, None)
        if file is None:
            continue
        told = "the same kind of rows is found here from the targets, 'encoder' names the model that reads them"
        if Path(str(file)).expanduser().exists():
            problems.append(
                f"{where}.params.{key}: {file} is not read; {told}. Remove the key for that, or train on a data "
                "set of the rows that the file names"
            )
        else:
            notes.append(f"{where}.params.{key}: {file} is not there and would not be read; {told}")


def _icons(params: dict[str, Any], around: Surroundings, where: str, problems: list[str], notes: list[str]) -> None:
    params.setdefault("target_gradient", "mean_of_cosines")
    if len(around.targets) > 1 and "vote_percent" not in params:
        notes.append(f"{where}: a task votes for 20 % of the pool (vote_percent); there for as many rows as are kept")
    boundaries = params.pop("task_boundaries", None)
    if not boundaries:
        return
    sizes = len(boundaries) if isinstance(boundaries, list | tuple) else 1
    if sizes == len(around.targets):
        notes.append(
            f"{where}.params.task_boundaries: is not read; each data set of eval_dataset is a task, whatever its size"
        )
    else:
        problems.append(
            f"{where}.params.task_boundaries: names {sizes} tasks, eval_dataset {len(around.targets)} data sets; here "
            "every task is a data set of its own: list one per task in eval_dataset"
        )


def _cluster_less(
    params: dict[str, Any], around: Surroundings, where: str, problems: list[str], notes: list[str]
) -> None:
    method = params.pop("clustering_method", "kmeans")
    if method != "kmeans":
        problems.append(
            f"{where}.params.clustering_method: {shown(method)} is not offered: rows near one another in random "
            "projections are not clusters of like gradients as often; write kmeans"
        )
    params.pop("lsh_num_bits", None)
    model = params.pop("embedding_model_name_or_path", None)
    if model is not None:
        problems.append(
            f"{where}.params.embedding_model_name_or_path: rows are clustered by the model under training here; "
            "remove it"
        )
    strategies = {alias: name for name, aliases in _PICK.items() for alias in aliases}
    path = f"{where}.params.representative_strategy"
    params["representative_strategy"] = _choice(params["representative_strategy"], strategies, path, problems)


def _coincide(params: dict[str, Any], around: Surroundings, where: str, problems: list[str], notes: list[str]) -> None:
    density = params.pop("single_member_density", 1.0)
    if density != 1.0:
        problems.append(f"{where}.params.single_member_density: {shown(density)} is not supported; it is 1 here")
    if not params.get("embedding_layers"):
        model = params.get("embedding_model_name_or_path") or around.model
        depth = _depth(Path(str(model))) if model else None
        if depth is None:
            problems.append(
                f"{where}.params.embedding_layers: null stands for five layers from the first to the last, but "
                f"{model} is no folder whose config.json tells its depth; list the layers"
            )
        else:
            params["embedding_layers"] = _five_layers(depth)
    notes.append(f"{where}: features are the residual stream's, of text alone; rows are clustered in every decision")


def _five_layers(depth: int) -> list[int]:
    """Return five hidden states, evenly spaced from the first layer's to the last one's; all of a shallower model."""
    count = min(5, depth)
    places = [1 + (depth - 1) * i / max(1, count - 1) for i in range(count)]
    return sorted({round(place) for place in places})


def _depth(folder: Path) -> int | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return int({**config, **(config.get("text_config") or {})}["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _nice(params: dict[str, Any], around: Surroundings, where: str, problems: list[str], notes: list[str]) -> None:
    """Translate the judge behind a server; a reward model in the process is refused with what to do instead."""
    path = f"{where}.params"
    backend, settings = params.pop("reward_model_backend", None), params.pop("reward_backend_params", None) or {}
    elsewhere = (
        "ask it through an OpenAI-compatible server (reward_model_backend: api), or give a 'reward' as docs/rewards.md "
        "describes them"
    )
    if backend not in (None, "api", "local_vllm"):
        problems.append(f"{path}.reward_model_backend: {shown(backend)} is not a choice (choices: api, local_vllm)")
    elif backend == "local_vllm" and "reward" not in params:
        problems.append(f"{path}.reward_model_backend: a model is not loaded beside the run here; {elsewhere}")
    if params.pop("reward_model_path", None) is not None and "reward" not in params:
        problems.append(f"{path}.reward_model_path: a model is not loaded beside the run here; {elsewhere}")
    for key in ("reward_prompt_with_ref", "reward_prompt_without_ref"):
        if params.pop(key, None) is not None:
            problems.append(f"{path}.{key}: is not read; write what the judge is asked as 'judge.instruction'")
    if backend == "api" and "reward" not in params:
        place = f"{path}.reward_backend_params.api"
        api = settings.get("api") if isinstance(settings, Mapping) else None
        if not isinstance(api, Mapping) or not api.get("api_url") or not api.get("model_name"):
            problems.append(f"{place}: expected a mapping with api_url and model_name, found {shown(api)}")
            return
        if api.get("temperature"):
            notes.append(f"{place}.temperature: the judge is asked at temperature 0")
        judge = {"url": str(api["api_url"]).rstrip("/").removesuffix("/chat/completions"), "model": api["model_name"]}
        if api.get("api_key") is not None:
            judge["api_key_env"] = api["api_key"]
        params.update(reward="judge", judge={**judge, "best": 1.0})


_Special = Callable[[dict[str, Any], Surroundings, str, list[str], list[str]], None]
_SPECIAL: dict[str, _Special] = {
    "delta_loss": _delta_loss,
    "near": _precomputed,
    "tsds": _precomputed,
    "icons": _icons,
    "cluster_less": _cluster_less,
    "coincide": _coincide,
    "nice": _nice,
}
