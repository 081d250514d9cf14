"""How long single operators take in ONNX Runtime, by its own profile of graphs that hold many of them.

The time of a file with one operator would include the call and the change of layout before and after the operator. The
profile has the kernel alone. Many operators follow each other in a graph, so each finds the caches as cold as in a
network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sparsekit.export.session import open_session

__all__ = ["Operator", "time_operators"]

# The most weights and inputs of one graph: several graphs are cheap, files over 2 GiB are impossible.
_MAX_BYTES = 256 * 2**20
_WARMUP = 3
_ROUNDS_AT_ONCE = 8
# An operator has been timed well enough when the half-width of its interval is this share of its time.
_NARROW = 0.02
_NAME = re.compile(r"[a-z](\d+)(?:\D.*)?_kernel_time")


@dataclass(frozen=True)
class Operator:
    """A convolution or, without `strides`, the product of an input (rows, in) with a matrix (in, out).

    `weight_shape` is (out, in / conv_groups, *kernel), or (in, out) of a product. `pads` has those before each
    dimension, then those behind each.
    """

    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    conv_groups: int = 1

    @property
    def key(self) -> str:
        """The whole operator as one line of text."""

        def times(sizes: tuple[int, ...]) -> str:
            return "x".join(map(str, sizes))

        if not self.strides:
            return f"matmul {times(self.input_shape)} by {times(self.weight_shape)}"
        return (
            f"conv {times(self.input_shape)} by {times(self.weight_shape)} strides {times(self.strides)} "
            f"pads {times(self.pads)} dilations {times(self.dilations)} groups {self.conv_groups}"
        )

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights and the input."""
        return 4 * (prod(self.weight_shape) + prod(self.input_shape))


def time_operators(
    operators: Sequence[Operator],
    *,
    threads: int = 1,
    max_rounds: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Return the milliseconds of ONNX Runtime's kernel for each operator: the mean of the middle half of the rounds.

    Every round runs all operators once. Rounds go on until operators with a wide interval take less than a tenth of the
    time, at most `max_rounds`. `progress(done, max_rounds)` is called every few rounds.
    """
    if not operators:
        return []
    with TemporaryDirectory() as folder:
        chunks = _chunks(operators)
        times: NDArray[np.float64] = np.empty((0, len(operators)))
        while len(times) < max_rounds:
            rounds = min(_ROUNDS_AT_ONCE, max_rounds - len(times))
            columns = [_profiled(chunk, Path(folder), threads, rounds) for chunk in chunks]
            times = np.concatenate([times, np.concatenate(columns, axis=1)])
            if progress is not None:
                progress(len(times), max_rounds)
            if _narrow_enough(times):
                break
    return [float(value) for value in _middle_mean(times)]


def _chunks(operators: Sequence[Operator]) -> list[list[Operator]]:
    chunks: list[list[Operator]] = [[]]
    for operator in operators:
        if chunks[-1] and sum(o.n_bytes for o in chunks[-1]) + operator.n_bytes > _MAX_BYTES:
            chunks.append([])
        chunks[-1].append(operator)
    return chunks


def _middle_mean(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of the middle half of each column. The profile has whole microseconds: a median is too coarse."""
    ordered = np.sort(times, axis=0)
    n = len(ordered)
    middle: NDArray[np.float64] = ordered[n // 4 : max(n - n // 4, 1)].mean(axis=0)
    return middle


def _narrow_enough(times: NDArray[np.float64]) -> bool:
    """Whether operators with too wide an interval take at most a tenth of the time."""
    ordered = np.sort(times, axis=0)
    n = len(ordered)
    # The standard error of a median, from the quartiles of what is nearly a normal distribution.
    spread = (ordered[(3 * n) // 4] - ordered[n // 4]) / 1.35
    centre = np.maximum(_middle_mean(times), 1e-6)
    wide = 1.96 * 1.25 * spread / np.sqrt(n) > _NARROW * centre
    return bool(centre[wide].sum() <= 0.1 * centre.sum())


def _profiled(operators: Sequence[Operator], folder: Path, threads: int, rounds: int) -> NDArray[np.float64]:
    """Return the milliseconds (rounds, operators) of one session."""
    file = folder / "operators.onnx"
    file.write_bytes(_graph(operators).SerializeToString())
    session = open_session(file, threads=threads, profile=folder / "profile")
    generator = np.random.default_rng(0)
    inputs = {
        f"x{i}": generator.standard_normal(o.input_shape, dtype=np.float32) for i, o in enumerate(operators)
    }
    for _ in range(_WARMUP + rounds):
        session.run([], inputs)
    return _kernel_times(session, len(operators))[_WARMUP:]


def _kernel_times(session: onnxruntime.InferenceSession, n: int) -> NDArray[np.float64]:
    profile = Path(session.end_profiling())
    events: list[dict[str, Any]] = json.loads(profile.read_text(encoding="utf-8"))
    profile.unlink()
    readings: list[list[float]] = [[] for _ in range(n)]
    for event in events:
        # A fused kernel too has the name of the operator or of its output.
        if event.get("cat") == "Node" and (found := _NAME.fullmatch(event["name"])):
            readings[int(found[1])].append(event["dur"] / 1000)
    times: NDArray[np.float64] = np.array(readings).T
    return times


def _graph(operators: Sequence[Operator]) -> onnx.ModelProto:
    generator = np.random.default_rng(0)
    nodes, weights, inputs, outputs = [], [], [], []
    for i, o in enumerate(operators):
        weight = generator.standard_normal(o.weight_shape, dtype=np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{i}"))
        if o.strides:
            settings: dict[str, Any] = {
                "strides": o.strides,
                "pads": o.pads,
                "dilations": o.dilations,
                "group": o.conv_groups,
            }
            nodes.append(helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"y{i}"], name=f"n{i}", **settings))
        else:
            nodes.append(helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"y{i}"], name=f"n{i}"))
        inputs.append(helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, o.input_shape))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None))
    graph = helper.make_graph(nodes, "operators", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
