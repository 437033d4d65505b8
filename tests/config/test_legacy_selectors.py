"""Selector components of existing DataFlex: what their parameters mean here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dataflex.config.components import ComponentReader, five_layers, tables
from dataflex.config.schema import MethodConfig
from dataflex.registry import find
from dataflex.rewards.judge import JudgeConfig

PRESETS = tables()["presets"]


def read(
    tmp_path: Path, name: str, params: dict[str, Any], updates: int = 4, targets: tuple[str, ...] = ("t",)
) -> tuple[MethodConfig | None, list[str], str]:
    content = {"selectors": {"mine": {"name": name, "params": params}}}
    (tmp_path / "components.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "config.json").write_text('{"num_hidden_layers": 16}')
    problems: list[str] = []
    notes: list[str] = []
    reader = ComponentReader(
        kind="selector",
        file="components.yaml",
        base_dir=tmp_path,
        targets=targets,
        updates=updates,
        model=str(tmp_path / "model"),
        problems=problems,
        notes=notes,
    )
    return reader.read("mine"), problems, "\n".join(notes)


@pytest.mark.parametrize(
    ("name", "given", "ours", "noted"),
    [
        (
            "near",
            {"indices_path": "x.npy", "cache_dir": "c"},
            {},
            ["indices_path: x.npy is not there", "cache_dir: no effect"],
        ),
        ("tsds", {"probs_path": "x.npy"}, {}, ["probs_path: x.npy is not there"]),
        ("delta_loss", {"window_size": 0.3, "score_batch_size": 8}, {"window_size": 0.3, "updates": 3}, []),
        ("less", {"gradient_type": "sgd", "proj_dim": 4096}, {"precondition": "none"}, ["proj_dim: gradients are"]),
        ("less", {"gradient_type": "adam", "save_interval": 16}, {"precondition": "true_adam"}, []),
        ("icons", {"task_boundaries": None}, {"precondition": "true_adam", "target_gradient": "mean_of_cosines"}, []),
        (
            "icons",
            {"task_boundaries": [5]},
            {"precondition": "true_adam", "target_gradient": "mean_of_cosines"},
            ["is not read"],
        ),
        ("cluster_less", {"cluster_size": 10}, {"pick": "random", "cluster_size": 10}, []),
        (
            "coincide",
            {"embedding_layers": None},
            {"clusters": 10_000, "temperature": 1.0, "iterations": 10, "layers": (1, 5, 8, 12, 16)},
            ["features are the residual stream's"],
        ),
        (
            "cluster_less",
            {"cluster_size": 64, "samples_per_cluster": 4, "proj_dim": 1024, "clustering_max_iter": 10},
            {"pick": "random", "representatives": 4, "sketch_size": 1024},
            ["clustering_max_iter: no effect"],
        ),
        (
            "cluster_less",
            {"num_clusters": 9, "cluster_size": 3, "representative_strategy": "center", "embedding_layer": 2},
            {"pick": "nearest", "clusters": 9, "cluster_size": 3, "layer": 2},
            [],
        ),
        (
            "coincide",
            {"embedding_layers": [1, 2], "density_chunk_size": 5, "embedding_model_name_or_path": "m"},
            {"clusters": 10_000, "temperature": 1.0, "iterations": 10, "layers": (1, 2), "encoder": "m"},
            ["density_chunk_size: no effect"],
        ),
        ("zeroth", {"cache_dir": "c"}, {}, ["cache_dir: no effect"]),
        ("all", {}, {}, []),
        (
            "nice",
            {
                "gradient_type": "sgd",
                "mc_samples": 6,
                "max_prompt_length": 4096,
                "reward_model_backend": "api",
                "reward_backend_params": {
                    "local_vllm": {"vllm_seed": 1},
                    "api": {"api_url": "http://h/v1/chat/completions", "api_key": "KEY", "model_name": "m"},
                },
            },
            {
                "precondition": "none",
                "samples": 6,
                "max_new_tokens": 512,
                "temperature": 0.7,
                "reward": "judge",
                "judge": JudgeConfig(url="http://h/v1", model="m", api_key_env="KEY", best=1.0),
            },
            ["max_prompt_length: prompts are those"],
        ),
        (
            "nice",
            {"reward": "rougeL", "reward_model_path": "rm", "policy_model_path": "p", "proj_dim": 8},
            {"samples": 4, "max_new_tokens": 512, "temperature": 0.7, "reward": "rougeL"},
            ["policy_model_path: is not read", "proj_dim: gradients are"],
        ),
    ],
)
def test_parameters(tmp_path: Path, name: str, given: dict[str, Any], ours: dict[str, Any], noted: list[str]) -> None:
    component, problems, notes = read(tmp_path, name, given)
    assert problems == []
    assert component is not None
    assert component.params == find("selector", name).Params(**ours)
    assert all(note in notes for note in noted)


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("less", {"gradient_type": "adan"}, "gradient_type: 'adan' is not a choice (choices: adam, sgd)"),
        ("icons", {"task_boundaries": [3, 2]}, "task_boundaries: names 2 tasks, eval_dataset 1 data sets"),
        ("near", {"indices_path": "components.yaml"}, "indices_path: components.yaml is not read"),
        ("tsds", {"probs_path": "components.yaml"}, "probs_path: components.yaml is not read"),
        ("coincide", {"embedding_model_name_or_path": "a/b"}, "embedding_layers: null stands for five layers"),
        ("cluster_less", {"clustering_method": "lsh"}, 'clustering_method: "lsh" is not offered'),
        ("cluster_less", {"representative_strategy": "best"}, "representative_strategy: 'best' is not a choice"),
        ("coincide", {"single_member_density": 2.0}, "single_member_density: 2.0 is not supported"),
        ("nice", {"reward_model_backend": "local_vllm"}, "reward_model_backend: a model is not loaded beside the run"),
        ("nice", {"reward_model_path": "rm"}, "reward_model_path: a model is not loaded beside the run"),
        ("nice", {"reward_model_backend": "vllm"}, "reward_model_backend: 'vllm' is not a choice"),
        ("nice", {"reward_model_backend": "api"}, "reward_backend_params.api: expected a mapping with api_url"),
        ("nice", {"reward": "f1", "reward_prompt_with_ref": "x"}, "reward_prompt_with_ref: is not read"),
        ("nice", {}, "reward: missing"),
        ("near", {"indices": "x"}, "indices: unknown key"),
        ("delta_loss", {"windowsize": 0.2}, "windowsize: unknown key"),
    ],
)
def test_parameters_that_cannot_be_followed(tmp_path: Path, name: str, given: dict[str, Any], told: str) -> None:
    component, problems, _ = read(tmp_path, name, given)
    assert component is None
    assert any(
        problem.startswith(f"components_cfg_file: selectors.mine.params.{told}".replace('"', "'"))
        for problem in problems
    )


@pytest.mark.parametrize("updates", [0, -1])
def test_a_window_without_a_number_of_updates_stays_where_it_starts(tmp_path: Path, updates: int) -> None:
    component, problems, notes = read(tmp_path, "delta_loss", {}, updates=updates)
    assert problems == []
    assert "the window stays where it starts" in notes
    assert component is not None
    from dataflex.selectors.losses import window

    size = component.params.updates
    assert window(1000, 500 / (size - 1), 0.2, 10.0) == window(1000, 0.0, 0.2, 10.0)


def test_the_preset_of_nice_says_what_it_lacks(tmp_path: Path) -> None:
    component, problems, _ = read(tmp_path, "nice", PRESETS["selectors"]["nice"]["params"])
    assert component is None
    assert "ask it through an OpenAI-compatible server" in problems[0]


@pytest.mark.parametrize("name", sorted(set(PRESETS["selectors"]) - {"nice", "custom"}))
def test_every_preset_can_be_built(tmp_path: Path, name: str) -> None:
    entry = PRESETS["selectors"][name]
    component, problems, _ = read(tmp_path, entry["name"], entry["params"])
    assert problems == []
    assert component is not None
    component.build()


@pytest.mark.parametrize(
    ("name", "params", "targets"),
    [
        ("less", {}, ("a + b",)),
        ("cluster_less", {}, ("a + b",)),
        ("icons", {}, ("a + b",)),
        ("icons", {"task_boundaries": [3, 2]}, ("a", "b")),
    ],
)
def test_several_evaluation_sets_are_one_target_as_there(
    tmp_path: Path, name: str, params: dict[str, Any], targets: tuple[str, ...]
) -> None:
    component, problems, notes = read(tmp_path, name, params, targets=("a", "b"))
    assert problems == []
    assert component is not None
    assert component.targets == targets
    assert ("are one target, as there: 'a + b'" in notes) == (len(targets) == 1)


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (5, [1, 2, 3, 4, 5]), (7, [1, 2, 4, 6, 7]), (32, [1, 9, 16, 24, 32])],
)
def test_five_layers_from_the_first_to_the_last(depth: int, layers: list[int]) -> None:
    assert five_layers(depth) == layers
