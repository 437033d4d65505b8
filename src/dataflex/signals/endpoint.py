"""Asks an OpenAI-compatible server (vLLM or any other) for completions: retries, order kept, cost shown.

Standard library only. Redirects are not followed: they would carry the key to another host. The key is
read from an environment variable, never from a file, and appears in no message.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import logging
import os
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, Literal

from dataflex.errors import ConfigError, DataFlexError
from dataflex.rng import stream


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """Where and how to ask.

    Attributes:
        url: Base address with the version, as in ``http://127.0.0.1:8000/v1``.
        model: Name of the model at the server.
        api: ``chat`` for chat completions, ``completions`` for plain text.
        api_key_env: Name of the environment variable that holds the key; None sends none.
        max_tokens: Tokens generated at most per sample.
        temperature: 0 is greedy.
        top_p: Smallest set of tokens whose probabilities reach this sum.
        num_samples: Samples per prompt.
        seed: Sent with each request (plus its index), and seed of the waiting times' jitter.
        timeout_seconds: Without any byte from the server.
        max_retries: Further tries of a request after the first.
        backoff_seconds: First waiting time; doubled at each retry, times 0.5 to 1.5.
        backoff_max_seconds: Longest waiting time; a server that asks for more is an error.
        concurrency: Requests under way at once.
        price_in_per_million: Price of a million prompt tokens, in any currency.
        price_out_per_million: Price of a million generated tokens.

    Raises:
        ConfigError: All values that cannot be, together.
    """

    url: str
    model: str
    api: Literal["chat", "completions"] = "chat"
    api_key_env: str | None = None
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    num_samples: int = 1
    seed: int = 0
    timeout_seconds: float = 120.0
    max_retries: int = 6
    backoff_seconds: float = 1.0
    backoff_max_seconds: float = 60.0
    concurrency: int = 8
    price_in_per_million: float = 0.0
    price_out_per_million: float = 0.0

    def __post_init__(self) -> None:
        rules = (
            ("url", self.url.startswith(("http://", "https://")), "an http:// or https:// address"),
            ("model", bool(self.model), "the name of a model"),
            ("api", self.api in ("chat", "completions"), "'chat' or 'completions'"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("num_samples", self.num_samples >= 1, "at least 1"),
            ("timeout_seconds", self.timeout_seconds > 0, "above 0"),
            ("max_retries", self.max_retries >= 0, "0 or more"),
            ("backoff_seconds", self.backoff_seconds > 0, "above 0"),
            ("backoff_max_seconds", self.backoff_max_seconds >= self.backoff_seconds, "at least backoff_seconds"),
            ("concurrency", self.concurrency >= 1, "at least 1"),
            ("price_in_per_million", self.price_in_per_million >= 0, "0 or more"),
            ("price_out_per_million", self.price_out_per_million >= 0, "0 or more"),
        )
        problems = [
            f"endpoint.{name}: must be {wanted}, found {getattr(self, name)!r}"
            for name, holds, wanted in rules
            if not holds
        ]
        if problems:
            raise ConfigError(problems)


_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_SHOWN = 300


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a request was not answered.

    Attributes:
        reason: For people; holds no key.
        again: Whether trying again may help.
        status: HTTP status, or None when there was none.
        retry_after: Seconds that the server asked to wait, or None.
    """

    reason: str
    again: bool
    status: int | None = None
    retry_after: float | None = None


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would carry the key to another host."""

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


def post_json(url: str, body: Any, *, key: str | None, timeout_seconds: float) -> Any:
    """Send ``body`` and return the JSON value answered, or a ``Failure``.

    Args:
        url: Complete address.
        body: JSON value.
        key: Sent as a bearer token; None sends none.
        timeout_seconds: Without any byte from the server.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode("utf-8"), headers, method="POST")
    opener = urllib.request.build_opener(_StayHere)
    try:
        with opener.open(request, timeout=timeout_seconds) as response:
            content = response.read()
    except urllib.error.HTTPError as error:
        with error:
            return _refused(error, key)
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        slow = isinstance(reason, TimeoutError)
        text = f"no answer within {timeout_seconds:g} s" if slow else f"cannot be reached: {_named(reason)}"
        hopeless = isinstance(reason, (ssl.SSLCertVerificationError, http.client.InvalidURL))
        return Failure(reason=_without(text, key), again=not hopeless)
    try:
        return json.loads(content)
    except ValueError:
        return Failure(reason=f"answered with something that is not JSON: {_shown(content, key)}", again=False)


def _refused(error: urllib.error.HTTPError, key: str | None) -> Failure:
    try:
        content = error.read()
    except (OSError, http.client.HTTPException):
        content = b""
    location = error.headers.get("Location")
    moved = f" (redirects to {location}; redirects are not followed)" if location else ""
    return Failure(
        reason=_without(f"HTTP {error.code} {error.reason}{moved}: {_shown(content, key)}", key),
        again=error.code in _AGAIN,
        status=error.code,
        retry_after=_retry_after(error.headers.get("Retry-After")),
    )


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


def _named(reason: Any) -> str:
    return str(reason) if isinstance(reason, str) else f"{type(reason).__name__}: {reason}"


def _shown(content: bytes, key: str | None) -> str:
    return _without(content.decode("utf-8", errors="replace"), key)[:_SHOWN] or "(empty)"


def _without(text: str, key: str | None) -> str:
    """Take the key out of a text that a server may have echoed it in."""
    return text.replace(key, "***") if key else text


logger = logging.getLogger(__name__)

Message = dict[str, str]


class EndpointError(DataFlexError):
    """A server could not be reached, refused, or answered with something else than completions."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sample.

    Attributes:
        text: What the model wrote.
        finished: True when it ended by itself, False when it was cut off.
    """

    text: str
    finished: bool


@dataclass(kw_only=True)
class Cost:
    """What has been spent so far.

    Attributes:
        requests: Requests sent, retries included.
        retries: Requests sent again.
        tokens_in: Prompt tokens, as counted by the server.
        tokens_out: Generated tokens, as counted by the server.
        seconds: Wall-clock time in ``complete``.
        price: By the configured prices.
    """

    requests: int = 0
    retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    price: float = 0.0

    def __str__(self) -> str:
        price = f", price {self.price:.4f}" if self.price else ""
        return (
            f"{self.requests:,} requests ({self.retries:,} of them retries), {self.tokens_in:,} tokens in, "
            f"{self.tokens_out:,} tokens out, {self.seconds:.1f} s{price}"
        )


@dataclass(kw_only=True)
class EndpointClient:
    """Asks for completions; may be used again and again, ``cost`` adds up.

    Raises:
        ConfigError: The environment variable of the key is not set.
    """

    config: EndpointConfig
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        name = self.config.api_key_env
        self._key = os.environ.get(name, "").strip() if name is not None else None
        if name is not None and not self._key:
            raise ConfigError(f"endpoint.api_key_env: the environment variable {name!r} is not set")
        if self._key and not all("!" <= letter <= "~" for letter in self._key):  # would be shown in a library's error
            raise ConfigError(f"endpoint.api_key_env: {name!r} holds characters that cannot be in a key")
        self._lock = threading.Lock()

    def complete(self, prompts: Sequence[str | Sequence[Message]]) -> list[list[Completion]]:
        """Return ``num_samples`` completions of each prompt, in the order of the prompts.

        Args:
            prompts: Text, or for ``chat`` also lists of ``{"role": ..., "content": ...}``.

        Raises:
            EndpointError: A request failed for good; those not yet sent are called off.
        """
        started = time.perf_counter()
        stop = threading.Event()
        answers: list[list[Completion]] = [[] for _ in prompts]
        with ThreadPoolExecutor(max_workers=self.config.concurrency, thread_name_prefix="endpoint") as pool:
            pending = {pool.submit(self._ask, i, prompt, stop): i for i, prompt in enumerate(prompts)}
            try:
                for future in as_completed(pending):
                    answers[pending[future]] = future.result()
            finally:
                stop.set()  # on success nothing waits any more
                for future in pending:
                    future.cancel()
                self.cost.seconds += time.perf_counter() - started
        logger.info("endpoint %s: %s", self.config.url, self.cost)
        return answers

    def _ask(self, index: int, prompt: str | Sequence[Message], stop: threading.Event) -> list[Completion]:
        """Send one request until it is answered, its retries are used up, or the others are called off."""
        config = self.config
        path = "/chat/completions" if config.api == "chat" else "/completions"
        url, body = config.url.rstrip("/") + path, self._body(index, prompt)
        jitter = stream(config.seed, "endpoint-backoff", index)
        for attempt in range(config.max_retries + 1):
            if stop.is_set():
                raise EndpointError("called off")
            with self._lock:
                self.cost.requests += 1
                self.cost.retries += attempt > 0
            answer = post_json(url, body, key=self._key, timeout_seconds=config.timeout_seconds)
            if not isinstance(answer, Failure):
                return self._read(url, answer)
            if not answer.again or attempt == config.max_retries:
                raise EndpointError(self._explain(url, answer, attempt + 1))
            wait = min(config.backoff_seconds * 2.0**attempt * jitter.uniform(0.5, 1.5), config.backoff_max_seconds)
            if answer.retry_after is not None:
                if answer.retry_after > config.backoff_max_seconds:
                    raise EndpointError(
                        f"{url} asks to wait {answer.retry_after:.0f} s, longer than backoff_max_seconds "
                        f"({config.backoff_max_seconds:g}): {answer.reason}"
                    )
                wait = max(wait, answer.retry_after)
            logger.info("endpoint %s: %s; trying again in %.1f s", url, answer.reason, wait)
            stop.wait(wait)
        raise AssertionError("the last attempt returns or raises")

    def _body(self, index: int, prompt: str | Sequence[Message]) -> dict[str, Any]:
        config = self.config
        body: dict[str, Any] = {
            "model": config.model,
            "max_tokens": config.max_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "n": config.num_samples,
            "seed": config.seed + index,
        }
        if config.api == "chat":
            body["messages"] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        elif isinstance(prompt, str):
            body["prompt"] = prompt
        else:
            raise EndpointError(f"prompt {index}: plain completions take text; use api 'chat' for messages")
        return body

    def _read(self, url: str, answer: Any) -> list[Completion]:
        """Take the completions out of an answer and add up its usage."""
        chat = self.config.api == "chat"
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice.get("index", 0))
            texts = [choice["message"]["content"] if chat else choice["text"] for choice in choices]
            finished = [choice.get("finish_reason") == "stop" for choice in choices]
            usage = answer.get("usage") or {}
            used = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            shown = json.dumps(answer)[:300]
            raise EndpointError(
                f"{url} answered without completions ({type(error).__name__}: {error}): {shown}"
            ) from error
        if len(texts) != self.config.num_samples or not all(isinstance(text, str) for text in texts):
            raise EndpointError(
                f"{url} answered with {len(texts)} completions {str(texts)[:200]}; "
                f"asked for {self.config.num_samples} texts"
            )
        with self._lock:
            self.cost.tokens_in += used[0]
            self.cost.tokens_out += used[1]
            price = used[0] * self.config.price_in_per_million + used[1] * self.config.price_out_per_million
            self.cost.price += price / 1e6
        return [Completion(text=text, finished=end) for text, end in zip(texts, finished, strict=True)]

    def _explain(self, url: str, failure: Failure, attempts: int) -> str:
        tries = f" (after {attempts} tries)" if attempts > 1 else ""
        if failure.status in (401, 403):
            name = self.config.api_key_env
            hint = f"the key in {name} was refused" if name else "it wants a key: name its variable in api_key_env"
            return f"{url}: {hint}: {failure.reason}{tries}"
        if failure.status == 404:
            return f"{url}: no such address or model {self.config.model!r}: {failure.reason}{tries}"
        return f"{url}: {failure.reason}{tries}"
