"""``dataflex eval``: against single rows under plain transformers, on an adapter; what it reads and refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from dataflex.compare.results import evaluation_metrics
from dataflex.errors import ConfigError
from dataflex.offline.answers import Task, Written, matches, normalized, read_tasks
from dataflex.offline.choices import Question, as_rows, outcomes, read_questions, summary
from dataflex.offline.evaluation import eval_request
from tests.distributed.ranks import errors_of
from tests.offline.conftest import rows_of

QUESTIONS = [
    {"question": row["instruction"], "choices": [other["output"] for other in rows_of(3 + i % 2, seed=40 + i)]}
    | {"answer": "ABC"[i % 3] if i % 2 else i % 3}
    | {"subject": "odd" if i % 2 else "even"}
    for i, row in enumerate(rows_of(5, seed=30))
]


@pytest.fixture
def held(scoring, monkeypatch):
    monkeypatch.chdir(scoring.folder)
    for name, count, seed in (("web", 7, 11), ("code", 4, 12)):
        rows = rows_of(count, seed=seed)
        scoring.write(name, [{**row, "source": "a" if row["id"] % 2 else "b"} for row in rows])
    (scoring.folder / "q.jsonl").write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    return scoring


def slow(model, tokenizer, prompt, answer):
    """Sum of losses of the answer and its end, and their number, under the template 'default'."""
    import torch

    def tokens(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    end = [tokenizer.eos_token_id]
    head = tokens(f"Human: {prompt}") + end + tokens("\nAssistant:")
    tail = tokens(answer) + end + tokens("\n")
    with torch.no_grad():
        logits = model(torch.tensor([[*head, *tail]])).logits[0].double().log_softmax(-1)
    return -float(sum(logits[len(head) - 1 + i, token] for i, token in enumerate(tail))), len(tail)


def test_an_adapter_against_single_rows(held, tiny_model, capsys):
    """Losses by set and mix, and choices, of an adapter whose base model is beside it."""
    import shutil

    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.copytree(tiny_model, held.folder / "saves/base")
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, torch_dtype=torch.float32)
    made = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    for name, value in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    made.save_pretrained(held.folder / "saves/adapter")
    config = Path("saves/adapter/adapter_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "base"}))

    command = ["eval", "saves/adapter", "--data", "web,code", "--choices", "q.jsonl", "--mix", "code=3,web=1"]
    command += [f"dataset_dir={held.data}", "template=default", "cutoff_len=64", "--out", "out/e.json"]
    assert held.run(*command) == 0
    printed = capsys.readouterr().out
    found = json.loads(Path("out/e.json").read_text())
    assert not [path for path in held.folder.iterdir() if "work" in path.name]

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, torch_dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, held.folder / "saves/adapter").eval()
    sums = {}
    for name, count, seed in (("web", 7, 11), ("code", 4, 12)):
        sums[name] = np.sum(
            [slow(model, tokenizer, r["instruction"], r["output"]) for r in rows_of(count, seed)], axis=0
        )
        mean = sums[name][0] / sums[name][1]
        told = found["data"]["sets"][name]
        assert (told["rows"], told["tokens"]) == (count, sums[name][1])
        assert told["loss"] == pytest.approx(mean, rel=1e-5)
        assert told["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    means = {name: value[0] / value[1] for name, value in sums.items()}
    total = sums["web"] + sums["code"]
    data = found["data"]
    assert data["micro"]["loss"] == pytest.approx(total[0] / total[1], rel=1e-5)
    assert data["macro"]["loss"] == pytest.approx((means["web"] + means["code"]) / 2, rel=1e-5)
    assert data["mix"]["loss"] == pytest.approx(0.25 * means["web"] + 0.75 * means["code"], rel=1e-5)

    right, margins, bits = [], [], []
    for question in QUESTIONS:
        pairs = [slow(model, tokenizer, question["question"], choice) for choice in question["choices"]]
        values = [-loss / count for loss, count in pairs]
        answer = question["answer"] if isinstance(question["answer"], int) else "ABC".index(question["answer"])
        right.append(max(range(len(values)), key=values.__getitem__) == answer)
        margins.append(values[answer] - max(v for i, v in enumerate(values) if i != answer))
        bits.append(pairs[answer][0] / math.log(2) / len(question["choices"][answer].encode()))
    (told,) = found["choices"]
    assert (told["questions"], told["left_out"]) == (5, 0)
    assert told["accuracy"] == pytest.approx(np.mean(right))
    assert told["margin"] == pytest.approx(np.mean(margins), rel=1e-4)
    assert told["bits_per_byte"] == pytest.approx(np.mean(bits), rel=1e-5)
    assert told["subjects"]["odd"]["margin"] == pytest.approx((margins[1] + margins[3]) / 2, rel=1e-4)
    for text in ("with the adapter saves/adapter", "mix (code 75.0 %, web 25.0 %)", "macro (of 2 subjects)"):
        assert text in printed


def test_domains_and_questions_that_were_cut(held, tiny_model, capsys):
    """A configuration names model and sets; domains are a column's; a choice beyond cutoff_len is not compared."""
    long = {"question": "one", "choices": ["two " * 80, "two"], "answer": 1}
    Path("long.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (*QUESTIONS[:2], long)))
    config = held.config(eval_dataset="web,code", dynamic={"domain_column": "source", "selector": "loss"})
    assert held.run("eval", config, "--choices", "long.jsonl", "--length", "sum", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["data"]["sets"]) == ["web", "code"]
    domains = found["data"]["domains"]
    assert sorted(domains) == ["a", "b"]
    assert found["data"]["macro"]["loss"] == pytest.approx((domains["a"]["loss"] + domains["b"]["loss"]) / 2)
    assert (found["choices"][0]["questions"], found["choices"][0]["left_out"]) == (2, 1)
    assert held.run("eval", config, "--mix", "c=1") == 2
    assert "--mix: c: no such domain (domains: b, a)" in capsys.readouterr().err


def test_generated_answers_against_transformers(held, tiny_model, capsys):
    """Greedy answers are those of ``generate`` on the prompt of the template; what is cut is left out."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, torch_dtype=torch.float32).eval()

    def answer(question):
        parts = [f"Human: {question}", tokenizer.eos_token, "\nAssistant:"]
        head = [token for part in parts for token in tokenizer(part, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            made = model.generate(torch.tensor([head]), max_new_tokens=5, do_sample=False)[0][len(head) :]
        return tokenizer.decode(made, skip_special_tokens=True)

    asked = [row["instruction"] for row in rows_of(4, seed=50)]
    lines = [{"question": text, "answer": answer(text).upper() + "  ."} for text in asked[:3]]
    lines += [{"question": asked[3], "answer": "nine of eight"}, {"question": "two " * 80, "answer": "one"}]
    Path("a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    command = [str(tiny_model), "--data", "web", "--answers", "a.jsonl", "--max-new-tokens", "5", "--out", "e.json"]
    assert held.run("eval", *command, f"dataset_dir={held.data}", "template=default", "cutoff_len=64") == 0
    (found,) = json.loads(Path("e.json").read_text())["answers"]
    assert (found["questions"], found["left_out"], found["exact_match"]) == (4, 1, 0.75)
    assert "exact match" in capsys.readouterr().out


def test_what_answers_are_compared_by():
    assert normalized("  The  Answer\nis 1,234,567. ") == "the answer is 1234567"
    assert normalized("1,23") == "1,23"
    assert normalized("\u5317\u4eac\u3002") == "\u5317\u4eac"
    assert normalized("2.5") != normalized("25")
    assert normalized("so 3 + 4 = 7\n#### 7", "####") == "7"
    assert normalized("7", "####") == ""
    problems: list[str] = []
    Path("a.jsonl").write_text('{"question": "q", "answer": "a"}\n{"question": "q"}\n{"question": "q", "answer": 3}\n')
    assert read_tasks(Path("a.jsonl"), problems) == [Task(text="q", answer="a")]
    assert ["line 2: has no answer" in problems[0], "line 3: answer: expected" in problems[1]] == [True, True]
    told = matches(
        [Task(text="q", answer="A")] * 3, [Written(text="a", finished=True), Written(text="b", finished=False), None]
    )
    assert told == {"questions": 2, "exact_match": 0.5, "finished": 0.5, "left_out": 1}


@pytest.mark.parametrize(
    ("expected", "text", "right"),
    [
        ("so #### 7", "is #### 7", 1.0),
        ("so #### 7", "7", 0.0),
        ("7", "is #### 7", 1.0),
        ("7", "7", 0.0),
        ("7", "it is a duck", 0.0),
        ("so #### .", "none", 0.0),
    ],
)
def test_answers_without_the_mark_are_no_match(expected, text, right):
    told = matches([Task(text="q", answer=expected)], [Written(text=text, finished=True)], "####")
    assert told["exact_match"] == right


def test_all_questions_are_asked_under_max_samples(held, tiny_model, capsys, caplog):
    command = [str(tiny_model), "--data", "web", "--choices", "q.jsonl", "--json", f"dataset_dir={held.data}"]
    assert held.run("eval", *command, "template=default", "cutoff_len=64", "max_samples=3") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["data"]["micro"]["rows"], found["choices"][0]["questions"]) == (7, 5)
    assert found["choices"][0]["left_out"] == 0


@pytest.mark.gloo
def test_two_ranks_print_what_one_prints(held, two_ranks):
    command = ["eval", held.config(eval_dataset="web"), "--choices", str(Path("q.jsonl").resolve()), "--json", "--out"]
    assert held.run(*command, "one.json") == 0
    output = two_ranks([asked := held.command(*command, str(Path("two.json").resolve()))])
    assert not errors_of(asked), output
    one, two = (json.loads(Path(f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["data"]["micro"]["loss"] == pytest.approx(one["data"]["micro"]["loss"], rel=1e-6)
    assert two["choices"][0]["margin"] == pytest.approx(one["choices"][0]["margin"], rel=1e-4)


def test_ties_lengths_and_means():
    """Numbers by hand: a tie of the two best counts half; a choice without a loss leaves its question out."""
    one = Question(text="q", choices=("ab", "cd", "ef"), answer=1, subject="s")
    two = Question(text="q", choices=("a", "b"), answer=0, subject="t")
    losses, tokens = np.array([1.0, 1.0, 2.0, 3.0, np.nan]), np.array([4, 2, 2, 1, 1])
    by_mean, by_sum = (outcomes([one, two], losses, tokens, length) for length in ("mean", "sum"))
    np.testing.assert_allclose(by_mean[0], [0.5, 0.0, 2 / math.log(2) / 2])
    np.testing.assert_allclose(by_sum[0], [1.0, 2.0, 2 / math.log(2) / 2])
    assert np.isnan(by_mean[1]).all()
    told = summary([one, two], by_mean)
    assert (told["questions"], told["left_out"], told["accuracy"], list(told["subjects"])) == (1, 1, 0.5, ["s"])
    assert [row["output"] for row in as_rows([one, two])] == ["ab", "cd", "ef", "a", "b"]


def test_files_of_questions(tmp_path):
    problems: list[str] = []
    table = tmp_path / "abstract_algebra_test.csv"
    table.write_text('"What, then?",1,2,3,4,C\n')
    (question,) = read_questions(table, problems)
    assert question == Question(text="What, then?", choices=("1", "2", "3", "4"), answer=2, subject="abstract_algebra")
    assert problems == []


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2: is no JSON"),
        ("[1]", "line 2: expected an object"),
        ('{"question": "q", "choices": ["a", "b"]}', "line 2: has no answer"),
        ('{"question": "", "choices": ["a", "b"], "answer": 0}', "line 2: question: expected a text"),
        ('{"question": "q", "choices": ["a"], "answer": 0}', "line 2: choices: expected a list of two or more texts"),
        ('{"question": "q", "choices": ["a", " "], "answer": 0}', "line 2: choices: expected texts"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "line 2: answer: expected an index from 0 to 1"),
        ('{"question": "q", "choices": ["a", "b"], "answer": "C"}', "a letter from A to B, found 'C'"),
    ],
)
def test_bad_lines(tmp_path, line, told):
    path, problems = tmp_path / "q.jsonl", []
    path.write_text(f"{json.dumps(QUESTIONS[0])}\n{line}\n")
    assert len(read_questions(path, problems)) == 1
    (problem,) = problems
    assert problem.startswith(f"--choices: {path}, ")
    assert told in problem


@pytest.mark.parametrize(
    ("model", "options", "told"),
    [
        ("MODEL", {}, "--data: name data sets"),
        ("MODEL", {"data": "wep"}, "--data: 'wep' is not defined"),
        ("MODEL", {"data": "wep", "choices": "q.jsonl"}, "did you mean 'web'?"),
        ("MODEL", {"data": "web", "mix": "wep=1"}, "--mix: wep: no such domain; did you mean 'web'?"),
        ("MODEL", {"data": "web", "length": "means"}, "--length: 'means'; did you mean 'mean'?"),
        ("MODEL", {"choices": "none.jsonl"}, "--choices: none.jsonl cannot be read: No such file"),
        ("empty", {"data": "web"}, "MODEL: empty is neither a model (config.json) nor an adapter"),
        ("./gone", {"data": "web"}, "MODEL: no such folder: gone"),
        (
            "MODEL",
            {"data": "web", "out": Path("notes.json")},
            "--out: notes.json is there, and 'dataflex eval' did not",
        ),
        ("MODEL", {"data": "web", "out": Path("empty")}, "--out: empty is a folder"),
        ("MODEL", {"data": "web", "out": Path("notes.json/e.json")}, "notes.json is a file, not a folder"),
        ("MODEL", {"data": "web", "length": "sum"}, "--length sum: has no effect without --choices"),
        ("MODEL", {"data": "web", "max_new_tokens": 9}, "--max-new-tokens 9: has no effect without --answers"),
        ("MODEL", {"data": "web", "after": "####"}, "--after '####': has no effect without --answers"),
        ("MODEL", {"choices": "q.jsonl", "mix": "web=1"}, "--mix: has no effect without --data"),
        ("lost", {"data": "web"}, "the base model of the adapter lost is '../gone/model'"),
    ],
)
def test_what_is_refused(held, tiny_model, tmp_path_factory, model, options, told):
    Path("empty").mkdir()
    Path("lost").mkdir()
    Path("notes.json").write_text('{"mine": 1}')
    Path("lost/adapter_config.json").write_text('{"base_model_name_or_path": "../gone/model", "peft_type": "LORA"}')
    work = tmp_path_factory.mktemp("work")
    model = str(tiny_model) if model == "MODEL" else model
    with pytest.raises(ConfigError) as caught:
        eval_request(model, [f"dataset_dir={held.data}"], work=work, **options)
    assert told in str(caught.value)


def test_an_unknown_data_set_beside_questions_is_told_once(held, tiny_model, tmp_path_factory):
    given = [f"dataset_dir={held.data}"]
    with pytest.raises(ConfigError) as caught:
        eval_request(str(tiny_model), given, work=tmp_path_factory.mktemp("work"), data="wep", choices="q.jsonl")
    (problem,) = caught.value.problems
    assert "'wep' is not defined" in problem


def test_what_was_trained_from_scratch_is_loaded(held, tiny_model, tmp_path_factory):
    """The configuration of a run that began with random weights evaluates the weights that it names."""
    given = [f"dataset_dir={held.data}", "train_from_scratch=true"]
    request = eval_request(str(tiny_model), given, work=tmp_path_factory.mktemp("work"), data="web")
    assert "train_from_scratch" not in request.score.lf


def test_tasks_of_lm_eval_against_single_rows(held, tiny_model, capsys):
    """Local task files: which choice is taken, and what is generated, are those of plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(tiny_model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    task = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "q2.jsonl"}}, "test_split": "test"}
    texts = [row["instruction"] for row in rows_of(6, seed=50)]
    others = [row["output"] for row in rows_of(6, seed=51)]

    def tokens(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def logits(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    def gain(text, choice):
        head, tail = tokens(text), tokens(text + " " + choice)
        return float(sum(logits(tail)[i - 1, tail[i]] for i in range(len(head), len(tail))))

    questions = [{"q": text, "choices": [others[i], others[i - 1]], "right": i % 2} for i, text in enumerate(texts)]
    taken = [max((0, 1), key=lambda k: gain(each["q"], each["choices"][k])) for each in questions]
    for each in questions:
        first = tokenizer.decode([int(logits(tokens(each["q"]))[-1].argmax())])
        each["next"] = first if each["right"] else first + "not"
    Path("q2.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    chosen = {"output_type": "multiple_choice", "doc_to_target": "right", "doc_to_choice": "choices"}
    made = {"output_type": "generate_until", "doc_to_target": "{{next}}", "metric_list": [{"metric": "exact_match"}]}
    made["generation_kwargs"] = {"until": ["<never>"], "max_gen_toks": 1, "do_sample": False}
    for name, own in (("chosen", chosen), ("made", made)):
        Path(f"{name}.yaml").write_text(json.dumps({"task": name, "doc_to_text": "{{q}}", **task, **own}))

    def found(*more):
        command = ["eval", str(tiny_model), "--tasks", "chosen.yaml,made.yaml", "--out", "out.json", "template=default"]
        assert held.run(*command, *more) == 0
        return json.loads(Path("out.json").read_text())

    alone = found()
    assert "data" not in alone
    by_name = {each["task"]: each for each in alone["tasks"]}
    right = np.mean([k == each["right"] for k, each in zip(taken, questions, strict=True)])
    assert by_name["chosen"]["questions"] == 6
    assert by_name["chosen"]["metrics"]["acc"] == pytest.approx(right)
    assert 0 < right < 1
    assert by_name["made"]["metrics"] == {"exact_match": 0.5}
    assert "exact_match" in capsys.readouterr().out
    beside = found("--data", "web", f"dataset_dir={held.data}")
    assert beside["tasks"] == alone["tasks"]
    assert beside["data"]["micro"]["rows"] == 7
    assert evaluation_metrics(alone)["task/chosen/acc"] == pytest.approx(right)


def test_tasks_that_cannot_be_run(held, tiny_model, tmp_path_factory, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        eval_request(str(tiny_model), [], work=tmp_path_factory.mktemp("work"), tasks="nowhere.yaml")
    for told in ("--tasks: no such file: nowhere.yaml", "--tasks: lm-eval is not installed; install the extra: pip "):
        assert told in str(caught.value)
