"""Models that are not called with one batch of normal floats: the whole chain, from groups to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekit as sk
from sparsekit.evaluation import as_inputs, flat_tensors
from sparsekit.structure.inputs import InputSpec


def _mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, outputs))


class Tokens(nn.Module):
    """Ids and a mask of truth values."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mlp, self.head = nn.Embedding(50, 16), _mlp(16, 16), nn.Linear(16, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.table(ids)
        x = (x + self.mlp(x)) * mask.unsqueeze(-1)
        return self.head(x.sum(1) / mask.sum(1, keepdim=True))


class Timed(nn.Module):
    """Maps and a time, which is a number without dimensions or one for each map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.time = nn.Conv2d(3, 16, 3, padding=1), _mlp(1, 16)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift = self.time(time.reshape(-1, 1).to(x.dtype))
        return self.last(F.relu(self.first(x) + shift[:, :, None, None]))


class Logarithm(nn.Module):
    """Values above zero; others give NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = _mlp(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.log())


class Maps(nn.Module):
    """A batch of maps, or one map without a dimension for the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(F.relu(self.first(x))).mean((-2, -1)))


class Frames(Maps):
    """Four frames of each example lie in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.unflatten(0, (-1, 4)).mean(1)


class TwoMaps(Maps):
    """Always two maps."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(2, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)


class Nested(Maps):
    """One dictionary, which holds a list."""

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"logits": super().forward(batch["image"]) + batch["shifts"][0]}


class ByName(Maps):
    """Arguments that can only be given by name, one of which is no tensor."""

    def forward(self, *, pixel_values: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(pixel_values) * scale


class Several(Maps):
    """A list of maps of different sizes."""

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return [super(Several, self).forward(image) for image in images]


MAP = torch.randn(1, 3, 12, 12)
ROWS = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]], dtype=torch.bool)
KINDS: dict[str, tuple[nn.Module, Any, str, int]] = {
    "ids and a mask": (Tokens(), (torch.randint(50, (2, 6)), ROWS), "any", 2),
    "a whole number without dimensions": (Timed(), (MAP, torch.tensor(7)), "any", 2),
    "a time for each map": (Timed(), (MAP, torch.tensor([0.3])), "any", 2),
    "values above zero": (Logarithm(), torch.rand(4, 8) + 0.1, "any", 1),
    "no batch": (Maps(), MAP[0], "fixed", 2),
    "frames in the batch": (Frames(), torch.randn(8, 3, 12, 12), "multiples", 2),
    "always two": (TwoMaps(), torch.randn(2, 3, 12, 12), "fixed", 2),
    "a dictionary": (Nested(), ({"image": MAP, "shifts": [torch.zeros(1, 5)]},), "any", 2),
    "by name": (ByName(), {"pixel_values": MAP, "scale": 2.0}, "any", 2),
    "a list": (Several(), [torch.randn(3, 12, 12), torch.randn(3, 10, 14)], "fixed", 2),
}
# An export takes a second: nests differ there, and types, but not values or batches.
EXPORTED = ("ids and a mask", "a dictionary", "by name", "a list")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_input_goes_through_the_whole_chain(kind: str, tmp_path: Path) -> None:
    model, example, batch, n_free = KINDS[kind]
    groups = sk.find_groups(model.eval(), example, round_to=1, min_channels=1)
    assert (groups.inputs.batch, len(groups.free)) == (batch, n_free)
    masks = {g.name: torch.arange(g.n_channels) >= g.n_channels // 2 for g in groups.free}
    plan = sk.make_plan(groups, masks)
    assert sk.PrunePlan.from_json(json.loads(json.dumps(plan.to_json(), allow_nan=False))) == plan
    cut = sk.apply_plan(model, plan)
    assert sk.verify_cut(model, cut, plan).max_rel < 1e-5
    assert sk.count_macs(cut, example) < sk.count_macs(model, example)
    assert sk.find_groups(cut, example).free
    if kind not in EXPORTED:
        return
    file = sk.export_onnx(cut, tmp_path / "cut.onnx", example, output_names=())
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    given = zip(session.get_inputs(), as_inputs(example).tensors, strict=True)
    found = session.run(None, {entry.name: tensor.numpy() for entry, tensor in given})
    with torch.no_grad():
        expected = flat_tensors(as_inputs(example).call(cut))
    for ours, theirs in zip(expected, found, strict=True):
        assert torch.allclose(ours, torch.from_numpy(theirs), atol=1e-5)


def test_trial_inputs_keep_what_may_mean_something_and_stay_in_range() -> None:
    infinite = torch.tensor([[0.0, -torch.inf], [0.0, 0.0]])
    example = (torch.rand(2, 50) + 1, torch.tensor([3, 9]), ROWS, infinite, torch.tensor(5.0))
    spec = InputSpec.of(example)
    assert InputSpec.from_json(json.loads(json.dumps(spec.to_json(), allow_nan=False))) == spec
    drawn = spec.draw(0, nn.Linear(2, 2).double(), batch=4).tensors
    assert drawn[0].shape == (4, 50)
    assert drawn[0].dtype == drawn[3].dtype == torch.float64
    assert drawn[0].min() >= 1
    assert drawn[0].max() <= 2
    assert drawn[0].std() > 0.1
    assert drawn[1].tolist() == [3, 9, 3, 9]
    assert torch.equal(drawn[2], ROWS.repeat(2, 1))
    assert torch.equal(drawn[3], infinite.repeat(2, 1).double())
    assert 2.5 <= float(drawn[4]) <= 7.5
    again = spec.draw(0, nn.Linear(2, 2).double(), batch=4).tensors
    assert all(torch.equal(one, other) for one, other in zip(drawn, again, strict=True))


def test_many_whole_numbers_are_drawn_between_the_smallest_and_the_largest() -> None:
    spec = InputSpec.of(torch.randint(3, 9, (2, 5000)))
    (drawn,) = spec.draw(0, nn.Linear(2, 2)).tensors
    assert drawn.unique().tolist() == [3, 4, 5, 6, 7, 8]
    assert len(json.dumps(spec.to_json())) < 300
