"""A plain PyTorch loop, on one process or several, with any block: no Trainer, no LLaMA-Factory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataflex import BatchShape, Loop, RowSpace, Session

EXAMPLES = Path(__file__).parents[2] / "examples"


def tokenized(name, tokenizer, most=300):
    """Return the first rows of a file as ``input_ids`` and ``labels``, prompts masked, and the source of each."""
    rows = [json.loads(line) for line in (EXAMPLES / "data" / f"{name}.jsonl").read_text("utf-8").splitlines()[:most]]
    made = []
    for row in rows:
        prompt = tokenizer(f"{row['instruction']} {row['input']}\n")["input_ids"]
        answer = [*tokenizer(row["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        made.append({"input_ids": (prompt + answer)[:64], "labels": ([-100] * len(prompt) + answer)[:64]})
    return Dataset.from_list(made), [row["source"] for row in rows]


def pad(features):
    """Collate rows into one batch, padded on the right."""
    columns = {name: [torch.tensor(row[name]) for row in features] for name in ("input_ids", "labels")}
    ids = pad_sequence(columns["input_ids"], batch_first=True)
    labels = pad_sequence(columns["labels"], batch_first=True, padding_value=-100)
    lengths = torch.tensor([len(row) for row in columns["input_ids"]])
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
    }


def train(
    block,
    out,
    resume=None,
    *,
    model_dir=EXAMPLES / "models" / "base-4m",
    total_steps=8,
    save_steps=4,
    micro=2,
    sharding="none",
):
    """Train and return the loss of each step; this is the loop, in which everything of DataFlex is a line.

    With ``sharding="fsdp2"`` ranks share the parameters; it saves nothing then.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    if sharding == "fsdp2":
        mesh = init_device_mesh("cpu", (world,))
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    dataset, sources = tokenized("pool", tokenizer)
    rows = RowSpace.of(dataset, domains=sources, targets={"gsm8k_valid": tokenized("gsm8k_valid", tokenizer)[0]})
    loop = Loop(
        model=model,
        optimizer=lambda: optimizer,
        learning_rate=lambda: optimizer.param_groups[0]["lr"],
        collate=pad,
        shape=BatchShape(
            micro_batch_size=micro,
            accumulation=4 // micro // world,
            world=world,
            rank=rank,
            drop_last=True,
            shuffle=True,
        ),
        total_steps=total_steps,
        seed=1,
        device=torch.device("cpu"),
        output_dir=Path(out),
        tokenizer=tokenizer,
        sharding=sharding,
    )
    session = Session.open(block, rows, loop)
    if resume is not None:
        saved = torch.load(Path(resume) / "training.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    wrapped = DistributedDataParallel(model) if world > 1 and sharding == "none" else model
    losses = []
    for index in range(session.start(resume), total_steps):
        step = session.step(index)
        if step is None:  # the data ran out
            break
        total = torch.zeros(())
        for batch in step.batches:
            with session.forward():
                logits = wrapped(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = session.loss(batch, logits)
            loss.backward()
            total += loss.detach()
        if world > 1:  # each rank has the loss of its own rows: the step's is the mean, as DDP's gradient is
            dist.all_reduce(total)
            total /= world
        session.end_step()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
        session.log(index + 1, {"loss": losses[-1]})
        if (index + 1) % save_steps == 0 and sharding == "none":
            with session.checkpoint(Path(out) / f"checkpoint-{index + 1}", index + 1):
                if rank == 0:
                    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    torch.save(saved, Path(out) / f"checkpoint-{index + 1}" / "training.pt")
    session.finish(total_steps, {})
    session.close()
    return losses
