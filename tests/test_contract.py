"""Broken plugins: the author is told what the contract wants, with the class and its file; no traceback of ours."""

from __future__ import annotations

import itertools
import textwrap

import numpy as np
import pytest

from dataflex import registry
from dataflex.cli import main
from dataflex.config.build import parse_dynamic
from dataflex.errors import ComponentError, ConfigError
from dataflex.method import Method
from dataflex.testing import example_context
from dataflex.validate import check_mix, check_selection, check_state, check_static_weights, check_weights

HEAD = """
from dataclasses import dataclass, field
import numpy as np
from dataflex import Card, Mix, Mixer, Requires, Selection, Selector, Weighter
from dataflex import Params as BaseParams
CARD = Card(summary="Does it.", paper="baseline", cost="none")
"""
COUNT = itertools.count()


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    monkeypatch.setattr(registry, "_plugins", {kind: {} for kind in registry.KINDS})
    monkeypatch.setattr(registry, "_plugin_files", {})


def write(tmp_path, body):
    path = tmp_path / f"mine{next(COUNT)}.py"
    path.write_text(HEAD + textwrap.dedent(body))
    return path


def built(tmp_path, body):
    (cls,) = registry.load_plugin(write(tmp_path, body))
    return registry.find(cls.kind, cls.name)(cls.Params())


def told(tmp_path, body):
    path = write(tmp_path, body)
    with pytest.raises(ConfigError) as caught:
        parse_dynamic({"plugins": [str(path)], "selector": "random"}, tmp_path)
    text = str(caught.value)
    assert str(path) in text
    return text


SELECT = "    def select(self, pool, budget, ctx): return Selection(rows=pool[:budget])"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (f"class A(Selector):\n    name = 'a'\n{SELECT}", "'card' must be dataflex.Card"),
        (f"class A(Selector):\n    name, card = 'a', 'text'\n{SELECT}", "found a value of type str"),
        (f"class A(Selector):\n    name, card = 'a', Card(summary='', paper=3, cost='x')\n{SELECT}", "card.summary"),
        (f"class A(Selector):\n    name, card = '../a', CARD\n{SELECT}", "'name' must be a word"),
        (f"class A(Selector):\n    name, card = 5, CARD\n{SELECT}", "'name' must be a word"),
        ("class A(Selector):\n    name, card = 'a', CARD", "select(pool, budget, ctx) is missing"),
        ("class A(Mixer):\n    name, card = 'a', CARD", "mix(ctx) is missing"),
        ("class A(Weighter):\n    name, card = 'a', CARD", "weigh(batch) or static_weights(rows, columns) is missing"),
        (
            "class A(Selector):\n    name, card = 'a', CARD\n    def select(self, pool, ctx): return 1",
            "select(self, pool, ctx) cannot be called as select(self, pool, budget, ctx)",
        ),
        ("class A(Mixer):\n    name, card, mix = 'a', CARD, 3", "mix must be a method: def mix(self, ctx)"),
        (
            f"class A(Selector):\n    name, card = 'a', CARD\n{SELECT}\n"
            "    @dataclass(frozen=True, kw_only=True)\n    class Params(BaseParams):\n        rate: float = 1.0",
            "parameter 'rate' has no help; write rate: ... = field(",
        ),
        (
            f"class A(Selector):\n    name, card = 'a', CARD\n{SELECT}\n"
            "    class Params(BaseParams):\n        rate: float = 1.0",
            "'Params' must be a dataclass: write @dataclass",
        ),
        (
            f"class A(Selector):\n    name, card = 'a', CARD\n{SELECT}\n    class Params:\n        pass",
            "subclass of dataflex.Params",
        ),
        (
            f"class A(Selector):\n    name, card = 'a', CARD\n{SELECT}\n    def state_dict(self): return {{}}",
            "state_dict and load_state_dict go together",
        ),
        (
            f"class A(Selector):\n    name, card = 'a', CARD\n{SELECT}\n    requires = 3",
            "requires must be a method: def requires(self)",
        ),
        (
            "class A(Mixer):\n    name, card, observes = 'a', CARD, True\n    def mix(self, ctx): return None",
            "observes is True, and observe(stats) is missing",
        ),
        (f"class A(Selector):\n    card = CARD\n{SELECT}", "defines no method"),
        (f"class A(Selector):\n    name, card = 'loss', CARD\n{SELECT}", "is the name of a built-in method"),
        (
            f"class A(Selector):\n    name, card = 'a', CARD\n{SELECT}\n"
            f"class B(Selector):\n    name, card = 'a', CARD\n{SELECT}",
            "selector 'a' is there twice",
        ),
        (
            "import nothing_of_that_name",
            "cannot be imported: ModuleNotFoundError: No module named 'nothing_of_that_name' (line 7)",
        ),
        ("def f(:", "SyntaxError"),
        ("x = 1 / 0", "ZeroDivisionError: division by zero (line 7)"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_classes_that_lack_something(tmp_path, body, expected):
    text = told(tmp_path, body)
    assert expected in text
    if "class A" in body and "defines no" not in expected:
        assert "class A (" in text
        assert ", line " in text


def test_everything_that_lacks_is_told_at_once(tmp_path):
    text = told(tmp_path, "class A(Selector):\n    name = 'a'\n    Params = 3\nclass B(Mixer):\n    name = 'b'")
    assert [word for word in ("'card'", "'Params'", "select(", "mix(") if word not in text] == []
    assert {line.partition(":")[0] for line in text.splitlines()} == {"dynamic.plugins"}


@pytest.mark.parametrize(
    ("gives", "expected"),
    [
        ("[0, 1]", "select gave a value of type list; it must give dataflex.Selection("),
        ("None", "select gave a value of type NoneType"),
        ("Selection(rows=[0, 1])", "select gave rows as a value of type list; expected int64 [n]"),
        ("Selection(rows=pool.astype(float))", "rows as an array of float64"),
        ("Selection(rows=pool[:, None])", "shape (6, 1)"),
        ("Selection(rows=pool[:1], scores=[1.0] * 6)", "scores as a value of type list"),
        ("Selection(rows=pool[:1], scores=np.array(['a'] * 6))", "scores as an array of <U1"),
        ("Selection(rows=pool[:1], reason=3)", "a reason of type int"),
        ("Selection(rows=pool[:1] + 99)", "1 rows that are not in the pool, such as 99"),
        ("Selection(rows=pool)", "6 rows for a budget of 3"),
        ("Selection(rows=pool[:1], scores=np.ones(2))", "2 scores for a pool of 6 rows"),
    ],
)
def test_what_selectors_give(tmp_path, gives, expected):
    head = "class A(Selector):\n    name, card = 'a', CARD\n"
    body = f"{head}    def select(self, pool, budget, ctx):\n        return {gives}"
    selector = built(tmp_path, body)
    with pytest.raises(ComponentError) as caught:
        check_selection(selector, selector.select(np.arange(6), 3, example_context({"a": 6})), np.arange(6), 3)
    assert expected in str(caught.value)
    assert "class A (" in str(caught.value)
    assert "line 9)" in str(caught.value)


@pytest.mark.parametrize(
    ("gives", "expected"),
    [
        ("np.array([0.5, 0.5])", "mix gave an array of float64 and shape (2,); it must give dataflex.Mix(proportions="),
        ("[0.5, 0.5]", "a value of type list"),
        ("Mix(proportions=np.array([1.0]))", "returned [1.0] for the domains a, b"),
        ("Mix(proportions=np.array([np.nan, 1.0]))", "one finite number >= 0 each"),
        ("Mix(proportions=np.array([-1.0, 2.0]))", "one finite number >= 0 each"),
        ("Mix(proportions={'a': 1})", "proportions as a value of type dict"),
        ("Mix(proportions=['a', 'b'])", "proportions as a value of type list"),
    ],
)
def test_what_mixers_give(tmp_path, gives, expected):
    mixer = built(
        tmp_path, f"class A(Mixer):\n    name, card = 'a', CARD\n    def mix(self, ctx):\n        return {gives}"
    )
    with pytest.raises(ComponentError) as caught:
        check_mix(mixer, mixer.mix(example_context({"a": 6, "b": 2})), ("a", "b"))
    assert expected in str(caught.value)
    assert "class A (" in str(caught.value)


@pytest.mark.parametrize(
    ("gives", "expected"),
    [
        ("np.ones(3)", "weigh gave an array of float64 and shape (3,); it must give a torch tensor"),
        ("None", "weigh gave a value of type NoneType"),
        ("torch.ones(3, dtype=torch.int64)", "a tensor of torch.int64"),
        ("torch.ones(4)", "weights of shape (4,); expected (3,) or (3, 5)"),
        ("torch.ones(3, 1)", "weights of shape (3, 1)"),
    ],
)
def test_what_weighters_give(tmp_path, gives, expected):
    head = "import torch\nclass A(Weighter):\n    name, card = 'a', CARD\n"
    body = f"{head}    def weigh(self, batch):\n        return {gives}"
    weighter = built(tmp_path, body)
    with pytest.raises(ComponentError) as caught:
        check_weights(weighter, weighter.weigh(None), [(3,), (3, 5)])
    assert expected in str(caught.value)
    assert "class A (" in str(caught.value)


def test_other_answers_of_weighters_and_states(tmp_path):
    weighter = built(
        tmp_path,
        """
        class A(Weighter):
            name, card = "a", CARD
            def static_weights(self, rows, columns): return np.ones(len(rows) + 1)
            def requires(self): return Requires(columns="weight")
            def state_dict(self): return {"seen": {"rows": {1, 2}}}
            def load_state_dict(self, state): pass
            @property
            def normalizer(self): return "tokens"
        """,
    )
    with pytest.raises(ComponentError, match=r"weights of shape \(4,\) for 3 rows: class A"):
        check_static_weights(weighter, np.arange(3), {})
    with pytest.raises(
        ComponentError, match="requires raised ValueError: columns='weight': must be a tuple of names: class A"
    ):
        weighter.requires()
    with pytest.raises(ComponentError, match=r"state of weighter 'a'\.seen\.rows: a set cannot be saved; .*: class A"):
        check_state(weighter)
    with pytest.raises(
        ComponentError, match="normalizer gave 'tokens'; it must give 'weight_sum', 'num_tokens' or 'num_sequences'"
    ):
        _ = weighter.normalizer


def test_what_a_plugin_raises_keeps_its_own_frames_and_says_which_call_it_was(tmp_path):
    selector = built(
        tmp_path,
        """
        def helper(values):
            return values["gone"]

        class A(Selector):
            name, card = "a", CARD
            def select(self, pool, budget, ctx):
                return helper({})
        """,
    )
    with pytest.raises(ComponentError) as caught:
        selector.select(np.arange(3), 1, None)
    first, *trace = str(caught.value).splitlines()
    assert first.startswith("selector 'a': select raised KeyError: 'gone': class A (")
    assert "return helper({})" in "\n".join(trace)
    assert 'return values["gone"]' in "\n".join(trace)
    assert "contract.py" not in "\n".join(trace)
    assert isinstance(caught.value.__cause__, KeyError)


def test_constructors_and_parameters_that_raise(tmp_path):
    body = """
    class A(Selector):
        name, card = "a", CARD
        @dataclass(frozen=True, kw_only=True)
        class Params(BaseParams):
            rate: float = field(default=1.0, metadata={"help": "rate"})
            def __post_init__(self):
                if self.rate > 1: raise TypeError("too much")
        def __init__(self, params):
            raise OSError("no such thing")
        def select(self, pool, budget, ctx): return Selection(rows=pool)
    """
    path = write(tmp_path, body)
    with pytest.raises(ConfigError, match="selector 'a': __init__ raised OSError: no such thing: class A"):
        parse_dynamic({"plugins": [str(path)], "interval_steps": 2, "selector": "a"}, tmp_path)
    with pytest.raises(ComponentError, match=r"parameters raised TypeError: too much: class A\.Params"):
        parse_dynamic({"plugins": [str(path)], "selector": {"name": "a", "rate": 2}}, tmp_path)


def test_methods_of_a_plugin_are_watched_once_and_ours_never(tmp_path):
    from dataflex.selectors.losses import LossSelector

    before = LossSelector.select
    assert registry.find("selector", "loss").select is before
    path = write(tmp_path, f"class A(Selector):\n    name, card = 'a', CARD\n{SELECT}")
    (cls,) = registry.load_plugin(path)
    call = cls.select
    assert registry.find("selector", "a").select is call
    assert issubclass(cls, Method)


def test_entry_points_are_held_to_the_same(tmp_path, monkeypatch, capsys):
    import sys

    (tmp_path / "their_package.py").write_text(
        "from dataflex import Selector\nclass NoCard(Selector):\n    name = 'no_card'\nnot_one = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    class Point:
        def __init__(self, name):
            self.name, self.value = name, f"their_package:{name}"

        def load(self):
            import importlib

            return getattr(importlib.import_module("their_package"), self.name)

    monkeypatch.setattr(registry, "entry_points", lambda group: [Point("NoCard"), Point("not_one"), Point("gone")])
    with pytest.raises(
        ComponentError, match=r"'card' must be dataflex\.Card.*class NoCard \(.*their_package\.py, line 2"
    ):
        registry.find("selector", "NoCard")
    with pytest.raises(ComponentError, match=r"3 is not a subclass of dataflex\.Selector"):
        registry.find("selector", "not_one")
    with pytest.raises(ComponentError, match="their_package:gone cannot be imported: AttributeError"):
        registry.find("selector", "gone")
    assert main(["methods"]) == 0
    assert "not available: selector/NoCard: " in capsys.readouterr().out
    sys.modules.pop("their_package")
