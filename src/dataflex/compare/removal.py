"""Trains a model again and again without some of its rows, and scores rows on the way, for ``dataflex audit``.

LLaMA-Factory's workflow builds tokenizer, data, model and trainer; our trainer's ``train`` runs the audit in this
process and stops there. Every run begins with the same weights and takes the same steps: in each, the rows of the
full run's batch that are kept. What is left out leaves its place empty, so that no other row changes its step or its
companions; the loss of a step is divided by the supervised tokens of the full run's batch, so that no other row changes
its weight. A run is a function of the kept rows alone, to the bit.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex import comm
from dataflex.compare.audit import FORMAT, LEDGER, Audit, Floats, filled, judged, mean_of
from dataflex.errors import DataError, UnsupportedError
from dataflex.offline.scoring import WorkflowMixin, ask, context, left_by
from dataflex.rng import permutations, stream
from dataflex.signals.runner import SignalRunner
from dataflex.signals.sweep import fetch, preserve_state, to_device
from dataflex.state import blake2b, replacing
from dataflex.train.ledger import Ledger
from dataflex.train.loader import ROWS

logger = logging.getLogger(__name__)

Kept = NDArray[np.bool_]


class Audited(Exception):
    """Leaves the workflow with what was found, as JSON values."""

    def __init__(self, found: dict[str, Any]) -> None:
        super().__init__("audited")
        self.found = found


class Journal:
    """Losses of finished runs and scores, a JSON object a line; a line that a kill cut off is dropped."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self.known = path, dict[str, list[float]]()
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                told = json.loads(line)
            except ValueError:
                continue
            self.known[told["key"]] = told["values"]
        with replacing(path) as file:
            file.writelines(self._line(key, found) for key, found in self.known.items())

    def get(self, key: str, make: Callable[[], Floats]) -> Floats:
        """Return what is known under a key, or what ``make`` gives, which is written down."""
        if key not in self.known:
            self.known[key] = make().tolist()
            with self._path.open("ab") as file:
                file.write(self._line(key, self.known[key]))
        return np.array(self.known[key], dtype=np.float64)

    @staticmethod
    def _line(key: str, found: list[float]) -> bytes:
        return json.dumps({"key": key, "values": found}).encode() + b"\n"


class _AuditMixin(WorkflowMixin):
    """A trainer that trains without rows."""

    dataflex_audit: ClassVar[Audit]

    def dataflex_ask(self) -> None:
        """Audit, and leave the workflow."""
        if comm.world() > 1:
            raise UnsupportedError("audit: runs on one process")
        raise Audited(Experiments(self, self.dataflex_audit).found())


class Experiments:
    """The runs of an audit and what they say."""

    def __init__(self, trainer: Any, audit: Audit) -> None:
        self.trainer, self.audit, self.args = trainer, audit, trainer.args
        self.space, self.model = trainer.dataflex_setup.rows, trainer.model
        self.seed = int(self.args.seed)
        self.runner: SignalRunner = trainer.dataflex_runner(None)
        access = self.runner.access
        self.runner.access = replace(access, optimizer=lambda: trainer.optimizer, learning_rate=self._rate)
        names = audit.settings.targets
        sweeps = [replace(access.target_sweep(name), what=None) for name in names]
        self.target_of = np.repeat(np.arange(len(names)), [len(sweep.rows) for sweep in sweeps])
        self.targets = [list(sweep.turns()) for sweep in sweeps]
        self.steps = self._steps()
        self.pool = np.unique(np.concatenate(self.steps))  # rows that the full run is trained on
        self.batches: dict[bytes, dict[str, Any]] = {}
        self.begin = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.journal = Journal(audit.out / f"audit-{audit.fingerprint}.jsonl")
        self.trained = 0

    def _rate(self) -> float:
        return float(self.trainer._get_learning_rate())

    def _steps(self) -> list[NDArray[np.int64]]:
        """Return the rows of each step of the full run; each epoch has its own order and may end in a short batch."""
        size, n = self.args.train_batch_size * self.args.gradient_accumulation_steps, self.space.num_rows
        per_epoch = math.ceil(n / size)
        most = self.args.max_steps
        total = most if most > 0 else math.ceil(per_epoch * self.args.num_train_epochs)
        orders = permutations(self.seed, "audit order", 0, math.ceil(total / per_epoch), n)
        return [order[at : at + size] for order in orders for at in range(0, n, size)][:total]

    def _batch(self, rows: NDArray[np.int64]) -> dict[str, Any]:
        """Return the collated batch of a step."""
        key = rows.tobytes()
        if key not in self.batches:
            batch = self.trainer.data_collator(fetch(self.trainer.train_dataset, rows))
            names = ("input_ids", "attention_mask", "labels")
            self.batches[key] = to_device({name: batch[name] for name in names}, self.args.device)
        return self.batches[key]

    def _losses(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss and the number of supervised tokens of each row [B]."""
        with self.trainer.compute_loss_context_manager():
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:]
        told = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), labels, ignore_index=-100, reduction="none"
        )
        return told.sum(1), (labels != -100).sum(1)

    def run(self, kept: Kept, until: int | None = None, ledger: Ledger | None = None) -> None:
        """Train the model from its first weights on the rows that are ``kept`` [N], for ``until`` steps (None: all)."""
        trainer, total = self.trainer, len(self.steps)
        torch.manual_seed(self.seed)
        self.model.load_state_dict(self.begin)
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.create_optimizer_and_scheduler(total)
        alone = int((~kept[self.pool]).sum()) == 1
        self.model.train()
        for step, rows in enumerate(self.steps[:until]):
            batch, mine = self._batch(rows), torch.from_numpy(kept[rows])
            tokens = (batch["labels"][:, 1:] != -100).sum()
            if alone:  # the batch keeps its shape, so that the others' sums round as in the full run
                batch = {
                    **batch,
                    "labels": batch["labels"].masked_fill(~mine[:, None].to(batch["labels"].device), -100),
                }
            elif not mine.all():
                batch = {name: value[mine.to(value.device)] for name, value in batch.items()}
            if ledger is not None:
                ledger.before(step, decides=False)
                ledger.begin({**batch, ROWS: rows}, self.args.device)
            if mine.any():
                (self._losses(batch)[0].sum() / tokens.clamp(min=1)).backward()
                if ledger is not None:
                    ledger.take(step)
                    ledger.end_step()
                if self.args.max_grad_norm:
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
            trainer.optimizer.step()  # without gradients nothing moves
            trainer.optimizer.zero_grad()
            trainer.lr_scheduler.step()
        self.trained += 1

    def target_losses(self) -> Floats:
        """Return the token-mean loss of each target row [T] under the model as it is."""
        found = []
        with torch.no_grad(), preserve_state(self.model):
            self.model.eval()
            for turns in self.targets:
                losses = np.zeros(sum(len(turn.positions) for turn in turns))
                for positions, batch, _ in turns:
                    told, tokens = self._losses(batch)
                    losses[positions] = (told.double() / tokens.clamp(min=1)).cpu().numpy()
                found.append(losses)
        return np.concatenate(found)

    def losses_of(self, kept: Kept) -> Floats:
        """Return the target rows' losses [T] after a training on the rows that are kept [N]."""

        def make() -> Floats:
            self.run(kept)
            return self.target_losses()

        return self.journal.get(f"run {blake2b(np.packbits(kept).tobytes()).hex()}", make)

    def mean(self, losses: Floats) -> float:
        """Return the mean over targets of the mean over their rows [T]."""
        sums = np.bincount(self.target_of, weights=losses)
        return float((sums / np.bincount(self.target_of)).mean())

    def without(self, rows: NDArray[np.int64]) -> Kept:
        """Return which rows are kept where some are left out [N]."""
        kept = np.ones(self.space.num_rows, dtype=bool)
        kept[rows] = False
        return kept

    def scores(self) -> dict[str, Floats]:
        """Return every score by name [N], more is better for the targets."""
        audit, n = self.audit, self.space.num_rows
        after = min(audit.settings.score_after or max(len(self.steps) // 2, 1), len(self.steps))
        state: list[int] = []  # steps that the model has taken

        def asked(name: str) -> Floats:
            if not state:
                self.run(np.ones(n, dtype=bool), until=after)
                self.runner.begin(after)
                state.append(after)
            logger.info("score %s", name)
            ctx = context(
                self.space.domains, self.runner, seed=self.seed, step=after, learning_rate=float(self._rate())
            )
            ctx = replace(ctx, columns=self.space.columns, unit=self.trainer.dataflex_setup.config.unit)
            method = audit.methods[name]
            with preserve_state(self.model):
                columns = {column.name: column.values for column in ask(method, self.space.all_rows(), n, ctx)}
            ranks = columns[f"{method.name}.rank"]
            scores = columns.get(method.name)
            return filled(np.where(ranks < 0, -n, -ranks).astype(np.float64) if scores is None else scores)

        def credits() -> Floats:
            assert audit.request.config.ledger is not None
            logger.info("score ledger: the full run, accounted for")
            ledger = Ledger(
                access=self.runner.access, space=self.space, options=audit.request.config.ledger, seed=self.seed
            )
            self.run(np.ones(n, dtype=bool), ledger=ledger)
            ledger.settle(len(self.steps))
            return np.asarray(-ledger.credits.mean(axis=1))  # what lowers a loss has a negative credit

        found = {}
        for name in audit.methods:
            key = audit.score_key(name, after)
            found[name] = self.journal.get(key, lambda name=name: asked(name))  # type: ignore[misc]
        if audit.ledger:
            found[LEDGER] = self.journal.get("score ledger", credits)
        for name, column in audit.columns.items():
            if len(column) != n:
                raise DataError(f"scores.{name}: {len(column):,} values for {n:,} rows")
            found[name] = filled(column)
        return found

    def found(self) -> dict[str, Any]:
        """Make what is left of the runs, and return what the audit came to."""
        audit, began = self.audit, time.monotonic()
        subsets, removed, alone = audit.subsets, audit.brittleness, audit.settings.leave_one_out
        if removed is not None and removed.rows >= len(self.pool):
            raise DataError(f"brittleness.rows: {removed.rows} of {len(self.pool)} rows")
        known, scores = len(self.journal.known), self.scores()
        full = self.losses_of(self.without(self.pool[:0]))
        logger.info("all rows: loss %.4f after %d steps", self.mean(full), len(self.steps))
        measured: dict[str, Any] = {}
        if subsets is not None:
            size = min(max(round(subsets.fraction * len(self.pool)), 1), len(self.pool) - 1)
            made = []
            for at in range(subsets.count):
                drawn = stream(self.seed, "audit subset", at).permutation(self.pool)[size:]
                made.append((self.without(drawn), self.mean(self.losses_of(self.without(drawn)))))
                logger.info("subset %d of %d: loss %.4f", at + 1, subsets.count, made[-1][1])
            kept = np.array([each[0] for each in made])
            kept[:, np.setdiff1d(self.space.all_rows(), self.pool)] = False  # never trained on
            measured["subsets"] = (kept, [each[1] for each in made])
        if alone:
            rows, rises = np.sort(stream(self.seed, "audit leave one out").permutation(self.pool)[:alone]), []
            for row in rows:
                rises.append(self.mean(self.losses_of(self.without(row))) - self.mean(full))
                logger.info("without row %d: %+.6f", row, rises[-1])
            measured["leave_one_out"] = (rows, np.array(rises))
        told = {
            name: {key: vars(each) for key, each in judged(found, measured).items()} for name, found in scores.items()
        }
        if removed is not None:
            logger.info("without %d rows: %d scores, %d random sets", removed.rows, len(scores), removed.random)
            others = np.mean(
                [
                    self.losses_of(
                        self.without(stream(self.seed, "audit random", at).permutation(self.pool)[: removed.rows])
                    )
                    for at in range(removed.random)
                ],
                axis=0,
            )
            for name, found in scores.items():
                top = self.pool[np.argsort(-found[self.pool], kind="stable")[: removed.rows]]
                told[name]["brittleness"] = vars(mean_of(self.losses_of(self.without(top)) - others))
        sizes = [f"{len(self.pool)} rows in {len(self.steps)} steps", f"{len(full)} target rows"]
        sizes += [f"{subsets.count} subsets of {subsets.fraction:g}"] if subsets is not None else []
        sizes += [f"{len(measured['leave_one_out'][0])} rows left out alone"] if alone else []
        sizes += [f"the top {removed.rows} rows against {removed.random} random sets"] if removed is not None else []
        return {
            "format": FORMAT,
            "suite": audit.settings.suite,
            "about": audit.settings.about,
            "fingerprint": audit.fingerprint,
            "seed": self.seed,
            "sizes": f"{'; '.join(sizes)}; seed {self.seed}.",
            "loss": self.mean(full),
            "scores": told,
            "leave_one_out": {
                str(row): rise for row, rise in zip(*measured.get("leave_one_out", ((), ())), strict=True)
            },
            "runs": self.trained,
            "known_before": known,
            "seconds": time.monotonic() - began,
        }


def run_audit(audit: Audit) -> dict[str, Any]:
    """Make an audit's runs and return what it came to, as JSON values."""
    mixin = type("AuditMixin", (_AuditMixin,), {"dataflex_audit": audit})
    done, _ = left_by(Audited, audit.request.config, audit.request.lf, mixin)
    shutil.rmtree(audit.request.work.parent, ignore_errors=True)
    return done.found
