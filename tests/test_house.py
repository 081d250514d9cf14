"""The house: rooms, and the files in them. Imports point only downwards in this list, which also rules out circles."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sparsekit

# A file imports only from rooms below its own, and in its own room only from files to the right of it.
HOUSE = """
__main__
cli
runs: pipeline attempts prune_stages commands choosing stages own_code run report_assembly rehearsal accuracy_search
    run_directory arguments results
report: page terminal figures rows inspection dry_run numbers schema
integrations: transformers lightning torch_pruning
finished: prune_model repair_cut forecast steps choice preparation targets images display
latency: search layers table operators compare
artifact: save load dense_model format
repair: curves trials channel_order distillation refit held_out replay closed_form statistics rows divergence
    lasso_order least_squares recalibration
sparsify: late_choice sparsifier steering revival penalised_weights learned_importance penalties strength
    channel_vectors schedules prox
selection: keep_masks bisection knapsack loss_curves carriers costs importance rounding
coupling: find_groups residual_blocks proof trace rules.table rules.contractions rules.recurrence rules.norms
    rules.placement rules.movement rules.maps rules.quantization rules.reductions rules.pointwise rules.meeting
    size_uses form_groups solve tracer observations place_finder named_integers labels
surgery: transplant optimizer_state verify cut mask unstable_outputs constants norms bypass attributes rewrite_code
    layer_norms attention
export: parity graph_summary precision onnx_file group_merging quiet session
training: loop splits loader display evaluate optimizers seeding data_sources models own_models
    checkpoint options
recipe: reading messages draft recipe consistency specs
structure: compose plan counting groups inputs latency_curve places masks
evaluation
machine
files
errors
options
"""


def _ranks() -> dict[str, tuple[int, int]]:
    """Of each file, its room's place from the top and its own within the room."""
    ranks = {}
    for room_rank, line in enumerate(HOUSE.strip().replace("\n    ", " ").split("\n")):
        room, _, names = line.partition(": ")
        files = [f"{room}.{name}" for name in names.split()] or [room]
        ranks |= {file: (room_rank, rank) for rank, file in enumerate(files)}
    return ranks


RANKS = _ranks()
PACKAGE = Path(sparsekit.__file__).parent
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text(encoding="utf-8")
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
}
# The room of recipes is read by those who tell the story, and by the command line.
RECIPE_READERS = {"recipe", "runs", "cli"}


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
    """Which files of the package a source imports."""
    names = (name.removeprefix("sparsekit.") for name in _imported(source) if name.startswith("sparsekit."))
    return {name for name in names if name in SOURCES}


def _room(file: str) -> str:
    return file.partition(".")[0]


def test_every_file_has_its_place() -> None:
    assert set(RANKS) == set(SOURCES)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_imports_point_only_downwards(name: str) -> None:
    wrong = {other for other in _ours(SOURCES[name]) if RANKS[other] <= RANKS[name]}
    assert not wrong, f"{name} imports {sorted(wrong)}, which do not stand below it"


def test_rooms_hold_no_code_of_their_own() -> None:
    """A room's `__init__` is its sign: one sentence. What it holds is imported from the file that has it."""
    for path in PACKAGE.rglob("__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert path.parent == PACKAGE or [type(node) for node in body] == [ast.Expr], path


def test_all_ways_to_import_are_seen() -> None:
    source = """
import sparksekit, sparsekit.structure.groups as g
from sparsekit import files, __version__
from sparsekit.runs import pipeline
def late():
    from sparsekit.cli import main
"""
    assert _ours(source) == {"structure.groups", "files", "runs.pipeline", "cli"}


@pytest.mark.parametrize("name", ["sparsify.prox", "sparsify.schedules"])
def test_mathematics_imports_nothing_of_ours(name: str) -> None:
    assert _ours(SOURCES[name]) == set()


def test_only_the_story_and_the_command_line_know_recipes() -> None:
    readers = {
        _room(name) for name, source in SOURCES.items() if any(_room(o) == "recipe" for o in _ours(source))
    }
    assert readers <= RECIPE_READERS


@pytest.mark.parametrize(
    "library", ["timm", "torch_pruning", "lightning", "transformers", "matplotlib", "jinja2"]
)
def test_libraries_are_imported_only_where_they_are_meant(library: str) -> None:
    meant = {
        "timm": {"training", "artifact", "surgery.norms"},
        "torch_pruning": {"integrations.torch_pruning"},
        "lightning": {"integrations.lightning"},
        "transformers": {"integrations.transformers"},
        "matplotlib": {"report.figures"},
        "jinja2": {"report.page"},
    }[library]
    users = {
        name
        for name, source in SOURCES.items()
        if library in {module.split(".")[0] for module in _imported(source)}
    }
    assert {name for name in users if name not in meant and _room(name) not in meant} == set()


def test_tests_mirror_the_rooms() -> None:
    """`pytest tests/coupling` runs what holds the room `coupling`."""
    folders = {path.parent.name for path in Path(__file__).parent.glob("*/test_*.py")}
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == rooms
