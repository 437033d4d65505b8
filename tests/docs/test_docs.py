"""What is written is true as far as a machine can tell: blocks parse, tables match the code, every method is there."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import sys
from dataclasses import MISSING, fields, is_dataclass

import numpy as np
import pytest
import yaml

from dataflex.compare.audit import read_audit
from dataflex.compare.suite import read_suite
from dataflex.config.build import parse_dynamic
from dataflex.config.check import _REFUSED, _REFUSED_WITH_TOKEN_LOSSES
from dataflex.config.mappings import describe, field_hints, plain, shown
from dataflex.config.schema import FLAT_KEYS, AverageConfig, DynamicConfig, FlatKeys, LedgerConfig, SignalsConfig
from dataflex.config.split import split
from dataflex.contract import class_problems
from dataflex.method import SIGNALS, BatchView, Context, Params, Requires, Signals
from dataflex.orderers.patterns import By
from dataflex.plan.domains import DomainStats
from dataflex.plan.rollouts import RolloutStats
from dataflex.plan.schedule import Interval
from dataflex.registry import KINDS, find, names
from dataflex.signals import kinds
from dataflex.testing import example_context, example_stats
from tests.docs.pages import EXAMPLES, ROOT, TEXTS, blocks

OURS = ("dataflex.selectors.", "dataflex.mixers.", "dataflex.orderers.", "dataflex.weighters.")
METHODS = [(kind, name) for kind in KINDS for name in names(kind) if find(kind, name).__module__.startswith(OURS)]


def test_the_expected_pages_are_there():
    expected = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md", "examples/data/README.md"}
    expected |= {
        f"docs/{name}.md"
        for name in (
            "configuration",
            "design",
            "limits",
            "methods",
            "offline",
            "paper-index",
            "report",
            "writing-a-method",
        )
    }
    assert expected <= set(TEXTS)


# ---------------------------------------------------------------- configurations


def dynamic_blocks():
    found = []
    for page, code in blocks("yaml"):
        mapping = yaml.safe_load(code)
        assert isinstance(mapping, dict), (page, code)
        found.append((page, mapping))
    return found


@pytest.mark.parametrize(("page", "mapping"), dynamic_blocks())
def test_every_yaml_block_is_valid(page, mapping, tmp_path, monkeypatch):
    """Strictly, as a configuration that lies in examples/ would be, or a suite beside the page."""
    if "leave_one_out" in mapping:
        monkeypatch.chdir(ROOT)
        file = tmp_path / "audit.json"
        file.write_text(json.dumps({**mapping, "base": str((ROOT / page).parent / mapping["base"])}))
        assert read_audit(file).names == list(mapping["scores"])
    elif "arms" in mapping:
        monkeypatch.chdir(ROOT)
        base, file = str((ROOT / page).parent / mapping["base"]), tmp_path / "suite.json"
        file.write_text(json.dumps({**mapping, "base": base, "evaluate": None}))
        assert read_suite(file, work=tmp_path).claims
    elif "dynamic" in mapping:
        dynamic = parse_dynamic(mapping["dynamic"], EXAMPLES)
        assert dynamic.methods or dynamic.ledger or dynamic.average_weights or dynamic.stock
    else:
        assert set(mapping) & set(FLAT_KEYS), f"{page}: neither a dynamic block nor flat keys"
        assert split(mapping, EXAMPLES).dynamic is not None


def rows_of(page, heading):
    """Cells of the first table below a heading, its head and ruler left out."""
    text = TEXTS[page]
    text = text[text.index(f"{heading}\n") :]
    lines = re.search(r"((?:^\|.*\n)+)", text, re.MULTILINE).group(1).splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]


def default(field):
    return "`" + shown(plain(field.default)).strip("'") + "`"


@pytest.mark.parametrize(
    ("cls", "heading"),
    [
        (DynamicConfig, "## The dynamic block"),
        (SignalsConfig, "### Signals"),
        (LedgerConfig, "### The ledger"),
        (AverageConfig, "### An average of the weights"),
    ],
)
def test_every_key_of_the_dynamic_block_is_described_as_it_is(cls, heading):
    table = {row[0].strip("`"): row for row in rows_of("docs/configuration.md", heading)}
    known = [field for field in fields(cls) if field.metadata.get("user", True)]
    assert list(table) == [field.name for field in known]
    hints, words = field_hints(cls), {"minimum": "at least", "above": "above", "maximum": "at most"}
    for field in known:
        limits = [f"{word} {field.metadata[key]:g}" for key, word in words.items() if key in field.metadata]
        takes = ", ".join([describe(hints[field.name]), *limits])
        takes = "a name, or a mapping with `name`" if field.name in KINDS else takes
        told = "all of its defaults" if is_dataclass(field.default) else default(field)
        told = "must be given" if field.default is MISSING else told
        assert table[field.name][1:3] == [takes, told], field.name


def test_every_flat_key_is_described_with_its_default():
    table = {row[0].strip("`"): row for row in rows_of("docs/configuration.md", "## Flat keys")}
    assert list(table) == list(FLAT_KEYS)
    for field in fields(FlatKeys):
        assert table[field.name][1] == default(field), field.name


def test_every_refused_setting_is_told():
    limits = TEXTS["docs/limits.md"]
    assert [key for key in [*_REFUSED, *_REFUSED_WITH_TOKEN_LOSSES] if f"`{key}`" not in limits] == []


# ---------------------------------------------------------------- methods


@pytest.fixture(scope="module")
def renderer():
    spec = importlib.util.spec_from_file_location("render_methods", ROOT / "docs" / "render_methods.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["render_methods"] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules["render_methods"]


@pytest.mark.slow
def test_the_gallery_is_what_the_classes_say(renderer):
    """Otherwise: make docs."""
    assert renderer.render() == TEXTS["docs/methods.md"]


@pytest.mark.slow
def test_the_gallery_check_can_fail(renderer, tmp_path, monkeypatch, capsys):
    assert renderer.main(["--check"]) == 0
    monkeypatch.setattr(renderer, "PAGE", tmp_path / "methods.md")
    assert renderer.main(["--check"]) == 1
    assert "python docs/render_methods.py" in capsys.readouterr().err
    assert renderer.main([]) == 0
    assert renderer.main(["--check"]) == 0


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_every_method_is_in_the_tables(kind, name):
    assert f"{kind} [`{name}`](methods.md#{kind}-{name})" in TEXTS["docs/paper-index.md"]
    assert f"\n### {kind} {name}\n" in TEXTS["docs/methods.md"]


def test_every_paper_is_in_the_index():
    for kind, name in METHODS:
        for number in re.findall(r"arXiv (\d{4}\.\d{5})", find(kind, name).card.paper):
            assert f"(https://arxiv.org/abs/{number})" in TEXTS["docs/paper-index.md"], name


def test_the_methods_that_the_readme_names_are_of_the_family():
    for page in ("README.md", "README.zh-CN.md"):
        rows = re.findall(r"^\| \[.*\]\(docs/methods\.md#(\w+)s\) .*\|(.*)\|$", TEXTS[page], re.MULTILINE)
        assert [kind for kind, _ in rows] == list(KINDS)
        for kind, listed in rows:
            assert set(re.findall(r"`(\w+)`", listed)) <= set(names(kind))


def test_the_methods_that_the_guide_recommends_exist():
    known = {name for kind in KINDS for name in names(kind)}
    rows = re.findall(r"^\| [^|]+ \| ([^|]*`[^|]*) \|", TEXTS["docs/choosing.md"], re.MULTILINE)
    assert len(rows) > 12
    first = [re.match(r"`(\w+)`", row) for row in rows]
    assert [found.group(1) for found in first if found and found.group(1) not in known] == []


def test_the_translation_has_the_commands_of_the_readme():
    def commands(page):
        shown = [code for at, code in blocks("bash") if at == page]
        return [line.partition("#")[0].strip() for code in shown for line in code.splitlines()]

    assert commands("README.zh-CN.md") == commands("README.md")
    configurations = {page: yaml.safe_load(code) for page, code in reversed(blocks("yaml"))}
    assert configurations["README.zh-CN.md"] == configurations["README.md"]


def test_the_messages_on_the_page_are_those_of_the_code():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src" / "dataflex").rglob("*.py"))
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)
    shown = re.findall(r"^\| `([^`]+)`(?: on resume)? \|", TEXTS["docs/troubleshooting.md"], re.MULTILINE)
    assert len(shown) > 10
    for message in shown:
        parts = [part.strip(" :;()>-") for part in message.split("...")]
        for part in parts:
            assert part in sources, part


@pytest.mark.slow
def test_the_site_has_no_broken_link(tmp_path, monkeypatch):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)
    counted = logging.getLogger("mkdocs")
    found = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    counted.addHandler(handler)
    try:
        build(load_config("mkdocs.yml", site_dir=str(tmp_path / "site")))
    finally:
        counted.removeHandler(handler)
    assert found == []
    start = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "md-source" in start
    assert 'data-md-component="source"' not in start
    for kind, name in METHODS:
        assert "<h1" in (tmp_path / "site" / "methods" / kind / name / "index.html").read_text(encoding="utf-8")
    assert "doremi" in (tmp_path / "site" / "zh" / "index.html").read_text(encoding="utf-8")


def test_the_selector_in_the_guide_is_the_example():
    code = next(code for page, code in blocks("python") if page == "docs/writing-a-method.md")
    assert code == (EXAMPLES / "my_selector.py").read_text(encoding="utf-8")
    assert sum(1 for line in code.splitlines() if line.strip()) <= 30


def test_the_test_in_the_guide_passes(monkeypatch):
    code = next(code for page, code in blocks("python") if page == "docs/writing-a-method.md" and "def test_" in code)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    scope = {}
    exec(compile(code, "guide", "exec"), scope)
    tests = [value for name, value in scope.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


def test_the_mixer_in_the_guide_learns_from_losses_and_keeps_its_state():
    code = next(code for page, code in blocks("python") if page == "docs/writing-a-method.md" and "DomainStats" in code)
    scope = {"__name__": "guide"}
    exec(compile(code, "guide", "exec"), scope)
    mixer, again = scope["Hardest"](Params()), scope["Hardest"](Params())
    assert class_problems("mixer", scope["Hardest"]) == []
    ctx = example_context()
    assert mixer.mix(ctx).proportions.tolist() == [1 / 3] * 3
    mixer.observe(example_stats([2.0, 3.0, 9.0], [10, 10, 0]))
    web, code, math = mixer.mix(ctx).proportions
    assert web < math < code
    again.load_state_dict(mixer.state_dict())
    for one in (mixer, again):
        one.observe(example_stats([1.0, 3.0, 5.0]))
    np.testing.assert_allclose(again.loss, [1.9, 3.0, 5.0])
    assert mixer.mix(ctx).proportions.tolist() == again.mix(ctx).proportions.tolist()


def test_the_orderer_in_the_guide_ranks_what_it_names():
    code = next(code for page, code in blocks("python") if page == "docs/writing-a-method.md" and "MiddleFirst" in code)
    scope = {"__name__": "guide"}
    exec(compile(code, "guide", "exec"), scope)
    cls = scope["MiddleFirst"]
    assert class_problems("orderer", cls) == []
    orderer = cls(cls.Params(by=By.of("length")))
    assert orderer.ranks(5, np.random.default_rng(0)).tolist() == [2, 1, 3, 0, 4]
    assert orderer.sort_keys(np.arange(3), example_context({"a": 3}, lengths=[3, 1, 2])).tolist() == [3, 1, 2]


@pytest.mark.parametrize("cls", [Context, Interval, BatchView, DomainStats, RolloutStats, Requires])
def test_the_guide_names_all_that_a_method_is_given_and_may_require(cls):
    told = TEXTS["docs/writing-a-method.md"]
    assert [field.name for field in fields(cls) if f"`{field.name}`" not in told] == []


def test_the_guide_names_every_signal_that_can_be_required():
    row = next(row for row in rows_of("docs/writing-a-method.md", "configuration that does not fulfil it:"))
    assert set(SIGNALS) <= set(re.findall(r"`(\w+)`", row[1]))


def test_the_guide_tells_every_signal_that_methods_may_ask_for():
    calls = [name for name in vars(Signals) if not name.startswith("_")]
    signals = {name: thing for name, thing in vars(kinds).items() if name[0] != "_" and thing is not kinds.Signal}
    asked = [name for name, thing in signals.items() if isinstance(thing, type) and issubclass(thing, kinds.Signal)]
    assert "tokens" in calls
    assert "TokenLoss" in asked
    wanted = [*(f"`ctx.signals.{name}(" for name in calls), *(f"| `{name}(" for name in asked)]
    assert [text for text in wanted if text not in TEXTS["docs/writing-a-method.md"]] == []


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_blocks_compile(page, code):
    compile(code, page, "exec")
