"""What the documentation shows runs: every >>> in the package, every Python block of the README."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import sparsekit

README = Path(__file__).parents[1] / "README.md"
MODULES = sorted(module.name for module in pkgutil.walk_packages(sparsekit.__path__, "sparsekit."))


def _python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_the_examples_in_docstrings_are_right(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_some_docstrings_have_examples() -> None:
    found = doctest.DocTestFinder().find(importlib.import_module("sparsekit.sparsify.schedules"))
    assert any(test.examples for test in found)


def test_the_python_blocks_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, so that a later block may go on where an earlier one ended."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(_python_blocks(README.read_text(encoding="utf-8"))):
        exec(compile(block, f"README.md, Python block {number}", "exec"), namespace)


def test_python_blocks_are_found() -> None:
    text = "a\n```python\nx = 1\ny = 2\n```\nb\n```\nnot me\n```\n```python\nz = 3\n```\n"
    assert _python_blocks(text) == ["x = 1\ny = 2\n", "z = 3\n"]
