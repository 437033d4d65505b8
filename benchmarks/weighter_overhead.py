"""What weighters cost per optimizer step over the stock step, as ratios within one run, and at their peak.

Stock and weighted runs alternate on the small model, the same rows in the same order; step times are process CPU
seconds between optimizer steps, medians over all steps. ``adapt`` embeds its anchors before the first step only, and
``slm`` reads the losses of its reference (here the start model) from the cache that is made before the first step:
both are left out of the medians. Aims: loss at most 1.02, adapt and slm at most 1.03.

Peak memory is that of the loss alone, forward and backward, over logits that exist already: the bytes that torch's
allocator holds at most beyond them, for the stock loss and for ours, in fp32 and bf16, with all and with half of
the positions supervised.

Usage: python benchmarks/weighter_overhead.py [--quick] [--steps N] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from path_overhead import ROOT, run_settings, step_seconds, told

MODEL = ROOT / "examples/models/base-4m"
NEVER = 10**6
CASES = {
    "loss": {"name": "loss", "burn_in_steps": 0},
    "adapt": {"name": "adapt", "targets": ["goal"], "refresh_steps": NEVER},
    "joint": {"name": "joint_update_aware", "targets": ["goal"], "refresh_steps": NEVER},
    "slm, cached": {"name": "slm", "reference": str(MODEL)},
    "token (dft)": {"name": "token"},
    "token (entropy)": {"name": "token", "function": "entropy"},
    "group_dro": {"name": "group", "strategy": "group_dro"},
    "meta": {"name": "meta", "targets": ["goal"]},
    "presence": {"name": "presence"},
}


def peak_bytes(compute: Callable[[], object]) -> int:
    """Return the most bytes that torch's CPU allocator held at once while computing, beyond those before."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = compute()
    del result
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            held += event.nbytes()
            most = max(most, held)
    return most


def memory_table(positions: int, vocabulary: int) -> list[str]:
    """Measure peaks of the stock loss and of ours."""
    import torch
    import torch.nn.functional as F

    from dataflex.train.weighting import token_losses

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
            max_samples=30 * options.steps,
            packing=False,
            per_device_train_batch_size=8,
            logging_steps=10,
            disable_shuffling=True,
        )
        times: dict[str, list[float]] = {"stock": [], **{case: [] for case in options.cases}}
        for _ in range(options.rounds):
            for case in times:
                block = None if case == "stock" else {"weighter": CASES[case]}
                if case == "group_dro":
                    block = {**(block or {}), "domain_column": "source"}
                times[case] += step_seconds(settings, block, folder)
        memory = memory_table(2048 if options.quick else 8192, 4096)
    write = sys.stdout.write
    write(f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}; base-4m, ")
    write(f"batch 8 x 128 tokens, {options.rounds} x {options.steps} steps, CPU seconds per step\n")
    write(told(times, "stock"))
    write("\n" + "\n".join(memory) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
