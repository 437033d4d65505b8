"""The training loss of whole steps: ranks, accumulation, ragged rows, packing, and weights that multiply."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataflex.mixers.loss_weights import DoReMi
from dataflex.plan.domains import Domains
from dataflex.plan.proportions import logs
from dataflex.testing import example_context
from dataflex.train import loader
from dataflex.train.feedback import WeightStats
from dataflex.train.loss import Reweighter
from dataflex.weighters.likeness import Adapt, JointUpdateAware
from dataflex.weighters.loss import LossWeighter, Rho, SelectiveLanguageModelling
from dataflex.weighters.product import Factor, OfSelection, Product
from dataflex.weighters.rows import Column, GroupWeighter
from dataflex.weighters.token import Focal, TokenWeighter
from tests.train.ranks import Ranks

ROWS, WIDTH, WORDS, WIDE = 12, 8, 7, 5
SIZES = {"a": 6, "b": 6}
DOMAINS = Domains.from_sizes(tuple(SIZES), tuple(SIZES.values()))
CPU = torch.device("cpu")


class Data:
    """Ragged rows of two documents each; those of ``unlabelled`` have no supervised token."""

    def __init__(self, seed=0, unlabelled=()):
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(ROWS, WIDTH, WORDS, generator=generator)
        self.hidden = torch.randn(ROWS, WIDTH, WIDE, generator=generator)
        self.reference = 2.0 * torch.rand(ROWS, WIDTH, generator=generator)
        self.labels = torch.randint(0, WORDS, (ROWS, WIDTH), generator=generator)
        for row in range(ROWS):
            self.labels[row, : 1 + row % 3] = -100
            self.labels[row, 4] = -100
            self.labels[row, WIDTH - row % 4 :] = -100
        self.labels[list(unlabelled)] = -100

    def of(self, batch, rows, mask_BT, joined=None):
        return torch.where(mask_BT, self.reference[rows], 0.0)

    def batch(self, rows):
        places = torch.arange(WIDTH).remainder(4).expand(len(rows), WIDTH)
        return {
            "labels": self.labels[rows],
            "input_ids": self.labels[rows].clamp(min=0),
            "position_ids": places,
            loader.ROWS: rows,
        }

    def tokens(self, rows):
        return self.labels[rows].ne(-100).sum()


def step_of(data, make, parts, *, mixer=None, over_ranks=True, world=1, packed=False, items=None, step=3):
    """Return loss and gradient by row [N, T, V] of this rank's micro-batches, as DDP would get them to average."""
    weighter = None if make is None else make()
    reweighter = Reweighter(
        weighter,
        mixer,
        columns={"sample_weight": 1.0 + np.arange(ROWS) % 3, "ones": np.ones(ROWS)},
        domains=DOMAINS,
        over_ranks=over_ranks,
        world=world,
        packed=packed,
        reference=data,
    )
    if items is None:
        items = sum(data.tokens(rows) for rows in parts)
    batches = [data.batch(rows) for rows in parts]
    reweighter.begin_step(batches, items, CPU, index=step, total=10)
    total, gradient = torch.zeros(()), torch.zeros_like(data.logits)
    for rows, batch in zip(parts, batches, strict=True):
        logits = data.logits[rows].clone().requires_grad_()
        loss = reweighter.loss(batch, logits, None if reweighter.embedding is None else data.hidden[rows])
        (found,) = torch.autograd.grad(loss, logits)
        gradient[rows] += found
        total = total + loss.detach()
    if over_ranks:  # as the Trainer does
        total, gradient = total * world, gradient * world
    return total, gradient


def over(ranks, work):
    """Return mean loss and gradient over ranks, as DDP makes them."""
    losses, gradients = zip(*ranks.run(work), strict=True)
    return torch.stack(losses).mean(), torch.stack(gradients).mean(dim=0)


def anchored(cls, **params):
    weighter = cls(cls.Params(**params))
    weighter.load_state_dict({"anchors": np.linspace(-1, 1, WIDE, dtype=np.float32)})
    return weighter


def grouped(**params):
    weighter = GroupWeighter(GroupWeighter.Params(**params))
    weighter.prepare(example_context(SIZES), np.arange(ROWS))
    return weighter


WEIGHTERS = {
    "column": lambda: Column(Column.Params()),
    "column-count": lambda: Column(Column.Params(normalizer="num_tokens")),
    "loss": lambda: LossWeighter(LossWeighter.Params(warmup_steps=0)),
    "adapt": lambda: anchored(Adapt, rescale="mean1"),
    "joint": lambda: anchored(JointUpdateAware),
    "slm": lambda: SelectiveLanguageModelling(SelectiveLanguageModelling.Params(reference="r", keep=0.8)),
    "slm-one": lambda: SelectiveLanguageModelling(SelectiveLanguageModelling.Params(reference="r", keep=0.01)),
    "rho": lambda: Rho(Rho.Params(reference="r", keep=0.5)),
    "balanced": lambda: grouped(strategy="class_balanced"),
    "dro": lambda: grouped(strategy="group_dro", eta=0.5),
    "focal": lambda: Focal(Focal.Params()),
    "clip": lambda: TokenWeighter(TokenWeighter.Params(function="clip_quantile", quantile=0.6)),
    "product": lambda: Product(Product.Params(of=(Factor.of("column"), Factor.of("slm", reference="r", keep=0.5)))),
    "product-sample": lambda: Product(Product.Params(of=(Factor.of("loss", warmup_steps=0), Factor.of("column")))),
    "product-count": lambda: Product(Product.Params(of=(Factor.of("focal"), Factor.of("column")))),
    "entropy": lambda: TokenWeighter(TokenWeighter.Params(function="entropy")),
}
PARTS = [np.array([0, 7, 2]), np.array([3, 10, 5]), np.array([6, 1])]  # the last micro-batch is short


def stock(data, parts, items):
    gradient, total = torch.zeros_like(data.logits), torch.zeros(())
    for rows in parts:
        logits = data.logits[rows].clone().requires_grad_()
        targets = F.pad(data.labels[rows], (0, 1), value=-100)[:, 1:].reshape(-1)
        loss = F.cross_entropy(logits.view(-1, WORDS), targets, reduction="sum") / items
        gradient[rows] += torch.autograd.grad(loss, logits)[0]
        total = total + loss.detach()
    return total, gradient


UNIT = {
    "token": lambda: Column(Column.Params(column="ones")),
    "num_tokens": lambda: Column(Column.Params(column="ones", normalizer="num_tokens")),
    "equal domains": lambda: grouped(power=0.0),
    "all tokens": lambda: SelectiveLanguageModelling(SelectiveLanguageModelling.Params(reference="r", keep=1.0)),
    "warm-up": lambda: LossWeighter(LossWeighter.Params(warmup_steps=5)),
}


@pytest.mark.parametrize("name", UNIT)
@pytest.mark.parametrize("over_ranks", [True, False])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_unit_weights_on_two_ranks_are_the_stock_loss(monkeypatch, name, over_ranks, accumulation):
    """Ragged rows, accumulation, a short last micro-batch, and both ways of counting tokens."""
    data = Data()
    sides = [PARTS[:accumulation], [np.array([8, 9, 4]), np.array([11, 4, 6]), np.array([1, 2])][:accumulation]]
    counts = [sum(data.tokens(rows) for rows in side) for side in sides]
    items = [sum(counts)] * 2 if over_ranks else counts
    got = over(
        Ranks(monkeypatch, 2),
        lambda r: step_of(data, UNIT[name], sides[r], over_ranks=over_ranks, world=2, items=items[r]),
    )
    factor = 2.0 if over_ranks else 1.0
    wanted = [stock(data, side, count) for side, count in zip(sides, items, strict=True)]
    torch.testing.assert_close(got[0], factor * (wanted[0][0] + wanted[1][0]) / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(got[1], factor * (wanted[0][1] + wanted[1][1]) / 2, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", WEIGHTERS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("unlabelled", [(), (1, 4, 8, 9)])
def test_two_ranks_are_one_of_twice_the_rows(monkeypatch, name, packed, unlabelled):
    """Also where all of a rank's rows are without supervised tokens: it takes part in every collective."""
    data = Data(unlabelled=unlabelled)
    sides = [[np.array([0, 7]), np.array([2, 3])], [np.array([4, 8]), np.array([9, 1])]]
    whole = [np.concatenate(parts) for parts in zip(*sides, strict=True)]
    items = sum(data.tokens(rows) for rows in whole)
    one = step_of(data, WEIGHTERS[name], whole, packed=packed)
    two = over(
        Ranks(monkeypatch, 2), lambda r: step_of(data, WEIGHTERS[name], sides[r], world=2, packed=packed, items=items)
    )
    assert torch.isfinite(one[0])
    assert one[1].abs().sum() > 0
    for ours, theirs in zip(two, one, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["column", "slm", "loss", "adapt", "rho", "dro"])
@pytest.mark.parametrize("packed", [False, True])
def test_weights_are_told_relative_to_equal_ones(monkeypatch, name, packed):
    """Their mean is 1: over tokens under ``token``, else over sequences (``adapt`` with its weights made so)."""
    told = []
    monkeypatch.setattr(WeightStats, "add", lambda stats, weights, by_sequence: told.append((weights, by_sequence)))
    data, rows = Data(), np.array([0, 7, 2, 3, 10, 5])
    step_of(data, WEIGHTERS[name], [rows], packed=packed)
    [(weights, by_sequence)] = told
    if name in ("column", "slm"):
        mask = F.pad(data.labels[rows], (0, 1), value=-100)[:, 1:].ne(-100)
        mean = (weights * mask).sum() / mask.sum()
    else:
        mean = by_sequence.mean()
    assert float(mean) == pytest.approx(1.0, rel=1e-5)
    assert weights.max() > 1.0


@pytest.mark.parametrize("name", ["loss", "joint", "rho", "dro"])
def test_means_of_sequences_do_not_depend_on_how_tokens_are_counted(monkeypatch, name):
    data, sides = Data(), [[np.array([0, 7])], [np.array([4, 8])]]
    counts = [data.tokens(side[0]) for side in sides]

    def on_two(over_ranks):
        ranks, items = Ranks(monkeypatch, 2), [sum(counts)] * 2 if over_ranks else counts
        return over(
            ranks, lambda r: step_of(data, WEIGHTERS[name], sides[r], over_ranks=over_ranks, world=2, items=items[r])
        )

    for ours, theirs in zip(on_two(True), on_two(False), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", WEIGHTERS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_step_without_a_supervised_token_changes_nothing(name, packed):
    data = Data(unlabelled=range(ROWS))
    loss, gradient = step_of(data, WEIGHTERS[name], PARTS, packed=packed)
    assert loss == 0.0
    assert gradient.abs().sum() == 0.0


# ---------------------------------------------------------------- a weighter and a mixer that weighs the loss


def mixer_with(alpha):
    mixer = DoReMi(DoReMi.Params(reference="r"))
    mixer.mix(example_context(SIZES))
    mixer.log_alpha = logs(np.asarray(alpha))
    return mixer


@pytest.mark.parametrize("name", [name for name in WEIGHTERS if name != "adapt"])
@pytest.mark.parametrize("packed", [False, True])
def test_equal_domain_weights_change_nothing(name, packed):
    data = Data()
    alone = step_of(data, WEIGHTERS[name], PARTS, packed=packed)
    together = step_of(data, WEIGHTERS[name], PARTS, packed=packed, mixer=mixer_with([0.5, 0.5]))
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("normalizer", "over_ranks"), [("weight_sum", True), ("num_tokens", True), ("num_tokens", False)]
)
def test_weights_multiply_before_one_normalization(monkeypatch, normalizer, over_ranks):
    """The step's loss against loops: sum a w l over sum a w (token), or over sum a (count)."""
    data, alpha = Data(), np.array([0.8, 0.2])
    sides = [PARTS[:2], [np.array([8, 9]), np.array([11, 4, 6])]]
    counts = [sum(data.tokens(rows) for rows in side) for side in sides]
    items = [sum(counts)] * 2 if over_ranks else counts
    loss, _ = over(
        Ranks(monkeypatch, 2),
        lambda r: step_of(
            data,
            lambda: Column(Column.Params(normalizer=normalizer)),
            sides[r],
            mixer=mixer_with(alpha),
            over_ranks=over_ranks,
            world=2,
            items=items[r],
        ),
    )
    log_p = F.log_softmax(data.logits.double(), dim=-1)

    def sums(side):
        above = below = 0.0
        for row in np.concatenate(side):
            a, w = alpha[DOMAINS.domain_of[row]], 1.0 + row % 3
            for t in range(1, WIDTH):
                if data.labels[row, t] != -100:
                    above -= a * w * float(log_p[row, t - 1, data.labels[row, t]])
                    below += a * (w if normalizer == "weight_sum" else 1.0)
        return above, below

    pairs = [sums(side) for side in sides]
    wanted = sum(a for a, _ in pairs) / sum(b for _, b in pairs) if over_ranks else sum(a / b for a, b in pairs) / 2
    assert float(loss) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("beside", ["nothing", "column"])
def test_weights_of_a_selection_multiply_those_of_a_weighter(beside):
    """The step's loss against loops: sum of selection's weight x column x token loss over the number of tokens."""
    data, chosen = Data(), np.linspace(0.5, 3.0, ROWS)

    def make():
        ours = OfSelection("num_tokens", lambda rows: chosen[rows])
        return ours if beside == "nothing" else Product.joined(Column(Column.Params(normalizer="num_tokens")), ours)

    loss, _ = step_of(data, make, PARTS)
    log_p, above, tokens = F.log_softmax(data.logits.double(), dim=-1), 0.0, 0
    for row in np.concatenate(PARTS).tolist():
        weight = chosen[row] * (1.0 if beside == "nothing" else 1.0 + row % 3)
        for t in range(1, WIDTH):
            if data.labels[row, t] != -100:
                above -= weight * float(log_p[row, t - 1, data.labels[row, t]])
                tokens += 1
    assert float(loss) == pytest.approx(above / tokens, rel=1e-5)


def test_in_the_warmup_the_mixer_weighs_alone():
    data, mixer = Data(), mixer_with([0.9, 0.1])
    alone = step_of(data, None, PARTS, mixer=mixer)
    together = step_of(data, UNIT["warm-up"], PARTS, mixer=mixer)
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])
