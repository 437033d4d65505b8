"""A pool with a helpful, a harmless and a harmful domain: the ledger tells them apart, with every seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from dataflex.plan.plan import BatchShape
from dataflex.record.read import read_events
from dataflex.train.row_space import RowSpace
from dataflex.train.session import Loop, Session

STEPS, ROWS = 24, 40
RIGHT, WRONG = (10, 11, 12, 13), (20, 21, 22, 23)


def rows(draw, count, prompts, answers):
    """Rows of four prompt tokens and four answer tokens; an answer is one of ``answers``, repeated."""
    made = []
    for _ in range(count):
        prompt, answer = draw.choice(prompts, 4).tolist(), answers[draw.integers(len(answers))]
        made.append({"input_ids": prompt + list(answer), "labels": [-100] * 4 + list(answer)})
    return made


def pad(features):
    ids, labels = (torch.tensor([row[name] for row in features]) for name in ("input_ids", "labels"))
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def warm_up(model, pool, draw):
    """Train on the whole pool, so that what all domains have in common is known, and what contradicts is not."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        batch = pad([pool[row] for row in draw.choice(len(pool), 12, replace=False)])
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def changes(tiny_model, folder, seed):
    """Train on the pool and return the change of the target's loss by domain, and what is unexplained of it."""
    draw = np.random.default_rng(seed)
    asked, others = np.arange(30, 40), np.arange(45, 55)
    pool = {
        "helpful": rows(draw, ROWS, asked, [RIGHT]),
        "harmless": rows(draw, ROWS, others, [RIGHT, WRONG]),  # as many right answers as wrong ones, to other prompts
        "harmful": rows(draw, ROWS, asked, [WRONG]),
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    warm_up(model, [row for domain in pool.values() for row in domain], draw)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    space = RowSpace.of(
        Dataset.from_list([row for domain in pool.values() for row in domain]),
        domains=[name for name, domain in pool.items() for _ in domain],
        targets={"goal": Dataset.from_list(rows(draw, 12, asked, [RIGHT]))},
    )
    loop = Loop(
        model=model,
        optimizer=lambda: optimizer,
        learning_rate=lambda: 3e-3,
        collate=pad,
        shape=BatchShape(micro_batch_size=6, accumulation=1, world=1, rank=0, drop_last=True, shuffle=True),
        total_steps=STEPS,
        seed=seed,
        device=torch.device("cpu"),
        output_dir=folder,
    )
    session = Session.open({"ledger": {"targets": ["goal"]}}, space, loop)
    session.start()
    for index in range(STEPS):
        for batch in session.step(index).batches:
            with session.forward():
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            session.loss(batch, logits).backward()
        session.end_step()
        optimizer.step()
        optimizer.zero_grad()
    session.finish(STEPS, {})
    session.close()
    told = [event for event in read_events(folder) if event["event"] == "credited"][-1]["targets"]["goal"]
    return told["domains"], told["unexplained"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_domains_are_told_apart(tiny_model, tmp_path, seed):
    of, unexplained = changes(tiny_model, tmp_path, seed)
    assert of["helpful"] < 0.0 < of["harmful"], of
    assert of["helpful"] < of["harmless"] < of["harmful"], of
    assert abs(of["harmless"]) < 0.5 * min(-of["helpful"], of["harmful"]), of
    assert abs(unexplained) < 0.05 * -of["helpful"]
