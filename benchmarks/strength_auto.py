"""Does an automatic strength leave what was asked for, whatever the architecture?

    python benchmarks/strength_auto.py

For each architecture and share asked: a timm model learns scikit-learn's handwritten digits (1,400 images at 32 px) for
a few epochs without a penalty, then with `strength=AutoStrength({"macs": asked}, 150)` for one phase of 150 updates.
Nothing is tuned: convolutional networks with BatchNorm train with SGD, the others with AdamW, at one rate each. Noted:
the share of the MACs left by a cut of the exact zeros alone (kept channels rounded up to a multiple), the largest
change of a logit at that cut, and the accuracy on the 397 test images before the phase, at its end, and right after
the cut.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from common import Labelled, digits, machine_text, versions_text, write_json, write_text
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekit as sk

HERE = Path(__file__).parent
SIDE = 32
EXAMPLE = torch.zeros(1, 1, SIDE, SIDE)
BATCH = 64
PHASE = 150
VIT = {"img_size": SIDE, "patch_size": 8, "depth": 4}
MODELS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "resnetv2_50": {},
    "mobilenetv3_small_100": {},
    "efficientnet_b0": {},
    "convnext_atto": {},
    "deit_tiny_patch16_224": VIT,
}
WITHOUT_BATCHNORM = ("convnext", "deit")


def batches(data: Labelled, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(data[0]), (BATCH,), generator=generator)
        yield data[0][chosen], data[1][chosen]


def train(
    model: nn.Module, name: str, steps: int, seed: int, make_hook: Any = None
) -> tuple[sk.Sparsifier | None, torch.optim.Optimizer]:
    """One phase with a rate that falls linearly to 0."""
    if name.startswith(WITHOUT_BATCHNORM):
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    hook: sk.Sparsifier | None = make_hook() if make_hook else None
    model.train()
    for images, labels in batches(digits(SIDE)[0], steps, seed):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if hook is not None:
            hook.step(optimizer)
        schedule.step()
    return hook, optimizer


@torch.no_grad()
def outputs(model: nn.Module) -> tuple[float, Tensor]:
    """Accuracy on the test images, and the logits."""
    images, labels = digits(SIDE)[1]
    logits = model.eval()(images)
    return float((logits.argmax(1) == labels).float().mean()), logits


def run(
    name: str, asked: float, importance: Literal["magnitude", "taylor"], dense_steps: int, multiple: int
) -> dict[str, Any]:
    """Train, sparsify, cut the zeros, and say what is left."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, in_chans=1, **MODELS[name])
    groups = sk.find_groups(model, EXAMPLE, round_to=multiple, min_channels=8)
    train(model, name, dense_steps, seed=1)
    dense, _ = outputs(model)

    def make_hook() -> sk.Sparsifier:
        strength = sk.AutoStrength({"macs": asked}, PHASE, importance=importance)
        return sk.Sparsifier(model, groups, strength=strength)

    hook, _ = train(model, name, PHASE, seed=2, make_hook=make_hook)
    assert hook is not None
    before, logits = outputs(model)
    masks = sk.keep_carriers(model, groups, sk.keep_masks(model, groups, method="zeros"))
    plan = sk.make_plan(groups, masks)
    pruned = sk.apply_plan(model, plan)
    after, cut_logits = outputs(pruned)
    return {
        "model": name,
        "importance": importance,
        "asked": asked,
        "macs": sk.count_macs(pruned, EXAMPLE) / sk.count_macs(model, EXAMPLE),
        "zero_share": hook.progress()["zero_share"],
        "accuracy_dense": dense,
        "accuracy_before_cut": before,
        "accuracy_after_cut": after,
        "logit_change": float((logits - cut_logits).abs().max() / logits.abs().max()),
    }


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "# Strength without guessing: the share that was asked for",
        "",
        f"Written by `python {shlex.join(sys.argv)}`, whose docstring says what was run. MACs: the share left by a "
        "cut of the exact zeros. Accuracy: before the phase, at its end, right after the cut.",
        "",
        f"- machine: {machine_text()}; versions: {versions_text('torch', 'timm')}",
        "",
        "| model | importance | asked | MACs left | accuracy dense | before the cut | after it | logit change |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {r['model']} | {r['importance']} | {r['asked']:.2f} | {r['macs']:.3f} | {r['accuracy_dense']:.4f} "
            f"| {r['accuracy_before_cut']:.4f} | {r['accuracy_after_cut']:.4f} | {r['logit_change']:.1e} |"
            for r in rows
        ),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run everything, print and write the rows."""
    parser = argparse.ArgumentParser(description="is the share asked for the share that is left?")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--asked", type=float, nargs="+", default=[0.5])
    parser.add_argument("--importance", nargs="+", default=["magnitude", "taylor"])
    parser.add_argument("--dense-steps", type=int, default=100)
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "strength_auto.json")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs" / "results" / "strength_auto.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console, rows = Console(), []
    for name in arguments.models:
        for asked in arguments.asked:
            for importance in arguments.importance:
                rows.append(run(name, asked, importance, arguments.dense_steps, arguments.round_to))
                console.print(rows[-1])
                write_json(arguments.output, rows)
    write_text(arguments.docs, page(rows))


if __name__ == "__main__":
    main()
