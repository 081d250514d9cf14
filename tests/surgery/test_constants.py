"""Constants of dead channels that a zero-padded layer reads: merged into one that stays, and one kept for that."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from models_by_hand import build
from plain import find_groups
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.layers import Linear as TimmLinear
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from sparsekit.selection.carriers import keep_carriers
from sparsekit.selection.keep_masks import _chosen, keep_masks
from sparsekit.structure.groups import ChannelGroup, ChannelGroups, Member
from sparsekit.structure.inputs import InputSpec
from sparsekit.structure.masks import Masks
from sparsekit.structure.plan import PrunePlan, TensorCut, make_plan
from sparsekit.surgery.constants import fold_constants_
from sparsekit.surgery.cut import apply_plan
from sparsekit.surgery.verify import verify_cut

EXACT = 1e-10  # float64, relative to the largest output
N = 8  # channels that readers read
SHIFTS = [0.1, 0.7, -0.2, 0.3, 1.3, 0.0, -0.4, 0.5]


def reading(reader: nn.Module, *, dead: list[int], between: nn.Module | None = None) -> nn.Module:
    """Convolution, BatchNorm (scale 0 in the dead channels), ReLU or what lies between, reader; in float64."""
    torch.manual_seed(0)
    stem = nn.Conv2d(3, N, 3, bias=False)
    model = nn.Sequential(stem, nn.BatchNorm2d(N), between or nn.ReLU(), copy.deepcopy(reader))
    model = model.double().eval()
    with torch.no_grad():
        model[1].weight[dead] = 0
        model[1].bias.copy_(torch.tensor(SHIFTS, dtype=torch.float64))
    return model


def images(seed: int = 1) -> Tensor:
    return torch.randn(4, 3, 11, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def without(*dropped: int) -> Tensor:
    mask = torch.ones(N, dtype=torch.bool)
    mask[list(dropped)] = False
    return mask


def relative_change(before: nn.Module, after: nn.Module, inputs: Tensor | None = None) -> float:
    inputs = images() if inputs is None else inputs
    with torch.no_grad():
        dense, cut = before(inputs), after(inputs)
    return float((dense - cut).abs().max() / dense.abs().max())


def change_at_the_cut(model: nn.Module, masks: Masks) -> float:
    plan = make_plan(find_groups(model, images()), masks)
    cut = apply_plan(model, plan)
    assert verify_cut(model, cut, plan).max_rel < EXACT
    return relative_change(model, cut)


class OwnInitialiser(nn.Conv2d):
    """A subclass with an initialiser of its own that computes as torch's class does."""

    def __init__(self) -> None:
        super().__init__(N, 4, 3, padding=1)


PADDED = [
    nn.Conv2d(N, 4, 3, padding=1),
    nn.Conv2d(N, 4, 3, padding=1, bias=False),
    nn.Conv2d(N, 4, 3, padding=(2, 0)),
    nn.Conv2d(N, 4, 3, padding=2, dilation=2),
    nn.Conv2d(N, 4, 5, padding=2, stride=2, bias=False),
    nn.Conv2d(N, 4, (3, 5), padding="same"),
    nn.Conv2d(N, 4, 1, padding=1),
    nn.ConvTranspose2d(N, 4, 2, stride=2),
    nn.ConvTranspose2d(N, 4, 3, stride=2, padding=1, output_padding=1),
    nn.ConvTranspose2d(N, 4, 3, padding=1, dilation=2, bias=False),
    Conv2dSame(N, 4, 3, stride=2),
    Conv2dSame(N, 4, 5, bias=False, dilation=2),
    OwnInitialiser(),
    ScaledStdConv2d(N, 4, 3, padding=1),  # the cut makes it a plain one first
    StdConv2dSame(N, 4, 3, stride=2),
]


@pytest.mark.parametrize("reader", PADDED, ids=str)
def test_constants_are_merged_exactly_into_one_that_stays(reader: nn.Module) -> None:
    model = reading(reader, dead=[1, 3, 4])
    assert change_at_the_cut(model, {"0": without(3, 4)}) < EXACT
    assert change_at_the_cut(reading(reader, dead=[3, 4]), {"0": without(3, 4)}) > 1e-3  # without a carrier


@pytest.mark.parametrize(
    ("reader", "shape"),
    [
        (nn.Conv1d(N, 4, 3, padding=1), (2, 3, 9)),
        (nn.ConvTranspose3d(N, 4, 2, stride=2), (2, 3, 4, 5, 4)),
    ],
    ids=str,
)
def test_the_same_in_one_and_in_three_dimensions(reader: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    flat = len(shape) == 3
    stem, norm = (nn.Conv1d(3, N, 1), nn.BatchNorm1d(N)) if flat else (nn.Conv3d(3, N, 1), nn.BatchNorm3d(N))
    model = nn.Sequential(stem, norm, nn.Sigmoid(), copy.deepcopy(reader)).double().eval()
    with torch.no_grad():
        norm.weight[[2, 6]] = 0
        norm.bias[[2, 6]] = torch.tensor([-1.0, 0.4], dtype=torch.float64)
    inputs = torch.randn(shape, dtype=torch.float64)
    plan = make_plan(find_groups(model, inputs), {"0": without(6)})
    assert relative_change(model, apply_plan(model, plan), inputs) < EXACT


def test_the_column_of_the_largest_constant_takes_them_over_and_nothing_else_changes() -> None:
    model = reading(nn.Conv2d(N, 4, 3, padding=1), dead=[1, 3, 4, 7])
    before = model[3].weight.detach().clone()
    plan = make_plan(find_groups(model, images()), {"0": without(3, 7)})
    assert fold_constants_(model, plan) == {"3": 2}
    after = model[3].weight.detach()
    expected = before[:, 4] + (0.3 * before[:, 3] + 0.5 * before[:, 7]) / 1.3
    torch.testing.assert_close(after[:, 4], expected, rtol=1e-12, atol=1e-14)
    others = [0, 1, 2, 5, 6]
    assert torch.equal(after[:, others], before[:, others])
    assert not after[:, [3, 7]].any()


def test_constants_below_zero_carry_too() -> None:
    model = reading(nn.Conv2d(N, 4, 3, padding=1), dead=[2, 6, 7], between=nn.LeakyReLU(0.5))
    with torch.no_grad():
        model[1].bias[6] = -4.0  # becomes -2, the largest there is
    assert change_at_the_cut(model, {"0": without(2, 7)}) < EXACT


def test_a_constant_far_smaller_than_what_it_would_take_over_does_not() -> None:
    for smaller, folded in ((1e-3, {}), (0.1, {"3": 1})):
        model = reading(nn.Conv2d(N, 4, 3, padding=1), dead=[3, 4])
        with torch.no_grad():
            model[1].bias[3] = 1.3 * smaller
        assert fold_constants_(model, make_plan(find_groups(model, images()), {"0": without(4)})) == folded


def test_a_channel_that_varies_around_a_value_is_no_carrier() -> None:
    model = reading(nn.Conv2d(N, 4, 3, padding=1), dead=[1])
    with torch.no_grad():
        model[1].weight[4], model[1].bias[4] = 1e-4, 9.0
    assert fold_constants_(model, make_plan(find_groups(model, images()), {"0": without(1)})) == {}


@pytest.mark.parametrize("reader", [TimmLinear(N * 36, 4), nn.Linear(N * 36, 4)], ids=["timm", "torch"])
def test_a_layer_with_a_bias_that_is_exact_needs_no_carrier(reader: nn.Module) -> None:
    between = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2, 1), nn.AdaptiveMaxPool2d(6), nn.Flatten())
    model = reading(reader, dead=[1, 4], between=between)
    groups = find_groups(model, images())
    assert change_at_the_cut(model, {"0": without(1)}) < EXACT
    masks = {"0": without(1, 4)}
    assert keep_carriers(model, groups, masks)["0"] is masks["0"]
    weight = model[3].weight.detach().clone()
    assert fold_constants_(model, make_plan(groups, {"0": without(1)})) == {"3": 36}
    assert torch.equal(model[3].weight[:, 4 * 36 :], weight[:, 4 * 36 :])


# layers whose weight is not the filter they apply


class Doubled(nn.Conv2d):
    """Uses another weight than it holds."""

    def _conv_forward(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(images, weight * weight.abs().mean(), bias)


def patched() -> nn.Module:
    layer = nn.Conv2d(N, 4, 3, padding=1)
    layer.forward = lambda images: F.conv2d(images, layer.weight.tanh(), layer.bias, padding=1)  # type: ignore[method-assign]
    return layer


COMPUTED: dict[str, Callable[[], nn.Module]] = {
    "StdConv2d": lambda: StdConv2d(N, 4, 3, padding=1, bias=True),
    "StdConv2d_1x1": lambda: StdConv2d(N, 4, 1),
    "StdConv2dSame": lambda: StdConv2dSame(N, 4, 3),
    "ScaledStdConv2d": lambda: ScaledStdConv2d(N, 4, 3, padding=1),
    "ScaledStdConv2dSame": lambda: ScaledStdConv2dSame(N, 4, 3),
    "_conv_forward": lambda: Doubled(N, 4, 3, padding=1),
    "_conv_forward_1x1": lambda: Doubled(N, 4, 1),
    "patched": patched,
    "masked": lambda: prune.l1_unstructured(nn.Conv2d(N, 4, 3, padding=1), "weight", 0.3),
    "parametrized": lambda: parametrizations.weight_norm(nn.Conv2d(N, 4, 3, padding=1)),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_layer_that_computes_its_weight_only_loses_columns(kind: str) -> None:
    model = reading(nn.Identity(), dead=[1, 3, 4])
    model[3] = COMPUTED[kind]().double().eval()
    # Most such groups are frozen; here the one member that matters, whatever `find_groups` makes of it.
    name = next(
        name for name, tensor in model.state_dict().items() if name[0] == "3" and tensor.shape[1:2] == (N,)
    )
    groups = ChannelGroups(
        (ChannelGroup("0", N, (Member(name, 1, tuple(range(N)), 1, "consumer"),)),),
        InputSpec.of(torch.zeros(1, 3, 11, 11)),
        tensor_shapes={name: (4, N)},
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert fold_constants_(model, make_plan(groups, {"0": without(3, 4)})) == {}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key != name)
    assert torch.equal(model.state_dict()[name][:, without(3, 4)], before[name][:, without(3, 4)])
    assert not model.state_dict()[name][:, [3, 4]].any()
    masks = {"0": without(1, 3, 4)}
    assert keep_carriers(model, groups, masks)["0"] is masks["0"]


def test_a_grouped_layer_is_not_read_since_its_columns_are_not_its_inputs() -> None:
    model = reading(nn.Conv2d(N, 4, 3, padding=1, groups=2), dead=[1, 2, 3])
    cut = TensorCut("3.weight", 1, "consumer", keep=(0, 1), drop=(2, 3))
    assert fold_constants_(model, PrunePlan((cut,), (), InputSpec.of(torch.zeros(1, 3, 11, 11)))) == {}


class TwoReaders(nn.Module):
    """Two zero-padded convolutions read the same channels."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, N, 3), nn.BatchNorm2d(N)
        self.one, self.two = nn.Conv2d(N, 4, 3, padding=1), nn.Conv2d(N, 4, 3, padding=1)
        if tied:
            self.two.weight = self.one.weight

    def forward(self, inputs: Tensor) -> Tensor:
        maps = self.norm(self.stem(inputs))
        return self.one(maps.relu()) + self.two(maps.sigmoid())


def test_a_weight_of_two_layers_serves_neither_of_them_as_carrier() -> None:
    for tied, folded in ((False, {"one": 1, "two": 1}), (True, {})):
        model = TwoReaders(tied).double().eval()
        with torch.no_grad():
            model.norm.weight[[1, 4]], model.norm.bias[[1, 4]] = 0, 0.8
        plan = make_plan(find_groups(model, images()), {"stem": without(4)})
        assert fold_constants_(copy.deepcopy(model), plan) == folded
        if not tied:
            assert relative_change(model, apply_plan(model, plan)) < EXACT


def test_a_stream_that_two_batch_norms_write_has_a_constant_for_each_place_it_is_read_at() -> None:
    model, (inputs,) = build("Residual")
    groups = find_groups(model, inputs)
    (stream,) = [group for group in groups.free if group.n_channels == 8]
    with torch.no_grad():
        for norm, shift in ((model.stem_norm, 0.6), (model.outer_norm, -0.2)):
            norm.weight[[2, 3, 5]] = 0
            norm.bias[[2, 3, 5]] = shift * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    masks = {stream.name: without(2, 5)}
    plan = make_plan(groups, masks)
    assert fold_constants_(copy.deepcopy(model), plan) == {"inner": 2, "head": 2}
    assert relative_change(model, apply_plan(model, plan), inputs) < EXACT
    # All three gone: only the padded reader needs one back, and gets the largest.
    masks = keep_carriers(model, groups, {stream.name: without(2, 3, 5)})
    assert torch.equal(masks[stream.name], without(2, 3))
    assert relative_change(model, apply_plan(model, make_plan(groups, masks)), inputs) < EXACT


# carriers


def slimmed(reader: nn.Module, dead: list[int], round_to: int = 1) -> tuple[nn.Module, ChannelGroups, Masks]:
    """A model some of whose scales, but not shifts, are zero, and the masks of the channels that are not."""
    model = reading(reader, dead=dead)
    groups = find_groups(model, images(), round_to=round_to)
    return model, groups, _chosen(model, groups, "threshold", 1e-9, True, None, None)


def kept(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


def test_the_largest_constant_is_kept_where_none_would_stay() -> None:
    model, groups, masks = slimmed(nn.Conv2d(N, 4, 3, padding=1), [1, 3, 4, 5])
    assert kept(masks["0"]) == [0, 2, 6, 7]
    assert change_at_the_cut(model, masks) > 1e-3
    carried = keep_carriers(model, groups, masks)
    assert kept(carried["0"]) == [0, 2, 4, 6, 7]
    assert kept(masks["0"]) == [0, 2, 6, 7]  # a new mask
    assert change_at_the_cut(model, carried) < EXACT
    assert keep_carriers(model, groups, carried)["0"] is carried["0"]  # it has one now


def test_keep_masks_keep_a_carrier_of_themselves() -> None:
    model, groups, masks = slimmed(nn.Conv2d(N, 4, 3, padding=1), [1, 3, 4, 5])
    carried = keep_masks(model, groups, method="threshold", threshold=1e-9)
    assert kept(carried["0"]) == kept(keep_carriers(model, groups, masks)["0"]) == [0, 2, 4, 6, 7]


def test_it_takes_the_place_of_a_dead_channel_that_filled_a_multiple() -> None:
    # Dead: 2, 5 and 6 put out nothing, 3 and 4 a constant. Rounding brings back 2, the first of the dead.
    model, groups, masks = slimmed(nn.Conv2d(N, 4, 3, padding=1), [2, 3, 4, 5, 6], round_to=4)
    assert kept(masks["0"]) == [0, 1, 2, 7]
    carried = keep_carriers(model, groups.with_rounding(4, 1), masks)
    assert kept(carried["0"]) == [0, 1, 4, 7]
    assert change_at_the_cut(model, carried) < EXACT


def test_a_channel_that_only_seems_dead_is_not_given_up() -> None:
    model, groups, masks = slimmed(nn.Conv2d(N, 4, 3, padding=1), [3, 4])
    with torch.no_grad():  # channel 2 reads 0 on every random image, but its filter is alive
        model[1].bias[2] = -100.0
    assert kept(keep_carriers(model, groups, masks)["0"]) == [0, 1, 2, 4, 5, 6, 7]


def test_without_a_place_to_take_one_more_stays_rounded_up_again() -> None:
    model, groups, masks = slimmed(nn.Conv2d(N, 4, 3, padding=1), [2, 3, 4, 6], round_to=2)
    assert kept(masks["0"]) == [0, 1, 5, 7]
    carried = keep_carriers(model, groups.with_rounding(2, 1), masks)
    assert int(carried["0"].sum()) == 6
    assert {0, 1, 4, 5, 7} < set(kept(carried["0"]))
    assert change_at_the_cut(model, carried) < EXACT


@pytest.mark.parametrize("shifts", [0.0, -0.5, 1e-9])
def test_masks_of_groups_without_constants_are_returned_as_they_are(shifts: float) -> None:
    model = reading(nn.Conv2d(N, 4, 3, padding=1), dead=[1, 3])
    with torch.no_grad():
        model[1].bias[[1, 3]] = shifts
    groups = find_groups(model, images())
    masks = {"0": without(1, 3)}
    carried = keep_carriers(model, groups.with_rounding(4, 1), masks)
    assert list(carried) == ["0"]
    assert carried["0"] is masks["0"]


@pytest.mark.parametrize(
    "name", ["Residual", "Concatenation", "Transposed", "GroupedConv", "Attention", "test_vit"]
)
def test_live_channels_need_no_carrier(name: str) -> None:
    model, inputs = build(name)
    groups = find_groups(model, inputs)
    masks = keep_masks(model, groups, target={"channels": 0.6})
    carried = keep_carriers(model, groups, masks)
    assert all(carried[name] is mask for name, mask in masks.items())


def test_one_carrier_serves_both_parts_of_what_a_layer_reads() -> None:
    model, (inputs,) = build("Concatenation")
    with torch.no_grad():
        for layer, dead, shift in ((model.left, [1, 2], 0.3), (model.right, [0, 4], 0.9)):
            layer.weight[dead], layer.bias[dead] = 0, shift
    groups = find_groups(model, inputs)
    masks = {
        "left": torch.tensor([True, False, False, True]),
        "right": torch.tensor([False, True, True, True, False, True]),
    }
    carried = keep_carriers(model, groups, masks)
    assert kept(carried["left"]) == [0, 1, 3]
    assert carried["right"] is masks["right"]
    assert relative_change(model, apply_plan(model, make_plan(groups, carried)), inputs) < EXACT


def test_the_model_its_flags_and_the_random_state_are_left_alone() -> None:
    model, groups, masks = slimmed(nn.Conv2d(N, 4, 3, padding=1), [1, 3, 4])
    model.train()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    apply_plan(model, make_plan(groups, keep_carriers(model, groups, masks)))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
