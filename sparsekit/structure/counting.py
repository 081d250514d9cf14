"""MACs and params of a model, and the cost of each of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsekit.evaluation import ExampleInput, as_inputs, evaluating
from sparsekit.structure.groups import LayerCost
from sparsekit.structure.inputs import batch_size

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def count_params(model: nn.Module) -> int:
    """Count the params of a model. Shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example_input: ExampleInput) -> int:
    """Count the MACs of one forward pass on `example_input`, divided by its batch size (FLOPs / 2).

    Convolutions and all matrix products count, attention included, as in `torch.utils.flop_counter`. The model runs in
    eval mode without gradients; its flags are restored.
    """
    # The counter tracks modules by the gradients of their inputs, and fails if an input is a parameter.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inputs = as_inputs(example_input).each(Tensor.detach)
    batch = batch_size(model, example_input)
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with evaluating(model), attention_in_the_open(), FlopCounterMode(display=False) as counter:
            inputs.call(model)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return int(counter.get_total_flops() // 2 // batch)


@contextmanager
def attention_in_the_open() -> Iterator[None]:
    """Compute attention as plain matrix products, because the counter does not know the fused kernels of a CPU."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def layer_costs(
    model: nn.Module, example_input: ExampleInput, batch: int | None = None
) -> tuple[LayerCost, ...]:
    """Return the cost of every convolution and linear layer, observed in one forward pass on `batch` examples.

    Without `batch` it is found out (`batch_size`).
    """
    batch = batch_size(model, example_input) if batch is None else batch
    positions: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        if isinstance(module, nn.Linear):
            count = out.numel() // weight.shape[0]
        else:
            mapped = args[0] if isinstance(module, TRANSPOSED) else out
            count = prod(mapped.shape[2:]) * mapped.shape[0]
        key = f"{name}.weight" if name else "weight"
        positions[key] = positions.get(key, 0) + count // batch
        shapes[key] = tuple(weight.shape)

    watch_layers(model, example_input, record)
    return tuple(LayerCost(name, shapes[name], positions[name]) for name in positions)


def watch_layers(
    model: nn.Module,
    example_input: ExampleInput,
    record: Callable[[str, nn.Module, tuple[Tensor, ...], Tensor], None],
) -> None:
    """Run the model once in eval mode, and call `record(name, layer, inputs, output)` for each run of a layer."""
    hooks = [
        module.register_forward_hook(
            lambda m, args, kwargs, out, name=name: record(name, m, (*args, *kwargs.values()), out),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
        if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear))
    ]
    try:
        with evaluating(model):
            as_inputs(example_input).call(model)
    finally:
        for hook in hooks:
            hook.remove()
