"""Repair in closed form: exact where what goes can be told from what stays, and never for the worse."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from models_by_hand import build, random_masks
from plain import find_groups
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.evaluation import flat_tensors
from sparsekit.repair import least_squares, rows
from sparsekit.structure.masks import Masks

EVERYWHERE = 10**9  # so many positions: all of them
N = 8  # channels that readers read


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def statistics(
    model: nn.Module, groups: sk.ChannelGroups, *batches: Any, **options: Any
) -> sk.InputStatistics:
    return sk.input_statistics(model, groups, batches, most_positions=EVERYWHERE, **options)


def squared_change(before: nn.Module, after: nn.Module, inputs: Any) -> float:
    """The mean squared change of the outputs, relative to their size."""
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad():
        pairs = list(zip(flat_tensors(before(*inputs)), flat_tensors(after(*inputs)), strict=True))
    return sum(float((a - b).square().mean() / a.square().mean()) for a, b in pairs)


def without_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "_RIDGE", 1e-13)


def dropping(groups: sk.ChannelGroups, name: str, *channels: int) -> Masks:
    mask = torch.ones(groups[name].n_channels, dtype=torch.bool)
    mask[list(channels)] = False
    return {name: mask}


def make_dependent_(stem: nn.Module, *, affine: bool, conv_groups: int = 1) -> None:
    """Let the second half of a stem's outputs (of each part) be functions of the first half."""
    generator = torch.Generator().manual_seed(7)
    part = N // conv_groups
    with torch.no_grad():
        for start in range(0, N, part):
            first, second = slice(start, start + part // 2), slice(start + part // 2, start + part)
            mixing = torch.randn(part - part // 2, part // 2, generator=generator, dtype=torch.float64)
            stem.weight[second] = torch.tensordot(mixing, stem.weight[first], 1)
            offset = torch.randn(part - part // 2, generator=generator, dtype=torch.float64)
            stem.bias[second] = mixing @ stem.bias[first] + (offset if affine else 0)


IMAGES, SEQUENCES, TOKENS = (12, 3, 9, 9), (12, 3, 20), (40, 5, 12)
CASES: list[tuple[str, tuple[int, ...], nn.Module, list[nn.Module], bool]] = [
    # stem, images, what follows, whether the second half may have constants of its own
    ("linear over tokens", TOKENS, nn.Linear(12, N), [nn.Linear(N, 4)], True),
    ("1x1", IMAGES, nn.Conv2d(3, N, 3), [nn.Conv2d(N, 4, 1, stride=2, bias=False)], True),
    ("3x3", IMAGES, nn.Conv2d(3, N, 3), [nn.Conv2d(N, 4, 3)], True),
    ("3x3 padded", IMAGES, nn.Conv2d(3, N, 3), [nn.Conv2d(N, 4, 3, padding=1)], False),
    ("3x3 circular", IMAGES, nn.Conv2d(3, N, 3), [nn.Conv2d(N, 4, 3, padding=1, padding_mode="circular")], True),
    ("strided", IMAGES, nn.Conv2d(3, N, 3), [nn.Conv2d(N, 4, 3, stride=2)], True),
    ("dilated", IMAGES, nn.Conv2d(3, N, 3), [nn.Conv2d(N, 4, (3, 2), dilation=(2, 3), bias=False)], True),
    ("1-d", SEQUENCES, nn.Conv1d(3, N, 5), [nn.Conv1d(N, 4, 3, stride=2)], True),
    ("grouped", IMAGES, nn.Conv2d(3, N, 3), [nn.Conv2d(N, 6, 3, groups=2)], True),
    ("flattened", (200, 3, 5, 5), nn.Conv2d(3, N, 3), [nn.MaxPool2d(1), nn.Flatten(), nn.Linear(N * 9, 4)], True),
    ("pooled", (200, 3, 5, 5), nn.Conv2d(3, N, 3), [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(N, 4)], True),
    ("transposed", IMAGES, nn.Conv2d(3, N, 3), [nn.ConvTranspose2d(N, 4, 3, stride=2)], False),
    ("transposed 2x2", IMAGES, nn.Conv2d(3, N, 3), [nn.ConvTranspose2d(N, 4, 2, stride=2, bias=False)], False),
]  # fmt: skip
POINTWISE = ("3x3", "3x3 padded", "3x3 circular", "strided", "dilated", "1-d", "grouped", "flattened")


@pytest.mark.parametrize(
    ("case", "pointwise"),
    [(case, False) for case in CASES] + [(case, True) for case in CASES if case[0] in POINTWISE],
    ids=lambda value: value[0] if isinstance(value, tuple) else "pointwise" if value else "full",
)
def test_channels_that_are_functions_of_those_that_stay_can_go(
    case: tuple[str, tuple[int, ...], nn.Module, list[nn.Module], bool],
    pointwise: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, shape, stem, following, affine = case
    without_ridge(monkeypatch)
    if pointwise:
        monkeypatch.setitem(rows.readers.__kwdefaults__, "most_columns", 1)
    model = copy.deepcopy(nn.Sequential(stem, *following, nn.Flatten())).double().eval()
    conv_groups = getattr(following[0], "groups", 1)
    make_dependent_(model[0], affine=affine, conv_groups=conv_groups)
    x = images(*shape)
    groups = find_groups(model, x[:2])
    half = groups["0"].n_channels // 2
    known = statistics(model, groups, x)
    assert known.layers[f"{len(following)}.weight"].reader.pointwise == (
        pointwise or "Transpose" in str(following)
    )
    plan = sk.make_plan(groups, dropping(groups, "0", *range(half, groups["0"].n_channels)))
    repaired = sk.repair_weights(model, plan, known)
    pruned = sk.apply_plan(repaired, plan)
    assert sk.verify_cut(repaired, pruned, plan).max_rel < 1e-9
    others = images(*shape, seed=1)
    assert squared_change(model, sk.apply_plan(model, plan), others) > 0.01
    assert squared_change(model, pruned, others) < 1e-10


class ReadsTwoGroups(nn.Module):
    """What reads both branches stands behind their concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, N, 3, padding=1), nn.Conv2d(3, N, 3, padding=1)
        self.reader = nn.Conv2d(2 * N, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(torch.cat([self.left(x), self.right(x)], 1)).flatten(1)


def test_what_reads_two_cut_groups_is_repaired_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ridge(monkeypatch)
    torch.manual_seed(0)
    model = ReadsTwoGroups().double().eval()
    x = images(*IMAGES)
    with (
        torch.no_grad()
    ):  # the right branch tells what goes of the left one, and the left one what goes of the right
        model.left.weight[:4], model.left.bias[:4] = model.right.weight[4:] * 2, model.right.bias[4:] - 1
        model.right.weight[:4], model.right.bias[:4] = model.left.weight[4:] / 3, model.left.bias[4:] + 2
    groups = find_groups(model, x[:2])
    known = statistics(model, groups, x)
    plan = sk.make_plan(groups, dropping(groups, "left", *range(4)) | dropping(groups, "right", *range(4)))
    pruned = sk.apply_plan(sk.repair_weights(model, plan, known), plan)
    assert squared_change(model, pruned, images(*IMAGES, seed=1)) < 1e-10


@pytest.mark.parametrize("reader", [nn.Conv2d(N, 4, 1), nn.Conv2d(N, 4, 3), nn.Conv2d(N, 4, 3, padding=1)])
def test_constant_channels_are_folded_as_every_cut_folds_them(reader: nn.Module) -> None:
    """Those that go are constant; of a padded layer a constant channel that stays takes them over."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, N, 3, bias=False), nn.BatchNorm2d(N), nn.ReLU(), copy.deepcopy(reader))
    model = model.double().eval()
    with torch.no_grad():
        model[1].weight[:4] = 0
        model[1].bias.copy_(torch.tensor([0.7, 1.0, 0.0, 0.3, 0.1, 0.2, 0.3, 0.4]))
    x = images(*IMAGES)
    groups = find_groups(model, x[:2])
    plan = sk.make_plan(groups, dropping(groups, "0", 0, 2, 3))
    pruned = sk.apply_plan(sk.repair_weights(model, plan, statistics(model, groups, x)), plan)
    folded = sk.apply_plan(model, plan)
    for (name, ours), theirs in zip(pruned.state_dict().items(), folded.state_dict().values(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9), name
    assert squared_change(model, pruned, images(*IMAGES, seed=1)) < 1e-18


@pytest.mark.parametrize(
    "reader", [nn.Conv2d(N, 4, 3, padding=1), nn.ConvTranspose2d(N, 4, 3, stride=2), nn.Conv2d(N, 4, 1)]
)
def test_no_other_weights_change_the_output_less_on_these_images(
    reader: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither numpy's, from one row for each output and all the weights that stay."""
    without_ridge(monkeypatch)
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, N, 3), nn.ReLU(), copy.deepcopy(reader)).double().eval()
    x = images(6, 3, 7, 7)
    groups = find_groups(model, x[:2])
    plan = sk.make_plan(groups, dropping(groups, "0", 1, 4, 5))
    repaired = sk.repair_weights(model, plan, statistics(model, groups, x))
    with torch.no_grad():
        read, wanted = model[:2](x), model(x)
        found = float((repaired(x) - wanted).square().sum())
        blind = sk.apply_plan(model, plan)
        assert found < float((blind(x) - wanted).square().sum())
    if isinstance(reader, nn.ConvTranspose2d):
        return  # its places of the kernel are predicted one by one
    read[:, [1, 4, 5]] = 0
    patches = (
        nn.functional.unfold(read, reader.kernel_size, padding=reader.padding).transpose(1, 2).flatten(0, 1)
    )
    design = torch.cat([patches, torch.ones(len(patches), 1)], 1)
    target = wanted.flatten(2).transpose(1, 2).flatten(0, 1)
    best = torch.linalg.lstsq(design, target, driver="gelsd").solution
    assert found == pytest.approx(float((design @ best - target).square().sum()), rel=1e-5)


@pytest.mark.parametrize("reader", [nn.ConvTranspose2d(N, 4, 3, stride=2), nn.Conv2d(N, 4, 3, padding=1)])
def test_what_hardly_varies_is_not_lost_where_no_bias_can_take_it_over(
    reader: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over maps so small that most of the kernel lies outside; other channels can take it over."""
    monkeypatch.setitem(rows.readers.__kwdefaults__, "most_columns", 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, N, 1), copy.deepcopy(reader)).double().eval()
    with torch.no_grad():
        model[0].weight.mul_(0.05)
        model[0].bias.fill_(1.0)
    x = images(60, 3, 2, 2)
    groups = find_groups(model, x[:2])
    plan = sk.make_plan(groups, dropping(groups, "0", 0, 1, 2))
    pruned = sk.apply_plan(sk.repair_weights(model, plan, statistics(model, groups, x)), plan)
    assert squared_change(model, pruned, x) < 0.02 * squared_change(model, sk.apply_plan(model, plan), x)


def test_the_order_of_the_groups_does_not_matter() -> None:
    model, inputs = build("Concatenation")
    groups = find_groups(model, inputs)
    x = images(40, *inputs[0].shape[1:])
    turned = replace(groups, groups=tuple(reversed(groups.groups)))
    masks = random_masks(groups, 0.5)
    states = []
    for order in (groups, turned):
        plan = sk.make_plan(order, dict(reversed(list(masks.items()))) if order is turned else masks)
        states.append(sk.repair_weights(model, plan, statistics(model, order, x)).state_dict())
    for name, values in states[0].items():
        assert torch.allclose(values, states[1][name], atol=1e-10), name


@pytest.mark.parametrize("name", ["SqueezeExcite", "GroupedConv", "FlattenBeforeLinear", "Transposed", "UsedTwice",
    "TwoInTwoOut", "LayerNormMlp", "Depthwise", "SwiGlu", "OneDimensional", "ThreeDimensional", "Windows",
    "DictionaryOfOutputs", "Siamese", "TokenMixing", "HierarchicalSplit"])  # fmt: skip
def test_repair_brings_models_by_hand_nearer_and_the_cut_is_proved(name: str) -> None:
    model, example = build(name)
    groups = find_groups(model, example)
    inputs = tuple(images(48, *x.shape[1:], seed=i) for i, x in enumerate(example))
    known = statistics(model, groups, inputs)
    plan = sk.make_plan(groups, random_masks(groups, 0.6, seed=3))
    repaired = sk.repair_weights(model, plan, known)
    pruned = sk.apply_plan(repaired, plan)
    assert sk.verify_cut(repaired, pruned, plan).max_rel < 1e-8
    before, after = (squared_change(model, one, inputs) for one in (sk.apply_plan(model, plan), pruned))
    assert after < before


# Half of all channels go; three quarters stay of a network without norms, which errors grow in.
TIMM: list[tuple[str, float, dict[str, Any]]] = [
    ("test_resnet", 0.5, {}),
    ("mobilenetv3_small_050", 0.5, {}),
    ("test_efficientnet", 0.5, {}),
    ("convnext_atto", 0.5, {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)}),
    ("deit_tiny_patch16_224", 0.5, {"depth": 2, "img_size": 32, "embed_dim": 48}),
    ("densenet121", 0.5, {"block_config": (2, 2), "growth_rate": 8}),
    ("test_nfnet", 0.75, {}),
]


@pytest.mark.parametrize(("name", "share", "options"), TIMM, ids=[name for name, _, _ in TIMM])
def test_repair_brings_networks_of_timm_nearer_and_the_cut_is_proved(
    name: str, share: float, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("gamma"):  # a layer scale of 1e-6 hides its whole branch
                parameter.fill_(1.0)
    x = images(48, 3, 32, 32).float()
    model.train()
    with torch.no_grad():
        for _ in range(4):
            model(x)  # norms that fit the images
    model.eval()
    groups = find_groups(model, x[:2])
    plan = sk.make_plan(groups, random_masks(groups, share, seed=3))
    known = sk.input_statistics(model, groups, x.split(16))
    assert not known.left_out
    repaired = sk.repair_weights(model, plan, known)
    pruned = sk.apply_plan(repaired, plan)
    assert sk.verify_cut(repaired, pruned, plan).max_rel < 1e-4
    before, after = (squared_change(model, one, x) for one in (sk.apply_plan(model, plan), pruned))
    assert after < before


def test_the_model_that_is_repaired_stays_as_it_is() -> None:
    model, inputs = build("SqueezeExcite")
    before = copy.deepcopy(model.state_dict())
    groups = find_groups(model, inputs)
    plan = sk.make_plan(groups, random_masks(groups, 0.5))
    known = statistics(model, groups, images(30, *inputs[0].shape[1:]))
    repaired = sk.repair_weights(model, plan, known)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(values, before[key]) for key, values in model.state_dict().items())
    assert [p.shape for p in repaired.parameters()][:1] == [p.shape for p in model.parameters()][:1]
