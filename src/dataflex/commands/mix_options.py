"""The options of ``dataflex mix``: one step each, with an example. Imports argparse only."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

__all__ = ["MIX_STEPS", "add_mix_steps"]

MIX_STEPS = {
    "doremi": (
        "Train a reference, a proxy and the final model with the proportions that the proxy found (DoReMi).",
        "dataflex mix doremi run.yaml --small small.yaml --out runs/doremi",
    ),
    "swarm": (
        "Write the configurations of many small runs with mixtures drawn around the natural one, and run them.",
        "dataflex mix swarm run.yaml --runs 24 --out swarm --run",
    ),
    "fit": (
        "Fit held-out losses to mixtures, and say how well unseen mixtures are ordered.",
        "dataflex mix fit swarm --method log_linear",
    ),
    "propose": (
        "Write the proportions with the lowest predicted loss, near the natural mix and under caps.",
        "dataflex mix propose swarm --budget 2000000 --max-epochs 4 --out mixture.json",
    ),
    "mixmin": (
        "Weigh domains by how well their proxies together explain a target (one proxy per domain).",
        "dataflex mix mixmin --models web=runs/web,code=runs/code --target goal.jsonl --out mixture.json",
    ),
    "chameleon": (
        "Weigh domains by their embeddings alone (leverage scores), in minutes.",
        "dataflex mix chameleon --model runs/small --domains web=web.jsonl,code=code.jsonl --out mixture.json",
    ),
}
"""Name of a step -> what it does, and an example."""

_USE = "\n\nThe file it writes is taken by 'mixer: {name: static, from: FILE}'."


def add_mix_steps(command: argparse.ArgumentParser, handler: Callable[[argparse.Namespace], str | int]) -> None:
    """Add the steps below ``dataflex mix``; each calls ``handler`` with ``options.step`` set to its name."""
    steps = command.add_subparsers(dest="step", metavar="STEP")
    parsers = {}
    for name, (told, example) in MIX_STEPS.items():
        more = _USE if name in ("doremi", "propose", "mixmin", "chameleon") else ""
        parsers[name] = steps.add_parser(name, help=told, description=told + more, epilog=f"example:\n  {example}")
        parsers[name].set_defaults(handler=handler)
    _doremi(parsers["doremi"])
    _swarm(parsers["swarm"])
    _fit(parsers["fit"])
    _propose(parsers["propose"])
    _mixmin(parsers["mixmin"])
    _chameleon(parsers["chameleon"])
    command.epilog = "examples:\n" + "\n".join(f"  {example}" for _, example in MIX_STEPS.values())


def _doremi(step: argparse.ArgumentParser) -> None:
    told = "configuration of the final run; 'mixer: {name: doremi, ...}' in it holds the proxy's parameters"
    step.add_argument("config", type=Path, metavar="CONFIG", help=told)
    step.add_argument("--small", type=Path, metavar="FILE", help="keys that differ in the reference and proxy runs")
    step.add_argument("--out", type=Path, metavar="DIR", help="folder of all runs (default: CONFIG's output_dir)")
    step.add_argument("--reference", metavar="FOLDER", help="a reference model that is there already (first round)")
    step.add_argument(
        "--reference-mix",
        default="size",
        metavar="WHAT",
        help="what the first reference is trained on: size (default), uniform, or a proportions file",
    )
    step.add_argument("--rounds", type=int, default=1, metavar="N", help="rounds at most (default: 1)")
    parts = ("reference", "proxy", "proportions", "final")
    step.add_argument("--step", dest="part", choices=parts, help="this step alone (default: all that are not done)")
    step.add_argument("--round", dest="number", type=int, metavar="N", help="round of that step (default: 1)")
    step.add_argument("--write", action="store_true", help="only write the configurations, for another machine to run")
    _overrides(step)


def _swarm(step: argparse.ArgumentParser) -> None:
    step.add_argument("config", type=Path, metavar="CONFIG", help="configuration of a small run; its mixer is replaced")
    step.add_argument("--runs", type=int, required=True, metavar="N", help="mixtures; 3 (domains + 1) or more")
    step.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for configurations and runs")
    step.add_argument("--run", action="store_true", help="run them here, one after another; finished ones are skipped")
    step.add_argument(
        "--natural", metavar="WHAT", help="rows, bytes, a run's folder, a proportions file or web=9,code=1"
    )
    step.add_argument("--style", choices=("olmix", "regmix"), default="olmix", help="whose settings (default: olmix)")
    step.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    step.add_argument("--strengths", metavar="LEAST,MOST,COUNT", help="concentrations (default: 0.1,5,15)")
    step.add_argument("--prior-power", type=float, metavar="P", help="prior ~ natural share^P (olmix: 1, regmix: 0.5)")
    step.add_argument("--max-ratio", type=float, metavar="X", help="most times the natural share (regmix: 15)")
    step.add_argument("--min-weight", type=float, metavar="W", help="shares below it become 0 (default: 0.0002)")
    step.add_argument("--round", type=float, metavar="W", help="shares are multiples of it (default: 0.0002)")
    _overrides(step)


def _fit(step: argparse.ArgumentParser) -> None:
    step.add_argument("folder", type=Path, metavar="DIR", help="folder of a swarm, or one with a ratios.csv")
    step.add_argument("--method", choices=("log_linear", "mixing_law", "lightgbm"), default="log_linear")
    step.add_argument("--metrics", type=Path, metavar="CSV", help="losses: a column 'run' and one per task")
    step.add_argument("--tasks", metavar="NAME[,NAME]", help="held-out sets to fit (default: all)")
    step.add_argument("--without", metavar="RUN[,RUN]", help="runs to leave out")
    step.add_argument("--folds", type=int, default=10, help="folds of the cross-validation; 0: leave one out")
    step.add_argument("--seed", type=int, default=0, help="seed of starts, trees and folds (default: 0)")


def _propose(step: argparse.ArgumentParser) -> None:
    step.add_argument("folder", type=Path, metavar="DIR", help="folder with a fit.json")
    step.add_argument("--kl", type=float, metavar="L", help="weight of staying near the natural mix (default: 0.05)")
    step.add_argument("--budget", type=float, metavar="R", help="what the large run uses, in the unit of the sizes")
    step.add_argument("--max-epochs", type=float, metavar="N", help="most epochs over any domain within --budget (4)")
    step.add_argument("--cap", metavar="NAME=SHARE,...", help="largest shares of single domains")
    step.add_argument("--tasks", metavar="NAME[,NAME]", help="held-out sets whose mean loss is lowered (default: all)")
    step.add_argument("--natural", metavar="WHAT", help="sizes, for a folder without swarm.json (see 'mix swarm')")
    step.add_argument("--seed", type=int, default=0, help="seed of the search among mixtures (lightgbm)")
    _out(step, "DIR/proportions.json")


def _mixmin(step: argparse.ArgumentParser) -> None:
    step.add_argument("--models", metavar="NAME=FOLDER,...", help="one proxy model per domain")
    step.add_argument("--target", type=Path, metavar="FILE", help="target texts: .jsonl, .json or .txt")
    step.add_argument("--column", default="text", metavar="KEY[,KEY]", help="keys of a row to join (default: text)")
    step.add_argument("--piece-tokens", type=int, default=64, metavar="N", help="texts are cut to this (default: 64)")
    step.add_argument("--most-texts", type=int, default=2048, metavar="N", help="texts drawn at most (default: 2048)")
    step.add_argument("--matrix", type=Path, metavar="FILE", help=".npz or .csv of log-likelihoods, instead of models")
    step.add_argument("--save-matrix", type=Path, metavar="FILE", help="keep the log-likelihoods (.npz)")
    step.add_argument("--rate", type=float, default=1.0, help="step size (default: 1)")
    step.add_argument("--steps", type=int, default=100, help="steps at most (default: 100)")
    step.add_argument("--test-share", type=float, default=0.2, help="share of pieces to test on (default: 0.2)")
    step.add_argument("--seed", type=int, default=0, help="seed of that split (default: 0)")
    _out(step, None)


def _chameleon(step: argparse.ArgumentParser) -> None:
    step.add_argument("--model", metavar="FOLDER", help="model that embeds the texts")
    step.add_argument("--domains", metavar="NAME=FILE,...", help="texts of each domain: .jsonl, .json or .txt")
    step.add_argument("--column", default="text", metavar="KEY[,KEY]", help="keys of a row to join (default: text)")
    step.add_argument("--samples", type=int, default=2048, metavar="N", help="texts per domain (default: 2048)")
    step.add_argument("--tokens", type=int, default=512, metavar="N", help="tokens of each text (default: 512)")
    step.add_argument("--embeddings", type=Path, metavar="NPZ", help="one array per domain, instead of a model")
    step.add_argument("--save-embeddings", type=Path, metavar="NPZ", help="keep the domains' mean embeddings")
    step.add_argument("--purpose", choices=("pretraining", "finetuning"), default="pretraining")
    step.add_argument("--ridge", type=float, default=10.0, help="lambda of the leverage scores (default: 10)")
    step.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    _out(step, None)


def _out(step: argparse.ArgumentParser, default: str | None) -> None:
    told = "proportions file to write" + (f" (default: {default})" if default else "")
    step.add_argument("--out", type=Path, required=default is None, metavar="FILE", help=told)


def _overrides(step: argparse.ArgumentParser) -> None:
    step.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="overrides of the configuration")
