"""What mkdocs does not do by itself: README as the start page, a page per method, links out of the docs folder.

Nothing is written twice: the start page is README.md, and pages of methods come from ``render_methods``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS))
from render_methods import method_pages  # noqa: E402  (lies beside this file, which mkdocs loads by its path)

STARTS = {"index.md": "README.md", "zh.md": "README.zh-CN.md"}
"""Start pages of the site, by the files that they are."""
_LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")


def on_config(config: Any) -> Any:
    """Put the pages of methods into the navigation."""
    pages = method_pages()
    kinds = dict.fromkeys(path.split("/")[1] for path in pages if path.count("/") > 1)
    for entry in config.nav:
        if "Methods" in entry:
            entry["Methods"] = ["methods/index.md"] + [
                {f"{kind.capitalize()}s": [path for path in pages if path.startswith(f"methods/{kind}/")]}
                for kind in kinds
            ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the start page and the pages of methods."""
    starts = {page: (ROOT / name).read_text(encoding="utf-8") for page, name in STARTS.items()}
    for path, text in {**starts, **method_pages()}.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Let links lead to the pages of the site where there are any, else to the repository.

    The texts of the start page and of methods were written for another folder.
    """
    name = page.file.src_uri
    start, up = ROOT if name in STARTS else DOCS, "../" * name.count("/")

    def changed(match: re.Match[str]) -> str:
        path, _, anchor = match.group(1).partition("#")
        anchor = f"#{anchor}" if anchor else ""
        there = (start / path).resolve()
        if there.parent == ROOT and there.name in STARTS.values():
            return f"]({next(page for page, named in STARTS.items() if named == there.name)}{anchor})"
        if there == DOCS / "methods.md":
            kind, _, method = anchor[1:].partition("-")
            return f"]({up}methods/{kind}/{method}.md)" if method else f"]({up}methods/index.md{anchor})"
        if there.suffix in (".md", ".svg") and there.is_relative_to(DOCS):
            return f"]({up}{there.relative_to(DOCS).as_posix()}{anchor})"
        kind = "tree" if there.is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{there.relative_to(ROOT).as_posix()}{anchor})"

    return _LINK.sub(changed, markdown)


def on_post_page(output: str, **_: Any) -> str:
    """Take away the mark at which the theme asks GitHub for stars: pages ask nobody but their own server."""
    return output.replace(' data-md-component="source"', "")
