"""Constants of dead channels: observed where the next layer reads them, and added to its bias where exact.

A channel whose scale is zero still puts out act(shift), the same at every position. Dropping it would lose that
constant. Rather than derive it from operator rules, it is observed at the input of each consuming layer on two
random batches: what does not vary there is a constant, whatever lies in between (pooling, gates, additions).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.modes import evaluating, random_inputs
from sparsekit.plan import PrunePlan, TensorCut

# A channel counts as constant when it varies by less than this, relative to its size (float32 noise of a sum).
_CONSTANT_TOLERANCE = 1e-6


def fold_constants_(model: nn.Module, plan: PrunePlan) -> dict[str, int]:
    """Detach the channels that `plan` drops from every layer that reads them; constants go into its bias.

    In place. Afterwards the dropped columns of every consumer are zero, so that dropping the channels changes
    nothing more: this is the masked dense model. A constant c of input channel i adds sum over the kernel of
    W[:, i] x c to the bias, which is exact for linear layers, 1x1 convolutions and convolutions that do not
    zero-pad; elsewhere a constant other than 0 is dropped. Returns how many constants were folded, by module.
    """
    consumers = [cut for cut in plan.cuts if cut.role == "consumer" and cut.drop]
    modules = dict(model.named_modules())
    layers = [cut for cut in consumers if _is_layer(modules[cut.tensor.rpartition(".")[0]])]
    constants = _observe_constants(model, plan, layers)
    folded: dict[str, int] = {}
    with torch.no_grad():
        for cut in consumers:
            name = cut.tensor.rpartition(".")[0]
            module = modules[name]
            weight = getattr(module, cut.tensor.rpartition(".")[2])
            assert isinstance(weight, Tensor)
            dropped = torch.tensor(cut.drop, device=weight.device)
            constant = constants.get(cut.tensor, torch.zeros(len(dropped))).to(weight)
            live = constant != 0
            if _bias_is_exact(module) and bool(live.any()):
                columns = weight.index_select(cut.dim, dropped).reshape(len(weight), len(dropped), -1).sum(2)
                _add_to_bias_(module, columns @ constant)
                folded[name] = int(live.sum())
    blank_columns_(model, plan)
    return folded


def blank_columns_(model: nn.Module, plan: PrunePlan) -> None:
    """Set the columns that read dropped channels to zero, in place."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        for cut in plan.cuts:
            if cut.role == "consumer" and cut.drop:
                tensor = tensors[cut.tensor]
                tensor.index_fill_(cut.dim, torch.tensor(cut.drop, device=tensor.device), 0)


def _is_layer(module: nn.Module) -> bool:
    """Whether the module's weight is a filter bank, so that what it reads is its own input."""
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))


def _observe_constants(model: nn.Module, plan: PrunePlan, consumers: list[TensorCut]) -> dict[str, Tensor]:
    """For each consumer, the constant value of each dropped channel at its input; 0 where it varies."""
    lowest: dict[str, Tensor] = {}
    highest: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def watch(cut: TensorCut) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def record(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            channel_dim = -1 if isinstance(module, nn.Linear) else 1
            read = args[0] if args else keywords["input"]
            values = read.movedim(channel_dim, 0).flatten(1)[list(cut.drop)]
            low, high = values.amin(1), values.amax(1)
            key = cut.tensor
            lowest[key] = torch.minimum(lowest[key], low) if key in lowest else low
            highest[key] = torch.maximum(highest[key], high) if key in highest else high

        return record

    hooks = [
        modules[cut.tensor.rpartition(".")[0]].register_forward_pre_hook(watch(cut), with_kwargs=True)
        for cut in consumers
    ]
    try:
        with evaluating(model):
            for seed in (0, 1):
                model(*random_inputs(plan.input_shapes, seed, model, batch=2))
    finally:
        for hook in hooks:
            hook.remove()
    constants = {}
    for key, low in lowest.items():
        middle = (low + highest[key]) / 2
        steady = highest[key] - low <= _CONSTANT_TOLERANCE * (1 + middle.abs())
        constants[key] = torch.where(steady, middle, torch.zeros_like(middle))
    for cut in consumers:  # a layer the example never reaches reads no constant
        constants.setdefault(cut.tensor, torch.zeros(len(cut.drop)))
    return constants


def _bias_is_exact(module: nn.Module) -> bool:
    """Whether a constant input channel adds the same number to every output position."""
    if isinstance(module, nn.Linear):
        return True
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or module.groups != 1:
        return False
    if all(size == 1 for size in module.kernel_size):
        return module.padding in ("valid", "same") or not any(module.padding)
    # Subclasses may pad on their own (timm's "same" convolutions), so only the plain classes are trusted.
    plain = type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    unpadded = module.padding == "valid" or (module.padding != "same" and not any(module.padding))
    return plain and (unpadded or module.padding_mode in ("reflect", "replicate", "circular"))


def _add_to_bias_(module: nn.Module, amount: Tensor) -> None:
    bias, weight = getattr(module, "bias", None), module.weight
    assert isinstance(weight, Tensor)
    if bias is None:
        bias = nn.Parameter(torch.zeros_like(amount), requires_grad=weight.requires_grad)
        module.bias = bias
    bias.add_(amount)
