"""Which operators are known, and what becomes of channels that run through the less common ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision.ops
from plain import find_groups
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekit as sk
from sparsekit.coupling.rules import table
from sparsekit.coupling.rules.pointwise import pointwise

CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def layer(inputs: int, outputs: int, dims: int = 2) -> nn.Module:
    convolution = CONVOLUTION[dims](inputs, outputs, 3, padding=1)
    return nn.Sequential(convolution, NORM[dims](outputs), nn.ReLU())


class Between(nn.Module):
    """A function, with layers of its own, between one layer that makes channels and one that reads them."""

    def __init__(
        self, run: Callable[[Any, Tensor], Tensor], dims: int = 2, made: int = 8, read: int = 8, **own: Any
    ) -> None:
        super().__init__()
        self.run = run
        self.made, self.reader = layer(3, made, dims), CONVOLUTION[dims](read, 2, 1)
        for name, value in own.items():
            setattr(self, name, value)

    def forward(self, images: Tensor) -> Tensor:
        return self.reader(self.run(self, self.made(images)))


def cut_and_verified(model: nn.Module, image: Tensor) -> sk.ChannelGroups:
    """The groups of a model, once a random cut of all that is free was verified."""
    groups = find_groups(model.eval(), image)
    masks = {}
    for number, group in enumerate(groups.free):
        generator = torch.Generator().manual_seed(number)
        masks[group.name] = torch.ones(group.n_channels, dtype=torch.bool)
        masks[group.name][torch.randperm(group.n_channels, generator=generator)[: 1 + number % 3]] = False
    plan = sk.make_plan(groups, masks)
    assert sk.verify_cut(model, sk.apply_plan(model, plan), plan).max_rel < 1e-5
    return groups


def made_by(groups: sk.ChannelGroups, prefix: str = "made") -> list[sk.ChannelGroup]:
    return [g for g in groups if any(m.module.startswith(prefix) for m in g.of_role("producer"))]


# ------------------------------------------------------------------------------------------ the table of rules


def _operators() -> Iterator[tuple[str, Any]]:
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            if overload != "hacked_twin":
                yield name, getattr(packet, overload)


def test_what_torch_calls_pointwise_works_element_by_element_here() -> None:
    own = {name for rule, names in table.KINDS.items() if rule is not pointwise for name in names.split()}
    tagged = [(name, one) for name, one in _operators() if torch.Tag.pointwise in one.tags]
    assert len(tagged) > 300
    others = {name for name, one in tagged if table.rule_for(name, one) is not pointwise}
    assert {name.rstrip("_") for name in others} <= own


def test_every_name_in_the_table_is_an_operator_once() -> None:
    names = [name for names in table.KINDS.values() for name in names.split()]
    assert len(names) == len(set(names))
    known = (torch.ops.aten, torch.ops.torchvision)
    assert {n for n in names if not any(hasattr(one, n) for one in known)} == table.OURS


# ------------------------------------------------------------------------------------------ map by map


def _segnet(self: Any, x: Tensor) -> Tensor:
    pooled, indices = getattr(F, f"max_pool{x.dim() - 2}d")(x, 2, return_indices=True)
    return getattr(F, f"max_unpool{x.dim() - 2}d")(self.deep(pooled), indices, 2)


def _transformer(self: Any, x: Tensor) -> Tensor:
    dims = x.dim() - 2
    theta = self.locate(x.flatten(2).mean(2)).view(-1, dims, dims + 1)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


def _fourier(self: Any, x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.filter)
    real, imaginary = self.mix(torch.cat([spectrum.real, spectrum.imag], 1)).chunk(2, 1)
    return x + torch.fft.irfft2(torch.complex(real, imaginary), s=x.shape[-2:], norm="ortho")


def _pooled_in_space(self: Any, x: Tensor) -> Tensor:
    x = F.interpolate(F.adaptive_max_pool3d(x, 3), scale_factor=2, mode="trilinear", align_corners=False)
    x = F.interpolate(F.avg_pool3d(x, 3, 1, 1), scale_factor=2, mode="nearest-exact")
    x = F.interpolate(F.adaptive_avg_pool3d(x, 4), scale_factor=2.0)
    return F.max_pool3d(nn.ReplicationPad3d(1)(nn.ReflectionPad3d(1)(x)), 3, 1, 1)


def _pooled_in_time(self: Any, x: Tensor) -> Tensor:
    x = F.lp_pool1d(F.max_pool1d(F.avg_pool1d(x, 3, 1, 1), 3, 1, 1), 2.0, 3, 1)
    return F.interpolate(F.adaptive_avg_pool1d(x, 5), scale_factor=2, mode="linear")


def _statistics(self: Any, x: Tensor) -> Tensor:
    deviation, mean = torch.std_mean(x, (2, 3), keepdim=True)
    x = (x - mean) / (deviation + 1) + x.flatten(2).kthvalue(3, -1)[0][..., None, None]
    x = x.cumsum(2) + x.cummax(3)[0] + x.logcumsumexp(2) + x.topk(8, dim=3)[0] + x.sort(dim=2, stable=True)[0]
    return torch.roll(x, (1, 2), (2, 3)) - x.flatten(2).median(-1)[0][..., None, None]


def _regions(self: Any, x: Tensor) -> Tensor:
    boxes = torch.tensor([[0.0, 0, 0, 5, 5], [0, 1, 1, 7, 7]], dtype=x.dtype)
    pooled = torchvision.ops.roi_align(x, boxes, (2, 2)) + torchvision.ops.roi_pool(x, boxes, (2, 2))
    return pooled.repeat(1, 1, 1, 4)


def _tokens(self: Any, x: Tensor) -> Tensor:
    """Tokens are chosen, moved, summed up and overwritten by their numbers; channels are not."""
    tokens = x.flatten(2).transpose(1, 2)
    best = self.score(tokens).squeeze(-1).topk(16, 1)[1].unsqueeze(-1)
    chosen = tokens.gather(1, best.expand(-1, -1, tokens.shape[-1])) + torch.take_along_dim(tokens, best, 1)
    chosen = chosen + tokens.gather(1, best.repeat(1, 1, tokens.shape[-1]))
    tokens = tokens.clone()
    tokens[:, torch.arange(64) % 4 == 0] = self.mask_token
    tokens[:, 2] = tokens[:, 3] * 2
    tokens[:, [5, 6]] += tokens[:, [6, 7]]
    slots = torch.arange(64) % 16
    summed = torch.zeros_like(chosen).index_add(1, slots, tokens)
    summed = summed.scatter_add(1, slots[None, :, None].expand_as(tokens), tokens)
    marked = (torch.arange(16) % 3 == 0)[None, :, None]
    summed = summed.masked_scatter(
        marked.expand_as(summed), self.embed(chosen)[:, :6].reshape(-1, x.shape[1])
    )
    summed = torch.slice_scatter(summed, chosen[:, :4], 1, 0, 4)
    summed = torch.select_scatter(summed, chosen[:, 1], 1, 0).index_copy(1, slots[:4], chosen[:, 4:8])
    return summed.transpose(1, 2).reshape(x.shape[0], -1, 4, 4)


def _gated(self: Any, x: Tensor) -> Tensor:
    return F.channel_shuffle(F.glu(x, 1), 2)


MAP_BY_MAP: dict[str, tuple[Callable[[], Between], int, dict[str, int]]] = {
    "segnet": (lambda: Between(_segnet, deep=layer(8, 8)), 2, {"made": 8}),
    "segnet in 3d": (lambda: Between(_segnet, 3, deep=layer(8, 8, 3)), 3, {"made": 8}),
    "spatial transformer": (lambda: Between(_transformer, locate=nn.Linear(8, 6)), 2, {"made": 8}),
    "the same in 3d": (lambda: Between(_transformer, 3, locate=nn.Linear(8, 12)), 3, {"made": 8}),
    "fourier": (
        lambda: Between(_fourier, mix=nn.Conv2d(16, 16, 1), filter=nn.Parameter(torch.randn(8, 8, 5, 2))),
        2,
        {"made": 8},
    ),
    "pooling in 3d": (lambda: Between(_pooled_in_space, 3), 3, {"made": 8}),
    "pooling in 1d": (lambda: Between(_pooled_in_time, 1), 1, {"made": 8}),
    "statistics": (lambda: Between(_statistics), 2, {"made": 8}),
    "regions": (lambda: Between(_regions), 2, {"made": 8}),
    "tokens": (
        lambda: Between(
            _tokens, score=nn.Linear(8, 1), embed=nn.Linear(8, 8), mask_token=nn.Parameter(torch.randn(8))
        ),
        2,
        {"made": 8, "embed": 8},
    ),
    # Channel c is gated by c + 8, and shuffled in two parts: of 16 channels four kinds are left.
    "gated": (lambda: Between(_gated, made=16), 2, {"made": 4}),
}


@pytest.mark.parametrize("name", MAP_BY_MAP)
def test_what_works_map_by_map_leaves_channels_free(name: str) -> None:
    make, dims, free = MAP_BY_MAP[name]
    torch.manual_seed(0)
    groups = cut_and_verified(make(), torch.randn(1, 3, *[8] * dims))
    assert {
        prefix: sum(g.n_channels for g in made_by(groups, prefix) if not g.frozen) for prefix in free
    } == free


def test_what_says_where_to_sample_stays() -> None:
    torch.manual_seed(0)
    groups = cut_and_verified(Between(_transformer, locate=nn.Linear(8, 6)), torch.randn(1, 3, 8, 8))
    assert {g.frozen for g in made_by(groups, "locate")} == {"it says where to read or write"}


@pytest.mark.parametrize(
    ("offsets", "conv_groups", "free"), [(1, 1, 8), (2, 1, 4), (1, 2, 4), (1, 8, 8), (2, 2, 0)]
)
def test_parts_with_offsets_of_their_own_lose_equally_many_channels(
    offsets: int, conv_groups: int, free: int
) -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.deformed(x, self.offset(x), torch.sigmoid(self.weight(x)))

    torch.manual_seed(0)
    model = Between(
        run,
        offset=nn.Conv2d(8, 18 * offsets, 3, padding=1),
        weight=nn.Conv2d(8, 9 * offsets, 3, padding=1),
        deformed=torchvision.ops.DeformConv2d(8, 8, 3, padding=1, groups=conv_groups),
    )
    groups = cut_and_verified(model, torch.randn(1, 3, 8, 8))
    assert sum(g.n_channels for g in made_by(groups) if not g.frozen) == free
    assert any(m.module == "deformed" for g in groups.free for m in g.members)
    assert all(g.frozen for prefix in ("offset", "weight") for g in made_by(groups, prefix))


def test_the_bins_of_position_sensitive_pooling_go_together() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        boxes = torch.tensor([[0.0, 0, 0, 5, 5], [0, 1, 1, 7, 7]], dtype=x.dtype)
        return torchvision.ops.ps_roi_align(x, boxes, (2, 2)) + torchvision.ops.ps_roi_pool(x, boxes, (2, 2))

    torch.manual_seed(0)
    groups = cut_and_verified(Between(run, made=32), torch.randn(1, 3, 8, 8))
    (group,) = made_by(groups)
    assert not group.frozen
    assert group.of_role("producer")[0].positions[:8] == tuple(range(8))
    assert (group.n_channels, group.width) == (8, 1)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda self, x: F.local_response_norm(x, 3), "local_response_norm mixes channels"),
        (
            lambda self, x: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=8, dim=1),
            "a Fourier transform over it",
        ),
        (lambda self, x: torch.roll(x, 1, 1), "by a fixed number of places"),
        (lambda self, x: x[:, [0, 2, 5, 1, 3, 4, 6, 7]], "by a fixed number of places"),
        (lambda self, x: x.topk(8, dim=1)[0], "topk mixes channels"),
        (
            lambda self, x: torch.cdist(*[x.permute(0, 2, 3, 1)] * 2).permute(0, 3, 1, 2),
            "cdist mixes channels",
        ),
        (lambda self, x: nn.FractionalMaxPool2d(2, output_size=4)(x), "draws regions for each channel"),
        (lambda self, x: F.avg_pool3d(x[:, None], 3, 1, 1)[:, 0], "avg_pool3d mixes channels"),
        (lambda self, x: x.gather(2, torch.zeros(1, 8, 8, 8, dtype=torch.int64)), "a trial cut failed"),
        (lambda self, x: x.index_fill(1, torch.tensor([0]), 0.0), "by a fixed number of places"),
    ],
)
def test_what_mixes_or_counts_channels_keeps_them_and_says_so(run: Any, reason: str) -> None:
    torch.manual_seed(0)
    (group,) = made_by(find_groups(Between(run), torch.randn(1, 3, 8, 8)))
    assert reason in group.frozen


# ------------------------------------------------------------------------------------------ fake quantisation


def _prepared() -> nn.Module:
    import torch.ao.quantization as quantization

    torch.manual_seed(0)
    body = nn.Sequential(layer(3, 8), layer(8, 8), nn.Flatten(), nn.Linear(8 * 16, 4))
    model = nn.Sequential(quantization.QuantStub(), body, quantization.DeQuantStub()).train()
    vars(model)["qconfig"] = quantization.get_default_qat_qconfig("x86")
    quantization.fuse_modules_qat(model, [[f"1.{i}.{j}" for j in range(3)] for i in range(2)], inplace=True)
    prepared: nn.Module = quantization.prepare_qat(model)
    prepared(torch.randn(4, 3, 4, 4))
    return prepared.eval()


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning", "ignore::UserWarning")
def test_a_model_prepared_for_int8_is_cut_once_its_observers_are_off() -> None:
    import torch.ao.quantization as quantization

    model = _prepared()
    watched = find_groups(model, torch.randn(1, 3, 4, 4))
    assert not watched.free
    assert all("disable_observer" in group.frozen for group in watched)
    groups = cut_and_verified(model.apply(quantization.disable_observer), torch.randn(1, 3, 4, 4))
    assert sum(g.n_channels for g in groups.free) == 16
    plan = sk.make_plan(groups, {g.name: torch.arange(8) % 2 == 0 for g in groups.free})
    cut = sk.apply_plan(model, plan)
    # The ranges of the weights are cut too, so that it still becomes a model of eight bits.
    image = torch.randn(1, 3, 4, 4)
    with torch.no_grad():
        assert torch.allclose(quantization.convert(cut)(image), cut(image), atol=0.05)
