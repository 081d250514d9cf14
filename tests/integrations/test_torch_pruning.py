"""Torch-Pruning's criteria on our groups against Torch-Pruning on its own; histories against the models it cuts."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from models_by_hand import BY_HAND, build, random_masks
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekit as sk
from sparsekit.errors import InputError
from sparsekit.integrations import torch_pruning as for_torch_pruning
from sparsekit.integrations.torch_pruning import from_pruning_history, importance, to_pruning_history
from sparsekit.selection.importance import output_shares
from sparsekit.structure.groups import ChannelGroups

Loaded = tuple[nn.Module, tuple[Tensor, ...], ChannelGroups]
Loader = Callable[[str], Loaded]

PLAIN = [
    "Residual",
    "FlattenBeforeLinear",
    "Depthwise",
    "Concatenation",
    "SqueezeExcite",
    "Transposed",
    "OneDimensional",
    "resnet18",
]
CRITERIA: dict[str, Callable[[], Any]] = {
    "group_magnitude": tp.importance.GroupMagnitudeImportance,
    "bn_scale": tp.importance.BNScaleImportance,
    "lamp": tp.importance.LAMPImportance,
    "fpgm": tp.importance.FPGMImportance,
    "taylor": tp.importance.GroupTaylorImportance,
    "hessian": tp.importance.GroupHessianImportance,
}


class Net(nn.Module):
    """Convolution, BatchNorm, depthwise convolution, flatten, two linear layers; dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.depthwise_norm = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
        self.wide, self.dropout, self.head = nn.Linear(8 * 4 * 4, 10), nn.Dropout(), nn.Linear(10, 4)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.norm(self.conv(images)))
        maps = F.relu(self.depthwise_norm(self.depthwise(maps)))
        return self.head(self.dropout(F.relu(self.wide(maps.flatten(1)))))


IMAGES = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
BATCHES = [(IMAGES[:4], LABELS[:4]), (IMAGES[4:], LABELS[4:])]


def net() -> tuple[Net, ChannelGroups]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net().eval()
    return model, sk.find_groups(model, IMAGES[:1])


@pytest.fixture(scope="module")
def loaded() -> Loader:
    """Models of `PLAIN` by name, in float32, with inputs and groups; found once, changed by nobody."""
    known: dict[str, Loaded] = {}

    def load(name: str) -> Loaded:
        if name not in known:
            model, inputs = build(name)
            model = model.float()
            inputs = tuple(one.float() for one in inputs)
            known[name] = model, inputs, sk.find_groups(model, inputs)
        return known[name]

    return load


@pytest.fixture(scope="module")
def blocks() -> Loaded:
    """A small ConvNeXt, whose residual blocks are groups as well."""
    torch.manual_seed(0)
    model = timm.create_model("test_convnext", num_classes=4).eval()
    inputs = (torch.randn(1, 3, 32, 32),)
    return model, inputs, sk.find_groups(model, inputs, blocks=True)


def graph_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> tp.DependencyGraph:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tp.DependencyGraph().build_dependency(model, example_inputs=inputs, verbose=False)


def ranked_by_torch_pruning(
    model: nn.Module, inputs: tuple[Tensor, ...], groups: ChannelGroups, judge: Any
) -> dict[str, Tensor | None]:
    """What the object says of Torch-Pruning's own groups, under the names of ours and in the order of our channels.

    A group that it starts from a depthwise convolution is started from the layer before instead: otherwise, before a
    flatten, "taylor" and "hessian" mix up its channels there (they sort indices, not what these belong to).
    """
    graph = graph_of(model, inputs)
    names = {module: name for name, module in model.named_modules()}
    makers = {
        m.tensor: (group, m)
        for group in groups.free
        for m in group.members
        if m.role in ("producer", "depthwise")
    }
    found = {}
    for theirs in graph.get_all_groups():
        group, root = makers.get(f"{names[theirs[0].dep.target.module]}.weight", (None, None))
        if group is None:
            continue
        if root.role == "depthwise":
            root = group.of_role("producer")[0]
            layer = model.get_submodule(root.module)
            theirs = graph.get_pruning_group(layer, tp.prune_conv_out_channels, range(len(root.positions)))
        numbers = judge(theirs)
        found[group.name] = (
            numbers if numbers is None else numbers[list(root.positions)].view(-1, root.repeat).mean(1)
        )
    return found


def with_gradients(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> nn.Module:
    """As Torch-Pruning's examples do it: the gradients of all batches add up."""
    copied = copy.deepcopy(model)
    for images, labels in batches:
        F.cross_entropy(copied(images), labels).backward()
    return copied


def with_squared_gradients(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> nn.Module:
    copied = copy.deepcopy(model)
    totals = [torch.zeros_like(p) for p in copied.parameters()]
    pairs = [
        (image[None], label[None])
        for images, labels in batches
        for image, label in zip(images, labels, strict=True)
    ]
    for image, label in pairs:
        copied.zero_grad()
        F.cross_entropy(copied(image), label).backward()
        for total, parameter in zip(totals, copied.parameters(), strict=True):
            total += parameter.grad.square()
    for total, parameter in zip(totals, copied.parameters(), strict=True):
        parameter.grad = total / len(pairs)
    return copied


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor | None], rtol: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, numbers in ours.items():
        expected = theirs[name]
        if expected is None:
            expected = torch.full_like(numbers, math.inf)
        assert torch.allclose(numbers, expected.double(), rtol=rtol, atol=0), name


# ------------------------------------------------------------------------------------------------- importance


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("criterion", ["group_magnitude", "bn_scale", "lamp", "fpgm"])
def test_importance_is_what_torch_pruning_finds_on_its_own_groups(
    loaded: Loader, name: str, criterion: str
) -> None:
    model, inputs, groups = loaded(name)
    theirs = ranked_by_torch_pruning(copy.deepcopy(model), inputs, groups, CRITERIA[criterion]())
    # Its "lamp" takes differences of sums in float32, and layers are added in another order.
    assert_same(importance(model, groups, criterion), theirs, rtol=1e-3 if criterion == "lamp" else 1e-5)


@pytest.mark.parametrize(
    "judge",
    [
        tp.importance.GroupMagnitudeImportance(p=1, group_reduction="max", normalizer=None, bias=True),
        tp.importance.GroupMagnitudeImportance(group_reduction="prod", normalizer="max"),
        tp.importance.GroupMagnitudeImportance(group_reduction="sum", normalizer="sentinel_0.5"),
    ],
    ids=["max", "prod", "sum"],
)
def test_objects_with_other_settings_are_used_as_they_are(loaded: Loader, judge: Any) -> None:
    model, inputs, groups = loaded("resnet18")
    assert_same(
        importance(model, groups, judge),
        ranked_by_torch_pruning(copy.deepcopy(model), inputs, groups, judge),
    )


@pytest.mark.parametrize("criterion", ["taylor", "taylor_object"])
def test_taylor_is_what_torch_pruning_finds_with_the_gradients_of_the_batches(criterion: str) -> None:
    model, groups = net()
    theirs = ranked_by_torch_pruning(
        with_gradients(model, BATCHES), (IMAGES[:1],), groups, tp.importance.GroupTaylorImportance()
    )
    asked = criterion if criterion == "taylor" else tp.importance.TaylorImportance()
    assert_same(importance(model, groups, asked, batches=BATCHES), theirs)


def test_taylor_follows_the_loss_it_is_given() -> None:
    model, groups = net()

    def squares(outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs - F.one_hot(labels, 4)).square().mean()

    other = importance(model, groups, "taylor", batches=BATCHES, loss=squares)
    copied = copy.deepcopy(model)
    for images, labels in BATCHES:
        squares(copied(images), labels).backward()
    judge = tp.importance.GroupTaylorImportance()
    assert_same(other, ranked_by_torch_pruning(copied, (IMAGES[:1],), groups, judge))


def test_hessian_is_the_mean_over_single_images() -> None:
    model, groups = net()
    theirs = ranked_by_torch_pruning(
        with_squared_gradients(model, BATCHES), (IMAGES[:1],), groups, tp.importance.GroupHessianImportance()
    )
    assert_same(importance(model, groups, "hessian", batches=BATCHES), theirs)


def test_hessian_of_one_image_is_what_torch_pruning_accumulates() -> None:
    """Of several images, its `accumulate_grad` keeps the last."""
    model, groups = net()
    judge = tp.importance.GroupHessianImportance()
    for i in (3, 0):
        copied = with_gradients(model, [(IMAGES[i : i + 1], LABELS[i : i + 1])])
        for parameter, own in zip(model.parameters(), copied.parameters(), strict=True):
            parameter.grad = own.grad
        judge.accumulate_grad(model)
    theirs = ranked_by_torch_pruning(model, (IMAGES[:1],), groups, judge)
    assert_same(importance(model, groups, "hessian", batches=[(IMAGES[:1], LABELS[:1])]), theirs)


def test_gradients_are_found_in_a_residual_network_whose_backbone_is_frozen(loaded: Loader) -> None:
    model, inputs, groups = loaded("resnet18")
    images, labels = inputs[0], torch.tensor([0, 3])
    judge = tp.importance.GroupTaylorImportance()
    theirs = ranked_by_torch_pruning(with_gradients(model, [(images, labels)]), inputs, groups, judge)
    frozen = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        assert_same(importance(frozen, groups, "taylor", batches=[(images, labels)]), theirs)
    assert not any(p.requires_grad or p.grad is not None for p in frozen.parameters())


def test_groups_are_compared_as_global_pruning_compares_them(loaded: Loader) -> None:
    model, inputs, groups = loaded("resnet18")
    theirs = copy.deepcopy(model)
    pruner = tp.pruner.MagnitudePruner(
        theirs,
        inputs,
        tp.importance.GroupMagnitudeImportance(),
        global_pruning=True,
        pruning_ratio=0.3,
        ignored_layers=[theirs.fc],
    )
    pruner.step()
    ranked = importance(model, groups, "group_magnitude")
    numbers = torch.cat(list(ranked.values())).sort().values
    threshold = numbers[len(numbers) - int(0.7 * len(numbers)) - 1]
    plan = sk.make_plan(groups, {name: one > threshold for name, one in ranked.items()})
    assert from_pruning_history(groups, pruner.pruning_history()).cuts == plan.cuts


@pytest.mark.parametrize("criterion", ["group_magnitude", "lamp", "fpgm"])
def test_heads_are_ranked_as_torch_pruning_ranks_them(criterion: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5)
    example = torch.randn(1, 3, 32, 32)
    groups = sk.find_groups(model, example)
    qkv = model.blocks[0].attn.qkv
    judge = CRITERIA[criterion]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.MagnitudePruner(
            copy_of := copy.deepcopy(model),
            example,
            judge,
            num_heads={copy_of.blocks[0].attn.qkv: 3},
            prune_num_heads=True,
        )
    attention = next(g for g in pruner.DG.get_all_groups() if pruner._is_atten_group(g)[0])
    theirs = judge(pruner._downstream_node_as_root_if_attention(attention)).view(3, -1).mean(1)
    ours = importance(model, groups, criterion)["blocks.0.attn.qkv"]
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-5, atol=0)
    assert qkv.weight.grad is None


def test_places_in_the_blocks_of_a_grouped_convolution_are_averaged_as_there() -> None:
    model, inputs = build("GroupedConv")
    groups = sk.find_groups(model, inputs)
    graph = graph_of(traced := copy.deepcopy(model), inputs)
    judge = tp.importance.GroupMagnitudeImportance()
    theirs = judge(graph.get_pruning_group(traced.before, tp.prune_conv_out_channels, list(range(8))))
    ours = importance(model, groups, "group_magnitude")["before"]
    torch.testing.assert_close(ours, theirs.view(2, 4).mean(0).double(), rtol=1e-5, atol=0)


def test_a_criterion_may_look_at_wide_layers_only() -> None:
    """A gated unit's BatchNorm has two rows a channel, and what reads it one column."""
    model, inputs = build("SplitGate")
    ours = importance(model, sk.find_groups(model, inputs), "bn_scale")["up"]
    scale = model.norm.weight.detach().abs().view(2, 6).mean(0)
    torch.testing.assert_close(ours, scale / scale.mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["group_magnitude", "bn_scale", "lamp", "fpgm", "random", "magnitude"])
def test_every_free_group_gets_finite_numbers_or_none_at_all(loaded: Loader, name: str) -> None:
    for model, _, groups in (loaded(one) for one in PLAIN):
        found = importance(model, groups, name)
        assert found.keys() == {group.name for group in groups.free}
        for group in groups.free:
            numbers = found[group.name]
            assert numbers.shape == (group.n_channels,)
            assert (numbers.dtype, numbers.device.type) == (torch.float64, "cpu")
            assert (numbers >= 0).all()
            assert numbers.isfinite().all() or numbers.isinf().all()


def test_magnitude_is_our_own(loaded: Loader) -> None:
    model, _, groups = loaded("Residual")
    assert_same(importance(model, groups, "magnitude"), output_shares(model, groups))


def test_random_importance_is_the_same_for_the_same_seed_and_draws_nothing_from_the_callers_state() -> None:
    model, groups = net()
    before = torch.get_rng_state()
    first, again = importance(model, groups, "random"), importance(model, groups, "random", seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(first, again)
    assert not torch.equal(first["conv"], importance(model, groups, "random", seed=1)["conv"])


@pytest.mark.parametrize("criterion", ["taylor", "hessian", "fpgm", "random"])
def test_the_model_and_the_random_state_stay_as_they_were(criterion: str) -> None:
    model, groups = net()
    model.train()
    model.norm.eval()
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    importance(model, groups, criterion, batches=BATCHES)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    gradients = {name for name, p in model.named_parameters() if p.grad is not None}
    assert gradients == {"conv.weight"}
    assert (model.conv.weight.grad == 1).all()


def test_what_the_caller_accumulated_in_his_hessian_object_stays_there() -> None:
    model, groups = net()
    trained, judge = with_gradients(model, BATCHES), tp.importance.GroupHessianImportance()
    judge.accumulate_grad(trained)
    held = len(judge._accu_grad)
    gradient = trained.conv.weight.grad.clone()
    importance(trained, groups, judge, batches=BATCHES)
    assert len(judge._accu_grad) == held > 0
    assert torch.equal(trained.conv.weight.grad, gradient)


def test_a_group_of_zeros_has_no_importance_rather_than_none_that_is_a_number() -> None:
    model, groups = net()
    with torch.no_grad():
        model.norm.weight.zero_()
        model.depthwise_norm.weight.zero_()
    assert importance(model, groups, "bn_scale")["conv"].tolist() == [0.0] * 8


def test_whole_blocks_and_groups_without_a_layer_to_look_at_stay_whole(blocks: Loaded) -> None:
    model, _, groups = blocks
    found = importance(model, groups, "bn_scale")
    assert any(group.bypass for group in groups.free)
    assert any(not group.bypass for group in groups.free)
    assert all(numbers.isinf().all() for numbers in found.values())
    found = importance(model, groups, "group_magnitude")
    assert {group.name for group in groups.free if group.bypass} == {
        name for name, numbers in found.items() if numbers.tolist() == [math.inf]
    }


def test_the_importance_chooses_and_the_cut_is_right() -> None:
    model, groups = net()
    ranked = importance(model, groups, "taylor", batches=BATCHES)
    masks = {name: numbers >= numbers.median() for name, numbers in ranked.items()}
    plan = sk.make_plan(groups, masks)
    pruned = sk.apply_plan(model, plan)
    sk.verify_cut(model, pruned, plan)
    kept = masks["conv"]
    assert 0 < kept.sum() < len(kept)
    assert torch.equal(pruned.get_parameter("conv.weight"), model.get_parameter("conv.weight")[kept])


@pytest.mark.parametrize(
    ("criterion", "batches", "says"),
    [
        ("tailor", None, "criterion must be one of group_magnitude, .*magnitude.*'tailor'"),
        (tp.importance.LAMPImportance, None, "the class LAMPImportance; call it"),
        (7, None, "got 7"),
        ("taylor", None, "GroupTaylorImportance ranks by gradients .* batches=None, give batches"),
        (tp.importance.HessianImportance(), None, "HessianImportance ranks by gradients"),
        ("taylor", [], "batches has none"),
        ("taylor", (IMAGES, LABELS), "pairs .images, labels. of tensors, got Tensor"),
        ("hessian", [(IMAGES, 3)], "got tuple of Tensor, int"),
        (lambda group: torch.ones(3), None, "numbers of shape .3,. for the 8 channels of conv"),
        (lambda group: -torch.ones(len(group[0].idxs)), None, "gives -1 for a channel of conv"),
        (lambda group: group.nothing, None, "cannot rank the channels of conv: AttributeError"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_clear_message(criterion: Any, batches: Any, says: str) -> None:
    model, groups = net()
    with pytest.raises(InputError, match=says):
        importance(model, groups, criterion, batches=batches)


def test_a_loss_for_each_image_is_refused() -> None:
    model, groups = net()
    with pytest.raises(InputError, match=r"one number for a batch, got shape \(4,\)"):
        importance(
            model,
            groups,
            "taylor",
            batches=BATCHES,
            loss=lambda x, y: F.cross_entropy(x, y, reduction="none"),
        )


def test_weights_that_are_not_finite_are_refused() -> None:
    model, groups = net()
    with torch.no_grad():
        model.conv.weight[2] = torch.nan
    with pytest.raises(InputError, match="finite"):
        importance(model, groups, "group_magnitude")


def test_groups_of_another_model_are_refused(loaded: Loader) -> None:
    model, _, _ = loaded("Residual")
    _, groups = net()
    for call in (
        lambda: importance(model, groups, "lamp"),
        lambda: to_pruning_history(model, sk.make_plan(groups, {}), groups),
    ):
        with pytest.raises(InputError, match="do not fit the model"):
            call()


def test_torch_pruning_is_loaded_when_it_is_needed() -> None:
    code = "import sys, sparksekit.integrations.torch_pruning; print('torch_pruning' in sys.modules)"
    code = code.replace("sparksekit", "sparsekit")
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )


# ------------------------------------------------------------------------------------------------- histories


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def assert_same_models(ours: nn.Module, theirs: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert shapes(ours) == shapes(theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(*inputs), theirs.eval()(*inputs), rtol=1e-4, atol=1e-5)


def replayed(model: nn.Module, inputs: tuple[Tensor, ...], history: Any) -> nn.Module:
    copied = copy.deepcopy(model)
    graph_of(copied, inputs).load_pruning_history(history)
    return copied


@pytest.mark.parametrize("name", [*PLAIN, "ChunkGate", "SplitGate", "GroupedConv", "LayerNormMlp"])
def test_a_plan_cuts_the_same_in_torch_pruning(loaded: Loader, name: str) -> None:
    model, inputs, groups = loaded(name)
    plan = sk.make_plan(groups, random_masks(groups, 0.6))
    before = copy.deepcopy(model.state_dict())
    history = to_pruning_history(model, plan, groups)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(history) == sum(len(cut.kept) < cut.n_channels for cut in plan.groups)
    assert_same_models(sk.apply_plan(model, plan), replayed(model, inputs, history), inputs)
    assert from_pruning_history(groups, history).cuts == plan.cuts


def test_groups_that_share_a_layer_count_what_the_earlier_ones_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch-Pruning itself does not follow slices."""
    monkeypatch.setattr(for_torch_pruning, "_check_agrees", lambda *_: None)
    model, inputs = build("Ghost")
    groups = sk.find_groups(model, inputs)
    shared = ["primary", "primary#2"]
    plan = sk.make_plan(groups, {name: torch.tensor([False, True]) for name in shared})
    history = to_pruning_history(model, plan, groups)
    assert [name for name, _, _ in history] == ["primary", "primary"]
    rows = next(cut for cut in plan.cuts if cut.tensor == "primary.weight")
    assert history[0][2] == [rows.drop[0]]
    assert history[1][2] == [rows.drop[1] - 1]
    assert from_pruning_history(groups, history).cuts == plan.cuts


def test_a_plan_that_removes_nothing_is_an_empty_history(loaded: Loader) -> None:
    model, _, groups = loaded("Residual")
    assert to_pruning_history(model, sk.make_plan(groups, {}), groups) == []
    assert from_pruning_history(groups, []) == sk.make_plan(groups, {})


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("steps", [1, 3])
def test_what_a_pruner_of_torch_pruning_did_is_a_plan_of_ours(loaded: Loader, name: str, steps: int) -> None:
    model, inputs, groups = loaded(name)
    theirs = copy.deepcopy(model)
    frozen = {m.module for group in groups if group.frozen for m in group.of_role("producer")}
    pruner = tp.pruner.MagnitudePruner(
        theirs,
        inputs,
        tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        iterative_steps=steps,
        ignored_layers=[theirs.get_submodule(one) for one in frozen],
    )
    for _ in range(steps):
        pruner.step()
    plan = from_pruning_history(groups, pruner.pruning_history())
    assert len(pruner.pruning_history()) >= len(groups.free)
    pruned = sk.apply_plan(model, plan)
    assert_same_models(pruned, theirs, inputs)
    sk.verify_cut(model, pruned, plan)


def kept(groups: ChannelGroups, history: Any) -> dict[str, list[int]]:
    return {cut.name: list(cut.kept) for cut in from_pruning_history(groups, history).groups}


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([("conv", True, [1])], {"conv": [0, 2, 3, 4, 5, 6, 7]}),
        ([("conv", True, [0]), ("conv", True, [0, 6])], {"conv": [2, 3, 4, 5, 6]}),
        ([("conv", True, [0]), ("depthwise", True, [0])], {"conv": [2, 3, 4, 5, 6, 7]}),
        ([["norm", True, torch.tensor([7, 2])]], {"conv": [0, 1, 3, 4, 5, 6]}),
        ([("wide", False, [16])], {"conv": [0, 2, 3, 4, 5, 6, 7]}),
        ([("conv", True, [0, 1]), ("wide", False, [1, 17])], {"conv": [4, 5, 6, 7]}),
        (
            [("head", False, [9]), ("wide", True, 0), ("conv", True, [7])],
            {"conv": [0, 1, 2, 3, 4, 5, 6], "wide": [1, 2, 3, 4, 5, 6, 7, 8]},
        ),
    ],
)
def test_entries_count_what_the_earlier_ones_leave_whichever_layer_they_name(
    history: Any, expected: dict[str, list[int]]
) -> None:
    model, groups = net()
    assert kept(groups, history) == expected
    plain = [
        (name, is_out, indices if isinstance(indices, int) else [int(i) for i in indices])
        for name, is_out, indices in history
    ]
    ours = sk.apply_plan(model, from_pruning_history(groups, history))
    assert_same_models(ours, replayed(model, (IMAGES[:1],), plain), (IMAGES,))


def test_one_half_of_a_gated_pair_stands_for_both(loaded: Loader) -> None:
    model, inputs, groups = loaded("SplitGate")
    for entry in (("up", True, [2]), ("up", True, [8]), ("down", False, [2])):
        assert kept(groups, [entry]) == {"up": [0, 1, 3, 4, 5]}
        ours = sk.apply_plan(model, from_pruning_history(groups, [entry]))
        assert_same_models(ours, replayed(model, inputs, [entry]), inputs)


@pytest.mark.parametrize(
    ("history", "says"),
    [
        ([("nowhere", True, [0])], "entry 0 .* .nowhere.: no group has channels of its output side"),
        ([("conv", False, [0])], "entry 0 .* .conv.: no group has channels of its input side"),
        ([("head", True, [0])], "channels of head, which has to stay whole: it reaches the model's output"),
        ([("conv", True, [8])], "index 8, and its output side has 8 positions left"),
        ([("conv", True, [-1])], "index -1"),
        ([("conv", True, [0]), ("conv", True, [7])], "entry 1 .* index 7, and its output side has 7"),
        ([("wide", False, [128])], "index 128, and its input side has 128"),
        ([("conv", True, range(8))], "leaves no channel of conv; a layer must not be emptied"),
        ([("conv", True, range(7)), ("wide", False, [0])], "entry 1 .* leaves no channel of conv"),
        ([("conv", True)], "entry 0 of the pruning history must be .*, got .'conv', True."),
        ([("conv", True, [0.5])], "must be .name of a layer"),
        ([("conv", True, None)], "must be .name of a layer"),
    ],
)
def test_histories_that_fit_nothing_are_refused(history: Any, says: str) -> None:
    _, groups = net()
    with pytest.raises(InputError, match=says):
        from_pruning_history(groups, history)


def test_a_group_that_was_pruned_by_indices_of_its_own_has_an_entry_too_many() -> None:
    """`Group.prune(idxs)` notes down what it pruned, and then all of the group."""
    model, groups = net()
    graph = graph_of(model, (IMAGES[:1],))
    graph.get_pruning_group(model.conv, tp.prune_conv_out_channels, list(range(8))).prune(idxs=[0])
    with pytest.raises(InputError, match="second, wrong entry"):
        from_pruning_history(groups, graph.pruning_history())


def test_half_a_block_of_a_grouped_convolution_is_refused() -> None:
    model, inputs = build("GroupedConvOfFour")
    groups = sk.find_groups(model, inputs)
    assert kept(groups, [("before", True, [2, 3])]) == {"before": [0, 2, 3]}
    for entry in (("before", True, [2]), ("grouped", True, [3, 4]), ("after", False, [0, 1])):
        with pytest.raises(InputError, match=r"which go together or not at all \(channel . of before"):
            from_pruning_history(groups, [entry])


def test_channels_of_no_group_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    groups = sk.find_groups(model, torch.zeros(1, 3, 4, 4), ignore=["0"])
    with pytest.raises(InputError, match="0, which has to stay whole: 0 is on the ignore list"):
        from_pruning_history(groups, [("2", False, [1])])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "GroupedConvOfFour",
            "cuts grouped.weight to .12, 1, 3, 3. by this history, the plan to .6, 2, 3, 3.",
        ),
        ("ChannelShuffle", "keeps other channels of after.weight"),
        ("AttentionOfNamedSizes", "that torch_pruning cuts does not run: .*sizes in the model's code"),
    ],
)
def test_plans_that_torch_pruning_cuts_another_way_are_refused(name: str, says: str) -> None:
    model, inputs = build(name)
    groups = sk.find_groups(model, inputs)
    plan = sk.make_plan(groups, random_masks(groups, 0.6))
    with pytest.raises(InputError, match=says):
        to_pruning_history(model, plan, groups)


def test_plans_with_whole_blocks_or_of_other_groups_are_refused(loaded: Loader, blocks: Loaded) -> None:
    model, _, groups = blocks
    block = next(group for group in groups.free if group.bypass)
    with pytest.raises(InputError, match="torch_pruning cuts channels only"):
        to_pruning_history(model, sk.make_plan(groups, {block.name: torch.tensor([False])}), groups)
    _, _, others = loaded("Residual")
    plan = sk.make_plan(others, random_masks(others, 0.5))
    with pytest.raises(InputError, match="give the groups that it was made from"):
        to_pruning_history(model, plan, groups)


def test_the_models_by_hand_are_known() -> None:
    assert set(PLAIN) - {"resnet18"} <= set(BY_HAND)
