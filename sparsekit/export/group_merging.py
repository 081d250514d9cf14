"""Grouped convolutions as ONNX Runtime runs them fast: groups as wide as its blocks, filled up with zeros.

Its blocked layout takes a grouped convolution only if each group has whole blocks of channels (`NchwcTransformer` in
onnxruntime/core/optimizer/nchwc_transformer.cc); narrower ones run group by group, and what is around them is reordered
on the way in and out. Two groups of 8 channels as one of 16, with zeros where they do not meet, multiply twice as much
and take less time (benchmarks/merged_groups.py).
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

# With more zeros than that what the layout gains is lost again.
_MOST_MERGED = 4


def merge_factor(inputs: int, outputs: int, block: int) -> int:
    """Of how many groups with so many input and output channels one should be made, if their number allows it.

    `block` is the width of the layout's blocks, 1 where there is no such layout.
    """
    for factor in range(1, _MOST_MERGED + 1):
        if (inputs * factor) % block == 0 and (outputs * factor) % block == 0:
            return factor if max(inputs, outputs) * factor <= 2 * block else 1
    return 1


def merge_groups_(proto: onnx.ModelProto, block: int) -> int:
    """Widen the groups of all 2-d convolutions whose weights are constants, in place; returns of how many."""
    weights = {initializer.name: initializer for initializer in proto.graph.initializer}
    readers = [name for node in proto.graph.node for name in node.input]
    merged = 0
    for node in proto.graph.node:
        groups = next((a for a in node.attribute if node.op_type == "Conv" and a.name == "group"), None)
        if (
            groups is None
            or groups.i == 1
            or node.input[1] not in weights
            or readers.count(node.input[1]) > 1
        ):
            continue
        initializer = weights[node.input[1]]
        if len(initializer.dims) != 4:
            continue
        weight = numpy_helper.to_array(initializer)
        factor = merge_factor(weight.shape[1], len(weight) // groups.i, block)
        if factor > 1 and groups.i % factor == 0:
            wide = _widened(weight, groups.i, factor)
            initializer.CopyFrom(numpy_helper.from_array(wide, initializer.name))
            groups.i //= factor
            merged += 1
    return merged


def _widened(weight: np.ndarray, conv_groups: int, factor: int) -> np.ndarray:
    """(out, in / groups, *kernel) to (out, factor * in / groups, *kernel), the same convolution in fewer groups."""
    outputs, inputs = weight.shape[:2]
    wide = np.zeros((outputs, factor * inputs, *weight.shape[2:]), weight.dtype)
    per_group = outputs // conv_groups
    for place in range(factor):  # of a group among those that it is merged with
        rows = [i for i in range(outputs) if (i // per_group) % factor == place]
        wide[rows, place * inputs : (place + 1) * inputs] = weight[rows]
    return wide
