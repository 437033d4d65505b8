"""Estimated bytes of a rank, compared with numbers worked out by hand and with true numbers of parameters."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.build import parse_dynamic
from dataflex.config.forecast import forecast
from dataflex.config.memory import decoder_of, memory
from dataflex.config.schema import DynamicConfig
from dataflex.signals.specs import SKETCH
from tests.docs.pages import EXAMPLES

SIZES = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 10,
}
PARAMETERS = 2 * 80 + 2 * (16 + 64 + 32 + 32 + 64 + 3 * 128) + 8
CHECKPOINTED = 15 * (2 * (2 * 8 + 120) + 64 + 10 * 10)
"""Of 15 tokens, whose layer keeps 4 x 8 + 2 x 8 + 2 x 4 + 4 x 16 = 120 numbers, and 8 x 8 bytes."""
FSDP2 = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 2}}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"deepspeed": {"zero_optimization": {"stage": stage, **more}}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    return tmp_path


@pytest.fixture
def estimate(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that estimates the bytes on one of four ranks: 3 rows of 5 tokens, bf16, all parameters."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    base = {"model_name_or_path": str(folder), "stage": "sft", "finetuning_type": "full", "cutoff_len": 5, "bf16": True}

    def told(dynamic: DynamicConfig | None = None, **changes: Any) -> dict[str, float] | None:
        lf = LlamaFactoryArgs.read({**base, "per_device_train_batch_size": 3, "max_steps": 10, **changes})
        return memory(forecast(dynamic or DynamicConfig(), lf, []), lf)

    return told


def test_parameters_of_the_example_are_those_of_its_file():
    path = EXAMPLES / "models" / "base-4m"
    content = (path / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    true = sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    assert decoder_of(path).parameters == true == 4_590_848


@pytest.mark.parametrize("width", [2, 4])
def test_activations_of_a_layer_are_those_that_autograd_keeps(width: int):
    """Bytes of saved tensors, parameters left out, grow by this much with a layer: on the CPU, with 2 x 200 tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = EXAMPLES / "models" / "base-4m"

    def kept(layers: int) -> int:
        config = AutoConfig.from_pretrained(path, num_hidden_layers=layers)
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16 if width == 2 else torch.float32).train()
        own = {each.untyped_storage().data_ptr() for each in model.parameters()}
        seen: dict[int, Any] = {}

        def keep(tensor: Any) -> Any:
            seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        ids = torch.randint(3, 4000, (2, 200))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids=ids, labels=ids)
        return sum(each.untyped_storage().nbytes() for place, each in seen.items() if place not in own)

    decoder = decoder_of(path)
    one, two = (replace(decoder, layers=layers).activations(400, width, checkpointed=False) for layers in (1, 2))
    assert (kept(4) - kept(2)) / 2 == pytest.approx(two - one, rel=0.01)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Mistral-7B-v0.1", 7_241_732_096),
        ("Llama-3.2-3B", 3_212_749_824),
        ("Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen2.5-0.5B", 494_032_768),
    ],
)
def test_parameters_of_the_recipes_models_are_those_published(name: str, parameters: int):
    assert decoder_of(EXAMPLES / "scale" / "models" / name).parameters == parameters


@pytest.mark.parametrize(
    ("changes", "biases"),
    [
        ({"attention_bias": True}, 8 + 4 + 4 + 8),
        ({"mlp_bias": True}, 16 + 16 + 8),
        ({"model_type": "qwen2"}, 8 + 4 + 4),
    ],
)
def test_biases_count(folder: Path, changes: dict[str, Any], biases: int):
    (folder / "config.json").write_text(json.dumps({**SIZES, **changes}))
    assert decoder_of(folder).parameters == PARAMETERS + 2 * biases


def test_matrices_with_adapters(folder: Path):
    decoder = decoder_of(folder)
    assert decoder.adapters(2, "q_proj,v_proj") == 2 * 2 * (16 + 12)
    assert decoder.adapters(2, ["all"]) == 2 * 2 * (16 + 12 + 12 + 16 + 3 * 24)
    assert decoder.adapters(2, "lm_head") is None


@pytest.mark.parametrize(
    ("changes", "parameters", "gradients", "optimizer", "activations"),
    [
        ({}, 5408, 5408, 10816, CHECKPOINTED),
        ({"bf16": False}, 5408, 5408, 10816, 15 * (4 * 136 + 64 + 80)),
        ({"pure_bf16": True, "bf16": False}, 2704, 2704, 5408, CHECKPOINTED),
        ({"disable_gradient_checkpointing": True}, 5408, 5408, 10816, 15 * (2 * (2 * 120 + 64) + 100)),
        (zero(1), 2704, 2704, 4056, CHECKPOINTED),
        (zero(2), 2704, 676, 4056, CHECKPOINTED),
        (zero(3), 676, 676, 4056, CHECKPOINTED),
        (FSDP2, 1352, 1352, 2704, CHECKPOINTED),
        ({**zero(3), "finetuning_type": "lora", "lora_rank": 2, "lora_target": "q_proj,v_proj"}, 732, 56, 336, None),
        ({"finetuning_type": "lora", "lora_rank": 2, "lora_target": "q_proj,v_proj"}, 3152, 448, 896, CHECKPOINTED),
    ],
)
def test_bytes_of_each_engine(estimate, changes, parameters, gradients, optimizer, activations):
    assert PARAMETERS == 1352
    found = estimate(**changes)
    activations = CHECKPOINTED if activations is None else activations
    assert list(found.values())[:5] == [parameters, gradients, optimizer, activations, 0]
    assert found["total"] == parameters + gradients + optimizer + activations


@pytest.mark.parametrize(
    ("changes", "selector", "vectors"),
    [
        (zero(2), {}, 2 + 2),  # moments are brought together
        (zero(2), {"precondition": "none"}, 2),
        ({}, {}, 2),
        (zero(2), {"name": "loss", "targets": None}, 0),
    ],
)
def test_bytes_of_gradients_of_targets(estimate, changes, selector, vectors):
    chosen = {key: value for key, value in {"name": "less", "targets": ["a", "b"], **selector}.items() if value}
    dynamic = parse_dynamic({"selector": chosen, "interval_steps": 5}, Path())
    assert estimate(dynamic, **changes)["signals"] == 4 * 1352 * vectors


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("rank", [None, 4])
def test_numbers_of_a_sketch_are_those_of_the_hooks(rank: int | None, checkpointed: bool):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from dataflex.signals.gradients.engine import GradientEngine
    from dataflex.signals.gradients.in_run import Directions, StepCapture, capturable

    path = EXAMPLES / "models" / "base-4m"
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    if rank is not None:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules=["q_proj", "up_proj"]))
    engine = GradientEngine(model)
    ids = torch.randint(3, 4000, (1, 5))
    engine.run({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}, [])
    if checkpointed:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    capture = StepCapture(capturable(model, engine.units)[0], sketch=SKETCH)
    capture.aim(Directions.none(capture.layers))
    assert decoder_of(path).sketch(rank, "q_proj,up_proj", checkpointed=checkpointed) == capture.size


@pytest.mark.parametrize(
    ("options", "interval", "rows"), [({"budget": 0.1}, 2, 2 * 3), ({"budget": 0.1}, 9, 9 * 3), ({}, 9, 0)]
)
def test_bytes_of_sketches_that_wait_for_the_next_decision(estimate, monkeypatch, options, interval, rows):
    """Each rank has 3 rows a step; a row's sketch has 64 + 2 (32) + 64 + 3 (128) numbers in each of 2 layers."""
    block = {"selector": {"name": "less", "targets": ["a"]}, "interval_steps": interval, "warmup_steps": 1}
    dynamic = parse_dynamic({**block, "signals": options}, Path())
    vectors = 4 * 1352
    assert estimate(dynamic)["signals"] == vectors + 4 * 2 * (2 * 64 + 2 * 32 + 3 * 128) * rows
    monkeypatch.setattr("dataflex.config.memory.HELD_ROWS", 4)
    assert estimate(dynamic)["signals"] == vectors + 4 * 2 * (2 * 64 + 2 * 32 + 3 * 128) * min(rows, 4)


def test_bytes_of_a_reference(estimate, folder: Path):
    mixer = {"name": "doremi", "reference": str(folder)}
    assert estimate(parse_dynamic({"mixer": mixer}, Path()))["signals"] == 2 * 1352
    assert estimate(parse_dynamic({"mixer": {**mixer, "reference": "nowhere"}}, Path())) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"model_name_or_path": "someone/something"},
        {"stage": "dpo"},
        {"finetuning_type": "freeze"},
        {"optim": "adafactor"},
        {"finetuning_type": "lora", "lora_target": "q_proj", "additional_target": "lm_head"},
        {"finetuning_type": "lora", "lora_target": "lm_head"},
        zero(2, offload_optimizer={"device": "cpu"}),
    ],
)
def test_what_is_not_estimated(estimate, changes):
    assert estimate(**changes) is None
    assert estimate(**zero(2, offload_optimizer={"device": "none"})) is not None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"model_type": "gpt2"}', json.dumps({**SIZES, "vocab_size": None}), "null"]
)
def test_other_models_are_left_out(folder: Path, text: str):
    (folder / "config.json").write_text(text)
    assert decoder_of(folder) is None
