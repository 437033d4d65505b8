"""The proxy run of DoReMi through the real training path: its weights reach the loss, and it resumes exactly."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from dataflex.errors import ConfigError
from dataflex.mixers.loss_weights import DoReMi
from dataflex.plan.domains import Domains
from dataflex.plan.proportions import logs, read_proportions
from dataflex.testing import example_context
from dataflex.train.loader import ROWS
from dataflex.train.loss import Reweighter, token_losses

SETTINGS = {
    "dataset": "alpha,beta,gamma",
    "max_steps": 6,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "save_strategy": "steps",
    "save_steps": 1,
}


@pytest.fixture
def reference(run):
    """The tiny model after 8 steps on the natural mix."""
    trained = run("reference", dataset=SETTINGS["dataset"], max_steps=8, learning_rate=5e-3, dynamic={"mixer": "size"})
    return str(trained.folder)


def proxy(reference, **params):
    return {"dynamic": {"mixer": {"name": "doremi", "reference": reference, "eta": 5.0, **params}}}


@pytest.mark.parametrize("variant", ["repo", "paper"])
def test_the_proxy_learns_weights_and_resumes_bit_for_bit(run, reference, variant):
    settings = {**SETTINGS, **proxy(reference, variant=variant)}
    straight = run("straight", **settings)
    losses, found = straight.series(), read_proportions(straight.folder / "dataflex" / "doremi.json")
    assert found.names == ("alpha", "beta", "gamma")
    assert found.details["steps"] == 6
    assert found.details["trajectory"]["steps"] == list(range(7))
    assert max(abs(share - 1 / 3) for share in found.proportions) > 1e-4
    assert len(list((straight.folder / "dataflex" / "reference").glob("reference-losses-*/array.npy"))) == 1
    logged = [entry["dataflex/loss_weight/alpha"] for entry in straight.log]
    assert len(set(logged)) == 6

    resumed_from = 3
    folder = run.folder / "resumed"
    shutil.copytree(straight.folder / f"checkpoint-{resumed_from}", folder / f"checkpoint-{resumed_from}")
    shutil.copytree(straight.folder / "dataflex", folder / "dataflex")
    (folder / "dataflex" / "doremi.json").unlink()
    resumed = run("resumed", **settings, resume_from_checkpoint=str(folder / f"checkpoint-{resumed_from}"))
    assert resumed.series() == losses
    again = read_proportions(folder / "dataflex" / "doremi.json")
    assert again.proportions == found.proportions
    assert again.details == found.details
    ours, theirs = resumed.weights(), straight.weights()
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("block", [{}, {"selector": "random", "keep_ratio": 0.5, "repeat": True, "interval_steps": 2}])
def test_weights_are_corrected_by_the_proportions_of_each_step(run, reference, block):
    """Those of warm-up are others; a step size of nearly 0 leaves all weights at a third."""
    settings = proxy(reference, eta=1e-12, smoothing=0.0)
    settings["dynamic"] |= {"warmup_steps": 2, "initial_proportions": [2, 1, 1], **block}
    ran = run("warm", **{**SETTINGS, "save_strategy": "no", "max_steps": 4}, **settings)
    logged = [[entry[f"dataflex/loss_weight/{name}"] for name in ("alpha", "beta", "gamma")] for entry in ran.log]
    np.testing.assert_allclose(logged, [[0.2, 0.4, 0.4]] * 2 + [[1 / 3] * 3] * 2, atol=1e-9)


def test_a_cached_reference_gives_what_a_live_one_gives(run, reference):
    cached = run("cached", **SETTINGS, **proxy(reference))
    live = run("live", **SETTINGS, **proxy(reference, reference_cache=False))
    assert not (live.folder / "dataflex" / "reference").exists()
    one, other = (read_proportions(r.folder / "dataflex" / "doremi.json") for r in (cached, live))
    np.testing.assert_allclose(one.proportions, other.proportions, atol=1e-3)  # losses are kept in half precision
    np.testing.assert_allclose(cached.series(), live.series(), atol=1e-3)


def test_the_reference_matters(run, reference, tiny_model):
    good = run("good", **SETTINGS, **proxy(reference))
    same = run("same", **SETTINGS, **proxy(str(tiny_model)))  # the untrained model itself: next to no excess at first
    one, other = (read_proportions(r.folder / "dataflex" / "doremi.json") for r in (good, same))
    assert np.abs(np.subtract(one.proportions, other.proportions)).max() > 1e-4
    assert good.series()[0] == same.series()[0]  # the first step's weights are equal ones
    assert good.series()[2:] != same.series()[2:]  # the weights of later ones reach the loss


def test_a_missing_or_foreign_reference_is_refused(run, reference, tmp_path):
    with pytest.raises(ConfigError, match=r"dynamic\.mixer\.reference: no such folder: .*refrence; did you mean"):
        run("missing", **SETTINGS, **proxy(str(run.folder / "refrence")))
    with pytest.raises(ConfigError, match=r"dynamic\.mixer\.reference: missing"):
        run("none", **SETTINGS, dynamic={"mixer": {"name": "doremi"}})
    foreign = tmp_path / "foreign"
    shutil.copytree(reference, foreign)
    file = foreign / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    words["cat"], words["dog" if "dog" in words else "dogs"] = words["dog" if "dog" in words else "dogs"], words["cat"]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the tokenizer of .*foreign is not that of the run: .* 2 differ"):
        run("foreign-run", **SETTINGS, **proxy(str(foreign)))
    assert not list((run.folder / "foreign-run").glob("checkpoint-*"))


# ---------------------------------------------------------------- the weights reach the gradient


@pytest.mark.parametrize("variant", ["repo", "paper"])
def test_one_hot_weights_train_on_one_domain_alone(variant):
    """The gradient is that of the mean over the tokens of domain 0."""
    torch.manual_seed(0)
    domains = Domains.from_sizes(("a", "b"), (4, 4))
    mixer = DoReMi(DoReMi.Params(reference="ref", variant=variant))
    mixer.mix(example_context({"a": 4, "b": 4}))
    logits = torch.randn(6, 5, 11, requires_grad=True)
    labels = torch.randint(0, 11, (6, 5))
    labels[torch.rand(6, 5) < 0.3] = -100
    labels[:, 0] = -100
    rows = np.array([0, 5, 1, 6, 2, 7])

    def gradient():
        reweighter = Reweighter(None, mixer, columns={}, domains=domains, over_ranks=True, world=1)
        parts = [(slice(0, 4), rows[:4]), (slice(4, 6), rows[4:])]
        items = labels.ne(-100).sum()
        batches = [{"labels": labels[part], ROWS: ids} for part, ids in parts]
        reweighter.begin_step(batches, items, torch.device("cpu"), index=0, total=1)
        total = torch.zeros(())
        for (part, _), batch in zip(parts, batches, strict=True):
            total = total + reweighter.loss(batch, logits[part])
        (found,) = torch.autograd.grad(total, logits)
        return found

    def mean_over(keep):
        losses = token_losses(logits, labels)
        mask = losses.mask_BT & torch.from_numpy(keep)[:, None]
        (found,) = torch.autograd.grad((losses.loss_BT * mask).sum() / mask.sum(), logits)
        return found

    equal = gradient()
    mixer.log_alpha = logs(np.array([1.0, 0.0]))
    one_hot = gradient()
    torch.testing.assert_close(one_hot, mean_over(rows < 4), atol=1e-7, rtol=1e-5)
    assert not torch.allclose(one_hot, equal, atol=1e-3)
    if variant == "repo":
        torch.testing.assert_close(equal, mean_over(rows < 99), atol=1e-7, rtol=1e-5)
    else:
        half = 0.5 * mean_over(rows < 4) + 0.5 * mean_over(rows >= 4)
        torch.testing.assert_close(equal, half, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("variant", "want"), [("repo", 2.2), ("paper", 2.5)])
def test_normalizers(variant, want):
    """Domain a has token losses 1, 2, 3 and b has 4, with weights .75 and .25."""
    mixer = DoReMi(DoReMi.Params(reference="ref", variant=variant))
    mixer.mix(example_context({"a": 1, "b": 1}))
    mixer.log_alpha = logs(np.array([0.75, 0.25]))
    losses = torch.tensor([[1.0, 2.0, 3.0, 0.0], [4.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([[-100, 0, 0, 0, -100], [-100, 0, -100, -100, -100]])
    # Two classes, class 0 with probability exp(-loss).
    p = torch.exp(-losses)
    logits = torch.stack([torch.log(p), torch.log1p(-p.clamp(max=1 - 1e-9))], dim=-1)
    logits = torch.cat([logits, torch.zeros(2, 1, 2)], dim=1).float()
    reweighter = Reweighter(
        None, mixer, columns={}, domains=Domains.from_sizes(("a", "b"), (1, 1)), over_ranks=True, world=1
    )
    batch, items = {"labels": labels, ROWS: np.array([0, 1])}, labels.ne(-100).sum()
    reweighter.begin_step([batch], items, torch.device("cpu"), index=0, total=1)
    loss = reweighter.loss(batch, logits)
    assert float(loss) == pytest.approx(want, abs=1e-5)


# ---------------------------------------------------------------- rows are scored plan by plan


@pytest.mark.parametrize("store", ["kept", "lost"])
def test_a_reference_that_scores_plan_by_plan_resumes_bit_for_bit(run, reference, store):
    """Killed in the middle of the second plan; the arrays of the passes may be gone."""
    block = {
        "interval_steps": 2,
        "selector": {"name": "loss", "focus": "high"},
        "weighter": {"name": "slm", "reference": reference},
    }
    settings = {**SETTINGS, "gradient_accumulation_steps": 1, "dynamic": block}
    straight = run("straight", **settings)
    passes = sorted(path.name for path in (straight.folder / "dataflex" / "reference").glob("reference-losses-*"))
    assert len(passes) >= 2
    folder = run.folder / "resumed"
    shutil.copytree(straight.folder / "checkpoint-3", folder / "checkpoint-3")
    shutil.copytree(straight.folder / "dataflex", folder / "dataflex")
    if store == "lost":
        shutil.rmtree(folder / "dataflex" / "reference")
    resumed = run("resumed", **settings, resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert resumed.series() == straight.series()
    ours, theirs = resumed.weights(), straight.weights()
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    again = {path.name for path in (folder / "dataflex" / "reference").glob("reference-losses-*")}
    assert again <= set(passes)
