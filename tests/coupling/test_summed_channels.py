"""Channels that sums and L2 norms add up: they may go once they are zero, and a constant is no zero."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models_by_hand import ways_to_cut
from plain import find_groups, sparsifier
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekit as sk
from sparsekit.selection.importance import zero_channels
from sparsekit.structure.compose import compose
from sparsekit.surgery.verify import compare_outputs

EXACT = 1e-12
IMAGES = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """A function between a layer that makes 8 maps and those that read what it returns; `other` makes 8 more."""

    def __init__(self, run: Callable[[Any, Tensor, Tensor], Tensor], read: int = 8) -> None:
        super().__init__()
        self.run = run
        self.made = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.other, self.scale = nn.Conv2d(3, 8, 1), nn.Parameter(torch.rand(8) + 0.5)
        self.reader, self.head = nn.Conv2d(read, 6, 3, padding=1), nn.Linear(6, 4, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.run(self, self.made(images), self.other(images))
        return self.head(self.reader(maps).relu().mean((2, 3)))


def _ssd(self: Any, x: Tensor, _: Tensor) -> Tensor:
    length = x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10
    return self.scale[None, :, None, None] * (x / length)


def _classified_by_cosine(self: Any, x: Tensor, _: Tensor) -> Tensor:
    return F.normalize(x.mean((2, 3)))[..., None, None]


def _as_tokens(self: Any, x: Tensor, _: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    return (tokens / torch.linalg.norm(tokens, dim=-1, keepdim=True)).transpose(1, 2).unflatten(2, (6, 6))


FREE: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], int]] = {
    "SSD's L2 norm": (_ssd, 8),
    "F.normalize": (lambda self, x, other: F.normalize(x, dim=1), 8),
    "in L1": (lambda self, x, other: F.normalize(x, p=1.0, dim=1), 8),
    "with the third power": (lambda self, x, other: x / torch.norm(x, 3, 1, keepdim=True), 8),
    "features of a cosine classifier": (_classified_by_cosine, 8),
    "tokens": (_as_tokens, 8),
    "cosine similarity": (lambda self, x, other: F.cosine_similarity(x, other)[:, None], 1),
    "dot product": (lambda self, x, other: (x * other).sum(1, keepdim=True), 1),
    "squares": (lambda self, x, other: x.square().sum(1, keepdim=True), 1),
    "a learned sum": (lambda self, x, other: (x * self.scale[:, None, None]).sum(1, keepdim=True), 1),
    "length": (lambda self, x, other: x / (1 + torch.linalg.vector_norm(x, dim=1, keepdim=True)), 8),
    "over everything": (lambda self, x, other: x / (1 + x.abs().sum()), 8),
    "a gate that is a sum": (lambda self, x, other: x * x.sum(1, keepdim=True).sigmoid(), 8),
}


def built(run: Callable[[Any, Tensor, Tensor], Tensor], read: int = 8) -> tuple[Between, sk.ChannelGroups]:
    torch.manual_seed(0)
    model = Between(run, read).double().eval()
    norm = model.made[1]
    for vector in (norm.weight, norm.running_var):
        nn.init.uniform_(vector, 0.5, 1.5)
    nn.init.uniform_(norm.bias, -0.3, 0.3)
    return model, find_groups(model, IMAGES)


def group_of(groups: sk.ChannelGroups, module: str = "made.0") -> sk.ChannelGroup:
    return next(g for g in groups if any(m.module == module for m in g.of_role("producer")))


def silence_(model: nn.Module, group: sk.ChannelGroup, channels: list[int]) -> None:
    """Set the penalised weights of some channels to zero, as a penalty does."""
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for m in group.penalised:
            gone = [m.positions[c * m.repeat + i] for c in channels for i in range(m.repeat)]
            tensors[m.tensor].index_fill_(m.dim, torch.tensor(gone), 0)


@pytest.mark.parametrize("name", FREE)
def test_summed_channels_can_be_cut_in_every_way_and_zeros_go_without_a_loss(name: str) -> None:
    model, groups = built(*FREE[name])
    group = group_of(groups)
    assert group in groups.free
    assert (group.n_channels, group.least, group.summed) == (8, 1, True)
    assert {"made.1.weight", "made.1.bias"} <= {m.tensor for m in group.penalised}
    for masks in ways_to_cut(groups):
        plan = sk.make_plan(groups, masks)
        assert sk.PrunePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
        assert sk.verify_cut(model, sk.apply_plan(model, plan), plan).max_rel < EXACT
    plan = sk.make_plan(groups, {group.name: torch.arange(8) % 3 != 1})
    pruned = sk.apply_plan(model, plan)
    assert compare_outputs(model, pruned, plan.inputs).max_rel > 1e-6  # these channels were not zero
    silence_(model, group, [1, 4, 7])
    assert compare_outputs(model, sk.apply_plan(model, plan), plan.inputs).max_rel < EXACT


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda self, x, other: x - x.mean(1, keepdim=True), "mean mixes channels"),
        (lambda self, x, other: x - x.amax(1, keepdim=True), "amax mixes channels"),
        (lambda self, x, other: x / (1 + x.var(1, keepdim=True)), "var mixes channels"),
        (lambda self, x, other: F.normalize(x, p=torch.inf, dim=1), "linalg_vector_norm mixes channels"),
        # The columns that read a dead channel are not zero.
        (
            lambda self, x, other: F.conv2d(x, F.normalize(self.reader.weight[:, :, :1, :1])).repeat(
                1, 2, 1, 1
            )[:, :8],
            "linalg_vector_norm mixes channels",
        ),
        # What is added up is not zero for a channel that is.
        (lambda self, x, other: x / x.sigmoid().sum(1, keepdim=True), "a trial cut failed"),
        (lambda self, x, other: x / (x >= 0).sum(1, keepdim=True), "a trial cut failed"),
        (
            lambda self, x, other: x * (x.sigmoid() * self.scale[:, None, None]).sum(1, keepdim=True),
            "a trial cut failed",
        ),
        # It is the number of channels that are left.
        (lambda self, x, other: x - x.sum(1, keepdim=True) / x.shape[1], "a trial cut failed"),
    ],
)
def test_what_zeros_do_change_keeps_its_channels(run: Any, reason: str) -> None:
    assert reason in group_of(built(run)[1]).frozen


def test_what_is_added_to_summed_channels_has_to_be_zero_too() -> None:
    def run(self: Any, x: Tensor, other: Tensor) -> Tensor:
        return F.normalize(x + self.position, dim=1)

    for learned in (True, False):
        torch.manual_seed(0)
        model = Between(run).double().eval()
        position = torch.randn(1, 8, 6, 6, dtype=torch.float64)
        if learned:
            model.position = nn.Parameter(torch.zeros_like(position))
        else:
            model.register_buffer("position", position)
        group = group_of(find_groups(model, IMAGES))
        assert ("a trial cut failed" in group.frozen) == (not learned)
        assert ("position" in {m.tensor for m in group.penalised}) == learned


def test_a_constant_that_a_sum_reads_is_not_dead() -> None:
    model, groups = built(*FREE["F.normalize"])
    group = group_of(groups)
    norm = model.made[1]
    with torch.no_grad():
        norm.weight[[2, 3, 5]] = 0
        norm.bias[[2, 3]] = 0
    assert zero_channels(model, groups)[group.name].nonzero().flatten().tolist() == [2, 3]
    masks = sk.keep_masks(model, groups)
    assert (~masks[group.name]).nonzero().flatten().tolist() == [2, 3]
    plan = sk.make_plan(groups, masks)
    assert compare_outputs(model, sk.apply_plan(model, plan), plan.inputs).max_rel < EXACT


def test_only_what_is_added_up_is_silenced_and_composed_plans_silence_what_both_do() -> None:
    model, groups = built(*FREE["dot product"])
    first = sk.make_plan(groups, {g.name: torch.arange(g.n_channels) % 3 != 1 for g in groups.free})
    assert {(cut.tensor, cut.silenced) for cut in first.cuts if cut.silenced} == {
        (name, (1, 4, 7)) for name in ("made.1.weight", "made.1.bias", "other.weight", "other.bias")
    }
    once = sk.apply_plan(model, first)
    again = find_groups(once, IMAGES)
    second = sk.make_plan(again, {g.name: torch.arange(g.n_channels) > 1 for g in again.free})
    both = compose(first, second)
    assert sk.verify_cut(model, sk.apply_plan(model, both), both).max_rel < EXACT
    assert (
        compare_outputs(sk.apply_plan(once, second), sk.apply_plan(model, both), both.inputs).max_rel < EXACT
    )
    damaged = first.to_json()
    damaged["cuts"][0]["silenced"] = damaged["cuts"][0]["keep"]
    with pytest.raises(sk.FileError, match="silences what it does not drop"):
        sk.PrunePlan.from_json(damaged)


@pytest.mark.parametrize("name", ["SSD's L2 norm", "features of a cosine classifier", "dot product"])
def test_trained_with_a_penalty_the_cut_loses_nothing(name: str) -> None:
    model, groups = built(*FREE[name])
    group = group_of(groups)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 3, 6, 6, dtype=torch.float64, generator=generator)
    labels = torch.randint(4, (32,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pushed = sparsifier(model, groups, strength=0.1)
    model.train()
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        pushed.step(optimizer)
    masks = sk.keep_masks(model.eval(), groups, method="zeros")
    assert 1 <= int(masks[group.name].sum()) < 8
    plan = sk.make_plan(groups, masks)
    pruned = sk.apply_plan(model, plan)
    assert sk.verify_cut(model, pruned, plan).max_rel < EXACT
    assert compare_outputs(model, pruned, plan.inputs).max_rel < EXACT
