"""Parameters of existing DataFlex's mixer components in our spelling."""

from __future__ import annotations

from typing import Any

__all__ = ["mixer_params"]

_DEFAULTS = {"reweight_eta": 0.1, "reweight_eps": 0.01}  # of the components file that comes with it
_RENAMED = {"reference_model_path": "reference", "reweight_eta": "eta", "reweight_eps": "smoothing"}
_WITHOUT_EFFECT = ("num_eval_samples", "eval_batch_size")


def mixer_params(name: str, given: dict[str, Any], where: str, problems: list[str], notes: list[str]) -> dict[str, Any]:
    """Return a mixer's parameters in our spelling; only ``doremi`` spells some differently.

    Args:
        name: Our name of the mixer.
        given: Parameters of the component.
        where: What the component is called in messages.
        problems: Takes one line per problem.
        notes: Takes one line per parameter that is dropped or means something else here.
    """
    if name != "doremi":
        return given
    params = {**_DEFAULTS, **given}
    for key in _WITHOUT_EFFECT:
        if key in params:
            notes.append(f"{where}.params.{key}: no effect here; the losses of training are used")
            del params[key]
    if params.get("reference_model_path", "") is None:
        problems.append(
            f"{where}.params.reference_model_path: is null; without a reference model this is not DoReMi but the "
            "hardest domains first. Train one (its step 1), or use 'dataflex mix doremi'"
        )
        params["reference_model_path"] = "none"
    notes.append(
        f"{where}: the weights act in the loss, from the next step on, and are updated in every step; domains are "
        "sampled alike; the averaged weights are written to OUTPUT_DIR/dataflex/doremi.json"
    )
    return {_RENAMED.get(key, key): value for key, value in params.items()}
