"""Six examples on two ranks serve the rows and have the losses that are written of them."""

from __future__ import annotations

import json

import pytest

from dataflex.config.load import load_mapping
from tests.examples.test_examples import EXAMPLES, SHORT, tiny
from tests.golden import trajectories

pytestmark = pytest.mark.gloo

NAMES = ("combined.yaml", "mix_odm.yaml", "select_less.yaml", "select_loss.yaml", "weight_loss.yaml", "weight_slm.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, two_ranks):
    folder = tmp_path_factory.mktemp("trajectories")
    configs = []
    for name in NAMES:
        own = [setting.replace("{model}", str(tiny_model)) for setting in SHORT.get(name, [])]
        mapping = load_mapping(EXAMPLES / name, [*tiny(tiny_model, folder / name.removesuffix(".yaml")), *own])
        configs.append(folder / f"{name}.json")
        configs[-1].write_text(json.dumps(mapping))
    two_ranks(configs)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_go_as_they_went(folder, name):
    errors = [path.read_text() for path in folder.glob(f"{name}.json.*error")]
    assert not errors, errors
    trajectories.check(f"two ranks: {name}", folder / name.removesuffix(".yaml"))
