"""Imports between the package's modules point only upwards in this list; it is the map of the package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sparsekit

# A module imports only from lines above its own.
LAYERS = """
errors files group_merging
recipe
rewriting
latency_curve
groups modes labels sizes standardised layer_norms bypass
prox schedules
facts plan complexity
holdings
tracing coupling
operators calls grouping scores
watching
masks penalties
choice
importance penalised pull
rates
controller fold
surgery
proof
blocks
analysis sparsifier continuation recalibration
checkpoint models machine
data train session
artifact export parity latency operator_times census quantize
latency_table
readable
report run_directory inspection layer_latency speed_search settling
planning report_figures
report_page
inputs
summary lightning transformers run
targets stages
commands pruning
attempts
pipeline
cli
__main__
"""
RANKS = {name: rank for rank, line in enumerate(LAYERS.split("\n")) for name in line.split()}
# What knows recipes: the pipeline and what is split off from it, and the command line.
RECIPE_READERS = {"inputs", "summary", "run", "targets", "commands", "attempts", "pipeline", "cli"}

SOURCES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in Path(sparsekit.__file__).parent.rglob("*.py")
    if path.stem != "__init__"  # it loads what it names on first use
}


def _imported(source: str) -> set[str]:
    """Dotted names of all modules imported anywhere in a source, also in functions and for type checking."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _ours(source: str) -> set[str]:
    """Which modules of the package a source imports."""
    parts = (name.split(".") for name in _imported(source))
    return {name[1] for name in parts if name[0] == "sparsekit" and len(name) > 1 and name[1] in SOURCES}


def test_every_module_has_its_place() -> None:
    assert set(RANKS) == set(SOURCES)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_imports_point_only_upwards(name: str) -> None:
    """Which also rules out cycles."""
    wrong = {other for other in _ours(SOURCES[name]) if RANKS[other] >= RANKS[name]}
    assert not wrong, f"{name} imports {sorted(wrong)}, which do not stand above it"


def test_all_ways_to_import_are_seen() -> None:
    source = """
import sparksekit, sparsekit.facts as f
from sparsekit import plan, __version__
def late():
    from sparsekit.cli import main
"""
    assert _ours(source) == {"facts", "plan", "cli"}


@pytest.mark.parametrize("name", ["prox", "schedules"])
def test_mathematics_imports_nothing_of_ours(name: str) -> None:
    assert _ours(SOURCES[name]) == set()


def test_nothing_of_the_package_needs_torch_pruning() -> None:
    """It is the peer of the benchmarks and a reference of the tests, which install it; users do not have to."""
    imported = {module.split(".")[0] for source in SOURCES.values() for module in _imported(source)}
    assert "torch_pruning" not in imported


def test_only_the_pipeline_and_the_command_line_know_recipes() -> None:
    assert {name for name, source in SOURCES.items() if "recipe" in _ours(source)} <= RECIPE_READERS
