"""Runs one configuration once per point of a save, and kills the process there; the points follow the configuration.

``python killed_at.py RUN.json STEP POINT ...`` imports everything once and forks for each point; the output
folder of each is the configuration's with the point's name in the place of ``POINT``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path


def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def at(step: int, original, *, after: bool, of):
    """Return ``original`` with a kill before or after it, at ``step``."""

    def patched(*args, **kwargs):
        hit = of(*args) == step
        if hit and not after:
            die()
        result = original(*args, **kwargs)
        if hit:
            die()
        return result

    return patched


def arm(point: str, step: int) -> None:
    from transformers import trainer

    from dataflex import checkpoints
    from dataflex.train import checkpoint
    from dataflex.train.session import Session

    def of_trainer(self, *_):
        return self.state.global_step

    def of_folder(folder, *_):
        return int(str(folder).rpartition("-")[2])

    if point == "begun":
        checkpoints.begin = at(step, checkpoints.begin, after=True, of=of_folder)
    elif point in ("weights", "optimizer", "scaler"):
        name = {"weights": "save_model", "optimizer": "_save_optimizer_and_scheduler", "scaler": "_save_scaler"}[point]
        kept = getattr(trainer.Trainer, name)
        setattr(trainer.Trainer, name, at(step, kept, after=True, of=of_trainer))
    elif point == "ours":
        checkpoint.save = at(step, checkpoint.save, after=True, of=of_folder)
    elif point == "half_ours":
        checkpoint.save_state = at(
            step, checkpoint.save_state, after=False, of=lambda folder, *_: of_folder(folder.parent)
        )
    elif point == "state":
        Session.seal_checkpoint = at(
            step, Session.seal_checkpoint, after=False, of=lambda self, step, *_: self._unsealed and step
        )
    elif point == "manifest":
        checkpoints.seal = at(step, checkpoints.seal, after=True, of=of_folder)
    else:
        assert point == "before", point
        checkpoints.begin = at(step, checkpoints.begin, after=False, of=of_folder)


def main(config: str, step: str, points: list[str]) -> None:
    import llamafactory.train.sft.workflow
    import llamafactory.train.tuner  # noqa: F401

    from dataflex.run import train_here

    for point in points:
        child = os.fork()
        if child == 0:
            arm(point, int(step))
            mapping = json.loads(Path(config).read_text())
            mapping["output_dir"] = mapping["output_dir"].replace("POINT", point)
            own = Path(f"{config}.{point}.json")
            own.write_text(json.dumps(mapping))
            train_here([str(own)])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(f"{point} {os.WTERMSIG(status) if os.WIFSIGNALED(status) else -1}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
