"""SIGTERM: handed on by launchers, an end at the next step with a checkpoint, the same step on every rank."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest

from dataflex.checkpoints import broken_reason, find_resumable
from dataflex.cli import guarded
from dataflex.ending import TERMINATED, Terminated, TermWish, ends_on_term, heed_parent_only, run_child
from dataflex.record.read import read_ending
from tests.ending.conftest import dataflex, environment, start, wait_for


def test_sigterm_becomes_terminated_and_the_handler_goes_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match="the text"), ends_on_term("the text"):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_wish_is_noted_and_said_once(capfd):
    wish = TermWish()
    with wish.noted("[dataflex] SIGTERM"):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
    assert wish.asked
    assert capfd.readouterr().err == "\n[dataflex] SIGTERM\n"


def test_a_child_process_is_not_kept_from_ending():
    with TermWish().noted():
        ready, said = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(said, b"!")  # what comes while a process is forked is lost
            time.sleep(30)
            os._exit(0)
        assert os.read(ready, 1) == b"!"
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_worker_of_a_loader_heeds_its_own_process_only():
    import multiprocessing

    def work(ready):
        heed_parent_only()
        ready.send(True)
        time.sleep(60)

    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=work, args=(theirs,), daemon=True)
    worker.start()
    assert ours.recv()
    for _ in range(2):  # as torchrun does: from another process
        subprocess.run(["sh", "-c", f"kill -TERM {worker.pid}"], check=True)
        worker.join(0.3)
        assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


CHILD = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print('child saves', flush=True), time.sleep(0.5), sys.exit(7)))
signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))
signal.signal(signal.SIGINT, lambda *_: (print('child stops', flush=True), sys.exit(8)))
print('ready', flush=True)
time.sleep(60)
"""
PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored
from dataflex.cli import guarded
from dataflex.ending import run_child
sys.exit(guarded(lambda: run_child([sys.executable, '-c', sys.argv[1]])))
"""


@pytest.mark.parametrize(
    ("number", "code", "told"),
    [
        (signal.SIGTERM, TERMINATED, ["child saves", "dataflex: ended by SIGTERM"]),
        (signal.SIGINT, 1, ["child stops", "dataflex: interrupted"]),
        (signal.SIGHUP, TERMINATED, ["child saves", "dataflex: ended by SIGHUP"]),
    ],
)
def test_a_launcher_hands_signals_on_and_waits(tmp_path, number, code, told):
    log = tmp_path / "log"
    process = start([sys.executable, "-c", PARENT, CHILD], log, environment())
    wait_for(lambda: "ready" in log.read_text(), process)
    process.send_signal(number)
    assert process.wait(timeout=30) == code
    for words in told:
        assert words in log.read_text()


def test_a_child_that_ends_by_itself_gives_its_code():
    assert run_child([sys.executable, "-c", "raise SystemExit(2)"]) == 2


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_sigterm_during_a_command_is_told(name):
    code = (
        "import os, signal, sys, time; from dataflex.cli import guarded\n"
        f"def act():\n    os.kill(os.getpid(), signal.{name})\n    time.sleep(9)\n    return 0\n"
        "sys.exit(guarded(act))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == TERMINATED == 143
    assert done.stderr.startswith("dataflex: ended by SIGTERM")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_an_import_makes_an_error_of_is_told_as_a_signal(number, capsys):
    def act():
        try:
            signal.raise_signal(number)
        except BaseException as error:
            raise ModuleNotFoundError("Could not import module 'TrainerCallback'") from error

    code = guarded(act)
    words = {signal.SIGINT: (1, "interrupted"), signal.SIGTERM: (TERMINATED, "ended by SIGTERM; what was not saved")}
    assert code == words[number][0]
    assert capsys.readouterr().err.startswith(f"dataflex: {words[number][1]}")


HANGS = """
import sys, time
from pathlib import Path
from dataflex.cli import guarded
from dataflex.ending import TermWish, Terminated

def act():
    wish = TermWish()
    with wish.noted("[dataflex] ending after the step"):
        while not wish.asked:
            print("a step", file=sys.stderr, flush=True)
            time.sleep(0.02)
        for stream in (sys.stdout, sys.stderr):  # the rest of the step, and the checkpoint
            print("saving", file=stream, flush=True)
        Path(sys.argv[1]).write_text("saved")
    raise Terminated("ended after the step")

sys.exit(guarded(act))
"""


def test_a_terminal_that_is_closed_ends_a_run_after_its_step(tmp_path):
    def lead():  # a session of its own, whose terminal is stdin's
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", HANGS, str(tmp_path / "checkpoint")]
    run = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=lead)
    os.close(theirs)
    assert os.read(ours, 6) == b"a step"
    os.close(ours)
    assert run.wait(timeout=60) == TERMINATED
    assert (tmp_path / "checkpoint").read_text() == "saved"


RUN = {"max_steps": 60, "save_strategy": "no", "lora_dropout": 0.1, "finetuning_type": "lora"}


def steps_done(config: Path) -> int:
    events = config.with_suffix("") / "dataflex" / "events.jsonl"
    return events.read_text().count('"event": "stepped"') if events.is_file() else 0


def stopped_at(config: Path) -> int:
    """The step of the only checkpoint, which is complete."""
    newest, passed_over = find_resumable(config.with_suffix(""))
    assert newest is not None
    assert not passed_over
    events = [json.loads(line) for line in (config.with_suffix("") / "dataflex" / "events.jsonl").open()]
    assert not [event for event in events if event["event"] == "finished"]
    assert events[-1]["event"] == "checkpointed"
    return int(newest.name.rpartition("-")[2])


@pytest.fixture
def term_at(monkeypatch):
    """Return a function after which this process is sent SIGTERM once, in the given optimizer step."""
    from dataflex.huggingface.trainer import TrainerMixin

    real = TrainerMixin.training_step

    def arm(step):
        left = [step]

        def training_step(self, *args, **kwargs):
            if self.state.global_step in left:
                left.clear()
                signal.raise_signal(signal.SIGTERM)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(TrainerMixin, "training_step", training_step)

    return arm


@pytest.mark.parametrize("save_strategy", ["no", "steps", "epoch"])
def test_one_process_stops_with_a_checkpoint_and_goes_on_bit_for_bit(run, term_at, save_strategy):
    block = {"warmup_steps": 2, "interval_steps": 3, "selector": "loss"}
    settings = {**RUN, "max_steps": 12, "dataset": "alpha,beta", "save_strategy": save_strategy, "save_steps": 5}
    straight = run("straight", **settings, dynamic=block)
    term_at(4)
    with pytest.raises(Terminated, match="after step 5 of 12"):
        run("stopped", **settings, dynamic=block)
    folder = run.folder / "stopped"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-5"]
    assert broken_reason(folder / "checkpoint-5") is None
    assert not (folder / "trainer_state.json").exists()
    assert [event["step"] for event in read_ending(folder)] == [5]
    resumed = run("stopped", **settings, dynamic=block, resume_from_checkpoint=True)
    assert resumed.series() == straight.series()
    assert resumed.series("grad_norm") == straight.series("grad_norm")


def test_sigterm_in_the_last_step(run, term_at):
    settings = {**RUN, "max_steps": 3, "dynamic": {"selector": "all"}}
    term_at(2)
    with pytest.raises(Terminated, match="after step 3 of 3"):
        run("last", **settings)
    outcome = run("last", **settings, resume_from_checkpoint=True)
    assert outcome.events[-1]["event"] == "finished"


def test_without_save_on_term_a_run_ends_at_once(run, term_at):
    term_at(1)
    with pytest.raises(Terminated, match="at once"), ends_on_term("at once"):
        run("plain", **RUN, dynamic={"selector": "all", "save_on_term": False})
    assert not list((run.folder / "plain").glob("checkpoint-*"))


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", "torchrun", "one rank", "the whole group"])
def test_two_ranks_stop_at_the_same_step(configure, slow_block, tmp_path, whom):
    config = configure(**RUN, dynamic=slow_block(), dataloader_num_workers=1)
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            dataflex("train", config), env=environment(2), stdout=output, stderr=output, start_new_session=True
        )
    wait_for(lambda: steps_done(config) >= 2, process)
    family = psutil.Process(process.pid).children(recursive=True)
    agent = family[0]
    ranks = [member for member in agent.children() if "dataflex" in member.cmdline()]
    assert len(ranks) == 2
    if whom == "the whole group":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        {"launcher": process, "torchrun": agent, "one rank": ranks[1]}[whom].send_signal(signal.SIGTERM)
    code = process.wait(timeout=120)
    text = log.read_text()
    assert code == (TERMINATED if whom in ("launcher", "the whole group") else 1), text[-3000:]
    assert not [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]
    step = stopped_at(config)
    assert text.count(f"ended by SIGTERM after step {step} of 60") == 2, text[-3000:]


@pytest.mark.gloo
def test_torchrun_with_a_stock_run_is_ended(configure, tmp_path):
    config = configure(**{**RUN, "max_steps": 100_000, "num_train_epochs": None}, dynamic=None)
    log = tmp_path / "log"
    process = start(dataflex("train", config), log, environment(2))
    wait_for(lambda: "'loss'" in log.read_text(), process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == TERMINATED
    assert not [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]
    assert "dataflex: ended by SIGTERM" in log.read_text()


@pytest.mark.slow
def test_sigterm_during_a_decision_ends_after_its_step(configure, slow_block, tmp_path):
    config = configure(**RUN, dynamic=slow_block(seconds=1.5))
    log = tmp_path / "log"
    process = start(dataflex("train", config), log, environment())
    wait_for(lambda: steps_done(config) >= 1, process)
    time.sleep(0.3)  # in the middle of the next decision
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == TERMINATED
    assert stopped_at(config) == 2
    assert "[dataflex] SIGTERM: ending after the step in progress" in log.read_text()
