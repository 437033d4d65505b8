"""Which examples a packed row is made of, and the weights of messages, on the tokens that the messages became.

Nothing of LLaMA-Factory's formats, templates, truncation and packing is repeated: a conversation is converted once more
with the numbers of its messages as their contents, encoded once more with the numbers of its turns as their tokens, and
packed once more with the weights, or the examples' numbers, as labels. Upstream names relied upon, each asserted by
``tests/upstream``: ``get_dataset_converter`` of ``llamafactory.data.converter`` and what a converter makes of an
example; the processors' ``_encode_data_example``, ``preprocess_dataset``, ``tokenizer`` and ``template``, whose
``encode_multiturn`` gives a pair of token ids for each turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dataflex.config.data import WANTED_PART
from dataflex.errors import DataError

WEIGHTS = "dataflex_weights"
"""Column of tokenized rows: the weight of each token."""
NUMBER = "dataflex_number"
"""Column of aligned rows, dropped when they are tokenized: their positions in all rows that were read."""
DOCUMENTS = "dataflex_documents"
"""Column of packed rows: the numbers of the examples in each, in their order."""
_WEIGHT = "dataflex_weight"
_IGNORE = -100


def joined_parts(content: Any) -> Any:
    """Return the text of a content that is a list of parts, ``{"type": "text", "value": ...}``; any other as it is.

    Raises:
        DataError: A part is no text.
    """
    if not isinstance(content, list):
        return content
    if other := [part for part in content if part.get("type") != "text"]:
        raise DataError(f"a message has a part of type {other[0].get('type')!r}; {WANTED_PART}")
    return "".join(str(part["value"]) for part in content)


class WeighedConverter:
    """Converts an example as ``converter`` does and keeps its messages' weights ``name``, 1 where one has none.

    Messages may also be written as for LLaMA-Factory v1, whose contents are lists of parts.
    """

    def __init__(self, converter: Any, name: str) -> None:
        self.converter, self.name = converter, name

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """Return LLaMA-Factory's columns, with the weights in the messages."""
        attr = self.converter.dataset_attr
        messages = example.get(attr.messages) if attr.formatting in ("sharegpt", "openai") else None
        messages = [{**each, attr.content_tag: joined_parts(each.get(attr.content_tag))} for each in messages or ()]
        made = self.converter({**example, attr.messages: messages} if messages else example)
        weights = [1.0 if (given := each.get(self.name)) is None else given for each in messages]
        numbered = [{**each, attr.content_tag: str(k), "tool_calls": None} for k, each in enumerate(messages)]
        marks = self.converter({**example, attr.messages: numbered}) if messages else made
        for part in ("_prompt", "_response"):
            for place, message in enumerate(made[part]):
                # Several answers of tools become one message, whose last number stands for all of them.
                number = marks[part][place]["content"].rsplit("\n", 1)[-1] if messages else ""
                message[_WEIGHT] = float(weights[int(number)]) if messages else 1.0
        return made


class _Marked:
    """A template that gives the numbers of messages, as negative ids, in the place of their tokens: -1, -2, ..."""

    def __init__(self, template: Any, pairs: list[tuple[list[int], list[int]]]) -> None:
        self._template, self._pairs = template, pairs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._template, name)

    def encode_multiturn(self, *_: Any, **__: Any) -> list[tuple[list[int], list[int]]]:
        return [([-2 * k - 1] * len(a), [-2 * k - 2] * len(b)) for k, (a, b) in enumerate(self._pairs)]


class _Noted(_Marked):
    """A template whose token ids are noted as it gives them."""

    def encode_multiturn(self, *args: Any, **kwargs: Any) -> list[tuple[list[int], list[int]]]:
        self._pairs[:] = self._template.encode_multiturn(*args, **kwargs)
        return list(self._pairs)


class _Noting:
    """A tokenizer that notes the tokens of each text."""

    def __init__(self, tokenizer: Any, ids: list[list[int]]) -> None:
        self._tokenizer, self._ids = tokenizer, ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = self._tokenizer(*args, **kwargs)
        self._ids[:] = made["input_ids"]
        return made


class NumberedProcessor:
    """Tokenizes converted examples as ``processor`` does; of those that have a ``NUMBER``, gives ``DOCUMENTS``."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def print_data_example(self, example: dict[str, Any]) -> None:
        """Print an example as stock."""
        self.processor.print_data_example(example)

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return LLaMA-Factory's columns, and those of this class."""
        if not hasattr(self.processor, "_encode_data_example"):
            return self._cut(examples)
        numbers = (
            {id(k): n for k, n in zip(examples["_prompt"], examples[NUMBER], strict=True)} if NUMBER in examples else {}
        )
        encoded: list[tuple[list[int], list[int], dict[str, list[Any]]]] = []

        def encode(**given: Any) -> tuple[list[int], list[int]]:
            ids, labels, marks = self._encode(**given)
            marks |= {DOCUMENTS: [numbers[id(given["prompt"])]] * len(ids)} if numbers else {}
            encoded.append((ids, labels, marks))
            return ids, labels

        made: dict[str, list[Any]] = self._processed(examples, encode)
        for name in encoded[0][2] if encoded else ():
            again = ((ids, marks[name]) for ids, _, marks in encoded)
            packed = self._processed(examples, lambda *_, again=again, **__: next(again))["labels"]
            made[name] = [self._of_tokens(name, row) for row in packed]
        return made

    def _of_tokens(self, name: str, marks: list[Any]) -> list[Any]:
        """Return a row of ``name`` from the marks of its tokens."""
        if name == WEIGHTS:
            return [0.0 if weight == _IGNORE else weight for weight in marks]
        return list(dict.fromkeys(number for number in marks if number != _IGNORE))

    def _cut(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the blocks of packed text, and the examples that each has tokens of."""
        ids: list[list[int]] = []
        tokenizer = self.processor.tokenizer
        try:
            self.processor.tokenizer = _Noting(tokenizer, ids)
            made: dict[str, list[Any]] = self.processor.preprocess_dataset(examples)
        finally:
            self.processor.tokenizer = tokenizer
        size, ends = self.processor.data_args.cutoff_len, np.cumsum([len(each) for each in ids])
        parts = []
        for start in range(0, size * len(made["input_ids"]), size):
            first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, start + size, side="left")
            counts = np.diff(np.minimum([start, *ends[first : last + 1]], start + size))
            parts.append([*enumerate(counts.tolist(), start=int(first))])
        return {**made, **self._of_blocks(examples, ids, parts)}

    def _of_blocks(
        self, examples: dict[str, list[Any]], ids: list[list[int]], parts: list[list[tuple[int, int]]]
    ) -> dict[str, list[Any]]:
        """Return columns of blocks: ``ids`` of each example, ``parts`` of a block (an example's place, its tokens)."""
        return {DOCUMENTS: [[examples[NUMBER][place] for place, _ in part] for part in parts]}

    def _processed(self, examples: dict[str, list[Any]], encode: Callable[..., Any]) -> Any:
        self.processor._encode_data_example = encode
        try:
            return self.processor.preprocess_dataset(examples)
        finally:
            del self.processor._encode_data_example

    def _encode(self, **given: Any) -> tuple[list[int], list[int], dict[str, list[Any]]]:
        """Return tokens and labels of one example, and columns of marks by token."""
        return *type(self.processor)._encode_data_example(self.processor, **given), {}


class WeighedProcessor(NumberedProcessor):
    """Tokenizes converted examples as ``processor`` does, and gives the weight of each token as ``WEIGHTS``."""

    def _encode(self, **given: Any) -> tuple[list[int], list[int], dict[str, list[Any]]]:
        processor = self.processor
        pairs: list[tuple[list[int], list[int]]] = []
        encode, template = type(processor)._encode_data_example, processor.template
        try:
            processor.template = _Noted(template, pairs)
            ids, labels = encode(processor, **given)
            processor.template = _Marked(template, pairs)
            marks, _ = encode(processor, **given)
        finally:
            processor.template = template
        of_message = [message[_WEIGHT] for message in given["prompt"] + given["response"]]
        weights, number = [], 0
        for mark, label in zip(marks, labels, strict=True):
            number = -mark - 1 if mark < 0 else number  # tokens of no message belong to that before them
            # What is supervised of a prompt that is not trained on is the end of the answer before it.
            ends = number % 2 == 0 and label != _IGNORE and not processor.data_args.train_on_prompt
            weights.append(of_message[max(number - ends, 0)])
        return ids, labels, {WEIGHTS: weights}
