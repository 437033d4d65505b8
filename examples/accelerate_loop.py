"""Trains in a loop with Accelerate, on rows of high loss: python examples/accelerate_loop.py runs/acc [CHECKPOINT]."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from dataflex import BatchShape, Loop, RowSpace, Session

HERE, OUT, FROM = Path(__file__).parent, Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
accelerator, tokenizer = Accelerator(), AutoTokenizer.from_pretrained(HERE / "models/base-4m")
rows = Dataset.from_json(str(HERE / "data/gsm8k_test.jsonl")).map(lambda row: tokenizer(row["output"]))
model = AutoModelForCausalLM.from_pretrained(HERE / "models/base-4m")
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
ranks = {"world": accelerator.num_processes, "rank": accelerator.process_index}
loop = Loop(
    **{"model": accelerator.unwrap_model(model), "optimizer": lambda: optimizer, "learning_rate": lambda: 1e-3},
    **{"collate": DataCollatorForLanguageModeling(tokenizer, mlm=False), "device": accelerator.device},
    shape=BatchShape(micro_batch_size=2, accumulation=2, drop_last=True, shuffle=True, **ranks),
    **{"total_steps": 8, "seed": 1, "output_dir": OUT},
)
session = Session.open({"selector": "loss", "interval_steps": 4}, RowSpace.of(rows.select_columns("input_ids")), loop)
if FROM is not None:
    accelerator.load_state(FROM)
for index in range(session.start(FROM), 8):
    for batch in session.step(index).batches:
        inputs = {name: batch[name].to(accelerator.device) for name in ("input_ids", "attention_mask", "labels")}
        accelerator.backward(session.loss({**batch, **inputs}, model(**inputs).logits))
    session.end_step()
    optimizer.step()
    optimizer.zero_grad()
    if index % 4 == 3:
        with session.checkpoint(OUT / f"checkpoint-{index + 1}", index + 1):
            accelerator.save_state(OUT / f"checkpoint-{index + 1}")
session.finish(8, {})
session.close()
