"""Trains with TRL's SFTTrainer, and ODM decides how much of each source: python examples/trl_sft.py runs/trl.

python examples/trl_sft.py runs/trl runs/trl/checkpoint-6      # goes on from there
"""

import sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import dataflex

HERE = Path(__file__).parent
MODEL = HERE / "models" / "base-4m"


def written(row):
    """Return a row of the pool as TRL reads one."""
    return {"prompt": f"{row['instruction']} {row['input'] or ''}\n", "completion": row["output"]}


pool = load_dataset("json", data_files=str(HERE / "data" / "pool.jsonl"), split="train[:200]").map(written)
DynamicTrainer = dataflex.wrap(SFTTrainer, {"mixer": "odm", "interval_steps": 2}, domains="source")
trainer = DynamicTrainer(
    model=AutoModelForCausalLM.from_pretrained(MODEL),
    args=SFTConfig(sys.argv[1], max_steps=12, per_device_train_batch_size=4, save_steps=6, max_length=96, bf16=False),
    train_dataset=pool.select_columns(["prompt", "completion", "source"]),
    processing_class=AutoTokenizer.from_pretrained(MODEL),
)
trainer.train(resume_from_checkpoint=sys.argv[2] if len(sys.argv) > 2 else None)
