"""Networks as people write them by hand, in small: what `networks.py` cuts beside those of libraries.

Each is a kind of code that is common outside the model collections: sizes as numbers in reshapes, skip connections
that are joined, norms over groups of channels, recurrent layers, a time or a caption beside the image, heads of which
one pass runs only one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, *, act: bool = True) -> nn.Sequential:
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([nn.ReLU()] if act else []))


class LeNet(nn.Module):
    """Flattens to a number that is written in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 5 * 5, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x).relu(), 2)
        x = F.max_pool2d(self.conv2(x).relu(), 2)
        x = x.view(-1, 16 * 5 * 5)
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


class PaddedBlock(nn.Module):
    """A block of CIFAR's ResNets with shortcuts of option A: subsampled, and padded with zero channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = _conv(inputs, outputs, 3, stride), _conv(outputs, outputs, act=False)
        self.stride, self.missing = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        if self.missing:
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride],
                (0, 0, 0, 0, self.missing // 2, self.missing - self.missing // 2),
            )
        return (x + y).relu()


class CifarResNet(nn.Module):
    """ResNet-14 for CIFAR with option A."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
        self.stem = _conv(3, 16)
        self.blocks = nn.Sequential(*(PaddedBlock(*sizes) for sizes in widths))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class UNet(nn.Module):
    """Two levels, transposed convolutions upwards, skip connections joined."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = _conv(3, 16), _conv(16, 32), _conv(32, 64)
        self.up2, self.up1 = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.join2, self.join1, self.out = _conv(64, 32), _conv(32, 16), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        y = self.middle(F.max_pool2d(two, 2))
        y = self.join2(torch.cat([self.up2(y), two], 1))
        return self.out(self.join1(torch.cat([self.up1(y), one], 1)))


class Edsr(nn.Module):
    """Super-resolution: residual blocks without norms, a pixel shuffle at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.tail = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 12, 3, padding=1)
        self.bodies = nn.ModuleList(
            nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        y = x
        for body in self.bodies:
            y = y + 0.1 * body(y)
        return F.pixel_shuffle(self.tail(x + y), 2)


class Generator(nn.Module):
    """A decoder from a vector, its first map written in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(32, 64 * 4 * 4), nn.BatchNorm2d(64)
        self.up1, self.norm1 = nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32)
        self.up2 = nn.ConvTranspose2d(32, 3, 4, 2, 1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.norm(self.first(z).view(-1, 64, 4, 4)).relu()
        return self.up2(self.norm1(self.up1(x)).relu()).tanh()


class CycleGenerator(nn.Module):
    """Reflection padding, instance norms, residual blocks, transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.ReflectionPad2d(3), nn.Conv2d(3, 16, 7), nn.InstanceNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1), nn.InstanceNorm2d(32), nn.ReLU(),
        )  # fmt: skip
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReflectionPad2d(1), nn.Conv2d(32, 32, 3), nn.InstanceNorm2d(32), nn.ReLU(),
                nn.ReflectionPad2d(1), nn.Conv2d(32, 32, 3), nn.InstanceNorm2d(32),
            )
            for _ in range(2)
        )  # fmt: skip
        self.up = nn.Sequential(
            nn.ConvTranspose2d(32, 16, 3, 2, 1, output_padding=1), nn.InstanceNorm2d(16), nn.ReLU(),
            nn.ReflectionPad2d(3), nn.Conv2d(16, 3, 7), nn.Tanh(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        for block in self.blocks:
            x = x + block(x)
        return self.up(x)


class Crnn(nn.Module):
    """Reads a line of text: maps become a sequence for two bidirectional LSTM layers."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(
            _conv(1, 16), nn.MaxPool2d(2), _conv(16, 32), nn.MaxPool2d(2), _conv(32, 32), nn.MaxPool2d((8, 1))
        )
        self.rnn = nn.LSTM(32, 24, num_layers=2, bidirectional=True)
        self.out = nn.Linear(48, 20)

    def forward(self, x: Tensor) -> Tensor:
        sequence, _ = self.rnn(self.maps(x).squeeze(2).permute(2, 0, 1))
        steps, batch, width = sequence.shape
        return self.out(sequence.view(steps * batch, width)).view(steps, batch, -1)


class GruHead(nn.Module):
    """A signal through convolutions and a GRU, of which the last state is read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(4, 32, 5, padding=2), nn.BatchNorm1d(32), nn.ReLU())
        self.gru, self.fc = nn.GRU(32, 32, batch_first=True), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.gru(self.conv(x).transpose(1, 2))
        return self.fc(state[-1])


class GroupNormNet(nn.Module):
    """Norms over groups of channels, of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 32, 3), nn.GroupNorm(8, 32)
        self.conv2, self.norm2 = nn.Conv2d(32, 32, 3), nn.GroupNorm(4, 32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        return self.fc(self.norm2(self.conv2(x)).relu().mean((2, 3)))


class TimedBlock(nn.Module):
    """A block of a diffusion network: the time is added between two normed convolutions."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(t))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))


class DiffusionUNet(nn.Module):
    """Predicts noise from an image and a step, which is a whole number."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        time = 4 * width
        self.width, self.t1, self.t2 = width, nn.Linear(width, time), nn.Linear(time, time)
        self.stem, self.out = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.one, self.down = TimedBlock(width, width, time), nn.Conv2d(width, width, 3, 2, 1)
        self.two, self.middle = TimedBlock(width, 2 * width, time), TimedBlock(2 * width, 2 * width, time)
        self.up, self.norm = TimedBlock(3 * width, width, time), nn.GroupNorm(8, width)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        half = self.width // 2
        rates = torch.exp(-math.log(10000.0) * torch.arange(half, device=x.device) / half)
        angles = step[:, None].to(x.dtype) * rates[None].to(x.dtype)
        t = self.t2(F.silu(self.t1(torch.cat([angles.cos(), angles.sin()], 1))))
        one = self.one(self.stem(x), t)
        y = self.middle(self.two(self.down(one), t), t)
        y = self.up(torch.cat([F.interpolate(y, scale_factor=2.0), one], 1), t)
        return self.out(F.silu(self.norm(y)))


class Siamese(nn.Module):
    """One network on two images; their distance is the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(3, 16), nn.MaxPool2d(2), _conv(16, 32), nn.AdaptiveAvgPool2d(1))
        self.embed, self.answer = nn.Linear(32, 24), nn.Linear(24, 1)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        a, b = (self.embed(self.body(x).flatten(1)) for x in (one, other))
        return self.answer((a - b).abs())


class SpatialTransformer(nn.Module):
    """Learns how to turn the image before it is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.where = nn.Sequential(_conv(3, 8, 3, 2), _conv(8, 10, 3, 2))
        self.angles = nn.Sequential(nn.Linear(10 * 64, 32), nn.ReLU(), nn.Linear(32, 6))
        self.body, self.fc = nn.Sequential(_conv(3, 16, 3, 2), _conv(16, 32, 3, 2)), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.angles(self.where(x).view(-1, 10 * 64)).view(-1, 2, 3)
        x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
        return self.fc(self.body(x).mean((2, 3)))


class SegNet(nn.Module):
    """Enlarges by the places of the largest values."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = _conv(3, 16), _conv(16, 32)
        self.up2, self.up1, self.out = _conv(32, 16), _conv(16, 16), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, first = F.max_pool2d(self.down1(x), 2, return_indices=True)
        x, second = F.max_pool2d(self.down2(x), 2, return_indices=True)
        x = self.up2(F.max_unpool2d(x, second, 2))
        return self.out(self.up1(F.max_unpool2d(x, first, 2)))


class Cbam(nn.Module):
    """Attention over channels, then over places, by means and largest values of all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.second, self.fc = _conv(3, 32), _conv(32, 32), nn.Linear(32, 10)
        self.mlp = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32))
        self.places = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        gate = (self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))).sigmoid()
        x = x * gate[:, :, None, None]
        summary = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.fc(self.second(x * self.places(summary).sigmoid()).mean((2, 3)))


class TwoHeads(nn.Module):
    """Classifies, and with a flag segments; training runs an auxiliary head."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = _conv(3, 16, 3, 2), _conv(16, 32, 3, 2)
        self.classes, self.maps = nn.Linear(32, 10), nn.Conv2d(32, 4, 1)
        self.auxiliary = nn.Sequential(
            _conv(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
        )

    def forward(self, x: Tensor, segment: bool = False) -> Any:
        first = self.one(x)
        second = self.two(first)
        if segment:
            return self.maps(second)
        answer = self.classes(second.mean((2, 3)))
        return (answer, self.auxiliary(first)) if self.training else answer


class HandSwish(nn.Module):
    """An inverted bottleneck as other libraries write it: a swish by hand, a squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 64, 1)
        self.depthwise, self.norm = nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.BatchNorm2d(64)
        self.reduce, self.grow = nn.Conv2d(64, 8, 1), nn.Conv2d(8, 64, 1)
        self.project, self.fc = nn.Conv2d(64, 16, 1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        def swish(values: Tensor) -> Tensor:
            return values * torch.sigmoid(values)

        x = swish(self.stem(x))
        y = swish(self.norm(self.depthwise(swish(self.expand(x)))))
        y = y * torch.sigmoid(self.grow(swish(self.reduce(y.mean((2, 3), keepdim=True)))))
        return self.fc((x + self.project(y)).mean((2, 3)))


class WrittenAttention(nn.Module):
    """A vision transformer of two blocks, its sizes as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.places = nn.Conv2d(3, 48, 4, 4), nn.Parameter(torch.randn(1, 64, 48) * 0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(48) for _ in range(4))
        self.qkv = nn.ModuleList(nn.Linear(48, 144) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(48, 48) for _ in range(2))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48)) for _ in range(2)
        )
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        b, n, _ = x.shape
        for i in range(2):
            q, k, v = self.qkv[i](self.norms[2 * i](x)).reshape(b, n, 3, 4, 12).permute(2, 0, 3, 1, 4)
            attention = (q @ k.transpose(-2, -1) * 12**-0.5).softmax(-1)
            x = x + self.out[i]((attention @ v).transpose(1, 2).reshape(b, n, 48))
            x = x + self.mlp[i](self.norms[2 * i + 1](x))
        return self.head(x.mean(1))


class CnnTransformer(nn.Module):
    """Convolutions, then torch's own transformer layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 32, 3, 2), _conv(32, 48, 3, 2))
        layer = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


class Captions(nn.Module):
    """An image and the ids of a caption; their likeness is the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(_conv(3, 16, 3, 2), _conv(16, 32, 3, 2))
        self.table, self.text = nn.Embedding(100, 24), nn.Sequential(nn.Linear(24, 48), nn.ReLU())
        self.to_common, self.text_to_common = nn.Linear(32, 16), nn.Linear(48, 16)

    def forward(
        self, *, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> dict[str, Tensor]:
        image = self.to_common(self.image(pixel_values).mean((2, 3)))
        words = self.text(self.table(input_ids)) * attention_mask[..., None]
        text = self.text_to_common(words.sum(1) / attention_mask.sum(1, keepdim=True))
        return {"likeness": (image * text).sum(-1), "image": image}


class Volume(nn.Module):
    """A classifier of volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv3d(1, 8, 3, padding=1), nn.Conv3d(8, 16, 3, padding=1)
        self.norm, self.fc = nn.BatchNorm3d(8), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(self.norm(self.one(x)).relu(), 2)
        x = F.interpolate(self.two(x).relu(), scale_factor=2.0, mode="trilinear")
        return self.fc(F.adaptive_avg_pool3d(x, 1).flatten(1))


class SpectralDiscriminator(nn.Module):
    """Filters divided by their largest singular value."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.layers = nn.Sequential(
            norm(nn.Conv2d(3, 16, 4, 2, 1)), nn.LeakyReLU(0.2), norm(nn.Conv2d(16, 32, 4, 2, 1)), nn.LeakyReLU(0.2),
            nn.Conv2d(32, 1, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
