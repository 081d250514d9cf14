"""What follows a cut of recurrent layers: attributes, training, a second cut, artifacts, ONNX files."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from plain import find_groups
from torch import Tensor, nn

import sparsekit as sk


class Reader(nn.Module):
    """A network that reads text in images: columns of a map are steps of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.norm = nn.Conv2d(1, 8, (4, 3), padding=(0, 1)), nn.BatchNorm2d(8)
        self.steps = nn.LSTM(8, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.letters = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        columns = self.norm(self.maps(images)).relu().squeeze(2).transpose(1, 2)
        return self.letters(self.steps(columns)[0])


IMAGE = torch.randn(1, 1, 4, 9, generator=torch.Generator().manual_seed(0))


def _half(groups: sk.ChannelGroups) -> dict[str, Tensor]:
    return {g.name: torch.arange(g.n_channels) % 2 == 0 for g in groups.free}


def test_a_cut_recurrent_layer_is_one_of_its_smaller_size() -> None:
    model = Reader().eval()
    groups = find_groups(model, IMAGE)
    plan = sk.make_plan(groups, _half(groups))
    pruned = sk.apply_plan(model, plan)
    assert isinstance(pruned.steps, nn.LSTM)
    assert (pruned.steps.input_size, pruned.steps.hidden_size) == (4, 4)
    assert pruned.steps._flat_weights == [getattr(pruned.steps, n) for n in pruned.steps._flat_weights_names]
    fresh = nn.LSTM(4, 4, num_layers=2, bidirectional=True, batch_first=True)
    fresh.load_state_dict(pruned.steps.state_dict())
    steps = torch.randn(2, 3, 4)
    assert torch.equal(fresh(steps)[0], pruned.steps(steps)[0])


def test_training_goes_on_after_the_cut_and_a_second_cut_composes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = Reader()
    model = copy.deepcopy(dense)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.randn(2, 1, 4, 9)).square().mean().backward()
        optimizer.step()

    step(model, optimizer)
    groups = find_groups(model, IMAGE)
    plan = sk.make_plan(groups, _half(groups))
    pruned = sk.apply_plan(model, plan)
    moved = sk.transplant(optimizer, model, pruned, plan)
    kept = torch.tensor(next(c.keep for c in plan.cuts if (c.tensor, c.dim) == ("steps.bias_hh_l1", 0)))
    averages = optimizer.state[model.steps.bias_hh_l1]["exp_avg"]
    assert torch.equal(moved.state[pruned.steps.bias_hh_l1]["exp_avg"], averages[kept])
    step(pruned, moved)
    again = find_groups(pruned.eval(), IMAGE)
    second = sk.make_plan(again, _half(again))
    smaller = sk.apply_plan(pruned, second)
    assert sk.verify_cut(pruned, smaller, second).max_rel < 1e-5
    assert smaller.steps.hidden_size == 2
    both = sk.apply_plan(model, sk.compose(plan, second))
    assert [p.shape for p in both.parameters()] == [p.shape for p in smaller.parameters()]

    sk.save(smaller, tmp_path / "artifact", factory=lambda: copy.deepcopy(dense))
    loaded = sk.load(tmp_path / "artifact", factory=lambda: copy.deepcopy(dense))
    assert loaded.steps.hidden_size == 2
    images = torch.randn(3, 1, 4, 9)
    with torch.no_grad():
        assert torch.allclose(loaded(images), smaller(images), atol=1e-6)
