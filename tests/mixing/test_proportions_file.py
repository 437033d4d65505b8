"""The proportions file and the static mixer that takes it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dataflex.config.build import parse_dynamic
from dataflex.config.load import load_mapping
from dataflex.config.mappings import as_mapping
from dataflex.config.split import resolve
from dataflex.errors import ConfigError
from dataflex.mixers.fixed import Static
from dataflex.plan.proportions import (
    ProportionsFile,
    digest_of,
    file_digest,
    provenance,
    read_proportions,
    write_proportions,
)
from dataflex.testing import example_context
from dataflex.version import __version__
from tests.config.conftest import _plain_environment, add_column, config, project

__all__ = ["_plain_environment", "config", "project"]


def write(path, names=("a", "b"), shares=(0.7, 0.3), **more):
    content = ProportionsFile(names=names, proportions=shares, method="log_linear", **more)
    return write_proportions(path, content)


def test_a_file_reads_back(tmp_path):
    source = provenance("dataflex mix propose", inputs=[], settings={"kl": 0.05}, config_digest="abc")
    path = write(tmp_path / "deep" / "mixture.json", provenance=source, details={"gap": np.float64(0.0)})
    back = read_proportions(path)
    assert back.by_name == {"a": 0.7, "b": 0.3}
    assert back.method == "log_linear"
    assert back.provenance["settings"] == {"kl": 0.05}
    assert back.provenance["config_digest"] == "abc"
    assert back.provenance["versions"] == {"dataflex": __version__, "numpy": np.__version__}
    assert back.provenance["date"].endswith("+00:00")
    assert back.details == {"gap": 0.0}
    assert [file.name for file in path.parent.iterdir()] == ["mixture.json"]


def test_provenance_holds_digests_of_files(tmp_path):
    file = tmp_path / "ratios.csv"
    file.write_text("run,a\n")
    told = provenance("x", inputs=[file, tmp_path])["inputs"]
    assert told == {str(file): file_digest(file), str(tmp_path): None}
    assert told[str(file)] != file_digest(write(tmp_path / "m.json"))
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1}) != digest_of({"a": 1, "b": 3})


def test_what_are_no_proportions_is_not_written(tmp_path):
    with pytest.raises(AssertionError, match=r"sum to 1\.1"):
        write(tmp_path / "m.json", shares=(0.7, 0.4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[1]", "is no proportions file; expected"),
        ({"names": ["a"]}, "is no proportions file; expected"),
        ({"names": ["a", "b"], "proportions": [1.0]}, "1 proportions for 2 names"),
        ({"names": ["a", "a"], "proportions": [0.5, 0.5]}, "names holds 'a' twice"),
        ({"names": ["a", "b"], "proportions": [1.5, -0.5]}, "the proportion of 'b' is -0.5"),
        ({"names": ["a", "b"], "proportions": [float("nan"), 1]}, "the proportion of 'a' is nan"),
        ({"names": ["a", "b"], "proportions": [0.5, 0.4]}, "proportions sum to 0.9, must sum to 1"),
        ({"names": [], "proportions": []}, "names must be a list of texts"),
        ({"names": "ab", "proportions": [1, 0]}, "must be lists"),
    ],
)
def test_bad_files_are_told(tmp_path, body, told):
    path = tmp_path / "m.json"
    path.write_text(body if isinstance(body, str) else json.dumps(body))
    with pytest.raises(ConfigError) as caught:
        read_proportions(path)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)


# ---------------------------------------------------------------- the static mixer


def from_file(path):
    return Static(Static.Params(from_file=str(path)))


def test_static_takes_a_file_by_name_whatever_its_order(tmp_path):
    path = write(tmp_path / "m.json", names=("code", "web"), shares=(0.25, 0.75))
    mix = from_file(path).mix(example_context({"web": 10, "code": 10}))
    assert mix.proportions.tolist() == [0.75, 0.25]
    assert mix.reason == f"from {path} (log_linear): web 0.75, code 0.25"


def test_names_must_be_those_of_the_domains(tmp_path):
    path = write(tmp_path / "m.json", names=("webb", "code"))
    with pytest.raises(ConfigError) as caught:
        from_file(path).mix(example_context({"web": 10, "code": 10, "math": 1}))
    assert [problem.split(": ", 1)[1] for problem in caught.value.problems] == [
        "no such domain; did you mean 'web'? (domains: web, code, math)",
        "missing; every domain needs a number, 0 means never (domains: web, code, math)",
        "missing; every domain needs a number, 0 means never (domains: web, code, math)",
    ]
    assert caught.value.problems[0].startswith(f"dynamic.mixer.from ({path}).webb:")


def test_a_resumed_run_keeps_what_it_began_with(tmp_path):
    path = write(tmp_path / "m.json", names=("web", "code"))
    ctx = example_context({"web": 10, "code": 10})
    first = from_file(path)
    first.mix(ctx)
    write(path, names=("web", "code"), shares=(0.1, 0.9))
    resumed = from_file(path)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert resumed.mix(ctx).proportions.tolist() == [0.7, 0.3]
    assert from_file(path).mix(ctx).proportions.tolist() == [0.1, 0.9]
    assert Static(Static.Params(proportions=(1.0, 1.0))).state_dict() == {}


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ({"name": "static"}, "dynamic.mixer.proportions: missing; give one number per domain, or a file with 'from"),
        (
            {"name": "static", "from": "m.json", "proportions": [1, 2]},
            "dynamic.mixer.proportions: given together with 'from'",
        ),
        ({"name": "static", "from": 3}, "dynamic.mixer.from: expected text, found 3"),
        ({"name": "static", "form": "m.json"}, "dynamic.mixer.form: unknown key; did you mean 'from'?"),
        ({"name": "static", "from_file": "m.json"}, "dynamic.mixer.from_file: unknown key"),
    ],
)
def test_the_block_is_read_strictly(block, told, tmp_path):
    with pytest.raises(ConfigError) as caught:
        parse_dynamic({"mixer": block}, tmp_path)
    assert any(problem.startswith(told) for problem in caught.value.problems), caught.value.problems


def test_the_block_is_written_back_as_it_was_given(tmp_path):
    given = parse_dynamic({"mixer": {"name": "static", "from": "m.json"}}, tmp_path)
    block = as_mapping(given)
    assert block["mixer"] == {"name": "static", "proportions": None, "from": "m.json"}
    assert parse_dynamic(block, tmp_path) == given


def test_a_file_that_does_not_fit_is_told_before_anything_is_loaded(project, config):
    def problems(**dynamic):
        mapping = config(dynamic={"mixer": {"name": "static", "from": "m.json"}, **dynamic})
        (project / "c.json").write_text(json.dumps(mapping))
        try:
            resolve(load_mapping(project / "c.json"), project)
        except ConfigError as error:
            return error.problems
        return []

    add_column(project, "source", "web")
    file = project / "data" / "b.json"
    file.write_text(file.read_text().replace('"source": "web"', '"source": "code"'))
    assert [problem.split(": ")[:2] for problem in problems()] == [["dynamic.mixer.from", "no such file"]]
    assert [problem.split(": ")[:2] for problem in problems(domain_column="source")] == [
        ["dynamic.mixer.from", "no such file"]
    ]
    write(project / "m.json", names=("a", "c"))
    told = problems()
    assert len(told) == 2
    assert told[0].startswith("dynamic.mixer.from (m.json).c: no such domain")
    write(project / "m.json")
    assert problems() == []


@pytest.mark.parametrize("floor", [0.1, {"b": 0.1}])
def test_a_domain_that_the_file_says_0_for_has_no_floor(tmp_path, floor):
    """As where the numbers are written in the configuration."""
    file = write(tmp_path / "m.json", shares=(1.0, 0.0))
    block = {"mixer": {"name": "static", "from": str(file)}, "min_proportion": floor}
    with pytest.raises(ConfigError, match=r"dynamic.mixer.from \(.*m.json\) says 0 for b, which means never"):
        parse_dynamic(block, tmp_path)
    assert parse_dynamic({**block, "min_proportion": {"a": 0.1}}, tmp_path).mixer is not None
