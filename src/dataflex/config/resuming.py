"""Every key that a resumed run may find changed, once: whether that is refused, told, or of no consequence.

A checkpoint's plan names rows by number and its methods' states belong to what decided them, so most keys must stay as
they were. The identity in a checkpoint (``train.checkpoint``) is made of this table.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.mappings import plain
from dataflex.config.schema import DynamicConfig
from dataflex.printable import redacted

Kind = Literal["refused", "told", "free", "rows", "batch"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What happens when a key has another value than in the checkpoint.

    Attributes:
        kind: ``refused``; ``told`` (it goes on, and says what the change does); ``free`` (nothing depends on it);
            ``rows`` (refused where the rows are other ones because of it); ``batch`` (refused where the global batch
            is another).
        note: For ``told``: what the change does.
        flat: The flat key of existing DataFlex that means the same.
    """

    kind: Kind
    note: str = ""
    flat: str | None = None


_REFUSED, _FREE, _ROWS, _BATCH = Change(kind="refused"), Change(kind="free"), Change(kind="rows"), Change(kind="batch")

METHODS: tuple[str, ...] = ("selector", "mixer", "weighter")
"""Compared by name, parameters and targets."""

_BLOCK: dict[str, Change] = {
    **{kind: Change(kind="refused", flat="component_name") for kind in METHODS},
    "warmup_steps": Change(kind="refused", flat="warmup_step"),
    "interval_steps": Change(kind="refused", flat="update_step"),
    "candidate_batches": _REFUSED,
    "keep_ratio": _REFUSED,
    "exclude_seen": _REFUSED,
    "repeat": Change(kind="told", note="holds from the next decision on"),
    "unit": _REFUSED,
    "interleave": _REFUSED,
    "initial_proportions": Change(kind="refused", flat="init_mixture_proportions"),
    "max_epochs": Change(kind="told", note="the plan in progress stays as it is, the next decision heeds the new caps"),
    "at_cap": Change(kind="told", note="holds from the next decision on"),
    "min_proportion": Change(kind="told", note="holds from the next decision on"),
    "domain_column": _REFUSED,
    "domain_path": _REFUSED,
    "domain_clusters": _REFUSED,
    "domain_encoder": _REFUSED,
    "eval_by_domain": _FREE,
    "signals.pool_fraction": _REFUSED,
    "signals.screen_fraction": _REFUSED,
    "signals.screen_by": _REFUSED,
    "signals.max_age_steps": Change(kind="told", note="holds from the next decision on"),
    "signals.store": _FREE,
    "signals.store_gb": _FREE,
    "max_repeats": _FREE,
    "save_on_term": _FREE,
    "checkpoint_hash": _FREE,
    "plugins": _FREE,
    "leakage": _ROWS,
    "resume_plan": _FREE,
    "seed": Change(kind="refused", flat="params.seed"),
    "freeze_gate": Change(kind="refused", flat="freeze_gate"),
    "early_stopping_min_delta": _FREE,
    "cycle_steps": Change(kind="refused", flat="update_times"),
    "total_steps": _FREE,
    "flat": _FREE,
}

_LLAMAFACTORY: dict[str, Change] = {
    "stage": _REFUSED,
    "seed": _ROWS,
    "disable_shuffling": _REFUSED,
    "dataloader_drop_last": _REFUSED,
    "per_device_train_batch_size": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    **dict.fromkeys(
        (
            "dataset",
            "dataset_dir",
            "tokenized_path",
            "model_name_or_path",
            "template",
            "cutoff_len",
            "packing",
            "neat_packing",
            "train_on_prompt",
            "mask_history",
            "ignore_pad_token_for_loss",
            "default_system",
            "enable_thinking",
            "tool_format",
            "max_samples",
            "val_size",
            "streaming",
        ),
        _ROWS,
    ),
    "max_steps": _FREE,
    "num_train_epochs": _FREE,
}

ON_RESUME: dict[str, Change] = {**{f"dynamic.{key}": change for key, change in _BLOCK.items()}, **_LLAMAFACTORY}
"""Keys as they are written in a configuration; those without a dot are LLaMA-Factory's."""

_TRUTH = ("disable_shuffling", "dataloader_drop_last")


def settings_of(config: DynamicConfig, lf: LlamaFactoryArgs) -> dict[str, Any]:
    """Return the value of every key that a resumed run is compared by, methods left out, as JSON values.

    Args:
        config: The dynamic block.
        lf: LLaMA-Factory's keys as they were written; those that were not are None.
    """
    found: dict[str, Any] = {}
    for key, change in ON_RESUME.items():
        block, _, name = key.rpartition(".")
        if change.kind == "free" or name in METHODS:
            continue
        if block:
            found[key] = plain(getattr(config.signals if block.endswith("signals") else config, name))
        elif name in _TRUTH:
            found[key] = lf.on(name)
        else:
            found[key] = ", ".join(lf.train_sets) if name == "dataset" and lf.train_sets else lf.get(name)
    values: dict[str, Any] = redacted(json.loads(json.dumps(found, default=str)))
    return values
