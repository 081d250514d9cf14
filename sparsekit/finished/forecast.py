"""What a finished model would lose at several speeds: predicted from measured loss curves, before anything is cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from sparsekit.errors import InputError
from sparsekit.finished.choice import Judge, Known
from sparsekit.finished.display import StepDisplay
from sparsekit.finished.preparation import Measured, Options, measure
from sparsekit.options import FinishedImportance, Outputs, RoundTo
from sparsekit.selection.costs import CostShare, kept_share
from sparsekit.selection.knapsack import Knapsack
from sparsekit.structure.groups import ChannelGroups

__all__ = ["Forecast", "SpeedForecast", "forecast"]

SPEEDS = (1.25, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class SpeedForecast:
    """What one speed would cost.

    - `speedup` is predicted: that of the masks which lose least for it, by the measured latencies of the layers.
    - `kl` and `agreement` compare the outputs with the dense model's after the repair in closed form. See `Divergence`.
    - `kept` are the shares of the dense model that stay.
    """

    asked: float
    speedup: float
    kl: float
    agreement: float
    kept: CostShare


@dataclass(frozen=True)
class Forecast:
    """What `forecast` returns.

    - `speeds`, from slow to fast; those out of reach are left out, and `remark` says so.
    - `groups` have measured latencies; `known` has their loss curves, which `search_speed` takes as importance.
    """

    speeds: tuple[SpeedForecast, ...]
    groups: ChannelGroups
    known: Known
    remark: str = ""


def forecast(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    speedups: Sequence[float] = SPEEDS,
    importance: FinishedImportance = "greedy",
    ignore: Sequence[str] = (),
    threads: int = 1,
    batch_size: int = 1,
    blocks: bool = True,
    through_layer_norm: bool = False,
    round_to: RoundTo = "auto",
    min_channels: int = 8,
    max_images: int = 512,
    outputs: Outputs = "classes",
    seed: int = 0,
    console: Console | None = None,
) -> Forecast:
    """Predict how far the outputs of a finished model would be from its own at several `speedups`; cuts nothing.

    It measures layers and loss curves as `prune` does, chooses channels for each speed, and compares a copy that is cut
    and repaired in closed form with the model, on images kept apart. `prune` does better: it measures curves again
    where much is lost, refits, and learns. The other arguments are those of `prune`. The model is not changed.

    Raises InputError for speeds that are not above 1, DataError for images, ModelError for a model that cannot be
    analysed.
    """
    options = Options(
        importance=importance,
        ignore=ignore,
        threads=threads,
        batch_size=batch_size,
        blocks=blocks,
        through_layer_norm=through_layer_norm,
        round_to=round_to,
        min_channels=min_channels,
        max_images=max_images,
        outputs=outputs,
        seed=seed,
    )
    return forecast_with(model, images, tuple(speedups), options, console=console)


def forecast_with(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    speedups: Sequence[float],
    options: Options,
    *,
    check: Callable[[ChannelGroups], None] = lambda groups: None,
    console: Console | None = None,
) -> Forecast:
    """As `forecast`; `check` may refuse the measured groups before minutes are spent."""
    for value in speedups:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 < value < math.inf:
            raise InputError(f"speedups must be finite numbers above 1, got {value!r}")
    with StepDisplay(console) as show:
        measured = measure(model, images, options, show, latencies=True, check=check)
        measured.prepared.held_out.forget()
        show.begin("predicting")
        return _forecast(measured, sorted(set(speedups)))


def _forecast(measured: Measured, speedups: Sequence[float]) -> Forecast:
    groups, curves = measured.prepared.groups, measured.curves
    knapsack, judge = Knapsack(groups, curves), Judge(measured.prepared)
    most = 1 / knapsack.least("latency")
    found = []
    for asked in (speedup for speedup in speedups if speedup <= most):
        masks = knapsack.under({"latency": 1 / asked})
        left, divergence = kept_share(groups, masks), judge.of(masks)
        found.append(SpeedForecast(asked, 1 / left.latency, divergence.kl, divergence.agreement, left))
    beyond = [f"{speedup:g}" for speedup in speedups if speedup > most]
    remark = ""
    if beyond:
        remark = (
            f"out of reach: {', '.join(beyond)}; with the fewest channels allowed a speed-up of about {most:.3g} is "
            "predicted; lower min_channels or round_to for more"
        )
    return Forecast(tuple(found), groups, curves, remark)
