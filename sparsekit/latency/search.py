"""Masks for a speed-up: chosen by predicted latency, then cut, exported, measured, and corrected."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from sparsekit.errors import InputError
from sparsekit.evaluation import ExampleInput
from sparsekit.export.onnx_file import export_onnx
from sparsekit.latency.compare import LatencyComparison, compare_latency
from sparsekit.options import Quantity
from sparsekit.selection.costs import kept_share
from sparsekit.selection.knapsack import Knapsack
from sparsekit.selection.loss_curves import LossCurve
from sparsekit.structure.groups import ChannelGroups
from sparsekit.structure.masks import Masks
from sparsekit.structure.plan import make_plan
from sparsekit.surgery.cut import apply_plan

__all__ = ["SpeedSearch", "SpeedTrial", "search_speed", "time_masks"]

# A measured speed-up within this share of the one asked for meets it.
SPEED_TOLERANCE = 0.03
# The search stops at this share.
_NEAR = 0.01
_MAX_TRIALS = 8
_ROUNDS = 40


@dataclass(frozen=True)
class SpeedTrial:
    """One set of masks: the speed-up predicted for it, and what ONNX Runtime measured (`low` to `high`: 95 %)."""

    predicted: float
    measured: float
    low: float
    high: float
    dense_ms: float
    pruned_ms: float
    trustworthy: bool

    @staticmethod
    def of(predicted: float, compared: LatencyComparison) -> SpeedTrial:
        """Make a trial of a comparison of two files: the dense and the cut model."""
        dense, pruned = compared.latencies
        (speed,) = compared.speedups
        return SpeedTrial(
            predicted,
            speed.value,
            speed.low,
            speed.high,
            dense.median_ms,
            pruned.median_ms,
            compared.trustworthy,
        )


@dataclass(frozen=True)
class SpeedSearch:
    """What `search_speed` found: keep-masks, the trial that measured them, and all trials in order.

    `asked` is the speed-up that was asked for. `remark` says why the measured one is over 3 % away from it; empty if
    it is not.
    """

    masks: Masks
    asked: float
    found: SpeedTrial
    trials: tuple[SpeedTrial, ...]
    remark: str = ""


def search_speed(
    model: nn.Module,
    groups: ChannelGroups,
    importance: Mapping[str, Tensor | LossCurve],
    example_input: ExampleInput,
    *,
    speedup: float | None = None,
    latency_ms: float | None = None,
    limits: Mapping[Quantity, float] | None = None,
    threads: int = 1,
    progress: Callable[[SpeedTrial], None] | None = None,
) -> SpeedSearch:
    """Find keep-masks of the most important channels that reach a measured `speedup`, or a `latency_ms`.

    `choose_channels` predicts the masks. A copy is cut by them, exported, and timed in ONNX Runtime, interleaved with
    the dense model, at the batch of `example_input`. The measurement corrects the prediction, up to eight times, until
    it is within 1 % of what was asked for. The model is not changed.

    `groups` come from `measure_layers`; `importance` is as in `choose_channels`, or has a measured loss curve for a
    group; `limits` are further shares to keep at most of "macs", "params" or "channels". `progress(trial)` is called
    after each measurement.

    Raises InputError for a speed that even the fewest channels do not reach, and names the one that they do.
    """
    if (speedup is None) == (latency_ms is None):
        raise InputError("search_speed needs one of speedup and latency_ms")
    if not 0 < (asked_value := speedup or latency_ms or 0.0) < math.inf:
        raise InputError(f"a speed-up or a latency must be a finite number > 0, got {asked_value}")
    knapsack = Knapsack(groups, importance)
    with TemporaryDirectory() as folder:
        stopwatch = _Stopwatch(model, groups, example_input, threads, Path(folder))
        return _Search(knapsack, groups, dict(limits or {}), stopwatch, progress).run(speedup, latency_ms)


def time_masks(
    model: nn.Module,
    groups: ChannelGroups,
    masks: Masks,
    example_input: ExampleInput,
    *,
    threads: int = 1,
) -> SpeedTrial:
    """Return the speed-up of the model cut by `masks`: predicted by measured `groups`, and measured by ONNX Runtime."""
    with TemporaryDirectory() as folder:
        return _Stopwatch(model, groups, example_input, threads, Path(folder)).of(masks)


class _Stopwatch:
    """Times copies of a model that are cut by masks against the model itself. Files go to `folder`."""

    def __init__(
        self,
        model: nn.Module,
        groups: ChannelGroups,
        example_input: ExampleInput,
        threads: int,
        folder: Path,
    ) -> None:
        self._model, self._groups, self._threads = model, groups, threads
        self._example_input = example_input
        self._folder = folder
        self._dense = self._export(model, "dense.onnx")

    def of(self, masks: Masks) -> SpeedTrial:
        pruned = apply_plan(self._model, make_plan(self._groups, masks))
        files = [self._dense, self._export(pruned, "pruned.onnx")]
        compared = compare_latency(files, threads=self._threads, rounds=_ROUNDS)
        return SpeedTrial.of(1 / kept_share(self._groups, masks).latency, compared)

    def _export(self, model: nn.Module, name: str) -> Path:
        return export_onnx(model, self._folder / name, self._example_input, output_names=())


class _Search:
    """One search and its state: the trials so far, in order."""

    def __init__(
        self,
        knapsack: Knapsack,
        groups: ChannelGroups,
        limits: dict[Quantity, float],
        stopwatch: _Stopwatch,
        progress: Callable[[SpeedTrial], None] | None,
    ) -> None:
        self._knapsack, self._groups, self._limits = knapsack, groups, limits
        self._stopwatch, self._progress = stopwatch, progress
        self._trials: list[tuple[Masks, SpeedTrial]] = []

    def run(self, speedup: float | None, latency_ms: float | None) -> SpeedSearch:
        dense_ms = sum(layer.ms or 0.0 for layer in self._groups.layers)
        asked = speedup or dense_ms / (latency_ms or 1.0)
        least = self._knapsack.least("latency")
        share, slow, fast = 1 / asked, 1.0, 0.0  # between what was too slow, and what was fast enough
        for _ in range(_MAX_TRIALS):
            share = min(max(share, least), 1.0)
            trial = self._measure(self._knapsack.under(self._limits | {"latency": share}))
            if latency_ms is not None:
                asked = trial.dense_ms / latency_ms
            too_slow = trial.measured < asked
            if share <= least and trial.measured < asked * (1 - SPEED_TOLERANCE) and trial.trustworthy:
                raise InputError(
                    f"a speed-up of {asked:.3g} is out of reach: with the fewest channels allowed it is "
                    f"{trial.measured:.3g}; ask for less, or lower min_channels or round_to"
                )
            slow, fast = (min(slow, share), fast) if too_slow else (slow, max(fast, share))
            if abs(trial.measured / asked - 1) <= _NEAR or slow <= max(fast * 1.002, least):
                break
            share *= trial.measured / asked
            if fast and not fast < share < slow:
                share = math.sqrt(slow * fast)
        return self._outcome(asked)

    def _measure(self, masks: Masks) -> SpeedTrial:
        """Return the trial of these masks, from memory if they were measured before."""
        for known, trial in self._trials:
            if all(bool((known[name] == mask).all()) for name, mask in masks.items()):
                return trial
        trial = self._stopwatch.of(masks)
        self._trials.append((masks, trial))
        if self._progress is not None:
            self._progress(trial)
        return trial

    def _outcome(self, asked: float) -> SpeedSearch:
        masks, found = min(self._trials, key=lambda t: abs(math.log(t[1].measured / asked)))
        remark = ""
        if abs(found.measured / asked - 1) > SPEED_TOLERANCE:
            remark = (
                f"asked for a speed-up of {asked:.3g}, and the nearest of {len(self._trials)} measured is "
                f"{found.measured:.3g}: "
            )
            if asked <= 1:
                remark += "the model is as fast already"
            elif self._limits and found.measured > asked:
                remark += f"the target of {' and '.join(self._limits)} is the tighter one"
            elif all(trial.trustworthy for _, trial in self._trials):
                remark += "cutting whole steps of channels allows nothing nearer"
            else:
                remark += "the machine was too busy to measure well"
        return SpeedSearch(masks, asked, found, tuple(trial for _, trial in self._trials), remark)
