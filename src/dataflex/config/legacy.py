"""Flat keys of configurations written for existing DataFlex, translated to the same ``DynamicConfig``.

Three training types came with it, each with one component from a components file (``components``). The number of steps
becomes LLaMA-Factory's ``max_steps`` wherever the flat keys fix it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataflex.config.build import target_list
from dataflex.config.components import ComponentReader
from dataflex.config.mappings import collect, shown
from dataflex.config.pipelines import orderer, pipeline
from dataflex.config.rules import rule_problems
from dataflex.config.schema import FLAT_KEYS, DynamicConfig, FlatKeys, MethodConfig
from dataflex.errors import ConfigError, did_you_mean
from dataflex.registry import find

_DEFAULT_EPOCHS = 3.0  # of the Hugging Face Trainer
_KIND_OF = {"dynamic_select": "selector", "dynamic_mix": "mixer", "dynamic_weight": "weighter"}
_TRAIN_TYPES = ("static", *_KIND_OF, "dynamic_reorder", "dynamic_lego")


def translate(
    mapping: Mapping[str, Any], base_dir: Path
) -> tuple[dict[str, Any], DynamicConfig | None, float, list[str]]:
    """Return LLaMA-Factory's keys, the configuration that the flat keys describe, the early-stopping delta, and notes.

    Args:
        mapping: A whole configuration without a ``dynamic`` block.
        base_dir: Folder of the configuration file.

    Raises:
        ConfigError: All problems of the flat keys and of the component's parameters.
    """
    lf = {key: value for key, value in mapping.items() if key not in FLAT_KEYS}
    flat = {key: value for key, value in mapping.items() if key in FLAT_KEYS}
    former = {"dynamic_weighting": "dynamic_weight", "static_full": "static"}
    if isinstance(flat.get("train_type"), str):
        flat["train_type"] = former.get(flat["train_type"], flat["train_type"])
    problems: list[str] = []
    kind = flat.get("train_type", "static")
    if isinstance(kind, str) and kind not in _TRAIN_TYPES:
        near = did_you_mean(kind, _TRAIN_TYPES)
        problems.append(f"train_type: {kind!r} is not available{near} (known: {', '.join(_TRAIN_TYPES)})")
    keys = collect(FlatKeys, flat, "", problems)
    if keys is None or problems:
        raise ConfigError(problems)
    if keys.train_type == "static":
        idle = ", ".join(key for key in flat if key not in ("train_type", "early_stopping_min_delta"))
        told = f"{idle}: no effect with train_type static; the run is LLaMA-Factory's own"
        return lf, None, keys.early_stopping_min_delta, [told] if idle else []
    translation = _Translation(keys, lf, base_dir)
    dynamic = translation.result()
    return translation.lf, dynamic, keys.early_stopping_min_delta, translation.notes


class _Translation:
    """Translation of one configuration; writes ``max_steps`` into ``lf`` and notes keys without effect."""

    def __init__(self, keys: FlatKeys, lf: dict[str, Any], base_dir: Path) -> None:
        self.keys, self.lf, self.base_dir = keys, lf, base_dir
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.data_sets = self._names("dataset", [])

    def result(self) -> DynamicConfig:
        keys = self.keys
        ways = {
            "dynamic_select": self._select,
            "dynamic_mix": self._mix,
            "dynamic_weight": self._weigh,
            "dynamic_reorder": self._reorder,
            "dynamic_lego": self._pipeline,
        }
        given = ways[keys.train_type]()
        if keys.freeze_gate and keys.train_type != "dynamic_mix":
            self.notes.append(f"freeze_gate: no effect with train_type {keys.train_type}")
        if not self.problems:
            dynamic = DynamicConfig(flat=True, early_stopping_min_delta=keys.early_stopping_min_delta, **given)
            self.problems += rule_problems(dynamic)
        if self.problems:
            raise ConfigError(self.problems)
        return dynamic

    def _names(self, key: str, problems: list[str]) -> tuple[str, ...]:
        value = self.lf.get(key)
        return () if value is None else target_list(value, key, problems)

    def _component(self, targets: tuple[str, ...]) -> dict[str, Any]:
        """Return the method of the run and the component's seed, as keyword arguments."""
        kind = _KIND_OF[self.keys.train_type]
        reader = self._reader(kind, targets)
        method = reader.read(self.keys.component_name)
        return {} if method is None else {kind: method, "seed": reader.seed, **reader.block}

    def _reader(self, kind: str, targets: tuple[str, ...]) -> ComponentReader:
        keys = self.keys
        return ComponentReader(
            kind=kind,
            file=keys.components_cfg_file,
            base_dir=self.base_dir,
            problems=self.problems,
            notes=self.notes,
            targets=targets,
            num_domains=len(self.data_sets),
            warmup_steps=keys.warmup_step,
            updates=keys.update_times,
            model=str(self.lf["model_name_or_path"]) if self.lf.get("model_name_or_path") else None,
        )

    def _interval(self) -> int:
        """Return the steps between two decisions, at least 1."""
        if self.keys.update_step < 1:
            self.problems.append(
                f"update_step: must be at least 1 with train_type {self.keys.train_type}, found "
                f"{self.keys.update_step} (optimizer steps between two decisions)"
            )
        return max(1, self.keys.update_step)

    def _fix_steps(self, total: int | None, reason: str) -> int | None:
        """Set the run's length: ``train_step``, else ``total``; None leaves it to the epochs, as there."""
        if self.keys.train_step > 0:
            total, reason = self.keys.train_step, f"train_step asks for {self.keys.train_step} steps"
        given = self.lf.pop("max_steps", None)
        if given not in (None, total, -1):
            self.notes.append(f"max_steps: {shown(given)} is not looked at; {reason}")
        if total is not None:
            self.lf["max_steps"] = total
        return total

    def _epochs(self) -> float:
        value = self.lf.get("num_train_epochs")
        if value is None:
            return _DEFAULT_EPOCHS
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.problems.append(f"num_train_epochs: expected a number above 0, found {shown(value)}")
            return _DEFAULT_EPOCHS
        return float(value)

    def _select(self) -> dict[str, Any]:
        """Run stages of ``warmup_step`` uniform steps and ``update_times`` selections for ``update_step`` steps each.

        They are repeated over and over; ``num_train_epochs`` counts them.
        """
        component = self._component(self._names("eval_dataset", self.problems))
        return {**component, **self._selecting_steps()}

    def _selecting_steps(self) -> dict[str, Any]:
        keys, interval = self.keys, self._interval()
        cycle, steps = None, None
        told = "with update_times <= 0 the run lasts for num_train_epochs"
        if keys.update_times > 0:
            cycle = keys.warmup_step + interval * keys.update_times
            epochs = self._epochs() if keys.train_step <= 0 else 1.0
            steps = math.ceil(epochs * cycle)
            told = f"num_train_epochs x (warmup_step + update_step x update_times) = {epochs:g} x {cycle} = {steps}"
            if epochs != 1:
                self.notes.append(f"steps: {told}; here an epoch is one such stage, not a pass over the data")
        return {
            "warmup_steps": keys.warmup_step,
            "interval_steps": interval,
            "cycle_steps": cycle,
            "total_steps": self._fix_steps(steps, told),
        }

    def _mix(self) -> dict[str, Any]:
        """Serve ``init_mixture_proportions`` for ``warmup_step`` steps, then what the component says.

        The rules ``stratified`` and ``uniform`` and ``static_mix`` leave the component without a say.
        """
        keys = self.keys
        fixed = self._fixed_mixture()
        interval = 1 if keys.static_mix else self._interval()
        steps, told = None, "the run lasts for num_train_epochs over the data sets"
        if not keys.static_mix and keys.update_times >= 0:
            steps = keys.warmup_step + interval * keys.update_times
            told = f"warmup_step + update_step x update_times = {steps} steps"
            if steps == 0 and keys.train_step <= 0:
                self.problems.append("update_times: 0 with warmup_step 0 asks for a run of no steps")
        result = {"freeze_gate": keys.freeze_gate, "total_steps": self._fix_steps(steps, told)}
        if fixed is not None:
            if keys.component_name is not None:
                self.notes.append(f"component_name: {keys.component_name!r} has no say, the mixture is fixed")
            return {**result, "mixer": fixed}
        targets, initial = keys.mixer_eval_dataset, keys.init_mixture_proportions
        component = self._component(target_list(targets, "mixer_eval_dataset", self.problems) if targets else ())
        if keys.warmup_step > 0:
            initial = initial or (1.0,) * max(1, len(self.data_sets))
        elif initial is not None:
            self.notes.append("init_mixture_proportions: no effect, as there is no warm-up (warmup_step 0)")
            initial = None
        return {
            **result,
            **component,
            "warmup_steps": keys.warmup_step,
            "interval_steps": interval,
            "initial_proportions": initial,
        }

    def _fixed_mixture(self) -> MethodConfig | None:
        """Return the mixer of a run whose proportions never change, or None when the component sets them."""
        rule, written, data_sets = self.keys.mixture_sample_rule, self.keys.init_mixture_proportions, self.data_sets
        if written is not None and rule == "mixture":
            if data_sets and len(written) != len(data_sets):
                self.problems.append(
                    f"init_mixture_proportions: {len(written)} numbers for {len(data_sets)} data sets "
                    f"({', '.join(data_sets)})"
                )
            if sum(written) <= 0:
                self.problems.append("init_mixture_proportions: all are 0; at least one must be above 0")
        if rule != "mixture" and written is not None:
            self.notes.append(f"init_mixture_proportions: no effect with the rule {rule}")
        if rule == "mixture" and not self.keys.static_mix:
            return None
        if rule == "mixture" and written is not None and not self.problems:
            return _mixer("static", proportions=written)
        return _mixer("size" if rule == "stratified" else "uniform")

    def _pipeline(self) -> dict[str, Any]:
        """Run the stages of a pipeline, each at its own pace, for as long as a selection would run."""
        given = self._selecting_steps()
        if given["cycle_steps"] is not None and given["cycle_steps"] != given["total_steps"]:
            self.notes.append("steps: the warm-up comes once, at the beginning; there it comes again in every stage")
        targets, mixer_targets = self._names("eval_dataset", self.problems), self.keys.mixer_eval_dataset
        if mixer_targets is not None:
            self.notes.append("mixer_eval_dataset: a pipeline's methods have the targets of eval_dataset")
        initial = self.keys.init_mixture_proportions
        reader = self._reader("pipeline", targets)
        found = pipeline(reader, self.keys.component_name, given["interval_steps"])
        decide = [found[kind] for kind in ("selector", "mixer", "orderer") if kind in found and found[kind].decides]
        if all(method.every is not None for method in decide):
            given["interval_steps"] = None
        if "mixer" not in found or found["mixer"].warmup_steps == 0:
            initial = None
        own = all(method.warmup_steps is not None for method in decide) and "weighter" not in found
        warmup = {"warmup_steps": 0} if own else {}
        given |= {**warmup, **reader.block, **found}
        return {**given, "cycle_steps": None, "initial_proportions": initial, "seed": reader.seed}

    def _reorder(self) -> dict[str, Any]:
        """Serve the whole pool in order: ranked beforehand, from the first step on; by the model, after the warm-up."""
        given, keys = self._selecting_steps(), self.keys
        reader = self._reader("reorder", ())
        method, every = orderer(reader, keys.component_name)
        if given["cycle_steps"] is not None and given["cycle_steps"] != given["total_steps"]:
            self.notes.append("steps: rows are served epoch by epoch, however many stages the run has")
        given |= {"cycle_steps": None, "seed": reader.seed, **reader.block}
        if method is not None and method.kind == "selector":
            return {**given, "selector": method, "warmup_steps": 0}
        if not every:
            self.notes.append("warmup_step, update_step: no effect where the order is known beforehand, as there")
            return {**given, "warmup_steps": 0, "interval_steps": None, "orderer": method}
        return {**given, "interval_steps": given["interval_steps"] * every, "orderer": method}

    def _weigh(self) -> dict[str, Any]:
        """Use the plain loss for ``warmup_step`` steps, then weights."""
        component = self._component(self._names("eval_dataset", self.problems))
        return {**component, "total_steps": self._fix_steps(None, "") if self.keys.train_step > 0 else None}


def _mixer(name: str, **given: Any) -> MethodConfig:
    return MethodConfig(kind="mixer", name=name, params=find("mixer", name).Params(**given))
