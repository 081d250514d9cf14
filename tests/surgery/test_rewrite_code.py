"""Places where code computes a size: which are found, and what a module whose code leaves them to torch is."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import json
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models_by_hand import AttentionOfComputedSizes, build, random_masks
from torch import Tensor, nn

from sparsekit.artifact.load import load
from sparsekit.artifact.save import save
from sparsekit.coupling.find_groups import find_groups
from sparsekit.errors import InputError, ModelError
from sparsekit.structure.places import Place
from sparsekit.structure.plan import make_plan
from sparsekit.surgery.cut import apply_plan
from sparsekit.surgery.rewrite_code import leave_sizes_to_torch_, original_class, rewritten_places
from sparsekit.surgery.verify import verify_cut

TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Heads(nn.Module):
    """Four heads of two channels, whose width `split` and `join` (of the classes below) compute from the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.split(self.up(x), x.shape[-1]).softmax(-1)
        return self.down(self.join(heads, x.shape[-1]))

    def split(self, x: Tensor, c: int) -> Tensor:
        return x.reshape(len(x), 5, self.num_heads, c // self.num_heads)

    def join(self, x: Tensor, c: int) -> Tensor:
        return x.reshape(len(x), 5, c)


class OneLayer(nn.Module):
    """Holds the rest of a model, so that its place has a name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def places_of(model: nn.Module, inputs: Tensor = TOKENS) -> tuple[Place, ...]:
    return tuple(sorted({place for group in find_groups(model, inputs) for place in group.rewrites}))


def rewritten(model: nn.Module, *, times: int = 1) -> tuple[nn.Module, tuple[Place, ...]]:
    places, copied = places_of(model), copy.deepcopy(model)
    for _ in range(times):
        leave_sizes_to_torch_(copied, places)
    return copied, places


def test_a_computed_size_is_found_by_method_call_and_argument() -> None:
    places = places_of(OneLayer(Heads()))
    assert [(p.module, p.method, p.call, p.argument) for p in places] == [
        ("inner", "join", 0, 2),
        ("inner", "split", 0, 3),
    ]
    assert len({place.source for place in places}) == 2


def test_calls_of_one_method_are_counted_in_the_order_of_the_source() -> None:
    model, (tokens,) = build("AttentionOfComputedSizes")
    places = places_of(model, tokens)
    assert [(p.method, p.call, p.argument) for p in places] == [("forward", 0, 4), ("forward", 1, 2)]


@pytest.mark.parametrize("make", [Heads, AttentionOfComputedSizes])
def test_before_a_cut_the_rewritten_module_computes_what_it_did(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    changed, places = rewritten(model)
    assert places
    assert torch.equal(model(TOKENS), changed(TOKENS))


def test_after_a_cut_it_computes_what_the_masked_model_does() -> None:
    model = OneLayer(Heads()).eval()
    groups = find_groups(model, TOKENS)
    plan = make_plan(groups, random_masks(groups, 0.5))
    assert plan.rewrites
    assert verify_cut(model, apply_plan(model, plan), plan).max_rel < 1e-5
    assert rewritten_places(model.inner) == ()


def test_a_rewritten_module_is_still_of_its_class() -> None:
    changed, places = rewritten(OneLayer(Heads()))
    inner = changed.inner
    assert isinstance(inner, Heads)
    assert type(inner) is not Heads
    assert (type(inner).__name__, type(inner).__qualname__) == (Heads.__name__, Heads.__qualname__)
    assert type(inner).__module__ == Heads.__module__
    assert original_class(inner) is Heads
    assert original_class(Heads()) is Heads
    assert rewritten_places(inner) == places
    assert rewritten_places(changed) == rewritten_places(Heads()) == ()
    assert not any("_rewritten" in name for name in changed.state_dict())


def test_only_the_modules_that_are_named_are_changed() -> None:
    model = nn.Sequential(OneLayer(Heads()), OneLayer(Heads()))
    (place, *_) = places_of(OneLayer(Heads()))
    leave_sizes_to_torch_(model, [replace(place, module="1.inner")])
    assert [type(layer.inner) is Heads for layer in model] == [True, False]


def test_a_copy_of_a_rewritten_module_is_rewritten_too_and_lives_on_its_own() -> None:
    model, places = rewritten(Heads())
    copied = copy.deepcopy(model)
    assert rewritten_places(copied) == places
    assert torch.equal(model(TOKENS), copied(TOKENS))
    with torch.no_grad():
        copied.up.weight.zero_()
    assert model.up.weight.any()


def test_a_rewritten_module_can_be_pickled() -> None:
    import pickle

    model, places = rewritten(Heads())
    assert rewritten_places(pickle.loads(pickle.dumps(model))) == places


def test_rewriting_again_changes_nothing() -> None:
    once, places = rewritten(Heads())
    twice, _ = rewritten(Heads(), times=2)
    assert rewritten_places(once) == rewritten_places(twice) == places
    assert original_class(twice) is Heads


def test_places_that_are_rewritten_one_after_the_other_add_up() -> None:
    together, places = rewritten(Heads())
    apart = copy.deepcopy(together)
    apart.__class__ = Heads
    for place in reversed(places):
        leave_sizes_to_torch_(apart, [place])
    assert len(places) == 2
    assert rewritten_places(apart) == rewritten_places(together)
    apart.up, apart.down = nn.Linear(8, 4), nn.Linear(4, 3)  # two heads of two
    apart.num_heads = 2
    assert apart(TOKENS).shape == (2, 5, 3)


def test_a_rewritten_module_that_moves_into_another_model_is_rewritten_there() -> None:
    inner, places = rewritten(Heads())
    model = OneLayer(inner)
    leave_sizes_to_torch_(model, [replace(place, module="inner") for place in places])
    assert {place.module for place in rewritten_places(model.inner)} == {"inner"}


def test_a_part_of_a_cut_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model = OneLayer(Heads()).eval()
    groups = find_groups(model, TOKENS)
    pruned = apply_plan(model, make_plan(groups, random_masks(groups, 0.5)))
    save(pruned.inner, tmp_path, factory=Heads)
    assert torch.equal(load(tmp_path, factory=Heads)(TOKENS), pruned(TOKENS))


def test_of_a_place_that_is_rewritten_again_the_last_size_stands() -> None:
    model = Heads()
    (place,) = [place for place in places_of(model) if place.method == "split"]
    for size in (4, 2):
        leave_sizes_to_torch_(model, [replace(place, size=size)])
    assert rewritten_places(model) == (replace(place, size=2),)


def test_a_cut_model_that_is_analysed_again_has_the_places_of_its_class() -> None:
    model = OneLayer(Heads())
    places = places_of(model)
    leave_sizes_to_torch_(model, places[:1])
    # The numbers still belong to the text of the original method.
    assert set(places_of(model)) <= set(places)
    leave_sizes_to_torch_(model, places_of(model))
    assert set(rewritten_places(model.inner)) == set(places)


def test_a_place_survives_json_text() -> None:
    for place in places_of(OneLayer(Heads())):
        assert Place(**json.loads(json.dumps(asdict(place)))) == place


@pytest.mark.parametrize(
    "wrong",
    [
        {"source": "0" * 64},
        {"method": "nowhere"},
        {"method": "num_heads"},
        {"method": "__init__"},
        {"call": 7},
        {"argument": 7},
    ],
)
def test_a_place_in_other_code_is_refused_and_the_module_stays(wrong: dict[str, Any]) -> None:
    model = Heads()
    place = replace(places_of(model)[0], **wrong)
    with pytest.raises(
        InputError, match=r"test_rewrite_code\.Heads\..* is not the code the cut was made for"
    ):
        leave_sizes_to_torch_(model, [place])
    assert type(model) is Heads


def test_an_error_in_a_rewritten_method_is_shown_where_its_source_stands() -> None:
    model, _ = rewritten(Heads())
    frames = []
    for one in (model, Heads()):
        with pytest.raises(RuntimeError) as caught:
            one.split(torch.zeros(1), 7)
        frames.append(traceback.extract_tb(caught.value.__traceback__)[-1])
    assert frames[0].filename == frames[1].filename == __file__
    assert frames[0].lineno == frames[1].lineno


# ------------------------------------------------------------------------------------ what is left alone


class WithSuper(Heads):
    def split(self, x: Tensor, c: int) -> Tensor:
        assert super().join is not None
        return x.reshape(len(x), 5, self.num_heads, c // self.num_heads)


def noted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Tensor:
        return function(*args)

    return wrapper


def unchanged(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function


class WithWrapper(Heads):
    @noted
    def split(self, x: Tensor, c: int) -> Tensor:
        return x.reshape(len(x), 5, self.num_heads, c // self.num_heads)


class WithDecorator(Heads):
    @unchanged
    def split(self, x: Tensor, c: int) -> Tensor:
        return x.reshape(len(x), 5, self.num_heads, c // self.num_heads)


class WithLambda(Heads):
    split = lambda self, x, c: x.reshape(len(x), 5, self.num_heads, c // self.num_heads)  # noqa: E731


LEFT_ALONE = [WithSuper, WithWrapper, WithDecorator, WithLambda]


@pytest.mark.parametrize("make", LEFT_ALONE)
def test_code_that_cannot_be_taken_apart_safely_is_left_alone_and_its_heads_stay(
    make: Callable[[], nn.Module],
) -> None:
    groups = find_groups(make(), TOKENS)
    assert "split" not in {place.method for group in groups for place in group.rewrites}
    assert "a trial cut failed" in groups["up"].frozen


@pytest.mark.parametrize("make", [WithSuper, WithWrapper, WithDecorator, WithLambda])
def test_places_in_code_that_cannot_be_taken_apart_are_refused(make: Any) -> None:
    text = textwrap.dedent(inspect.getsource(make.split))
    place = Place("", "split", 0, 3, hashlib.sha256(text.encode()).hexdigest())
    with pytest.raises(InputError, match="is not the code the cut was made for"):
        leave_sizes_to_torch_(make(), [place])


class Inherited(Heads):
    """Its methods are those of the class it comes from."""


class WithView(Heads):
    def split(self, x: Tensor, c: int) -> Tensor:
        return x.view((len(x), 5, self.num_heads, c // self.num_heads))


class OverLines(Heads):
    def split(self, x: Tensor, c: int) -> Tensor:
        return x.abs().reshape(
            len(x),
            5,
            self.num_heads,
            c // self.num_heads,
        )


class WithName(Heads):
    def split(self, x: Tensor, c: int) -> Tensor:
        width = c // self.num_heads
        return x.view(x.shape[0], x.shape[1], self.num_heads, width)


class WithRestLeftToTorch(Heads):
    def split(self, x: Tensor, c: int) -> Tensor:
        return x.reshape(len(x), -1, self.num_heads, c // self.num_heads)


DEFAULT_WIDTH = 8


class WithDefault(Heads):
    def split(self, x: Tensor, c: int = DEFAULT_WIDTH, *, n: int = 5) -> Tensor:
        return x.reshape(len(x), n, self.num_heads, c // self.num_heads)


# Python 3.10 does not say in which column a call is.
KNOWS_COLUMNS = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 does not tell columns")


def split_heads(x: Tensor, c: int, num_heads: int) -> Tensor:
    return x.reshape(len(x), 5, num_heads, c // num_heads)


class WithFunction(Heads):
    def split(self, x: Tensor, c: int) -> Tensor:
        return split_heads(x, c, self.num_heads)


class WithTwoOnALine(Heads):
    def split(self, x: Tensor, c: int) -> Tensor:
        return x.reshape(len(x), 5, self.num_heads, c // self.num_heads).reshape(
            len(x), 5, self.num_heads, c // 4
        )


class WithStar(Heads):
    def split(self, x: Tensor, c: int) -> Tensor:
        sizes = (self.num_heads, c // self.num_heads)
        return x.reshape(len(x), 5, *sizes)


@pytest.mark.parametrize(
    "make",
    [
        Inherited,
        WithView,
        OverLines,
        WithName,
        WithRestLeftToTorch,
        WithDefault,
        WithFunction,
        pytest.param(WithTwoOnALine, marks=KNOWS_COLUMNS),
        WithStar,
    ],
)
def test_other_ways_to_write_it_are_understood(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    groups = find_groups(model, TOKENS)
    assert groups["up"].n_channels == 4
    plan = make_plan(groups, random_masks(groups, 0.5))
    assert {place.method.partition("/")[0] for place in plan.rewrites} == {"split", "join"}
    assert verify_cut(model, apply_plan(model, plan), plan).max_rel < 1e-5


class PrivateNames(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.__five = 5

    def split(self, x: Tensor, c: int) -> Tensor:
        return x.reshape(len(x), self.__five, self.num_heads, c // self.num_heads)


class DefaultOfTheClass(Heads):
    length = 5

    def split(self, x: Tensor, c: int, n: int = length) -> Tensor:
        return x.reshape(len(x), n, self.num_heads, c // self.num_heads)


@pytest.mark.parametrize("make", [PrivateNames, DefaultOfTheClass])
def test_names_that_only_the_class_body_knows_are_kept(make: Callable[[], nn.Module]) -> None:
    assert not find_groups(make(), TOKENS)["up"].frozen


class DividedAttributes(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.width = 8

    def split(self, x: Tensor, c: int) -> Tensor:
        return x.reshape(len(x), 5, self.num_heads, self.width // self.num_heads)


def test_a_quotient_of_two_attributes_is_a_computed_size() -> None:
    assert not find_groups(DividedAttributes(), TOKENS)["up"].frozen


class LeNet(nn.Module):
    """Writes the number of features behind its maps into the code, as tutorials do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2 = nn.Linear(16 * 5 * 5, 20), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.conv1(x).relu(), 2)
        x = nn.functional.max_pool2d(self.conv2(x).relu(), 2)
        x = x.view(-1, 16 * 5 * 5)
        return self.fc2(self.fc1(x).relu())


class Decoder(nn.Module):
    """Writes the number of maps, and gives the sizes to a function of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.conv, self.out = (
            nn.Linear(16, 12 * 16),
            nn.ConvTranspose2d(12, 8, 2),
            nn.Conv2d(8, 3, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(torch.reshape(self.up(x).relu(), (-1, 12, 4, 4))).relu())


@pytest.mark.parametrize(
    ("make", "example", "widths"),
    [(LeNet, torch.randn(1, 3, 32, 32), [6, 16, 20]), (Decoder, torch.randn(2, 16), [12, 8])],
)
def test_a_number_of_channels_that_is_written_in_the_code_is_written_anew(
    make: Callable[[], nn.Module], example: Tensor, widths: list[int], tmp_path: Path
) -> None:
    model = make().eval()
    for _ in range(2):
        groups = find_groups(model, example, round_to=1, min_channels=1)
        assert [g.n_channels for g in groups.free] == widths
        plan = make_plan(groups, random_masks(groups, 0.5))
        cut = apply_plan(model, plan)
        assert verify_cut(model, cut, plan).max_rel < 1e-5
        kept = {group.name: len(group.kept) for group in plan.groups}
        model, widths = cut, [kept[group.name] for group in groups.free]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        with pytest.raises(ModelError, match="were rewritten by a cut"):
            torch.jit.script(model)
    save(model, tmp_path, factory=make)
    with torch.no_grad():
        assert torch.equal(load(tmp_path, factory=make)(example), model(example))
