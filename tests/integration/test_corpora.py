"""Corpora that are tokenized when served, and domains by path or by clusters."""

from __future__ import annotations

import json
import multiprocessing

import numpy as np
import pytest

from tests.integration.test_identity import same


@pytest.fixture
def corpus(tmp_path):
    """Shards of two domains in two formats: plain text documents of uneven length, some long."""
    import pandas as pd

    from tests.conftest import WORDS

    rng = np.random.default_rng(0)

    def documents(count):
        return [" ".join(rng.choice(WORDS, size=rng.integers(3, 90))) for _ in range(count)]

    folder = tmp_path / "corpus"
    for name in ("json", "parquet"):
        (folder / name).mkdir(parents=True)
    for shard in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in documents(20 + shard)]
        (folder / "json" / f"web-{shard}.jsonl").write_text("".join(lines))
        pd.DataFrame({"text": documents(9)}).to_parquet(folder / "parquet" / f"code-{shard}.parquet")
    (folder / "json" / "math-0.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents(12)))
    info = {name: {"file_name": name, "columns": {"prompt": "text"}} for name in ("json", "parquet")}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def settings(corpus, **changes):
    return {
        "stage": "pt",
        "dataset_dir": str(corpus),
        "dataset": "json,parquet",
        "cutoff_len": 32,
        "max_steps": 8,
        "disable_shuffling": False,
        "preprocessing_batch_size": 16,
        **changes,
    }


MIX = {"mixer": {"name": "static", "proportions": [3, 1]}}


@pytest.mark.parametrize("packing", [True, False])
def test_served_rows_are_those_tokenized_beforehand(run, corpus, packing):
    """Shards in JSON lines and Parquet, blocks cut in groups of 16 documents, two worker processes."""
    plain = run("plain", **settings(corpus, packing=packing), dynamic=MIX)
    served = run("served", **settings(corpus, packing=packing), streaming=True, dataloader_num_workers=2, dynamic=MIX)
    assert multiprocessing.active_children() == []  # the workers ended with the training
    same(plain, served)
    spaces = [outcome.events[0]["row_space"] for outcome in (plain, served)]
    assert spaces[0]["domains"] == spaces[1]["domains"]
    assert spaces[0]["tokens"] == spaces[1]["tokens"]


@pytest.mark.parametrize("options", [{}, {"streaming": True}, {"val_size": 6}])
def test_proportions_of_documents_that_share_rows(run, corpus, options):
    """75 and 27 documents are packed into rows of 32 tokens; equal shares of documents are other shares of rows."""
    equal = {"mixer": "uniform", "unit": "documents"}
    outcome = run("documents", **settings(corpus, packing=True, **options), dynamic=equal)
    rows = outcome.events[0]["row_space"]["domains"]
    held = options.get("val_size", 0)
    if held:  # what was set aside was of the same rows
        rows = run("all", **settings(corpus, packing=True), dynamic=equal).events[0]["row_space"]["domains"]
    per_row = np.array([75 / rows["json"], 27 / rows["parquet"]])
    shares = (1 / per_row) / (1 / per_row).sum()
    assert abs(shares[0] - 0.5) > 0.005
    assert outcome.log[0]["dataflex/nominal/json"] == pytest.approx(shares[0], abs=1e-12)
    apart = run("apart", **settings(corpus, packing=False), dynamic=equal)
    assert apart.log[0]["dataflex/nominal/json"] == 0.5


def test_instructions_too(run):
    base = {"dataset": "alpha,beta", "max_steps": 5, "dynamic": MIX}
    same(run("plain", **base), run("served", **base, streaming=True))


@pytest.mark.parametrize("packing", [{"packing": True}, {"neat_packing": True}])
def test_packed_instructions_too(run, packing):
    """Alpha and beta in groups of 7 rows: packs of several rows, and of rows of one length."""
    base = {"dataset": "alpha,beta", "cutoff_len": 96, "preprocessing_batch_size": 7, "max_steps": 5, **packing}
    plain, served = run("plain", **base, dynamic=MIX), run("served", **base, dynamic=MIX, streaming=True)
    same(plain, served)
    spaces = [outcome.events[0]["row_space"] for outcome in (plain, served)]
    assert spaces[0]["domains"] == spaces[1]["domains"]
    assert spaces[0]["tokens"] == spaces[1]["tokens"]


def test_a_data_set_of_a_hub_is_served(run, corpus):
    """A repository in the hub's layout: Parquet shards beside a card."""
    hub = corpus / "hub"
    (hub / "data").mkdir(parents=True)
    for shard, file in enumerate(sorted((corpus / "parquet").iterdir())):
        (hub / "data" / f"train-{shard:05d}-of-00003.parquet").write_bytes(file.read_bytes())
    (hub / "README.md").write_text("---\nlicense: mit\n---\n")
    local = run("local", **settings(corpus), streaming=True, dynamic=MIX)
    info = json.loads((corpus / "dataset_info.json").read_text())
    info["parquet"] = {"hf_hub_url": str(hub), "columns": {"prompt": "text"}}
    (corpus / "dataset_info.json").write_text(json.dumps(info))
    same(local, run("remote", **settings(corpus), streaming=True, dynamic=MIX))


def test_a_streamed_run_is_resumed_exactly(run, corpus):
    base = settings(corpus, streaming=True, save_strategy="steps", save_steps=3)
    dynamic = {"mixer": "odm", "interval_steps": 1}
    whole = run("whole", **base, dynamic=dynamic)
    rest = run("rest", **base, resume_from_checkpoint=str(whole.folder / "checkpoint-3"), dynamic=dynamic)
    assert whole.series()[3:] == rest.series()[-5:]
    for name, value in whole.weights().items():
        assert np.array_equal(value, rest.weights()[name]), name


def test_selection_by_a_signal_on_a_stream(run):
    ours = run("loss", dataset="alpha", streaming=True, max_steps=4, dynamic={"selector": "loss", "interval_steps": 2})
    kinds = [event["kind"] for event in ours.events if event["event"] == "planned"]
    assert kinds == ["dynamic", "dynamic"]


@pytest.mark.parametrize("streaming", [False, True])
def test_domains_by_path(run, corpus, streaming):
    dynamic = {"mixer": "uniform", "domain_path": "json/*-*.jsonl"}
    base = {**settings(corpus, dataset="json", packing=False), "streaming": streaming or None}
    ours = run("paths", **base, dynamic=dynamic)
    assert ours.events[0]["row_space"]["domains"] == {"web": 63, "math": 12} or ours.events[0]["row_space"][
        "domains"
    ] == {"math": 12, "web": 63}
    counts = [event["domain_counts"] for event in ours.events if event["event"] == "planned"]
    assert counts == [{name: 8 for name in counts[0]}]


def test_a_pattern_that_does_not_fit_is_told(run, corpus):
    from dataflex.errors import ConfigError

    dynamic = {"mixer": "uniform", "domain_path": "text/*.jsonl"}
    with pytest.raises(ConfigError, match=r"dynamic.domain_path: 'text/\*.jsonl' does not fit the file .*json/"):
        run("paths", **settings(corpus, dataset="json", packing=False), dynamic=dynamic)


def test_domains_by_clusters(run, tiny_model):
    dynamic = {"mixer": "uniform", "domain_clusters": 3, "domain_encoder": str(tiny_model)}
    outcomes = [run(name, dataset="alpha", max_steps=3, dynamic=dynamic) for name in ("one", "two")]
    spaces = [outcome.events[0]["row_space"]["domains"] for outcome in outcomes]
    assert spaces[0] == spaces[1]
    assert set(spaces[0]) == {"cluster_00", "cluster_01", "cluster_02"}
    assert sum(spaces[0].values()) == 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "dpo", "dataset": "pairs"}, "streaming: rows of stage dpo are not tokenized one by one"),
        ({"dynamic": {**MIX, "domain_clusters": 3}}, "dynamic.domain_encoder: missing"),
        ({"dynamic": {**MIX, "domain_encoder": "x"}}, "dynamic.domain_encoder: has no effect"),
        ({"dynamic": {**MIX, "domain_path": "x"}}, "dynamic.domain_path: 'x' has no '\\*'"),
        (
            {"dynamic": {**MIX, "domain_path": "*", "domain_column": "source"}},
            "dynamic.domain_path: defines the domains, and so does domain_column",
        ),
    ],
)
def test_what_does_not_go_together_is_told(run, changes, message):
    from dataflex.errors import ConfigError

    base = {"dataset": "alpha,beta", "max_steps": 3, "streaming": True, "dynamic": MIX}
    with pytest.raises(ConfigError, match=message):
        run("refused", **{**base, **changes})
