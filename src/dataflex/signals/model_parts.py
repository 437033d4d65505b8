"""Finds the parts of a language model inside its wrappers, and listens to them without leaving a trace.

Passes always call the outermost module: under FSDP2 and ZeRO-3 its hooks gather the parameters, so calling an inner
module would meet shards. What a pass wants from inside it takes through forward hooks that are removed afterwards.
``output_hidden_states=True`` is not used: transformers then leaves hooks of its own on the model for good.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dataflex.errors import UnsupportedError


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """Parts of a model."""

    root: nn.Module  # what is called: the outermost module that was given
    lm: nn.Module  # the transformers model inside (no adapters' or value head's wrapper)
    base: nn.Module  # the body of ``lm``, whose output is the last hidden state; ``lm`` itself if it has no head
    head: nn.Module | None  # the output embeddings, or None

    @property
    def text_config(self) -> Any:
        """Configuration of the language part."""
        return self.lm.config.get_text_config()


def model_parts(model: nn.Module) -> ModelParts:
    """Look inside PEFT and value-head wrappers; UnsupportedError where there is no transformers model."""
    from transformers import PreTrainedModel

    lm: Any = model
    if not isinstance(lm, PreTrainedModel) and isinstance(getattr(lm, "pretrained_model", None), nn.Module):
        lm = lm.pretrained_model  # trl's value-head wrapper, LLaMA-Factory's stage rm
    if not isinstance(lm, PreTrainedModel) and callable(getattr(lm, "get_base_model", None)):
        lm = lm.get_base_model()  # peft
    if not isinstance(lm, PreTrainedModel):
        raise UnsupportedError(f"signals need a transformers model, found {type(lm).__name__}")
    return ModelParts(root=model, lm=lm, base=lm.base_model, head=lm.get_output_embeddings())


def logits_in(outputs: Any) -> torch.Tensor:
    """Return the logits of a model's outputs; value heads give a tuple."""
    return outputs[0] if isinstance(outputs, tuple) else outputs.logits


def is_partitioned(model: nn.Module) -> bool:
    """Return whether parameters are partitioned over ranks (ZeRO-3, FSDP), so that all ranks must call in step."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_shape") for parameter in model.parameters())


@contextmanager
def attached(*handles: RemovableHandle) -> Iterator[None]:
    """Remove hooks at the end of a block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def narrow_head(parts: ModelParts) -> AbstractContextManager[None]:
    """While inside, the head sees the last position only: a forward costs next to nothing after the body."""

    def last_position(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0][:, -1:], *inputs[1:])

    return nullcontext() if parts.head is None else attached(parts.head.register_forward_pre_hook(last_position))


@contextmanager
def capture_hidden(parts: ModelParts, layer: int) -> Iterator[list[torch.Tensor]]:
    """While inside, every forward appends the hidden states [B, T, D] of ``layer`` (see ``Embedding``) to the list."""
    seen: list[torch.Tensor] = []
    depth = parts.text_config.num_hidden_layers
    index = layer + depth + 1 if layer < 0 else layer
    if not 0 <= index <= depth:
        raise UnsupportedError(f"layer {layer}: the model has hidden states 0 to {depth} (or -1 to {-depth - 1})")

    def output(_module: nn.Module, _args: Any, result: Any) -> None:
        seen.append(result[0] if isinstance(result, tuple) else result.last_hidden_state)

    def entered(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    if index == depth:
        handle = parts.base.register_forward_hook(output)
    else:
        decoder: Any = parts.lm
        stacks = [part for part in decoder.get_decoder().modules() if isinstance(part, nn.ModuleList)]
        stacks = [stack for stack in stacks if len(stack) == depth]
        if len(stacks) != 1:
            raise UnsupportedError(
                f"embeddings of an inner layer: {type(parts.lm).__name__} has {len(stacks)} lists of {depth} layers, "
                "expected one; use layer: -1"
            )
        handle = stacks[0][index].register_forward_pre_hook(entered, with_kwargs=True)
    with attached(handle):
        yield seen
