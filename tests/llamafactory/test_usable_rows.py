"""Rows that LLaMA-Factory drops, or ends on, are known before it is imported."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.config.data import _Fatal, _Row

TEXTS = st.sampled_from([None, "", "text", 3])
CHAT = {"formatting": "sharegpt", "columns": {"messages": "m", "chosen": "c", "rejected": "r", "kto_tag": "k"}}
OPEN = {
    **CHAT,
    "formatting": "openai",
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "observation_tag": "tool",
        "function_tag": "function",
        "system_tag": "system",
    },
}
PLAIN = {"columns": {"prompt": "p", "query": "q", "response": "a", "chosen": "c", "rejected": "r", "kto_tag": "k"}}
NAMES = {
    "sharegpt": ("from", "value", ["human", "gpt", "observation", "function_call", "system", "nobody"]),
    "openai": ("role", "content", ["user", "assistant", "tool", "function", "system", "nobody"]),
}


def messages_of(formatting: str) -> st.SearchStrategy[Any]:
    role, content, names = NAMES[formatting]
    spoken = st.sampled_from([*names[:2] * 4, *names])
    one = st.fixed_dictionaries({role: spoken, content: st.sampled_from(["text", "text", "text", None])})
    called = [{"function": {"name": "f", "arguments": "{}"}}]
    calls = st.builds(lambda message: message | {"tool_calls": called}, one)
    return one if formatting == "sharegpt" else st.one_of(one, one, one, calls)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], str, dict[str, Any]]:
    entry = draw(st.sampled_from([PLAIN, CHAT, OPEN]))
    stage = draw(st.sampled_from(["sft", "rm", "dpo", "kto", "pt"]))
    entry = {**entry, "ranking": stage in ("rm", "dpo")}
    if entry["ranking"]:
        entry["columns"] = {key: column for key, column in entry["columns"].items() if key != "kto_tag"}
    tag = draw(st.sampled_from([True, False, None]))
    if "formatting" not in entry:
        return entry, stage, {**{key: draw(TEXTS) for key in "pqacr"}, "k": tag}
    one = messages_of(entry["formatting"])
    turns = draw(st.one_of(st.none(), st.lists(one, max_size=5), st.lists(one, min_size=1, max_size=3)))
    role, _, names = NAMES[entry["formatting"]]
    if turns and draw(st.booleans()):  # in turn
        turns = [{**turn, role: names[place % 2]} for place, turn in enumerate(turns)]
    pair = st.one_of(st.none(), one)
    return entry, stage, {"m": turns, "c": draw(pair), "r": draw(pair), "k": tag}


def theirs(entry: dict[str, Any], stage: str, row: dict[str, Any]) -> str:
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import DatasetAttr

    attr = DatasetAttr("file", dataset_name="x")
    attr.join(entry)
    columns = {"m", "p", "q", "a", "c", "r", "k"}
    try:
        found = get_dataset_converter(attr.formatting, attr, None)({**dict.fromkeys(columns), **row})
    except (AttributeError, KeyError, TypeError):
        return "ends"
    wanted = 1 if stage == "sft" else 2
    prompt, response = found["_prompt"], found["_response"]
    if stage == "pt":
        return "kept" if prompt and isinstance(prompt[0]["content"], str) else "ends"
    if len(prompt) % 2 != 1 or len(response) != wanted:
        return "dropped"
    # A template takes text alone.
    return "kept" if all(isinstance(each["content"], str) for each in [*prompt, *response]) else "ends"


@given(case=cases())
def test_what_becomes_of_a_row_is_what_llamafactory_makes_of_it(case: Any) -> None:
    entry, stage, row = case
    try:
        ours = "dropped" if _Row(entry, stage).fault(row) else "kept"
    except _Fatal:
        ours = "ends"
    assert ours == theirs(entry, stage, row)


@pytest.mark.parametrize("content", [None, 3])
def test_a_template_takes_text_alone(content: Any) -> None:
    from llamafactory.data.formatter import StringFormatter

    with pytest.raises((RuntimeError, TypeError)):
        StringFormatter(slots=["{{content}}"]).apply(content=content)
