"""Needs that methods declare are checked of every kind of method, and of every part of a composed one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dataflex.commands.methods import requirements
from dataflex.config.needs import unmet
from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.config.split import resolve
from dataflex.errors import ConfigError
from dataflex.method import Params, Reference, Requires, RunFacts, ScoreFile
from dataflex.registry import KINDS, find, names
from dataflex.signals.kinds import Embedding

Config = Callable[..., dict[str, Any]]

SEVERAL = [
    (kind, name)
    for kind in KINDS
    for name in names(kind)
    if kind == "mixer" or requirements(find(kind, name)).domains > 1
]


def problems(mapping: dict[str, Any], project: Path) -> list[str]:
    try:
        resolve(mapping, project)
    except ConfigError as error:
        return error.problems
    return []


def block_of(kind: str, name: str) -> dict[str, Any]:
    cls = find(kind, name)
    method: dict[str, Any] = {"name": name, **({"targets": ["t"]} if requirements(cls).targets else {})}
    method.update(
        {
            "static": {"proportions": [1]},
            "doremi": {"reference": "r"},
            "staged": {"stages": [{"start_step": 0, "proportions": [1]}]},
            "sheared": {"target_losses": [1.0]},
            "velocity": {"target_losses": [1.0]},
            "skill_it": {"graph": [[1.0]]},
        }.get(name, {})
    )
    return {kind: method, "interval_steps": 1}


def test_both_kinds_of_methods_are_there() -> None:
    assert {("selector", "random_balanced"), ("weighter", "group"), ("mixer", "uniform")} <= set(SEVERAL)


@pytest.mark.parametrize(("kind", "name"), SEVERAL)
def test_one_domain_is_refused(kind: str, name: str, config: Config, project: Path) -> None:
    found = problems(config(dataset="a", dynamic=block_of(kind, name)), project)
    assert any(f"dynamic.{kind}: {name} needs at least two domains, found 1" in line for line in found), found


@pytest.mark.parametrize(
    ("beside", "told"),
    [
        ({"weighter": {"name": "loss"}}, "dynamic.weighter: the infobatch selector gives rows weights in the loss"),
        ({"weighter": ["column", "meta"]}, ""),
        ({"mixer": "group_dro", "keep_ratio": 0.5}, "dynamic.mixer: the infobatch selector gives rows weights"),
        ({"signals": {"budget": 0.5}}, "dynamic.signals.budget: the infobatch selector gives rows weights"),
        ({"weighter": "focal"}, None),
        ({"mixer": "odm", "keep_ratio": 0.5}, None),
    ],
)
def test_what_leaves_no_place_for_the_weights_of_a_selection(
    beside: Any, told: str | None, config: Config, project: Path
) -> None:
    found = problems(config(dataset="a,b", dynamic={"selector": "infobatch", "interval_steps": 1, **beside}), project)
    assert (found == []) if told is None else any(told in line for line in found), found


def test_a_budget_that_pays_for_no_target_row(config: Config, project: Path) -> None:
    block = {"selector": {"name": "less", "targets": ["t"]}, "interval_steps": 2, "signals": {"budget": 0.01}}
    (line,) = problems(config(max_steps=4, per_device_train_batch_size=2, dynamic=block), project)
    told = (
        "dynamic.signals.budget: 0.01 of 8 sequences pays for 0.08 rows, and the run looks at one target row at least"
    )
    assert line == f"{told}; raise it to 0.125 or more"


@pytest.mark.parametrize(
    "block", [{"weighter": "group"}, {"selector": "random_balanced"}, {"weighter": ["focal", "group"]}]
)
def test_a_bare_copy_of_several_sets_is_one_domain(block: Any, config: Config, project: Path) -> None:
    """One that LLaMA-Factory made alone; where there is none yet, the run makes one that tells."""
    (project / "there").mkdir()
    (project / "there/dataset_dict.json").write_text("{}")
    found = problems(config(tokenized_path="there", dynamic=block), project)
    told = "tokenized_path: a copy made by LLaMA-Factory alone does not say which"
    assert any(line.startswith(told) for line in found), found
    (note,) = resolve(config(tokenized_path="there", dynamic={"selector": "all"}), project).notes
    assert note.startswith(f"{told} of a, b a row is from: all are one domain, 'all'")
    assert resolve(config(tokenized_path="new", dynamic={"selector": "all"}), project).notes == ()


@pytest.mark.parametrize(
    ("block", "place"),
    [
        ({"selector": {"name": "less", "targets": ["t"]}}, "dynamic.selector.precondition"),
        ({"selector": {"represent": "influence", "targets": ["t"]}}, "dynamic.selector.represent.precondition"),
        ({"selector": {"represent": "gradient", "targets": ["t"]}}, "dynamic.selector.represent.precondition"),
        ({"selector": {"represent": "less", "targets": ["t"]}}, "dynamic.selector.represent.precondition"),
        (
            {"selector": {"represent": "loss", "vectors": "gradient", "rule": "deita"}},
            "dynamic.selector.vectors.precondition",
        ),
        (
            {"selector": {"name": "bm25", "targets": ["t"]}, "signals": {"screen_by": "pilot", "screen_fraction": 0.5}},
            "dynamic.signals.screen_by",
        ),
    ],
)
def test_moments_are_needed_by_parts_as_by_the_whole(block: Any, place: str, config: Config, project: Path) -> None:
    block = {**block, "interval_steps": 5}
    zero2 = {"zero_optimization": {"stage": 2}}
    for optimizer in (
        {"optim": "adafactor"},
        {"optim": "ademamix"},
        {"use_galore": True},
        {"use_muon": True, "deepspeed": zero2},
    ):
        found = problems(config(dynamic=block, **optimizer), project)
        assert [line for line in found if line.startswith(f"{place}: ") and "Adam's moments" in line], found
    assert problems(config(dynamic=block), project) == problems(config(dynamic=block, use_muon=True), project) == []


def test_muon_has_directions_but_not_those_of_another_adam(config: Config, project: Path) -> None:
    block = {"interval_steps": 5, "selector": {"name": "less", "targets": ["t"], "precondition": "paper_repo"}}
    [found] = problems(config(dynamic=block, use_muon=True), project)
    assert found.startswith("dynamic.selector.precondition: paper_repo needs Adam's moments"), found


@pytest.mark.parametrize(
    ("params", "changes", "told"),
    [
        ({}, {"stage": "dpo"}, "less does not work under stage dpo"),
        ({"include_momentum": False}, {}, "include_momentum: has no effect with 'precondition: ekfac'"),
        ({"precondition": "none", "ekfac_rows": 8}, {}, "ekfac_rows: has no effect without 'precondition: ekfac'"),
        ({"precondition": "none", "ekfac_damping": 1.0}, {}, "ekfac_damping: has no effect without"),
    ],
)
def test_where_the_curvature_cannot_be_had(params: Any, changes: Any, told: str, config: Config, project: Path) -> None:
    selector = {"name": "less", "targets": ["t"], "precondition": "ekfac", **params}
    block = {"interval_steps": 5, "selector": selector}
    assert any(told in line for line in problems(config(dynamic=block, **changes), project))


def test_curvature_needs_no_moments_and_takes_passes_over_the_pool(config: Config, project: Path) -> None:
    block = {"interval_steps": 5, "selector": {"name": "less", "targets": ["t"], "precondition": "ekfac"}}
    assert problems(config(dynamic=block, optim="adafactor"), project) == []
    within = problems(config(dynamic={**block, "signals": {"budget": 0.1}}), project)
    assert any(
        "the less selector, preconditioned by ekfac, has no scores that training steps give" in w for w in within
    )


def test_parts_say_what_stages_and_parameters_they_need(config: Config, project: Path) -> None:
    part = {"represent": {"name": "tacs"}, "targets": ["t"]}
    zero3 = {"deepspeed": {"zero_optimization": {"stage": 3}}}
    found = problems(config(dynamic={"selector": part, "interval_steps": 5}, **zero3), project)
    assert any("does not work with partitioned parameters" in line for line in found), found
    found = problems(config(stage="kto", dynamic={"selector": part, "interval_steps": 5}), project)
    assert any("compose does not work under stage kto" in line for line in found), found
    found = problems(config(dynamic={"weighter": ["group", "meta"]}), project)
    assert any("needs a target" in line for line in found), found
    found = problems(
        config(dynamic={"weighter": {"name": "product", "of": ["group", "meta"], "targets": ["t"]}}, **zero3), project
    )
    assert any("does not work with partitioned parameters" in line for line in found), found


@dataclass(frozen=True, kw_only=True)
class Asking(MethodConfig):
    """A method that requires what a test says."""

    needs: Requires

    @property
    def requires(self) -> Requires:  # type: ignore[override]
        return self.needs


NAMES = {"selector": "random", "mixer": "uniform", "orderer": "shuffle", "weighter": "none"}
# Field of Requires: a kind of method, what it states, what is known of a run that does not have it, and what is told.
UNMET: dict[str, list[tuple[str, Any, RunFacts | None, str]]] = {
    "signals": [
        ("selector", frozenset({"gates"}), RunFacts(stage="dpo"), "asks for gates"),
        ("selector", frozenset({"in_run_losses"}), RunFacts(stage="dpo"), "asks for in_run_losses"),
        ("mixer", frozenset({"in_run_scores"}), RunFacts(optimizer="optim: lion"), "needs Adam's moments"),
    ],
    "targets": [("weighter", True, None, "none needs a target")],
    "domains": [
        ("selector", 3, RunFacts(num_domains=2), "needs at least 3 domains, found 2"),
        (
            "weighter",
            2,
            RunFacts(num_domains=1, copied=True),
            "tokenized_path: a copy made by LLaMA-Factory alone does not say",
        ),
    ],
    "stages": [("mixer", ("pt",), RunFacts(stage="sft"), "uniform does not work under stage sft (works under: pt)")],
    "whole_parameters": [("selector", True, RunFacts(partitioned="fsdp"), "with partitioned parameters (fsdp)")],
    "needs_interval": [("mixer", True, None, "dynamic.interval_steps: missing")],
    "within_batch": [("selector", True, None, "dynamic.candidate_batches: missing")],
    "columns": [
        ("selector", ("w",), RunFacts(columns={"a": {"v"}}), "the data set 'a' has no column 'w' (columns found: v)"),
        ("weighter", ("w",), RunFacts(packed=True), "packing: rows hold several samples"),
        ("mixer", ("w",), RunFacts(copied=True), "LLaMA-Factory alone does not keep the column 'w'"),
    ],
    "reference": [
        ("mixer", Reference("nowhere"), RunFacts(), "dynamic.mixer.reference: no such folder: nowhere"),
        ("selector", Reference("nowhere"), None, "requires reference, which only a mixer or a weighter is given"),
    ],
    "models": [("weighter", {"encoder": "./nowhere"}, RunFacts(), "dynamic.weighter.encoder: no such folder")],
    "preconditions": [
        ("mixer", {"precondition": "true_adam"}, RunFacts(optimizer="optim: lion"), "needs Adam's moments")
    ],
    "by_target": [("mixer", {"losses": {"u": 1.0}}, RunFacts(), "dynamic.mixer.losses.u: no such target")],
    "pure_micro_batches": [("mixer", True, None, "uniform requires micro-batches of one domain each")],
    "embedding": [
        ("selector", object(), None, "requires embedding, which only a weighter is given"),
        ("weighter", Embedding(encoder="other"), None, "leave encoder out of requires()"),
    ],
    "entropy": [("mixer", True, None, "requires entropy, which only a weighter is given")],
    "token_weights": [
        ("mixer", ("turn", "w"), None, "requires token_weights, which only a weighter is given"),
        ("weighter", ("turn", "w"), RunFacts(copied=True), "tokenized_path: a tokenized copy does not keep the 'w'"),
        ("weighter", ("token", "w"), RunFacts(copied=False), "weights of tokens are read from a tokenized copy"),
    ],
    "row_weights": [
        ("mixer", "num_tokens", None, "requires row_weights, which only a selector is given"),
        (
            "selector",
            "num_tokens",
            RunFacts(stage="dpo"),
            "gives rows weights, and stage dpo trains on a loss of its own",
        ),
    ],
    "ledger": [
        ("weighter", True, None, "requires ledger, which only a mixer is given"),
        ("mixer", True, None, "dynamic.ledger: missing; the uniform mixer decides by it"),
    ],
    "selector_scores": [
        ("mixer", True, None, "requires selector_scores, which only an orderer is given"),
        ("orderer", True, None, "goes by the selector's scores, and the random selector gives none"),
    ],
    "score_files": [
        ("weighter", (ScoreFile("f", "c"),), None, "requires score_files, which only an orderer is given"),
        ("orderer", (ScoreFile("nowhere", "c"),), RunFacts(), "nowhere: no such file; scores are written by"),
    ],
}
NOT_REQUIRED = {
    "budget": "what a selector allows, held against the block",
    "passes": "what a method costs, told by 'dataflex plan'",
}


def test_every_field_of_requires_has_a_case() -> None:
    assert [*UNMET, *NOT_REQUIRED] == [field.name for field in dataclasses.fields(Requires)]


@pytest.mark.parametrize(
    ("field", "kind", "stated", "run", "told"), [(field, *case) for field, cases in UNMET.items() for case in cases]
)
def test_what_a_run_does_not_have_is_told(field: str, kind: str, stated: Any, run: Any, told: str) -> None:
    def found(needs: Requires) -> list[str]:
        asking = {kind: Asking(kind=kind, name=NAMES[kind], params=Params(), needs=needs)}
        beside = {"selector": MethodConfig(kind="selector", name="random", params=find("selector", "random").Params())}
        return [*unmet(DynamicConfig(**{**beside, **asking}), run, models=True)]

    assert found(Requires()) == []
    lines = found(Requires(**{field: stated}))
    assert any(told in line for line in lines), lines


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"selector": {"name": "tacs", "targets": ["t"]}}, "the tacs selector has no scores that training steps give"),
        ({"selector": None, "mixer": "uniform", "domain_column": "d"}, "a run without a selector has no scores"),
        ({"signals": {"budget": 0.1, "screen_fraction": 0.5}}, "screening makes a pass over the pool"),
        (
            {"selector": {"name": "less", "targets": ["t"], "sketch_size": 64}},
            "dynamic.selector.sketch_size: has no effect beside dynamic.signals.budget",
        ),
        (
            {"selector": {"name": "greats", "targets": ["t"], "target_rows": 4}, "candidate_batches": 2},
            "dynamic.selector.target_rows: has no effect beside dynamic.signals.budget",
        ),
        (
            {"selector": {"name": "opus", "targets": ["t"], "interaction": "learning_rate"}, "candidate_batches": 2},
            "the opus selector, with an interaction that needs the size of gradients, has no scores",
        ),
        ({"signals": {"budget": 0.0}}, "budget: must be above 0"),
        ({"signals": {"budget": 1e4}}, "budget: must be at most 1000"),
    ],
)
def test_a_budget_is_for_what_training_steps_give(
    changes: dict[str, Any], told: str, config: Config, project: Path
) -> None:
    block = {"selector": {"name": "less", "targets": ["t"]}, "interval_steps": 5, "signals": {"budget": 0.1}, **changes}
    found = problems(config(dynamic={key: value for key, value in block.items() if value is not None}), project)
    assert any(told in line for line in found), found


def test_a_budget_needs_steps_that_score_rows(config: Config, project: Path) -> None:
    block = {"selector": "loss", "interval_steps": 5, "signals": {"budget": 0.1}}
    assert problems(config(dynamic=block), project) == []
    for name in ("greats", "opus"):
        selector = {"name": name, "targets": ["t"]}
        assert problems(config(dynamic={**block, "selector": selector, "candidate_batches": 2}), project) == []
    found = problems(config(stage="dpo", dynamic=block), project)
    assert any("in the steps of stages pt and sft, not of dpo" in line for line in found), found
    found = problems(config(enable_liger_kernel=True, label_smoothing_factor=0.1, dynamic=block), project)
    assert any("gives no loss per token, which the loss selector needs" in line for line in found), found
    assert any("smoothing replaces the loss that the loss selector looks at" in line for line in found), found


PAIRS = {"stage": "dpo", "finetuning_type": "lora"}
MARGIN = {"selector": "margin", "interval_steps": 5, "warmup_steps": 1}
HALVES = {"name": "selective_dpo", "first": ["one"], "second": ["other"]}
GRADIENTS = {"selector": "grad_norm", "interval_steps": 5}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dynamic": MARGIN}, "margin does not work under stage sft, whose rows are no pairs of a"),
        ({**PAIRS, "dynamic": {**MARGIN, "warmup_steps": 0}}, "dynamic.warmup_steps: missing; at step 0 the policy is"),
        ({**PAIRS, "pref_loss": "simpo", "dynamic": MARGIN}, "pref_loss: simpo has no reference model, which"),
        (
            {**PAIRS, "fsdp": "full_shard", "dynamic": {**MARGIN, "selector": {"name": "margin", "policy": "after"}}},
            "margin does not work with partitioned parameters (fsdp), since it scores rows by other models (policy)",
        ),
        (
            {**PAIRS, "fsdp": "full_shard", "dynamic": {**MARGIN, "selector": HALVES}},
            "since it scores rows by other models (first[0], second[0])",
        ),
        (
            {**PAIRS, "pref_loss": "kto_pair", "dynamic": GRADIENTS},
            "pref_loss: the gradient of a pair by itself is not",
        ),
        ({**PAIRS, "pref_loss": "ipo", "dynamic": GRADIENTS}, "not known under ipo (known: sigmoid, orpo, simpo), and"),
        ({**PAIRS, "pref_bco_weight": 0.5, "dynamic": GRADIENTS}, "pref_bco_weight: the loss has a running mean"),
        ({**PAIRS, "ld_alpha": 0.5, "dynamic": GRADIENTS}, "ld_alpha: long answers are weighed by position"),
    ],
)
def test_what_stage_dpo_cannot_give_is_refused(
    config: Config, project: Path, changes: dict[str, Any], told: str
) -> None:
    found = problems(config(**changes), project)
    assert any(told in line for line in found), found
    given = {**changes, "pref_loss": "sigmoid", "pref_bco_weight": 0.0, "ld_alpha": None, "fsdp": None, **PAIRS}
    given["dynamic"] = {**given["dynamic"], "warmup_steps": 1}
    assert not any(told in line for line in problems(config(**given), project))


@pytest.mark.parametrize("selector", ["margin", {"name": "bees", "column": "rating"}])
def test_margins_of_the_run_s_own_models_take_partitioned_parameters(
    config: Config, project: Path, selector: Any
) -> None:
    changes = {**PAIRS, "fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2}}
    found = problems(config(**changes, dynamic={**MARGIN, "selector": selector}), project)
    assert not any("partitioned" in line for line in found), found


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dynamic": {"ledger": {"targets": []}}}, "dynamic.ledger.targets: names no data set"),
        ({"dynamic": {"ledger": {"targets": ["nowhere"]}}}, "dynamic.ledger.targets: "),
        ({"dynamic": {"ledger": {"targets": ["t"], "refresh_steps": 0}}}, "refresh_steps: must be at least 1, found 0"),
        ({"dynamic": {"ledger": {"target": ["t"]}}}, "dynamic.ledger.target: unknown key; did you mean 'targets'?"),
        (
            {"dynamic": {"mixer": {"name": "ledger", "targets": ["t", "a"]}, "ledger": {"targets": ["t"]}}},
            "dynamic.mixer.targets: the ledger has no account of a; add it to dynamic.ledger.targets",
        ),
        ({"stage": "dpo"}, "dynamic.ledger: rows are seen in the steps of stages pt and sft, not of dpo"),
        ({"optim": "adafactor"}, "not under the run's optimizer (optim: adafactor)"),
        ({"use_muon": True}, "not under the run's optimizer (use_muon)"),
        ({"fsdp": "full_shard"}, "dynamic.ledger: needs parameters that keep their shapes, and fsdp partitions them"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "and DeepSpeed ZeRO-3 partitions them"),
        ({"deepspeed": {"zero_optimization": {"stage": 0}}}, "deepspeed: the ledger reads what ZeRO-1 and 2 step"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}},
            "deepspeed: the ledger does not read gradients that are offloaded",
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 1}}, "bf16": True},
            "deepspeed: ZeRO-1 with bf16 has an optimizer of its own",
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2}}, "optim": "sgd"},
            "deepspeed: the ledger reads Adam's moments of DeepSpeed, not SGD's",
        ),
    ],
)
def test_a_ledger_is_for_what_it_can_split(changes: dict[str, Any], told: str, config: Config, project: Path) -> None:
    settings = {"dynamic": {"ledger": {"targets": ["t"]}}, **changes}
    found = problems(config(**settings), project)
    assert any(told in line for line in found), found


def test_a_ledger_needs_no_method_and_a_mixer_turns_it_on(config: Config, project: Path) -> None:
    assert problems(config(dynamic={"ledger": {"targets": ["t"]}}), project) == []
    assert problems(config(optim="sgd", dynamic={"ledger": {"targets": ["t"]}}), project) == []
    for engine in (
        {"deepspeed": {"zero_optimization": {"stage": 2}}},
        {"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2}},
    ):
        assert problems(config(**engine, dynamic={"ledger": {"targets": ["t"]}}), project) == []
    block = {"mixer": {"name": "ledger", "targets": ["t"]}, "interval_steps": 5}
    dynamic = resolve(config(dynamic=block), project).dynamic
    assert dynamic is not None
    assert dynamic.ledger is not None
    assert dynamic.ledger.targets == ("t",)
