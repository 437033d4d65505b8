"""The judge: a model behind an OpenAI-compatible server (vLLM or any other) that grades answers.

Standard library only. Redirects are not followed: they would carry the key to another host. The key is read from an
environment variable when the first answer is graded, never from a file, and appears in no message.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import logging
import os
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from dataflex.errors import ConfigError, DataFlexError
from dataflex.parts import param
from dataflex.rewards.base import Candidate, Grades, graded
from dataflex.rng import stream

logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_MOST_IN_A_ROW = 3
_WAIT_SECONDS, _MOST_WAIT_SECONDS = 1.0, 60.0
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_OF_ALL = frozenset({401, 403, 404})
_SHOWN = 300
_INSTRUCTION = (
    "Grade the answer to the task below against the reference. Reply with one number from 0 (wrong or useless) to "
    "{best:g} (as good as the reference), and nothing else.\n\n[Task]\n{prompt}\n\n[Reference]\n{reference}\n\n"
    "[Answer]\n{answer}\n\n[Grade]\n"
)


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Where the judge is and how it is asked; each field's ``help`` says what it is."""

    url: str = param(help="base address of the server with the version, as http://127.0.0.1:8000/v1")
    model: str = param(help="name of the model at the server")
    api_key_env: str | None = param(None, "environment variable that holds the key")
    instruction: str = param(_INSTRUCTION, "what is asked, with {prompt}, {answer}, {reference} and {best}")
    best: float = param(10.0, "highest grade; rewards are grades divided by it", above=0.0)
    max_tokens: int = param(16, "tokens of a reply at most", minimum=1)
    timeout_seconds: float = param(60.0, "seconds without any byte", above=0.0)
    max_retries: int = param(4, "further tries of a request", minimum=0)
    concurrency: int = param(8, "requests under way at once", minimum=1)

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
        return self.instruction.format(best=self.best, **asdict(candidate))


class JudgeError(DataFlexError):
    """The server could not be reached, refused a request, or answered without a text."""


class _Gone(JudgeError):
    """What a request failed of is not the request: the server is away or busy, or refuses the key or the model."""


class _Busy(_Gone):
    """A request failed that may be answered later; ``wait`` has the seconds that the server asked for, or None."""

    def __init__(self, told: str, wait: float | None = None) -> None:
        super().__init__(told)
        self.wait = wait


class Judge:
    """The reward that asks the judge for a grade of each answer, at temperature 0."""

    def __init__(self, config: JudgeConfig) -> None:
        self._config = config
        self._url = f"{config.url.rstrip('/')}/chat/completions"
        self._lock = threading.Lock()
        self._used: Counter[str] = Counter()

    def __call__(self, candidates: Sequence[Candidate]) -> Grades:
        """Return one reward per candidate: the first number of the reply, divided by the highest grade.

        A request that fails for good costs its own answer only, unless the server is gone (``complete``).

        Raises:
            ConfigError: The environment variable of the key is not set.
        """
        replies = self.complete([self._config.ask(one) for one in candidates], [one.prompt for one in candidates])
        return graded([self._grade(one) if isinstance(one, str) else str(one) for one in replies])

    def _grade(self, reply: str) -> object:
        found = _NUMBER.search(reply)
        if found is None:
            return f"the judge replied {reply.strip()[:80]!r} without a number"
        grade = float(found.group())
        if not 0 <= grade <= self._config.best:
            return f"the judge's grade {grade:g} is not between 0 and {self._config.best:g}"
        return grade / self._config.best

    @cached_property
    def _key(self) -> str | None:
        """Read by the first request, so that a configuration can be built where the key is not set."""
        name = self._config.api_key_env
        if name is None:
            return None
        key = os.environ.get(name, "").strip()
        where = "dynamic.selector.judge.api_key_env"
        if not key:
            raise ConfigError(f"{where}: the environment variable {name!r} is not set")
        if not all("!" <= letter <= "~" for letter in key):  # would be shown in a library's error
            raise ConfigError(f"{where}: {name!r} holds characters that cannot be in a key")
        return key

    def complete(self, requests: Sequence[str], prompts: Sequence[str] | None = None) -> list[str | JudgeError]:
        """Return the reply to each request, in their order, or why there is none.

        When requests about three ``prompts`` (one for each request; None: the requests) have failed in a row since the
        server is gone, those not yet answered are cancelled and have the last reason too. Answers to one prompt may
        share what makes a server fail.

        Raises:
            ConfigError: The environment variable of the key is not set.
        """
        started, stop = time.perf_counter(), threading.Event()
        found: list[str | JudgeError | None] = [None] * len(requests)
        away: set[str] = set()
        last = JudgeError("cancelled")
        with ThreadPoolExecutor(max_workers=self._config.concurrency, thread_name_prefix="judge") as pool:
            pending = {pool.submit(self._ask, i, request, stop): i for i, request in enumerate(requests)}
            try:
                for future in as_completed(pending):
                    i = pending[future]
                    try:
                        found[i] = future.result()
                    except JudgeError as error:
                        found[i] = last = error
                    if not isinstance(found[i], _Gone):
                        away.clear()
                        continue
                    away.add((prompts or requests)[i])
                    if len(away) == _MOST_IN_A_ROW:
                        break
            finally:
                stop.set()
                for future in pending:
                    future.cancel()
        used = ", ".join(f"{count:,} {what}" for what, count in self._used.items())
        logger.info("judge %s: %s in all; %.1f s", self._config.url, used, time.perf_counter() - started)
        return [last if one is None else one for one in found]

    def _ask(self, index: int, request: str, stop: threading.Event) -> str:
        """Send one request until it is answered, its retries are used up, or the others are cancelled."""
        config = self._config
        body = {
            "model": config.model,
            "max_tokens": config.max_tokens,
            "temperature": 0.0,
            "top_p": 1.0,
            "n": 1,
            "seed": index,
            "messages": [{"role": "user", "content": request}],
        }
        jitter = stream(0, "endpoint-backoff", index)
        for attempt in range(config.max_retries + 1):
            if stop.is_set():
                raise JudgeError("cancelled")
            with self._lock:
                self._used.update({"requests": 1, "retries": int(attempt > 0)})
            try:
                return self._text(self._send(body))
            except _Busy as busy:
                if attempt == config.max_retries:
                    raise _Gone(str(busy) + (f" (after {attempt + 1} tries)" if attempt else "")) from busy
                if (busy.wait or 0.0) > _MOST_WAIT_SECONDS:
                    asked = f"the server asks to wait {busy.wait:.0f} s, longer than {_MOST_WAIT_SECONDS:g} s"
                    raise _Gone(f"{busy}; {asked}") from busy
                wait = min(_WAIT_SECONDS * 2.0**attempt * jitter.uniform(0.5, 1.5), _MOST_WAIT_SECONDS)
                wait = max(wait, busy.wait or 0.0)
                logger.info("judge: %s; trying again in %.1f s", busy, wait)
                stop.wait(wait)
        raise AssertionError("the last attempt returns or raises")

    def _text(self, answer: Any) -> str:
        """Return the text of an answer, and add up the tokens used."""
        try:
            text = answer["choices"][0]["message"]["content"]
            usage = answer.get("usage") or {}
            used = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
            if not isinstance(text, str):
                raise TypeError("content is not a text")
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            told = f"{type(error).__name__}: {error}"
            raise JudgeError(f"{self._url} answered without a text ({told}): {json.dumps(answer)[:_SHOWN]}") from error
        with self._lock:
            self._used.update({"tokens in": used[0], "tokens out": used[1]})
        return text

    def _send(self, body: Any) -> Any:
        """Return the JSON value that the server answers.

        Raises:
            JudgeError: There is none; ``_Gone`` where that is so of every request, ``_Busy`` where trying again may
                help. The key is not in the message.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        request = urllib.request.Request(self._url, json.dumps(body).encode("utf-8"), headers, method="POST")
        timeout = self._config.timeout_seconds
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            with error:
                refused = self._refusal(error)
            if error.code in _AGAIN:
                raise _Busy(refused, _retry_after(error.headers.get("Retry-After"))) from None
            raise (_Gone if error.code in _OF_ALL else JudgeError)(refused) from None
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            named = reason if isinstance(reason, str) else f"{type(reason).__name__}: {reason}"
            slow = isinstance(reason, TimeoutError)
            hopeless = isinstance(reason, (ssl.SSLCertVerificationError, http.client.InvalidURL))
            failed = self._told(f"no answer within {timeout:g} s" if slow else f"cannot be reached: {named}")
            raise (_Gone(failed) if hopeless else _Busy(failed)) from None
        try:
            return json.loads(content)
        except ValueError:
            raise JudgeError(self._told("answered with something that is not JSON: ", content or b"(empty)")) from None

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        try:
            content = error.read()
        except (OSError, http.client.HTTPException):
            content = b""
        location, name = error.headers.get("Location"), self._config.api_key_env
        hint = {
            401: f"the key in {name} was refused: "
            if name
            else "a key is required: name its environment variable in api_key_env: ",
            404: f"no such address or model {self._config.model!r}: ",
        }.get(401 if error.code == 403 else error.code, "")
        moved = f" (redirects to {location}; redirects are not followed)" if location else ""
        return self._told(f"{hint}HTTP {error.code} {error.reason}{moved}: ", content or b"(empty)")

    def _told(self, text: str, content: bytes = b"") -> str:
        """Return a message about the server, with the beginning of its answer; the key is hidden, if it is echoed."""
        shown = [text, content.decode("utf-8", errors="replace")]
        told, answer = (part.replace(self._key, "***") if self._key else part for part in shown)
        return f"{self._url}: {told}{answer[:_SHOWN]}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


def _retry_after(value: str | None) -> float | None:
    """Read seconds or an HTTP date; anything else counts as not given."""
    if value is None:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return None
