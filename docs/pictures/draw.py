"""Draw the pictures of the pages "How it works".

    python docs/pictures/draw.py

zeros.svg    one weight under subgradient and proximal steps, computed here; and the share of channels that are exactly
             zero in training, from benchmarks/results/zero_making.json
groups.svg   a schematic: one channel through a convolution, a BatchNorm and the next convolution
speed.svg    MACs ratio and measured speed-up, from benchmarks/results/speed.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"

OURS, PEER, ROUNDED, INK, PALE = "#0a7d74", "#b5562b", "#5b6fb0", "#333a42", "#dfe5e8"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "sparsekit",
}


def main() -> None:
    """Write the three pictures beside this file."""
    with matplotlib.rc_context(STYLE):
        for name, figure in (("zeros", zeros()), ("groups", groups()), ("speed", speed())):
            figure.savefig(HERE / f"{name}.svg", metadata={"Date": None}, facecolor="white")


# ------------------------------------------------------------------------------------------------------ zeros


def zeros() -> Figure:
    """Why a subgradient never arrives at zero and a proximal step does; and what that makes of a network."""
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = np.arange(26)
    for name, colour, marker in (("subgradient", PEER, "o"), ("proximal step", OURS, "s")):
        left.plot(steps, _one_weight(name), color=colour, marker=marker, markersize=3.5, lw=1.2, label=name)
    left.axhline(0, color=INK, lw=0.8)
    left.set(xlabel="step", ylabel="weight", title="one weight that only the penalty pulls")
    left.legend(frameon=False)

    runs = json.loads((RESULTS / "zero_making.json").read_text(encoding="utf-8"))["runs"]
    for where, name, colour in (("subgradient", "subgradient", PEER), ("proximal", "proximal step", OURS)):
        curves = [
            run["curve"]
            for run in runs
            if (run["optimizer"], run["penalty"], run["where"]) == ("SGD", "group_lasso", where)
        ]
        mean = np.mean(np.array(curves), 0)
        right.plot(mean[:, 0], mean[:, 1], color=colour, lw=1.8, label=name)
    right.set(xlabel="training step", ylabel="share of channels", title="channels that are exactly zero")
    right.set_ylim(bottom=-0.004)
    right.legend(frameon=False)
    return figure


def _one_weight(how: str, start: float = 1.0, pull: float = 0.07) -> list[float]:
    """A weight that starts at `start` and loses `pull` (rate x strength) a step, by subgradient or proximal step."""
    weights = [start]
    for _ in range(25):
        w = weights[-1]
        weights.append(w - np.sign(w) * (pull if how == "subgradient" else min(pull, abs(w))))
    return weights


# ----------------------------------------------------------------------------------------------------- groups


def groups() -> Figure:
    """One channel, drawn in every tensor that it runs through."""
    figure = Figure(figsize=(8.4, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_aspect("equal")
    axes.set_xlim(-0.3, 16.6)
    axes.set_ylim(-1.5, 5.3)
    _grid(axes, (0.0, 0.0), rows=4, columns=3, row=2, label="conv1.weight", below="rows: producer")
    for i, name in enumerate(("weight", "bias", "mean", "var")):
        _grid(axes, (6.0 + 1.25 * i, 0.0), rows=4, columns=1, row=2, label=f"{name}")
    axes.text(8.4, -0.55, "bn: norm", ha="center", va="top")
    _grid(
        axes,
        (14.0, 1.0),
        rows=2,
        columns=4,
        column=2,
        size=0.6,
        label="conv2.weight",
        below="columns: consumer",
    )
    for start, end in (((3.2, 1.5), (5.8, 1.5)), ((11.0, 1.5), (13.8, 1.5))):
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=OURS, lw=1.5))
    axes.text(4.5, 1.75, "channel 2", ha="center", color=OURS)
    axes.text(12.4, 1.75, "ReLU", ha="center", color=OURS)
    return figure


def _grid(
    axes: Axes,
    at: tuple[float, float],
    *,
    rows: int,
    columns: int,
    row: int | None = None,
    column: int | None = None,
    size: float = 1.0,
    label: str = "",
    below: str = "",
) -> None:
    """A matrix of cells, row 0 on top; one row or one column is coloured."""
    x, y = at
    for i in range(rows):
        for j in range(columns):
            chosen = i == row or j == column
            corner = (x + j * size, y + (rows - 1 - i) * size)
            axes.add_patch(
                Rectangle(corner, size, size, facecolor=OURS if chosen else PALE, edgecolor="white", lw=2)
            )
    middle = x + columns * size / 2
    axes.text(middle, y + rows * size + 0.2, label, ha="center", va="bottom")
    axes.text(middle, y - 0.55 if y == 0 else y - 0.3, below, ha="center", va="top")


# ------------------------------------------------------------------------------------------------------ speed


def speed() -> Figure:
    """What fewer MACs save on the clock, for a network that it is simple for and one that it is not."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / "speed.json").read_text(encoding="utf-8"))
    figure = Figure(figsize=(8.4, 3.5), layout="constrained")
    for axes, model in zip(
        figure.subplots(1, 2, sharey=True), ("resnet50", "mobilenetv3_large_100"), strict=True
    ):
        mine = [row for row in rows if row["model"] == model]
        axes.plot([1, 3.4], [1, 3.4], color=INK, lw=0.8, ls=":", label="time follows MACs")
        _points(axes, mine, OURS, "s", "chosen along measured latency")
        for key, colour, marker, name in (
            ("aligned", ROUNDED, "^", "Torch-Pruning, multiples of 16"),
            ("unaligned", PEER, "o", "Torch-Pruning, any number"),
        ):
            _points(axes, [row["torch_pruning"][key] for row in mine], colour, marker, name)
        axes.set(xlabel="dense MACs / pruned MACs", title=model)
    first, *_ = figure.axes
    first.set_ylabel("measured speed-up")
    first.legend(frameon=False, fontsize=8.5)
    return figure


def _points(axes: Axes, rows: list[dict[str, Any]], colour: str, marker: str, label: str) -> None:
    x, y = [1.0, *(row["macs_ratio"] for row in rows)], [1.0, *(row["measured"] for row in rows)]
    axes.plot(x, y, color=colour, marker=marker, lw=1.4, markersize=5, label=label)


if __name__ == "__main__":
    main()
