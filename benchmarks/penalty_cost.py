"""What a penalty costs in a training step: the proximal step, Torch-Pruning's regulariser, an L2 pass, a naive L1 term.

    python benchmarks/penalty_cost.py
    python benchmarks/penalty_cost.py --device cuda --batch 64 --threads 8

The second writes docs/results/penalty_cost_cuda.md and results/penalty_cost_cuda.json.

Everything is timed in one process, once a round in an order drawn anew each round, on the model as it trains:

    step_ms           forward, backward and optimizer step (SGD with momentum) on one batch of random images
    ours_ms           Sparsifier.step, with every channel alive: strength 1e-9 shrinks, and kills nothing
    auto_ms           Sparsifier.step with an AutoStrength, which learns the channels' importance from the gradients
    deciding_ms       the same in one of the hundred steps of a phase that decide anew what is to go
    torch_pruning_ms  GroupNormPruner.regularize
    l2_ms             gradient += coefficient x weight, for all parameters at once
    naive_l1_ms       an L1 term of all parameters in the loss: its forward and backward pass alone

Medians over the rounds. The claims, with a constant strength and an automatic one: ours takes at most 1 % of the step
(on a CPU: a GPU's step is so short that starting a few kernels is a larger share of it), and at most a tenth of
Torch-Pruning's time. Writes docs/results/penalty_cost.md.
"""

from __future__ import annotations

import argparse
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch_pruning as tp
from common import versions_text, write_json, write_text
from rich.console import Console
from rich.progress import track
from torch.nn import functional as F

import sparsekit as sk

MODELS = ("resnet18", "resnet50", "mobilenetv3_large_100")
# A phase that is penalised from its first step to its last.
WHOLE = sk.PhaseShares(0.0, 0.0, 0.0)
LARGEST_SHARE, LEAST_RATIO = 0.01, 10.0


def contestants(name: str, arguments: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """What is timed, by its key in the results."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_classes=1000).to(arguments.device)
    images = torch.randn(arguments.batch, 3, arguments.size, arguments.size, device=arguments.device)
    labels = torch.arange(arguments.batch, device=arguments.device) % 1000
    example = images[:1]
    groups = sk.find_groups(model, example, round_to=1, min_channels=1)

    def penalised(strength: sk.ConstantStrength | sk.AutoStrength) -> sk.Sparsifier:
        return sk.Sparsifier(model, groups, arguments.penalty, strength=strength)

    constant = penalised(sk.ConstantStrength(1e-9, adaptive=2.0))
    auto, deciding = (
        penalised(sk.AutoStrength({"macs": 0.5}, total_steps, WHOLE)) for total_steps in (10**6, 100)
    )
    pruner = tp.pruner.GroupNormPruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(),
        global_pruning=True,
        ignored_layers=[model.get_classifier()],
    )
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    parameters = list(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def l2() -> None:
        with torch.no_grad():
            torch._foreach_add_([p.grad for p in parameters], parameters, alpha=1e-12)

    def naive_l1() -> None:
        term = torch.stack([p.abs().sum() for p in parameters]).sum()
        (1e-12 * term).backward()  # type: ignore[no-untyped-call]

    return {
        "step_ms": step,
        "ours_ms": lambda: constant.step(optimizer),
        "auto_ms": lambda: auto.step(optimizer),
        "deciding_ms": lambda: deciding.step(optimizer),
        "torch_pruning_ms": lambda: pruner.regularize(model),
        "l2_ms": l2,
        "naive_l1_ms": naive_l1,
    }


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of each contestant."""
    timed = contestants(name, arguments)

    def milliseconds(action: Callable[[], None]) -> float:
        wait()
        started = time.perf_counter()
        action()
        wait()
        return (time.perf_counter() - started) * 1000

    def wait() -> None:
        if arguments.device.startswith("cuda"):
            torch.cuda.synchronize()

    for _ in range(2):
        for action in timed.values():  # the step comes first: the others need its gradients
            action()
    times: dict[str, list[float]] = {key: [] for key in timed}
    order, rng = list(timed), random.Random(0)
    for _ in track(range(arguments.rounds), description=name):
        rng.shuffle(order)
        for key in order:
            times[key].append(milliseconds(timed[key]))
    return {"model": name, **{key: statistics.median(values) for key, values in times.items()}}


def main() -> None:
    """Measure, print a table, write the figures as JSON."""
    parser = argparse.ArgumentParser(description="cost of a penalty in a training step")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--penalty", default="group_lasso")
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="results; by default in benchmarks/results")
    parser.add_argument("--docs", type=Path, help="page; by default in docs/results")
    arguments = parser.parse_args()
    name = (
        "penalty_cost" if arguments.device == "cpu" else f"penalty_cost_{arguments.device.partition(':')[0]}"
    )
    here = Path(__file__).parent
    output = arguments.output or here / "results" / f"{name}.json"
    docs = arguments.docs or here.parent / "docs" / "results" / f"{name}.md"
    torch.set_num_threads(arguments.threads)
    rows = [measure(name, arguments) for name in arguments.models]
    write_json(output, rows)
    text = page(rows, arguments)
    write_text(docs, text)
    Console().print(text, highlight=False, soft_wrap=True)


def page(rows: Sequence[Mapping[str, Any]], arguments: argparse.Namespace) -> str:
    """The results as Markdown."""
    ours = [(row, key) for row in rows for key in ("ours_ms", "auto_ms")]
    share = max(row[key] / row["step_ms"] for row, key in ours)
    ratio = min(row["torch_pruning_ms"] / row[key] for row, key in ours)
    device = sk.describe_machine()["cpu"]
    if arguments.device.startswith("cuda"):
        device = f"{torch.cuda.get_device_name(arguments.device)}, {device}"
    lines = [
        "# What a penalty costs in a training step",
        "",
        f"Written by `{shlex.join(['python', 'benchmarks/penalty_cost.py', *sys.argv[1:]])}`, whose docstring "
        "says what is timed. Milliseconds; shares are those of the step.",
        "",
        f"- machine: {device}, {arguments.device}, {arguments.threads} threads; batch {arguments.batch}, "
        f"{arguments.size} px, {arguments.rounds} rounds; penalty {arguments.penalty}",
        f"- versions: {versions_text('torch', 'timm', 'torch-pruning')}",
        f"- ours takes at most {share:.2%} of a step ({LARGEST_SHARE:.0%} allowed on a CPU), and Torch-Pruning "
        f"at least {ratio:.0f} times as long ({LEAST_RATIO:.0f} demanded)",
        "",
        "| model | step | constant strength | auto | auto, deciding | Torch-Pruning | L2 pass | naive L1 term |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{row[key]:.2f} ({row[key] / row['step_ms']:.2%})"
            for key in ("ours_ms", "auto_ms", "deciding_ms", "torch_pruning_ms", "l2_ms", "naive_l1_ms")
        ]
        lines.append(f"| {row['model']} | {row['step_ms']:.0f} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
