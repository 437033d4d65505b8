"""Commands, files and links that the pages show exist."""

from __future__ import annotations

import re
import shlex

import pytest

from dataflex.cli import _EXAMPLES as COMMANDS
from dataflex.cli import _parser
from dataflex.commands.mix import MIX_STEPS
from dataflex.record.charts import CHARTS
from tests.config.keys import user_keys
from tests.docs.pages import BLOCK, ROOT, TEXTS, blocks, prose


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


def is_mention(rest):
    """Tell whether a command of ours stands without what it needs, or with LLaMA-Factory's own flags."""
    return len(rest) == 1 or rest[1].startswith("--stage") or (rest[0] == "mix" and len(rest) == 2)


OF_MAKE = [(page, rest) for page, (program, *rest) in commands() if program == "make"]
OURS = [(page, rest) for page, (program, *rest) in commands() if program == "dataflex" and rest != ["--help"]]


def test_programs_are_known():
    known = {"make", "python", "pip", "dataflex", "llamafactory-cli", "pre-commit", "torchrun"}
    assert {words[0] for _, words in commands()} <= known
    assert {tuple(words[1:]) for _, words in commands() if words[0] == "pre-commit"} <= {("install",)}


@pytest.mark.parametrize(("page", "rest"), OF_MAKE)
def test_every_target_of_make_exists(page, rest):
    assert {word for word in rest if "=" not in word} <= targets()


@pytest.mark.parametrize(("page", "rest"), [each for each in OURS if is_mention(each[1])])
def test_every_command_that_is_mentioned_exists(page, rest):
    assert rest[0] in {*COMMANDS, "help"}
    assert rest[0] != "mix" or rest[1:] == [] or rest[1] in MIX_STEPS


@pytest.mark.parametrize(("page", "rest"), [each for each in OURS if not is_mention(each[1])])
def test_every_command_exists(page, rest):
    options = _parser().parse_args(rest)
    for path in (word for word in rest if word.startswith("examples/")):
        assert (ROOT / path).exists(), path
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
    # 'plan.shard' is a call of an object
    modules = re.findall(rf"`({'|'.join(sorted(rooms - {'plan'}))})[./](\w+)", design)
    assert len(modules) > 10
    for package, module in modules:
        place = ROOT / "src" / "dataflex" / package / module
        assert place.is_dir() or place.with_suffix(".py").is_file(), f"{package}.{module}"


def test_every_plot_is_described():
    assert re.findall(r"^\| `(\w+\.png)` \|", TEXTS["docs/report.md"], re.MULTILINE) == [
        f"{name}.png" for name in CHARTS
    ]


@pytest.mark.parametrize("page", TEXTS)
def test_pages_are_plain_text_without_paths_of_a_machine(page):
    assert TEXTS[page].isascii() or page == "README.zh-CN.md"
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|opt)/", TEXTS[page])


def test_the_licence_is_the_one_that_the_package_names():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "Apache-2.0" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
