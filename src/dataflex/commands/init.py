"""``dataflex init``: a commented configuration for the user's own data, which ``dataflex plan`` accepts.

Questions are asked on a terminal only, and only for what no flag gives. Nothing that exists is replaced; a
``dataset_info.json`` that is there is added to.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any

from dataflex.commands.methods import default_of, example, meaning, requirements
from dataflex.commands.plan import plan
from dataflex.config.build import method_class
from dataflex.config.data import INFO_FILE, columns_of, contents_of
from dataflex.config.load import merged
from dataflex.config.mappings import as_yaml, key_of, plain
from dataflex.console import answers, ask
from dataflex.errors import ConfigError, did_you_mean
from dataflex.method import Method, Selector, Weighter
from dataflex.printable import Answer
from dataflex.registry import KINDS, names
from dataflex.state import owner, read_json, replacing

RECIPES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "baseline": ("LLaMA-Factory's own run, recorded: what the others are compared with", {"record": True}),
    "towards": (
        "rows that lower the loss of a target, chosen within a tenth of the training's passes (LESS)",
        {"selector": {"name": "less"}, "signals": {"budget": 0.1}},
    ),
    "words": ("rows that share words with a target, which costs no pass (BM25)", {"selector": {"name": "bm25"}}),
    "denoise": (
        "rows of medium loss: neither learnt already nor noise",
        {"selector": {"name": "loss", "focus": "medium"}},
    ),
    "mixture": (
        "more of the domains whose loss is high (ODM); two data sets, or --domains",
        {"mixer": {"name": "odm"}},
    ),
    "curriculum": ("short rows first", {"orderer": {"name": "pacing", "by": "length"}}),
}
"""Name: what it does, and its block."""

_COLUMNS: tuple[tuple[frozenset[str], dict[str, Any]], ...] = (
    (
        frozenset({"messages", "chosen", "rejected"}),
        {"formatting": "sharegpt", "ranking": True, "columns": {"messages": "messages"}},
    ),
    (frozenset({"prompt", "chosen", "rejected"}), {"ranking": True, "columns": {"prompt": "prompt"}}),
    (frozenset({"instruction", "chosen", "rejected"}), {"ranking": True, "columns": {"prompt": "instruction"}}),
    (frozenset({"conversations"}), {"formatting": "sharegpt", "columns": {"messages": "conversations"}}),
    (
        frozenset({"messages"}),
        {
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {
                **{f"{tag}_tag": tag for tag in ("role", "content")},
                **{f"{tag}_tag": tag for tag in ("user", "assistant", "system")},
            },
        },
    ),
    (frozenset({"instruction", "output"}), {"columns": {"prompt": "instruction", "response": "output"}}),
    (frozenset({"prompt", "response"}), {"columns": {"prompt": "prompt", "response": "response"}}),
    (frozenset({"prompt", "completion"}), {"columns": {"prompt": "prompt", "response": "completion"}}),
    (frozenset({"question", "answer"}), {"columns": {"prompt": "question", "response": "answer"}}),
    (frozenset({"text"}), {"columns": {"prompt": "text"}}),
)
"""Columns that tell a format, the special ones first, and LLaMA-Factory's entry for it."""
_ALSO = {name: name for name in ("system", "tools", "images", "videos", "audios")}
_OF_PROMPTS = {"input": "query", "history": "history"}  # not of conversations, which hold them
_SINCE = {"chosen": "chosen", "rejected": "rejected"}
_NEEDED = {"name": "METHOD", "data": "--data", "model": "--model", "targets": "--targets"}
_DECISIONS = 10  # of a run, if the data is not tiny


@dataclass(frozen=True, kw_only=True)
class _Data:
    """Data sets of one folder, by name, and what is new in its ``dataset_info.json``."""

    folder: Path
    train: tuple[str, ...]
    targets: tuple[str, ...]
    rows: int | None  # training rows, where they could be counted
    stage: str
    new: dict[str, Any]


def init(
    name: str | None,
    overrides: Sequence[str] = (),
    *,
    data: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    model: str | None = None,
    out: Path | None = None,
    stage: str | None = None,
    template: str = "default",
    domains: str | None = None,
    dataset_dir: Path | None = None,
    full: bool = False,
) -> Answer:
    """Write a configuration, and the entries of ``dataset_info.json`` that it needs; return where they are.

    Args:
        name: A method ("less", "mixer/odm") or one of ``RECIPES``; None: asked for.
        overrides: ``key=value`` texts over what would be written, as ``dynamic.selector.focus=high``.
        data: Files to train on, or names of data sets in ``dataset_dir``.
        targets: Files or names of data sets to select towards, for methods that need them.
        model: Folder or hub id.
        out: File to write; None: beside the data, named after the method.
        stage: LLaMA-Factory's stage; None: as the columns of the data say.
        template: LLaMA-Factory's name of the model's chat template.
        domains: Column that names a row's domain; None: each data set is one.
        dataset_dir: Folder of ``dataset_info.json``; None: that of the first file.
        full: Train all parameters instead of an adapter.

    Raises:
        ConfigError: Something is missing and no terminal is there to ask, a file exists already, or the configuration
            would not be accepted; then nothing is written.
    """
    data, of_data = _without_overrides(data)
    targets, of_targets = _without_overrides(targets)
    overrides = [*overrides, *of_data, *of_targets]
    given: dict[str, Any] = {"name": name, "data": data, "model": model}
    _ask(given, {"name": _offer(), "data": "Files to train on, or names of data sets: ", "model": "Model: "})
    title, told, block, methods = _block_of(str(given["name"]))
    if any(requirements(cls).targets for cls in methods):
        given["targets"] = targets
        _ask(given, {"targets": "Files or names of the data sets to select towards: "})
    found = _data(_words(given["data"]), _words(given.get("targets")), dataset_dir)
    file = found.folder / f"{title}.yaml" if out is None else out
    if file.exists() or file.is_symlink():
        raise ConfigError(f"{file} exists; name another file with --out")
    if file.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out: {file} must end in .yaml or .yml")
    if not file.parent.is_dir():
        raise ConfigError(f"--out: {file.parent} is no folder")
    run = _run(found, given["model"], title, stage or found.stage, template, full)
    run["dynamic"] = _filled(block, methods, found, int(run["interval"]), domains)
    del run["interval"]
    info = found.folder / INFO_FILE
    with ExitStack() as undo:
        if found.new:
            _add_entries(info, found.new, undo)
        text = _text(merged(run, overrides), told, methods, file)
        _write_new(file, text)
        undo.callback(file.unlink)
        plan(file)
        undo.pop_all()
    lines = [f"{file}: {told}"]
    lines += [f"{info}: describes {', '.join(found.new)}"] if found.new else []
    lines += ["", f"dataflex plan {file}", f"dataflex train {file}"]
    return Answer("\n".join(lines), {"file": str(file), "dataset_info": str(info), "new": [*found.new]})


def _without_overrides(words: Sequence[str] | None) -> tuple[list[str] | None, list[str]]:
    """Return the words that name data, and the ``key=value`` texts that were written behind them."""
    overrides = [word for word in words or () if "=" in word and not _is_file(word)]
    return None if words is None else [word for word in words if word not in overrides], overrides


def _offer() -> str:
    listed = "".join(f"  {name:<12} {told}\n" for name, (told, _) in RECIPES.items())
    return f"{listed}One of these, or a method ('dataflex methods' lists them): "


def _ask(given: dict[str, Any], questions: Mapping[str, str]) -> None:
    """Fill in what is missing by asking, if somebody is there to answer.

    Raises:
        ConfigError: Nobody is, or the answer is empty; all that is missing is named.
    """
    missing = [key for key in questions if not given.get(key)]
    if missing and not answers():
        raise ConfigError(f"init: {', '.join(_NEEDED[key] for key in missing)} must be given where no terminal can ask")
    for key in missing:
        given[key] = ask(questions[key])
        if not given[key]:
            raise ConfigError(f"init: {_NEEDED[key]} is needed")


def _words(value: Any) -> list[str]:
    """Return names given as a list, or as a text that was typed, as in a shell; commas part names that are no files."""
    words = list(value or ())
    if isinstance(value, str):
        try:
            words = [value] if _is_file(value) else shlex.split(value)
        except ValueError:  # a quote that is not closed
            words = value.split()
    parts = [[word] if _is_file(word) else word.split(",") for word in words]
    return [word.strip() for part in parts for word in part if word.strip()]


def _block_of(name: str) -> tuple[str, str, dict[str, Any], list[type[Method]]]:
    """Return the name of the file, what it does, the block without what the data says, and its methods."""
    if name in RECIPES:
        told, block = RECIPES[name]
    else:
        kind, _, wanted = name.rpartition("/")
        kinds = [each for each in KINDS if kind in ("", each) and wanted in names(each)]
        if not kinds:
            known = [*RECIPES, *(each for one in KINDS for each in names(one))]
            raise ConfigError(f"init: there is no recipe or method {name!r}{did_you_mean(name, known)}")
        if len(kinds) > 1:
            raise ConfigError(
                f"init: {name} is {' and '.join(f'{each}/{wanted}' for each in kinds)}; write one of them"
            )
        told, block = "", {kinds[0]: {"name": wanted}}
    problems: list[str] = []
    pairs = [(kind, block[kind]["name"]) for kind in KINDS if kind in block]
    methods = [cls for pair in pairs if (cls := method_class(*pair, "/".join(pair), problems)) is not None]
    if problems:
        raise ConfigError(problems)
    return name.replace("/", "_"), told or methods[0].card.summary, block, methods


# ---- data


def _data(train: Sequence[str], targets: Sequence[str], dataset_dir: Path | None) -> _Data:
    """Return the data sets that files and names stand for."""
    problems: list[str] = []
    files = [Path(word) for word in (*train, *targets) if _is_file(word)]
    if dataset_dir is None and not files:
        raise ConfigError(f"--data: no such file: {', '.join(train)}; data sets by name need --dataset-dir")
    folder = dataset_dir if dataset_dir is not None else files[0].parent
    known = _known(folder / INFO_FILE)
    new: dict[str, Any] = {}

    def named(word: str, flag: str) -> str:
        if not _is_file(word):
            if word not in known:
                problems.append(
                    f"{flag}: neither a file nor in {folder / INFO_FILE}: {word}{did_you_mean(word, [*known])}"
                )
            return word
        place = os.path.relpath(word, folder)
        for each, entry in {**known, **new}.items():
            if isinstance(entry, Mapping) and os.path.normpath(str(entry.get("file_name"))) == place:
                return str(each)
        name = Path(word).stem
        if name in known or name in new:
            problems.append(f"{flag}: {folder / INFO_FILE} has another data set {name!r}; rename {word}")
        entry = _entry(Path(word), flag, problems)
        new[name] = {"file_name": place, **entry}
        return name

    of_train = tuple(named(word, "--data") for word in train)
    of_targets = tuple(named(word, "--targets") for word in targets)
    if problems:
        raise ConfigError(problems)
    first = {**known, **new}[of_train[0]]
    counts = [_rows(folder, {**known, **new}[name]) for name in of_train]
    rows = None if None in counts else sum(count for count in counts if count is not None)
    stage = "dpo" if first.get("ranking") else "pt" if first.get("columns") == {"prompt": "text"} else "sft"
    return _Data(folder=folder, train=of_train, targets=of_targets, rows=rows, stage=stage, new=new)


def _is_file(word: str) -> bool:
    return Path(word).is_file()


def _known(info: Path) -> dict[str, Any]:
    if not info.is_file():
        return {}
    try:
        found = read_json(info)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{info} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{info} must map names of data sets to their description")
    return found


def _rows(folder: Path, entry: Mapping[str, Any]) -> int | None:
    if not entry.get("file_name"):
        return None
    counts = [found.rows for found in contents_of(folder / str(entry["file_name"])).values()]
    return None if None in counts or not counts else sum(count for count in counts if count is not None)


def _entry(file: Path, flag: str, problems: list[str]) -> dict[str, Any]:
    """Return how LLaMA-Factory reads a file, by the names of its columns."""
    problems += [f"{flag}: {file}: {found.problem}" for found in contents_of(file).values() if found.problem]
    columns = columns_of(file) or frozenset()
    for needed, entry in _COLUMNS:
        if needed <= columns:
            also = _SINCE if entry.get("ranking") else {}
            if needed != {"text"}:
                known = _ALSO if entry.get("formatting") else {**_OF_PROMPTS, **_ALSO}
                also = {**also, **{role: column for column, role in known.items() if column in columns}}
            return {**entry, "columns": {**entry["columns"], **also}}
    listed = ", ".join(sorted(columns)) or "none"
    problems.append(f"{flag}: the columns of {file} ({listed}) are of no known format; describe it in {INFO_FILE}")
    return {}


def _add_entries(info: Path, new: Mapping[str, Any], undo: ExitStack) -> None:
    """Add entries to a ``dataset_info.json``, which is as it was if ``undo`` is closed."""
    before = info.read_bytes() if info.is_file() else None

    def restore() -> None:
        if before is None:
            info.unlink()
        else:
            _replace(info, before)

    text = json.dumps({**_known(info), **new}, indent=2, ensure_ascii=False) + "\n"
    _replace(info, text.encode())
    undo.callback(restore)


def _replace(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def _write_new(file: Path, text: str) -> None:
    """Write a file that is not there yet, whole or not at all; ConfigError where it is."""
    aside = file.with_name(f".{file.name}.{owner()}.yaml")
    try:
        _replace(aside, text.encode())
        os.link(aside, file)  # fails where the name is taken
    except FileExistsError as error:
        raise ConfigError(f"{file} exists; name another file with --out") from error
    finally:
        aside.unlink(missing_ok=True)


# ---- the configuration


def _run(data: _Data, model: str, title: str, stage: str, template: str, full: bool) -> dict[str, Any]:
    """Return LLaMA-Factory's keys, and ``interval``: the optimizer steps between two decisions."""
    batch, accumulation, epochs = 4, 4, 3
    if data.rows is not None and data.rows < 40 * batch * accumulation:
        accumulation = 1
    steps = epochs * (data.rows or 1600 * accumulation) // (batch * accumulation)
    adapter = {} if full else {"lora_rank": 16, "lora_target": "all"}
    chat = {} if stage == "pt" else {"template": template}
    return {
        "model_name_or_path": model,
        "stage": stage,
        "do_train": True,
        "finetuning_type": "full" if full else "lora",
        **adapter,
        **chat,
        "cutoff_len": 2048,
        "dataset_dir": str(data.folder),
        "dataset": ", ".join(data.train),
        "output_dir": str(data.folder / "runs" / title),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": float(epochs),
        "learning_rate": 1.0e-5 if full else 1.0e-4,
        "lr_scheduler_type": "cosine",
        "logging_steps": 10,
        "save_strategy": "epoch",
        "report_to": "none",
        "seed": 1,
        "interval": max(1, steps // _DECISIONS),
    }


def _filled(
    block: Mapping[str, Any], methods: Iterable[type[Method]], data: _Data, interval: int, domains: str | None
) -> dict[str, Any]:
    """Return the ``dynamic`` block with what the data says."""
    found: dict[str, Any] = {}
    for cls in methods:
        shown = example(cls)["dynamic"]
        found.update({key: value for key, value in shown.items() if key not in (cls.kind, "interval_steps")})
        chooses = issubclass(cls, Selector) and cls.selects_subset
        if "interval_steps" in shown or chooses:  # one selection would not do for several epochs
            at_once = requirements(cls).within_batch
            found |= {"interval_steps": 1} if at_once else {"warmup_steps": interval, "interval_steps": interval}
    if domains is not None:
        found["domain_column"] = domains
    for key, value in block.items():
        found[key] = dict(value) if isinstance(value, Mapping) else value
    for cls in methods:
        own, shown = found[cls.kind], example(cls)["dynamic"][cls.kind]
        if requirements(cls).targets:
            own["targets"] = list(data.targets)
        if issubclass(cls, Weighter) and all(map(default_of, fields(cls.Params))):
            steps = interval * _DECISIONS
            own |= {"warmup_steps": interval} if cls(cls.Params()).warmup(steps) >= steps else {}
        given = {} if isinstance(shown, str) else shown
        own.update(
            {key: value for key, value in given.items() if key in ("updates", "by", "represent", "rule", "reward")}
        )
        share = {name: round(1 / len(data.train), 4) for name in data.train}
        if "proportions" in given and domains is None:
            own["proportions"] = share
        if "stages" in given and domains is None:
            own["stages"] = [{"start_step": 0, "proportions": share}]
    return found


_COMMENTS = {
    "model_name_or_path": "a folder or a hub id",
    "lora_rank": "of the adapter; finetuning_type: full trains all parameters",
    "template": "of the model: qwen, llama3, mistral, ... (LLaMA-Factory's list); default: none of them",
    "cutoff_len": "tokens of a row beyond which it is cut",
    "dataset_dir": "where dataset_info.json is, from where the command is started",
    "output_dir": "checkpoints, and the record in dataflex/",
    "gradient_accumulation_steps": "micro-batches of one optimizer step",
    "report_to": "or tensorboard, wandb, ...",
}
_IN_BLOCK = {
    "warmup_steps": "optimizer steps before the first one, on all rows",
    "interval_steps": "optimizer steps between two decisions",
    "candidate_batches": "chosen from this many batches in every step",
    "record": "what happened, for dataflex report; the training is LLaMA-Factory's own",
    "domain_column": "column that names a row's domain",
    "signals": "share of the training's passes that decisions may cost",
}
_BESIDE = 50


def _text(mapping: Mapping[str, Any], told: str, methods: Sequence[type[Method]], file: Path) -> str:
    """Return the configuration as YAML with comments; parameters with a default are there as comments."""
    rest = {key: value for key, value in mapping.items() if key != "dynamic"}
    lines = [f"# {told[0].upper()}{told[1:]}", "#", f"#   dataflex plan {file}", f"#   dataflex train {file}", ""]
    lines += [_commented(line, _COMMENTS) for line in as_yaml(rest).splitlines()]
    lines += ["", "dynamic:"]
    classes = {cls.kind: cls for cls in methods}
    for key, value in mapping["dynamic"].items():
        cls = classes.get(key)
        if cls is None or not isinstance(value, Mapping) or value.get("name") != cls.name:
            lines += [_commented(line, _IN_BLOCK) for line in as_yaml({key: value}, indent=2).splitlines()]
            continue
        lines += [f"  {key}:", *as_yaml(value, indent=4).splitlines()]
        for field in fields(cls.Params):
            if key_of(field) not in value and default_of(field):
                lines.append(f"    # {key_of(field)}: {_default(field)}".ljust(_BESIDE) + f"  # {meaning(field)}")
    return "\n".join(lines) + "\n"


def _default(field: Field[Any]) -> str:
    value = field.default
    if value is MISSING and field.default_factory is not MISSING:
        value = field.default_factory()
    return as_yaml({"x": plain(value)}).removeprefix("x:").strip()


def _commented(line: str, comments: Mapping[str, str]) -> str:
    comment = comments.get(line.strip().partition(":")[0])
    return f"{line.ljust(_BESIDE)}  # {comment}" if comment else line
