"""Batched sampling from the model under training.

The loop is our own rather than ``model.generate``: it calls the outermost module, so that FSDP2 and ZeRO-3 gather
parameters, keeps all ranks in step, leaves nothing behind on the model and draws no global random numbers. A draw is a
function of (seed, prompt id, sample, position) only.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex import comm
from dataflex.errors import ComponentError, DataError, UnsupportedError
from dataflex.rng import uniforms
from dataflex.signals.model_access import ModelAccess
from dataflex.signals.model_parts import is_partitioned, model_parts
from dataflex.signals.specs import Generation, GenerationSpec
from dataflex.signals.sweep import Sweep, mask_of, padded, preserve_state, row_pass

_SAMPLES = 2**20  # ids of draws: prompt id x this + sample


def pick_tokens(logits_BV: torch.Tensor, uniforms_B: torch.Tensor, spec: GenerationSpec) -> torch.Tensor:
    """Choose one token per row, int64 [B], by inverting the cumulative distribution of logits [B, V].

    ``uniforms_B`` are float64 in (0, 1), not used when greedy. Order of operations as in transformers: temperature,
    then ``top_k``, then ``top_p``.
    """
    logits_BV = logits_BV.float()
    if spec.temperature == 0.0:
        return logits_BV.argmax(dim=-1)
    scaled_BV = logits_BV / spec.temperature
    if 0 < spec.top_k < scaled_BV.shape[-1]:
        scaled_BV, token_BV = scaled_BV.topk(spec.top_k, dim=-1)
    elif spec.top_p < 1.0:
        scaled_BV, token_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
    else:
        token_BV = torch.arange(scaled_BV.shape[-1], device=scaled_BV.device).expand_as(scaled_BV)
    p_BV = torch.softmax(scaled_BV.double(), dim=-1)
    if spec.top_p < 1.0:  # likeliest first: a token stays while those before it do not reach top_p
        p_BV = p_BV * (p_BV.cumsum(dim=-1) - p_BV < spec.top_p)
    cumulative_BV = p_BV.cumsum(dim=-1)
    goal_B1 = uniforms_B[:, None] * cumulative_BV[:, -1:]
    place_B1 = torch.searchsorted(cumulative_BV, goal_B1, right=True)
    last_B1 = cumulative_BV.shape[-1] - 1 - p_BV.flip(-1).gt(0).long().argmax(dim=-1, keepdim=True)
    place_B1 = place_B1.minimum(last_B1)  # rounding at a number close to 1
    return token_BV.gather(1, place_B1)[:, 0]


class Generator:
    """Samples from the causal language model of ``access``; a sample ends with an end token of tokenizer or model."""

    def __init__(self, access: ModelAccess) -> None:
        self._access, self._tokenizer = access, access.known_tokenizer("generation")
        self._parts = model_parts(access.model)
        if self._parts.head is None or hasattr(access.model, "pretrained_model"):
            raise UnsupportedError(f"generation needs a causal language model, found {type(access.model).__name__}")
        self._accepts = frozenset(inspect.signature(self._parts.lm.forward).parameters)
        own = getattr(getattr(self._parts.lm, "generation_config", None), "eos_token_id", None)
        ends = [self._tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else [own])]
        self._ends = frozenset(int(token) for token in ends if token is not None)

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Sequence[int]], spec: GenerationSpec, *, ids: NDArray[np.int64] | None = None
    ) -> list[Generation]:
        """Sample ``spec.num_samples`` continuations of every prompt, equal on every rank (collective).

        ``ids`` are an id per prompt [n] that its draws depend on, as a row id; positions if left out.

        Raises:
            DataError: An empty prompt.
            ComponentError: The model's logits are not finite.
        """
        empty = [index for index, prompt in enumerate(prompts) if not len(prompt)]
        if empty:
            raise DataError(f"generation: prompts {empty[:5]} have no tokens")
        names = np.arange(len(prompts), dtype=np.int64) if ids is None else np.asarray(ids, dtype=np.int64)
        count, root = spec.num_samples, self._parts.root
        draws = np.repeat(names, count) * _SAMPLES + np.tile(np.arange(count), len(prompts))
        repeated = [prompt for prompt in prompts for _ in range(count)]
        sweep = Sweep(
            dataset=[*zip(repeated, draws.tolist(), strict=True)],
            rows=np.arange(len(repeated), dtype=np.int64),
            lengths=np.array([len(prompt) for prompt in repeated], dtype=np.int64) + spec.max_new_tokens,
            collate=_left_padded,
            token_budget=self._access.token_budget,
            device=self._access.device,
            what="responses generated",
        )
        with preserve_state(root):
            root.eval()
            made = row_pass(sweep, lambda batch: self._batch(spec, **batch), (spec.max_new_tokens,))
        # Tokens pass through float32, which holds every vocabulary's.
        by_place = made.astype(np.int64).tolist()
        found = []
        for i, row in enumerate(by_place):
            tokens = [token for token in row if token >= 0]
            text, ended = self._tokenizer.decode(tokens, skip_special_tokens=True), tokens[-1] in self._ends
            one = Generation(prompt=i // count, sample=i % count, token_ids=tuple(tokens), text=text, finished=ended)
            found.append(one)
        return found

    def _batch(
        self, spec: GenerationSpec, *, inputs: torch.Tensor, mask: torch.Tensor, draws: NDArray[np.int64]
    ) -> torch.Tensor:
        """Return new tokens [B, max_new_tokens], -1 after the end."""
        device = inputs.device
        ends = torch.tensor(sorted(self._ends), dtype=torch.int64, device=device)
        new = torch.full((len(inputs), spec.max_new_tokens), -1, dtype=torch.int64, device=device)
        alive = torch.ones(len(inputs), dtype=torch.bool, device=device)
        in_step = comm.world() > 1 and is_partitioned(self._parts.root)
        fed, past = inputs, None
        for step in range(spec.max_new_tokens):
            logits, past = self._forward(fed, mask, past)
            if not torch.isfinite(logits.max(dim=-1).values).all():
                raise ComponentError("generation: the model's logits are not finite")
            u = torch.from_numpy(uniforms(spec.seed, "generate", step, draws)).to(device)
            token = pick_tokens(logits, u, spec)
            new[:, step] = torch.where(alive, token, -1)
            alive = alive & ~torch.isin(token, ends)
            going = alive.any().long()
            if not int(comm.gather_sum(going) if in_step else going):
                break
            token = torch.where(alive, token, 0)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            inputs = torch.cat([inputs, token[:, None]], dim=1)
            fed = inputs if past is None else token[:, None]
        return new

    def _forward(self, fed: torch.Tensor, mask: torch.Tensor, past: Any) -> tuple[torch.Tensor, Any]:
        """Return logits of the last position [B, V] and the cache, or None where the model keeps none."""
        options: dict[str, Any] = {"attention_mask": mask, "use_cache": True}
        if past is not None:
            options["past_key_values"] = past
        if "position_ids" in self._accepts:  # counted from the first real token: padding is on the left
            options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -fed.shape[1] :]
        if "logits_to_keep" in self._accepts:
            options["logits_to_keep"] = 1
        with self._access.autocast():
            outputs = self._parts.root(input_ids=fed, **options)
        return outputs.logits[:, -1], getattr(outputs, "past_key_values", None)


def _left_padded(asked: list[Any]) -> dict[str, Any]:
    prompts = [prompt for prompt, _ in asked]
    draws = np.array([draw for _, draw in asked], dtype=np.int64)
    return {"inputs": padded(prompts, 0, "left"), "mask": mask_of(prompts, "left"), "draws": draws}
