"""Measured speed-up: ONNX files timed against each other in one process, with intervals and a null.

Files timed one after the other would differ by clock, neighbours and temperature as well. So every round runs every
file once, in shuffled order, and the speed-up is the median over rounds of the ratio within the round. The null is a
second session of the first file: it shows what difference this machine reports where there is none. Two sessions of
one file differ by one or two per cent, because their memory lies elsewhere. So each file is opened several times.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from sparsekit.errors import FileError, InputError
from sparsekit.export.session import open_session
from sparsekit.options import Provider

__all__ = ["Interval", "Latency", "LatencyComparison", "bootstrap_median", "compare_latency"]

# Neighbouring rounds share disturbances, so the bootstrap draws blocks of this many rounds.
_BLOCK = 5
_RESAMPLES = 10_000
_RESAMPLES_AT_ONCE = 1_000
_MIN_ROUNDS = 10
# Below this the clock and the call itself show in the figure, so such a model runs several times in one measurement.
_MIN_MEASURED_MS = 0.2
# All sessions stay open until the end, unless their files have more bytes than this in all.
_KEPT_BYTES = 2**30
_NULL_TOLERANCE = 0.01
_NULL_MAX_HALF_WIDTH = 0.02


@dataclass(frozen=True)
class Latency:
    """Wall time of one run of the ONNX file `path` with `batch` inputs: the median and other percentiles.

    `p99_ms` is None in older results.
    """

    path: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    batch: int
    p99_ms: float | None = None

    @property
    def per_second(self) -> float:
        """Inputs per second, one run after the other."""
        return 1000 * self.batch / self.median_ms


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LatencyComparison:
    """What `compare_latency` measured.

    - `latencies`: one for each file, in the order given.
    - `speedups`: latency of the first file / that of each other file, in the order given. Above 1 the other is faster.
    - `null`: the same of the first file and a second session of it; 1 on a quiet machine.
    - `trustworthy`: whether the null is near enough to 1 and narrow enough. `reason` says why not, else "".
    """

    latencies: tuple[Latency, ...]
    speedups: tuple[Interval, ...]
    null: Interval
    threads: int
    batch: int
    rounds: int
    trustworthy: bool
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return plain lists, mappings and numbers; `from_json` reads them back."""
        fields = asdict(self)
        return {**fields, "latencies": list(fields["latencies"]), "speedups": list(fields["speedups"])}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> LatencyComparison:
        """Return the comparison that `to_json` wrote."""
        latencies = tuple(Latency(**entry) for entry in fields["latencies"])
        speedups = tuple(Interval(**entry) for entry in fields["speedups"])
        return cls(
            **{**fields, "latencies": latencies, "speedups": speedups, "null": Interval(**fields["null"])}
        )


def compare_latency(
    paths: Sequence[str | os.PathLike[str]],
    *,
    threads: int = 1,
    batch: int | None = None,
    rounds: int = 100,
    warmup: int = 10,
    seed: int = 0,
    sessions: int = 4,
    provider: Provider = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> LatencyComparison:
    """Time the ONNX files `paths` against each other, on one fixed random input each.

    Each file is warmed up with at least `warmup` runs. Then come `rounds` rounds. Each times every file and the null
    once, in shuffled order (`seed`), with inputs and outputs bound beforehand. All files are opened `sessions` times,
    each time for an equal part of the rounds. Unless the files are large the earlier sessions stay open, so that the
    new ones get other memory.

    An open batch dimension becomes `batch` (1 if None). Inputs and outputs lie in the host's memory, whatever the
    `provider`. `progress(done, rounds)` is called after each round.

    The result is trustworthy if the null's interval reaches into [0.99, 1.01] and its half-width is at most 0.02.

    Raises:
        FileError: a file is missing or damaged, has another batch size, or leaves more than the batch dimension open.
        InputError: there is no file, `threads` exceeds the usable cores, `rounds` is below 10, a count is negative,
            `sessions` is not between 1 and `rounds`, or the provider is not installed.
    """
    _check_counts(paths, batch, rounds, warmup, sessions)
    files = [Path(path) for path in paths]
    generator = np.random.default_rng(seed)
    times_ms = np.empty((rounds, len(files) + 1))
    open_runners: list[_Runner] = []
    for share in np.array_split(np.arange(rounds), sessions):
        opened = [open_session(path, threads=threads, provider=provider) for path in [*files, files[0]]]
        if sessions * sum(path.stat().st_size for path in files) > _KEPT_BYTES:
            open_runners.clear()
        inputs = [
            _random_inputs(session, path, batch, seed)
            for session, path in zip(opened, [*files, files[0]], strict=True)
        ]
        size = _common_batch(files, inputs[:-1], batch)
        runners = [_prepare(session, fed, warmup) for session, fed in zip(opened, inputs, strict=True)]
        # The null, at the end, must be measured exactly as the file it repeats.
        runners[-1] = replace(runners[-1], repeats=runners[0].repeats)
        open_runners += runners
        for number in share:
            times_ms[number] = _time_round(runners, generator)
            if progress is not None:
                progress(int(number) + 1, rounds)
    ratios = times_ms[:, :1] / times_ms[:, 1:]
    *speedups, null = (bootstrap_median(column, seed=seed) for column in ratios.T)
    reason = _distrust(null)
    return LatencyComparison(
        latencies=tuple(
            _summary(path, column, size) for path, column in zip(files, times_ms.T, strict=False)
        ),
        speedups=tuple(speedups),
        null=null,
        threads=threads,
        batch=size,
        rounds=rounds,
        trustworthy=not reason,
        reason=reason,
    )


def bootstrap_median(
    values: NDArray[np.float64], *, block: int = _BLOCK, resamples: int = _RESAMPLES, seed: int = 0
) -> Interval:
    """Return the median of `values`, in order of time, and its 95 % percentile bootstrap interval.

    Circular blocks of `block` neighbours are drawn, so that a disturbance of a few rounds widens the interval (Politis
    and Romano, "A circular block-resampling procedure for stationary data", 1992).
    """
    values = np.asarray(values, dtype=np.float64)
    count = len(values)
    generator = np.random.default_rng(seed)
    offsets = np.arange(block)
    medians = []
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        drawn = min(_RESAMPLES_AT_ONCE, resamples - start)
        starts = generator.integers(0, count, size=(drawn, math.ceil(count / block), 1))
        index = ((starts + offsets) % count).reshape(drawn, -1)[:, :count]
        medians.append(np.median(values[index], axis=1))
    low, high = np.percentile(np.concatenate(medians), [2.5, 97.5])
    return Interval(float(np.median(values)), float(low), float(high))


@dataclass(frozen=True)
class _Runner:
    """A session with its inputs and outputs bound, and how often it runs in one measurement."""

    session: onnxruntime.InferenceSession
    binding: onnxruntime.IOBinding
    # The binding points into these arrays without owning them: they must live as long as it does.
    bound: tuple[onnxruntime.OrtValue, ...]
    repeats: int

    def measure_ms(self) -> float:
        run, binding = self.session.run_with_iobinding, self.binding
        start = perf_counter_ns()
        for _ in range(self.repeats):
            run(binding)
        return (perf_counter_ns() - start) / 1e6 / self.repeats


def _check_counts(
    paths: Sequence[str | os.PathLike[str]], batch: int | None, rounds: int, warmup: int, sessions: int
) -> None:
    if not paths:
        raise InputError("compare_latency needs at least one ONNX file, got none")
    if batch is not None and batch < 1:
        raise InputError(f"batch must be at least 1, got {batch}")
    if rounds < _MIN_ROUNDS:
        raise InputError(
            f"rounds must be at least {_MIN_ROUNDS} for an interval to mean anything, got {rounds}"
        )
    if warmup < 0:
        raise InputError(f"warmup must be at least 0, got {warmup}")
    if not 1 <= sessions <= rounds:
        raise InputError(f"sessions must be between 1 and {rounds}, the rounds, got {sessions}")


def _random_inputs(
    session: onnxruntime.InferenceSession, path: Path, batch: int | None, seed: int
) -> dict[str, NDArray[Any]]:
    generator = np.random.default_rng(seed)
    return {
        entry.name: _random_array(entry.type, _input_shape(entry, path, batch), path, generator)
        for entry in session.get_inputs()
    }


def _input_shape(entry: onnxruntime.NodeArg, path: Path, batch: int | None) -> tuple[int, ...]:
    shape = list(entry.shape)
    if shape and not isinstance(shape[0], int):
        shape[0] = batch or 1
    if not all(isinstance(size, int) for size in shape):
        raise FileError(
            f"{path}: input {entry.name!r} has the shape {tuple(entry.shape)}; only the first dimension "
            "may be open, export it with a fixed size"
        )
    return tuple(shape)


def _random_array(
    kind: str, shape: tuple[int, ...], path: Path, generator: np.random.Generator
) -> NDArray[Any]:
    floats = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
    integers = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int8)": np.int8}
    if kind in floats:
        return generator.standard_normal(shape).astype(floats[kind])
    if kind in integers:  # 0 and 1 are valid indices into almost any table
        return generator.integers(0, 2, shape).astype(integers[kind])
    if kind == "tensor(uint8)":
        return generator.integers(0, 256, shape).astype(np.uint8)
    if kind == "tensor(bool)":
        return generator.integers(0, 2, shape).astype(np.bool_)
    raise FileError(
        f"{path}: no random input can be made for an input of type {kind}; use float or integer inputs"
    )


def _common_batch(
    files: Sequence[Path], inputs: Sequence[Mapping[str, NDArray[Any]]], batch: int | None
) -> int:
    sizes = []
    for path, fed in zip(files, inputs, strict=True):
        first = next(iter(fed.values()), None)
        size = first.shape[0] if first is not None and first.ndim else 1
        if batch is not None and size != batch:
            raise FileError(
                f"{path} has the batch size {size} built in, got batch {batch}; export it with that batch"
            )
        sizes.append(size)
    if len(set(sizes)) > 1:
        listed = ", ".join(f"{path}: {size}" for path, size in zip(files, sizes, strict=True))
        raise FileError(
            f"files of different batch sizes cannot be compared ({listed}); export them with one batch"
        )
    return sizes[0]


def _prepare(session: onnxruntime.InferenceSession, fed: Mapping[str, NDArray[Any]], warmup: int) -> _Runner:
    """Bind inputs and output buffers, so that no run allocates; warm up; choose the repeats."""
    binding, bound = session.io_binding(), []
    for name, array in fed.items():
        bound.append(onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)))
        binding.bind_ortvalue_input(name, bound[-1])
    for entry, output in zip(session.get_outputs(), session.run(None, dict(fed)), strict=True):
        if isinstance(output, np.ndarray):
            bound.append(onnxruntime.OrtValue.ortvalue_from_numpy(output.copy()))
            binding.bind_ortvalue_output(entry.name, bound[-1])
        else:
            binding.bind_output(entry.name, "cpu")
    once = _Runner(session, binding, tuple(bound), 1)
    typical_ms = float(np.median([once.measure_ms() for _ in range(max(3, warmup))]))
    return replace(once, repeats=max(1, math.ceil(_MIN_MEASURED_MS / max(typical_ms, 1e-3))))


def _time_round(runners: Sequence[_Runner], generator: np.random.Generator) -> NDArray[np.float64]:
    """Return the time of one run of each in ms, (runners,). They run in an order that is drawn anew."""
    times_ms = np.empty(len(runners))
    for column in generator.permutation(len(runners)):
        times_ms[column] = runners[column].measure_ms()
    return times_ms


def _distrust(null: Interval) -> str:
    """Return why a comparison with this null is not trustworthy, or "" if it is."""
    half_width = (null.high - null.low) / 2
    found = f"the first file against itself gave {null.value:.3f} [{null.low:.3f}, {null.high:.3f}]"
    if half_width > _NULL_MAX_HALF_WIDTH:
        return f"{found}, wider than +-{_NULL_MAX_HALF_WIDTH}: the machine is busy; repeat it"
    if null.low > 1 + _NULL_TOLERANCE or null.high < 1 - _NULL_TOLERANCE:
        return f"{found}, which excludes 1 +-{_NULL_TOLERANCE}: something disturbs one session; repeat it"
    return ""


def _summary(path: Path, times_ms: NDArray[np.float64], batch: int) -> Latency:
    p10, median, p90, p99 = (float(value) for value in np.percentile(times_ms, [10, 50, 90, 99]))
    return Latency(str(path), median, p10, p90, batch, p99)
