"""Parameters of existing DataFlex's mixer components in our spelling."""

from __future__ import annotations

from typing import Any

__all__ = ["mixer_params"]

_DEFAULTS = {"reweight_eta": 0.1, "reweight_eps": 0.01}  # of the components file that comes with it
_RENAMED = {"reference_model_path": "reference", "reweight_eta": "eta", "reweight_eps": "smoothing"}
_WITHOUT_EFFECT = ("num_eval_samples", "eval_batch_size")
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


def mixer_params(name: str, given: dict[str, Any], where: str, problems: list[str], notes: list[str]) -> dict[str, Any]:
    """Return a mixer's parameters in our spelling.

    Args:
        name: Our name of the mixer.
        given: Parameters of the component.
        where: What the component is called in messages.
        problems: Takes one line per problem.
        notes: Takes one line per parameter that is dropped or means something else here.
    """
    if name == "odm":
        notes.append(f"{where}: every domain's mean loss counts in every step (variant: full_information)")
        return _renamed(given, _ODM, _ODM_WITHOUT_EFFECT, where, notes)
    if name == "dynamic_moe":
        return _renamed(given, _MOE, _MOE_WITHOUT_EFFECT, where, notes)
    if name != "doremi":
        return given
    params = {**_DEFAULTS, **given}
    for key in _WITHOUT_EFFECT:
        if key in params:
            notes.append(f"{where}.params.{key}: no effect here; the losses of training are used")
            del params[key]
    if params.get("reference_model_path") is None and "reference" not in params:
        what = "is null" if "reference_model_path" in params else "missing"
        problems.append(
            f"{where}.params.reference_model_path: {what}; without a reference model this is not DoReMi but the "
            "hardest domains first. Train one (its step 1), or use 'dataflex mix doremi'"
        )
        params["reference_model_path"] = "none"
    notes.append(
        f"{where}: the weights act in the loss, from the next step on, and are updated in every step; domains are "
        "sampled alike; the averaged weights are written to OUTPUT_DIR/dataflex/doremi.json"
    )
    return {_RENAMED.get(key, key): value for key, value in params.items()}


def _renamed(
    given: dict[str, Any], names: dict[str, str], without_effect: dict[str, str], where: str, notes: list[str]
) -> dict[str, Any]:
    notes += [f"{where}.params.{key}: no effect here; {why}" for key, why in without_effect.items() if key in given]
    return {names.get(key, key): value for key, value in given.items() if key not in without_effect}
