"""Documents of packed rows as samples: the same as each one alone, and as autograd of its loss in the packed row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dataflex.errors import UnsupportedError
from dataflex.signals.gradients import Dots, GradientEngine, Norms, TargetVectors
from dataflex.signals.gradients.documents import Documents
from tests.signals.gradients.small import PAD, VOCAB, Collect, build

LENGTHS = [[5, 9, 3], [12, 4], [7]]
"""Tokens of each document, by row."""
UNLABELLED = {(1, 1)}


def packed(mask: str = "block", every_token: bool = False) -> dict:
    """Rows of documents; the first third of each is a prompt unless ``every_token`` is supervised."""
    generator = torch.Generator().manual_seed(0)
    width = max(map(sum, LENGTHS)) + 2
    ids = torch.full((len(LENGTHS), width), PAD)
    labels, number = torch.full_like(ids, -100), torch.zeros_like(ids)
    positions = torch.zeros_like(ids)
    for i, lengths in enumerate(LENGTHS):
        start = 0
        for j, length in enumerate(lengths):
            own = slice(start, start + length)
            ids[i, own] = torch.randint(4, VOCAB, (length,), generator=generator)
            first = start if every_token else start + max(1, length // 3)
            if (i, j) not in UNLABELLED:
                labels[i, first : own.stop] = ids[i, first : own.stop]
            number[i, own], positions[i, own] = j + 1, torch.arange(length)
            start = own.stop
    if mask == "plain":
        return {"input_ids": ids, "attention_mask": number.gt(0).long(), "labels": labels, "position_ids": positions}
    causal = torch.ones(width, width).tril().bool()
    # Padding looks at itself alone, or its softmax would be over nothing.
    seen = (number[:, :, None].eq(number[:, None]) & number[:, None].gt(0)) & causal
    additive = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]
    return {"input_ids": ids, "attention_mask": additive, "labels": labels, "position_ids": positions}


def documents():
    return [(i, j) for i, lengths in enumerate(LENGTHS) for j in range(len(lengths))]


def span(i, j):
    start = sum(LENGTHS[i][:j])
    return slice(start, start + LENGTHS[i][j])


def in_place(model, batch, i, j, named):
    """Loss of one document where it stands in the packed row, and its gradient by autograd."""
    own = span(i, j)
    inputs = {key: value[i : i + 1] for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits[0, own][:-1]
    loss = F.cross_entropy(logits, batch["labels"][i, own][1:])
    return loss, grads(loss, named)


def alone(model, batch, i, j, named):
    """The same of a row that holds the document and nothing else."""
    own = span(i, j)
    ids, labels = batch["input_ids"][i : i + 1, own], batch["labels"][i : i + 1, own]
    loss = F.cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1], labels[0, 1:])
    return loss, grads(loss, named)


def grads(loss, named):
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for g, p in zip(found, named.values(), strict=True)
        ]
    )


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "lora", "qwen2", "dora"])
def test_documents_equal_autograd_of_each_ones_loss(name, every_token):
    model = build(name).eval()
    batch = packed(every_token=every_token)
    engine = GradientEngine(model, by_document=True)
    collect = Collect(engine)
    found = engine.run(batch, [collect, Norms()])
    where = documents()
    assert found["row"].tolist() == [i for i, _ in where]
    assert found["document"].tolist() == [j for _, j in where]
    for k, (i, j) in enumerate(where):
        if (i, j) in UNLABELLED:
            assert found["losses"][k].isnan()
            assert found["norms"][k].isnan()
            continue
        for oracle in (in_place, alone):
            loss, gradient = oracle(model, batch, i, j, engine.parameters)
            assert found["losses"][k].item() == pytest.approx(loss.item(), rel=1e-5)
            error = (found["collect"][k] - gradient).norm() / gradient.norm()
            assert error < 2e-5, (i, j, oracle.__name__, error)
        assert found["norms"][k].item() == pytest.approx(gradient.norm().item(), rel=1e-4)


def test_scores_of_documents():
    """Consumers see documents as they see rows, whatever form the engine picks."""
    model = build("lora").eval()
    batch = packed()
    engine = GradientEngine(model, by_document=True)
    targets = TargetVectors.zeros(2, engine.shapes, "cpu")
    for tensor in targets.tensors.values():
        tensor.normal_(generator=torch.Generator().manual_seed(1))
    flat = torch.cat([targets.flat(name) for name in targets.tensors], dim=1)
    found = engine.run(batch, [Dots(targets, normalize="both")])["dots"]
    for k, (i, j) in enumerate(documents()):
        if (i, j) not in UNLABELLED:
            _, gradient = in_place(model, batch, i, j, engine.parameters)
            torch.testing.assert_close(found[k], F.cosine_similarity(gradient[None], flat), rtol=1e-3, atol=1e-6)


def test_rows_that_are_not_packed_are_documents():
    model = build("lora").eval()
    batch = packed()
    single = {key: value[2:3] for key, value in batch.items()}
    rows, by_document = GradientEngine(model), GradientEngine(model, by_document=True)
    torch.testing.assert_close(by_document.run(single, [Norms()])["norms"], rows.run(single, [Norms()])["norms"])


def test_a_batch_without_labels():
    model = build("lora").eval()
    batch = packed()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    found = GradientEngine(model, by_document=True).run(batch, [Norms()])
    assert len(found["norms"]) == len(documents())
    assert found["norms"].isnan().all()


def test_derivatives_by_document():
    model = build("lora").eval()
    batch = packed()
    engine = GradientEngine(model, by_document=True)
    direction = {name: torch.ones(shape) for name, shape in engine.shapes.items()}
    found = engine.jvp(batch, direction)
    for k, (i, j) in enumerate(documents()):
        if (i, j) not in UNLABELLED:
            _, gradient = in_place(model, batch, i, j, engine.parameters)
            assert found[k].item() == pytest.approx(gradient.sum().item(), rel=1e-3, abs=1e-5)


def test_documents_that_see_one_another_are_refused():
    engine = GradientEngine(build("lora").eval(), by_document=True)
    with pytest.raises(UnsupportedError, match="neat_packing"):
        engine.run(packed("plain"), [Norms()])


def test_layers_without_a_formula_are_refused():
    engine = GradientEngine(build("mixtral").eval(), by_document=True)
    with pytest.raises(UnsupportedError, match="by document"):
        engine.run(packed(), [Norms()])


def test_where_tokens_are():
    found = Documents.of(packed())
    assert len(found) == 6
    assert found.real.sum(dim=1).tolist() == [length for lengths in LENGTHS for length in lengths]
    batch = packed()
    laid = found.apart(batch["input_ids"])
    assert laid[1, :9].tolist() == batch["input_ids"][0, 5:14].tolist()
    assert laid[0, 5:].eq(0).all()
