"""Keys whose value a resumed run may find changed: whether a change is refused, reported, or has no consequence.

A checkpoint's plan names rows by number and its methods' states belong to what decided them, so most keys must stay as
they were unless ``on_change: extend`` is set. The fields of the schema define this for our keys, ``_LLAMAFACTORY`` for
the others. The identity in a checkpoint (``train.checkpoint``) is made of both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.mappings import plain
from dataflex.config.schema import DynamicConfig, SignalsConfig
from dataflex.printable import redacted
from dataflex.registry import KINDS

Kind = Literal["refused", "told", "free", "rows", "batch"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What happens when a key has another value than in the checkpoint.

    ``refused``; ``told`` (it goes on, and says what the change does); ``free`` (nothing depends on it); ``rows``
    (refused where the rows are other ones because of it); ``batch`` (refused where the global batch is another).
    """

    kind: Kind
    note: str = ""  # for "told": what the change does
    flat: str | None = None  # the flat key of existing DataFlex that means the same

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Change:
        """Return the entry of a field with this metadata."""
        resume, flat = metadata.get("resume", "refused"), metadata.get("flat")
        return cls(kind=resume, flat=flat) if resume in get_args(Kind) else cls(kind="told", note=resume, flat=flat)


_LLAMAFACTORY: dict[Kind, str] = {
    "refused": "stage disable_shuffling dataloader_drop_last",
    "batch": "per_device_train_batch_size gradient_accumulation_steps",
    "rows": "seed dataset dataset_dir tokenized_path model_name_or_path template cutoff_len packing neat_packing "
    "train_on_prompt mask_history ignore_pad_token_for_loss default_system enable_thinking tool_format max_samples "
    "val_size streaming",
    "free": "max_steps num_train_epochs",
}
ON_RESUME: dict[str, Change] = {
    **{f"dynamic.{each.name}": Change.of(each.metadata) for each in fields(DynamicConfig) if each.name != "signals"},
    **{f"dynamic.signals.{each.name}": Change.of(each.metadata) for each in fields(SignalsConfig)},
    **{key: Change(kind=kind) for kind, keys in _LLAMAFACTORY.items() for key in keys.split()},
}
"""Keys as they are written in a configuration; those without a dot are LLaMA-Factory's."""

FIXED = ("stage", "dynamic.freeze_gate")
"""Keys that must stay as they were under ``on_change: extend`` too."""
TOKENIZES = (
    "template cutoff_len packing neat_packing train_on_prompt mask_history ignore_pad_token_for_loss default_system "
    "enable_thinking tool_format"
).split()
"""Keys that make other tokens or labels of the same data."""

_TRUTH = ("disable_shuffling", "dataloader_drop_last")


def settings_of(config: DynamicConfig, lf: LlamaFactoryArgs) -> dict[str, Any]:
    """Return the values that are compared with those of a checkpoint, as JSON values.

    Methods are left out: they are compared by name, parameters and targets.

    Args:
        config: The dynamic block.
        lf: LLaMA-Factory's keys as they were written; those that were not are None.
    """
    found: dict[str, Any] = {}
    for key, change in ON_RESUME.items():
        block, _, name = key.rpartition(".")
        if change.kind == "free" or name in KINDS:
            continue
        if block:
            found[key] = plain(getattr(config.signals if block.endswith("signals") else config, name))
        elif name in _TRUTH:
            found[key] = lf.on(name)
        else:
            found[key] = ", ".join(lf.train_sets) if name == "dataset" and lf.train_sets else lf.get(name)
    values: dict[str, Any] = redacted(json.loads(json.dumps(found, default=str)))
    return values
