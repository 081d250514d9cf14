"""Which channels should an automatic strength take to zero: by learned importance, or by measured loss curves?

    python benchmarks/settled_choice.py

For each seed a small timm network learns scikit-learn's handwritten digits at 32 px (1,197 images), from random
weights. From there `sparsekit prune` makes it smaller, once by `sparsify.importance: taylor` and once by `curves`, for
the same shares of MACs and params and the same epochs; all else is equal. Both choose once, when the warm-up is over.
The loss and accuracy on the 200 validation images are those of the last epoch. The 400 test images are looked at once,
at the end of each run. Seeds change weights, splits and the order of images.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from common import machine_text, versions_text, write_json, write_text
from rich.console import Console

HERE = Path(__file__).parent
RECIPE = """
model: {{name: {model}}}
data:
  name: digits
  validation_share: 0.1113
  test_share: 0.2226
  image_size: 32
  batch_size: 64
  augment: {{scale: [0.8, 1.0], hflip: 0.0, color_jitter: null}}
training: {{optimizer: sgd, lr: 0.05, weight_decay: 5e-4}}
dense: {{epochs: {dense}, warmup_epochs: 1, baseline: false}}
sparsify: {{epochs: {sparsify}}}
cut: {{round_to: 8}}
finetune: {{epochs: {finetune}, lr: 0.02}}
benchmark: {{rounds: 10}}
device: cpu
"""
CHOICES = ("taylor", "curves")


def prune(recipe: Path, output: Path, *overrides: str) -> dict[str, Any]:
    """Run the recipe with overrides; returns what it found."""
    begun = time.monotonic()
    settings = [part for one in overrides for part in ("--set", one)]
    subprocess.run(
        [sys.executable, "-m", "sparsekit", "prune", str(recipe), "--output", str(output), *settings],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
    )
    report = json.loads((output / "report.json").read_text())
    epochs = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    last = {row["phase"]: row for row in epochs}  # of each phase
    return {
        "macs": 1 / report["macs_ratio"],
        "params": 1 / report["params_ratio"],
        "sparse_loss": last["sparsify"]["validation_loss"],
        "validation_loss": last["finetune"]["validation_loss"],
        "validation_accuracy": last["finetune"]["accuracy"],
        "dense_accuracy": report["dense"]["accuracy"],
        "test_accuracy": report["pruned"]["accuracy"],
        "seconds": time.monotonic() - begun,
    }


def runs_of(
    seed: int, shares: Sequence[float], recipe: Path, folder: Path, console: Console
) -> list[dict[str, Any]]:
    """All runs of a seed; the first trains the dense model, from which the others start."""
    rows: list[dict[str, Any]] = []
    start: list[str] = []
    for share in shares:
        for choice in CHOICES:
            output = folder / f"{seed}-{share}-{choice}"
            target = f"cut.target={{macs: {share}, params: {share}}}"
            found = prune(recipe, output, f"seed={seed}", target, f"sparsify.importance={choice}", *start)
            rows.append({"seed": seed, "asked": share, "choice": choice, **found})
            console.print(rows[-1])
            start = start or [
                "dense.epochs=0",
                f"model.checkpoint={output / 'checkpoints' / 'dense.safetensors'}",
            ]
    return rows


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "# Which channels go: learned importance or loss curves",
        "",
        f"Written by `python {shlex.join(sys.argv)}`, whose docstring says what was run.",
        "",
        f"- machine: {machine_text()}; versions: {versions_text('torch', 'timm')}",
        f"- dense, before anything goes: {_spread([r['dense_accuracy'] for r in rows])} of the test images",
        "- each figure is a mean over the seeds, with the lowest and the highest",
        "",
        "| shares asked | chosen by | MACs left | validation loss, sparse | pruned | validation accuracy "
        "| test accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for share in sorted({row["asked"] for row in rows}, reverse=True):
        for choice in CHOICES:
            own = [row for row in rows if (row["asked"], row["choice"]) == (share, choice)]
            figures = [
                _spread([row[key] for row in own])
                for key in ("macs", "sparse_loss", "validation_loss", "validation_accuracy", "test_accuracy")
            ]
            lines.append(f"| {share:g} | {choice} | {' | '.join(figures)} |")
    lines += ["", *(f"- {_difference(rows, key)}" for key in ("test_accuracy", "validation_loss"))]
    return "\n".join([*lines, ""])


def _difference(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    """What curves change, in pairs of the same seed and shares."""
    by_pair: dict[tuple[int, float], dict[str, float]] = {}
    for row in rows:
        by_pair.setdefault((row["seed"], row["asked"]), {})[row["choice"]] = row[key]
    changes = [pair["curves"] - pair["taylor"] for pair in by_pair.values()]
    return f"{key.replace('_', ' ')}, curves minus taylor over {len(changes)} pairs: {_spread(changes)}"


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def main() -> None:
    """Run everything, print and write the rows."""
    parser = argparse.ArgumentParser(
        description="do measured loss curves choose better than learned importance?"
    )
    parser.add_argument("--model", default="test_resnet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.33])
    parser.add_argument(
        "--epochs", type=int, nargs=3, default=[8, 10, 4], help="of dense, sparsify and finetune"
    )
    parser.add_argument("--output", type=Path, default=HERE / "results" / "settled_choice.json")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs" / "results" / "settled_choice.md")
    arguments = parser.parse_args()
    dense, sparsify, finetune = arguments.epochs
    console, rows = Console(), []
    with TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(
            RECIPE.format(model=arguments.model, dense=dense, sparsify=sparsify, finetune=finetune)
        )
        for seed in arguments.seeds:
            rows += runs_of(seed, arguments.shares, recipe, Path(folder), console)
            write_json(arguments.output, rows)
    write_text(arguments.docs, page(rows))


if __name__ == "__main__":
    main()
