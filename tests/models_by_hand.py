"""Small models, each named after the trait that makes it hard to cut, with an example input for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekit.groups import ChannelGroups
from sparsekit.plan import PrunePlan

Example = tuple[nn.Module, tuple[Tensor, ...]]


class Residual(nn.Module):
    """Two convolutions add to a stream: stem and branch output share their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.outer, self.outer_norm = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        stream = F.relu(self.stem_norm(self.stem(images)))
        branch = self.outer_norm(self.outer(F.relu(self.inner_norm(self.inner(stream)))))
        return self.head(F.relu(stream + branch).mean((2, 3)))


class Concatenation(nn.Module):
    """The second branch's channels start behind the first's in what reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 6, 1)
        self.reader = nn.Conv2d(10, 5, 3, padding=1)
        self.head = nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        both = torch.cat([self.left(images), self.right(images)], 1)
        return self.head(F.relu(self.reader(F.relu(both))).mean((2, 3)))


class ChunkGate(nn.Module):
    """A gated linear unit: output c of the first half multiplies output c of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 12), nn.Linear(6, 3)

    def forward(self, features: Tensor) -> Tensor:
        value, gate = self.up(features).chunk(2, -1)
        return self.down(value * F.gelu(gate))


class SplitGate(nn.Module):
    """As ChunkGate, for maps, by `split`, behind a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.Conv2d(6, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        both = self.norm(self.up(images))
        value, gate = both.split(both.shape[1] // 2, 1)
        return self.down(value * gate.sigmoid())


class FlattenBeforeLinear(nn.Module):
    """Every channel of the map owns height x width columns of the linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6 * 4 * 4, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.max_pool2d(F.relu(self.norm(self.conv(images))), 2).flatten(1))


class Transposed(nn.Module):
    """Transposed convolutions hold their input channels first; one follows another."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 8, 2, stride=2)
        self.up_norm = nn.BatchNorm2d(8)
        self.further = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        grown = F.relu(self.up_norm(self.up(F.relu(self.down(images)))))
        return self.head(F.relu(self.further(grown)))


class UsedTwice(nn.Module):
    """One convolution in two places of one stream, one normalisation each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = (
            nn.Conv2d(3, 6, 3),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Conv2d(6, 2, 1),
        )
        self.last = nn.Conv2d(2, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        stream = F.relu(self.stem(images))
        return self.last(F.relu(self.head(F.relu(self.shared(F.relu(self.shared(stream)))))))


class TiedWeights(nn.Module):
    """Two linear layers are the same parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.head, self.last = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, features: Tensor) -> Tensor:
        return self.last(F.relu(self.head(F.relu(self.second(F.relu(self.first(features)))))))


class TwoInTwoOut(nn.Module):
    """Two inputs of different sizes meet in a sum; two heads read it."""

    def __init__(self) -> None:
        super().__init__()
        self.images = nn.Conv2d(3, 6, 3)
        self.numbers = nn.Linear(4, 6)
        self.classes, self.boxes = nn.Linear(6, 3), nn.Linear(6, 4)

    def forward(self, images: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        mixed = F.gelu(self.images(images).mean((2, 3)) + self.numbers(numbers))
        return self.classes(mixed), self.boxes(mixed)


class Depthwise(nn.Module):
    """Expand, one filter a channel, project (MobileNet's block)."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.expand_norm = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.depthwise_norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.project = nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        expanded = F.hardswish(self.expand_norm(self.expand(images)))
        return self.project(F.hardswish(self.depthwise_norm(self.depthwise(expanded))))


class SqueezeExcite(nn.Module):
    """Channels are multiplied by a gate computed from all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.norm(self.conv(images)))
        gate = self.excite(F.relu(self.squeeze(maps.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head(maps * gate)


class LayerNormMlp(nn.Module):
    """A transformer's MLP: its hidden channels are free, the normalised stream is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.up, self.down, self.head = nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.embed(tokens)
        return self.head((stream + self.down(F.gelu(self.up(self.norm(stream))))).mean(1))


class GroupedConv(nn.Module):
    """A convolution of two groups between plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.grouped, self.after = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 3, groups=2),
            nn.Conv2d(8, 6, 1),
        )
        self.head = nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.after(F.relu(self.grouped(F.relu(self.before(images)))))).mean((2, 3)))


class Attention(nn.Module):
    """Scaled dot-product attention of two heads, written out, and an MLP behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.head = nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        q, k, v = self.qkv(tokens).reshape(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        return self.head(F.relu(self.up(self.proj(mixed))).mean(1))


_IMAGES = (2, 3, 10, 10)
_SHAPES: dict[Callable[[], nn.Module], tuple[tuple[int, ...], ...]] = {
    Residual: (_IMAGES,),
    Concatenation: (_IMAGES,),
    ChunkGate: ((2, 5),),
    SplitGate: (_IMAGES,),
    FlattenBeforeLinear: (_IMAGES,),
    Transposed: (_IMAGES,),
    UsedTwice: (_IMAGES,),
    TiedWeights: ((2, 6),),
    TwoInTwoOut: (_IMAGES, (2, 4)),
    Depthwise: (_IMAGES,),
    SqueezeExcite: (_IMAGES,),
    LayerNormMlp: ((2, 7, 4),),
    GroupedConv: (_IMAGES,),
    Attention: ((2, 5, 8),),
}
BY_HAND: dict[str, Callable[[], nn.Module]] = {maker.__name__: maker for maker in _SHAPES}  # type: ignore[attr-defined]


def build(name: str, seed: int = 0) -> Example:
    """A model of `BY_HAND`, or of timm's at 64 px with 5 classes, in float64 and eval mode, and its inputs.

    Norms get random scales, shifts and statistics: fresh ones would hide a mistake in their order.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name in BY_HAND:
            model, shapes = BY_HAND[name](), _SHAPES[BY_HAND[name]]
        else:
            import timm

            model = timm.create_model(name, num_classes=5, **({"img_size": 64} if "vit" in name else {}))
            shapes = ((2, 3, 64, 64),)
        model = model.double().eval()
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.3, 0.3)
                nn.init.uniform_(module.running_mean, -0.3, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):  # a layer scale of 1e-6 hides its whole branch
                nn.init.uniform_(parameter, 0.5, 1.5)
        return model, tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def random_masks(groups: ChannelGroups, share: float, seed: int = 0) -> dict[str, Tensor]:
    """Keep about `share` of each free group's channels, at random, and at least one."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for group in groups.free:
        kept = max(1, round(share * group.n_channels))
        masks[group.name] = torch.zeros(group.n_channels, dtype=torch.bool)
        masks[group.name][torch.randperm(group.n_channels, generator=generator)[:kept]] = True
    return masks


def zero_dropped_(model: nn.Module, plan: PrunePlan) -> None:
    """Set everything that produces a dropped channel to zero, as a penalty would; the consumers are left alone."""
    state = model.state_dict()
    for cut in plan.cuts:
        if cut.role not in ("consumer", "size") and not cut.tensor.endswith(("running_mean", "running_var")):
            state[cut.tensor].index_fill_(cut.dim, torch.tensor(cut.drop), 0)
