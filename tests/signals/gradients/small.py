"""Tiny models of several families, ragged batches, and the comparison of engine and oracle."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from dataflex.signals.gradients.consumers import Consumer
from dataflex.signals.gradients.engine import GradientEngine
from dataflex.signals.losses import row_losses
from dataflex.testing import oracle_row_gradients

VOCAB, PAD = 37, 3
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
}


def llama(**changes) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**_SIZES, **changes}))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 24}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(**_SIZES))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=8))


def gemma() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**_SIZES, head_dim=8, bos_token_id=1, eos_token_id=2))


def mixtral(experts: str = "eager") -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**{**_SIZES, "num_hidden_layers": 1}, num_local_experts=3)
    return MixtralForCausalLM._from_config(config, experts_implementation=experts)


def lora(model: nn.Module, targets="all-linear", *, drawn: bool = True, **changes) -> nn.Module:
    """Wrap a model with peft's LoRA; B is drawn too unless told not to, since with B = 0 A has no gradient."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            model, LoraConfig(r=3, lora_alpha=6, lora_dropout=0.2, target_modules=targets, **changes)
        )
    for name, parameter in model.named_parameters():
        if drawn and "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter, std=0.05)
    return model


MODELS = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "mixtral": mixtral,
    "lora": lambda: lora(llama()),
    "lora-gpt2": lambda: lora(gpt2(), targets=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
    "lora-saved": lambda: lora(llama(), modules_to_save=["lm_head", "embed_tokens"]),
    "lora-embedding": lambda: lora(llama(), targets=["embed_tokens", "q_proj"]),
    "dora": lambda: lora(llama(), use_dora=True),
    "dora-bias": lambda: lora(qwen2(), use_dora=True),
}


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return mixtral("grouped_mm") if name == "mixtral-grouped" else MODELS[name]()


def ragged(lengths: list[int], *, side: str = "right", seed: int = 0, unlabelled: tuple[int, ...] = ()) -> dict:
    """Rows of the given lengths; the first third of each is a prompt; rows in ``unlabelled`` have no labels."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), PAD)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, length in enumerate(lengths):
        start = 0 if side == "right" else longest - length
        own = torch.randint(4, VOCAB, (length,), generator=generator)
        ids[i, start : start + length] = own
        mask[i, start : start + length] = 1
        if i not in unlabelled:
            labels[i, start + length // 3 : start + length] = own[length // 3 :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Collect(Consumer):
    """Keeps every per-sample gradient, which no consumer of the library does."""

    name = "collect"

    def __init__(self, engine: GradientEngine) -> None:
        self.engine = engine

    def begin(self, finite):
        self.rows = {name: torch.zeros(len(finite), shape.numel()) for name, shape in self.engine.shapes.items()}

    def dense_cost(self, shape):
        return 0.0

    def add(self, block):
        for (name, start, stop), values in block.parts():
            self.rows[name][:, start:stop] = values

    def finish(self):
        return {"": torch.cat(list(self.rows.values()), dim=1)}


def engine_of(model: nn.Module, **options) -> GradientEngine:
    return GradientEngine(model, loss=lambda batch: row_losses(model, batch), **options)


def layers_of(engine: GradientEngine) -> dict[str, str]:
    """How each parameter is differentiated: names of layer kinds or ``torch.func``, " + " between several uses."""
    found: dict[str, str] = {}
    for unit in engine.units:
        for name in unit.parameters.values():
            kind = unit.kind.name if unit.kind else "torch.func"
            found[name] = f"{found[name]} + {kind}" if name in found else kind
    return found


def oracle(model: nn.Module, batch: dict, parameters=None) -> list[dict[str, torch.Tensor]]:
    """Return every row's gradients, one row at a time, in eval mode."""
    training = model.training
    model.eval()
    named = parameters or {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [
        oracle_row_gradients(lambda one: row_losses(model, one), batch, i, named)
        for i in range(len(batch["input_ids"]))
    ]
    model.train(training)
    return rows


def flat(rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.stack([torch.cat([gradient.flatten() for gradient in row.values()]) for row in rows])


def differences(
    found: dict[str, torch.Tensor], expected: list[dict[str, torch.Tensor]], limit: float, floor: float = 1e-3
) -> list[str]:
    """Return one line for every row and parameter that is off by more than ``limit``.

    Relative to the parameter's own gradient, or to ``floor`` of the row's where that is smaller:
    some gradients vanish by symmetry (bias of keys) and hold rounding only.
    """
    lines = []
    for i, row in enumerate(expected):
        whole = torch.stack([gradient.norm() for gradient in row.values()]).norm()
        for name, gradient in row.items():
            error = (found[name][i] - gradient.flatten()).norm()
            scale = max(gradient.norm(), floor * whole)
            if not error <= limit * scale:
                lines.append(
                    f"row {i} {name}: error {error:.3e}, engine {found[name][i].norm():.6e}, "
                    f"oracle {gradient.norm():.6e}"
                )
    return lines
