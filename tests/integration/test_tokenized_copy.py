"""Several data sets tokenized once: the second start tokenizes nothing and serves the same rows."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

from dataflex.config.split import resolve
from dataflex.errors import ConfigError, DataError
from dataflex.record.read import load_plan
from tests.integration.test_identity import same

SETS = "alpha,beta,gamma,ones,held"
BLOCK = {
    "mixer": {"name": "static", "proportions": [3, 2, 1, 2, 1]},
    "weighter": "column",
    "ledger": {"targets": ["goal"]},
}
SHORT = {"max_steps": 6, "gradient_accumulation_steps": 2}


def served(outcome):
    planned = [event for event in outcome.events if event["event"] == "planned"]
    return [load_plan(outcome.folder, event["interval"]).rows.tolist() for event in planned]


def started(outcome):
    return next(event for event in outcome.events if event["event"] == "run_started")["row_space"]


def measured(outcome):
    metrics = [event["metrics"] for event in outcome.events if event["event"] == "evaluated"]
    return [{key: value for key, value in each.items() if "loss" in key} for each in metrics]


@pytest.fixture
def tokenized(monkeypatch):
    """Names of the data sets that were tokenized, in order; ``fails`` is where it breaks off."""
    from llamafactory.data import loader

    seen = SimpleNamespace(names=[], fails=None, count=0)
    merged, made = loader._get_merged_dataset, loader._get_preprocessed_dataset

    def watched(names, *args, **kwargs):
        seen.names += names or []
        return merged(names, *args, **kwargs)

    def counted(dataset, *args, **kwargs):
        if dataset is not None and seen.names[-1] == seen.fails:
            raise RuntimeError("out of power")
        seen.count += dataset is not None
        return made(dataset, *args, **kwargs)

    monkeypatch.setattr(loader, "_get_merged_dataset", watched)
    monkeypatch.setattr(loader, "_get_preprocessed_dataset", counted)
    return seen


def test_a_second_start_tokenizes_nothing_and_serves_the_same(run, tmp_path, tokenized):
    copied = {**SHORT, "dataset": SETS, "dynamic": BLOCK, "tokenized_path": str(tmp_path / "copy")}
    plain = run("plain", **{**copied, "tokenized_path": None})
    tokenized.names.clear()
    first = run("first", **copied, preprocessing_num_workers=2)
    assert tokenized.names == [*SETS.split(","), "goal"]
    tokenized.names.clear()
    second = run("second", **copied)
    assert tokenized.names == ["goal"]
    for outcome in (first, second):
        assert served(outcome) == served(plain)
        assert outcome.series() == plain.series()
        assert started(outcome) == started(plain)
    assert not (tmp_path / "copy.parts").exists()
    stock = run("stock", **SHORT, dataset=SETS)
    tokenized.names.clear()
    alone = run("alone", **SHORT, dataset=SETS, tokenized_path=str(tmp_path / "copy"))  # LLaMA-Factory reads it too
    assert tokenized.names == []
    assert alone.series() == stock.series()


def test_domains_and_held_out_rows_of_a_copy(run, tmp_path, tokenized):
    """A column that nothing asked for when the copy was made names the domains, of rows that are held out too."""
    settings = {**SHORT, "dataset": "alpha,beta", "val_size": 0.2, "tokenized_path": str(tmp_path / "copy")}
    settings |= {"eval_strategy": "steps", "eval_steps": 3}
    run("makes", **settings, dynamic={"mixer": "uniform"})
    block = {"mixer": "uniform", "domain_column": "source", "eval_by_domain": True}
    tokenized.count = 0
    read = run("reads", **settings, dynamic=block)
    assert tokenized.count == 0
    plain = run("plain", **{**settings, "tokenized_path": None}, dynamic=block)
    assert started(read)["domains"].keys() == {"alpha0", "alpha1", "beta0", "beta1"}
    assert started(read) == started(plain)
    assert served(read) == served(plain)
    assert measured(read) == measured(plain) != []
    with pytest.raises(ConfigError, match=r"tokenized copy .*copy.*has no column 'topic'.*columns found: .*source"):
        run("none", **settings, dynamic={"mixer": "uniform", "domain_column": "topic"})


def test_numbers_and_short_texts_are_kept():
    from datasets import Dataset

    from dataflex.llamafactory.copies import joined_columns, scalar_columns

    raw = {"n": [1, 2], "x": [0.5, None], "b": [True, False], "short": ["a", None], "long": ["a" * 99, "b" * 99]}
    one = Dataset.from_dict({**raw, "list": [[1], [2]]})
    assert scalar_columns(one, []).column_names == ["n", "x", "b", "short"]
    assert scalar_columns(one, ["long"]).column_names == ["n", "x", "b", "short", "long"]
    other = scalar_columns(Dataset.from_dict({"n": [3], "x": ["text"], "short": ["c"]}), [])
    joined = joined_columns([scalar_columns(one, []), other])
    assert joined.to_pydict() == {"n": [1, 2, 3], "short": ["a", None, "c"]}
    assert joined_columns([other, None]) is None


def test_paths_of_files_are_kept_where_they_are_asked_for(run, data_dir, tmp_path, tokenized):
    data = tmp_path / "data"
    (data / "web").mkdir(parents=True)
    for name in ("alpha", "beta"):
        shutil.copy(data_dir / f"{name}.jsonl", data / "web")
    (data / "dataset_info.json").write_text(json.dumps({"web": {"file_name": "web"}}))
    settings = {**SHORT, "dataset": "web", "dataset_dir": str(data)}
    block = {"mixer": "uniform", "domain_path": "web/*.jsonl"}
    plain = run("plain", **settings, dynamic=block)
    for name in ("first", "second"):
        outcome = run(name, **settings, tokenized_path=str(tmp_path / "copy"), dynamic=block)
        assert started(outcome) == started(plain)
        assert served(outcome) == served(plain)
    assert tokenized.count == 2


@pytest.mark.parametrize("packed", [{"packing": True}, {"neat_packing": True}])
def test_packed_rows_and_documents(run, tmp_path, packed):
    settings = {**SHORT, **packed, "dataset": "alpha,beta", "gradient_accumulation_steps": 1, "cutoff_len": 40}
    block = {"mixer": "uniform", "unit": "documents"}
    plain = run("plain", **settings, dynamic=block)
    for name in ("first", "second"):
        outcome = run(name, **settings, tokenized_path=str(tmp_path / "copy"), dynamic=block)
        assert served(outcome) == served(plain)
        assert outcome.series() == plain.series()


def test_an_interrupted_start_goes_on_with_the_next_data_set(run, tmp_path, tokenized):
    settings = {**SHORT, "dataset": "alpha,beta,gamma", "tokenized_path": str(tmp_path / "copy")}
    tokenized.fails = "beta"
    with pytest.raises(DataError, match="out of power"):
        run("breaks", **settings, dynamic={"mixer": "uniform"})
    assert not (tmp_path / "copy").exists()
    tokenized.fails, tokenized.names = None, []
    outcome = run("goes on", **settings, dynamic={"mixer": "uniform"})
    assert tokenized.names == ["beta", "gamma"]
    plain = run("plain", **{**settings, "tokenized_path": None}, dynamic={"mixer": "uniform"})
    assert outcome.series() == plain.series()
    tokenized.fails = "beta"
    shutil.rmtree(tmp_path / "copy")
    with pytest.raises(DataError, match="out of power"):
        run("breaks", **settings, dynamic={"mixer": "uniform"})
    tokenized.fails, tokenized.names = None, []
    run("other", **settings, cutoff_len=32, dynamic={"mixer": "uniform"})  # what was finished is of another length
    assert tokenized.names == ["alpha", "beta", "gamma"]


def test_a_copy_of_something_else_is_told(run, data_dir, tmp_path, tiny_model):
    data = tmp_path / "data"
    shutil.copytree(data_dir, data)
    settings = {**SHORT, "dataset": "alpha,beta", "dataset_dir": str(data), "tokenized_path": str(tmp_path / "copy")}
    block = {"mixer": "uniform"}
    run("makes", **settings, dynamic=block)

    def problems(**changes):
        with pytest.raises(ConfigError) as caught:
            resolve({**run.mapping("x", **settings, dynamic=block), **changes}, tmp_path)
        (line,) = caught.value.problems
        return line

    def fits():
        resolve(run.mapping("x", **settings, dynamic=block), tmp_path)

    assert "template changed ('default' -> 'llama3')" in problems(template="llama3")
    both = problems(cutoff_len=32, max_samples=9)
    assert "cutoff_len changed (64 -> 32); max_samples changed (not given -> 9)" in both
    assert "dataset changed (alpha, beta -> beta, alpha)" in problems(dataset="beta,alpha")
    assert "packing changed (false -> true)" in problems(packing=True)
    rows = (data / "beta.jsonl").read_text()
    (data / "beta.jsonl").write_text(rows)  # touched
    fits()
    (data / "beta.jsonl").write_text(rows.replace("a", "b", 1))
    assert "file beta.jsonl of 'beta' changed" in problems()
    (data / "beta.jsonl").write_text(rows)
    info = json.loads((data / "dataset_info.json").read_text())
    (data / "dataset_info.json").write_text(json.dumps({**info, "alpha": {**info["alpha"], "num_samples": 9}}))
    assert "the entry of 'alpha' in dataset_info.json changed" in problems()
    shutil.rmtree(data)  # only the copy was taken along
    fits()

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    words = json.loads((model / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["cat"], vocabulary["dogs"] = vocabulary["dogs"], vocabulary["cat"]
    (model / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(DataError, match=r"made of something else: the tokenizer is another one"):
        run("other", **settings, model_name_or_path=str(model), dynamic=block)
    torn = next((tmp_path / "copy" / "train").glob("*.arrow"))
    torn.write_bytes(torn.read_bytes()[:-8])
    with pytest.raises(DataError, match="is not as it was written"):
        run("torn", **settings, dynamic=block)
    (tmp_path / "copy" / "dataflex" / "copy.json").write_text("{")
    assert "copy.json cannot be read" in problems()


def losses(outcome):
    return [{key: value for key, value in entry.items() if key.startswith("dataflex/loss/")} for entry in outcome.log]


HELD_OUT = {"val_size": 0.2, "eval_strategy": "steps", "eval_steps": 3}


@pytest.mark.parametrize("more", [{}, HELD_OUT], ids=["all", "held out"])
def test_a_record_alone_on_a_copy_changes_nothing_and_tells_domains(run, tmp_path, tokenized, more):
    """LLaMA-Factory makes the copy and reads it; beside it lies what the record needs at the next start."""
    settings = {**SHORT, "dataset": "alpha,beta,gamma", "disable_shuffling": False, **more}
    record = {"record": True}
    without = run("no copy", **settings, dynamic=record)
    for start in ("first", "second"):
        tokenized.count = 0
        stock = run(f"stock {start}", **settings, tokenized_path=str(tmp_path / "stock"))
        recorded = run(f"recorded {start}", **settings, tokenized_path=str(tmp_path / "recorded"), dynamic=record)
        same(stock, recorded)
        assert (tokenized.count > 0) == (start == "first")
        assert losses(recorded) == losses(without)
        assert set().union(*losses(recorded)) >= {"dataflex/loss/alpha", "dataflex/loss/beta"}
        assert started(recorded) == started(without)
        assert measured(recorded) == measured(without)
    by_column = {**record, "domain_column": "source"}
    read = run("column", **settings, tokenized_path=str(tmp_path / "recorded"), dynamic=by_column)
    assert losses(read) == losses(run("plain column", **settings, dynamic=by_column))
    bare = run("bare", **settings, tokenized_path=str(tmp_path / "stock"), dynamic=record)  # who made it said nothing
    same(stock, bare)
    assert set().union(*losses(bare)) == {"dataflex/loss/all"}
    dynamic = run("dynamic", **settings, tokenized_path=str(tmp_path / "recorded"), dynamic={"mixer": "uniform"})
    assert served(dynamic) == served(run("plain dynamic", **settings, dynamic={"mixer": "uniform"}))


def test_a_record_alone_reads_a_copy_that_a_mixture_made(run, tmp_path):
    settings = {**SHORT, "dataset": "alpha,beta"}
    run("makes", **settings, tokenized_path=str(tmp_path / "copy"), dynamic={"mixer": "uniform"})
    recorded = run("reads", **settings, tokenized_path=str(tmp_path / "copy"), dynamic={"record": True})
    same(run("stock", **settings), recorded)
    assert losses(recorded) == losses(run("plain", **settings, dynamic={"record": True}))


def test_streaming_has_no_effect_on_a_copy(run, tmp_path):
    settings = {**SHORT, "dataset": "alpha,beta", "tokenized_path": str(tmp_path / "copy")}
    made = run("makes", **settings, dynamic={"selector": "all"})
    mapped = run("streams", **settings, streaming=True, dynamic={"selector": "all"})
    same(made, mapped)
    assert losses(made) == losses(mapped)


def test_a_record_alone_of_a_stream_of_pairs_is_refused(run, tmp_path):
    mapping = run.mapping("x", **SHORT, dataset="pairs", stage="dpo", streaming=True, dynamic={"record": True})
    with pytest.raises(ConfigError, match=r"streaming: rows of stage dpo are not told apart by their tokens"):
        resolve(mapping, tmp_path)


def test_every_row_of_a_stream_is_served_as_a_record_alone_serves_those_of_memory(run):
    out = run("all", **SHORT, dataset="alpha,beta", streaming=True, dynamic={"selector": "all"})
    rows_at_once = run("record", **SHORT, dataset="alpha,beta", dynamic={"record": True})
    same(rows_at_once, out)
    assert losses(out) == losses(rows_at_once) != []
