"""Rows, steps and mixtures that are known before anything is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.config.args import LlamaFactoryArgs, data_set_names
from dataflex.config.build import parse_dynamic
from dataflex.config.costs import passes_by_label
from dataflex.config.data import Source, count_bytes, count_rows, find_sources, train_rows
from dataflex.config.forecast import Forecast, batch_of, forecast, total_steps
from dataflex.config.split import resolve
from dataflex.errors import ConfigError, UnsupportedError

Config = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("x.jsonl", '{"a": 1}\n\n{"a": 2}\n', 2),
        ("x.jsonl", '{"a": 1}\n{"a": 2}', 2),
        ("x.json", '{"a": 1}\n{"a": 2}\n', 2),
        ("x.json", '\n [{"a": 1},\n {"a": 2}, {"a": 3}]', 3),
        ("x.json", "[]", 0),
        ("x.json", '{\n"a": 1\n}', None),
        ("x.json", '[{"a": 1}', None),
        ("x.txt", "one\n\ntwo\n", 3),
        ("x.txt", "", 0),
        ("x.csv", "a,b\n1,2\n", None),
    ],
)
def test_rows_of_a_file(name: str, text: str, rows: int | None, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert count_rows(Source(name="x", path=tmp_path / name), LlamaFactoryArgs.read({})) == rows


def test_rows_of_a_folder_are_added_up(tmp_path: Path) -> None:
    for i in (1, 2):
        (tmp_path / f"{i}.jsonl").write_text('{"a": 1}\n' * i)
    assert count_rows(Source(name="x", path=tmp_path), LlamaFactoryArgs.read({})) == 3


@pytest.mark.parametrize(
    ("entry", "keys", "rows", "size"),
    [
        ({}, {}, 4, 100),
        ({}, {"max_samples": 2}, 2, 30),  # the first two lines
        ({}, {"max_samples": 9}, 4, 100),
        ({"num_samples": 2}, {}, 2, 50),  # drawn by chance: their share
        ({"num_samples": 8}, {"max_samples": 6}, 6, 150),  # rows come again
        ({"num_samples": 2}, {"streaming": True}, 4, 100),
        ({"split": "train[:50%]"}, {}, 2, 50),
        ({"split": "train[1:]"}, {"max_samples": 2}, 2, 50),
        ({"split": "train[-1:]"}, {}, 1, 25),
    ],
)
def test_rows_and_bytes_are_those_that_the_run_loads(
    entry: dict[str, Any], keys: dict[str, Any], rows: int | None, size: int | None, tmp_path: Path
) -> None:
    lines = ['{"a":""}', '{"a": "' + "x" * 10 + '"}', '{"a": "' + "x" * 25 + '"}', '{"a": "' + "x" * 25 + '"}']
    text = "".join(line + "\n" for line in lines)
    assert [len(line) + 1 for line in lines[:2]] == [9, 20]
    (tmp_path / "x.jsonl").write_text(text[:9] + "\n" + text[9:])  # an empty line is no row
    assert len(text) + 1 == 100
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"x": {"file_name": "x.jsonl", "columns": {"prompt": "a"}, **entry}})
    )
    (source,), problems = find_sources(
        ["x"], LlamaFactoryArgs.read({"dataset_dir": str(tmp_path)}), "dataset", tmp_path
    )
    assert not problems
    assert (count_rows(source, LlamaFactoryArgs.read(keys)), count_bytes(source, LlamaFactoryArgs.read(keys))) == (
        rows,
        size,
    )


def test_a_changed_file_is_counted_again(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"a": 1}\n')
    assert count_rows(Source(name="x", path=file), LlamaFactoryArgs.read({})) == 1
    file.write_text('{"a": 1}\n' * 3)
    assert count_rows(Source(name="x", path=file), LlamaFactoryArgs.read({})) == 3


def test_samples_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"a": 1}\n' * 9)
    assert count_rows(Source(name="x", path=file), LlamaFactoryArgs.read({"max_samples": 5})) == 5
    assert count_rows(Source(name="x", path=file), LlamaFactoryArgs.read({"max_samples": 50})) == 9
    assert count_rows(Source(name="x", path=file, num_samples=20), LlamaFactoryArgs.read({})) == 20
    assert count_rows(Source(name="x", path=file, num_samples=20), LlamaFactoryArgs.read({"max_samples": 12})) == 12
    assert count_rows(Source(name="hub"), LlamaFactoryArgs.read({"max_samples": 12})) is None


@pytest.mark.parametrize(("val_size", "left"), [(0, 150), (0.1, 135), (0.001, 149), (30, 120), (1, 0), (200, 0)])
def test_rows_set_aside(val_size: Any, left: int) -> None:
    assert train_rows([100, 50], LlamaFactoryArgs.read({"val_size": val_size})) == left
    assert train_rows([100, None], LlamaFactoryArgs.read({"val_size": val_size})) is None


def test_names_of_data_sets() -> None:
    assert data_set_names("a, b,c ") == ("a", "b", "c")
    assert data_set_names(["a", "b"]) == ("a", "b")
    assert data_set_names(None) == ()


def test_sources_of_every_kind(project: Path) -> None:
    for lf in ({"dataset_dir": "ONLINE"}, {"dataset_dir": "REMOTE:someone/info"}):
        assert find_sources(["x"], LlamaFactoryArgs.read(lf), "dataset", project) == ([Source(name="x")], [])
    sources, problems = find_sources(["a", "hub"], LlamaFactoryArgs.read({}), "dataset", project)
    assert sources == [Source(name="a", path=Path("data/a.jsonl")), Source(name="hub")]
    assert problems == []
    (project / "data" / "dataset_info.json").write_text('{"a": ')
    assert find_sources(["a"], LlamaFactoryArgs.read({}), "dataset", project)[1][0].startswith(
        "dataset_dir: data/dataset_info.json is malformed JSON at line 1, column 7"
    )
    assert find_sources(
        ["a"], LlamaFactoryArgs.read({"dataset_dir": {"a": {"file_name": "data/a.jsonl"}}}), "dataset", project
    )[0] == [Source(name="a", path=Path("data/a.jsonl"))]


@pytest.mark.parametrize(
    ("lf", "packs"),
    [
        ({}, False),
        ({"stage": "pt"}, True),
        ({"stage": "pt", "packing": False}, False),
        ({"packing": True}, True),
        ({"neat_packing": True, "packing": False}, True),
    ],
)
def test_packing(lf: dict[str, Any], packs: bool) -> None:
    assert LlamaFactoryArgs.read(lf).packed is packs


@given(
    rows=st.integers(1, 400),
    per_device=st.integers(1, 9),
    accumulation=st.integers(1, 5),
    world=st.integers(1, 3),
    epochs=st.sampled_from([0.3, 1.0, 1.5, 3.0]),
)
def test_steps_against_counting_batches(
    rows: int, per_device: int, accumulation: int, world: int, epochs: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(world))
        lf = {
            "per_device_train_batch_size": per_device,
            "gradient_accumulation_steps": accumulation,
            "num_train_epochs": epochs,
        }
        steps, left = 0, rows
        while left > 0:  # one optimizer step takes up to `accumulation` rounds of one micro-batch per rank
            left -= per_device * accumulation * world
            steps += 1
        assert total_steps(LlamaFactoryArgs.read(lf), rows) == math.ceil(epochs * steps)
        assert batch_of(LlamaFactoryArgs.read(lf)).global_batch == per_device * accumulation * world


def test_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert batch_of(LlamaFactoryArgs.read({})).global_batch == 8
    monkeypatch.setenv("NPROC_PER_NODE", "4")
    assert batch_of(LlamaFactoryArgs.read({})).world == 1
    monkeypatch.setenv("FORCE_TORCHRUN", "true")
    monkeypatch.setenv("NNODES", "2")
    assert batch_of(LlamaFactoryArgs.read({})).world == 8
    monkeypatch.setenv("USE_RAY", "1")
    assert batch_of(LlamaFactoryArgs.read({"ray_num_workers": 3})).world == 3
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert batch_of(LlamaFactoryArgs.read({"ray_num_workers": 3})).world == 5


def view_of(block: dict[str, Any], project: Path, **lf: Any) -> Forecast:
    lf = {"per_device_train_batch_size": 2, "max_steps": 60, **lf}
    sources, problems = find_sources(["a", "b"], LlamaFactoryArgs.read(lf), "dataset", project)
    assert problems == []
    return forecast(parse_dynamic(block, project), LlamaFactoryArgs.read(lf), sources)


@pytest.mark.parametrize(
    ("keys", "training", "gradients"),
    [
        ({"stage": "sft"}, (1, 1), (1, 1)),
        ({"stage": "dpo"}, (4, 2), (4, 2)),
        ({"stage": "dpo", "pref_loss": "simpo"}, (2, 2), (2, 2)),
    ],
)
def test_a_pair_takes_both_answers_under_policy_and_reference(
    keys: dict[str, Any], training: tuple[int, int], gradients: tuple[int, int], project: Path
) -> None:
    sources, _ = find_sources(["a", "b"], LlamaFactoryArgs.read({}), "dataset", project)
    block = parse_dynamic({"selector": "grad_norm", "interval_steps": 10**6}, project)
    view = forecast(block, LlamaFactoryArgs.read({"max_steps": 60, **keys}), sources)
    found = passes_by_label(view)
    assert view.sequences is not None
    assert found["training"] == {"forward": training[0] * view.sequences, "backward": training[1] * view.sequences}
    assert view.rows is not None
    told = found["selector grad_norm"]
    assert told == {"forward": gradients[0] * view.rows, "backward": gradients[1] * view.rows}


def test_mixture_over_warm_up_and_stages(project: Path) -> None:
    block = {
        "mixer": {
            "name": "staged",
            "stages": [{"start_step": 0, "proportions": [1, 0]}, {"start_step": 40, "proportions": [1, 3]}],
        },
        "warmup_steps": 10,
        "interval_steps": 20,
        "initial_proportions": [1, 1],
    }
    view = view_of(block, project)
    # 10 steps half and half, 10-30 and 30-50 all a (the stage of step 40 begins inside), 50-60 a quarter a
    assert view.served().tolist() == [10 + 80 + 5, 10 + 15]
    assert view.num_decisions("selector") == 3
    assert view.schedule.all_warmup_steps == 10


def test_floors_are_held(project: Path) -> None:
    block = {"mixer": {"name": "static", "proportions": [1, 9]}, "min_proportion": {"a": 0.25}}
    assert view_of(block, project).served().tolist() == [30, 90]
    staged = [{"start_step": 0, "proportions": [1, 9]}, {"start_step": 30, "proportions": [1, 1]}]
    block = {"mixer": {"name": "staged", "stages": staged}, "interval_steps": 30, "min_proportion": 0.25}
    assert view_of(block, project).served().tolist() == [15 + 30, 45 + 30]


def test_caps_are_followed(project: Path) -> None:
    capped = view_of({"mixer": {"name": "static", "proportions": [1, 3]}, "max_epochs": {"b": 1}}, project)
    assert capped.served().tolist() == [70, 50]
    stopped = view_of(
        {"mixer": {"name": "static", "proportions": [1, 3]}, "max_epochs": {"b": 1}, "at_cap": "stop"}, project
    )
    assert stopped.served() == pytest.approx([50 / 3, 50])
    over = view_of({"mixer": {"name": "static", "proportions": [1, 3]}, "max_epochs": 1, "at_cap": "error"}, project)
    assert over.served().tolist() == [30, 90]


@given(
    warmup=st.integers(0, 9),
    interval=st.integers(1, 9),
    total=st.integers(1, 60),
    cycle=st.none() | st.integers(10, 25),
)
def test_counts_of_intervals_against_listing_them(warmup: int, interval: int, total: int, cycle: int | None) -> None:
    from dataclasses import replace

    dynamic = parse_dynamic({"selector": "random", "warmup_steps": warmup, "interval_steps": interval}, Path("."))
    dynamic = replace(dynamic, cycle_steps=cycle)
    view = Forecast(
        dynamic=dynamic, batch=batch_of(LlamaFactoryArgs.read({})), counts={}, packs=False, rows=None, steps=total
    )
    listed = list(dynamic.schedule(total).intervals())
    assert view.num_decisions("selector") == sum(one.kind == "dynamic" for one in listed)
    assert view.schedule.all_warmup_steps == sum(one.steps for one in listed if one.kind == "warmup")
    decided = [one for one in listed if one.kind == "dynamic"]
    assert view.first_decision("selector") == (decided[0] if decided else None)
    assert all(one.steps <= decided[0].steps for one in decided)


def test_what_is_not_known_stays_open(project: Path) -> None:
    packing = view_of({"mixer": "uniform"}, project, packing=True, max_steps=-1)
    assert (packing.rows, packing.steps, packing.domains, packing.schedule) == (None, None, None, None)
    assert packing.counts == {"a": 100, "b": 50}
    by_column = view_of({"mixer": "uniform", "domain_column": "source"}, project)
    assert by_column.domains is None
    assert by_column.rows == 150


def _with_sources(project: Path) -> None:
    """Give rows of a the domains web (40, two of them without a response) and code (60), those of b books."""
    rows = [json.loads(line) for line in (project / "data/a.jsonl").read_text().splitlines()]
    told = [{**row, "source": "web" if place < 40 else "code"} for place, row in enumerate(rows)]
    told[38]["output"] = told[39]["output"] = None
    (project / "data/a.jsonl").write_text("\n".join(map(json.dumps, told)))
    file = project / "data/b.json"
    file.write_text(json.dumps([{**row, "source": "books"} for row in json.loads(file.read_text())]))


def test_domains_of_a_column_are_known(project: Path) -> None:
    _with_sources(project)
    block = {"mixer": "uniform", "domain_column": "source"}
    domains = view_of(block, project).domains
    assert domains is not None
    assert dict(zip(domains.names, domains.num_rows.tolist(), strict=True)) == {"web": 38, "code": 60, "books": 50}
    first = view_of(block, project, max_samples=45).domains
    assert first is not None
    assert dict(zip(first.names, first.num_rows.tolist(), strict=True)) == {"web": 38, "code": 5, "books": 45}
    held = view_of(block, project, val_size=0.5).domains
    assert held is not None
    assert held.num_rows.tolist() == [19, 30, 25]
    assert view_of(block, project, streaming=True).domains is None


def test_names_of_a_column_are_checked(project: Path, config: Callable[..., dict[str, Any]]) -> None:
    def told(**block: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            resolve(config(dataset="a,b", dynamic={"domain_column": "source", **block}), project)
        return "\n".join(caught.value.problems)

    _with_sources(project)
    given = {"web": 0.5, "cod": 0.5}
    assert "dynamic.mixer.proportions.cod: no such domain; did you mean 'code'?" in told(
        mixer={"name": "static", "proportions": given}
    )
    assert "dynamic.max_epochs.wbe: no such domain; did you mean 'web'?" in told(mixer="uniform", max_epochs={"wbe": 2})
    file = project / "data/a.jsonl"
    file.write_text(file.read_text().replace('"source": "code"', '"source": null'))
    assert "line 41 of" in told(mixer="uniform")
    assert "has source = null (and 59 more rows); every row's must be text" in told(mixer="uniform")
    file.write_text(file.read_text().replace('"source": null', '"source": "web"'))
    with pytest.raises(ConfigError, match="uniform needs at least two domains, found 1"):
        resolve(config(dataset="a", dynamic={"domain_column": "source", "mixer": "uniform"}), project)


def test_validation_rows_are_taken_from_all_domains_alike(project: Path) -> None:
    view = view_of({"mixer": "size"}, project, val_size=0.2)
    assert view.rows == 120
    assert view.domains is not None
    assert view.domains.num_rows.tolist() == [80, 40]


def test_a_mixer_that_looks_at_the_model_is_not_asked(project: Path) -> None:
    (project / "looking.py").write_text(
        "import numpy as np\n"
        "from dataflex import Card, Mix, Mixer, Requires\n"
        "from dataflex.signals.kinds import TokenLoss\n"
        "class Looking(Mixer):\n"
        "    name = 'looking'\n"
        "    card = Card(summary='Looks.', paper='baseline', cost='1 F over the pool')\n"
        "    def requires(self):\n"
        "        return Requires(signals=frozenset({'losses'}), needs_interval=True)\n"
        "    def mix(self, ctx):\n"
        "        return Mix(proportions=ctx.signals(TokenLoss(), np.arange(3)))\n"
    )
    view = view_of({"plugins": ["looking.py"], "mixer": "looking", "interval_steps": 10}, project)
    with pytest.raises(UnsupportedError, match="looks at the model"):
        view.served()


def test_ten_million_rows_are_forecast_by_domain(tmp_path: Path) -> None:
    dynamic = parse_dynamic({"mixer": "temperature"}, tmp_path)
    view = Forecast(
        dynamic=dynamic,
        batch=batch_of(LlamaFactoryArgs.read({})),
        counts={"x": 9_000_000, "y": 900_000, "z": 100_000},
        packs=False,
        rows=10_000_000,
        steps=10**6,
    )
    served = view.served()
    assert served.sum() == pytest.approx(8e6)
    roots = np.sqrt([90, 9, 1])
    assert served / served.sum() == pytest.approx(roots / roots.sum())


def test_rows_are_counted_once_and_without_tokenizing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = project / "data" / "big.jsonl"
    line = json.dumps({"instruction": "x" * 200, "output": "y" * 200}) + "\n"
    big.write_text(line * 50_000)
    args = LlamaFactoryArgs.read({})
    assert count_rows(Source(name="big", path=big), args) == 50_000

    def read_again(*_args: Any, **_keys: Any) -> Any:
        raise AssertionError("the file is read a second time")

    monkeypatch.setattr(Path, "open", read_again)
    monkeypatch.setattr(Path, "read_bytes", read_again)
    assert count_rows(Source(name="big", path=big), args) == 50_000
