"""A detector's outputs jump where boxes are as good: right cuts still pass, wrong ones do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.structure.plan import PrunePlan
from sparsekit.surgery.unstable_outputs import largest_difference_of_layers


class Detector(nn.Module):
    """Keeps the places with the largest scores, many of which are 1 but for the last digit, and reads these again."""

    def __init__(self, steepness: float = 30.0) -> None:
        super().__init__()
        self.steepness = steepness
        self.stem, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.scores, self.boxes = nn.Conv2d(12, 1, 1), nn.Conv2d(12, 4, 1)
        self.again, self.classes = nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = []
        for image in images:
            maps = self.body(self.stem(image[None]).relu()).relu()
            scores = (self.steepness * (self.scores(maps).flatten() + 1.2)).sigmoid()
            best = scores.topk(9).indices
            best = best[scores[best] > 0.5]
            if len(best) > 8:
                best = best[:8]
            features = maps.flatten(2)[0].T[best]
            classes = self.classes(self.again(features).relu())
            found.append({"boxes": self.boxes(maps).flatten(2)[0].T[best], "classes": classes})
        return found


@pytest.fixture(scope="module")
def cut() -> tuple[nn.Module, nn.Module, PrunePlan, list[Tensor]]:
    torch.manual_seed(0)
    model, example = Detector().eval(), [torch.randn(3, 9, 9)]
    groups = sk.find_groups(model, example, round_to=1, min_channels=1)
    assert {group.name for group in groups.free} == {"stem", "body", "again"}
    plan = sk.make_plan(groups, {g.name: torch.arange(g.n_channels) >= 5 for g in groups.free})
    return model, sk.apply_plan(model, plan), plan, example


def test_a_right_cut_passes_though_the_outputs_jump(
    cut: tuple[nn.Module, nn.Module, PrunePlan, list[Tensor]],
) -> None:
    model, pruned, plan, _ = cut
    assert sk.verify_cut(model, pruned, plan).max_rel < 1e-4


@pytest.mark.parametrize("layer", ["body", "boxes", "again", "classes"])
def test_a_wrong_layer_is_found_before_and_behind_the_choice(
    cut: tuple[nn.Module, nn.Module, PrunePlan, list[Tensor]], layer: str
) -> None:
    model, pruned, plan, _ = cut
    wrong = sk.apply_plan(model, plan)
    with torch.no_grad():
        weight = wrong.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        weight[0] += 0.1
    with pytest.raises(sk.VerificationError):
        sk.verify_cut(model, wrong, plan)
    assert sk.verify_cut(model, pruned, plan).max_rel < 1e-4


def test_steady_outputs_are_compared_themselves() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval()
    groups = sk.find_groups(model, torch.randn(1, 3, 9, 9))
    plan = sk.make_plan(groups, {"0": torch.arange(8) >= 3})
    inputs = plan.inputs.draw(0, model)
    assert largest_difference_of_layers(model, sk.apply_plan(model, plan), plan, inputs, 1e-4) is None


def test_what_torch_export_refuses_is_traced_on_the_example_with_a_warning(tmp_path: Path) -> None:
    model, example = Detector(0.1).eval(), torch.randn(3, 9, 9)
    with pytest.warns(UserWarning, match="Detector has sizes that depend on its data"):
        file = sk.export_onnx(model, tmp_path / "cut.onnx", [example], output_names=())
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        (expected,) = model([example])
    for ours, theirs in zip(expected.values(), session.run(None, {"input": example.numpy()}), strict=True):
        assert np.allclose(ours.numpy(), theirs, atol=1e-5)
