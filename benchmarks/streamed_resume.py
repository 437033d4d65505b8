"""CPU seconds that a streamed run takes to resume at row 10 million, beside those at its beginning.

Text in JSON lines is cut into blocks of four tokens, so that a small file holds more than 10 million rows. A run goes
to its last step without passes of the model, which would take hours; decisions, record, checkpoints are those of any
run. It is then resumed at an early and a late checkpoint. Counted are the CPU seconds of this process between the
loaded model and the first batch: the states of the checkpoint, the record, and the decision that is due; then those of
reading and tokenizing the batch's rows, as in any step. Loading the data (from the cache of ``datasets``, the same in
both cases) is told in seconds. Exits with 1 where the late one takes a second or longer.

Usage: python benchmarks/streamed_resume.py [--rows N] [--batch N]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "ERROR")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

ROOT = Path(__file__).resolve().parent.parent
BLOCK, WORDS_OF_A_DOCUMENT = 4, 127


def make_data(folder: Path, rows: int) -> None:
    """Write two data sets that together hold a few more than ``rows`` blocks."""
    from tests.conftest import WORDS

    rng, info = random.Random(0), {}
    for name, share in (("web", 0.8), ("code", 0.2)):
        documents = int(rows * share * 1.05) * BLOCK // (WORDS_OF_A_DOCUMENT + 1)
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(documents):
                file.write(json.dumps({"text": " ".join(rng.choices(WORDS, k=WORDS_OF_A_DOCUMENT))}) + "\n")
        info[name] = {"file_name": f"{name}.jsonl", "columns": {"prompt": "text"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))


class Watch:
    """Takes the time of a run between events of its session."""

    def __init__(self, *, trains: bool) -> None:
        self.trains, self.marks = trains, dict[str, float]()

    def run(self, config: Path) -> None:
        """Train with a configuration, quietly."""
        from transformers import Trainer

        from dataflex.run import train_here
        from dataflex.train.loader import PlanFeed
        from dataflex.train.session import Session

        names = ((Session, "start"), (PlanFeed, "step"), (Trainer, "training_step"))
        start, feed, step = (getattr(cls, name) for cls, name in names)
        watch, batch = self, list[object]()

        def started(session: Session, *args: object, **kwargs: object) -> int:
            watch.marks["start"] = time.process_time()
            return start(session, *args, **kwargs)

        def served(loader: PlanFeed, plan: object, index: int) -> list[object]:
            if watch.trains or not batch:
                watch.marks.setdefault("decided", time.process_time())
                batch[:] = feed(loader, plan, index)
                watch.marks.setdefault("batch", time.process_time())
            return [dict(each) for each in batch]

        def trained(trainer: Trainer, model: object, inputs: object, *args: object, **kwargs: object) -> object:
            import torch

            return step(trainer, model, inputs, *args, **kwargs) if watch.trains else torch.zeros(())

        try:
            Session.start, PlanFeed.step, Trainer.training_step = started, served, trained
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                train_here([str(config)])
        finally:
            for (cls, name), original in zip(names, (start, feed, step), strict=True):
                setattr(cls, name, original)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, help="row at which the run is resumed")
    parser.add_argument("--batch", type=int, default=1_000, help="rows of a step")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests import conftest

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = conftest.tiny_model.__wrapped__(SimpleNamespace(mktemp=lambda part: _made(folder / part)))
        make_data(folder, options.rows)
        last = options.rows // options.batch
        settings = {
            **{"model_name_or_path": str(model), "stage": "pt", "do_train": True, "finetuning_type": "full"},
            **{"dataset_dir": str(folder), "dataset": "web,code", "template": "default", "cutoff_len": BLOCK},
            **{"streaming": True, "packing": True, "per_device_train_batch_size": options.batch, "use_cpu": True},
            **{"save_strategy": "steps", "save_steps": last, "report_to": "none", "output_dir": str(folder / "run")},
            **{"logging_steps": 1000, "max_steps": last + 1, "preprocessing_num_workers": 2},
            "dynamic": {"mixer": {"name": "static", "proportions": [4, 1]}, "interval_steps": 100},
        }

        def start(place: str, **more: object) -> tuple[Watch, float, dict]:
            config = folder / f"{place}.json"
            config.write_text(json.dumps({**settings, **more}))
            watch = Watch(trains=place != "whole")
            began = time.perf_counter()
            watch.run(config)
            output = Path(str({**settings, **more}["output_dir"]))
            events = [json.loads(line) for line in (output / "dataflex/events.jsonl").read_text().splitlines()]
            return watch, time.perf_counter() - began, events[-1]

        _, seconds, _ = start("whole", save_steps=1_000_000, max_steps=1, output_dir=str(folder / "first"))
        print(f"tokens counted, data cached: {seconds:.0f} s")
        early = str(folder / "early")
        start("whole", save_steps=1, max_steps=1, output_dir=early)
        _, seconds, _ = start("whole", max_steps=last)
        print(f"{last:,} steps of {options.batch:,} rows without passes: {seconds:.0f} s")
        found = {}
        for place, output, step in (("early", early, 1), ("late", str(folder / "run"), last)):
            more = {"resume_from_checkpoint": f"{output}/checkpoint-{step}", "output_dir": output}
            watch, _, event = start(place, **more, max_steps=step + 1, save_strategy="no")
            found[place] = watch.marks["decided"] - watch.marks["start"]
            batch = watch.marks["batch"] - watch.marks["decided"]
            told = f"{found[place]:.3f} s, and {batch:.3f} s for its rows (data: {event['spent']['data']:.1f} s)"
            print(f"resumed at row {step * options.batch:>12,}: {told}")
        return int(found["late"] >= 1.0)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    sys.exit(main())
