"""What a training step of `fit` costs beside a bare PyTorch loop over the same model and loader.

    python benchmarks/step_cost.py --model resnet18 --size 64 --batch 32 --rounds 12

Both train in one process, a short epoch each in turn, in an order drawn anew each round, because a machine drifts
by more than the difference. A step is the time from one update to the next (both loops note the clock after each
update; in `fit` a hook that does nothing else does so). The ratio of the medians is taken within a round; its
median and a bootstrap interval over the rounds are reported. A second bare loop shows what noise alone gives.
The claim: the median ratio of `fit` is at most 1.05.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from common import write_json
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sparsekit as sk

LIMIT = 1.05
Loader = DataLoader[Any]


class Clock:
    """A hook of `fit` that notes the time after each update."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.times.append(time.perf_counter())

    def project_(self, model: nn.Module) -> None:
        pass

    def check_processes(self) -> None:
        pass

    def progress(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def step_ms(self) -> float:
        """Median time between updates, the first two left out as warm-up."""
        steps = [after - before for before, after in pairwise(self.times[2:])]
        return statistics.median(steps) * 1000


def bare_epoch(model: nn.Module, loader: Loader) -> float:
    """Milliseconds a step of the least loop that trains and knows its mean loss."""
    clock = Clock()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    model.train()
    total = torch.zeros(())
    for images, labels in loader:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        clock.step(optimizer)
        total += loss.detach()
    total.item()
    return clock.step_ms()


def fit_epoch(model: nn.Module, loader: Loader, validation: Loader, accelerator: Accelerator) -> float:
    """Milliseconds a step of the same epoch through `fit`, penalty off."""
    clock = Clock()
    options = sk.TrainOptions(epochs=1, lr=0.01, weight_decay=0.0, schedule="constant")
    sk.fit(model, (loader, validation), options, phase="cost", seed=0, accelerator=accelerator, hook=clock)
    return clock.step_ms()


def build(name: str, size: int) -> nn.Module:
    """timm's model; of a transformer, whose position embedding depends on it, for images of this size."""
    try:
        model: nn.Module = timm.create_model(name, num_classes=10, img_size=size)
    except TypeError:  # an architecture that runs on any
        model = timm.create_model(name, num_classes=10)
    return model


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds a step of each contestant, one number a round."""
    torch.manual_seed(0)
    model = build(arguments.model, arguments.size)
    accelerator = Accelerator(cpu=True)

    def loader(n_batches: int) -> Loader:
        n = n_batches * arguments.batch
        images = torch.randn(n, 3, arguments.size, arguments.size)
        return DataLoader(TensorDataset(images, torch.arange(n) % 10), batch_size=arguments.batch)

    training, validation = loader(3 + arguments.steps), loader(1)
    contestants: dict[str, Callable[[], float]] = {
        "bare": lambda: bare_epoch(model, training),
        "bare again": lambda: bare_epoch(model, training),
        "fit": lambda: fit_epoch(model, training, validation, accelerator),
    }
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for epoch in contestants.values():
        epoch()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order, rng = list(contestants), random.Random(0)
    for _ in range(arguments.rounds):
        rng.shuffle(order)
        for name in order:
            # All start from the same weights, so all do the same arithmetic.
            model.load_state_dict(start)
            times[name].append(contestants[name]())
    return times


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the median."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(5000))
    return medians[125], medians[-126]


def main() -> None:
    """Measure, print a table, write the figures as JSON."""
    parser = argparse.ArgumentParser(description="cost of a step of fit against a bare loop")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="steps timed in each round")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "step_cost.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    times = measure(arguments)
    table = Table("loop", "ms a step (median)", "ratio to bare", "95 % interval")
    result: dict[str, Any] = {
        "settings": {k: v for k, v in vars(arguments).items() if k != "output"},
        "torch": torch.__version__,
    }
    for name, values in times.items():
        ratios = [value / bare for value, bare in zip(values, times["bare"], strict=True)]
        median, (low, high) = statistics.median(ratios), interval(ratios)
        table.add_row(name, f"{statistics.median(values):.2f}", f"{median:.3f}", f"{low:.3f} .. {high:.3f}")
        row = {"ms": statistics.median(values), "ratio": median, "low": low, "high": high, "all_ms": values}
        result[name.replace(" ", "_")] = row
    result["claim"] = {"limit": LIMIT, "holds": result["fit"]["ratio"] <= LIMIT}
    write_json(arguments.output, result)
    Console().print(table, f"claim (fit at most {LIMIT} of bare): {result['claim']['holds']}", sep="\n")


if __name__ == "__main__":
    main()
