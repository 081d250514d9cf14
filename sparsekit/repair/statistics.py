"""What the layers of a dense model read on images: one pass, sums in float64, no labels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.errors import InputError, ModelError, first_line
from sparsekit.evaluation import eval_mode, flat_tensors
from sparsekit.repair.divergence import sampled_loss
from sparsekit.repair.least_squares import Moments
from sparsekit.repair.rows import Reader, readers
from sparsekit.structure.groups import ChannelGroups
from sparsekit.structure.masks import Scores
from sparsekit.surgery.constants import Reading, channel_dim, plain_layers
from sparsekit.surgery.norms import make_readers_plain_

# Of a map, so many positions an image are enough: neighbours are alike. Layers with more columns need more rows.
_MOST_POSITIONS = 64
_COLUMNS_PER_POSITION = 8
# A layer that reads more columns is left out: its covariance would take over 300 MB.
_WIDEST = 6144
# What the rows of one layer may take while a batch is worked on.
_MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer reads.

    `moments` are those of its rows, about 0 where no bias can take over a constant. `sensitivity` (outputs, outputs) is
    the sum over positions, averaged over the images, of the products of the gradients of the layer's outputs.
    `reading` has the range of each input channel.
    """

    reader: Reader
    moments: Moments
    sensitivity: Tensor
    reading: Reading


@dataclass(frozen=True)
class InputStatistics:
    """What the layers that read channels of free groups read on some images, by the name of their weight.

    - `gates` has for each free group the gate score (n_channels,) of its channels: the mean over the images of
      (sum over positions and readers of x_c dL/dx_c)^2, by how much closing the channel would move the loss.
    - `left_out` names layers that read such channels and cannot be repaired, with the reason.
    """

    layers: Mapping[str, LayerStatistics]
    gates: Scores
    left_out: Mapping[str, str]
    n_images: int

    @property
    def readers(self) -> dict[str, Reader]:
        """How each layer is read, by the name of its weight."""
        return {tensor: layer.reader for tensor, layer in self.layers.items()}


def input_statistics(
    model: nn.Module,
    groups: ChannelGroups,
    batches: Iterable[Tensor | tuple[Tensor, ...]],
    *,
    gradients: bool = True,
    seed: int = 0,
    most_positions: int = _MOST_POSITIONS,
) -> InputStatistics:
    """Gather what the layers of a model read on `batches` of images, which need no labels.

    The model is not changed; it runs in eval mode, on its own device, forwards and, with `gradients`, backwards: the
    loss is the cross-entropy of labels that are drawn from the model's own predictions. Of each map `most_positions`
    positions are taken, or an eighth of the layer's columns if that is more, at random by `seed`. The memory it takes
    is that of a batch, and 8 bytes for each pair of columns of a layer.

    Raises InputError if there is no batch, and ModelError if the model does not run on one.
    """
    with torch.random.fork_rng():
        model = copy.deepcopy(model)
        return _Gathering(model, groups, gradients, seed, most_positions).over(batches)


@dataclass
class _Sums:
    """The sums of one layer over all rows so far; float64, but those of a single batch."""

    reader: Reader
    layer: nn.Module
    rows: float = 0.0
    first: Tensor = field(default_factory=lambda: torch.zeros(()))
    second: Tensor = field(default_factory=lambda: torch.zeros(()))
    gradients: Tensor = field(default_factory=lambda: torch.zeros(()))
    low: Tensor | None = None
    high: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add rows (n, conv_groups, columns)."""
        by_group = _precise(rows).movedim(1, 0)
        self.rows += rows.shape[0]
        self.first = self.first + by_group.double().sum(1)
        self.second = self.second + (by_group.mT @ by_group).double()

    def see(self, x: Tensor) -> None:
        values = x.movedim(channel_dim(self.layer), 0).flatten(1)
        low, high = values.amin(1).double().cpu(), values.amax(1).double().cpu()
        self.low = low if self.low is None else torch.minimum(low, self.low)
        self.high = high if self.high is None else torch.maximum(high, self.high)

    def result(self, n_images: int) -> LayerStatistics:
        assert self.low is not None
        assert self.high is not None
        mean = self.first / self.rows
        if not self.reader.affine(self.layer):
            mean = torch.zeros_like(mean)
        covariance = self.second / self.rows - mean[:, :, None] * mean[:, None]
        moments = Moments(mean, (covariance + covariance.mT) / 2, self.rows)
        return LayerStatistics(
            self.reader, moments, self.gradients / max(n_images, 1), Reading(self.low, self.high)
        )


def _precise(tensor: Tensor) -> Tensor:
    """At least float32: products of halves overflow."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _Gathering:
    """One pass over batches, and the sums of all layers so far."""

    def __init__(
        self, model: nn.Module, groups: ChannelGroups, gradients: bool, seed: int, most_positions: int
    ) -> None:
        self._model, self._groups, self._most = model, groups, most_positions
        self._gradients = gradients
        self._generator = torch.Generator().manual_seed(seed)
        consumers = [(g, m) for g in groups.free for m in g.of_role("consumer")]
        tensors = dict.fromkeys(member.tensor for _, member in consumers)
        make_readers_plain_(model, tensors)
        plain = plain_layers(model, tensors, conv_groups=True)
        read = readers(groups, plain)
        self._sums = {
            tensor: _Sums(reader, plain[tensor])
            for tensor, reader in read.items()
            if reader.columns <= _WIDEST
        }
        self._gates: Scores = {g.name: torch.zeros(g.n_channels, dtype=torch.float64) for g in groups.free}
        self._left_out = {
            t: "its weight is computed, shared, or not that of a convolution or linear layer"
            for t in tensors
            if t not in plain
        } | {
            t: f"it reads {reader.columns} columns, more than {_WIDEST}"
            for t, reader in read.items()
            if reader.columns > _WIDEST
        }
        self._held: list[tuple[str, Tensor, Tensor]] = []

    def over(self, batches: Iterable[Tensor | tuple[Tensor, ...]]) -> InputStatistics:
        n_images = 0
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        with eval_mode(self._model), self._watching(), torch.set_grad_enabled(self._gradients):
            for batch in batches:
                n_images += self._one(_inputs_of(batch))
        if not n_images:
            raise InputError("there are no images to take statistics from; give at least one batch")
        seen = {tensor: sums for tensor, sums in self._sums.items() if sums.rows}
        unseen = dict.fromkeys(set(self._sums) - set(seen), "it does not run")
        return InputStatistics(
            {tensor: sums.result(n_images) for tensor, sums in seen.items()},
            {name: total / n_images for name, total in self._gates.items()},
            {**self._left_out, **unseen},
            n_images,
        )

    def _one(self, inputs: tuple[Tensor, ...]) -> int:
        # Gradients start at the images: no weight needs one.
        leaves = tuple(
            x.detach().clone().requires_grad_(self._gradients) if x.is_floating_point() else x for x in inputs
        )
        self._held = []
        try:
            # Copies, because models may overwrite their input.
            outputs = flat_tensors(self._model(*(x.clone() for x in leaves)))
        except Exception as error:
            raise ModelError(
                f"{type(self._model).__name__} does not run on images of shape "
                f"{[tuple(x.shape) for x in inputs]}: {first_line(error)}"
            ) from error
        if self._gradients:
            loss = sampled_loss(outputs, self._generator)
            wanted = [t for _, x, y in self._held for t in (x, y)]
            followed = [t for t in wanted if t.requires_grad]  # what does not come from the images has none
            if loss.requires_grad and followed:
                found = iter(torch.autograd.grad(loss, followed, allow_unused=True))
                all_found = tuple(next(found) if t.requires_grad else None for t in wanted)
                self._add_gradients(all_found, len(inputs[0]))
        with torch.no_grad():
            for tensor, x, _ in self._held:
                self._add_rows(tensor, x.detach())
        self._held = []
        return len(inputs[0])

    def _add_rows(self, tensor: str, x: Tensor) -> None:
        sums = self._sums[tensor]
        sums.see(x)
        bytes_each = 4 * sums.reader.columns * sums.reader.conv_groups * max(x[0].numel() // x.shape[1], 1)
        for part in torch.split(x, max(_MOST_BYTES // max(bytes_each, 1), 1)):
            rows = sums.reader.rows(sums.layer, part)
            sums.add(self._some(rows, sums.reader.columns).flatten(0, 1))

    def _some(self, rows: Tensor, columns: int) -> Tensor:
        """Pick positions of (images, positions, ...) at random, if there are too many."""
        most = max(self._most, columns // _COLUMNS_PER_POSITION)
        if rows.shape[1] <= most:
            return rows
        picked = torch.randperm(rows.shape[1], generator=self._generator)[:most]
        return rows[:, picked.to(rows.device)]

    def _add_gradients(self, found: tuple[Tensor | None, ...], n_images: int) -> None:
        by_group = {
            g.name: torch.zeros(n_images, g.n_channels, dtype=torch.float64) for g in self._groups.free
        }
        for (tensor, x, _), of_input, of_output in zip(self._held, found[0::2], found[1::2], strict=True):
            sums = self._sums[tensor]
            if of_output is not None:
                rows = of_output.movedim(channel_dim(sums.layer), -1)
                rows = rows.reshape(len(of_output), -1, rows.shape[-1])
                some = self._some(rows, sums.reader.columns)
                part = _precise(some).flatten(0, 1)
                sums.gradients = sums.gradients + (part.T @ part).double() * (rows.shape[1] / some.shape[1])
            if of_input is None or len(x) % n_images:
                continue
            # Windows of an image, which some models stack along the batch, are of that image.
            closing = (x.detach() * of_input).movedim(channel_dim(sums.layer), -1)
            moved = closing.reshape(n_images, -1, closing.shape[-1]).sum(1).double().cpu()
            self._add_gates(tensor, moved, by_group)
        for name, values in by_group.items():
            self._gates[name] += values.square().sum(0)

    def _add_gates(self, tensor: str, moved: Tensor, by_group: dict[str, Tensor]) -> None:
        """Add what closing each input channel of a layer would change, (images, inputs), to the groups it is of."""
        conv_groups = self._sums[tensor].reader.conv_groups
        folded = moved.reshape(len(moved), conv_groups, -1).sum(1) if conv_groups > 1 else moved
        for group in self._groups.free:
            for member in group.of_role("consumer"):
                if member.tensor == tensor and max(member.positions) < folded.shape[1]:
                    own = folded[:, list(member.positions)]
                    by_group[group.name] += own.reshape(len(own), group.n_channels, member.repeat).sum(2)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Hold what each layer reads and gives while the model runs; copies, because models work in place."""

        def before(tensor: str) -> Callable[..., Any]:
            def hold(
                module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
                read = (args[0] if args else keywords["input"]).clone()
                self._held.append((tensor, read, read))
                return ((read, *args[1:]), keywords) if args else ((), {**keywords, "input": read})

            return hold

        def after(tensor: str) -> Callable[..., Any]:
            def hold(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
                # The latest call of this layer: a layer within a layer has no weight of ours.
                index = next(i for i in reversed(range(len(self._held))) if self._held[i][0] == tensor)
                self._held[index] = (tensor, self._held[index][1], output)
                return output.clone()

            return hold

        hooks = [
            sums.layer.register_forward_pre_hook(before(tensor), with_kwargs=True)
            for tensor, sums in self._sums.items()
        ]
        hooks += [sums.layer.register_forward_hook(after(tensor)) for tensor, sums in self._sums.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _inputs_of(batch: Any) -> tuple[Tensor, ...]:
    """The inputs of a batch: a tensor, a tuple for a model with several inputs, or what a loader gives, a list."""
    if isinstance(batch, list) and batch and isinstance(batch[0], Tensor):
        batch = batch[0]  # labels come after it
    found = batch if isinstance(batch, tuple) else (batch,)
    if not all(isinstance(one, Tensor) and one.dim() > 1 for one in found):
        raise InputError(
            "batches must be an iterable of batches of images; of a tensor give images.split(16)"
        )
    return found
