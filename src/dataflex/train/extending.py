"""Carries a run over to a pool or to settings that were changed on purpose (``on_change: extend``).

Rows are known by their tokens and labels. What domains have served of the epoch in progress, counts of rows, and the
states of methods that stayed as they were go on; everything else begins anew, which the log says.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.config.resuming import TOKENIZES
from dataflex.errors import CheckpointError
from dataflex.plan.live import Served, whole
from dataflex.registry import KINDS
from dataflex.train.checkpoint import Found, Identity
from dataflex.train.controller import Controller

logger = logging.getLogger(__name__)

_BY_ROW = {"selector": "", "orderer": "", "signals": "signals", "in_run": "signals", "ledger": "ledger"}
"""What holds values of single rows, and the key of the block that it depends on."""


def extend(
    controller: Controller, found: Found, identity: Identity, step: int
) -> tuple[set[str], dict[str, Any], NDArray[np.int64]]:
    """Let a controller go on after ``step`` optimizer steps of a run over another pool, or with other settings.

    Returns:
        What kept its state: kinds of methods, parts of the controller, "rows" where they are the same; numbers of rows
        for the record; and the row there of each row [N], -1 for new ones.

    Raises:
        CheckpointError: No row is known again, or a key has made other tokens of the same data.
    """
    space, before = controller.space, found.described
    old, old_keys = found.rows()
    state = found.state["controller"]
    known = Served(old if state["served"]["domains"] == list(old.names) else whole(len(old_keys)))
    known.load_state_dict(state["served"])
    pool = space.domains if controller.mixer is not None else whole(space.num_rows)
    served, row_of = known.carried(old_keys, pool, space.keys)
    changed = identity.changed(before)
    _check_known(row_of, len(old_keys), [line for key, line in changed.items() if key in TOKENIZES])
    same_rows = before["space"]["fingerprint"] == space.fingerprint
    same_domains = before["space"]["domains"] == space.describe()["domains"]
    same_names = old.names == space.domains.names
    kept = _kept(found, identity, changed, same_rows=same_rows and same_domains, same_names=same_names)
    controller.take_over(state, found.plan, step, before=old.names, served=served, found=row_of, kept=kept)
    for change in found.changes:
        logger.info("resume: on_change: extend: %s", change)
    rows = {
        "kept": int((row_of >= 0).sum()),
        "new": int((row_of < 0).sum()),
        "gone": len(old_keys) - int((row_of >= 0).sum()),
        "not_served_yet": dict(zip(pool.names, served.left.tolist(), strict=True)),
    }
    logger.info("resume: %(kept)d rows are known, %(new)d are new, %(gone)d left the pool", rows)
    return kept, rows, row_of


def _check_known(row_of: NDArray[Any], num_rows: int, tokenizes: list[str]) -> None:
    """Raise CheckpointError where the rows are known no more."""
    known = int((row_of >= 0).sum())
    why = "; ".join(tokenizes)
    if known == 0:
        raise CheckpointError(
            f"resume: dynamic.on_change: extend knows rows by their tokens and labels, and finds none of {num_rows:,} "
            f"again{f' ({why})' if why else ''}. With another tokenizer, template or cutoff_len all rows are other "
            "ones: restore it. If all data are new on purpose, decide afresh with 'dynamic.resume_plan: ignore'."
        )
    if tokenizes and known < num_rows:
        raise CheckpointError(
            f"resume: dynamic.on_change: extend does not find {num_rows - known:,} of {num_rows:,} rows again, and "
            f"cannot tell rows that were dropped from rows that have other tokens now: {why}. Restore that, or change "
            "the data at another resume."
        )


def _kept(
    found: Found, identity: Identity, changed: Mapping[str, str], *, same_rows: bool, same_names: bool
) -> set[str]:
    """Return what keeps its state: what was not changed, and whose rows or domains are the same."""
    before, now = found.described, identity.described
    kept = set()
    for kind in KINDS:
        method, was = now["methods"][kind], before["methods"][kind]
        if method is None:
            continue
        same = same_rows if kind in _BY_ROW else same_names
        if method == was and same:
            kept.add(kind)
        else:
            what = "it is another" if method != was else "other rows" if kind in _BY_ROW else "other domains"
            logger.info("resume: on_change: extend: the %s %r begins anew (%s)", kind, method["name"], what)
    unlike = {key.split(".")[1] for key in changed if key.startswith("dynamic.")}
    for part in ("signals", "in_run", "ledger"):
        if part not in found.state["controller"]:
            continue
        if same_rows and _BY_ROW[part] not in unlike and (part != "in_run" or "selector" in kept):
            kept.add(part)
        elif part != "signals":
            logger.info("resume: on_change: extend: the %s begins anew (other rows or settings)", part)
    return kept | ({"rows"} if same_rows else set())
