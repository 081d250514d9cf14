"""What Torch-Pruning needs to be told about a timm model, by every benchmark that runs it beside us."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn import functional as F


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
