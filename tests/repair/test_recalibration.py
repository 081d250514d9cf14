"""BatchNorm statistics after recalibration are the averages of the batches' own, and nothing else has changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.errors import InputError


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.9), nn.Linear(5, 4), nn.BatchNorm1d(4, momentum=0.3)
    )


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 3, generator=generator) + i for i in range(4)]


def test_statistics_are_the_mean_over_batches_of_what_each_norm_reads() -> None:
    net = model().train()
    net[2].eval()
    flags = [module.training for module in net.modules()]
    weights = copy.deepcopy(dict(net.named_parameters()))
    assert sk.recalibrate_batchnorms(net, batches()) == 2
    assert [module.training for module in net.modules()] == flags
    assert all(torch.equal(p, weights[name]) for name, p in net.named_parameters())
    assert net[4].momentum == 0.3
    read = [net[0](x) for x in batches()]
    assert torch.allclose(net[1].running_mean, torch.stack([x.mean(0) for x in read]).mean(0), atol=1e-6)
    assert torch.allclose(net[1].running_var, torch.stack([x.var(0) for x in read]).mean(0), atol=1e-6)
    # The second reads what the first gives with each batch's own statistics, without dropout.
    second = [net[3](nn.functional.batch_norm(x, None, None, training=True)) for x in read]
    assert torch.allclose(net[4].running_mean, torch.stack([x.mean(0) for x in second]).mean(0), atol=1e-5)


@pytest.mark.parametrize("bad", [[], [torch.randn(4, 3), torch.randn(4, 7)], [torch.randn(1, 3)]])
def test_what_goes_wrong_leaves_the_old_statistics(bad: list[Tensor]) -> None:
    net = model()
    net[1].running_mean.fill_(3.0)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises((InputError, RuntimeError, ValueError)):
        sk.recalibrate_batchnorms(net, bad)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net[1].momentum == 0.1
    assert net[1].training


def test_a_model_without_batchnorm_is_left_alone() -> None:
    assert sk.recalibrate_batchnorms(nn.Linear(3, 2), []) == 0
