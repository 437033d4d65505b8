"""Rewards: metrics with known values, functions and commands that are late, broken or silent."""

from __future__ import annotations

import sys
import textwrap
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.errors import ConfigError
from dataflex.registry import load_function
from dataflex.rewards.base import Candidate, graded
from dataflex.rewards.build import build_reward, command_reward, exact_match, f1, function_reward, metric, normalized


def candidates(*answers, reference="the answer is 4", prompt="2 + 2?"):
    return [Candidate(prompt=prompt, answer=answer, reference=reference) for answer in answers]


# ---------------------------------------------------------------- grades


def test_what_is_no_finite_number_is_a_problem():
    found = graded([1, 0.5, True, np.float32(2), "why", ValueError("bad\nworse"), None, float("nan"), [1]])
    np.testing.assert_array_equal(found.values[:4], [1.0, 0.5, 1.0, 2.0])
    assert np.isnan(found.values[4:]).all()
    assert found.problems == (
        "why",
        "ValueError: worse",
        "the reward is None, not a number",
        "the reward is nan",
        "the reward is [1], not a number",
    )
    assert graded(["a", "b", "a", "c", "d"]).why() == "a (2 times); b; c; and 1 others"


# ---------------------------------------------------------------- metrics


def test_metrics_of_known_pairs():
    assert normalized("The  Answer, is: 4!") == "answer is 4"
    assert exact_match("Answer is 4.", "the answer is 4") == 1.0
    assert exact_match("answer is 5", "the answer is 4") == 0.0
    assert f1("answer 4 4", "the answer is 4") == pytest.approx(2 * 2 / 6)  # 2 of 3 words, 2 of 3 words
    assert f1("", "") == 1.0
    assert f1("x", "") == f1("", "x") == f1("y", "x") == 0.0


def test_rouge_of_known_pairs():
    """ROUGE-1 and -2 count shared n-grams, ROUGE-L the longest common subsequence."""
    pair = candidates("the cat was under the bed", reference="the cat was found under the bed")
    found = [build_reward(name, None, None, 1.0)(pair).values[0] for name in ("rouge1", "rouge2", "rougeL")]
    np.testing.assert_allclose(found, [2 * 6 / 13, 2 * 4 / 11, 2 * 6 / 13])


def test_metrics_of_other_scripts():
    """Chinese by characters ('The answer is Beijing.' and 'Beijing'), Russian by words."""
    answer, reference = "\u7b54\u6848\u662f\u5317\u4eac\u3002", "\u5317\u4eac"
    assert f1(answer, reference) == pytest.approx(2 * 2 / 7)
    assert exact_match(reference + "\u3002", reference) == 1.0
    assert metric("rougeL")(answer, reference) == pytest.approx(2 * 2 / 7)
    assert metric("rouge2")(answer, answer) == 1.0
    russian = "\u041c\u043e\u0441\u043a\u0432\u0430"
    hindi = "\u0939\u093f\u0928\u094d\u0926\u0940"  # one word with its vowel signs
    assert metric("rouge1")(f"{hindi} \u0939", hindi) == pytest.approx(2 / 3)
    assert metric("rougeL")(f"{russian} \u0433\u043e\u0440\u043e\u0434", russian) == pytest.approx(2 / 3)


@given(answer=st.text(st.characters(max_codepoint=0x17F)), reference=st.text(st.characters(max_codepoint=0x17F)))
@settings(deadline=None)
def test_rouge_of_latin_letters_is_the_librarys(answer, reference):
    from rouge_score.rouge_scorer import RougeScorer

    want = RougeScorer(["rougeL"], use_stemmer=True).score(reference, answer)["rougeL"].fmeasure
    assert metric("rougeL")(answer, reference) == want


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ConfigError, match=r"dataflex-llm\[rewards\]"):
        metric("rougeL")


# ---------------------------------------------------------------- functions


def test_a_function_from_a_file_and_from_a_module(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def length(prompt, answer, reference):\n    return len(answer) - len(reference)\n")
    reward = build_reward(f"{file}:length", None, None, 5.0)
    assert reward(candidates("ab", "", reference="abc")).values.tolist() == [-1.0, -3.0]
    assert load_function(f"{file}:length", "reward") is load_function(f"{file}:length", "reward")
    assert load_function("math:sqrt", "reward")(4.0) == 2.0
    with pytest.raises(ConfigError, match=r"dynamic\.selector\.reward: math has no function 'sqr'"):
        build_reward("math:sqr", None, None, 5.0)
    (tmp_path / "broken.py").write_text("import nothing_like_it\n")
    with pytest.raises(ConfigError, match="cannot be imported: ModuleNotFoundError"):
        build_reward(f"{tmp_path}/broken.py:f", None, None, 5.0)


def test_one_bad_answer_costs_only_itself():
    def function(*, prompt, answer, reference):
        if answer == "slow":
            time.sleep(30)
        return {"good": 1.0, "text": "1.0", "nan": float("nan")}[answer]

    found = function_reward(function, timeout_seconds=0.3)(candidates("good", "raises", "slow", "text", "nan", "good"))
    assert np.isnan(found.values).tolist() == [False, True, True, True, True, False]
    assert found.problems[:2] == ("KeyError: 'raises'", "no answer within 0.3 s")
    assert "'1.0', not a number" in found.problems[2]


def test_functions_that_hang_are_given_up():
    def function(**_given):
        time.sleep(30)

    found = function_reward(function, timeout_seconds=0.05)(candidates(*["x"] * 40))
    assert np.isnan(found.values).all()
    assert len(found.values) == 40
    assert found.problems[-1] == "not tried: 8 calls that took too long still run"


def test_calls_that_take_too_long_and_end_hold_up_no_others():
    def function(**_given):
        time.sleep(0.15)
        return 1.0

    found = function_reward(function, timeout_seconds=0.05)(candidates(*["x"] * 20))
    assert set(found.problems) == {"no answer within 0.05 s"}


# ---------------------------------------------------------------- commands


def command(tmp_path, body, timeout_seconds=10.0):
    file = tmp_path / "reward.py"
    file.write_text("import json, sys, time\n" + textwrap.dedent(body))
    return command_reward(f"{sys.executable} {file}", timeout_seconds=timeout_seconds)


def test_a_command_reads_lines_and_writes_lines(tmp_path):
    reward = command(
        tmp_path,
        """
        rows = [json.loads(line) for line in sys.stdin]
        for row in rows:
            assert sorted(row) == ["answer", "prompt", "reference"]
            n = len(row["answer"])
            print(json.dumps({"reward": n, "note": "x"}) if n % 2 else n)
        """,
    )
    assert reward(candidates("a", "bb", "ccc", "\u00e4\n")).values.tolist() == [1.0, 2.0, 3.0, 2.0]
    many = reward(candidates(*["x" * 2000] * 500))  # more than a pipe holds, both ways
    assert many.values.tolist() == [2000.0] * 500


def test_a_bad_line_costs_only_its_answer(tmp_path):
    reward = command(
        tmp_path,
        """
        for line in sys.stdin:
            replies = {"nan": "NaN", "words": "very good", "true": "true", "none": "{}", "null": '{"reward": null}'}
            print(replies.get(json.loads(line)["answer"], "1"))
        """,
    )
    found = reward(candidates("a", "nan", "words", "true", "b", "none", "null", "b"))
    assert np.isnan(found.values).tolist() == [False, True, True, True, False, True, True, False]
    assert "wrote 'very good'; it must write one line for each answer" in found.problems[1]
    assert found.problems[-1] == "the reward is None, not a number"


def test_a_line_too_many_shifts_no_reward(tmp_path):
    """Two kinds: a line that is no reward, and one that looks like a reward and leaves another over."""
    echo = "for line in sys.stdin: print(json.loads(line)['answer'])"
    found = command(tmp_path, f"print('loading')\n{echo}")(candidates(*"123456"))
    assert np.isnan(found.values).all()
    assert "the command wrote 'loading'; " in found.why()
    found = command(tmp_path, f"print(7)\n{echo}")(candidates(*"123"))
    assert np.isnan(found.values).all()
    assert "the command wrote '3'; " in found.why()
    stray = "for line in sys.stdin: print('odd' if '2' in line else '', json.loads(line)['answer'], sep='\\n')"
    found = command(tmp_path, stray)(candidates("1", "2", "3", prompt="p"))
    np.testing.assert_array_equal(found.values, [1.0, np.nan, 3.0])


def test_a_signal_to_our_group_is_not_for_the_command(tmp_path):
    reward = command(tmp_path, "import os\nfor line in sys.stdin: print(float(os.getpgrp() == os.getpid()))")
    assert reward(candidates("a", "b")).values.tolist() == [1.0, 1.0]


FALLS = """
for line in sys.stdin:
    answer = json.loads(line)["answer"]
    if answer == "bad":
        sys.exit("cannot read this")
    if answer == "slow":
        time.sleep(30)
    print(1.0, flush=True)
"""


def test_a_command_that_falls_over_or_falls_silent_goes_on_with_the_rest(tmp_path):
    found = command(tmp_path, FALLS, timeout_seconds=1.5)(candidates("a", "bad", "b", "slow", "c", "d"))
    assert np.isnan(found.values).tolist() == [False, True, False, True, False, False]
    assert found.problems == (
        "the command ended with code 1: cannot read this",
        "no line from the command within 1.5 s",
    )


def test_a_prompt_whose_answers_all_fail_costs_no_other_prompts(tmp_path):
    asks = [*candidates("a"), *candidates(*["bad"] * 20, prompt="poison"), *candidates("b", "bad", "c", prompt="other")]
    found = command(tmp_path, FALLS)(asks)
    assert np.flatnonzero(~np.isnan(found.values)).tolist() == [0, 21, 23]
    assert len(found.problems) == 21


def test_a_command_that_never_works_is_given_up(tmp_path):
    body = f"open({str(tmp_path / 'starts')!r}, 'a').write('x')\nsys.exit(3)"
    found = command(tmp_path, body)([one for i in range(5) for one in candidates(*["x"] * 10, prompt=str(i))])
    assert np.isnan(found.values).all()
    assert set(found.problems) == {"the command ended with code 3"}
    assert len((tmp_path / "starts").read_text()) == 7  # three at each of two prompts, one at the third
    program = tmp_path / "gone"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    reward = command_reward(str(program), timeout_seconds=1)
    program.unlink()
    found = reward(candidates("x", "y"))
    assert "cannot be started" in found.problems[0]
    assert len(found.problems) == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [("", "is empty"), ("a 'b", "cannot be read"), ("no-such-program x", "no such program: no-such-program")],
)
def test_a_command_that_cannot_be_read_is_told(text, problem):
    with pytest.raises(ConfigError, match=f"dynamic.selector.command: .*{problem}"):
        command_reward(text, timeout_seconds=1)
