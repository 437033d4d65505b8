"""Flat keys of configurations written for existing DataFlex, translated to the same ``DynamicConfig``.

Three training types came with it, each with one component from a components file:

- ``dynamic_select``: stages of ``warmup_step`` uniform steps and ``update_times`` selections of
  ``update_step`` steps each, over and over; ``num_train_epochs`` counts stages.
- ``dynamic_mix``: ``init_mixture_proportions`` during ``warmup_step`` steps, then the component's,
  asked again every ``update_step`` steps; the rules ``stratified`` and ``uniform`` and ``static_mix``
  leave the component without a say.
- ``dynamic_weight``: the plain loss for ``warmup_step`` steps, then weights.

The number of steps becomes LLaMA-Factory's ``max_steps`` wherever the flat keys fix it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataflex.config.components import Component, read_component
from dataflex.config.convert import shown
from dataflex.config.flat import FLAT_KEYS, KIND_OF, FlatKeys, read_flat
from dataflex.config.methods import target_list
from dataflex.config.rules import rule_problems
from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.errors import ConfigError
from dataflex.registry import find

_DEFAULT_EPOCHS = 3.0  # of the Hugging Face Trainer


def translate(
    mapping: Mapping[str, Any], base_dir: Path
) -> tuple[dict[str, Any], DynamicConfig | None, float, list[str]]:
    """Return LLaMA-Factory's keys, what the flat keys ask for, the early-stopping delta, and notes.

    Args:
        mapping: A whole configuration without a ``dynamic`` block.
        base_dir: Folder of the configuration file.

    Raises:
        ConfigError: All problems of the flat keys and of the component's parameters.
    """
    lf = {key: value for key, value in mapping.items() if key not in FLAT_KEYS}
    flat = {key: value for key, value in mapping.items() if key in FLAT_KEYS}
    notes: list[str] = []
    problems: list[str] = []
    keys = read_flat(flat, problems)
    if keys is None:
        raise ConfigError(problems)
    if keys.train_type == "static":
        idle = [key for key in flat if key not in ("train_type", "early_stopping_min_delta")]
        if idle:
            notes.append(f"{', '.join(idle)}: no effect with train_type static; the run is LLaMA-Factory's own")
        return lf, None, keys.early_stopping_min_delta, notes
    dynamic = _Translation(keys, lf, base_dir, problems, notes).result()
    if dynamic is None or problems:
        raise ConfigError(problems)
    return lf, dynamic, keys.early_stopping_min_delta, notes


class _Translation:
    """One translation under way: reads ``keys``, writes ``max_steps`` into ``lf``, notes what has no effect."""

    def __init__(
        self, keys: FlatKeys, lf: dict[str, Any], base_dir: Path, problems: list[str], notes: list[str]
    ) -> None:
        self.keys, self.lf, self.base_dir, self.problems, self.notes = keys, lf, base_dir, problems, notes

    def result(self) -> DynamicConfig | None:
        ways = {"dynamic_select": self._select, "dynamic_mix": self._mix, "dynamic_weight": self._weigh}
        given = ways[self.keys.train_type]()
        if self.keys.freeze_gate and self.keys.train_type != "dynamic_mix":
            self.notes.append(f"freeze_gate: no effect with train_type {self.keys.train_type}")
        if self.problems:
            return None
        dynamic = DynamicConfig(flat=True, early_stopping_min_delta=self.keys.early_stopping_min_delta, **given)
        self.problems += rule_problems(dynamic)
        return dynamic

    def _component(self, targets: tuple[str, ...] = ()) -> Component | None:
        keys = self.keys
        return read_component(
            kind=KIND_OF[keys.train_type],
            name=keys.component_name,
            file=keys.components_cfg_file,
            base_dir=self.base_dir,
            targets=targets,
            num_domains=len(self._data_sets()),
            burn_in_steps=keys.warmup_step,
            updates=keys.update_times,
            model=str(self.lf["model_name_or_path"]) if self.lf.get("model_name_or_path") else None,
            problems=self.problems,
            notes=self.notes,
        )

    def _data_sets(self) -> tuple[str, ...]:
        value = self.lf.get("dataset")
        return target_list(value, "dataset", []) if value is not None else ()

    def _interval(self) -> int | None:
        if self.keys.update_step < 1:
            self.problems.append(
                f"update_step: must be at least 1 with train_type {self.keys.train_type}, found "
                f"{self.keys.update_step} (optimizer steps between two decisions)"
            )
            return None
        return self.keys.update_step

    def _fix_steps(self, total_steps: int | None, reason: str) -> int | None:
        """Set the run's length; None leaves it to the epochs, as existing DataFlex does."""
        given = self.lf.pop("max_steps", None)
        if given is not None and given != total_steps and given != -1:
            self.notes.append(f"max_steps: {shown(given)} is not looked at; {reason}")
        if total_steps is None:
            return None
        self.lf["max_steps"] = total_steps
        return total_steps

    def _epochs(self) -> float:
        value = self.lf.get("num_train_epochs")
        if value is None:
            return _DEFAULT_EPOCHS
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.problems.append(f"num_train_epochs: expected a number above 0, found {shown(value)}")
            return _DEFAULT_EPOCHS
        return float(value)

    def _select(self) -> dict[str, Any]:
        keys = self.keys
        interval = self._interval()
        component = self._component(self._evaluated())
        cycle = keys.warmup_step + (interval or 0) * keys.update_times if keys.update_times > 0 else None
        if keys.train_step > 0:
            total = self._fix_steps(keys.train_step, f"train_step asks for {keys.train_step} steps")
        elif cycle is not None:
            epochs = self._epochs()
            steps = math.ceil(epochs * cycle)
            told = f"num_train_epochs x (warmup_step + update_step x update_times) = {epochs:g} x {cycle} = {steps}"
            total = self._fix_steps(steps, told)
            if epochs != 1:
                self.notes.append(f"steps: {told}; here an epoch is one such stage, not a pass over the data")
        else:
            total = self._fix_steps(None, "with update_times <= 0 the run lasts for num_train_epochs")
        return {
            **_method(component, "selector"),
            "warmup_steps": keys.warmup_step,
            "interval_steps": interval,
            "cycle_steps": cycle,
            "total_steps": total,
        }

    def _evaluated(self) -> tuple[str, ...]:
        """Return the data sets that existing DataFlex takes for a component's targets."""
        evaluated = self.lf.get("eval_dataset")
        return target_list(evaluated, "eval_dataset", self.problems) if evaluated is not None else ()

    def _mix(self) -> dict[str, Any]:
        keys = self.keys
        fixed = self._fixed_mixture()
        interval = None if keys.static_mix else self._interval()
        if keys.train_step > 0:
            total = self._fix_steps(keys.train_step, f"train_step asks for {keys.train_step} steps")
        elif keys.static_mix or keys.update_times < 0:
            total = self._fix_steps(None, "the run lasts for num_train_epochs over the data sets")
        else:
            steps = keys.warmup_step + (interval or 0) * keys.update_times
            if steps == 0:
                self.problems.append("update_times: 0 with warmup_step 0 asks for a run of no steps")
            total = self._fix_steps(steps, f"warmup_step + update_step x update_times = {steps} steps")
        result: dict[str, Any] = {"freeze_gate": keys.freeze_gate, "total_steps": total}
        if fixed is not None:
            if keys.component_name is not None:
                self.notes.append(f"component_name: {keys.component_name!r} has no say, the mixture is fixed")
            return {**result, "mixer": fixed}
        targets = keys.mixer_eval_dataset
        component = self._component(target_list(targets, "mixer_eval_dataset", self.problems) if targets else ())
        return {
            **result,
            **_method(component, "mixer"),
            "warmup_steps": keys.warmup_step,
            "interval_steps": interval,
            "initial_proportions": self._initial(),
        }

    def _initial(self) -> tuple[float, ...] | None:
        """Proportions of the warm-up; without any, the domains are served alike."""
        written = self.keys.init_mixture_proportions
        if self.keys.warmup_step == 0:
            if written is not None:
                self.notes.append("init_mixture_proportions: no effect, as there is no warm-up (warmup_step 0)")
            return None
        return written or (1.0,) * max(1, len(self._data_sets()))

    def _fixed_mixture(self) -> MethodConfig | None:
        """Return the mixer of a run whose proportions never change, or None when the component sets them."""
        keys = self.keys
        written, data_sets = keys.init_mixture_proportions, self._data_sets()
        if written is not None and keys.mixture_sample_rule == "mixture":
            if data_sets and len(written) != len(data_sets):
                self.problems.append(
                    f"init_mixture_proportions: {len(written)} numbers for {len(data_sets)} data sets "
                    f"({', '.join(data_sets)})"
                )
            if sum(written) <= 0:
                self.problems.append("init_mixture_proportions: all are 0; at least one must be above 0")
        if keys.mixture_sample_rule != "mixture":
            if written is not None:
                self.notes.append(f"init_mixture_proportions: no effect with the rule {keys.mixture_sample_rule}")
            return _plain("size" if keys.mixture_sample_rule == "stratified" else "uniform")
        if not keys.static_mix:
            return None
        if self.problems or written is None:
            return _plain("uniform")
        return _plain("static", proportions=written)

    def _weigh(self) -> dict[str, Any]:
        keys = self.keys
        total = None
        if keys.train_step > 0:
            total = self._fix_steps(keys.train_step, f"train_step asks for {keys.train_step} steps")
        return {**_method(self._component(self._evaluated()), "weighter"), "total_steps": total}


def _plain(name: str, **given: Any) -> MethodConfig:
    return MethodConfig(kind="mixer", name=name, params=find("mixer", name).Params(**given))


def _method(component: Component | None, kind: str) -> dict[str, Any]:
    return {} if component is None else {kind: component.method, "seed": component.seed}
