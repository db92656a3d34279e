"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685) by surgery on a finished model.

A frozen `W` of a linear layer gets a trainable update of rank R: `y = W x + (alpha / R) B A x`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freeze import layer_numbers
from machine.fast import linear

PARENTS = {"q": "attention", "k": "attention", "v": "attention", "o": "attention"}
PARENTS |= {"fc1": "feed_forward", "fc2": "feed_forward"}
TARGETS = tuple(PARENTS)


class LoRALinear(nn.Module):
    """A linear layer `(N, in) -> (N, out)`, frozen, beside a trainable low-rank path that starts at exactly zero."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale, self.dropout = alpha / rank, dropout
        like: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.A = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, **like))  # zero: training starts at the base model
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # not zero: else B would have no gradient

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """Of x, or of its GELU."""
        x = F.gelu(x) if gelu else x
        exact = self.base.weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
        if exact and not (self.training and self.dropout > 0):  # 16 bits would lose a small update in the sum
            return MergedLinear.apply(x, self.base.weight, self.base.bias, self.A, self.B, self.scale)
        low_rank = F.linear(F.dropout(x, self.dropout, self.training), self.A)  # (N, R)
        return self.base(x) + self.scale * F.linear(low_rank, self.B)


class MergedLinear(torch.autograd.Function):
    """`x (W + scale B A)^T + b` with W and b frozen: one matrix product instead of three passes over the rows."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(x, weight, A, B)
        return linear(x, torch.addmm(weight, B, A, alpha=scale), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        grad_x = linear(grad, torch.addmm(weight, B, A, alpha=ctx.scale).T) if ctx.needs_input_grad[0] else None
        grad_A = ctx.scale * linear(grad, B.T).T @ x
        grad_B = ctx.scale * (linear(x, A).T @ grad).T  # in this order, the wide one last, five times faster
        return grad_x, None, None, grad_A, grad_B, None


def inject(
    module: nn.Module,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    layers: Sequence[int] | None = None,
    dropout: float = 0.0,
) -> list[str]:
    """Wrap the `targets` (among q k v o fc1 fc2) of the transformer layers with these numbers (None: all).

    `module` is a backbone or has one as `backbone`. Returns the names of what it wrapped. Raises ValueError for a
    target or layer that does not exist, one wrapped already, and a rank below 1.
    """
    backbone: Any = getattr(module, "backbone", module)
    blocks: nn.ModuleList = backbone.layers
    numbers = layer_numbers("all" if layers is None else layers, len(blocks), "lora_layers")
    if rank < 1:
        raise ValueError(f"lora_rank: expected at least 1, found {rank}")
    if unknown := [target for target in targets if target not in PARENTS]:
        raise ValueError(f"lora_targets: no {', '.join(unknown)}; expected some of {', '.join(TARGETS)}")
    if not targets or not numbers:
        raise ValueError("lora_targets and lora_layers: nothing to wrap; expected at least one of each")
    places = {f"layers.{i}.{PARENTS[t]}.{t}": (getattr(blocks[i], PARENTS[t]), t) for i in numbers for t in targets}
    if wrapped := [name for name, (parent, t) in places.items() if isinstance(getattr(parent, t), LoRALinear)]:
        raise ValueError(f"{wrapped[0]} has LoRA already")
    for parent, target in places.values():
        setattr(parent, target, LoRALinear(getattr(parent, target), rank, alpha, dropout))
    return list(places)


def adapters(module: nn.Module) -> Iterator[tuple[nn.Module, str, LoRALinear]]:
    """Every LoRA layer below `module` with the module that holds it and its name there."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                yield parent, name, child


@torch.no_grad()
def merge(module: nn.Module) -> None:
    """Add every update to its weight, `W + (alpha / R) B A`, and put the plain linear layer back."""
    for parent, name, adapter in adapters(module):
        weight = adapter.base.weight
        merged = weight + (adapter.scale * adapter.B @ adapter.A).to(weight.dtype)
        adapter.base.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)
        setattr(parent, name, adapter.base)
