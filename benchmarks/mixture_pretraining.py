"""Do learned mixtures beat the default one? A small model pretrained from scratch on seven domains.

For each seed, with equal steps and so equal tokens: the natural mixture (by size), a web-heavy one in the
proportions of SlimPajama, ODM, and the three steps of DoReMi (reference: the natural run; proxy; main run
with the averaged weights). Held-out loss by domain at the end, as perplexity; means over seeds with their
standard deviation. Finished runs are kept in the folder of --out and not repeated.

The data are folders ``DOMAIN_train.jsonl`` and ``DOMAIN_test.jsonl`` with a field ``text``.

Usage: python benchmarks/mixture_pretraining.py --data FOLDER --out FOLDER [--steps N] [--seeds N] [--odm-interval N]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOMAINS = ("wiki", "book", "github", "arxiv", "stackexchange", "c4", "speech")
# SlimPajama's shares of CommonCrawl and C4 together go to c4; it has no speeches, which get what Wikipedia has.
WEB_HEAVY = {"c4": 0.80, "github": 0.042, "book": 0.037, "arxiv": 0.034, "wiki": 0.031, "stackexchange": 0.028}
WEB_HEAVY["speech"] = 1.0 - sum(WEB_HEAVY.values())
HELD_OUT_BYTES = 60_000


def prepare(data: Path, out: Path) -> None:
    """Register training files and the beginning of each test file."""
    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    info = {}
    for name in DOMAINS:
        kept, size = [], 0
        for line in (data / f"{name}_test.jsonl").read_text(encoding="utf-8").splitlines():
            text = json.loads(line)["text"][: HELD_OUT_BYTES - size]
            kept.append(json.dumps({"text": text}))
            size += len(text)
            if size >= HELD_OUT_BYTES:
                break
        (folder / f"{name}_test.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
        train = str((data / f"{name}_train.jsonl").resolve())
        info[name] = {"file_name": train, "columns": {"prompt": "text"}}
        info[f"{name}_test"] = {"file_name": f"{name}_test.jsonl", "columns": {"prompt": "text"}}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=1))


def model(out: Path, seed: int) -> Path:
    """Write a random model of 1.3M parameters with the small model's tokenizer."""
    folder = out / f"model-{seed}"
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/models/base-4m")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def train(out: Path, name: str, seed: int, steps: int, dynamic: dict) -> dict:
    """Train unless that was done, and return the closing metrics."""
    folder = out / f"{name}-{seed}"
    results = folder / "all_results.json"
    if not results.is_file():
        settings = {
            "model_name_or_path": str(model(out, seed)),
            "stage": "pt",
            "do_train": True,
            "do_eval": True,
            "finetuning_type": "full",
            "template": "default",
            "cutoff_len": 256,
            "packing": True,
            "dataset_dir": str(out / "data"),
            "dataset": ",".join(DOMAINS),
            "eval_dataset": ",".join(f"{domain}_test" for domain in DOMAINS),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 16,
            "learning_rate": 3.0e-3,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.05,
            "weight_decay": 0.1,
            "max_steps": steps,
            "logging_steps": 20,
            "save_strategy": "no",
            "report_to": "none",
            "output_dir": str(folder),
            "overwrite_output_dir": True,
            "seed": seed,
            "dynamic": {"eval_by_domain": True, "unit": "tokens", **dynamic},
        }
        file = out / f"{name}-{seed}.json"
        file.write_text(json.dumps(settings, indent=1))
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "LLAMAFACTORY_VERBOSITY": "WARN",
            "DISABLE_VERSION_CHECK": "1",
        }
        with open(out / f"{name}-{seed}.log", "w") as log:
            subprocess.run(
                [sys.executable, "-m", "dataflex", "train", str(file)],
                check=True,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
    return json.loads(results.read_text())


def seed_runs(out: Path, seed: int, options: argparse.Namespace) -> dict[str, dict]:
    """Run every case of one seed."""
    steps = options.steps
    found = {
        "natural": train(out, "natural", seed, steps, {"mixer": "size"}),
        "web-heavy": train(out, "web-heavy", seed, steps, {"mixer": {"name": "static", "proportions": WEB_HEAVY}}),
        "odm": train(
            out,
            "odm",
            seed,
            steps,
            {"mixer": "odm", "interval_steps": options.odm_interval, "warmup_steps": max(steps // 100, 1)},
        ),
    }
    # A short run sees a part of the pool only: cheaper to ask the reference as it goes than to ask for all rows once.
    proxy = {"name": "doremi", "reference": str(out / f"natural-{seed}"), "reference_cache": False}
    train(out, "doremi-proxy", seed, steps, {"mixer": proxy})
    learned = out / f"doremi-proxy-{seed}" / "dataflex" / "doremi.json"
    main = {"mixer": {"name": "static", "from": str(learned)}}
    found["doremi"] = train(out, "doremi", seed, steps, main)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--odm-interval", type=int, default=1)
    parser.add_argument("--only-seed", type=int, default=None, help="run one seed only, and tell nothing")
    options = parser.parse_args()
    out = options.out.resolve()
    prepare(options.data, out)
    if options.only_seed is not None:
        seed_runs(out, options.only_seed, options)
        return 0
    runs = {seed: seed_runs(out, seed, options) for seed in range(1, options.seeds + 1)}
    write = sys.stdout.write
    tokens = options.steps * 4 * 256
    write(
        f"{platform.processor() or platform.machine()}; 1.3M parameters, {options.seeds} seeds, {options.steps} steps, "
    )
    write(f"{tokens:,} tokens each; held-out perplexity, mean (standard deviation)\n")
    cases = list(next(iter(runs.values())))
    rows = [*DOMAINS, "macro", "micro"]
    write(f"{'':<14}" + "".join(f"{case:>18}" for case in cases) + "\n")
    for row in rows:
        key = f"eval_{row}_loss" if row in ("macro", "micro") else f"eval_{row}_test_token_loss"
        cells = []
        for case in cases:
            values = [math.exp(found[case][key]) for found in runs.values()]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.2f} ({spread:.2f})")
        write(f"{row:<14}" + "".join(f"{cell:>18}" for cell in cells) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
