"""One POST of JSON over HTTP, with every failure turned into a value that says whether to try again."""

from __future__ import annotations

import email.utils
import http.client
import json
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

__all__ = ["Failure", "post_json"]

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
