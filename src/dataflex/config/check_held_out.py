"""Checks of what is held out for evaluation, and of what asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dataflex.config.convert import shown
from dataflex.config.data import count_rows, data_sets, find_sources, tokenized
from dataflex.config.schema import DynamicConfig
from dataflex.config.values import number, truthy

__all__ = ["by_domain_problems", "held_out_problems"]


def held_out_problems(lf: Mapping[str, Any], base_dir: Path) -> Iterator[str]:
    """Yield what is wrong with what is held out, and what asks for held-out rows where there are none."""
    named, share = data_sets(lf.get("eval_dataset")), number(lf, "val_size", 0.0)
    if named and share > 1e-6:
        yield "val_size: cannot be given together with eval_dataset; remove one of the two"
    if share < 0 or (share >= 1 and share != int(share)):
        yield f"val_size: expected a share below 1 or a whole number of rows, found {shown(lf['val_size'])}"
    sources, problems = find_sources(named, lf, "eval_dataset", base_dir)
    yield from (problem for problem in problems if not problem.startswith("dataset_dir:") or tokenized(lf))
    for source in sources:
        if source.path is not None and count_rows(source, lf) == 0:
            yield f"eval_dataset: {source.name!r} has no rows ({source.path})"
    if lf.get("eval_dataset") or share > 1e-6 or tokenized(lf):
        return
    for key, off in (("eval_strategy", "no"), ("do_eval", False), ("do_predict", False), ("eval_on_start", False)):
        asked = str(lf.get(key) or "no") != "no" if off == "no" else truthy(lf, key)
        if asked:
            yield f"{key}: no rows are held out; name an 'eval_dataset', set 'val_size', or remove the key"


def by_domain_problems(dynamic: DynamicConfig, lf: Mapping[str, Any]) -> Iterator[str]:
    """Yield why held-out rows cannot be told apart by domain, or split from several data sets."""
    several, share = len(data_sets(lf.get("dataset"))) > 1, number(lf, "val_size", 0.0)
    if tokenized(lf):
        return
    if several and share > 1e-6:
        for key in ("predict_with_generate", "streaming"):
            if truthy(lf, key):
                yield f"val_size: with {key} over several data sets there is no split; name an 'eval_dataset' instead"
    if not dynamic.eval_by_domain or lf.get("eval_dataset"):
        return
    if share <= 1e-6:
        yield "dynamic.eval_by_domain: no rows are held out; name an 'eval_dataset', or set 'val_size'"
    elif dynamic.domain_column is None and not several:
        yield (
            "dynamic.eval_by_domain: the held-out rows are of one data set; name a 'domain_column', or several data "
            "sets"
        )
