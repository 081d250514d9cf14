"""Layers that the example does not run, tensors that modules keep, and outputs inside objects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import sparsekit as sk
from sparsekit.evaluation import copied, flat_tensors
from sparsekit.structure.groups import ChannelGroups

IMAGES = torch.randn(2, 3, 16, 16)


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU())


def half(model: nn.Module, groups: ChannelGroups) -> nn.Module:
    """Without half of each group, proved."""
    masks = {g.name: torch.arange(g.n_channels) >= g.n_channels // 2 for g in groups.free}
    plan = sk.make_plan(groups, masks)
    cut = sk.apply_plan(model, plan)
    assert sk.verify_cut(model, cut, plan).max_rel < 1e-5
    return cut


class Heads(nn.Module):
    """Training runs an auxiliary head, a flag another one, and one is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = block(3, 16), block(16, 32)
        self.classes, self.maps, self.spare = nn.Linear(32, 5), nn.Conv2d(32, 4, 1), nn.Conv2d(32, 2, 1)
        self.auxiliary = nn.Sequential(
            nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
        )

    def forward(self, x: Tensor, segment: bool = False) -> Any:
        first = self.one(x)
        second = self.two(first)
        if segment:
            return self.maps(second)
        answer = self.classes(second.mean((2, 3)))
        return (answer, self.auxiliary(first)) if self.training else answer


def test_a_head_that_only_training_runs_is_cut_with_what_it_reads() -> None:
    model = Heads().eval()
    groups = sk.find_groups(model, IMAGES[:1])
    assert {member.tensor for member in groups["one.0"].of_role("consumer")} == {
        "two.0.weight",
        "auxiliary.0.weight",
    }
    assert groups.unread == ("maps.weight", "maps.bias", "spare.weight", "spare.bias")
    answer, auxiliary = half(model, groups).train()(IMAGES)
    assert answer.shape == auxiliary.shape == (2, 5)
    assert not model.training


def test_a_further_example_shows_a_head_behind_a_flag() -> None:
    model = Heads().eval()
    groups = sk.find_groups(model, IMAGES[:1], more_inputs=[{"x": IMAGES[:1], "segment": True}])
    assert groups.unread == ("spare.weight", "spare.bias")
    assert len(groups.inputs.ways) == 2
    plan = sk.make_plan(groups, {"two.0": torch.arange(32) >= 20})
    assert sk.PrunePlan.from_json(plan.to_json()) == plan
    assert half(model, groups)(IMAGES, segment=True).shape == (2, 4, 4, 4)


def test_a_wrong_head_behind_a_flag_is_found() -> None:
    model = Heads().eval()
    groups = sk.find_groups(model, IMAGES[:1], more_inputs=[{"x": IMAGES[:1], "segment": True}])
    plan = sk.make_plan(groups, {"two.0": torch.arange(32) >= 20})
    cut = sk.apply_plan(model, plan)
    with torch.no_grad():
        cut.maps.weight[0] += 1  # type: ignore[index, union-attr, operator]
    with pytest.raises(sk.VerificationError):
        sk.verify_cut(model, cut, plan)


class KeepsFeatures(nn.Module):
    """Keeps tensors of its last pass, which are part of a graph after a training step."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = block(3, 16), block(16, 16), nn.Linear(16, 5)
        self.pyramid: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.two(self.one(x))
        self.pyramid = [self.features, {"double": 2 * self.features}]
        return self.head(self.features.mean((2, 3)))


def test_a_model_that_keeps_tensors_is_cut_exported_and_saved_after_a_training_step(tmp_path: Path) -> None:
    model = KeepsFeatures()
    groups = sk.find_groups(model, IMAGES)
    model(IMAGES).square().sum().backward()
    assert model.features.grad_fn is not None
    cut = half(model, groups)
    assert sk.find_groups(model, IMAGES).free
    sk.export_onnx(cut, tmp_path / "cut.onnx", IMAGES)
    sk.save(cut, tmp_path / "cut", factory=KeepsFeatures)
    duplicate = copied(model)
    assert duplicate.features.grad_fn is None
    assert duplicate.pyramid[0] is duplicate.features


def test_masks_of_torch_have_to_be_made_permanent_first() -> None:
    model = KeepsFeatures()
    prune.l1_unstructured(model.one[0], "weight", 0.3)
    with pytest.raises(
        sk.ModelError, match=r"one\.0\.weight is masked by torch\.nn\.utils\.prune; make the mask perm"
    ):
        sk.find_groups(model, IMAGES)
    prune.remove(model.one[0], "weight")
    assert sk.find_groups(model, IMAGES).free


@dataclass
class Output:
    logits: Tensor
    features: Any = None


class InObjects(KeepsFeatures):
    """Returns its first features in a list, in an object, in a dictionary."""

    def forward(self, x: Tensor) -> dict[str, Output]:  # type: ignore[override]
        first = self.one(x)
        return {"out": Output(self.head(self.two(first).mean((2, 3))), [first])}


def test_channels_that_leave_in_an_object_stay() -> None:
    groups = sk.find_groups(InObjects(), IMAGES)
    assert groups["one.0"].frozen == "it reaches the model's output"
    assert [group.name for group in groups.free] == ["two.0"]


def test_tensors_are_found_in_objects_that_hold_themselves() -> None:
    class Slots:
        __slots__ = ("inside",)

    held = Slots()
    held.inside = [IMAGES, held]
    assert [t.shape for t in flat_tensors((held, {"a": IMAGES[0]}, nn.Linear(2, 2), "text"))] == [
        IMAGES.shape,
        IMAGES[0].shape,
    ]


def test_a_cut_keeps_the_channels_last_in_memory() -> None:
    model = KeepsFeatures().eval().to(memory_format=torch.channels_last)
    cut = half(model, sk.find_groups(model, IMAGES))
    filters = [p for p in cut.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in filters)
