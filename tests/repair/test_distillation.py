"""Learning from the dense model: never for the worse, the same each time, and nothing else is touched."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from models_by_hand import random_masks
from plain import find_groups
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.errors import TrainingError
from sparsekit.evaluation import flat_tensors
from sparsekit.repair import distillation
from sparsekit.repair.distillation import DistillProgress, distill
from sparsekit.repair.held_out import HeldOut, outputs_of


class Net(nn.Module):
    """Batch norms, dropout and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True))
        self.second = nn.Sequential(
            nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True)
        )
        self.third = nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.drop, self.head, self.size = nn.Dropout(0.5), nn.Linear(16, 5), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.drop(self.third(self.second(self.first(x))).mean((2, 3)))
        return self.head(4 * features), self.size(features)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """As of some models of torchvision, which are not loaded from plain dictionaries."""
        raise ValueError("version should be set to 1 or 2 instead of None")


@dataclass
class Case:
    dense: nn.Module
    pruned: nn.Module
    plan: sk.PrunePlan
    used: Tensor
    held_out: HeldOut

    def learn(self, **options: Any) -> distillation.Learned:
        return distill(self.dense, self.pruned, self.plan, self.used, self.held_out, **options)


def case(dense: nn.Module | None = None, *, blocks: bool = False, side: int = 8) -> Case:
    torch.manual_seed(0)
    dense = Net() if dense is None else dense
    x = torch.randn(80, 3, side, side).cumsum(-1).cumsum(-2) / 8
    dense.train()
    with torch.no_grad():
        for _ in range(20):
            dense(x)  # norms that fit the images
    dense.eval()
    groups = find_groups(dense, x[:2], **({"blocks": "all"} if blocks else {}))
    masks = random_masks(groups, 0.6, seed=2)
    if blocks:
        masks |= {group.name: torch.zeros(1, dtype=torch.bool) for group in groups.free if group.bypass}
    plan = sk.make_plan(groups, masks)
    return Case(dense, sk.apply_plan(dense, plan), plan, x[:60], HeldOut(dense, groups, (x[60:],)))


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert model.state_dict().keys() == before.keys()
    for name, values in model.state_dict().items():
        assert torch.equal(values, before[name]), name


def test_it_comes_nearer_on_images_that_it_does_not_see() -> None:
    one = case()
    start = one.held_out.of(one.pruned)
    stages = ("second", "third")
    for chosen in ((), stages, one.held_out.stages):
        found = one.learn(steps=40, lr=3e-3, stages=chosen)
        assert found.divergence.kl < 0.7 * start.kl
        assert one.held_out.of(found.model).kl == pytest.approx(found.divergence.kl, rel=1e-6)
        assert not found.interrupted


@pytest.mark.parametrize("lr", [1e-4, 10.0, 1e20])
def test_it_is_never_for_the_worse(lr: float) -> None:
    one = case()
    start = one.held_out.of(one.pruned)
    found = one.learn(steps=16, lr=lr)
    assert found.divergence.kl <= start.kl
    assert one.held_out.of(found.model).kl == pytest.approx(found.divergence.kl, rel=1e-6)
    assert all(values.isfinite().all() for values in found.model.state_dict().values())


def test_the_same_steps_give_the_same_model_whatever_the_random_state() -> None:
    one = case()
    states = []
    for seed, own in ((3, 0), (3, 1), (4, 1)):
        torch.manual_seed(own)
        before = torch.get_rng_state()
        states.append(state(one.learn(steps=8, lr=1e-3, seed=seed).model))
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(values, states[1][name]) for name, values in states[0].items())
    assert any(not torch.equal(values, states[2][name]) for name, values in states[0].items())


def test_both_models_and_all_flags_stay() -> None:
    one = case()
    one.dense.train()
    one.pruned.train()
    one.pruned.second.eval()
    one.pruned.first[0].weight.requires_grad_(False)
    before, flags = (state(one.dense), state(one.pruned)), [m.training for m in one.pruned.modules()]
    with torch.no_grad():  # a caller that is not training
        found = one.learn(steps=8, lr=1e-3, stages=("second",))
    assert_same(one.dense, before[0])
    assert_same(one.pruned, before[1])
    assert all(m.training for m in one.dense.modules())
    for model in (one.pruned, found.model):
        assert [m.training for m in model.modules()] == flags
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["first.0.weight"]
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks for m in model.modules())
    assert not any(m._forward_hooks for m in one.dense.modules())
    # Frozen parameters learn too, and statistics of norms do not.
    assert not torch.equal(found.model.first[0].weight, one.pruned.first[0].weight)
    assert torch.equal(found.model.first[1].running_mean, one.pruned.first[1].running_mean)


def test_an_interruption_returns_what_was_best_until_then() -> None:
    one = case()
    told: list[DistillProgress] = []

    def stop(now: DistillProgress) -> None:
        told.append(now)
        if now.steps == 30:
            raise KeyboardInterrupt

    before = state(one.pruned)
    found = one.learn(steps=40, lr=3e-3, progress=stop)
    assert found.interrupted
    assert [now.steps for now in told] == list(range(1, 31))
    assert found.divergence.kl < one.held_out.of(one.pruned).kl
    assert one.held_out.of(found.model).kl == pytest.approx(found.divergence.kl, rel=1e-6)
    assert not any(m.training for m in found.model.modules())
    assert not any(m._forward_hooks for m in found.model.modules())
    assert_same(one.pruned, before)


def test_progress_runs_from_none_to_all() -> None:
    told: list[DistillProgress] = []
    case().learn(steps=10, progress=told.append)
    assert [now.share for now in told] == pytest.approx([i / 10 for i in range(10)])
    assert all(math.isfinite(now.loss) and now.loss > 0 for now in told)


@pytest.mark.parametrize("limits", [{"steps": 0}, {"seconds": 0.0}])
def test_no_time_is_no_learning(limits: dict[str, Any]) -> None:
    one = case()
    found = one.learn(**limits)
    assert_same(found.model, state(one.pruned))


def test_a_time_ends_it() -> None:
    told: list[DistillProgress] = []
    case().learn(seconds=0.3, progress=told.append)
    assert told
    assert told[-1].share < 1


def test_a_model_that_gives_no_numbers_is_refused_at_the_first_step() -> None:
    one = case()
    with torch.no_grad():
        one.pruned.head.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"loss is not finite at the first step"):
        one.learn(steps=3)


def test_only_the_channels_that_stayed_are_compared() -> None:
    one = case()
    seen: list[tuple[str, torch.Size]] = []
    kept = distillation._of_what_stays

    def noted(wanted: Tensor, features: Tensor, rows: Any) -> Tensor | None:
        found = kept(wanted, features, rows)
        assert found is not None
        seen.append(("", found.shape))
        assert found.shape == features.shape
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(distillation, "_of_what_stays", noted)
        one.learn(steps=1, stages=("first", "third"))
    assert len(seen) == 2
    # The same channels by hand.
    (dropped,) = [cut for cut in one.plan.cuts if cut.tensor == "third.0.weight" and cut.dim == 0]
    rows = distillation._kept_rows(one.pruned, one.plan, ["third"])["third"]
    maps = torch.randn(2, 16, 3, 3)
    assert torch.equal(kept(maps, maps[:, : len(dropped.keep)], rows), maps[:, list(dropped.keep)])


def test_stages_inside_blocks_that_go_are_left_alone() -> None:
    torch.manual_seed(0)
    one = case(timm.create_model("test_convnext", num_classes=4, ls_init_value=1.0), blocks=True, side=32)
    gone = [block.module for block in one.plan.blocks]
    assert gone
    inside = [
        name for name, module in one.dense.named_modules()
        if isinstance(module, nn.Linear) and any(name.startswith(f"{b}.") for b in gone)
    ]  # fmt: skip
    assert inside
    found = one.learn(steps=2, stages=(*inside, *gone))
    assert found.divergence.kl <= one.held_out.of(one.pruned).kl


@pytest.mark.parametrize("shape", [(6, 40), (40,)])
def test_inputs_of_any_dimensions_are_learned_from(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    x = torch.randn(50, *shape)
    groups = find_groups(dense, x[:2])
    plan = sk.make_plan(groups, random_masks(groups, 0.5))
    pruned, held_out = sk.apply_plan(dense, plan), HeldOut(dense, groups, (x[40:],))
    found = distill(dense, pruned, plan, x[:40], held_out, steps=24, lr=3e-3)
    assert found.divergence.kl < held_out.of(pruned).kl
    wanted, ours = flat_tensors(dense(x)), outputs_of(found.model, (x,))
    assert [one.shape for one in wanted] == [one.shape for one in ours]


class OneNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu().mean((2, 3)))


@pytest.mark.parametrize("dense", [Net, OneNumber])
def test_parts_of_a_batch_give_what_the_whole_gives(dense: type[nn.Module]) -> None:
    torch.manual_seed(0)
    one = case(dense())
    stages = () if dense is OneNumber else ("second",)
    whole, parts = (one.learn(steps=6, stages=stages, at_once=n) for n in (16, 5))
    assert whole.divergence.kl < one.held_out.of(one.pruned).kl
    for name, values in whole.model.state_dict().items():
        assert torch.allclose(values, parts.model.state_dict()[name], atol=1e-5), name
