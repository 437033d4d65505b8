"""Fixtures shared by all tests: offline, a working directory of its own, a tiny model, ragged rows in three domains."""

from __future__ import annotations

import os

# A number of threads decides last bits. Processes that tests start inherit this one, so that bytes can be compared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import json
import random
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from tests.distributed.ranks import two_ranks  # noqa: F401 (a fixture: one job of two ranks serves all folders)

settings.register_profile("quick", max_examples=20, deadline=None)
settings.register_profile("full", deadline=None)  # how long an example takes is up to the machine
settings.load_profile("full")

WORDS = (
    "the cat sat on a mat and saw two red balls near one big tree while three old dogs ran to see "
    "sum of four plus five is nine times seven less eight so we add then divide by ten print return "
    "def class for in range if else import list map set open close file line code loop"
).split()


_MODULES = 200  # this many new ones, and what they hold is taken out of the garbage collector's sight again
_settled = 0

gc.disable()  # until everything is imported


def settle():
    """Spare the garbage collector what is imported: every run collects twice, which would take as long as its steps."""
    global _settled
    if len(sys.modules) > _settled + _MODULES:
        gc.collect()
        gc.freeze()
        _settled = len(sys.modules)


def pytest_collection_finish():
    settle()
    gc.enable()


_TRAINING = {"run", "configure", "scoring", "two_ranks"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what trains, and put it first: where files go to several processes, short ones at the end fill the gaps."""
    for item in items:
        if _TRAINING & set(getattr(item, "fixturenames", ())):
            item.add_marker("trains")
    longest_first = ("gloo", "trains", "slow")
    rank = {}
    for item in items:
        own = next((i for i, mark in enumerate(longest_first) if item.get_closest_marker(mark)), len(longest_first))
        rank[item.path] = min(rank.get(item.path, own), own)
    items.sort(key=lambda item: rank[item.path])


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    settle()
    monkeypatch.chdir(tmp_path)
    for key in ("FORCE_TORCHRUN", "USE_RAY", "NPROC_PER_NODE", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)


@pytest.fixture
def unsorted(monkeypatch):
    """Make folders listed in an order that is not that of the names: the last name first, the others ascending."""
    listed = os.listdir

    def last_first(*args):
        names = sorted(listed(*args))
        return [*names[-1:], *names[:-1]]

    monkeypatch.setattr(os, "listdir", last_first)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random 2-layer Llama with attention dropout-free defaults and a word tokenizer, built in code."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<pad>", *sorted(set(WORDS))])}
    for token in ("Human", "Assistant", ":", ".", "?", "#"):
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        attention_dropout=0.0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tied(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with one matrix at both ends, of which LLaMA-Factory v1 alone fails to load a checkpoint."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("tiny-tied")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny_model, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_moe(tiny_model, tmp_path_factory) -> Path:
    """A random mixture of four experts with the tiny model's tokenizer."""
    import shutil

    import torch
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("tiny-moe")
    for file in tiny_model.iterdir():
        if "token" in file.name:
            shutil.copy(file, folder)
    torch.manual_seed(1)
    config = MixtralConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(tiny_model)),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def sentence(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """64 ragged rows in 3 domains (one tiny), text, preference and target rows, registered for LLaMA-Factory."""
    rng = random.Random(1)
    folder = tmp_path_factory.mktemp("data")
    info: dict[str, dict] = {}

    def write(name, rows, **entry):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        info[name] = {"file_name": f"{name}.jsonl", **entry}

    def instruction(source, weight):
        return {
            "instruction": sentence(rng, 2, 9),
            "input": "",
            "output": sentence(rng, 1, 12),
            "source": source,
            "sample_weight": weight,
        }

    for name, count in (("alpha", 40), ("beta", 21), ("gamma", 3)):
        write(name, [instruction(f"{name}{i % 2}", round(rng.uniform(0.0, 2.0), 3)) for i in range(count)])
    write("ones", [{**instruction("one", 1.0)} for _ in range(37)])
    write("goal", [instruction("goal", 1.0) for _ in range(5)])
    write("held", [instruction("held", 1.0) for _ in range(7)])
    write("text", [{"text": sentence(rng, 5, 40)} for _ in range(60)], columns={"prompt": "text"})
    weighted = [{"text": sentence(rng, 5, 40), "sample_weight": rng.uniform(0, 2)} for _ in range(30)]
    write("weighted_text", weighted, columns={"prompt": "text"})
    pairs = [
        {
            "conversations": [{"from": "human", "value": sentence(rng, 2, 9)}],
            "chosen": {"from": "gpt", "value": sentence(rng, 1, 9)},
            "rejected": {"from": "gpt", "value": sentence(rng, 1, 9)},
        }
        for _ in range(24)
    ]
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    write("pairs", pairs[:16], formatting="sharegpt", ranking=True, columns=columns)
    write("pairs2", pairs[16:], formatting="sharegpt", ranking=True, columns=columns)
    tagged = [
        {
            "messages": [
                {"role": "user", "content": sentence(rng, 2, 9)},
                {"role": "assistant", "content": sentence(rng, 1, 9)},
            ],
            "label": bool(i % 2),
        }
        for i in range(24)
    ]
    entry = {
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "kto_tag": "label"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    write("tagged", tagged[:16], **entry)
    write("tagged2", tagged[16:], **entry)
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder
