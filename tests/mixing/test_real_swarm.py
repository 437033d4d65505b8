"""A tiny swarm that is really trained, fitted, proposed from and trained with; proxies that really answer."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml

from dataflex.cli import main
from dataflex.mixing.runs import losses_of_run
from dataflex.mixing.swarm import read_swarm
from dataflex.plan.proportions import read_proportions
from dataflex.record.read import read_events
from tests.integration.conftest import base_settings


@pytest.fixture
def config(tiny_model, data_dir, tmp_path, monkeypatch):
    """A configuration of four steps over two domains with a held-out set each; runs are trained in this process."""
    from dataflex.run import train_here

    trained = []

    def train(path):
        trained.append(path.stem)
        return train_here([str(path)])

    monkeypatch.setattr("dataflex.mixing.runs.train", train)
    monkeypatch.setattr("dataflex.mixing.fit.RESTARTS", 2)
    mapping = base_settings(tiny_model, data_dir)
    mapping |= {"dataset": "alpha,beta", "eval_dataset": "goal,held", "max_steps": 4, "output_dir": "unused"}
    mapping |= {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(mapping))
    return trained


def mix(*arguments):
    return main(["mix", *map(str, arguments)])


@pytest.mark.slow
def test_a_swarm_from_configuration_to_a_run_with_the_proposal(config, tmp_path, capsys):
    command = ("swarm", "small.yaml", "--runs", 3, "--out", "swarm", "--run")
    assert mix(*command) == 0
    swarm = read_swarm(tmp_path / "swarm")
    assert config == list(swarm.runs)
    losses = {run: losses_of_run(swarm.output_dir(run)) for run in swarm.runs}
    for run, mixture in zip(swarm.runs, swarm.mixtures, strict=True):
        assert set(losses[run]) == {"goal", "held"}
        assert all(np.isfinite(list(losses[run].values())))
        planned = next(event for event in read_events(swarm.output_dir(run)) if event["event"] == "planned")
        served = np.array([planned["domain_counts"].get(name, 0) for name in swarm.names])
        assert served.sum() == 16
        assert np.abs(served - 16 * mixture).max() <= 1
    assert len({losses[run]["goal"] for run in swarm.runs}) > 1

    # One run as a kill in its third step leaves it: it goes on from its checkpoint, the others are left alone.
    killed = swarm.output_dir("run-0002")
    shutil.rmtree(killed / "checkpoint-4")
    for file in ("trainer_state.json", "all_results.json", "eval_results.json", "train_results.json"):
        (killed / file).unlink(missing_ok=True)
    record = killed / "dataflex" / "events.jsonl"
    events = [json.loads(line) for line in record.read_text().splitlines()]
    record.write_text("".join(json.dumps(event) + "\n" for event in events if event["step"] <= 2))
    assert swarm.unfinished() == ["run-0002"]
    assert mix(*command) == 0
    assert config == [*swarm.runs, "run-0002"]
    assert [event["step"] for event in read_events(killed) if event["event"] == "resumed"] == [2]
    assert losses_of_run(killed) == losses["run-0002"]

    assert mix("fit", "swarm") == 0
    told = capsys.readouterr().out
    assert "log_linear on 3 runs; quality by leave-one-out" in told
    assert "note: 3 runs for 2 domains" in told
    assert mix("propose", "swarm", "--budget", 100, "--out", "mixture.json") == 0
    content = read_proportions("mixture.json")
    assert content.names == ("alpha", "beta")

    mapping = yaml.safe_load((tmp_path / "small.yaml").read_text())
    mapping |= {"output_dir": "final", "dynamic": {"mixer": {"name": "static", "from": "mixture.json"}}}
    (tmp_path / "final.yaml").write_text(yaml.safe_dump(mapping))
    from dataflex.run import train_here

    assert train_here(["final.yaml"]) == 0
    planned = next(event for event in read_events(tmp_path / "final") if event["event"] == "planned")
    assert planned["proportions"] == pytest.approx(content.by_name)
    assert planned["reason"].startswith("from mixture.json (log_linear)")


@pytest.mark.slow
def test_rounds_that_are_trained(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dataflex.mixing.propose._DRAWS", 10_000)
    command = ("climb", "small.yaml", "--runs", "3,2", "--top", 40, "--out", "climb", "--run")
    assert mix(*command) == 0
    swarm = read_swarm(tmp_path / "climb")
    assert config == list(swarm.runs) == [f"run-{number:04d}" for number in range(1, 6)]
    assert "round 2 of 2: 5 runs with those before" in capsys.readouterr().out
    content = read_proportions("climb/proportions.json")
    measured = [np.mean(list(losses_of_run(swarm.output_dir(run)).values())) for run in swarm.runs]
    assert content.details["measured"] == pytest.approx(min(measured))
    assert mix(*command) == 0
    assert len(config) == 5


# ---------------------------------------------------------------- models


@pytest.fixture
def two_models(tiny_model, tmp_path):
    """The tiny model, and a copy whose weights are others."""
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_model, tmp_path / "one")
    shutil.copytree(tiny_model, tmp_path / "two")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "two")
    return {"web": str(tmp_path / "one"), "code": str(tmp_path / "two")}


TEXTS = ["the cat sat on a mat and saw two red balls", "print", "return def class for in range if else", "dogs ran"]


def test_log_likelihoods_are_those_of_each_token_in_turn(two_models):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dataflex.mixing.models import log_likelihoods

    found, lengths = log_likelihoods(two_models, TEXTS, piece_tokens=4, batch_size=3)
    tokenizer = AutoTokenizer.from_pretrained(two_models["web"])
    pieces = []
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces += [[tokenizer.bos_token_id, *ids[i : i + 4]] for i in range(0, len(ids), 4)]
    assert lengths.tolist() == [len(piece) - 1 for piece in pieces]
    assert max(lengths) == 4
    for column, folder in enumerate(two_models.values()):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        for row, piece in enumerate(pieces):
            expected = 0.0
            for place in range(1, len(piece)):
                with torch.no_grad():
                    logits = model(torch.tensor([piece[:place]])).logits[0, -1]
                expected += float(torch.log_softmax(logits, dim=-1)[piece[place]])
            assert found[row, column] == pytest.approx(expected, abs=1e-4)


def test_mean_states_are_those_of_the_middle_layer(two_models):
    import torch
    from transformers import AutoModel, AutoTokenizer

    from dataflex.mixing.models import mean_states

    found = mean_states(two_models["code"], TEXTS, most_tokens=5, batch_size=3)
    model = AutoModel.from_pretrained(two_models["code"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(two_models["code"])
    for row, text in enumerate(TEXTS):
        ids = tokenizer(text, truncation=True, max_length=5)["input_ids"]
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        assert len(states) == 3  # the embedding and two layers
        np.testing.assert_allclose(found[row], states[1][0].double().mean(dim=0).numpy(), atol=1e-5)


def test_mixmin_and_chameleon_ask_models(two_models, tmp_path, capsys):
    lines = [json.dumps({"question": text, "answer": "one big tree"}) for text in TEXTS * 5]
    (tmp_path / "goal.jsonl").write_text("\n".join(lines) + "\n")
    models = ",".join(f"{name}={folder}" for name, folder in two_models.items())
    command = ("mixmin", "--models", models, "--target", "goal.jsonl", "--column", "question,answer")
    assert mix(*command, "--piece-tokens", 8, "--save-matrix", "m.npz", "--out", "mix.json") == 0
    assert mix("mixmin", "--matrix", "m.npz", "--out", "again.json") == 0
    content = read_proportions("mix.json")
    assert content.names == ("web", "code")
    assert content.proportions == read_proportions("again.json").proportions
    assert mix("mixmin", "--models", models, "--target", "goal.jsonl", "--out", "x.json") == 2
    assert "no text under 'text'" in capsys.readouterr().err

    (tmp_path / "web.txt").write_text("the cat sat\nthe dogs ran\n")
    (tmp_path / "code.txt").write_text("print return\ndef class for\n")
    domains = "web=web.txt,code=code.txt"
    model = two_models["web"]
    assert (
        mix("chameleon", "--model", model, "--domains", domains, "--save-embeddings", "e.npz", "--out", "c.json") == 0
    )
    assert mix("chameleon", "--embeddings", "e.npz", "--out", "d.json") == 0
    assert read_proportions("c.json").proportions == read_proportions("d.json").proportions


def test_models_that_cannot_be_compared_are_refused(two_models, tmp_path, capsys):
    (tmp_path / "goal.txt").write_text("the cat sat\n")
    file = tmp_path / "two" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["cat"], vocabulary["dogs"] = vocabulary["dogs"], vocabulary["cat"]
    file.write_text(json.dumps(content))
    models = ",".join(f"{name}={folder}" for name, folder in two_models.items())
    assert mix("mixmin", "--models", models, "--target", "goal.txt", "--out", "x.json") == 2
    assert "code and web have different tokenizers" in capsys.readouterr().err
    assert mix("mixmin", "--models", "a=nowhere,b=gone", "--target", "goal.txt", "--out", "x.json") == 2
    assert "--models: no such folder: nowhere" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
