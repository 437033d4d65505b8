"""Checks and measures DataFlex on one GPU in ten minutes, with random weights; nothing is fetched.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu --scale toy      all of it, small, to see that it works

Needs what ``dataflex`` itself imports (torch, transformers, numpy, safetensors, pyarrow, scipy, xxhash, PyYAML), and no
LLaMA-Factory. Writes ``results.json`` after each check, and ``results-gpu.md``. A check for which too little time is
left is skipped. The exit code is 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))  # also where dataflex is not installed
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def hardware(device: Any) -> dict[str, str]:
    """Return what the numbers were measured on."""
    import numpy
    import torch
    import transformers

    from dataflex.version import __version__

    found = {"device": str(device), "processor": platform.machine(), "cores": str(os.cpu_count())}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "memory": f"{properties.total_memory / 2**30:.0f} GiB"}
        found["CUDA"] = str(torch.version.cuda)
    versions = {"dataflex": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return found | versions | {"numpy": numpy.__version__, "python": platform.python_version()}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", choices=["full", "toy"], default="full")
    parser.add_argument("--minutes", type=float, default=9.0, help="no check is begun that would end after these")
    parser.add_argument("--only", nargs="*", help="names of the checks to run, in this order")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    options = parser.parse_args(arguments)
    import torch
    from benchmarks.gpu.checks import CHECKS, Setting, run
    from benchmarks.gpu.page import page
    from benchmarks.gpu.shapes import FULL, TOY

    if unknown := sorted({*(options.only or ())} - {*CHECKS}):
        parser.error(f"no check is named {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    device, toy = torch.device(options.device), options.scale == "toy"
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu --scale toy tries the checks without one")
    setting = Setting(device, TOY if toy else FULL, toy)
    results: dict[str, Any] = {"scale": options.scale, "hardware": hardware(device), "checks": []}
    options.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * options.minutes
    for name in options.only or CHECKS:
        left, needed = until - time.monotonic(), CHECKS[name][1] * (0.1 if toy else 1.0)
        if left < needed:
            told = f"skipped: {max(left, 0):.0f} s are left, it may need {needed:.0f}"
            found = {"name": name, "goal": CHECKS[name][2], "passed": None, "values": {}, "problem": told}
        else:
            found = run(name, setting)
        results["checks"].append(found)
        (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (options.out / "results-gpu.md").write_text(page(results))
        state = {True: "passed", False: "FAILED", None: "measured"}[found["passed"]]
        sys.stdout.write(f"{name}: {found['problem'] or state} ({found.get('seconds', 0)} s)\n")
        for key, value in found["values"].items():
            sys.stdout.write(f"  {key}: {value:.6g}\n" if isinstance(value, float) else f"  {key}: {value}\n")
        sys.stdout.flush()
    failed = [each["name"] for each in results["checks"] if each["passed"] is False]
    sys.stdout.write(f"gpu: {len(results['checks'])} checks, failed: {', '.join(failed) or 'none'}; {options.out}\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
