"""Indexes: against exact scores of LESS, over checkpoints, killed and taken up, on two ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from dataflex.offline import indexing
from dataflex.offline.index import agreement, read_index
from dataflex.score_table import read_scores
from dataflex.signals.gradients.projection import packed, row_type, second_moment, whitened_cosines, whitening
from dataflex.signals.store import ResumablePass
from tests.distributed.ranks import errors_of
from tests.offline.conftest import rows_of

LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"}


@pytest.fixture
def wide(monkeypatch):
    """Sketches so wide that hardly two coordinates meet."""
    monkeypatch.setattr(indexing, "WIDE", 2**18)


def columns_of(path):
    return read_scores(path).columns


def bergson_map(folder):
    """Return a gradient store [rows, numbers] as bergson maps it: by its base type, or before 2 by a structure."""
    info = json.loads((folder / "info.json").read_text())
    sizes = info["grad_sizes"]
    shape = (info["num_grads"], sum(sizes.values()))
    flat = np.memmap(folder / "gradients.bin", dtype=info["base_dtype"], mode="r", shape=shape)
    parts = np.memmap(folder / "gradients.bin", dtype=info["dtype"], mode="r", shape=shape[:1])
    assert parts.dtype.names == tuple(sizes)
    np.testing.assert_array_equal(np.concatenate([parts[name] for name in sizes], axis=1), flat)
    return flat


@pytest.mark.parametrize(
    ("precision", "changes"),
    [
        ("int8", ()),
        ("fp16", ("less.target_gradient=cosine_of_mean", "less.aggregate=mean")),
        ("int8", ("less.normalize=false",)),
    ],
)
def test_a_query_gives_the_scores_of_less(scoring, wide, precision, changes):
    """Two targets at once; all rows fit into the projection, so that only sketch and rounding are off."""
    pool = rows_of(40)
    pool[7]["output"] = None
    scoring.write("pool", pool)
    for name, seed in (("goal", 6), ("aim", 7)):
        scoring.write(name, rows_of(5, seed=seed))
    config = scoring.config(dataset="pool", max_samples=30, **LORA)
    command = ["score", config, "--method", "less", "less.precondition=sign", *changes]
    assert scoring.run(*command, "--targets", "goal,aim", "--out", "exact.parquet") == 0
    assert scoring.run(*command, "--index", "index", "--precision", precision, "less.sketch_size=32") == 0
    assert sorted(path.name for path in (scoring.folder / "index/store").iterdir()) == sorted(
        name for part in read_index(scoring.folder / "index").parts for name in (part.rows, part.projection)
    )
    query = ["query", "index", "--target", "goal,aim", "--out", "found.parquet", "--bergson", "store"]
    assert scoring.run(*query) == 0
    exact, found = read_scores(scoring.folder / "exact.parquet"), read_scores(scoring.folder / "found.parquet")
    assert list(found.columns) == list(exact.columns)
    assert found.position.tolist() == exact.position.tolist()
    for name in ("less", "less/goal", "less/aim"):
        scale = np.abs(exact.columns[name]).max()
        np.testing.assert_allclose(found.columns[name], exact.columns[name], rtol=0, atol=0.1 * scale)
    assert found.provenance["targets"] == exact.provenance["targets"]
    assert found.provenance["data"] == exact.provenance["data"]
    told = found.provenance["index"]["agreement"]["aim"]
    assert told["rows"] == 29
    assert told["correlation"] > 0.99
    # Products of the gradients written for bergson are the scores; a row without a loss is zero there.
    told = np.array([found.columns["less/goal"], found.columns["less/aim"]]).T
    products = bergson_map(scoring.folder / "store/rows") @ bergson_map(scoring.folder / "store/targets").T
    np.testing.assert_allclose(products, np.nan_to_num(told), rtol=0, atol=1e-5 * np.nanmax(np.abs(told)))
    # The file is one that a subset can be taken of, with the order of preference too.
    assert scoring.run("select", "found.parquet", "--score", "less.rank", "--budget", "7", "--out", "best.jsonl") == 0
    assert len((scoring.folder / "best.jsonl").read_text().splitlines()) == 7


def test_several_checkpoints_and_a_new_target_elsewhere(scoring, wide, capsys):
    """Rows under each checkpoint's weights and moments; scores averaged by the learning rates, as LESS averages."""
    scoring.write("pool", rows_of(40))
    scoring.write("goal", rows_of(6, seed=8))
    trained = {
        **LORA,
        "dataset": "pool",
        "output_dir": str(scoring.folder / "run"),
        "adam_epsilon": 1e-3,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": 2,
    }
    assert scoring.run("train", scoring.config(**trained)) == 0
    steps = [scoring.folder / f"run/checkpoint-{step}" for step in (2, 4)]
    each = []
    for number, step in enumerate(steps):
        command = ["score", scoring.config(**trained), "--method", "less", "--targets", "goal"]
        assert scoring.run(*command, "--out", f"{number}.parquet", f"resume_from_checkpoint={step}") == 0
        each.append(columns_of(scoring.folder / f"{number}.parquet")["less"])
    rates = np.array([4.0, 2.0])  # the linear schedule at steps 2 and 4 of 6
    wanted = rates @ np.stack(each) / rates.sum()
    both = f"resume_from_checkpoint=[{steps[0]},{steps[1]}]"
    command = ["score", scoring.config(**trained), "--method", "less", both]
    assert scoring.run(*command, "--targets", "goal", "--out", "no.parquet") == 2
    assert "scores are those of one checkpoint" in capsys.readouterr().err
    assert scoring.run(*command, "--index", "index", "less.sketch_size=64") == 0
    parts = read_index(scoring.folder / "index").parts
    np.testing.assert_allclose([part.rate for part in parts], rates / 6 * 1e-2, rtol=1e-6)

    elsewhere = scoring.folder / "elsewhere"
    elsewhere.mkdir()
    (scoring.data / "goal.jsonl").rename(elsewhere / "new.jsonl")
    (elsewhere / "dataset_info.json").write_text(json.dumps({"new": {"file_name": "new.jsonl"}}))
    (scoring.data / "pool.jsonl").unlink()  # a query needs no row of the pool
    command = ["query", "index", "--target", "new", "--out", "found.parquet"]
    assert scoring.run(*command) == 2
    assert "--target: 'new' is not defined" in capsys.readouterr().err
    assert scoring.run(*command, f"dataset_dir={elsewhere}", "--sample", "20") == 0
    np.testing.assert_allclose(columns_of(scoring.folder / "found.parquet")["less"], wanted, rtol=0, atol=0.01)
    assert "new: on 20 rows of the sample: rank correlation 0.99" in capsys.readouterr().out
    # Other weights than the rows were sketched under are refused.
    swapped = read_index(scoring.folder / "index").folder / "index.json"
    text = json.loads(swapped.read_text())
    text["parts"][0]["checkpoint"], text["parts"][1]["checkpoint"] = map(str, steps[::-1])
    swapped.write_text(json.dumps(text))
    assert scoring.run(*command, f"dataset_dir={elsewhere}") == 2
    assert "was made with other weights" in capsys.readouterr().err
    assert scoring.run(*command, "--bergson", str(elsewhere), "--whiten", "0.5") == 2
    told = capsys.readouterr().err
    for reason in (
        "one checkpoint, and the index has 2",
        "whitening of its own",
        "elsewhere is there; name a new folder",
    ):
        assert reason in told


def whitened_by_hand(pool, target, weight):
    """TrackStar's scores, row by row: R^(-1/2) g of length one against that of each of the target's rows."""
    moment = np.zeros((pool.shape[1], pool.shape[1]))
    for row in target:
        moment += weight * np.outer(row, row) / len(target)
    for row in pool:
        moment += (1 - weight) * np.outer(row, row) / len(pool)
    root = np.linalg.inv(np.real(sqrtm(moment)))
    units = [[root @ row / np.linalg.norm(root @ row) for row in rows] for rows in (pool, target)]
    return np.array([np.mean([row @ aim for aim in units[1]]) for row in units[0]])


def test_whitening_by_hand():
    """Rows of fixed numbers; one without a loss, and a direction that is rounding only."""
    pool = np.array([[3, 0, 1, 0], [0, 2, 1, 0], [4, 1, 0, 0], [1, 1, 1, 0], [0, 1, 2, 0], [-2, 1, 0, 0]], dtype=float)
    target = np.array([[1, 2, 0, 0], [2, 0, 3, 0]], dtype=float)
    rows = packed(*map(torch.tensor, (pool, np.linalg.norm(pool, axis=1))), torch.eye(4), row_type(4, "int8"))
    rows = np.concatenate([rows, rows[:1]])
    rows["norm"][-1], rows["scale"][-1] = np.nan, np.nan
    rows["values"][:, 3] = [1, -1, 0, 1, -1, 0, 0]
    moment, least = second_moment(rows)
    np.testing.assert_allclose(moment[:3, :3], pool[:, :3].T @ pool[:, :3] / 6, atol=0.05)
    assert 0 < moment[3, 3] < least < 0.01
    for weight in (0.0, 0.5, 0.9):
        turn = whitening(weight * target.T @ target / 2 + (1 - weight) * moment, (1 - weight) * least)
        assert turn.shape == (4, 3)
        found = whitened_cosines(rows, target.astype(np.float32), turn)
        assert np.isnan(found[-1])
        np.testing.assert_allclose(found[:-1], whitened_by_hand(pool[:, :3], target[:, :3], weight), atol=0.02)
    # In the coordinates that all rows share: R = diag(16, 1), so [4, 0] and [0, 1] count alike and [4, 1] lies between.
    pool = np.array([[4 * 2**0.5, 0], [0, 2**0.5]])
    assert whitened_by_hand(pool, np.array([[4.0, 1.0]]), 0.0) == pytest.approx([0.5**0.5] * 2)


def test_a_whitened_query_under_a_checkpoint(scoring, wide, capsys):
    """Rows of the target go through Adam as those of the index do: the index holds the same rows, read by hand."""
    scoring.write("pool", rows_of(40))
    scoring.write("goal", rows_of(6, seed=8))
    trained = {**LORA, "dataset": "pool", "output_dir": str(scoring.folder / "run"), "max_steps": 3}
    assert scoring.run("train", scoring.config(**trained, adam_epsilon=1e-3, save_strategy="steps", save_steps=3)) == 0
    both = scoring.config(**{**trained, "dataset": "pool,goal"})
    step = f"resume_from_checkpoint={scoring.folder}/run/checkpoint-3"
    command = ["score", both, "--method", "less", "--index", "index", "--precision", "fp16", "less.sketch_size=16"]
    assert scoring.run(*command, "less.precondition=adam_scale", step) == 0
    command = ["query", "index", "--target", "goal,pool", "--out", "found.parquet", "--whiten"]
    for weight, told in (("1", "from 0 to below 1"), ("nan", "from 0 to below 1")):
        assert scoring.run(*command, weight) == 2
        assert f"--whiten: {weight}; a weight {told}" in capsys.readouterr().err
    assert scoring.run(*command, "0.5", "--sample", "9") == 2
    assert "--sample: exact scores are not whitened" in capsys.readouterr().err
    assert scoring.run(*command, "0.5") == 0
    index = read_index(scoring.folder / "index")
    rows = index.rows(index.parts[0])
    gradients = rows["values"].astype(float) * (rows["scale"] * rows["norm"])[:, None]
    found = read_scores(scoring.folder / "found.parquet")
    for name, part in (("goal", gradients[40:]), ("pool", gradients[:40])):
        wanted = whitened_by_hand(gradients, part, 0.5)
        np.testing.assert_allclose(found.columns[f"less/{name}"], wanted, rtol=0, atol=5e-3)
    assert found.provenance["index"]["whiten"] == 0.5
    assert found.provenance["index"]["agreement"] == {"goal": None, "pool": None}


def test_rows_that_lie_in_both_and_secrets(scoring, caplog):
    scoring.write("pool", rows_of(20))
    scoring.write("goal", [*rows_of(3), *rows_of(2, seed=9)])
    command = ["score", scoring.config(dataset="pool", **LORA), "--method", "less", "--index", "index"]
    command += ["less.precondition=none", "less.sketch_size=32", "hf_hub_token=hf_none"]
    assert scoring.run(*command) == 0
    assert "hf_none" not in (scoring.folder / "index/index.json").read_text()
    first = bytes_of(scoring.folder / "index")
    assert scoring.run(*command) == 0
    assert first == bytes_of(scoring.folder / "index")
    with caplog.at_level("WARNING", logger="dataflex"):
        assert scoring.run("query", "index", "--target", "goal", "--out", "q.parquet", "--sample", "0") == 0
    assert "target 'goal': 3 of its 5 rows are also rows of the index" in caplog.messages
    assert read_scores(scoring.folder / "q.parquet").provenance["index"]["agreement"] == {"goal": None}


def bytes_of(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def arrays_of(folder):
    index = read_index(folder)
    return [np.array(index.array(name)).tobytes() for part in index.parts for name in (part.projection, part.rows)]


KILLED = """
import sys
from tests.offline.test_index import killed_after
killed_after(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
"""


def killed_after(what, most, command):
    """Run a command in a process that kills itself once it has recorded ``most`` rows of a pass."""
    from dataflex.cli import main

    record, done = ResumablePass.record, 0

    def counted(work, rows, values):
        nonlocal done
        record(work, rows, values)
        done += len(rows) if work._key.method == what else 0
        if done >= most:
            os.kill(os.getpid(), signal.SIGKILL)

    ResumablePass.record = counted
    os._exit(main(command))


@pytest.fixture
def resumable(scoring):
    """A command, its index in one go on one rank, and the number of rows that the projection is fitted to."""
    scoring.write("pool", rows_of(120))
    settings = {"dataset": "pool", "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    command = ["score", scoring.config(**settings, **LORA), "--method", "less"]
    command += ["less.precondition=sign", "less.sketch_size=16", "--index"]
    assert scoring.run(*command, "straight") == 0
    return command, arrays_of(scoring.folder / "straight"), 64


def unfinished(scoring):
    assert not (scoring.folder / "killed/index.json").exists()
    assert scoring.run("query", "killed", "--target", "pool", "--out", "q.parquet") == 2


@pytest.mark.slow
def test_kill_and_go_on(scoring, resumable, caplog):
    """Killed among the rows of the sample and again among all rows: the same bytes as in one go."""
    command, straight, fitted = resumable
    for what, most in (("sample", 8), ("rows", fitted + 12)):
        child = os.fork()
        if child == 0:
            killed_after(f"index {what}", most, [*command, "killed"])
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        unfinished(scoring)
    with caplog.at_level("INFO", logger="dataflex"):
        assert scoring.run(*command, "killed") == 0
    assert f"index rows: going on after {fitted + 12} of 120 rows" in caplog.text
    assert arrays_of(scoring.folder / "killed") == straight


@pytest.mark.slow
@pytest.mark.gloo
def test_two_ranks_are_killed_and_go_on(scoring, resumable, two_ranks):
    """The same bytes as on one rank in one go."""
    command, straight, fitted = resumable
    (scoring.folder / "killed.py").write_text(KILLED)
    environment = {
        **os.environ,
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "killed.py"]
    words = [*launch, "index rows", str(fitted + 12), *command, "killed"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode != 0, done.stdout + done.stderr
    assert "SIGKILL" in done.stderr, done.stderr
    unfinished(scoring)
    told = two_ranks([asked := scoring.command(*command, str(scoring.folder / "killed"))])
    assert not errors_of(asked), told
    assert "index rows: going on after" in told, told
    assert arrays_of(scoring.folder / "killed") == straight


@pytest.mark.parametrize(("rows", "shared"), [(20, 20), (64, 64), (120, 64), (300, 20), (400, 0)])
def test_rows_to_fit_to_and_the_sample(rows, shared):
    supervised = np.ones(rows + 1, dtype=np.int64)
    supervised[3] = 0
    sample, fit = indexing.drawn(supervised, 16, seed=1)
    assert (len(sample), len(fit)) == (min(256, rows), min(64, rows))
    assert len(np.intersect1d(sample, fit)) == shared
    for drawn in (sample, fit):
        assert 3 not in drawn
        assert (np.diff(drawn) > 0).all()


def test_agreement_by_hand():
    exact = np.arange(30.0)
    found = exact.copy()
    found[[0, 29]] = found[[29, 0]]  # the best row is taken for the worst
    one = agreement(np.append(exact, np.nan), np.append(found, 1.0))
    assert one is not None
    assert one.rows == 30
    assert one.overlap == pytest.approx(2 / 3)
    squares = 2 * 29**2
    assert one.correlation == pytest.approx(1 - 6 * squares / (30 * (30**2 - 1)))
    # Wilson's interval solves (p - s)^2 = z^2 p (1 - p) / n.
    for end in (one.low, one.high):
        assert (end - 2 / 3) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / 3)
    assert agreement(exact[:9], found[:9]) is None
    tied = agreement(np.zeros(20), np.arange(20.0))
    assert tied is not None
    assert tied.correlation == 0.0
