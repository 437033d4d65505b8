"""Renders docs/methods.md from the classes of the built-in methods: cards, needs, parameters, examples.

    python docs/render_methods.py            writes docs/methods.md
    python docs/render_methods.py --check    fails when the file is not what would be written

Nothing about a method is written down twice: whoever changes a card or a parameter runs this again.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dataflex.commands.methods import default_of, example, meaning, requirements
from dataflex.config.load import load_mapping
from dataflex.config.mappings import as_yaml, describe, field_hints, key_of
from dataflex.config.split import split
from dataflex.method import STAGES, Method
from dataflex.registry import KINDS, find, names

__all__ = ["PAGE", "built_in", "method_pages", "render"]

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "methods.md"
EXAMPLES = DOCS.parent / "examples"

_HEAD = """# Methods

<!-- Rendered from the classes by docs/render_methods.py; change those, not this page. -->

Every method that comes with DataFlex, as `dataflex methods` lists them and `dataflex methods NAME` tells about one.
F and B are forward and backward passes of one row. Up to one selector, one mixer, one orderer and one weighter work
together in a run; they decide in that order. [Your own](writing-a-method.md) joins them from a file or from another
package.
"""


def built_in() -> dict[str, list[type[Method]]]:
    """Return the classes of the built-in methods by kind, in the registry's order."""
    found = {kind: [find(kind, name) for name in names(kind)] for kind in KINDS}
    return {kind: [cls for cls in classes if cls.__module__.startswith("dataflex.")] for kind, classes in found.items()}


def render() -> str:
    """Return the whole page."""
    uses, blocks = _uses(), [_HEAD]
    for kind, classes in built_in().items():
        blocks.append(_overview(kind, classes, f"#{kind}-{{}}"))
        blocks += [_section(cls, uses.get((kind, cls.name), [])) for cls in classes]
    return "\n".join(blocks)


def method_pages() -> dict[str, str]:
    """Return the same as pages of the site by path: a list of all methods, and a page for each."""
    uses, methods = _uses(), built_in()
    lists = [_overview(kind, classes, f"methods.md#{kind}-{{}}") for kind, classes in methods.items()]
    pages = {"methods/index.md": "\n".join([_HEAD, *lists])}
    for kind, classes in methods.items():
        for cls in classes:
            text = _section(cls, uses.get((kind, cls.name), []))
            pages[f"methods/{kind}/{cls.name}.md"] = text.replace(f"### {kind} ", "# ", 1)
    return pages


def _overview(kind: str, classes: list[type[Method]], link: str) -> str:
    rows = [(f"[{c.name}]({link.format(c.name)})", c.card.summary, "; ".join(_needs(c)), c.card.cost) for c in classes]
    return f"## {kind.capitalize()}s\n\n" + _table(("name", "what it does", "needs", "cost"), rows)


def _uses() -> dict[tuple[str, str], list[str]]:
    """Return the example files that use each method, those with fewest methods first."""
    files: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for path in sorted(EXAMPLES.glob("*.yaml")):
        mapping = load_mapping(path)
        dynamic = split(mapping, EXAMPLES).dynamic if "model_name_or_path" in mapping else None
        for method in dynamic.methods if dynamic else ():
            files.setdefault((method.kind, method.name), []).append((len(dynamic.methods) if dynamic else 0, path.name))
    return {key: [name for _, name in sorted(found)] for key, found in files.items()}


def _section(cls: type[Method], files: list[str]) -> str:
    links = ", ".join(f"[{name}](../examples/{name})" for name in files)
    if cls.__module__.endswith((".rollouts", ".bandits")):
        rollouts = "in [trl_grpo.py](../examples/trl_grpo.py), as the block of `dataflex.wrap`"
        links = f"{links}, {rollouts}" if links else rollouts
    facts = [
        f"- **Paper**: {cls.card.paper}",
        f"- **Cost**: {cls.card.cost}",
        *([f"- **Note**: {cls.card.note}"] if cls.card.note else []),
        f"- **Needs**: {'; '.join(_needs(cls))}",
        f"- **Decides**: {_decides(cls)}",
        f"- **Runs as it is**: {links}",
    ]
    return "\n".join(
        [
            f"### {cls.kind} {cls.name}",
            "",
            *_prose(cls),
            *facts,
            "",
            *_parameters(cls),
            "```yaml",
            as_yaml(example(cls)).rstrip(),
            "```",
            "",
        ]
    )


def _prose(cls: type[Method]) -> Iterator[str]:
    """Yield the words of the class where it has several paragraphs, else those of its module; a paragraph a line."""
    text = inspect.cleandoc(cls.__doc__ or "")
    if "\n\n" not in text:
        text = inspect.cleandoc(getattr(inspect.getmodule(cls), "__doc__", None) or "")
    for paragraph in text.split("\n\n"):
        yield " ".join(paragraph.split())
        yield ""


def _needs(cls: type[Method]) -> list[str]:
    needs = requirements(cls)
    told = [f"signal `{signal}`" for signal in sorted(needs.signals)]
    told += ["`targets`"] if needs.targets else []
    told += ["several domains"] if cls.kind == "mixer" else []
    told += [f"stage {', '.join(needs.stages)}"] if needs.stages != STAGES else []
    told += ["whole parameters (no ZeRO-3, no FSDP)"] if needs.whole_parameters else []
    return told or ["nothing"]


def _decides(cls: type[Method]) -> str:
    if cls.kind == "weighter":
        return "in every step"
    if requirements(cls).needs_interval:
        return "anew in every interval, from the model or the step (`interval_steps` must be given)"
    return "without a look at the model or the step (`interval_steps` may be left out)"


def _parameters(cls: type[Method]) -> list[str]:
    hints = field_hints(cls.Params)
    rows = [
        (f"`{key_of(field)}`", describe(hints[field.name]), _default(field), meaning(field))
        for field in dataclasses.fields(cls.Params)
    ]
    if requirements(cls).targets:
        rows.insert(0, ("`targets`", "a list of texts", "required", "data sets of `dataset_info.json` to aim at"))
    return [_table(("parameter", "takes", "default", "meaning"), rows)] if rows else ["No parameters.", ""]


def _default(field: dataclasses.Field[Any]) -> str:
    default = default_of(field)
    return f"`{default}`".replace("'", "") if default else "required"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: list[str]) -> int:
    """Write the page, or compare it."""
    page = render()
    if arguments == ["--check"]:
        current = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
        if current != page:
            sys.stderr.write("docs/methods.md is not up to date; run: python docs/render_methods.py\n")
        return int(current != page)
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
