"""Every command of the pages is run, or checked by what comes before its work, or named here with who runs it.

The pages' commands lie in one folder where ``examples/`` is the repository's and ``mine.yaml`` the README's own
configuration. Training commands are planned here; those of the README are run in ``tests/integration``.
"""

from __future__ import annotations

import json
import re
import shlex

import numpy as np
import pytest
import yaml

from dataflex.cli import _parser, main
from dataflex.commands.plan import plan
from dataflex.config.args import data_set_names
from dataflex.config.files import FileRecord
from dataflex.config.mappings import key_of
from dataflex.llamafactory.launch import torchrun_command
from dataflex.offline.request import score_request
from dataflex.record.chosen import write_rows
from dataflex.registry import KINDS, find, names
from dataflex.score_table import ScoreTable, write_scores
from tests.config.keys import user_keys
from tests.docs.pages import EXAMPLES, ROOT, TEXTS, blocks
from tests.record.synthetic import SELECTION, simulate, space_of

EVAL = "tests/offline/test_eval.py"
SWARM = "tests/mixing/test_mix_commands.py"
REUSE = "tests/mixing/test_reuse.py"
SCALE = "tests/examples/test_scale.py"
OF_DOREMI = [f"doremi_{step}" for step in ("1_reference", "2_proxy", "3_final_6b")]
ELSEWHERE = {
    **{
        f"train examples/scale/{name}.yaml": SCALE
        for name in ("mistral_7b_less", "llama_3b_less", "qwen_6b_odm", "qwen_30b_odm", *OF_DOREMI)
    },
    **{
        f"plan examples/scale/{name}.yaml model_name_or_path=examples/scale/models/{model} use_cpu=true": SCALE
        for name, model in (("mistral_7b_less", "Mistral-7B-v0.1"), ("llama_3b_less", "Llama-3.2-3B"))
    },
    "init towards --data my/pool.jsonl --targets my/goal.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --template qwen": (
        "tests/cli/test_init.py"
    ),
    "webui": "tests/llamafactory/test_board.py",
    "report runs/hf": "tests/huggingface/test_wrap.py",
    "query runs/offline/index --target gsm8k_valid general_valid --out runs/offline/query.parquet": (
        "tests/offline/test_index.py"
    ),
    'rows runs/demo/dynamic --where chosen and domain != "noise_gsm8k" --export runs/demo/clean.jsonl': (
        "tests/cli/test_rows.py"
    ),
    "eval examples/models/base-4m --data gsm8k_test,general_valid --choices runs/offline/choices.jsonl --mix "
    "gsm8k_test=3,general_valid=1 --out runs/offline/base.json dataset_dir=examples/data template=default": EVAL,
    "eval runs/offline/adapter --data gsm8k_test --choices runs/offline/choices.jsonl dataset_dir=examples/data "
    "template=default": EVAL,
    "eval examples/demo_static.yaml adapter_name_or_path=runs/offline/adapter": EVAL,
    "mix swarm small.yaml --runs 24 --out swarm --run": "tests/mixing/test_real_swarm.py",
    "mix fit swarm": SWARM,
    "mix propose swarm --budget 2000000 --max-epochs 4 --out mixture.json": SWARM,
    "mix swarm small.yaml --runs 9 --reuse old.json --changed math --out swarm --run": REUSE,
    "mix propose swarm --cap kept=0.8 --out shares.json": SWARM,
    "mix reuse old.json --shares shares.json --out mixture.json": REUSE,
    "mix climb small.yaml --runs 64,32,16 --out climb": "tests/mixing/test_climb.py",
    "mix climb small.yaml --runs 64,32,16 --out climb --run": "tests/mixing/test_real_swarm.py",
    "mix msft examples/mix_msft.yaml --out runs/msft": "tests/mixing/test_msft.py",
    "mix doremi run.yaml --small small.yaml --out runs/doremi": "tests/integration/test_mix_doremi.py",
    "mix mixmin --models web=runs/web,code=runs/code --target goal.jsonl --out mixture.json": (
        "tests/mixing/test_real_swarm.py"
    ),
    "mix chameleon --model runs/small --domains web=web.jsonl,code=code.jsonl --out mixture.json": (
        "tests/mixing/test_real_swarm.py"
    ),
}
"""Commands that only work on the models and runs of a reader's own, and the file of tests that runs their like."""

RUN = ("report", "rows", "methods", "plan", "select", "mix", "version", "schema", "completion")
"""Commands that are run here as they are."""


def shown():
    """Page, environment and words of every line in the bash blocks of the pages."""
    found = []
    for page, code in blocks("bash"):
        for text in code.splitlines():
            words, environment = shlex.split(text, comments=True), {}
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                name, _, value = words.pop(0).partition("=")
                environment[name] = value
            if words:
                found.append((page, environment, words))
    return found


SHOWN = shown()
OURS = [pytest.param(*each, id=f"{each[0]}: {' '.join(each[2])[:70]}") for each in SHOWN if each[2][0] == "dataflex"]


def readme_configuration():
    """The README's first YAML block, which its commands call mine.yaml."""
    (code,) = [code for page, code in blocks("yaml") if page == "README.md" and "model_name_or_path" in code]
    return code


def scores(path, columns):
    """Write a table of scores of the examples' pool, as ``dataflex score`` would."""
    file = EXAMPLES / "data" / "pool.jsonl"
    rows = len(file.read_text(encoding="utf-8").splitlines())
    entry = json.loads((EXAMPLES / "data" / "dataset_info.json").read_text())["pool"]
    source = {"name": "pool", "rows": rows, "rows_read": rows, "entry": entry, "files": [vars(FileRecord.of(file))]}
    rng = np.random.default_rng(0)
    table = ScoreTable(
        datasets=("pool",),
        dataset_of=np.zeros(rows, dtype=np.int64),
        domains=("pool",),
        domain_of=np.zeros(rows, dtype=np.int64),
        position=np.arange(rows),
        tokens=np.full(rows, 50),
        supervised_tokens=np.full(rows, 20),
        columns={
            name: rng.permutation(rows).astype(np.float64) if name.endswith(".rank") else rng.normal(size=rows)
            for name in columns
        },
        provenance={
            "methods": [{"name": name} for name in dict.fromkeys(column.split(".")[0] for column in columns)],
            "data": {"sources": [source]},
            "config": {},
        },
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_scores(path, table)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    for name in ("examples", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    text = readme_configuration()
    for name in ("mine.yaml", "run.yaml"):
        (folder / name).write_text(text, encoding="utf-8")
    stock = {key: value for key, value in yaml.safe_load(text).items() if key != "dynamic"}
    (folder / "clean.yaml").write_text(yaml.safe_dump({**stock, "output_dir": "runs/clean"}))
    small = {**stock, "dataset": "pool,weighted", "eval_dataset": "gsm8k_valid", "output_dir": "runs/small"}
    (folder / "small.yaml").write_text(yaml.safe_dump(small))
    for run in ("mine", "demo/dynamic", "demo/plain", "select_loss"):
        simulate(folder / "runs" / run / "dataflex", **SELECTION)
        write_rows(folder / "runs" / run / "dataflex", space_of(SELECTION["sources"]))
    scores(folder / "runs/offline/scores.parquet", ["less", "rds_plus", "rds_plus.rank"])
    scores(folder / "runs/offline/query.parquet", ["less"])
    scores(folder / "runs/offline/loss.parquet", ["loss"])
    scores(folder / "runs/offline/spread.parquet", ["compose.rank"])
    draw = np.random.default_rng(0)
    likelihoods = -50.0 - 10.0 * draw.random((40, 2))
    np.savez(folder / "loglik.npz", names=["web", "code"], log_likelihoods=likelihoods, lengths=np.full(40, 20.0))
    np.savez(folder / "domains.npz", **{name: draw.normal(size=(20, 8)) for name in ("web", "code", "math")})
    # What a command of a page reads that an earlier one of the page wrote while training or scoring.
    for checkpoint in (folder / "runs/offline/train/checkpoint-4", folder / "runs/mine/checkpoint-40"):
        checkpoint.mkdir(parents=True)
        for name in ("trainer_state.json", "config.json", "optimizer.pt"):
            (checkpoint / name).write_text('{"global_step": 4}')
    return folder


@pytest.fixture
def reader(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("page", "environment", "words"), OURS)
def test_a_command_of_ours_works(page, environment, words, reader, monkeypatch, capsys):
    rest = words[1:]
    command, text = rest[0], " ".join(rest)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if text in ELSEWHERE:
        _parser().parse_args(rest)
        assert (ROOT / ELSEWHERE[text]).is_file()
        return
    if command == "train":
        config, *overrides = rest[1:]
        for name in ("FORCE_TORCHRUN", "NPROC_PER_NODE", "NNODES"):  # what the launcher is told is looked at below
            monkeypatch.delenv(name, raising=False)
        assert "Schedule" in plan(reader / config, overrides)
        if environment.get("FORCE_TORCHRUN"):
            told = torchrun_command(rest[1:], environment, devices=1, free_port=1)
            for name, option in (("NPROC_PER_NODE", "--nproc-per-node"), ("NNODES", "--nnodes")):
                if name in environment:
                    assert told[told.index(option) + 1] == environment[name]
        else:
            assert set(environment) <= {"USE_RAY"}
        return
    if command == "score":
        options = _parser().parse_args(rest)
        request = score_request(
            options.data,
            options.overrides,
            methods=data_set_names(options.methods),
            out=options.out,
            index=options.index,
            precision=options.precision,
            targets=options.targets,
            budget=options.budget,
            store=options.store,
        )
        assert request.config.scorers
        return
    assert command in RUN, f"{page}: 'dataflex {text}' is neither run here nor in ELSEWHERE"
    assert main(rest) == 0, capsys.readouterr().err


def test_commands_of_others_exist():
    for page, _, words in SHOWN:
        program, *rest = words
        if program in ("python", "torchrun"):
            if rest[0] == "-m":
                script = f"{rest[1].replace('.', '/')}/__main__.py"
                after = rest[2:]
            else:
                script = next(word for word in rest if word.endswith(".py"))
                after = rest[rest.index(script) :]
            source = (ROOT / script).read_text(encoding="utf-8")
            for option in (word for word in after if word.startswith("--")):
                assert f'"{option}"' in source or f'"-{option[2:3]}"' in source, f"{page}: {option} of {script}"
        else:
            assert program in ("dataflex", "make", "pip", "pre-commit"), f"{page}: nobody runs {program}"


def test_what_is_run_elsewhere_is_shown_somewhere():
    lines = {" ".join(words[1:]) for _, _, words in SHOWN if words[0] == "dataflex"}
    assert set(ELSEWHERE) <= lines


def test_resumed_checkpoints_of_the_readme_are_written():
    """A checkpoint that a command names is one that the README's configuration saves."""
    settings = yaml.safe_load(readme_configuration())
    named = re.findall(rf"{settings['output_dir']}/checkpoint-(\d+)", TEXTS["README.md"])
    assert named
    for step in map(int, named):
        assert step % settings["save_steps"] == 0
        assert step <= settings["max_steps"]


def test_keys_named_in_the_text_exist():
    params = {kind: {key_of(f) for n in names(kind) for f in _fields(kind, n)} for kind in KINDS}
    known = {f"dynamic.{key}" for key in user_keys()}
    for page, text in TEXTS.items():
        if page == "CHANGELOG.md":
            continue
        for path in re.findall(r"`(?:[^`\n]* )?(dynamic\.[a-z_.]*[a-z_])", text):
            _, key, *below = path.split(".")
            if below and key in KINDS:
                assert below[0] in params[key] | {"name", "targets"}, f"{page}: {path}"
            else:
                assert path in known, f"{page}: {path}"


def _fields(kind, name):
    from dataclasses import fields

    return fields(find(kind, name).Params)
