"""The divergence of outputs against scipy, for classes, maps and several outputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from torch import Tensor
from torch.nn import functional as F

from sparsekit.repair.divergence import compared, confidence, divergence, kl, look_like_values


def outputs(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_mean_divergence_of_predicted_classes() -> None:
    dense, ours = outputs(40, 7), outputs(40, 7, seed=1)
    p, q = (softmax(one.double().numpy(), 1) for one in (dense, ours))
    found = divergence([dense], [ours])
    assert found.kl == pytest.approx(
        float(np.mean([entropy(a, b) for a, b in zip(p, q, strict=True)])), rel=1e-5
    )
    assert found.agreement == pytest.approx(float((p.argmax(1) == q.argmax(1)).mean()))


@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 4, 4), (6, 1), (6,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_outputs_are_not_apart(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    same = outputs(*shape).to(dtype)
    found = divergence([same], [same.clone()])
    assert found.kl == pytest.approx(0.0, abs=1e-7)
    assert found.agreement == 1.0 if shape == (6, 5) else math.isnan(found.agreement)


def test_small_divergences_are_told_apart_and_never_negative() -> None:
    dense = outputs(50, 10)
    step = outputs(50, 10, seed=3)
    found = [divergence([dense], [dense + size * step]).kl for size in (0.0, 1e-5, 1e-4, 1e-3)]
    assert found[0] == 0.0
    assert found == sorted(found)
    assert found[2] == pytest.approx(found[3] / 100, rel=0.01)


def test_adding_a_number_to_all_classes_of_an_image_changes_nothing() -> None:
    dense = outputs(10, 4)
    found = divergence([dense], [dense + outputs(10, 1, seed=2)])
    assert found.kl == pytest.approx(0.0, abs=1e-6)
    assert found.agreement == 1.0


def test_maps_count_by_their_squared_difference_over_twice_the_variance() -> None:
    dense, ours = outputs(5, 2, 3, 3), outputs(5, 2, 3, 3, seed=1)
    a, b = dense.double().numpy(), ours.double().numpy()
    found = divergence([dense], [ours])
    assert found.kl == pytest.approx(float(((a - b) ** 2).mean() / (2 * a.var(ddof=1))), rel=1e-5)
    # In whatever unit they are.
    assert divergence([dense * 1000], [ours * 1000]).kl == pytest.approx(found.kl, rel=1e-5)


def test_values_in_two_dimensions_count_as_maps_do() -> None:
    x, y = torch.randn(2, 20, 8)
    (dense,), (output,) = compared(x, "values"), compared(y, "values")
    found = divergence([dense], [output])
    assert found.kl == pytest.approx(float((x - y).square().mean() / (2 * x.var())), rel=1e-5)
    assert math.isnan(found.agreement)


def test_scores_that_are_nearly_alike_look_like_values() -> None:
    x = torch.randn(50, 10)
    assert look_like_values([F.normalize(x, dim=1)])
    assert not look_like_values([4 * x])
    assert not look_like_values(compared(F.normalize(x, dim=1), "values"))


def test_confidence_is_the_mean_of_the_largest_probabilities() -> None:
    scores = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4]]))
    assert confidence([torch.randn(2, 3, 4), scores]) == pytest.approx(0.6)
    assert math.isnan(confidence(compared(scores, "values")))


def test_several_outputs_add_up_and_integers_have_no_part() -> None:
    pairs = [(outputs(8, 4), outputs(8, 4, seed=1)), (outputs(8, 2, 5), outputs(8, 2, 5, seed=2)),
             (outputs(8, 3, seed=4), outputs(8, 3, seed=5))]  # fmt: skip
    single = [divergence([a], [b]) for a, b in pairs]
    indices = torch.arange(8)
    found = divergence([*(a for a, _ in pairs), indices], [*(b for _, b in pairs), indices + 1])
    assert found.kl == pytest.approx(sum(one.kl for one in single))
    assert found.agreement == pytest.approx((single[0].agreement + single[2].agreement) / 2)


def test_outputs_that_are_all_the_same_are_no_error() -> None:
    constant = torch.ones(4, 2, 3)
    assert divergence([constant], [constant]).kl == 0.0
    assert divergence([torch.ones(0, 3, 2)], [torch.ones(0, 3, 2)]).kl == 0.0


def test_a_gradient_can_be_taken() -> None:
    dense, ours = outputs(8, 4), outputs(8, 4, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(kl(dense, ours), ours)
    assert torch.allclose(gradient, (ours.softmax(1) - dense.softmax(1)) / 8, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_outputs_that_are_no_numbers_are_infinitely_far_away(bad: float) -> None:
    dense = torch.randn(6, 5)
    spoiled = dense.clone()
    spoiled[2, 3] = bad
    for shape in ((6, 5), (6, 5, 1)):
        assert divergence([dense.reshape(shape)], [spoiled.reshape(shape)]).kl == math.inf
