"""What merging narrow groups of convolutions in the exported file brings: the file without against the file with.

    python benchmarks/merged_groups.py

Dense models with random weights at 224 px, batch 1, one thread, interleaved. Beside the latencies: convolutions outside
ONNX Runtime's blocked layout, reorders into it and back, and the largest difference between the logits of both files
as a share of the largest logit.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from common import machine_text, versions_text, write_json, write_text
from rich.console import Console
from rich.progress import track
from torch import nn

import sparsekit as sk

HERE = Path(__file__).parent
MODELS = (
    "regnetx_002",
    "regnety_002",
    "regnety_004",
    "resnext50_32x4d",
    "seresnext26d_32x4d",
    "resnext26ts",
)


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm starts some at zero, and what is behind them would not count
    images = torch.randn(1, 3, 224, 224)
    with TemporaryDirectory() as folder:
        files = [
            sk.export_onnx(model, Path(folder) / f"{merged}.onnx", images, merge_groups=merged)
            for merged in (False, True)
        ]
        compared = sk.compare_latency(files, threads=1, rounds=rounds)
        plain, merged = (sk.summarise_graph(file) for file in files)
        logits = [run(file, images.numpy()) for file in files]
        sizes = [file.stat().st_size for file in files]
    (ratio,) = compared.speedups
    return {
        "model": name,
        "plain_ms": compared.latencies[0].median_ms,
        "merged_ms": compared.latencies[1].median_ms,
        "speedup": ratio.value,
        "low": ratio.low,
        "high": ratio.high,
        "trustworthy": compared.trustworthy,
        "outside": [plain.plain, merged.plain],
        "reorders": [plain.reorders, merged.reorders],
        "bytes": sizes,
        "difference": float(np.abs(logits[0] - logits[1]).max() / np.abs(logits[0]).max()),
    }


def run(file: Path, images: Any) -> Any:
    """The logits that ONNX Runtime gives."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": images})[0]


def page(rows: Sequence[Mapping[str, Any]], rounds: int) -> str:
    """The rows as Markdown."""
    simd = ", ".join(sk.describe_machine()["simd"])
    lines = [
        "# Merged groups",
        "",
        "Written by `python benchmarks/merged_groups.py`, whose docstring says what is measured. Each pair is the file "
        "whose groups are as the model has them, and the one whose groups are merged.",
        "",
        f"- machine: {machine_text()}, {simd}; {rounds} rounds",
        f"- versions: {versions_text('torch', 'timm', 'onnx', 'onnxruntime')}",
        "",
        "| model | ms | times as fast | convolutions outside the layout | reorders | MB | logits differ by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mark = "" if row["trustworthy"] else " (noisy)"
        cells = (
            f"{row['plain_ms']:.2f} / {row['merged_ms']:.2f}",
            f"{row['speedup']:.2f} ({row['low']:.2f} to {row['high']:.2f}){mark}",
            *(f"{row[key][0]} / {row[key][1]}" for key in ("outside", "reorders")),
            " / ".join(f"{n / 1e6:.1f}" for n in row["bytes"]),
            f"{row['difference']:.0e}",
        )
        lines.append(f"| {row['model']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, print a table, write the figures as JSON and Markdown."""
    parser = argparse.ArgumentParser(description="files with and without merged groups")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "merged_groups.json")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs" / "results" / "merged_groups.md")
    arguments = parser.parse_args()
    console = Console()
    rows = [measure(name, arguments.rounds) for name in track(arguments.models, console=console)]
    write_json(arguments.output, rows)
    text = page(rows, arguments.rounds)
    write_text(arguments.docs, text)
    console.print(text, highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
