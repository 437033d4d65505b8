"""The environments of the systems, the rows they are given, and their configurations."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "runs/vs_peers"
MODEL = ROOT / "examples/models/base-4m"
PACKAGES = {
    "peer": ["--no-deps", "dataflex==1.1.0", "traker==0.3.2"],  # its pins want an older torch
    "trak": ["traker==0.3.2"],
    "kronfluence": ["kronfluence==1.0.1"],
    "dattri": ["dattri==0.3.0"],
    "bergson": ["bergson==2.5.1"],
}


def python_of(system: str) -> Path:
    """Return the interpreter of a system, in an environment that is made if it is not there.

    Each lies over our own environment: the same torch, transformers and LLaMA-Factory, and what a system brings itself
    hides ours.
    """
    system = system.partition("_fp")[0]
    if system not in PACKAGES:
        return Path(sys.executable)
    folder = HOME / "environments" / system
    stamp, python = folder / "installed.json", folder / "bin/python"
    if not stamp.is_file() or json.loads(stamp.read_text(encoding="utf-8")) != PACKAGES[system]:
        venv.create(folder, clear=True, symlinks=True)
        below = next(folder.glob("lib/python*/site-packages")) / "below.pth"
        below.write_text(f"import site; site.addsitedir({site.getsitepackages()[0]!r})\n", encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
        subprocess.run([*pip, *PACKAGES[system]], check=True)
        stamp.write_text(json.dumps(PACKAGES[system]), encoding="utf-8")
    return python


def environment(system: str) -> dict[str, str]:
    """Return the variables that a system runs with: one thread, no network, and no other dataflex than its own."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "PYTHONPATH"))}
    ours |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return ours if system.partition("_fp")[0] in PACKAGES else ours | {"PYTHONPATH": str(ROOT / "src")}


def write_rows(rows: int, targets: int) -> Path:
    """Write the pool, in two parts for mixers, and the target; return their folder."""
    folder = HOME / f"data-{rows}-{targets}"
    folder.mkdir(parents=True, exist_ok=True)
    source = ROOT / "examples/data"
    pool = (source / "pool.jsonl").read_text(encoding="utf-8").splitlines()
    pool = [pool[i * len(pool) // rows] for i in range(rows)]
    target = (source / "gsm8k_valid.jsonl").read_text(encoding="utf-8").splitlines()[:targets]
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    parts = {"pool": pool, "first": pool[: rows // 2], "second": pool[rows // 2 :], "target": target}
    for name, lines in parts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    info = {name: {"file_name": f"{name}.jsonl", "columns": columns} for name in parts}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


CLUSTERS = {"cluster_size": 25, "samples_per_cluster": 4}
PASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "loss": ("loss", {"focus": "medium", "score_batch_size": 8}),
    "delta_loss": ("delta_loss", {"window_size": 0.2, "score_batch_size": 8}),
    "less_1024": ("less", {"gradient_type": "adam", "proj_dim": 1024, "seed": 123, "save_interval": 16}),
    "less_4096": ("less", {"gradient_type": "adam", "proj_dim": 4096, "seed": 123, "save_interval": 16}),
    "icons": ("icons", {"gradient_type": "adam", "proj_dim": 1024, "seed": 123, "save_interval": 16}),
    "cluster_less": ("cluster_less", {"gradient_type": "adam", "proj_dim": 1024, "seed": 42, **CLUSTERS}),
}
MIXER = {"train_type": "dynamic_mix", "mixture_sample_rule": "mixture", "init_mixture_proportions": [0.5, 0.5]}
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "static": ("", {}, {"train_type": "static", "max_steps": 20}),
    "odm": ("odm", {"alpha": 0.9, "warmup_steps": 4, "initial_proportions": [0.5, 0.5]}, MIXER),
    "doremi": ("doremi", {"reference_model_path": str(MODEL), "reweight_eta": 0.1, "reweight_eps": 0.01}, MIXER),
    "linupper": ("loss", {"strategy": "linupper", "delta": 1.0}, {"train_type": "dynamic_weight", "max_steps": 20}),
}
PARTS = {name: "peer" for name in (*PASSES, *RUNS)} | {
    name: name for name in ("kronfluence", "dattri", "bergson", "trak_fp32", "trak_fp16", "less_loop")
}
"""What is measured, and the system that ours is compared with in it."""
FAMILY = {"dynamic_select": "selectors", "dynamic_mix": "mixers", "dynamic_weight": "weighters"}


def write_configuration(part: str, data: Path, folder: Path) -> Path:
    """Write the configuration of a part, the same for both systems but for its folder, and return its file."""
    steps = {
        "warmup_step": 4,
        "update_step": 4,
        "update_times": 4 if part in RUNS else 2 if part == "delta_loss" else 1,
    }
    config: dict[str, Any] = {
        "model_name_or_path": str(MODEL),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": "all",
        "template": "default",
        "cutoff_len": 256,
        "dataset_dir": str(data),
        "dataset": "pool",
        "overwrite_cache": True,
        "preprocessing_num_workers": 1,
        "output_dir": str(folder / "run"),
        "overwrite_output_dir": True,
        "per_device_train_batch_size": 4,
        "learning_rate": 1.0e-3,
        "num_train_epochs": 1.0,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 42,
    }
    if part in PASSES:
        component, params = PASSES[part]
        config |= {"train_type": "dynamic_select", "eval_dataset": "target"}
    else:
        component, params, more = RUNS[part]
        config |= more
        if more is MIXER:
            config["dataset"] = "first,second"
    folder.mkdir(parents=True, exist_ok=True)
    if component:
        config |= {"component_name": component, "components_cfg_file": str(folder / "components.yaml"), **steps}
        params = params | {"cache_dir": str(folder / "cache")}
        kept = {FAMILY[config["train_type"]]: {component: {"name": component, "params": params}}}
        (folder / "components.yaml").write_text(yaml.safe_dump(kept), encoding="utf-8")
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return file
