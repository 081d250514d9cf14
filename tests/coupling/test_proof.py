"""The proof has to fail where a cut of one group fits only because another group loses the same share."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekit as sk
from sparsekit.coupling.proof import _SMALL, Trial, _few, _share
from sparsekit.structure.groups import ChannelGroup, ChannelGroups
from sparsekit.structure.inputs import InputSpec


class TwoHeads(nn.Module):
    """Values of two heads are laid out as the stream is, by its width, twice on one line."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.key_dim = 2, 8
        self.stem, self.out = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 5, 1)
        self.qkv, self.proj = nn.Conv2d(32, 64, 1), nn.Conv2d(32, 32, 1)
        self.position = nn.Conv2d(32, 32, 3, padding=1, groups=32)

    def forward(self, images: Tensor) -> Tensor:
        x = F.silu(self.stem(images))
        b, c, h, w = x.shape
        heads = self.qkv(x).view(b, self.num_heads, -1, h * w)
        q, k, v = heads.split([self.key_dim, self.key_dim, 16], dim=2)
        attention = (q.transpose(-2, -1) @ k).softmax(-1)
        y = (v @ attention.transpose(-2, -1)).view(b, c, h, w) + self.position(v.reshape(b, c, h, w))
        return self.out(x + self.proj(y))


class Squeezes(nn.Module):
    """Takes one channel for none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(F.relu(self.first(images))).amax((2, 3)).squeeze(1))


def cuts_of(groups: ChannelGroups) -> list[dict[str, Tensor]]:
    """Masks that cut each group alone, all but it, all, and all to as few as may be."""
    half = {g.name: torch.arange(g.n_channels) >= max(g.n_channels // 3, 1) for g in groups.free}
    whole = {g.name: torch.ones(g.n_channels, dtype=torch.bool) for g in groups.free}
    few = {g.name: torch.arange(g.n_channels) < g.least for g in groups.free}
    alone = [{**whole, name: half[name]} for name in half]
    others = [{**half, name: whole[name]} for name in half]
    return [*alone, *others, half, few]


@pytest.mark.parametrize("model", [TwoHeads(), Squeezes()], ids=lambda m: type(m).__name__)
def test_each_free_group_can_be_cut_alone_and_all_but_it_and_to_the_fewest(model: nn.Module) -> None:
    groups = sk.find_groups(model.eval(), torch.randn(1, 3, 8, 8))
    assert len(groups.free) == 2
    for masks in cuts_of(groups):
        plan = sk.make_plan(groups, masks)
        sk.verify_cut(model, sk.apply_plan(model, plan), plan)


def test_where_the_code_cannot_do_with_one_channel_two_stay() -> None:
    groups = sk.find_groups(Squeezes().eval(), torch.randn(1, 3, 8, 8), min_channels=1, round_to=1)
    assert [(g.name, g.least, g.rounding.least) for g in groups.free] == [("first", 1, 1), ("second", 2, 2)]
    with pytest.raises(sk.InputError, match="keeps 1 channel; the model's code needs 2 at least"):
        sk.make_plan(groups, {"second": torch.arange(8) < 1})


def test_any_two_groups_lose_different_shares_in_one_of_the_cuts() -> None:
    large = [tuple(_share(number, which) for which in range(3)) for number in range(200)]
    assert all(one != other for one, other in combinations(large, 2))
    assert all(share > 0 for share, *_ in large)
    for n in range(2, _SMALL):
        few = [tuple(_few(n, number, which) for which in range(6)) for number in range(2**5)]
        assert all(one != other for one, other in combinations(few, 2))
        assert all(1 <= kept < n for kept, *_ in few)
        assert all(1 <= kept <= n for kept in sum(few, ()))


def test_of_groups_that_fail_only_together_one_stays_whole() -> None:
    groups = tuple(ChannelGroup(f"g{letter}", 2, ()) for letter in "abcd")
    trial = Trial(nn.Linear(2, 2), ChannelGroups(groups, inputs=InputSpec.of(torch.zeros(1, 2))))
    failures = trial.search(lambda names: "both" if {"gb", "gd"} <= set(names) else "")
    assert failures == {"gd": "a trial cut with other groups failed: both"}
