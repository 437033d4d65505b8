"""The components file of existing DataFlex: ``selectors | mixers | weighters: NAME: {name, params}``.

A component becomes one of our methods. ``_RULES`` says what becomes of its parameters; those that it does not name are
parameters of our method, or told as unknown. Files of scores that were computed beforehand are not read, since the same
is computed here from the targets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dataflex.config.build import half_read, method_class
from dataflex.config.load import load_mapping
from dataflex.config.mappings import collect, shown
from dataflex.config.schema import MethodConfig
from dataflex.errors import ConfigError, did_you_mean

SHIPPED = Path(__file__).with_name("components.yaml")
"""What existing DataFlex ships in the file that its examples name, for the components that we offer."""
_SHIPPED_THERE = "configs/components.yaml"


@dataclass(kw_only=True)
class ComponentReader:
    """Reads components of one run; notes what is dropped, or means something else here.

    Attributes:
        kind: "selector", "mixer" or "weighter".
        file: The components file as written; looked up from the working directory, then from ``base_dir``.
        base_dir: Folder of the configuration file.
        problems: Takes one line per problem.
        notes: Takes one line per parameter that is dropped or means something else here.
        targets: Data sets for a method that needs targets; for selectors and weighters they are one target.
        num_domains: Number of data sets.
        burn_in_steps: Steps of plain loss before a weighter acts.
        updates: Decisions of a selector after each warm-up (``update_times``).
        model: ``model_name_or_path``.
        seed: The seed that the component carried; None until one was read.
        place: Path of the component, for messages.
    """

    kind: str
    file: str
    base_dir: Path
    problems: list[str]
    notes: list[str]
    targets: tuple[str, ...] = ()
    num_domains: int = 1
    burn_in_steps: int = 0
    updates: int = 1
    model: str | None = None
    seed: int | None = None
    place: str = ""

    def read(self, name: str | None) -> MethodConfig | None:
        """Return our method for the component ``name`` of the file, or None after noting why not."""
        kind, before = self.kind, len(self.problems)
        if name is None:
            self.problems.append(f"component_name: missing; name a {kind} of the components file")
            return None
        try:
            section = self._content().get(f"{kind}s") or {}
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
        method = self._method(*self.translated(str(entry.get("name") or name), params))
        return method if len(self.problems) == before else None

    def _content(self) -> dict[str, Any]:
        for path in (Path(self.file), self.base_dir / self.file):
            if path.is_file():
                return load_mapping(path)
        if Path(self.file).as_posix().endswith(_SHIPPED_THERE):
            self.notes.append(
                f"components_cfg_file: {self.file} is not there; the presets that existing DataFlex ships are used"
            )
            return load_mapping(SHIPPED)
        where = f"neither in the working directory ({Path.cwd()}) nor beside the configuration"
        raise ConfigError(f"{self.file} is {where}")

    def translated(self, name: str, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return our method's name and its parameters in our spelling; a null parameter means one that is not given."""
        rules = _RULES.get((self.kind, name), _Rules())
        params = {**rules.defaults, **{key: value for key, value in given.items() if value is not None}}
        for key, why in {**_WITHOUT_EFFECT, **rules.dropped}.items():
            if params.pop(key, None) is not None:
                self.note(why, key)
        for key, (only, why) in rules.fixed.items():
            value = params.pop(key, only)
            if value != only:
                self.refuse(f"{shown(value)} {why}", key)
        for key, why in rules.refused.items():
            if params.pop(key, None) is not None:
                self.refuse(why, key)
        if self.kind == "selector" and (seed := params.pop("seed", None)) is not None:
            self.seed = self._seed(seed)
            self.note("becomes the seed of all decisions", "seed")
        if self.kind != "mixer" and len(self.targets) > 1 and not (name == "icons" and given.get("task_boundaries")):
            self.targets = (" + ".join(self.targets),)
            self.note(f"the data sets of eval_dataset are one target, as there: {self.targets[0]!r}")
        if rules.special is not None:
            name = rules.special(self, params, given) or name
        for key, choices in rules.choices.items():
            if key in params:
                value = params[key]
                params[key] = choices.get(str(value).lower())
                if params[key] is None:
                    self.refuse(f"{shown(value)} is not a choice (choices: {', '.join(choices)})", key)
        params = {rules.renamed.get(key, key): value for key, value in params.items()}
        # The loss weighter's own default is a burn-in of many steps.
        if self.kind == "weighter" and (self.burn_in_steps > 0 or name == "loss"):
            params = {"burn_in_steps": self.burn_in_steps, **params}
        if rules.note:
            self.note(rules.note)
        return name, params

    def note(self, text: str, key: str = "") -> None:
        """Note what is dropped or means something else here, of the component or one of its parameters."""
        self.notes.append(f"{self.place}{key and f'.params.{key}'}: {text}")

    def refuse(self, text: str, key: str) -> None:
        """Note a parameter that cannot be followed."""
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
        params = collect(cls.Params, given, f"{place}.params", self.problems, subject=f"{name} {kind}")
        method = None if params is None else MethodConfig(kind=kind, name=name, params=params)
        needs = half_read(cls, given) if method is None else method.requires
        if needs is not None and needs.targets and not self.targets:
            key = "mixer_eval_dataset" if kind == "mixer" else "eval_dataset"
            self.problems.append(
                f"{place}: {cls.name} needs a target; flat keys take it from {key}: name a data set there"
            )
        if method is None or needs is None:
            return None
        return replace(method, targets=self.targets if needs.targets else ())


# -- what is more than another name ---------------------------------------------------------------


def _drawn(reader: ComponentReader, params: dict[str, Any], given: Mapping[str, Any]) -> str:
    """Existing DataFlex's random mixer draws shares once from its seed, which then stay."""
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
    """Refuse a file of rows or probabilities that is there: it would be left aside for others computed here."""
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
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return int({**config, **(config.get("text_config") or {})}["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _nice(reader: ComponentReader, params: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Translate the judge behind a server; a reward model in the process is refused with what to do instead."""
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


# -- the tables -----------------------------------------------------------------------------------

_ODM_FLOOR = 0.03
_NO_END = 10**9  # updates that never end: the window stays where it starts


@dataclass(frozen=True, kw_only=True)
class _Rules:
    """What becomes of a component's parameters.

    Attributes:
        defaults: Values of parameters that the component may leave out, where our default is another.
        dropped: Parameters that are left out, and what is noted.
        fixed: Parameters that have one value here, and why another is refused.
        refused: Parameters that are refused, and why.
        special: What is done beside; gives our name of the method where it is another one. It gets the reader, the
            parameters to change, and those of the file.
        choices: Parameters whose values have other names here.
        renamed: Parameters that have other names here.
        note: What the method does otherwise.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    special: Callable[[ComponentReader, dict[str, Any], Mapping[str, Any]], str | None] | None = None
    choices: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


def _idle(*keys: str, why: str = "") -> dict[str, str]:
    return dict.fromkeys(keys, f"no effect here; {why}" if why else "no effect here")


_WITHOUT_EFFECT = _idle("cache_dir", "save_interval", "score_batch_size", "score_num_workers")
_EXACT = {
    "proj_dim": "gradients are compared as they are here, without a projection; 'sketch_size' brings a sparse one"
}
_DIRECTION = {"gradient_type": {"adam": "true_adam", "sgd": "none"}}
_PICK = {
    "random": ("random", "rand"),
    "nearest": ("nearest", "nearest_to_centroid", "center", "centroid"),
    "farthest": ("farthest", "farthest_from_centroid", "boundary"),
    "mixed": ("mixed", "mixed_center_boundary", "center_boundary"),
}
_CLUSTERING = _idle("clustering_batch_size", "assignment_chunk_size", "embedding_model_dtype")
_RULES: dict[tuple[str, str], _Rules] = {
    ("selector", "less"): _Rules(dropped=_EXACT, choices=_DIRECTION, renamed={"gradient_type": "precondition"}),
    ("selector", "icons"): _Rules(
        defaults={"gradient_type": "adam", "target_gradient": "mean_of_cosines"},
        dropped=_EXACT,
        special=_icons,
        choices=_DIRECTION,
        renamed={"gradient_type": "precondition"},
    ),
    ("selector", "delta_loss"): _Rules(special=_delta_loss),
    ("selector", "near"): _Rules(special=_precomputed),
    ("selector", "tsds"): _Rules(special=_precomputed),
    ("selector", "cluster_less"): _Rules(
        defaults={"representative_strategy": "random"},
        dropped={**_CLUSTERING, **_idle("clustering_max_iter", "lsh_num_bits")},
        fixed={
            "clustering_method": (
                "kmeans",
                "is not offered: rows near one another in random projections are not clusters of like gradients as "
                "often; write kmeans",
            )
        },
        refused={"embedding_model_name_or_path": "rows are clustered by the model under training here; remove it"},
        choices={
            **_DIRECTION,
            "representative_strategy": {alias: name for name, aliases in _PICK.items() for alias in aliases},
        },
        renamed={
            "gradient_type": "precondition",
            "num_clusters": "clusters",
            "samples_per_cluster": "representatives",
            "representative_strategy": "pick",
            "proj_dim": "sketch_size",
            "embedding_layer": "layer",
        },
    ),
    ("selector", "coincide"): _Rules(
        defaults={"num_clusters": 10_000, "temperature": 1.0, "clustering_max_iter": 10},
        dropped={**_CLUSTERING, **_idle("clustering_num_workers", "clustering_device", "density_chunk_size")},
        fixed={"single_member_density": (1.0, "is not supported; it is 1 here")},
        special=_coincide,
        renamed={
            "num_clusters": "clusters",
            "clustering_max_iter": "iterations",
            "embedding_layers": "layers",
            "embedding_model_name_or_path": "encoder",
        },
        note="features are the residual stream's, of text alone; rows are clustered in every decision",
    ),
    ("selector", "nice"): _Rules(
        defaults={"mc_samples": 4, "max_new_tokens": 512, "generation_temperature": 0.7},
        dropped={
            **_EXACT,
            "policy_model_path": "is not read; answers are sampled from the model under training",
            "max_prompt_length": "prompts are those of the target as cutoff_len leaves them",
            "prompt_template": "is not read; prompts are those of the target as 'template' writes them",
        },
        refused=dict.fromkeys(
            ("reward_prompt_with_ref", "reward_prompt_without_ref"),
            "is not read; write what the judge is asked as 'judge.instruction'",
        ),
        special=_nice,
        choices=_DIRECTION,
        renamed={"gradient_type": "precondition", "mc_samples": "samples", "generation_temperature": "temperature"},
    ),
    ("mixer", "random"): _Rules(special=_drawn),
    ("mixer", "static"): _Rules(special=_static),
    ("mixer", "doremi"): _Rules(
        defaults={"reweight_eta": 1.0, "reweight_eps": 1e-3},
        dropped=_idle("num_eval_samples", "eval_batch_size", why="the losses of training are used"),
        special=_doremi,
        renamed={"reference_model_path": "reference", "reweight_eta": "eta", "reweight_eps": "smoothing"},
    ),
    ("mixer", "odm"): _Rules(
        dropped={
            **_idle("warmup_steps", why="warmup_step is the only warm-up"),
            **_idle("reward_scale", why="losses are not scaled"),
            **_idle("initial_proportions", why="warm-up serves init_mixture_proportions"),
        },
        special=_odm,
        renamed={"alpha": "smoothing", "min_exploration_rate": "floor"},
        note="every domain's mean loss counts in every step, as it is (variant: full_information); there the last "
        "micro-batch's loss, times reward_scale, counts for one domain",
    ),
    ("mixer", "dynamic_moe"): _Rules(
        dropped=_idle(
            "collect_steps",
            "eval_samples",
            "eval_batch_size",
            why="all of the held-out data of mixer_eval_dataset is looked at",
        ),
        renamed={"c": "smoothing"},
    ),
    ("weighter", "loss"): _Rules(special=_loss),
    ("weighter", "adapt"): _Rules(
        dropped={**_idle("anchor_batch_size"), **_idle("eps", why="tau must be above 0")},
        renamed={"refresh_interval": "refresh_steps"},
        note="the loss is the weighted sum of the tokens' losses divided by their number, not a sum over the batch, so "
        "the learning rate may have to be raised; vectors come out of the training forward",
    ),
    ("weighter", "joint_update_aware"): _Rules(
        dropped={
            **_idle("fixed_point_iters", "damping", why="the iteration runs until the fixed point holds"),
            **_idle("target_batch_size", "target_num_batches", why="every row of the target is embedded"),
        },
        special=_joint_update_aware,
        renamed={
            "target_update_step": "refresh_steps",
            "embed_normalize": "normalize",
            "embed_layer": "layer",
            "objective_mode": "mode",
        },
        note="vectors come out of the training forward; the weights are those of the exact fixed point",
    ),
}
