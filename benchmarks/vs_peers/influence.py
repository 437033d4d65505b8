"""Driver: scores rows towards every target row by inner products of gradients, by one library.

    python influence.py SYSTEM PART ROWS TARGETS NUMBER OUT.json

All get the same model with LoRA adapters, the same tokenized rows sorted by length, and batches of up to 2048 tokens,
or of eight rows. ``trak_*`` projects gradients that are there already; in ``less_loop`` rows are compared by cosines,
as in LESS. NUMBER of the rows are scored anew by autograd, one row at a time.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]
import torch  # noqa: E402
from benchmarks.support.selection_passes import collate, read, tokens  # noqa: E402
from meter import Meter, adam, agreement, cosines_oracle, one_thread, row_gradient, spread  # noqa: E402

MODEL = Path(__file__).resolve().parents[2] / "examples/models/base-4m"
Tokens = list[tuple[list[int], int]]
SIZE, PROJECTED, BLOCK, GROUP = 8192, 1024, 128, 16
unit = torch.nn.functional.normalize


def prepared(rows: int, targets: int) -> tuple[Any, Any, Tokens, Tokens]:
    """Return the model after four steps of training, its optimizer, and rows and target rows by length."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    pool = read("pool")
    found = [tokens(tokenizer, pool[i]) for i in spread(len(pool), rows)]
    aims = [tokens(tokenizer, row) for row in read("gsm8k_valid")[:targets]]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for start in range(0, 32, 8):
        model(**collate(torch, [found[i % rows] for i in range(start, start + 8)])).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model, optimizer, *(sorted(part, key=lambda row: -len(row[0])) for part in (found, aims))


def features(rows: Tokens) -> list[dict[str, Any]]:
    """Return rows as an oracle takes them."""
    return [{key: value[0].tolist() for key, value in collate(torch, [row]).items()} for row in rows]


def batches(rows: Tokens) -> list[list[int]]:
    """Return positions in batches of up to 2048 tokens; the longest row comes first."""
    found: list[list[int]] = []
    for i in range(len(rows)):
        if not found or len(rows[found[-1][0]][0]) * (len(found[-1]) + 1) > 2048:
            found.append([])
        found[-1].append(i)
    return found


def row_means(model: Any, batch: dict[str, Any]) -> Any:
    """Return the mean loss of each row of a batch [b]."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return losses.sum(dim=1) / labels.ne(-100).sum(dim=1)


def ours(model: Any, optimizer: Any, rows: Tokens, aims: Tokens, *, less: bool) -> Any:
    """Score by this repository's engine: inner products, or LESS's cosines with Adam's directions."""
    from dataflex.signals.gradients.consumers import Dots
    from dataflex.signals.gradients.engine import GradientEngine
    from dataflex.signals.gradients.precondition import PRESETS, moments_of, preconditioner
    from dataflex.signals.gradients.scorers import TargetBuilder

    engine = GradientEngine(model)
    builder = TargetBuilder(engine, [str(i) for i in range(len(aims))], normalize_rows=False)
    direction = preconditioner(PRESETS["true_adam"], moments_of(optimizer, engine.parameters)) if less else None
    with engine.observing():
        for batch in batches(aims):
            builder.add(collate(torch, [aims[i] for i in batch]), torch.tensor(batch))
        dots = Dots(builder.finish(), normalize="both" if less else "none")
        given = [collate(torch, [rows[i] for i in batch]) for batch in batches(rows)]
        return torch.cat([engine.run(batch, [dots], precondition=direction)["dots"] for batch in given])


def less_loop(model: Any, optimizer: Any, rows: Tokens, aims: Tokens) -> Any:
    """Score as LESS describes it: one row at a time, Adam, a random projection to 8192 numbers, cosines.

    The matrix of signs is made anew in blocks, for 16 rows at a time, in fp32.
    """

    def projected(part: Tokens, turn: Callable[[Any], Any]) -> Any:
        found = []
        for start in range(0, len(part), GROUP):
            held = torch.stack([turn(row_gradient(model, row)) for row in features(part[start : start + GROUP])])
            generator, blocks = torch.Generator().manual_seed(0), []
            for _ in range(0, SIZE, BLOCK):
                signs = torch.empty(held.shape[1], BLOCK).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
                blocks.append(held @ signs)
            found.append(unit(torch.cat(blocks, dim=1)))
        return torch.cat(found)

    return (
        projected(rows, adam(model, optimizer.state, corrected=True)) @ projected(aims, lambda gradient: gradient).t()
    )


def kronfluence(model: Any, optimizer: Any, rows: Tokens, aims: Tokens) -> Any:
    """Score by kronfluence with the identity in place of a Hessian."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    tracked = [name for name, m in model.named_modules() if "lora_" in name and isinstance(m, torch.nn.Linear)]

    class Rows(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Any:
            return row_means(model, batch).sum()

        def compute_measurement(self, batch: Any, model: Any) -> Any:
            return row_means(model, batch).sum()

        def get_influence_tracked_modules(self) -> list[str]:
            return tracked

        def get_attention_mask(self, batch: Any) -> Any:
            return batch["attention_mask"]

    task = Rows()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        model = prepare_model(model, task)
        analyzer = Analyzer("rows", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=lambda part: collate(torch, part)))
        analyzer.fit_all_factors("none", rows, per_device_batch_size=8, factor_args=FactorArguments("identity"))
        analyzer.compute_pairwise_scores(
            "rows",
            factors_name="none",
            query_dataset=aims,
            train_dataset=rows,
            per_device_query_batch_size=len(aims),
            per_device_train_batch_size=8,
            score_args=ScoreArguments(),
        )
        return analyzer.load_pairwise_scores("rows")["all_modules"].t()


def dattri(model: Any, optimizer: Any, rows: Tokens, aims: Tokens) -> Any:
    """Score by dattri's TracIn at one checkpoint, without its projection."""
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader

    def loss(parameters: Any, data: Any) -> Any:
        ids, labels = (part.unsqueeze(0) for part in data)
        # Rows are padded at their end, which a causal model's losses do not see.
        logits = torch.func.functional_call(model, parameters, (), {"input_ids": ids, "use_cache": False}).logits[0]
        each = torch.nn.functional.cross_entropy(logits[:-1], labels[0, 1:], reduction="none", ignore_index=-100)
        return each.sum() / labels[0, 1:].ne(-100).sum()

    def pairs(part: list[tuple[list[int], int]]) -> tuple[Any, Any]:
        batch = collate(torch, part)
        return batch["input_ids"], batch["labels"]

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    tracin = TracInAttributor(task, weight_list=torch.ones(1), normalized_grad=False, device="cpu")
    tracin.projector_kwargs = None
    # The targets' gradients are made anew for every batch of rows, so that large batches pay.
    loaders = (DataLoader(part, batch_size=size, collate_fn=pairs) for part, size in ((rows, 32), (aims, len(aims))))
    return tracin.attribute(*loaders)


def bergson(model: Any, optimizer: Any, rows: Tokens, aims: Tokens) -> Any:
    """Score by the gradients that bergson collects in memory."""
    from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector
    from datasets import Dataset

    linear = [name for name, m in model.base_model.named_modules() if isinstance(m, torch.nn.Linear)]
    names = {name for name in linear if "lora_" in name}
    with tempfile.TemporaryDirectory(dir=".") as folder:

        def gradients(part: Tokens) -> Any:
            kept = Dataset.from_list([{key: row[key] for key in ("input_ids", "labels")} for row in features(part)])
            config = IndexConfig(run_path=f"{folder}/run", loss_reduction="mean")
            config.partial_run_path.mkdir(exist_ok=True)
            collector = InMemoryCollector(
                model=model.base_model, processor=GradientProcessor(), data=kept, cfg=config, target_modules=names
            )
            computer = CollectorComputer(model, kept, collector=collector, batches=batches(part), cfg=config)
            computer.run_with_collector_hooks()
            return torch.cat([collector.gradients[name] for name in sorted(collector.gradients)], dim=1)

        return gradients(rows) @ gradients(aims).t()


def projections(system: str, model: Any, rows: Tokens, aims: Tokens, meter: Meter) -> Any:
    """Project gradients that are there already to 1024 numbers; return the cosines [rows, targets]."""
    held = torch.stack([row_gradient(model, row) for row in features([*rows, *aims])])
    if system == "ours":
        from dataflex.signals.gradients.consumers import Block, Segment, Sketch

        sketch = Sketch(size=PROJECTED)
        with meter.measure():
            sketch.begin(torch.ones(len(held), dtype=torch.bool))
            sketch.add(Block(segments=(Segment("all", 0, held.shape[1]),), values=held))
            found = sketch.finish()[""]
    else:
        from trak.projectors import BasicProjector, ProjectionType

        options = {"block_size": BLOCK, "dtype": torch.float16 if system == "trak_fp16" else torch.float32}
        signs, where = ProjectionType.rademacher, torch.device("cpu")
        with meter.measure():
            projector = BasicProjector(held.shape[1], PROJECTED, 0, signs, where, **options)
            found = projector.project(held, model_id=0)
    found = unit(found.float())
    return found[: len(rows)] @ found[len(rows) :].t()


def main() -> None:
    """Run the command line at the top."""
    system, part, count, targets, number, out = sys.argv[1:]
    one_thread()
    meter = Meter()
    model, optimizer, rows, aims = prepared(int(count), int(targets))
    picked = spread(len(rows), int(number)) if int(number) else []
    few, whole = features([rows[i] for i in picked]), features(aims)
    cosines = part == "less_loop" or part.startswith("trak")
    turn = adam(model, optimizer.state, corrected=True) if part == "less_loop" else lambda gradient: gradient
    if picked and cosines:
        exact = cosines_oracle(model, few, whole, turn)
    elif picked:
        exact = torch.stack([row_gradient(model, row) for row in few])
        exact = exact @ torch.stack([row_gradient(model, row) for row in whole]).t()
    if part.startswith("trak"):
        scores = projections(system, model, rows, aims, meter)
    else:
        score = {"kronfluence": kronfluence, "dattri": dattri, "bergson": bergson, "less_loop": less_loop}.get(system)
        with meter.measure():
            if score is None:
                scores = ours(model, optimizer, rows, aims, less=part == "less_loop")
            else:
                scores = score(model, optimizer, rows, aims)
    found = meter.result()
    if picked:
        found["fidelity"] = agreement(scores[picked].detach().flatten().tolist(), exact.flatten().tolist())
    Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
