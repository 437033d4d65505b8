"""Configurations written for existing DataFlex: the same run, in our words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.config.schema import FLAT_KEYS, DynamicConfig, MethodConfig
from dataflex.config.split import Split, resolve, split
from dataflex.errors import ConfigError
from dataflex.registry import find

Config = Callable[..., dict[str, Any]]

COMPONENTS = """
selectors:
  loss:
    name: loss
    params:
      cache_dir: ../saves/loss_output
      focus: "medium"
      focus_weight: 3
      quantiles: [0.2, 0.8]
      replacement: true
      temperature: 0.5
      score_batch_size: 8
      score_num_workers: 2
  random:
    name: random
    params: {cache_dir: ../saves/random_output, seed: 123, replacement: false}
  targeted:
    name: tacs
    params: {cache_dir: x}
  broken:
    name: loss
    params: {focsu: high, focus_weight: -1}
  unknown:
    name: lose
  bare: 3
mixers:
  static:
    name: static
    params: {proportions: [0.6, 0.4]}
  even:
    name: static
    params: {proportions: null}
  random:
    name: random
    params: {seed: 42}
weighters:
  loss:
    name: loss
    params: {strategy: quadratic, delta: 2.0}
  softmax:
    name: loss
    params: {strategy: uniform, delta: 1.0}
  adapt:
    name: adapt
    params: {tau: 0.5, refresh_interval: 20, anchor_batch_size: 8, clip: null}
  joint_update_aware:
    name: joint_update_aware
    params: {beta: 0.2, tau: 0.1, fixed_point_iters: 5, damping: 1.0, target_update_step: 7, target_batch_size: 1,
      target_num_batches: 1, embed_normalize: true, pooling: mean_pool, embed_layer: -2, objective_mode: diverse_only}
"""


@pytest.fixture
def flat(project: Path, config: Config) -> Callable[..., dict[str, Any]]:
    (project / "components.yaml").write_text(COMPONENTS)

    def changed(**changes: Any) -> dict[str, Any]:
        return config(dynamic=None, **{"components_cfg_file": "components.yaml", **changes})

    return changed


def method(kind: str, name: str, targets: tuple[str, ...] = (), **params: Any) -> MethodConfig:
    return MethodConfig(kind=kind, name=name, params=find(kind, name).Params(**params), targets=targets)


def dynamic_of(parts: Split) -> DynamicConfig:
    assert parts.dynamic is not None
    assert not set(parts.lf) & set(FLAT_KEYS)
    return parts.dynamic


def test_select(flat: Config, project: Path) -> None:
    given_keys = flat(
        train_type="dynamic_select",
        component_name="loss",
        warmup_step=10,
        update_step=20,
        update_times=3,
        num_train_epochs=1.5,
        learning_rate=1e-4,
        early_stopping_min_delta=0.01,
    )
    parts = resolve(given_keys, project)
    assert dynamic_of(parts) == DynamicConfig(
        selector=method(
            "selector",
            "loss",
            focus="medium",
            focus_weight=3.0,
            quantiles=(0.2, 0.8),
            temperature=0.5,
            replacement=True,
        ),
        warmup_steps=10,
        interval_steps=20,
        cycle_steps=70,
        total_steps=105,
        early_stopping_min_delta=0.01,
    )
    expected = {key: value for key, value in given_keys.items() if key not in FLAT_KEYS}
    assert parts.lf == {**expected, "max_steps": 105}
    notes = "\n".join(parts.notes)
    for dropped in ("cache_dir", "score_batch_size", "score_num_workers"):
        assert f"components_cfg_file: selectors.loss.params.{dropped}: no effect here" in notes
    assert "1.5 x 70 = 105" in notes


def test_select_takes_three_epochs_unless_told(flat: Config, project: Path) -> None:
    parts = resolve(flat(train_type="dynamic_select", component_name="random", update_step=7, update_times=2), project)
    dynamic = dynamic_of(parts)
    assert (dynamic.cycle_steps, dynamic.total_steps, parts.lf["max_steps"]) == (14, 42, 42)
    assert dynamic.selector == method("selector", "random", replacement=False)
    assert dynamic.seed == 123
    assert any("num_train_epochs x" in note for note in parts.notes)


@pytest.mark.parametrize("update_times", [0, -1])
def test_select_without_a_count_lasts_for_the_epochs(flat: Config, project: Path, update_times: int) -> None:
    keys = flat(
        train_type="dynamic_select",
        component_name="loss",
        warmup_step=4,
        update_step=5,
        update_times=update_times,
        max_steps=77,
    )
    parts = resolve(keys, project)
    dynamic = dynamic_of(parts)
    assert (dynamic.warmup_steps, dynamic.interval_steps) == (4, 5)
    assert dynamic.cycle_steps is None
    assert dynamic.total_steps is None
    assert "max_steps" not in parts.lf
    assert any(note.startswith("max_steps: 77 is not looked at") for note in parts.notes)


def test_train_step_fixes_the_total_and_stages_go_on(flat: Config, project: Path) -> None:
    keys = flat(
        train_type="dynamic_select", component_name="loss", warmup_step=1, update_step=5, update_times=2, train_step=40
    )
    parts = resolve(keys, project)
    assert (dynamic_of(parts).cycle_steps, dynamic_of(parts).total_steps, parts.lf["max_steps"]) == (11, 40, 40)


def test_targets_come_from_the_evaluation_set(flat: Config, project: Path) -> None:
    keys = flat(train_type="dynamic_select", component_name="targeted", update_step=5, eval_dataset="t, b")
    parts = resolve(keys, project)
    assert dynamic_of(parts).selector == method("selector", "tacs", targets=("t + b",))
    assert parts.lf["eval_dataset"] == "t, b"
    del keys["eval_dataset"]
    with pytest.raises(
        ConfigError, match=r"selectors.targeted: tacs needs a target; flat keys take it from eval_dataset"
    ):
        resolve(keys, project)


@given(
    warmup=st.integers(0, 7),
    interval=st.integers(1, 6),
    times=st.integers(1, 4),
    epochs=st.floats(0.1, 4),
    train_step=st.integers(0, 60),
)
def test_schedule_of_select_against_a_step_by_step_reading(
    warmup: int, interval: int, times: int, epochs: float, train_step: int
) -> None:
    mapping = {
        "train_type": "dynamic_select",
        "component_name": "loss",
        "components_cfg_file": "configs/components.yaml",
        "warmup_step": warmup,
        "update_step": interval,
        "update_times": times,
        "num_train_epochs": epochs,
        "train_step": train_step,
    }
    parts = split(mapping, Path("/nowhere"))
    stage = warmup + interval * times
    total = train_step if train_step else math.ceil(epochs * stage)
    assert parts.lf["max_steps"] == total
    decided, warmed = [], []
    for step in range(total):
        within = step % stage
        if within == 0 and warmup:
            warmed.append(step)
        elif within >= warmup and (within - warmup) % interval == 0:
            decided.append(step)
    intervals = list(dynamic_of(parts).schedule(total).intervals())
    assert [i.start_step for i in intervals if i.kind == "dynamic"] == decided
    assert [i.start_step for i in intervals if i.kind == "warmup"] == warmed


def test_mix(flat: Config, project: Path) -> None:
    keys = flat(
        train_type="dynamic_mix",
        component_name="static",
        mixture_sample_rule="mixture",
        init_mixture_proportions=[0.7, 0.3],
        warmup_step=4,
        update_step=3,
        update_times=2,
        freeze_gate=True,
    )
    parts = resolve(keys, project)
    assert dynamic_of(parts) == DynamicConfig(
        mixer=method("mixer", "static", proportions=(0.6, 0.4)),
        warmup_steps=4,
        interval_steps=3,
        initial_proportions=(0.7, 0.3),
        total_steps=10,
        freeze_gate=True,
    )
    assert parts.lf["max_steps"] == 10


def test_mix_starts_uniformly_unless_told(flat: Config, project: Path) -> None:
    keys = flat(train_type="dynamic_mix", component_name="even", warmup_step=4, update_step=3, update_times=-1)
    parts = resolve(keys, project)
    dynamic = dynamic_of(parts)
    assert dynamic.initial_proportions == (1.0, 1.0)
    assert dynamic.mixer == method("mixer", "uniform")
    assert dynamic.total_steps is None
    assert "max_steps" not in parts.lf


def test_mix_without_warm_up_starts_with_the_component(flat: Config, project: Path) -> None:
    keys = flat(
        train_type="dynamic_mix", component_name="static", update_step=3, init_mixture_proportions=[1, 1], train_step=9
    )
    parts = resolve(keys, project)
    assert dynamic_of(parts).initial_proportions is None
    assert dynamic_of(parts).total_steps == 9
    assert any(note.startswith("init_mixture_proportions: no effect") for note in parts.notes)


def test_random_mixer_draws_once(flat: Config, project: Path) -> None:
    import numpy as np

    np.random.seed(42)
    raw = np.random.random(2)
    keys = flat(train_type="dynamic_mix", component_name="random", update_step=3, train_step=9)
    mixer = dynamic_of(resolve(keys, project)).mixer
    assert mixer == method("mixer", "static", proportions=tuple((raw / raw.sum()).tolist()))


def test_odm_and_dynamic_moe(flat: Config, project: Path) -> None:
    keys = flat(train_type="dynamic_mix", update_step=3, train_step=9, component_name="odm")
    del keys["components_cfg_file"]  # the presets of existing DataFlex
    parts = resolve(keys, project)
    assert dynamic_of(parts).mixer == method("mixer", "odm", smoothing=0.9, floor=0.03)
    assert any("reward_scale: no effect here; losses are not scaled" in note for note in parts.notes)
    assert any("full_information" in note for note in parts.notes)


@pytest.mark.parametrize(
    ("changes", "mixer"),
    [
        ({"static_mix": True}, ("uniform", {})),
        ({"static_mix": True, "init_mixture_proportions": [3, 1]}, ("static", {"proportions": (3.0, 1.0)})),
        ({"mixture_sample_rule": "stratified", "init_mixture_proportions": [3, 1]}, ("size", {})),
        ({"mixture_sample_rule": "uniform", "component_name": "static"}, ("uniform", {})),
    ],
)
def test_fixed_mixtures(
    flat: Config, project: Path, changes: dict[str, Any], mixer: tuple[str, dict[str, Any]]
) -> None:
    keys = flat(train_type="dynamic_mix", warmup_step=5, update_step=5, update_times=4, **changes)
    parts = resolve(keys, project)
    name, params = mixer
    total = None if changes.get("static_mix") else 25
    assert dynamic_of(parts) == DynamicConfig(mixer=method("mixer", name, **params), total_steps=total)
    assert parts.lf.get("max_steps") == total
    if "component_name" in changes:
        assert any("'static' has no say" in note for note in parts.notes)


def test_weight(flat: Config, project: Path) -> None:
    for name in ("dynamic_weight", "dynamic_weighting"):
        parts = resolve(flat(train_type=name, component_name="loss", warmup_step=100, train_step=500), project)
        weighter = method("weighter", "loss", strategy="quadratic", delta=2.0, warmup_steps=100)
        assert dynamic_of(parts) == DynamicConfig(weighter=weighter, total_steps=500)
        assert parts.lf["max_steps"] == 500


def test_weight_called_uniform_there(flat: Config, project: Path) -> None:
    parts = resolve(flat(train_type="dynamic_weight", component_name="softmax", max_steps=60), project)
    assert dynamic_of(parts).weighter == method("weighter", "loss", strategy="softmax_loss", warmup_steps=0)
    assert parts.lf["max_steps"] == 60
    assert any("softmax_loss" in note for note in parts.notes)


def test_weight_by_likeness(flat: Config, project: Path) -> None:
    keys = {"train_type": "dynamic_weight", "max_steps": 60, "eval_dataset": "t"}
    parts = resolve(flat(**keys, component_name="adapt"), project)
    wanted = method("weighter", "adapt", ("t",), tau=0.5, refresh_steps=20)
    assert dynamic_of(parts).weighter == wanted
    assert any("params.anchor_batch_size: no effect here" in note for note in parts.notes)
    assert any("not a sum over the batch" in note for note in parts.notes)
    warmed = resolve(flat(**keys, component_name="adapt", warmup_step=12), project)
    assert dynamic_of(warmed).weighter == method(
        "weighter", "adapt", ("t",), tau=0.5, refresh_steps=20, warmup_steps=12
    )
    parts = resolve(flat(**keys, component_name="joint_update_aware"), project)
    params = {"beta": 0.2, "tau": 0.1, "refresh_steps": 7, "layer": -2, "mode": "diverse_only"}
    pooled = {"pooling": "mean", "completion_only": True, "normalize": True}
    assert dynamic_of(parts).weighter == method("weighter", "joint_update_aware", ("t",), **params, **pooled)
    assert sum("fixed point" in note for note in parts.notes) == 3


@pytest.mark.parametrize("train_type", [None, "static"])
def test_static_is_a_stock_run(flat: Config, project: Path, train_type: str | None) -> None:
    keys = flat(component_name="loss", warmup_step=3, update_step=4, early_stopping_min_delta=0.02, max_steps=9)
    if train_type:
        keys["train_type"] = train_type
    parts = resolve(keys, project)
    assert parts.dynamic is None
    assert parts.lf == {key: value for key, value in keys.items() if key not in FLAT_KEYS}
    assert parts.early_stopping_min_delta == 0.02
    assert parts.notes == (
        "components_cfg_file, component_name, warmup_step, update_step: no effect with train_type static; "
        "the run is LLaMA-Factory's own",
    )


def test_a_plain_configuration_is_left_alone(config: Config, project: Path) -> None:
    mapping = config(dynamic=None, anything={"deep": [1, None]})
    parts = resolve(mapping, project)
    assert parts == Split(lf=mapping, dynamic=None)


def test_components_are_looked_for_in_the_working_directory_first(
    flat: Config, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = flat(train_type="dynamic_select", component_name="loss", update_step=5)
    (project / "work").mkdir()
    monkeypatch.chdir(project / "work")
    selector = dynamic_of(split(keys, project)).selector
    assert selector is not None
    assert selector.params.focus == "medium"  # type: ignore[attr-defined]
    (project / "work" / "components.yaml").write_text("selectors: {loss: {name: loss, params: {focus: low}}}")
    selector = dynamic_of(split(keys, project)).selector
    assert selector is not None
    assert selector.params.focus == "low"  # type: ignore[attr-defined]


def test_the_file_that_existing_examples_name_need_not_be_there(flat: Config, project: Path) -> None:
    keys = flat(train_type="dynamic_select", component_name="loss", update_step=5)
    keys["components_cfg_file"] = "src/dataflex/configs/components.yaml"
    parts = resolve(keys, project)
    assert dynamic_of(parts).selector == method("selector", "loss", focus="medium")
    assert any("the presets that existing DataFlex ships are used" in note for note in parts.notes)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"component_name": "los"},
            "component_name: 'los' is not among the selectors of components.yaml; did you mean 'loss'?",
        ),
        ({"component_name": None}, "component_name: missing; name a selector of the components file"),
        ({"components_cfg_file": "comp.yaml"}, "components_cfg_file: comp.yaml is neither in the working directory"),
        (
            {"component_name": "broken"},
            "components_cfg_file: selectors.broken.params.focsu: unknown key; did you mean 'focus'? "
            "(loss selector accepts:",
        ),
        (
            {"component_name": "broken"},
            "components_cfg_file: selectors.broken.params.focus_weight: must be at least 0, found -1",
        ),
        (
            {"component_name": "unknown"},
            "components_cfg_file: selectors.unknown: unknown selector 'lose'; did you mean 'loss'?",
        ),
        (
            {"component_name": "bare"},
            "components_cfg_file: selectors.bare: expected a mapping with 'name' and 'params'",
        ),
        ({"update_step": 0}, "update_step: must be at least 1 with train_type dynamic_select, found 0"),
        ({"update_step": "5"}, "update_step: expected a whole number, found the text '5'"),
        ({"warmup_step": -1}, "warmup_step: must be at least 0, found -1"),
        (
            {"train_type": "dynamic_selct"},
            "train_type: 'dynamic_selct' is not available; did you mean 'dynamic_select'?",
        ),
        ({"train_type": "dynamic_legos"}, "train_type: 'dynamic_legos' is not available; did you mean 'dynamic_lego'?"),
        ({"train_type": 3}, "train_type: expected text, found 3"),
        ({"num_train_epochs": "many"}, "num_train_epochs: expected a number above 0, found 'many'"),
        (
            {"train_type": "dynamic_mix", "component_name": "static", "init_mixture_proportions": [1, 2, 3]},
            "init_mixture_proportions: 3 numbers for 2 data sets (a, b)",
        ),
        (
            {"train_type": "dynamic_mix", "component_name": "static", "init_mixture_proportions": [1, -2]},
            "init_mixture_proportions[1]: must be at least 0, found -2",
        ),
        (
            {"train_type": "dynamic_mix", "component_name": "static", "init_mixture_proportions": [0, 0]},
            "init_mixture_proportions: all are 0",
        ),
        (
            {"train_type": "dynamic_mix", "component_name": "static", "mixture_sample_rule": "stratifed"},
            "mixture_sample_rule: 'stratifed' is not a choice; did you mean 'stratified'?",
        ),
        (
            {"train_type": "dynamic_mix", "component_name": "static", "update_times": 0},
            "update_times: 0 with warmup_step 0 asks for a run of no steps",
        ),
    ],
)
def test_refused(flat: Config, project: Path, changes: dict[str, Any], line: str) -> None:
    keys = flat(train_type="dynamic_select", component_name="loss", update_step=5)
    keys |= changes
    keys = {key: value for key, value in keys.items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        resolve(keys, project)
    assert any(problem.startswith(line) for problem in caught.value.problems), caught.value.problems


def test_problems_of_flat_keys_and_of_the_rest_are_told_together(flat: Config, project: Path) -> None:
    keys = flat(
        train_type="dynamic_select", component_name="broken", update_step=0, group_by_length=True, dataset="a,z"
    )
    with pytest.raises(ConfigError) as caught:
        resolve(keys, project)
    beginnings = {problem.split(":")[0] for problem in caught.value.problems}
    assert beginnings == {"update_step", "components_cfg_file", "group_by_length", "dataset"}


# -- pipelines ------------------------------------------------------------------------------------

STAGES = """
pipelines:
  three:
    params:
      cache_dir: x
      stages:
        - {family: mixer, component: random, every: 5}
        - {family: selector, component: loss, mode: filter, keep_ratio: 0.4, warmup_step: 5, every: 8}
        - {family: weighter, component: loss, warmup_step: 7}
        - {family: weighter, component: adapt, enabled: false}
  filter:
    name: filter
    params: {stages: [{family: selector, component: random}]}
  draw:
    params: {stages: [{family: selector, component: random, mode: draw, every: 1}]}
  weights:
    params: {stages: [{family: weighter, component: loss, warmup_step: 7}]}
  twice:
    params: {stages: [{family: mixer, component: random}, {family: mixer, component: even}]}
  both:
    params: {stages: [{family: selector, component: random, mode: draw}, {family: mixer, component: even}]}
  strange:
    params: {stages: [{family: selectr, component: random}, {family: mixer, component: evn}, {component: even}], n: 1}
  none: {params: {stages: []}}
"""


@pytest.fixture
def lego(flat: Config, project: Path) -> Callable[..., Split]:
    file = project / "stages.yaml"
    file.write_text(COMPONENTS + STAGES, encoding="utf-8")

    def read(name: str) -> Split:
        keys = {"train_type": "dynamic_lego", "component_name": name, "components_cfg_file": "stages.yaml"}
        steps = {"warmup_step": 3, "update_step": 4, "update_times": 6, "num_train_epochs": 1.0}
        return resolve(flat(**keys, **steps), project)

    return read


def test_every_stage_of_a_pipeline_has_its_own_pace(lego: Callable[..., Split]) -> None:
    parts = lego("three")
    dynamic = dynamic_of(parts)
    selector, mixer, weighter = dynamic.selector, dynamic.mixer, dynamic.weighter
    assert selector is not None
    assert mixer is not None
    assert weighter is not None
    assert (selector.name, selector.every, selector.warmup_steps) == ("loss", 8, 7)
    assert (mixer.name, mixer.every, mixer.warmup_steps) == ("static", 8, 3)
    assert weighter.params.warmup_steps == 7  # type: ignore[attr-defined]
    assert (dynamic.keep_ratio, dynamic.repeat, dynamic.cycle_steps) == (0.4, True, None)
    assert parts.lf.max_steps == 3 + 4 * 6
    schedule = dynamic.schedule(27)
    assert [each.start_step for each in schedule.of("selector").decided()] == [7, 15, 23]
    assert [each.start_step for each in schedule.of("mixer").decided()] == [3, 11, 19]


def test_a_filter_alone_is_drawn_from_and_a_draw_takes_the_interval(lego: Callable[..., Split]) -> None:
    dynamic = dynamic_of(lego("filter"))
    assert dynamic.mixer is not None
    assert (dynamic.mixer.name, dynamic.keep_ratio, dynamic.seed) == ("size", 0.5, 123)
    dynamic = dynamic_of(lego("draw"))
    assert dynamic.selector is not None
    assert (dynamic.mixer, dynamic.keep_ratio, dynamic.selector.every) == (None, None, 4)
    weights = dynamic_of(lego("weights"))
    assert weights.methods == (weights.weighter,)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("twice", "one mixer at most, found random, even"),
        ("both", "takes the whole interval, which leaves the mixer nothing to set; write 'mode: filter'"),
        ("strange", "unknown family 'selectr'; did you mean 'selector'?"),
        ("strange", "stages[2].family: missing"),
        ("strange", "params.n: unknown key"),
        ("none", "expected a list of stages"),
        ("thre", "did you mean 'three'?"),
    ],
)
def test_a_pipeline_that_cannot_be_followed_is_told(lego: Callable[..., Split], name: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        lego(name)
    assert told in "\n".join(caught.value.problems)


REORDERS = """
reorders:
  plain:
    params: {kind: static, pattern: sorting, apply_at: raw, polarity: higher_earlier, window_size: 8, seed: 4,
      score_source: precomputed, score_params: {score_field: quality}}
  segment:
    params: {kind: static, pattern: segment, pattern_params: {x_pct: 20, y_pct: 5, front_is_high: true}}
  flat: {params: {kind: static, pattern: saw}}
  stair: {params: {kind: static, pattern: stair, folding_ratio: 0.2}}
  shuffle: {params: {kind: static, pattern: shuffle, score_params: {score_field: quality}}}
  by_model:
    params: {kind: dynamic, pattern: folding, polarity: higher_later, pattern_params: {layers: 3}, reorder_every: 2,
      score_source: model_loss, score_params: {batch_size: 8, max_samples: 100}, consume_once: true}
  again: {params: {kind: dynamic, pattern: saw, score_source: cached_selection, score_params: {cache_path: x.json}}}
  file: {params: {kind: static, score_params: {score_path: x.npy}}}
  twice: {params: {kind: dynamic, consume_once: false}}
  wrong: {params: {kind: static, pattern: sortin}}
  odd: {params: {kind: static, polarty: higher_later}}
"""


@pytest.fixture
def reordered(flat: Config, project: Path) -> Callable[..., Split]:
    (project / "orders.yaml").write_text(REORDERS, encoding="utf-8")
    rows = [{"instruction": "a", "input": "", "output": "b", "quality": 1.0, "score": 2.0} for _ in range(150)]
    (project / "data/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def read(name: str) -> Split:
        keys = {"train_type": "dynamic_reorder", "component_name": name, "components_cfg_file": "orders.yaml"}
        steps = {"warmup_step": 3, "update_step": 4, "update_times": 6, "num_train_epochs": 1.0}
        return resolve(flat(**keys, **steps, dataset="a"), project)

    return read


@pytest.mark.parametrize(
    ("name", "ours", "params"),
    [
        ("plain", "sorting", {"by": ("column", "quality"), "descending": True, "jitter": 8}),
        ("segment", "segment", {"front_percent": 20.0, "back_percent": 5.0, "front": "high", "back": "high"}),
        ("flat", "sorting", {"by": ("column", "score"), "descending": False}),
        ("stair", "stair", {"sections": 2, "layers": 2, "ratio": 0.2}),
        ("shuffle", "shuffle", {}),
    ],
)
def test_an_order_that_is_known_beforehand_begins_at_once(
    reordered: Callable[..., Split], name: str, ours: str, params: dict[str, Any]
) -> None:
    parts = reordered(name)
    dynamic = dynamic_of(parts)
    assert dynamic.orderer is not None
    assert dynamic.orderer.name == ours
    assert (dynamic.warmup_steps, dynamic.interval_steps, dynamic.cycle_steps) == (0, None, None)
    assert parts.lf.max_steps == 27
    for key, value in params.items():
        found = getattr(dynamic.orderer.params, key)
        assert ((found.name, found.params.column) if key == "by" else found) == value


def test_an_order_by_the_model_begins_after_the_warm_up(reordered: Callable[..., Split]) -> None:
    dynamic = dynamic_of(reordered("by_model"))
    assert dynamic.orderer is not None
    assert (dynamic.orderer.name, dynamic.orderer.params.layers) == ("folding", 3)  # type: ignore[attr-defined]
    assert dynamic.orderer.params.by.name == "loss"  # type: ignore[attr-defined]
    assert (dynamic.warmup_steps, dynamic.interval_steps) == (3, 8)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("again", "scores of another run are not read; let the selector decide in this run"),
        ("file", "score_params.score_path: is not read; write its numbers into the rows as a column"),
        ("twice", "consume_once: false is not offered"),
        ("wrong", "pattern: 'sortin' is not a choice; did you mean 'sorting'?"),
        ("odd", "polarty: unknown parameter; did you mean 'polarity'?"),
    ],
)
def test_an_order_that_cannot_be_followed_is_told(reordered: Callable[..., Split], name: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        reordered(name)
    assert told in "\n".join(caught.value.problems)


@pytest.mark.parametrize("kind", ["selector", "weighter"])
def test_a_custom_component_is_told_how_to_be_ported(flat: Config, project: Path, kind: str) -> None:
    file = project / "own.yaml"
    file.write_text(f"{kind}s: {{custom: {{name: custom, params: {{strategy: uniform}}}}}}", encoding="utf-8")
    keys = {"train_type": f"dynamic_{kind.removesuffix('or').removesuffix('er')}", "components_cfg_file": "own.yaml"}
    with pytest.raises(ConfigError, match=r"docs/writing-a-method.md has a table"):
        resolve(flat(**keys, component_name="custom", update_step=2), project)
