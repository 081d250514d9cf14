"""Small models, each named after the trait that makes it hard to cut, with an example input for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekit.structure.groups import ChannelGroups
from sparsekit.structure.plan import PrunePlan

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


class GroupedConvOfFour(nn.Module):
    """Four blocks of a grouped convolution between 1x1 convolutions, a BatchNorm behind: blocks go as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.before_norm = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.grouped_norm = nn.Conv2d(8, 12, 3, groups=4, bias=False), nn.BatchNorm2d(12)
        self.after = nn.Conv2d(12, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.before_norm(self.before(images)))
        return self.after(F.relu(self.grouped_norm(self.grouped(maps))))


class ChannelShuffle(nn.Module):
    """Channels of two halves are interleaved (ShuffleNet): the code halves, so one goes from each half."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3), nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.before(images))
        batch, channels, height, width = maps.shape
        shuffled = maps.reshape(batch, 2, channels // 2, height, width).transpose(1, 2).flatten(1, 2)
        return self.head(F.relu(self.after(shuffled)).mean((2, 3)))


class HierarchicalSplit(nn.Module):
    """Parts as wide as an attribute says run through convolutions of their own, adding the one before (Res2Net)."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 4
        self.expand, self.expand_norm = nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.project, self.head = nn.Conv2d(12, 6, 1), nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        parts = torch.split(F.relu(self.expand_norm(self.expand(images))), self.width, 1)
        first = F.relu(self.first(parts[0]))
        second = F.relu(self.second(first + parts[1]))
        joined = self.project(torch.cat([first, second, parts[2]], 1))
        return self.head(F.relu(joined).mean((2, 3)))


class Ghost(nn.Module):
    """Cheap copies of channels join them, and only the first `n_channels` of both are used (GhostNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.n_channels = 6
        self.primary, self.cheap = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.reader, self.head = nn.Conv2d(6, 5, 1), nn.Linear(5, 2)

    def forward(self, images: Tensor) -> Tensor:
        primary = F.relu(self.primary(images))
        both = torch.cat([primary, F.relu(self.cheap(primary))], 1)
        return self.head(F.relu(self.reader(both[:, : self.n_channels])).mean((2, 3)))


def attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """(batch, heads, length, width) each; heads are laid side by side again: (batch, length, heads x width)."""
    logits = queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5 + bias
    return (logits.softmax(-1) @ values).transpose(1, 2).flatten(2)


class AttentionOfNamedSizes(nn.Module):
    """Heads and their width are attributes; queries, keys and values come from one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 2
        self.qkv, self.proj, self.head = nn.Linear(6, 24), nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, _ = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, length, 3, self.num_heads, self.head_dim)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.head(F.relu(self.proj(attend(queries, keys, values))).mean(1))


class AttentionOfSeparateLayers(nn.Module):
    """Queries, keys and values have a layer each; how they are joined again is computed from the attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 2
        self.queries, self.keys, self.values = nn.Linear(6, 8), nn.Linear(6, 8, bias=False), nn.Linear(6, 8)
        self.proj, self.head = nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, _ = tokens.shape
        shape = (batch, length, self.num_heads, self.head_dim)
        layers = (self.queries, self.keys, self.values)
        queries, keys, values = (layer(tokens).view(shape).transpose(1, 2) for layer in layers)
        mixed = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)
        mixed = mixed.reshape(batch, length, self.num_heads * self.head_dim)
        return self.head(F.relu(self.proj(mixed)).mean(1))


class AttentionOfComputedSizes(nn.Module):
    """The width of a head is computed from the width of the input, which stays when a head goes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj, self.head = nn.Linear(8, 24), nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        b, n, c = tokens.shape
        qkv = self.qkv(tokens).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2]).transpose(1, 2).reshape(b, n, c)
        return self.head(F.relu(self.proj(mixed)).mean(1))


class AttentionWithPositionTable(nn.Module):
    """A table of relative positions, looked up by a buffer of indices, has one column for each head (Swin, BEiT)."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 2
        self.qkv, self.proj, self.head = nn.Linear(6, 24), nn.Linear(8, 10), nn.Linear(10, 3)
        self.table = nn.Parameter(torch.randn(9, 4))
        places = torch.arange(5)
        self.register_buffer("index", places[:, None] - places[None, :] + 4)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, _ = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, length, 3, self.num_heads, self.head_dim)
        bias = self.table[self.index.flatten()].view(length, length, -1).permute(2, 0, 1).contiguous()
        mixed = attend(*qkv.permute(2, 0, 3, 1, 4).unbind(0), bias.unsqueeze(0))
        return self.head(F.relu(self.proj(mixed)).mean(1))


class AttentionWithNormedHeads(nn.Module):
    """Queries and keys of a head are normalised over its width: one norm serves all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 3
        self.qkv, self.proj, self.head = nn.Linear(6, 36), nn.Linear(12, 10), nn.Linear(10, 3)
        self.queries_norm, self.keys_norm = nn.LayerNorm(3), nn.LayerNorm(3)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, _ = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, length, 3, self.num_heads, self.head_dim)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = attend(self.queries_norm(queries), self.keys_norm(keys), values)
        return self.head(F.relu(self.proj(mixed)).mean(1))


class TalkingHeads(nn.Module):
    """Linear layers mix the heads before and after the softmax (CaiT): those in between are channels of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 2
        self.qkv, self.proj, self.head = nn.Linear(6, 24), nn.Linear(8, 10), nn.Linear(10, 3)
        self.mix_logits, self.mix_weights = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, _ = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, length, 3, self.num_heads, self.head_dim)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        logits = self.mix_logits((queries @ keys.transpose(-2, -1)).permute(0, 2, 3, 1))
        weights = self.mix_weights(logits.softmax(2)).permute(0, 3, 1, 2)
        mixed = (weights @ values).transpose(1, 2).reshape(batch, length, -1)
        return self.head(F.relu(self.proj(mixed)).mean(1))


class ClassToken(nn.Module):
    """A class token joins the patches, and all get a position embedding: bare parameters along the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 5, stride=5)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.up, self.down, self.head = nn.Linear(8, 10), nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        stream = torch.cat([self.token.expand(len(images), -1, -1), patches], 1) + self.positions
        stream = stream + self.down(F.gelu(self.up(stream + stream.mean(1, keepdim=True))))
        return self.head(stream[:, 0])


class LayerScale(nn.Module):
    """A bare parameter scales the branch that adds to a BatchNorm stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.outer = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.outer_norm, self.gamma = nn.BatchNorm2d(8), nn.Parameter(torch.full((8,), 1e-6))
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        stream = self.stem_norm(self.stem(images))
        branch = self.outer_norm(self.outer(F.relu(self.inner(stream))))
        return self.head((stream + branch * self.gamma.view(1, -1, 1, 1)).mean((2, 3)))


class SwiGlu(nn.Module):
    """A gated MLP whose two halves come from one layer by `chunk`, in a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 16), nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.embed(tokens)
        gate, value = self.up(stream).chunk(2, dim=-1)
        return self.head((stream + self.down(F.silu(gate) * value)).mean(1))


class Windows(nn.Module):
    """Maps are partitioned into windows, an MLP runs on their tokens, and they are put together again (Swin)."""

    def __init__(self) -> None:
        super().__init__()
        self.window = 2
        self.stem, self.up, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        stream = self.stem(images).permute(0, 2, 3, 1)
        batch, height, width, channels = stream.shape
        size, rows, columns = self.window, height // self.window, width // self.window
        windows = stream.view(batch, rows, size, columns, size, channels).transpose(2, 3)
        windows = windows.reshape(-1, size * size, channels)
        windows = windows + self.down(F.gelu(self.up(windows)))
        windows = windows.view(batch, rows, columns, size, size, -1).transpose(2, 3)
        return self.head(F.relu(windows.reshape(batch, height, width, -1)).permute(0, 3, 1, 2))


class UnfoldFold(nn.Module):
    """Patches of a map become columns and a map again: each channel owns as many as the kernel has entries."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.reads, self.writes = nn.Conv2d(3, 4, 1), nn.Linear(16, 7), nn.Linear(7, 24)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(F.relu(self.stem(images)), 2, stride=2).transpose(1, 2)
        columns = self.writes(F.relu(self.reads(patches))).transpose(1, 2)
        return self.head(F.relu(F.fold(columns, images.shape[-2:], 2, stride=2)))


class TokenMixing(nn.Module):
    """Linear layers run over the tokens (MLP-Mixer): channels pass through them, tokens stay."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.tokens_up, self.tokens_down = nn.Linear(5, 6, bias=False), nn.Linear(6, 5, bias=False)
        self.up, self.down, self.head = nn.Linear(8, 10), nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.embed(tokens)
        mixed = self.tokens_down(F.gelu(self.tokens_up(stream.transpose(1, 2)))).transpose(1, 2)
        stream = stream + mixed
        return self.head((stream + self.down(F.gelu(self.up(stream)))).mean(1))


class Siamese(nn.Module):
    """One encoder reads both inputs, and what reads both results has a column for each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3))
        self.mixed, self.head = nn.Linear(10, 7), nn.Linear(7, 2)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        both = torch.cat([self.encoder(image).amax((2, 3)) for image in (first, second)], 1)
        return self.head(F.relu(self.mixed(both)))


class DictionaryOfOutputs(nn.Module):
    """Returns a dictionary with a list in it, and one of its outputs is a hidden map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.neck = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Conv2d(5, 4, 1)
        self.classes, self.boxes = nn.Linear(4, 3), nn.Linear(5, 4)

    def forward(self, images: Tensor) -> dict[str, Tensor | list[Tensor]]:
        maps = F.relu(self.body(F.relu(self.stem(images))))
        neck = self.neck(maps)
        outputs = [self.classes(neck.mean((2, 3))), self.boxes(maps.mean((2, 3)))]
        return {"outputs": outputs, "features": neck}


class OneDimensional(nn.Module):
    """Convolutions over a sequence, a depthwise one among them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv1d(3, 8, 3, padding=1, bias=False), nn.BatchNorm1d(8)
        self.depthwise, self.inner = nn.Conv1d(8, 8, 3, padding=1, groups=8), nn.Conv1d(8, 6, 1)
        self.head = nn.Linear(6, 2)

    def forward(self, signal: Tensor) -> Tensor:
        maps = F.max_pool1d(F.relu(self.stem_norm(self.stem(signal))), 2)
        return self.head(F.relu(self.inner(self.depthwise(maps))).mean(2))


class ThreeDimensional(nn.Module):
    """Convolutions over a volume, and a transposed one back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv3d(3, 6, 3, padding=1, bias=False), nn.BatchNorm3d(6)
        self.body, self.up, self.head = nn.Conv3d(6, 5, 1), nn.ConvTranspose3d(5, 4, 2, 2), nn.Conv3d(4, 2, 1)

    def forward(self, volume: Tensor) -> Tensor:
        maps = F.max_pool3d(F.relu(self.stem_norm(self.stem(volume))), 2)
        return self.head(F.relu(self.up(F.relu(self.body(maps)))))


_IMAGES, _TOKENS = (2, 3, 10, 10), (2, 5, 6)
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
    GroupedConvOfFour: (_IMAGES,),
    ChannelShuffle: (_IMAGES,),
    HierarchicalSplit: (_IMAGES,),
    Ghost: (_IMAGES,),
    AttentionOfNamedSizes: (_TOKENS,),
    AttentionOfSeparateLayers: (_TOKENS,),
    AttentionOfComputedSizes: ((2, 5, 8),),
    AttentionWithPositionTable: (_TOKENS,),
    AttentionWithNormedHeads: (_TOKENS,),
    TalkingHeads: (_TOKENS,),
    ClassToken: (_IMAGES,),
    LayerScale: (_IMAGES,),
    SwiGlu: ((2, 5, 4),),
    Windows: (_IMAGES,),
    UnfoldFold: (_IMAGES,),
    TokenMixing: ((2, 5, 4),),
    Siamese: (_IMAGES, _IMAGES),
    DictionaryOfOutputs: (_IMAGES,),
    OneDimensional: ((2, 3, 12),),
    ThreeDimensional: ((2, 3, 4, 4, 4),),
}
BY_HAND: dict[str, Callable[[], nn.Module]] = {maker.__name__: maker for maker in _SHAPES}  # type: ignore[attr-defined]


# Fewer of the same layers.
_SMALLER: dict[str, dict[str, Any]] = {"densenet121": {"block_config": (2, 2), "growth_rate": 8}}


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

            arguments = {"img_size": 64} if "vit" in name else _SMALLER.get(name, {})
            model = timm.create_model(name, num_classes=5, **arguments)
            shapes = ((2, 3, 64, 64),)
        model = model.double().eval()
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
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


def ways_to_cut(groups: ChannelGroups) -> list[dict[str, Tensor]]:
    """Each group alone, all but it, all, and all to one unit."""
    n = {group.name: group.n_channels for group in groups.free}
    some = {name: torch.arange(size) % 3 != 1 for name, size in n.items()}
    whole = {name: torch.ones(size, dtype=torch.bool) for name, size in n.items()}
    one = {group.name: torch.arange(group.n_channels) < group.least for group in groups.free}
    alone = [{**whole, name: some[name]} for name in n]
    return [*alone, *({**some, name: whole[name]} for name in n), some, one]


def zero_dropped_(model: nn.Module, plan: PrunePlan) -> None:
    """Set everything that produces a dropped channel to zero, as a penalty would; the consumers are left alone."""
    state = model.state_dict()
    for cut in plan.cuts:
        if cut.role not in ("consumer", "size") and not cut.tensor.endswith(("running_mean", "running_var")):
            state[cut.tensor].index_fill_(cut.dim, torch.tensor(cut.drop), 0)
