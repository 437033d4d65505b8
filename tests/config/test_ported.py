"""A user's classes for existing DataFlex: the block that they amount to, and what is refused before a model loads."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.commands.plan import plan
from dataflex.config.split import resolve
from dataflex.errors import ComponentError, ConfigError
from dataflex.testing import FakeSignals, example_context

Config = Callable[..., dict[str, Any]]

SELECTOR = """
from dataflex.core.registry import register_selector
from .base_selector import Selector

@register_selector("custom_rows")
class Mine(Selector):
    def __init__(self, dataset, accelerator, data_collator, cache_dir{more}):
        super().__init__(dataset, accelerator, data_collator, cache_dir)

    def select(self, model, step_id: int, num_samples: int, **kwargs):
        {body}
        return list(range(num_samples))
"""
WEIGHTER = """
from dataflex.core.registry import register_weighter
from .base_weighter import Weighter

@register_weighter("custom_weights")
class Mine(Weighter):
    def __init__(self{more}):
        pass

    def get_weighted_loss(self, losses, *, ctx=None, model=None, inputs=None):
        {body}
        return losses.mean()
"""


def written(project: Path, config: Config, kind: str, text: str, **entry: Any) -> dict[str, Any]:
    """Write a file of classes, named after its text, and return a configuration that names it."""
    file = project / f"file_{abs(hash(text))}.py"
    file.write_text(text, encoding="utf-8")
    name = "custom_rows" if kind == "selector" else "custom_weights"
    found = {"name": name, "file": file.name, "params": {"cache_dir": "x"} if kind == "selector" else {}, **entry}
    (project / "own.yaml").write_text(f"{kind}s: {{custom: {found}}}", encoding="utf-8")
    keys = {"components_cfg_file": "own.yaml", "component_name": "custom", "update_step": 2}
    return config(dynamic=None, train_type=f"dynamic_{kind.removesuffix('or').removesuffix('er')}", **keys)


def test_the_block_is_printed(config: Config, project: Path) -> None:
    mapping = written(project, config, "selector", SELECTOR.format(more=", least=3", body="pass"))
    file = project / "c.json"
    file.write_text(json.dumps(mapping), encoding="utf-8")
    text = plan(file)
    assert "  plugins:\n" in text or "plugins: [" in text, text
    assert "least: 3" in text
    assert "random numbers begin anew at every call" in text


@pytest.mark.parametrize(
    ("kind", "more", "body", "told"),
    [
        ("selector", "", "kwargs['optimizer_state']", "select looks into **kwargs"),
        ("selector", "", "self.accelerator.prepare(model)", "self.accelerator.prepare is of their Trainer"),
        ("selector", "", "self._scores_for([], model, 0)", "self._scores_for is of their base class"),
        ("selector", ", eval_dataset=None", "pass", "__init__ takes eval_dataset"),
        ("selector", ", seen=[]", "pass", "the default of seen can be changed"),
        ("weighter", "dataset", "pass", "__init__ takes dataset"),
        ("weighter", "", "model(inputs)", "get_weighted_loss looks at model"),
        ("weighter", "", "ctx.optimizer.step()", "ctx.optimizer.step is of their Trainer"),
    ],
)
def test_what_is_not_given_is_refused(
    config: Config, project: Path, kind: str, more: str, body: str, told: str
) -> None:
    more = f", {more}=None" if kind == "weighter" and more else more
    text = (SELECTOR if kind == "selector" else WEIGHTER).format(more=more, body=body)
    with pytest.raises(ConfigError) as caught:
        resolve(written(project, config, kind, text), project)
    assert told in "\n".join(caught.value.problems)
    assert "docs/writing-a-method.md has a table of the calls" in "\n".join(caught.value.problems) or more


def test_other_mistakes_of_a_file_are_told(config: Config, project: Path) -> None:
    text = SELECTOR.format(more="", body="pass")
    for changed, entry, told in [
        (text, {"name": "custom_row"}, "registers no selector 'custom_row'; did you mean 'custom_rows'?"),
        (text, {"file": "nowhere.py"}, "selectors.custom.file: no such file: nowhere.py"),
        (text, {"params": {}}, "params.cache_dir: missing"),
        (text, {"params": {"cache_dir": "x", "lest": 1}}, "params.lest: unknown key"),
        ("import dataflex.utils.selector_io  # register_selector", {}, "No module named 'dataflex.utils.selector_io'"),
        (text.replace("step_id: int, num_samples: int, **kwargs", "pool"), {}, "cannot be called with model"),
    ]:
        with pytest.raises(ConfigError) as caught:
            resolve(written(project, config, "selector", changed, **entry), project)
        assert told in "\n".join(caught.value.problems), caught.value.problems


def given() -> Any:
    """Return signals that give what a class is given of the run."""
    signals: Any = FakeSignals(np.zeros(8))
    signals.access = SimpleNamespace(
        model=torch.nn.Linear(1, 1), train=SimpleNamespace(dataset=[]), device="cpu", collate=None, tokenizer=None
    )
    return signals


def test_what_a_class_raises_is_told_with_its_own_place(config: Config, project: Path) -> None:
    text = SELECTOR.format(more="", body="raise KeyError('lost')")
    dynamic = resolve(written(project, config, "selector", text), project).dynamic
    assert dynamic is not None
    assert dynamic.selector is not None
    selector, ctx = dynamic.selector.build(), example_context({"a": 8}, signals=given())
    with pytest.raises(ComponentError) as caught:
        selector.select(np.arange(8), 2, ctx)  # type: ignore[attr-defined]
    told = str(caught.value)
    line = 1 + text.splitlines().index("    def select(self, model, step_id: int, num_samples: int, **kwargs):")
    place = f"class Mine ({project / Path(dynamic.plugins[0]).name}, line {line})"
    assert f"select raised KeyError: 'lost': {place}" in told


def test_what_a_class_draws_and_leaves_behind_is_its_own(config: Config, project: Path) -> None:
    body = "import random, numpy, torch; random.random(), numpy.random.random(), torch.rand(()); model.eval()"
    dynamic = resolve(written(project, config, "selector", SELECTOR.format(more="", body=body)), project).dynamic
    assert dynamic is not None
    assert dynamic.selector is not None
    model, signals = torch.nn.Linear(2, 2), given()
    signals.access.model = model

    def states() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), model.training

    before = states()
    dynamic.selector.build().select(np.arange(8), 2, example_context({"a": 8}, signals=signals))
    assert states() == before
