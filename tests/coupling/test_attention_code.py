"""Attention as people write it: sizes computed in code, in free functions, and torch's attention called as one."""

import functools
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekit as sk
from sparsekit.coupling.named_integers import uncached_reshapes


def split_heads(x, heads):
    b, n, c = x.shape
    return x.reshape(b, n, heads, c // heads).transpose(1, 2)


def attend(x, qkv, heads):
    """A free function that computes the width of a head from that of its input, also for the scale."""
    width = x.shape[-1]
    q, k, v = [split_heads(part, heads) for part in F.linear(x, qkv).chunk(3, -1)]
    scores = (q * (width // heads) ** -0.5) @ k.transpose(-2, -1)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape[0], x.shape[1], width)


class InAFunction(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.heads = 4
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x):
        return self.out(attend(x, self.qkv.weight, self.heads))


class InTheMethod(InAFunction):
    def forward(this, x):
        b, n, c = x.shape
        qkv = F.linear(x, this.qkv.weight).view(b, n, 3, this.heads, c // this.heads)
        q, k, v = qkv.unbind(2)
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / (c / this.heads) ** 0.5
        mixed = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)
        return this.out(mixed.reshape(b, n, c))


class AsAFunctionOfTorch(nn.Module):
    """The attention pooling of CLIP."""

    def __init__(self, width=16):
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        tokens = x.transpose(0, 1)
        out, _ = F.multi_head_attention_forward(
            query=tokens[:1],
            key=tokens,
            value=tokens,
            embed_dim_to_check=tokens.shape[-1],
            num_heads=self.heads,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q.bias, self.k.bias, self.v.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.out.weight,
            out_proj_bias=self.out.bias,
            training=self.training,
            use_separate_proj_weight=True,
            q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight,
            v_proj_weight=self.v.weight,
        )
        return out.transpose(0, 1)


class Tokens(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.attention, self.head = kind(), nn.Linear(16, 3)

    def forward(self, x):
        tokens = self.embed(x)
        return self.head((tokens[:, :1] + self.attention(self.norm(tokens))).mean(1))


@pytest.mark.parametrize("kind", [InAFunction, InTheMethod, AsAFunctionOfTorch])
def test_heads_go_where_code_computes_their_width(kind, tmp_path):
    torch.manual_seed(0)
    model, x = Tokens(kind).eval(), torch.randn(2, 5, 6)
    for kept in (2, 1):  # the second cut is one of the model that was loaded
        groups = sk.find_groups(model, x, round_to=1, min_channels=1)
        (heads,) = groups.free
        assert [m.tensor for m in heads.of_role("size")] == ["attention.heads"]
        masks = {heads.name: torch.arange(heads.n_channels) >= heads.n_channels - kept}
        plan = sk.make_plan(groups, masks)
        pruned = sk.apply_plan(model, plan)
        assert sk.verify_cut(model, pruned, plan).max_rel < 1e-5
        assert pruned.attention.out.weight.shape == (16, 4 * kept)
        folder = sk.save(pruned, tmp_path / str(kept), factory=lambda: Tokens(kind), plan=plan)
        model = sk.load(folder, factory=lambda: Tokens(kind))
        assert torch.equal(model(x), pruned(x))


def test_torchvision_swin_loses_heads_of_its_windows():
    from torchvision.models import SwinTransformer

    torch.manual_seed(0)
    model = SwinTransformer([4, 4], 16, depths=[2], num_heads=[4], window_size=[2, 2], num_classes=3).eval()
    nn.init.normal_(model.head.weight)
    x = torch.randn(1, 3, 16, 16)
    groups = sk.find_groups(model, x, round_to=1, min_channels=1)
    names = [f"features.1.{i}.attn.qkv" for i in (0, 1)]
    plan = sk.make_plan(groups, {name: torch.tensor([True, False, True, False]) for name in names})
    pruned = sk.apply_plan(model, plan)
    assert sk.verify_cut(model, pruned, plan).max_rel < 1e-5
    assert pruned.features[1][1].attn.relative_position_bias_table.shape == (9, 2)


def test_shapes_that_einops_keeps_are_worked_out_anew(monkeypatch):
    einops = types.ModuleType("einops.einops")
    einops._reconstruct_from_shape = functools.lru_cache(lambda size: [size])
    monkeypatch.setitem(sys.modules, "einops.einops", einops)
    kept = einops._reconstruct_from_shape(2)
    with uncached_reshapes():
        assert einops._reconstruct_from_shape(2) is not kept
    assert einops._reconstruct_from_shape(2) is kept
