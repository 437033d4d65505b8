"""LLaMA-Factory v1 on two gloo ranks: one rank's rows and losses, under FSDP2 and ZeRO-3 too, and a resumed run."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import yaml

from tests.distributed.test_engines import engine_settings
from tests.llamafactory.test_v1 import RM, losses, pairs, served, sources

pytestmark = pytest.mark.gloo
BLOCK = {
    **{"selector": {"name": "loss", "focus": "high"}, "mixer": {"name": "odm"}, "weighter": {"name": "focal"}},
    **{"interval_steps": 4, "keep_ratio": 0.8, "repeat": True},
}


OF_PAIRS = {
    "selector": {"name": "dsir", "targets": ["pairs2"]},
    **{"interval_steps": 2, "keep_ratio": 0.5, "repeat": True},
}


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_two_ranks_serve_and_learn_what_one_does(stage, tiny_tied, data_dir, tmp_path, two_ranks):
    from dataflex.run import train_here

    keys = {
        **{"model": str(tiny_tied), "template": "chatml", "cutoff_len": 40, "batching_workers": 0, "seed": 3},
        **{"global_batch_size": 4, "learning_rate": 2e-3, "max_steps": 6, "save_steps": 3, "dynamic": BLOCK},
        "train_dataset": sources(tmp_path, data_dir, "alpha", "beta"),
    }
    if stage == "rm":
        data = {
            "train_dataset": pairs(tmp_path, data_dir, "pairs"),
            "eval_dataset": pairs(tmp_path, data_dir, "pairs2"),
        }
        keys |= {**RM, **data, "dynamic": OF_PAIRS}

    def file(name, **changes):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**keys, "output_dir": str(tmp_path / name), **changes}))
        return path

    resumed = tmp_path / "two" / "checkpoint-3"
    two, again = file("two", micro_batch_size=1), file("again", micro_batch_size=1, resume_from_checkpoint=str(resumed))
    sharded = {"fsdp2": {"name": "fsdp2"}}
    sharded["zero3"] = {"name": "deepspeed", "config_file": engine_settings("zero3", tmp_path)["deepspeed"]}
    files = [two, again]
    for name, config in sharded.items() if stage == "sft" else ():
        more = {"micro_batch_size": 1, "dist_config": config, "bf16": False}  # by default FSDP2 computes in it
        files.append(file(name, **more))
        files.append(file(f"{name}-again", **more, resume_from_checkpoint=str(tmp_path / name / "checkpoint-3")))
    printed = two_ranks(files)
    assert not [*tmp_path.glob("*.error")], printed[-4000:]
    micro = 1 if stage == "rm" else 2  # v1 weighs a micro-batch of pairs by its tokens, so its size acts on the loss
    assert train_here([str(file("one", micro_batch_size=micro, save_steps=None))]) == 0
    one = tmp_path / "one"
    assert served(tmp_path / "two").tolist() == served(one).tolist()
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(one), rtol=2e-5)
    assert losses(tmp_path / "again") == losses(tmp_path / "two")[3:]
    for name in sharded if stage == "sft" else ():
        assert served(tmp_path / name).tolist() == served(one).tolist()
        np.testing.assert_allclose(losses(tmp_path / name), losses(one), rtol=2e-5)
        assert losses(tmp_path / f"{name}-again") == losses(tmp_path / name)[3:]
    shutil.rmtree(tmp_path / "two")
