"""Trains in a PyTorch loop, and ODM decides how much of each source: python examples/plain_loop.py OUT [CHECKPOINT]."""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from dataflex import BatchShape, Loop, RowSpace, Session

HERE, OUT, FROM = Path(__file__).parent, Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
tokenizer = AutoTokenizer.from_pretrained(HERE / "models/base-4m")
rows = Dataset.from_json(str(HERE / "data/pool.jsonl")).map(lambda row: tokenizer(row["output"]))
model = AutoModelForCausalLM.from_pretrained(FROM or HERE / "models/base-4m")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
if FROM is not None:
    optimizer.load_state_dict(torch.load(f"{FROM}/optimizer.pt", weights_only=True))
loop = Loop(
    **{"model": model, "optimizer": lambda: optimizer, "learning_rate": lambda: 1e-3, "device": model.device},
    **{"collate": DataCollatorForLanguageModeling(tokenizer, mlm=False), "output_dir": OUT},
    shape=BatchShape(micro_batch_size=2, accumulation=2, world=1, rank=0, drop_last=True, shuffle=True),
    **{"total_steps": 8, "seed": 1},
)
space = RowSpace.of(rows.select_columns("input_ids"), domains=rows["source"])
session = Session.open({"mixer": "odm", "interval_steps": 2}, space, loop)
for index in range(session.start(FROM), 8):
    for batch in session.step(index).batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        session.loss(batch, logits).backward()
    session.end_step()
    optimizer.step()
    optimizer.zero_grad()
    if index % 4 == 3:
        with session.checkpoint(folder := OUT / f"checkpoint-{index + 1}", index + 1):
            model.save_pretrained(folder)
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
session.finish(8, {})
session.close()
