"""The steps of ``dataflex mix`` and their options; what a step does is in ``dataflex.mixing``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple


def finite(text: str) -> float:
    """Return a finite number; argparse tells what is none."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


finite.__name__ = "number"  # which the message holds


class Step(NamedTuple):
    """A step: what it does, an example, its module in ``dataflex.mixing``, and its options by flag."""

    told: str
    example: str
    module: str
    options: dict[str, dict[str, Any]]


_OVERRIDES = dict(nargs="*", default=[], metavar="key=value", help="overrides of the configuration")
_OUT = dict(type=Path, required=True, metavar="FILE", help="proportions file to write")
_COLUMN = dict(metavar="KEY[,KEY]", help="keys of a row to join (default: text)")
_METHOD = dict(choices=("log_linear", "mixing_law", "lightgbm"), default="log_linear")
_JUDGED: dict[str, dict[str, Any]] = {
    "--without": dict(metavar="RUN[,RUN]", help="runs to leave out"),
    "--folds": dict(type=int, default=10, help="folds of the cross-validation; 0: leave one out"),
}
_DRAWS: dict[str, dict[str, Any]] = {
    "--run": dict(action="store_true", help="run them here, one after another; finished ones are skipped"),
    "--natural": dict(metavar="WHAT", help="rows, bytes, a run's folder, a proportions file or web=9,code=1"),
    "--style": dict(choices=("olmix", "regmix"), default="olmix", help="whose settings (default: olmix)"),
    "--seed": dict(type=int, default=0, help="seed of the draws (default: 0)"),
    "--strengths": dict(metavar="LEAST,MOST,COUNT", help="concentrations (default: 0.1,5,15)"),
    "--prior-power": dict(type=finite, metavar="P", help="prior ~ natural share^P (olmix: 1, regmix: 0.5)"),
    "--max-ratio": dict(type=finite, metavar="X", help="largest multiple of the natural share (regmix: 15)"),
    "--min-weight": dict(type=finite, metavar="W", help="shares below it become 0 (default: 0.0002)"),
    "--round": dict(type=finite, metavar="W", help="shares are multiples of it (default: 0.0002)"),
    "--reuse": dict(
        type=Path, metavar="FILE", help="proportions file whose domains keep their shares among one another"
    ),
    "--changed": dict(metavar="NAME[,NAME]", help="domains of that file that changed (see 'mix reuse')"),
}
_CAPS: dict[str, dict[str, Any]] = {
    "--budget": dict(type=finite, metavar="R", help="what the large run uses, in the unit of the sizes"),
    "--max-epochs": dict(type=finite, metavar="N", help="maximum epochs over a domain within --budget (4)"),
    "--cap": dict(metavar="NAME=SHARE,...", help="largest shares of single domains"),
}

MIX_STEPS = {
    "doremi": Step(
        "Train a reference, a proxy and the final model with the proportions that the proxy found (DoReMi).",
        "dataflex mix doremi run.yaml --small small.yaml --out runs/doremi",
        "doremi",
        {
            "config": dict(type=Path, metavar="CONFIG", help="of the final run; its mixer (doremi) is the proxy's"),
            "--small": dict(type=Path, metavar="FILE", help="keys that differ in the reference and proxy runs"),
            "--out": dict(type=Path, metavar="DIR", help="folder of all runs (default: CONFIG's output_dir)"),
            "--reference": dict(metavar="FOLDER", help="an existing reference model for the first round"),
            "--reference-mix": dict(
                default="size",
                metavar="WHAT",
                help="what the first reference is trained on: size (default), uniform, or a proportions file",
            ),
            "--rounds": dict(type=int, default=1, metavar="N", help="maximum number of rounds (default: 1)"),
            "--step": dict(
                dest="part",
                choices=("reference", "proxy", "proportions", "final"),
                help="this step alone (default: all that are not done)",
            ),
            "--round": dict(dest="number", type=int, metavar="N", help="round of that step (default: 1)"),
            "--write": dict(action="store_true", help="only write the configurations, for another machine to run"),
            "overrides": _OVERRIDES,
        },
    ),
    "msft": Step(
        "Train in stages; after each, roll back to where the first domain was best and go on without it (mSFT).",
        "dataflex mix msft run.yaml --out runs/msft",
        "msft",
        {
            "config": dict(type=Path, metavar="CONFIG", help="of a stage of max_steps, evaluated every eval_steps"),
            "--out": dict(type=Path, metavar="DIR", help="folder of all stages (default: CONFIG's output_dir)"),
            "--stages": dict(type=int, default=10, metavar="N", help="maximum number of stages (default: 10)"),
            "--natural": dict(metavar="WHAT", help="sizes of the domains without a static mixer (see 'mix swarm')"),
            "overrides": _OVERRIDES,
        },
    ),
    "swarm": Step(
        "Write the configurations of many small runs with mixtures drawn around the natural one, and run them.",
        "dataflex mix swarm run.yaml --runs 24 --out swarm --run",
        "swarm",
        {
            "config": dict(type=Path, metavar="CONFIG", help="configuration of a small run; its mixer is replaced"),
            "--runs": dict(type=int, required=True, metavar="N", help="mixtures; 3 (domains + 1) or more"),
            "--out": dict(type=Path, required=True, metavar="DIR", help="folder for configurations and runs"),
            **_DRAWS,
            "overrides": _OVERRIDES,
        },
    ),
    "fit": Step(
        "Fit held-out losses to mixtures, and say how well unseen mixtures are ordered.",
        "dataflex mix fit swarm --method log_linear",
        "fit",
        {
            "folder": dict(type=Path, metavar="DIR", help="folder of a swarm, or one with a ratios.csv"),
            "--method": _METHOD,
            "--metrics": dict(type=Path, metavar="CSV", help="losses: a column 'run' and one per task"),
            "--tasks": dict(metavar="NAME[,NAME]", help="held-out sets to fit (default: all)"),
            **_JUDGED,
            "--seed": dict(type=int, default=0, help="seed of starts, trees and folds (default: 0)"),
        },
    ),
    "propose": Step(
        "Write the proportions with the lowest predicted loss, near the natural mix and under caps.",
        "dataflex mix propose swarm --budget 2000000 --max-epochs 4 --out mixture.json",
        "propose",
        {
            "folder": dict(type=Path, metavar="DIR", help="folder with a fit.json"),
            "--kl": dict(type=finite, metavar="L", help="weight of staying near the natural mix (default: 0.05)"),
            **_CAPS,
            "--tasks": dict(metavar="NAME[,NAME]", help="held-out sets whose mean loss is lowered (default: all)"),
            "--natural": dict(metavar="WHAT", help="sizes, for a folder without swarm.json (see 'mix swarm')"),
            "--seed": dict(type=int, default=0, help="seed of the search among mixtures (lightgbm)"),
            "--out": dict(type=Path, metavar="FILE", help="proportions file to write (default: DIR/proportions.json)"),
        },
    ),
    "climb": Step(
        "Search in rounds: each trains mixtures that a fit to all runs so far predicts to be best (CLIMB).",
        "dataflex mix climb run.yaml --runs 64,32,16 --out climb --run",
        "climb",
        {
            "config": dict(type=Path, metavar="CONFIG", help="configuration of a small run; its mixer is replaced"),
            "--runs": dict(default="64,32,16", metavar="N,N,...", help="runs of each round (default: 64,32,16)"),
            "--top": dict(type=int, default=5000, metavar="N", help="best of 100,000 to draw from (default: 5000)"),
            "--out": dict(type=Path, required=True, metavar="DIR", help="folder for configurations and runs"),
            "--method": _METHOD,
            "--tasks": dict(metavar="NAME[,NAME]", help="held-out sets whose mean loss is lowered (default: all)"),
            **_JUDGED,
            **_CAPS,
            **_DRAWS,
            "overrides": _OVERRIDES,
        },
    ),
    "reuse": Step(
        "Carry proportions over to domains of which some changed; the others keep their relative shares.",
        "dataflex mix reuse old.json --shares kept=0.7,math=0.3 --out mixture.json",
        "reuse",
        {
            "old": dict(type=Path, metavar="FILE", help="proportions file of the domains before"),
            "--shares": dict(
                metavar="WHAT",
                help="shares of 'kept' and of each changed domain: kept=0.7,math=0.3, or the file of a proposal",
            ),
            "--keep": dict(metavar="NAME[,NAME]", help="domains that are kept (default: all that did not change)"),
            "--natural": dict(metavar="WHAT", help="sizes by name, or a run's folder, for --budget"),
            "--budget": _CAPS["--budget"],
            "--max-epochs": _CAPS["--max-epochs"],
            "--out": _OUT,
        },
    ),
    "mixmin": Step(
        "Weigh domains by how well their proxies together explain a target (one proxy per domain).",
        "dataflex mix mixmin --models web=runs/web,code=runs/code --target goal.jsonl --out mixture.json",
        "models",
        {
            "--models": dict(metavar="NAME=FOLDER,...", help="one proxy model per domain"),
            "--target": dict(type=Path, metavar="FILE", help="target texts: .jsonl, .json or .txt"),
            "--column": _COLUMN,
            "--piece-tokens": dict(type=int, metavar="N", help="texts are cut to this (default: 64)"),
            "--most-texts": dict(type=int, metavar="N", help="number of texts drawn (default: 2048)"),
            "--matrix": dict(type=Path, metavar="FILE", help=".npz or .csv of log-likelihoods, instead of models"),
            "--save-matrix": dict(type=Path, metavar="FILE", help="keep the log-likelihoods (.npz)"),
            "--rate": dict(type=finite, default=1.0, help="step size (default: 1)"),
            "--steps": dict(type=int, default=100, help="maximum number of steps (default: 100)"),
            "--test-share": dict(type=finite, default=0.2, help="share of pieces to test on (default: 0.2)"),
            "--seed": dict(type=int, default=0, help="seed of that split (default: 0)"),
            "--out": _OUT,
        },
    ),
    "chameleon": Step(
        "Weigh domains by their embeddings alone (leverage scores), in minutes.",
        "dataflex mix chameleon --model runs/small --domains web=web.jsonl,code=code.jsonl --out mixture.json",
        "models",
        {
            "--model": dict(metavar="FOLDER", help="model that embeds the texts"),
            "--domains": dict(metavar="NAME=FILE,...", help="texts of each domain: .jsonl, .json or .txt"),
            "--column": _COLUMN,
            "--samples": dict(type=int, metavar="N", help="texts per domain (default: 2048)"),
            "--tokens": dict(type=int, metavar="N", help="tokens of each text (default: 512)"),
            "--embeddings": dict(type=Path, metavar="NPZ", help="one array per domain, instead of a model"),
            "--save-embeddings": dict(type=Path, metavar="NPZ", help="keep the domains' mean embeddings"),
            "--purpose": dict(choices=("pretraining", "finetuning"), default="pretraining"),
            "--ridge": dict(type=finite, default=10.0, help="lambda of the leverage scores (default: 10)"),
            "--seed": dict(type=int, default=0, help="seed of the samples (default: 0)"),
            "--out": _OUT,
        },
    ),
}

_USE = "\n\nThe file it writes is taken by 'mixer: {name: static, from: FILE}'."


def mix(options: argparse.Namespace) -> str | int:
    """Run one step and return what to print, or an exit code where runs have printed already."""
    module = import_module(f"dataflex.mixing.{MIX_STEPS[options.step].module}")
    step: Callable[[argparse.Namespace], str | int] = getattr(module, f"{options.step}_step")
    return step(options)


def add_mix_steps(command: argparse.ArgumentParser, handler: Callable[[argparse.Namespace], str | int]) -> None:
    """Add the steps below ``dataflex mix``; each calls ``handler`` with ``options.step`` set to its name."""
    steps = command.add_subparsers(dest="step", metavar="STEP")
    for name, step in MIX_STEPS.items():
        more = _USE if name not in ("msft", "swarm", "fit") else ""
        parser = steps.add_parser(
            name, help=step.told, description=step.told + more, epilog=f"example:\n  {step.example}"
        )
        parser.set_defaults(handler=handler)
        parser.add_argument("--json", dest="as_json", action="store_true", help="print JSON (docs/json.md)")
        for flag, settings in step.options.items():
            parser.add_argument(flag, **settings)
    command.epilog = "examples:\n" + "\n".join(f"  {step.example}" for step in MIX_STEPS.values())
