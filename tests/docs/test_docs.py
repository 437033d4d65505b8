"""What is written is true as far as a machine can tell: blocks parse, commands and links exist, tables match code."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from dataflex.cli import _parser
from dataflex.config.build import parse_dynamic, user_keys
from dataflex.config.check_run import _REFUSED, _REFUSED_WITH_WEIGHTER
from dataflex.config.collect import field_hints
from dataflex.config.convert import describe, shown
from dataflex.config.flat import FLAT_KEYS, FlatKeys
from dataflex.config.schema import DynamicConfig
from dataflex.config.show import plain
from dataflex.config.split import split
from dataflex.core.registry import KINDS, find, names
from dataflex.record.plots import PLOTS

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *EXAMPLES.rglob("*.md")])
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
OURS = ("dataflex.selectors.", "dataflex.mixers.", "dataflex.weighters.")
METHODS = [(kind, name) for kind in KINDS for name in names(kind) if find(kind, name).__module__.startswith(OURS)]

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language):
    return [(page, code) for page, text in TEXTS.items() for kind, code in BLOCK.findall(text) if kind == language]


def prose(text):
    return BLOCK.sub("", text)


def test_the_expected_pages_are_there():
    expected = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md", "examples/data/README.md"}
    expected |= {
        f"docs/{name}.md"
        for name in ("configuration", "design", "limits", "methods", "paper-index", "report", "writing-a-method")
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
def test_every_yaml_block_is_valid(page, mapping):
    """Strictly, as a configuration that lies in examples/ would be."""
    if "dynamic" in mapping:
        assert parse_dynamic(mapping["dynamic"], EXAMPLES).methods
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


def test_every_key_of_the_dynamic_block_is_described_as_it_is():
    table = {row[0].strip("`"): row for row in rows_of("docs/configuration.md", "## The dynamic block")}
    assert list(table) == user_keys()
    hints, words = field_hints(DynamicConfig), {"minimum": "at least", "above": "above", "maximum": "at most"}
    for field in fields(DynamicConfig):
        if not field.metadata.get("user", True):
            continue
        limits = [f"{word} {field.metadata[key]:g}" for key, word in words.items() if key in field.metadata]
        takes = ", ".join([describe(hints[field.name]), *limits])
        takes = "a name, or a mapping with `name`" if field.name in KINDS else takes
        assert table[field.name][1:3] == [takes, default(field)], field.name


def test_every_flat_key_is_described_with_its_default():
    table = {row[0].strip("`"): row for row in rows_of("docs/configuration.md", "## Flat keys")}
    assert list(table) == list(FLAT_KEYS)
    for field in fields(FlatKeys):
        assert table[field.name][1] == default(field), field.name


def test_every_refused_setting_is_told():
    limits = TEXTS["docs/limits.md"]
    assert [key for key in [*_REFUSED, *_REFUSED_WITH_WEIGHTER] if f"`{key}`" not in limits] == []


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


def test_the_gallery_is_what_the_classes_say(renderer):
    """Otherwise: make docs."""
    assert renderer.render() == TEXTS["docs/methods.md"]


def test_the_gallery_check_can_fail(renderer, tmp_path, monkeypatch, capsys):
    assert renderer.main(["--check"]) == 0
    monkeypatch.setattr(renderer, "PAGE", tmp_path / "methods.md")
    assert renderer.main(["--check"]) == 1
    assert "python docs/render_methods.py" in capsys.readouterr().err
    assert renderer.main([]) == 0
    assert renderer.main(["--check"]) == 0


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_every_method_is_in_the_tables(kind, name):
    assert f"| {kind} | `{name}` |" in TEXTS["README.md"]
    assert f"{kind} [`{name}`](methods.md#{kind}-{name})" in TEXTS["docs/paper-index.md"]
    assert f"\n### {kind} {name}\n" in TEXTS["docs/methods.md"]


def test_every_paper_is_in_the_index():
    for kind, name in METHODS:
        for number in re.findall(r"arXiv (\d{4}\.\d{5})", find(kind, name).card.paper):
            for page in ("README.md", "docs/paper-index.md"):
                assert f"(https://arxiv.org/abs/{number})" in TEXTS[page], (page, name)


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


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_blocks_compile(page, code):
    compile(code, page, "exec")


# ---------------------------------------------------------------- commands, links, files


def commands():
    """Every command shown: lines of bash blocks, and inline code that begins with dataflex."""
    found = []
    for page, code in blocks("bash"):
        for line in code.splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words:
                found.append((page, words))
    for page, text in TEXTS.items():
        for code in re.findall(r"`((?:dataflex|make) [^`]+)`", prose(text)):
            found.append((page, shlex.split(code)))
    return found


def targets():
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize(("page", "words"), commands())
def test_every_command_exists(page, words):
    program, *rest = words
    if program == "make":
        assert set(rest) <= targets()
        return
    if program in ("python", "pip"):
        return
    assert (
        (program == "dataflex") or (program, rest[:1]) == ("pre-commit", ["install"]) or program == "llamafactory-cli"
    )
    if program != "dataflex" or rest in (["--help"], ["help"]):
        return
    from dataflex.cli import _EXAMPLES as COMMANDS

    assert rest[0] in COMMANDS
    if len(rest) == 1 or rest[1].startswith("--stage"):
        return  # a mention of the command, or LLaMA-Factory's own flags
    options = _parser().parse_args(rest)
    for path in (word for word in rest if word.startswith("examples/")):
        assert (ROOT / path).is_file(), path
    for override in getattr(options, "overrides", []):
        key, _, _ = override.partition("=")
        if key.startswith("dynamic."):
            assert key.split(".")[1] in user_keys(), override


def test_commands_were_found():
    shown_commands = {words[1] for _, words in commands() if words[0] == "dataflex" and len(words) > 1}
    assert {"train", "plan", "methods", "report", "version"} <= shown_commands
    assert ["make", "demo"] in [words for _, words in commands()]
    text = TEXTS["README.md"]
    assert text.index("make demo") < text.index("make test") < text.index("dataflex plan")


def anchors(text):
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(TEXTS[page])):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page}: {link}"


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", TEXTS["README.md"]))
    assert {page for page in TEXTS if page.startswith("docs/")} == linked


def test_the_rooms_in_the_design_are_those_of_the_package():
    design = TEXTS["docs/design.md"]
    rooms = {path.name for path in (ROOT / "src" / "dataflex").iterdir() if (path / "__init__.py").is_file()}
    assert [room for room in rooms if f" {room}/ " not in design] == []
    modules = re.findall(r"`(core|train|config|signals|dist|bridge|record)\.(\w+)", design)
    assert len(modules) > 10
    for package, module in modules:
        assert (ROOT / "src" / "dataflex" / package / f"{module}.py").is_file(), f"{package}.{module}"


def test_every_plot_is_described():
    assert re.findall(r"^\| `(\w+\.png)` \|", TEXTS["docs/report.md"], re.MULTILINE) == list(PLOTS)


@pytest.mark.parametrize("page", TEXTS)
def test_pages_are_plain_text_without_paths_of_a_machine(page):
    assert TEXTS[page].isascii()
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|opt)/", TEXTS[page])


def test_the_licence_is_the_one_that_the_package_names():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "Apache-2.0" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
