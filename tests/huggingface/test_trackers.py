"""Names of our numbers in trackers, and what of them the terminal shows."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
from transformers.integrations import integration_utils
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dataflex.console import VERBOSE
from dataflex.huggingface.trackers import shown_apart
from tests.record.synthetic import SELECTION, simulate

LOGS = {
    "loss": 2.0,
    "eval_loss": 1.0,
    "dataflex/interval": 3.0,
    "dataflex/mix/web/en": 0.4,
    "dataflex/nominal/web": 0.5,
}


def test_trackers_see_groups_and_constants_once():
    stock = integration_utils.rewrite_logs
    with shown_apart():
        for _ in range(2):  # two trackers, in one log
            assert integration_utils.rewrite_logs({**LOGS, "epoch": 0.1}) == {
                **{"train/loss": 2.0, "eval/loss": 1.0, "train/epoch": 0.1},
                **{"dataflex/interval": 3.0, "dataflex_mix/web/en": 0.4, "dataflex_nominal/web": 0.5},
            }
        named = [
            integration_utils.rewrite_logs({"dataflex/nominal/web": share, "dataflex/interval": 3.0, "epoch": epoch})
            for epoch, share in ((0.2, 0.5), (0.3, 0.6), (0.4, 0.6))
        ]
    assert [each.get("dataflex_nominal/web") for each in named] == [None, 0.6, 0.6]
    assert [each["dataflex/interval"] for each in named] == [3.0] * 3
    assert integration_utils.rewrite_logs is stock


@pytest.mark.parametrize("callback", [ProgressCallback, PrinterCallback])
def test_the_terminal_shows_no_single_domains_unless_asked(callback, monkeypatch, capsys):
    class State:
        is_world_process_zero = is_local_process_zero = True

    def shown():
        found = callback()
        found.training_bar = type("Bar", (), {"write": staticmethod(print)})
        found.on_log(None, State, None, logs=dict(LOGS))
        return capsys.readouterr().out

    monkeypatch.delenv(VERBOSE, raising=False)
    before = callback.on_log
    with shown_apart():
        assert "dataflex/interval" in (brief := shown())
        assert "dataflex/mix" not in brief
        monkeypatch.setenv(VERBOSE, "1")
        assert "dataflex/mix/web/en" in shown()
    assert callback.on_log is before
    assert list(inspect.signature(before).parameters)[:5] == ["self", "args", "state", "control", "logs"]


class StandIn:
    """A tracker's module with the signatures that it has, which notes what it is given."""

    class Image:
        def __init__(self, data, *, caption=None):
            self.size, self.caption = data.size, caption

    class Table:
        def __init__(self, columns=None, data=None, dataframe=None, allow_mixed_types=False):
            self.columns = list(columns if dataframe is None else dataframe.columns)
            self.lines = data if dataframe is None else dataframe.to_numpy().tolist()

    class Sheet:
        def add(self, headers, rows):
            self.columns, self.lines = headers, rows

    def __init__(self):
        self.logged, self.step, self.echarts = {}, None, SimpleNamespace(Table=self.Sheet)

    def log(self, data, step=None):
        self.step = data.pop("train/global_step", step)
        self.logged.update(data)


def callback(name, **attributes):
    return type(name, (), attributes)()


@pytest.mark.slow
def test_trackers_get_figures_and_tables_and_none_ends_the_training(tmp_path, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    from dataflex.huggingface.trackers import send_report

    simulate(tmp_path / "dataflex", **SELECTION)
    writer, trackers = SummaryWriter(tmp_path / "board"), {name: StandIn() for name in ("wandb", "trackio", "swanlab")}
    broken = callback("WandbCallback", _wandb=None)
    board = callback("TensorBoardCallback", tb_writer=writer)
    names = ("WandbCallback", "TrackioCallback", "SwanLabCallback")
    others = [callback(name, **{f"_{key}": each}) for name, (key, each) in zip(names, trackers.items(), strict=True)]
    send_report([broken, board, *others, callback("PrinterCallback")], tmp_path / "dataflex", 100)
    assert [each.message for each in caplog.records] == [
        "WandbCallback took no figures and tables: AttributeError: 'NoneType' object has no attribute 'Image'"
    ]
    writer.close()
    events = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0, "tensors": 0}).Reload()
    figures = events.Tags()["images"]
    assert {"dataflex_figures/loss", "dataflex_figures/mixture", "dataflex_figures/histogram"} <= set(figures)
    (image,) = events.Images("dataflex_figures/loss")
    assert (image.step, image.width > 900) == (100, True)
    (text,) = events.Tensors("dataflex_tables/Losses and metrics/text_summary")
    assert "| train loss | 2.49062 | 1 |" in text.tensor_proto.string_val[0].decode()
    for tracker in trackers.values():
        assert tracker.step == 100
        assert set(figures) == {name for name, each in tracker.logged.items() if isinstance(each, StandIn.Image)}
        assert tracker.logged["dataflex_figures/loss"].caption.startswith("Training loss 2.491 -> 1.169")
        table = tracker.logged["dataflex_tables/Losses and metrics"]
        assert (table.columns[0], table.lines[0][:3]) == ("name", ["train loss", 2.49062, 1])
    send_report([board], tmp_path / "nowhere", 1)
    assert "trackers get no figures and tables: DataError" in caplog.records[-1].message


def test_what_callbacks_log_with_has_the_names_that_are_relied_upon():
    for name, held in (
        ("TensorBoard", "tb_writer"),
        ("Wandb", "_wandb"),
        ("Trackio", "_trackio"),
        ("SwanLab", "_swanlab"),
    ):
        assert f"self.{held} = " in inspect.getsource(getattr(integration_utils, f"{name}Callback").__init__)
