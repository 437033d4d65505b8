"""Classes for existing DataFlex: rows that the first rank draws for all, and half of the loss."""

import torch
import torch.distributed as dist
from dataflex.core.registry import register_selector, register_weighter

from .base_selector import Selector
from .base_weighter import Weighter


@register_selector("drawn_once")
class DrawnOnce(Selector):
    def select(self, model, step_id, num_samples, **kwargs):
        drawn = [torch.randperm(len(self.dataset))[:num_samples].tolist() if self.accelerator.is_main_process else None]
        if dist.is_initialized():
            dist.broadcast_object_list(drawn, src=0)
        return drawn[0]


@register_weighter("half")
class Half(Weighter):
    def get_weighted_loss(self, losses, *, ctx=None, model=None, inputs=None):
        return 0.5 * losses.mean()
