"""Statistics of what layers read: as collected by hand, in any batches, and without a trace in the model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models_by_hand import build
from plain import find_groups
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekit as sk
from sparsekit.errors import InputError, ModelError
from sparsekit.evaluation import flat_tensors
from sparsekit.repair import statistics as home
from sparsekit.repair.divergence import sampled_loss

EVERYWHERE = 10**9  # so many positions: all of them
N_IMAGES = 10


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(name: str, n: int = N_IMAGES) -> tuple[nn.Module, sk.ChannelGroups, tuple[Tensor, ...]]:
    model, example = build(name)
    inputs = tuple(images(n, *x.shape[1:], seed=i) for i, x in enumerate(example))
    return model, find_groups(model, example), inputs


def fixed_loss(outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """A loss without chance, which is not the same for all outputs of an image."""
    flat = torch.cat([output.flatten(1) for output in outputs], 1)
    return (flat * torch.arange(1.0, flat.shape[1] + 1)).sin().sum()


NAMES = ["SqueezeExcite", "FlattenBeforeLinear", "GroupedConv", "UsedTwice", "Concatenation", "LayerNormMlp",
    "Transposed", "TwoInTwoOut", "DictionaryOfOutputs", "OneDimensional", "Windows"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_batches_sum_up_to_what_all_images_give_at_once(name: str) -> None:
    model, groups, inputs = by_hand(name)
    once = sk.input_statistics(model, groups, [inputs], gradients=False, most_positions=EVERYWHERE)
    parts = list(zip(*(x.split([1, 4, 5]) for x in inputs), strict=True))
    streamed = sk.input_statistics(model, groups, iter(parts), gradients=False, most_positions=EVERYWHERE)
    assert once.n_images == streamed.n_images == N_IMAGES
    assert once.layers.keys() == streamed.layers.keys()
    for tensor, one in once.layers.items():
        other = streamed.layers[tensor]
        assert one.moments.mean.dtype == one.moments.covariance.dtype == torch.float64
        assert one.moments.rows == other.moments.rows
        assert torch.allclose(one.moments.mean, other.moments.mean, atol=1e-12)
        assert torch.allclose(one.moments.covariance, other.moments.covariance, atol=1e-12)
        # A batch of another size may take another kernel, which rounds another way.
        assert torch.allclose(one.reading.low, other.reading.low, atol=1e-12)
        assert torch.allclose(one.reading.high, other.reading.high, atol=1e-12)


def read_by(model: nn.Module, tensor: str, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What a layer reads in each of its calls."""
    read: list[Tensor] = []
    layer = model.get_submodule(tensor.rpartition(".")[0])
    hook = layer.register_forward_pre_hook(lambda module, args: read.append(args[0].detach().clone()))
    with torch.no_grad():
        model(*inputs)
    hook.remove()
    return read


@pytest.mark.parametrize("name", ["LayerNormMlp", "UsedTwice", "Siamese", "FlattenBeforeLinear"])
def test_moments_are_those_of_all_rows_of_all_calls(name: str) -> None:
    model, groups, inputs = by_hand(name)
    found = sk.input_statistics(model, groups, [inputs], gradients=False, most_positions=EVERYWHERE)
    assert found.layers
    for tensor, layer in found.layers.items():
        rows = [
            layer.reader.rows(model.get_submodule(layer.reader.module), x).flatten(0, 1)[:, 0]
            for x in read_by(model, tensor, inputs)
        ]
        joined = torch.cat(rows)
        assert layer.moments.rows == len(joined)
        assert torch.allclose(layer.moments.mean[0], joined.mean(0))
        assert torch.allclose(layer.moments.covariance[0], torch.cov(joined.T, correction=0), atol=1e-12)


def closing(model: nn.Module, group: sk.ChannelGroup, inputs: tuple[Tensor, ...]) -> Tensor:
    """The gate scores of a group by its definition: a factor before each channel of each image, at all its readers."""
    factors = torch.ones(len(inputs[0]), group.n_channels, dtype=torch.float64, requires_grad=True)

    def scaled(member: Any) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (x,) = args
            dim = x.dim() - 1 if isinstance(layer, nn.Linear) else 1
            per_part = x.shape[dim] // getattr(layer, "groups", 1)
            columns = list(torch.ones(len(x), per_part, dtype=torch.float64).unbind(1))
            windows = len(x) // len(factors)  # of one image, along the batch
            for order, position in enumerate(member.positions):
                columns[position] = factors[:, order // member.repeat].repeat_interleave(windows)
            every = torch.stack(columns * getattr(layer, "groups", 1), 1)
            shape = [1] * x.dim()
            shape[0], shape[dim] = len(x), x.shape[dim]
            return (x * every.reshape(shape),)

        return hook

    hooks = [
        model.get_submodule(member.module).register_forward_pre_hook(scaled(member))
        for member in group.of_role("consumer")
    ]
    loss = fixed_loss(flat_tensors(model(*inputs)), torch.Generator())
    for hook in hooks:
        hook.remove()
    (gradient,) = torch.autograd.grad(loss, factors)
    return gradient.square().mean(0)


@pytest.mark.parametrize("name", NAMES)
def test_gates_say_how_much_closing_a_channel_moves_the_loss(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home, "sampled_loss", fixed_loss)
    model, groups, inputs = by_hand(name)
    parts = list(zip(*(x.split([3, 7]) for x in inputs), strict=True))
    found = sk.input_statistics(model, groups, parts)
    assert found.gates.keys() == {group.name for group in groups.free}
    for group in groups.free:
        assert torch.allclose(found.gates[group.name], closing(model, group, inputs)), group.name


@pytest.mark.parametrize("name", ["LayerNormMlp", "SqueezeExcite", "Transposed", "UsedTwice"])
def test_sensitivities_are_summed_products_of_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "sampled_loss", fixed_loss)
    model, groups, inputs = by_hand(name)
    found = sk.input_statistics(model, groups, [inputs], most_positions=EVERYWHERE)
    for layer in found.layers.values():
        given: list[Tensor] = []
        module = model.get_submodule(layer.reader.module)
        hook = module.register_forward_hook(lambda m, args, out, given=given: given.append(out))
        loss = fixed_loss(flat_tensors(model(*inputs)), torch.Generator())
        hook.remove()
        wanted = 0
        for gradient in torch.autograd.grad(loss, given):
            rows = (gradient if isinstance(module, nn.Linear) else gradient.movedim(1, -1)).flatten(0, -2)
            wanted = wanted + rows.T @ rows / N_IMAGES
        assert torch.allclose(layer.sensitivity, wanted)


def test_labels_are_drawn_as_the_model_predicts() -> None:
    """On average the gradient's square is the curvature of the divergence, diag(p) - p p^T."""
    logits = images(1, 4, seed=3).float().expand(20_000, 4).clone().requires_grad_()
    loss = sampled_loss([logits], torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(loss, logits)
    p = logits[0].detach().softmax(0)
    assert torch.allclose(gradient.T @ gradient / 20_000, p.diag() - torch.outer(p, p), atol=0.01)


def test_outputs_that_are_no_classes_count_by_their_variance() -> None:
    maps = images(5000, 1, 2, 2).float().mul(3).requires_grad_()
    loss = sampled_loss([maps], torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(loss, maps)
    rows = gradient.flatten(1)
    assert torch.allclose(rows.T @ rows / 5000, torch.eye(4) / (4 * maps.detach().var()), atol=2e-3)


def test_a_label_is_drawn_anew_for_each_seed_and_the_same_for_one() -> None:
    model, groups, inputs = by_hand("SqueezeExcite")
    gates = [sk.input_statistics(model, groups, [inputs], seed=seed).gates for seed in (0, 0, 1)]
    for name, values in gates[0].items():
        assert torch.equal(values, gates[1][name])
    assert any(not torch.equal(values, gates[2][name]) for name, values in gates[0].items())


def test_some_positions_stand_for_all() -> None:
    model, groups, inputs = by_hand("SqueezeExcite", n=128)
    every = sk.input_statistics(model, groups, [inputs], gradients=False, most_positions=EVERYWHERE)
    some = sk.input_statistics(model, groups, [inputs], gradients=False, most_positions=16)
    for tensor, layer in some.layers.items():
        moments = every.layers[tensor].moments
        assert layer.moments.rows <= 128 * max(16, layer.reader.columns // 8)
        assert float((layer.moments.covariance - moments.covariance).norm() / moments.covariance.norm()) < 0.4


def test_the_model_and_the_random_state_stay_as_they_are() -> None:
    model, groups, inputs = by_hand("SqueezeExcite")
    model.train()
    next(model.children()).eval()
    next(model.parameters()).requires_grad_(False)
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    with torch.no_grad():
        found = sk.input_statistics(model, groups, [inputs])
    assert any(bool(values.any()) for values in found.gates.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * (
        len([*model.parameters()]) - 1
    )
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(x.requires_grad for x in inputs)


class Doubling(nn.Linear):
    """Does not use its weight as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


@pytest.mark.parametrize("computed", [True, False])
def test_layers_whose_weight_is_shared_or_computed_are_left_out(computed: bool) -> None:
    torch.manual_seed(0)
    other = Doubling(6, 6) if computed else nn.Linear(6, 6)
    model = nn.Sequential(
        *(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), other, nn.ReLU(), nn.Linear(6, 3))
    )
    if not computed:
        other.weight = model[2].weight
    model, inputs = model.double().eval(), (images(N_IMAGES, 5),)
    groups = find_groups(model, inputs[0][:2])
    found = sk.input_statistics(model, groups, [inputs])
    readers = {member.tensor for group in groups.free for member in group.of_role("consumer")}
    assert set(found.left_out) | set(found.layers) == readers
    assert not set(found.left_out) & set(found.layers)
    assert "6.weight" in found.layers
    assert set(found.left_out) == ({"4.weight"} if computed else {"2.weight"})
    assert all("computed, shared" in reason for reason in found.left_out.values())
    plan = sk.make_plan(
        groups,
        {g.name: torch.arange(g.n_channels) < g.n_channels - 1 for g in groups.free if g.n_channels > 1},
    )
    repaired = sk.repair_weights(model, plan, found)
    assert sk.verify_cut(repaired, sk.apply_plan(repaired, plan), plan).max_rel < 1e-9


class InPlace(nn.Module):
    """Its input, its activations and its sums are overwritten."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)
        self.act = nn.ReLU(inplace=in_place)

    def forward(self, x: Tensor) -> Tensor:
        x = x.sub_(0.5).mul_(2.0) if self.in_place else (x - 0.5) * 2.0
        x = self.act(self.first(x))
        y = self.second(input=x)
        x = x.add_(y) if self.in_place else x + y
        x = F.relu(x, inplace=self.in_place)
        return self.head(x.mean((2, 3)))


def test_what_is_overwritten_is_seen_as_it_was_read() -> None:
    torch.manual_seed(0)
    plain = InPlace(False).double().eval()
    overwriting = InPlace(True).double().eval()
    overwriting.load_state_dict(plain.state_dict())
    x = images(N_IMAGES, 3, 6, 6)
    kept = x.clone()
    groups = find_groups(plain, x[:2])
    wanted = sk.input_statistics(plain, groups, [x])
    found = sk.input_statistics(overwriting, groups, [x])
    assert torch.equal(x, kept)
    for tensor, layer in wanted.layers.items():
        assert torch.allclose(layer.moments.covariance, found.layers[tensor].moments.covariance)
        assert torch.allclose(layer.sensitivity, found.layers[tensor].sensitivity)
    for name, values in wanted.gates.items():
        assert torch.allclose(values, found.gates[name])


def test_layers_that_do_not_run_are_named() -> None:
    class Idle(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](self[1](self[0](x)))

    model = Idle(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
    groups = find_groups(model, images(2, 5))

    class Skips(Idle):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self[1](self[0](x)), self[2].weight, self[2].bias)

    model.__class__ = Skips
    found = sk.input_statistics(model, groups, [images(8, 5)])
    assert dict(found.left_out) == {"2.weight": "it does not run"}


def test_a_model_whose_outputs_have_no_gradient_has_no_gates() -> None:
    class Detached(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    model = Detached(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
    groups = find_groups(model, images(2, 5))
    found = sk.input_statistics(model, groups, [images(8, 5)])
    assert "2.weight" in found.layers
    assert not any(values.any() for values in found.gates.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_does_not_reach_the_sums(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten()).eval()
    x = images(32, 3, 7, 7) + 1
    groups = find_groups(model, x[:2].float())
    exact = sk.input_statistics(copy.deepcopy(model).double(), groups, [x], most_positions=EVERYWHERE)
    found = sk.input_statistics(model.to(dtype), groups, [x.to(dtype)], most_positions=EVERYWHERE)
    ours, theirs = (one.layers["2.weight"].moments for one in (found, exact))
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    assert float((ours.covariance - theirs.covariance).norm() / theirs.covariance.norm()) < tolerance


def test_what_cannot_be_measured_is_refused() -> None:
    model, groups, _ = by_hand("SqueezeExcite")
    with pytest.raises(InputError, match=r"no images.*at least one batch"):
        sk.input_statistics(model, groups, [])
    with pytest.raises(ModelError, match=r"does not run on images of shape \[\(4, 7, 9, 9\)\]"):
        sk.input_statistics(model, groups, [images(4, 7, 9, 9)])
