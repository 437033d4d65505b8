"""Rows with images: what is scored is what is in the picture, and pictures are part of what rows are known by."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dataflex.errors import ConfigError
from dataflex.record.read import load_plan

COLOURS = ("red", "green", "blue")
SWAPPED = (1, 4, 7)  # rows that get another row's picture


@pytest.fixture(scope="module")
def eyes(tmp_path_factory):
    """A random two-layer Qwen2-VL, and pictures of one colour each with a question about it."""
    import torch
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    folder = tmp_path_factory.mktemp("eyes")
    special = [f"<|{name}|>" for name in ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")]
    words = [*"what colour is this picture user assistant system . ?".split(), *COLOURS]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<pad>", *special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=special,
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 4 * 28 * 28}
    images = Qwen2VLImageProcessor(size=size, patch_size=14, merge_size=2)
    Qwen2VLProcessor(
        image_processor=images, tokenizer=fast, video_processor=Qwen2VLVideoProcessor(), chat_template="-"
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    ids = {
        "image_token_id": vocabulary["<|image_pad|>"],
        "video_token_id": vocabulary["<|video_pad|>"],
        "vision_start_token_id": vocabulary["<|vision_start|>"],
        "vision_end_token_id": vocabulary["<|vision_end|>"],
    }
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids))
    model.save_pretrained(folder / "model")

    rng, rows = np.random.default_rng(0), []
    for number in range(12):
        colour = number % len(COLOURS)
        pixels = rng.integers(0, 40, (28, 28, 3)).astype(np.uint8)
        pixels[..., colour] += 200
        Image.fromarray(pixels).save(folder / f"{number}.png")
        question, answer = "<image> what colour is this picture ?", f"{COLOURS[colour]} ."
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(
            {"messages": messages, "images": [str(folder / f"{number}.png")], "kind": COLOURS[colour], "w": 1.0}
        )
    swapped = [dict(row) for row in rows]
    for row in SWAPPED:
        swapped[row]["images"] = rows[(row + 1) % 12]["images"]
    sets = {"pictures": rows, "swapped": swapped, "goal": rows[9:]}
    form = {
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    for name, content in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "dataset_info.json").write_text(
        json.dumps({name: {"file_name": f"{name}.json", **form} for name in sets})
    )
    return {
        "model_name_or_path": str(folder / "model"),
        "dataset_dir": str(folder),
        "template": "qwen2_vl",
        "cutoff_len": 128,
        "max_steps": 2,
    }


def scores(run, eyes, name, selector, **settings):
    outcome = run(name, **eyes, **settings, dataset=name, dynamic={"interval_steps": 2, "selector": selector})
    return outcome, load_plan(outcome.folder, 0).scores


@pytest.mark.parametrize(
    ("selector", "settings"),
    [
        ({"name": "loss"}, {}),
        ({"name": "rds_plus", "targets": ["goal"]}, {}),
        ({"name": "less", "targets": ["goal"], "precondition": "none"}, {"finetuning_type": "lora", "lora_rank": 2}),
    ],
    ids=lambda value: value.get("name", ""),
)
def test_a_swapped_picture_changes_the_scores_of_its_row_alone(run, eyes, selector, settings):
    first, before = scores(run, eyes, "pictures", selector, **settings)
    second, after = scores(run, eyes, "swapped", selector, **settings)
    assert np.isfinite(before).all()
    scale = np.abs(before).max()
    same = np.setdiff1d(np.arange(12), SWAPPED)
    np.testing.assert_allclose(after[same], before[same], rtol=1e-4, atol=1e-5 * scale)
    assert (np.abs(after[list(SWAPPED)] - before[list(SWAPPED)]) > 1e-4 * scale).all()
    spaces = [outcome.events[0]["row_space"] for outcome in (first, second)]
    assert spaces[0]["tokens"] == spaces[1]["tokens"]
    assert spaces[0]["fingerprint"] != spaces[1]["fingerprint"]
    if "targets" in selector:  # equal words, but only the target's own pictures are those of training rows
        leaks = [space["leaks"]["goal"] for space in spaces]
        assert [leak["training_rows"] for leak in leaks] == [3, 3]


def test_pictures_within_a_budget_and_a_ledger(run, eyes):
    block = {
        "domain_column": "kind",
        "interval_steps": 2,
        "selector": {"name": "less", "targets": ["goal"]},
        "signals": {"budget": 3.0},
        "max_repeats": None,
        "ledger": {"targets": ["goal"]},
    }
    settings = {**eyes, "max_steps": 6, "learning_rate": 3e-3, "dataset": "pictures"}
    outcome = run("within", **settings, dynamic=block)
    told = [event["reason"] for event in outcome.events if event["event"] == "planned"]
    assert len(told) == 3
    assert all("correlation" in reason for reason in told[1:]), told
    account = [event for event in outcome.events if event["event"] == "credited"][-1]["targets"]["goal"]
    assert abs(account["unexplained"]) < 0.02 * abs(account["now"] - account["before"])
    assert abs(account["others"]["other"]) < 1e-5
    for method in ({**block, "ledger": None}, {"ledger": block["ledger"]}):
        with pytest.raises(ConfigError, match="asks for gradients by row, and an image encoder runs on patches"):
            run("trained", **settings, freeze_vision_tower=False, dynamic=method)


def test_pictures_in_a_mixture_with_weights(run, eyes):
    block = {
        "domain_column": "kind",
        "mixer": {"name": "static", "proportions": {"red": 2, "green": 1, "blue": 1}},
        "weighter": {"name": "column", "column": "w"},
    }
    outcome = run("mixed", **{**eyes, "max_steps": 4}, dataset="pictures", dynamic=block)
    counts = [event["domain_counts"] for event in outcome.events if event["event"] == "planned"]
    assert counts == [{"red": 4, "green": 2, "blue": 2}]
    assert np.isfinite(outcome.series()).all()
