"""Corpora that are tokenized when served, and domains by path or by clusters."""

from __future__ import annotations

import json
import multiprocessing

import numpy as np
import pytest

from dataflex.record.chosen import chosen_table
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
    assert places(plain) == places(served)
    assert (None in places(plain)) != packing


def places(outcome):
    """Return the data set and position of each document of each row; None where a row is one document."""
    told = chosen_table(outcome.folder).column("documents").to_pylist()
    return [pack and sorted((each["dataset"], each["position"]) for each in pack) for pack in told]


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
    assert places(plain) == places(served)
    assert sum(map(len, places(plain))) == 61


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


@pytest.fixture
def hub(corpus):
    """A repository in the hub's layout, shards of JSON lines (compressed) or Parquet, with a card that counts rows."""
    import gzip

    def make(kind, card=True):
        folder = corpus / f"hub-{kind}"
        (folder / "data").mkdir(parents=True)
        paths = []
        for shard, file in enumerate(sorted((corpus / "parquet").iterdir())):
            path = folder / "data" / f"train-{shard:05d}-of-00003.{kind}"
            if kind == "parquet":
                path.write_bytes(file.read_bytes())
            else:
                import pandas as pd

                lines = pd.read_parquet(file).to_json(orient="records", lines=True)
                path.write_bytes(gzip.compress(lines.encode()))
            paths.append(path)
        told = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n"
        if kind == "parquet":
            told += "dataset_info:\n  features:\n  - name: text\n    dtype: string\n  splits:\n  - name: train\n"
            told += "    num_examples: 27\n    num_bytes: 9999\n"
        (folder / "README.md").write_text(f"---\n{told}---\n" if card else "---\nlicense: mit\n---\n")
        info = json.loads((corpus / "dataset_info.json").read_text())
        info["hub"] = {"hf_hub_url": str(folder), "columns": {"prompt": "text"}}
        (corpus / "dataset_info.json").write_text(json.dumps(info))
        return paths

    return make


BROKEN = {
    "truncated parquet": ("parquet", lambda path: path.write_bytes(path.read_bytes()[:-20]), "cannot be read: Arrow"),
    "corrupt parquet": (
        "parquet",
        lambda path: path.write_bytes((whole := path.read_bytes())[:4] + b"\xff" * 200 + whole[204:]),
        "cannot be read: ",
    ),
    "truncated gzip": ("jsonl.gz", lambda path: path.write_bytes(path.read_bytes()[:-30]), "cannot be read: EOFError"),
    "not gzip": ("jsonl.gz", lambda path: path.write_bytes(b"{" * 100), "cannot be read: "),
    "missing": ("parquet", lambda path: path.unlink(), "is missing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_shard_that_fails_is_told_and_left_out_only_where_the_user_said_so(run, corpus, hub, case, caplog):
    """The second of three shards of nine documents; a run that is resumed when it was repaired is told."""
    from dataflex.errors import CheckpointError, DataError

    kind, destroy, reason = BROKEN[case]
    paths = hub(kind)
    base = settings(corpus, dataset="json,hub", packing=False, streaming=True)
    base |= {"save_strategy": "steps", "save_steps": 4}
    sound = paths[1].read_bytes()
    destroy(paths[1])
    with pytest.raises(DataError, match=rf"dataset: 'hub' cannot be loaded: shard \S*{paths[1].name} {reason}") as told:
        run("refused", **base, dynamic=MIX)
    assert "'dynamic.on_bad_shard: skip'" in str(told.value)
    assert not any(path.name in str(told.value) for path in (paths[0], paths[2]))
    skipping = {**MIX, "on_bad_shard": "skip"}
    left = run("skipped", **base, dynamic=skipping)
    assert f"data set 'hub': shard {paths[1]} {reason}" in caplog.text
    space = left.events[0]["row_space"]
    assert space["sources"] == {"json": 75, "hub": 18}
    ((name, (line,)),) = space["bad_shards"].items()
    assert name == "hub"
    assert line.startswith(f"shard {paths[1]} {reason}")
    checkpoint = str(left.folder / "checkpoint-4")
    again = run("again", **base, dynamic=skipping, resume_from_checkpoint=checkpoint)
    assert again.series()[-4:] == left.series()[-4:]
    if case == "missing":
        paths[1].write_bytes(sound)
        with pytest.raises(CheckpointError, match=r"left out: shard \S* is missing -> none"):
            run("repaired", **base, dynamic=skipping, resume_from_checkpoint=checkpoint)
        whole = run("whole", **base, dynamic=MIX)
        assert whole.events[0]["row_space"]["sources"] == {"json": 75, "hub": 27}


def test_bad_files_of_a_folder_are_told_by_plan_and_have_no_place(run, corpus, unsorted):
    """Rows after a file that was left out have their own files, and domains by path are those of the others."""
    from dataflex.config.split import resolve
    from dataflex.errors import ConfigError

    bad = corpus / "json" / "web-1.jsonl"
    bad.write_text(bad.read_text()[:-9])
    base = settings(corpus, dataset="json", packing=False, streaming=True)
    with pytest.raises(ConfigError, match=r"cannot be read: \S*web-1.jsonl is malformed JSON.*dynamic.on_bad_shard"):
        resolve(run.mapping("x", **base, dynamic=MIX), corpus)
    dynamic = {"mixer": "uniform", "domain_path": "json/*-*.jsonl", "on_bad_shard": "skip"}
    notes = resolve(run.mapping("x", **base, dynamic=dynamic), corpus).notes
    assert any("web-1.jsonl is malformed JSON" in note and "left out" in note for note in notes)
    left = run("left", **base, dynamic=dynamic)
    assert left.events[0]["row_space"]["domains"] == {"web": 42, "math": 12}
    files = chosen_table(left.folder).column("file").to_pylist()
    names = ("web-0.jsonl", "web-2.jsonl", "math-0.jsonl")
    assert [files.count(str(corpus / "json" / name)) for name in names] == [20, 22, 12]
    for path in (corpus / "json").iterdir():
        path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        run("none", **base, dynamic=dynamic)


def test_two_shards_of_which_one_number_is_missing():
    from dataflex.config.data import missing_shards

    assert missing_shards(["a/x-0-of-3.json", "a/x-2-of-3.json", "b/x-0-of-1.json", "c.json"]) == ["a/x-1-of-3.json"]
    assert missing_shards(["t-00001-of-00002.parquet", "t-00002-of-00002.parquet"]) == []  # counted from 1


@pytest.mark.parametrize("packing", [False, True])
def test_the_mixture_of_a_stream_changes_on_resume(run, corpus, packing):
    """The rest of a run under other proportions is that of a run whose rows were tokenized beforehand."""
    base = settings(corpus, packing=packing, save_strategy="steps", save_steps=4)
    changed = {"mixer": {"name": "static", "proportions": [1, 3]}, "on_change": "extend"}
    rest = {}
    for name, streaming in (("plain", None), ("served", True)):
        begun = run(name, **base, streaming=streaming, dynamic=MIX)
        at = str(begun.folder / "checkpoint-4")
        rest[name] = run(f"{name}-on", **base, streaming=streaming, dynamic=changed, resume_from_checkpoint=at)
    same(rest["plain"], rest["served"])
    counts = [entry["dataflex/sequences/parquet"] for entry in rest["served"].log]
    assert counts[-1] - counts[-5] == 6  # of the last eight rows


def test_shards_are_served_by_workers_as_without(run, corpus):
    """Four shards and three, read by no worker and by two."""
    outcomes = [
        run(f"w{count}", **settings(corpus), streaming=True, dataloader_num_workers=count, dynamic=MIX)
        for count in (0, 2)
    ]
    same(*outcomes)
