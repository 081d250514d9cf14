"""One forward pass is traced: labels follow the values from operator to operator, and what is seen is noted.

`TorchDispatchMode` sees every operator that is executed: a few dozen kinds, whatever the model's code looks like.
`rules` say what each of them does to labels. `size_uses` watches the calls that the model's code makes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sparsekit.coupling.rules.table import apply_rule
from sparsekit.coupling.size_uses import SizeWatcher, watch_declared_sizes_
from sparsekit.coupling.tracer import OperatorCall, Tracer
from sparsekit.errors import ModelError
from sparsekit.evaluation import Arguments, flat_tensors
from sparsekit.surgery.layer_norms import ZeroPaddedLayerNorm, layer_norm_form
from sparsekit.surgery.norms import is_standardised

# Modules with a rule of their own: what they do as a whole says more than what their operators do one by one.
_ROOT_MEAN_SQUARE = "root_mean_square_norm"
_WHOLE_MODULES = {
    "GlobalResponseNorm": "global_response_norm",
    **dict.fromkeys(("RMSNorm", "RmsNorm", "RmsNorm2d", "RmsNormFp32", "RmsNorm2dFp32"), _ROOT_MEAN_SQUARE),
}
_STANDARDISED, _RECURRENT = "standardised_convolution", "recurrent_layer"
# A subclass with a forward pass of its own may do anything with the parameters.
_RECURRENT_PASSES = {kind.forward for kind in (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)}
_LAYER_NORM = "zero_counting_layer_norm"


def _watch_whole_modules_(model: nn.Module, tracer: Tracer) -> None:
    """Apply a rule to each call of some modules instead of to their operators; in place, the model is a copy."""

    def wrap(module: nn.Module, name: str, *more: Any) -> Callable[..., Any]:
        forward = module.forward

        def by_rule(*args: Any, **kwargs: Any) -> Any:
            if name != _RECURRENT and (kwargs or len(args) != 1 or not isinstance(args[0], Tensor)):
                return forward(*args, **kwargs)
            # What recurrent layers and layer norms do inside is of no interest, also where it is written by hand.
            whole = name == _RECURRENT or bool(more)
            with _disable_current_modes(), torch._C.DisableTorchFunction() if whole else nullcontext():
                result = forward(*args, **kwargs)
            given = (module, *args) if name == _RECURRENT else (*args, module, *more)
            tensors = tuple(flat_tensors((args, kwargs)))
            outputs = tuple(flat_tensors(result))
            call = OperatorCall(name, torch.ops.aten.convolution.default, given, kwargs, tensors, outputs)
            apply_rule(tracer, call)
            return result

        return by_rule

    for module in model.modules():
        name = _STANDARDISED if is_standardised(module) else _WHOLE_MODULES.get(type(module).__name__)
        if type(module).forward in _RECURRENT_PASSES:
            name = _RECURRENT
        if name == _ROOT_MEAN_SQUARE and not _can_make_up(module):
            name = None
        asked = tracer.through_layer_norm or isinstance(module, ZeroPaddedLayerNorm)
        form = layer_norm_form(module) if name is None and asked else None
        if form is not None:
            vars(module)["forward"] = wrap(module, _LAYER_NORM, form)
        elif name is not None:
            vars(module)["forward"] = wrap(module, name)


def _can_make_up(module: Any) -> bool:
    """Whether a root mean square norm runs over one dimension and has a scale and an epsilon, which a cut changes."""
    scale, shape = getattr(module, "weight", None), getattr(module, "normalized_shape", ())
    return isinstance(scale, nn.Parameter) and len(shape) == 1 and isinstance(module.eps, float)


def trace(
    model: nn.Module,
    *inputs: Arguments,
    in_training: Arguments | None = None,
    through_layer_norm: bool = False,
) -> Tracer:
    """Run `model` on all inputs and return the tracer with all that it has seen. The model gets hooks: give a copy.

    Where parameters are left that no pass has read, as those of an auxiliary head, it also runs in training mode on
    `in_training`, as far as it can. Channels that reach an output are fixed. Raises ModelError if the model returns no
    tensor.
    """
    tracer = Tracer(model, through_layer_norm=through_layer_norm)
    watch_declared_sizes_(model, tracer)
    _watch_whole_modules_(model, tracer)
    for one in inputs:
        _pass(model, one, tracer)
    if in_training is not None and tracer.unread():
        model.train()
        with suppress(Exception):  # it may need targets: what ran until then was seen
            _pass(model, in_training, tracer)
    return tracer


def _pass(model: nn.Module, inputs: Arguments, tracer: Tracer) -> None:
    with torch.no_grad(), SizeWatcher(tracer, apply_rule), _Operators(tracer):
        outputs = inputs.call(model)
    results = flat_tensors(outputs)
    if not results:
        raise ModelError(
            f"{type(model).__name__} returns no tensor but {type(outputs).__name__}; return a tensor, or a tuple, list "
            "or dictionary of tensors"
        )
    for tensor in results:
        tracer.read(tensor)
        tracer.settle(tensor)
        for labels in tracer.known(tensor).labels:
            tracer.seen.fix(labels, "it reaches the model's output")


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Applies a rule to every operator that is executed."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tuple(flat_tensors((args, kwargs)))
        for tensor in tensors:  # numbered first: an operator in place could make them unrecognisable
            self._tracer.known(tensor)
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        call = OperatorCall(name, func, args, kwargs, tensors, tuple(flat_tensors(result)))
        apply_rule(self._tracer, call)
        return result
