"""The identity of a model, for naming stored values: what its numbers are, and how they act.

A full hash of billions of parameters would cost more than some passes. Two moments and a sample of every tensor tell
states of a training run apart, since an optimizer step changes all of a tensor. Equal parameters under another
configuration (rotary base, scale of an adapter, precision) have another name; what acts in training only does not
count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from enum import Enum
from typing import Any

import numpy as np
import torch

from dataflex import comm
from dataflex.signals.sweep import fetch
from dataflex.state import blake2b

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SAMPLED = 64
_PROBED_ROWS = 16
_OF_NO_EFFECT = (
    "_name_or_path architectures base_model_name_or_path dtype inference_mode init_lora_weights peft_version revision "
    "transformers_version use_cache"
).split()
"""Settings that say where a model came from, act at other times, or are told by its modules and parameters."""
_ADAPTER_SETTINGS = ("scaling", "use_dora", "merged_adapters", "active_adapters", "disable_adapters")

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]
Autocast = Callable[[], AbstractContextManager[Any]]


def state_identity(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return 32 hex digits that name the values of tensors, in the same order on every rank (collective)."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in named:
        held: Any = getattr(tensor, "ds_tensor", tensor)  # the part that this rank holds, under ZeRO-3 or FSDP
        local = (held.to_local() if hasattr(held, "to_local") else held).detach()
        flat = (torch.view_as_real(local) if local.is_complex() else local).reshape(-1)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if flat.numel():
            # Bits as integers: their sums wrap around, and are the same in any order, so for any number of threads.
            wide = flat.view(_BITS[flat.element_size()]).long()
            numbers = [wide.sum(), (wide * wide).sum(), *wide[:: max(1, wide.numel() // _SAMPLED)][:_SAMPLED]]
            digest.update(torch.stack(numbers).cpu().numpy().tobytes())
    mine = digest.hexdigest()
    every = comm.gather_objects(mine)
    # Ranks that hold whole parameters agree; parts are named by all of them together.
    return mine if len(set(every)) == 1 else blake2b("".join(every).encode()).hex()


def model_identity(model: torch.nn.Module) -> str:
    """Return 32 hex digits that name a model: values, architecture, adapters and what is trained (collective)."""
    told = json.dumps([*_settings(model)], sort_keys=True, default=_plain)
    return blake2b(state_identity(_tensors(model)).encode(), told.encode()).hex()


def frozen_identity(model: torch.nn.Module) -> str:
    """Return 32 hex digits that name a model by what is not trained of it: without adapters (collective)."""
    kept = ((name, tensor) for name, tensor in _tensors(model) if not tensor.requires_grad)
    told = json.dumps([*_settings(model)][:-1], sort_keys=True, default=_plain)
    return blake2b(state_identity(kept).encode(), told.encode()).hex()


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors of a model: parameters, what bitsandbytes keeps beside quantized ones, buffers."""
    for name, parameter in model.named_parameters():
        yield name, parameter
        state: Any = getattr(parameter, "quant_state", None)
        scales = {
            "absmax": getattr(state, "absmax", None),
            "offset": getattr(state, "offset", None),
            "state2": getattr(getattr(state, "state2", None), "absmax", None),
            "SCB": getattr(parameter, "SCB", None),
        }
        yield from ((f"{name} {part}", found) for part, found in scales.items() if torch.is_tensor(found))
    yield from model.named_buffers()


def _settings(model: torch.nn.Module) -> Iterator[Any]:
    """Yield, as JSON values, what acts on the values of a model."""
    seen: set[int] = set()
    codes: set[str] = set()
    for name, module in model.named_modules():
        forward = module.forward
        where, what = getattr(forward, "__module__", ""), getattr(forward, "__qualname__", "")
        codes.add(f"{type(module).__module__}.{type(module).__qualname__} {where}.{what}")
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict") and id(config) not in seen:
            seen.add(id(config))
            # Which attention runs is no part of a configuration's own dictionary.
            yield name, config, getattr(config, "_attn_implementation", None)
        adapters: Any = getattr(module, "peft_config", None)
        if isinstance(adapters, dict) and id(adapters) not in seen:
            seen.add(id(adapters))
            yield name, adapters
        if hasattr(module, "scaling") and hasattr(module, "active_adapters"):
            yield name, {key: getattr(module, key, None) for key in _ADAPTER_SETTINGS}
    yield sorted(codes)
    yield [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _plain(value: Any) -> Any:
    """Return a setting that JSON has no word for as one that it has."""
    if hasattr(value, "to_dict"):
        return _acting(value.to_dict())
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    return value.tolist() if isinstance(value, torch.Tensor | np.ndarray | np.generic) else str(value)


def _acting(settings: dict[Any, Any]) -> dict[str, Any]:
    """Leave out what has no effect, in nested settings too."""
    return {
        str(key): _acting(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key not in _OF_NO_EFFECT
    }


def precision(autocast: Autocast, device: torch.device) -> dict[str, str]:
    """Return how numbers are worked out around a model's forward: autocast, device, precision of products."""
    with autocast():
        enabled = torch.is_autocast_enabled(device.type)
        cast = str(torch.get_autocast_dtype(device.type)) if enabled else "none"
    products = getattr(torch.backends.cuda.matmul, "fp32_precision", None) or torch.get_float32_matmul_precision()
    return {"autocast": cast, "device": device.type, "products": str(products)}


def tokenizer_identity(tokenizer: Any) -> str:
    """Return 32 hex digits that name a tokenizer's vocabulary; "" for none."""
    return "" if tokenizer is None else blake2b(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hex()


def inputs_identity(dataset: Any, num_rows: int, collate: Collate) -> str:
    """Return 32 hex digits that name how rows become batches: masks and positions keep packed documents apart."""
    digest = hashlib.blake2b(digest_size=16)
    for row in np.unique(np.linspace(0, num_rows - 1, _PROBED_ROWS).astype(np.int64)) if num_rows else []:
        batch = collate(fetch(dataset, np.array([row])))
        for name in sorted(batch):
            value = batch[name]
            if torch.is_tensor(value):
                digest.update(f"{name} {tuple(value.shape)}".encode())
                digest.update(value.float().numpy().tobytes())
    return digest.hexdigest()


def surroundings(
    dataset: Any, num_rows: int, collate: Collate, tokenizer: Any, autocast: Autocast, device: torch.device
) -> dict[str, Any]:
    """Return, as JSON values, what values of rows come from besides the model and the tokens."""
    return {
        "inputs": inputs_identity(dataset, num_rows, collate),
        "precision": precision(autocast, device),
        "tokenizer": tokenizer_identity(tokenizer),
    }
