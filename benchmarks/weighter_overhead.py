"""What weighters cost per optimizer step over the stock step, as ratios within one run, and at their peak.

Stock and weighted runs alternate on the small model, the same rows in the same order; step times are process CPU
seconds between optimizer steps, medians over all steps. ``adapt`` embeds its anchors before the first step only, and
``slm`` reads the losses of its reference (here the start model) from the cache that is made before the first step:
both are left out of the medians. Aims: loss at most 1.02, adapt and slm at most 1.03.

Peak memory is told twice. Of a whole optimizer step, the fifth of a run: the bytes of all tensors that live when it
begins and the most that torch's allocator holds beyond them until it ends. And of the loss alone, forward and
backward, over logits that exist already, for the stock loss and for ours, in fp32 and bf16, with all and with half of
the positions supervised.

Usage: python benchmarks/weighter_overhead.py [--quick] [--steps N] [--rounds N] [--batch N]
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from path_overhead import ROOT, run_settings, step_seconds, told, watched_run

MODEL = ROOT / "examples/models/base-4m"
NEVER = 10**6
CASES = {
    "loss": {"name": "loss", "warmup_steps": 0},
    "adapt": {"name": "adapt", "targets": ["goal"], "refresh_steps": NEVER},
    "joint": {"name": "joint_update_aware", "targets": ["goal"], "refresh_steps": NEVER},
    "slm, cached": {"name": "slm", "reference": str(MODEL)},
    "token (dft)": {"name": "token"},
    "token (entropy)": {"name": "token", "function": "entropy"},
    "group_dro": {"name": "group", "strategy": "group_dro"},
    "meta": {"name": "meta", "targets": ["goal"]},
    "presence": {"name": "presence"},
}


def most_held(profiler: Any) -> int:
    """Return the most bytes that torch's CPU allocator held at once while profiled, beyond those before."""
    import torch

    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            held += event.nbytes()
            most = max(most, held)
    return most


def profiling() -> Any:
    """Return a profiler of memory on the CPU."""
    from torch.profiler import ProfilerActivity, profile

    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def peak_bytes(compute: Callable[[], object]) -> int:
    """Return the most bytes held at once while computing, beyond those before."""
    with profiling() as profiler:
        result = compute()
    del result
    return most_held(profiler)


def living_bytes() -> int:
    """Return the bytes of the storages of all tensors that live."""
    import torch

    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def step_bytes(settings: dict, dynamic: dict | None, folder: Path) -> tuple[int, int]:
    """Train five steps; return the bytes that live before the fifth, and the most it holds beyond them."""
    profiler, before, ended = profiling(), 0, False

    def watch(step: int) -> None:
        nonlocal before, ended
        if step == 4:
            before = living_bytes()
            profiler.__enter__()
        if step == 5 and not ended:  # called once more at the end of an epoch
            ended = True
            profiler.__exit__(None, None, None)

    watched_run({**settings, "max_steps": 5}, dynamic, folder, watch)
    return before, most_held(profiler)


def step_table(peaks: dict[str, tuple[int, int]], base: str) -> str:
    """Return the peaks of whole steps and their ratios to that of the case ``base``."""
    lines = [f"{'peak of a step':<16} {'before MB':>9} {'beyond MB':>9} {'ratio to ' + base:>16}"]
    whole = sum(peaks[base])
    for case, (before, beyond) in peaks.items():
        lines.append(f"{case:<16} {before / 1e6:>9.1f} {beyond / 1e6:>9.1f} {(before + beyond) / whole:>16.3f}")
    return "\n".join(lines) + "\n"


def memory_table(positions: int, vocabulary: int) -> list[str]:
    """Measure peaks of the stock loss and of ours."""
    import torch
    import torch.nn.functional as F

    from dataflex.train.loss import token_losses

    lines = [f"{'loss of ' + str(positions) + ' positions x ' + str(vocabulary):<34} {'stock MB':>9} {'ours MB':>9}"]
    for dtype in (torch.float32, torch.bfloat16):
        for share in (1.0, 0.5):
            logits = torch.randn(1, positions, vocabulary).to(dtype).requires_grad_()
            labels = torch.randint(0, vocabulary, (1, positions))
            labels[:, : round((1 - share) * positions)] = -100
            targets = F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)

            def stock(logits: torch.Tensor = logits, targets: torch.Tensor = targets) -> object:
                flat = logits.float().view(-1, logits.shape[-1])
                return torch.autograd.grad(F.cross_entropy(flat, targets, reduction="sum"), logits)

            def ours(logits: torch.Tensor = logits, labels: torch.Tensor = labels) -> object:
                return torch.autograd.grad(token_losses(logits, labels).loss_BT.sum(), logits)

            peaks = [peak_bytes(compute) / 1e6 for compute in (stock, ours)]
            what = f"{str(dtype).removeprefix('torch.')}, {share:.0%} supervised"
            lines.append(f"{what:<34} {peaks[0]:>9.1f} {peaks[1]:>9.1f}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and one round")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES), help="which weighters")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.rounds = 12, 1
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        info = {}
        columns = {"prompt": "instruction", "query": "input", "response": "output"}
        for name, file in (("pool", "pool"), ("goal", "gsm8k_valid")):
            rows = (ROOT / f"examples/data/{file}.jsonl").read_text().splitlines()
            (folder / f"{name}.jsonl").write_text("\n".join(rows[: 8 if name == "goal" else None]) + "\n")
            info[name] = {"file_name": f"{name}.jsonl", "columns": columns}
        (folder / "dataset_info.json").write_text(json.dumps(info))
        settings = run_settings(
            folder,
            options.steps,
            dataset="pool",
            max_samples=4 * options.batch * options.steps,
            packing=False,
            per_device_train_batch_size=options.batch,
            logging_steps=10,
            disable_shuffling=True,
        )
        blocks: dict[str, dict | None] = {case: {"weighter": CASES[case]} for case in options.cases}
        if "group_dro" in blocks:
            blocks["group_dro"] = {"weighter": CASES["group_dro"], "domain_column": "source"}
        blocks = {"stock": None, **blocks}
        times: dict[str, list[float]] = {case: [] for case in blocks}
        for _ in range(options.rounds):
            for case, block in blocks.items():
                times[case] += step_seconds(settings, block, folder)
        peaks = {case: step_bytes(settings, block, folder) for case, block in blocks.items()}
        memory = memory_table(2048 if options.quick else 8192, 4096)
    write = sys.stdout.write
    write(f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}; base-4m, ")
    write(f"batch {options.batch} x 128 tokens, {options.rounds} x {options.steps} steps, CPU seconds per step\n")
    write(told(times, "stock"))
    write("\n" + step_table(peaks, "stock"))
    write("\n" + "\n".join(memory) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
