"""Open torch's attention: the same parameters and results, computed in the open, with as many heads as are left.

`nn.MultiheadAttention` insists that its heads together are as wide as what it reads, and in eval mode it may hand all
its tensors to one fused kernel. So a module whose heads or widths a cut changes gets a subclass with a forward of our
own: parameters, their names and the arguments stay, `embed_dim` may differ from `num_heads` x `head_dim`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Attribute of the classes made here.
_MARK = "_attends_in_the_open"


def open_attention_(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Give attention modules (those of `names`, or all) a subclass that computes in the open, in place.

    Subclasses with a forward of their own are left as they are. An encoder that holds an open one no longer packs its
    inputs into nested tensors: only the fused kernel reads these.
    """
    for name, module in model.named_modules():
        if can_open(module) and (names is None or name in names):
            module.__class__ = _open_class(type(module))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(map(is_open, module.modules())):
            module.use_nested_tensor = False


def open_where_cut_(model: nn.Module) -> None:
    """Open the attention modules whose tensors do not have the shapes that torch's forward asks for, in place."""
    cut = [name for name, module in model.named_modules() if can_open(module) and not _fits(module)]
    open_attention_(model, cut)


def can_open(module: nn.Module) -> bool:
    """Whether the module computes as torch's own class does."""
    own = getattr(type(module), "forward", None) is nn.MultiheadAttention.forward
    return own and isinstance(module, nn.MultiheadAttention)


def is_open(module: nn.Module) -> bool:
    """Whether the module is an opened one."""
    return _MARK in vars(type(module))


def closed_class(module: nn.Module) -> type[nn.Module]:
    """The module's class before it was opened."""
    cls = type(module)
    return cls.__bases__[0] if is_open(module) else cls


def refit_attention_(module: nn.MultiheadAttention) -> None:
    """Make the declared widths agree with the tensors, in place; `num_heads` is a size that the plan names."""
    packed = module.in_proj_weight
    weights = [packed] * 3 if packed is not None else _separate(module)
    module.embed_dim, module.kdim, module.vdim = (weight.shape[1] for weight in weights)


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What `F.multi_head_attention_forward` returns, of heads that need not be as wide as the query together.

    Shapes as there: query (targets, batch, width), key and value (sources, batch, width), or without the batch. The
    width of a head is that of the projected query / `num_heads`; `embed_dim_to_check` is not checked.
    """
    batched = query.dim() == 3
    if not batched:
        query, key, value = _with_batch(query, key, value)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    weights = (q_proj_weight, k_proj_weight, v_proj_weight)
    packed = None if use_separate_proj_weight else in_proj_weight
    projected = _projected((query, key, value), weights, packed, in_proj_bias)
    q, k, v = _in_heads(projected, (bias_k, bias_v), num_heads)
    batch = query.shape[1]
    k = k if static_k is None else _unflattened(static_k, 0, (batch, num_heads))
    v = v if static_v is None else _unflattened(static_v, 0, (batch, num_heads))
    if add_zero_attn:
        k, v = (torch.cat([one, torch.zeros_like(one[:, :, :1])], 2) for one in (k, v))
    only_causal = is_causal and key_padding_mask is None and not need_weights
    if is_causal and attn_mask is None:
        raise RuntimeError("is_causal is a hint about attn_mask, which has to be given as well")
    mask = None if only_causal else _mask(attn_mask, key_padding_mask, q, k)
    dropout = dropout_p if training else 0.0
    attention = None
    if need_weights:
        attention = _attention(q, k, mask, dropout)
        attended = attention @ v
    else:
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, only_causal)
    out = F.linear(attended.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if attention is not None:
        attention = attention if batched else attention.squeeze(0)
        attention = attention.mean(-3) if average_attn_weights else attention
    return out if batched else out.squeeze(1), attention


@contextmanager
def functional_attention_in_the_open(note: Callable[[Any], None]) -> Iterator[None]:
    """Let `F.multi_head_attention_forward` be `attention_forward`, for code that calls it with weights of its own.

    `note` is told of the number of heads of each call, while it runs.
    """

    def noted(*args: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
        note(args[4] if len(args) > 4 else keywords["num_heads"])
        return attention_forward(*args, **keywords)

    functional: Any = F
    before = functional.multi_head_attention_forward
    functional.multi_head_attention_forward = noted
    try:
        yield
    finally:
        functional.multi_head_attention_forward = before


def _forward(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `nn.MultiheadAttention.forward`."""
    swap = self.batch_first and query.dim() == 3
    if swap:  # the same tensor stays the same: then one product projects all three
        moved = {id(one): one.transpose(0, 1) for one in (query, key, value)}
        query, key, value = (moved[id(one)] for one in (query, key, value))
    out, attention = attention_forward(
        query,
        key,
        value,
        self.embed_dim,
        self.num_heads,
        self.in_proj_weight,
        self.in_proj_bias,
        self.bias_k,
        self.bias_v,
        self.add_zero_attn,
        self.dropout,
        self.out_proj.weight,
        self.out_proj.bias,
        training=self.training,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        attn_mask=attn_mask,
        use_separate_proj_weight=self.in_proj_weight is None,
        q_proj_weight=self.q_proj_weight,
        k_proj_weight=self.k_proj_weight,
        v_proj_weight=self.v_proj_weight,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
    )
    return out.transpose(0, 1) if swap else out, attention


def _open_class(cls: type[nn.Module]) -> type[nn.Module]:
    attributes = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__reduce_ex__": _reduced,
        "forward": _forward,
        # Transformer layers ask for this before they take the fused kernel, which knows no other widths.
        "_qkv_same_embed_dim": property(lambda self: False),
        _MARK: True,
    }
    return type(cls.__name__, (cls,), attributes)


def _reduced(module: nn.Module, protocol: Any) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """How to copy or pickle an opened module: its class is made anew."""
    return _empty, (closed_class(module),), module.__dict__


def _empty(cls: type[nn.Module]) -> nn.Module:
    made = _open_class(cls)
    return made.__new__(made)


def _fits(module: Any) -> bool:
    """Whether the tensors are what torch's forward asks for: heads as wide together as the query."""
    rows = module.in_proj_weight.shape[0] // 3 if module.in_proj_weight is not None else None
    rows = module.q_proj_weight.shape[0] if rows is None else rows
    columns = (module.q_proj_weight if module.in_proj_weight is None else module.in_proj_weight).shape[1]
    out: tuple[int, ...] = tuple(module.out_proj.weight.shape)
    return bool(rows == columns == module.embed_dim and out == (rows, rows))


def _separate(module: nn.MultiheadAttention) -> list[Tensor]:
    weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    return [weight for weight in weights if weight is not None]


def _with_batch(*tensors: Tensor) -> Iterator[Tensor]:
    """The tensors with a batch of one; one that is given twice stays one."""
    made = {id(one): one.unsqueeze(1) for one in tensors}
    return (made[id(one)] for one in tensors)


def _projected(
    tensors: tuple[Tensor, ...],
    weights: tuple[Tensor | None, ...],
    packed: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, ...]:
    """Query, key and value, each by its weight, or by its third of a packed one: in one product if they are one."""
    if packed is not None and all(tensor is tensors[0] for tensor in tensors):
        return F.linear(tensors[0], packed, bias).chunk(3, -1)
    weights = weights if packed is None else packed.chunk(3)
    biases: tuple[Tensor | None, ...] = (None, None, None) if bias is None else bias.chunk(3)
    if any(weight is None for weight in weights):
        raise RuntimeError("attention needs in_proj_weight, or use_separate_proj_weight with three weights")
    found = zip(tensors, weights, biases, strict=True)
    return tuple(F.linear(one, weight, own) for one, weight, own in found if weight is not None)


def _in_heads(
    projected: tuple[Tensor, ...], biases: tuple[Tensor | None, Tensor | None], num_heads: int
) -> tuple[Tensor, ...]:
    """(length, batch, width) -> (batch, heads, length, width of a head), behind key and value a learned one each."""
    q, k, v = projected
    bias_k, bias_v = biases
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([one, own.repeat(1, one.shape[1], 1)]) for one, own in ((k, bias_k), (v, bias_v)))
    return tuple(_unflattened(one, -1, (num_heads, -1)).permute(1, 2, 0, 3) for one in (q, k, v))


def _unflattened(tensor: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    split: Tensor = tensor.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
    return split


def _attention(q: Tensor, k: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """(batch, heads, targets, sources)."""
    scores = (q * float(q.shape[-1]) ** -0.5) @ k.transpose(-2, -1)
    attention = torch.softmax(scores if mask is None else scores + mask, -1)
    return F.dropout(attention, dropout) if dropout else attention


def _mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """What is added to the scores: (batch or 1, heads or 1, targets or 1, sources); places added to the keys are open.

    `attn_mask` is (targets, sources) or (batch x heads, targets, sources), `key_padding_mask` (batch, sources).
    """
    both = []
    if attn_mask is not None:
        added = _added(attn_mask, q, k)
        both.append(added if added.dim() == 2 else _unflattened(added, 0, (q.shape[0], q.shape[1])))
    if key_padding_mask is not None:
        both.append(_added(key_padding_mask, q, k)[:, None, None])
    return both[0] if len(both) == 1 else both[0] + both[1] if both else None


def _added(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A mask as numbers: where a boolean one is true, nothing is read."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
    return F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
