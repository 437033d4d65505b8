"""The command line: ``dataflex train | plan | methods | score | select | eval | compare | audit | mix | ...``.

Each command imports what it needs when it is called. Exit codes: 2 for a mistake of the user's and a refused write,
told in plain lines on stderr; 143 for SIGTERM; 1 for a run that fails otherwise (a defect of ours keeps its trace)
or is interrupted (SIGINT).
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

from dataflex.console import VERBOSE, flush_streams, lost_reader, open_closed_streams, others_aside, tell, write
from dataflex.ending import TERMINATED, Terminated, ends_on_term
from dataflex.errors import ConfigError, DataFlexError, chain, did_you_mean
from dataflex.printable import Answer, plain, shown
from dataflex.storage import storage_problem
from dataflex.version import untested

_FAILED = 1
_MISTAKE = 2
_CODES = (0, _MISTAKE, TERMINATED)

_Handler = Callable[[argparse.Namespace], str | int]

_TRAINS_OR_SCORES = ("train", "plan", "score", "query", "eval", "compare", "audit", "webui")
"""Commands for which it matters what LLaMA-Factory and transformers are installed."""

_EXAMPLES = {
    "train": "dataflex train run.yaml dynamic.interval_steps=20 output_dir=saves/run2",
    "plan": "dataflex plan run.yaml dynamic.selector=loss",
    "methods": "dataflex methods selector/loss",
    "score": "dataflex score run.yaml --method less,loss --out scores.parquet less.precondition=none",
    "query": "dataflex query index --target gsm8k_valid --out scores.parquet",
    "select": "dataflex select scores.parquet --score less --budget 0.1 --out subset.jsonl",
    "eval": "dataflex eval saves/run --data gsm8k_valid --choices mmlu.jsonl template=llama3",
    "compare": "dataflex compare evidence/s1.yaml seeds=[1,2,3] --jobs 2",
    "audit": "dataflex audit evidence/audit.yaml subsets.count=20",
    "mix": "dataflex mix swarm run.yaml --runs 24 --out swarm --run",
    "rows": """dataflex rows saves/run2 --most --where 'domain == "gsm8k" and times_served > 3' --text""",
    "report": "dataflex report saves/run2 saves/plain --out report",
    "webui": "dataflex webui",
    "init": "dataflex init towards --data my/pool.jsonl --targets my/goal.jsonl --model Qwen/Qwen2.5-0.5B",
    "schema": "dataflex schema",
    "completion": "dataflex completion bash",
    "version": "dataflex version",
}


class _Parser(argparse.ArgumentParser):
    """Raises mistakes instead of printing usage and exiting, and accepts no abbreviated options."""

    def __init__(self, **settings: object) -> None:
        settings.setdefault("allow_abbrev", False)
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**settings)  # type: ignore[arg-type]
        self.register("type", Path, _path)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, as each command's parser is called; ``key=value`` overrides may also come after options."""
        ours = itertools.takewhile(lambda text: text != "--" and (self._subparsers is None or text[:1] == "-"), args)
        flags = [text.partition("=")[0] for text in ours if text.startswith("--")]
        known = [*self._option_string_actions]
        # Told before what is missing, which may be what is meant.
        self._refuse([f"{flag}{did_you_mean(flag, known)}" for flag in flags if flag not in known])
        # argparse would take the last one, and say nothing of the others.
        for flag in dict.fromkeys(flags):
            if flags.count(flag) > 1 and (action := self._option_string_actions[flag]).nargs != 0:
                listed = f": '{flag} A B'" if action.nargs == "+" else ""
                self.error(f"argument {flag}: is given {flags.count(flag)} times; give all it is to have once{listed}")
        options, left = super().parse_known_args(args, namespace)
        overrides = hasattr(options, "overrides")
        self._refuse([text for text in left if not overrides or text.startswith("-") or "=" not in text])
        if left:
            options.overrides = [*options.overrides, *left]
        return options, []

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), [str(choice) for choice in action.choices or ()])
            raise

    def _refuse(self, texts: Sequence[str]) -> None:
        if texts:
            self.error(f"unrecognized arguments: {' '.join(texts)}")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see '{self.prog} --help')")


def _path(text: str) -> Path:
    """Return a path; an empty text, as of a variable that is not set, would be the working directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a path, found an empty text")
    return Path(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, by default that of the process's arguments, and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run(arguments))


def guarded(action: Callable[[], int]) -> int:
    """Run ``action`` and turn mistakes of the user's into plain lines on stderr and an exit code."""
    open_closed_streams()
    try:
        with ends_on_term("ended by SIGTERM; what was not saved by then is lost"):
            return action()
    except (Exception, KeyboardInterrupt, Terminated) as error:
        verdict = _verdict(error)
        if verdict is None:
            raise
        told, code = verdict
        _tell(told)
        return code
    finally:
        flush_streams()


def _verdict(error: BaseException) -> tuple[str, int] | None:
    """Return what to tell of an error and the exit code, or None for a defect of ours."""
    for one in chain(error):  # imports that are interrupted raise errors of their own
        if isinstance(one, KeyboardInterrupt):
            return "interrupted", _FAILED
        if isinstance(one, Terminated):
            return str(one), TERMINATED
    if lost_reader(error):
        return "ended, since the reader of its output has closed it", _FAILED
    told = str(error) if isinstance(error, DataFlexError) else storage_problem(error)
    return None if told is None else (told, _MISTAKE)


def _tell(text: str) -> None:
    tell("\n".join(f"dataflex: {line}" for line in text.split("\n")))


def _run(arguments: list[str]) -> int:
    parser = _parser(steps_of_mix=arguments[:1] in (["mix"], ["completion"]))
    if not arguments or arguments[0] == "help":
        _write(parser.format_help())
        return 0
    command, rest = arguments[0], arguments[1:]
    if command in ("-v", "--version"):
        command = "version"
    if command not in _EXAMPLES and not command.startswith("-"):
        known = list(_EXAMPLES)
        raise ConfigError(f"unknown command {command!r}{did_you_mean(command, known)} (commands: {', '.join(known)})")
    if command in _TRAINS_OR_SCORES and os.environ.get("RANK", "0") == "0" and not {"-h", "--help"} & {*rest}:
        for line in untested():
            _tell(f"warning: {line}")
    if command == "train" and "--verbose" in rest:
        os.environ[VERBOSE] = "1"
        rest = [text for text in rest if text != "--verbose"]
    if command == "train" and rest[:1] not in (["-h"], ["--help"]):
        # Everything is handed on untouched, so that LLaMA-Factory's own flags pass through.
        if not rest:
            raise ConfigError(f"train: name a configuration file, as in '{_EXAMPLES['train']}'")
        from dataflex.run import train

        told: str | int = train(rest)
    else:
        try:
            options = parser.parse_args([command, *rest])
        except SystemExit:  # argparse has printed the help
            return 0
        if command in ("score", "query", "eval"):
            options.arguments = rest
        as_json = getattr(options, "as_json", False)
        with others_aside() if as_json else nullcontext():
            told = options.handler(options)
        if as_json and isinstance(told, Answer) and told:  # ranks other than 0 have nothing to say
            # ASCII that no terminal obeys; what is made of messages would change the data.
            write(json.dumps(plain(told.values), indent=1, allow_nan=False) + "\n")
            return 0
    if isinstance(told, int):
        return told if told in _CODES else _FAILED
    if told:
        _write(told)
    return 0


def _calls(module: str, function: str) -> _Handler:
    """Return a handler that imports a command's function and calls it with the options of its parser."""

    def handle(options: argparse.Namespace) -> str | int:
        of_parser = ("command", "handler", "version", "as_json")
        given = {key: value for key, value in vars(options).items() if key not in of_parser}
        told: str | int = getattr(importlib.import_module(module), function)(**given)
        return told

    return handle


def _parser(steps_of_mix: bool = True) -> _Parser:
    """Return the parser of all commands; the steps of ``mix`` are imported only where they are wanted."""
    parser = _Parser(
        prog="dataflex",
        description="Train with data that is decided during training, on top of LLaMA-Factory.",
        epilog="'dataflex COMMAND --help' explains a command.\n\nexample:\n  " + _EXAMPLES["train"],
    )
    parser.add_argument("-v", "--version", action="store_true", help="print the versions, as 'dataflex version' does")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    def add(name: str, told: str, handler: _Handler, more: str = "") -> _Parser:
        epilog = f"example:\n  {_EXAMPLES[name]}"
        command: _Parser = commands.add_parser(name, help=told, description=f"{told}{more}", epilog=epilog)
        command.set_defaults(handler=handler)
        if name not in ("train", "mix", "compare", "audit", "webui", "schema", "completion"):
            command.add_argument("--json", dest="as_json", action="store_true", help="print JSON (docs/json.md)")
        return command

    version = _calls("dataflex.version", "version_lines")
    _add_config(add("train", "Train as a configuration says.", version, _TRAIN))  # 'train' itself is not parsed
    plan = _calls("dataflex.commands.plan", "plan")
    told = "Check a configuration and say what the run will do and cost, without a model."
    _add_plan(add("plan", told, plan))
    methods = _calls("dataflex.commands.methods", "methods")
    _add_methods(add("methods", "List the methods, or tell all about one.", methods))
    init = _calls("dataflex.commands.init", "init")
    _add_init(add("init", "Write a commented configuration for data of your own.", init, _INIT))
    schema = _calls("dataflex.commands.schema", "schema")
    add("schema", "Print the JSON schema of configurations, for editors.", schema).set_defaults(as_json=True)
    _add_completion(add("completion", "Print a script that completes commands in a shell.", lambda _: ""), parser)
    score, select = _calls("dataflex.commands.score", "score"), _calls("dataflex.offline.subset", "select")
    _add_score(add("score", "Score every row of a data set with selectors, without training.", score, _SCORE))
    query = _calls("dataflex.commands.score", "query")
    _add_query(add("query", "Score the rows of an index towards new targets, without a pass over them.", query, _QUERY))
    _add_select(add("select", "Write the subset of a data set that scores ask for.", select, _SELECT))
    evaluate = _calls("dataflex.commands.score", "evaluate")
    _add_eval(
        add("eval", "Held-out loss and perplexity of a model, multiple choice, and exact match.", evaluate, _EVAL)
    )
    compare = _calls("dataflex.commands.compare", "compare")
    _add_compare(
        add("compare", "Train a suite of arms over seeds, and say which differences are real.", compare, _COMPARE)
    )
    audit = add(
        "audit",
        "Train without rows, and say which scores predicted it.",
        _calls("dataflex.commands.compare", "audit"),
        _AUDIT,
    )
    audit.add_argument("suite", type=Path, metavar="SUITE", help="a .yaml, .yml or .json file")
    _add_overrides(audit, "keys of the suite")
    mix = add("mix", "Find proportions of domains before the large run, step by step.", lambda _: mix.format_help())
    if steps_of_mix:
        from dataflex.commands.mix import add_mix_steps
        from dataflex.commands.mix import mix as run_mix

        add_mix_steps(mix, run_mix)
    rows = _calls("dataflex.commands.rows", "rows")
    _add_rows(add("rows", "Print or export which rows of a run's pool were chosen, when and why.", rows, _ROWS))
    tells = _calls("dataflex.record.report", "report")
    _add_report(add("report", "Tell what a run decided, what it cost and whether it helped.", tells))
    board = _calls("dataflex.llamafactory.board", "webui")
    add("webui", "LLaMA-Factory's web UI; runs whose extra arguments hold a 'dynamic' block are ours.", board, _WEBUI)
    add("version", "Print the versions of dataflex and what it stands on.", version)
    return parser


_TRAIN = (
    "\n\nAny LLaMA-Factory configuration works unchanged; a 'dynamic' block turns methods on.\n"
    "LLaMA-Factory's own flags (--stage sft ...) are accepted instead of a file.\n"
    "--verbose tells more: the methods' reasons, and the numbers of single domains.\n"
    "FORCE_TORCHRUN=1, NPROC_PER_NODE, NNODES, NODE_RANK and USE_RAY=1 work as there."
)
_INIT = (
    "\n\nRecipes: baseline (a recorded run), towards (LESS within a budget), words (BM25), denoise (medium loss),\n"
    "mixture (ODM), curriculum (short rows first). What no flag gives is asked for on a terminal. Files are described\n"
    "in the dataset_info.json beside them. Nothing is replaced; what 'dataflex plan' would refuse is not written."
)
_SCORE = (
    "\n\nDATA is a LLaMA-Factory configuration, with or without a 'dynamic' block, or the names of data sets.\n"
    "METHOD.key=value sets a method's parameter. A run that was killed goes on where it stopped.\n"
    "FORCE_TORCHRUN=1 and NPROC_PER_NODE work as for 'train'; with --engine ray, a cluster's workers share the work."
)
_QUERY = (
    "\n\nDIR is what 'dataflex score --method less --index DIR' wrote. Targets are data sets of dataset_info.json;\n"
    "key=value changes a key that the index was made with, as in dataset_dir=other. A target's gradients, and exact\n"
    "scores of a sample of the rows, are the only passes."
)
_EVAL = (
    "\n\nMODEL is a model's folder or hub id, an adapter's folder, or a LLaMA-Factory configuration that names one of\n"
    'them. FILE holds a question a line: {"question": ..., "choices": [...], "answer": 0, "subject": ...}; a .csv is\n'
    "a table of MMLU's. FORCE_TORCHRUN=1 and NPROC_PER_NODE work as for 'train'."
)
_COMPARE = (
    "\n\nSUITE is a YAML file: a base configuration, arms that change keys of it, seeds, steps, evaluations, and\n"
    "claims fixed beforehand (docs/compare.md). A suite that was killed goes on; finished runs are not repeated."
)
_AUDIT = (
    "\n\nSUITE is a YAML file: a base configuration, targets, scores, and up to three experiments: random subsets,\n"
    "rows left out alone, and the top rows left out (docs/compare.md). An audit that was killed goes on."
)
_ROWS = (
    "\n\nCOND compares columns of the table (docs/report.md): 'domain == \"code\" and (score > 2 or weight < 0.1)';\n"
    "'\"gcd\" in id' looks into texts, 'rank == None' finds missing values. Exported rows are the lines of their\n"
    "files, byte for byte, beside their provenance and an entry for dataset_info.json."
)
_WEBUI = (
    "\n\nWrite the block into 'Extra arguments' of the Train tab, such as\n"
    '{"optim": "adamw_torch", "dynamic": {"selector": "loss", "interval_steps": 50}}. Other tabs are stock.\n'
    "GRADIO_SERVER_NAME, GRADIO_SERVER_PORT and GRADIO_SHARE work as there."
)
_SELECT = (
    "\n\nRows are written byte for byte, in the format of their file, beside their provenance and an entry\n"
    "for dataset_info.json. key=value sets a parameter of the rule."
)


def _add_report(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    told = "the output_dir of a run; the first one is told of, the others are what it is compared with"
    add("run_dirs", type=Path, nargs="+", metavar="RUN", help=told)
    add("--out", type=Path, default=None, help="folder for all files (default: inside the first RUN)")
    told = "renew the page while the first RUN goes on, until it has ended or Ctrl-C"
    add("--watch", dest="watched", action="store_true", help=told)
    told = "renew the page until Ctrl-C, and serve it to browsers on this machine"
    add("--serve", dest="served", action="store_true", help=told)
    add("--port", type=int, help="port to serve at (default: 8765; 0: any that is free)")
    add("--host", metavar="ADDRESS", help="loopback address to serve at (default: 127.0.0.1)")


def _add_methods(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("name", nargs="?", help="a method, such as loss or selector/loss, or a kind: selector")
    add("--family", metavar="KIND", help="only those of a kind: selector, mixer, orderer or weighter")
    add("--stage", metavar="STAGE", help="only those that work in a stage: pt, sft, rm, dpo or kto")
    told = "only those that need all of these: targets, domains, reference, columns, gradients, ...; nothing"
    add("--needs", metavar="WHAT[,WHAT]", help=told)


def _add_init(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("name", nargs="?", metavar="METHOD", help="a method, or a recipe: the list is above")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="keys over what is written, such as learning_rate=1.0e-5")
    add(
        "--data",
        nargs="+",
        metavar="FILE",
        help="files to train on (.jsonl, .json, .csv, .parquet), or data sets' names",
    )
    add("--targets", nargs="+", metavar="FILE", help="files or data sets to select towards")
    add("--model", metavar="MODEL", help="a folder or a hub id")
    add("--out", type=Path, metavar="FILE", help="file to write (default: METHOD.yaml beside the data)")
    add("--stage", choices=("pt", "sft", "rm", "dpo", "kto"), help="default: as the columns of the data say")
    add("--template", default="default", metavar="NAME", help="the model's chat template in LLaMA-Factory's list")
    add("--domains", metavar="COLUMN", help="column that names a row's domain (default: each data set is one)")
    add("--dataset-dir", type=Path, metavar="DIR", help="folder of dataset_info.json (default: that of the first file)")
    add("--full", action="store_true", help="train all parameters instead of an adapter")


def _add_completion(command: argparse.ArgumentParser, parser: argparse.ArgumentParser) -> None:
    command.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="SHELL", help="bash, zsh or fish")

    def handle(options: argparse.Namespace) -> str:
        from dataflex.commands.completion import completion

        return completion(options.shell, parser)

    command.set_defaults(handler=handle)


def _add_plan(command: argparse.ArgumentParser) -> None:
    told = "tokens that all ranks together train on in a second: also print hours"
    command.add_argument("--tokens-per-second", type=_above_zero, metavar="N", help=told)
    _add_config(command)


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return number


def _add_score(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("data", metavar="DATA", help="a .yaml, .yml or .json configuration, or names of data sets")
    add("--method", dest="methods", required=True, metavar="NAME[,NAME]", help="selectors (see 'dataflex methods')")
    add("--out", type=Path, metavar="FILE", help="parquet file to write")
    add("--index", type=Path, metavar="DIR", help="write the rows' sketched gradients instead, for 'dataflex query'")
    add("--precision", metavar="KIND", help="how an index keeps a row: int8 (default) or fp16")
    add("--targets", metavar="NAME[,NAME]", help="data sets for the methods that need targets")
    add("--budget", type=int, metavar="ROWS", help="rows that a method is asked for (default: all)")
    add("--store", metavar="DIR", help="keep finished passes here (default: beside FILE, removed)")
    add("--engine", choices=("ranks", "ray"), default="ranks", help="what shares the work: ranks (default) or Ray")
    add("--workers", type=int, metavar="N", help="with --engine ray, by default one per GPU, else per node")
    _add_overrides(command, "overrides")


def _add_query(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("index", type=Path, metavar="DIR", help="a folder that 'dataflex score --index' wrote")
    add("--target", dest="targets", required=True, nargs="+", metavar="NAME", help="data sets, one target each")
    add("--out", required=True, type=Path, metavar="FILE", help="parquet file to write")
    add("--sample", type=int, metavar="ROWS", help="rows that exact scores are compared on (default: 128; 0: none)")
    told = "whiten gradients, the target's own rows weighing this much, such as 0.9 (TrackStar)"
    add("--whiten", type=float, metavar="WEIGHT", help=told)
    told = "new folder for the projected gradients of rows and targets, in files that bergson reads"
    add("--bergson", type=Path, metavar="FOLDER", help=told)
    _add_overrides(command, "overrides")


def _add_select(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("scores", type=Path, metavar="SCORES", help="a file that 'dataflex score' wrote")
    add("--score", dest="column", metavar="COLUMN", help="column to select by (default: the only method's)")
    add("--budget", required=True, metavar="AMOUNT", help="a share (0.1), rows (500) or tokens (200000tokens)")
    add("--rule", default="top_k", metavar="NAME", help="subset rule (default: top_k)")
    add("--prefer", choices=("high", "low"), help="which scores are good (default: high, ranks: low)")
    add("--order", choices=("source", "preference"), default="source", help="order of the rows written")
    add("--seed", type=int, default=0, help="seed of rules that draw (default: 0)")
    near = "leave out rows that are this similar to a preferred one, such as 0.8 (extra dedup)"
    add("--near-duplicates", type=float, metavar="SHARE", help=near)
    told = "file to write; without an ending, a folder with a file for each data set"
    add("--out", required=True, type=Path, metavar="FILE", help=told)
    add("--overwrite", action="store_true", help="replace what no earlier subset wrote")
    _add_overrides(command, "parameters of the rule")


def _add_eval(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", metavar="MODEL", help="folder or hub id of a model, folder of an adapter, or a configuration")
    add("--data", metavar="NAME[,NAME]", help="held-out data sets (default: eval_dataset of a configuration)")
    add("--choices", metavar="FILE[,FILE]", help="files of questions with choices, one of them right")
    add("--length", default="mean", metavar="KIND", help="choices are compared by the mean (default) or sum of tokens")
    add("--answers", metavar="FILE[,FILE]", help="files of questions with an answer, which is generated and compared")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="longest generated answer (default: 256)")
    add("--after", default="", metavar="TEXT", help="compare what follows the last TEXT of an answer, such as '####'")
    add("--mix", metavar="NAME=SHARE,...", help="also the loss under these shares of domains")
    add("--tasks", metavar="FILE[,FILE]", help="task files of lm-eval (extra lm-eval)")
    add("--out", type=Path, metavar="FILE", help="also write the JSON here")
    _add_overrides(command, "LLaMA-Factory's keys, such as template=llama3 or dataset_dir=data")


def _add_compare(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("suite", type=Path, metavar="SUITE", help="a .yaml, .yml or .json file")
    add("--jobs", type=int, default=1, metavar="N", help="runs that are trained at once (default: 1)")
    add("--commands", action="store_true", help="print the commands that are left, and train nothing")
    _add_overrides(command, "keys of the suite")


def _add_rows(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("run_dir", type=Path, metavar="RUN", help="the output_dir of a run")
    group = command.add_mutually_exclusive_group()
    for name, told in (
        ("most", "rows served most often first (default)"),
        ("never", "rows that were never served"),
        ("near-cut", "rows just above and below the cut of their latest decision"),
        ("heaviest", "rows of the largest mean weight"),
        ("lightest", "rows of the smallest mean weight"),
    ):
        group.add_argument(f"--{name}", dest="by", action="store_const", const=name, help=told)
    add("--where", metavar="COND", help="only rows that fulfil a condition on columns")
    add("--limit", type=int, metavar="N", help="most rows (default: 20 printed, all exported)")
    add("--text", action="store_true", help="print each row's text, read from its file")
    told = "write the rows, in the format of their file, instead; without an ending, a folder with a file for each set"
    add("--export", type=Path, metavar="FILE", help=told)
    add("--overwrite", action="store_true", help="replace what no earlier export wrote")


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", type=Path, metavar="CONFIG", help="a .yaml, .yml or .json file")
    _add_overrides(command, "overrides, nested keys with dots: dynamic.interval_steps=20")


def _add_overrides(command: argparse.ArgumentParser, told: str) -> None:
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=told)


def _write(text: str) -> None:
    text = shown(text, sys.stdout)
    write(text if text.endswith("\n") else text + "\n")


if __name__ == "__main__":
    sys.exit(main())
