"""Widths that norms over all channels run over: layer norms on request, RMS norms always, both exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from models_by_hand import build, random_masks, zero_dropped_
from timm.layers import LayerNorm2d, RmsNorm, RmsNorm2d
from torch import Tensor, nn

from sparsekit.artifact.load import load
from sparsekit.artifact.save import save
from sparsekit.coupling.find_groups import find_groups
from sparsekit.errors import InputError
from sparsekit.structure.plan import make_plan
from sparsekit.surgery.cut import apply_plan
from sparsekit.surgery.layer_norms import count_zeros_, layer_norm_form
from sparsekit.surgery.verify import compare_outputs, verify_cut


def normalised(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm over the last dimension, by its formula."""
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weight + bias


class NormByHand(nn.Module):
    """Layer norm of maps, in the way of ConvNeXt's and SAM's code, with names of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift, self.gain = (
            nn.Parameter(torch.zeros(1, channels, 1, 1)),
            nn.Parameter(torch.ones(channels)),
        )
        self.eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        deviation = torch.sqrt(centred.pow(2).mean(1, keepdim=True) + self.eps)
        return self.gain[:, None, None] * centred / deviation + self.shift


@pytest.mark.parametrize(
    "make", [nn.LayerNorm, LayerNorm2d, NormByHand, lambda n: nn.LayerNorm(n, bias=False)]
)
def test_a_layer_norm_counts_what_is_gone_as_zeros(make: Callable[[int], nn.Module]) -> None:
    torch.manual_seed(0)
    norm, keep = make(6).double(), [1, 3, 4]
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    form = layer_norm_form(norm)
    assert form is not None
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    x[..., [0, 2, 5]] = 0
    x = x.movedim(-1, form.dim)
    expected = norm(x).index_select(form.dim, torch.tensor(keep))
    count_zeros_(norm, 6)
    for name, parameter in norm.named_parameters():
        dim = max(range(parameter.dim()), key=lambda d: parameter.shape[d])
        setattr(norm, name, nn.Parameter(parameter.index_select(dim, torch.tensor(keep))))
    torch.testing.assert_close(norm(x.index_select(form.dim, torch.tensor(keep))), expected)
    count_zeros_(norm, 3)  # a second cut: the width stays that of the first model
    assert norm.dense_width == 6


def test_only_what_computes_a_layer_norm_is_taken_for_one() -> None:
    others = (
        nn.BatchNorm2d(6),
        nn.RMSNorm(6, eps=1e-3),
        nn.LayerNorm((2, 3)),
        nn.GroupNorm(1, 6),
        nn.Linear(1, 6),
    )
    for module in (*others, nn.LayerNorm(6, elementwise_affine=False)):
        assert layer_norm_form(module) is None
        with pytest.raises(InputError, match="no layer norm"):
            count_zeros_(module, 6)


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "test_convnext"])
def test_on_request_a_width_under_layer_norm_is_cut(name: str, tmp_path: Path) -> None:
    model, inputs = build(name)
    asked, plain = (find_groups(model, inputs, through_layer_norm=through) for through in (True, False))
    widths = {group.name for group in asked.free if group.of_role("layer_norm")}
    assert widths
    assert widths.isdisjoint(group.name for group in plain.free)
    assert {g.name: g.n_channels for g in plain.free}.items() <= {
        g.name: g.n_channels for g in asked.free
    }.items()
    norms = {m.module for g in asked.free for m in g.members if m.role == "layer_norm"}
    alone = {n: mask for n, mask in random_masks(asked, 0.6).items() if n in widths}
    for masks in (alone, random_masks(asked, 0.4, seed=1)):
        plan = make_plan(asked, masks)
        pruned = apply_plan(model, plan)
        assert verify_cut(model, pruned, plan).max_rel < 1e-9
        for norm in norms:
            module, dense = pruned.get_submodule(norm), model.get_submodule(norm)
            assert tuple(module.normalized_shape) == tuple(module.weight.shape)
            assert len(module.weight) < len(dense.weight)
    if name in ("test_vit", "test_convnext"):
        return
    save(pruned, tmp_path)
    assert compare_outputs(pruned, load(tmp_path).double(), plan.inputs).max_rel < 1e-12


@pytest.mark.parametrize("norm", [nn.LayerNorm, NormByHand])
def test_zero_channels_go_from_under_a_layer_norm_and_their_shift_is_folded(norm: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, shape = Stream(norm).double(), (2, 4, 3, 3) if norm is NormByHand else (2, 5, 4)
    for parameter in (*model.before.parameters(), *model.after.parameters()):
        nn.init.uniform_(parameter, 0.5, 1.5)
    groups = find_groups(model, torch.randn(shape, dtype=torch.float64), through_layer_norm=True)
    (width,) = (group for group in groups.free if group.n_channels == 8)
    assert len(width.of_role("layer_norm")) == 4
    plan = make_plan(groups, {width.name: torch.arange(8) % 3 != 0})
    verify_cut(model, apply_plan(model, plan), plan, tolerance=1e-9)
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for member in width.penalised:
            if not member.tensor.endswith(("after.bias", "after.shift")):  # what is left is a constant
                tensors[member.tensor].index_fill_(member.dim, torch.tensor([0, 3, 6]), 0)
    pruned = apply_plan(model, plan)
    assert compare_outputs(model, pruned, plan.inputs).max_rel < 1e-12
    again = find_groups(pruned, torch.randn(shape, dtype=torch.float64), through_layer_norm=True)
    second = make_plan(again, {width.name: torch.arange(5) > 1})
    assert verify_cut(pruned, apply_plan(pruned, second), second).max_rel < 1e-9
    assert pruned.after.dense_width == 8


def test_a_layer_norm_without_scale_keeps_its_width() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 2))
    groups = find_groups(model, torch.randn(2, 3), through_layer_norm=True)
    assert not groups.free


class Stream(nn.Module):
    """A stream of maps or tokens with a branch, normalised in front of the branch and behind."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        two_d = norm in (RmsNorm2d, NormByHand)
        layer = (lambda i, o: nn.Conv2d(i, o, 1)) if two_d else nn.Linear
        self.embed, self.up, self.down, self.head = layer(4, 8), layer(8, 10), layer(10, 8), layer(8, 3)
        self.before, self.after = norm(8), norm(8)
        self.before.eps = self.after.eps = 1e-2

    def forward(self, x: Tensor) -> Tensor:
        stream = self.embed(x)
        stream = stream + self.down(self.up(self.before(stream)).relu())
        return self.head(self.after(stream))


@pytest.mark.parametrize(
    ("norm", "shape"), [(nn.RMSNorm, (2, 5, 4)), (RmsNorm, (2, 5, 4)), (RmsNorm2d, (2, 4, 3, 3))]
)
def test_zero_channels_under_a_root_mean_square_norm_go_without_changing_anything(
    norm: type[nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = Stream(norm).double()
    for module in (model.before, model.after):
        nn.init.uniform_(module.weight, 0.5, 1.5)
    groups = find_groups(model, torch.randn(shape, dtype=torch.float64))
    (width,) = (group for group in groups.free if group.n_channels == 8)
    plan = make_plan(groups, {width.name: torch.arange(8) % 3 != 0})
    verify_cut(model, apply_plan(model, plan), plan, tolerance=1e-9)
    zero_dropped_(model, plan)
    pruned = apply_plan(model, plan)
    assert compare_outputs(model, pruned, plan.inputs).max_rel < 1e-12
    assert tuple(pruned.before.normalized_shape) == (5,)


def test_a_root_mean_square_norm_without_an_epsilon_to_change_keeps_its_width() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.RMSNorm(6, eps=None), nn.Linear(6, 2))
    assert not find_groups(model, torch.randn(2, 3)).free


def test_the_width_of_a_transformer_with_root_mean_square_norms_is_free() -> None:
    model = timm.create_model("test_vit4", num_classes=5).double().eval()
    groups = find_groups(model, torch.randn(1, *model.pretrained_cfg["input_size"], dtype=torch.float64))
    (width,) = (group for group in groups.free if group.of_role("response"))
    assert width.n_channels == model.num_features


class AttentionOfComputedWidth(nn.Module):
    """Attention that writes its heads side by side into as many columns as its *input* has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 3)
        self.num_heads, self.head_dim = 4, 2

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens))
        batch, n, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, n, width)).mean(1)


@pytest.mark.parametrize("share", [(0.5, 1.0), (1.0, 0.5), (0.5, 0.5), (0.75, 0.25)])
def test_width_and_heads_can_go_apart_where_one_is_computed_from_the_other(
    share: tuple[float, float],
) -> None:
    model = AttentionOfComputedWidth().double().eval()
    groups = find_groups(model, torch.randn(2, 5, 6, dtype=torch.float64), through_layer_norm=True)
    assert {g.name: g.n_channels for g in groups.free} == {"embed": 8, "qkv": 4}
    kept = {
        g.name: torch.arange(g.n_channels) < part * g.n_channels
        for g, part in zip(groups.free, share, strict=True)
    }
    plan = make_plan(groups, kept)
    verify_cut(model, apply_plan(model, plan), plan, tolerance=1e-9)
