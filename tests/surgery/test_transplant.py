"""After the cut, training goes on as if the dropped channels had never been there."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import timm.optim
import torch
from models_by_hand import build, random_masks
from timm.scheduler import CosineLRScheduler, PlateauLRScheduler
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import AveragedModel

from sparsekit.coupling.find_groups import find_groups
from sparsekit.errors import InputError, VerificationError
from sparsekit.structure.inputs import InputSpec
from sparsekit.structure.plan import PrunePlan, TensorCut, make_plan
from sparsekit.surgery.cut import apply_plan
from sparsekit.surgery.transplant import rebind_scheduler, transplant, transplant_ema

Cut = tuple[nn.Module, nn.Module, PrunePlan]
TWO_OF_EIGHT = InputSpec.of(torch.zeros(2, 8))
LR = 0.01
EXACT = {"rtol": 1e-11, "atol": 1e-13}  # float64

# All that timm makes without further packages, wrappers included.
TIMM = sorted(
    {
        *(str(name) for name in timm.optim.list_optimizers(exclude_filters=["bnb*", "fused*", "kron*"])),
        *("lookahead_adamw", "lookahead_momentum", "lookahead_lamb", "lookahead_adamp"),
    }
    - {"adahessian"}  # needs gradients with a graph
)
# Those whose update of an entry depends on the gradients of that entry only.
ELEMENTWISE = [
    *("adabelief", "adadelta", "adagrad", "adam", "adamax", "adamw", "adanw", "adopt", "laprop", "lion"),
    *("lookahead_adamw", "lookahead_momentum", "madgrad", "madgradw", "momentum", "nadam", "nadamlegacy"),
    *("nadamw", "nesterov", "radam", "radamlegacy", "rmsprop", "rmsproptf", "sgd", "sgdw"),
]
TORCH: dict[str, Callable[..., Optimizer]] = {
    "torch sgd, plain": lambda p: torch.optim.SGD(p, lr=LR),
    "torch sgd, momentum": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "torch adam, amsgrad": lambda p: torch.optim.Adam(p, lr=LR, amsgrad=True),
    "torch adamw, lr a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(LR), foreach=False),
    "torch adam, fused": lambda p: torch.optim.Adam(p, lr=LR, fused=True),
    "torch rmsprop, centered": lambda p: torch.optim.RMSprop(p, lr=LR, momentum=0.9, centered=True),
    "torch adagrad": lambda p: torch.optim.Adagrad(p, lr=LR),
    "torch asgd": lambda p: torch.optim.ASGD(p, lr=LR, t0=2),
    "torch rprop": lambda p: torch.optim.Rprop(p, lr=LR),
}


def by_name(name: str) -> Callable[..., Optimizer]:
    if name in TORCH:
        return TORCH[name]
    if name not in TIMM:
        pytest.skip("not in this version of timm")
    return lambda source: timm.optim.create_optimizer_v2(source, opt=name, lr=LR, weight_decay=0.1)


def half_cut(name: str, seed: int = 0) -> Cut:
    model, inputs = build(name)
    groups = find_groups(model, inputs)
    plan = make_plan(groups, random_masks(groups, 0.5, seed))
    assert plan.cuts
    return model, apply_plan(model, plan), plan


def sliced(plan: PrunePlan, name: str, tensor: Tensor) -> Tensor:
    """What stays of a tensor with the shape of the uncut parameter."""
    kept = tensor.detach()
    for cut in plan.cuts:
        if cut.tensor == name:
            kept = kept[(slice(None),) * cut.dim + (list(cut.keep),)]
    return kept.clone()


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def give_slices(model: nn.Module, pruned: nn.Module, plan: PrunePlan) -> None:
    dense = dict(model.named_parameters())
    for name, parameter in pruned.named_parameters():
        parameter.grad = sliced(plan, name, dense[name].grad)


def train(optimizer: Optimizer, model: nn.Module, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        give_gradients(model, step)
        optimizer.step()


def held(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def inner(optimizer: Optimizer) -> Optimizer:
    """Where the state is."""
    return getattr(optimizer, "_base_optimizer", optimizer)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in (*value.keys(), *value.values()):
            yield from tensors_in(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from tensors_in(entry)


def assert_once_and_all(optimizer: Optimizer, model: nn.Module) -> None:
    assert sorted(map(id, held(optimizer))) == sorted(map(id, model.parameters()))


# ---- the state follows


@pytest.mark.parametrize("name", [*ELEMENTWISE, *TORCH])
def test_the_cut_model_steps_as_the_slice_of_the_dense_one(name: str) -> None:
    make = by_name(name)
    model, inputs = build("Depthwise")
    optimizer = make(model if name not in TORCH else model.parameters())
    train(optimizer, model, 7)
    groups = find_groups(model, inputs)
    plan = make_plan(groups, random_masks(groups, 0.5))
    pruned = apply_plan(model, plan)
    result = transplant(optimizer, model, pruned, plan)
    assert type(result) is type(optimizer)
    dense = dict(model.named_parameters())
    for step in range(7, 12):
        for key, parameter in pruned.named_parameters():
            torch.testing.assert_close(parameter.detach(), sliced(plan, key, dense[key]), **EXACT)
        give_gradients(model, step)
        give_slices(model, pruned, plan)
        optimizer.step()
        result.step()


def test_a_second_order_optimizer_goes_on() -> None:
    model, pruned, plan = half_cut("Depthwise")
    optimizer = timm.optim.create_optimizer_v2(model, opt="adahessian", lr=LR)

    def step(model: nn.Module, optimizer: Optimizer) -> None:
        # The Hessian is diagonal, so that its estimate is exact whatever random signs are drawn.
        for parameter in model.parameters():
            (parameter.grad,) = torch.autograd.grad((parameter**3).sum(), parameter, create_graph=True)
        optimizer.step()

    step(model, optimizer)
    with torch.no_grad():
        for key, parameter in pruned.named_parameters():
            parameter.copy_(sliced(plan, key, model.get_parameter(key)))
    result = transplant(optimizer, model, pruned, plan)
    assert result.generator is not optimizer.generator
    step(model, optimizer)
    step(pruned, result)
    for key, parameter in pruned.named_parameters():
        torch.testing.assert_close(parameter.detach(), sliced(plan, key, model.get_parameter(key)), **EXACT)


def state_by_hand(optimizer: Optimizer, model: nn.Module, plan: PrunePlan) -> dict[str, Any]:
    """A state dict for the pruned model, as torch's own load_state_dict takes it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    cut = {entry.tensor for entry in plan.cuts}
    packed = copy.deepcopy(optimizer.state_dict())
    for index, parameter in enumerate(held(optimizer)):
        state, name = packed["state"].get(index, {}), names[id(parameter)]
        shapes = {tuple(tensor.shape) for tensor in tensors_in(state)} - {()}
        if name in cut and shapes - {tuple(parameter.shape)}:
            del packed["state"][index]
        else:
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim():
                    state[key] = sliced(plan, name, value)
    return packed


@pytest.mark.parametrize("model_name", ["Residual", "SqueezeExcite"])
@pytest.mark.parametrize("name", TIMM)
def test_the_state_is_what_loading_slices_made_by_hand_gives(name: str, model_name: str) -> None:
    make = by_name(name)
    model, pruned, plan = half_cut(model_name)
    optimizer = make(model)
    train(optimizer, model, 4)
    twin = copy.deepcopy(pruned)
    with torch.no_grad():  # copies of weights in the state get what the cut added; here it adds nothing
        for key, parameter in [*pruned.named_parameters(), *twin.named_parameters()]:
            parameter.copy_(sliced(plan, key, model.get_parameter(key)))
    reference = make(twin)
    reference.load_state_dict(state_by_hand(optimizer, model, plan))
    result = transplant(optimizer, model, pruned, plan)
    for step in range(4, 12):
        give_gradients(twin, step)
        give_gradients(pruned, step)
        reference.step()
        result.step()
    for ours, theirs in zip(pruned.parameters(), twin.parameters(), strict=True):
        # Loading turns 0-dim float32 state, such as NAdam's products, into float64.
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", ["adafactor", "adafactorbv"])
def test_factored_state_is_dropped_where_it_was_cut_and_kept_elsewhere(name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 12), nn.Linear(12, 10), nn.Linear(10, 8))
    keep, drop = (0, 2, 4, 5, 7, 8), (1, 3, 6)
    cuts = [("0.weight", 0, "producer"), ("0.bias", 0, "producer"), ("1.weight", 1, "consumer")]
    plan = PrunePlan(
        tuple(TensorCut(t, d, role, keep, drop) for t, d, role in cuts), (), InputSpec.of(torch.zeros(2, 8))
    )
    optimizer = timm.optim.create_optimizer_v2(model, opt=name, lr=LR, min_dim_size_to_factor=4)
    train(optimizer, model, 3)
    pruned = apply_plan(model, plan)
    result = transplant(optimizer, model, pruned, plan)
    old, new = (
        {name: opt.state[p] for name, p in of.named_parameters() if p in opt.state}
        for opt, of in ((optimizer, model), (result, pruned))
    )
    assert set(old) - set(new) == {"0.weight", "1.weight"}
    assert len(new["0.bias"]) == len(old["0.bias"])
    assert {key for key, value in new["3.weight"].items() if isinstance(value, Tensor) and value.dim()} == {
        key for key, value in old["3.weight"].items() if isinstance(value, Tensor) and value.dim()
    }
    torch.testing.assert_close(new["3.weight"], old["3.weight"], rtol=0, atol=0)
    train(result, pruned, 2)


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize("width", [6, 8])
def test_preconditioners_are_dropped_where_the_parameter_was_cut(width: int) -> None:
    model = nn.Sequential(
        nn.Linear(8, width), nn.Linear(width, 8), nn.Linear(8, 8)
    )  # of width 8: square as well
    keep, drop = (0, 2, 3), tuple(i for i in range(width) if i not in (0, 2, 3))
    cuts = [("0.weight", 0, "producer"), ("0.bias", 0, "producer"), ("1.weight", 1, "consumer")]
    plan = PrunePlan(
        tuple(TensorCut(t, d, role, keep, drop) for t, d, role in cuts), (), InputSpec.of(torch.zeros(2, 8))
    )
    optimizer = timm.optim.create_optimizer_v2(model, opt="kron", lr=LR)
    with torch.compiler.set_stance("force_eager"):
        train(optimizer, model, 2)
        pruned = apply_plan(model, plan)
        result = transplant(optimizer, model, pruned, plan)
        kept = {name for name, parameter in pruned.named_parameters() if parameter in result.state}
        assert kept == {"1.bias", "2.weight", "2.bias"}
        assert result.rng is not optimizer.rng
        assert result.rng.getstate() == optimizer.rng.getstate()
        train(result, pruned, 2)


def test_an_optimizer_that_never_stepped_has_no_state_to_move() -> None:
    model, pruned, plan = half_cut("Residual")
    result = transplant(torch.optim.AdamW(model.parameters()), model, pruned, plan)
    assert not result.state
    train(result, pruned, 1)


# ---- folded constants


class DeadEnds(nn.Module):
    """Dead channels whose constant goes into a bias that has to be made (`mix`) and one that is there (`head`)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.mix, self.mix_norm = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.mix_norm(self.mix(F.relu(self.norm(self.conv(images)))))
        return self.head(F.relu(maps).mean((2, 3)))


def dead_ends() -> tuple[nn.Module, PrunePlan]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DeadEnds().double()
    with torch.no_grad():
        for norm, dead in ((model.norm, [1, 4]), (model.mix_norm, [0, 3, 5])):
            norm.weight[dead], norm.bias[dead] = 0, 0.7
    groups = find_groups(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    masks = {}
    for group in groups.free:
        of_norm = model.get_submodule(group.of_role("norm")[0].module)
        masks[group.name] = of_norm.weight != 0
    return model, make_plan(groups, masks)


@pytest.mark.parametrize("name", ["momentum", "adamw", "adagrad", "lookahead_adamw"])
def test_a_bias_made_by_folding_joins_the_group_of_its_weight_with_fresh_state(name: str) -> None:
    model, plan = dead_ends()
    optimizer = by_name(name)(model)  # two groups: without and with weight decay
    train(optimizer, model, 3)
    pruned = apply_plan_to_dead(model, plan)
    assert model.mix.bias is None
    result = transplant(optimizer, model, pruned, plan)
    assert_once_and_all(result, pruned)
    (group,) = [g for g in result.param_groups if any(p is pruned.mix.weight for p in g["params"])]
    position = [p is pruned.mix.weight for p in group["params"]].index(True)
    assert group["params"][position + 1] is pruned.mix.bias
    assert group["weight_decay"] == 0.1
    fresh = inner(by_name(name)([pruned.mix.bias])).state
    assert set(inner(result).state.get(pruned.mix.bias, {})) == set(fresh.get(pruned.mix.bias, {}))
    before = pruned.mix.bias.detach().clone()
    train(result, pruned, 1)
    assert not torch.equal(before, pruned.mix.bias)


def apply_plan_to_dead(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """The steps with random gradients woke the dead channels: put them to sleep again, then cut."""
    with torch.no_grad():
        for norm, dead in ((model.norm, [1, 4]), (model.mix_norm, [0, 3, 5])):
            norm.weight[dead], norm.bias[dead] = 0, 0.7
    return apply_plan(model, plan)


@pytest.mark.parametrize("name", ["lookahead_momentum", "madgrad", "torch asgd"])
def test_a_folded_constant_also_goes_into_copies_of_the_weights(name: str) -> None:
    """Else the next step takes it out of the bias again."""
    model, plan = dead_ends()
    optimizer = by_name(name)(model if name not in TORCH else model.parameters())
    for group in optimizer.param_groups:
        group["weight_decay"] = group["lambd"] = (
            0.0  # pulls to zero: depends on the weights, not on gradients only
        )
    train(optimizer, model, 8)
    pruned = apply_plan_to_dead(model, plan)
    change = (pruned.head.bias - model.head.bias).detach()
    assert float(change.abs().max()) > 0.1
    result = transplant(optimizer, model, pruned, plan)
    key = {"lookahead_momentum": "lookahead_slow_buff", "madgrad": "x0", "torch asgd": "ax"}[name]
    old, new = inner(optimizer).state[model.head.bias][key], inner(result).state[pruned.head.bias][key]
    torch.testing.assert_close(new, old + change, **EXACT)
    for step in range(8, 16):
        give_gradients(model, step)
        pruned.head.bias.grad = model.head.bias.grad.clone()
        optimizer.step()
        result.step()
        torch.testing.assert_close(pruned.head.bias, model.head.bias + change, **EXACT)


def test_a_new_bias_stays_out_if_its_weight_was_not_trained() -> None:
    model, plan = dead_ends()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=LR)
    pruned = apply_plan(model, plan)
    assert pruned.mix.bias is not None
    assert held(transplant(optimizer, model, pruned, plan)) == list(pruned.head.parameters())


# ---- which parameters, which options


def test_param_groups_keep_every_option_and_their_order() -> None:
    model, pruned, plan = half_cut("Residual")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    lr = torch.tensor(0.3)
    optimizer = torch.optim.Adam(
        [
            {"params": others, "weight_decay": 0.0, "betas": (0.5, 0.6), "lr_scale": 0.25},
            {"params": decayed, "lr": lr, "foreach": False, "note": ["kept"]},
        ],
        lr=LR,
        weight_decay=0.2,
        foreach=False,
    )
    optimizer.param_groups[0]["initial_lr"] = 0.5
    train(optimizer, model, 2)
    result = transplant(optimizer, model, pruned, plan)
    assert_once_and_all(result, pruned)
    names = {id(p): name for of in (model, pruned) for name, p in of.named_parameters()}
    for old, new in zip(optimizer.param_groups, result.param_groups, strict=True):
        assert [names[id(p)] for p in old["params"]] == [names[id(p)] for p in new["params"]]
        assert {k: v for k, v in old.items() if k != "params"} == {
            k: v for k, v in new.items() if k != "params"
        }
    assert result.defaults == optimizer.defaults
    assert result.param_groups[1]["lr"] is not lr
    assert result.param_groups[1]["note"] is not optimizer.param_groups[1]["note"]
    assert result.param_groups[0] is not optimizer.param_groups[0]


def test_names_in_param_groups_follow() -> None:
    model, plan = dead_ends()
    named = [(f"net.{name}", parameter) for name, parameter in model.named_parameters()]
    pruned = apply_plan(model, plan)
    (group,) = transplant(torch.optim.SGD(named, lr=LR), model, pruned, plan).param_groups
    names = {id(parameter): name for name, parameter in pruned.named_parameters()}
    assert len(group["param_names"]) == len(group["params"])
    for name, parameter in zip(group["param_names"], group["params"], strict=True):
        assert name.removeprefix("net.") == names[id(parameter)]


def test_parameters_that_are_not_trained_stay_out() -> None:
    model, pruned, plan = half_cut("Residual")
    for parameter in model.stem.parameters():
        parameter.requires_grad = False
    pruned = apply_plan(model, plan)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR, momentum=0.9)
    result = transplant(optimizer, model, pruned, plan)
    assert sorted(map(id, held(result))) == sorted(id(p) for p in pruned.parameters() if p.requires_grad)
    assert not pruned.stem.weight.requires_grad


def test_a_parameter_that_is_gone_is_dropped_and_its_empty_group_stays() -> None:
    model, pruned, plan = half_cut("Residual")
    pruned.head.bias = None
    rest = [p for p in model.parameters() if p is not model.head.bias]
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": [model.head.bias], "lr": 0.5}], lr=LR)
    train(optimizer, model, 1)
    result = transplant(optimizer, model, pruned, plan)
    assert_once_and_all(result, pruned)
    assert len(result.state) == len(held(result))
    assert (result.param_groups[1]["params"], result.param_groups[1]["lr"]) == ([], 0.5)
    train(result, pruned, 1)


def test_tied_parameters_move_once() -> None:
    model, pruned, plan = half_cut("TiedWeights")
    assert pruned.first.weight is pruned.second.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    train(optimizer, model, 2)
    result = transplant(optimizer, model, pruned, plan)
    assert_once_and_all(result, pruned)
    buffer = result.state[pruned.first.weight]["momentum_buffer"]
    assert torch.equal(buffer, optimizer.state[model.first.weight]["momentum_buffer"])


@pytest.mark.parametrize("still_tied", [True, False])
def test_a_tied_parameter_that_is_cut_takes_its_state_along(still_tied: bool) -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 3, bias=False) for name in ("one", "two")}).double()
    model["two"].weight = model["one"].weight
    plan = PrunePlan(
        tuple(TensorCut(f"{name}.weight", 1, "consumer", (0, 3), (1, 2)) for name in model), (), InputSpec()
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    train(optimizer, model, 2)
    pruned = nn.ModuleDict({name: nn.Linear(2, 3, bias=False) for name in model}).double()
    if still_tied:
        pruned["two"].weight = pruned["one"].weight
    result = transplant(optimizer, model, pruned, plan)
    assert_once_and_all(result, pruned)
    for name in model:
        buffer = result.state[pruned[name].weight]["momentum_buffer"]
        expected = optimizer.state[model[name].weight]["momentum_buffer"][:, [0, 3]]
        assert torch.equal(buffer, expected)
    assert len({t.data_ptr() for state in result.state.values() for t in tensors_in(state)}) == len(
        held(result)
    )


def test_cuts_of_what_is_no_parameter_are_left_aside() -> None:
    model, pruned, plan = half_cut("Residual")
    size: Any = "size"  # an integer attribute
    more = PrunePlan((*plan.cuts, TensorCut("head.heads", 0, size, (0,), (1,))), plan.groups, plan.inputs)
    assert_once_and_all(transplant(torch.optim.SGD(model.parameters(), lr=LR), model, pruned, more), pruned)


# ---- nothing else changes


@pytest.mark.parametrize("name", ["momentum", "adamw", "lookahead_adamw", "lamb", "adafactor", "madgrad"])
def test_the_old_optimizer_is_left_alone_and_shares_nothing(name: str) -> None:
    model, pruned, plan = half_cut("Depthwise")
    optimizer = by_name(name)(model)
    train(optimizer, model, 2)
    before, weights = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    states = {key: list(state) for key, state in inner(optimizer).state.items()}
    result = transplant(optimizer, model, pruned, plan)
    ours, theirs = (
        {t.untyped_storage().data_ptr() for t in tensors_in([inner(o).state, o.param_groups, o.defaults])}
        for o in (result, optimizer)
    )
    assert not ours & theirs
    train(result, pruned, 6)
    for group in result.param_groups:
        group["lr"] = 7.0
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), dict(weights), rtol=0, atol=0)
    assert {key: list(state) for key, state in inner(optimizer).state.items()} == states


def test_random_numbers_are_not_drawn() -> None:
    model, pruned, plan = half_cut("Depthwise")
    optimizer = timm.optim.create_optimizer_v2(model, opt="adahessian", lr=LR)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    transplant(optimizer, model, pruned, plan)
    transplant_ema(ModelEmaV3(model), pruned, plan)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_hooks_move_but_are_not_shared() -> None:
    model, pruned, plan = half_cut("Residual")
    betas = (0.5, 0.9)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, betas=betas)
    seen: list[Optimizer] = []

    def note(optimizer: Optimizer, args: Any, keywords: Any) -> None:
        assert optimizer.param_groups[0]["betas"] == betas
        seen.append(optimizer)

    optimizer.register_step_post_hook(note)
    result = transplant(optimizer, model, pruned, plan)
    result.register_step_post_hook(note)
    train(optimizer, model, 1)
    train(result, pruned, 1)
    assert [id(opt) for opt in seen] == [id(optimizer), id(result), id(result)]


def test_a_method_kept_as_an_attribute_is_bound_to_the_new_optimizer() -> None:
    model, pruned, plan = half_cut("Residual")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    optimizer.step = optimizer.step  # as wrappers do that restore it later
    result = transplant(optimizer, model, pruned, plan)
    before = pruned.head.bias.detach().clone()
    train(result, pruned, 1)
    assert not torch.equal(pruned.head.bias, before)


def test_a_wrapper_and_what_it_wraps_stay_one() -> None:
    model, pruned, plan = half_cut("Residual")
    result = transplant(by_name("lookahead_momentum")(model), model, pruned, plan)
    base = result._base_optimizer
    assert result.param_groups is base.param_groups
    assert result.defaults is base.defaults
    assert_once_and_all(base, pruned)


def test_the_result_can_be_saved_loaded_and_moved_again() -> None:
    model, plan = dead_ends()
    optimizer = by_name("adamw")(model)
    train(optimizer, model, 2)
    pruned = apply_plan_to_dead(model, plan)
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    first = transplant(optimizer, model, pruned, plan)
    scheduler = rebind_scheduler(scheduler, first)
    other = transplant(by_name("adamw")(model), model, copy.deepcopy(pruned), plan)
    other.load_state_dict(first.state_dict())
    torch.testing.assert_close(other.state_dict(), first.state_dict(), rtol=0, atol=0)
    groups = find_groups(pruned, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    again = make_plan(groups, random_masks(groups, 0.6))
    smaller = apply_plan(pruned, again)
    train(first, pruned, 1)
    last = transplant(first, pruned, smaller, again)
    assert_once_and_all(last, smaller)
    scheduler = rebind_scheduler(scheduler, last)
    for _ in range(2):
        train(last, smaller, 1)
        scheduler.step()
    assert [group["lr"] for group in last.param_groups] == pytest.approx([LR / 10, LR / 10])


# ---- what is refused


def refused(optimizer: Optimizer, model: nn.Module, pruned: nn.Module, plan: PrunePlan, message: str) -> None:
    with pytest.raises(InputError, match=message):
        transplant(optimizer, model, pruned, plan)


def test_parameters_of_another_model_are_refused() -> None:
    model, pruned, plan = half_cut("Residual")
    other = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=LR)
    refused(
        other,
        model,
        pruned,
        plan,
        r"parameter 0 of param group 0, of shape \(8, 3, 3, 3\), is not a parameter",
    )
    refused(
        torch.optim.SGD(pruned.parameters(), lr=LR), model, pruned, plan, "pass the uncut model that this SGD"
    )


def test_a_pruned_model_of_another_plan_is_refused() -> None:
    model, pruned, plan = half_cut("Residual")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    refused(optimizer, model, model, plan, r"\.weight: needs shape .*, got .*apply_plan\(model, plan\)")
    refused(optimizer, model, pruned, PrunePlan((), (), InputSpec()), "needs shape")
    refused(
        optimizer,
        model,
        copy.deepcopy(pruned).float(),
        plan,
        r"needs torch\.float64 on cpu, got torch\.float32",
    )
    refused(
        optimizer,
        model,
        nn.Sequential(pruned),
        plan,
        r"0\.stem\.weight: the uncut model has no such parameter",
    )
    larger = PrunePlan(
        (TensorCut("stem.weight", 0, "producer", (0, 9), tuple(range(1, 9))),), (), InputSpec()
    )
    refused(
        optimizer,
        model,
        pruned,
        larger,
        r"stem\.weight: needs size 10 in dimension 0 uncut, got \(8, 3, 3, 3\)",
    )


def test_a_parameter_that_is_listed_twice_is_refused() -> None:
    model, pruned, plan = half_cut("Residual")
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = torch.optim.SGD([model.head.bias, model.head.bias], lr=LR)
    refused(optimizer, model, pruned, plan, r"parameter 1 of param group 0.*twice")


def test_two_parameters_that_became_one_are_refused() -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 3, bias=False) for name in ("one", "two")})
    pruned = copy.deepcopy(model)
    pruned["two"].weight = pruned["one"].weight
    with pytest.raises(VerificationError, match=r"does not hold each parameter.*two\.weight"):
        transplant(torch.optim.SGD(model.parameters(), lr=LR), model, pruned, PrunePlan((), (), InputSpec()))


def test_state_that_spans_all_parameters_is_refused() -> None:
    model, pruned, plan = half_cut("Residual")
    refused(torch.optim.LBFGS(model.parameters()), model, pruned, plan, "LBFGS spans all parameters")


def test_a_step_replaced_by_a_function_that_holds_the_optimizer_is_refused() -> None:
    model, pruned, plan = half_cut("Residual")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    inner_step = optimizer.step

    def counting() -> None:
        inner_step()

    optimizer.step = counting
    refused(optimizer, model, pruned, plan, "counting, which the optimizer or scheduler calls, holds the old")


# ---- schedules

Maker = Callable[[Optimizer], Any]
SCHEDULES: dict[str, Maker] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "a lambda each": lambda o: lr_scheduler.LambdaLR(
        o, [lambda step: 0.9**step, lambda step: 1 / (1 + step)]
    ),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10, eta_min=1e-4),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.3], total_steps=12),
    "cyclic": lambda o: lr_scheduler.CyclicLR(
        o, base_lr=0.01, max_lr=0.1, step_size_up=3, mode="triangular2"
    ),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(o, T_max=6)],
        milestones=[6],
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, total_iters=7), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def two_groups(model: nn.Module) -> Optimizer:
    heads = [p for name, p in model.named_parameters() if name.startswith("head")]
    rest = [p for name, p in model.named_parameters() if not name.startswith("head")]
    return torch.optim.SGD([{"params": rest}, {"params": heads, "lr": 0.2}], lr=0.1, momentum=0.9)


def course(optimizer: Optimizer, advance: Callable[[int], None], steps: range) -> list[tuple[float, ...]]:
    """Learning rate and momentum of each group after each step."""
    seen = []
    for step in steps:
        optimizer.step()
        advance(step)
        seen.append(tuple(float(g[key]) for g in optimizer.param_groups for key in ("lr", "momentum")))
    return seen


@pytest.mark.parametrize("done", [0, 1, 5, 6])
@pytest.mark.parametrize("name", SCHEDULES)
def test_torch_schedules_go_on_as_those_of_an_uncut_twin(name: str, done: int) -> None:
    model, pruned, plan = half_cut("Residual")
    optimizer, twin = two_groups(model), two_groups(copy.deepcopy(model))
    scheduler, reference = SCHEDULES[name](optimizer), SCHEDULES[name](twin)
    course(optimizer, lambda _: scheduler.step(), range(done))
    course(twin, lambda _: reference.step(), range(done))
    result = transplant(optimizer, model, pruned, plan)
    moved = rebind_scheduler(scheduler, result)
    assert type(moved) is type(scheduler)
    assert moved.optimizer is result
    expected = course(twin, lambda _: reference.step(), range(done, 11))
    assert course(result, lambda _: moved.step(), range(done, 11)) == expected
    # The old pair was not touched and runs the same course.
    assert course(optimizer, lambda _: scheduler.step(), range(done, 11)) == expected
    assert moved.get_last_lr() == reference.get_last_lr()


@pytest.mark.parametrize("done", [0, 3, 6])
@pytest.mark.filterwarnings("ignore:PlateauLRScheduler:FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda o: CosineLRScheduler(o, t_initial=10, warmup_t=4, warmup_lr_init=1e-3, lr_min=1e-4),
        lambda o: CosineLRScheduler(o, t_initial=10, noise_range_t=(2, 9)),
        lambda o: PlateauLRScheduler(o, patience_t=1, decay_rate=0.5, warmup_t=2, mode="min"),
        lambda o: PlateauLRScheduler(o, patience_t=0, decay_rate=0.5, mode="min", noise_range_t=(2, 9)),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5, cooldown=1),
    ],
    ids=["cosine", "cosine, noise", "plateau", "plateau, noise", "torch's plateau"],
)
def test_schedules_driven_by_epoch_or_metric_go_on_as_those_of_an_uncut_twin(make: Maker, done: int) -> None:
    model, pruned, plan = half_cut("Residual")
    metrics = [3.0, 2.0, 2.5, 2.5, 2.4, 1.9, 2.1, 2.2, 2.3, 2.0, 2.0, 2.0]

    def advance(scheduler: Any) -> Callable[[int], None]:
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            return lambda step: scheduler.step(metrics[step])
        return lambda step: scheduler.step(step + 1, metrics[step])

    optimizer, twin = two_groups(model), two_groups(copy.deepcopy(model))
    scheduler, reference = make(optimizer), make(twin)
    course(optimizer, advance(scheduler), range(done))
    course(twin, advance(reference), range(done))
    result = transplant(optimizer, model, pruned, plan)
    moved = rebind_scheduler(scheduler, result)
    expected = course(twin, advance(reference), range(done, 12))
    assert course(result, advance(moved), range(done, 12)) == expected
    assert len(set(expected)) > 1
    assert course(optimizer, advance(scheduler), range(done, 12)) == expected


def test_a_new_schedule_can_start_after_the_cut() -> None:
    model, pruned, plan = half_cut("Residual")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    lr_scheduler.StepLR(optimizer, 1)
    result = transplant(optimizer, model, pruned, plan)
    scheduler = lr_scheduler.StepLR(result, 1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train(
        result, pruned, 1
    )  # torch's scheduler replaced step() of the old optimizer; this must not call that
    scheduler.step()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_what_cannot_be_rebound_is_refused() -> None:
    model, pruned, plan = half_cut("Residual")
    optimizer = two_groups(model)
    result = transplant(optimizer, model, pruned, plan)
    with pytest.raises(InputError, match="got object, which does not"):
        rebind_scheduler(object(), result)
    cycle = SCHEDULES["one cycle"](optimizer)
    with pytest.raises(
        InputError, match=r"2 param groups of 2 needed, which lack the options \['base_momentum'"
    ):
        rebind_scheduler(cycle, result)
    with pytest.raises(InputError, match="1 param groups of 2 needed"):
        rebind_scheduler(cycle, torch.optim.SGD(pruned.parameters(), lr=LR))
    holding = lr_scheduler.LambdaLR(optimizer, lambda _: float(optimizer.param_groups[0]["momentum"]))
    with pytest.raises(InputError, match=r"lambda.* holds the old SGD"):
        rebind_scheduler(holding, transplant(optimizer, model, pruned, plan))


# ---- weight averages


def averaged(make: Callable[[nn.Module], Any], model: nn.Module, seed: int = 9) -> Any:
    """An average that differs from the model."""
    average = make(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return average


def update(average: Any, model: nn.Module) -> None:
    (average.update_parameters if isinstance(average, AveragedModel) else average.update)(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: ModelEmaV3(m, decay=0.7, use_warmup=True, min_decay=0.1),
        lambda m: ModelEmaV3(m, decay=0.7, foreach=False, exclude_buffers=True),
        lambda m: ModelEmaV2(m, decay=0.7),
        lambda m: AveragedModel(m, avg_fn=lambda mean, new, n: 0.7 * mean + 0.3 * new),
    ],
    ids=["V3", "V3, each", "V2", "torch"],
)
def test_the_cut_average_goes_on_as_the_slice_of_the_dense_one(make: Callable[[nn.Module], Any]) -> None:
    model, pruned, plan = half_cut("Residual")
    average = averaged(make, model)
    update(average, model)
    before = copy.deepcopy(average.state_dict())
    result = transplant_ema(average, pruned, plan)
    assert type(result) is type(average)
    assert result.module is not average.module
    assert not {t.data_ptr() for t in result.state_dict().values()} & {t.data_ptr() for t in before.values()}
    with torch.no_grad():
        for key, parameter in pruned.named_parameters():
            parameter.copy_(sliced(plan, key, model.get_parameter(key)))
    update(result, pruned)
    torch.testing.assert_close(dict(average.state_dict()), dict(before), rtol=0, atol=0)
    update(average, model)
    for key, parameter in result.module.named_parameters():
        torch.testing.assert_close(parameter, sliced(plan, key, average.module.get_parameter(key)), **EXACT)
    kept = {k: v for k, v in vars(average).items() if isinstance(v, (int, float, str))}
    assert {k: vars(result)[k] for k in kept} == kept
    if isinstance(average, AveragedModel):
        assert int(result.n_averaged) == int(average.n_averaged) == 2


def test_an_averaged_module_alone_is_cut_with_its_own_constants() -> None:
    model, plan = dead_ends()
    average = copy.deepcopy(model)
    with torch.no_grad():
        average.norm.bias[[1, 4]] = 0.3  # another constant than the model's 0.7
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    pruned = apply_plan(model, plan)
    result = transplant_ema(average, pruned, plan)
    torch.testing.assert_close(result.eval()(images), average.eval()(images), **EXACT)
    assert result.state_dict().keys() == pruned.state_dict().keys()
    assert not torch.allclose(result.mix.bias, pruned.mix.bias)


def test_an_average_without_a_constant_of_the_model_gets_a_bias_of_zeros() -> None:
    model, plan = dead_ends()
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        ema.module.norm.bias[[1, 4]] = 0.0
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    pruned = apply_plan(model, plan)
    result = transplant_ema(ema, pruned, plan)
    assert list(result.module.state_dict()) == list(pruned.state_dict())
    assert not result.module.mix.bias.any()
    torch.testing.assert_close(result(images), ema(images), **EXACT)
    result.update(pruned)
    torch.testing.assert_close(result.module.mix.bias, pruned.mix.bias / 2, **EXACT)
    assert ema.module.mix.bias is None


def test_an_average_that_does_not_fit_is_refused() -> None:
    model, plan = dead_ends()
    ema = ModelEmaV3(model)
    with torch.no_grad():
        model.norm.bias[[1, 4]] = 0.0  # the average still gives a constant, for which there is no bias
    pruned = apply_plan(model, plan)
    assert pruned.mix.bias is None
    with pytest.raises(InputError, match=r"no mix\.bias: channels that are zero in the model.*project_"):
        transplant_ema(ema, pruned, plan)
    with pytest.raises(InputError, match="got float, which does not"):
        transplant_ema(0.9, pruned, plan)
    with pytest.raises(InputError, match="the plan does not fit the model"):
        transplant_ema(nn.Linear(3, 4), pruned, plan)
