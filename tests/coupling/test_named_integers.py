"""Integers that know their attribute: to torch and to the model they are like any other."""

from __future__ import annotations

import copy
import operator
import pickle
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from models_by_hand import BY_HAND, build
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekit.coupling.named_integers import NamedInt, name_integers_
from sparsekit.evaluation import flat_tensors
from sparsekit.structure.places import Attribute
from sparsekit.surgery.attributes import read_sizes, write_size_

HEADS = Attribute("blocks.0.attention", "num_heads")


def named(value: int) -> NamedInt:
    return NamedInt.of(value, HEADS)


CALLS: dict[str, Any] = {
    "reshape": lambda x, n: x.reshape(2, n, 3, 8),
    "reshape of a tuple": lambda x, n: torch.reshape(x, (2, n, -1)),
    "view": lambda x, n: x.view(2, n, 3, 8),
    "split": lambda x, n: x.split(n, 1)[0],
    "split in parts": lambda x, n: torch.split(x, [n, n, n], 1)[1],
    "chunk": lambda x, n: x.chunk(n, 1)[2],
    "narrow": lambda x, n: x.narrow(1, n, n),
    "slice": lambda x, n: x[:, n:, :n],
    "unflatten": lambda x, n: x.unflatten(1, (n, 3)),
    "repeat": lambda x, n: x.repeat(1, n, 1),
    "pooling": lambda x, n: F.adaptive_avg_pool1d(x, n),
    "scale": lambda x, n: x * n**-0.5,
    "zeros": lambda x, n: torch.zeros(n, n),
    "arange": lambda x, n: torch.arange(n),
    "norm": lambda x, n: F.group_norm(x, n),
    "shuffle": lambda x, n: F.channel_shuffle(x.unsqueeze(-1), n),
}


@pytest.mark.parametrize("call", CALLS)
def test_torch_takes_a_named_integer_for_the_number_it_is(call: str) -> None:
    x = torch.randn(2, 12, 8)
    assert torch.equal(CALLS[call](x, named(4)), CALLS[call](x, 4))


def test_a_named_integer_is_equal_to_its_number_and_survives_copies() -> None:
    number = named(12)
    assert (number, hash(number), str(number), f"{number:03d}") == (12, hash(12), "12", "012")
    assert {12: "found"}[number] == "found"
    assert isinstance(number, int)
    copied = copy.deepcopy({"sizes": [number]})["sizes"][0]
    assert isinstance(copied, NamedInt)
    assert copied.attribute == HEADS
    assert type(pickle.loads(pickle.dumps(number))) is int


OPERATIONS = [
    operator.add,
    operator.sub,
    operator.mul,
    operator.floordiv,
    operator.truediv,
    operator.mod,
    operator.pow,
]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "other", [5, 2.5, True, np.int64(5), np.float64(2.5), torch.tensor([5.0, 2.5])], ids=repr
)
@pytest.mark.parametrize("turned", [False, True])
def test_arithmetic_gives_the_numbers_it_gives_with_plain_integers(
    operation: Any, other: Any, turned: bool
) -> None:
    found, expected = (operation(other, n) if turned else operation(n, other) for n in (named(12), 12))
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    assert isinstance(found, type(expected))
    assert not isinstance(found, NamedInt)


def test_sequences_are_repeated_and_indexed_by_a_named_integer() -> None:
    assert [7] * named(3) == named(3) * [7] == [7, 7, 7]
    assert "abcdef"[named(2) :] == "cdef"
    assert (-named(3), abs(named(3)), round(named(3)), max(named(3), 2)) == (-3, 3, 3, 3)


class Pair(NamedTuple):
    height: int
    width: int


class Sized(nn.Module):
    """One attribute of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale, self.fused, self.nothing, self.offset = 4, 0.5, True, None, -1
        self.sizes, self.parts, self.mixed = (2, 3), [5, 6], (1, "same")
        self.pair, self.empty, self.zeros = Pair(7, 7), (), [0, 3]
        self._hidden = 9
        self.layers = nn.ModuleList(
            [nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.BatchNorm2d(4), nn.PixelShuffle(2)]
        )


def test_positive_integers_and_sequences_of_them_are_named_and_nothing_else() -> None:
    model = Sized()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    name_integers_(model)
    found: dict[Attribute, int] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            assert type(value) in (type(before[name][key]), NamedInt)
            assert value == before[name][key] or isinstance(value, nn.Module)
            for entry in value if type(value) in (tuple, list) else (value,):
                if isinstance(entry, NamedInt):
                    found[entry.attribute] = int(entry)
    assert found == {
        Attribute("", "num_heads"): 4,
        Attribute("", "sizes", 0): 2,
        Attribute("", "sizes", 1): 3,
        Attribute("", "parts", 0): 5,
        Attribute("", "parts", 1): 6,
        # Among the amounts of a padding there are zeros.
        Attribute("", "zeros", 1): 3,
        Attribute("layers.3", "upscale_factor"): 2,
    }


@pytest.mark.parametrize("name", [*BY_HAND, "test_vit", "test_efficientnet"])
def test_a_model_with_named_integers_computes_what_it_did(name: str) -> None:
    model, inputs = build(name)
    copied = copy.deepcopy(model)
    name_integers_(copied)
    with torch.no_grad():
        ours, theirs = flat_tensors(model(*inputs)), flat_tensors(copied(*inputs))
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


class Holder(nn.Module):
    """Sizes in every form that is read and written."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.width, self.inner.pair, self.inner.parts = 8, (3, 4), [5, 6, 7]
        self.feature_info = [{"num_chs": 16, "module": "stem"}, {"num_chs": 32, "module": "body"}]


@pytest.mark.parametrize(
    ("attribute", "before"),
    [
        (Attribute("inner", "width"), (8,)),
        (Attribute("inner", "pair", 1), (3, 4)),
        (Attribute("inner", "parts", 0), (5, 6, 7)),
        (Attribute("", "feature_info", 1), (16, 32)),
    ],
)
def test_a_size_that_was_written_is_read_and_the_others_stay(
    attribute: Attribute, before: tuple[int, ...]
) -> None:
    model = Holder()
    path = f"{attribute.module}.{attribute.name}".lstrip(".")
    holder = model.get_submodule(attribute.module)
    value = getattr(holder, attribute.name)
    kept = copy.deepcopy(value)
    others = {key: read_sizes(model, f"inner.{key}") for key in ("width", "pair", "parts")}
    assert read_sizes(model, path) == before

    write_size_(model, attribute, 2)

    written = list(before)
    written[attribute.item or 0] = 2
    assert read_sizes(model, path) == tuple(written)
    assert type(getattr(holder, attribute.name)) is type(value)
    assert value == kept  # a list that copies of the model may share is replaced
    changed = {key for key, sizes in others.items() if read_sizes(model, f"inner.{key}") != sizes}
    assert changed == {attribute.name} - {"feature_info"}


def test_what_else_a_feature_description_says_is_kept() -> None:
    model = Holder()
    write_size_(model, Attribute("", "feature_info", 0), 4)
    assert model.feature_info == [{"num_chs": 4, "module": "stem"}, {"num_chs": 32, "module": "body"}]


@pytest.mark.parametrize("path", ["inner.height", "outer.width", "height", "inner.width.more"])
def test_an_attribute_that_is_not_there_has_no_sizes(path: str) -> None:
    assert read_sizes(Holder(), path) == ()


def test_an_attribute_is_written_as_code_would_write_it() -> None:
    paths = [str(Attribute("a.b", "width")), str(Attribute("", "width")), str(Attribute("a", "sizes", 2))]
    assert paths == ["a.b.width", "width", "a.sizes[2]"]


def test_sizes_of_a_cut_model_are_read_where_a_forward_pass_reads_them() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 4

        def forward(self, x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, 2))

    model = Heads()
    write_size_(model, Attribute("", "num_heads"), 3)
    assert model(torch.zeros(1, 6)).shape == (1, 3, 2)
