"""``dataflex plan`` on small examples whose numbers can be checked by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.cli import main

Config = Callable[..., dict[str, Any]]
Plan = Callable[..., str]


@pytest.fixture
def plan(project: Path, config: Config, capsys: pytest.CaptureFixture[str]) -> Plan:
    """Return a function that writes a configuration with changes, plans it and returns what was printed."""

    def printed(*overrides: str, **changes: Any) -> str:
        (project / "run.json").write_text(json.dumps(config(**changes)))
        code = main(["plan", "run.json", *overrides])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return printed


def section(text: str, title: str) -> list[str]:
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    stop = next((i for i in range(start, len(lines)) if not lines[i]), len(lines))
    return lines[start + 1 : stop]


EXPECTED = """\
Configuration
  model_name_or_path: ./model
  stage: sft
  finetuning_type: lora
  dataset: a,b
  dataset_dir: data
  val_size: 0.0
  cutoff_len: 2048
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 3
  num_train_epochs: 2
  learning_rate: 5.0e-05
  disable_shuffling: false
  seed: 42
  output_dir: out
  dynamic:
    selector:
      name: loss
      aggregate: max
      rule: {name: gumbel_top_k, temperature: 1.0, standardize: false}
      focus: medium
      focus_weight: 5.0
      quantiles: [0.33, 0.66]
      temperature: 1.0
      replacement: false
    mixer: null
    orderer: null
    weighter: {name: column, warmup_steps: 10, level: row, column: w, normalizer: weight_sum}
    warmup_steps: 10
    interval_steps: 15
    candidate_batches: null
    keep_ratio: null
    exclude_seen: false
    max_repeats: 4
    repeat: false
    unit: sequences
    interleave: shuffled
    initial_proportions: null
    max_epochs: null
    at_cap: redistribute
    min_proportion: null
    domain_column: null
    domain_path: null
    domain_clusters: null
    domain_encoder: null
    eval_by_domain: false
    record: false
    ledger: null
    average_weights: null
    signals:
      pool_fraction: 1.0
      screen_fraction: 1.0
      screen_by: embeddings
      budget: null
      explore: 0.2
      explore_by: uniform
      in_run_rank: 8
      max_age_steps: 0
      store: null
      store_gb: 10.0
    plugins: []
    leakage: warn
    on_bad_shard: error
    resume_plan: strict
    on_change: strict
    checkpoint_hash: size
    seed: null
    save_on_term: true
    freeze_gate: false
    early_stopping_min_delta: 0.0

Schedule
  global batch         6 sequences (2 per device x 3 accumulated x 1 process)
  rows                 150 (a 100, b 50)
  steps                50 (2 epochs over 150 rows)
  warm-up              10 steps, rows drawn uniformly
  intervals            3 of 15 steps, 90 sequences each; the last has 10 steps
  kept                 at most 90 of 150 rows for 90 sequences of an interval
  repeats              2.67 times a row over the run if every decision kept the same rows
  epochs               2 over all rows on average, but the selector decides which rows

Cost (F: forward pass of one sequence, B: backward pass)
  training             300 F + 300 B
  selector loss        450 F (3 intervals x 150 rows x 1 F; 1 F over the pool per interval)
  weighter column      none
  share of methods     33.3% of all passes, a B counted as two F
  beside training      0.5 x the passes of the training itself

Size (docs/scale.md says how it is estimated)
  tokens               at most 614,400 (sequences x cutoff_len)
"""


def test_selection_and_weights(plan: Plan, project: Path) -> None:
    for file in (project / "data/a.jsonl", project / "data/b.json"):
        file.write_text(file.read_text().replace('"input":', '"w": 1.0, "input":'))
    text = plan(
        "dynamic.selector.focus=medium",
        gradient_accumulation_steps=3,
        num_train_epochs=2,
        dynamic={
            "selector": "loss",
            "weighter": {"name": "column", "column": "w"},
            "warmup_steps": 10,
            "interval_steps": 15,
        },
    )
    assert text == EXPECTED


def test_json_has_the_numbers(plan: Plan, project: Path) -> None:
    told = json.loads(
        plan("--json", dynamic={"selector": "loss", "interval_steps": 10, "warmup_steps": 10}, max_steps=30)
    )
    assert told["config"]["dynamic"]["selector"]["name"] == "loss"
    assert told["steps"] == 30
    assert told["sequences"] == 30 * told["global_batch"]
    assert told["decisions"] == {"selector": 2}
    assert told["pool"] == dict.fromkeys(("rows", "drawn", "left"), told["rows"])
    assert told["passes"] == {
        "training": {"forward": told["sequences"], "backward": told["sequences"]},
        "selector loss": {"forward": 2 * told["rows"], "backward": 0},
    }
    assert json.loads(plan("--json", dynamic=None, do_train=False))["trains"] is False


def test_the_printed_block_gives_the_same_run(plan: Plan, project: Path) -> None:
    import textwrap

    import yaml

    from dataflex.config.load import load_mapping
    from dataflex.config.split import resolve

    text = plan(dynamic={"mixer": {"name": "static", "proportions": {"a": 1, "b": 2.5}}, "max_epochs": {"b": 3}})
    block = textwrap.dedent("\n".join(section(text, "Configuration")))
    (project / "again.yaml").write_text(f"{block}\ndo_train: true\n")
    assert yaml.safe_load(block)["dynamic"]["mixer"]["proportions"] == {"a": 1.0, "b": 2.5}
    first = resolve(load_mapping("run.json"), project)
    assert resolve(load_mapping("again.yaml"), project).dynamic == first.dynamic


def test_epochs_per_domain(plan: Plan) -> None:
    text = plan(
        max_steps=60,
        dynamic={
            "mixer": {"name": "static", "proportions": [1, 3]},
            "warmup_steps": 20,
            "initial_proportions": [1, 1],
            "max_epochs": {"b": 1},
        },
    )
    assert section(text, "Schedule")[2:] == [
        "  steps                60 (max_steps)",
        "  warm-up              20 steps, at initial_proportions",
        "  intervals            interval_steps is not set: one decision holds for the whole run",
        "  epochs per domain    a: 0.7 (70 sequences, 58.3%)",
        "                       b: 1 (50 sequences, 41.7%, at its cap)",
    ]
    assert section(text, "Cost")[-1] == "  share of methods     0.0% of all passes, a B counted as two F"


@pytest.mark.parametrize(
    ("weighter", "cost", "share"),
    [
        # 40 steps of 2 rows train on 80 of 150: 240 F in all, a B counted as two
        ({"name": "slm"}, "80 F of the reference, kept on disk", 80),
        ({"name": "slm", "warmup_steps": 10}, "60 F of the reference, kept on disk", 60),
        ({"name": "slm", "reference_cache": False}, "80 F of the reference, in every step", 80),
        ({"name": "rho", "reference_cache": False, "warmup_steps": 10}, "60 F of the reference, in every step", 60),
        ({"name": "presence"}, "80 F + 80 B (80 rows x 1 F + 1 B;", 240),
        ({"name": "focal"}, "none", 0),
    ],
)
def test_what_a_weighter_costs(plan: Plan, tiny_model: Path, weighter: dict, cost: str, share: int) -> None:
    if weighter["name"] in ("slm", "rho"):
        weighter = {**weighter, "reference": str(tiny_model)}
    text = plan(max_steps=40, gradient_accumulation_steps=1, dynamic={"weighter": weighter})
    told = section(text, "Cost")
    assert told[1].split(None, 2)[2].startswith(cost)
    assert told[2].split(None, 3)[3] == f"{share / (share + 240):.1%} of all passes, a B counted as two F"


@pytest.mark.parametrize(
    ("budget", "cost", "beside"),
    [
        (0.5, "at most 0.5 x the passes of the training (dynamic.signals.budget): F + B of about 40 rows", "0.5"),
        (
            0.2,
            "about 0.4 x the passes of the training: 8 rows of each target in 4 decisions, more than dynamic.",
            "0.4",
        ),
    ],
)
def test_what_a_budget_buys(budget: float, cost: str, beside: str, plan: Plan) -> None:
    """Four decisions over 80 sequences look at 8 of the 10 target rows each at least, which are .4 of the training."""
    less = {"name": "less", "targets": ["t"]}
    block = {"selector": less, "interval_steps": 10, "warmup_steps": 0, "signals": {"budget": budget}}
    told = section(plan(max_steps=40, dynamic=block), "Cost")
    assert told[1].split(None, 2)[2].startswith(cost)
    assert told[-1] == f"  beside training      {beside} x the passes of the training itself"


@pytest.mark.parametrize(
    ("selector", "cost"),
    [
        (
            "grad_norm",
            "at most 0.5 x the passes of the training (dynamic.signals.budget): F + B of about 40 rows, of pilots,",
        ),
        ("loss", "no passes, since training steps show losses (dynamic.signals.budget)"),
    ],
)
def test_what_a_budget_buys_without_targets(selector: str, cost: str, plan: Plan) -> None:
    block = {"selector": selector, "interval_steps": 10, "signals": {"budget": 0.5}}
    told = section(plan(max_steps=40, dynamic=block), "Cost")
    assert told[1].split(None, 2)[2].startswith(cost)


def test_a_pool_that_is_drawn_and_kept_in_part(plan: Plan) -> None:
    """60 of 150 rows are scored in each interval, a tenth of those is kept: 20 sequences of 6 rows."""
    block = {"selector": "loss", "interval_steps": 10, "keep_ratio": 0.1, "signals": {"pool_fraction": 0.4}}
    text = plan(max_steps=40, dynamic=block)
    assert section(text, "Schedule")[3:7] == [
        "  intervals            4 of 10 steps, 20 sequences each",
        "  pool                 60 of 150 rows, drawn anew in each interval (pool_fraction 0.4)",
        "  kept                 at most 6 of 60 rows (keep_ratio 0.1) for 20 sequences of an interval: each 3.33 times",
        "  repeats              13.3 times a row over the run if every decision kept the same rows",
    ]
    assert section(text, "Cost")[1:] == [
        "  selector loss        240 F (4 intervals x 60 rows x 1 F; 1 F over the pool per interval)",
        "  share of methods     50.0% of all passes, a B counted as two F",
        "  beside training      1 x the passes of the training itself",
    ]


@pytest.mark.parametrize(
    ("options", "pool", "cost"),
    [
        (
            {"screen_fraction": 0.2},
            "150 of 150 rows; screening leaves 30 (embeddings, screen_fraction 0.2)",
            "800 F (4 intervals x 150 rows x 1 F of embeddings; 200 of the targets)",
        ),
        (
            {"pool_fraction": 0.5, "screen_fraction": 0.4},
            "75 of 150 rows, drawn anew in each interval (pool_fraction 0.5); screening leaves 30 (embeddings, "
            "screen_fraction 0.4)",
            "500 F (4 intervals x 75 rows x 1 F of embeddings; 200 of the targets)",
        ),
        (
            {"screen_fraction": 0.2, "screen_by": "pilot"},
            "150 of 150 rows; screening leaves 30 (pilot, screen_fraction 0.2)",
            "128 F + 128 B (4 intervals x 32 rows of a pilot x 1 F + 1 B)",
        ),
    ],
)
def test_a_pool_that_is_screened(plan: Plan, options: dict, pool: str, cost: str) -> None:
    """40 steps of 2 rows towards the 50 rows of b; whatever is drawn, 30 rows are left in each interval."""
    selector = {"name": "less", "targets": ["b"]}
    text = plan(max_steps=40, dataset="a,b", dynamic={"selector": selector, "interval_steps": 10, "signals": options})
    assert f"  pool                 {pool}" in section(text, "Schedule")
    told = section(text, "Cost")
    assert told[1] == f"  screening            {cost}"
    assert told[2].split(None, 2)[2] == (
        "120 F + 120 B (4 intervals x 30 rows x 1 F + 1 B; 1 F + 1 B over the pool and 2 (F + B) over the targets per "
        "interval); 400 F + 400 B (4 intervals x 50 target rows x 2 F + 2 B)"
    )


def test_the_curvature_costs_passes_over_its_rows(plan: Plan) -> None:
    selector = {"name": "less", "targets": ["b"], "precondition": "ekfac", "ekfac_rows": 30}
    text = plan(max_steps=40, dataset="a,b", dynamic={"selector": selector, "interval_steps": 10})
    assert "480 F + 240 B (4 intervals x 30 rows of the curvature x 4 F + 2 B)" in text


def test_too_few_rows_for_an_interval(
    plan: Plan, project: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    block = {"selector": "loss", "interval_steps": 10, "signals": {"pool_fraction": 0.1}}
    (project / "run.json").write_text(json.dumps(config(max_steps=40, dynamic=block)))
    assert main(["plan", "run.json"]) == 2
    assert capsys.readouterr().err == (
        "dataflex: dynamic.interval_steps: an interval of 10 steps wants 20 rows, and the data sets hold 150, of which "
        "dynamic.signals.pool_fraction and screen_fraction leave 15. Lower interval_steps to 7 or less, or set "
        "'repeat: true'.\n"
    )
    assert "for 20 sequences of an interval: each 1.33 times" in plan(max_steps=40, dynamic={**block, "repeat": True})


def test_passes_in_time(plan: Plan, project: Path) -> None:
    """An earlier run of 10 steps took 50 s beside its decisions: 40 steps take 200 s, decisions half as much."""
    block = {"selector": "loss", "interval_steps": 20, "signals": {"pool_fraction": 0.4}}
    assert "a step in the record" not in plan(max_steps=40, dynamic=block)

    def record(**started: Any) -> None:
        events = [
            {"event": "run_started", "step": 0, "time": 0.0, "global_batch": 2, "world": 1, **started},
            {"event": "finished", "step": 10, "time": 99.0, "metrics": {}, "seconds": {"train": 50.0, "signals": 40.0}},
        ]
        (project / "out" / "dataflex").mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(event) + "\n" for event in events)
        (project / "out" / "dataflex" / "events.jsonl").write_text(text)

    record()
    assert section(plan(max_steps=40, dynamic=block), "Cost")[-1] == (
        "  time                 about 5 min 00 s: training 3 min 20 s, methods 1 min 40 s (5 s a step in the record of "
        "the run before)"
    )
    record(global_batch=4)  # steps of another size say nothing
    assert "a step in the record" not in plan(max_steps=40, dynamic=block)
    (project / "out" / "dataflex" / "events.jsonl").write_text("{")
    assert "a step in the record" not in plan(max_steps=40, dynamic=block)


def test_a_product_costs_what_its_factors_do(plan: Plan, tiny_model: Path) -> None:
    factors = ["presence", {"name": "rho", "reference": str(tiny_model)}]
    text = plan(max_steps=40, gradient_accumulation_steps=1, dynamic={"weighter": factors})
    told = section(text, "Cost")
    assert "80 F + 80 B (80 rows x 1 F + 1 B;" in told[1]
    assert told[1].endswith("; 80 F of the reference, kept on disk")
    assert told[2].split(None, 3)[3] == f"{320 / 560:.1%} of all passes, a B counted as two F"


def test_caps_that_end_the_run_are_told(plan: Plan) -> None:
    mixer = {"name": "static", "proportions": [1, 3]}
    stop = plan(max_steps=60, dynamic={"mixer": mixer, "max_epochs": 1, "at_cap": "stop"})
    assert section(stop, "Schedule")[-1].strip() == "max_epochs leaves the run 53 of 120 sequences short (stop)"
    error = plan(max_steps=60, dynamic={"mixer": mixer, "max_epochs": 1, "at_cap": "error"})
    assert "b: 1.8 (90 sequences, 75.0%, more than max_epochs 1: the run would fail)" in error


def test_a_domain_too_small_for_a_micro_batch_of_its_own_is_told(plan: Plan) -> None:
    """A cap leaves whole micro-batches of 64: of a's 100 rows one, of b's 50 none."""
    block = {"mixer": {"name": "odm", "variant": "exp3"}, "interval_steps": 1, "max_epochs": 1}
    settings = {"max_steps": 2, "per_device_train_batch_size": 64, "gradient_accumulation_steps": 1}
    text = plan(**settings, dynamic={**block, "at_cap": "redistribute"})
    assert "a: 0.64 (64 sequences, 50.0%, at its cap)" in text
    assert "b: 0 (0 sequences, 0.0%, never: max_epochs 1 leaves fewer rows than a micro-batch of 64)" in text
    mixed = plan(**settings, dynamic={**block, "mixer": "uniform", "at_cap": "redistribute"})
    assert "b: 1 (50 sequences, 39.1%, at its cap)" in mixed


def test_processes_count(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    assert "(2 per device x 1 accumulated x 1 process, as NPROC_PER_NODE is not set)" in plan()
    monkeypatch.setenv("NPROC_PER_NODE", "4")
    text = plan()
    assert "8 sequences (2 per device x 1 accumulated x 4 processes)" in text
    assert section(text, "Schedule")[2] == "  steps                57 (3 epochs over 150 rows)"


def test_packed_rows_are_not_guessed(plan: Plan) -> None:
    text = plan(packing=True, dynamic={"selector": "loss", "interval_steps": 5})
    assert section(text, "Schedule")[1:] == [
        "  rows                 known after packing (samples: a 100, b 50)",
        "  steps                known after loading (3 epochs)",
    ]
    assert section(text, "Cost")[0] == "  training             known after loading"


def test_remote_data_sets_are_not_counted(plan: Plan) -> None:
    text = plan(dataset="a,hub", max_steps=10, dynamic={"mixer": "uniform"})
    assert "  rows                 known after loading (a 100, hub ?)" in text
    assert "  epochs per domain    known after loading" in text
    assert "  training             20 F + 20 B" in text


def test_rows_drawn_from_a_remote_data_set_are_counted(plan: Plan, project: Path) -> None:
    file = project / "data" / "dataset_info.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps({**info, "hub": {**info["hub"], "num_samples": 40}}))
    assert "  rows                 140 (a 100, hub 40)" in plan(dataset="a,hub", dynamic={"mixer": "uniform"})
    assert "  rows                 50 (a 25, hub 25)" in plan(
        dataset="a,hub", max_samples=25, dynamic={"mixer": "uniform"}
    )


def test_hours_of_methods_go_by_their_passes(plan: Plan) -> None:
    """40 steps of 2 rows of 45 tokens, 1 a second: one hour. 4 x 60 F beside 80 (F + B) are as many passes again."""
    block = {"selector": "loss", "interval_steps": 10, "signals": {"pool_fraction": 0.4}}
    text = plan("--tokens-per-second", "1", max_steps=40, cutoff_len=45, dynamic=block)
    assert section(text, "Size") == [
        "  tokens               at most 3,600 (sequences x cutoff_len)",
        "  hours                at most 1.0 of training, of methods 1.0, at the tokens per second given",
    ]
    told = json.loads(plan("--json", "--tokens-per-second", "1", max_steps=40, cutoff_len=45, dynamic=block))
    assert (told["tokens"], told["memory_per_rank"]) == (3600, None)
    assert told["hours"] == {"training": 1.0, "methods": 1.0}
    text = plan("--tokens-per-second", "1", dataset="a,hub", max_steps=40, dynamic=block)
    assert section(text, "Size")[-1].endswith("of methods not known, at the tokens per second given")
    assert section(plan("--tokens-per-second", "1", packing=True, dynamic=block), "Size") == [
        "  tokens               known after loading"
    ]


def test_joined_targets_are_counted_whole(plan: Plan) -> None:
    """The target "t + b" has 10 + 50 rows, which max_samples does not cut; the hub's rows are not known."""
    block = {"selector": {"name": "less", "targets": ["t + b", "t", "t + hub"]}, "interval_steps": 10}
    told = json.loads(plan("--json", max_samples=20, dynamic=block))
    assert told["targets"] == {"t + b": 60, "t": 10, "t + hub": None}


@pytest.mark.parametrize("given", ["0", "-3", "inf", "many"])
def test_tokens_per_second_are_above_zero(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "run.json", f"--tokens-per-second={given}"]) == 2
    assert f"expected a number above 0, found {given!r}" in capsys.readouterr().err


def test_proportions_of_tokens_are_not_guessed(plan: Plan) -> None:
    text = plan(dynamic={"mixer": "uniform", "unit": "tokens"})
    assert "  epochs per domain    known after tokenizing (proportions are of tokens)" in text


def test_validation_rows(plan: Plan) -> None:
    assert "  rows                 135 (a 100, b 50; val_size sets 15 aside)" in plan(val_size=0.1)


def test_warm_up_that_takes_the_whole_run(plan: Plan) -> None:
    text = plan(max_steps=5, dynamic={"selector": "random", "warmup_steps": 5, "interval_steps": 5})
    assert "  intervals            none: the run ends with the warm-up, and no method ever decides" in text


def test_stock_run(plan: Plan) -> None:
    text = plan(dynamic=None)
    assert "No method is named, so this is a stock LLaMA-Factory run." in text
    assert "dynamic" not in text
    assert section(text, "Cost") == ["  training             450 F + 450 B"]


def test_stock_run_that_trains_nothing(plan: Plan) -> None:
    text = plan(dynamic=None, do_train=False, dataset="nowhere")
    assert text.endswith("Nothing is trained (do_train is not on).\n")


def test_flat_keys_are_shown_translated(plan: Plan) -> None:
    text = plan(
        dynamic=None,
        train_type="dynamic_select",
        components_cfg_file="src/dataflex/configs/components.yaml",
        component_name="loss",
        warmup_step=10,
        update_step=10,
        update_times=2,
        num_train_epochs=1.5,
    )
    assert text.startswith("note: components_cfg_file: src/dataflex/configs/components.yaml is not there;")
    assert "  max_steps: 45\n" in text
    assert "    warmup_steps: 10\n    interval_steps: 10\n" in text
    assert "train_type" not in text
    assert section(text, "Schedule")[3:6] == [
        "  warm-up              10 steps, rows drawn uniformly",
        "  cycle                warm-up and intervals start again every 30 steps",
        "  intervals            3 of 10 steps, 20 sequences each",
    ]


def test_a_stock_run_with_a_missing_file_is_refused(
    project: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "run.json").write_text(json.dumps(config(dynamic=None, dataset="a,gone")))
    assert main(["plan", "run.json"]) == 2
    assert capsys.readouterr().err == "dataflex: dataset: the file of 'gone' is missing: data/gone.jsonl\n"
