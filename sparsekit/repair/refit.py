"""Refit a cut model layer by layer: each repaired layer is fitted to what the pruned network really gives it.

The closed form takes what the dense network gives a layer. In the pruned network the layers before it have errors of
their own. Here a layer reads what the pruned network, repaired so far, gives it, and has to give what the dense network
gives there. At the last layer before an addition it makes up for the error of the shortcut, too. ("Asymmetric": He,
Zhang and Sun, "Channel pruning for accelerating very deep neural networks", 2017, section 3.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.evaluation import evaluating
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
_MOST_POSITIONS, _COLUMNS_PER_POSITION = 64, 4
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
    """
    refitted = copy.deepcopy(pruned)
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
        inside = [t for t in lost if t.startswith(f"{name}.")]
        by_module = {readers[t].module: readers[t] for t in inside}
        for layer in pair.in_running_order(number, list(by_module)):
            _refit_one_(pair, number, by_module[layer], generator)
        pair.advance(number)
    return refitted


def _refit_one_(pair: _Pair, number: int, reader: Reader, generator: torch.Generator) -> None:
    layer = pair.pruned.get_submodule(reader.module)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    columns = weight[0].numel()
    own = Reader(reader.tensor, False, reader.conv_groups, columns, reader.taps)
    scale = pair.scale_to_the_end(number, reader.module)
    most = max(_MOST_POSITIONS, columns // _COLUMNS_PER_POSITION)
    sums: list[Tensor] = []
    n = 0
    for seen in pair.at(number, reader.module):
        wanted = seen.target(scale)
        precise = torch.promote_types(seen.read.dtype, torch.float32)
        x, wanted = own.rows(layer, seen.read).to(precise), wanted.to(precise)
        y = wanted.flatten(2).mT if isinstance(layer, nn.modules.conv._ConvNd) else wanted
        y = y.reshape(*x.shape[:2], reader.conv_groups, -1)
        if x.shape[1] > most:
            picked = torch.randperm(x.shape[1], generator=generator)[:most].to(x.device)
            x, y = x[:, picked], y[:, picked]
        x, y = (t.flatten(0, 1).movedim(1, 0) for t in (x, y))  # (conv_groups, rows, ...)
        parts = [x.mT @ x, y.mT @ x, x.sum(1), y.sum(1)]
        sums = [
            part.double() if not sums else total + part.double()
            for part, total in zip(parts, sums or parts, strict=True)
        ]
        n += x.shape[1]
    if not sums or n < _FEWEST_ROWS * columns:
        return
    xx, yx, x1, y1 = (total / n for total in sums)
    moments = Moments(x1, xx - x1[:, :, None] * x1[:, None], n)
    cross = yx - y1[:, :, None] * x1[:, None]
    before = own.weight(layer).to(xx.device)
    new = fit(before, cross, moments)
    bias = layer.bias if isinstance(layer.bias, Tensor) else torch.zeros(weight.shape[0]).to(weight)
    shift = (y1 - (new @ x1[:, :, None])[:, :, 0]).flatten()
    own.set_weight_(layer, new)
    add_to_bias_(layer, shift.to(bias) - bias.detach())


@dataclass(frozen=True)
class _Seen:
    """What one batch shows at a layer: what it reads and gives in the pruned network, and what the dense one gives.

    `ends` are the outputs of the station in both, if they have one shape.
    """

    read: Tensor
    given: Tensor
    dense: Tensor
    ends: tuple[Tensor, Tensor] | None

    def target(self, scale: Tensor | None) -> Tensor:
        """What the layer should give. With `scale`, a change of it changes the station's output by so much."""
        if scale is None or self.ends is None:
            return self.dense
        dense, pruned = self.ends
        return self.given + (dense - pruned) / scale


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

    def at(self, number: int, layer: str) -> Iterator[_Seen]:
        """Give what each batch shows at a layer of a station."""
        keep = self._keep.get(f"{layer}.weight")
        for b in range(len(self._batches)):
            with _holding(self.dense, layer) as theirs:
                dense_end = self._run(self.dense, 0, b, number)
            with _holding(self.pruned, layer) as ours:
                pruned_end = self._run(self.pruned, 1, b, number)
            given, whole = theirs["given"], theirs["given"]
            if keep is not None:
                dim = (
                    1
                    if isinstance(self.pruned.get_submodule(layer), nn.modules.conv._ConvNd)
                    else whole.dim() - 1
                )
                given = whole.index_select(dim, keep)
                if dense_end.shape == whole.shape:
                    dense_end = dense_end.index_select(dim, keep)
            ends = (dense_end, pruned_end)
            alike = dense_end.shape == pruned_end.shape == ours["given"].shape
            yield _Seen(ours["read"], ours["given"], given, ends if alike else None)

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
        dim = 1 if isinstance(module, (nn.Conv1d, nn.Conv2d)) else end.dim() - 1
        others = [d for d in range(end.dim()) if d != dim]
        scale = (change * noise).sum(others, keepdim=True) / noise.square().sum(others, keepdim=True)
        error = (change - scale * noise).square().mean().sqrt()
        usable = bool(error <= _SAME * change.square().mean().sqrt()) and bool((scale.abs() > _SAME).all())
        return scale if usable else None

    def advance(self, number: int) -> None:
        """Run the station in both models, keep what it gives, and forget what no later station needs."""
        name = self._stations.names[number]
        for b, given in enumerate(self._given):
            ends = self._run(self.dense, 0, b, number), self._run(self.pruned, 1, b, number)
            given[name] = (_packed(ends[0]), _packed(ends[1]))
            for old in set(given) - self._needed[number]:
                del given[old]

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

    def _run(self, model: nn.Module, which: int, b: int, number: int) -> Tensor:
        """Run one station of a model on a batch: what is before answers from memory, what is after does not run."""
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
            changed.enter_context(_stopping_after(station))
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
def _holding(model: nn.Module, layer: str) -> Iterator[dict[str, Tensor]]:
    """Hold what a layer reads and gives; copies, because models work in place."""
    held: dict[str, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> None:
        held["given"] = output.clone()

    def before(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
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
