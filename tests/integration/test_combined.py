"""Selectors, mixers, orderers and weighters together, over cadences, packing and streaming: accepted ones train."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.random_configurations import accepted, trained

CHOICES: dict[str, dict[str, Any]] = {
    "selector": {
        "none": None,
        "loss": {"name": "loss"},
        "greats": {"name": "greats", "targets": ["goal"]},
        "loss, own pace": {"name": "loss", "every": 2, "warmup_steps": 1},
    },
    "mixer": {"none": None, "odm": {"name": "odm"}, "odm, own pace": {"name": "odm", "every": 1}},
    "orderer": {
        "none": None,
        "by length": {"name": "zigzag", "by": "length"},
        "by loss, own pace": {"name": "saw", "by": "loss", "every": 1},
        "by scores": {"name": "segment", "by": "selector"},
        "paced": {"name": "pacing", "by": "random", "full_at": 3},
    },
    "weighter": {
        "none": None,
        "in the batch": {"name": "loss", "warmup_steps": 1},
        "towards targets": {"name": "adapt", "targets": ["goal"], "refresh_steps": 2},
        "two": ["focal", {"name": "column"}],
    },
    "rows": {
        "plain": {},
        "packed": {"packing": True, "neat_packing": True},
        "streamed": {"streaming": True},
        "two data sets": {"dataset": "alpha,beta"},
    },
}


def combinations(model: Path, data: Path) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield the names of what is chosen and the configuration of every combination."""
    for names in itertools.product(*CHOICES.values()):
        chosen = {kind: CHOICES[kind][name] for kind, name in zip(CHOICES, names, strict=True)}
        rows, block = chosen.pop("rows"), {kind: method for kind, method in chosen.items() if method is not None}
        within = "greats" in names
        block |= {"candidate_batches": 2} if within else {}
        block |= {"keep_ratio": 0.6} if {"selector", "mixer"} <= block.keys() and not within else {}
        block |= {"repeat": True} if "selector" in block and not within else {}
        decides = [block[kind] for kind in ("selector", "mixer") if kind in block]
        decides += [block["orderer"]] if names[2] == "by loss, own pace" else []
        if not all("every" in method for method in decides):
            block["interval_steps"] = 1 if within else 2
        yield (
            names,
            {
                "model_name_or_path": str(model),
                "stage": "sft",
                "do_train": True,
                "finetuning_type": "full",
                "dataset_dir": str(data),
                "dataset": "alpha,beta" if "mixer" in block else "alpha",
                "template": "default",
                "cutoff_len": 64,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "max_steps": 3,
                "save_strategy": "no",
                "report_to": "none",
                "optim": "adamw_torch",
                "overwrite_cache": True,  # neat_packing changes how later runs of a process write theirs
                **rows,
                **({"dynamic": block} if block else {}),
            },
        )


@pytest.mark.slow
def test_pairs_that_are_accepted_train(tiny_model: Path, data_dir: Path, tmp_path: Path) -> None:
    """Combinations in random order, each with two choices that were not yet seen together; plan is asked 200 times."""
    shown: set[frozenset[tuple[int, str]]] = set()
    tried = list(combinations(tiny_model, data_dir))
    random.Random(14).shuffle(tried)
    new = (each for each in tried if not pairs_of(each[0]) <= shown)
    for number, (names, mapping) in enumerate(itertools.islice(new, 200)):
        folder = tmp_path / str(number)
        folder.mkdir()
        if accepted(mapping, folder):
            shown |= pairs_of(names)
            assert trained(folder) == "", (names, mapping)
    assert {(kind, name) for kind, names in enumerate(CHOICES.values()) for name in names} == set().union(*shown)


def pairs_of(names: tuple[str, ...]) -> set[frozenset[tuple[int, str]]]:
    """Return every two choices of a combination."""
    return {frozenset(pair) for pair in itertools.combinations(enumerate(names), 2)}
