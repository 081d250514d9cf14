"""What a model is called with, as plain data: shapes, types and ranges; and trial inputs that are drawn from it.

Weights are compared on trial inputs, long after the example is gone. So these have to be such as the model can read:
ids within the table, times above zero, masks that leave something.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sparsekit.errors import InputError
from sparsekit.evaluation import Arguments, ExampleInput, as_inputs, evaluating, flat_tensors, mapped

# Which batches a model takes: any, only multiples of the example's, or only the example's.
Batch = Literal["any", "multiples", "fixed"]
# Whole numbers and truth values may mean something, so they are kept as they are, up to so many of them.
_MOST_VALUES = 4096
_CONSTANTS = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of an example: its shape, its type, and what values it has.

    mean, std, low, high: of its values. values: the values themselves, in order, where they are kept. grows: whether
    its first dimension is the batch.
    """

    shape: tuple[int, ...]
    dtype: str
    mean: float = 0.0
    std: float = 1.0
    low: float = -math.inf
    high: float = math.inf
    values: tuple[float, ...] = ()
    grows: bool = False

    @staticmethod
    def of(tensor: Tensor) -> TensorSpec:
        """Describe a tensor. A floating one is drawn anew, unless some of its values are infinite or NaN."""
        name = str(tensor.dtype).removeprefix("torch.")
        spec = TensorSpec(tuple(tensor.shape), name)
        if not tensor.numel() or tensor.is_meta or tensor.is_complex():
            return spec
        numbers = tensor.detach().double().cpu()
        kept = not tensor.is_floating_point() or not bool(numbers.isfinite().all())
        values = tuple(numbers.flatten().tolist()) if kept and numbers.numel() <= _MOST_VALUES else ()
        if tensor.is_floating_point() and not bool(numbers.isfinite().all()):
            return replace(spec, values=values)
        low, high = float(numbers.min()), float(numbers.max())
        if tensor.is_floating_point() and low == high == 0:
            return spec  # an example of zeros says nothing
        mean, std = float(numbers.mean()), float(numbers.std(correction=0))
        mean, std = float(f"{mean:.4g}"), float(f"{std:.4g}")
        return replace(spec, mean=mean, std=std, low=low, high=high, values=values)

    def draw(self, generator: torch.Generator, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A tensor of this kind, of another first dimension perhaps, on the device and in the precision of `like`."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        if self.values:
            values = torch.tensor(self.values, dtype=torch.float64).reshape(self.shape)
            if shape != self.shape:
                values = values[torch.arange(shape[0]) % self.shape[0]]
        elif dtype.is_floating_point or dtype.is_complex:
            values = self._numbers(generator, shape, dtype)
        elif dtype == torch.bool:
            values = torch.rand(shape, generator=generator) < self.mean
        else:
            low, high = (0, 1) if math.isinf(self.low) else (int(self.low), int(self.high))
            values = torch.randint(low, high + 1, shape, generator=generator)
        if dtype.is_floating_point:
            dtype = like.dtype
        elif dtype.is_complex:
            dtype = torch.complex128 if like.dtype == torch.float64 else torch.complex64
        return values.to(like.device, dtype)

    def _numbers(self, generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.cfloat if dtype.is_complex else None)
        if math.isinf(self.low):
            return drawn
        if self.low == self.high:  # one value is not enough to see what depends on it
            return self.low * (0.5 + torch.rand(shape, generator=generator))
        return (self.mean + self.std * drawn).clamp(self.low, self.high)


@dataclass(frozen=True)
class InputSpec:
    """The arguments of an example, nested as the model takes them, with a `TensorSpec` in place of each tensor.

    `others` are further ways to call the model, as `find_groups(more_inputs=)` was given them.
    """

    positional: tuple[Any, ...] = ()
    keyword: tuple[tuple[str, Any], ...] = ()
    batch: Batch = "any"
    others: tuple[InputSpec, ...] = ()

    @staticmethod
    def of(example_input: ExampleInput) -> InputSpec:
        """Describe an example, for a model that takes any batch: `tried` finds out whether it does.

        Raises InputError for an argument that is neither tensor nor constant nor a nest of them, and without a tensor.
        """
        arguments = as_inputs(example_input)
        _check_nest(arguments)
        positional, keyword = (
            mapped(part, TensorSpec.of) for part in (arguments.positional, dict(arguments.keyword))
        )
        spec = InputSpec(positional, tuple(keyword.items()))
        if any(one.shape[:1] == (0,) for one in spec.tensors):
            raise InputError(
                f"example_input holds a tensor without elements: its shapes are {list(spec.shapes)}; give one example "
                "at least"
            )
        return spec._with_batch()

    @property
    def tensors(self) -> list[TensorSpec]:
        """The tensors, in order."""
        found: list[TensorSpec] = []
        mapped((self.positional, dict(self.keyword)), found.append, TensorSpec)
        return found

    @property
    def ways(self) -> tuple[InputSpec, ...]:
        """All ways to call the model, this one first."""
        return (self, *self.others)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Their shapes."""
        return tuple(one.shape for one in self.tensors)

    @property
    def batch_size(self) -> int:
        """How many examples there are: 1 where no tensor has a dimension for them."""
        return next((one.shape[0] for one in self.tensors if one.grows), 1)

    def draw(self, seed: int, like: nn.Module, batch: int | None = None) -> Arguments:
        """Trial arguments, on the device and in the precision of the model `like`.

        `batch` replaces the batch size, if the model takes any, or multiplies it. The random state does not move.
        """
        generator = torch.Generator().manual_seed(seed)
        parameter = next((p for p in like.parameters() if p.is_floating_point()), torch.zeros(()))

        def drawn(one: TensorSpec) -> Tensor:
            shape = one.shape
            if batch is not None and one.grows and self.batch != "fixed":
                shape = (batch * (shape[0] if self.batch == "multiples" else 1), *shape[1:])
            return one.draw(generator, parameter, shape)

        positional, keyword = (
            mapped(part, drawn, TensorSpec) for part in (self.positional, dict(self.keyword))
        )
        return Arguments(positional, keyword)

    def to_json(self) -> dict[str, Any]:
        """As dictionaries and lists; `from_json` gives back an equal one."""
        return {
            "positional": [_to_json(one) for one in self.positional],
            "keyword": {name: _to_json(one) for name, one in self.keyword},
            "batch": self.batch,
            **({"others": [one.to_json() for one in self.others]} if self.others else {}),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> InputSpec:
        """Read what `to_json` returned. Raises AttributeError, KeyError, TypeError or ValueError else."""
        held = _as(dict, data)
        if held["batch"] not in get_args(Batch) or set(held) - {"positional", "keyword", "batch", "others"}:
            raise ValueError(f"batch must be one of {', '.join(get_args(Batch))}, got {held['batch']!r:.40}")
        return InputSpec(
            tuple(_from_json(one) for one in _as(list, held["positional"])),
            tuple((name, _from_json(one)) for name, one in _as(dict, held["keyword"]).items()),
            held["batch"],
            tuple(InputSpec.from_json(one) for one in _as(list, held.get("others", []))),
        )

    def _with_batch(self, batch: Batch = "any") -> InputSpec:
        """With those tensors growing whose first dimension is that of the first tensor, unless the batch is fixed."""
        size = next((one.shape[0] for one in self.tensors if one.shape), None)
        kind: Batch = "fixed" if size is None else batch

        def changed(one: TensorSpec) -> TensorSpec:
            return replace(one, grows=kind != "fixed" and bool(one.shape) and one.shape[0] == size)

        positional, keyword = (
            mapped(part, changed, TensorSpec) for part in (self.positional, dict(self.keyword))
        )
        return InputSpec(positional, tuple(keyword.items()), kind, self.others)

    def tried(self, model: nn.Module) -> InputSpec:
        """With the batches that the model takes: any, if it runs on one more than it was shown, or twice as many."""
        for spec, batch in ((self._with_batch(), self.batch_size + 1), (self._with_batch("multiples"), 2)):
            with suppress(Exception), evaluating(model), torch.random.fork_rng():
                if flat_tensors(spec.draw(0, model, batch).call(model)):
                    return spec
        return self._with_batch("fixed")


def batch_size(model: nn.Module, example_input: ExampleInput) -> int:
    """How many examples `example_input` holds. Where its shape does not tell, the model is run on one more."""
    spec = InputSpec.of(example_input)
    # Four dimensions are a batch of maps. Fewer may be one image or sequence, without a dimension for the batch.
    clear = spec.batch_size == 1 or any(one.grows and len(one.shape) > 3 for one in spec.tensors)
    return spec.batch_size if clear else spec.tried(model).batch_size


def _check_nest(arguments: Arguments) -> None:
    if not arguments.tensors:
        found = [type(one).__name__ for one in (*arguments.positional, *arguments.keyword.values())]
        raise InputError(
            f"example_input must hold a tensor, got {', '.join(found) or 'nothing'}; give a tensor, a tuple of "
            "arguments, or a dictionary of arguments by name"
        )
    for place, one in (*enumerate(arguments.positional), *arguments.keyword.items()):
        for part in _leaves(one):
            if not isinstance(part, (Tensor, *_CONSTANTS)):
                raise InputError(
                    f"argument {place} of example_input holds a {type(part).__name__}; give tensors, numbers, texts, "
                    "None, and lists, tuples and dictionaries of these"
                )


def _leaves(nest: Any) -> Iterator[Any]:
    if isinstance(nest, Mapping):
        nest = list(nest.values())
    if isinstance(nest, (list, tuple)):
        for part in nest:
            yield from _leaves(part)
    else:
        yield nest


def _to_json(nest: Any) -> Any:
    """Each node as a dictionary with one key, which says what it is."""
    if isinstance(nest, TensorSpec):
        fields = {
            name: value for name, value in asdict(nest).items() if value != getattr(TensorSpec, name, None)
        }
        numbers = {name: _as_text(fields[name]) for name in ("mean", "std", "low", "high") if name in fields}
        values = {"values": [_as_text(value) for value in nest.values]} if nest.values else {}
        return {"tensor": {**fields, "shape": list(nest.shape), **numbers, **values}}
    if isinstance(nest, Mapping):
        return {"dict": {str(name): _to_json(one) for name, one in nest.items()}}
    if isinstance(nest, (list, tuple)):
        return {"tuple" if isinstance(nest, tuple) else "list": [_to_json(one) for one in nest]}
    return {"value": nest}


def _as_text(number: float) -> float | str:
    """JSON has no infinity."""
    return number if math.isfinite(number) else str(number)


def _as(kind: type, value: Any) -> Any:
    """The value, if it is of this type."""
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__} where {value!r:.40} stands")
    return value


def _from_json(data: Any) -> Any:
    ((kind, held),) = _as(dict, data).items()
    if kind == "tensor":
        return _tensor_from_json(_as(dict, held))
    if kind == "dict":
        return {name: _from_json(one) for name, one in _as(dict, held).items()}
    if kind in ("list", "tuple"):
        parts = [_from_json(one) for one in _as(list, held)]
        return parts if kind == "list" else tuple(parts)
    if kind == "value" and isinstance(held, _CONSTANTS):
        return held
    raise ValueError(f"an argument is described by {kind!r:.40}, which is unknown")


def _tensor_from_json(data: Mapping[str, Any]) -> TensorSpec:
    unknown = set(data) - {"shape", "dtype", "mean", "std", "low", "high", "values", "grows"}
    shape = tuple(_as(int, size) for size in _as(list, data["shape"]))
    values = tuple(_number(value) for value in _as(list, data.get("values", [])))
    if unknown or any(size < 1 for size in shape):
        raise ValueError(f"an input has an impossible shape {shape} or the unknown keys {sorted(unknown)}")
    if not isinstance(getattr(torch, _as(str, data["dtype"]), None), torch.dtype):
        raise ValueError(f"an input has the unknown type {data['dtype']!r:.40}")
    if values and len(values) != math.prod(shape):
        raise ValueError(f"an input of shape {shape} has {len(values)} values")
    numbers = {name: _number(data[name]) for name in ("mean", "std", "low", "high") if name in data}
    grows = _as(bool, data.get("grows", False))
    return TensorSpec(shape, data["dtype"], **numbers, values=values, grows=grows)


def _number(value: Any) -> float:
    if value in ("inf", "-inf", "nan") or type(value) in (int, float):
        return float(value)
    raise TypeError(f"expected a number where {value!r:.40} stands")
