"""Run a model without changing it: copies, eval mode, true float32, its arguments, its outputs as flat tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sparsekit.errors import ModelError, first_line

_PLAIN = (nn.Module.train, nn.Module.eval)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put `model` into eval mode; afterwards every submodule gets its own training flag back."""
    flags = [(module, module.training) for module in model.modules()]
    # Some timm models compute tensors in eval mode, keep them, and drop them in `train`; so these are called, even if
    # the model is in eval mode already: its weights may have changed. For all others a flag is enough, and much faster.
    own = [(m, training) for m, training in flags if _functions(m.train, m.eval) != _PLAIN]
    try:
        # In steps: the `train` of some timm modules returns nothing.
        for module, _ in own:
            module.train()
            module.eval()
        for module, _ in flags:
            if module.training:
                module.training = False
        yield model
    finally:
        for module, training in own:
            module.train(training)
        for module, training in flags:
            if module.training != training:
                module.training = training


def _functions(*methods: Any) -> tuple[Any, ...]:
    """What the methods run: one may be set on the module itself."""
    return tuple(getattr(method, "__func__", None) for method in methods)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """As `eval_mode`, without gradients, and without the fused kernel for torch's transformer layers.

    That kernel calls no layer, so hooks would not see any; and inputs packed for it suit no other forward.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with eval_mode(model), torch.no_grad():
            yield model
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def comparing(model: nn.Module) -> Iterator[nn.Module]:
    """As `evaluating`, in true float32, to compare outputs to many digits.

    That is without autocast, and without TF32, the default of NVIDIA GPUs, which rounds inputs to 10 bits.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with evaluating(model), torch.autocast(device.type, enabled=False), _no_tf32():
        yield model


@contextmanager
def _no_tf32() -> Iterator[None]:
    convolutions: Any = torch.backends.cudnn
    products: Any = torch.backends.cuda.matmul
    switches: list[tuple[Any, str, Any]] = [
        (convolutions, "allow_tf32", False),
        (products, "allow_tf32", False),
    ]
    try:
        before = [getattr(place, name) for place, name, _ in switches]
    except RuntimeError:  # torch 2.9 has switches for each kind of operation, and objects where they differ
        kinds = (convolutions.conv, convolutions.rnn, products)
        switches = [(kind, "fp32_precision", "ieee") for kind in kinds]
        before = [getattr(place, name) for place, name, _ in switches]
    try:
        for place, name, value in switches:
            setattr(place, name, value)
        yield
    finally:
        for (place, name, _), value in zip(switches, before, strict=True):
            setattr(place, name, value)


# How a model is called: one argument, several by position, or several by name.
ExampleInput = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Arguments:
    """What a model is called with: by position, and by name. Each may be a nest of tuples, lists and dicts."""

    positional: tuple[Any, ...] = ()
    keyword: Mapping[str, Any] = field(default_factory=dict)

    def call(self, model: Callable[..., Any]) -> Any:
        """What the model returns for them."""
        return model(*self.positional, **self.keyword)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors in them, in order."""
        return flat_tensors((self.positional, dict(self.keyword)))

    def each(self, change: Callable[[Tensor], Any]) -> Arguments:
        """The same nest with each tensor changed, in order."""
        return Arguments(mapped(self.positional, change), mapped(dict(self.keyword), change))


def as_inputs(example_input: ExampleInput) -> Arguments:
    """The arguments that a model is called with.

    A tuple holds several by position, a dict several by name. Anything else, a tensor or a list, is one argument.
    """
    if isinstance(example_input, Mapping):
        return Arguments(keyword=dict(example_input))
    if isinstance(example_input, tuple):
        return Arguments(tuple(example_input))
    return Arguments((example_input,))


def mapped(nest: Any, change: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """The nest of tuples, lists and dicts, with everything of this kind in it changed, in order."""
    if isinstance(nest, kind):
        return change(nest)
    if isinstance(nest, Mapping):
        return {key: mapped(value, change, kind) for key, value in nest.items()}
    if isinstance(nest, (list, tuple)):
        values = [mapped(value, change, kind) for value in nest]
        return type(nest)(*values) if hasattr(nest, "_fields") else type(nest)(values)
    return nest


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of a model, also of one that keeps tensors of its last pass, as `self.features = x` does.

    Torch copies no tensor that is part of a graph: these are copied without it. Raises ModelError for a model that
    cannot be copied.
    """
    memo: dict[int, Any] = {}
    for name, module in model.named_modules():
        _refuse_masked(name, module)
        kept: list[Tensor] = []
        _collect([vars(module), module._parameters, module._buffers], kept, set())
        for tensor in kept:
            if tensor.grad_fn is not None and id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied: {first_line(error)}; every cut is tried on copies, so keep what "
            "cannot be copied out of the module"
        ) from error


def _refuse_masked(name: str, module: nn.Module) -> None:
    """Raise ModelError for a module that `torch.nn.utils.prune` masks: its weight is made anew in each pass."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            own = getattr(hook, "_tensor_name", "weight")
            raise ModelError(
                f"{name or type(module).__name__}.{own} is masked by torch.nn.utils.prune; make the mask permanent "
                f"first: torch.nn.utils.prune.remove(module, {own!r})"
            )


def flat_tensors(outputs: Any) -> list[Tensor]:
    """The tensors in a model's output, in order, out of any nesting of tuples, lists, mappings and objects.

    Of an object, such as a dataclass, all attributes count. Modules are not looked into.
    """
    found: list[Tensor] = []
    _collect(outputs, found, set())
    return found


_PLAIN_VALUES = (str, bytes, int, float, complex, type(None), type, ModuleType, torch.dtype, torch.device)


def _collect(value: Any, found: list[Tensor], seen: set[int]) -> None:
    """Append the tensors in a value, in order; `seen` are the objects looked into, for some hold themselves."""
    if isinstance(value, Tensor):
        found.append(value)
        return
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = list(value)
    elif isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (nn.Module, *_PLAIN_VALUES)) or callable(value) or id(value) in seen:
        return
    else:
        seen.add(id(value))
        slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
        parts = [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in slots)]
    for part in parts:
        _collect(part, found, seen)


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))
