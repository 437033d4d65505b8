"""A rank leaves nothing alive that the end of the interpreter could trip over."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.distributed.ranks import errors_of, ranks_that_run
from tests.ending.conftest import environment, torchrun


@pytest.fixture(scope="module")
def new_ranks(tmp_path_factory):
    """``two_ranks`` that nothing has run on before: what other jobs left alive does not count here."""
    yield from ranks_that_run(tmp_path_factory)


@pytest.mark.gloo
@pytest.mark.parametrize("dynamic", [{"interval_steps": 1, "selector": "loss"}, None], ids=["dynamic", "stock"])
def test_no_group_and_no_thread_of_gloo_is_left(configure, new_ranks, dynamic):
    config = configure(dynamic=dynamic, save_strategy="steps", save_steps=1, dataloader_num_workers=1)
    new_ranks([config])
    assert not errors_of(config)
    for rank in (0, 1):
        alive = json.loads(config.with_name(f"{config.name}.alive{rank}").read_text())
        assert not alive["group"]
        assert not [name for name in alive["native"] if "gloo" in name]
        assert alive["python"] == ["MainThread"]


PENDING = """
import os, sys, time
import torch
import torch.distributed as dist
from dataflex.ending import leave

def fail():
    dist.init_process_group("gloo")
    if os.environ["RANK"] == "1":
        time.sleep(120)
    dist.all_reduce(torch.ones(3), async_op=True)  # the other rank never joins
    raise RuntimeError("lost its mind")

leave(fail)
"""


@pytest.mark.gloo
def test_a_rank_that_fails_does_not_wait_for_what_is_pending(tmp_path):
    script = tmp_path / "pending.py"
    script.write_text(PENDING)
    done = subprocess.run(torchrun(script), env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "RuntimeError: lost its mind" in done.stderr
    assert "terminate called" not in done.stderr


def test_functions_of_python_run_before_a_rank_leaves(tmp_path):
    code = "import atexit\nfrom dataflex.ending import leave\natexit.register(print, 'flushed')\nleave(lambda: 3)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (3, "flushed\n")
