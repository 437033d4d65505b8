"""Writes the pools of the suites, from examples/data and fixed seeds: the same bytes in every call.

s1   planted: 20 % relevant rows (GSM8K), 30 % GSM8K questions with the answers of others, 50 % of other sources
s3   words do not tell: 20 % relevant, 30 % GSM8K with the words of each line of the answer shuffled, 50 % others
m1   four real domains and two of junk: 40 % random hexadecimal digits, 20 % of one boilerplate
m3   seven domains of equal size
w1   instructions of which 30 % have the answer of another row of their source; the right ones alone; clean ones beside

Questions with four choices, of rows of GSM8K that nothing is trained on, lie beside them, and beside the folder the
shape of a small model with the tokenizer of base-4m, which the suites of mixtures train from scratch. By hand: python
evidence/data.py [FOLDER]
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
OUT = Path("runs/evidence/data")
ROWS = 600  # of s1 and s3
REAL = {
    "gsm8k": ("gsm8k",),
    "alpaca": ("alpaca_libre",),
    "aqua": ("aqua",),
    "cot": ("cot_strategyqa", "cot_ecqa", "cot_creak", "cot_qasc", "cot_sensemaking"),
}
SEVEN = ("gsm8k", "svamp", "aqua", "alpaca_libre", "cot_strategyqa", "cot_ecqa", "cot_creak")
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2}
BOILERPLATE = "This page uses cookies. By continuing you accept our terms of use and our privacy policy. "

Row = dict[str, Any]

sys.path.insert(0, str(ROOT / "benchmarks"))
from corrupted_answers import corrupt  # noqa: E402
from demo_selectors import shuffled  # noqa: E402


def pool() -> list[Row]:
    """Return the rows of the example pool."""
    return [json.loads(line) for line in (EXAMPLES / "data/pool.jsonl").read_text(encoding="utf-8").splitlines()]


def write(folder: Path, sets: dict[str, Sequence[Row]]) -> None:
    """Write data sets and their dataset_info.json, which knows those of the examples too."""
    folder.mkdir(parents=True, exist_ok=True)
    info = json.loads((EXAMPLES / "data/dataset_info.json").read_text(encoding="utf-8"))
    for entry in info.values():
        entry["file_name"] = str(EXAMPLES / "data" / entry["file_name"])
    for name, rows in sets.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        columns = {"prompt": "text"} if "text" in rows[0] else COLUMNS
        info[name] = {"file_name": f"{name}.jsonl", "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")


def planted(kind: str) -> dict[str, list[Row]]:
    """Return s1 or s3, and its relevant rows alone."""
    rng = random.Random(f"planted {kind}")
    rows = pool()
    relevant = [row for row in rows if row["source"] == "gsm8k"]
    others = [row for row in rows if not row["source"].endswith("gsm8k")]
    rng.shuffle(relevant)
    right, wrong = relevant[: ROWS // 5], relevant[ROWS // 5 : ROWS // 2]
    if kind == "s1":
        answers = [row["output"] for row in wrong]
        wrong = [{**row, "output": answer} for row, answer in zip(wrong, answers[1:] + answers[:1], strict=True)]
    else:
        wrong = [{**row, "output": shuffled(row["output"], rng)} for row in wrong]
    kinds = {"relevant": right, "wrong": wrong, "other": rng.sample(others, ROWS // 2)}
    every = [{**row, "source": name} for name, found in kinds.items() for row in found]
    rng.shuffle(every)
    return {kind: every, f"{kind}_relevant": [row for row in every if row["source"] == "relevant"]}


def text_of(row: Row) -> Row:
    """Return a row as a text."""
    return {"text": "\n".join(filter(None, [row["instruction"], row["input"], row["output"]]))}


def domains() -> dict[str, list[Row]]:
    """Return m1: four domains, each with a held-out part and one to decide by, and two of junk, 60 % of all tokens."""
    rng, rows, found = random.Random("m1"), pool(), {}
    for name, sources in REAL.items():
        own = [text_of(row) for row in rows if row["source"] in sources]
        rng.shuffle(own)
        found[f"m1_{name}"], found[f"m1_{name}_held"], found[f"m1_{name}_valid"] = own[40:200], own[:40], own[200:208]
    size = 160 * len(REAL)
    found["m1_hex"] = [{"text": "".join(rng.choices("0123456789abcdef", k=144))} for _ in range(size)]
    page = [{"text": BOILERPLATE * 4 + f"Page {rng.randrange(10**6)}."} for _ in range(size * 2 // 3)]
    return {**found, "m1_page": page}


def seven() -> dict[str, list[Row]]:
    """Return m3: seven domains of 100 rows, and 20 held-out rows of each."""
    rng, rows, found = random.Random("m3"), pool(), {}
    for name in SEVEN:
        own = [text_of(row) for row in rows if row["source"] == name]
        rng.shuffle(own)
        found[f"m3_{name}"], found[f"m3_{name}_held"] = own[20:120], own[:20]
    return found


def reweighted() -> dict[str, list[Row]]:
    """Return w1: the pool, its right rows alone, clean rows for a reference, and held-out ones."""
    rng = random.Random("w1")
    rows = [row for row in pool() if not row["source"].startswith("noise")]
    rng.shuffle(rows)
    size = len(rows) // 5
    held, clean, mixed = rows[:size], rows[size : 2 * size], rows[2 * size :]
    right = list(mixed)
    corrupt(mixed, 0.3, rng)
    same = [row for row, before in zip(mixed, right, strict=True) if row["output"] == before["output"]]
    return {"w1": mixed, "w1_right": same, "w1_clean": clean, "w1_held": held}


def questions() -> list[Row]:
    """Return GSM8K's test rows, and those of its rows in the pool that base.yaml's ``max_samples`` leaves out."""
    lines = (EXAMPLES / "data/gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()
    return [*map(json.loads, lines), *(row for row in pool()[1000:] if row["source"] == "gsm8k")]


def small_model(folder: Path) -> None:
    """Write the configuration and the tokenizer of a model of a million parameters, without these."""
    folder.mkdir(parents=True, exist_ok=True)
    base = EXAMPLES / "models/base-4m"
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **SHAPE}, indent=1), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copy(base / name, folder)


def main(out: Path = OUT) -> int:
    """Write everything."""
    small_model(out.parent / "small")
    write(out, {**planted("s1"), **planted("s3"), **domains(), **seven(), **reweighted(), "s2_questions": questions()})
    sys.path.insert(0, str(EXAMPLES))
    from choices import main as write_choices

    return write_choices(str(out / "s2_questions.jsonl"), str(out / "choices.jsonl"))


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
