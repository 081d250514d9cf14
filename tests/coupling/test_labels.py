"""Labels against the tensors they stand for: an array, expanded to the tensor's shape, says it of every element."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from sparsekit.coupling.labels import aligned, along, compressed, merged_by_span, moved, span

Operator = Callable[[Tensor], Tensor | Sequence[Tensor]]


def random_labels(shape: Sequence[int], dims: Sequence[int], seed: int, n_labels: int = 5) -> Tensor:
    """Labels that vary along some of `dims` at most, in full size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [size if dim in dims else 1 for dim, size in enumerate(shape)]
    return torch.randint(n_labels, sizes, generator=generator).float().expand(tuple(shape))


CASES = [(dims, seed) for dims in ((), (0,), (1,), (3,), (0, 1), (1, 3), (0, 2, 3)) for seed in range(4)]


@pytest.mark.parametrize(("dims", "seed"), CASES)
@pytest.mark.parametrize("held", ["expanded", "contiguous"])
def test_a_compressed_array_says_the_same_and_is_as_small_as_possible(
    dims: tuple[int, ...], seed: int, held: str
) -> None:
    labels = random_labels((3, 4, 1, 5), dims, seed)
    small = compressed(labels.contiguous() if held == "contiguous" else labels)
    assert torch.equal(small.expand(labels.shape), labels)
    assert set(span(small)) <= set(dims)
    for dim in span(small):
        slices = small.unbind(dim)
        assert any(not torch.equal(slices[0], other) for other in slices)
    assert torch.equal(compressed(small), small)


def test_an_array_that_differs_in_the_last_slice_only_is_not_compressed() -> None:
    labels = torch.ones(6, 2)
    labels[5, 1] = 2
    assert compressed(labels).shape == (6, 2)
    labels[5] = 2
    assert compressed(labels).shape == (6, 1)


MOVES: dict[str, Operator] = {
    "permute": lambda t: t.permute(2, 0, 3, 1),
    "flatten": lambda t: t.flatten(1),
    "unflatten": lambda t: t.reshape(2, 2, 3, 2, 4),
    "merge and split elsewhere": lambda t: t.reshape(3, 4, 8),
    "slice": lambda t: t[:, 1:4, ::2],
    "select": lambda t: t.select(1, 3),
    "roll": lambda t: t.roll(2, 1),
    "flip": lambda t: t.flip((1, 3)),
    "expand": lambda t: t.unsqueeze(0).expand(3, -1, -1, -1, -1),
    "windows": lambda t: t.reshape(2, 3, 2, 2, 4).transpose(1, 2).flatten(0, 1),
    "chunks": lambda t: t.chunk(3, 1),
    "parts": lambda t: t.split([1, 5], 1),
    "one by one": lambda t: t.unbind(3),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("dims", [(), (1,), (3,), (0, 1), (1, 2, 3)])
def test_labels_move_as_values_do(move: str, dims: tuple[int, ...]) -> None:
    shape, operator = (2, 6, 2, 4), MOVES[move]
    dense = random_labels(shape, dims, 0)
    expected = operator(dense.contiguous())
    results = moved(compressed(dense), shape, operator)
    expected = [expected] if isinstance(expected, Tensor) else list(expected)
    assert len(results) == len(expected)
    for labels, values in zip(results, expected, strict=True):
        assert labels.dim() == values.dim()
        assert torch.equal(labels.expand(values.shape), values)
        assert torch.equal(compressed(labels), labels)


@pytest.mark.parametrize("dim", range(4))
def test_a_vector_is_laid_along_one_dimension(dim: int) -> None:
    vector = torch.arange(5.0)
    laid = along(vector, dim, 4)
    assert span(laid) == (dim,)
    assert torch.equal(laid.flatten(), vector)


@pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 1), (6, 1, 4), (6, 1, 1)])
def test_labels_meet_a_larger_tensor_as_broadcasting_has_it(shape: tuple[int, ...]) -> None:
    labels = random_labels(shape, range(len(shape)), 0)
    laid = aligned(labels, 3)
    assert laid.dim() == 3
    assert torch.equal(laid.expand(6, 3, 4), torch.broadcast_to(labels, (6, 3, 4)))


@pytest.mark.parametrize("seed", range(5))
def test_arrays_over_the_same_dimensions_become_one_and_are_coupled_others_stay(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    arrays, n_labels = [], 1
    for dims in ((1,), (), (1,), (0, 1), (1,), (2,), (0, 1)):
        sizes = [(2, 3, 4)[dim] if dim in dims else 1 for dim in range(3)]
        count = torch.Size(sizes).numel()
        order = torch.randperm(count, generator=generator)
        arrays.append((order + n_labels).float().reshape(sizes))
        n_labels += count
    coupled: list[tuple[Tensor, Tensor]] = []
    merged = merged_by_span(arrays, lambda one, other: coupled.append((one, other)))
    assert [span(labels) for labels in merged] == [(1,), (0, 1), (2,)]
    assert all(any(labels is one for one in arrays) for labels in merged)
    for one, other in coupled:
        assert one.shape == other.shape
        assert any(one is kept for kept in merged)
    # Every array that varies is kept, or coupled with one that is.
    held = [*merged, *(other for _, other in coupled)]
    assert {id(labels) for labels in held} == {id(labels) for labels in arrays if span(labels)}
