"""``dataflex query``: the request, read and checked before anything heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataflex.checkpoints import broken_reason
from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.build import method_block, target_list
from dataflex.config.check import data_sets, model_problems, target_problems, told_once
from dataflex.config.data import target_data_sets
from dataflex.config.load import merged
from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.errors import ConfigError
from dataflex.offline.index import Index, read_index
from dataflex.offline.request import FIXED, OfflineConfig, score_out_problems

SAMPLE_ROWS = 128
_OF_THE_POOL = ("max_samples", "mix_strategy", "interleave_probs", "tokenized_path")
_NOT_CHANGED = ("cutoff_len", "dataset", "finetuning_type", "resume_from_checkpoint", "stage", "template")


@dataclass(frozen=True, kw_only=True)
class QueryRequest:
    """One run of ``dataflex query``."""

    index: Index
    lf: dict[str, Any]  # LLaMA-Factory's keys; its data sets are those of the targets
    config: OfflineConfig
    method: MethodConfig  # LESS towards the targets
    out: Path  # the file to write
    work: Path  # folder that LLaMA-Factory may write to, removed at the end
    sample: int  # rows that exact scores are compared on
    whiten: float | None  # weight of the target's own second moment in what gradients are whitened by; None: not at all
    bergson: Path | None  # folder to write projected gradients into, as bergson reads them


def query_request(
    index: Path,
    overrides: Sequence[str],
    *,
    targets: Sequence[str],
    out: Path,
    sample: int | None = None,
    whiten: float | None = None,
    bergson: Path | None = None,
) -> QueryRequest:
    """Read and check what ``dataflex query`` is asked for; ``ConfigError`` with all problems.

    Args:
        index: Folder of the index.
        overrides: ``key=value`` texts over LLaMA-Factory's keys that the index was made with.
        targets: Names of data sets, each text one or several with commas; ``a + b`` are the rows of both as one target.
        out: The parquet file to write.
        sample: Number of rows that exact scores are compared on; None: 128, or as many as the index holds.
        whiten: Whitens projected gradients, with this weight (0 to below 1) of the second moment of the target's rows.
        bergson: New folder for the projected gradients of rows and targets, in files that bergson reads.

    Raises:
        DataError: There is no such index, or a part of it is missing.
    """
    found = read_index(index)
    problems: list[str] = []
    named = [text for text in targets if "=" not in text]
    changes = [*overrides, *(text for text in targets if "=" in text)]
    for text in changes:
        key = text.partition("=")[0]
        if key in _NOT_CHANGED or key.startswith(("dynamic.", "less.")):
            problems.append(f"{key}: is that of the index, and cannot be changed; remove it")
    aims = target_list(",".join(named), "--target", problems)
    lf = merged(dict(found.lf), changes)
    for key in _OF_THE_POOL:
        lf.pop(key, None)
    work = out.with_name(f"{out.name}.work")
    lf.update(FIXED, output_dir=str(work / "run"))
    lf["dataset"] = ",".join(dict.fromkeys(target_data_sets(*aims)))
    view = LlamaFactoryArgs.read(lf)
    problems += told_once(view, ())
    problems += model_problems(view)
    method = method_block("selector", {**found.params, "targets": list(aims) or ["any"]}, "index", problems)
    if method is not None and aims:
        alone = DynamicConfig(selector=method)
        asked = target_problems(alone, view, Path.cwd())
        problems += [problem.replace("dynamic.selector.targets", "--target", 1) for problem in asked]
        problems += [problem for problem in data_sets(view, Path.cwd())[1] if problem.startswith("dataset_dir:")]
    for part in found.parts:
        if part.checkpoint is not None and (reason := broken_reason(Path(part.checkpoint))) is not None:
            problems.append(f"{index}: its checkpoint {part.checkpoint} cannot be used: {reason}")
    problems += score_out_problems(out)
    if sample is not None and not 0 <= sample <= len(found.sample):
        problems.append(f"--sample: {sample} rows; between 0 and {len(found.sample)}, which the index holds")
    if whiten is not None and not 0 <= whiten < 1:
        problems.append(f"--whiten: {whiten:g}; a weight from 0 to below 1, such as 0.9")
    if whiten is not None and sample:
        problems.append("--sample: exact scores are not whitened; leave it out beside --whiten")
    if bergson is not None:
        problems += _bergson_problems(bergson, found, whiten)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    assert method is not None
    if whiten is not None:
        sample = 0
    return QueryRequest(
        index=found,
        lf=lf,
        config=OfflineConfig(seed=found.seed),
        method=replace(method, targets=aims),
        out=out,
        work=work,
        sample=min(SAMPLE_ROWS, len(found.sample)) if sample is None else sample,
        whiten=whiten,
        bergson=bergson,
    )


def _bergson_problems(folder: Path, index: Index, whiten: float | None) -> list[str]:
    """Return why projected gradients could not be written there."""
    problems = []
    if len(index.parts) > 1:
        problems.append(f"--bergson: holds gradients of one checkpoint, and the index has {len(index.parts)}")
    if whiten is not None:
        problems.append("--bergson: every target has a whitening of its own; leave out --bergson or --whiten")
    if os.path.lexists(folder):
        problems.append(f"--bergson: {folder} is there; name a new folder")
    return problems
