"""Fold the constants that dead channels put out into what stays, so that cutting the channels does not lose them.

A channel whose scale is zero still puts out act(shift), the same at every position. Constants are observed, not
derived: a channel that does not vary at the input of the layer that reads it, on two random batches, is taken to be
constant. That is not a proof: a channel that only other images excite passes for a constant too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.errors import ModelError, first_line
from sparsekit.evaluation import evaluating
from sparsekit.structure.counting import CONVOLUTIONS, TRANSPOSED
from sparsekit.structure.inputs import InputSpec
from sparsekit.structure.plan import PrunePlan

# A channel counts as constant when it varies by less than this, relative to its size (float32 noise of a sum).
CONSTANT_TOLERANCE = 1e-6
# With a carrier below this share of the largest constant it takes over, weights would become far too large.
_SMALLEST_CARRIER = 0.01
_LAYERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
# Forwards that use `weight` as it is, besides torch's own; by name, so that timm need not be loaded.
_AS_IS = {"timm.layers.linear.Linear.forward", "timm.layers.conv2d_same.Conv2dSame.forward"}


def fold_constants_(model: nn.Module, plan: PrunePlan) -> dict[str, int]:
    """Detach the channels that `plan` drops from the layers that read them, and keep their constants; in place.

    Constants are those of two random batches; see `move_constants_`. Returns how many were folded, by module.
    """
    tensors = (cut.tensor for cut in plan.cuts if cut.role == "consumer" and cut.drop)
    layers = plain_layers(model, tensors)
    folded = move_constants_(model, plan, observe_inputs(model, plan.inputs, layers))
    blank_columns_(model, plan)
    return folded


def move_constants_(model: nn.Module, plan: PrunePlan, readings: Mapping[str, Reading]) -> dict[str, int]:
    """Move the constants of channels that `plan` drops into what stays, in place, and set their columns to zero.

    `readings` say, by the weight's name, which input channels of a layer are constant. The constants a_i of the dropped
    channels i go

    - into the bias, as the sum over i and the kernel of a_i W[:, i]. That is exact where every output position reads
      the whole kernel: linear layers, 1x1 convolutions, and convolutions without zero padding;
    - elsewhere into the column of the largest constant a_j that stays, the carrier: W[:, j] += sum over i of
      (a_i / a_j) W[:, i]. That is exact because all input channels are padded alike.

    Both need an ungrouped layer that uses its weight as it is and shares it with no other (`plain_layers`). Constants
    of other layers, and constants without a carrier (see `keep_carriers`), stay where they are. Returns how many were
    moved, by module.
    """
    cuts = [cut for cut in plan.cuts if cut.role == "consumer" and cut.drop and cut.tensor in readings]
    layers = plain_layers(model, (cut.tensor for cut in cuts))
    folded: dict[str, int] = {}
    with torch.no_grad():
        for cut in (cut for cut in cuts if cut.tensor in layers):
            module, reading = layers[cut.tensor], readings[cut.tensor]
            stays = torch.ones(len(reading.low), dtype=torch.bool)
            stays[list(cut.drop)] = False
            lost = reading.constants.masked_fill(stays, 0)
            carrier = reading.carrier(stays)
            if not lost.any():
                continue
            if bias_is_exact(module):
                weight = module.weight
                assert isinstance(weight, Tensor)
                add_to_bias_(module, weight.reshape(*weight.shape[:2], -1).sum(2) @ lost.to(weight))
            elif carrier is not None:
                _merge_(module, cut.dim, carrier, lost / reading.constants[carrier])
            else:
                continue
            _blank_(module, cut.dim, lost.nonzero()[:, 0])
            folded[cut.tensor.rpartition(".")[0]] = int(lost.count_nonzero())
    return folded


def blank_columns_(model: nn.Module, plan: PrunePlan) -> None:
    """Set the columns that read dropped channels to zero, in place."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        for cut in plan.cuts:
            if cut.role == "consumer" and cut.drop:
                tensor = tensors[cut.tensor]
                tensor.index_fill_(cut.dim, torch.tensor(cut.drop, device=tensor.device), 0)


def readers_of(
    model: nn.Module, tensors: Iterable[str], *, conv_groups: bool = False
) -> dict[str, nn.Module]:
    """The linear layers and ungrouped convolutions that hold these tensors, by tensor; with `conv_groups` all.

    The weight of an ungrouped one has one column for each input channel, in order.
    """
    modules = dict(model.named_modules())
    found = ((tensor, modules[tensor.rpartition(".")[0]]) for tensor in tensors)
    return {
        tensor: module
        for tensor, module in found
        if isinstance(module, _LAYERS) and (conv_groups or getattr(module, "groups", 1) == 1)
    }


def plain_layers(
    model: nn.Module, tensors: Iterable[str], *, conv_groups: bool = False
) -> dict[str, nn.Module]:
    """Those of `readers_of` that use their weight as it is and share it with no other module."""
    held = [tensor for module in model.modules() for tensor in module._parameters.values()]

    def is_plain(module: nn.Module) -> bool:
        weight = module._parameters.get("weight")  # None if it is computed: normalised or parametrised
        alone = weight is not None and sum(tensor is weight for tensor in held) == 1
        return alone and (_is_torch_own(module) or _forward_name(module) in _AS_IS)

    found = readers_of(model, tensors, conv_groups=conv_groups)
    return {tensor: module for tensor, module in found.items() if is_plain(module)}


def bias_is_exact(module: nn.Module) -> bool:
    """Whether a constant input channel of a plain layer adds the same number to every output position."""
    if isinstance(module, nn.Linear):
        return True
    if not isinstance(module, CONVOLUTIONS):
        return False
    if all(size == 1 for size in module.kernel_size):
        return module.padding in ("valid", "same") or not any(module.padding)
    # A forward that is not torch's may pad in another way than `padding` says.
    unpadded = module.padding == "valid" or (module.padding != "same" and not any(module.padding))
    return _is_torch_own(module) and (unpadded or module.padding_mode in ("reflect", "replicate", "circular"))


@dataclass(frozen=True)
class Reading:
    """Lowest and highest value of each input channel of a layer, over all positions; float64, on the CPU."""

    low: Tensor
    high: Tensor

    @property
    def constants(self) -> Tensor:
        """The value of each channel that does not vary; 0 for one that does."""
        middle = (self.low + self.high) / 2
        steady = self.high - self.low <= CONSTANT_TOLERANCE * (1 + middle.abs())
        return middle.where(steady, 0.0)

    @property
    def carriers(self) -> Tensor:
        """Which channels may be carriers: constant, not 0, and steady measured by their own size."""
        size = self.constants.abs()
        return (size > 0) & (self.high - self.low <= CONSTANT_TOLERANCE * size)

    def carrier(self, stays: Tensor) -> int | None:
        """The largest carrier among the channels that stay; None if none is large enough for the constants that go."""
        size = self.constants.abs()
        largest = size.masked_fill(stays, 0).max()
        usable = size.where(self.carriers & stays & (size >= _SMALLEST_CARRIER * largest), 0.0)
        return int(usable.argmax()) if usable.any() else None


def observe_inputs(
    model: nn.Module, inputs: InputSpec, layers: Mapping[str, nn.Module]
) -> dict[str, Reading]:
    """What each layer reads on two random batches, by its weight's name; layers that do not run are left out."""
    readings: dict[str, Reading] = {}

    def watch(key: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def record(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            read = args[0] if args else keywords["input"]
            values = read.movedim(channel_dim(module), 0)
            values = values.reshape(len(values), -1)  # a linear layer may read one vector
            low, high = values.amin(1).double().cpu(), values.amax(1).double().cpu()
            if key in readings:
                low, high = torch.minimum(low, readings[key].low), torch.maximum(high, readings[key].high)
            readings[key] = Reading(low, high)

        return record

    hooks = [module.register_forward_pre_hook(watch(key), with_kwargs=True) for key, module in layers.items()]
    try:
        with evaluating(model):
            for seed in (0, 1) if layers else ():
                inputs.draw(seed, model, batch=2).call(model)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run on trial inputs of shapes {list(inputs.shapes)}: "
            f"{first_line(error)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return readings


def add_to_bias_(module: nn.Module, amount: Tensor) -> None:
    """Add to the bias (outputs,) of a layer, in place; it is made if there is none."""
    bias, weight = getattr(module, "bias", None), module.weight
    assert isinstance(weight, Tensor)
    if bias is None:
        bias = nn.Parameter(torch.zeros_like(amount, dtype=weight.dtype), requires_grad=weight.requires_grad)
        module.bias = bias
    with torch.no_grad():
        bias.add_(amount.to(bias))


def _blank_(module: nn.Module, dim: int, positions: Tensor) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    weight.index_fill_(dim, positions.to(weight.device), 0)


def _merge_(module: nn.Module, dim: int, carrier: int, shares: Tensor) -> None:
    """Add to the carrier's column the columns of all input channels, times their shares (n_inputs,)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    columns = weight.movedim(dim, 0)  # a view
    columns[carrier] += torch.tensordot(shares.to(weight), columns, 1)


def _is_torch_own(module: nn.Module) -> bool:
    """Whether the module computes as torch's class does: a subclass may standardise its weight or pad itself."""
    base = next(base for base in _LAYERS if isinstance(module, base))
    own = (getattr(base, "forward", None), getattr(base, "_conv_forward", None))
    return own == tuple(
        getattr(getattr(module, name, None), "__func__", None) for name in ("forward", "_conv_forward")
    )


def _forward_name(module: nn.Module) -> str:
    """Full name of the function that the module computes with."""
    forward = getattr(module.forward, "__func__", None)
    return f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}"


def channel_dim(module: nn.Module) -> int:
    """The dimension of the channels in the input of a linear layer or convolution, counted from the end."""
    return -1 - len(module.kernel_size) if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) else -1
