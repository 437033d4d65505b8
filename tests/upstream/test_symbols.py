"""Every LLaMA-Factory, transformers, accelerate and datasets symbol that we rely on, with the shape we rely on.

An upgrade that breaks one of them fails here first, and names it.
"""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

METHODS = {
    "get_train_dataloader": ["self"],
    "get_eval_dataloader": ["self", "eval_dataset"],
    "set_initial_training_values": ["self", "args", "dataloader"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_init_training_state": [
        "self",
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ],
    "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
    "_get_num_items_in_batch": ["self", "batch_samples", "device"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "compute_loss_context_manager": ["self"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_save_rng_state": ["self", "output_dir"],
    "save_model": ["self", "output_dir", "_internal_call"],
    "_get_output_dir": ["self", "trial"],
    "_finalize_training": ["self", "trial", "num_train_samples", "start_time"],
    "add_callback": ["self", "callback"],
    "log": ["self", "logs", "start_time"],
    "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
    "predict": ["self", "test_dataset", "ignore_keys", "metric_key_prefix"],
    "train": ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_prepare_for_training": ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
    "get_tp_size": ["self"],
    "get_cp_size": ["self"],
    "get_sp_size": ["self"],
    "is_world_process_zero": ["self"],
}


@pytest.mark.parametrize("name", METHODS)
def test_trainer_methods(name):
    from transformers import Trainer

    assert list(inspect.signature(getattr(Trainer, name)).parameters) == METHODS[name]


def test_the_trainer_draws_batches_after_the_update():
    """The seam: all micro-batches of a step are asked for at once, before the first forward pass of the step."""
    from transformers import Trainer

    source = inspect.getsource(Trainer._run_epoch)
    assert source.index("self.get_batch_samples(") < source.index("self.training_step(")
    assert "skip_first_batches" in source
    assert "current_gradient_accumulation_steps" in source


def test_the_trainer_state_is_written_after_the_random_states():
    from transformers import Trainer

    source = inspect.getsource(Trainer._save_checkpoint)
    order = [source.index(part) for part in ("self._save_rng_state(", "save_to_json(", "rotate_checkpoints(")]
    assert order == sorted(order)


def test_a_save_ends_with_the_callbacks_and_older_checkpoints_can_be_removed_later():
    from transformers import Trainer
    from transformers.trainer_utils import rotate_checkpoints

    source = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert source.index("self._save_checkpoint(") < source.index("callback_handler.on_save(")
    assert "save_total_limit=self.args.save_total_limit" in inspect.getsource(Trainer._save_checkpoint)
    parameters = list(inspect.signature(rotate_checkpoints).parameters)
    assert parameters[:4] == ["output_dir", "save_total_limit", "best_model_checkpoint", "use_mtime"]


def test_sums_between_logs_are_the_trainers():
    """They are set to zero before the first batches are asked for, and what is logged is their mean over ranks."""
    from transformers import Trainer

    loop = inspect.getsource(Trainer._inner_training_loop)
    for name in ("self._tr_loss = ", "self._total_loss_scalar = ", "self._globalstep_last_logged = "):
        assert loop.index(name) < loop.index("self._run_epoch("), name
    told = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert "nested_gather(tr_loss, self.args.parallel_mode).mean()" in told


def test_custom_losses_are_not_divided_by_accumulation():
    from transformers import Trainer

    step, loss = inspect.getsource(Trainer.training_step), inspect.getsource(Trainer.compute_loss)
    assert "self.compute_loss_func is None" in step
    assert "loss *= self.accelerator.num_processes" in loss


def test_trainer_classes_and_data_loading():
    from dataflex.llamafactory.swap import TRAINERS

    for stage, (caller, holder, name) in TRAINERS.items():
        workflow, home = importlib.import_module(caller), importlib.import_module(holder)
        assert inspect.isclass(getattr(home, name)), stage
        assert list(inspect.signature(workflow.get_dataset).parameters) == [
            "template",
            "model_args",
            "data_args",
            "training_args",
            "stage",
            "tokenizer",
            "processor",
        ], stage
        source = inspect.getsource(workflow)
        assert "load_tokenizer(model_args)" in source, stage
        assert "load_model(tokenizer, model_args, " in source, stage


def test_names_of_what_a_finished_run_leaves():
    from llamafactory.extras.constants import CHECKPOINT_NAMES

    from dataflex.run import WEIGHTS

    assert WEIGHTS == CHECKPOINT_NAMES


def test_tuner():
    from llamafactory.train import tuner

    assert list(inspect.signature(tuner.run_exp).parameters) == ["args", "callbacks"]
    assert list(inspect.signature(tuner._training_function).parameters) == ["config"]
    assert list(inspect.signature(tuner.Worker._training_function).parameters) == ["self", "config"]
    assert "early_stopping_threshold" in inspect.signature(tuner.EarlyStoppingCallback).parameters
    assert "early_stopping_patience_counter" in tuner.EarlyStoppingCallback().state()["attributes"]


def test_raw_data_are_seen_before_alignment():
    from llamafactory.data import loader

    parameters = list(inspect.signature(loader.align_dataset).parameters)
    assert parameters == ["dataset", "dataset_attr", "data_args", "training_args"]
    assert "return align_dataset(dataset," in inspect.getsource(loader._load_single_dataset)
    source = inspect.getsource(loader._get_merged_dataset)
    assert "] = _load_single_dataset(dataset_attr," in source
    assert "get_dataset_list(dataset_names, data_args.dataset_dir)" in source


def test_packing_takes_a_token_from_the_cutoff_where_it_is_asked_for():
    from llamafactory.hparams import DataArguments

    assert DataArguments(cutoff_len=64, packing=True).cutoff_len == 63
    assert DataArguments(cutoff_len=64, neat_packing=True).cutoff_len == 63
    assert DataArguments(cutoff_len=64).cutoff_len == 64


def test_predictions_are_saved_beside_the_rows_that_they_are_of():
    from llamafactory.train.rm.trainer import PairwiseTrainer
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

    assert list(inspect.signature(CustomSeq2SeqTrainer.save_predictions).parameters)[1] == "dataset"
    assert list(inspect.signature(PairwiseTrainer.save_predictions).parameters) == ["self", "predict_results"]


def test_launcher_conditions(monkeypatch):
    """Our launcher, which does without importing these, decides by the same devices and variables."""
    from llamafactory.extras import misc

    from dataflex.config.args import env_enabled
    from dataflex.llamafactory.launch import device_count

    assert device_count() == misc.get_device_count()
    for value in ("1", "y", "True", "yes", "0", ""):
        for name, theirs in (("USE_RAY", misc.use_ray), ("USE_KT", misc.use_kt)):
            monkeypatch.setenv(name, value)
            assert env_enabled(name) == theirs()
    assert env_enabled("UNSET", "1") == misc.is_env_enabled("UNSET", "1")


def test_collators():
    from llamafactory.data import KTODataCollatorWithPadding, PairwiseDataCollatorWithPadding
    from llamafactory.data.collator import MultiModalDataCollatorForSeq2Seq

    assert issubclass(PairwiseDataCollatorWithPadding, MultiModalDataCollatorForSeq2Seq)
    assert issubclass(KTODataCollatorWithPadding, MultiModalDataCollatorForSeq2Seq)


def test_data_arguments():
    from llamafactory.hparams import DataArguments

    arguments = DataArguments(dataset="a, b")
    assert arguments.dataset == ["a", "b"]
    for name in ("eval_dataset", "val_size", "packing", "neat_packing", "tokenized_path", "max_samples"):
        assert hasattr(arguments, name), name


def test_splitting_depends_on_length_and_seed_only():
    import numpy as np
    from datasets import Dataset

    rows = np.arange(23)
    numbers = Dataset.from_dict({"row": rows}).train_test_split(test_size=0.2, seed=3)["train"]["row"]
    words = Dataset.from_dict({"word": [f"w{i}" for i in rows]}).train_test_split(test_size=0.2, seed=3)["train"]
    assert [f"w{i}" for i in numbers] == list(words["word"])


def test_a_second_model_can_be_loaded_whole_under_zero3_and_fsdp(monkeypatch):
    """``signals.other_models`` unsets what makes ``from_pretrained`` partition, for the time of the call."""
    import os

    from transformers.integrations import deepspeed, fsdp

    from dataflex.signals.other_models import loading_whole

    class Zero3:
        def is_zero3(self):
            return True

    config = Zero3()
    deepspeed.set_hf_deepspeed_config(config)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert "FSDP_CPU_RAM_EFFICIENT_LOADING" in inspect.getsource(fsdp.is_fsdp_enabled)
    try:
        assert deepspeed.is_deepspeed_zero3_enabled()
        with loading_whole():
            assert not deepspeed.is_deepspeed_zero3_enabled()
            assert "FSDP_CPU_RAM_EFFICIENT_LOADING" not in os.environ
        assert deepspeed.is_deepspeed_zero3_enabled()
        assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_rows_without_an_answer_are_left_out_by_these_rules():
    """``llamafactory.datasets`` follows rows back to their files, and knows which ones the processors drop."""
    from llamafactory.data.processor import feedback, pairwise, pretrain, supervised

    prompt = 'len(examples["_prompt"][i]) % 2 != 1'
    for processor, answers in (
        (supervised.SupervisedDatasetProcessor, "!= 1"),
        (pairwise.PairwiseDatasetProcessor, "< 2"),
        (feedback.FeedbackDatasetProcessor, "< 2"),
    ):
        source = inspect.getsource(processor.preprocess_dataset)
        assert source.count("continue") == 1
        assert f'if {prompt} or len(examples["_response"][i]) {answers}:' in source
    source = inspect.getsource(pretrain.PretrainDatasetProcessor.preprocess_dataset)
    assert "continue" not in source
    assert "self.tokenizer(text_examples, add_special_tokens=False)" in source  # all documents of a group in one call


def test_create_optimizer_needs_nothing():
    from transformers import Trainer

    required = [
        parameter
        for parameter in inspect.signature(Trainer.create_optimizer).parameters.values()
        if parameter.default is inspect.Parameter.empty
    ]
    assert [parameter.name for parameter in required] == ["self"]


def test_weights_of_turns_follow_conversions_and_encodings():
    from llamafactory.data import converter, loader
    from llamafactory.data.processor import PackedSupervisedDatasetProcessor, SupervisedDatasetProcessor
    from llamafactory.data.template import Template

    assert list(inspect.signature(converter.get_dataset_converter).parameters) == ["name", "dataset_attr", "data_args"]
    assert "get_dataset_converter(" in inspect.getsource(converter.align_dataset)
    assert "_get_dataset_processor(" in inspect.getsource(loader._get_preprocessed_dataset)
    assert "self.template.encode_multiturn(" in inspect.getsource(SupervisedDatasetProcessor._encode_data_example)
    for cls in (SupervisedDatasetProcessor, PackedSupervisedDatasetProcessor):
        source = inspect.getsource(cls.preprocess_dataset)
        assert source.count("self._encode_data_example(") == 1
        assert '                prompt=examples["_prompt"][i]' in source  # given by name, as it is
    assert "list[tuple[list[int], list[int]]]" in inspect.getsource(Template.encode_multiturn)


def test_trackers_look_up_how_numbers_are_named():
    from transformers.integrations import integration_utils as trackers
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    assert list(inspect.signature(trackers.rewrite_logs).parameters) == ["d"]
    for name in ("TensorBoardCallback", "WandbCallback", "SwanLabCallback", "TrackioCallback"):
        assert "rewrite_logs(logs)" in inspect.getsource(getattr(trackers, name).on_log).replace("non_scalar_", "")
    for callback in (PrinterCallback, ProgressCallback):
        assert list(inspect.signature(callback.on_log).parameters) == "self args state control logs kwargs".split()


def test_the_trainer_of_v1_goes_through_batches_in_this_order():
    """The seams of LLaMA-Factory v1: what is looked up where, and when a step's batches are gone through."""
    from llamafactory.v1.core import base_trainer
    from llamafactory.v1.core.utils import checkpoint
    from llamafactory.v1.trainers import rm_trainer, sft_trainer

    source = inspect.getsource(base_trainer.BaseTrainer.fit)
    steps = [
        "while self.global_step < self.num_training_steps",
        "self.train_batch_generator.set_epoch(",
        "for micro_batches in self.train_batch_generator",
        "compute_valid_tokens(micro_batches)",
        "for i, micro_batch in enumerate(micro_batches)",
        "self.compute_loss(micro_batch)",
        "loss * mini_step_valid_tokens * self.dp_size / (step_valid_tokens + 1e-6)",
        "loss.backward()",
        "clip_grad_norm_(",
        "self.optimizer.step()",
        "self.callback_handler.on_step_end(",
        "self.callback_handler.on_log(",
        "self._checkpoint.save(epoch)",
    ]
    places = [source.index(step) for step in steps]
    assert places == sorted(places)
    made = inspect.getsource(base_trainer.BaseTrainer)
    for call in ("BatchGenerator(", "TrainingCheckpointCoordinator(self)", "self._checkpoint.resume("):
        assert call in made
    assert "SFTTrainer(" in inspect.getsource(sft_trainer.run_sft)
    assert "RMTrainer(" in inspect.getsource(rm_trainer.run_rm)
    read = inspect.getsource(rm_trainer.RMTrainer.compute_loss)
    assert set(re.findall(r"batch(?:\.get\(|\[)\"(\w+)", read)) == {"input_ids", "token_type_ids"}
    saved = inspect.getsource(checkpoint.TrainingCheckpointCoordinator.save)
    for name in ("mark_checkpoint_complete(", "save_total_limit", 'f"checkpoint-{self._t.global_step}"'):
        assert name in saved
    for name in ("resolve_resume_checkpoint_path", "rotate_checkpoints", "mark_checkpoint_complete"):
        assert callable(getattr(checkpoint, name))


def test_the_data_engine_of_v1():
    from llamafactory.v1.core.data_engine import DataEngine
    from llamafactory.v1.core.utils.rendering import Renderer

    assert list(inspect.signature(DataEngine._convert_data_sample).parameters) == ["self", "raw_sample", "dataset_name"]
    assert list(inspect.signature(Renderer.process_samples).parameters) == ["self", "samples"]
    for name in ("self.datasets", "self.data_index", "self.dataset_infos"):
        assert name in inspect.getsource(DataEngine.__init__)
