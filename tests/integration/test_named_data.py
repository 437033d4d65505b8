"""The data are what the user named: beside tokenized copies, in their order, with usable columns, and predicted."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest

from dataflex.errors import ConfigError, DataError
from dataflex.record.read import load_plan

LESS = {"interval_steps": 1, "selector": {"name": "less", "targets": ["goal"]}}


def row_space(outcome):
    return next(event for event in outcome.events if event["event"] == "run_started")["row_space"]


def served(outcome):
    planned = [event for event in outcome.events if event["event"] == "planned"]
    return [load_plan(outcome.folder, event["interval"]).rows.tolist() for event in planned]


def test_a_copy_stands_for_the_training_data_alone(run, tmp_path):
    """37 training rows cut to 20; 5 target rows and 7 evaluation rows stay what they are named, on both runs."""
    copied = {"tokenized_path": str(tmp_path / "copy"), "max_samples": 20, "max_steps": 2, "eval_dataset": "held"}
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 1}
    plain = run("plain", **{**copied, "tokenized_path": None}, **evaluated, dynamic=LESS)
    for name in ("writes", "reads"):
        outcome = run(name, **copied, **evaluated, dynamic=LESS)
        assert row_space(outcome)["leaks"]["goal"]["of"] == 5
        assert row_space(outcome)["sources"] == {"ones": 20}
        assert served(outcome) == served(plain)
        assert outcome.series() == plain.series()
    other = run("other", **{**copied, "eval_dataset": "goal"}, **evaluated, dynamic=LESS)
    losses = [e["metrics"]["eval_loss"] for o in (outcome, other) for e in o.events if e["event"] == "evaluated"]
    assert losses[0] != losses[len(losses) // 2]  # the copy was written beside 'held'


def test_a_folder_that_is_no_copy_is_told(run, tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"tokenized_path: '.*copy' cannot be loaded: FileNotFoundError"):
        run("out", tokenized_path=str(tmp_path / "copy"), dynamic=LESS)


@pytest.mark.parametrize("packing", [False, True])
def test_a_target_is_cut_where_it_is_written(run, packing):
    """LLaMA-Factory takes a token from the cutoff for packed training rows; targets are not packed."""
    from dataflex.llamafactory.datasets import DataLoading

    spaces = []
    original = DataLoading.load

    def keep(self):
        module, space = original(self)
        spaces.append(space)
        return module, space

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataLoading, "load", keep)
        run("out", cutoff_len=8, packing=packing, max_steps=1, dynamic=LESS)
    assert spaces[0].targets["goal"].lengths.max() == 8


def test_nothing_is_shuffled_where_that_is_asked_for(run):
    """A selection comes in the selector's order, a mixture's domains in file order, in warm-up of the mixture too."""
    loss = {"interval_steps": 2, "selector": {"name": "longest"}}
    ordered, shuffled = (run(f"s{off}", max_steps=4, disable_shuffling=off, dynamic=loss) for off in (True, False))
    assert [sorted(rows) for rows in served(ordered)] == [sorted(rows) for rows in served(shuffled)]
    assert served(ordered) != served(shuffled)
    mixed = run("mixed", dataset="alpha,beta", max_steps=6, dynamic={"mixer": "uniform"})
    rows = np.array(served(mixed)[0])
    assert rows[rows < 40].tolist() == list(range(6))
    assert rows[rows >= 40].tolist() == list(range(40, 46))
    both = run(
        "both",
        dataset="alpha,beta",
        max_steps=4,
        dynamic={"mixer": "uniform", "selector": "random", "keep_ratio": 0.5, "interval_steps": 4},
    )
    again = np.array(served(both)[0])
    assert len(set(again[again < 40].tolist())) == 4


@pytest.fixture
def weighted(run, tmp_path):
    """Return a function that writes 12 rows with a column and points the run at them."""

    def write(name, values, ending="jsonl"):
        rows = [
            {"instruction": "add", "input": "", "output": f"sum {i}", name: value} for i, value in enumerate(values)
        ]
        lines = [json.dumps(row) for row in rows]
        folder = tmp_path / "own"
        folder.mkdir(exist_ok=True)
        text = "\n\n".join(lines) if ending == "jsonl" else f"[{', '.join(lines)}]"
        (folder / f"w.{ending}").write_text(text)
        (folder / "dataset_info.json").write_text(json.dumps({"w": {"file_name": f"w.{ending}"}}))
        run.base.update(dataset_dir=str(folder), dataset="w", max_steps=6)

    return write


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "null"), (float("nan"), ".nan"), (float("inf"), ".inf"), (-0.5, "-0.5"), (1e300, "1e+300")],
)
@pytest.mark.parametrize(("ending", "place"), [("jsonl", "line 23 of .*w.jsonl"), ("json", "item 12 of .*w.json")])
def test_a_bad_weight_is_told_before_the_first_step(run, weighted, tmp_path, value, shown, ending, place):
    weighted("trust", [1.0] * 11 + [value], ending)
    for weighter in ("column", "product"):
        block = {"name": "column", "column": "trust"}
        dynamic = {"weighter": block if weighter == "column" else [block, "focal"]}
        with pytest.raises(ConfigError) as caught:
            run(weighter, dynamic=dynamic)
        assert str(caught.value).startswith("dynamic.weighter: data set 'w', ")
        assert f"has trust = {shown}; weights must be finite numbers, 0 or more" in str(caught.value)

        assert re.search(place, str(caught.value))
        assert not (tmp_path / weighter / "dataflex" / "events.jsonl").exists()


def test_a_weight_that_is_text_is_told_too(run, weighted):
    weighted("trust", ["1.0"] * 12)
    with pytest.raises(ConfigError, match=r"line 1 of .*has trust = '1.0' \(and 11 more rows\); weights"):
        run("out", dynamic={"weighter": {"name": "column", "column": "trust"}})


def test_a_row_without_a_domain_is_told(run, weighted):
    weighted("kind", ["x"] * 5 + [None] + ["y"] * 6)
    with pytest.raises(
        ConfigError, match=r"dynamic.domain_column: data set 'w', line 11 of .*has kind = null; every row"
    ):
        run("out", dynamic={"domain_column": "kind", "mixer": "uniform"})
    weighted("kind", ["x"] * 12)
    with pytest.raises(
        ConfigError, match=r"dynamic.weighter: group needs at least two domains, found 1; every row has"
    ):
        run("out", dynamic={"domain_column": "kind", "weighter": "group"})


def test_static_weights_of_a_users_weighter_are_looked_at_first(run, tmp_path):
    from dataflex.errors import ComponentError

    (tmp_path / "late.py").write_text(
        "import numpy as np\n"
        "from dataflex import Card, Weighter\n\n"
        "class Late(Weighter):\n"
        "    name, card = 'late', Card(summary='Bad at the end.', paper='none', cost='0')\n"
        "    def static_weights(self, rows, columns):\n"
        "        return np.where(rows == 36, -1.0, 1.0).astype(np.float32)\n"
    )
    with pytest.raises(ComponentError, match="'late' returned negative or non-finite weights, first of row 36"):
        run("out", dynamic={"plugins": [str(tmp_path / "late.py")], "weighter": "late"})
    assert not any('"stepped"' in path.read_text() for path in (tmp_path / "out").rglob("events.jsonl"))


def test_what_the_loader_refuses_is_a_data_error(run, weighted, tmp_path):
    weighted("nested", [{"a": 1}] * 11 + [{"a": "x"}])  # within a mapping: not seen without loading
    with pytest.raises(DataError, match=r"dataset: 'w' cannot be loaded: ArrowInvalid: JSON parse error"):
        run("out", dynamic={"selector": "random"})
    for name in ("targets", "eval_dataset"):
        info = {"w": {"file_name": "w.jsonl"}, "good": {"file_name": "good.jsonl"}}
        (tmp_path / "own" / "dataset_info.json").write_text(json.dumps(info))
        row = json.dumps({"instruction": "a", "input": "", "output": "b"})
        (tmp_path / "own" / "good.jsonl").write_text("\n".join([row] * 12))
        selector = {"name": "bm25", "targets": ["w" if name == "targets" else "good"]}
        changes = {"eval_dataset": "w"} if name == "eval_dataset" else {}
        with pytest.raises(DataError, match=rf"{name}: 'w' cannot be loaded: ArrowInvalid"):
            run("out", dataset="good", **changes, dynamic={"selector": selector, "interval_steps": 1})


@pytest.mark.parametrize("key", ["dataset", "eval_dataset"])
def test_rows_that_fill_no_packed_row_are_told(run, key):
    with pytest.raises(DataError, match=rf"{key}: 'held' has fewer tokens than one row of cutoff_len 900, so packing"):
        run("out", **{"stage": "pt", "cutoff_len": 900, "dataset": "alpha", key: "held"}, dynamic={"selector": "all"})


def test_predictions_of_sets_that_are_evaluated_by_domain(run, tmp_path, monkeypatch):
    """Generated answers are those of the whole evaluation data, in its order; without packages it is refused."""
    from types import ModuleType

    import llamafactory.hparams.parser as parser
    import llamafactory.train.sft.workflow as workflow

    settings = {"eval_dataset": "goal,held", "do_predict": True, "predict_with_generate": True, "max_new_tokens": 2}
    dynamic = {"selector": "all", "eval_by_domain": True}
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ConfigError, match="predict_with_generate: needs jieba"):
        run("refused", **settings, max_steps=1, dynamic=dynamic)
    for name in ("jieba", "nltk", "rouge_chinese"):
        module = ModuleType(name)
        module.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(parser, "check_version", lambda *args, **kwargs: None)
    monkeypatch.setattr(workflow, "ComputeSimilarity", lambda tokenizer: lambda predictions, **kwargs: {"answers": 1.0})
    predictions = {}
    for name, block in (("ours", dynamic), ("stock", {"selector": "all"})):
        outcome = run(name, **settings, max_steps=1, dynamic=block)
        lines = (outcome.folder / "generated_predictions.jsonl").read_text().splitlines()
        predictions[name] = [json.loads(line) for line in lines]
    assert len(predictions["ours"]) == 5 + 7
    assert predictions["ours"] == predictions["stock"]
