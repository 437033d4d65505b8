"""What ``dataflex score`` refuses before anything is loaded, and what it leaves out of a training configuration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dataflex.errors import ConfigError, DataError
from dataflex.offline.index import Index, Part, write_told
from dataflex.offline.query import query_request
from dataflex.offline.request import score_request
from dataflex.score_table import ScoreTable, write_scores
from tests.offline.conftest import rows_of


@pytest.fixture
def request_of(scoring):
    scoring.write("pool", rows_of(5))
    scoring.write("goal", rows_of(2, seed=9))
    scoring.write("bare", [])
    scoring.write("drawn", rows_of(3, seed=4), num_samples=2)

    def make(*overrides, methods=("loss",), out="scores.parquet", config=None, **options):
        data = scoring.config(dataset="pool", **(config or {}))
        return score_request(data, overrides, methods=methods, out=Path(out), **options)

    return make


@pytest.mark.parametrize(
    ("overrides", "options", "told"),
    [
        ((), {"methods": ("lose",)}, "--method: unknown selector 'lose'; did you mean 'loss'?"),
        ((), {"methods": ()}, "--method: name one or more selectors"),
        ((), {"methods": ("loss", "loss")}, "--method: names loss twice"),
        ((), {"methods": ("uds",)}, "--method: uds chooses within the candidates of a training step"),
        (("embed.encoder=/none",), {"methods": ("embed",), "targets": "goal"}, "embed.encoder: no such folder: /none"),
        (("rho_loss.reference=/none",), {"methods": ("rho_loss",)}, "rho_loss.reference: no such folder: /none"),
        (
            ("dsir.target_proportions.gaol=1",),
            {"methods": ("dsir",), "targets": "goal"},
            "dsir.target_proportions.gaol: no such target; did you mean 'goal'?",
        ),
        (("less.bf16=true",), {}, "less.bf16=true: less is not among the methods asked for (loss)"),
        (("loss.fokus=low",), {}, "loss.fokus: unknown key; did you mean 'focus'?"),
        ((), {"methods": ("rds_plus",)}, "rds_plus: rds_plus needs a target"),
        ((), {"methods": ("rds_plus",), "targets": "gaol"}, "rds_plus.targets: 'gaol' is not defined"),
        ((), {"methods": ("rds_plus",), "targets": "bare"}, "rds_plus.targets: 'bare' has no rows"),
        ((), {"methods": ("less",), "targets": "goal"}, "write 'less.precondition=none', or name a checkpoint"),
        ((), {"out": "scores.csv"}, "must end in .parquet"),
        ((), {"budget": 0}, "--budget: 0 rows"),
        (("dataset=pol",), {}, "'pol' is not defined"),
        (("dataset=drawn",), {}, "has num_samples"),
        (("tokenized_path=somewhere",), {}, "tokenized_path"),
        (("stage=ppo",), {}, "stage: ppo is not supported"),
        (("stage=rm",), {}, "--method: loss does not work under stage rm"),
        (("model_name_or_path=/nowhere/model",), {}, "no such folder"),
        (("resume_from_checkpoint=true",), {}, "name the checkpoint's folder"),
        (("resume_from_checkpoint=nowhere",), {}, "there is no such folder"),
        (("fsdp=full_shard",), {}, "fsdp: scoring partitions parameters by FSDP2 alone"),
        (("deepspeed.zero_optimization.stage=3",), {"methods": ("tacs",), "targets": "goal"}, "ZeRO-3"),
    ],
)
def test_what_is_refused(request_of, overrides, options, told):
    with pytest.raises(ConfigError) as caught:
        request_of(*overrides, **options)
    assert told in str(caught.value)


def test_a_partitioned_model_is_scored_as_it_is(request_of):
    request = request_of("deepspeed.zero_optimization.stage=3")
    assert request.lf["deepspeed"] == {"zero_optimization": {"stage": 3}}
    assert "deepspeed" not in request_of("deepspeed.zero_optimization.stage=2").lf


def test_all_problems_at_once(request_of):
    with pytest.raises(ConfigError) as caught:
        request_of("dataset=pol", "loss.fokus=low", out="scores.csv")
    assert len(caught.value.problems) == 3


def test_training_keys_are_left_out(request_of):
    found = request_of(
        config={
            "val_size": 0.1,
            "packing": True,
            "eval_strategy": "steps",
            "eval_steps": 5,
            "load_best_model_at_end": True,
            "deepspeed": {"zero_optimization": {"stage": 2}},
            "group_by_length": True,
            "streaming": True,
        }
    )
    for key in ("val_size", "eval_strategy", "eval_steps", "load_best_model_at_end", "deepspeed", "streaming"):
        assert key not in found.lf
    assert found.lf["packing"] is False
    assert found.lf["do_train"] is True
    assert "group_by_length" not in found.lf
    assert len(found.notes) == 4
    assert found.work == Path("scores.parquet.work")
    assert found.config.signals.store == "scores.parquet.work/store"


def test_the_selector_of_the_configuration_is_the_base(request_of):
    block = {"interval_steps": 5, "seed": 3, "selector": {"name": "rds_plus", "targets": ["goal"], "layer": 1}}
    config = {"dynamic": block}
    found = request_of("rds_plus.rule=top_k", methods=("rds_plus", "near", "loss"), config=config)
    first, second, third = found.config.scorers
    assert (first.params.layer, first.params.rule.name, first.targets) == (1, "top_k", ("goal",))
    assert (second.targets, third.targets) == (("goal",), ())
    assert found.config.seed == 3
    assert found.config.targets == ("goal",)
    other = request_of(methods=("rds_plus",), config=config, targets="pool")
    assert other.config.scorers[0].targets == ("pool",)


def test_targets_go_to_the_parts_that_take_them(request_of):
    base = ("compose.represent=embed",)
    apart = request_of(*base, "compose.rule=k_center", methods=("compose", "rds_plus"), targets="goal")
    assert [method.targets for method in apart.config.scorers] == [(), ("goal",)]
    near = request_of(*base, "compose.rule=knn_kde", methods=("compose",), targets="goal")
    assert near.config.scorers[0].targets == ("goal",)


def test_names_of_data_sets_instead_of_a_file(request_of, scoring):
    overrides = [f"dataset_dir={scoring.data}", f"model_name_or_path={scoring.base['model_name_or_path']}"]
    found = score_request("pool,goal", overrides, methods=["loss"], out=Path("s.parquet"))
    assert [source.name for source in found.sources] == ["pool", "goal"]
    assert found.entries["goal"] == {"file_name": "goal.jsonl"}
    with pytest.raises(ConfigError, match="model_name_or_path: missing"):
        score_request("pool", overrides[:1], methods=["loss"], out=Path("s.parquet"))


def test_refusals_do_not_import_torch(request_of, scoring):
    config = scoring.config(dataset="pol")
    code = (
        "import sys; from dataflex.cli import main;"
        f"code = main(['score', {config!r}, '--method', 'loss', '--out', 's.parquet']);"
        "assert code == 2, code; assert 'torch' not in sys.modules and 'llamafactory' not in sys.modules;"
        "assert main(['score', '--help']) == 0 and main(['select', '--help']) == 0;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.fixture
def index_of(scoring, request_of):
    """Ask for an index of LESS over the pool."""

    def make(*overrides, methods=("less",), index="index", **options):
        data = scoring.config(dataset="pool", finetuning_type="lora")
        return score_request(
            data, ["less.precondition=sign", *overrides], methods=methods, index=Path(index), **options
        )

    return make


@pytest.mark.parametrize(
    ("overrides", "options", "told"),
    [
        ((), {"out": Path("s.parquet")}, "--out: an index is queried for scores later"),
        ((), {"targets": "goal"}, "--targets: an index is made for any target"),
        ((), {"budget": 5}, "--budget: an index holds every row"),
        ((), {"store": "kept"}, "--store: an index keeps its own passes"),
        ((), {"methods": ("loss",)}, "--method: an index holds the gradients of 'less' alone, found loss"),
        ((), {"precision": "int4"}, "--precision: unknown 'int4'; did you mean 'int8'?"),
        (("less.precondition=ekfac",), {}, "less.precondition: an index knows no curvature"),
        ((), {"index": "s.parquet"}, "--index: s.parquet is to be a folder"),
        ((), {"index": "run.json"}, "--index: run.json is a file"),
        ((), {"index": "data"}, "no part of an index; name another folder"),
        (("less.precondition=true_adam",), {}, "write 'less.precondition=none', or name a checkpoint"),
        (('lr_scheduler_kwargs={"api_key": "abc"}',), {}, "lr_scheduler_kwargs: holds a secret"),
        (("less.sketch_size=many",), {}, "less.sketch_size"),
        (("less.sketch_size=1",), {}, "less.sketch_size"),
        (("resume_from_checkpoint=[here,there]",), {}, "resume_from_checkpoint: there cannot be used"),
        (("resume_from_checkpoint=[here,here]",), {}, "resume_from_checkpoint: names a folder twice"),
    ],
)
def test_what_an_index_refuses(index_of, overrides, options, told):
    with pytest.raises(ConfigError) as caught:
        index_of(*overrides, **options)
    assert told in str(caught.value)


def test_without_a_place_or_an_index(scoring, request_of):
    with pytest.raises(ConfigError) as caught:
        score_request(scoring.config(dataset="pool"), (), methods=("loss",), precision="int8")
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["--out", "--precision"]


def test_what_an_index_is_made_of(index_of):
    found = index_of("less.checkpoints=3")
    (less,) = found.config.scorers
    assert (less.params.sketch_size, less.params.checkpoints, less.targets) == (512, 1, ())
    assert (found.precision, found.out, found.work) == ("int8", Path("index"), Path("index/work"))
    assert index_of("less.sketch_size=64", precision="fp16").config.scorers[0].params.sketch_size == 64


def an_index(folder, config):
    """Write an index of five rows, as 'dataflex score' would, of numbers that mean nothing."""
    table = ScoreTable(
        datasets=("pool",),
        dataset_of=np.zeros(5, dtype=np.int64),
        domains=("pool",),
        domain_of=np.zeros(5, dtype=np.int64),
        position=np.arange(5),
        tokens=np.full(5, 9),
        supervised_tokens=np.full(5, 3),
        columns={},
        provenance={
            "methods": [{"name": "less"}],
            "config": {},
            "data": {"sources": [{"name": "pool", "rows_read": 5, "files": [], "entry": None}]},
        },
    )
    write_scores(folder / "rows.parquet", table)
    (folder / "sample").mkdir()
    np.save(folder / "fingerprints.npy", np.zeros(5, dtype=np.uint64))
    for name, array in (("index-rows-0", np.zeros(5)), ("index-projection-0", np.zeros((8, 2)))):
        (folder / "store" / name).mkdir(parents=True)
        np.save(folder / "store" / name / "array.npy", array)
    part = Part(checkpoint=None, rate=0.0, model="", rows="index-rows-0", projection="index-projection-0")
    write_told(
        Index(
            folder=folder,
            lf=json.loads(Path(config).read_text()),
            params={"name": "less", "precondition": "sign", "sketch_size": 2},
            seed=0,
            wide=8,
            parts=(part,),
            sample=np.arange(3),
        )
    )
    return folder


@pytest.fixture
def query_of(scoring, request_of):
    folder = an_index(scoring.folder / "index", scoring.config(dataset="pool", finetuning_type="lora"))

    def make(*overrides, index=folder, targets=("goal",), out="found.parquet", **options):
        return query_request(index, overrides, targets=targets, out=Path(out), **options)

    return make


@pytest.mark.parametrize(
    ("overrides", "options", "told"),
    [
        ((), {"targets": ("gaol",)}, "--target: 'gaol' is not defined"),
        ((), {"targets": ("goal,bare",)}, "--target: 'bare' has no rows"),
        ((), {"targets": ("",)}, "--target"),
        ((), {"out": "found.csv"}, "--out: found.csv must end in .parquet"),
        ((), {"sample": 4}, "--sample: 4 rows; between 0 and 3"),
        ((), {"sample": -1}, "--sample: -1 rows"),
        (("template=llama3",), {}, "template: is that of the index"),
        (("less.normalize=false",), {}, "less.normalize: is that of the index"),
        (("dataset_dir=/nowhere",), {}, "/nowhere"),
        (("model_name_or_path=/nowhere/model",), {}, "no such folder"),
    ],
)
def test_what_a_query_refuses(query_of, overrides, options, told):
    with pytest.raises(ConfigError) as caught:
        query_of(*overrides, **options)
    assert told in str(caught.value)


def test_damaged_indexes(query_of, scoring):
    folder = scoring.folder / "index"
    with pytest.raises(DataError, match="is no index; one is written by"):
        query_of(index=scoring.folder / "nothing")
    with pytest.raises(ConfigError) as caught:
        query_of(targets=("gaol",), sample=9, out="found.csv")
    assert len(caught.value.problems) == 3
    asked = query_of(targets=("goal", "pool"), sample=2)
    assert asked.method.targets == ("goal", "pool")
    assert asked.lf["dataset"] == "goal,pool"
    assert (asked.sample, query_of().sample) == (2, 3)
    rows = folder / "store/index-rows-0/array.npy"
    np.save(rows, np.zeros(4))
    with pytest.raises(DataError, match="of different sizes"):
        query_of()
    rows.write_bytes(b"no array")
    with pytest.raises(DataError, match="missing or damaged"):
        query_of()
    (folder / "index.json").write_text("{}")
    with pytest.raises(DataError, match=r"index\.json: cannot be read: KeyError"):
        query_of()
    (folder / "index.json").unlink()
    with pytest.raises(DataError, match="the index is not finished"):
        query_of()


def test_refused_queries_do_not_import_torch(query_of):
    code = (
        "import sys; from dataflex.cli import main;"
        "code = main(['query', 'index', '--target', 'gaol', '--out', 'found.parquet']);"
        "assert code == 2, code; assert 'torch' not in sys.modules and 'llamafactory' not in sys.modules;"
        "assert main(['query', '--help']) == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
