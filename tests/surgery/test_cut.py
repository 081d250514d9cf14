from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from models_by_hand import BY_HAND, build, random_masks, zero_dropped_
from timm.layers import Conv2dSame
from torch import Tensor, nn

from sparsekit.coupling.find_groups import find_groups
from sparsekit.errors import ModelError, VerificationError
from sparsekit.evaluation import as_inputs, flat_tensors
from sparsekit.structure.inputs import InputSpec
from sparsekit.structure.plan import PrunePlan, make_plan
from sparsekit.surgery.constants import fold_constants_
from sparsekit.surgery.cut import apply_plan
from sparsekit.surgery.mask import mask_model
from sparsekit.surgery.verify import compare_outputs, outputs, verify_cut

TIMM = [
    "resnet18",
    "mobilenetv3_small_050",
    "test_convnext",
    "test_vit",
    "densenet121",
    "legacy_seresnet18",
    "resnetv2_18",
]
EXACT = 1e-10  # float64, relative to the largest output


def largest_difference(first: object, second: object) -> float:
    """Of two (nested) outputs of equal shapes, relative to the largest entry of the first."""
    ours, theirs = flat_tensors(first), flat_tensors(second)
    assert ours
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    worst = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    return worst / max(float(t.abs().max()) for t in ours)


def without_dropped_inputs(
    model: nn.Module, plan: PrunePlan, inputs: tuple[Tensor, ...], *, constants: bool = False
) -> object:
    """Outputs of the dense model when every layer reads 0 in place of the dropped channels; nothing is sliced.

    With `constants`, layers that look at one position at a time read a channel that does not vary as it is.
    """
    steady: dict[nn.Module, Tensor] = {}

    def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        values = args[0].movedim(-1 if isinstance(module, nn.Linear) else 1, 0).flatten(1)
        pointwise = isinstance(module, nn.Linear) or set(module.kernel_size) == {1}
        varies = (values.amax(1) - values.amin(1) > 1e-12) | (not pointwise) | (not constants)
        steady[module] = values.mean(1).masked_fill(varies, 0.0)

    def blank(drop: tuple[int, ...]) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            dim = -1 if isinstance(module, nn.Linear) else 1
            read = args[0].movedim(dim, 0).clone()
            blocks = getattr(module, "groups", 1)  # a column of a grouped convolution is one of every block
            for position in drop:
                for channel in range(position, len(read), len(read) // blocks):
                    read[channel] = steady[module][channel]
            return (read.movedim(0, dim),)

        return hook

    consumers = [cut for cut in plan.cuts if cut.role == "consumer"]
    readers = {cut.tensor: model.get_submodule(cut.tensor.rpartition(".")[0]) for cut in consumers}
    with torch.no_grad():
        watching = [module.register_forward_pre_hook(watch) for module in readers.values()]
        model(*inputs)
        for hook in watching:
            hook.remove()
        blanking = [readers[cut.tensor].register_forward_pre_hook(blank(cut.drop)) for cut in consumers]
        try:
            return model(*inputs)
        finally:
            for hook in blanking:
                hook.remove()


@pytest.mark.parametrize("share", [0.5, 0.0], ids=["half", "one_channel"])
@pytest.mark.parametrize("name", [*BY_HAND, *TIMM])
def test_the_cut_model_is_the_dense_one_that_reads_zeros_in_place_of_what_varied_and_was_dropped(
    name: str, share: float
) -> None:
    model, inputs = build(name)
    groups = find_groups(model, inputs)
    plan = make_plan(groups, random_masks(groups, share))
    assert plan.cuts
    inputs = plan.inputs.draw(0, model).positional  # what is constant is judged on these, here as there
    cut = apply_plan(model, plan)
    with torch.no_grad():
        outputs, dense = cut(*inputs), model(*inputs)
    masked = without_dropped_inputs(model, plan, inputs, constants=True)
    assert largest_difference(masked, outputs) < EXACT
    assert largest_difference(dense, outputs) > 1e-6  # the cut did remove something


@pytest.mark.parametrize("name", [*BY_HAND, *TIMM])
def test_cutting_channels_that_a_penalty_made_zero_changes_nothing(name: str) -> None:
    model, inputs = build(name)
    groups = find_groups(model, inputs)
    plan = make_plan(groups, random_masks(groups, 0.5, seed=1))
    with torch.no_grad():
        dense = model(*inputs)
        zero_dropped_(model, plan)
        sparse, cut = model(*inputs), apply_plan(model, plan)(*inputs)
    assert largest_difference(sparse, cut) < EXACT
    assert largest_difference(dense, sparse) > 1e-6


def test_a_zero_group_of_a_float32_network_is_cut_without_a_trace() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10).eval()
    images = torch.randn(2, 3, 64, 64)
    groups = find_groups(model, images)
    plan = make_plan(groups, random_masks(groups, 0.5))
    with torch.no_grad():
        for group in plan.groups:  # scale and shift only: the rows before the BatchNorm keep their values
            gone = [c for c in range(group.n_channels) if c not in group.kept]
            for member in groups[group.name].of_role("norm"):
                if member.tensor.endswith(("weight", "bias")):
                    model.state_dict()[member.tensor][gone] = 0
        sparse, cut = model(images), apply_plan(model, plan)(images)
    assert float((sparse - cut).abs().max()) <= 1e-6 * max(1.0, float(sparse.abs().max()))


def test_the_tensors_that_stay_are_those_named_by_hand() -> None:
    model, inputs = build("Concatenation")
    left, right = (
        torch.tensor([True, False, True, False]),
        torch.tensor([False, True, False, False, True, True]),
    )
    cut = apply_plan(model, make_plan(find_groups(model, inputs), {"left": left, "right": right}))
    dense, state = model.state_dict(), cut.state_dict()
    assert torch.equal(state["left.weight"], dense["left.weight"][[0, 2]])
    assert torch.equal(state["left.bias"], dense["left.bias"][[0, 2]])
    assert torch.equal(state["right.weight"], dense["right.weight"][[1, 4, 5]])
    assert torch.equal(state["right.bias"], dense["right.bias"][[1, 4, 5]])
    assert torch.equal(state["reader.weight"], dense["reader.weight"][:, [0, 2, 5, 8, 9]])
    assert all(torch.equal(state[key], dense[key]) for key in ("reader.bias", "head.weight", "head.bias"))


@pytest.mark.parametrize("name", ["Transposed", "Depthwise", "FlattenBeforeLinear", "Residual"])
def test_the_size_attributes_of_every_layer_agree_with_its_tensors(name: str) -> None:
    model, inputs = build(name)
    groups = find_groups(model, inputs)
    cut = apply_plan(model, make_plan(groups, random_masks(groups, 0.5)))
    for module in cut.modules():
        if isinstance(module, nn.ConvTranspose2d):
            assert module.weight.shape[:2] == (module.in_channels, module.out_channels)
        elif isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.shape == module.running_var.shape == (module.num_features,)
    if name == "Depthwise":
        assert cut.depthwise.groups == cut.depthwise.in_channels == cut.depthwise.out_channels == 4


def test_the_dense_model_is_left_alone_and_its_flags_carry_over() -> None:
    model, inputs = build("Residual")
    groups = find_groups(model, inputs)
    model.train()
    model.inner_norm.eval()
    model.stem.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    plan = make_plan(groups, random_masks(groups, 0.5))
    cut = apply_plan(model, plan)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in cut.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in cut.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not {p.data_ptr() for p in cut.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert all(p.is_contiguous() and p.dtype == torch.float64 for p in cut.parameters())
    cut(*inputs).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in cut.parameters())


def test_a_cut_model_can_be_cut_again() -> None:
    model, inputs = build("resnet18")
    for _ in range(2):
        groups = find_groups(model, inputs)
        plan = make_plan(groups, random_masks(groups, 0.5))
        cut = apply_plan(model, plan)
        with torch.no_grad():
            assert largest_difference(without_dropped_inputs(model, plan, inputs), cut(*inputs)) < EXACT
        model = cut
    assert model.conv1.out_channels == 16


def constant_channels(reader: nn.Module, *between: nn.Module) -> tuple[nn.Module, PrunePlan]:
    """Conv, BatchNorm, ReLU, what lies between, reader; channels 1 and 4 put out relu(shift) > 0, and are dropped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), *between, reader)
    model = model.double().eval()
    with torch.no_grad():
        model[1].weight[[1, 4]] = 0
        model[1].bias.copy_(torch.tensor([0.1, 0.7, -0.2, 0.3, 1.3, 0.0], dtype=torch.float64))
    groups = find_groups(model, torch.randn(2, 3, 10, 10, dtype=torch.float64))
    return model, make_plan(groups, {"0": torch.tensor([True, False, True, True, False, True])})


def change_at_the_cut(model: nn.Module, plan: PrunePlan) -> float:
    images = torch.randn(4, 3, 10, 10, dtype=torch.float64)
    with torch.no_grad():
        return largest_difference(model(images), apply_plan(model, plan)(images))


POOLED = (nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    ("reader", "between"),
    [
        (nn.Linear(6, 4), POOLED),
        (nn.Linear(6, 4, bias=False), POOLED),
        (nn.Linear(6 * 16, 4), (nn.MaxPool2d(2), nn.Flatten())),
        (nn.Conv2d(6, 4, 1), ()),
        (nn.Conv2d(6, 4, 1, bias=False, stride=2), ()),
        (Conv2dSame(6, 4, 1, stride=2), ()),  # pads on its own, but not for a kernel of one
        (nn.Conv2d(6, 4, 3), ()),
        (nn.Conv2d(6, 4, 3, bias=False, dilation=2), (nn.MaxPool2d(3, 1, 1),)),
        (nn.Conv2d(6, 4, (1, 3), padding="valid"), ()),
        (nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), ()),
        (nn.Conv2d(6, 4, 3, padding="same", padding_mode="circular"), ()),
    ],
)
def test_the_constant_of_a_dead_channel_is_folded_into_what_reads_it(
    reader: nn.Module, between: tuple[nn.Module, ...]
) -> None:
    model, plan = constant_channels(copy.deepcopy(reader), *between)
    assert change_at_the_cut(model, plan) < EXACT
    # Without the fold the change would be plain to see: the channels are not zero.
    with torch.no_grad():
        images = torch.randn(4, 3, 10, 10, dtype=torch.float64)
        assert largest_difference(model(images), without_dropped_inputs(model, plan, (images,))) > 1e-3


@pytest.mark.parametrize(
    "reader",
    [
        nn.Conv2d(6, 4, 3, padding=1),
        nn.Conv2d(6, 4, 3, padding="same"),
        nn.Conv2d(6, 4, 1, padding=1),
        Conv2dSame(6, 4, 3),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
    ],
)
def test_a_constant_that_a_layer_does_not_read_everywhere_alike_is_not_folded(reader: nn.Module) -> None:
    model, plan = constant_channels(copy.deepcopy(reader))
    masked = copy.deepcopy(model)
    assert fold_constants_(masked, plan) == {}
    assert torch.equal(masked[-1].bias, model[-1].bias)
    assert change_at_the_cut(model, plan) > 1e-3
    # What is promised all the same: masked and cut agree.
    assert verify_cut(model, apply_plan(model, plan), plan).max_rel < EXACT


def test_folding_says_how_many_constants_went_where_and_makes_a_bias_where_there_was_none() -> None:
    model, plan = constant_channels(nn.Conv2d(6, 4, 1, bias=False))
    weight = model[-1].weight.detach().clone()
    cut = apply_plan(model, plan)
    assert model[-1].bias is None
    assert cut[-1].bias.requires_grad
    expected = 0.7 * weight[:, 1, 0, 0] + 1.3 * weight[:, 4, 0, 0]
    assert torch.allclose(cut[-1].bias, expected, rtol=1e-12)
    assert fold_constants_(model, plan) == {"3": 2}
    assert not model[-1].weight[:, [1, 4]].any()


def test_a_bias_made_for_a_constant_is_cut_with_its_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 5, 1, bias=False),  # reads the constants, and loses outputs of its own
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 2, 1),
    )
    model = model.double().eval()
    with torch.no_grad():
        model[1].weight[[1, 4]], model[1].bias[[1, 4]] = 0, 0.9
        model[4].weight[[0, 3]], model[4].bias[[0, 3]] = 0, 0.4
        model[4].running_mean.uniform_(-0.5, 0.5)
    groups = find_groups(model, torch.randn(2, 3, 10, 10, dtype=torch.float64))
    masks = {"0": torch.ones(6, dtype=torch.bool), "3": torch.ones(5, dtype=torch.bool)}
    masks["0"][[1, 4]] = masks["3"][[0, 3]] = False
    plan = make_plan(groups, masks)
    assert apply_plan(model, plan)[3].bias.shape == (3,)
    assert change_at_the_cut(model, plan) < EXACT


def test_a_channel_that_varies_is_not_taken_for_a_constant() -> None:
    model, plan = constant_channels(nn.Conv2d(6, 4, 1))
    with torch.no_grad():
        model[1].weight[1] = 0.01
        model[1].bias[1] = 5.0  # far from the kink of the ReLU: it varies a little around 5
    assert fold_constants_(model, plan) == {"3": 1}


def test_a_gated_constant_varies_with_the_image_and_is_not_folded() -> None:
    model, inputs = build("SqueezeExcite")
    groups = find_groups(model, inputs)
    (stream,) = [g for g in groups.free if "norm" in {m.module for m in g.members}]
    with torch.no_grad():
        model.norm.weight[2], model.norm.bias[2] = 0, 0.8
    mask = torch.ones(8, dtype=torch.bool)
    mask[2] = False
    assert fold_constants_(model, make_plan(groups, {stream.name: mask})) == {"squeeze": 1}


@pytest.mark.parametrize("name", ["Concatenation", "SplitGate", "Transposed"])
def test_a_plan_is_refused_by_another_model(name: str) -> None:
    model, inputs = build("Residual")
    groups = find_groups(model, inputs)
    plan = make_plan(groups, random_masks(groups, 0.5))
    with pytest.raises(ModelError, match="the plan does not fit the model"):
        apply_plan(build(name)[0], plan)


def test_a_plan_is_refused_by_a_model_of_the_same_names_and_other_shapes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    groups = find_groups(model, torch.randn(1, 3, 4, 4))
    plan = make_plan(groups, random_masks(groups, 0.5))
    for other in (
        nn.Sequential(nn.Conv2d(3, 7, 1), nn.ReLU(), nn.Conv2d(7, 2, 1)),
        nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.BatchNorm2d(6)),  # a weight of one dimension
        apply_plan(model, plan),
    ):
        with pytest.raises(ModelError, match=r"needs size 6 in dimension [01], found "):
            apply_plan(other, plan)


def test_a_cut_that_is_wrong_is_reported() -> None:
    model, inputs = build("Residual")
    groups = find_groups(model, inputs)
    plan = make_plan(groups, random_masks(groups, 0.5))
    cut = apply_plan(model, plan)
    assert verify_cut(model, cut, plan).max_rel < EXACT
    with torch.no_grad():
        cut.head.weight.copy_(cut.head.weight.flip(1))
    with pytest.raises(VerificationError, match=r"differs from the masked one by .* nothing was written"):
        verify_cut(model, cut, plan)


class BoxesAndKinds(nn.Module):
    """Ends as a detector does: boxes in pixels, scores, what is found, and what is zero but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.boxes, self.kinds = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x).relu()
        boxes, scores = self.boxes(x).sigmoid() * 1e4, self.kinds(x).sigmoid()
        return {"boxes": boxes, "scores": scores, "found": scores > 0.5, "rest": scores + 1 - scores - 1}


def test_each_output_is_compared_for_its_own_size() -> None:
    torch.manual_seed(0)
    model = BoxesAndKinds()
    groups = find_groups(model, torch.randn(1, 3, 8, 8))
    assert [group.name for group in groups.free] == ["body"]
    plan = make_plan(groups, random_masks(groups, 0.5))
    cut = apply_plan(model, plan)
    assert verify_cut(model, cut, plan).max_rel < 1e-4
    with torch.no_grad():
        cut.kinds.bias += 0.01
    with pytest.raises(VerificationError, match="differs from the masked one"):
        verify_cut(model, cut, plan)


class Amplifying(nn.Module):
    """What two sums differ by in their last digits is all that its outputs show."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(1e7 * self.head(self.first(x).relu()))


def test_rounding_that_a_network_amplifies_is_not_taken_for_a_wrong_cut() -> None:
    torch.manual_seed(0)
    model = Amplifying()
    groups = find_groups(model, torch.randn(1, 3, 8, 8))
    plan = make_plan(groups, random_masks(groups, 0.5))
    cut = apply_plan(model, plan)
    assert compare_outputs(mask_model(model, plan), cut, plan.inputs).max_rel > 0.01
    assert verify_cut(model, cut, plan).max_rel < 1e-6
    assert next(cut.parameters()).dtype == torch.float32
    with torch.no_grad():
        cut.head.weight.copy_(cut.head.weight.flip(1))
    with pytest.raises(VerificationError, match="differs from the masked one"):
        verify_cut(model, cut, plan)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_do_not_agree(value: float) -> None:
    model, inputs = build("Residual")
    plan = make_plan(find_groups(model, inputs), {})
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.head.bias[0] = value
    with pytest.raises(VerificationError):
        verify_cut(model, broken, plan)


def test_models_are_compared_in_true_float32_whatever_is_on_outside() -> None:
    """Autocast and, on an NVIDIA GPU, TF32 round by more than a right cut may differ."""
    seen: list[tuple[bool, bool]] = []

    class Looking(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return super().forward(x)

    model, inputs = nn.Sequential(nn.Conv2d(3, 8, 3), Looking(), nn.Conv2d(8, 4, 3)), torch.randn(1, 3, 9, 9)
    switches = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(inputs)
        seen.clear()
        (compared,) = outputs(model, as_inputs(inputs))
    assert seen == [(False, False)]
    assert compared.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(compared, model(inputs))
    assert not torch.equal(rounded.float(), compared)
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == switches


def test_outputs_of_other_shapes_do_not_agree() -> None:
    with pytest.raises(VerificationError, match="different shapes"):
        compare_outputs(nn.Linear(3, 2), nn.Linear(3, 4), InputSpec.of(torch.zeros(1, 3)))


def test_the_difference_is_measured_against_the_largest_output() -> None:
    first, second = nn.Linear(1, 2, bias=True), nn.Linear(1, 2, bias=True)
    with torch.no_grad():
        for layer, bias in ((first, [4.0, 1.0]), (second, [4.0, 3.0])):
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor(bias))
    agreement = compare_outputs(first, second, InputSpec.of(torch.zeros(1, 1)))
    assert (agreement.max_abs, agreement.scale, agreement.max_rel) == (2.0, 4.0, 0.5)


def test_a_masked_model_keeps_its_size_and_the_original_its_weights() -> None:
    model, inputs = build("Residual")
    groups = find_groups(model, inputs)
    plan = make_plan(groups, random_masks(groups, 0.5))
    before = model.inner.weight.clone()
    masked = mask_model(model, plan)
    assert [p.shape for p in masked.parameters()] == [p.shape for p in model.parameters()]
    assert torch.equal(model.inner.weight, before)
