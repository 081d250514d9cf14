"""`find_groups`: which channels are coupled, which must stay and why, and a proof that the rest can be cut."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparsekit.coupling.form_groups import form_groups
from sparsekit.coupling.named_integers import name_integers_, uncached_reshapes
from sparsekit.coupling.place_finder import PlaceFinder
from sparsekit.coupling.proof import prove
from sparsekit.coupling.residual_blocks import find_blocks
from sparsekit.coupling.solve import solve
from sparsekit.coupling.trace import trace
from sparsekit.errors import InputError, ModelError, first_line
from sparsekit.evaluation import evaluating
from sparsekit.options import Blocks, RoundTo
from sparsekit.structure.counting import attention_in_the_open, layer_costs
from sparsekit.structure.groups import ChannelGroup, ChannelGroups, LayerCost, check_rounding
from sparsekit.surgery.attention import functional_attention_in_the_open, open_attention_
from sparsekit.surgery.attributes import read_sizes


def find_groups(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    *,
    ignore: Sequence[str] = (),
    through_layer_norm: bool = False,
    blocks: Blocks = False,
    round_to: RoundTo = "auto",
    min_channels: int = 8,
) -> ChannelGroups:
    """Find the coupled channels of a model that runs on `example_input`.

    Every group comes back; those that must stay whole say why in `frozen`: they reach the model's output, pass
    through something sparsekit cannot cut, match a name pattern of `ignore`, or failed the proof. The proof cuts a
    half, a third or a quarter of every free group of a copy with randomised norms, in float64 (float32 above 8 GMACs),
    and compares it with the masked copy.

    Channels that a layer norm runs over stay, unless `through_layer_norm` asks for them: with one of them gone the
    norm's mean and variance are others, so such a cut is not lossless even where the channel is zero
    (`ChannelGroup.lossless`), and has to be fine-tuned.

    With `blocks` whole residual blocks are groups as well, of one channel each (`ChannelGroup.bypass`): those whose
    layer scales are all that stands between them and the identity. Their penalised weights are those scales. "all" adds
    the blocks with a plain identity shortcut, such as those of ResNets without a downsampling layer, of MobileNets with
    a skip and of vision transformers: they pass their input on once the last layer of each branch is zero, weight and
    bias (`ChannelGroup.silenced`). No penalty shrinks these layers; a mask has to say which blocks go, and what goes
    then is no zero, so the model has to be fine-tuned.

    `round_to` and `min_channels` say how many channels of a layer may be kept: multiples, and at least so many
    (`ChannelGroups.with_rounding`). Everything that chooses channels reads them off the groups.

    The model keeps its mode, parameters, buffers and random state: all of it happens to copies. Raises ModelError if
    the model cannot be copied, does not run on the example or returns no tensor, InputError for arguments of other
    types and for a pattern of `ignore` that matches no module.
    """
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    _check_types(model, inputs)
    check_rounding(round_to, min_channels)
    if blocks not in (False, True, "all"):
        raise InputError(f"blocks must be False, True or 'all', got {blocks!r}")
    with torch.random.fork_rng():
        model = _copied(model)
        costs = _run_once(model, inputs)
        names = [name for name, _ in model.named_modules()]
        for pattern in ignore:
            if not fnmatch.filter(names, pattern):
                raise InputError(
                    f"ignore: the pattern {pattern!r} matches no module of {type(model).__name__}"
                )
        parametrised = _parametrised(model)
        traced = _trace(model, inputs, through_layer_norm=through_layer_norm)
        formed = [_frozen_if_needed(group, ignore, parametrised) for group in traced]
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        sized = {m.tensor for group in formed for m in group.members if m.role == "size"}
        groups = ChannelGroups(
            groups=tuple(formed),
            input_shapes=tuple(tuple(x.shape) for x in inputs),
            layers=costs,
            tensor_shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
            parameters=tuple(name for name, _ in model.named_parameters()),
            attributes={path: read_sizes(model, path) for path in sorted(sized)},
        )
        proved = prove(model, groups)
        if blocks:
            whole = tuple(
                _frozen_if_ignored(group, ignore)
                for group in find_blocks(model, groups, plain=blocks == "all")
            )
            proved = replace(proved, groups=proved.groups + whole)
        return proved.with_rounding(round_to, min_channels)


def _check_types(model: Any, inputs: tuple[Any, ...]) -> None:
    if not isinstance(model, nn.Module):
        found = f"the class {model.__name__}; call it" if isinstance(model, type) else type(model).__name__
        raise InputError(f"model must be a torch.nn.Module, got {found}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{type(model).__name__} is compiled by torch.jit; give the module it was made from: compiled code "
            "cannot be followed"
        )
    if not inputs or not all(isinstance(one, Tensor) for one in inputs):
        found = ", ".join(type(one).__name__ for one in inputs) or "none"
        raise InputError(f"example_input must be a tensor or a tuple of tensors, got {found}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ModelError(f"{name} is not initialised; run the model once before it is analysed")
        if tensor.is_meta:
            raise ModelError(f"{name} is on the meta device and holds no numbers; load the weights first")


def _copied(model: nn.Module) -> nn.Module:
    """A copy to run: a forward pass may change counters, caches and statistics."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied: {first_line(error)}; every cut is tried on copies, so keep what "
            "cannot be copied out of the module"
        ) from error


def _run_once(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[LayerCost, ...]:
    try:
        return layer_costs(model, inputs)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run on the example input of shape "
            f"{[tuple(x.shape) for x in inputs]}: {first_line(error)}"
        ) from error


def _trace(
    model: nn.Module, inputs: tuple[Tensor, ...], *, through_layer_norm: bool
) -> tuple[ChannelGroup, ...]:
    """The groups that one forward pass of a copy shows."""
    traced = copy.deepcopy(model)
    parameters = {name for name, _ in traced.named_parameters()}
    open_attention_(traced)
    places = PlaceFinder(traced)
    in_the_open = functional_attention_in_the_open(places.note_attention)
    with evaluating(traced), attention_in_the_open(), in_the_open, uncached_reshapes():
        name_integers_(traced, places.note_quotient)
        seen = trace(traced, inputs, through_layer_norm=through_layer_norm).seen
        seen.quotients = places.quotients
    return form_groups(seen, solve(seen), parameters)


def _frozen_if_needed(group: ChannelGroup, ignore: Sequence[str], parametrised: set[str]) -> ChannelGroup:
    """The group, frozen for what no operator shows: it is ignored, or a parametrisation computes its weights."""
    made = [m.module for m in group.members if m.role in ("producer", "norm", "depthwise")]
    ignored = [module for module in made if _matches(module, ignore)]
    reason = group.frozen
    if ignored:
        reason = f"{ignored[0]} is on the ignore list"
    elif computed := sorted(
        m.module.partition(".parametrizations")[0] for m in group.members if m.module in parametrised
    ):
        reason = f"{computed[0]}.weight is computed from other tensors (a parametrisation)"
    elif not reason and not group.of_role("consumer"):
        reason = "no layer reads its channels one by one"
    elif not reason and group.n_channels < 2:
        reason = "its channels can only go together"
    return replace(group, frozen=reason)


def _frozen_if_ignored(block: ChannelGroup, ignore: Sequence[str]) -> ChannelGroup:
    inside = [member.module for member in block.members if _matches(member.module, ignore)]
    return replace(block, frozen=f"{inside[0]} is on the ignore list") if inside else block


def _parametrised(model: nn.Module) -> set[str]:
    """Names of modules with a tensor that is computed from others, and of modules that hold those others."""
    names = {name for name, module in model.named_modules() if hasattr(module, "parametrizations")}
    return names | {name for name, _ in model.named_modules() if ".parametrizations" in name}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether the module, or one that holds it, matches a pattern."""
    parts = name.split(".")
    prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatch.fnmatch(prefix, pattern) for prefix in prefixes for pattern in patterns)
