"""Depth: residual blocks whose layer scales are zero go as a whole, and nothing else changes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from plain import find_groups
from plain import sparsifier as sparsifier_of
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekit as sk
from sparsekit.errors import FileError, InputError, ModelError
from sparsekit.selection.costs import kept_share
from sparsekit.sparsify.schedules import PhaseShares
from sparsekit.structure.compose import compose
from sparsekit.structure.counting import count_params
from sparsekit.structure.groups import ChannelGroups
from sparsekit.structure.plan import PrunePlan
from sparsekit.surgery.bypass import Passthrough, bypassed

# What each model is made with: its blocks have one vector, two or three; attention inside, other arguments than the
# input, vectors of their own that scale nothing.
MODELS: dict[str, dict[str, Any]] = {
    "test_convnext": {"num_classes": 4},
    "deit3_small_patch16_224": {
        "num_classes": 4,
        "depth": 2,
        "img_size": 32,
        "embed_dim": 48,
        "num_heads": 3,
    },
    "beit_base_patch16_224": {"num_classes": 4, "depth": 2, "img_size": 32, "embed_dim": 48, "num_heads": 3},
    "xcit_nano_12_p16_224": {"num_classes": 4, "depth": 2, "embed_dim": 32, "cls_attn_layers": 1},
    "cait_xxs24_224": {"num_classes": 4, "depth": 2, "img_size": 32, "embed_dim": 32, "num_heads": 2},
}


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **MODELS[name]).eval()
    with torch.no_grad():  # timm starts scales at 1e-6 or so: nothing would depend on the blocks
        for key, parameter in model.named_parameters():
            if "gamma" in key:
                parameter.uniform_(0.5, 1.0)
    return model


def _images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _blocks(groups: ChannelGroups) -> list[str]:
    return [group.name for group in groups.free if group.bypass]


def _dropped(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(1, dtype=torch.bool) for name in names}


@pytest.mark.parametrize("name", MODELS)
def test_a_block_of_zero_scales_is_left_out_and_all_logits_stay(name: str) -> None:
    model, images = _model(name), _images()
    groups = find_groups(model, images, blocks=True)
    names = _blocks(groups)
    assert len(names) >= 2
    assert all(isinstance(model.get_submodule(block), nn.Module) for block in names)
    before = count_params(model)
    first = groups[names[0]]
    with torch.no_grad():
        for member in first.penalised:
            model.get_parameter(member.tensor).zero_()
        expected = model(images)
    masks = sk.keep_masks(model, groups, method="zeros")
    assert [block for block in names if not bool(masks[block].all())] == names[:1]
    plan = sk.make_plan(groups, masks)
    pruned = sk.apply_plan(model, plan)
    sk.verify_cut(model, pruned, plan)
    with torch.no_grad():
        torch.testing.assert_close(pruned(images), expected, rtol=1e-5, atol=1e-5)
    assert bypassed(pruned) == names[:1]
    inside = sum(p.numel() for n, p in model.named_parameters() if n.startswith(f"{names[0]}."))
    assert count_params(pruned) == before - inside
    share = kept_share(groups, masks)
    assert share.params == pytest.approx(count_params(pruned) / before)
    assert share.macs < 1


def test_only_vectors_that_scale_a_block_are_penalised() -> None:
    """BEiT's attention has vectors of its own (biases of queries and values), which are no scales."""
    groups = find_groups(_model("beit_base_patch16_224"), _images(), blocks=True)
    first, second = (groups[name] for name in _blocks(groups))
    assert [member.tensor for member in first.penalised] == ["blocks.0.gamma_1", "blocks.0.gamma_2"]
    assert {m.tensor for m in first.members}.isdisjoint(m.tensor for m in second.members)


@pytest.mark.parametrize("name", ["test_vit", "resnet18", "mobilenetv3_small_050"])
def test_models_without_layer_scales_have_no_such_blocks(name: str) -> None:
    model = timm.create_model(name, num_classes=4).eval()
    images = torch.randn(1, *model.pretrained_cfg["input_size"])
    assert not _blocks(find_groups(model, images, blocks=True))


def test_blocks_are_groups_only_where_they_are_asked_for() -> None:
    model = _model("test_convnext")
    asked, plain = (find_groups(model, _images(), blocks=blocks) for blocks in (True, False))
    assert asked.groups[: len(plain.groups)] == plain.groups
    assert not any(group.bypass for group in plain)


class Twice(nn.Module):
    """A block that is used twice, and one whose scale also reaches the output another way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.shared, self.leaking, self.once = Branch(), Branch(), Branch()

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.shared(self.stem(x)))
        x = self.leaking(x) * self.leaking.gamma.exp()
        return self.head(self.once(x))


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.gamma = nn.Linear(8, 12), nn.Linear(12, 8), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.down(F.relu(self.up(x)))


def test_a_block_that_cannot_go_is_frozen_or_no_group() -> None:
    groups = find_groups(Twice(), torch.randn(2, 6), blocks=True)
    blocks = {group.name: group.frozen for group in groups if group.bypass}
    assert set(blocks) == {"leaking", "once"}
    assert blocks["once"] == ""
    assert "a trial cut failed" in blocks["leaking"]
    ignored = find_groups(Twice(), torch.randn(2, 6), blocks=True, ignore=["once.*"])
    assert ignored["once"].frozen == "once.up is on the ignore list"
    with pytest.raises(InputError, match=r"leaking removes channels, but the group is frozen"):
        sk.make_plan(groups, _dropped("leaking"))


def test_widths_inside_and_outside_of_a_block_that_goes_are_cut_with_it() -> None:
    model, inputs = Twice().eval(), torch.randn(2, 6)
    groups = find_groups(model, inputs, blocks=True)
    masks = {g.name: torch.arange(g.n_channels) % 2 == 0 for g in groups.free if not g.bypass}
    assert "once.up" in masks
    plan = sk.make_plan(groups, masks | _dropped("once"))
    assert not [cut.tensor for cut in plan.cuts if cut.tensor.startswith("once.")]
    pruned = sk.apply_plan(model, plan)
    assert sk.verify_cut(model, pruned, plan).max_rel < 1e-5
    # First the widths and then the block is the same as both at once.
    narrow = sk.make_plan(groups, masks)
    half = sk.apply_plan(model, narrow)
    deep = sk.make_plan(find_groups(half, inputs, blocks=True), _dropped("once"))
    both = compose(narrow, deep)
    assert both.cuts == plan.cuts
    assert both.blocks == plan.blocks
    with torch.no_grad():
        torch.testing.assert_close(sk.apply_plan(model, both)(inputs), sk.apply_plan(half, deep)(inputs))


def test_a_plan_with_blocks_survives_json_and_refuses_what_no_plan_says() -> None:
    model, inputs = Twice(), torch.randn(2, 6)
    groups = find_groups(model, inputs, blocks=True)
    plan = sk.make_plan(groups, _dropped("once"))
    data = json.loads(json.dumps(plan.to_json()))
    assert PrunePlan.from_json(data) == plan
    wrong = data | {"blocks": [{"module": 3, "scales": []}]}
    with pytest.raises(FileError, match="expected str where 3 stands"):
        PrunePlan.from_json(wrong)
    other = sk.make_plan(groups, {"once.up": torch.arange(12) < 6}).to_json()
    with pytest.raises(FileError, match=r"it cuts once\.down\.weight, and takes out once"):
        PrunePlan.from_json(other | {"blocks": data["blocks"]})
    with pytest.raises(ModelError, match=r"there is no once\.gamma, which silences a block that goes"):
        sk.apply_plan(nn.Sequential(nn.Linear(6, 4)), plan)


def test_an_artifact_without_blocks_loads_in_the_same_shape(tmp_path: Path) -> None:
    model, images = _model("deit3_small_patch16_224"), _images()
    groups = find_groups(model, images, blocks=True)
    pruned = sk.apply_plan(model, sk.make_plan(groups, _dropped("blocks.1"))).eval()
    arguments = MODELS["deit3_small_patch16_224"]
    path = sk.save(pruned, tmp_path / "pruned", model_name="deit3_small_patch16_224", model_args=arguments)
    loaded = sk.load(path)
    assert isinstance(loaded.get_submodule("blocks.1"), Passthrough)
    with torch.no_grad():
        assert torch.equal(loaded(images), pruned(images))
    structure = json.loads((path / "structure.json").read_text())
    assert structure["bypassed"] == ["blocks.1"]
    (path / "structure.json").write_text(json.dumps(structure | {"bypassed": ["blocks.7"]}))
    with pytest.raises(FileError, match=r"no module 'blocks\.7' that could be bypassed"):
        sk.load(path)


@pytest.mark.parametrize("penalty", ["group_lasso", "l1", "scale_l1"])
def test_a_penalty_takes_whole_blocks_to_zero_and_the_cut_is_lossless(penalty: Any) -> None:
    """A target that widths alone cannot reach: what every layer keeps is more."""
    torch.manual_seed(0)
    model = _model("deit3_small_patch16_224").train()
    groups = find_groups(model, _images(1), blocks=True)
    least = 64
    settings: dict[str, Any] = {"min_channels": least, "importance": "magnitude"}
    widths = replace(groups, groups=tuple(g for g in groups if not g.bypass))
    auto: dict[str, Any] = {
        "penalty": penalty,
        "strength": "auto",
        "total_steps": 60,
        "target": {"macs": 0.55},
    }
    with pytest.raises(InputError, match="no channel group" if penalty == "scale_l1" else "out of reach"):
        sparsifier_of(model, widths, **auto, **settings)
    sparsifier = sparsifier_of(model, groups, **auto, **settings, shares=PhaseShares(0.0, 0.0, 0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    labels = torch.arange(8) % 4
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(_images(8)), labels).backward()
        optimizer.step()
        sparsifier.step(optimizer)
    assert sparsifier.shortfall() == ""
    model.eval()
    masks = sk.keep_masks(model, groups.with_rounding(1, least), method="zeros")
    assert any(not bool(masks[name].any()) for name in _blocks(groups))
    assert kept_share(groups, masks).macs <= 0.55
    pruned = sk.apply_plan(copy.deepcopy(model), sk.make_plan(groups, masks))
    with torch.no_grad():
        torch.testing.assert_close(pruned(_images()), model(_images()), rtol=1e-4, atol=1e-5)


def test_by_magnitude_blocks_are_compared_with_each_other_and_equal_ones_do_not_go_together() -> None:
    model = _model("test_convnext")
    groups = find_groups(model, _images(), blocks=True)
    blocks = _blocks(groups)
    settings: dict[str, Any] = {"strength": "auto", "total_steps": 10, "importance": "magnitude"}

    def gone(least: int) -> list[str]:
        sparsifier = sparsifier_of(model, groups, target={"macs": 0.9}, min_channels=least, **settings)
        return [name for name in blocks if not bool(sparsifier.expected_masks()[name].all())]

    with torch.no_grad():
        for name in blocks:
            model.get_parameter(groups[name].penalised[0].tensor).fill_(0.5)
    assert gone(10_000) == blocks[-len(gone(10_000)) :]
    assert len(gone(10_000)) < len(blocks)
    with torch.no_grad():
        model.get_parameter(groups[blocks[1]].penalised[0].tensor).fill_(0.01)
    assert blocks[1] in gone(10_000)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "budget", "target": {"macs": 0.3}},
        {"method": "budget", "target": {"macs": 0.1}},
        {"method": "auto", "target": {"macs": 0.1}},
        {"method": "threshold", "threshold": 0.9},
        {"method": "threshold", "threshold": 1.5, "relative": False},
        {"method": "gap"},
    ],
)
def test_one_shot_methods_take_dead_blocks_and_leave_live_ones(settings: dict[str, Any]) -> None:
    model = _model("test_convnext")
    groups = find_groups(model, _images(), blocks=True)
    first = _blocks(groups)[0]
    with torch.no_grad():
        model.get_parameter(groups[first].penalised[0].tensor).zero_()
    if settings.get("target") == {"macs": 0.1}:
        with pytest.raises(InputError, match="out of reach"):
            sk.keep_masks(model, groups, **settings)
        return
    masks = sk.keep_masks(model, groups, **settings)
    assert [name for name in _blocks(groups) if not bool(masks[name].all())] == [first]


class Silent(nn.Module):
    """Two branches, of which one is silent now: by a scale of zeros, of another shape, or by a layer of zeros."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.one, self.other = Branch(), nn.Linear(8, 8, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1, 8) if how == "scale" else torch.ones(1, 8))
        if how == "layer":
            nn.init.zeros_(self.other.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.gamma * self.other(x)


@pytest.mark.parametrize("how", ["scale", "layer"])
def test_a_branch_that_is_silent_only_now_counts(how: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), Silent(how), nn.Linear(8, 4))
    groups = find_groups(model, torch.randn(2, 6), blocks=True)
    assert {g.name: [m.tensor for m in g.penalised] for g in groups if g.bypass} == {"1.one": ["1.one.gamma"]}
    whole = nn.Sequential(nn.Linear(6, 8), Both(how), nn.Linear(8, 4))
    groups = find_groups(whole, torch.randn(2, 6), blocks=True)
    assert [sorted(m.tensor for m in g.penalised) for g in groups if g.bypass] == [["1.gamma", "1.scale"]]


class Both(nn.Module):
    """As `Silent`, with both branches in one module."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.gamma, self.scale = nn.Parameter(torch.zeros(1, 8)), nn.Parameter(torch.ones(8, 1))
        if how == "layer":
            nn.init.ones_(self.gamma)
            nn.init.zeros_(self.other.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale.squeeze(1) * F.relu(self.one(x)) + self.gamma * self.other(x)


def test_blocks_whose_scales_all_start_at_zero_can_be_planned() -> None:
    model = _model("test_convnext")
    groups = find_groups(model, _images(), blocks=True)
    with torch.no_grad():
        for name in _blocks(groups):
            model.get_parameter(groups[name].penalised[0].tensor).zero_()
    sparsifier = sparsifier_of(
        model, groups, strength="auto", total_steps=10, importance="magnitude", target={"macs": 0.5}
    )
    assert kept_share(groups, sparsifier.expected_masks()).macs <= 0.5


class TwoNames(nn.Module):
    """Blocks under two names each, and a weight that lies in two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.first = nn.Linear(6, 8), nn.Linear(8, 4), Branch()
        self.stages = nn.ModuleList([self.first, Branch()])
        self.stages[1].up.weight = self.first.up.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


def test_what_is_shared_with_the_rest_of_the_model_does_not_go() -> None:
    model, inputs = TwoNames(), torch.randn(2, 6)
    groups = find_groups(model, inputs, blocks=True)
    masks = _dropped("first")
    pruned = sk.apply_plan(model, sk.make_plan(groups, masks))
    assert isinstance(pruned.stages[0], Passthrough)
    assert pruned.stages[0] is pruned.first
    assert kept_share(groups, masks).params == pytest.approx(count_params(pruned) / count_params(model))


def test_channels_in_a_block_that_goes_count_as_gone() -> None:
    groups = find_groups(_model("test_convnext"), _images(), blocks=True)
    inside = sum(
        group.n_channels
        for group in groups.free
        if group.name.startswith(tuple(f"{b}." for b in _blocks(groups)))
    )
    assert inside
    total = sum(group.n_channels for group in groups.free)
    left = kept_share(groups, _dropped(*_blocks(groups))).channels
    assert left == pytest.approx(1 - (inside + len(_blocks(groups))) / total)
