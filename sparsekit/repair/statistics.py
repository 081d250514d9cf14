"""What the layers of a dense model read on images: one pass, its sums in float64, no labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sparsekit.errors import InputError, ModelError, first_line
from sparsekit.evaluation import copied, eval_mode
from sparsekit.options import Outputs
from sparsekit.repair.divergence import compared, sampled_loss
from sparsekit.repair.least_squares import Moments
from sparsekit.repair.rows import Reader, readers
from sparsekit.structure.groups import ChannelGroup, ChannelGroups, Member
from sparsekit.structure.masks import Scores
from sparsekit.surgery.constants import Reading, channel_dim, plain_layers
from sparsekit.surgery.norms import make_readers_plain_

# Of a map, so many positions an image are enough: neighbours are alike. Layers with more columns need more rows.
_MOST_POSITIONS = 64
_COLUMNS_PER_POSITION = 8
# A layer that reads more columns is left out: its covariance would take over 300 MB.
_WIDEST = 6144
# Products of so many rows are summed in float32 before they are added in float64.
_ROWS_IN_FLOAT32 = 1024
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
    outputs: Outputs = "classes",
) -> InputStatistics:
    """Gather what the layers of a model read on `batches` of images, which need no labels.

    The model is not changed; it runs in eval mode, on its own device, forwards and, with `gradients`, backwards: the
    loss is the cross-entropy of labels that are drawn from the model's own predictions; `outputs` "values" says that
    outputs of two dimensions are no scores of classes. Of each map `most_positions`
    positions are taken, or an eighth of the layer's columns if that is more, at random by `seed`. The memory it takes
    is that of a batch, 8 bytes for each pair of columns of a layer (12 for a while), and 4 for each pair of outputs.

    Raises InputError if there is no batch or for another word in `outputs`, and ModelError if the model does not run on
    a batch.
    """
    if outputs not in get_args(Outputs):
        raise InputError(f"outputs must be {' or '.join(get_args(Outputs))}, got {outputs!r}")
    with torch.random.fork_rng():
        model = copied(model)
        return _Gathering(model, groups, gradients, seed, most_positions, outputs).over(batches)


@dataclass
class _Sums:
    """The sums of one layer over all rows so far; float64, but those of the latest rows and of gradients."""

    reader: Reader
    layer: nn.Module
    rows: float = 0.0
    first: Tensor = field(default_factory=lambda: torch.zeros(()))
    second: Tensor | None = None
    gradients: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    _latest: Tensor | None = None
    _latest_rows: int = 0

    def add(self, rows: Tensor) -> None:
        """Add rows (n, conv_groups, columns)."""
        by_group = _precise(rows).movedim(1, 0)
        self.rows += rows.shape[0]
        self.first = self.first + by_group.sum(1, dtype=torch.float64)
        if self._latest is None:
            self._latest = by_group.mT @ by_group
        else:
            self._latest.baddbmm_(by_group.mT, by_group)
        self._latest_rows += rows.shape[0]
        if self._latest_rows >= _ROWS_IN_FLOAT32:
            self._round_off()

    def _round_off(self) -> None:
        """Add the sums of the latest rows to all: to do so for every few rows would take longer than the products."""
        if self._latest is not None and self.second is None:
            self.second = self._latest.double()
        elif self._latest is not None and self.second is not None:
            self.second += self._latest
        self._latest, self._latest_rows = None, 0

    def add_gradients(self, rows: Tensor, times: float) -> None:
        """Add the gradients of outputs, rows (n, outputs), each of which stands for so many."""
        rows = _precise(rows)
        if self.gradients is None:
            self.gradients = torch.zeros(rows.shape[1], rows.shape[1]).to(rows)
        self.gradients.addmm_(rows.T, rows, alpha=times)

    def see(self, x: Tensor) -> None:
        values = x.movedim(channel_dim(self.layer), 0).flatten(1)
        low, high = (end.double().cpu() for end in torch.aminmax(values, dim=1))
        self.low = low if self.low is None else torch.minimum(low, self.low)
        self.high = high if self.high is None else torch.maximum(high, self.high)

    def result(self, n_images: int) -> LayerStatistics:
        """Return what was summed, which is not kept."""
        self._round_off()
        low, high, covariance, gradients = self.low, self.high, self.second, self.gradients
        assert low is not None
        assert high is not None
        assert covariance is not None
        self.second = self.gradients = None
        mean = self.first / self.rows
        if not self.reader.affine(self.layer):
            mean = torch.zeros_like(mean)
        covariance /= self.rows
        covariance -= mean[:, :, None] * mean[:, None]
        sensitivity = torch.zeros(()) if gradients is None else gradients.div_(max(n_images, 1))
        return LayerStatistics(
            self.reader, Moments(mean, covariance, self.rows), sensitivity, Reading(low, high)
        )


def _precise(tensor: Tensor) -> Tensor:
    """At least float32: products of halves overflow."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _Gathering:
    """One pass over batches, and the sums of all layers so far."""

    def __init__(
        self,
        model: nn.Module,
        groups: ChannelGroups,
        gradients: bool,
        seed: int,
        most_positions: int,
        kind: Outputs,
    ) -> None:
        self._model, self._groups, self._most = model, groups, most_positions
        self._gradients, self._kind = gradients, kind
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
        # By weight, the groups whose channels it reads.
        self._read: dict[str, list[tuple[ChannelGroup, Member]]] = {tensor: [] for tensor in self._sums}
        for group, member in consumers:
            if member.tensor in self._sums:
                self._read[member.tensor].append((group, member))
        # Of the batch that is worked on: its images, and by group what closing each channel would change for each.
        self._n_images = 0
        self._closing: Scores = {}
        self._failure: Exception | None = None
        # A zero that is added to what layers read. Gradients are followed to it: neither weights nor images need any.
        self._probe = torch.zeros((), requires_grad=gradients)

    def over(self, batches: Iterable[Tensor | tuple[Tensor, ...]]) -> InputStatistics:
        n_images = 0
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        with eval_mode(self._model), self._watching(), torch.set_grad_enabled(self._gradients):
            for batch in batches:
                n_images += self._one(_inputs_of(batch))
        if not n_images:
            raise InputError("there are no images to take statistics from; give at least one batch")
        found = {tensor: sums.result(n_images) for tensor, sums in self._sums.items() if sums.rows}
        unseen = {tensor: "it does not run" for tensor in self._sums if tensor not in found}
        return InputStatistics(
            found,
            {name: total / n_images for name, total in self._gates.items()},
            {**self._left_out, **unseen},
            n_images,
        )

    def _one(self, inputs: tuple[Tensor, ...]) -> int:
        self._n_images = len(inputs[0])
        self._closing = {}
        try:
            # Copies, because models may overwrite their input.
            outputs = compared(self._model(*(x.detach().clone() for x in inputs)), self._kind)
        except Exception as error:
            if self._failure is not None:  # ours, not the model's
                raise self._failure from None
            raise ModelError(
                f"{type(self._model).__name__} does not run on images of shape "
                f"{[tuple(x.shape) for x in inputs]}: {first_line(error)}"
            ) from error
        if self._gradients:
            loss = sampled_loss(outputs, self._generator)
            if loss.requires_grad:
                # Hooks take what they need on the way.
                torch.autograd.grad(loss, self._probe, allow_unused=True)
        for name, moved in self._closing.items():
            self._gates[name] += moved.square().sum(0)
        return self._n_images

    def _add_rows(self, tensor: str, x: Tensor) -> None:
        sums = self._sums[tensor]
        reader, layer = sums.reader, sums.layer
        sums.see(x)
        picked = self._picked(reader.n_positions(layer, x), reader, x)
        n_positions = len(picked) if picked is not None else reader.n_positions(layer, x)
        bytes_each = 4 * reader.columns * reader.conv_groups * n_positions
        for part in torch.split(x, max(_MOST_BYTES // max(bytes_each, 1), 1)):
            sums.add(reader.rows(layer, part, picked).flatten(0, 1))

    def _picked(self, n_positions: int, reader: Reader, like: Tensor) -> Tensor | None:
        """Pick positions at random, if there are too many for a layer."""
        most = max(self._most, reader.columns // _COLUMNS_PER_POSITION)
        if n_positions <= most:
            return None
        return torch.randperm(n_positions, generator=self._generator)[:most].to(like.device)

    def _add_output_gradient(self, tensor: str, gradient: Tensor) -> None:
        sums = self._sums[tensor]
        rows = gradient.movedim(channel_dim(sums.layer), -1)
        rows = rows.reshape(len(gradient), -1, rows.shape[-1])
        picked = self._picked(rows.shape[1], sums.reader, rows)
        some = rows if picked is None else rows[:, picked]
        sums.add_gradients(some.flatten(0, 1), rows.shape[1] / some.shape[1])

    def _add_input_gradient(self, tensor: str, x: Tensor, gradient: Tensor) -> None:
        """Add what closing each input channel of a layer would change, to the groups that it is of."""
        n_images, sums = self._n_images, self._sums[tensor]
        if len(x) % n_images:
            return
        # Windows of an image, which some models stack along the batch, are of that image.
        closing = (x * gradient).movedim(channel_dim(sums.layer), -1)
        moved = closing.reshape(n_images, -1, closing.shape[-1]).sum(1, dtype=torch.float64).cpu()
        conv_groups = sums.reader.conv_groups
        folded = moved.reshape(n_images, conv_groups, -1).sum(1) if conv_groups > 1 else moved
        for group, member in self._read[tensor]:
            if max(member.positions) < folded.shape[1]:
                own = (
                    folded[:, list(member.positions)]
                    .reshape(n_images, group.n_channels, member.repeat)
                    .sum(2)
                )
                before = self._closing.get(group.name)
                self._closing[group.name] = own if before is None else before + own

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Take what each layer reads while the model runs, and gradients on the way back.

        Layers get and give copies, because models work in place.
        """

        def before(tensor: str) -> Callable[..., Any]:
            def take(
                module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
                x = args[0] if args else keywords["input"]
                read = x + self._probe.to(x)
                try:
                    with torch.no_grad():
                        self._add_rows(tensor, read.detach())
                except Exception as error:
                    self._failure = error
                    raise
                if read.requires_grad:
                    read.register_hook(partial(self._add_input_gradient, tensor, read.detach()))
                return ((read, *args[1:]), keywords) if args else ((), {**keywords, "input": read})

            return take

        def after(tensor: str) -> Callable[..., Any]:
            def take(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
                if output.requires_grad:
                    output.register_hook(partial(self._add_output_gradient, tensor))  # type: ignore[no-untyped-call]
                return output.clone()

            return take

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
