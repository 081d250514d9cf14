"""Depth without layer scales: blocks with an identity shortcut go once the last layers of their branches are zero."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from plain import find_groups, sparsifier
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekit as sk
from sparsekit.errors import InputError
from sparsekit.structure.groups import ChannelGroups
from sparsekit.structure.plan import PrunePlan
from sparsekit.surgery.bypass import bypassed

SMALL_DEIT: dict[str, Any] = {"num_classes": 4, "img_size": 32, "depth": 2, "embed_dim": 48}


def _resnet18() -> nn.Module:
    return timm.create_model("resnet18", num_classes=4, channels=(64, 24, 32, 40))


def _mobilenet_v2() -> nn.Module:
    return torchvision.models.mobilenet_v2(num_classes=4, width_mult=0.5)


def _mobilenetv3() -> nn.Module:
    return timm.create_model("mobilenetv3_small_050", num_classes=4)


def _deit() -> nn.Module:
    return timm.create_model("deit_tiny_patch16_224", **SMALL_DEIT)


def _convnext() -> nn.Module:
    """As convnext_atto, narrower, without layer scales."""
    return ConvNeXt(
        num_classes=4, depths=(1, 1, 2, 1), dims=(8, 8, 16, 16), conv_mlp=True, ls_init_value=None
    )


# How each model is made; its blocks without a downsampling layer; the last layers of their branches.
MODELS: dict[str, tuple[Any, list[str], list[str]]] = {
    "resnet18": (_resnet18, ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"], ["bn2"]),
    "mobilenet_v2": (
        _mobilenet_v2,
        [f"features.{i}" for i in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)],
        ["conv.3"],
    ),
    "mobilenetv3": (_mobilenetv3, [f"blocks.{i}" for i in (1.1, 2.1, 2.2, 3.0, 3.1, 4.1, 4.2)], ["bn3"]),
    "deit": (_deit, ["blocks.0", "blocks.1"], ["attn.proj", "mlp.fc2"]),
    "convnext": (
        _convnext,
        [f"stages.{i}.blocks.{j}" for i, j in ["00", "10", "20", "21", "30"]],
        ["mlp.fc2"],
    ),
}


def _made(make: Any) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def _images(batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _silenced(groups: ChannelGroups) -> dict[str, list[str]]:
    """By block the layers and vectors that have to be zero, without the block's own name."""
    return {
        group.name: list(
            dict.fromkeys(
                m.tensor.removeprefix(f"{group.name}.").removesuffix(".weight").removesuffix(".bias")
                for m in group.silenced
            )
        )
        for group in groups
        if group.bypass
    }


def _dropped(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(1, dtype=torch.bool) for name in names}


@pytest.mark.parametrize("name", MODELS)
def test_every_block_with_an_identity_shortcut_is_found_and_can_go(name: str) -> None:
    make, blocks, last = MODELS[name]
    model = _made(make)
    groups = find_groups(model, _images(), blocks="all")
    assert _silenced(groups) == dict.fromkeys(blocks, last)
    assert not any(group.frozen for group in groups if group.bypass)
    for names in (blocks[:1], blocks[-1:], blocks):
        plan = sk.make_plan(groups, _dropped(*names))
        pruned = sk.apply_plan(model, plan)
        assert bypassed(pruned) == names
        assert sk.verify_cut(model, pruned, plan).max_rel < 1e-5


@pytest.mark.parametrize("name", ["resnet18", "deit"])
def test_a_block_of_zero_layers_is_left_out_and_all_logits_stay(name: str) -> None:
    make, blocks, last = MODELS[name]
    model, images = _made(make), _images(2)
    groups = find_groups(model, images, blocks="all")
    layers = [model.get_submodule(f"{blocks[1]}.{layer}") for layer in last]
    with torch.no_grad():
        for block in blocks:  # timm starts the last scales of a ResNet at 0, but not their shifts
            for layer in last:
                for parameter in model.get_submodule(f"{block}.{layer}").parameters():
                    parameter.uniform_(0.01, 0.02)
        for layer in layers:
            layer.weight.zero_()
    assert all(bool(sk.keep_masks(model, groups, method="zeros")[block].all()) for block in blocks)
    with torch.no_grad():
        for layer in layers:
            layer.bias.zero_()
        expected = model(images)
    masks = sk.keep_masks(model, groups, method="zeros")
    assert [block for block in blocks if not bool(masks[block].all())] == [blocks[1]]
    with torch.no_grad():
        pruned = sk.apply_plan(model, sk.make_plan(groups, masks))
        torch.testing.assert_close(pruned(images), expected, rtol=1e-5, atol=1e-5)


class Branch(nn.Module):
    """x + f(x), its last layer with a bias, unless a last norm is given."""

    def __init__(self, norm: nn.Module | None = None, *, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=bias)
        self.norm = norm or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.down(F.relu(self.up(x))))


class Gate(nn.Module):
    """x * factor * sigmoid(f(x)): the identity at f = 0 if the factor is 2."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.read, self.write, self.factor = nn.Linear(8, 2), nn.Linear(2, 8), factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor * torch.sigmoid(self.write(F.relu(self.read(x))))


class Terse(Branch):
    """Its `train` returns nothing, as that of some timm modules."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)


class Mixed(nn.Module):
    """Two branches: one with a layer scale, one without."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.gamma = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.one(x) + self.other(x)


class Scaled(nn.Module):
    """One branch, with a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gamma = Branch(), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.inner(x)


class ByHand(nn.Module):
    """Blocks in a row, one of them used twice, and one whose last layer the head reads, too."""

    def __init__(self, **blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(6, 8), nn.ModuleDict(blocks), nn.Linear(8, 4)
        self.twice, self.leaking = Branch(), Branch()

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.stem(x)))
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.leaking(x) + self.leaking.down.bias)


def test_a_trial_decides_what_is_a_block_not_a_name() -> None:
    model = ByHand(
        plain=Branch(),
        without_bias=Branch(bias=False),
        normed=Branch(nn.LayerNorm(8)),
        batch_normed=Branch(nn.BatchNorm1d(8)),
        with_statistics_only=Branch(nn.BatchNorm1d(8, affine=False)),
        dropping=Branch(nn.Dropout(0.5)),
        terse=Terse(),
        gate=Gate(2.0),
        halving=Gate(1.0),
        stage=nn.Sequential(Branch(), Branch()),
        mixed=Mixed(),
        scaled=Scaled(),
    ).eval()
    groups = find_groups(model, torch.randn(2, 6), blocks="all")
    assert _silenced(groups) == {
        "blocks.plain": ["down"],
        "blocks.without_bias": ["down"],
        "blocks.normed": ["norm"],
        "blocks.batch_normed": ["norm"],
        "blocks.dropping": ["down"],
        "blocks.terse": ["down"],
        "blocks.gate": ["write"],
        "blocks.stage.0": ["down"],
        "blocks.stage.1": ["down"],
        "blocks.mixed": ["gamma", "other"],
        "blocks.scaled": ["gamma"],
        "leaking": ["down"],
    }
    frozen = {group.name: group.frozen for group in groups if group.bypass and group.frozen}
    assert list(frozen) == ["leaking"]
    assert "a trial cut failed" in frozen["leaking"]
    # A penalty on some of what has to be zero would take a living block for a dead one.
    penalised = [group.name for group in groups if group.bypass and group.penalised]
    assert penalised == ["blocks.scaled"]
    for block in (group.name for group in groups.free if group.bypass):
        plan = sk.make_plan(groups, _dropped(block))
        assert sk.verify_cut(model, sk.apply_plan(model, plan), plan).max_rel < 1e-5


def test_layers_that_others_hold_are_not_silenced() -> None:
    model = ByHand(first=Branch(), second=Branch(), third=Branch(), fourth=Branch())
    model.blocks["first"].down.weight = model.blocks["second"].down.weight
    model.reader = model.blocks["third"].down
    model.alias = model.blocks["fourth"]
    found = _silenced(find_groups(model, torch.randn(2, 6), blocks="all"))
    assert found == {"blocks.fourth": ["down"], "leaking": ["down"]}


def test_a_layer_without_bias_does_where_the_last_one_is_held_elsewhere() -> None:
    model = ByHand(first=Branch(bias=False), second=Branch())
    model.blocks["first"].down.weight = model.blocks["second"].down.weight
    found = _silenced(find_groups(model, torch.randn(2, 6), blocks="all"))
    assert found == {"blocks.first": ["up"], "leaking": ["down"]}


def test_all_blocks_are_those_with_layer_scales_and_more() -> None:
    model = ByHand(scaled=Scaled(), plain=Branch(), mixed=Mixed(), other=Scaled())
    without, scaled, everything = (
        find_groups(model, torch.randn(2, 6), blocks=blocks).groups for blocks in (False, True, "all")
    )
    assert [group.name for group in scaled[len(without) :]] == ["blocks.scaled", "blocks.other"]
    assert scaled[: len(without)] == everything[: len(without)] == without
    assert [group for group in everything if group.penalised] == [
        group for group in scaled if group.penalised
    ]
    model = timm.create_model("test_convnext", num_classes=4)
    assert find_groups(model, _images(), blocks="all") == find_groups(model, _images(), blocks=True)


def test_what_blocks_are_asked_for_is_checked() -> None:
    wrong: Any = "plain"
    with pytest.raises(InputError, match="blocks must be False, True or 'all', got 'plain'"):
        sk.find_groups(nn.Linear(2, 2), torch.randn(1, 2), blocks=wrong)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "auto", "target": {"macs": 0.9}},
        {"method": "budget", "target": {"macs": 0.9}},
        {"method": "threshold", "threshold": 0.5},
        {"method": "gap"},
    ],
)
def test_one_shot_methods_and_penalties_leave_such_blocks_alone(settings: dict[str, Any]) -> None:
    model, inputs = ByHand(first=Branch(), second=Branch()), torch.randn(2, 6)
    groups = find_groups(model, inputs, blocks="all")
    masks = sk.keep_masks(model, groups, **settings)
    assert masks["blocks.first"].all()
    assert masks["blocks.second"].all()


def test_a_penalty_shrinks_the_widths_and_no_such_block() -> None:
    torch.manual_seed(0)
    model, inputs = ByHand(first=Branch(), second=Branch()), torch.randn(8, 6)
    groups = find_groups(model, inputs, blocks="all")
    phase = sparsifier(model, groups, strength="auto", total_steps=20, target={"macs": 0.8})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), torch.arange(8) % 4).backward()
        optimizer.step()
        phase.step(optimizer)
    assert phase.shortfall() == ""
    masks = sk.keep_masks(model, groups, method="zeros")
    assert masks["blocks.first"].all()
    assert masks["blocks.second"].all()
    assert not all(bool(mask.all()) for mask in masks.values())


def test_a_budget_takes_the_blocks_that_you_rank_lowest() -> None:
    model, inputs = ByHand(first=Branch(), second=Branch(), third=Branch()), torch.randn(2, 6)
    groups = find_groups(model, inputs, blocks="all")
    ranked = {group.name: torch.full((group.n_channels,), torch.inf) for group in groups.free}
    ranked |= {"blocks.first": torch.tensor([2.0]), "blocks.second": torch.tensor([1.0])}
    masks = sk.choose_channels(groups, ranked, {"macs": 0.85})
    assert [name for name, mask in masks.items() if not bool(mask.all())] == ["blocks.second"]
    plan = sk.make_plan(groups, masks)
    assert PrunePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    pruned = sk.apply_plan(model, plan)
    assert sk.count_macs(pruned, inputs[:1]) <= 0.85 * sk.count_macs(model, inputs[:1])


def test_widths_first_and_then_a_block_is_the_same_as_both_at_once() -> None:
    """The first cut gives the block's last layer a bias, which the dense model does not have."""
    model, inputs = ByHand(block=Branch(bias=False)).eval(), torch.randn(2, 6)
    with torch.no_grad():
        model.blocks["block"].up.weight[6:] = 0
        model.blocks["block"].up.bias[6:] = 1
    groups = find_groups(model, inputs, blocks="all")
    masks = {"blocks.block.up": torch.arange(12) < 6, "twice.up": torch.arange(12) < 9}
    narrow = sk.make_plan(groups, masks)
    half = sk.apply_plan(model, narrow)
    assert half.blocks["block"].down.bias is not None
    deep = sk.make_plan(find_groups(half, inputs, blocks="all"), _dropped("blocks.block"))
    assert deep.blocks[0].scales == ("blocks.block.down.weight", "blocks.block.down.bias")
    both = sk.compose(narrow, deep)
    pruned = sk.apply_plan(model, both)
    sk.verify_cut(model, pruned, both)
    with torch.no_grad():
        torch.testing.assert_close(pruned(inputs), sk.apply_plan(half, deep)(inputs))
    at_once = sk.apply_plan(model, sk.make_plan(groups, masks | _dropped("blocks.block")))
    with torch.no_grad():
        torch.testing.assert_close(pruned(inputs), at_once(inputs))


def test_a_model_without_plain_blocks_is_saved_loaded_and_exported(tmp_path: Path) -> None:
    model, images = _made(_deit), _images()
    groups = find_groups(model, images, blocks="all")
    pruned = sk.apply_plan(model, sk.make_plan(groups, _dropped("blocks.1"))).eval()
    path = sk.save(pruned, tmp_path / "pruned", model_name="deit_tiny_patch16_224", model_args=SMALL_DEIT)
    loaded = sk.load(path)
    assert bypassed(loaded) == ["blocks.1"]
    with torch.no_grad():
        assert torch.equal(loaded(images), pruned(images))
    exported = sk.export_onnx(loaded, tmp_path / "pruned.onnx", images)
    assert sk.check_parity(pruned, exported, images).max_rel < 1e-4
