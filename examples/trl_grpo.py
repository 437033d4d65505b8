"""Trains with TRL's GRPOTrainer, and MoPPS decides which prompts to answer: python examples/trl_grpo.py runs/grpo.

python examples/trl_grpo.py runs/grpo runs/grpo/checkpoint-3      # goes on from there
"""

import sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import dataflex

HERE = Path(__file__).parent
MODEL = HERE / "models" / "base-4m"
SETTINGS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4, "bf16": False}


def has_a_digit(completions, **_):
    """Reward answers that hold a digit."""
    return [float(any(map(str.isdigit, text))) for text in completions]


pool = load_dataset("json", data_files=str(HERE / "data" / "pool.jsonl"), split="train[:200]")
DynamicTrainer = dataflex.wrap(GRPOTrainer, {"selector": "mopps", "interval_steps": 1}, domains="source")
trainer = DynamicTrainer(
    model=AutoModelForCausalLM.from_pretrained(MODEL),
    args=GRPOConfig(sys.argv[1], max_steps=4, save_steps=3, max_completion_length=6, logging_steps=1, **SETTINGS),
    train_dataset=pool.map(lambda row: {"prompt": f"{row['instruction'][:80]} {row['input'] or ''}"[:120]}),
    reward_funcs=has_a_digit,
    processing_class=AutoTokenizer.from_pretrained(MODEL),
)
trainer.train(resume_from_checkpoint=sys.argv[2] if len(sys.argv) > 2 else None)
