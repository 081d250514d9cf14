"""MACs and params of a model, and the cost of each of its layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

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

    Without `batch` it is found out (`batch_size`). The projections of torch's attention have costs too: the packed one
    reads query, key and value in three parts.
    """
    batch = batch_size(model, example_input) if batch is None else batch
    positions: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if isinstance(module, nn.MultiheadAttention):
            for own, projection, count in _projections(module, args):
                key = f"{name}.{own}".lstrip(".")
                positions[key], shapes[key] = positions.get(key, 0) + count // batch, tuple(projection.shape)
            return
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


def _projections(
    module: nn.MultiheadAttention, tensors: tuple[Tensor, ...]
) -> Iterator[tuple[str, Tensor, int]]:
    """The names of the weights that project query, key and value, the weights, and how often each is applied."""
    counts = [tensor.numel() // tensor.shape[-1] for tensor in tensors]
    packed: Tensor | None = module.in_proj_weight
    if packed is not None:
        yield "in_proj_weight", packed, sum(counts) // 3
        return
    for key, count in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), counts, strict=True):
        yield key, getattr(module, key), count


def watch_layers(
    model: nn.Module,
    example_input: ExampleInput,
    record: Callable[[str, nn.Module, tuple[Tensor, ...], Tensor], None],
) -> None:
    """Run the model once in eval mode, and call `record(name, layer, inputs, output)` for each run of a layer.

    Torch's attention uses the weight of its last layer without calling it. It is recorded as a whole, with query, key
    and value, and then as if it had called that layer.
    """

    def record_attention(
        name: str, module: nn.MultiheadAttention, args: Any, keywords: Any, out: Any
    ) -> None:
        given = dict(zip(("query", "key", "value"), args, strict=False)) | keywords
        record(name, module, (given["query"], given["key"], given["value"]), out[0])
        read = out[0].new_empty(*out[0].shape[:-1], module.out_proj.weight.shape[1])
        record(f"{name}.out_proj".lstrip("."), module.out_proj, (read,), out[0])

    attention = [
        module.register_forward_hook(
            lambda m, args, keywords, out, name=name: record_attention(name, m, args, keywords, out),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and _takes_three(module)
    ]
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
        for hook in (*hooks, *attention):
            hook.remove()


def _takes_three(module: nn.MultiheadAttention) -> bool:
    """Whether it is called with query, key and value: a subclass may take other arguments."""
    return list(inspect.signature(module.forward).parameters)[:3] == ["query", "key", "value"]
