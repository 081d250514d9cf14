"""What work on a finished model begins with: groups, latencies, statistics, and loss curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sparsekit.coupling.find_groups import find_groups
from sparsekit.errors import InputError, ModelError, first_line
from sparsekit.evaluation import copied, evaluating, flat_tensors
from sparsekit.finished.display import StepDisplay
from sparsekit.finished.images import collect_images
from sparsekit.latency.layers import measure_layers
from sparsekit.options import FinishedImportance, Outputs, RoundTo
from sparsekit.repair.curves import loss_curves
from sparsekit.repair.held_out import HeldOut
from sparsekit.repair.statistics import InputStatistics, input_statistics
from sparsekit.selection.loss_curves import LossCurve
from sparsekit.structure.groups import ChannelGroups
from sparsekit.surgery.norms import make_readers_plain_

# Of the images, this share is kept apart, and at most so many.
_KEPT_APART = 0.2
_MOST_KEPT_APART = 128
# What a pass with gradients may take, and how much of the layers' outputs it holds at once: about half, as measured.
_STATISTICS_BYTES, _HELD_AT_ONCE = 320 * 2**20, 0.5
_LARGEST_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is looked at: see `prune`."""

    importance: FinishedImportance = "greedy"
    ignore: Sequence[str] = ()
    threads: int = 1
    batch_size: int = 1
    blocks: bool = True
    through_layer_norm: bool = False
    round_to: RoundTo = "auto"
    min_channels: int = 8
    max_images: int = 512
    outputs: Outputs = "classes"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, words in (("importance", get_args(FinishedImportance)), ("outputs", get_args(Outputs))):
            if getattr(self, name) not in words:
                raise InputError(f"{name} must be {' or '.join(words)}, got {getattr(self, name)!r}")
        for name in ("threads", "batch_size", "max_images"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"{name} must be a whole number >= 1, got {value!r}")


@dataclass(frozen=True)
class Prepared:
    """A model and images, ready for trials and repair.

    - `dense` is a copy of the model to work with; `groups` are those of the model.
    - `used` are images that may be fitted, so many of them `at_once` in a pass with gradients; `held_out` judges by the
      others.
    - `statistics` are what the layers of `dense` read on the images that are used.
    """

    dense: nn.Module
    groups: ChannelGroups
    used: Tensor
    at_once: int
    statistics: InputStatistics
    held_out: HeldOut
    seed: int

    @property
    def n_images(self) -> int:
        """How many images there were."""
        return len(self.used) + self.held_out.n_images


@dataclass(frozen=True)
class Measured:
    """A finished model, measured: what a choice of channels needs.

    - `model` is the caller's. The groups of `prepared` have measured latencies if these were asked for.
    - `timed` is the input that speeds are measured with, with so many `threads`.
    - `curves` are the loss curves of the groups, whose channels go in the order of `importance`.
    """

    prepared: Prepared
    model: nn.Module
    timed: Tensor
    threads: int
    importance: FinishedImportance
    curves: dict[str, LossCurve | Tensor]


def measure(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    options: Options,
    show: StepDisplay,
    *,
    latencies: bool,
    check: Callable[[ChannelGroups], None],
) -> Measured:
    """Find the groups, measure layers if `latencies` are needed, prepare, and measure the loss curves.

    `check` may refuse the groups before minutes are spent. Raises DataError for images, ModelError for the model.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = collect_images(images, most=options.max_images)
    timed = found[:1].float().expand(options.batch_size, *found.shape[1:]).clone()
    example = _like(found[:1].clone(), model)
    show.begin("finding groups")
    groups = find_groups(
        model,
        example,
        ignore=options.ignore,
        through_layer_norm=options.through_layer_norm,
        blocks="all" if options.blocks else False,
        round_to=options.round_to,
        min_channels=options.min_channels,
    )
    _check_free(model, groups)
    if latencies:
        show.begin("measuring layers")
        groups = measure_layers(
            float_on_cpu(model), groups, timed, threads=options.threads, progress=show.share
        )
    check(groups)
    dense, layout = _working_copy(model, groups, example)
    used, apart = _parts(found, dense, layout, options.seed)
    del found
    prepared = _with_statistics(dense, groups, used, apart, options.seed, show, options.outputs)
    curves = measure_curves(prepared, show, options.importance)
    return Measured(prepared, model, timed, options.threads, options.importance, curves)


def prepare(
    model: nn.Module, groups: ChannelGroups, images: Tensor, show: StepDisplay, *, seed: int
) -> Prepared:
    """Copy a model whose groups are known, keep some of the images apart, and take statistics on the others.

    Raises ModelError for a model that does not run on the images, or whose outputs cannot be compared.
    """
    dense, layout = _working_copy(model, groups, _like(images[:1], model))
    used, apart = _parts(images, dense, layout, seed)
    return _with_statistics(dense, groups, used, apart, seed, show)


def _parts(images: Tensor, dense: nn.Module, layout: torch.memory_format, seed: int) -> tuple[Tensor, Tensor]:
    """Images that may be fitted, and images kept apart, as the working copy takes them."""
    used, apart = (_like(part, dense).contiguous(memory_format=layout) for part in split(images, seed))
    return used, apart


def _with_statistics(
    dense: nn.Module,
    groups: ChannelGroups,
    used: Tensor,
    apart: Tensor,
    seed: int,
    show: StepDisplay,
    outputs: Outputs = "classes",
) -> Prepared:
    show.begin("statistics of the layers' inputs")
    at_once = _batch_size(dense, used)
    statistics = input_statistics(
        dense, groups, show.over(torch.split(used, at_once)), seed=seed, outputs=outputs
    )
    held_out = HeldOut(dense, groups, (apart,), kind=outputs)
    return Prepared(dense, groups, used, at_once, statistics, held_out, seed)


def measure_curves(
    prepared: Prepared, show: StepDisplay, importance: FinishedImportance = "greedy"
) -> dict[str, LossCurve | Tensor]:
    """Measure the loss curve of each free group, whose channels go in the order of `importance`."""
    show.begin("measuring loss curves")
    return loss_curves(
        prepared.dense,
        prepared.groups,
        prepared.statistics,
        prepared.held_out,
        importance=importance,
        progress=show.share,
    )


def _check_free(model: nn.Module, groups: ChannelGroups) -> None:
    if groups.free:
        return
    why = "; ".join(f"{group.name}: {group.frozen}" for group in groups.groups[:3])
    raise ModelError(
        f"nothing of {type(model).__name__} can be cut: "
        + (why or "it has no convolution or linear layer in floating point; prune before you quantise")
    )


def float_on_cpu(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in float32, as it is exported."""
    return copied(model).cpu().float()


def _working_copy(
    model: nn.Module, groups: ChannelGroups, example: Tensor
) -> tuple[nn.Module, torch.memory_format]:
    """A copy to work with, in eval mode, and its memory format: the one that is faster for maps, if it runs in it.

    Standardised convolutions whose inputs may go are plain in it, so that they can be masked and repaired.
    """
    plain = copied(model)
    plain.train()  # in steps: the `train` of some timm modules returns nothing
    plain.eval()
    make_readers_plain_(plain, (m.tensor for group in groups.free for m in group.of_role("consumer")))
    tensors = [*plain.parameters(), *plain.buffers()]
    if example.dim() != 4 or any(tensor.dim() == 5 for tensor in tensors):
        return plain, torch.contiguous_format
    faster = copied(plain).to(memory_format=torch.channels_last)
    try:  # a `view` of a map may refuse it
        with evaluating(faster):
            faster(example.repeat(2, 1, 1, 1).contiguous(memory_format=torch.channels_last))
    except Exception:
        return plain, torch.contiguous_format
    return faster, torch.channels_last


def as_given(pruned: nn.Module, model: nn.Module) -> nn.Module:
    """Return a pruned working copy in the usual memory format, with the training flags of the caller's model."""
    flags = {name: module.training for name, module in model.named_modules()}
    pruned = pruned.to(memory_format=torch.contiguous_format)
    for name, module in pruned.named_modules():
        module.training = flags.get(name, model.training)
    return pruned


def _like(images: Tensor, model: nn.Module) -> Tensor:
    """The images on the device and in the dtype of the model."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), images)
    return images.to(parameter.device, parameter.dtype)


def split(images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Images that the steps use, and images kept apart."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    n = min(max(round(_KEPT_APART * len(images)), 1), _MOST_KEPT_APART)
    return images[order[n:]], images[order[:n]]


def _batch_size(model: nn.Module, images: Tensor) -> int:
    """How many images a pass with gradients may take at once."""
    total = 0

    def count(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal total
        total += sum(t.numel() * t.element_size() for t in flat_tensors(output))

    hooks = [module.register_forward_hook(count) for module in model.modules() if not list(module.children())]
    try:
        with evaluating(model):
            model(images[:1])
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run on images of shape {tuple(images.shape[1:])}: {first_line(error)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return int(min(max(_STATISTICS_BYTES // max(_HELD_AT_ONCE * total, 1), 1), _LARGEST_BATCH))
