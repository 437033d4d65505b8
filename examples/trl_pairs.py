"""Trains on pairs with TRL's DPOTrainer, RewardTrainer or KTOTrainer: python examples/trl_pairs.py DPO runs/dpo.

python examples/trl_pairs.py DPO runs/dpo runs/dpo/checkpoint-6      # goes on from there; Reward and KTO alike
"""

import sys
from pathlib import Path

import trl
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import dataflex

HERE = Path(__file__).parent
MODEL = HERE / "models" / "base-4m"
BLOCKS = {
    "DPO": {"selector": "margin", "interval_steps": 4, "warmup_steps": 4},  # pairs that the model prefers most by then
    "Reward": {"orderer": {"name": "sorting", "by": {"name": "column", "column": "chosen_rating"}}},
    "KTO": {"mixer": "uniform"},
}


def single(row, number):
    """Return one answer of a pair, right and wrong ones in turn, as KTO reads one."""
    return {"completion": row["rejected" if number % 2 else "chosen"], "label": number % 2 == 0}


kind, out, *checkpoint = sys.argv[1:]
pool = load_dataset("json", data_files=str(HERE / "data" / "pairs.jsonl"), split="train[:200]")
pool = pool.map(lambda row: {"prompt": row["instruction"] + "\n"}, remove_columns=["instruction", "input"])
pool = pool.map(single, with_indices=True, remove_columns=["chosen", "rejected"]) if kind == "KTO" else pool
model = AutoModelForSequenceClassification if kind == "Reward" else AutoModelForCausalLM
trainer = dataflex.wrap(getattr(trl, f"{kind}Trainer"), BLOCKS[kind], domains="source")(
    model=model.from_pretrained(MODEL, num_labels=1) if kind == "Reward" else model.from_pretrained(MODEL),
    args=getattr(trl, f"{kind}Config")(out, max_steps=12, per_device_train_batch_size=4, save_steps=6, bf16=False),
    train_dataset=pool,
)
trainer.train(resume_from_checkpoint=checkpoint[0] if checkpoint else None)
