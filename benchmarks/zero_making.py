"""Who makes zeros: subgradient against proximal steps, L1 against group lasso, SGD against AdamW.

    python benchmarks/zero_making.py

A small convolutional network learns scikit-learn's handwritten digits (1,400 for training, 397 for test) with a penalty
of constant strength on its filters (no BatchNorm, so that size means something), once for each combination of

    where      "subgradient": strength x w_g x the subgradient is added to the gradient before the optimizer's step;
               "proximal": sparsekit's Sparsifier after it
    penalty    "l1" on single weights, "group_lasso" on whole channels
    optimizer  SGD with momentum, AdamW

Noted along the way: the share of channels that are exactly zero, and below a thousandth of the median norm at the
start. At the end, of the channels that the proximal run took to zero, the median norm in the subgradient run beside the
noise floor predicted for a channel of p weights without a gradient of its own: eta sqrt(p) sigma^2 / (2 strength), with
eta the length of a steady step and sigma its noise in units of eta, after momentum. For SGD that is the standard
deviation of the gradient between batches; AdamW divides it, and the strength, by the root mean square of what it is
given. Every figure is the mean over the seeds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from channels import PenalisedChannels
from common import Labelled, digits, save_figure, write_json, write_text
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekit as sk

HERE = Path(__file__).parent
EXAMPLE = torch.zeros(1, 1, 8, 8)
BATCH = 64
# Learning rate and length of a steady step.
OPTIMIZERS: dict[str, dict[str, float]] = {
    "SGD": {"lr": 0.02, "steady": 0.2},
    "AdamW": {"lr": 2e-3, "steady": 2e-3},
}
# In units of the loss; of a proximal step behind AdamW, in shares of AdamW's own step.
STRENGTHS = {
    ("SGD", "subgradient"): {"l1": 3e-4, "group_lasso": 1e-4},
    ("SGD", "proximal"): {"l1": 3e-4, "group_lasso": 1e-4},
    ("AdamW", "subgradient"): {"l1": 3e-4, "group_lasso": 1e-4},
    ("AdamW", "proximal"): {"l1": 0.1, "group_lasso": 0.03},
}
Run = dict[str, Any]


def network() -> nn.Sequential:
    """Three convolutions and a classifier, far wider than digits need."""
    return nn.Sequential(
        *(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    """Without weight decay: the penalty is to be seen alone."""
    lr = OPTIMIZERS[kind]["lr"]
    if kind == "SGD":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


@torch.no_grad()
def add_subgradient_(channels: PenalisedChannels, penalty: str, strength: float) -> None:
    """To every gradient: strength x sign(w), or strength x sqrt(p) x w / norm of the channel."""
    factors = channels.sizes.sqrt() / channels.norms().clamp_min(1e-12)
    for tensor, factor in channels.spread(factors):
        assert tensor.grad is not None
        tensor.grad.add_(tensor.sign() if penalty == "l1" else factor * tensor, alpha=strength)


def gradient_noise(model: nn.Module, data: Labelled, groups: sk.ChannelGroups) -> float:
    """Standard deviation between batches of the gradient of a penalised weight, root mean square over weights."""
    model = copy.deepcopy(model)
    names = {member.tensor for group in groups.free for member in group.penalised}
    found: list[Tensor] = []
    for chunk in torch.arange(len(data[0])).split(BATCH)[:20]:
        model.zero_grad()
        F.cross_entropy(model(data[0][chunk]), data[1][chunk]).backward()  # type: ignore[no-untyped-call]
        gradients = (
            p.grad.flatten() for n, p in model.named_parameters() if n in names and p.grad is not None
        )
        found.append(torch.cat(list(gradients)))
    return float(torch.stack(found).var(0).mean().sqrt())


def run(kind: str, penalty: str, where: str, seed: int, steps: int) -> Run:
    """Train once and note how many channels are zero."""
    training, test = digits()
    torch.manual_seed(seed)
    model = network()
    groups = sk.find_groups(model, EXAMPLE, round_to=1, min_channels=1)
    optimizer = optimizer_of(kind, model)
    strength = STRENGTHS[kind, where][penalty]
    channels = PenalisedChannels(model, groups)
    constant = sk.ConstantStrength(strength, adaptive=0.0)
    hook = sk.Sparsifier(model, groups, penalty, strength=constant)  # type: ignore[arg-type]
    start = float(channels.norms().median())
    generator = torch.Generator().manual_seed(seed)
    curve: list[tuple[int, float, float]] = []
    for step in range(steps + 1):
        if step % max(steps // 50, 1) == 0:
            norms = channels.norms()
            curve.append(
                (step, float((norms == 0).float().mean()), float((norms < 1e-3 * start).float().mean()))
            )
        chosen = torch.randint(len(training[0]), (BATCH,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(training[0][chosen]), training[1][chosen]).backward()  # type: ignore[no-untyped-call]
        if where == "subgradient":
            add_subgradient_(channels, penalty, strength)
        optimizer.step()
        if where == "proximal":
            hook.step(optimizer)
    with torch.no_grad():
        right = float((model(test[0]).argmax(1) == test[1]).float().mean())
    return {
        "optimizer": kind,
        "penalty": penalty,
        "where": where,
        "seed": seed,
        "strength": strength,
        "accuracy": right,
        "curve": curve,
        "zero_share": curve[-1][1],
        "small_share": curve[-1][2],
        "norms": channels.norms().tolist(),
        "sizes": channels.sizes.tolist(),
        "noise": gradient_noise(model, training, groups),
    }


def floors(runs: Sequence[Run]) -> list[Run]:
    """For each pair of runs: median norm, under the subgradient, of the channels that the proximal run took to zero."""
    rows = []
    for proximal in (r for r in runs if r["where"] == "proximal"):
        key = [proximal[name] for name in ("optimizer", "penalty", "seed")]
        (other,) = (
            r
            for r in runs
            if r["where"] == "subgradient" and [r["optimizer"], r["penalty"], r["seed"]] == key
        )
        dead = [i for i, norm in enumerate(proximal["norms"]) if norm == 0]
        if not dead:
            continue
        eta, sigma, strength = OPTIMIZERS[key[0]]["steady"], other["noise"], other["strength"]
        if (
            key[0] == "AdamW"
        ):  # it divides by the root mean square of what it is given, the subgradient included
            strength /= (sigma**2 + strength**2) ** 0.5
            sigma = 1.0
        sigma *= ((1 - 0.9) / (1 + 0.9)) ** 0.5  # a momentum of 0.9 averages the noise
        predicted = [eta * other["sizes"][i] ** 0.5 * sigma**2 / (2 * strength) for i in dead]
        rows.append(
            {
                "optimizer": key[0],
                "penalty": key[1],
                "seed": key[2],
                "dead": len(dead),
                "median_norm": statistics.median(other["norms"][i] for i in dead),
                "predicted_floor": statistics.median(predicted),
            }
        )
    return rows


def plot(runs: Sequence[Run], file: Path) -> None:
    """Share of channels that are exactly zero, over the steps; a panel an optimizer."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for panel, kind in zip(panels, OPTIMIZERS, strict=True):
        for penalty, colour in (("l1", "tab:orange"), ("group_lasso", "tab:blue")):
            for where, style in (("proximal", "-"), ("subgradient", ":")):
                curves = [
                    r["curve"]
                    for r in runs
                    if (r["optimizer"], r["penalty"], r["where"]) == (kind, penalty, where)
                ]
                mean = [
                    statistics.mean(points)
                    for points in zip(*([p[1] for p in c] for c in curves), strict=True)
                ]
                panel.plot([p[0] for p in curves[0]], mean, style, color=colour, label=f"{penalty}, {where}")
        panel.set(title=kind, xlabel="step", ylim=(-0.03, 1.03))
    panels[0].set_ylabel("channels exactly zero")
    panels[0].legend(frameon=False, fontsize=8)
    save_figure(figure, file)
    plt.close(figure)


def page(runs: Sequence[Run], rows: Sequence[Run], command: str) -> str:
    """The results as Markdown."""
    lines = [
        "# Who makes zeros",
        "",
        f"Written by `{command}`, whose docstring says what was run. Shares are those of the 192 channels, at the end.",
        "",
        "![share of channels that are exactly zero, over training](zero_making.svg)",
        "",
        "| optimizer | penalty | step | seeds | exactly zero | below 0.001 of the start | test accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((r["optimizer"], r["penalty"], r["where"]) for r in runs):
        found = [r for r in runs if (r["optimizer"], r["penalty"], r["where"]) == key]
        means = [
            statistics.mean(r[name] for r in found) for name in ("zero_share", "small_share", "accuracy")
        ]
        lines.append(
            f"| {key[0]} | {key[1]} | {key[2]} | {len(found)} | "
            + " | ".join(f"{m:.3f}" for m in means)
            + " |"
        )
    lines += [
        "",
        "Of the channels that the proximal run took to zero, how large the subgradient left them, and the noise floor "
        "predicted for channels without a gradient of their own. The formula is that of a group lasso; L1, which pulls "
        "every weight by itself, is beside it for comparison:",
        "",
        "| optimizer | penalty | channels | median norm | predicted floor |",
        "|---|---|---|---|---|",
    ]
    for kind, penalty in dict.fromkeys((r["optimizer"], r["penalty"]) for r in rows):
        found = [r for r in rows if (r["optimizer"], r["penalty"]) == (kind, penalty)]
        dead, norm, floor = (
            statistics.mean(r[name] for r in found) for name in ("dead", "median_norm", "predicted_floor")
        )
        lines.append(f"| {kind} | {penalty} | {dead:.0f} | {norm:.2g} | {floor:.2g} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Train all combinations, write figures, page and plot."""
    parser = argparse.ArgumentParser(description="who makes zeros")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "zero_making.json")
    parser.add_argument(
        "--docs", type=Path, default=HERE.parent / "docs" / "results", help="folder of the page and the plot"
    )
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    combinations = [
        (kind, penalty, where, seed)
        for kind in OPTIMIZERS
        for penalty in ("l1", "group_lasso")
        for where in ("subgradient", "proximal")
        for seed in a.seeds
    ]
    runs = [run(*one, a.steps) for one in track(combinations, description="training")]
    rows = floors(runs)
    kept = [{key: value for key, value in r.items() if key not in ("norms", "sizes")} for r in runs]
    write_json(a.output, {"runs": kept, "floors": rows})
    plot(runs, a.docs / "zero_making.svg")
    text = page(runs, rows, "python benchmarks/zero_making.py")
    write_text(a.docs / "zero_making.md", text)
    Console().print(text, highlight=False, markup=False)


if __name__ == "__main__":
    main()
