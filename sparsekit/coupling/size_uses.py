"""Which attribute sizes which dimension, learned from the calls that a model's code makes.

`TorchFunctionMode` shows calls with their arguments, also integers that know their attribute (`named_integers`).
Where a reshape is given a computed size, its place is noted too (`place_finder`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from sparsekit.coupling.labels import FIXED, along, span
from sparsekit.coupling.named_integers import MultipleInt, NamedInt, PartInt
from sparsekit.coupling.observations import MADE, Atoms, SizeUse, to_atoms
from sparsekit.coupling.tracer import Known, OperatorCall, Rule, Tracer
from sparsekit.evaluation import flat_tensors
from sparsekit.structure.places import Attribute

# What torch functions are called with: by position and by name.
_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]


class SizeWatcher(TorchFunctionMode):
    """Notes which attribute sizes which dimension of what a call returns."""

    def __init__(self, tracer: Tracer, apply_rule: Rule) -> None:
        super().__init__()
        self._tracer, self._apply_rule = tracer, apply_rule

    def _by_rule(self, name: str, func: Callable[..., Tensor], args: _Args, kwargs: _Kwargs) -> Tensor:
        with _disable_current_modes():
            result = func(*args, **kwargs)
        named = takewhile(kwargs.__contains__, ("input", *_WHOLE_FUNCTIONS[name])[len(args) :])
        given = (*args, *(kwargs[one] for one in named))
        tensors = tuple(flat_tensors(given))
        call = OperatorCall(
            name, torch.ops.aten.pad.default, given, kwargs, tensors, tuple(flat_tensors(result))
        )
        self._apply_rule(self._tracer, call)
        return result

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _WHOLE_FUNCTIONS:
            return self._by_rule(name, func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if name in _MAKERS and isinstance(result, Tensor):
            _made(self._tracer, args, kwargs or {}, result)
        rule = _SIZE_RULES.get(name)
        if rule is not None and args and isinstance(args[0], Tensor):
            rule(self._tracer, args, kwargs or {}, result)
        return result


# By their names, these attributes are the number of channels that a module takes or gives.
_OF_INPUT = ("in_features", "in_channels", "in_chs", "in_dim", "input_dim", "num_channels", "num_features")
_OF_OUTPUT = ("out_features", "out_channels", "out_chs", "out_dim", "output_dim")


def watch_declared_sizes_(model: nn.Module, tracer: Tracer) -> None:
    """Note the sizes that modules declare in attributes, when they run; in place, the model is a copy."""

    def declare(module: nn.Module, args: _Args, output: Any) -> None:
        for names, tensors in ((_OF_INPUT, flat_tensors(args)), (_OF_OUTPUT, flat_tensors(output))):
            for name in names:
                if tensors:
                    _note_silently(tracer, vars(module).get(name), tensors[0])

    for module in model.modules():
        module.register_forward_hook(declare)
    _watch_classifier_(model, tracer)
    _watch_features_(model, tracer)


def _watch_classifier_(model: Any, tracer: Tracer) -> None:
    """Sizes a timm model declares for its classifier: `head_hidden_size`, `embed_dim`, `num_features` of the head."""
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    if isinstance(classifier, nn.Module):
        heads = [m for m in model.modules() if m is not model and classifier in m.children()]
        widths = [
            *(vars(model).get(name) for name in ("head_hidden_size", "embed_dim")),
            *(vars(head).get("num_features") for head in heads),
        ]
        for size in widths:
            classifier.register_forward_hook(
                lambda m, args, out, size=size: _note_silently(tracer, size, args[0])
            )


def _watch_features_(model: Any, tracer: Tracer) -> None:
    """Sizes a timm model declares for its features: `num_features` at the end, `feature_info` of its stages."""
    if hasattr(model, "forward_features") and "num_features" in vars(model):
        forward_features, width = model.forward_features, vars(model)["num_features"]

        def noted(*args: Any, **kwargs: Any) -> Any:
            features = forward_features(*args, **kwargs)
            for tensor in flat_tensors(features)[-1:]:
                _note_silently(tracer, width, tensor)
            return features

        vars(model)["forward_features"] = noted
    modules = dict(model.named_modules())
    for stage, info in enumerate(getattr(model, "feature_info", None) or ()):
        if isinstance(info, dict) and info.get("module") in modules and "num_chs" in info:
            stage_width = NamedInt.of(info["num_chs"], Attribute("", "feature_info", stage))
            modules[info["module"]].register_forward_hook(
                lambda m, args, out, size=stage_width: _note_silently(tracer, size, flat_tensors(out)[0])
            )


def _note_silently(tracer: Tracer, size: Any, tensor: Tensor) -> None:
    """Note that `size` declares the channels of `tensor`: dimension 1 if that fits (maps), else the last (tokens)."""
    if not isinstance(size, NamedInt):
        return
    for dim in (1, tensor.dim() - 1) if tensor.dim() > 2 else (tensor.dim() - 1,):
        found = _slices(tracer.known(tensor), dim) if tensor.shape[dim] == size else None
        if found is not None:
            tracer.seen.sizes += [SizeUse(size.attribute, slices, silent=True) for slices in found]
            return


def _note(tracer: Tracer, size: Any, tensor: Tensor, dim: int) -> None:
    """Note that `size` is the size of dimension `dim` of `tensor`."""
    if not isinstance(size, (NamedInt, MultipleInt)) or tensor.shape[dim] != size or size == 1:
        return
    if tensor.stride(dim) == 0:  # expanded: it has whatever size it is asked for
        return
    slices = _slices(tracer.known(tensor), dim % tensor.dim())
    if slices is None:
        tracer.seen.sizes.append(SizeUse(size.attribute, None))
    for one in slices or ():
        if isinstance(size, MultipleInt) and size.inner:
            one = one.reshape(size.times, -1, one.shape[1]).swapaxes(0, 1)
        if isinstance(size, MultipleInt):
            one = one.reshape(int(size) // size.times, -1)
        tracer.seen.sizes.append(SizeUse(size.attribute, one))


def _slices(known: Known, dim: int) -> list[Atoms] | None:
    """For each label array that spans `dim`, its slices along `dim` as rows; None if there is no array."""
    found = [to_atoms(labels) for labels in known.labels if dim in span(labels)]
    return [atoms.swapaxes(0, dim).reshape(atoms.shape[dim], -1) for atoms in found] or None


def _reshaped(tracer: Tracer, args: _Args, kwargs: _Kwargs, result: Any) -> None:
    sizes: Any = args[1:] if len(args) > 1 else (kwargs.get("shape") or kwargs.get("size") or ())
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = sizes[0]
    if isinstance(result, Tensor) and len(sizes) == result.dim():
        for dim, size in enumerate(sizes):
            _note(tracer, size, result, dim)
        if any(type(size) is int and size > 1 for size in sizes):
            for dim, place in tracer.places.literal_sizes(len(sizes)).items():
                _note(tracer, NamedInt.of(sizes[dim], place.attribute), result, dim)
        # Labels with FIXED among them (tokens behind a class token) keep their size.
        cuttable = [one for one in tracer.known(result).labels if not bool((one == FIXED).any())]
        labelled = {
            d for one in cuttable for d in span(one) if type(sizes[d]) in (int, PartInt) and sizes[d] > 1
        }
        places = tracer.places.computed_sizes(len(sizes)) if labelled else {}
        computed = labelled & places.keys()
        taken = any(size == -1 for size in sizes)  # torch can work out one size of a call, not two
        for dim in computed if len(computed) == 1 else ():
            place = replace(places[dim], size=int(sizes[dim]) if taken else -1)
            for slices in _slices(tracer.known(result), dim) or ():
                tracer.seen.places.append((place, np.unique(slices)))


def _made(tracer: Tracer, args: _Args, kwargs: _Kwargs, result: Tensor) -> None:
    """A new tensor of an attribute's size, such as a first state of zeros: it shrinks with what the attribute sizes."""
    sizes: Any = args[1:] if args and isinstance(args[0], Tensor) else args
    if not sizes or isinstance(sizes[0], (tuple, list)):
        sizes = sizes[0] if sizes else kwargs.get("size", ())
    labels = []
    for dim, size in enumerate(sizes[: result.dim()]):
        if isinstance(size, (NamedInt, MultipleInt)) and size > 1:
            first = tracer.seen.add_axis(MADE, dim, int(size)).first
            atoms = torch.arange(first, first + int(size), dtype=torch.float32)
            labels.append(along(atoms, dim, result.dim()))
    if labels:
        tracer.learn(result, Known(tuple(labels)))
        for dim, size in enumerate(sizes[: result.dim()]):
            _note(tracer, size, result, dim)


def _unflattened(tracer: Tracer, args: _Args, kwargs: _Kwargs, result: Tensor) -> None:
    dim = args[1] if len(args) > 1 else kwargs["dim"]
    sizes = args[2] if len(args) > 2 else kwargs["sizes"]
    for offset, size in enumerate(sizes):
        _note(tracer, size, result, dim % args[0].dim() + offset)


def _split(tracer: Tracer, args: _Args, kwargs: _Kwargs, result: Sequence[Tensor]) -> None:
    sizes = args[1] if len(args) > 1 else next(v for k, v in kwargs.items() if "split" in k or k == "chunks")
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    if isinstance(sizes, PartInt):
        _note(tracer, sizes.whole, args[0], dim)
    if isinstance(sizes, NamedInt):
        for part in result:
            _note(tracer, sizes, part, dim)
    elif isinstance(sizes, (tuple, list)):
        if all(size == sizes[0] and not isinstance(size, NamedInt) for size in sizes):
            _tie_parts(tracer, result, dim)
        for size, part in zip(sizes, result, strict=True):
            _note(tracer, size, part, dim)
    else:
        _tie_parts(tracer, result, dim)


def _chunked(tracer: Tracer, args: _Args, kwargs: _Kwargs, result: Sequence[Tensor]) -> None:
    _tie_parts(tracer, result, args[2] if len(args) > 2 else kwargs.get("dim", 0))


def _tie_parts(tracer: Tracer, parts: Sequence[Tensor], dim: int) -> None:
    """Couple parts that the code asks to be equal: what goes from one goes from all."""
    for part in parts[1:]:
        if part.shape[dim] != parts[0].shape[dim]:
            return
    labels = [_slices(tracer.known(part), dim % part.dim()) for part in parts]
    for one in labels[1:]:
        for first, other in zip(labels[0] or (), one or (), strict=False):
            tracer.seen.couple(torch.from_numpy(first[:, :1]), torch.from_numpy(other[:, :1]))


def _convolved(tracer: Tracer, args: _Args, kwargs: _Kwargs, result: Any) -> None:
    """The attribute may be the number of conv groups: blurring filters have one for each channel."""
    _note(tracer, args[6] if len(args) > 6 else kwargs.get("groups"), args[0], 1)


def _attended(tracer: Tracer, args: _Args, kwargs: _Kwargs, result: Any) -> None:
    """Without a `scale`, torch derives one from the width of a head: within a head everything stays together."""
    if kwargs.get("scale") is None:
        for tensor in (args[0], args[1]) if len(args) > 1 else (args[0], kwargs["key"]):
            width = tensor.dim() - 1
            for labels in tracer.known(tensor).labels:
                tracer.seen.couple(labels.narrow(width, 0, 1), labels)


def _group_normed(tracer: Tracer, args: _Args, kwargs: _Kwargs, result: Any) -> None:
    """The number of norm groups falls with them; it has to be an attribute, or a part of one that counts channels."""
    number = args[1] if len(args) > 1 else kwargs["num_groups"]
    if isinstance(number, PartInt):
        _note(tracer, number.whole, result, 1)
        return
    for slices in _slices(tracer.known(result), 1) or () if number > 1 else ():
        if isinstance(number, NamedInt):
            tracer.seen.sizes.append(SizeUse(number.attribute, slices.reshape(int(number), -1)))
        elif number < result.shape[1]:
            reason = "group_norm is given a number of groups that is no attribute, which a cut could change"
            tracer.seen.fix(torch.from_numpy(slices), reason)


def _narrowed(tracer: Tracer, args: _Args, kwargs: _Kwargs, result: Tensor) -> None:
    if len(args) == 4:
        _note(tracer, args[2], args[0].narrow(args[1], 0, int(args[2])), args[1])
        _note(tracer, args[3], result, args[1])


def _indexed(tracer: Tracer, args: _Args, kwargs: _Kwargs, result: Any) -> None:
    """In `x[:, :n]` and `x[:, n:]`, n is the size of the part before it."""
    tensor, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
    if not any(isinstance(part, slice) for part in index):
        return
    dim, n_indexed = 0, sum(part is not None and part is not Ellipsis for part in index)
    for part in index:
        if part is Ellipsis:
            dim += tensor.dim() - n_indexed
        elif part is not None:
            for end in (part.start, part.stop) if isinstance(part, slice) else ():
                if isinstance(end, NamedInt) and 0 < end < tensor.shape[dim] and part.step in (None, 1):
                    _note_part(tracer, end, tensor, dim)
            dim += 1


def _note_part(tracer: Tracer, size: NamedInt, tensor: Tensor, dim: int) -> None:
    for labels in tracer.known(tensor).labels:
        if dim in span(labels):
            atoms = to_atoms(labels).swapaxes(0, dim)[: int(size)]
            tracer.seen.sizes.append(SizeUse(size.attribute, atoms.reshape(int(size), -1)))


# What is made of other values than zeros stays: a channel that is added to them is not zero without its weights.
_MAKERS = {"zeros", "new_zeros"}
# Functions with a rule of their own, and the names of their arguments after the first. In some modes `pad` copies into
# an empty tensor, piece by piece; a local response norm pads and pools across channels; and `take_along_dim` computes
# with an index after it was expanded, which then has a size of its own. Packed sequences are padded in pieces, too.
_WHOLE_FUNCTIONS = {
    "pad": ("pad", "mode", "value"),
    "local_response_norm": ("size",),
    "take_along_dim": ("indices", "dim"),
    "_pad_packed_sequence": (),
}
_SIZE_RULES: dict[str, Callable[[Tracer, _Args, _Kwargs, Any], None]] = {
    "reshape": _reshaped,
    "view": _reshaped,
    "unflatten": _unflattened,
    "split": _split,
    "split_with_sizes": _split,
    "chunk": _chunked,
    "narrow": _narrowed,
    "scaled_dot_product_attention": _attended,
    "group_norm": _group_normed,
    "conv2d": _convolved,
    "__getitem__": _indexed,
}
