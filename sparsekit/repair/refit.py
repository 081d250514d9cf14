"""Refit a cut model layer by layer: each repaired layer is fitted to what the pruned network really gives it.

The closed form takes what the dense network gives a layer. In the pruned network the layers before it have errors of
their own. Here a layer reads what the pruned network, repaired so far, gives it, and has to give what the dense network
gives there. At the last layer before an addition it makes up for the error of the shortcut, too. ("Asymmetric": He,
Zhang and Sun, "Channel pruning for accelerating very deep neural networks", 2017, section 3.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.evaluation import copied, evaluating
from sparsekit.repair.least_squares import Moments, fit
from sparsekit.repair.replay import Recording, Stations, answering
from sparsekit.repair.rows import Reader
from sparsekit.structure.plan import PrunePlan
from sparsekit.surgery.constants import add_to_bias_

# What the outputs of stations may take that are carried from one station to the next.
_MOST_BYTES = 384 * 2**20
_BATCH = 16
# With fewer rows than this times the columns a layer keeps what the closed form gave it.
_FEWEST_ROWS = 2
# Of each image so many positions are looked at, or more where all images would give fewer rows than this a column.
_MOST_POSITIONS, _ROWS_PER_COLUMN = 64, 16
_SAME = 1e-3


def refit(
    dense: nn.Module,
    pruned: nn.Module,
    plan: PrunePlan,
    readers: Mapping[str, Reader],
    images: Tensor,
    stations: Stations,
    *,
    seed: int = 0,
    progress: Callable[[float, float], None] | None = None,
) -> nn.Module:
    """Return a copy of the pruned model whose layers that lost inputs are refitted, in running order.

    `readers` are those of the dense model's layers. Layers that are read "pointwise", stand in no station, or see too
    few positions keep their weights. As many images are used as the outputs of the stations leave memory for: 384 MB.
    What the layers of one station should give comes on top of that.
    """
    refitted = copied(pruned)
    lost = {
        cut.tensor: cut
        for cut in plan.cuts
        if cut.role == "consumer" and cut.drop and cut.tensor in readers and not readers[cut.tensor].pointwise
    }
    pair = _Pair(dense, refitted, plan, stations, images)
    generator = torch.Generator().manual_seed(seed)
    for number, name in enumerate(stations.names):
        if progress is not None:
            progress(number, len(stations.names))
        pair.enter(number)
        inside = {readers[t].module: readers[t] for t in lost if t.startswith(f"{name}.")}
        order = pair.in_running_order(number, list(inside))
        layers = [_Layer.of(inside[layer], pair, number) for layer in order]
        targets = pair.advance_dense(number, layers, generator)
        for layer in layers:
            _refit_one_(layer, pair.seen(number, layer, targets[layer.name]))
        pair.advance_pruned(number)
    return refitted


@dataclass(frozen=True)
class _Layer:
    """A layer of the pruned model that is refitted.

    With `scale`, by channel, a change of what it gives changes the output of its station by so much.
    """

    reader: Reader
    module: nn.Module
    scale: Tensor | None

    @staticmethod
    def of(reader: Reader, pair: _Pair, number: int) -> _Layer:
        module = pair.pruned.get_submodule(reader.module)
        assert isinstance(module.weight, Tensor)
        own = Reader(reader.tensor, False, reader.conv_groups, module.weight[0].numel(), reader.taps)
        return _Layer(own, module, pair.scale_to_the_end(number, reader.module))

    @property
    def name(self) -> str:
        return self.reader.module

    def positions(self, output: Tensor) -> Tensor:
        """What the layer gives, as (images, positions, channels)."""
        if isinstance(self.module, nn.modules.conv._ConvNd):
            return output.flatten(2).mT
        return output.reshape(len(output), -1, output.shape[-1])

    def pick(self, rows: Tensor, n_batch: int, n_images: int, generator: torch.Generator) -> Tensor | None:
        """Pick positions of rows (n, positions, channels) of a batch, if there are too many."""
        most = max(_MOST_POSITIONS, _ROWS_PER_COLUMN * self.reader.columns // n_images)
        # Of all rows of an image: some models stack windows of it along the batch.
        count = max(most * n_batch // rows.shape[0], 1)
        if rows.shape[1] <= count:
            return None
        return torch.randperm(rows.shape[1], generator=generator)[:count].to(rows.device)


@dataclass(frozen=True)
class _Target:
    """What the dense network gives at some positions of one batch: at a layer, and, if need be, at its station's end.

    Both are (images, positions, channels), with the channels that stay.
    """

    picked: Tensor | None
    given: Tensor
    end: Tensor | None


def _at(rows: Tensor, picked: Tensor | None) -> Tensor:
    return rows if picked is None else rows[:, picked]


def _refit_one_(layer: _Layer, seen: Iterator[tuple[Tensor, Tensor]]) -> None:
    """Fit a layer to rows (images, positions, conv_groups, columns) and what it should give for them."""
    reader, module = layer.reader, layer.module
    sums: list[Tensor] = []
    n = 0
    for rows, wanted in seen:
        precise = torch.promote_types(rows.dtype, torch.float32)
        y = wanted.to(precise).reshape(*rows.shape[:2], reader.conv_groups, -1)
        x, y = (t.flatten(0, 1).movedim(1, 0) for t in (rows.to(precise), y))  # (conv_groups, rows, ...)
        parts = [x.mT @ x, y.mT @ x, x.sum(1), y.sum(1)]
        sums = (
            [part.double() for part in parts]
            if not sums
            else [s.add_(p) for s, p in zip(sums, parts, strict=True)]
        )
        n += x.shape[1]
    if not sums or n < _FEWEST_ROWS * reader.columns:
        return
    xx, yx, x1, y1 = (total / n for total in sums)
    moments = Moments(x1, xx - x1[:, :, None] * x1[:, None], n)
    cross = yx - y1[:, :, None] * x1[:, None]
    new = fit(reader.weight(module).to(xx.device), cross, moments)
    bias = (
        module.bias if isinstance(module.bias, Tensor) else torch.zeros(new.shape[0] * new.shape[1]).to(new)
    )
    shift = (y1 - (new @ x1[:, :, None])[:, :, 0]).flatten()
    reader.set_weight_(module, new)
    add_to_bias_(module, shift.to(bias) - bias.detach())


class _Pair:
    """The dense and the pruned model, run side by side from station to station."""

    def __init__(
        self, dense: nn.Module, pruned: nn.Module, plan: PrunePlan, stations: Stations, images: Tensor
    ) -> None:
        self.dense, self.pruned, self._stations = dense, pruned, stations
        self._keep = {
            cut.tensor: torch.tensor(cut.keep, device=images.device)
            for cut in plan.cuts
            if cut.role == "producer" and cut.dim == 0
        }
        self._images = images
        self._needed = _needed(dense, stations, images[:1])
        self._shapes = [_shapes(model, stations, images[:1]) for model in (dense, pruned)]
        self._batches: list[tuple[Tensor, ...]] = []
        # By batch and station, what the two models gave there.
        self._given: list[dict[str, tuple[Tensor, Tensor]]] = []
        # By batch, what the dense model gave at the station that is worked on.
        self._pending: list[Tensor] = []
        self._blanks: dict[tuple[int, ...], Tensor] = {}

    def enter(self, number: int) -> None:
        """Get ready for a station: take as many images as what is held before and after it leaves memory for."""
        held = [self._needed[n] for n in (number - 1, number) if n >= 0]
        most = max(sum(2 * prod(self._shapes[0][name]) for name in names) for names in held)
        # Half a float for each number, of two models.
        count = max(min(len(self._images), _MOST_BYTES // max(2 * most, 1)), 1)
        while len(self._batches) > 1 and sum(len(batch[0]) for batch in self._batches) > count:
            self._batches.pop()
            self._given.pop()
        while (start := sum(len(batch[0]) for batch in self._batches)) < count:
            if start > 0 and count - start < _BATCH and count < len(self._images):
                break
            self._batches.append((self._images[start : min(start + _BATCH, count)],))
            self._given.append({})
            if number:
                ends = self._needed[number - 1]
                both = [self._run_to(model, number - 1, ends) for model in (self.dense, self.pruned)]
                self._given[-1] = {name: (both[0][name], both[1][name]) for name in ends}

    def in_running_order(self, number: int, layers: Sequence[str]) -> list[str]:
        """Sort layers of a station by when they run in the pruned model."""
        order: list[str] = []
        with ExitStack() as hooks:
            for name in layers:
                module = self.pruned.get_submodule(name)
                hook = module.register_forward_hook(lambda m, args, out, name=name: order.append(name))
                hooks.callback(hook.remove)
            if layers:
                self._run(self.pruned, 1, 0, number)
        return [name for name in dict.fromkeys(order) if order.count(name) == 1]

    def advance_dense(
        self, number: int, layers: Sequence[_Layer], generator: torch.Generator
    ) -> dict[str, list[_Target]]:
        """Run the station in the dense model, and note what the layers should give, by layer and batch."""
        targets: dict[str, list[_Target]] = {layer.name: [] for layer in layers}
        n_images = sum(len(batch[0]) for batch in self._batches)
        for b in range(len(self._batches)):
            with ExitStack() as hooks:
                held = {
                    layer.name: hooks.enter_context(_holding(self.dense, layer.name, read=False))
                    for layer in layers
                }
                end = self._run(self.dense, 0, b, number)
            for layer in layers:
                output = held[layer.name]["given"]
                rows = layer.positions(output)
                picked = layer.pick(rows, len(self._batches[b][0]), n_images, generator)
                keep = self._keep.get(layer.reader.tensor, slice(None))
                alike = layer.scale is not None and end.shape == output.shape
                at_end = _packed(_at(layer.positions(end), picked)[..., keep]) if alike else None
                targets[layer.name].append(_Target(picked, _packed(_at(rows, picked)[..., keep]), at_end))
            self._pending.append(_packed(end))
        return targets

    def seen(self, number: int, layer: _Layer, targets: Sequence[_Target]) -> Iterator[tuple[Tensor, Tensor]]:
        """Give for each batch what the layer reads in the pruned network, as rows, and what it should give for them."""
        for b, target in enumerate(targets):
            to_the_end = layer.scale is not None and target.end is not None
            with _holding(self.pruned, layer.name) as ours:
                end = self._run(self.pruned, 1, b, number, None if to_the_end else layer.module)
            wanted = target.given
            if layer.scale is not None and target.end is not None and end.shape == ours["given"].shape:
                given, reached = (_at(layer.positions(t), target.picked) for t in (ours["given"], end))
                wanted = given + (target.end - reached) / layer.scale
            yield layer.reader.rows(layer.module, ours["read"], target.picked), wanted

    def scale_to_the_end(self, number: int, layer: str) -> Tensor | None:
        """Return by how much the station's output changes with the layer's, by channel; None if it is not linear.

        It is linear where only a norm and an addition follow.
        """
        module = self.pruned.get_submodule(layer)
        end = self._run(self.pruned, 1, 0, number)
        added: list[Tensor] = []

        def push(m: nn.Module, args: Any, out: Tensor) -> Tensor:
            size = out.detach().std().clamp_min(1e-6)
            noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out) * size
            added.append(noise)
            return out + noise

        hook = module.register_forward_hook(push)
        try:
            pushed = self._run(self.pruned, 1, 0, number)
        finally:
            hook.remove()
        noise = added[0]
        if noise.shape != end.shape:
            return None
        change = pushed - end
        dim = 1 if isinstance(module, nn.modules.conv._ConvNd) else end.dim() - 1
        others = [d for d in range(end.dim()) if d != dim]
        scale = (change * noise).sum(others, keepdim=True) / noise.square().sum(others, keepdim=True)
        error = (change - scale * noise).square().mean().sqrt()
        usable = bool(error <= _SAME * change.square().mean().sqrt()) and bool((scale.abs() > _SAME).all())
        return scale.flatten() if usable else None

    def advance_pruned(self, number: int) -> None:
        """Run the station in the pruned model, keep what both gave, and forget what no later station needs."""
        name = self._stations.names[number]
        for b, given in enumerate(self._given):
            given[name] = (self._pending[b], _packed(self._run(self.pruned, 1, b, number)))
            for old in set(given) - self._needed[number]:
                del given[old]
        self._pending = []

    def _run_to(self, model: nn.Module, number: int, names: set[str]) -> dict[str, Tensor]:
        """Run the newest batch from the start to a station; returns what stations of these names gave."""
        found = dict.fromkeys(names, torch.zeros(0))
        with evaluating(model), ExitStack() as hooks:
            for name in names:
                module = _submodule(model, name)
                if module is not None:
                    hook = module.register_forward_hook(
                        lambda m, args, out, name=name: found.update({name: _packed(out.clone())})
                    )
                    hooks.callback(hook.remove)
            last = next(n for n in reversed(range(number + 1)) if _submodule(model, self._stations.names[n]))
            hooks.enter_context(_stopping_after(model.get_submodule(self._stations.names[last])))
            with suppress(_Stop):
                model(*self._batches[-1])
        return found

    def _run(
        self, model: nn.Module, which: int, b: int, number: int, last: nn.Module | None = None
    ) -> Tensor:
        """Run one station of a model on a batch, or up to a module `last` within it; returns what that gives.

        What is before answers from memory, what is after does not run.
        """
        station = _submodule(model, self._stations.names[number])
        if station is None:  # the block that holds it is bypassed, and nothing reads it
            return torch.zeros(0)
        with evaluating(model), ExitStack() as changed:
            for earlier in self._stations.names[:number]:
                module = _submodule(model, earlier)
                if module is not None:
                    given = self._given[b].get(earlier)
                    answer = self._blank(which, b, earlier) if given is None else given[which]
                    answer = answer.to(self._batches[b][0].dtype)
                    changed.enter_context(answering(module, answer, copied=given is not None))
            changed.enter_context(_stopping_after(last or station))
            try:
                model(*self._batches[b])
            except _Stop as stop:
                return stop.given
        raise RuntimeError(f"{self._stations.names[number]} did not run")

    def _blank(self, which: int, b: int, name: str) -> Tensor:
        """Something of the right shape: nothing that runs needs it, but code in between may look at its size."""
        images = self._batches[b][0]
        shape = (len(images), *self._shapes[which][name][1:])
        if shape not in self._blanks:
            self._blanks[shape] = images.new_zeros(shape)
        return self._blanks[shape]


def _packed(tensor: Tensor) -> Tensor:
    """The tensor in half the memory, if its numbers fit: they are rounded to 3 digits."""
    half = tensor.half()
    return half if tensor.dtype == torch.float32 and bool(half.isfinite().all()) else tensor


class _Stop(Exception):
    """Carries what a station gave."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.given = given


@contextmanager
def _stopping_after(module: nn.Module) -> Iterator[None]:
    """Let the model's pass end with what the module gives."""

    def stop(m: nn.Module, args: Any, output: Tensor) -> None:
        raise _Stop(output.clone())

    hook = module.register_forward_hook(stop)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _holding(model: nn.Module, layer: str, *, read: bool = True) -> Iterator[dict[str, Tensor]]:
    """Hold what a layer gives and, if need be, reads; copies, because models work in place."""
    held: dict[str, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> None:
        held["given"] = output.clone()

    def before(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if read:
            held["read"] = (args[0] if args else keywords["input"]).clone()

    module = model.get_submodule(layer)
    hooks = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(note, with_kwargs=True),
    ]
    try:
        yield held
    finally:
        for hook in hooks:
            hook.remove()


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _shapes(model: nn.Module, stations: Stations, image: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the shape of what each station gives for one image."""
    shapes: dict[str, tuple[int, ...]] = {}
    with ExitStack() as hooks, evaluating(model):
        for name in stations.names:
            module = _submodule(model, name)
            if module is not None:
                hook = module.register_forward_hook(
                    lambda m, args, out, name=name: shapes.update({name: tuple(out.shape)})
                )
                hooks.callback(hook.remove)
        model(image)
    return shapes


def _needed(dense: nn.Module, stations: Stations, image: Tensor) -> list[set[str]]:
    """Return for each station which of the outputs so far, its own included, the rest of the network needs.

    Found by poison: an output is needed if the model's outputs are not numbers once it is not.
    """
    recording = Recording(dense, stations, (image,))
    needed: list[set[str]] = []
    for number, name in enumerate(stations.names):
        earlier = stations.names[:number]
        found = {name}
        if earlier and recording.is_needed(dense, number + 1, range(number)):
            found |= {e for i, e in enumerate(earlier) if recording.is_needed(dense, number + 1, [i])}
        needed.append(found)
    return needed
