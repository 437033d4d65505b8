"""Trainers of transformers and TRL behind the door for Python."""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import dataflex
from dataflex.errors import CheckpointError, ConfigError, DataError, UnsupportedError
from dataflex.huggingface.loop import loop_of
from dataflex.record.read import load_plan, read_ending, read_events
from dataflex.signals.losses import row_sums
from tests.conftest import sentence

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.slow


ROOT = Path(__file__).parents[2]


def words(seed, low=3, high=9):
    return sentence(random.Random(seed), low, high)


def texts(count, seed=0):
    return [
        {
            "prompt": words(1000 * seed + i),
            "completion": " " + words(1000 * seed + 500 + i),
            "rejected": words(1000 * seed + 700 + i),
            "source": "abc"[i % 3],
            "quality": float(i),
        }
        for i in range(count)
    ]


def tokenized(tokenizer, rows):
    made = []
    for row in rows:
        prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        kept = {name: row[name] for name in ("source", "quality")}
        made.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer, "text": "x", **kept})
    return Dataset.from_list(made)


def padded(features):
    longest = max(len(row["input_ids"]) for row in features)

    def column(name, filler):
        return torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in features])

    ids = column("input_ids", -1)
    return {"input_ids": ids.clamp(min=0), "labels": column("labels", -100), "attention_mask": (ids >= 0).long()}


SETTINGS = {
    **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6, "logging_steps": 1},
    **{"learning_rate": 1e-3, "bf16": False, "report_to": "none", "save_steps": 4, "use_cpu": True, "seed": 5},
}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def served(folder):
    numbers = [e["interval"] for e in read_events(folder / "dataflex") if e["event"] == "planned"]
    return np.concatenate([load_plan(folder / "dataflex", number).rows for number in numbers])


class Kind:
    """How a trainer is made for a test."""

    def __init__(self, tiny_model):
        self.folder = tiny_model
        self.tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        self.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"

    def model(self):
        return AutoModelForCausalLM.from_pretrained(self.folder)

    def make(self, name, out, block=None, **changes):
        """Return a trainer of a kind, wrapped where there is a block."""
        door = {key: changes.pop(key) for key in ("domains", "targets", "columns") if key in changes}
        cls = Trainer if name == "Trainer" else getattr(trl, name)
        if block is not None:
            cls = dataflex.wrap(cls, block, **door)
        rows, collator = changes.pop("rows", None) or texts(24), changes.pop("collator", padded)
        settings = {**SETTINGS, "output_dir": str(out), **changes}
        if name == "Trainer":
            return cls(
                model=self.model(),
                args=TrainingArguments(**settings),
                train_dataset=tokenized(self.tokenizer, rows),
                data_collator=collator,
            )
        return getattr(self, name)(cls, rows, settings)

    def SFTTrainer(self, cls, rows, settings):
        args = trl.SFTConfig(**settings)
        names = [name for name in rows[0] if name != "rejected"]
        data = Dataset.from_list([{name: row[name] for name in names} for row in rows])
        return cls(model=self.model(), args=args, train_dataset=data, processing_class=self.tokenizer)

    def DPOTrainer(self, cls, rows, settings):
        data = Dataset.from_list([{**row, "chosen": row["completion"]} for row in rows]).remove_columns("completion")
        args = trl.DPOConfig(**settings)
        return cls(
            model=self.model(), ref_model=self.model(), args=args, train_dataset=data, processing_class=self.tokenizer
        )

    def RewardTrainer(self, cls, rows, settings):
        data = Dataset.from_list([{**row, "chosen": row["completion"]} for row in rows]).remove_columns("completion")
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(self.folder, num_labels=1)
        return cls(model=model, args=trl.RewardConfig(**settings), train_dataset=data, processing_class=self.tokenizer)

    def KTOTrainer(self, cls, rows, settings):
        data = Dataset.from_list([{**row, "label": bool(i % 2)} for i, row in enumerate(rows)])
        data = data.remove_columns("rejected")
        return cls(
            model=self.model(),
            ref_model=self.model(),
            args=trl.KTOConfig(**settings),
            train_dataset=data,
            processing_class=self.tokenizer,
        )


@pytest.fixture(scope="module")
def kind(tiny_model):
    return Kind(tiny_model)


def loads(name):
    """Whether the installed TRL has a trainer that works with the installed transformers."""
    if name in ("Trainer", "SFTTrainer"):
        return True
    return int(trl.__version__.partition(".")[0]) >= 1


TRAINERS = [
    pytest.param(name, marks=pytest.mark.skipif(not loads(name), reason="this TRL cannot make one; see make test-trl"))
    for name in ("Trainer", "SFTTrainer", "DPOTrainer", "RewardTrainer", "KTOTrainer")
]
LANGUAGE = ("Trainer", "SFTTrainer")


@pytest.mark.parametrize("name", TRAINERS)
def test_a_neutral_block_gives_the_stock_run(kind, tmp_path, name):
    order = {} if name == "KTOTrainer" else {"train_sampling_strategy": "sequential"}
    stock = kind.make(name, tmp_path / "stock", **order)
    stock.train()
    ours = kind.make(name, tmp_path / "ours", {"selector": "all"}, **order)
    ours.train()
    assert losses(ours) == losses(stock)
    for before, after in zip(stock.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(before, after)
    assert served(tmp_path / "ours").tolist()[:24] == list(range(24))


@pytest.mark.parametrize("name", TRAINERS)
def test_a_recorded_run_is_the_stock_run(kind, tmp_path, name):
    stock = kind.make(name, tmp_path / "stock")
    stock.train()
    ours = kind.make(name, tmp_path / "ours", {"record": True})
    ours.train()
    assert losses(ours) == losses(stock)
    assert [event["event"] for event in read_events(tmp_path / "ours" / "dataflex")][-1] == "finished"
    assert [event["event"] for event in read_ending(tmp_path / "ours")] == ["ended"]


BLOCKS = {
    "loss": {"selector": "loss", "warmup_steps": 1, "interval_steps": 2},
    "less": {"selector": {"name": "less", "targets": ["goal"]}, "warmup_steps": 2, "interval_steps": 2},
    "odm": {"mixer": "odm", "interval_steps": 1},
    "focal": {"weighter": {"name": "focal", "warmup_steps": 0}},
    "ledger": {"ledger": {"targets": ["goal"], "refresh_steps": 2}},
}


def door(kind, name, block):
    """Return what ``wrap`` is given beside a block; a target is as the trainer's own rows are."""
    rows = texts(6, seed=9)
    if name == "Trainer":
        goal = tokenized(kind.tokenizer, rows)
    else:
        goal = Dataset.from_list([{key: row[key] for key in ("prompt", "completion")} for row in rows])
    return {"block": block, "domains": "source", "targets": {"goal": goal}}


@pytest.mark.parametrize("method", BLOCKS)
@pytest.mark.parametrize("name", LANGUAGE)
def test_methods_run_and_go_on_from_a_checkpoint(kind, tmp_path, name, method):
    whole = kind.make(name, tmp_path / "whole", **door(kind, name, BLOCKS[method]))
    whole.train()
    rest = kind.make(name, tmp_path / "whole", **door(kind, name, BLOCKS[method]), max_steps=6)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(rest) == losses(whole)
    for before, after in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(before, after)


def test_a_second_training_begins_anew(kind, tmp_path):
    """Its decisions, checkpoints and averages are its own, not those of the training before."""
    block = {**BLOCKS["odm"], "average_weights": {"last_steps": 2}}
    given = {"domains": "source"}
    rows = tokenized(kind.tokenizer, texts(4, seed=3)).select_columns(["input_ids", "labels"])
    first = kind.make("Trainer", tmp_path, block, **given)
    first.train()
    second = kind.make("Trainer", tmp_path, block, **given)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "eval_averaged_loss" in second.evaluate(rows)
    shutil.rmtree(tmp_path / "checkpoint-4")
    second.model.load_state_dict(kind.model().state_dict())
    second.optimizer = second.lr_scheduler = None
    second.add_callback(EvaluatesAt(2, second, rows))
    second.train()
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert second.dataflex.mixer.turn == first.dataflex.mixer.turn == 6
    assert (tmp_path / "checkpoint-4").is_dir()
    assert [entry for entry in second.state.log_history if "eval_averaged_loss" in entry] == []


class EvaluatesAt(TrainerCallback):
    """Evaluates after a step."""

    def __init__(self, step, trainer, rows):
        self.step, self.trainer, self.rows = step, trainer, rows

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.trainer.evaluate(self.rows)


def test_a_broken_checkpoint_is_never_resumed(kind, tmp_path, caplog):
    settings = {"domains": "source", "save_steps": 2}
    whole = kind.make("Trainer", tmp_path, BLOCKS["odm"], **settings)
    whole.train()
    file = tmp_path / "checkpoint-6" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 0x40
    file.write_bytes(content)
    rest = kind.make("Trainer", tmp_path, BLOCKS["odm"], **settings)
    with pytest.raises(CheckpointError, match=r"checkpoint-6 cannot be resumed from: model\.safetensors is broken"):
        rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    rest.train(resume_from_checkpoint=True)
    assert "not resuming from checkpoint-6: model.safetensors is broken" in caplog.text
    assert rest.dataflex.mixer.turn == 6
    assert losses(rest) == losses(whole)
    empty = kind.make("Trainer", tmp_path / "empty", BLOCKS["odm"], **settings)
    with pytest.raises(CheckpointError, match="empty holds no complete checkpoint of this run"):
        empty.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", LANGUAGE)
def test_unit_weights_make_the_stock_losses(kind, tmp_path, name):
    settings = {"train_sampling_strategy": "sequential", "adam_epsilon": 0.1}  # so that rounding stays small
    stock = kind.make(name, tmp_path / "stock", **settings)
    stock.train()
    block = {"weighter": {"name": "focal", "gamma": 0.0, "warmup_steps": 0}}
    ours = kind.make(name, tmp_path / "ours", block, **settings)
    ours.train()
    assert losses(ours) == pytest.approx(losses(stock), rel=1e-5)
    for before, after in zip(stock.model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=1e-6)


class Counted:
    """A model of two layers that counts its forward passes."""

    def __init__(self, kind, **changes):
        torch.manual_seed(0)
        size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = MixtralConfig(
            vocab_size=len(kind.tokenizer),
            **size,
            num_key_value_heads=2,
            num_local_experts=4,
            output_router_logits=True,
            router_aux_loss_coef=1.0,
            attn_implementation="eager",
            **changes,
        )
        self.model, self.passes = MixtralForCausalLM(config), 0
        self.model.model.register_forward_hook(self.count)

    def count(self, *_):
        self.passes += 1


UNIT = {"weighter": {"name": "focal", "gamma": 0.0, "warmup_steps": 0}}


@pytest.mark.parametrize("name", LANGUAGE)
def test_unit_weights_keep_dropout_and_the_term_of_routers(kind, tmp_path, monkeypatch, name):
    """TRL 1.16 divides that term by the accumulated micro-batches, transformers does not; either goes forward once."""
    found = []
    for block in ({"selector": "all"}, UNIT):
        counted = Counted(kind, attention_dropout=0.3)
        monkeypatch.setattr(kind, "model", lambda made=counted.model: made)
        order = {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": 4, "max_steps": 3}
        trainer = kind.make(name, tmp_path / str(len(found)), block, **order, save_strategy="no", adam_epsilon=0.1)
        trainer.train()
        measured = [entry.get("entropy", 0.0) for entry in trainer.state.log_history if "loss" in entry]
        found.append((losses(trainer), measured, counted.passes))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)
    assert found[1][2] == found[0][2] == 12


def token_loss(model, batch):
    """The plain mean loss of a batch's tokens."""
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()))


class Longer(Trainer):
    """Adds to the loss a cross-entropy of something else, log(1 + e^3)."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        other = outputs.logits[:, 0, :2] * 0 + torch.tensor([0.0, 3.0])
        loss = loss + cross_entropy(other, torch.zeros(len(other), dtype=torch.long))
        return (loss, outputs) if return_outputs else loss


def evaluated(kind, cls, model, args, rows):
    """Return the metrics of a wrapped trainer."""
    data = tokenized(kind.tokenizer, texts(8))
    more = {} if issubclass(cls, Trainer) and "trl" not in cls.__module__ else {"processing_class": kind.tokenizer}
    made = dataflex.wrap(cls, {"selector": "all"}, domains="source")
    held = tokenized(kind.tokenizer, rows).select_columns(["input_ids", "labels"])
    return made(model=model, args=args, train_dataset=data, eval_dataset=held, data_collator=padded, **more).evaluate()


@pytest.mark.filterwarnings("ignore:.*label_smoothing_factor.*:FutureWarning")
@pytest.mark.parametrize("changes", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.2}, {}])
@pytest.mark.parametrize("cls", [Trainer, Longer, trl.SFTTrainer])
def test_perplexity_is_that_of_the_plain_loss_whatever_is_minimized(kind, tmp_path, cls, changes):
    """Of a mixture of experts, whose own loss has a term of the routers."""
    if "loss_type" in changes and cls is not trl.SFTTrainer:
        return
    model, rows = Counted(kind).model, texts(7, seed=3)
    torch.nn.init.normal_(model.lm_head.weight)  # so that predictions are far from even
    make = trl.SFTConfig if cls is trl.SFTTrainer else TrainingArguments
    args = make(**{**SETTINGS, **changes}, output_dir=str(tmp_path), per_device_eval_batch_size=3)
    found = evaluated(kind, cls, model, args, rows)
    true = token_loss(model, padded([*tokenized(kind.tokenizer, rows)]))
    assert found["eval_token_loss"] == pytest.approx(true, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(np.exp(true), rel=1e-5)
    assert abs(found["eval_loss"] - true) > 0.05


def test_no_perplexity_where_the_outputs_tell_no_token_losses(kind, tmp_path):
    class Bare(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs)
            return (loss, {"loss": loss}) if return_outputs else loss

    args = TrainingArguments(**SETTINGS, output_dir=str(tmp_path))
    found = evaluated(kind, Bare, Counted(kind).model, args, texts(5))
    assert "eval_loss" in found
    assert not {"eval_token_loss", "eval_perplexity"} & set(found)


def test_all_trainers_serve_the_same_rows(kind, tmp_path):
    found = {}
    for name in LANGUAGE:
        kind.make(name, tmp_path / name, BLOCKS["odm"] | {"mixer": "uniform"}, domains="source").train()
        found[name] = served(tmp_path / name).tolist()
    assert found["Trainer"] == found["SFTTrainer"]


def test_a_trainer_tells_its_plan(kind, tmp_path):
    trainer = kind.make("Trainer", tmp_path, **door(kind, "Trainer", BLOCKS["less"]))
    told = dataflex.plan(trainer)
    assert told == trainer.plan()
    assert "4 sequences (2 per device x 2 accumulated x 1 process)" in told
    assert "24 (a 8, b 8, c 8)" in told
    assert "6 (max_steps)" in told
    with pytest.raises(UnsupportedError, match=r"plan: SimpleNamespace is no trainer of a class that dataflex\.wrap"):
        dataflex.plan(SimpleNamespace())


TWO_RANKS = """
import json, sys
import torch.distributed as dist
from accelerate.state import AcceleratorState
from dataflex.huggingface.loop import sharding_of
from pathlib import Path
from tests.distributed.driver import deepspeed_without_compiling, fsdp_on_cpu
from tests.huggingface import test_wrap as tests

dist.init_process_group("gloo")
kind = tests.Kind(Path(sys.argv[1]))
rows = tests.texts(5, seed=3)  # five rows in batches of two: one is repeated
args = tests.TrainingArguments(**tests.SETTINGS, output_dir=sys.argv[2], per_device_eval_batch_size=2)
found = tests.evaluated(kind, tests.Trainer, kind.model(), args, rows)
if dist.get_rank() == 0:
    print("EVALUATED " + json.dumps(found["eval_token_loss"]))
if tests.loads("GRPOTrainer"):
    from tests.huggingface import test_prompts as prompts

    found = [*prompts.two_ranks(Path(sys.argv[1]), Path(sys.argv[2]) / "prompts")]
    if dist.get_rank() == 0:
        print("PROMPTS " + json.dumps(found))
fsdp_on_cpu()
deepspeed_without_compiling()
layers = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
forms = {
    "": {},
    "free": {"padding_free": True, "max_length": None},
    "fsdp2": {"fsdp": "full_shard auto_wrap", "fsdp_config": layers},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}},
}
for name, form in [("Trainer", ""), *[("SFTTrainer", form) for form in forms]]:
    for method in ("less", "odm", "focal"):
        if form in ("fsdp2", "zero3") and method != "less":
            continue
        AcceleratorState._reset_state()
        given = {**tests.door(kind, name, tests.BLOCKS[method]), **forms[form]}
        out = Path(sys.argv[2]) / (name + form) / method
        made = kind.make(name, out, **given, gradient_accumulation_steps=1)
        made.train()
        if dist.get_rank() == 0:
            print("LOSSES " + json.dumps([name, form, method, sharding_of(made), tests.losses(made)]))
"""


@pytest.mark.gloo
def test_two_ranks_serve_the_rows_of_one(kind, tiny_model, tmp_path):
    (tmp_path / "two.py").write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [str(tmp_path / "two.py"), str(tiny_model), str(tmp_path / "two")]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    env["ACCELERATE_TORCH_DEVICE"] = "cpu"
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    found = [json.loads(line[7:]) for line in told.stdout.splitlines() if line.startswith("LOSSES ")]
    assert len(found) == 11
    for name, form, method, sharding, two in found:
        assert sharding == (form if form in ("fsdp2", "zero3") else "none")
        folder = f"{name}{form}/{method}"
        one = kind.make(name, tmp_path / "one" / folder, **door(kind, name, BLOCKS[method]))
        one.train()
        np.testing.assert_array_equal(served(tmp_path / "two" / folder), served(tmp_path / "one" / folder))
        assert two == pytest.approx(losses(one), rel=1e-4), folder
    (evaluation,) = [line[10:] for line in told.stdout.splitlines() if line.startswith("EVALUATED ")]
    held = padded([*tokenized(kind.tokenizer, texts(5, seed=3))])
    assert float(evaluation) == pytest.approx(token_loss(kind.model(), held), rel=1e-5)
    if loads("GRPOTrainer"):
        from tests.huggingface.test_prompts import two_ranks

        (found,) = [json.loads(line[8:]) for line in told.stdout.splitlines() if line.startswith("PROMPTS ")]
        assert found == [list(run) for run in two_ranks(tiny_model, tmp_path / "one" / "prompts")]


def test_what_is_supervised_is_what_the_collator_supervises(kind, tmp_path):
    trainer = kind.make("SFTTrainer", tmp_path, {"selector": "all"})
    space = trainer.dataflex_setup.rows
    labels = [trainer.data_collator([row])["labels"] for row in trainer.train_dataset]
    assert space.supervised.tolist() == [int((row != -100).sum()) for row in labels]
    assert space.supervised.sum() < space.lengths.sum()


@pytest.mark.skipif(not loads("DPOTrainer"), reason="see make test-trl")
def test_preferences_are_chosen_by_the_losses_of_their_chosen_answers(kind, tmp_path):
    trainer = kind.make("DPOTrainer", tmp_path, BLOCKS["loss"])
    trainer.train()
    assert len(losses(trainer)) == 6
    rows = [trainer.train_dataset[row] for row in range(3)]
    batch = trainer.dataflex_setup.score_collator(None)(rows)
    prompt = rows[0].get("prompt_ids") or rows[0]["prompt_input_ids"]
    assert (batch["labels"][0] != -100).sum() == batch["attention_mask"][0].sum() - len(prompt)


@pytest.mark.skipif(not loads("DPOTrainer"), reason="see make test-trl")
def test_preferences_are_chosen_by_their_margins(kind, tmp_path):
    """Log-probabilities of policy and reference are those that the trainer compares, and margins decide."""
    trainer = kind.make("DPOTrainer", tmp_path, {**BLOCKS["loss"], "selector": "margin"}, loss_type="ipo")
    trainer.train()
    assert len(losses(trainer)) == 6
    plans = [event for event in read_events(tmp_path / "dataflex") if event["event"] == "planned"]
    assert [plan["scores"]["scored"] for plan in plans[1:]] == [24] * 3
    rows = [trainer.train_dataset[row] for row in range(4)]
    pairs = loop_of(trainer, trainer.dataflex_setup, 1).preferences
    with torch.no_grad():
        trainer.model.eval()
        found = pairs.losses(lambda batch: row_sums(trainer.model, batch))(pairs.collate(rows))
        theirs = [trainer.compute_loss(trainer.model, trainer.data_collator([row])) for row in rows]
    assert found.tolist() == pytest.approx([float(each) for each in theirs], rel=1e-4)


@pytest.mark.skipif(not loads("DPOTrainer"), reason="see make test-trl")
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"loss_type": "robust"}, "loss_type: .* robust"),
        ({"loss_type": ["sigmoid", "sft"]}, "loss_type: .* sigmoid, sft"),
        ({"sync_ref_model": True}, "sync_ref_model: grad_norm takes the reference"),
    ],
)
def test_losses_of_pairs_without_a_gradient_of_their_own_are_refused(kind, tmp_path, changes, told):
    block = {"selector": "grad_norm", "interval_steps": 2}
    with pytest.raises(ConfigError, match=told):
        kind.make("DPOTrainer", tmp_path, block, **changes)


# ---------------------------------------------------------------- what is refused, before training


def test_a_weighter_for_preferences_is_refused(kind, tmp_path):
    if not loads("DPOTrainer"):
        pytest.skip("see make test-trl")
    with pytest.raises(ConfigError, match=r"reweighting needs .* stage dpo"):
        kind.make("DPOTrainer", tmp_path, BLOCKS["focal"])


@pytest.mark.parametrize("name", TRAINERS[3:])
def test_signals_of_rows_without_an_answer_are_refused(kind, tmp_path, name):
    with pytest.raises(ConfigError, match=r"dynamic\.selector: loss asks for losses, which .* not give"):
        kind.make(name, tmp_path, BLOCKS["loss"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy: the plan decides"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size: a plan is made for one batch size"),
        ({"domains": "sauce"}, "no column 'sauce' .*; did you mean 'source'"),
        ({"accelerator_config": {"split_batches": True}}, r"accelerator_config\.split_batches: per_device"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: smoothing replaces the loss"),
        ({"optim": "adafactor", "block": BLOCKS["less"]}, "Adam's moments .*adafactor"),
    ],
)
def test_arguments_that_cannot_be_followed_are_refused(kind, tmp_path, changes, told):
    given = {**door(kind, "Trainer", BLOCKS["focal"]), **changes}
    with pytest.raises(ConfigError, match=told):
        kind.make("Trainer", tmp_path, **given)


def test_a_loss_of_its_own_is_refused_beside_weights(kind, tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    rows = tokenized(kind.tokenizer, texts(8))
    args = TrainingArguments(**SETTINGS, output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"dynamic\.weighter: Own has a compute_loss of its own"):
        dataflex.wrap(Own, BLOCKS["focal"])(model=kind.model(), args=args, train_dataset=rows, data_collator=padded)


@pytest.mark.skipif(not loads("DPOTrainer"), reason="TRL 0.24 takes it for a loss function; see make test-trl")
@pytest.mark.parametrize("method", ["focal", "odm", "budget"])
def test_another_loss_of_trl_is_refused_beside_what_takes_token_losses(kind, tmp_path, method):
    blocks = {**BLOCKS, "budget": {**BLOCKS["loss"], "signals": {"budget": 0.5}}}
    given = door(kind, "SFTTrainer", blocks[method])
    with pytest.raises(ConfigError, match=r"loss_type: .* acts on the plain loss of each token, not on 'dft'; remove"):
        kind.make("SFTTrainer", tmp_path, **given, loss_type="dft")


def test_a_subclass_of_a_trainer_of_trl_is_taken_beside_weights(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(trl, "SFTTrainer", type("Mine", (trl.SFTTrainer,), {"__module__": "mine"}))
    trainer = kind.make("SFTTrainer", tmp_path, BLOCKS["focal"], max_steps=1)
    trainer.train()
    assert len(losses(trainer)) == 1


@pytest.mark.parametrize("method", ["get_train_dataloader", "_get_train_sampler", "get_batch_samples"])
def test_batches_of_its_own_are_refused_but_in_a_stock_run(kind, tmp_path, method):
    def served(self, *args):
        return getattr(Trainer, method)(self, *args)

    own, rows = type("Own", (Trainer,), {method: served}), tokenized(kind.tokenizer, texts(8))
    args = TrainingArguments(**SETTINGS, output_dir=str(tmp_path))
    given = {"model": kind.model(), "args": args, "train_dataset": rows, "data_collator": padded}
    with pytest.raises(ConfigError, match=f"Own: has a {method} of its own, which would have no part"):
        dataflex.wrap(own, {"selector": "all"})(**given)
    dataflex.wrap(own, {"record": True})(**given)


def test_what_has_no_effect_is_told(kind, tmp_path, caplog):
    idle = {"data_seed": 7, "accelerator_config": {"even_batches": False}}
    trainer = kind.make("Trainer", tmp_path, {"orderer": {"name": "sorting", "by": "length"}}, **idle)
    for told in ("data_seed: no effect", "accelerator_config.even_batches: no effect", "the last quarter of the steps"):
        assert told in caplog.text
        assert told in trainer.plan()
    assert "note" not in kind.make("Trainer", tmp_path, {"selector": "all"}).plan()


def test_losses_by_domain_are_not_those_of_another_cross_entropy(kind, tmp_path):
    """The loss of ``Longer`` has two, of which one is the tokens'."""
    found = []
    for cls in (Trainer, Longer):
        trainer = dataflex.wrap(cls, {"selector": "all"}, domains="source")(
            model=kind.model(),
            args=TrainingArguments(**{**SETTINGS, "max_steps": 1}, output_dir=str(tmp_path)),
            train_dataset=tokenized(kind.tokenizer, texts(8)),
            data_collator=padded,
        )
        trainer.train()
        (logs,) = [entry for entry in trainer.state.log_history if "loss" in entry]
        found.append({name: value for name, value in logs.items() if name.startswith("dataflex/loss/")})
    assert found[1] == found[0] != {}


def test_data_that_cannot_be_planned_is_refused(kind, tmp_path):
    args = TrainingArguments(**SETTINGS, output_dir=str(tmp_path))
    cls = dataflex.wrap(Trainer, BLOCKS["loss"])
    stream = tokenized(kind.tokenizer, texts(8)).to_iterable_dataset()
    with pytest.raises(ConfigError, match=r"train_dataset: IterableDataset; give a datasets\.Dataset"):
        cls(model=kind.model(), args=args, train_dataset=stream, data_collator=padded)
    with pytest.raises(ConfigError, match=r"train_dataset: has no rows"):
        cls(model=kind.model(), args=args, train_dataset=Dataset.from_dict({"input_ids": [], "labels": []}))
    bare = Dataset.from_list([{"input_ids": [1, 2, 3]}] * 4)
    trainer = cls(
        model=kind.model(),
        args=args,
        train_dataset=bare,
        data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
    )
    with pytest.raises(DataError, match="its batches have no labels"):
        trainer.train()
    flat = cls(
        model=kind.model(),
        args=args,
        train_dataset=tokenized(kind.tokenizer, texts(8)),
        data_collator=lambda rows: {"labels": torch.tensor([[token for row in rows for token in row["labels"]]])},
    )
    with pytest.raises(UnsupportedError, match="makes 1 sequences of 2 rows"):
        flat.train()


def test_domains_that_are_no_text_are_refused(kind, tmp_path):
    trainer = kind.make("Trainer", tmp_path, {"mixer": "uniform"}, domains="quality")
    with pytest.raises(DataError, match=r"row 0 of the training set, has quality = 0\.0"):
        trainer.train()


def test_masked_collation_is_supported(kind, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(kind.folder)
    rows = Dataset.from_list([tokenizer(row["prompt"]) for row in texts(16)])
    trainer = dataflex.wrap(Trainer, BLOCKS["loss"])(
        model=kind.model(),
        args=TrainingArguments(**SETTINGS, output_dir=str(tmp_path)),
        train_dataset=rows.remove_columns("token_type_ids") if "token_type_ids" in rows.column_names else rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    assert len(losses(trainer)) == 6


def test_classes_that_cannot_be_wrapped_are_refused():
    with pytest.raises(UnsupportedError, match=r"is not a class of transformers\.Trainer"):
        dataflex.wrap(dict, BLOCKS["loss"])
    with pytest.raises(UnsupportedError, match="is wrapped already"):
        dataflex.wrap(dataflex.wrap(Trainer, BLOCKS["loss"]), BLOCKS["loss"])
    with pytest.raises(ConfigError, match=r"dynamic\.selector\.targets: targets= has no data set 'goal'; did you mean"):
        dataflex.wrap(Trainer, BLOCKS["less"], targets={"goals": Dataset.from_list([])})
    with pytest.raises(ConfigError, match=r"dynamic\.eval_by_domain: evaluation sets are the loop's"):
        dataflex.wrap(Trainer, {**BLOCKS["odm"], "eval_by_domain": True})
    online = type("OnlineDPOTrainer", (Trainer,), {"__module__": "trl.trainer.online_dpo_trainer"})
    with pytest.raises(UnsupportedError, match="the rows of TRL's OnlineDPOTrainer are not planned"):
        dataflex.wrap(online, BLOCKS["loss"])
    if not loads("GRPOTrainer"):
        grpo = type("GRPOTrainer", (Trainer,), {"__module__": "trl.trainer.grpo_trainer"})
        with pytest.raises(UnsupportedError, match=r"GRPOTrainer of TRL 0\..* is not supported; install 'trl>=1.16'"):
            dataflex.wrap(grpo, BLOCKS["loss"])


PAIRS = [pytest.param("trl_pairs", kind, marks=TRAINERS[2].marks) for kind in ("DPO", "Reward", "KTO")]


@pytest.mark.parametrize(("name", "kind"), [("hf_trainer", None), ("trl_sft", None), *PAIRS])
def test_examples_train_and_go_on(tmp_path, name, kind, monkeypatch):
    example = ROOT / "examples" / f"{name}.py"
    assert len(example.read_text().splitlines()) < 40
    for more in ([], [str(tmp_path / "out" / "checkpoint-6")]):
        monkeypatch.setattr(sys, "argv", [str(example), *filter(None, [kind]), str(tmp_path / "out"), *more])
        trainer = runpy.run_path(str(example))["trainer"]
        assert trainer.state.global_step == 12
    kinds = [event["event"] for event in read_events(tmp_path / "out" / "dataflex")]
    assert kinds.count("resumed") == 1
    assert kinds[-1] == "finished"


def test_the_door_needs_no_llamafactory():
    code = "import dataflex, sys; dataflex.wrap; print([m for m in sys.modules if m.split('.')[0] == 'llamafactory'])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
