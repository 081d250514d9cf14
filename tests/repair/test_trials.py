"""Trials of groups: as masked and repaired copies lose, and the model comes back as it was."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from models_by_hand import random_masks
from plain import find_groups
from prepared import NAMES, prepared
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.repair.closed_form import repair_weights
from sparsekit.repair.held_out import HeldOut
from sparsekit.repair.trials import Trials, masked_in_place
from sparsekit.surgery.mask import mask_model


@pytest.mark.parametrize("name", [*NAMES, "test_convnext"])
def test_masked_in_place_is_what_a_repaired_copy_is_and_ends_without_a_trace(name: str) -> None:
    model, groups, known, apart = prepared(name, blocks="all")
    blocks = [group.name for group in groups.free if group.bypass]
    masks = random_masks(groups, 0.5, seed=1) | {
        name: torch.zeros(1, dtype=torch.bool) for name in blocks[:1]
    }
    plan = sk.make_plan(groups, masks)
    assert bool(plan.blocks) == (name == "test_convnext")
    before = copy.deepcopy(model.state_dict())
    parameters = {key: id(p) for key, p in model.named_parameters()}
    wanted = mask_model(repair_weights(model, plan, known), plan)(*apart)
    changed = {cut.tensor for cut in plan.cuts if cut.role == "consumer"}
    changed |= {scale for block in plan.blocks for scale in block.scales}
    with (
        contextlib.suppress(KeyboardInterrupt),
        masked_in_place(model, copy.deepcopy(model), plan, known, changed),
    ):
        found = model(*apart)
        names = {n for n, values in model.state_dict().items() if n in before and not values.equal(before[n])}
        raise KeyboardInterrupt
    assert torch.allclose(found, wanted)
    # All that changed is named, but biases of the layers that are.
    assert {n.rpartition(".")[0] for n in names} <= {n.rpartition(".")[0] for n in changed}
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(values, before[key]) for key, values in model.state_dict().items())
    assert {key: id(p) for key, p in model.named_parameters()} == parameters


@pytest.mark.parametrize("name", [*NAMES, "LayerNormMlp", "test_resnet"])
def test_a_trial_among_other_cuts_is_what_a_masked_copy_with_all_of_them_loses(name: str) -> None:
    model, groups, known, apart = prepared(name, blocks="all", through_layer_norm=True)
    base = random_masks(groups, 0.7, seed=3)
    blocks = [group for group in groups.free if group.bypass]
    base |= {group.name: torch.ones(1, dtype=torch.bool) for group in blocks}
    base |= {group.name: torch.zeros(1, dtype=torch.bool) for group in blocks[1:2]}
    held_out = HeldOut(model, groups, apart)
    trials = Trials(model, groups, known, held_out, base)
    before = copy.deepcopy(trials._model.state_dict())
    tried = [group for group in groups.free if not trials.is_bypassed(group)][:6]
    for group in tried:
        for kept in {0 if group.bypass else 1, group.n_channels}:
            mask = torch.arange(group.n_channels) < kept
            plan = sk.make_plan(groups, base | {group.name: mask})
            wanted = held_out.of(mask_model(repair_weights(model, plan, known), plan)).kl
            assert trials.loss(group, mask) == pytest.approx(wanted, rel=1e-4, abs=1e-9), group.name
    after = trials._model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(values, before[key]) for key, values in after.items())


class Shortcut(nn.Module):
    """A block whose only layer, with a bias, reads the stream itself."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def test_what_a_block_that_is_out_reads_stays_out_when_the_stream_is_tried() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 12, 3), nn.ReLU(), Shortcut(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))
    ).eval()
    with torch.no_grad():
        model[2].branch.bias.fill_(3.0)
    x = torch.randn(40, 3, 8, 8)
    groups = find_groups(model, x[:1], blocks="all")
    assert [group.bypass for group in groups.free if group.bypass] == ["2"]
    known, held_out = sk.input_statistics(model, groups, [x[:24]]), HeldOut(model, groups, (x[24:],))
    base = {group.name: torch.full((group.n_channels,), not group.bypass) for group in groups.free}
    trials = Trials(model, groups, known, held_out, base)
    (stream,) = [group for group in groups.free if not group.bypass and group.n_channels == 12]
    mask = torch.arange(12) < 8
    plan = sk.make_plan(groups, base | {stream.name: mask})
    wanted = held_out.of(mask_model(repair_weights(model, plan, known), plan)).kl
    assert trials.loss(stream, mask) == pytest.approx(wanted, rel=1e-4)
