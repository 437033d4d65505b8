"""What is published: metadata, the page of the index, the files, extras, the lock file, the container."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from email import message_from_string

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from dataflex.version import DISTRIBUTION, TESTED, __version__
from tests.docs.pages import ROOT, TEXTS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
SOURCE = PROJECT["urls"]["Source"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Metadata and list of files, as a build makes them of what lies here."""
    folder = tmp_path_factory.mktemp("egg")
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (info,) = folder.glob("*.egg-info")
    return message_from_string((info / "PKG-INFO").read_text()), {*(info / "SOURCES.txt").read_text().splitlines()}


def test_metadata(made):
    metadata, _ = made
    assert metadata["Name"] == DISTRIBUTION
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert not [line for line in metadata.get_all("Classifier") if line.startswith("License")]  # PEP 639: one of both
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_the_page_of_the_index_has_absolute_links_to_files_that_exist(made):
    page = made[0].get_payload()
    links = [*re.findall(r"\]\(([^)\s]+)\)", page), *re.findall(r'\b(?:src|href)="([^"]+)"', page)]
    assert len(links) > 20
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    ours = [link for link in links if link.startswith(f"{SOURCE}/")]
    assert len(ours) > 15
    for link in ours:
        path = re.fullmatch(rf"{SOURCE}/(?:blob|raw)/v{re.escape(__version__)}/([^#]+)(?:#.*)?", link)
        assert path is not None, link
        assert (ROOT / path[1]).exists(), link


def test_the_archive_holds_code_tests_and_examples(made):
    _, files = made
    there = {
        path.relative_to(ROOT).as_posix()
        for folder in ("src", "tests", "examples", "docs", "evidence", "benchmarks", "docker", ".github")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not {"__pycache__", "runs"} & {*path.parts} and ".egg-info" not in str(path)
    }
    assert sorted(there - files) == []
    top = "README.md CHANGELOG.md CITATION.cff LICENSE Makefile SECURITY.md requirements.lock"
    assert {".github/workflows/release.yml", *top.split()} <= files
    assert [file for file in files if file.startswith(("runs/", ".venv"))] == []


def test_the_files_of_the_package_are_the_ones_that_a_wheel_takes():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    data = {
        path.relative_to(ROOT / "src" / "dataflex").as_posix()
        for path in (ROOT / "src" / "dataflex").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert data == {*settings["package-data"]["dataflex"]}
    assert [path.stem for path in (ROOT / "src").glob("*.py")] == settings["py-modules"]


def test_extras():
    wanted = {"distributed", "cluster", "ann", "encoders", "report", "eval", "llamafactory", "all"}
    assert wanted <= {*EXTRAS}
    (everything,) = EXTRAS["all"]
    assert Requirement(everything).extras == {*EXTRAS} - {"all", "dev", "docs"}
    named = re.findall(r"""(?:extra:?|install\(['"])\s*`?([\w-]+)""", "\n".join(_code()))
    assert {"ann", "cluster", "encoders", "report"} <= {*named}
    told = {name for text in (*TEXTS.values(), *_code()) for name in re.findall(rf"{DISTRIBUTION}\[([\w,-]+)\]", text)}
    assert {name for names in told for name in names.split(",")} <= {*EXTRAS}
    assert {*re.findall(r"install\('([\w-]+)'\)", "\n".join(_code()))} <= {*EXTRAS}


def _code():
    return [path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")]


def test_no_page_and_no_message_installs_the_other_package():
    for text in (*TEXTS.values(), *_code()):
        assert not re.search(r"pip install [^\n`]*(?<![\w/])dataflex(?![\w-])", text)


def requirements():
    of = [*PROJECT["dependencies"], *EXTRAS["llamafactory"], *EXTRAS["report"]]
    return {each.name: each for each in map(Requirement, of)}


def test_the_tested_versions_are_the_allowed_ones():
    for name, (oldest, newest) in TESTED.items():
        allowed = requirements()[name].specifier
        assert allowed.contains(oldest)
        assert allowed.contains(newest)
        assert [Version(each.version) for each in allowed if each.operator == ">="] == [Version(oldest)]


def test_the_lock_file_agrees_with_what_is_required():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    locked = {each.name.lower(): each for each in map(Requirement, lines)}
    wanted = {name.lower(): each for name, each in requirements().items()}
    assert set(wanted) - set(locked) == {"torch"}  # its builds differ by machine
    for name in set(wanted) & set(locked):
        (exact,) = locked[name].specifier
        assert exact.operator == "=="
        assert wanted[name].specifier.contains(exact.version), name
    assert not [name for name in locked if name.startswith(("torch=", "nvidia", "triton", "cuda"))]


def test_the_citation_names_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == __version__
    assert cited["license"] == PROJECT["license"]
    assert cited["repository-code"] == SOURCE
    assert {"cff-version", "message", "title", "authors"} <= set(cited)


def test_the_container_copies_what_exists_and_installs_known_extras():
    recipe = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (?!--from)(.+)$", recipe, re.M) for word in line.split()[:-1]]
    assert copied
    assert [path for path in copied if not (ROOT / path).exists()] == []
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", recipe)
    assert {*extras.split(",")} <= {*EXTRAS}


def test_the_release_workflow():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
    text = "\n".join(step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"])
    for needed in ("python -m build", "cyclonedx-py", "pip-audit", "dataflex version", "twine check"):
        assert needed in text
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert {*re.findall(r"\bmake ([a-z-]+)", text)} <= targets


def test_nothing_of_ours_unpickles_or_runs_code_of_a_model():
    """As SECURITY.md says."""
    for text in _code():
        assert "trust_remote_code" not in text
        assert not re.search(r"^\s*(?:import|from) (?:pickle|dill|cloudpickle|joblib)", text, re.M)
        assert not re.search(r"allow_pickle=True|weights_only=False", text)
        assert text.count("torch.load(") == text.count("weights_only=True")
