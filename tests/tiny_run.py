"""The smallest run there is, on the embedded digits, and the command line as a process or in this one."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

from sparsekit.cli import main

TINY = """
model: {name: test_resnet}
data:
  name: digits
  image_size: 32
  batch_size: 32
  train_limit: 256
  validation_limit: 64
  test_limit: 96
  augment: null
training: {lr: 0.05}
dense: {epochs: 1}
sparsify: {epochs: 3, warmup: 0.0}
cut: {target: {macs: 0.5}, round_to: 4, min_channels: 4}
finetune: {epochs: 2, distill: {weight: 0.5, temperature: 2.0}}
benchmark: {rounds: 20, warmup: 2}
"""
# Steps so wide that few models lie between the dense and the smallest one, and few are exported and timed for a speed.
WIDE_STEPS = ("cut.round_to=16", "cut.min_channels=16")


def documented_network() -> str:
    """The module with a network of one's own that the guide shows."""
    page = Path(__file__).parents[1] / "docs" / "your_images.md"
    return re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)[0]


def options(*overrides: str) -> list[str]:
    """Overrides of the recipe as arguments."""
    return [part for override in overrides for part in ("--set", override)]


def sparsekit(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line; an exit code other than 0 is the caller's affair."""
    return subprocess.run(
        [sys.executable, "-m", "sparsekit", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        timeout=240,
    )


def in_this_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The same without starting a process, which takes seconds: for what needs none of its own."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["sparsekit", *map(str, arguments)]),
        mock.patch.dict(os.environ, {"COLUMNS": "200"}),
    ):
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return subprocess.CompletedProcess(list(arguments), code, out.getvalue(), err.getvalue())
