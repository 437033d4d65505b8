"""Two CPU ranks give the single-process result: the same rows, the same losses to 1e-5."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.integration.test_identity import same

pytestmark = pytest.mark.gloo

CASES = {
    "stock": {},
    "all": {"dynamic": {"selector": "all"}},
    "selection": {"dynamic": {"warmup_steps": 1, "interval_steps": 3, "selector": {"name": "loss"}}},
    "mixture": {
        "dataset": "alpha,beta,gamma",
        "dynamic": {"mixer": {"name": "static", "proportions": [0.5, 0.3, 0.2]}},
    },
    "targeted": {
        "dataset": "alpha",
        "dynamic": {"interval_steps": 4, "selector": {"name": "tacs", "targets": ["goal"], "learning_rate": 0.01}},
    },
    "column": {"dataset": "alpha", "dynamic": {"weighter": {"name": "column"}}},
    "theirs": {
        "dynamic": {
            "plugins": [str(Path(__file__).with_name("theirs.py"))],
            "interval_steps": 3,
            "selector": {"name": "drawn_once", "cache_dir": "unused"},
            "weighter": "half",
        }
    },
    "static": {"dataset": "alpha,beta", "disable_shuffling": False},
    "recorded": {"dataset": "alpha,beta", "disable_shuffling": False, "dynamic": {"record": True}},
    "lossweight": {"dynamic": {"weighter": {"name": "loss", "warmup_steps": 1, "r": 0.5}}},
}
EXTENDED = {
    "dataset": "beta,alpha",
    "dynamic": {"on_change": "extend", "mixer": {"name": "static", "proportions": [0.5, 0.5]}},
}
STREAMED = {
    "dataset": "alpha,shards",
    "streaming": True,
    "dataloader_num_workers": 2,
    "dynamic": {"mixer": {"name": "static", "proportions": [0.5, 0.5]}, "on_bad_shard": "skip"},
}
PACKED = {
    **{"stage": "pt", "dataset": "text,weighted_text", "mix_strategy": "interleave_over", "streaming": True},
    **{"dataloader_num_workers": 1, "buffer_size": 8, "preprocessing_batch_size": 20, "max_steps": 5},
}
RECORD = {"record": True}
MAX_STEPS = 8


def settings(case, world):
    return {
        **CASES[case],
        "max_steps": MAX_STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4 // (2 * world) * 2,
        "ddp_find_unused_parameters": False,
        "save_strategy": "steps",
        "save_steps": 3,
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny_model, data_dir, two_ranks):
    """All cases on one and on two ranks, and the two-rank continuation of a one-rank checkpoint."""
    from tests.integration.conftest import Outcome, Runner, base_settings

    folder = tmp_path_factory.mktemp("ranks")
    runner = Runner(base_settings(tiny_model, data_dir), folder)
    single = {case: runner(f"one-{case}", **settings(case, 1)) for case in CASES}
    configs = []
    for case in CASES:
        mapping = runner.mapping(f"two-{case}", **settings(case, 2))
        configs.append(folder / f"two-{case}.json")
        configs[-1].write_text(json.dumps(mapping))
    for case in ("selection", "mixture"):
        name = f"moved-{case}"
        shutil.copytree(single[case].folder / "checkpoint-3", folder / name / "checkpoint-3")
        shutil.copytree(single[case].folder / "dataflex", folder / name / "dataflex")
        mapping = runner.mapping(name, **settings(case, 2), resume_from_checkpoint=str(folder / name / "checkpoint-3"))
        configs.append(folder / f"{name}.json")
        configs[-1].write_text(json.dumps(mapping))
    mapping = runner.mapping(
        "two-resumed", **settings("selection", 2), resume_from_checkpoint=str(folder / "two-selection" / "checkpoint-6")
    )
    configs.append(folder / "two-resumed.json")
    configs[-1].write_text(json.dumps(mapping))
    at_three = str(single["mixture"].folder / "checkpoint-3")
    changed = {**settings("mixture", 2), **EXTENDED, "resume_from_checkpoint": at_three}
    configs.append(folder / "two-extended.json")
    configs[-1].write_text(json.dumps(runner.mapping("two-extended", **changed)))
    copied = {**settings("mixture", 2), "tokenized_path": str(folder / "copy")}
    for name in ("two-copying", "two-copied"):
        configs.append(folder / f"{name}.json")
        configs[-1].write_text(json.dumps(runner.mapping(name, **copied)))
    for name, case in {"two-rarely": "lossweight", "two-recorded-rarely": "recorded"}.items():
        rarely = {**settings(case, 2), "logging_steps": 4}
        again = {"resume_from_checkpoint": str(folder / name / "checkpoint-6")}
        for path, given in {name: {}, f"{name}-resumed": again}.items():
            configs.append(folder / f"{path}.json")
            configs[-1].write_text(json.dumps(runner.mapping(path, **rarely, **given)))
    streamed = {**settings("stock", 1), **STREAMED, "dataset_dir": str(with_shards(folder / "data", data_dir))}
    single["streamed"] = runner("one-streamed", **streamed)
    at_three = str(single["streamed"].folder / "checkpoint-3")
    streamed |= settings("stock", 2)
    for name, more in {"two-streamed": {}, "two-streamed-on": {"resume_from_checkpoint": at_three}}.items():
        configs.append(folder / f"{name}.json")
        configs[-1].write_text(json.dumps(runner.mapping(name, **streamed, **more)))
    for kind, given in {"stream": PACKED, "rows": {**PACKED, "streaming": False}}.items():
        for name, more in {f"two-packed-{kind}": {}, f"two-packed-{kind}-recorded": {"dynamic": RECORD}}.items():
            configs.append(folder / f"{name}.json")
            configs[-1].write_text(json.dumps(runner.mapping(name, **{**settings("stock", 2), **given, **more})))
    two_ranks(configs)
    errors = [path.read_text() for path in folder.glob("*.error")]
    assert not errors, errors
    at_three = str(folder / "two-mixture" / "checkpoint-3")
    changed = {**settings("mixture", 1), **EXTENDED, "resume_from_checkpoint": at_three}
    single["extended"] = runner("one-extended", **changed)
    double = {path.stem: Outcome(folder / path.stem) for path in map(Path, configs)}
    return single, double


def with_shards(folder, data_dir):
    """Data set alpha, and three shards of beta in a folder, of which the second is cut off."""
    (folder / "shards").mkdir(parents=True)
    lines = (data_dir / "beta.jsonl").read_text().splitlines(keepends=True)
    for shard in range(3):
        text = "".join(lines[shard * 7 : shard * 7 + 7])
        (folder / "shards" / f"{shard}.jsonl").write_text(text[:-9] if shard == 1 else text)
    info = {"alpha": {"file_name": str(data_dir / "alpha.jsonl")}, "shards": {"file_name": "shards"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def test_shards_of_a_stream_over_ranks_and_workers(results):
    """One process without and two with two workers each: the same rows, the same shard left out, resumed by both."""
    single, double = results
    one, two, on = single["streamed"], double["two-streamed"], double["two-streamed-on"]
    for outcome in (one, two, on):
        space = outcome.events[0]["row_space"]
        assert space["sources"] == {"alpha": 40, "shards": 14}
        assert [line.split(" ")[1].rsplit("/", 1)[1] for line in space["bad_shards"]["shards"]] == ["1.jsonl"]
    assert rows_of(two) == rows_of(one)
    np.testing.assert_allclose(two.series(), one.series(), rtol=1e-5)
    np.testing.assert_allclose(on.series()[-5:], one.series()[-5:], rtol=1e-5)


def rows_of(outcome):
    from dataflex.record.read import load_plan

    return [load_plan(outcome.folder, e["interval"]).rows.tolist() for e in outcome.events if e["event"] == "planned"]


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("lossweight", "static", "recorded")])
def test_two_ranks_equal_one(results, case):
    single, double = results
    one, two = single[case], double[f"two-{case}"]
    # 37 rows, 8 in a step: the fifth step is short, and two ranks even it out with rows from the start, as stock does.
    steps = 4 if case in {"stock", "all"} else MAX_STEPS
    np.testing.assert_allclose(two.series()[:steps], one.series()[:steps], rtol=1e-5)
    np.testing.assert_allclose(two.series("grad_norm")[:steps], one.series("grad_norm")[:steps], rtol=1e-4)
    if case != "stock":
        np.testing.assert_allclose(*(loss_by_domain(of)[:steps] for of in (two, one)), rtol=1e-5)
        assert rows_of(two) == rows_of(one)


def test_file_order_on_two_ranks_is_stock_bit_for_bit(results):
    _, double = results
    assert double["two-all"].series() == double["two-stock"].series()
    assert double["two-all"].series("grad_norm") == double["two-stock"].series("grad_norm")


def loss_by_domain(outcome, of="loss"):
    names = sorted({key for entry in outcome.log for key in entry if key.startswith(f"dataflex/{of}/")})
    return np.array([[entry.get(name, -1.0) for name in names] for entry in outcome.log])


def test_a_recorded_stock_run_of_two_ranks_is_stock_bit_for_bit(results):
    _, double = results
    recorded = double["two-recorded"]
    same(double["two-static"], recorded)
    assert loss_by_domain(recorded, "sequences").sum(axis=1).tolist() == [8.0 * step for step in range(1, 9)]
    resumed, straight = double["two-recorded-rarely-resumed"], double["two-recorded-rarely"]
    for what in ("loss", "tokens", "sequences"):
        assert loss_by_domain(resumed, what).tolist() == loss_by_domain(straight, what).tolist()


@pytest.mark.parametrize("kind", ["stream", "rows"])
def test_a_recorded_packed_run_of_two_ranks_is_stock_bit_for_bit(results, kind):
    """Both ranks' tokens are counted: 8 blocks of 64 in each step."""
    _, double = results
    recorded = double[f"two-packed-{kind}-recorded"]
    same(double[f"two-packed-{kind}"], recorded)
    assert loss_by_domain(recorded, "tokens").sum(axis=1).tolist() == [8.0 * 64 * step for step in range(1, 6)]
    assert (loss_by_domain(recorded) > 0).any(axis=0).all()


def test_loss_weights_look_at_the_global_micro_batch(results):
    """Weights are made per micro-batch: two ranks of 2 are one rank of 4, not two micro-batches of 2."""
    single, double = results
    one, two = single["lossweight"], double["two-lossweight"]
    assert one.series()[:1] == pytest.approx(two.series()[:1], rel=1e-5)
    assert one.series()[1:] != pytest.approx(two.series()[1:], rel=1e-4)


@pytest.mark.parametrize("case", ["selection", "mixture"])
def test_one_rank_checkpoint_goes_on_with_two(results, case):
    single, double = results
    np.testing.assert_allclose(double[f"moved-{case}"].series(), single[case].series(), rtol=1e-5)
    assert rows_of(double[f"moved-{case}"]) == rows_of(single[case])


def test_two_ranks_make_and_read_a_tokenized_copy(results):
    single, double = results
    for name in ("two-copying", "two-copied"):
        assert rows_of(double[name]) == rows_of(single["mixture"])
        assert double[name].series() == double["two-mixture"].series()


def test_a_changed_pool_goes_on_over_other_ranks(results):
    """A data set leaves and the others change places: from one rank to two, and from two to one."""
    single, double = results
    one, two = single["extended"], double["two-extended"]
    assert rows_of(two) == rows_of(one)
    np.testing.assert_allclose(two.series(), one.series(), rtol=1e-5)
    np.testing.assert_allclose(one.series()[:3], single["mixture"].series()[:3], rtol=1e-5)
    assert one.series()[3:] != pytest.approx(single["mixture"].series()[3:], rel=1e-3)


def test_two_ranks_resume_exactly(results):
    _, double = results
    assert double["two-resumed"].series() == double["two-selection"].series()


def test_two_ranks_log_after_a_resume_as_if_never_stopped(results):
    _, double = results
    straight, resumed = double["two-rarely"], double["two-rarely-resumed"]
    assert resumed.series() == straight.series()
    for ours, theirs in zip(resumed.log, straight.log, strict=True):
        told = [key for key in theirs if key.startswith("dataflex/weight")]
        assert [ours[key] for key in told] == pytest.approx([theirs[key] for key in told], rel=1e-12)
        assert len(told) == 5
        assert ours["dataflex/plain_loss"] == theirs["dataflex/plain_loss"]
        assert ours["dataflex/loss/ones"] == theirs["dataflex/loss/ones"]


def test_a_checkpoint_of_two_ranks_names_the_files_of_both_and_one_run(results, tmp_path):
    from dataflex import checkpoints

    _, double = results
    folder = double["two-selection"].folder
    for step in (3, 6):
        checkpoint = folder / f"checkpoint-{step}"
        assert checkpoints.broken_reason(checkpoint) is None
        assert (
            checkpoints.run_of(checkpoint)
            == checkpoints.current_run(folder)
            == double["two-selection"].events[0]["run"]
        )
        files = json.loads((checkpoint / "dataflex" / "manifest.json").read_text())["files"]
        assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "trainer_state.json"} <= files.keys()
    assert double["two-resumed"].events[0]["run"] == checkpoints.current_run(folder), "kept by a run that goes on"
    copied = tmp_path / "checkpoint-6"
    shutil.copytree(folder / "checkpoint-6", copied)
    (copied / "rng_state_1.pth").unlink()
    assert checkpoints.broken_reason(copied) == "rng_state_1.pth is missing: it was removed"
