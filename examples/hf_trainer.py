"""Trains with transformers.Trainer, and LESS decides during training which rows: python examples/hf_trainer.py runs/hf.

python examples/hf_trainer.py runs/hf runs/hf/checkpoint-6     # goes on from there
"""

import sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import dataflex

HERE = Path(__file__).parent
tokenizer = AutoTokenizer.from_pretrained(HERE / "models" / "base-4m")


def tokenized(row):
    """Return prompt and answer as tokens, of which the answer is learned."""
    prompt = tokenizer(f"{row['instruction']} {row['input'] or ''}\n")["input_ids"]
    answer = [*tokenizer(row["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": (prompt + answer)[:96], "labels": ([-100] * len(prompt) + answer)[:96]}


pool, goal = (
    load_dataset("json", data_files=str(HERE / "data" / f"{name}.jsonl"), split="train[:100]").map(tokenized)
    for name in ("pool", "gsm8k_valid")
)
block = {"selector": {"name": "less", "targets": ["gsm8k"]}, "warmup_steps": 4, "interval_steps": 4}
DynamicTrainer = dataflex.wrap(Trainer, block, domains="source", targets={"gsm8k": goal})
trainer = DynamicTrainer(
    model=AutoModelForCausalLM.from_pretrained(HERE / "models" / "base-4m"),
    args=TrainingArguments(sys.argv[1], max_steps=12, per_device_train_batch_size=4, save_steps=6, logging_steps=4),
    train_dataset=pool,
    data_collator=DataCollatorForSeq2Seq(tokenizer),
)
trainer.train(resume_from_checkpoint=sys.argv[2] if len(sys.argv) > 2 else None)
