"""A reward that is another model's judgement, asked of an OpenAI-compatible server."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from dataflex.rewards.base import Candidate, Grades, graded
from dataflex.signals.endpoint import EndpointClient, EndpointConfig, EndpointError

__all__ = ["Judge", "JudgeConfig"]

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_MOST_IN_A_ROW = 3
_INSTRUCTION = (
    "Grade the answer to the task below against the reference. Reply with one number from 0 (wrong or useless) to "
    "{best:g} (as good as the reference), and nothing else.\n\n[Task]\n{prompt}\n\n[Reference]\n{reference}\n\n"
    "[Answer]\n{answer}\n\n[Grade]\n"
)


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Where the judge is and how it is asked.

    Attributes:
        url: Base address with the version, as in ``http://127.0.0.1:8000/v1``.
        model: Name of the model at the server.
        api_key_env: Environment variable that holds the key.
        instruction: What is asked; ``{prompt}``, ``{answer}``, ``{reference}`` and ``{best}`` are filled in.
        best: The highest grade; the reward is the first number of the reply divided by it.
        max_tokens: Tokens of a reply at most.
        timeout_seconds: Without any byte from the server.
        max_retries: Further tries of a request.
        concurrency: Requests under way at once.
    """

    url: str = field(metadata={"help": "base address of the server with the version, as http://127.0.0.1:8000/v1"})
    model: str = field(metadata={"help": "name of the model at the server"})
    api_key_env: str | None = field(default=None, metadata={"help": "environment variable that holds the key"})
    instruction: str = field(
        default=_INSTRUCTION, metadata={"help": "what is asked, with {prompt}, {answer}, {reference} and {best}"}
    )
    best: float = field(
        default=10.0, metadata={"help": "highest grade; rewards are grades divided by it", "above": 0.0}
    )
    max_tokens: int = field(default=16, metadata={"help": "tokens of a reply at most", "minimum": 1})
    timeout_seconds: float = field(default=60.0, metadata={"help": "seconds without any byte", "above": 0.0})
    max_retries: int = field(default=4, metadata={"help": "further tries of a request", "minimum": 0})
    concurrency: int = field(default=8, metadata={"help": "requests under way at once", "minimum": 1})

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url: must be an http:// or https:// address, found {self.url!r}")
        if not self.model:
            raise ValueError("model: must be the name of a model")
        try:
            asked = self.ask(Candidate(prompt="\0", answer="\1", reference="\2"))
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"instruction: cannot be filled in ({type(error).__name__}: {error}); write braces as {{{{ and }}}}"
            ) from error
        if "\1" not in asked:
            raise ValueError("instruction: does not hold {answer}, so that all answers would get the same grade")

    def ask(self, candidate: Candidate) -> str:
        """Return the request for one candidate."""
        return self.instruction.format(
            prompt=candidate.prompt, answer=candidate.answer, reference=candidate.reference, best=self.best
        )


class Judge:
    """Asks for a grade of each answer.

    Args:
        config: Where and how.

    Raises:
        ConfigError: The environment variable of the key is not set.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self._config = config
        self._client = EndpointClient(
            config=EndpointConfig(
                url=config.url,
                model=config.model,
                api_key_env=config.api_key_env,
                max_tokens=config.max_tokens,
                temperature=0.0,
                timeout_seconds=config.timeout_seconds,
                max_retries=config.max_retries,
                concurrency=config.concurrency,
            )
        )

    def grade(self, candidates: Sequence[Candidate]) -> Grades:
        """Return one reward per candidate.

        All are asked at once. If a request fails for good, they are asked one by one, so that only those that
        fail have no grade; three failures in a row end that.
        """
        asked = [self._config.ask(one) for one in candidates]
        try:
            return graded([self._read(replies[0].text) for replies in self._client.complete(asked)])
        except EndpointError:
            pass  # told below, for the requests that it belongs to
        found: list[object] = []
        in_a_row = 0
        for request in asked:
            if in_a_row == _MOST_IN_A_ROW:
                found.append(found[-1])
                continue
            try:
                found.append(self._read(self._client.complete([request])[0][0].text))
                in_a_row = 0
            except EndpointError as error:
                found.append(str(error))
                in_a_row += 1
        return graded(found)

    def _read(self, reply: str) -> object:
        found = _NUMBER.search(reply)
        if found is None:
            return f"the judge replied {reply.strip()[:80]!r} without a number"
        grade = float(found.group())
        if not 0 <= grade <= self._config.best:
            return f"the judge's grade {grade:g} is not between 0 and {self._config.best:g}"
        return grade / self._config.best
