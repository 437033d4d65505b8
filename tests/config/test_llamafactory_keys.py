"""LLaMA-Factory's own keys: what it accepts is let through, what would end in a traceback is told with the key."""

from __future__ import annotations

import base64
import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from dataflex.cli import main
from dataflex.config import args as args_module
from dataflex.config import table as table_module
from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.check import model_problems, partitioned_by
from dataflex.config.load import MOST_LEVELS
from dataflex.config.needs import ZERO3
from dataflex.config.split import resolve
from dataflex.config.table import FILE, installed, read_source, table
from dataflex.version import TESTED

Config = Callable[..., dict[str, Any]]

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt": ({"lora_rnak": 8}, "lora_rnak: unknown key; did you mean 'lora_rank'?"),
    "cut": ({"templat": "alpaca"}, "templat: unknown key; did you mean 'template'?"),
    "template": ({"template": "alpacca"}, "template: 'alpacca' is not one of the 121 choices; did you mean 'alpaca'?"),
    "scheduler": ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type: 'cosin' is not one of the"),
    "optimizer": ({"optim": "adamw"}, "optim: 'adamw' is not one of the"),
    "strategy": ({"save_strategy": "step"}, "save_strategy: 'step' is not one of the 4 choices; did you mean 'steps'?"),
    "finetuning": ({"finetuning_type": "qlora"}, "finetuning_type: 'qlora' is not one of the 4 choices"),
    "rate": ({"learning_rate": "abc"}, "learning_rate: expected a number, found 'abc'"),
    "quoted rate": ({"learning_rate": "1e-4"}, "learning_rate: expected a number, found the text '1e-4'"),
    "infinite rate": ({"learning_rate": float("inf")}, "learning_rate: expected a number, found .inf"),
    "steps": ({"max_steps": "abc"}, "max_steps: expected a whole number, found 'abc'"),
    "steps nan": ({"max_steps": float("nan")}, "max_steps: expected a whole number, found .nan"),
    "steps inf": ({"max_steps": float("inf")}, "max_steps: expected a whole number, found .inf"),
    "steps 1e30": ({"max_steps": 1e30}, "max_steps: must be at most 2,147,483,647"),
    "batch 0": ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: must be at least 1, found 0"),
    "batch -1": ({"per_device_train_batch_size": -1}, "per_device_train_batch_size: must be at least 1, found -1"),
    "batch nan": (
        {"per_device_train_batch_size": float("nan")},
        "per_device_train_batch_size: expected a whole number, found .nan",
    ),
    "accumulation": ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: must be at least 1, found 0"),
    "list for a number": ({"cutoff_len": [8]}, "cutoff_len: expected a whole number, found [8]"),
    "list for a text": ({"template": ["alpaca"]}, 'template: expected text, found ["alpaca"]'),
    "list for a switch": ({"do_train": [1]}, "do_train: expected true or false, found [1]"),
    "list for a path": ({"output_dir": ["out"]}, 'output_dir: expected text, found ["out"]'),
    "streaming": ({"streaming": True, "max_samples": 3, "max_steps": 2}, "max_samples: does not work together with"),
    "long output": ({"output_dir": "x" * 300}, "output_dir: holds a name of 300 characters"),
    "long model": ({"model_name_or_path": "./" + "x" * 300}, "model_name_or_path: holds a name of 300 characters"),
    "long plugin": ({"dynamic": {"selector": "loss", "plugins": "x" * 300}}, "dynamic.plugins: holds a name of 300"),
    "NUL": ({"output_dir": "a\0b"}, "output_dir: holds a NUL character"),
    "NUL in a name": ({"run_name": "a\0b"}, "run_name: holds a NUL character"),
    "missing": ({"output_dir": "???"}, "output_dir: '???' stands for a value that is still to be given"),
    "large seed": ({"seed": 2**40}, "seed: must be at most 4,294,967,295"),
    "huge seed": ({"seed": 16**5000}, "seed: the number is too large"),
    "interval": (
        {"dynamic": {"selector": "loss", "interval_steps": 10**30}},
        "dynamic.interval_steps: the number is too",
    ),
    "store": (
        {"dynamic": {"selector": "loss", "interval_steps": 2, "signals": {"store": "s", "store_gb": float("inf")}}},
        "dynamic.signals.store_gb: must be at most",
    ),
    "pattern": (
        {"dynamic": {"selector": {"name": "less", "targets": ["t"], "parameters": "("}, "interval_steps": 2}},
        "dynamic.selector.parameters: '(' is not a regular expression: missing )",
    ),
    "column": (
        {"dynamic": {"mixer": "uniform", "domain_column": "source"}, "dataset": "a,b"},
        "dynamic.domain_column: the data set 'b' has no column 'source'",
    ),
    "best": ({"load_best_model_at_end": True, "save_strategy": "epoch"}, "load_best_model_at_end: needs save_strategy"),
    "rank-stabilized": ({"finetuning_type": "full", "use_rslora": True}, "use_rslora: works with finetuning_type lora"),
    "logging": ({"logging_steps": 0}, "logging_steps: must be above 0"),
    "stream": ({"streaming": True, "max_steps": 9, "dynamic": None}, "dataloader_num_workers: LLaMA-Factory cuts"),
    "prefetch": ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor: needs 'dataloader_num_workers'"),
    "tracker": ({"report_to": "wndb"}, "report_to: 'wndb' is not one of the 16 choices; did you mean 'wandb'?"),
    "tracker in a list": ({"report_to": ["tensorboard", "wndb"]}, "report_to: 'wndb' is not one of the 16 choices"),
    "tracker and none": ({"report_to": ["none", "tensorboard"]}, "report_to: 'none' stands alone; remove it"),
    "tracker not there": ({"report_to": "azure_ml"}, "report_to: azure_ml needs azureml, which is not installed"),
    "kubeflow": ({"report_to": ["kubeflow"]}, "report_to: kubeflow needs the environment variable KUBEFLOW_TRAINER_"),
    "lists in a list": ({"report_to": [[[[]]]]}, "report_to: expected a list of texts, found [[[]]] in it"),
    "null in a list of numbers": ({"interleave_probs": [None]}, "interleave_probs: expected a list of numbers, found"),
    "list of lists": ({"lora_target": [[]]}, "lora_target: expected a list of texts, found [] in it"),
    "pixels": ({"video_max_pixels": 8}, "video_max_pixels: must be at least video_min_pixels (256), found 8"),
    "prediction": ({"do_predict": True, "val_size": 2}, "do_predict: at stage sft it needs 'predict_with_generate"),
    "shares of sets": ({"interleave_probs": "1", "dynamic": None}, "interleave_probs: works with mix_strategy interl"),
    "one share": (
        {"interleave_probs": "1", "mix_strategy": "interleave_under", "dataset": "a,b", "dynamic": None},
        "interleave_probs: expected 2 numbers, one for each name in dataset, found 1",
    ),
    "bits of another model": ({"ref_model_quantization_bit": 3}, "ref_model_quantization_bit: must be 4 or 8, found 3"),
    "bits": ({"quantization_bit": 3}, "quantization_bit: bnb has 4, 8, found 3"),
    "no package of bits": ({"quantization_bit": 4}, "quantization_bit: bnb needs bitsandbytes, which is not inst"),
    "eetq": ({"quantization_bit": 4, "quantization_method": "eetq"}, "quantization_bit: eetq has 8, found 4"),
    "quantized, new words": (
        {"quantization_bit": 4, "resize_vocab": True},
        "resize_vocab: does not work together with quantiz",
    ),
    "map": ({"quantization_device_map": "auto"}, "quantization_device_map: is for inference, not for training"),
    "backend": ({"infer_backend": "vllm"}, "infer_backend: training works with huggingface only, found vllm"),
    "export": ({"export_quantization_bit": 4}, "export_quantization_bit: needs 'export_quantization_dataset'"),
    "depths": ({"mixture_of_depths": "convert"}, "mixture_of_depths: needs MoD, which is not installed"),
    "kt": ({"use_kt": True, "dynamic": None}, "use_kt: needs kt-kernel, which is not installed"),
    "reward model": ({"stage": "ppo", "dynamic": None}, "reward_model: missing; stage ppo needs one"),
    "principal": ({"pissa_init": True, "stage": "kto"}, "pissa_init: does not work with stage kto"),
    "accelerator file": ({"accelerator_config": "nowhere.json"}, "accelerator_config: no such file: nowhere.json"),
    "accelerator key": (
        {"accelerator_config": {"split_batch": True}},
        "accelerator_config.split_batch: unknown key; did you mean 'split_batches'?",
    ),
    "token file": ({"new_special_tokens_config": "t.yaml"}, "new_special_tokens_config: no such file: t.yaml"),
    "shift": ({"shift_attn": True}, "shift_attn: LLaMA-Factory has it for transformers below 4.48"),
    "fp16 on CPU": ({"fp16": True, "use_cpu": True}, "fp16: needs a GPU; remove the key"),
    "tf32 on CPU": ({"tf32": True, "use_cpu": True}, "tf32: needs a GPU; remove the key"),
    "plateau": ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type: reduce_lr_on_plateau goes by"),
    "schedule text": ({"lr_scheduler_kwargs": "x"}, "lr_scheduler_kwargs: expected a mapping, found 'x'"),
    "schedule key": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycle": 1}},
        "lr_scheduler_kwargs.num_cycle: unknown key; did you mean 'num_cycles'? (lr_scheduler_type cosine",
    ),
    "linear key": (
        {"lr_scheduler_kwargs": {"min_lr": 1e-5}},
        "lr_scheduler_kwargs.min_lr: unknown key (lr_scheduler_type linear takes none)",
    ),
    "number of a schedule": (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": "abc"}},
        "lr_scheduler_kwargs.min_lr: expected a number, found 'abc'",
    ),
    "null in a schedule": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": None}},
        "lr_scheduler_kwargs.num_cycles: expected a number, found null",
    ),
    "steps of a schedule": (
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": -5}},
        "lr_scheduler_kwargs.num_decay_steps: expected a number of steps, found -5",
    ),
    "shape of a schedule": (
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": '{"decay_type": "cos"}'},
        "lr_scheduler_kwargs.decay_type: expected linear, cosine or 1-sqrt, found 'cos'",
    ),
    "end of a schedule": (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1}, "learning_rate": 0.001},
        "lr_scheduler_kwargs.lr_end: must be below learning_rate (0.001), found 1",
    ),
    "no JSON": ({"deepspeed": "broken.json"}, "deepspeed: expected a mapping, found 'broken.json' (Expecting"),
    "JSON of a list": ({"fsdp": "full_shard", "fsdp_config": "list.json"}, "fsdp_config: expected a mapping, found []"),
    "JSON too deep": ({"accelerator_config": "deep.json"}, "accelerator_config: expected a mapping, found 'deep.json'"),
    "file for a mapping": (
        {"gradient_checkpointing_kwargs": "list.json"},
        "gradient_checkpointing_kwargs: expected a mapping, found 'list.json'",
    ),
    "attention": ({"flash_attn": "fa3"}, "flash_attn: LLaMA-Factory fails with fa3, which it sets itself where a"),
    "no ZeRO": ({"deepspeed": {"a": 1}}, "deepspeed.zero_optimization: missing; write it as in '{stage: 2}'"),
    "debug": ({"debug": "underflow"}, "debug: 'underflow' is none of underflow_overflow, tpu_metrics_debug; did you"),
    "ZeRO": ({"deepspeed": {"zero_optimization": 3}}, "deepspeed.zero_optimization: expected a mapping, found 3"),
    "stage of ZeRO": (
        {"deepspeed": '{"zero_optimization": {"stage": 4}}'},
        "deepspeed.zero_optimization.stage: expected 0, 1, 2 or 3, found 4",
    ),
    "least rate": (
        {"lr_scheduler_type": "cosine_with_min_lr"},
        "lr_scheduler_kwargs: lr_scheduler_type cosine_with_min_lr needs one of min_lr and",
    ),
    "nothing trained": (
        {"finetuning_type": "freeze", "freeze_trainable_layers": 0},
        "freeze_trainable_layers: with 0 nothing is trained",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_told_with_the_key(name: str, config: Config, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, told = REFUSED[name]
    if name == "column":
        file = project / "data/a.jsonl"
        file.write_text(file.read_text().replace('"input":', '"source": "x", "input":'))
    if "JSON" in name or "file" in name:
        monkeypatch.chdir(project)
        for file, text in {"broken": '{"a": 1,', "list": "[]", "deep": "[" * 100_000}.items():
            Path(f"{file}.json").write_text(text)
    if name == "shift":
        (project / "model/config.json").write_text('{"model_type": "llama"}')
    lines = refused(config(**changes), project)
    assert [line for line in lines if line.startswith(told)], lines
    assert len([line for line in lines if line.partition(":")[0] == told.partition(":")[0]]) == 1, lines


def refused(mapping: dict[str, Any], project: Path) -> list[str]:
    """Return the lines with which ``plan`` refuses a configuration."""
    from dataflex.errors import ConfigError

    with pytest.raises(ConfigError) as caught:
        resolve(mapping, project, check_stock=True)
    return caught.value.problems


def test_all_mistakes_are_told_together_with_ours(config: Config, project: Path) -> None:
    lines = refused(config(lora_rnak=8, template="no", learning_rate="x", seed=10**30, dynamic={"selectr": 1}), project)
    assert {line.partition(":")[0] for line in lines} >= {"lora_rnak", "template", "learning_rate", "seed"}
    assert any(line.startswith("dynamic.selectr") for line in lines)


ACCEPTED: dict[str, dict[str, Any]] = {
    "no as false": {"save_strategy": False, "eval_strategy": False, "report_to": False},
    "null": {
        "report_to": None,
        "num_train_epochs": None,
        "resume_from_checkpoint": None,
        "lora_alpha": None,
        "deepspeed": None,
    },
    "whole as float": {"cutoff_len": 64.0, "max_steps": 1e3},
    "float as whole": {"learning_rate": 0, "num_train_epochs": 1, "warmup_steps": 2, "weight_decay": 0},
    "ratio of steps": {"warmup_steps": 0.1, "logging_steps": 0.5, "save_steps": 0.25},
    "switch as text": {"plot_loss": "true", "overwrite_output_dir": "yes"},
    "number as name": {"run_name": 2024, "master_port": 29500},
    "list as text": {"lora_target": ["q_proj", "v_proj"], "dataset": ["a"], "report_to": ["none"]},
    "mapping": {
        "deepspeed": {"zero_optimization": {"stage": 2}},
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": {"num_cycles": 1},
    },
    "schedule": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}'},
    "debug": {"debug": ["underflow_overflow"], "eval_dataset": []},
    "null in a schedule": {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": None}},
    "JSON": {"deepspeed": '{"zero_optimization": {"stage": 2}}', "ray_init_kwargs": '{"num_cpus": 1}'},
    "JSON in base64": {"deepspeed": base64.urlsafe_b64encode(b'{"zero_optimization": {"stage": 2}}').decode()},
    "lengths filled in": {"lr_scheduler_type": "warmup_stable_decay"},
    "resume": {"resume_from_checkpoint": False},
    "no clipping": {"max_grad_norm": float("inf")},
    "unlimited": {"save_total_limit": -1, "max_steps": -1},
    "trainer": {"optim": "adamw_torch_fused", "lr_scheduler_type": "cosine", "torch_compile": False, "tf32": None},
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_llamafactory_accepts_is_let_through(name: str, config: Config, project: Path) -> None:
    resolve(config(**ACCEPTED[name]), project, check_stock=True)


def test_what_is_handed_on_is_what_llamafactory_reads_right() -> None:
    read = LlamaFactoryArgs.read(
        {
            **{"save_strategy": False, "max_steps": 1e3, "plot_loss": "false", "run_name": 7, "num_train_epochs": None},
            **{"adam_beta1": 0, "eval_dataset": []},
        }
    )
    assert not read.problems
    told = {"save_strategy": "no", "max_steps": 1000, "plot_loss": False, "run_name": "7"}
    assert dict(read) == {**told, "adam_beta1": 0.0, "eval_dataset": None}
    assert isinstance(read["max_steps"], int)
    assert isinstance(read["adam_beta1"], float)  # torch takes two floats for Adam's betas
    assert LlamaFactoryArgs.read(read) is read


def test_extra_keys_are_let_through_where_llamafactory_lets_them(config: Config, project: Path, monkeypatch) -> None:
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    resolve(config(lora_rnak=8), project, check_stock=True)


def test_bf16_without_a_device(config: Config, project: Path, monkeypatch) -> None:
    monkeypatch.setattr(args_module, "_device_is_possible", lambda: False)
    assert refused(config(bf16=True), project)[0].startswith("bf16: this machine has no device that computes in bf16")
    resolve(config(bf16=True, use_cpu=True), project)
    monkeypatch.setattr(args_module, "_device_is_possible", lambda: True)
    resolve(config(bf16=True), project)


@pytest.mark.parametrize("count", ["nan", "0", "-1", "two"])
def test_number_of_processes(count: str, config: Config, project: Path, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    monkeypatch.setenv("NPROC_PER_NODE", count)
    lines = refused(config(), project)
    assert lines == [f"NPROC_PER_NODE (environment): expected a whole number of at least 1, found {count!r}"]


FILES: dict[str, tuple[str, str]] = {
    "deep": (
        "deepspeed: " + "{a: " * 300 + "1" + "}" * 300,
        f"deepspeed: lists or mappings are nested more than {MOST_LEVELS}",
    ),
    "deep list": ("lora_target: " + "[" * 300 + "]" * 300, "lora_target: lists or mappings are nested more than"),
    "long number": ("seed: " + "9" * 5000, "seed: the number has too many digits"),
    "interpolation": ('run_name: "${"', "run_name: '${' begins an interpolation that cannot be read"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_read(name: str, config: Config, project: Path, capsys) -> None:
    line, told = FILES[name]
    (project / "run.yaml").write_text(
        json.dumps(config())[:-1] + ",\n" + line.replace(":", '":', 1).join(['"', ""]) + "}"
    )
    assert main(["plan", "run.yaml"]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("dynamic.selector=???", "dynamic.selector: '???' stands for a value that is still to be given"),
        ("seed=" + "9" * 5000, "seed: the number has too many digits"),
        ("run_name=${", "'${' begins an interpolation that cannot be read"),
    ],
)
def test_overrides_that_cannot_be_read(override: str, told: str, config: Config, project: Path, capsys) -> None:
    (project / "run.yaml").write_text(json.dumps(config()))
    assert main(["plan", "run.yaml", override]) == 2
    assert told in capsys.readouterr().err


def test_save_strategy_no_on_the_command_line(config: Config, project: Path) -> None:
    (project / "run.yaml").write_text(json.dumps(config()))
    assert main(["plan", "run.yaml", "save_strategy=no", "eval_strategy=no"]) == 0


def test_schedules_take_what_transformers_gives_them() -> None:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    given = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
    for name, function in TYPE_TO_SCHEDULER_FUNCTION.items():
        if name in args_module._SCHEDULE_KEYS:
            assert set(args_module._SCHEDULE_KEYS[name]) == set(inspect.signature(function).parameters) - set(given), (
                name
            )


@pytest.mark.parametrize(
    ("target", "told"), [("q_porj", "'q_porj'; did you mean 'q_proj'?"), ("q_proj", ""), ("all", "")]
)
def test_layers_of_adapters_are_those_of_the_model(
    target: str, told: str, config: Config, project: Path, tmp_path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    lf = LlamaFactoryArgs.read({"model_name_or_path": str(tmp_path), "finetuning_type": "lora", "lora_target": target})
    found = [each for each in model_problems(lf) if each.startswith("lora_target")]
    assert [f"lora_target: the model has no layer {told}"] == found if told else not found


def test_table_is_of_the_newest_version() -> None:
    """An older one has its keys read from its source."""
    stored = json.loads(FILE.read_text(encoding="utf-8"))
    newest = {package: version for package, (_, version) in TESTED.items()}
    assert stored["versions"] == newest, "run: python -m dataflex.config.table"
    assert all(Version(installed()[name]) <= Version(newest[name]) for name in newest)
    assert dict(table()) == read_source(), "run: python -m dataflex.config.table"


def test_a_version_without_a_table_is_read_from_its_source(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(table_module, "FILE", tmp_path / "none.json")
    found = table.__wrapped__()
    assert found["lora_rank"].types == ("int",)
    assert found["save_strategy"].choices == ("no", "steps", "epoch", "best")


def test_attributes_have_llamafactorys_defaults_and_no_others() -> None:
    read = LlamaFactoryArgs.read({"lora_rank": "x", "cutoff_len": None, "max_steps": 7})
    usual = {key: entry.default for key, entry in table().items()}
    assert {key: getattr(read, key) for key in usual} == {**usual, "max_steps": 7}
    assert list(read.problems) == ["lora_rank"]
    with pytest.raises(AttributeError, match="no key 'max_stepz'"):
        read.max_stepz  # noqa: B018


@pytest.mark.slow
def test_table_is_what_llamafactory_parses() -> None:
    from llamafactory.data.template import TEMPLATES
    from llamafactory.hparams import data_args, finetuning_args, generating_args, model_args, training_args

    classes = (
        model_args.ModelArguments,
        data_args.DataArguments,
        finetuning_args.FinetuningArguments,
        generating_args.GeneratingArguments,
        training_args.TrainingArguments,
    )
    parsed = {field.name: field for cls in classes for field in dataclasses.fields(cls) if field.init}
    assert set(parsed) == set(table())
    told = {name: key.default for name, key in table().items() if key.default is not None}
    assert told == {name: parsed[name].default for name in told}
    assert set(table()["template"].choices or ()) == set(TEMPLATES)


@pytest.mark.parametrize("way", ["mapping", "JSON", "file", "base64"])
def test_what_partitions_is_read_however_it_is_written(way: str, config: Config, project: Path) -> None:
    text = '{"zero_optimization": {"stage": 3}}'
    (project / "ds.json").write_text(text)
    given = {"mapping": json.loads(text), "JSON": text, "file": str(project / "ds.json")}
    lf = LlamaFactoryArgs.read({"deepspeed": given.get(way) or base64.urlsafe_b64encode(text.encode()).decode()})
    assert (partitioned_by(lf), lf.doubts) == (ZERO3, ())
