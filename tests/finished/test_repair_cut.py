"""What is said of images that the model hardly knows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.finished.repair_cut import _unsure
from sparsekit.repair.held_out import HeldOut

IMAGES = torch.randn(40, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Sure(nn.Module):
    """Names one of twenty classes, more or less clearly."""

    def __init__(self, clearly: float) -> None:
        super().__init__()
        self.clearly, self.conv, self.head = clearly, nn.Conv2d(3, 8, 3), nn.Linear(8, 20)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(self.conv(x).relu().amax((2, 3)))
        return self.clearly * scores / scores.std(1, keepdim=True)


@pytest.mark.parametrize(("clearly", "said"), [(0.9, True), (4.0, False)])
def test_a_model_that_is_unsure_of_its_answers_is_told(clearly: float, said: bool) -> None:
    torch.manual_seed(0)
    model = Sure(clearly).eval()
    held_out = HeldOut(model, sk.find_groups(model, IMAGES[:1]), (IMAGES,))
    with torch.no_grad():
        assert held_out.confidence == pytest.approx(float(model(IMAGES).softmax(1).amax(1).mean()), rel=1e-5)
    remarks = _unsure(held_out)
    assert bool(remarks) is said
    assert all("not sure of its answers on these images" in remark for remark in remarks)
