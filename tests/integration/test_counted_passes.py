"""The passes that ``dataflex plan`` prints, and those of the record, are those that a run makes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaModel

from dataflex.config.costs import costs
from dataflex.config.data import find_sources
from dataflex.config.forecast import forecast
from dataflex.config.load import load_mapping
from dataflex.config.split import resolve

BASE = {"dataset": "alpha,beta,gamma", "max_steps": 8, "disable_shuffling": False}
LESS = {"name": "less", "targets": ["goal"]}


@pytest.fixture
def passes(monkeypatch):
    """Sequences that went through any model: in training, without gradient, and with one; and the same in tokens."""
    counts = {"training": 0, "F": 0, "F + B": 0, "tokens F": 0, "tokens B": 0}
    original = LlamaModel.forward

    def forward(self, input_ids=None, *args, **kwargs):
        number = (kwargs["inputs_embeds"] if input_ids is None else input_ids).shape[0]
        counts["training" if self.training else "F + B" if torch.is_grad_enabled() else "F"] += number
        tokens = int(kwargs["attention_mask"].sum())
        counts["tokens F"] += tokens
        counts["tokens B"] += tokens if self.training or torch.is_grad_enabled() else 0
        return original(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    return counts


def printed(path, folder):
    """What ``plan`` prints of training and of the rest: F, B, and whether a number is the most or an estimate."""
    parts = resolve(load_mapping(path), folder)
    named = [find_sources(names, parts.lf, "", folder)[0] for names in (parts.lf.train_sets, parts.dynamic.targets)]
    found: dict[str, list[Any]] = {"training": [0, 0, ""], "beside": [0, 0, ""]}
    for label, each in costs(forecast(parts.dynamic, parts.lf, *named)).items():
        sums = found["training" if label == "training" else "beside"]
        for cost in each:
            bound, forward, backward = re.match(
                r"(about |at most )?(?:([\d,]+) F)?(?: \+ ([\d,]+) B)?", cost.text
            ).groups()
            sums[0] += int((forward or "0").replace(",", ""))
            sums[1] += int((backward or "0").replace(",", ""))
            sums[2] += bound or ""
            assert (cost.forward, cost.backward) == (
                int((forward or "0").replace(",", "")),
                int((backward or "0").replace(",", "")),
            )
    return found


def selecting(selector, **block):
    return {"dynamic": {"warmup_steps": 2, "interval_steps": 2, "selector": selector, **block}}


CASES = {
    "whole pool": selecting("loss"),
    "pool_fraction": selecting("loss", signals={"pool_fraction": 0.37}),
    "keep_ratio": selecting("el2n", signals={"pool_fraction": 0.5}, keep_ratio=0.3),
    "last interval is short": {**selecting("grad_norm", interval_steps=3), "max_steps": 9},
    "targets": selecting(LESS),
    "curvature": selecting({**LESS, "precondition": "ekfac", "ekfac_rows": 10}),
    "two targets": selecting({"name": "tacs", "targets": ["goal", "ones"]}),
    "vectors": selecting({"name": "rds_plus", "targets": ["goal"]}),
    "votes": selecting({"name": "icons", "targets": ["goal", "ones"]}),
    "layers": selecting({"name": "coincide", "layers": [0, 1], "clusters": 2}),
    "screened by embeddings": selecting(LESS, signals={"screen_fraction": 0.4}),
    "vectors of rows that were screened by them": selecting(
        {"name": "rds_plus", "targets": ["goal"]}, signals={"screen_fraction": 0.4}
    ),
    "drawn and screened": selecting(LESS, signals={"pool_fraction": 0.8, "screen_fraction": 0.5}),
    "screened by a pilot": selecting(LESS, signals={"screen_fraction": 0.4, "screen_by": "pilot"}),
    "screened by a pilot, other gradients": selecting(
        {**LESS, "target_gradient": "cosine_of_mean"}, signals={"screen_fraction": 0.4, "screen_by": "pilot"}
    ),
    "candidates": {"dynamic": {"interval_steps": 1, "candidate_batches": 3, "selector": "uds"}},
    "held-out sets": {
        "dynamic": {
            "interval_steps": 2,
            "mixer": {"name": "sheared", "targets": ["goal", "ones", "beta"], "target_losses": [1, 1, 1]},
        }
    },
    "reference, part of the pool": {"dynamic": {"weighter": {"name": "slm", "reference": "MODEL"}}},
    "reference, warm-up": {"dynamic": {"weighter": {"name": "rho", "reference": "MODEL", "warmup_steps": 3}}},
    "reference, short last step": {
        "dataset": "ones",
        "max_steps": 12,
        "gradient_accumulation_steps": 2,
        "dynamic": {"weighter": {"name": "slm", "reference": "MODEL"}},
    },
    "reference, pool again": {
        "dataset": "ones",
        "max_steps": 24,
        "dynamic": {"weighter": {"name": "slm", "reference": "MODEL"}},
    },
    "reference, in every step": {
        "dynamic": {"weighter": {"name": "slm", "reference": "MODEL", "reference_cache": False, "warmup_steps": 1}}
    },
    "reference, mixture": {"dynamic": {"mixer": {"name": "doremi", "reference": "MODEL"}}},
    "reference, few rows of a domain": {
        "max_steps": 60,
        "dynamic": {
            "mixer": {"name": "static", "proportions": [18, 1, 1]},
            "weighter": {"name": "slm", "reference": "MODEL"},
        },
    },
    "reference, rows that are chosen": {
        **selecting("loss", weighter={"name": "slm", "reference": "MODEL"}),
        "max_steps": 12,
    },
    "reference of a selector": selecting({"name": "rho_loss", "reference": "MODEL"}),
    "reference of a selector, drawn": selecting(
        {"name": "rho_loss", "reference": "MODEL"}, signals={"pool_fraction": 0.4}
    ),
    "scorer": selecting({"name": "ifd", "scorer": "MODEL", "fill": True}, signals={"pool_fraction": 0.4}),
    "proxies": selecting({"name": "s2l", "proxies": ["MODEL"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_printed_passes_are_those_of_the_run(run, passes, tiny_model, case):
    settings = json.loads(json.dumps({**BASE, **CASES[case]}).replace("MODEL", str(tiny_model)))
    finished = next(event for event in run("run", **settings).events if event["event"] == "finished")
    recorded = {way: sum(n for k, n in finished["passes"].items() if k.endswith(way)) for way in ("ward", "/backward")}
    assert recorded["ward"] - recorded["/backward"] == passes["tokens F"]
    assert recorded["/backward"] == passes["tokens B"]
    assert finished["compute"] == passes["tokens F"] + 2 * passes["tokens B"]
    made = passes["F"] + passes["F + B"], passes["F + B"]
    found = printed(run.folder / "run.json", run.folder)
    assert found["training"][:2] == [passes["training"]] * 2
    forward, backward, bounds = found["beside"]
    assert backward == made[1]
    if "at most" in bounds:
        assert forward * 0.5 < made[0] <= forward
    elif "about" in bounds:
        assert made[0] == pytest.approx(forward, rel=0.15)
    else:
        assert forward == made[0]
