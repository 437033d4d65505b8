"""Checks of what methods return, beside its type: rows of the pool, weights of the right shape."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.contract import refuse_answer, whereabouts
from dataflex.errors import ComponentError, DataError
from dataflex.method import DomainWeighter, Method, Mix, Mixer, Orderer, Rows, Selection, Selector, State, Weighter
from dataflex.plan.orders import Order
from dataflex.plan.proportions import normalized
from dataflex.state import refuse_state


def check_mix(mixer: Mixer, mix: Mix, names: tuple[str, ...]) -> NDArray[np.float64]:
    """Return a mixer's proportions [K], summing to one; ComponentError unless they are finite, >= 0 and not all 0."""
    refuse_answer(mixer, "mix", mix)
    given = np.asarray(mix.proportions, dtype=np.float64)
    if given.shape != (len(names),) or not np.isfinite(given).all() or (given < 0).any() or given.sum() <= 0:
        raise ComponentError(
            f"mixer {mixer.name!r} returned {given.tolist()} for the domains {', '.join(names)}; "
            f"expected one finite number >= 0 each, not all zero: {whereabouts(type(mixer), 'mix')}"
        )
    return normalized(given)


def check_selection(selector: Selector, selection: Selection, pool: Rows, wanted: int) -> None:
    """Make sure that a selection lies in the pool and within its budget.

    Raises:
        ComponentError: The selector broke its contract.
        DataError: It kept no row.
    """
    refuse_answer(selector, "select", selection)
    rows = selection.rows
    what = f"selector {selector.name!r}"
    if len(rows) == 0:
        raise DataError(f"{what} kept no row at all ({selection.reason or 'no reason given'})")
    outside = rows[~np.isin(rows, pool)] if len(pool) else rows
    if len(outside):
        raise ComponentError(
            f"{what} returned {len(outside):,} rows that are not in the pool, such as {outside[0]}: "
            f"{_select_of(selector)}"
        )
    if len(rows) > wanted:
        raise ComponentError(f"{what} returned {len(rows):,} rows for a budget of {wanted:,}: {_select_of(selector)}")
    if selection.scores is not None and len(selection.scores) != len(pool):
        raise ComponentError(
            f"{what} returned {len(selection.scores):,} scores for a pool of {len(pool):,} rows; it must give one for "
            f"each, in the order of the pool: {_select_of(selector)}"
        )
    if selection.weights is not None:
        _check_row_weights(selector, selection)
    if selection.nearest is not None and any(len(each) != len(pool) for each in selection.nearest):
        raise ComponentError(
            f"{what} returned 'nearest' that are not a target and a row for each of the pool's {len(pool):,} rows: "
            f"{_select_of(selector)}"
        )


def _check_row_weights(selector: Selector, selection: Selection) -> None:
    """Raise ComponentError unless the weights are as ``Requires.row_weights`` says, numbers >= 0, one for each row."""
    what, weights, rows = f"selector {selector.name!r}", np.asarray(selection.weights), selection.rows
    if selector.requires().row_weights is None:
        problem = "gave weights of rows; state their denominator, Requires(row_weights='num_tokens') or 'weight_sum'"
    elif weights.shape != rows.shape:
        problem = f"gave {len(weights):,} weights for {len(rows):,} rows"
    elif not (np.isfinite(weights) & (weights >= 0)).all():
        problem = f"gave negative or non-finite weights, such as {weights[~(np.isfinite(weights) & (weights >= 0))][0]}"
    else:
        _, first, place = np.unique(rows, return_index=True, return_inverse=True)
        if np.array_equal(weights[first][place], weights):
            return
        problem = "gave a row that is there twice two weights"
    raise ComponentError(f"{what} {problem}: {_select_of(selector)}")


def _select_of(selector: Selector) -> str:
    return whereabouts(type(selector), "select")


def check_sort_keys(orderer: Orderer, keys: Any, rows: Rows) -> NDArray[np.float64]:
    """Return an orderer's keys of rows; ComponentError unless there is one number for each."""
    refuse_answer(orderer, "sort_keys", keys)
    if len(keys) != len(rows):
        raise ComponentError(
            f"orderer {orderer.name!r} gave {len(keys):,} keys for {len(rows):,} rows: "
            f"{whereabouts(type(orderer), 'sort_keys')}"
        )
    return np.asarray(keys, dtype=np.float64)


def check_ranks(orderer: Orderer, ranks: Any, count: int) -> NDArray[np.int64]:
    """Return an orderer's ranks; ComponentError unless they are a permutation of 0 to ``count - 1``."""
    refuse_answer(orderer, "ranks", ranks)
    inside = len(ranks) == count and (not count or (ranks.min() >= 0 and ranks.max() < count))
    if not inside or (count and np.bincount(ranks, minlength=count).max() > 1):
        raise ComponentError(
            f"orderer {orderer.name!r} gave ranks {ranks.tolist()!s:.80}, no permutation of 0 to {count - 1:,}: "
            f"{whereabouts(type(orderer), 'ranks')}"
        )
    return np.asarray(ranks, dtype=np.int64)


def order_of(orderer: Orderer) -> Order:
    """Return what plans ask of an orderer, whose answers are checked."""
    return Order(
        ranks=lambda count, rng: check_ranks(orderer, orderer.ranks(count, rng), count),
        available=orderer.available if orderer.paced else None,
    )


def check_loss_weights(mixer: DomainWeighter, domains: int) -> NDArray[np.float64]:
    """Return the weights of the domains in the loss [K]; ComponentError unless they are numbers >= 0."""
    found = mixer.loss_weights()
    refuse_answer(mixer, "loss_weights", found)
    given = np.asarray(found, dtype=np.float64)
    if given.shape != (domains,) or not np.isfinite(given).all() or (given < 0).any():
        raise ComponentError(
            f"mixer {mixer.name!r} gave loss weights {given.tolist()!s:.200} that are no numbers >= 0 for each of "
            f"{domains} domains: {whereabouts(type(mixer), 'loss_weights')}"
        )
    return given


def check_static_weights(
    weighter: Weighter, rows: Rows, columns: Mapping[str, NDArray[Any]]
) -> NDArray[np.float64] | None:
    """Return the weights of rows [n] or of their tokens [n, T] that are known beforehand, or None.

    Raises:
        ComponentError: Another shape.
    """
    found = weighter.static_weights(rows, columns)
    refuse_answer(weighter, "static_weights", found)
    of_tokens = found is not None and found.ndim == 2 and weighter.requires().token_weights is not None
    if found is not None and (found.shape[:1] if of_tokens else found.shape) != rows.shape:
        raise ComponentError(
            f"weighter {weighter.name!r} gave weights of shape {found.shape} for {len(rows)} rows: "
            f"{whereabouts(type(weighter), 'static_weights')}"
        )
    return None if found is None else found.astype(np.float64)


def check_weights(weighter: Weighter, weights: Any, shapes: Collection[tuple[int, ...]]) -> None:
    """Raise ComponentError unless weights are a tensor of one of the shapes; ``WeightStats`` checks their values."""
    refuse_answer(weighter, "weigh", weights)
    if tuple(weights.shape) not in shapes:
        told = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ComponentError(
            f"weighter {weighter.name!r} returned weights of shape {tuple(weights.shape)}; expected {told}: "
            f"{whereabouts(type(weighter), 'weigh')}"
        )


def check_state(method: Method) -> State:
    """Return the state of a method; ComponentError with the path of what in it cannot be saved."""
    state = method.state_dict()
    refuse_answer(method, "state_dict", state)
    try:
        refuse_state(state, f"of {method.kind} {method.name!r}")
    except ComponentError as error:
        raise ComponentError(f"{error}: {whereabouts(type(method), 'state_dict')}") from error
    return state
