"""Settings of the training data stay with it when another data set is loaded."""

from __future__ import annotations

from dataclasses import fields

import pytest
from llamafactory.hparams import DataArguments

from dataflex.llamafactory.loading import _OF_TRAINING, _reason, of_another_set

_HOW_ROWS_ARE_READ = frozenset(
    {
        "data_shared_file_system",
        "dataset_dir",
        "default_system",
        "enable_thinking",
        "eval_num_beams",
        "eval_on_each_dataset",
        "ignore_pad_token_for_loss",
        "mask_history",
        "media_dir",
        "overwrite_cache",
        "preprocessing_batch_size",
        "preprocessing_num_workers",
        "preserve_thinking",
        "template",
        "tool_format",
        "train_on_prompt",
    }
)
"""Settings that hold for every data set: a new one of LLaMA-Factory's has to be put here or there."""


def test_every_setting_of_the_data_is_decided_upon():
    decided = {*_HOW_ROWS_ARE_READ, *_OF_TRAINING, "dataset", "eval_dataset", "cutoff_len"}
    assert {field.name for field in fields(DataArguments)} == decided


@pytest.mark.parametrize("packing", [False, True])
def test_what_another_set_is_loaded_with(packing):
    args = DataArguments(
        dataset="a,b",
        eval_dataset="c,d",
        cutoff_len=64,
        max_samples=3,
        tokenized_path="copy",
        packing=packing,
        mix_strategy="interleave_under",
        interleave_probs="0.5,0.5",
        mask_history=True,
        default_system="be kind",
    )
    other = of_another_set(args, ["goal"], cutoff_shortened=packing)
    assert (other.dataset, other.eval_dataset, other.tokenized_path) == (["goal"], None, None)
    assert (other.packing, other.neat_packing, other.max_samples, other.val_size) == (False, False, None, 0.0)
    assert (other.mix_strategy, other.interleave_probs, other.streaming) == ("concat", None, False)
    assert (other.cutoff_len, other.mask_history, other.default_system) == (64, True, "be kind")
    assert args.tokenized_path == "copy"


def test_reasons_are_those_at_the_bottom():
    error = RuntimeError("while generating")
    error.__cause__ = ValueError("column changed\nin row 2")
    assert _reason(error) == "ValueError: column changed"
    assert _reason(StopIteration()) == "it has no rows"
    assert _reason(KeyError("input")).startswith("'input' is missing in its rows")
