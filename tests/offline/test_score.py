"""``dataflex score`` through LLaMA-Factory's pipeline: against plain forward passes, online scores, kills and ranks."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dataflex.score_table import read_scores
from tests.distributed.ranks import errors_of
from tests.offline.conftest import rows_of


def plain_losses(model_folder, rows):
    """Token-mean loss of each row's answer under the template 'default', one row at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, torch_dtype=torch.float32).eval()
    losses = []
    for ids, labels in rows:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
        wanted = torch.tensor(labels[1:])
        there = wanted != -100
        losses.append(float(torch.nn.functional.cross_entropy(logits[there], wanted[there])))
    assert tokenizer is not None
    return np.array(losses)


def tokenized(scoring, name):
    """Tokens and labels of a data set by LLaMA-Factory's own pipeline."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    config = {**scoring.base, "dataset": name, "output_dir": str(scoring.folder / "tokenized")}
    model_args, data_args, training_args, _, _ = get_train_args(config)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    rows = get_dataset(template, model_args, data_args, training_args, stage="sft", **module)["train_dataset"]
    return list(zip(rows["input_ids"], rows["labels"], strict=True))


def test_losses_positions_and_subset(scoring, capsys):
    """Rows without an answer are dropped by the pipeline; scores still belong to the right rows of the files."""
    first, second = rows_of(23), rows_of(9, seed=5)
    first[4]["output"] = first[17]["output"] = None
    lines = scoring.write("pool", first).read_text().splitlines()
    scoring.write("more", second, ".json")
    config = scoring.config(dataset="pool,more", packing=True, val_size=0.2)
    assert scoring.run("score", config, "--method", "loss,random", "--out", "out/s.parquet", "loss.focus=low") == 0
    table = read_scores(scoring.folder / "out/s.parquet")
    assert sorted(path.name for path in (scoring.folder / "out").iterdir()) == ["s.parquet"]
    assert table.position.tolist() == [i for i in range(23) if i not in (4, 17)] + list(range(9))
    assert [table.datasets[i] for i in table.dataset_of] == ["pool"] * 21 + ["more"] * 9
    rows = [row for name in ("pool", "more") for row in tokenized(scoring, name)]
    assert table.tokens.tolist() == [len(ids) for ids, _ in rows]
    assert table.supervised_tokens.tolist() == [sum(label != -100 for label in labels) for _, labels in rows]
    expected = plain_losses(scoring.base["model_name_or_path"], rows)
    np.testing.assert_allclose(table.columns["loss"], expected, rtol=2e-5)
    assert sorted(table.columns["random.rank"].tolist()) == list(range(30))
    assert "random" not in table.columns
    assert "random.rank: 30 values" in capsys.readouterr().out
    assert table.provenance["methods"][0]["focus"] == "low"
    assert table.provenance["model"]["identity"]

    assert scoring.run("select", "out/s.parquet", "--score", "loss", "--budget", "15", "--out", "best") == 0
    best = set(np.argsort(-expected, kind="stable")[:15].tolist())
    wanted = [lines[table.position[i]] for i in sorted(best) if i < 21]
    assert (scoring.folder / "best/pool.jsonl").read_text().splitlines() == wanted
    again = json.loads((scoring.folder / "best/more.json").read_text())
    assert again == [second[table.position[i]] for i in sorted(best) if i >= 21]
    # What was written is a data set that can be scored in its turn, with the same losses.
    subset = scoring.config(dataset="pool", dataset_dir=str(scoring.folder / "best"))
    capsys.readouterr()
    assert scoring.run("score", subset, "--method", "loss", "--out", "again.parquet", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["out"], told["datasets"]) == ("again.parquet", ["pool"])
    assert set(told["columns"]) == {"loss", "loss.rank"}
    assert told["columns"]["loss"]["values"] == told["rows"] == len(wanted)
    found = read_scores(scoring.folder / "again.parquet").columns["loss"]
    np.testing.assert_allclose(found, [expected[i] for i in sorted(best) if i < 21], rtol=2e-5)


@pytest.mark.parametrize("optimizer", [{}, {"use_muon": True}])
def test_scores_by_target_and_from_a_checkpoint(scoring, optimizer):
    """LESS from a checkpoint, its optimizer's state loaded, gives what the run itself decided by at that step."""
    from dataflex.record.read import read_events

    scoring.write("pool", rows_of(24))
    for name, seed in (("goal", 6), ("aim", 7)):
        scoring.write(name, rows_of(4, seed=seed))
    lora = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all", "adam_epsilon": 1e-3}
    selector = {"name": "less", "targets": ["goal", "aim"]}
    trained = {
        **lora,
        **optimizer,
        "dataset": "pool",
        "output_dir": str(scoring.folder / "run"),
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 4,
        "dynamic": {"warmup_steps": 4, "interval_steps": 2, "selector": selector},
    }
    assert scoring.run("train", scoring.config(**trained)) == 0
    planned = [event for event in read_events(scoring.folder / "run") if event["event"] == "planned"]
    with np.load(scoring.folder / "run/dataflex" / planned[1]["plan"]) as arrays:
        online = arrays["scores"]
    assert planned[1]["start_step"] == 4

    command = ["score", scoring.config(**trained), "--method", "less", "--out", "s.parquet"]
    assert scoring.run(*command) == 2  # no moments
    checkpoint = scoring.folder / "run/checkpoint-4"
    assert scoring.run(*command, f"resume_from_checkpoint={checkpoint}") == 0
    columns = read_scores(scoring.folder / "s.parquet").columns
    np.testing.assert_allclose(columns["less"], online, rtol=1e-4, atol=1e-6)
    assert list(columns) == ["less", "less/goal", "less/aim", "less.rank"]
    np.testing.assert_array_equal(np.maximum(columns["less/goal"], columns["less/aim"]), columns["less"])
    assert (columns["less/goal"] != columns["less/aim"]).any()
    # Without the checkpoint's weights and moments the scores are others.
    assert scoring.run(*command[:-1], "plain.parquet", "less.precondition=none") == 0
    assert np.abs(read_scores(scoring.folder / "plain.parquet").columns["less"] - online).max() > 1e-2


@pytest.fixture
def told():
    """Lines of the package's own log."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    listener, ours = Listener(), logging.getLogger("dataflex")
    ours.addHandler(listener)
    yield lines
    ours.removeHandler(listener)


def test_a_user_s_method_and_equal_scores(scoring, told, capsys):
    plugin = scoring.folder / "mine.py"
    plugin.write_text(
        "import numpy as np\n"
        "from dataflex import Card, Selection, Selector\n"
        "class Mine(Selector):\n"
        "    name = 'mine'\n"
        "    card = Card(summary='Equal.', paper='baseline', cost='none')\n"
        "    def select(self, pool, budget, ctx):\n"
        "        return Selection(rows=pool[:budget], scores=np.ones(len(pool)))\n"
    )
    scoring.write("pool", rows_of(6))
    config = scoring.config(dataset="pool", dynamic={"domain_path": "data/p*.jsonl"})
    command = ["score", config, "--method", "mine", "--budget", "2", "--out", "s.parquet"]
    assert scoring.run(*command, f"dynamic.plugins=[{plugin}]") == 0
    table = read_scores(scoring.folder / "s.parquet")
    assert (table.datasets, table.domains) == (("pool",), ("ool",))
    columns = table.columns
    assert columns["mine"].tolist() == [1.0] * 6
    assert np.isfinite(columns["mine.rank"]).tolist() == [True] * 2 + [False] * 4
    assert "mine: all 6 scores are equal (1), so they say nothing" in told
    assert scoring.run(*command[:-3], "7", "--out", "t.parquet") == 2
    assert "--budget: 7 rows of 6" in capsys.readouterr().err
    assert not (scoring.folder / "t.parquet").exists()


def start(command, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "dataflex", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )


@pytest.mark.slow
def test_kill_and_go_on(scoring):
    scoring.write("pool", rows_of(4000))
    command = ["score", scoring.config(dataset="pool", per_device_train_batch_size=1, per_device_eval_batch_size=1)]
    command += ["--method", "loss"]
    # Equal bytes, since machine, shapes and threads are equal: every pass is a process of its own.
    straight = start([*command, "--out", "straight.parquet"])
    output = straight.communicate(timeout=180)[0]
    assert straight.returncode == 0, output
    process = start([*command, "--out", "killed.parquet"])
    parts = scoring.folder / "killed.parquet.work/store"
    deadline = time.monotonic() + 120
    while sum(part.stat().st_size for part in parts.glob("*.unfinished/part-*.bin")) < 20_000:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (scoring.folder / "killed.parquet").exists()
    process = start([*command, "--out", "killed.parquet"])
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "losses: going on after" in output
    for name in ("straight", "killed"):
        assert not (scoring.folder / f"{name}.parquet.work").exists()
    straight, killed = ((scoring.folder / f"{name}.parquet").read_bytes() for name in ("straight", "killed"))
    assert straight == killed


@pytest.mark.gloo
@pytest.mark.parametrize("precondition", ["sign", "ekfac"])
def test_two_ranks_write_what_one_writes(scoring, two_ranks, precondition):
    scoring.write("pool", rows_of(41))
    scoring.write("goal", rows_of(5, seed=6))
    settings = {"dataset": "pool", "finetuning_type": "lora", "lora_rank": 4, "ddp_find_unused_parameters": False}
    command = ["score", scoring.config(**settings), "--method", "loss,less,random", "--targets", "goal"]
    command += [f"less.precondition={precondition}", "--out"]
    assert scoring.run(*command, "one.parquet") == 0
    output = two_ranks([asked := scoring.command(*command, str(scoring.folder / "two.parquet"))])
    assert not errors_of(asked), output
    assert output.count(f"41 rows of pool -> {scoring.folder / 'two.parquet'}") == 1, output
    one, two = (read_scores(scoring.folder / f"{name}.parquet") for name in ("one", "two"))
    assert list(one.columns) == list(two.columns)
    np.testing.assert_allclose(one.columns["loss"], two.columns["loss"], rtol=1e-6)
    np.testing.assert_allclose(one.columns["less"], two.columns["less"], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(one.columns["random.rank"], two.columns["random.rank"])
    assert one.provenance["model"] == two.provenance["model"]


@pytest.mark.parametrize(
    "words", [("score", "--method", "loss", "--out", "two.parquet"), ("eval", "--choices", "q.jsonl")]
)
def test_ranks_are_started_where_the_environment_asks_for_them(scoring, monkeypatch, words):
    from dataflex.llamafactory import launch

    started = []
    monkeypatch.setattr(launch, "run_child", lambda command, env: started.append(command) or 2)
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    scoring.write("pool", rows_of(4))
    (scoring.folder / "q.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "answer": 0}\n')
    command = [words[0], scoring.config(dataset="pool"), *words[1:]]
    assert scoring.run(*command) == 2
    (found,) = started
    assert found[found.index("--nproc-per-node") + 1] == "2"
    assert found[-len(command) - 2 :] == ["-m", "dataflex", *command]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_files_of_a_folder_are_read_in_the_order_in_which_they_were_scored(scoring, unsorted, ending):
    """Five shards, listed as e, a, b, c, d: the longest rows are chosen from the files that they are in."""
    import pandas as pd

    rows = rows_of(30)
    folder = scoring.data / "shards"
    folder.mkdir()
    for shard, name in enumerate("abcde"):
        part = rows[shard * 6 : shard * 6 + 4 + shard % 3]
        if ending == ".jsonl":
            (folder / f"{name}{ending}").write_text("".join(json.dumps(row) + "\n" for row in part))
        else:
            pd.DataFrame(part).to_parquet(folder / f"{name}{ending}")
    (scoring.data / "dataset_info.json").write_text(json.dumps({"shards": {"file_name": "shards"}}))
    assert scoring.run("score", scoring.config(dataset="shards"), "--method", "longest", "--out", "s.parquet") == 0
    table = read_scores(scoring.folder / "s.parquet")
    (source,) = table.provenance["data"]["sources"]
    assert [os.path.basename(file["path"])[0] for file in source["files"]] == list("eabcd")
    assert scoring.run("select", "s.parquet", "--score", "longest.rank", "--budget", "9", "--out", f"best{ending}") == 0
    best = scoring.folder / f"best{ending}"
    chosen = pd.read_json(best, lines=True) if ending == ".jsonl" else pd.read_parquet(best)
    order = [row for shard in (4, 0, 1, 2, 3) for row in rows[shard * 6 : shard * 6 + 4 + shard % 3]]
    wanted = np.flatnonzero((ranks := table.columns["longest.rank"]) < 9)
    assert chosen["id"].tolist() == [order[place]["id"] for place in wanted]
    assert table.tokens[ranks < 9].min() >= table.tokens[ranks >= 9].max()
    words = [len(order[place]["output"].split()) for place in range(len(order))]
    assert (table.supervised_tokens - np.array(words) == table.supervised_tokens[0] - words[0]).all()
