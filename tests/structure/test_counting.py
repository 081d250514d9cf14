from __future__ import annotations

import pytest
import timm
import torch
from models_by_hand import BY_HAND, build, random_masks
from plain import find_groups
from torch import Tensor, nn

from sparsekit.selection.costs import kept_share
from sparsekit.structure.counting import count_macs, count_params, layer_costs
from sparsekit.structure.plan import make_plan
from sparsekit.surgery.cut import apply_plan


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv2d(3, 8, 3), (1, 3, 10, 12), 8 * 3 * 9 * (8 * 10)),
        (nn.Conv2d(3, 8, 3, padding=1, stride=2), (1, 3, 10, 12), 8 * 3 * 9 * (5 * 6)),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (1, 8, 10, 12), 8 * 9 * (10 * 12)),
        (nn.Conv2d(8, 12, 1, groups=4), (1, 8, 5, 5), 12 * 2 * 25),
        (nn.Conv1d(3, 5, 4), (1, 3, 10), 5 * 3 * 4 * 7),
        (nn.Linear(7, 5), (1, 7), 35),
        (nn.Linear(7, 5, bias=False), (1, 9, 7), 9 * 35),
        # Every input position is spread over the kernel.
        (nn.ConvTranspose2d(3, 4, 2, stride=2), (1, 3, 5, 6), 3 * 4 * 4 * (5 * 6)),
        (nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), (1, 6, 5, 5), 6 * 2 * 9 * 25),
    ],
)
def test_the_macs_of_a_layer_are_those_counted_by_hand(
    layer: nn.Module, shape: tuple[int, ...], macs: int
) -> None:
    assert count_macs(layer, torch.randn(shape)) == macs
    (cost,) = layer_costs(layer, torch.randn(shape))
    assert (cost.weight, cost.macs) == ("weight", macs)


@pytest.mark.parametrize("name", ["Residual", "Transposed", "TwoInTwoOut", "resnet18"])
def test_the_batch_size_does_not_matter(name: str) -> None:
    model, inputs = build(name)
    single = tuple(x[:1] for x in inputs)
    assert count_macs(model, inputs) == count_macs(model, single)
    assert layer_costs(model, inputs) == layer_costs(model, single)


def test_a_layer_that_runs_twice_costs_twice() -> None:
    model, inputs = build("UsedTwice")
    costs = {cost.weight: cost.macs for cost in layer_costs(model, inputs)}
    assert costs["shared.weight"] == 2 * 6 * 6 * 9 * 64
    assert sum(costs.values()) == count_macs(model, inputs)


def attention_macs(tokens: int, width: int, hidden: int) -> int:
    """Queries, keys, values and output; scores and their product with the values; the MLP."""
    return tokens * 4 * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden


def test_attention_counts_whatever_kernel_would_run_it() -> None:
    tokens = torch.randn(1, 5, 8)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert count_macs(encoder.eval(), tokens) == attention_macs(5, 8, 16)
    assert torch.backends.mha.get_fastpath_enabled()
    model, inputs = build("Attention")
    by_layer = 5 * (8 * 24 + 8 * 8 + 8 * 10) + 10 * 3
    assert count_macs(model, inputs) == by_layer + 2 * 5**2 * 8
    assert sum(cost.macs for cost in layer_costs(model, inputs)) == by_layer


def test_a_vision_transformer_costs_what_its_paper_layout_says() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=64, depth=2)
    tokens = 17
    expected = 2 * attention_macs(tokens, 192, 768) + 16 * 192 * 3 * 16**2 + 192 * 10
    assert count_macs(model, torch.randn(1, 3, 64, 64)) == expected


def test_counting_leaves_the_model_as_it_was() -> None:
    model, inputs = build("Residual")
    model.train()
    model.inner_norm.eval()
    flags = [m.training for m in model.modules()]
    statistics = model.stem_norm.running_mean.clone()
    count_macs(model, inputs)
    layer_costs(model, inputs)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(model.stem_norm.running_mean, statistics)
    assert not any(m._forward_hooks for m in model.modules())


class ReadsParameter(nn.Module):
    """A layer is called with a bare parameter, as class tokens are."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.layer, self.head = nn.Parameter(torch.ones(1, 4)), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.layer(features) + self.layer(self.token))


@pytest.mark.parametrize("fails", [False, True])
def test_a_parameter_that_a_module_is_called_with_is_no_obstacle_and_still_wants_gradients(
    fails: bool,
) -> None:
    model = ReadsParameter()
    model.layer.bias.requires_grad_(False)
    wanted = [p.requires_grad for p in model.parameters()]
    features = torch.randn(1, 7 if fails else 4, requires_grad=True)
    if fails:
        with pytest.raises(RuntimeError):
            count_macs(model, features)
    else:
        assert count_macs(model, features) == 2 * 4 * 5 + 5 * 3
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert features.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_shared_parameters_count_once() -> None:
    model, _ = build("TiedWeights")
    assert count_params(model) == 6 * 6 + (6 * 5 + 5) + (5 * 2 + 2)


def layer_macs(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Without products of activations, which attention has and no weight shows."""
    return sum(cost.macs for cost in layer_costs(model, inputs))


# Its layers look at channels as if they were positions, and so get cheaper with channels that no weight of theirs has.
POSITIONS_SHRINK = {"TokenMixing"}


@pytest.mark.parametrize("share", [0.5, 0.0])
@pytest.mark.parametrize("name", [*sorted(set(BY_HAND) - POSITIONS_SHRINK), "resnet18", "legacy_seresnet18"])
def test_the_share_foretold_from_masks_is_that_of_the_model_really_cut(name: str, share: float) -> None:
    model, inputs = build(name)
    groups = find_groups(model, inputs)
    masks = random_masks(groups, share)
    cut = apply_plan(model, make_plan(groups, masks))
    foretold = kept_share(groups, masks)
    assert foretold.macs == layer_macs(cut, inputs) / layer_macs(model, inputs) < 1
    assert foretold.params == count_params(cut) / count_params(model) < 1
    kept, free = sum(int(m.sum()) for m in masks.values()), sum(g.n_channels for g in groups.free)
    assert foretold.channels == pytest.approx(kept / free)


def test_masks_that_keep_everything_leave_everything() -> None:
    model, inputs = build("Residual")
    groups = find_groups(model, inputs)
    for masks in ({}, random_masks(groups, 1.0)):
        share = kept_share(groups, masks)
        assert (share.macs, share.params, share.channels) == (1.0, 1.0, 1.0)


def test_one_channel_of_the_branch_costs_a_row_and_a_column() -> None:
    model, inputs = build("Residual")
    groups = find_groups(model, inputs)
    (inner,) = [g for g in groups.free if g.n_channels == 6]
    mask = torch.ones(6, dtype=torch.bool)
    mask[3] = False
    dense = 100 * 9 * (3 * 8 + 8 * 6 + 6 * 8) + 8 * 4
    saved = 100 * 9 * (8 + 8)
    assert kept_share(groups, {inner.name: mask}).macs == (dense - saved) / dense
