"""Torch-Pruning beside us: what it needs to be told about a timm model, and its global cuts to a size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekit as sk


def free_attention_(model: nn.Module) -> list[Attention]:
    """Let timm's attention modules work at any width, in place, as the authors' own timm example does."""
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    for attention in attentions:
        attention.forward = _attention_of_any_width.__get__(attention)  # type: ignore[method-assign]
    return attentions


def told_of_its_width_(attentions: Sequence[Attention], pruner: Any) -> None:
    """Set the numbers of heads, and their widths, to what the pruner left of them."""
    for attention in attentions:
        attention.num_heads = pruner.num_heads[attention.qkv]
        attention.head_dim = attention.qkv.out_features // (3 * attention.num_heads)


def classifier_layers(model: Any, num_classes: int) -> list[nn.Module]:
    """The last linear layer with one output a class, and what timm says classifies."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == num_classes][-1:]
    found = model.get_classifier() if hasattr(model, "get_classifier") else None
    several = found if isinstance(found, (tuple, list)) else [found]
    return layers + [layer for layer in several if isinstance(layer, nn.Module)]


def global_cut(
    model: nn.Module,
    example: Tensor,
    ratio: float,
    *,
    importance: Any,
    round_to: int | None,
    num_classes: int,
    gradients: Sequence[Tensor] | None = None,
) -> nn.Module:
    """A copy of the model, cut by Torch-Pruning over all layers at once; the classifier stays whole.

    `gradients` are what the importance reads as the gradient of each parameter, in their order.
    """
    import torch_pruning as tp

    pruned = copy.deepcopy(model)
    for parameter, gradient in zip(pruned.parameters(), gradients or (), strict=gradients is not None):
        parameter.grad = gradient.clone()
    attentions = free_attention_(pruned)
    pruner = tp.pruner.MagnitudePruner(
        pruned,
        example,
        importance=importance,
        global_pruning=True,
        pruning_ratio=ratio,
        max_pruning_ratio=0.95,
        round_to=round_to,
        ignored_layers=classifier_layers(pruned, num_classes),
        num_heads={attention.qkv: attention.num_heads for attention in attentions},
        prune_num_heads=False,
        prune_head_dims=True,
    )
    pruner.step()
    told_of_its_width_(attentions, pruner)
    pruned.zero_grad(set_to_none=True)
    return pruned


class PeerCuts:
    """Cuts of one model by one variant of Torch-Pruning, each made once; `cut` takes the share to prune."""

    def __init__(self, model: nn.Module, example: Tensor, cut: Callable[[float], nn.Module]) -> None:
        self._example, self._cut = example, cut
        self._dense = sk.count_macs(model, example)
        self._cuts: dict[float, tuple[float, nn.Module]] = {}

    def to_macs(self, macs_ratio: float, *, halvings: int = 7) -> nn.Module:
        """The cut whose MACs ratio is nearest to the one asked for, by bisection of the share to prune."""
        low, high = 0.0, 0.97
        for _ in range(halvings):
            ratio = (low + high) / 2
            if ratio not in self._cuts:
                pruned = self._cut(ratio)
                self._cuts[ratio] = self._dense / sk.count_macs(pruned, self._example), pruned
            found = self._cuts[ratio][0]
            if abs(found / macs_ratio - 1) < 0.01:
                break
            low, high = (ratio, high) if found < macs_ratio else (low, ratio)
        return min(self._cuts.values(), key=lambda cut: abs(cut[0] - macs_ratio))[1]


def _attention_of_any_width(
    self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """timm's attention, its sizes read off the qkv layer instead of remembered."""
    batch, n_tokens, _ = x.shape
    head_dim = self.qkv.out_features // (3 * self.num_heads)
    qkv = self.qkv(x).reshape(batch, n_tokens, 3, self.num_heads, head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(
        self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask, is_causal=is_causal
    )
    mixed = self.norm(mixed.transpose(1, 2).reshape(batch, n_tokens, -1))
    if self.gate is not None:
        mixed = mixed * self.gate(x).sigmoid()
    return self.proj_drop(self.proj(mixed))  # type: ignore[no-any-return]
