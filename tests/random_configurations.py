"""Random configurations, half of them mutated, for 'what plan accepts, trains'.

``python -m benchmarks.soak.fuzz`` tries many; tests try a few. Model and data are folders as the fixtures
``tiny_model`` and ``data_dir`` make them.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["accepted", "configurations", "trained"]

_SELECTORS: tuple[Any, ...] = (
    *[None] * 8,
    "random",
    "random_balanced",
    "all",
    "loss",
    {"name": "loss", "focus": "high"},
    "delta_loss",
    "longest",
    "grad_norm",
    "el2n",
    {"name": "ifd", "min_answer_tokens": 1},
    {"name": "s2l", "clusters": 3},
    {"name": "coincide", "clusters": 3},
    {"name": "rho_loss", "reference": "MODEL"},
    {"name": "less", "targets": ["goal"], "precondition": "none"},
    {"name": "less", "targets": ["goal", "held"]},
    *[{"name": name, "targets": ["goal"]} for name in ("rds_plus", "near", "tsds", "bm25", "dsir", "icons")],
    {"name": "cluster_less", "targets": ["goal"], "clusters": 4},
    {"name": "tacs", "targets": ["goal"], "learning_rate": 0.01},
    {"name": "zeroth", "targets": ["goal"], "directions": 2},
    {"represent": "rds_plus", "aggregate": "round_robin", "rule": "knn_kde", "targets": ["goal"]},
)
_EACH_STEP: tuple[Any, ...] = (
    {"name": "greats", "targets": ["goal"], "target_rows": 2},
    {"name": "opus", "targets": ["goal"], "target_rows": 2},
    "uds",
)
"""Selectors that choose among the candidates of one step."""
_MIXERS: tuple[Any, ...] = (
    *[None] * 8,
    "uniform",
    "size",
    {"name": "temperature", "tau": 2.0},
    {"name": "static", "proportions": {"alpha": 0.5, "beta": 0.5}},
    {"name": "unimax", "max_epochs": 1.0},
    {"name": "staged", "stages": [{"start_step": 0, "proportions": [1, 0]}, {"start_step": 2, "proportions": [1, 2]}]},
    "odm",
    "random",
    {"name": "sheared", "targets": ["goal", "held"], "target_losses": {"alpha": 3.0, "beta": 2.0}},
    {"name": "velocity", "targets": ["goal", "held"], "target_losses": {"alpha": 3.0, "beta": 2.0}},
    {"name": "skill_it", "targets": ["goal", "held"], "graph": [[1.0, 0.5], [0.0, 1.0]]},
    {"name": "aioli", "targets": ["goal", "held"], "sweeps": 1, "hold": 1},
    {"name": "pike", "rows_per_domain": 2},
    {"name": "doge", "rows_per_domain": 2},
    {"name": "dga", "targets": ["goal"], "rows_per_domain": 2},
    "group_dro",
)
_ORDERERS: tuple[Any, ...] = (
    {"name": "sorting", "by": "length"},
    {"name": "saw", "by": "loss", "descending": True},
    {"name": "segment", "by": "selector", "jitter": 3},
    {"name": "zigzag", "by": {"name": "column", "column": "sample_weight"}},
    {"name": "pacing", "by": "random"},
    "shuffle",
)
_WEIGHTERS: tuple[Any, ...] = (
    *[None] * 8,
    {"name": "loss", "warmup_steps": 0},
    "focal",
    "token",
    {"name": "column", "column": "sample_weight"},
    ["focal", {"name": "column", "column": "sample_weight"}],
    {"name": "rho", "reference": "MODEL"},
    {"name": "slm", "reference": "MODEL", "keep": 0.6},
    {"name": "meta", "targets": ["goal"]},
    {"name": "adapt", "targets": ["goal"], "refresh_steps": 2},
    {"name": "joint_update_aware", "targets": ["goal"]},
    {"name": "presence", "group_rows": 2},
    {"name": "group", "strategy": "class_balanced"},
    {"name": "group", "strategy": "group_dro"},
)
_ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    0.5,
    1e30,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "abc",
    "no",
    "auto",
    "1e-4",
    "???",
    "a\0b",
    "x" * 300,
    "(",
    "alpha",
    [],
    [1],
    ["goal"],
    {},
    {"a": 1},
    {"name": "loss"},
    [[[[]]]],
    "\u2028\ud800",
)
_STRANGE_KEYS = (
    "lora_rnak",
    "templat",
    "",
    "a.b",
    "dynamic.selector",
    "0",
    "selector",
    "warmup_step",
    "component_name",
)


def configurations(seed: int, count: int, model: Path, data: Path) -> Iterator[dict[str, Any]]:
    """Yield configurations of the tiny model; every second one has one to three mutations."""
    for number in range(count):
        rng = random.Random(f"{seed}.{number}")
        mapping = copy.deepcopy(_sound(rng, model, data))  # what is mutated is nobody else's
        for _ in range(rng.randint(1, 3) if number % 2 else 0):
            _mutate(rng, mapping)
        yield mapping


def _datasets(rng: random.Random, pretraining: bool, *, several: bool) -> str:
    if pretraining and not several:
        return "text"
    return "alpha,beta" if several or rng.random() < 0.5 else "alpha"


def _paced(rng: random.Random, method: Any, paces: tuple[int, ...] = (1, 2, 3)) -> Any:
    """Give some methods a cadence of their own."""
    if method is None or rng.random() < 0.8:
        return method
    method = {"name": method} if isinstance(method, str) else dict(method)
    return method | rng.choice([{"every": rng.choice(paces)}, {"warmup_steps": 1}, {"every": 2, "warmup_steps": 1}])


def _sound(rng: random.Random, model: Path, data: Path) -> dict[str, Any]:
    def some(share: float, **keys: Any) -> dict[str, Any]:
        return keys if rng.random() < share else {}

    selector, mixer, weighter = (copy.deepcopy(rng.choice(each)) for each in (_SELECTORS, _MIXERS, _WEIGHTERS))
    each_step = selector is None and mixer is None and rng.random() < 0.2
    dynamic: dict[str, Any] = {
        "selector": rng.choice(_EACH_STEP) if each_step else _paced(rng, selector),
        "mixer": _paced(rng, mixer),
        "weighter": weighter,
        "interval_steps": 1 if each_step else rng.choice([1, 2]),
        **(dict(candidate_batches=2) if each_step else {}),
        **some(0.3, warmup_steps=1),
        **some(0.5 if selector else 0, repeat=True),
        **some(1.0 if selector and mixer else 0.2 if selector and selector != "all" else 0, keep_ratio=0.5),
        **some(0.2 if selector and not mixer else 0, exclude_seen=True),
        **some(0.2, signals=rng.choice([{"pool_fraction": 0.5}, {"max_age_steps": 2}, {"store": "signals"}])),
        **some(0.1, signals={"budget": 2.0}),
        **some(0.1, seed=3),
        **some(0.2, orderer=_paced(rng, rng.choice(_ORDERERS))),
        **some(0.1, average_weights={"last_steps": rng.choice([2, 3])}),
        **some(0.1, ledger={"targets": ["goal"], "refresh_steps": 2, "target_rows": 2}),
    }
    for method in dynamic.values():
        if isinstance(method, dict) and "reference" in method:
            method["reference"] = str(model)
    pretraining = rng.random() < 0.1
    return {
        "model_name_or_path": str(model),
        "stage": "pt" if pretraining else "sft",
        "do_train": True,
        "finetuning_type": rng.choice(["full", "lora"]),
        "dataset_dir": str(data),
        "dataset": _datasets(rng, pretraining, several=mixer is not None),
        "template": rng.choice(["default", "alpaca", "empty"]),
        "cutoff_len": rng.choice([32, 64]),
        "per_device_train_batch_size": rng.choice([1, 2]),
        "gradient_accumulation_steps": rng.choice([1, 2]),
        "learning_rate": rng.choice([1e-3, 1e-5]),
        "lr_scheduler_type": rng.choice(["linear", "cosine", "constant", "inverse_sqrt"]),
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": rng.choice(["no", False, "steps"]),
        "report_to": "none",
        "overwrite_output_dir": True,
        **some(0.2, optim=rng.choice(["adamw_torch", "sgd", "adafactor"])),
        **some(0.2, warmup_steps=rng.choice([1, 0.5])),
        **some(0.2, weight_decay=0.1),
        **some(0.15, val_size=0.2, eval_strategy="steps", eval_steps=2),
        **some(0.1, eval_dataset="held", do_eval=True),
        **some(0.1, packing=True, neat_packing=rng.random() < 0.5),
        **some(0.1, streaming=True),
        **some(0.1, max_samples=20),
        **some(0.1, dataloader_num_workers=1),
        **some(0.1, disable_shuffling=True),
        **some(0.1, lora_rank=4, lora_target=rng.choice(["all", ["q_proj"], "q_proj,v_proj"])),
        **some(0.1, label_smoothing_factor=0.1),
        **some(0.1, gradient_checkpointing=True),
        **some(0.1, dataloader_drop_last=True),
        **some(0.1, bf16=True, use_cpu=True),
        "dynamic": {key: value for key, value in dynamic.items() if value is not None},
    }


def _mutate(rng: random.Random, mapping: dict[str, Any]) -> None:
    places = [place for place in _places(mapping) if place[1] not in ("model_name_or_path", "overwrite_output_dir")]
    block, key = rng.choice(places)
    kind = rng.choice(["value", "value", "value", "gone", "misspelt", "more"])
    if kind == "value" or isinstance(block, list):
        block[key] = copy.deepcopy(rng.choice(_ODD))
    elif kind == "gone":
        del block[key]
    elif kind == "misspelt":
        cut = rng.randrange(len(key)) if key else 0
        block[key[:cut] + key[cut + 1 :]] = block.pop(key)
    else:
        block[rng.choice(_STRANGE_KEYS)] = copy.deepcopy(rng.choice(_ODD))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


def accepted(mapping: dict[str, Any], folder: Path) -> bool:
    """Whether ``plan`` accepts a configuration, told in ``plan.txt``; whatever it raises comes through."""
    from dataflex.cli import main

    file = folder / "run.json"
    file.write_text(json.dumps({"output_dir": str(folder / "out"), **mapping}))
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = main(["plan", str(file)])
    (folder / "plan.txt").write_text(told.getvalue(), errors="backslashreplace")
    assert code in (0, 2), told.getvalue()
    assert code == 0 or all(line.startswith("dataflex: ") for line in told.getvalue().splitlines()), told.getvalue()
    return code == 0


def trained(folder: Path) -> str:
    """Train the configuration that was accepted last, in this process; return what was told, or the trace."""
    from dataflex.errors import DataFlexError
    from dataflex.run import train_here

    try:
        train_here([str(folder / "run.json")])
    except DataFlexError as error:
        return f"refused while training: {error}"
    except Exception:  # noqa: BLE001
        return traceback.format_exc()
    return ""
