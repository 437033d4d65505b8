"""Parameters of existing DataFlex's weighter components ``adapt`` and ``joint_update_aware`` in our spelling.

The loss-based weighter is handled with the warm-up that it shares (``components``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_RENAMED: dict[str, dict[str, str]] = {
    "adapt": {"refresh_interval": "refresh_steps"},
    "joint_update_aware": {
        "target_update_step": "refresh_steps",
        "embed_normalize": "normalize",
        "embed_layer": "layer",
        "objective_mode": "mode",
    },
}
_DROPPED: dict[str, dict[str, str]] = {
    "adapt": {"anchor_batch_size": "no effect here", "eps": "no effect here; tau must be above 0"},
    "joint_update_aware": {
        "fixed_point_iters": "no effect here; the iteration runs until the fixed point holds",
        "damping": "no effect here; the iteration runs until the fixed point holds",
        "target_batch_size": "no effect here; every row of the target is embedded",
        "target_num_batches": "no effect here; every row of the target is embedded",
    },
}
_POOLING: dict[str, dict[str, Any]] = {
    "last_token": {"pooling": "last"},
    "mean_pool": {"pooling": "mean", "completion_only": True},
}
_NOTES = {
    "adapt": "the loss is the weighted sum of the tokens' losses divided by their number, not a sum over the batch, so "
    "the learning rate may have to be raised; vectors come out of the training forward",
    "joint_update_aware": "vectors come out of the training forward; the weights are those of the exact fixed point",
}


def weighter_params(name: str, given: Mapping[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    """Return a weighter's parameters in our spelling.

    Args:
        name: Our name of the weighter.
        given: Parameters of the component.
        where: What the component is called in messages.
        notes: Takes one line per parameter that is dropped or means something else here.
    """
    if name not in _RENAMED:
        return dict(given)
    params: dict[str, Any] = {}
    for key, value in given.items():
        if key in _DROPPED[name]:
            notes.append(f"{where}.params.{key}: {_DROPPED[name][key]}")
        elif key == "pooling" and value in _POOLING:
            params |= _POOLING[value]
        else:
            params[_RENAMED[name].get(key, key)] = value
    notes.append(f"{where}: {_NOTES[name]}")
    return params
