"""Losses, tokens and sequences by domain: of every run, right, resumed bit for bit, and harmless to a stock run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.integration.test_identity import same

RECORD = {"record": True}
THREE = {"dataset": "alpha,beta,gamma", "disable_shuffling": False, "num_train_epochs": 2.0}


def of_domains(outcome, what="loss"):
    prefix = f"dataflex/{what}/"
    return [
        {key.removeprefix(prefix): v for key, v in entry.items() if key.startswith(prefix)} for entry in outcome.log
    ]


def slow_losses(model_folder, features):
    """Sum of token losses and tokens of each row, one row and one token at a time, in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder).double().eval()
    found = []
    for feature in features:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([feature["input_ids"]])).logits[0]
        total, tokens = 0.0, 0
        for place, label in enumerate(feature["labels"][1:]):
            if label != -100:
                total -= float(logits[place].log_softmax(-1)[label])
                tokens += 1
        found.append((total, tokens))
    return found


@pytest.fixture
def served(monkeypatch):
    """Rows of every micro-batch as the model was given them: features without padding, and their ids."""
    from dataflex.train.session import Session

    seen = []
    note = Session.note

    def watch(self, batch, loss):
        rows = batch["dataflex_rows"]
        for place, row in enumerate(rows.tolist() if rows.ndim == 1 else []):
            real = batch["attention_mask"][place].bool()
            seen.append((row, {key: batch[key][place][real].tolist() for key in ("input_ids", "labels")}))
        note(self, batch, loss)

    monkeypatch.setattr(Session, "note", watch)
    return seen


@pytest.fixture
def batches(monkeypatch):
    """Every micro-batch as the model was given it, with the ids of its rows."""
    from dataflex.train.session import Session

    seen = []
    note = Session.note
    monkeypatch.setattr(Session, "note", lambda self, batch, loss: seen.append(dict(batch)) or note(self, batch, loss))
    return seen


@pytest.mark.parametrize(
    "dynamic",
    [RECORD, {"selector": "random", "interval_steps": 3}, {"mixer": "uniform"}],
    ids=["stock", "random", "mix"],
)
def test_the_losses_are_those_of_the_rows_that_were_served(run, served, dynamic, tiny_model):
    """No step changes the model, so that every log is a mean over the rows since the last one under that model."""
    outcome = run("a", **THREE, dynamic=dynamic, learning_rate=0.0, max_steps=6, logging_steps=2,
                  gradient_accumulation_steps=2)  # fmt: skip
    names = np.repeat(["alpha", "beta", "gamma"], [40, 21, 3])
    losses = slow_losses(tiny_model, [feature for _, feature in served])
    counts = dict.fromkeys(names, 0)
    for log in range(3):
        sums = {}
        for place in range(log * 8, log * 8 + 8):
            name = names[served[place][0]]
            counts[name] += 1
            before = sums.get(name, (0.0, 0))
            sums[name] = before[0] + losses[place][0], before[1] + losses[place][1]
        assert of_domains(outcome)[log] == pytest.approx({n: s / t for n, (s, t) in sums.items()}, rel=1e-5)
        assert of_domains(outcome, "sequences")[log] == counts
    tokens = {n: sum(len(f["input_ids"]) for r, f in served if names[r] == n) for n in counts}
    assert of_domains(outcome, "tokens")[-1] == tokens


def test_weights_do_not_enter(run):
    """A weighter sees the same rows under the same first model, whose losses by domain are the unweighted ones."""
    settings = {"dataset": "alpha,beta", "max_steps": 4, "learning_rate": 0.0}
    plain = run("plain", **settings, dynamic={"selector": "all"})
    weighed = run("weighed", **settings, dynamic={"weighter": "column"})
    for one, other in zip(of_domains(plain), of_domains(weighed), strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    assert plain.series() != weighed.series()


STREAM = {
    **{"dataset": "alpha,beta,gamma", "streaming": True, "dataloader_num_workers": 1, "buffer_size": 8},
    **{"num_train_epochs": 1.0, "max_steps": 10},
}
STOCK = {
    "plain": {},
    "shuffled": THREE,
    "accumulated": {**THREE, "gradient_accumulation_steps": 3},
    "lora with dropout": {**THREE, "finetuning_type": "lora", "lora_rank": 4, "lora_dropout": 0.2},
    "split": {**THREE, "val_size": 0.2, "eval_strategy": "steps", "eval_steps": 5},
    "packed": {**THREE, "packing": True},
    "neatly packed": {**THREE, "neat_packing": True},
    "interleaved": {**THREE, "mix_strategy": "interleave_under", "interleave_probs": "0.5,0.3,0.2"},
    "grouped": {**THREE, "train_sampling_strategy": "group_by_length"},
    "dft": {**THREE, "use_dft_loss": True},
    "smoothed": {**THREE, "label_smoothing_factor": 0.1},
    "packed, held out": {**THREE, "packing": True, "mix_strategy": "interleave_over", "val_size": 4},
    "pretraining": {"stage": "pt", "dataset": "text", "packing": True, "disable_shuffling": False},
    "pretraining of two": {
        **{"stage": "pt", "dataset": "text,weighted_text", "preprocessing_batch_size": 20, "disable_shuffling": False},
        **{"eval_dataset": "text", "eval_strategy": "steps", "eval_steps": 5},
    },
    "workers": {**THREE, "dataloader_num_workers": 1},
    "streamed": {**STREAM, "mix_strategy": "interleave_over", "val_size": 4, "eval_strategy": "steps", "eval_steps": 5},
    "streamed, packed": {**STREAM, "packing": True},
    "streamed, neatly packed": {
        **{**STREAM, "neat_packing": True, "mix_strategy": "interleave_under", "interleave_probs": "0.5,0.3,0.2"},
        **{"val_size": 4, "eval_strategy": "steps", "eval_steps": 5},
    },
    "streamed pretraining": {
        **{**STREAM, "stage": "pt", "dataset": "text,weighted_text", "mix_strategy": "interleave_over"},
        **{"preprocessing_batch_size": 20, "eval_dataset": "text", "eval_strategy": "steps", "eval_steps": 5},
    },
    "preferences": {"stage": "dpo", "dataset": "pairs", "finetuning_type": "lora", "disable_shuffling": False},
}


@pytest.mark.parametrize("case", STOCK)
def test_a_record_changes_nothing(run, case):
    """Losses, gradients and parameters are those of the stock run to the bit, whatever it is."""
    stock = run("stock", **STOCK[case])
    recorded = run("recorded", **STOCK[case], dynamic=RECORD)
    same(stock, recorded)
    assert not (stock.folder / "dataflex").exists()
    last = [event for event in recorded.events if event["event"] == "stepped"][-1]
    told = {key.removeprefix("dataflex/loss/") for entry in of_domains(recorded) for key in entry}
    if case in ("smoothed", "preferences"):
        assert not told
        assert "token losses" in last["no_loss_by_domain"]
    else:
        others = {"plain": {"ones"}, "pretraining": {"text"}}
        others["streamed pretraining"] = others["pretraining of two"] = {"text", "weighted_text"}
        assert told == others.get(case, {"alpha", "beta", "gamma"})
    assert sum(of_domains(recorded, "sequences")[-1].values()) > 0


def test_the_rows_of_a_stream_are_known(run, served):
    """Each is that of its tokens, and its domain's losses are those of the rows that were read."""
    run("recorded", **STREAM, dynamic={**RECORD, "domain_path": "*.jsonl"})
    streamed = list(served)
    served.clear()
    run("whole", dataset="alpha,beta,gamma", num_train_epochs=1.0, max_steps=-1, dynamic=RECORD)
    tokens = dict(served)
    assert len(streamed) == 20
    assert all(tokens[row] == feature for row, feature in streamed)


PACKED = ["packed", "neatly packed", "packed, held out", "pretraining of two"]
PACKED += ["streamed, packed", "streamed, neatly packed", "streamed pretraining"]


@pytest.mark.parametrize("case", PACKED)
def test_the_documents_of_packed_rows_are_known(run, served, batches, tiny_model, case):
    """Documents tile each row, and each token counts to the domain of its own; no step changes the model."""
    import torch
    from transformers import AutoModelForCausalLM

    from dataflex.train.loader import PADDING

    settings = {**STOCK[case], "learning_rate": 0.0}
    outcome = run("recorded", **settings, dynamic=RECORD)
    packed = list(batches)
    served.clear()
    plain = {"streaming": None, "packing": False, "neat_packing": None, "mix_strategy": None, "interleave_probs": None,
             "val_size": None, "eval_strategy": None, "max_steps": -1, "cutoff_len": 512,
             "num_train_epochs": 1.0}  # fmt: skip
    run("whole", **{**settings, **plain}, dynamic=RECORD)
    tokens = {row: feature["input_ids"] for row, feature in served}
    cut = settings.get("stage") == "pt"
    sizes = {"text": 60, "weighted_text": 30} if cut else {"alpha": 40, "beta": 21, "gamma": 3}
    names = np.repeat([*sizes], [*sizes.values()])
    model = AutoModelForCausalLM.from_pretrained(tiny_model).double().eval()
    counts, seen = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0)
    for batch, losses, tokens_told, sequences in zip(
        packed, *(of_domains(outcome, what) for what in ("loss", "tokens", "sequences")), strict=True
    ):
        rows, sums = batch["dataflex_rows"], dict.fromkeys(sizes, (0.0, 0))
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
        inputs["attention_mask"] = doubled(inputs["attention_mask"])
        with torch.no_grad():
            log_p = model(**inputs).logits.log_softmax(-1)
        for place, ids in enumerate(batch["input_ids"].tolist()):
            begins = np.flatnonzero(rows[place] > PADDING)
            stop = int((rows[place] != PADDING).sum())
            assert begins[0] == 0
            assert (rows[place][stop:] == PADDING).all()
            assert (batch["labels"][place][stop:] == -100).all()
            for first, last in zip(begins, [*begins[1:], stop], strict=True):
                row, part = int(rows[place][first]), ids[first:last]
                row, begun = (row, False) if row >= 0 else (~row, True)
                name = names[row]
                if begun:  # by the block before
                    assert first == 0
                    assert contains(tokens[row][1:], part)
                else:
                    assert part == tokens[row][: len(part)]
                    assert len(part) == len(tokens[row]) or (cut and last == stop)
                counts[name] += last - first
                seen[name] += not begun
                for position in range(max(first, 1), last):
                    if (label := int(batch["labels"][place][position])) != -100:
                        total, number = sums[name]
                        sums[name] = total - float(log_p[place, position - 1, label]), number + 1
        assert losses == pytest.approx({n: s / t for n, (s, t) in sums.items() if t}, rel=1e-5)
        assert (tokens_told, sequences) == (counts, seen)


def contains(whole, part):
    return any(whole[at : at + len(part)] == part for at in range(len(whole) - len(part) + 1))


def doubled(mask):
    return mask.double() if mask.is_floating_point() else mask


def test_a_stream_has_rows_that_are_not_drawn(run, tmp_path, data_dir):
    """LLaMA-Factory's streams do not heed ``num_samples``."""
    (tmp_path / "data").mkdir()
    info = {"alpha": {"file_name": str(data_dir / "alpha.jsonl"), "num_samples": 10}}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(info))
    recorded = run("x", **{**STREAM, "dataset": "alpha", "dataset_dir": str(tmp_path / "data")}, dynamic=RECORD)
    assert recorded.events[0]["row_space"]["sources"] == {"alpha": 40}


def test_packed_rows_may_be_drawn(run, tmp_path, data_dir):
    """LLaMA-Factory draws as without a record, which counts all documents there are."""
    (tmp_path / "data").mkdir()
    info = {name: {"file_name": str(data_dir / f"{name}.jsonl"), "num_samples": 10} for name in ("alpha", "beta")}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(info))
    settings = {**THREE, "dataset": "alpha,beta", "dataset_dir": str(tmp_path / "data"), "packing": True}
    stock, recorded = run("stock", **settings), run("recorded", **settings, dynamic=RECORD)
    same(stock, recorded)
    assert sum(of_domains(recorded, "sequences")[-1].values()) <= 40  # two epochs
    assert recorded.events[0]["row_space"]["sources"] == {"alpha": 40, "beta": 21}


BY_COLUMN, BY_PATH = {"domain_column": "source"}, {"domain_path": "*.jsonl"}


@pytest.mark.parametrize(
    ("dynamic", "settings"),
    [
        (BY_COLUMN, {**THREE, "val_size": 0.2}),
        (BY_PATH, {**THREE, "val_size": 0.2}),
        (BY_COLUMN, {**STREAM, "neat_packing": True}),
        (BY_COLUMN, {**THREE, "neat_packing": True}),
        (BY_PATH, {**THREE, "packing": True}),
    ],
    ids=["column", "path", "column of a packed stream", "column of packed rows", "path of packed rows"],
)
def test_domains_of_a_record_may_be_columns_or_paths(run, dynamic, settings):
    stock = run("stock", **settings)
    recorded = run("recorded", **settings, dynamic={**RECORD, **dynamic})
    same(stock, recorded)
    names = {name for entry in of_domains(recorded) for name in entry}
    assert names >= ({"alpha0", "alpha1", "beta0"} if "domain_column" in dynamic else {"alpha", "beta"})


@pytest.mark.parametrize(
    "dynamic",
    [
        RECORD,
        {"selector": {"name": "loss"}, "interval_steps": 4},
        {"mixer": "odm", "interval_steps": 2},
        {"weighter": "column"},
    ],
    ids=["stock", "selector", "observing mixer", "weighter"],
)
@pytest.mark.parametrize("at", [3, 4])
def test_the_log_of_a_resumed_run_is_the_same_to_the_bit(run, dynamic, at):
    """Checkpoints lie between two logs and at one; what was summed up since the last log goes on."""
    settings = {"dataset": "alpha,beta", "disable_shuffling": False, "max_steps": 8, "logging_steps": 4,
                "gradient_accumulation_steps": 2, "dynamic": dynamic}  # fmt: skip
    straight = run("straight", **settings)
    run("cut", **settings, save_strategy="steps", save_steps=at)
    resumed = run("cut", **settings, resume_from_checkpoint=str(run.folder / f"cut/checkpoint-{at}"))
    keys = [key for key in straight.log[-1] if key.startswith("dataflex/") and not key.endswith("seconds")]
    assert any(key.startswith("dataflex/loss/") for key in keys)
    assert {key: resumed.log[-1][key] for key in keys} == {key: straight.log[-1][key] for key in keys}


@pytest.mark.parametrize("case", ["packed", "streamed, packed", "streamed pretraining"])
def test_packed_rows_are_resumed_with_the_same_log(run, case):
    settings = {**STOCK[case], "max_steps": 6, "logging_steps": 3, "dynamic": RECORD, "eval_strategy": None}
    straight = run("straight", **settings)
    run("cut", **settings, save_strategy="steps", save_steps=2)
    resumed = run("cut", **settings, resume_from_checkpoint=str(run.folder / "cut/checkpoint-2"))
    told = [{key: n for key, n in of.log[-1].items() if not key.endswith("seconds")} for of in (straight, resumed)]
    assert told[0] == told[1]
    assert any(key.startswith("dataflex/loss/") for key in told[0])


def test_a_record_may_begin_at_a_checkpoint_of_a_run_without(run, caplog):
    settings = {**THREE, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    stock = run("stock", **settings)
    before = str(run.folder / "stock/checkpoint-3")
    resumed = run("recorded", **settings, dynamic=RECORD, resume_from_checkpoint=before)
    assert [entry["loss"] for entry in resumed.log] == [entry["loss"] for entry in stock.log]
    assert "begins anew" in caplog.text
    assert sum(of_domains(resumed, "sequences")[-1].values()) == 6


def test_one_reduction_of_losses_in_each_log(run, monkeypatch):
    """A log reduces losses, and passes with rows and tokens; the end the latter; a step nothing."""
    from dataflex import comm
    from dataflex.clock import PHASES

    calls = []
    whole = comm.gather_sum
    monkeypatch.setattr(comm, "gather_sum", lambda values: calls.append(tuple(values.shape)) or whole(values))
    settings = {"dataset": "alpha,beta", "max_steps": 6, "logging_steps": 3}
    passes = (2 * len(PHASES) + 4,)  # forward and backward by phase, rows and tokens of two domains
    run("chosen", **settings, dynamic={"selector": "random", "interval_steps": 6})
    assert calls.count(passes) == 3
    assert len([shape for shape in calls if shape != passes]) == 2
    calls.clear()
    run("recorded", **settings, dynamic=RECORD)
    assert calls.count(passes) == 3
    assert len([shape for shape in calls if shape != passes]) == 2


def test_very_many_domains_are_in_the_record_and_not_in_the_log(run, tmp_path, data_dir):
    rows = [json.loads(line) for line in (data_dir / "alpha.jsonl").read_text().splitlines()]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "many.jsonl").write_text("".join(json.dumps({**r, "source": f"s{i}"}) + "\n" for i, r in enumerate(rows)))
    (folder / "dataset_info.json").write_text(json.dumps({"many": {"file_name": "many.jsonl"}}))
    settings = {"dataset": "many", "dataset_dir": str(folder), "max_steps": 3}
    outcome = run("many", **settings, dynamic={"selector": "all", "domain_column": "source"})
    assert not any(name.startswith("dataflex/") and name.count("/") > 1 for entry in outcome.log for name in entry)
    events = [event for event in outcome.events if event["event"] == "stepped"]
    for place, event in enumerate(events[:3]):
        for what in ("loss", "tokens", "sequences"):
            told = {key for key in event if key.startswith(f"dataflex/{what}/")}
            assert told == {f"dataflex/{what}/s{2 * place + k}" for k in range(2)}
