"""Settings of an OpenAI-compatible server that is asked for completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dataflex.errors import ConfigError

__all__ = ["EndpointConfig"]


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
