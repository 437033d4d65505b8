"""Parameters of existing DataFlex's mixer components in our spelling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What the components mean where they leave a parameter out.
_DOREMI_DEFAULTS = {"reweight_eta": 1.0, "reweight_eps": 1e-3}
_ODM_FLOOR = 0.03

_DOREMI = {"reference_model_path": "reference", "reweight_eta": "eta", "reweight_eps": "smoothing"}
_DOREMI_WITHOUT_EFFECT = ("num_eval_samples", "eval_batch_size")
_ODM = {"alpha": "smoothing", "min_exploration_rate": "floor"}
_ODM_WITHOUT_EFFECT = {
    "warmup_steps": "warmup_step is the only warm-up",
    "reward_scale": "losses are not scaled",
    "initial_proportions": "warm-up serves init_mixture_proportions",
}
_MOE = {"c": "smoothing"}
_MOE_WITHOUT_EFFECT = dict.fromkeys(
    ("collect_steps", "eval_samples", "eval_batch_size"), "all of the held-out data of mixer_eval_dataset is looked at"
)


def mixer_params(
    name: str, given: Mapping[str, Any], num_domains: int, where: str, problems: list[str], notes: list[str]
) -> tuple[str, dict[str, Any]]:
    """Return a mixer's name and parameters in our spelling.

    Args:
        name: The component's method.
        given: Parameters of the component.
        num_domains: Number of data sets.
        where: What the component is called in messages.
        problems: Takes one line per problem.
        notes: Takes one line per parameter that is dropped or means something else here.
    """
    if name == "odm":
        return name, _odm(given, num_domains, where, notes)
    if name == "dynamic_moe":
        return name, _renamed(given, _MOE, _MOE_WITHOUT_EFFECT, where, notes)
    if name == "doremi":
        return _doremi(given, where, problems, notes)
    return name, dict(given)


def _odm(given: Mapping[str, Any], num_domains: int, where: str, notes: list[str]) -> dict[str, Any]:
    notes.append(
        f"{where}: every domain's mean loss counts in every step, as it is (variant: full_information); there the last "
        "micro-batch's loss, times reward_scale, counts for one domain"
    )
    if "warmup_steps" not in given:
        notes.append(f"{where}: warmup_step is the only warm-up; there the component has 2,000 more steps of it")
    floor = {} if num_domains * _ODM_FLOOR >= 1 else {"min_exploration_rate": _ODM_FLOOR}
    return _renamed({**floor, **given}, _ODM, _ODM_WITHOUT_EFFECT, where, notes)


def _doremi(given: Mapping[str, Any], where: str, problems: list[str], notes: list[str]) -> tuple[str, dict[str, Any]]:
    params = {**_DOREMI_DEFAULTS, **given}
    for key in _DOREMI_WITHOUT_EFFECT:
        if params.pop(key, None) is not None:
            notes.append(f"{where}.params.{key}: no effect here; the losses of training are used")
    if "reference_model_path" in params and params["reference_model_path"] is None:
        del params["reference_model_path"]
        notes.append(
            f"{where}.params.reference_model_path: is null; without a reference model this is not DoReMi but the "
            "hardest domains first, which is the mixer group_dro; no averaged weights are written"
        )
        return "group_dro", {_DOREMI.get(key, key): value for key, value in params.items()}
    if "reference_model_path" not in params and "reference" not in params:
        problems.append(
            f"{where}.params.reference_model_path: missing; train a reference model (its step 1), use 'dataflex mix "
            "doremi', or write null: the hardest domains first, which is not DoReMi"
        )
        params["reference_model_path"] = "none"
    notes.append(
        f"{where}: the weights act in the loss, from the next step on, and are updated in every step; a domain without "
        "rows in a step keeps its score; domains are sampled alike; the averaged weights are written to "
        "OUTPUT_DIR/dataflex/doremi.json"
    )
    return "doremi", {_DOREMI.get(key, key): value for key, value in params.items()}


def _renamed(
    given: Mapping[str, Any], names: dict[str, str], without_effect: dict[str, str], where: str, notes: list[str]
) -> dict[str, Any]:
    notes += [f"{where}.params.{key}: no effect here; {why}" for key, why in without_effect.items() if key in given]
    return {names.get(key, key): value for key, value in given.items() if key not in without_effect}
