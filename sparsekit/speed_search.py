"""Masks for a speed: chosen by what layers are predicted to cost, cut, exported, measured, and corrected."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from sparsekit.choice import Choice
from sparsekit.complexity import kept_share
from sparsekit.errors import InputError
from sparsekit.export import export_onnx
from sparsekit.groups import ChannelGroups
from sparsekit.latency import LatencyComparison, compare_latency
from sparsekit.masks import Masks, Quantity
from sparsekit.plan import make_plan
from sparsekit.surgery import apply_plan

__all__ = ["SpeedSearch", "SpeedTrial", "block_rounding", "search_speed"]

# A measured speed-up this near to the one asked for is good enough to stop at, and this near is what was asked for.
_NEAR = 0.01
_REACHED = 0.03
_MAX_TRIALS = 8
_ROUNDS = 40


@dataclass(frozen=True)
class SpeedTrial:
    """One set of masks: the speed-up that was predicted for it, and what ONNX Runtime measured."""

    predicted: float
    measured: float
    low: float
    high: float
    dense_ms: float
    pruned_ms: float
    trustworthy: bool

    @staticmethod
    def of(predicted: float, compared: LatencyComparison) -> SpeedTrial:
        """From a comparison of the dense model's file and the cut one's."""
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

    `asked` is the speed-up that was asked for. `remark` is empty if the measured one is within 3 % of that, else it
    says why not.
    """

    masks: Masks
    asked: float
    found: SpeedTrial
    trials: tuple[SpeedTrial, ...]
    remark: str = ""


def block_rounding(groups: ChannelGroups, min_channels: int = 1) -> dict[str, tuple[int, int]]:
    """For each free group in multiples of how many channels it is cut, by the blocks of its layers, and the least.

    Raises InputError if the layers were not measured.
    """
    blocks: dict[tuple[str, int], int] = {}
    for layer in groups.layers:
        if layer.curve is None:
            raise InputError(
                "the layers were not measured; take the groups that sparsekit.measure_layers returns"
            )
        blocks.update({(layer.weight, dim): block for dim, block in enumerate(layer.curve.blocks)})
    return {
        group.name: group.rounding(
            math.lcm(*(blocks.get((member.tensor, member.dim), 1) for member in group.members)), min_channels
        )
        for group in groups.free
    }


def search_speed(
    model: nn.Module,
    groups: ChannelGroups,
    worth: Masks,
    example_input: Tensor | tuple[Tensor, ...],
    *,
    speedup: float | None = None,
    latency_ms: float | None = None,
    limits: Mapping[Quantity, float] | None = None,
    rounding: Mapping[str, tuple[int, int]] | None = None,
    threads: int = 1,
    progress: Callable[[SpeedTrial], None] | None = None,
) -> SpeedSearch:
    """The keep-masks that keep the most worth of those that run `speedup` times as fast as `model`, or in `latency_ms`.

    `groups` come from `measure_layers`; `worth` and `rounding` are those of `choose_channels` (by default the blocks
    that were measured), `limits` further shares to keep at most ("macs", "params", "channels"). `choose_channels`
    predicts; a copy is cut and exported, and timed in ONNX Runtime, interleaved with the dense model, at the batch of
    `example_input`; the prediction is corrected by what was measured, up to eight times, until that is within 1 % of
    what was asked for. The model is not changed.

    Raises InputError for a speed out of reach, with the one that was measured at the fewest channels.
    """
    if (speedup is None) == (latency_ms is None):
        raise InputError("search_speed needs one of speedup and latency_ms")
    if not 0 < (asked_value := speedup or latency_ms or 0.0) < math.inf:
        raise InputError(f"a speed-up or a latency must be a finite number > 0, got {asked_value}")
    search = _Search(
        Choice(groups, worth, rounding or block_rounding(groups)),
        groups,
        model,
        example_input,
        dict(limits or {}),
        threads,
        progress,
    )
    with TemporaryDirectory() as folder:
        search.folder = Path(folder)
        search.export(model, "dense.onnx")
        return search.run(speedup, latency_ms)


class _Search:
    """The state of a search: what was tried, and between which predicted shares the one sought for lies."""

    folder: Path

    def __init__(
        self,
        choice: Choice,
        groups: ChannelGroups,
        model: nn.Module,
        example_input: Tensor | tuple[Tensor, ...],
        limits: dict[Quantity, float],
        threads: int,
        progress: Callable[[SpeedTrial], None] | None,
    ) -> None:
        self._choice, self._groups, self._model = choice, groups, model
        self._example, self._limits, self._threads = example_input, limits, threads
        self._progress = progress
        self._trials: list[tuple[Masks, SpeedTrial]] = []

    def export(self, model: nn.Module, name: str) -> Path:
        n = 1 if isinstance(self._example, Tensor) else len(self._example)
        return export_onnx(
            model,
            self.folder / name,
            self._example,
            input_names=[f"input{i}" for i in range(n)],
            output_names=(),
        )

    def run(self, speedup: float | None, latency_ms: float | None) -> SpeedSearch:
        dense_ms = sum(layer.ms or 0.0 for layer in self._groups.layers)
        asked = speedup or dense_ms / (latency_ms or 1.0)
        least = self._choice.least("latency")
        share, slow, fast = 1 / asked, 1.0, least  # between what was too slow and what was fast enough
        for _ in range(_MAX_TRIALS):
            share = min(max(share, least), 1.0)
            trial = self._measure(self._choice.under({"latency": share, **self._limits}))
            if latency_ms is not None:
                asked = trial.dense_ms / latency_ms
            if trial.measured < asked * (1 - _REACHED) and share <= least:
                raise InputError(
                    f"a speed-up of {asked:.3g} is out of reach: with the fewest channels allowed the model runs "
                    f"{trial.measured:.3g} times as fast; ask for less, or lower min_channels or round_to"
                )
            slow, fast = (min(slow, share), fast) if trial.measured < asked else (slow, max(fast, share))
            if abs(trial.measured / asked - 1) <= _NEAR or slow / fast < 1.002:
                break
            share *= trial.measured / asked
            if not fast < share < slow:
                share = math.sqrt(slow * fast)
        return self._outcome(asked)

    def _measure(self, masks: Masks) -> SpeedTrial:
        """The trial of these masks, measured unless they were before."""
        for known, trial in self._trials:
            if all(bool((known[name] == mask).all()) for name, mask in masks.items()):
                return trial
        pruned = apply_plan(self._model, make_plan(self._groups, masks))
        files = [self.folder / "dense.onnx", self.export(pruned, f"{len(self._trials)}.onnx")]
        compared = compare_latency(files, threads=self._threads, rounds=_ROUNDS)
        trial = SpeedTrial.of(1 / kept_share(self._groups, masks).latency, compared)
        self._trials.append((masks, trial))
        if self._progress is not None:
            self._progress(trial)
        return trial

    def _outcome(self, asked: float) -> SpeedSearch:
        masks, found = min(self._trials, key=lambda t: abs(math.log(t[1].measured / asked)))
        remark = ""
        if abs(found.measured / asked - 1) > _REACHED:
            remark = (
                f"asked for a speed-up of {asked:.3g}, and the nearest of {len(self._trials)} measured is "
                f"{found.measured:.3g}: "
            )
            if asked <= 1:
                remark += "the model is as fast already"
            elif self._limits and found.measured > asked:
                remark += f"the target of {' and '.join(self._limits)} is the tighter one"
            elif all(trial.trustworthy for _, trial in self._trials):
                remark += "whole blocks of channels leave nothing nearer"
            else:
                remark += "the machine was too busy to measure well"
        return SpeedSearch(masks, asked, found, tuple(trial for _, trial in self._trials), remark)
