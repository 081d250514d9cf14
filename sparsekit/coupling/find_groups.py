"""`find_groups`: which channels are coupled, which must stay and why, and a proof that the rest can be cut."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from sparsekit.coupling.form_groups import form_groups
from sparsekit.coupling.named_integers import name_integers_, uncached_reshapes
from sparsekit.coupling.place_finder import PlaceFinder
from sparsekit.coupling.proof import prove
from sparsekit.coupling.residual_blocks import find_blocks
from sparsekit.coupling.rules.meeting import COMPUTED
from sparsekit.coupling.solve import solve
from sparsekit.coupling.trace import trace
from sparsekit.errors import InputError, ModelError, first_line
from sparsekit.evaluation import Arguments, ExampleInput, as_inputs, copied, evaluating
from sparsekit.options import Blocks, RoundTo
from sparsekit.structure.counting import attention_in_the_open, layer_costs
from sparsekit.structure.groups import ChannelGroup, ChannelGroups, check_rounding
from sparsekit.structure.inputs import InputSpec
from sparsekit.surgery.attention import functional_attention_in_the_open, open_attention_
from sparsekit.surgery.attributes import read_sizes


def find_groups(
    model: nn.Module,
    example_input: ExampleInput,
    *,
    more_inputs: Sequence[ExampleInput] = (),
    ignore: Sequence[str] = (),
    through_layer_norm: bool = False,
    blocks: Blocks = False,
    round_to: RoundTo = "auto",
    min_channels: int = 8,
) -> ChannelGroups:
    """Find the coupled channels of a model that runs on `example_input`.

    Every group comes back; those that must stay whole say why in `frozen`: they reach the model's output, pass
    through something sparsekit cannot cut, match a name pattern of `ignore`, or failed the proof. The proof cuts a
    quarter to a half of every free group of a copy with randomised norms, and all but one unit, in float64 (float32
    above 8 GMACs), and compares it with the masked copy. Any two groups lose different shares in one of its trials.

    Channels that a layer norm runs over stay, unless `through_layer_norm` asks for them. The norms of the cut model
    count those that are gone as zeros, so zero channels go exactly. A channel is zero once the rows that make it are,
    and scale and shift of every layer norm over it: the width of a transformer is one group of many layers, which
    makes every other choice of channels another one. So it has to be asked for. The norm has to be a module of its own,
    whatever its code, that has a scale.

    With `blocks` whole residual blocks are groups as well, of one channel each (`ChannelGroup.bypass`): those whose
    layer scales are all that stands between them and the identity. Their penalised weights are those scales. "all" adds
    the blocks with a plain identity shortcut, such as those of ResNets without a downsampling layer, of MobileNets with
    a skip and of vision transformers: they pass their input on once the last layer of each branch is zero, weight and
    bias (`ChannelGroup.silenced`). No penalty shrinks these layers; a mask has to say which blocks go, and what goes
    then is no zero, so the model has to be fine-tuned.

    `round_to` and `min_channels` say how many channels of a layer may be kept: multiples, and at least so many
    (`ChannelGroups.with_rounding`). Everything that chooses channels reads them off the groups.

    A layer that no pass runs keeps its width, and fails once it is used with fewer channels: `more_inputs` are further
    examples, such as one with a flag that runs another head. Layers that only training runs are found without. What is
    left is listed in `ChannelGroups.unread`.

    The model keeps its mode, parameters, buffers and random state: all of it happens to copies. Raises ModelError if
    the model cannot be copied, does not run on the example or returns no tensor, InputError for arguments of other
    types and for a pattern of `ignore` that matches no module.
    """
    _check_model(model)
    inputs = as_inputs(example_input)
    others = tuple(as_inputs(one) for one in more_inputs)
    spec, *other_specs = (InputSpec.of(one) for one in (example_input, *more_inputs))
    check_rounding(round_to, min_channels)
    if blocks not in (False, True, "all"):
        raise InputError(f"blocks must be False, True or 'all', got {blocks!r}")
    with torch.random.fork_rng():
        model = copied(model)
        for one in (inputs, *others):
            _run_once(model, one)
        spec = replace(spec.tried(model), others=tuple(one.tried(model) for one in other_specs))
        costs = layer_costs(model, example_input, spec.batch_size)
        names = [name for name, _ in model.named_modules()]
        for pattern in ignore:
            if not fnmatch.filter(names, pattern):
                raise InputError(
                    f"ignore: the pattern {pattern!r} matches no module of {type(model).__name__}"
                )
        parametrised = _parametrised(model)
        # Two examples: some norms fail in training mode on one.
        traced, unread = _trace(
            model, (inputs, *others), spec.draw(0, model, 2), through_layer_norm=through_layer_norm
        )
        formed = [_frozen_if_needed(group, ignore, parametrised) for group in traced]
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        sized = {m.tensor for group in formed for m in group.members if m.role == "size"}
        groups = ChannelGroups(
            groups=tuple(formed),
            inputs=spec,
            layers=costs,
            tensor_shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
            parameters=tuple(name for name, _ in model.named_parameters()),
            attributes={path: read_sizes(model, path) for path in sorted(sized)},
            unread=unread,
        )
        proved = prove(model, groups)
        if blocks:
            whole = tuple(
                _frozen_if_ignored(group, ignore)
                for group in find_blocks(model, groups, plain=blocks == "all")
            )
            proved = replace(proved, groups=proved.groups + whole)
        return proved.with_rounding(round_to, min_channels)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        found = f"the class {model.__name__}; call it" if isinstance(model, type) else type(model).__name__
        raise InputError(f"model must be a torch.nn.Module, got {found}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{type(model).__name__} is compiled by torch.jit; give the module it was made from: compiled code "
            "cannot be followed"
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ModelError(f"{name} is not initialised; run the model once before it is analysed")
        if tensor.is_meta:
            raise ModelError(f"{name} is on the meta device and holds no numbers; load the weights first")


def _run_once(model: nn.Module, inputs: Arguments) -> None:
    try:
        with evaluating(model):
            inputs.call(model)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run on the example input of shape "
            f"{[tuple(x.shape) for x in inputs.tensors]}: {first_line(error)}"
        ) from error


def _trace(
    model: nn.Module, inputs: Sequence[Arguments], in_training: Arguments, *, through_layer_norm: bool
) -> tuple[tuple[ChannelGroup, ...], tuple[str, ...]]:
    """The groups that passes of a copy show, and the trained tensors that none of them read."""
    traced = copied(model)
    parameters = {name for name, _ in traced.named_parameters()}
    open_attention_(traced)
    places = PlaceFinder(traced)
    in_the_open = functional_attention_in_the_open(places.note_attention)
    with evaluating(traced), attention_in_the_open(), in_the_open, uncached_reshapes():
        name_integers_(traced, places.note_quotient)
        tracer = trace(traced, *inputs, in_training=in_training, through_layer_norm=through_layer_norm)
        tracer.seen.quotients = places.quotients
    return form_groups(tracer.seen, solve(tracer.seen), parameters), tracer.unread()


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
        reason = f"{computed[0]}.weight {COMPUTED}"
    elif not reason and not group.of_role("consumer") and not group.summed:
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
