"""Driver: one run of ``ours`` or of ``peer`` with a configuration in flat keys; what its decisions cost.

    python training.py ours|peer CONFIG.yaml ROWS OUT.json

The measured time of the peer is inside its ``select``, ours is the whole decision, plan and record included. ROWS is
the number of rows that are scored anew by autograd after the first decision (0: none).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from meter import Meter, adam, agreement, cosines_oracle, losses_oracle, one_thread, spread


def compared(kind: str, scores: Any, model: Any, rows: Any, targets: Any, state: Any, number: int) -> dict[str, float]:
    """Return how the scores of all rows agree with exact ones, on a few."""
    picked = spread(len(rows), number)
    few, own = [rows[i] for i in picked], [float(scores[i]) for i in picked]
    was = model.training
    model.eval()
    if kind == "less":
        direction = adam(model, state, corrected=SYSTEM == "ours")
        exact = cosines_oracle(model, few, list(targets), direction).mean(dim=1).tolist()
    else:
        exact = losses_oracle(model, few)
    model.train(was)
    return agreement(own, exact)


def watch_ours(meter: Meter, found: dict[str, Any], name: str, number: int) -> None:
    """Measure the decisions of this repository's DataFlex."""
    from dataflex.train.controller import Controller

    decide, choose = Controller._decide, Controller._select

    def chosen(self: Any, pool: Any, ctx: Any) -> Any:
        self.seen = choose(self, pool, ctx)
        return self.seen

    def decided(self: Any, interval: Any) -> Any:
        if interval.kind != "dynamic":
            return decide(self, interval)
        with meter.measure():
            plan = decide(self, interval)
        if number and name in ("less", "loss") and "fidelity" not in found:
            access = self.signals.access
            targets = next(iter(access.targets.values())).dataset if access.targets else ()
            state = access.optimizer().state
            scores, rows = self.seen.scores, access.train.dataset
            found["fidelity"] = compared(name, scores, access.model, rows, targets, state, number)
        return plan

    Controller._select, Controller._decide = chosen, decided  # type: ignore[method-assign]


def watch_peer(meter: Meter, found: dict[str, Any], name: str, number: int) -> None:
    """Measure the selections of PyPI's dataflex."""
    import torch
    from dataflex.core.registry import REGISTRY

    from dataflex.train import selector as _registered  # noqa: F401

    if name not in REGISTRY._store["selector"]:
        return
    chosen = REGISTRY.get("selector", name)
    select, seen = chosen.select, {}
    if name == "loss":
        score = chosen._compute_losses

        def scored(self: Any, *args: Any, **options: Any) -> Any:
            seen["scores"] = score(self, *args, **options)
            return seen["scores"]

        chosen._compute_losses = scored

    def selected(self: Any, model: Any, step_id: int, *args: Any, **options: Any) -> Any:
        with meter.measure():
            rows = select(self, model, step_id, *args, **options)
        if number and name in ("less", "loss") and "fidelity" not in found:
            targets, state = getattr(self, "eval_dataset", ()), options["optimizer_state"]
            if name == "less":
                kept = [
                    Path(self.cache_dir, part, str(step_id), "all_projected_grads.pt") for part in ("train", "eval")
                ]
                ours, aims = (torch.load(file, weights_only=True) for file in kept)
                seen["scores"] = (ours @ aims.T).mean(dim=1)
            found["fidelity"] = compared(name, seen["scores"], model, self.dataset, targets, state, number)
        return rows

    chosen.select = selected


def main() -> None:
    """Run the command line at the top."""
    import yaml

    import dataflex

    system, config, number, out = sys.argv[1:]
    asked = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    name = asked["component_name"] if asked["train_type"] == "dynamic_select" else ""
    one_thread()
    meter, found = Meter(), {"file": dataflex.__file__}
    if system == "ours":
        from dataflex.run import train_here

        watch_ours(meter, found, name, int(number))
        train_here([config])
    else:
        from dataflex.launcher import launch

        watch_peer(meter, found, name, int(number))
        sys.argv = ["dataflex", config]
        launch()
    Path(out).write_text(json.dumps(found | meter.result()), encoding="utf-8")


if __name__ == "__main__":
    SYSTEM = sys.argv[1]
    main()
