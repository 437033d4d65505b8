"""One rank: gradients, moments and the training afterwards of a sharded model, against an unwrapped copy.

Usage: torchrun ... sharded_worker.py RESULTS ENGINE,ENGINE,... (ddp, fsdp2, zero0, zero1, zero2, zero3)
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from dataflex.signals.gradients.consumers import Dots, Norms, TargetVectors
from dataflex.signals.gradients.engine import GradientEngine
from dataflex.signals.gradients.parameters import choose_parameters
from dataflex.signals.gradients.precondition import PRESETS, moments_of, preconditioner
from tests.signals.gradients.small import Collect, build, differences, engine_of, layers_of, oracle, ragged

RATE = 1e-2


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def adamw(parameters):
    # A large eps: engines add gradients up in another order, and Adam makes steps of full size of that rounding.
    return torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, eps=1e-3)


class Plain:
    """DDP."""

    backend = "plain"

    def __init__(self, model):
        self.inner = model
        self.wrapped = torch.nn.parallel.DistributedDataParallel(model)
        self.optimizer = adamw(trainable(model))
        self.release = None

    def step(self, batch):
        self.wrapped(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def whole(self):
        return {n: p.detach() for n, p in choose_parameters(self.inner).items()}


class Fsdp2(Plain):
    def __init__(self, model):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        for layer in base.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        self.inner = self.wrapped = model
        self.optimizer = adamw(trainable(model))
        self.release = None

    def whole(self):
        return {n: p.full_tensor().detach() for n, p in choose_parameters(self.inner).items()}


class Zero:
    backend = "zero"

    def __init__(self, model, stage):
        import deepspeed

        self.stage = stage
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
        }
        self.wrapped, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=adamw(trainable(model)), config=config
        )
        self.inner = self.wrapped.module
        self.release = self.wrapped.empty_partition_cache if stage == 3 else None

    def step(self, batch):
        self.wrapped.backward(self.wrapped(**batch).loss)
        self.wrapped.step()

    def whole(self):
        from deepspeed.utils import safe_get_full_fp32_param

        named = choose_parameters(self.inner)
        return {n: safe_get_full_fp32_param(p) if self.stage else p.detach() for n, p in named.items()}


def make(kind, model):
    if kind == "ddp":
        return Plain(model)
    return Fsdp2(model) if kind == "fsdp2" else Zero(model, int(kind[-1]))


def close(found, expected):
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def check(kind, name):
    reference = build(name)
    optimizer = adamw(trainable(reference))
    sharded = make(kind, copy.deepcopy(reference))
    reference.eval()
    sharded.wrapped.eval()  # no dropout: the two must train alike
    for seed in (1, 2):
        batch = ragged([5, 8], seed=seed)
        reference(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sharded.step(batch)
    engine = GradientEngine(sharded.inner, release=sharded.release)  # with LoRA, the head sees labelled positions only
    moments = moments_of(sharded.optimizer, engine.parameters, sharded.backend)
    named = choose_parameters(reference)
    expected_moments = moments_of(optimizer, named)
    first = max(close(moments[n].first, expected_moments[n].first) for n in named)
    second = max(close(moments[n].second, expected_moments[n].second) for n in named)
    step = next(iter(moments.values())).step
    rank = dist.get_rank()
    batch = ragged([5, 9 - rank, 3], seed=rank, unlabelled=() if rank else (2,))
    collect = Collect(engine)
    targets = TargetVectors.zeros(2, engine.shapes, "cpu")
    for tensor in targets.tensors.values():
        tensor.normal_(generator=torch.Generator().manual_seed(0))
    plain = engine.run(batch, [collect, Norms()])
    rows = oracle(reference, batch, named)
    lines = differences({n: g[: 3 - (rank == 0)] for n, g in collect.rows.items()}, rows[: 3 - (rank == 0)], 1e-4)
    adam = [preconditioner(PRESETS["true_adam"], m) for m in (moments, expected_moments)]
    scores = engine.run(batch, [Dots(targets)], precondition=adam[0])["dots"]
    again = engine_of(reference)
    expected = again.run(batch, [Dots(targets)], precondition=adam[1])["dots"]
    kept = ~torch.isnan(expected[:, 0])
    final = ragged([6, 7], seed=9)
    reference(**final).loss.backward()
    optimizer.step()
    sharded.wrapped.eval()
    sharded.step(final)
    whole = sharded.whole()
    return {
        "kind": kind, "model": name, "rank": rank, "differences": lines,
        "first": first, "second": second, "step": step,
        "scores": close(scores[kept], expected[kept]),
        "nan": bool(torch.equal(torch.isnan(scores), torch.isnan(expected))) and bool(plain["norms"][kept].gt(0).all()),
        "afterwards": max(close(whole[n], named[n].detach()) for n in named),
        "layers": sorted(set(layers_of(engine).values())),
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    kinds = sys.argv[2].split(",")
    if any(kind.startswith("zero") for kind in kinds):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would compile for a minute
        deepspeed.init_distributed("gloo")
    results = [check(kind, name) for kind in kinds for name in ("llama-tied", "lora")]
    Path(f"{sys.argv[1]}.{dist.get_rank()}").write_text("\n".join(map(json.dumps, results)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
