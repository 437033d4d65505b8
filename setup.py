"""Makes the text of the index page out of README.md; everything else is in pyproject.toml."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
_LINK = re.compile(r"""(\]\(|\bsrc="|\bhref=")(?![a-z+]+:|//|#)([^)"\s]+)""")


def index_page() -> str:
    """Return README.md with absolute links: to the files of this version, and to their bytes for pictures."""
    source = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Source"]
    version = re.search(r'^__version__ = "(.+)"', (ROOT / "src/dataflex/version.py").read_text(encoding="utf-8"), re.M)
    assert version is not None

    def absolute(match: re.Match[str]) -> str:
        kind = "raw" if match[2].endswith((".svg", ".png", ".jpg", ".gif")) else "blob"
        return f"{match[1]}{source}/{kind}/v{version[1]}/{match[2]}"

    return _LINK.sub(absolute, (ROOT / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    setup(long_description=index_page(), long_description_content_type="text/markdown")
