"""``dataflex eval``: held-out losses of a model, its choices and answers, by the pass that ``dataflex score`` makes.

The request is read and checked before anything heavy is imported. Questions become rows of data sets of their own.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from dataflex.config.args import LlamaFactoryArgs, data_set_names
from dataflex.config.data import INFO_FILE, find_entries, find_sources
from dataflex.config.load import ENDINGS, load_mapping, merged
from dataflex.config.schema import FLAT_KEYS
from dataflex.errors import ConfigError, DataError, did_you_mean
from dataflex.mixing.options import check_names, numbers_by_name
from dataflex.offline.answers import Task, Written, matches, read_tasks
from dataflex.offline.choices import LENGTHS, Length, Question, as_rows, outcomes, read_questions, summary
from dataflex.offline.harness import run_tasks, task_lines, task_problems
from dataflex.offline.request import ScoreRequest, out_problems, score_request
from dataflex.printable import redacted
from dataflex.record.text import number, percent, table
from dataflex.registry import KINDS
from dataflex.score_table import ScoreTable
from dataflex.signals.specs import GenerationSpec
from dataflex.state import read_json

_STAGES = ("sft", "pt")
_LENGTH, _NEW_TOKENS = "mean", 256
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ADAPTERS = {"LORA": "lora", "OFT": "oft"}
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """One run of ``dataflex eval``."""

    score: ScoreRequest  # the pass that gives the loss of every row
    files: Mapping[str, list[Question]]  # questions by file
    choices: str  # name of the data set that their rows are; "" without files
    length: Length  # how a choice's log-likelihood is compared
    tasks: Mapping[str, list[Task]]  # questions whose answers are generated, by file
    answers: str  # name of the data set that their rows are; "" without files
    generation: GenerationSpec
    after: str  # mark that the compared part of an answer follows; "" for all of it
    mix: Mapping[str, float]  # share of each domain in the stated mix; empty for none
    harness: tuple[Path, ...]  # task files of lm-eval
    unasked: str  # name of a data set of one row, where nothing but lm-eval is asked for; else ""


def eval_request(
    model: str,
    overrides: Sequence[str],
    *,
    work: Path,
    data: str | None = None,
    choices: str | None = None,
    length: str = _LENGTH,
    answers: str | None = None,
    max_new_tokens: int = _NEW_TOKENS,
    after: str = "",
    mix: str | None = None,
    tasks: str | None = None,
    out: Path | None = None,
) -> EvalRequest:
    """Read and check what ``dataflex eval`` is asked for; ``ConfigError`` with all problems.

    Args:
        model: Folder or hub id of a model, folder of an adapter, or a LLaMA-Factory YAML or JSON file.
        overrides: ``key=value`` texts over LLaMA-Factory's keys.
        work: An empty folder, which the rows of choices are written to.
        data: Names of data sets; None: the ``eval_dataset`` of the file.
        choices: Files of questions.
        length: ``mean`` or ``sum`` over the tokens of a choice.
        answers: Files of questions whose answers are generated, greedily.
        max_new_tokens: Longest generated answer.
        after: Mark that the compared part of an answer follows.
        mix: ``NAME=SHARE,...`` of domains; shares are divided by their sum.
        tasks: Task files of lm-eval.
        out: The JSON file to write.
    """
    problems: list[str] = []
    mapping = _mapping(model, overrides, problems)
    lf = LlamaFactoryArgs.read({**mapping, "stage": mapping.get("stage", "sft")})
    names = data_set_names(data) if data is not None else tuple(lf.eval_sets)
    paths, to_write, harness = ([Path(name) for name in data_set_names(given)] for given in (choices, answers, tasks))
    problems += task_problems(harness)
    if not (names or paths or to_write or harness):
        problems.append("--data: name data sets of dataset_info.json, or files with --choices, --answers or --tasks")
    if lf.stage not in (*_STAGES, ""):
        problems.append(f"stage: eval takes {' and '.join(_STAGES)}, found {lf.stage}")
    for option, asked in (("--choices", paths), ("--answers", to_write), ("--tasks", harness)):
        problems += [f"{option}: {path} is named twice" for path in dict.fromkeys(asked) if asked.count(path) > 1]
    files = {str(path): read_questions(path, problems) for path in dict.fromkeys(paths)}
    written = {str(path): read_tasks(path, problems) for path in dict.fromkeys(to_write)}
    if max_new_tokens < 1:
        problems.append(f"--max-new-tokens: expected 1 or more, found {max_new_tokens}")
    if length not in LENGTHS:
        problems.append(f"--length: {length!r}{did_you_mean(length, LENGTHS)} (choices: {', '.join(LENGTHS)})")
    problems += _idle(
        (f"--length {length}", "--choices", length != _LENGTH and not paths),
        (f"--max-new-tokens {max_new_tokens}", "--answers", max_new_tokens != _NEW_TOKENS and not to_write),
        (f"--after {after!r}", "--answers", after and not to_write),
        ("--mix", "--data", mix is not None and not names),
    )
    block = mapping["dynamic"] if isinstance(mapping.get("dynamic"), Mapping) else {}
    by = {key: block.get(key) for key in ("domain_column", "domain_path", "domain_clusters") if block.get(key)}
    if paths or to_write:
        problems += _not_for_questions(lf, by)
    shares = _shares(mix, () if by else names, problems) if mix is not None and names else {}
    if out is not None:
        problems += out_problems(out, "dataflex eval", _is_evaluation)
    for key in ("eval_dataset", "val_size", "max_samples"):
        mapping.pop(key, None)
    whole = () if lf.max_samples is None else ("max_samples is left out: every row and question is evaluated",)
    mapping["dataset"] = ",".join(names)
    column = by.get("domain_column")
    rows = {
        "choices": as_rows([question for questions in files.values() for question in questions]),
        "answers": [
            {"instruction": task.text, "input": "", "output": task.answer} for each in written.values() for task in each
        ],
        "unasked": [] if names or paths or to_write else [{"instruction": "one", "input": "", "output": "two"}],
    }
    own: dict[str, str] = {}
    if any(rows.values()) and not problems:
        own = _write_rows(work, rows, names, lf, None if column is None else str(column), problems)
        if problems:  # the data sets are no longer where the user has them
            raise ConfigError(problems)
        mapping.update(dataset=",".join([*names, *own.values()]), dataset_dir=str(work))
    try:
        score = score_request(mapping, ["loss.focus=high"], methods=("loss",), out=work / "scores.parquet")
    except ConfigError as error:
        more = [re.sub(r"^dataset: ", "--data: ", line) for line in error.problems if names or line[:8] != "dataset:"]
        raise ConfigError(dict.fromkeys([*problems, *more])) from error
    if problems:
        raise ConfigError(problems)
    # Ranks write to folders of their own, so that no pass is kept there to go on with.
    config = replace(score.config, signals=replace(score.config.signals, store=None))
    score = replace(score, config=config, notes=(*score.notes, *whole))
    return EvalRequest(
        score=score,
        files=files,
        choices=own.get("choices", ""),
        length=cast(Length, length),
        tasks=written,
        answers=own.get("answers", ""),
        generation=GenerationSpec(max_new_tokens=max_new_tokens, temperature=0.0),
        after=after,
        mix=shares,
        harness=tuple(harness),
        unasked=own.get("unasked", ""),
    )


def _idle(*options: tuple[str, str, Any]) -> Iterator[str]:
    """Yield options that were given (the last value) without the one that they belong to."""
    for option, needed, alone in options:
        if alone:
            yield f"{option}: has no effect without {needed}; remove it"


def _shares(mix: str, names: Sequence[str], problems: list[str]) -> Mapping[str, float]:
    """Return the share of each domain; ``names`` are those that there are, where that is known."""
    try:
        shares = numbers_by_name(mix, "--mix")
        if not sum(shares.values()):
            problems.append(f"--mix: all shares of {mix!r} are 0")
        if names:
            check_names("--mix", shares, names, every=False)
    except ConfigError as error:
        problems += error.problems
        return {}
    return shares


def _not_for_questions(lf: LlamaFactoryArgs, by: Mapping[str, Any]) -> Iterator[str]:
    """Yield settings under which questions cannot be asked."""
    if lf.stage == "pt" or lf.on("train_on_prompt"):
        key = "stage" if lf.stage == "pt" else "train_on_prompt"
        yield f"{key}: a question is no part of its answer; remove it, or --choices and --answers"
    if "domain_path" in by:
        yield "dynamic.domain_path: questions lie in no data set's file; evaluate them in a run of their own"


def _mapping(model: str, overrides: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """Return LLaMA-Factory's keys for the model, and the ``dynamic`` block without methods."""
    if model.lower().endswith(ENDINGS):
        mapping = load_mapping(model, overrides)
    else:
        given = merged({}, overrides)
        mapping = {**_loads(model, given, problems), **given}
    # The model is the one that was trained, whatever its training began with.
    mapping = {key: value for key, value in mapping.items() if key not in (*FLAT_KEYS, "train_from_scratch")}
    if isinstance(mapping.get("dynamic"), Mapping):
        mapping["dynamic"] = {key: value for key, value in mapping["dynamic"].items() if key not in KINDS}
    return mapping


def _loads(model: str, given: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the keys that load a model or an adapter of this name."""
    folder = Path(model).expanduser()
    told = folder / "adapter_config.json"
    if not told.is_file():
        problems += _model_problems(model, folder)
        whole = {} if given.get("adapter_name_or_path") else {"finetuning_type": "full"}
        return {"model_name_or_path": str(folder) if folder.is_dir() else model, **whole}
    try:
        config = read_json(told)
        base, kind = config.get("base_model_name_or_path"), str(config.get("peft_type"))
    except (OSError, ValueError, AttributeError) as error:
        problems.append(f"MODEL: {told} cannot be read: {error}")
        base, kind = None, "LORA"
    if kind not in _ADAPTERS:
        problems.append(f"MODEL: {folder} is an adapter of kind {kind}; LLaMA-Factory loads {', '.join(_ADAPTERS)}")
    keys = {"adapter_name_or_path": str(folder), "finetuning_type": _ADAPTERS.get(kind, "lora")}
    if not given.get("model_name_or_path"):
        keys["model_name_or_path"] = _base_of(folder, base, problems)
    return keys


def _base_of(adapter: Path, base: Any, problems: list[str]) -> str:
    """Return the base model of an adapter: from the working directory, beside the adapter or above, or a hub id."""
    if not isinstance(base, str) or not base:
        problems.append(f"model_name_or_path: the adapter {adapter} does not name its base model; give it")
        return "missing"
    places = [Path(), adapter, *adapter.absolute().parents]
    for place in places:
        if (place / base / "config.json").is_file():
            return str(place / base)
    if not _HUB_ID.fullmatch(base) or _not_kept(base):
        problems.append(
            f"model_name_or_path: the base model of the adapter {adapter} is {base!r}, and there is no such folder "
            f"in {Path.cwd()}, in the adapter's folder or above it{_not_kept(base)}; give it: model_name_or_path=..."
        )
    return base


def _model_problems(model: str, folder: Path) -> list[str]:
    """Return why a model cannot be loaded from here."""
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return []
        inside = sorted(
            path.parent.name for name in ("config", "adapter_config") for path in folder.glob(f"*/{name}.json")
        )
        hint = f"; there is {folder / inside[-1]}" if inside else ""
        return [f"MODEL: {folder} is neither a model (config.json) nor an adapter (adapter_config.json){hint}"]
    if folder.is_file():
        return [f"MODEL: {folder} is a file; name a model's folder, or a configuration ({', '.join(ENDINGS)})"]
    if not _HUB_ID.fullmatch(model) or ("/" in model and folder.parent.is_dir()):
        near = [str(path) for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        return [f"MODEL: no such folder: {folder}{did_you_mean(str(folder), near)}"]
    reason = _not_kept(model)
    return [f"MODEL: no such folder: {folder}{reason}"] if reason else []


def _not_kept(model: str) -> str:
    """Return why a hub's model cannot be had: the hub is not to be asked, and the model was not fetched before."""
    name = next((name for name in _OFFLINE if os.environ.get(name, "").lower() in ("1", "true", "yes", "on")), None)
    if name is None or not _HUB_ID.fullmatch(model):
        return ""
    from huggingface_hub import try_to_load_from_cache

    kept = isinstance(try_to_load_from_cache(model, "config.json"), str)
    return "" if kept else f", nor a model of that name fetched before ({name} is on)"


def _write_rows(
    work: Path,
    rows: Mapping[str, list[dict[str, str]]],
    names: Sequence[str],
    lf: LlamaFactoryArgs,
    column: str | None,
    problems: list[str],
) -> dict[str, str]:
    """Write kinds of rows as data sets beside the entries of the named ones; return their names by kind."""
    sources, missing = find_sources(names, lf, "--data", Path.cwd()) if names else ([], [])
    problems += missing
    entries = find_entries(names, lf) if names else {}
    for source in sources:
        entry = entries.get(source.name)
        if entry is None:
            problems.append(
                f"--data: {source.name} lies in no local dataset_info.json; evaluate it without questions beside it"
            )
        elif source.path is not None:
            entry["file_name"] = str(source.path.absolute())
    own = {}
    for kind, written in rows.items():
        if not written:
            continue
        name = kind
        while name in names:
            name += "_"
        own[kind] = name
        more = {} if column is None else {column: name}
        lines = "".join(json.dumps({**row, **more}) + "\n" for row in written)
        (work / f"{kind}.jsonl").write_text(lines, encoding="utf-8")
        columns = {"prompt": "instruction", "query": "input", "response": "output"}
        entries[name] = {"file_name": f"{kind}.jsonl", "columns": columns}
    (work / INFO_FILE).write_text(json.dumps(entries), encoding="utf-8")
    return own


# -- what came out ----------------------------------------------------------------------------------------------------


def also(request: EvalRequest, runner: Any, space: Any) -> tuple[list[Any] | None, list[dict[str, Any]]]:
    """Return what the model writes for the answers' rows, and what lm-eval's tasks came to (collective)."""
    batch = LlamaFactoryArgs.read(request.score.lf).per_device_eval_batch_size
    written = _generated(request, runner, space)
    access = runner.access
    told = run_tasks(request.harness, access.model, access.known_tokenizer("lm-eval"), batch) if request.harness else []
    return written, told


def _generated(request: EvalRequest, runner: Any, space: Any) -> list[Any] | None:
    """Return what the model writes for each row of the answers' data set, greedily; None without one (collective)."""
    if not request.answers:
        return None
    count = space.sources[request.answers]  # the last data set
    rows = np.arange(space.num_rows - count, space.num_rows, dtype=np.int64)
    return cast(
        list[Any], runner.generate([ids.tolist() for ids in runner.tokens(rows, part="prompt")], request.generation)
    )


def _is_evaluation(path: Path) -> bool:
    """Whether ``dataflex eval`` wrote a file."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"format", "model", "settings", "provenance"} <= set(found)


def evaluated(
    request: EvalRequest,
    scores: ScoreTable,
    generations: Sequence[Any] | None = None,
    harness: Sequence[Mapping[str, Any]] = (),
    column: str = "loss",
) -> dict[str, Any]:
    """Return losses by data set and domain, and what choices and generated answers came to, as JSON values.

    Raises:
        DataError: The mix names no domain of the rows, or no row has a loss.
    """
    loss = np.asarray(scores.columns[column], dtype=np.float64)
    # A first token that is supervised has nothing before it, and no loss.
    tokens = np.asarray(scores.supervised_tokens - (scores.supervised_tokens == scores.tokens), dtype=np.int64)
    tokens = np.where(np.isfinite(loss), tokens, 0)
    is_choice, is_answer, unasked = (
        np.array([name == own for name in scores.datasets])[scores.dataset_of]
        for own in (request.choices, request.answers, request.unasked)
    )
    is_question = is_choice | is_answer | unasked
    view = LlamaFactoryArgs.read(request.score.lf)
    settings = {key: getattr(view, key) for key in ("stage", "template", "cutoff_len")}
    found: dict[str, Any] = {"format": 1, "model": scores.provenance["model"], "settings": settings}
    if not is_question.all():
        found["data"] = _by_part(scores, loss, tokens, ~is_question, request.mix)
    if request.files:
        found["choices"] = _by_file(request, scores, loss, tokens, is_choice, view.cutoff_len)
    if generations is not None:
        found["answers"] = _written(request, scores, generations, is_answer, view.cutoff_len)
    if harness:
        found["tasks"] = list(harness)
    kept = ("config", "data", "versions")
    provenance = {key: scores.provenance[key] for key in kept}
    return cast(dict[str, Any], redacted({**found, "provenance": provenance}))


def _by_part(
    scores: ScoreTable, loss: NDArray[Any], tokens: NDArray[Any], rows: NDArray[Any], mix: Mapping[str, float]
) -> dict[str, Any]:
    def part(mask: NDArray[np.bool_]) -> dict[str, Any]:
        count = int(tokens[mask].sum())
        if not count:
            raise DataError("--data: a data set or domain has no token with a loss")
        sums = np.where(tokens[mask] > 0, loss[mask], 0.0) @ tokens[mask]
        return {"rows": int(mask.sum()), "tokens": count, **_told(float(sums) / count)}

    sets = {
        name: part(mask) for k, name in enumerate(scores.datasets) if (mask := rows & (scores.dataset_of == k)).any()
    }
    domains = {
        name: part(mask) for k, name in enumerate(scores.domains) if (mask := rows & (scores.domain_of == k)).any()
    }
    found = {"sets": sets, "domains": domains, "micro": part(rows)}
    found["macro"] = _told(float(np.mean([values["loss"] for values in domains.values()])))
    if mix:
        try:
            check_names("--mix", mix, list(domains), every=False)
        except ConfigError as error:
            raise DataError(str(error)) from error
        shares = {name: share / sum(mix.values()) for name, share in mix.items()}
        loss_of_mix = sum(share * domains[name]["loss"] for name, share in shares.items())
        found["mix"] = {"shares": shares, **_told(loss_of_mix)}
    return found


def _told(loss: float) -> dict[str, float | None]:
    """Return a loss in nats per token with its perplexity, None beyond what a float holds."""
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else None}


def _by_file(
    request: EvalRequest,
    scores: ScoreTable,
    loss: NDArray[Any],
    tokens: NDArray[Any],
    is_choice: NDArray[np.bool_],
    cutoff_len: int,
) -> list[dict[str, Any]]:
    total = sum(len(question.choices) for questions in request.files.values() for question in questions)
    # Rows that LLaMA-Factory drops, and rows that may have been cut, have no loss to compare.
    whole = is_choice & (scores.tokens < cutoff_len)
    position = scores.position[whole]
    losses, counts = np.full(total, np.nan), np.zeros(total, dtype=np.int64)
    losses[position], counts[position] = loss[whole], tokens[whole]
    found, start = [], 0
    for file, questions in request.files.items():
        stop = start + sum(len(question.choices) for question in questions)
        results = outcomes(questions, losses[start:stop], counts[start:stop], request.length)
        found.append({"file": file, "length": request.length, **summary(questions, results)})
        start = stop
    return found


def _written(
    request: EvalRequest, scores: ScoreTable, generations: Sequence[Any], is_answer: NDArray[np.bool_], cutoff_len: int
) -> list[dict[str, Any]]:
    written: list[Written | None] = [None] * sum(map(len, request.tasks.values()))
    for row, made in zip(np.flatnonzero(is_answer), generations, strict=True):
        if scores.tokens[row] < cutoff_len:  # else the question may have been cut
            written[scores.position[row]] = Written(text=made.text, finished=made.finished)
    found, start = [], 0
    for file, tasks in request.tasks.items():
        told = matches(tasks, written[start : start + len(tasks)], request.after)
        settings = {"max_new_tokens": request.generation.max_new_tokens, "after": request.after}
        found.append({"file": file, **settings, **told})
        start += len(tasks)
    return found


def as_text(found: Mapping[str, Any]) -> str:
    """Return what was found as tables."""
    model, settings = found["model"], found["settings"]
    adapter = f" with the adapter {model['adapter']}" if model["adapter"] else ""
    template = settings["template"] or "of the tokenizer"
    lines = [f"{model['name_or_path']}{adapter}: template {template}, cutoff_len {settings['cutoff_len']:,}"]
    data = found.get("data")
    if data is not None:
        rows = [("held-out", "rows", "tokens", "loss", "perplexity")]
        parts = {**data["sets"]}
        if list(data["domains"]) != list(parts):
            parts.update({f"domain {name}": values for name, values in data["domains"].items()})
        if len(parts) > 1:
            parts["micro (all tokens)"] = data["micro"]
            parts[f"macro (of {len(data['domains'])} domains)"] = data["macro"]
        if "mix" in data:
            shares = ", ".join(f"{name} {percent(share)}" for name, share in data["mix"]["shares"].items())
            parts[f"mix ({shares})"] = data["mix"]
        for name, values in parts.items():
            counts = [f"{values[key]:,}" if key in values else "" for key in ("rows", "tokens")]
            rows.append((name, counts[0], counts[1], number(values["loss"]), number(values["perplexity"], 2)))
        lines += ["", *table(rows, "<>>>>")]
    for each in found.get("choices", ()):
        lines += ["", *_choices_lines(each)]
    for each in found.get("answers", ()):
        told = [(each["file"], "questions", "exact match", "ended by itself")]
        if each["questions"]:
            counted = (f"{each['questions']:,}", percent(each["exact_match"]), percent(each["finished"]))
            told.append((f"greedy, at most {each['max_new_tokens']:,} tokens", *counted))
        lines += ["", *table(told, "<>>>")]
        lines += [_LEFT_OUT.format(each["left_out"], "an answer")] if each["left_out"] else []
    if "tasks" in found:
        lines += ["", *task_lines(found["tasks"])]
    return "\n".join(lines)


_LEFT_OUT = "  left out: {:,} questions with {} that reaches cutoff_len or that LLaMA-Factory dropped"


def _choices_lines(found: Mapping[str, Any]) -> list[str]:
    unit = "nats per token" if found["length"] == "mean" else "nats"
    rows: list[tuple[str, ...]] = [
        (found["file"], "questions", "accuracy", "chance", f"margin ({unit})", "bits per byte")
    ]

    def add(name: str, values: Mapping[str, Any]) -> None:
        shares = [percent(values[key]) for key in ("accuracy", "chance")]
        count = f"{values['questions']:,}" if "questions" in values else ""
        rows.append((name, count, *shares, number(values["margin"]), number(values["bits_per_byte"])))

    if found["questions"]:
        for name, values in found.get("subjects", {}).items():
            add(name, values)
        add("all questions (micro)", found)
        if "macro" in found:
            add(f"macro (of {len(found['subjects'])} subjects)", found["macro"])
    lines = table(rows, "<>>>>>")
    return [*lines, _LEFT_OUT.format(found["left_out"], "a choice")] if found["left_out"] else lines
