"""The components file of existing DataFlex: ``selectors | mixers | weighters: NAME: {name, params}``.

A component becomes one of our methods. ``components.yaml`` and ``_SPECIAL`` translate its parameters; all others must
be parameters of our method. Files of scores that were computed beforehand
are not read, since the same is computed here from the targets.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from dataflex.config.build import load_plugins, method_block, method_class, takes_targets
from dataflex.config.load import load_mapping
from dataflex.config.mappings import shown
from dataflex.config.schema import MethodConfig
from dataflex.errors import ConfigError, did_you_mean
from dataflex.ported import TABLE
from dataflex.registry import names
from dataflex.signals.other_models import sizes_of

_SHIPPED_THERE = "configs/components.yaml"
_WITHOUT_EFFECT: dict[str, str | None] = dict.fromkeys(
    ("cache_dir", "save_interval", "score_batch_size", "score_num_workers")
)
_ODM_FLOOR = 0.03
_OWN = "custom"  # what components of the user's own are called there
_NO_END = 10**9  # updates that never end: the window stays where it starts


@lru_cache(maxsize=1)
def tables() -> dict[str, Any]:
    """Return ``components.yaml``: the presets of existing DataFlex, and how parameters are translated."""
    import yaml

    content: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("components.yaml").read_text(encoding="utf-8"))
    return content


@dataclass(kw_only=True)
class ComponentReader:
    """Reads the component of a run and notes parameters that are dropped or differ in meaning."""

    kind: str  # "selector", "mixer" or "weighter"; "pipeline" or "reorder" for ``entry`` alone
    file: str  # as written; looked up from the working directory, then from base_dir
    base_dir: Path  # folder of the configuration file
    problems: list[str]
    notes: list[str]
    targets: tuple[str, ...] = ()  # data sets; for selectors and weighters they are one target
    num_domains: int = 1  # number of data sets
    warmup_steps: int = 0  # steps of plain loss before a weighter acts
    updates: int = 1  # decisions of a selector after each warm-up (update_times)
    model: str | None = None  # model_name_or_path
    seed: int | None = None  # the seed that the component carried, once it was read
    place: str = ""  # path of the component, for messages
    own: bool = False  # whether the component read last is a class in the user's own file
    block: dict[str, Any] = field(default_factory=dict)  # what such classes need of the block

    def read(self, name: str | None) -> MethodConfig | None:
        """Return our method for the component ``name`` of the file, or None after noting why not."""
        before, entry = len(self.problems), self.entry(name)
        if entry is None:
            return None
        method = self.ported(*entry) if self.own else self._method(*self.translated(*entry))
        return method if len(self.problems) == before else None

    def entry(self, name: str | None) -> tuple[str, Mapping[str, Any]] | None:
        """Return what the file says of the component ``name``: its class and parameters; None after noting why not."""
        kind = self.kind
        if name is None:
            self.problems.append(f"component_name: missing; name a {kind} of the components file")
            return None
        try:
            content = self._content()
            section = content.get(f"{kind}s") or content.get(f"{kind}ers") or {}  # reorders were reorderers
        except ConfigError as error:
            self.problems += [f"components_cfg_file: {problem}" for problem in error.problems]
            return None
        self.place = f"components_cfg_file: {kind}s.{name}"
        if not isinstance(section, Mapping) or name not in section:
            known = [str(key) for key in section] if isinstance(section, Mapping) else []
            self.problems.append(
                f"component_name: {name!r} is not among the {kind}s of {self.file}{did_you_mean(name, known)} "
                f"(known: {', '.join(known) or 'none'})"
            )
            return None
        entry = section[name]
        params = entry.get("params") or {} if isinstance(entry, Mapping) else None
        if not isinstance(params, Mapping):
            self.problems.append(f"{self.place}: expected a mapping with 'name' and 'params', found {shown(entry)}")
            return None
        found = str(entry.get("name") or name)
        self.own = "file" in entry
        if self.own:
            found = str(params.get("kind", found) if kind == "reorder" else found)
            before = len(self.problems)
            self._load(entry["file"], found)
            return (found, params) if len(self.problems) == before else None
        if found == _OWN and found not in names(kind):
            self.problems.append(
                f"{self.place}: {_OWN!r} is code that was written into existing DataFlex itself, which no key names; "
                f"copy the class to a file of its own and name that beside 'name': 'file: my_{kind}.py'. If it uses "
                f"more than is given here, port it ({TABLE})"
            )
            return None
        return found, params

    def _load(self, file: Any, name: str) -> None:
        """Load a file of the user's own classes."""
        told: list[str] = []
        self.block["plugins"] = (*self.block.get("plugins", ()), *load_plugins((str(file),), self.base_dir, told))
        self.problems += [line.replace("dynamic.plugins", f"{self.place}.file", 1) for line in told]
        kind = "selector" if self.kind == "reorder" else self.kind
        if kind == "selector":
            self.block["repeat"] = True  # rows that it gives may be fewer than asked for
        if not told and name not in names(kind):
            near = did_you_mean(name, names(kind))
            self.problems.append(f"{self.place}: {file} registers no {self.kind} {name!r}{near}")

    def ported(self, name: str, given: Mapping[str, Any]) -> MethodConfig | None:
        """Return the method that a class in the user's own file became."""
        kind, params = "selector" if self.kind == "reorder" else self.kind, dict(given)
        if self.kind == "reorder":
            params.pop("kind", None)
        if kind == "weighter" and self.warmup_steps > 0:
            params["warmup_steps"] = self.warmup_steps
        self.note(
            "draws and states are the run's: random numbers begin anew at every call, by the seed and the interval; "
            "attributes that are numbers, texts, lists, mappings or arrays are in checkpoints"
        )
        return method_block(kind, {"name": name, **params}, f"{self.place}.params", self.problems)

    def _content(self) -> dict[str, Any]:
        for path in (Path(self.file), self.base_dir / self.file):
            if path.is_file():
                return load_mapping(path)
        if Path(self.file).as_posix().endswith(_SHIPPED_THERE):
            self.notes.append(
                f"components_cfg_file: {self.file} is not there; the presets that existing DataFlex ships are used"
            )
            return dict(tables()["presets"])
        raise ConfigError(
            f"{self.file} is neither in the working directory ({Path.cwd()}) nor beside the configuration"
        )

    def translated(self, name: str, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the name and the parameters of our method; a null parameter counts as not given."""
        rules = defaultdict(dict, tables()["rules"][self.kind].get(name, {}))
        params = {**rules["defaults"], **{key: value for key, value in given.items() if value is not None}}
        for key, why in {**_WITHOUT_EFFECT, **rules["dropped"]}.items():
            if params.pop(key, None) is not None:
                self.note(why or "no effect here", key)
        for key, (only, why) in rules["fixed"].items():
            value = params.pop(key, only)
            if value != only:
                self.refuse(f"{shown(value)} {why}", key)
        for key, why in rules["refused"].items():
            if params.pop(key, None) is not None:
                self.refuse(why, key)
        if self.kind == "selector" and (seed := params.pop("seed", None)) is not None:
            self.seed = self._seed(seed)
            self.note("becomes the seed of all decisions", "seed")
        if self.kind != "mixer" and len(self.targets) > 1 and not (name == "icons" and given.get("task_boundaries")):
            self.targets = (" + ".join(self.targets),)
            self.note(f"the data sets of eval_dataset are one target, as there: {self.targets[0]!r}")
        special = _SPECIAL.get((self.kind, name))
        if special is not None:
            name = special(self, params, given) or name
        for key, choices in rules["choices"].items():
            if key in params:
                value = params[key]
                params[key] = choices.get(str(value).lower())
                if params[key] is None:
                    self.refuse(f"{shown(value)} is not a choice (choices: {', '.join(choices)})", key)
        renamed = rules["renamed"]
        params = {renamed.get(key, key): value for key, value in params.items()}
        # The loss weighter's own default is a warm-up of many steps.
        if self.kind == "weighter" and (self.warmup_steps > 0 or name == "loss"):
            params = {"warmup_steps": self.warmup_steps, **params}
        if "note" in rules:
            self.note(rules["note"])
        return name, params

    def note(self, text: str, key: str = "") -> None:
        """Note a difference of the component, or of one of its parameters."""
        self.notes.append(f"{self.place}{key and f'.params.{key}'}: {text}")

    def refuse(self, text: str, key: str) -> None:
        """Report a parameter that cannot be translated."""
        self.problems.append(f"{self.place}.params.{key}: {text}")

    def _seed(self, seed: Any, most: float = float("inf")) -> int:
        if isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < most:
            return seed
        range_ = "of at least 0" if most == float("inf") else "from 0 to 2**32 - 1"
        self.refuse(f"expected a whole number {range_}, found {shown(seed)}", "seed")
        return 0

    def _method(self, name: str, given: dict[str, Any]) -> MethodConfig | None:
        kind, place = self.kind, self.place
        cls = method_class(kind, name, place, self.problems)
        if cls is None:
            return None
        block = {"name": name, **given}
        if takes_targets(cls, given):
            block["targets"] = self.targets or ("none",)
            if not self.targets:
                key = "mixer_eval_dataset" if kind == "mixer" else "eval_dataset"
                told = f"{cls.name} needs a target; flat keys take it from {key}: name a data set there"
                self.problems.append(f"{place}: {told}")
        return method_block(kind, block, f"{place}.params", self.problems)


# -- what is more than another name ---------------------------------------------------------------


def _drawn(reader: ComponentReader, params: dict[str, Any], given: Mapping[str, Any]) -> str:
    """Draw the proportions as existing DataFlex's random mixer does: once, from its seed."""
    import numpy as np

    raw = np.random.RandomState(reader._seed(params.pop("seed", None), 2**32)).random_sample(max(1, reader.num_domains))
    params["proportions"] = [float(share) for share in raw / raw.sum()]
    reader.note("proportions drawn once from its seed, as there; this is a static mixer")
    return "static"


def _static(reader: ComponentReader, params: dict[str, Any], given: Mapping[str, Any]) -> str:
    return "static" if "proportions" in params else "uniform"


def _doremi(reader: ComponentReader, params: dict[str, Any], given: Mapping[str, Any]) -> str:
    key = "reference_model_path"
    if key in given and given[key] is None:
        reader.note(
            "is null; without a reference model this is not DoReMi but the hardest domains first, which is the mixer "
            "group_dro; no averaged weights are written",
            key,
        )
        return "group_dro"
    if not {key, "reference"} & params.keys():
        reader.refuse(
            "missing; train a reference model (its step 1), use 'dataflex mix doremi', or write null: the hardest "
            "domains first, which is not DoReMi",
            key,
        )
        params[key] = "none"
    reader.note(
        "the weights act in the loss, from the next step on, and are updated in every step; a domain without "
        "rows in a step keeps its score; domains are sampled alike; the averaged weights are written to "
        "OUTPUT_DIR/dataflex/doremi.json"
    )
    return "doremi"


def _odm(reader: ComponentReader, params: dict[str, Any], given: Mapping[str, Any]) -> None:
    if reader.num_domains * _ODM_FLOOR < 1:
        params.setdefault("min_exploration_rate", _ODM_FLOOR)
    if "warmup_steps" not in given:
        reader.note("warmup_step is the only warm-up; there the component has 2,000 more steps of it")


def _loss(reader: ComponentReader, params: dict[str, Any], given: Mapping[str, Any]) -> None:
    if params.get("strategy") == "uniform":
        reader.note("what 'uniform' computes there is called softmax_loss here", "strategy")
        params["strategy"] = "softmax_loss"


def _joint_update_aware(reader: ComponentReader, params: dict[str, Any], given: Mapping[str, Any]) -> None:
    ways: dict[str, dict[str, Any]] = {
        "last_token": {"pooling": "last"},
        "mean_pool": {"pooling": "mean", "completion_only": True},
    }
    params |= ways.get(str(params.get("pooling")), {})


def _delta_loss(reader: ComponentReader, params: dict[str, Any], given: Mapping[str, Any]) -> None:
    if reader.updates < 1:
        reader.note("without update_times the window stays where it starts, as there")
    params.setdefault("updates", max(1, reader.updates - 1) if reader.updates >= 1 else _NO_END)


def _precomputed(reader: ComponentReader, params: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse a file of precomputed rows or probabilities, if it exists: it would be ignored."""
    for key in ("indices_path", "probs_path"):
        file = params.pop(key, None)
        if file is None:
            continue
        told = "the same kind of rows is found here from the targets, 'encoder' names the model that reads them"
        if Path(str(file)).expanduser().exists():
            reader.refuse(
                f"{file} is not read; {told}. Remove the key for that, or train on a data set of the rows that the "
                "file names",
                key,
            )
        else:
            reader.note(f"{file} is not there and would not be read; {told}", key)


def _icons(reader: ComponentReader, params: dict[str, Any], given: Mapping[str, Any]) -> None:
    tasks, boundaries = len(reader.targets), params.pop("task_boundaries", None)
    if tasks > 1 and "vote_percent" not in params:
        reader.note("a task votes for 20 % of the pool (vote_percent); there for as many rows as are kept")
    sizes = len(boundaries) if isinstance(boundaries, list | tuple) else 1
    if boundaries and sizes == tasks:
        reader.note("is not read; each data set of eval_dataset is a task, whatever its size", "task_boundaries")
    elif boundaries:
        reader.refuse(
            f"names {sizes} tasks, eval_dataset {tasks} data sets; here every task is a data set of its own: list one "
            "per task in eval_dataset",
            "task_boundaries",
        )


def _coincide(reader: ComponentReader, params: dict[str, Any], given: Mapping[str, Any]) -> None:
    if params.get("embedding_layers"):
        return
    model = params.get("embedding_model_name_or_path") or reader.model
    depth = _depth(Path(str(model))) if model else None
    if depth is None:
        reader.refuse(
            f"null stands for five layers from the first to the last, but {model} is no folder whose config.json "
            "tells its depth; list the layers",
            "embedding_layers",
        )
    else:
        params["embedding_layers"] = five_layers(depth)


def five_layers(depth: int) -> list[int]:
    """Return five hidden states, evenly spaced from the first layer's to the last one's; all of a shallower model."""
    count = min(5, depth)
    places = [1 + (depth - 1) * i / max(1, count - 1) for i in range(count)]
    return sorted({round(place) for place in places})


def _depth(folder: Path) -> int | None:
    try:
        return int(sizes_of(folder)["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _nice(reader: ComponentReader, params: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Translate a judge behind a server; refuse a reward model in the process, and say what to use instead."""
    backend, settings = params.pop("reward_model_backend", None), params.pop("reward_backend_params", {})
    model = params.pop("reward_model_path", None)
    if backend not in (None, "api", "local_vllm"):
        reader.refuse(f"{shown(backend)} is not a choice (choices: api, local_vllm)", "reward_model_backend")
    if "reward" in params:
        return
    for key, asked in (("reward_model_backend", backend == "local_vllm"), ("reward_model_path", model is not None)):
        if asked:
            reader.refuse(
                "a model is not loaded beside the run here; ask it through an OpenAI-compatible server "
                "(reward_model_backend: api), or give a 'reward' as docs/rewards.md describes them",
                key,
            )
    if backend != "api":
        return
    api = settings.get("api") if isinstance(settings, Mapping) else None
    if not isinstance(api, Mapping) or not api.get("api_url") or not api.get("model_name"):
        told = f"expected a mapping with api_url and model_name, found {shown(api)}"
        reader.refuse(told, "reward_backend_params.api")
        return
    if api.get("temperature"):
        reader.note("the judge is asked at temperature 0", "reward_backend_params.api.temperature")
    judge = {"url": str(api["api_url"]).rstrip("/").removesuffix("/chat/completions"), "model": api["model_name"]}
    if api.get("api_key") is not None:
        judge["api_key_env"] = api["api_key"]
    params.update(reward="judge", judge={**judge, "best": 1.0})


_Special = Callable[[ComponentReader, dict[str, Any], Mapping[str, Any]], str | None]
_SPECIAL: dict[tuple[str, str], _Special] = {
    ("selector", "coincide"): _coincide,
    ("selector", "delta_loss"): _delta_loss,
    ("selector", "icons"): _icons,
    ("selector", "near"): _precomputed,
    ("selector", "nice"): _nice,
    ("selector", "tsds"): _precomputed,
    ("mixer", "doremi"): _doremi,
    ("mixer", "odm"): _odm,
    ("mixer", "random"): _drawn,
    ("mixer", "static"): _static,
    ("weighter", "joint_update_aware"): _joint_update_aware,
    ("weighter", "loss"): _loss,
}
"""What a table cannot say: functions of the reader, the parameters that are not null, and those of the file.

They change the parameters, and return the name of our method where it differs.
"""
