"""The judge against a server on this machine that answers, refuses, stalls and breaks off."""

from __future__ import annotations

import email.utils
import json
import logging
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import numpy as np
import pytest

from dataflex.errors import ConfigError
from dataflex.rewards import judge as module
from dataflex.rewards.base import Candidate
from dataflex.rewards.judge import Judge, JudgeConfig

KEY = "sk-very-secret-0815"
CANDIDATES = [Candidate(prompt="2 + 2?", answer="4", reference="4")]


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
    """Echo the prompt."""
    message = {"role": "assistant", "content": body["messages"][-1]["content"] + "!"}
    usage = {"prompt_tokens": 10, "completion_tokens": 3}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return 200, {}, json.dumps({"choices": [choice], "usage": usage}).encode()


def refusal(status, text="busy", **headers):
    content = json.dumps({"error": {"message": text}}).encode()
    return lambda number, body: (status, {name.replace("_", "-"): value for name, value in headers.items()}, content)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(module, "_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(module, "_MOST_WAIT_SECONDS", 3.0)


def judge(server, **changes):
    return Judge(
        JudgeConfig(**{"url": server.url, "model": "tiny", "timeout_seconds": 5.0, "max_retries": 2, **changes})
    )


def failure(one, request="q"):
    """Return why there is no reply to one request."""
    (found,) = one.complete([request])
    assert not isinstance(found, str)
    return str(found)


def used(one):
    return [one._used[name] for name in ("requests", "retries", "tokens in", "tokens out")]


def first_then(*scripts):
    """Use the given scripts for the first requests and answer all later ones."""
    return lambda number, body: (scripts[number] if number < len(scripts) else good)(number, body)


def test_replies_keep_the_order_and_the_cost_is_added_up(server, monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", KEY)
    together = threading.Barrier(4, timeout=5)

    def answer(number, body):
        if number < 4:
            together.wait()  # four at once
        time.sleep(0.02 if "3" in body["messages"][-1]["content"] else 0.0)
        return good(number, body)

    server.script = answer
    caplog.set_level(logging.INFO)
    one = judge(server, url=server.url + "/", api_key_env="MY_KEY", concurrency=4, max_tokens=33)
    assert one.complete([f"q{i}" for i in range(12)]) == [f"q{i}!" for i in range(12)]
    assert server.most_busy == 4
    path, headers, body, _ = next(request for request in server.requests if "q11" in str(request[2]))
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    message = {"role": "user", "content": "q11"}
    settings = {"model": "tiny", "max_tokens": 33, "temperature": 0.0, "top_p": 1.0, "n": 1, "seed": 11}
    assert body == {**settings, "messages": [message]}
    assert used(one) == [12, 0, 120, 36]
    assert "12 requests, 0 retries, 120 tokens in, 36 tokens out in all" in caplog.text
    assert KEY not in caplog.text + repr(one)
    assert one.complete([]) == []
    judge(server).complete(["q"])
    assert "Authorization" not in server.requests[-1][1]


def cut_off(number, body):
    status, _, content = good(number, body)
    return status, {"Content-Length": str(len(content) + 50)}, content


@pytest.mark.parametrize(
    "script", [refusal(429), refusal(500), refusal(502), refusal(503), refusal(504), refusal(408), cut_off]
)
def test_what_may_pass_is_tried_again(server, script):
    server.script = first_then(script, script)
    one = judge(server)
    assert one.complete(["q"]) == ["q!"]
    assert used(one) == [3, 2, 10, 3]
    server.requests.clear()
    server.script = script
    assert "(after 3 tries)" in failure(one)
    assert len(server.requests) == 3


def test_waits_grow_and_are_the_same_each_time(server, monkeypatch):
    monkeypatch.setattr(module, "_WAIT_SECONDS", 0.05)
    server.script = refusal(503)
    waits = []
    for _ in range(2):
        one = judge(server, max_retries=3)
        server.requests.clear()
        assert "HTTP 503" in failure(one)
        times = [request[3] for request in server.requests]
        waits.append([later - sooner for sooner, later in pairwise(times)])
    for wait, low in zip(waits[0], (0.05, 0.1, 0.2), strict=True):
        assert 0.5 * low <= wait < 1.5 * low + 0.2
    assert max(abs(a - b) for a, b in zip(*waits, strict=True)) < 0.2


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(server, form):
    asked = "0.4" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
    server.script = first_then(refusal(429, Retry_After=asked))
    assert judge(server).complete(["q"]) == ["q!"]
    waited = server.requests[1][3] - server.requests[0][3]
    assert 0.4 <= waited < 3.0
    server.script = refusal(429, "quota used up", Retry_After="7200")
    server.requests.clear()
    assert re.search(r"quota used up.*asks to wait 7200 s, longer than 3 s", failure(judge(server)))
    assert len(server.requests) == 1
    server.script = first_then(refusal(429, Retry_After="soon"))  # not a time: the usual wait
    assert judge(server).complete(["q"]) == ["q!"]


def test_a_silent_server_times_out(server):
    done = threading.Event()
    server.script = lambda number, body: (done.wait(3), good(number, body))[1]
    assert "no answer within 0.2 s (after 2 tries)" in failure(judge(server, timeout_seconds=0.2, max_retries=1))
    done.set()


def test_nobody_there(server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    assert re.search(r"cannot be reached: ConnectionRefusedError.*\(after 3 tries\)", failure(judge(server, url=url)))


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_named_but_not_shown(server, status, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", KEY)
    server.script = refusal(status, f"invalid key {KEY}")
    told = failure(judge(server, api_key_env="MY_KEY"))
    assert "the key in MY_KEY was refused" in told
    assert len(server.requests) == 1
    assert KEY not in told + caplog.text
    assert "***" in told
    assert "a key is required: name its environment variable in api_key_env" in failure(judge(server))
    monkeypatch.setenv("MY_KEY", f"{KEY}\nX-Other: 1")
    with pytest.raises(ConfigError, match="'MY_KEY' holds characters that cannot be in a key") as problem:
        judge(server, api_key_env="MY_KEY")(CANDIDATES)
    assert KEY not in str(problem.value)
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ConfigError, match=r"judge\.api_key_env: the environment variable 'MY_KEY' is not set"):
        judge(server, api_key_env="MY_KEY")(CANDIDATES)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (refusal(404, "model not found"), "no such address or model 'tiny'.*model not found"),
        (refusal(400, "context too long"), "HTTP 400 .*context too long"),
        (refusal(307, Location="http://127.0.0.1:1/elsewhere"), "redirects are not followed"),
        (lambda number, body: (200, {}, b"<html>hello</html>"), "not JSON: <html>hello</html>"),
        (lambda number, body: (200, {}, b"{}"), "without a text .*KeyError"),
        (lambda number, body: (200, {}, b"[1]"), "without a text .*TypeError"),
        (lambda number, body: (200, {}, b'{"choices": []}'), "without a text .*IndexError"),
        (lambda number, body: (200, {}, b'{"choices": [{"message": {"content": null}}]}'), "without a text .*null"),
        (lambda number, body: (200, {}, b'{"choices": [{"text": "hm"}]}'), "without a text .*'message'"),
    ],
)
def test_what_will_not_get_better_fails_at_once(server, script, message):
    server.script = script
    assert re.search(message, failure(judge(server)))
    assert len(server.requests) == 1


def test_a_server_that_is_gone_for_three_prompts_cancels_the_rest(server, monkeypatch):
    def answer(number, body):
        return refusal(404 if asked(body) in ("q0", "q1", "q2") else 503)(number, body)

    monkeypatch.setattr(module, "_WAIT_SECONDS", 2.0)
    server.script = answer
    found = judge(server, concurrency=3, max_retries=50).complete([f"q{i}" for i in range(200)])
    assert all("no such address or model" in str(one) for one in found)
    assert len(server.requests) < 20  # nobody goes on waiting


def test_a_request_that_is_refused_leaves_the_other_replies(server):
    server.script = lambda number, body: (refusal(400) if asked(body) == "q0" else good)(number, body)
    found = judge(server, concurrency=3).complete([f"q{i}" for i in range(20)])
    assert "HTTP 400" in str(found[0])
    assert found[1:] == [f"q{i}!" for i in range(1, 20)]
    assert len(server.requests) == 20  # each is asked once


def test_an_answer_without_usage_costs_nothing_known(server):
    server.script = lambda number, body: (200, {}, b'{"choices": [{"message": {"content": "hi"}}], "usage": null}')
    one = judge(server)
    assert one.complete(["q"]) == ["hi"]
    assert used(one) == [1, 0, 0, 0]


# ---------------------------------------------------------------- grades


def candidates(*answers, prompt="2 + 2?"):
    return [Candidate(prompt=prompt, answer=answer, reference="the answer is 4") for answer in answers]


def reply(text):
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def asked(body):
    return body["messages"][0]["content"]


def test_a_judges_first_number_is_the_grade(server):
    server.script = lambda number, body: reply(
        {"a": "7", "b": "Grade: 2.5 of 10", "c": "great", "d": "11", "e": "-1"}[asked(body).split("[Answer]\n")[1][0]]
    )
    found = judge(server)(candidates("a", "b", "c", "d", "e"))
    np.testing.assert_allclose(found.values[:2], [0.7, 0.25])
    assert np.isnan(found.values[2:]).all()
    assert "'great' without a number" in found.problems[0]
    assert "11 is not between 0 and 10" in found.problems[1]
    first = asked(server.requests[0][2])
    assert "2 + 2?" in first
    assert "the answer is 4" in first
    assert "to 10 (" in first
    assert server.requests[0][2]["temperature"] == 0.0


def test_a_request_that_fails_costs_only_its_answer(server):
    def script(number, body):
        return (400, {}, b"no") if "poison" in asked(body) else reply("10")

    server.script = script
    found = judge(server, concurrency=1, max_retries=0)(candidates("a", "poison", "b"))
    assert np.isnan(found.values).tolist() == [False, True, False]
    assert "400" in found.problems[0]


@pytest.mark.parametrize("status", [400, 404, 500])
def test_a_prompt_whose_answers_all_fail_costs_no_other_prompts(server, status):
    server.script = lambda number, body: (status, {}, b"no") if "poison" in asked(body) else reply("10")
    asks = [*candidates("a"), *candidates(*"bcdef", prompt="poison"), *candidates("g", "h", prompt="2 + 3?")]
    found = judge(server, concurrency=2, max_retries=0)(asks)
    assert np.isnan(found.values).tolist() == [False, True, True, True, True, True, False, False]


def test_a_judge_that_is_away_is_given_up(server):
    server.script = lambda number, body: (500, {}, b"down")
    asks = [one for i in range(30) for one in candidates("x", prompt=str(i))]
    found = judge(server, concurrency=1, max_retries=0)(asks)
    assert np.isnan(found.values).all()
    assert "HTTP 500" in found.problems[-1]
    assert len(server.requests) <= 5


def test_a_judges_instruction_may_hold_braces_of_its_own():
    config = JudgeConfig(url="http://x", model="m", instruction='{{"a": "{answer}"}}')
    assert config.ask(candidates("{prompt}")[0]) == '{"a": "{prompt}"}'
