from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from models_by_hand import BY_HAND, build
from plain import find_groups
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from sparsekit.errors import InputError
from sparsekit.selection.bisection import step_importance
from sparsekit.selection.costs import kept_share
from sparsekit.selection.importance import filter_norms, output_shares, rows, zero_channels
from sparsekit.selection.keep_masks import keep_masks
from sparsekit.selection.rounding import keep_too, round_up
from sparsekit.structure.groups import ChannelGroups, Rounding


def chain(*wanted: list[float]) -> tuple[nn.Module, ChannelGroups]:
    """1x1 convolutions one after another, without biases; each row's norm is the norm named for it."""
    torch.manual_seed(0)
    widths = [3, *(len(s) for s in wanted), 2]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 1, bias=False), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).double().eval()
    with torch.no_grad():
        for layer, own in zip(model[::2], wanted, strict=False):
            norms = layer.weight.flatten(1).norm(dim=1)
            layer.weight *= (torch.tensor(own, dtype=torch.float64) / norms)[:, None, None, None]
    return model, find_groups(model, torch.randn(1, 3, 4, 4, dtype=torch.float64))


def kept(masks: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()}


# norms


def test_a_filter_norm_is_that_of_the_filter_with_its_batch_norm_folded_in() -> None:
    model, inputs = build("Residual")
    groups = find_groups(model, inputs)
    norms = filter_norms(model, groups)

    def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
        weight, _ = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        return weight.detach().flatten(1).norm(dim=1)

    by_size = {g.n_channels: norms[g.name] for g in groups.free}
    torch.testing.assert_close(by_size[6], folded(model.inner, model.inner_norm))
    stream = torch.hypot(folded(model.stem, model.stem_norm), folded(model.outer, model.outer_norm))
    torch.testing.assert_close(by_size[8], stream)


def test_the_filter_norm_of_a_gated_unit_folds_each_half_with_its_own_scale() -> None:
    model, inputs = build("SplitGate")
    with torch.no_grad():
        model.norm.weight[:6] *= 100
    groups = find_groups(model, inputs)
    norm = model.norm
    weight = model.up.weight.flatten(1) * (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None]
    expected = weight.detach().reshape(2, 6, -1).movedim(1, 0).flatten(1).norm(dim=1)
    torch.testing.assert_close(filter_norms(model, groups)["up"], expected)


def test_a_norm_over_the_maps_of_a_linear_layer_is_folded_into_the_rows_of_each_map() -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(3, 5 * 4), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.norm(self.first(x).view(-1, 5, 2, 2)).relu())

    model = Maps().eval()
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 1.5)
        model.norm.running_var.uniform_(0.5, 1.5)
        scale = model.norm.weight.double() / (model.norm.running_var.double() + model.norm.eps).sqrt()
        expected = model.first.weight.double().reshape(5, -1).norm(dim=1) * scale
    groups = find_groups(model, torch.randn(2, 3))
    torch.testing.assert_close(filter_norms(model, groups)["first"], expected)


def test_a_batch_norm_without_scale_or_without_statistics_folds_what_it_has() -> None:
    for norm in (nn.BatchNorm2d(5, affine=False), nn.BatchNorm2d(5, track_running_stats=False)):
        model = nn.Sequential(nn.Conv2d(3, 5, 1, bias=False), norm, nn.ReLU(), nn.Conv2d(5, 2, 1)).eval()
        with torch.no_grad():
            if norm.affine:
                norm.weight.uniform_(0.5, 1.5)
                factor = norm.weight.double()
            else:
                norm.running_var.uniform_(0.5, 1.5)
                factor = 1 / (norm.running_var.double() + norm.eps).sqrt()
        groups = find_groups(model, torch.randn(2, 3, 6, 6))
        expected = model[0].weight.detach().double().flatten(1).norm(dim=1) * factor
        torch.testing.assert_close(filter_norms(model, groups)["0"], expected.detach())


def test_without_a_batch_norm_it_is_the_norm_of_the_rows_also_of_a_transposed_convolution() -> None:
    model, inputs = build("Transposed")
    groups = find_groups(model, inputs)
    norms = filter_norms(model, groups)
    weight = model.further.weight.detach()  # inputs first
    torch.testing.assert_close(norms["further"], weight.movedim(1, 0).flatten(1).norm(dim=1))


def test_the_gate_of_squeeze_and_excite_does_not_count() -> None:
    model, inputs = build("SqueezeExcite")
    groups = find_groups(model, inputs)
    before = filter_norms(model, groups)
    with torch.no_grad():
        model.excite.weight *= 7
    after = filter_norms(model, groups)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", list(BY_HAND))
def test_filter_norms_are_non_negative_float64_one_a_channel_of_each_free_group(name: str) -> None:
    model, inputs = build(name)
    groups = find_groups(model, inputs)
    norms = filter_norms(model.float(), groups)
    assert list(norms) == [g.name for g in groups.free]
    for group in groups.free:
        assert norms[group.name].shape == (group.n_channels,)
        assert norms[group.name].dtype == torch.float64
        assert (norms[group.name] > 0).all()


def test_magnitude_is_each_layer_s_output_shared_out_in_multiply_accumulates() -> None:
    """The residual stream is made by two layers; filters count with their BatchNorm folded in, so relative sizes do."""
    model, inputs = build("Residual")
    groups = find_groups(model, inputs)
    importance = output_shares(model, groups)
    macs = {layer.weight: layer.macs for layer in groups.layers}

    def shares(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
        weight, _ = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        energy = weight.detach().flatten(1).square().sum(1)
        return energy / energy.sum()

    by_size = {g.n_channels: importance[g.name] for g in groups.free}
    torch.testing.assert_close(by_size[6], macs["inner.weight"] * shares(model.inner, model.inner_norm))
    stream = macs["stem.weight"] * shares(model.stem, model.stem_norm)
    stream = stream + macs["outer.weight"] * shares(model.outer, model.outer_norm)
    torch.testing.assert_close(by_size[8], stream)
    with torch.no_grad():
        model.inner_norm.weight[2] = 0
        model.inner_norm.bias[2] = 0
        model.inner_norm.weight *= 3
    after = {g.n_channels: output_shares(model, groups)[g.name] for g in groups.free}
    assert after[6][2] == 0
    torch.testing.assert_close(after[6].sum(), torch.tensor(float(macs["inner.weight"]), dtype=torch.float64))


def test_what_no_layer_makes_is_beyond_price() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 4))
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head((x @ self.w.t()).relu())
            return out

    model = Bare()
    groups = find_groups(model, torch.zeros(1, 4))
    assert groups.free
    assert all(bool(importance.isinf().all()) for importance in output_shares(model, groups).values())


def test_rows_belong_to_their_channels() -> None:
    model, inputs = build("ChunkGate")
    groups = find_groups(model, inputs)
    (bias,) = [m for m in groups["up"].members if m.tensor == "up.bias"]
    values = torch.arange(12.0)
    assert rows(values, bias).tolist() == [[c, c + 6] for c in range(6)]


def test_a_channel_is_zero_when_all_its_penalised_weights_are() -> None:
    model, inputs = build("Residual")
    groups = find_groups(model, inputs)
    (stream,) = [g for g in groups.free if g.n_channels == 8]
    with torch.no_grad():
        for norm in (model.stem_norm, model.outer_norm):
            norm.weight[[2, 5]] = 0
            norm.bias[[2, 5]] = 0
        model.stem_norm.weight[1] = model.stem_norm.bias[1] = 0  # the branch still writes channel 1
        model.outer_norm.weight[3] = 0  # a shift is left
    zeros = zero_channels(model, groups)
    assert zeros[stream.name].nonzero().flatten().tolist() == [2, 5]
    assert sum(int(dead.sum()) for dead in zeros.values()) == 2


# masks


def test_exact_zeros_go_and_nothing_else() -> None:
    model, groups = chain([1.0, 0.0, 1e-9, 2.0], [0.0, 1.0])
    assert kept(keep_masks(model, groups, method="zeros")) == {"0": [0, 2, 3], "2": [1]}
    assert kept(keep_masks(model, groups)) == {"0": [0, 2, 3], "2": [1]}


def test_the_rows_behind_a_zero_scale_do_not_bring_a_channel_back() -> None:
    model, inputs = build("Residual")
    groups = find_groups(model, inputs)
    (inner,) = [g for g in groups.free if g.n_channels == 6]
    with torch.no_grad():
        model.inner_norm.weight[[0, 4]] = 0
        model.inner_norm.bias[[0, 4]] = 0
        model.inner.weight[[0, 4]] *= 1000
    for arguments in ({"method": "zeros"}, {"method": "threshold", "threshold": 0.0}, {}):
        masks = keep_masks(model, groups, **arguments)  # type: ignore[arg-type]
        assert kept(masks)[inner.name] == [1, 2, 3, 5]


def test_a_threshold_is_relative_to_the_largest_of_the_group_or_absolute() -> None:
    model, groups = chain([10.0, 4.0, 6.0], [0.3, 0.5, 1.0, 0.05])
    relative = keep_masks(model, groups, method="threshold", threshold=0.45)
    assert kept(relative) == {"0": [0, 2], "2": [1, 2]}
    absolute = keep_masks(model, groups, method="threshold", threshold=0.45, relative=False)
    assert kept(absolute) == {"0": [0, 1, 2], "2": [1, 2]}


def test_a_threshold_above_everything_leaves_the_best_channel() -> None:
    model, groups = chain([10.0, 4.0, 16.0], [0.3, 0.5])
    assert kept(keep_masks(model, groups, method="threshold", threshold=99.0, relative=False)) == {
        "0": [2],
        "2": [1],
    }


@pytest.mark.parametrize("method", ["gap", "auto"])
def test_a_clear_gap_separates_small_from_large(method: Any) -> None:
    # Within each population neighbours are close; between them lie two decades. The groups differ in scale.
    model, groups = chain([1.0, 0.01, 1.2, 0.9, 0.011], [50.0, 0.6, 45.0, 55.0])
    assert kept(keep_masks(model, groups, method=method)) == {"0": [0, 2, 3], "2": [0, 2, 3]}


def test_without_a_clear_gap_nothing_goes() -> None:
    # Neighbours are a factor 2 apart throughout, below half a decade, though the ends differ by 500.
    model, groups = chain([2.0**-i for i in range(10)])
    assert kept(keep_masks(model, groups, method="gap")) == {"0": list(range(10))}
    assert kept(keep_masks(model, groups)) == {"0": list(range(10))}


def test_a_gap_of_just_more_than_half_a_decade_counts() -> None:
    for factor, expected in ((3.0, [0, 1, 2, 3]), (3.4, [0, 1])):  # half a decade is 3.16
        model, groups = chain([1.0, 1.1, 1 / factor, 0.9 / factor])
        assert kept(keep_masks(model, groups, method="gap"))["0"] == expected


@pytest.mark.parametrize("quantity", ["macs", "params", "channels"])
@pytest.mark.parametrize("round_to", [1, 2, 4])
@pytest.mark.parametrize("wanted", [1.0, 0.9, 0.75, 0.6])
def test_a_budget_is_met_with_the_smallest_threshold(quantity: Any, round_to: int, wanted: float) -> None:
    model, groups = chain([0.5, 3.0, 0.1, 2.0, 0.7, 1.1, 0.9, 0.2], [4.0, 9.0, 1.0, 0.5, 6.0, 2.0])
    masks = keep_masks(model, groups.with_rounding(round_to, 1), method="budget", target={quantity: wanted})
    norms = filter_norms(model, groups)
    # By brute force: steps of each group from the largest norm down, as important as the mean square of their relative
    # norms;
    # every threshold on that, from none upwards; the first step of a group stays.
    steps = {}
    for name, norm in norms.items():
        relative = (norm / norm.mean()).square().sort(descending=True).values.tolist()
        parts = [relative[i : i + round_to] for i in range(0, len(relative), round_to)]
        steps[name] = [(sum(part) / len(part), len(part)) for part in parts]
    expected = None
    for threshold in [-1.0, *sorted(importance for parts in steps.values() for importance, _ in parts)]:
        rounded = {
            name: parts[0][1] + sum(n for importance, n in parts[1:] if importance > threshold)
            for name, parts in steps.items()
        }
        trial = {}
        for name, n in rounded.items():
            trial[name] = torch.zeros(len(norms[name]), dtype=torch.bool)
            trial[name][norms[name].topk(n).indices] = True
        if getattr(kept_share(groups, trial), quantity) <= wanted:
            expected = trial
            break
    assert expected is not None
    assert kept(masks) == kept(expected)


def test_exact_zeros_that_meet_the_target_are_all_that_goes() -> None:
    model, groups = chain([1.0, 0.0, 0.0, 2.0, 0.0, 0.1])
    assert kept(keep_masks(model, groups, target={"channels": 0.5})) == {"0": [0, 3, 5]}
    assert kept(keep_masks(model, groups, target={"channels": 0.9})) == {"0": [0, 3, 5]}
    # Not enough of them: the weakest of the living follow.
    assert kept(keep_masks(model, groups, target={"channels": 0.34})) == {"0": [0, 3]}


def test_a_target_out_of_reach_says_what_is_in_reach() -> None:
    model, groups = chain([1.0, 2.0, 3.0, 4.0])
    with pytest.raises(
        InputError, match=r"channels 0\.1 is out of reach.* leaves 0\.250\. 1 of 2 groups are frozen"
    ):
        keep_masks(model, groups, method="budget", target={"channels": 0.1})
    with pytest.raises(InputError, match=r"leaves 0\.750"):
        keep_masks(model, groups.with_rounding(1, 3), target={"channels": 0.5})
    with pytest.raises(InputError, match=r"leaves 1\.000"):
        keep_masks(model, groups.with_rounding(4, 1), target={"macs": 0.9})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "threshold"}, "needs a threshold"),
        ({"method": "budget"}, "needs a target"),
        (
            {"target": {"flops": 0.5}},
            "one of macs, params, channels, latency with its share, got {'flops': 0.5}",
        ),
        ({"target": {"macs": 0.5, "params": 0.5}}, "one of macs, params, channels, latency"),
    ],
)
def test_a_method_without_what_it_needs_is_refused(arguments: dict[str, Any], message: str) -> None:
    model, groups = chain([1.0, 2.0])
    with pytest.raises(InputError, match=message):
        keep_masks(model, groups, **arguments)


def test_a_model_with_nothing_free_has_no_masks_and_no_target_in_reach() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    groups = find_groups(model, torch.randn(1, 3, 4, 4))
    assert keep_masks(model, groups) == {}
    with pytest.raises(InputError, match=r"out of reach.*1\.000"):
        keep_masks(model, groups, method="budget", target={"macs": 0.5})


# rounding


@pytest.mark.parametrize("multiple", [1, 3, 4, 8])
@pytest.mark.parametrize("minimum", [1, 5, 99])
@pytest.mark.parametrize("n_kept", [0, 1, 4, 7, 10])
def test_rounding_reaches_a_multiple_with_the_best_of_what_was_dropped(
    multiple: int, minimum: int, n_kept: int
) -> None:
    generator = torch.Generator().manual_seed(n_kept)
    importance = torch.rand(10, generator=generator)
    mask = torch.zeros(10, dtype=torch.bool)
    mask[torch.randperm(10, generator=generator)[:n_kept]] = True  # not the best: they stay all the same
    rounded = round_up(mask, importance, Rounding(multiple, minimum))
    count = int(rounded.sum())
    assert rounded.dtype == torch.bool
    assert (rounded | ~mask).all()  # nothing that was kept goes
    assert count % multiple == 0 or count == 10
    assert count >= min(max(minimum, 1), 10)
    least = min(max(n_kept, minimum, 1), 10)
    assert count < least + multiple
    back, gone = importance[rounded & ~mask], importance[~rounded]
    assert not len(back) or not len(gone) or back.min() >= gone.max()


def test_zeros_come_back_last() -> None:
    model, groups = chain([0.0, 0.1, 5.0, 0.0, 3.0, 0.2])
    masks = keep_masks(model, groups.with_rounding(4, 1), method="threshold", threshold=1.0, relative=False)
    assert kept(masks) == {"0": [1, 2, 4, 5]}
    dead, dead_groups = chain([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    with torch.no_grad():
        dead[0].weight.zero_()
    assert int(keep_masks(dead, dead_groups, method="zeros")["0"].sum()) == 1
    assert int(keep_masks(dead, dead_groups.with_rounding(4, 1), method="zeros")["0"].sum()) == 4


def test_a_channel_kept_too_takes_the_place_of_a_spare_one_or_is_rounded_up_with() -> None:
    mask = torch.tensor([True, True, False, False, True, False])
    importance = torch.tensor([3.0, 0.0, 0.0, 0.1, 2.0, 0.4])
    spare = torch.tensor([False, True, True, False, False, False])
    none = torch.zeros(6, dtype=torch.bool)
    for spares, multiple, expected in (
        (spare, 3, [0, 2, 4]),
        (spare, 1, [0, 2, 4]),
        (none, 1, [0, 1, 2, 4]),
        (none, 5, [0, 1, 2, 4, 5]),
        (none, 4, [0, 1, 2, 4]),
    ):
        assert kept({"": keep_too(mask, 2, spares, importance, multiple)})[""] == expected
    assert mask.nonzero().flatten().tolist() == [0, 1, 4]


def test_the_model_is_left_alone() -> None:
    model, inputs = build("Residual")
    groups = find_groups(model, inputs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    masks = keep_masks(model.train(), groups, target={"macs": 0.5})
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(not mask.requires_grad and mask.dtype == torch.bool for mask in masks.values())


INF = float("inf")


@pytest.mark.parametrize(
    ("values", "multiple", "least", "importance"),
    [
        ([5.0, 1.0, 3.0, 7.0], 2, 1, [INF, 2, 2, INF]),
        ([5.0, 1.0, 3.0, 7.0], 1, 1, [5, 1, 3, INF]),
        ([5.0, 1.0, 3.0, 7.0], 1, 3, [INF, 1, INF, INF]),
        ([5.0, 1.0, 3.0, 7.0], 2, 3, [INF] * 4),
        ([5.0, 1.0, 3.0], 2, 1, [INF, 1, INF]),  # the last step is smaller
        ([5.0, 1.0], 8, 1, [INF, INF]),
        ([2.0, 2.0, 2.0, 2.0], 2, 1, [INF, INF, 2, 2]),
        ([5.0, 1.0, 3.0, 7.0, 9.0, 8.0], 2, 1, [6, 2, 2, 6, INF, INF]),
    ],
)
def test_steps_are_counted_from_the_most_important_channel_down(
    values: list[float], multiple: int, least: int, importance: list[float]
) -> None:
    assert (
        step_importance({"g": torch.tensor(values)}, {"g": Rounding(multiple, least)})["g"].tolist()
        == importance
    )


@pytest.mark.parametrize("method", ["threshold", "gap", "budget"])
def test_importance_that_is_given_ranks_and_groups_without_any_stay_whole(method: Any) -> None:
    model, groups = chain([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 2.0, 3.0, 4.0])
    first, second = (group.name for group in groups.free)
    given = {first: torch.tensor([60.0, 50.0, 40.0, 1e-3, 2e-3, 3e-3]), second: torch.full((4,), torch.inf)}
    masks = keep_masks(
        model,
        groups,
        method=method,
        importance=given,
        threshold=0.5 if method == "threshold" else None,
        target={"channels": 0.7} if method == "budget" else None,
    )
    assert kept(masks) == {first: [0, 1, 2], second: [0, 1, 2, 3]}


def test_importance_of_other_groups_is_refused() -> None:
    model, groups = chain([1.0, 2.0, 3.0, 4.0])
    for given, got in (({}, "none"), ({groups.free[0].name: torch.ones(3)}, r"shape \(3,\)")):
        with pytest.raises(InputError, match=f"importance must be 4 numbers .* got {got}"):
            keep_masks(model, groups, method="gap", importance=given)


@pytest.mark.parametrize("method", ["zeros", "auto", "gap"])
def test_of_a_group_that_nothing_ranks_only_zeros_go(method: Any) -> None:
    model, groups = chain([1.0, 0.0, 3.0, 0.0], [1.0, 2.0, 3.0, 4.0])
    first, second = (group.name for group in groups.free)
    given = {first: torch.full((4,), torch.inf), second: torch.ones(4)}
    masks = keep_masks(model, groups, method=method, importance=given)
    assert kept(masks) == {first: [0, 2], second: [0, 1, 2, 3]}
