"""Bytes that a rank needs on its device, estimated from ``config.json``, the adapter, the precision and the engine.

Notation: h hidden size, L layers, f size of the feed-forward layer, V vocabulary, a and k widths of all query and of
all key heads, r rank of the adapters, P parameters of the model, T those that are trained, W ranks, t tokens of a
micro-batch (``per_device_train_batch_size`` x ``cutoff_len``, so at most), c bytes of a number in computation (2 under
``bf16``, ``fp16``, ``pure_bf16``, else 4).

- P = V h (twice where embeddings are not tied) + L (2 h + h a + 2 h k + a h + 3 h f + biases) + h: decoders of Llama's
  kind, that is of Llama, Mistral and Qwen2.
- T = P, or with LoRA the sum of r (inputs + outputs) over the layers' matrices that have adapters (arXiv 2106.09685).
- Frozen parameters take c bytes. In 16 bit a trained one has, in bytes of parameter + gradient + AdamW's state, 2 + 2 +
  12 under DeepSpeed (ZeRO, arXiv 1910.02054, section 3.1: fp32 copy and two moments), 2 + 2 + 4 with ``pure_bf16``, and
  4 + 4 + 8 otherwise, since LLaMA-Factory and FSDP keep it in fp32; in fp32 always 4 + 4 + 8.
- ZeRO-1 divides the optimizer's state by W, ZeRO-2 gradients too, ZeRO-3 and FSDP parameters too (figure 1 there).
- Activations of a layer are what its backward pass reads, counted as in arXiv 2205.05198, section 4.1, without dropout,
  for RMSNorm, grouped queries, SwiGLU and an attention that keeps no scores: A = c t (4 h + 2 a + 2 k + 4 f) + 8 t h,
  of which the last are what transformers' two norms keep in fp32.
  All in all L A, or with checkpointing (LLaMA-Factory's default) c t h L + A; and 10 t V for logits in 16 bit, their
  fp32 copy and its gradient, or 8 t V in fp32.
- A row's sketch in its training step (``signals.budget`` with gradients and targets): s(inputs) x s(outputs) numbers of
  each trained matrix, s(n) = n up to 64, else 16; 256 of a longer bias or norm, which has none under checkpointing. The
  device holds those of at most 4,096 rows until the next decision, in fp32.
- Signals: one fp32 gradient for each target, 4 T, and where Adam's moments are divided, 8 T to bring them together, for
  methods that ask for gradients; the parameters of a reference model, whole, c bytes each.

Not counted: buffers of communication, layers that ZeRO-3 and FSDP gather, workspace, fragmentation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.check import partitioned_by, zero_options
from dataflex.config.forecast import Forecast
from dataflex.config.needs import wants_moments
from dataflex.signals.specs import HELD_ROWS, SKETCH
from dataflex.state import read_json

_KINDS = ("llama", "mistral", "qwen2")
_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused")
_NOT_COUNTED = ("additional_target", "adapter_name_or_path", "quantization_bit", "use_dora", "use_llama_pro")
"""Keys of LLaMA-Factory's under which there is no estimate, as with an optimizer that is not AdamW, and offloading."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Sizes of a decoder of Llama's kind."""

    hidden: int
    layers: int
    queries: int  # width of all query heads
    keys: int  # width of all key heads, and of all value heads
    feed_forward: int
    vocabulary: int
    tied: bool  # whether input and output embeddings are one matrix
    biased: frozenset[str] = frozenset()  # names of matrices with a bias

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each matrix of a layer, by its name in the model."""
        h, f = self.hidden, self.feed_forward
        attention = {"q_proj": (h, self.queries), "k_proj": (h, self.keys), "v_proj": (h, self.keys)}
        return {**attention, "o_proj": (self.queries, h), "gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h)}

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        each = sum(inputs * outputs + outputs * (name in self.biased) for name, (inputs, outputs) in self._items())
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * (2 * self.hidden + each) + self.hidden

    def adapters(self, rank: int, targets: Any) -> int | None:
        """Return the number of parameters of LoRA's matrices; None for a matrix that is not of the layers."""
        names = self._adapted(targets)
        if not set(names) <= set(self.matrices):
            return None
        return self.layers * rank * sum(sum(size) for name, size in self._items() if name in names)

    def sketch(self, rank: int | None, targets: Any, *, checkpointed: bool) -> int:
        """Return the numbers of the sketch of a row's gradient: of adapters of a rank, or of all (None)."""
        if rank is not None:
            names = self._adapted(targets)
            sizes = (size for name, size in self._items() if name in names)
            return self.layers * sum(_side(rank) * (_side(inputs) + _side(outputs)) for inputs, outputs in sizes)
        each = sum(
            _side(inputs) * _side(outputs) + _line(outputs) * (name in self.biased)
            for name, (inputs, outputs) in self._items()
        )
        norms = 0 if checkpointed else (2 * self.layers + 1) * _line(self.hidden)
        return self.layers * each + norms

    def _adapted(self, targets: Any) -> list[str]:
        names = targets if isinstance(targets, list | tuple) else [name.strip() for name in str(targets).split(",")]
        return list(self.matrices) if "all" in names else list(names)

    def activations(self, tokens: int, width: int, *, checkpointed: bool) -> int:
        """Return the bytes kept for the backward pass of a micro-batch, in numbers of ``width`` bytes."""
        numbers = 4 * self.hidden + 2 * self.queries + 2 * self.keys + 4 * self.feed_forward
        layer = width * numbers + 8 * self.hidden
        layers = width * self.hidden * self.layers + layer if checkpointed else self.layers * layer
        return tokens * (layers + (10 if width == 2 else 8) * self.vocabulary)

    def _items(self) -> Any:
        return self.matrices.items()


def _side(width: int) -> int:
    return SKETCH if width > 4 * SKETCH else width


def _line(width: int) -> int:
    return SKETCH**2 if width > 4 * SKETCH**2 else width


def decoder_of(folder: Any) -> Decoder | None:
    """Return the sizes that ``config.json`` in a folder tells; None without one, and for models of another kind."""
    try:
        found = read_json(Path(str(folder)).expanduser() / "config.json")
        if found.get("model_type") not in _KINDS or found.get("quantization_config"):
            return None
        heads, hidden = int(found["num_attention_heads"]), int(found["hidden_size"])
        width = int(found.get("head_dim") or hidden // heads)
        attention = {"q_proj", "k_proj", "v_proj"} if found["model_type"] == "qwen2" else set()
        attention |= {"q_proj", "k_proj", "v_proj", "o_proj"} if found.get("attention_bias") else set()
        return Decoder(
            hidden=hidden,
            layers=int(found["num_hidden_layers"]),
            queries=heads * width,
            keys=int(found.get("num_key_value_heads") or heads) * width,
            feed_forward=int(found["intermediate_size"]),
            vocabulary=int(found["vocab_size"]),
            tied=bool(found.get("tie_word_embeddings", False)),
            biased=frozenset(attention | ({"gate_proj", "up_proj", "down_proj"} if found.get("mlp_bias") else set())),
        )
    except (OSError, ValueError, AttributeError, KeyError, TypeError, ZeroDivisionError):
        return None


def memory(view: Forecast, lf: LlamaFactoryArgs) -> dict[str, float] | None:
    """Return bytes of a rank by what they are for, and their ``total``; None for a run that is not estimated."""
    decoder, zero = decoder_of(lf.model_name_or_path), zero_options(lf)
    adamw = lf.optim is None or lf.optim in _ADAMW
    offloads = any(_to_host(zero.get(f"offload_{what}")) for what in ("optimizer", "param"))
    if decoder is None or not adamw or offloads or lf.stage not in ("pt", "sft") or any(map(lf.on, _NOT_COUNTED)):
        return None
    lora = lf.finetuning_type == "lora"
    trained = decoder.adapters(lf.lora_rank, lf.lora_target) if lora else decoder.parameters
    if trained is None or lf.finetuning_type not in ("lora", "full"):
        return None
    world, pure = view.batch.world, lf.on("pure_bf16")
    width = 2 if pure or lf.bf16 or lf.fp16 else 4
    stage = 3 if partitioned_by(lf) else {1: 1, 2: 2}.get(zero.get("stage", 0), 0)
    if pure:
        each = (2, 2, 4)
    else:
        each = (2, 2, 12) if width == 2 and lf.deepspeed and not lf.fsdp else (4, 4, 8)
    signals = _signals(view, trained, width, divided=stage > 0 and world > 1)
    if signals is None:
        return None
    checkpointed = not lf.on("disable_gradient_checkpointing")
    numbers = decoder.sketch(lf.lora_rank if lora else None, lf.lora_target, checkpointed=checkpointed)
    signals += 4 * numbers * _sketched_rows(view)
    tokens = view.batch.micro_batch_size * lf.cutoff_len
    frozen = decoder.parameters if lora else 0
    found = {
        "parameters": (frozen * width + trained * each[0]) / (world if stage == 3 else 1),
        "gradients": trained * each[1] / (world if stage >= 2 else 1),
        "optimizer": trained * each[2] / (world if stage >= 1 else 1),
        "activations": decoder.activations(tokens, width, checkpointed=checkpointed),
        "signals": signals,
    }
    return {**found, "total": sum(found.values())}


def _to_host(offload: Any) -> bool:
    device = offload.get("device") if isinstance(offload, Mapping) else offload
    return bool(device) and re.fullmatch("none", str(device), re.IGNORECASE) is None


def _signals(view: Forecast, trained: int, width: int, *, divided: bool) -> float | None:
    """Return the bytes of what methods hold on the device; None where a reference model is of another kind."""
    vectors, folders = 0, set()
    for method in view.dynamic.methods:
        if method.requires.preconditions.get("precondition") == "ekfac":  # bases of sides that only a pass knows
            return None
        if "gradients" in method.requires.signals:
            moments = 2 if divided and any(wants_moments(method.requires)) else 0
            vectors = max(vectors, len(method.targets) + moments)
        if method.requires.reference is not None:
            folders.add(method.requires.reference.folder)
    references = [decoder_of(folder) for folder in folders]
    if None in references:
        return None
    return 4 * trained * vectors + width * sum(each.parameters for each in references if each is not None)


def _sketched_rows(view: Forecast) -> int:
    """Return the most rows of which the device holds sketches until the next decision."""
    selector, first = view.dynamic.selector, view.first_decision("selector")
    scored = selector is not None and bool(selector.targets) and "gradients" in selector.requires.signals
    if not scored or view.dynamic.signals.budget is None or first is None:
        return 0
    return min(HELD_ROWS, max(first.steps, first.start_step) * view.batch.global_batch // view.batch.world)
