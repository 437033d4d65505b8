"""PyPI's ``dataflex``, another project of the same import name, is told of at start, whichever files are imported."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dataflex_llm

SOURCE = Path(dataflex_llm.__file__)
OF_OURS = "from dataflex.version import DISTRIBUTION\n"
CLI = "def main():\n    print('ran')\n    return 0\n"


def distribution(site: Path, name: str, files: dict[str, str]) -> None:
    """Put files and what an installer writes beside them into a folder, over what is there."""
    lines = []
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        lines.append(f"{path},sha256={digest},{len(text)}\n")
    info = site / f"{name.replace('-', '_')}-1.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.1.0\n")
    (info / "RECORD").write_text("".join(lines))


def ours(site: Path) -> None:
    files = {"dataflex/__init__.py": "", "dataflex/cli.py": CLI, "dataflex/registry.py": OF_OURS}
    distribution(site, "dataflex-llm", {**files, "dataflex_llm.py": SOURCE.read_text()})


def theirs(site: Path) -> None:
    files = {"dataflex/__init__.py": "", "dataflex/cli.py": "raise SystemExit('theirs')\n", "dataflex/launcher.py": ""}
    distribution(site, "dataflex", files)


def start(*path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Start as the installed script does."""
    return subprocess.run(
        [sys.executable, "-S", "-c", "import sys, dataflex_llm; sys.exit(dataflex_llm.main())"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def sites(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "a", tmp_path / "b"


def test_nothing_is_said_without_it(sites: tuple[Path, Path]) -> None:
    ours(sites[0])
    done = start(sites[0])
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n", "")


def test_ours_found_first(sites: tuple[Path, Path]) -> None:
    ours(sites[0])
    theirs(sites[1])
    done = start(*sites)
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert done.stderr == (
        "dataflex: warning: PyPI's 'dataflex' 1.1.0, which is another project's, is installed too, with the same "
        f"import name. Ours are imported: {sites[0] / 'dataflex'}. Uninstall it: pip uninstall dataflex\n"
    )
    assert start(*sites, RANK="1").stderr == ""


def test_theirs_found_first(sites: tuple[Path, Path]) -> None:
    ours(sites[0])
    theirs(sites[1])
    done = start(sites[1], sites[0])
    assert (done.returncode, done.stdout) == (2, "")
    assert f"finds PyPI's 'dataflex' 1.1.0, which is another project's, in {sites[1] / 'dataflex'}," in done.stderr
    assert done.stderr.endswith("Uninstall it: pip uninstall dataflex.\n")


def test_a_folder_of_the_name_found_first(sites: tuple[Path, Path]) -> None:
    ours(sites[0])
    theirs(sites[1])
    shutil.rmtree(sites[1] / "dataflex-1.1.0.dist-info")
    done = start(sites[1], sites[0])
    assert done.returncode == 2
    assert f"finds another package in {sites[1] / 'dataflex'}, before dataflex-llm in" in done.stderr


@pytest.mark.parametrize("last", ["ours", "theirs"])
def test_both_in_one_folder(last: str, sites: tuple[Path, Path]) -> None:
    """Who was installed last has the files that both have; an uninstall takes them from either."""
    for install in (theirs, ours) if last == "ours" else (ours, theirs):
        install(sites[0])
    done = start(sites[0])
    assert done.stderr.endswith("pip uninstall dataflex && pip install --force-reinstall --no-deps dataflex-llm\n")
    if last == "ours":
        assert (done.returncode, done.stdout) == (0, "ran\n")
        assert "Ours are imported" in done.stderr
    else:
        assert (done.returncode, done.stdout) == (2, "")
        assert "Its files replace 1 of dataflex-llm, such as dataflex/cli.py" in done.stderr


def test_what_an_uninstall_leaves(sites: tuple[Path, Path]) -> None:
    ours(sites[0])
    for name in ("__init__", "cli"):
        (sites[0] / "dataflex" / f"{name}.py").unlink()
    done = start(sites[0])
    assert done.returncode == 2
    assert done.stderr.endswith("pip install --force-reinstall --no-deps dataflex-llm\n")
    assert "Traceback" not in done.stderr


def test_the_scripts_and_the_module_start_so() -> None:
    root = SOURCE.parents[1]
    assert (root / "pyproject.toml").read_text().count('= "dataflex_llm:main"') == 2
    assert "from dataflex_llm import main" in (root / "src" / "dataflex" / "__main__.py").read_text()
