"""The endpoint client against a server on this machine that answers, refuses, stalls and breaks off."""

from __future__ import annotations

import email.utils
import json
import logging
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest

from dataflex.errors import ConfigError, DataFlexError
from dataflex.signals.endpoint import EndpointClient, EndpointConfig, EndpointError

KEY = "sk-very-secret-0815"


class Server:
    """Answers with what ``script`` gives for (number of the request, body): (status, headers, content)."""

    def __init__(self):
        self.script = None
        self.requests = []
        self.busy = self.most_busy = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                with lock:
                    outer.busy += 1
                    outer.most_busy = max(outer.most_busy, outer.busy)
                    number = len(outer.requests)
                    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                    outer.requests.append((self.path, dict(self.headers), body, time.monotonic()))
                try:
                    status, headers, content = outer.script(number, body)
                finally:  # before the answer goes out: the client may send its next request at once
                    with lock:
                        outer.busy -= 1
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    if "Content-Length" not in headers:
                        self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client's time was up

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    one = Server()
    yield one
    one.close()


def good(number, body):
    """Echo the prompt, once per sample; the choices come in the wrong order."""
    chat = "messages" in body
    prompt = body["messages"][-1]["content"] if chat else body["prompt"]
    choices = []
    for index in reversed(range(body["n"])):
        text = f"{prompt}!{index}"
        choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choices.append({"index": index, "finish_reason": "length" if index else "stop", **choice})
    usage = {"prompt_tokens": 10, "completion_tokens": 3 * body["n"]}
    return 200, {}, json.dumps({"choices": choices, "usage": usage}).encode()


def refusal(status, text="busy", **headers):
    content = json.dumps({"error": {"message": text}}).encode()
    return lambda number, body: (status, {name.replace("_", "-"): value for name, value in headers.items()}, content)


def client(server, **changes):
    settings = {
        "url": server.url,
        "model": "tiny",
        "timeout_seconds": 5.0,
        "max_retries": 2,
        "backoff_seconds": 0.01,
        "backoff_max_seconds": 3.0,
        **changes,
    }
    return EndpointClient(config=EndpointConfig(**settings))


def first_then(*scripts):
    """Use the given scripts for the first requests and answer all later ones."""
    return lambda number, body: (scripts[number] if number < len(scripts) else good)(number, body)


def test_chat_keeps_the_order_and_adds_up_the_cost(server, monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", KEY)
    together = threading.Barrier(4, timeout=5)

    def answer(number, body):
        if number < 4:
            together.wait()  # four at once
        time.sleep(0.02 if "3" in body["messages"][-1]["content"] else 0.0)
        return good(number, body)

    server.script = answer
    caplog.set_level(logging.INFO)
    one = client(
        server,
        api_key_env="MY_KEY",
        num_samples=2,
        concurrency=4,
        temperature=0.7,
        top_p=0.9,
        max_tokens=33,
        seed=100,
        price_in_per_million=2.0,
        price_out_per_million=10.0,
    )
    prompts = [f"q{i}" for i in range(11)]
    prompts.append([{"role": "system", "content": "be short"}, {"role": "user", "content": "q11"}])
    answers = one.complete(prompts)
    assert [[sample.text for sample in samples] for samples in answers] == [[f"q{i}!0", f"q{i}!1"] for i in range(12)]
    assert [sample.finished for sample in answers[0]] == [True, False]
    assert server.most_busy == 4
    path, headers, body, _ = next(request for request in server.requests if len(request[2]["messages"]) == 2)
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    del body["messages"]
    assert body == {"model": "tiny", "max_tokens": 33, "temperature": 0.7, "top_p": 0.9, "n": 2, "seed": 111}
    assert (one.cost.requests, one.cost.retries, one.cost.tokens_in, one.cost.tokens_out) == (12, 0, 120, 72)
    assert one.cost.price == pytest.approx((120 * 2 + 72 * 10) / 1e6)
    assert 0 < one.cost.seconds < 20
    assert "12 requests (0 of them retries), 120 tokens in, 72 tokens out" in caplog.text
    assert KEY not in caplog.text + repr(one)
    assert one.complete([]) == []


def test_plain_completions(server):
    server.script = good
    one = client(server, api="completions", url=server.url + "/")
    assert [samples[0].text for samples in one.complete(["a", "b"])] == ["a!0", "b!0"]
    assert server.requests[0][0] == "/v1/completions"
    assert "Authorization" not in server.requests[0][1]
    with pytest.raises(EndpointError, match="plain completions take text"):
        one.complete([[{"role": "user", "content": "x"}]])


def cut_off(number, body):
    status, _, content = good(number, body)
    return status, {"Content-Length": str(len(content) + 50)}, content


@pytest.mark.parametrize(
    "script", [refusal(429), refusal(500), refusal(502), refusal(503), refusal(504), refusal(408), cut_off]
)
def test_what_may_pass_is_tried_again(server, script):
    server.script = first_then(script, script)
    one = client(server)
    assert one.complete(["q"])[0][0].text == "q!0"
    assert (one.cost.requests, one.cost.retries, one.cost.tokens_in) == (3, 2, 10)
    server.requests.clear()
    server.script = script
    with pytest.raises(EndpointError, match=r"\(after 3 tries\)"):
        one.complete(["q"])
    assert len(server.requests) == 3


def test_back_off_grows_and_is_the_same_each_time(server):
    server.script = refusal(503)
    waits = []
    for _ in range(2):
        one = client(server, max_retries=3, backoff_seconds=0.05)
        server.requests.clear()
        with pytest.raises(EndpointError, match="HTTP 503"):
            one.complete(["q"])
        times = [request[3] for request in server.requests]
        waits.append([later - sooner for sooner, later in pairwise(times)])
    for wait, low in zip(waits[0], (0.05, 0.1, 0.2), strict=True):
        assert 0.5 * low <= wait < 1.5 * low + 0.2
    assert max(abs(a - b) for a, b in zip(*waits, strict=True)) < 0.2


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(server, form):
    asked = "0.4" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
    server.script = first_then(refusal(429, Retry_After=asked))
    assert client(server).complete(["q"])[0][0].text == "q!0"
    waited = server.requests[1][3] - server.requests[0][3]
    assert 0.4 <= waited < 3.0
    server.script = refusal(429, "quota used up", Retry_After="7200")
    server.requests.clear()
    with pytest.raises(EndpointError, match=r"asks to wait 7200 s, longer than backoff_max_seconds .*quota used up"):
        client(server).complete(["q"])
    assert len(server.requests) == 1
    server.script = first_then(refusal(429, Retry_After="soon"))  # not a time: the usual back-off
    assert client(server).complete(["q"])[0][0].text == "q!0"


def test_a_silent_server_times_out(server):
    done = threading.Event()
    server.script = lambda number, body: (done.wait(3), good(number, body))[1]
    with pytest.raises(EndpointError, match=r"no answer within 0\.2 s \(after 2 tries\)"):
        client(server, timeout_seconds=0.2, max_retries=1).complete(["q"])
    done.set()


def test_nobody_there(server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(EndpointError, match=r"cannot be reached: ConnectionRefusedError.*\(after 3 tries\)"):
        client(server, url=url).complete(["q"])


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_named_but_not_shown(server, status, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", KEY)
    server.script = refusal(status, f"invalid key {KEY}")
    with pytest.raises(EndpointError, match="the key in MY_KEY was refused") as error:
        client(server, api_key_env="MY_KEY").complete(["q"])
    assert len(server.requests) == 1
    assert KEY not in str(error.value) + caplog.text
    assert "***" in str(error.value)
    with pytest.raises(EndpointError, match="it wants a key: name its variable in api_key_env"):
        client(server).complete(["q"])
    monkeypatch.setenv("MY_KEY", f"{KEY}\nX-Other: 1")
    with pytest.raises(ConfigError, match="'MY_KEY' holds characters that cannot be in a key") as problem:
        client(server, api_key_env="MY_KEY")
    assert KEY not in str(problem.value)
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ConfigError, match="the environment variable 'MY_KEY' is not set"):
        client(server, api_key_env="MY_KEY")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (refusal(404, "model not found"), "no such address or model 'tiny'.*model not found"),
        (refusal(400, "context too long"), "HTTP 400 .*context too long"),
        (refusal(307, Location="http://127.0.0.1:1/elsewhere"), "redirects are not followed"),
        (lambda number, body: (200, {}, b"<html>hello</html>"), "not JSON: <html>hello</html>"),
        (lambda number, body: (200, {}, b"{}"), "without completions .*KeyError"),
        (lambda number, body: (200, {}, b"[1]"), "without completions .*TypeError"),
        (lambda number, body: (200, {}, b'{"choices": []}'), "answered with 0 completions"),
        (
            lambda number, body: (200, {}, b'{"choices": [{"message": {"content": null}}]}'),
            r"answered with 1 completions \[None\]",
        ),
        (lambda number, body: (200, {}, b'{"choices": [{"text": "hm"}]}'), "without completions .*'message'"),
    ],
)
def test_what_will_not_get_better_fails_at_once(server, script, message):
    server.script = script
    with pytest.raises(EndpointError, match=message):
        client(server).complete(["q"])
    assert len(server.requests) == 1
    assert issubclass(EndpointError, DataFlexError)


def test_one_failure_calls_off_the_rest(server):
    def answer(number, body):
        if body["messages"][-1]["content"] == "q0":
            return refusal(400)(number, body)
        return refusal(503)(number, body)

    server.script = answer
    one = client(server, concurrency=3, max_retries=50, backoff_seconds=2.0)
    started = time.monotonic()
    with pytest.raises(EndpointError, match="HTTP 400"):
        one.complete([f"q{i}" for i in range(200)])
    assert time.monotonic() - started < 1.5  # nobody waits for a back-off to end
    assert len(server.requests) < 20


def test_an_answer_without_usage_costs_nothing_known(server):
    server.script = lambda number, body: (200, {}, b'{"choices": [{"message": {"content": "hi"}}], "usage": null}')
    one = client(server)
    assert one.complete(["q"])[0][0].text == "hi"
    assert (one.cost.tokens_in, one.cost.tokens_out) == (0, 0)


def test_all_wrong_settings_are_told_together():
    with pytest.raises(ConfigError) as error:
        EndpointConfig(url="localhost:8000", model="", api="responses", temperature=-1, max_retries=-1, concurrency=0)
    assert [problem.split(":")[0] for problem in error.value.problems] == [
        f"endpoint.{name}" for name in ("url", "model", "api", "temperature", "max_retries", "concurrency")
    ]
