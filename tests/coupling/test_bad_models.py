"""What cannot be analysed or cut: one clear message of sparsekit's own, and the model is left as it was."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from models_by_hand import Residual, build, random_masks
from torch import Tensor, nn

from sparsekit.coupling.find_groups import find_groups
from sparsekit.errors import FileError, InputError, ModelError, VerificationError
from sparsekit.structure.plan import PrunePlan, make_plan
from sparsekit.surgery.cut import apply_plan
from sparsekit.surgery.mask import mask_model
from sparsekit.surgery.verify import verify_cut

IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class TwoLayers(nn.Module):
    """Two convolutions in whatever forward pass a test gives it."""

    def __init__(self, run: Callable[[TwoLayers, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last, self.run = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1), run

    def forward(self, images: Tensor) -> Any:
        return self.run(self, images)


def _hooks(module: nn.Module) -> list[Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [list(getattr(module, kind).values()) for kind in kinds]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Fail if parameters, buffers, mode, hooks or the random state are not the same afterwards."""
    for order, module in enumerate(model.modules()):
        module.training = order % 2 == 0
    held = [*model.named_parameters(), *model.named_buffers()]
    lazy = nn.parameter.UninitializedTensorMixin
    values = {name: None if isinstance(t, lazy) or t.is_meta else t.detach().clone() for name, t in held}
    modules = list(model.named_modules())
    state = [(module.training, type(module), _hooks(module)) for _, module in modules]
    wanted = [tensor.requires_grad for _, tensor in held]
    random_state = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), random_state)
    assert list(model.named_modules()) == modules
    assert [(module.training, type(module), _hooks(module)) for _, module in modules] == state
    now = [*model.named_parameters(), *model.named_buffers()]
    assert all(one is other for (_, one), (_, other) in zip(now, held, strict=True))
    assert [tensor.requires_grad for _, tensor in now] == wanted
    for name, tensor in now:
        assert tensor.grad is None
        value = values[name]
        assert isinstance(tensor, lazy) or tensor.is_meta if value is None else tensor.equal(value), name


@contextmanager
def refused(model: nn.Module, error: type[Exception], message: str) -> Iterator[None]:
    """Expect one line that says what is wrong, and nothing of the model changed."""
    with untouched(model), pytest.raises(error, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- forward passes


def _fails(model: TwoLayers, images: Tensor) -> Tensor:
    raise ZeroDivisionError("division by zero")


def _fails_late(model: TwoLayers, images: Tensor) -> Tensor:
    return model.last(model.first(images)[:, :5])


def _fails_at_length(model: TwoLayers, images: Tensor) -> Tensor:
    raise ValueError("the first line\nand the second")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (_fails, "ZeroDivisionError: division by zero"),
        (_fails_late, "RuntimeError: Given groups=1"),
        (_fails_at_length, "ValueError: the first line$"),
    ],
)
def test_a_model_that_fails_on_the_example_is_refused(run: Any, message: str) -> None:
    model = TwoLayers(run)
    with refused(
        model, ModelError, rf"does not run on the example input of shape \[\(1, 3, 8, 8\)\]: {message}"
    ):
        find_groups(model, IMAGE)


@pytest.mark.parametrize("output", [None, "logits", [], {}, 3.0, {"logits": None}])
def test_a_model_that_returns_no_tensor_is_refused(output: Any) -> None:
    def run(model: TwoLayers, images: Tensor) -> Any:
        model.last(model.first(images))
        return output

    model = TwoLayers(run)
    with refused(model, ModelError, "TwoLayers returns no tensor"):
        find_groups(model, IMAGE)


def _branch_on_the_input(model: TwoLayers, images: Tensor) -> Tensor:
    hidden = model.first(images)
    return model.last(hidden.relu()) if images.mean() > 0 else model.last(hidden.sigmoid())


def _branch_on_one_channel(model: TwoLayers, images: Tensor) -> Tensor:
    hidden = model.first(images)
    return model.last(hidden.relu()) if bool((hidden[:, 0] > 1e9).any()) else model.last(hidden.sigmoid())


def _branch_on_all_channels(model: TwoLayers, images: Tensor) -> Tensor:
    hidden = model.first(images)
    return model.last(hidden.relu()) if hidden.mean() > 0 else model.last(hidden.sigmoid())


def _loop_until_small(model: TwoLayers, images: Tensor) -> Tensor:
    hidden = model.first(images)
    while hidden.norm() > 1:
        hidden = hidden / 2
    return model.last(hidden)


def _number_out_of_a_tensor(model: TwoLayers, images: Tensor) -> Tensor:
    hidden = model.first(images)
    return model.last(hidden / hidden.max().item())


def _as_many_as_are_positive(model: TwoLayers, images: Tensor) -> Tensor:
    hidden = model.first(images)
    return model.last(hidden * (hidden > 0).nonzero().shape[0])


def _assignment_by_mask(model: TwoLayers, images: Tensor) -> Tensor:
    hidden = model.first(images)
    hidden[hidden < 0] = 0
    return model.last(hidden)


def _through_numpy(model: TwoLayers, images: Tensor) -> Tensor:
    return model.last(torch.from_numpy(2 * model.first(images).detach().numpy()))


def _channels_in_order_of_size(model: TwoLayers, images: Tensor) -> Tensor:
    hidden = model.first(images)
    return model.last(hidden[:, hidden.mean((0, 2, 3)).argsort()])


def _other_layers_for_large_images(model: TwoLayers, images: Tensor) -> Tensor:
    hidden = model.first(images)
    return model.last(hidden) if images.abs().max() < 100 else model.last(hidden.flip(1))


def _find_and_cut(model: nn.Module) -> list[str]:
    """Names of free groups. What is free can be cut by half and agrees with the masked model; the rest says why."""
    groups = find_groups(model, IMAGE)
    assert all(group.frozen for group in groups if group not in groups.free)
    plan = make_plan(groups, random_masks(groups, 0.5))
    assert verify_cut(model, apply_plan(model, plan), plan).max_rel < 1e-4
    return [group.name for group in groups.free]


@pytest.mark.parametrize(
    ("run", "free"),
    [
        (_branch_on_the_input, ["first"]),
        (_branch_on_one_channel, ["first"]),
        (_branch_on_all_channels, []),
        (_loop_until_small, ["first"]),  # channels that are zero do not change a norm
        (_number_out_of_a_tensor, []),
        (_as_many_as_are_positive, []),
        (_assignment_by_mask, None),  # an operator that may come to be known
        (_through_numpy, []),
        (_channels_in_order_of_size, []),
        (_other_layers_for_large_images, ["first"]),
    ],
)
def test_a_path_that_depends_on_the_data_is_followed_as_the_example_takes_it_or_refused(
    run: Any, free: list[str] | None
) -> None:
    model = TwoLayers(run)
    with untouched(model):
        found = _find_and_cut(model)
    assert free is None or found == free


def _plain(model: TwoLayers, images: Tensor) -> Tensor:
    return model.last(model.first(images).relu())


@pytest.mark.parametrize(
    ("hook", "read", "free"),
    [
        (lambda m, args, out: out[:, :, ::2], 6, ["first"]),
        (lambda m, args, out: out.flip(1), 6, ["first"]),
        (lambda m, args, out: torch.cat([out, out], 1), 12, ["first"]),
        (lambda m, args, out: out[:, :3], 3, []),
        (lambda m, args, out: out.unflatten(1, (2, 3)).sum(1), 3, None),
    ],
    ids=["every_other_row", "flipped", "twice", "the_first_half", "halves_added"],
)
def test_forward_hooks_that_change_shapes_are_part_of_the_model(
    hook: Any, read: int, free: list[str] | None
) -> None:
    model = TwoLayers(_plain)
    model.last = nn.Conv2d(read, 4, 1)
    model.first.register_forward_hook(hook)
    with untouched(model):
        found = _find_and_cut(model)
    assert free is None or found == free


def test_a_hook_that_breaks_the_model_is_reported_as_the_model_that_does_not_run() -> None:
    model = TwoLayers(_plain)
    model.first.register_forward_hook(lambda m, args, out: out[:, :5])
    with refused(model, ModelError, "does not run on the example input"):
        find_groups(model, IMAGE)


# ----------------------------------------------------------------------------------------- models and inputs


@pytest.mark.parametrize("place", ["input", "model"])
def test_an_example_on_another_device_is_refused(place: str) -> None:
    model = Residual().to("meta" if place == "model" else "cpu")
    with refused(model, ModelError, "(does not run on the example input|is on the meta device)"):
        find_groups(model, IMAGE.to("meta") if place == "input" else IMAGE)


def test_a_model_without_numbers_is_refused() -> None:
    model = Residual().to("meta")
    with refused(model, ModelError, r"stem\.weight is on the meta device and holds no numbers"):
        find_groups(model, IMAGE.to("meta"))


@pytest.mark.parametrize(
    "example",
    [
        None,
        "image",
        3,
        (),
        {},
        np.zeros((1, 3, 8, 8)),
    ],
    ids=str,
)
def test_an_example_without_a_tensor_is_refused(example: Any) -> None:
    model = Residual()
    with refused(model, InputError, "example_input must hold a tensor, got "):
        find_groups(model, example)


def test_an_example_of_what_no_plan_can_hold_is_refused() -> None:
    model = Residual()
    with refused(model, InputError, "argument 1 of example_input holds a ndarray; give tensors, numbers"):
        find_groups(model, (IMAGE, [np.zeros(3)]))
    with refused(model, InputError, "example_input holds a tensor without elements"):
        find_groups(model, torch.zeros(0, 3, 8, 8))


@pytest.mark.parametrize(
    "example",
    [
        torch.randint(9, (1, 3, 8, 8)),
        torch.tensor(1.0),
        IMAGE.half(),
        [IMAGE],
        {"pictures": IMAGE},
        (IMAGE, "label"),
        (IMAGE, None),
    ],
)
def test_an_example_that_the_model_does_not_take_is_refused(example: Tensor) -> None:
    model = Residual()
    with refused(model, ModelError, "Residual does not run on the example input"):
        find_groups(model, example)


@pytest.mark.parametrize("model", [Residual, lambda images: images, None, "resnet18", {"weight": IMAGE}])
def test_what_is_no_module_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match=r"model must be a torch\.nn\.Module, got "):
        find_groups(model, IMAGE)


def test_a_model_whose_parameters_are_not_there_yet_is_refused() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with refused(model, ModelError, r"0\.weight is not initialised; run the model once"):
        find_groups(model, IMAGE)


class _HoldsALock(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = _HoldsALock()
    with refused(model, ModelError, "_HoldsALock cannot be copied: "):
        find_groups(model, IMAGE)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_a_layer_with_the_old_weight_norm_stays_and_says_why() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 6, 1)), nn.ReLU(), nn.Conv2d(6, 2, 1))
    assert "is computed from other tensors" in find_groups(model, IMAGE)["0"].frozen


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_a_scripted_model_is_refused() -> None:
    model = torch.jit.trace(TwoLayers(_plain).eval(), IMAGE)
    with pytest.raises(ModelError, match=r"is compiled by torch\.jit; give the module it was made from"):
        find_groups(model, IMAGE)


class _Counts(Residual):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(images)
        return super().forward(images)


def test_what_a_forward_pass_changes_is_changed_in_copies() -> None:
    model = _Counts()
    with untouched(model):
        assert _find_and_cut(model)
    assert not model.seen


def test_a_model_whose_outputs_are_no_numbers_has_nothing_that_can_be_proved() -> None:
    model = Residual()
    nn.init.constant_(model.stem.weight, float("nan"))
    groups = find_groups(model, IMAGE)
    assert not groups.free
    assert any("an output is not a finite number" in group.frozen for group in groups)


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Identity(), nn.Sequential(), nn.BatchNorm2d(3)])
def test_a_model_without_layers_has_no_groups(model: nn.Module) -> None:
    with untouched(model):
        assert len(find_groups(model, IMAGE)) == 0


# ------------------------------------------------------------------------------------------- plans and masks


def _planned(name: str = "Residual") -> tuple[nn.Module, PrunePlan]:
    model, inputs = build(name)
    groups = find_groups(model, inputs)
    return model, make_plan(groups, random_masks(groups, 0.5))


def _inputs(shape: list[Any], **also: Any) -> dict[str, Any]:
    """Of one argument, as a plan has it in JSON."""
    tensor = {"shape": shape, "dtype": "float32", "grows": True, **also}
    return {"positional": [{"tensor": tensor}], "keyword": {}, "batch": "any"}


def _changed(plan: PrunePlan, change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(plan.to_json()))
    change(data)
    return data


@pytest.mark.parametrize(
    "use",
    [
        apply_plan,
        mask_model,
        lambda model, plan: verify_cut(model, model, plan),
    ],
    ids=["apply_plan", "mask_model", "verify_cut"],
)
@pytest.mark.parametrize("name", ["Concatenation", "SplitGate", "AttentionOfNamedSizes"])
def test_a_plan_of_another_model_is_refused(name: str, use: Callable[[nn.Module, PrunePlan], Any]) -> None:
    _, plan = _planned()
    other, _ = build(name)
    with refused(other, ModelError, "the plan does not fit the model"):
        use(other, plan)


class _Wider(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.inner_norm = nn.Conv2d(8, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.outer = nn.Conv2d(7, 8, 3, padding=1, bias=False)


@pytest.mark.parametrize("version", ["wider", "cut"])
def test_a_plan_of_another_version_of_the_model_is_refused(version: str) -> None:
    model, plan = _planned()
    other = _Wider().double() if version == "wider" else apply_plan(model, plan)
    with refused(
        other, ModelError, r"the plan does not fit the model: \S+ needs size \d in dimension \d, found "
    ):
        apply_plan(other, plan)


def _empty_one(data: dict[str, Any]) -> None:
    cut = data["cuts"][0]
    cut["keep"], cut["drop"] = [], sorted(cut["keep"] + cut["drop"])


def _empty_all(data: dict[str, Any]) -> None:
    for cut in data["cuts"]:
        cut["keep"], cut["drop"] = [], sorted(cut["keep"] + cut["drop"])


@pytest.mark.parametrize("change", [_empty_one, _empty_all])
@pytest.mark.parametrize("name", ["Residual", "AttentionOfNamedSizes"])
def test_a_plan_that_would_empty_a_layer_is_refused(
    name: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    _, plan = _planned(name)
    with pytest.raises(
        FileError, match=r"no pruning plan: .* keeps nothing of \S+; a layer must not be emptied"
    ):
        PrunePlan.from_json(_changed(plan, change))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tensor", 3),
        ("tensor", None),
        ("dim", "0"),
        ("dim", None),
        ("dim", True),
        ("dim", -1),
        ("role", "bogus"),
        ("role", None),
        ("role", ["producer"]),
    ],
)
def test_a_plan_with_a_cut_of_the_wrong_types_is_refused(key: str, value: Any) -> None:
    _, plan = _planned()
    with pytest.raises(FileError, match="this is no pruning plan"):
        PrunePlan.from_json(_changed(plan, lambda data: data["cuts"][0].update({key: value})))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("groups", [{"name": 3, "n_channels": 4, "kept": [0]}]),
        ("groups", [{"name": "stem", "n_channels": "4", "kept": [0]}]),
        ("groups", [{"name": "stem", "n_channels": 4, "kept": "0"}]),
        ("groups", [{"name": "stem", "n_channels": 4, "kept": [4]}]),
        ("inputs", [["a"]]),
        ("inputs", {"positional": [], "keyword": {}, "batch": "some"}),
        ("inputs", _inputs(["a"])),
        ("inputs", _inputs([0, 3, 8, 8])),
        ("inputs", _inputs([-1, 3, 8, 8])),
        ("inputs", _inputs([1, 3], dtype="text")),
        ("inputs", _inputs([1, 3], values=[1.0])),
        ("inputs", {"positional": [{"object": 1}], "keyword": {}, "batch": "any"}),
        ("rewrites", [{"module": 1, "method": "forward", "call": 0, "argument": 0, "source": ""}]),
        ("rewrites", [{"module": "", "method": "forward", "call": "0", "argument": 0, "source": ""}]),
    ],
)
def test_a_plan_with_other_wrong_types_is_refused(key: str, value: Any) -> None:
    _, plan = _planned()
    with pytest.raises(FileError, match="this is no pruning plan"):
        PrunePlan.from_json(_changed(plan, lambda data: data.update({key: value})))


def test_a_plan_that_takes_a_weight_for_a_size_is_refused() -> None:
    model, plan = _planned()
    strange = PrunePlan.from_json(_changed(plan, lambda data: data["cuts"][0].update(role="size")))
    with refused(model, ModelError, "the plan does not fit the model"):
        apply_plan(model, strange)


def test_a_plan_that_cuts_a_tensor_twice_is_refused() -> None:
    _, plan = _planned()
    with pytest.raises(FileError, match=r"no pruning plan: .*cuts \S+ twice in dimension"):
        PrunePlan.from_json(_changed(plan, lambda data: data["cuts"].append(data["cuts"][0])))


@pytest.mark.parametrize("shapes", [[], [[1, 4, 8, 8]], [[1, 3]], [[1, 3, 8, 8], [1, 3, 8, 8]]])
def test_a_plan_with_inputs_that_the_model_does_not_take_is_refused(shapes: list[list[int]]) -> None:
    model, plan = _planned()
    inputs = [_inputs(shape)["positional"][0] for shape in shapes]
    strange = PrunePlan.from_json(_changed(plan, lambda data: data["inputs"].update(positional=inputs)))
    with refused(model, ModelError, "Residual does not run on trial inputs of shapes "):
        apply_plan(model, strange)


@pytest.mark.parametrize(
    ("module", "method"),
    [
        ("qkv", "forward"),
        ("", "nothing"),
        ("", "num_heads"),
        ("nowhere", "forward"),
    ],
)
def test_a_plan_that_rewrites_what_the_model_does_not_have_is_refused(module: str, method: str) -> None:
    model, plan = _planned("AttentionOfComputedSizes")
    other = {"module": module, "method": method}
    strange = PrunePlan.from_json(_changed(plan, lambda data: data["rewrites"][0].update(other)))
    with refused(model, InputError, "."):
        apply_plan(model, strange)


def test_a_cut_that_left_a_model_which_does_not_run_is_reported_as_wrong() -> None:
    model, plan = _planned()
    half = PrunePlan(plan.cuts[:1], plan.groups, plan.inputs)
    broken = apply_plan(model, half)
    with untouched(model), pytest.raises(VerificationError, match="the cut model does not run"):
        verify_cut(model, broken, plan)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(6, dtype=torch.bool), "keeps no channel; a layer must not be emptied"),
        (torch.ones(5, dtype=torch.bool), r"must be bool with 6 entries.*\(5,\)"),
        (torch.ones(6), "must be bool with 6 entries.*got float32"),
        ([True] * 6, "must be bool with 6 entries.*got list"),
        (None, "must be bool with 6 entries.*got NoneType"),
        (np.ones(6, bool), "must be bool with 6 entries.*got ndarray"),
    ],
)
def test_a_mask_that_is_none_or_keeps_nothing_is_refused(mask: Any, message: str) -> None:
    model, inputs = build("Residual")
    groups = find_groups(model, inputs)
    (inner,) = [group for group in groups.free if group.n_channels == 6]
    with refused(model, InputError, message):
        make_plan(groups, {inner.name: mask})


def test_masks_of_unknown_and_of_frozen_groups_are_refused() -> None:
    model, inputs = build("Residual")
    groups = find_groups(model, inputs)
    (frozen,) = [group for group in groups if group.frozen]
    mask = torch.arange(frozen.n_channels) > 0
    with refused(model, InputError, f"the group is frozen: {frozen.frozen}"):
        make_plan(groups, {frozen.name: mask})
    with refused(model, InputError, "a mask names the group 'layer9', which the model does not have"):
        make_plan(groups, {"layer9": mask})


def test_a_plan_leaves_a_model_untouched_that_it_fits() -> None:
    for name in ("Residual", "AttentionOfComputedSizes", "TiedWeights"):
        model, plan = _planned(name)
        again = copy.deepcopy(model)
        with untouched(model):
            verify_cut(model, apply_plan(model, plan), plan)
        assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
