"""Merge narrow groups of grouped convolutions, filled up with zeros, because ONNX Runtime runs wide ones faster.

Its blocked layout takes a grouped convolution only if the channels of each group are a multiple of the step
(`NchwcTransformer` in onnxruntime/core/optimizer/nchwc_transformer.cc). Narrower groups run one by one, with reorders
before and after. Two groups of 8 channels made one of 16 multiply twice as much and take less time
(benchmarks/merged_groups.py).
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

# With more zeros than this, the layout gains nothing.
_MOST_MERGED = 4


def merge_groups_(proto: onnx.ModelProto, step: int) -> int:
    """Merge the groups of all 2-d convolutions with constant weights, in place; returns of how many."""
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
        factor = merge_factor(weight.shape[1], len(weight) // groups.i, step)
        if factor > 1 and groups.i % factor == 0:
            wide = _widened(weight, groups.i, factor)
            initializer.CopyFrom(numpy_helper.from_array(wide, initializer.name))
            groups.i //= factor
            merged += 1
    return merged


def merge_factor(inputs: int, outputs: int, step: int) -> int:
    """How many groups to merge into one, if their number can be divided by it; 1 to leave them.

    `inputs` and `outputs` are the channels of one group, `step` is the step of the latency (`conv_step`).
    """
    for factor in range(1, _MOST_MERGED + 1):
        if (inputs * factor) % step == 0 and (outputs * factor) % step == 0:
            return factor if max(inputs, outputs) * factor <= 2 * step else 1
    return 1


def _widened(weight: np.ndarray, conv_groups: int, factor: int) -> np.ndarray:
    """The same convolution in fewer groups: (out, in / groups, *kernel) to (out, factor * in / groups, *kernel)."""
    outputs, inputs = weight.shape[:2]
    wide = np.zeros((outputs, factor * inputs, *weight.shape[2:]), weight.dtype)
    per_group = outputs // conv_groups
    for place in range(factor):  # the place of a group in its merged one
        rows = [i for i in range(outputs) if (i // per_group) % factor == place]
        wide[rows, place * inputs : (place + 1) * inputs] = weight[rows]
    return wide
