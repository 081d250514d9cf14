"""Widths that norms over all channels run over: layer norms on request and not lossless, RMS norms exactly."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from models_by_hand import build, random_masks, zero_dropped_
from timm.layers import LayerNorm2d, RmsNorm, RmsNorm2d
from torch import Tensor, nn

from sparsekit.coupling.find_groups import find_groups
from sparsekit.structure.plan import make_plan
from sparsekit.surgery.cut import apply_plan
from sparsekit.surgery.norms import normalise_all_, normalise_what_stays_
from sparsekit.surgery.verify import compare_outputs, verify_cut


def normalised(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm over the last dimension, by its formula."""
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weight + bias


@pytest.mark.parametrize("keep", [(0,), (1, 3, 4), (0, 1, 2, 3, 4, 5)])
def test_a_confined_norm_sees_the_channels_that_stay_and_gives_zero_for_the_others(
    keep: tuple[int, ...],
) -> None:
    torch.manual_seed(0)
    tokens, maps = nn.LayerNorm(6).double(), LayerNorm2d(6).double()
    for norm in (tokens, maps):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        normalise_what_stays_(norm, keep)
    some, x = list(keep), torch.randn(2, 5, 4, 6, dtype=torch.float64)
    for norm, found in ((tokens, tokens(x)), (maps, maps(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))):
        expected = torch.zeros_like(x)
        expected[..., some] = normalised(x[..., some], norm.weight[some], norm.bias[some], norm.eps)
        torch.testing.assert_close(found, expected)


def test_a_confined_norm_is_copied_with_what_it_is_confined_to_and_can_be_set_free() -> None:
    x, norm = torch.randn(3, 4), nn.LayerNorm(4)
    expected = norm(x)
    normalise_what_stays_(norm, (0, 1))
    normalise_what_stays_(norm, (2, 3))
    confined = copy.deepcopy(norm)
    assert confined(x)[:, :2].abs().max() == 0
    assert confined(x)[:, 2:].abs().max() > 0
    normalise_all_(norm)
    assert type(norm) is nn.LayerNorm
    assert torch.equal(norm(x), expected)
    assert confined(x)[:, :2].abs().max() == 0
    plain = nn.Linear(2, 2)
    normalise_all_(plain)
    assert type(plain) is nn.Linear


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "test_convnext"])
def test_on_request_a_width_under_layer_norm_is_cut_and_called_not_lossless(name: str) -> None:
    model, inputs = build(name)
    asked, plain = (find_groups(model, inputs, through_layer_norm=through) for through in (True, False))
    widths = {group.name for group in asked.free if not group.lossless}
    assert widths
    assert all(group.lossless for group in plain)
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
            assert type(module) is type(dense)
            assert tuple(module.normalized_shape) == tuple(module.weight.shape)
            assert len(module.weight) < len(dense.weight)


def test_a_layer_norm_does_change_when_a_zero_channel_goes() -> None:
    model, inputs = build("LayerNormMlp")
    groups = find_groups(model, inputs, through_layer_norm=True)
    (width,) = (group for group in groups.free if not group.lossless)
    assert {m.tensor for m in width.members if m.role == "layer_norm"} == {"norm.weight", "norm.bias"}
    assert not any(m.penalised for m in width.members if m.role == "layer_norm")
    plan = make_plan(groups, {width.name: torch.arange(6) > 1})
    zero_dropped_(model, plan)
    pruned = apply_plan(model, plan)
    assert verify_cut(model, pruned, plan).max_rel < 1e-9  # it computes what the plan says,
    assert compare_outputs(model, pruned, plan.inputs).max_rel > 1e-3  # which is not what it was


def test_a_layer_norm_without_scale_keeps_its_width() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 2))
    groups = find_groups(model, torch.randn(2, 3), through_layer_norm=True)
    assert not groups.free


class RmsStream(nn.Module):
    """A stream of maps or tokens with a branch, normalised by root mean square in front of the branch and behind."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        two_d = norm is RmsNorm2d
        layer = (lambda i, o: nn.Conv2d(i, o, 1)) if two_d else nn.Linear
        self.embed, self.up, self.down, self.head = layer(4, 8), layer(8, 10), layer(10, 8), layer(8, 3)
        self.before, self.after = norm(8, eps=1e-2), norm(8, eps=1e-2)

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
    model = RmsStream(norm).double()
    for module in (model.before, model.after):
        nn.init.uniform_(module.weight, 0.5, 1.5)
    groups = find_groups(model, torch.randn(shape, dtype=torch.float64))
    (width,) = (group for group in groups.free if group.n_channels == 8)
    assert width.lossless
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
