"""The public names are few, documented and guarded; importing them costs nothing until they are used."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparsekit
from sparsekit import errors


def test_the_public_names_are_these() -> None:
    """Changing this list changes what people's programs may rely on."""
    assert sparsekit.__all__ == [
        "Agreement",
        "AutoStrength",
        "ChannelGroup",
        "ChannelGroups",
        "ConstantStrength",
        "DataError",
        "Distillation",
        "EpochMetrics",
        "FileError",
        "Forecast",
        "GraphSummary",
        "InputError",
        "InputStatistics",
        "Interval",
        "Latency",
        "LatencyComparison",
        "LatencyTable",
        "ModelError",
        "Parity",
        "PhaseShares",
        "PrunePlan",
        "PruneResult",
        "PruneStep",
        "RecipeError",
        "Rounding",
        "RunError",
        "RunReport",
        "SparsekitError",
        "Sparsifier",
        "SpeedForecast",
        "SpeedSearch",
        "SpeedTrial",
        "StepHook",
        "TrainOptions",
        "TrainingError",
        "VerificationError",
        "apply_plan",
        "channel_latencies",
        "channel_macs",
        "check_parity",
        "choose_channels",
        "compare_latency",
        "compose",
        "count_macs",
        "count_params",
        "describe_machine",
        "export_onnx",
        "find_groups",
        "fit",
        "forecast",
        "importance",
        "input_statistics",
        "keep_carriers",
        "keep_masks",
        "library_versions",
        "load",
        "make_plan",
        "measure_layers",
        "prune",
        "read_report",
        "rebind_scheduler",
        "recalibrate_batchnorms",
        "repair_weights",
        "save",
        "search_speed",
        "summarise_graph",
        "transplant",
        "transplant_ema",
        "verify_cut",
    ]


def test_the_lazy_loader_knows_exactly_the_public_names() -> None:
    assert sorted(sparsekit.__all__) == sparsekit.__all__ == sorted(sparsekit._HOMES)


@pytest.mark.parametrize("name", sparsekit.__all__)
def test_every_public_name_comes_from_its_home_and_is_documented(name: str) -> None:
    found = getattr(sparsekit, name)
    assert found.__name__ == name
    assert found.__module__ == f"sparsekit.{sparsekit._HOMES[name]}"
    assert len(inspect.getdoc(found) or "") > 25
    members = vars(found).items() if inspect.isclass(found) else ()
    undocumented = [
        member
        for member, value in members
        if not member.startswith("_")
        and callable(getattr(value, "fget", None) or getattr(value, "__func__", value))
        and not inspect.getdoc(value)
    ]
    assert undocumented == []


def test_dir_lists_the_public_names_and_the_version() -> None:
    assert dir(sparsekit) == sorted([*sparsekit.__all__, "__version__"])


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="module 'sparsekit' has no attribute 'pruner'"):
        _ = sparsekit.pruner


@pytest.mark.parametrize(
    "module", ["sparsekit", "sparsekit.cli", "sparsekit.recipe.reading", "sparsekit.errors"]
)
def test_imports_that_should_be_quick_leave_the_heavy_libraries_alone(module: str) -> None:
    heavy = [
        "torch",
        "timm",
        "numpy",
        "onnx",
        "onnxruntime",
        "matplotlib",
        "sklearn",
        "accelerate",
        "torch_pruning",
    ]
    program = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


def test_a_source_tree_can_be_imported_without_installed_metadata() -> None:
    program = (
        "import importlib.metadata as m; m.version = m.distribution = None; "
        "import sparsekit; print(sparsekit.__version__)"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == sparsekit.__version__


def test_every_error_raised_on_purpose_is_public() -> None:
    raised = [error for error in vars(errors).values() if inspect.isclass(error)]
    assert {error.__name__ for error in raised if issubclass(error, errors.SparsekitError)} <= set(
        sparsekit.__all__
    )


# ------------------------------------------------------------------- what we show to others uses what is public

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted([*(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
# The blocks of the API page are signatures, made of the public names.
SIGNATURES = ROOT / "docs" / "reference" / "api.md"
PAGES = [ROOT / "README.md", *sorted({*(ROOT / "docs").rglob("*.md")} - {SIGNATURES})]
INTEGRATIONS = "sparsekit.integrations"


def _shown(file: Path) -> list[str]:
    """The programs of a file: itself, or the Python blocks of a page."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        return [text]
    blocks = re.findall(r"^( *)```python\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, block in blocks]


def _private(source: str) -> list[str]:
    """What a program takes from sparsekit that is not public, also in programs that it has as text."""
    tree = ast.parse(source)
    aliases = {"sk", "sparsekit"}  # a block of a page goes on where an earlier one ended
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname for alias in node.names if alias.name == "sparsekit" and alias.asname}
    return [name for node in ast.walk(tree) for name in _taken(node, aliases) if not _is_public(name)]


def _taken(node: ast.AST, aliases: set[str]) -> Iterator[str]:
    """The dotted names of sparsekit that one node of a program takes."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.startswith("sparsekit."))
    elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "sparsekit":
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
        yield f"sparsekit.{node.attr}"
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "import " in node.value:
        yield from _private_in_text(node.value)


def _private_in_text(text: str) -> list[str]:
    try:
        return _private(text) if "sparsekit" in text else []
    except SyntaxError:  # prose
        return []


def _is_public(name: str) -> bool:
    """A name of `sparsekit.__all__`, a module of integrations, or what such a module has to give."""
    parts = name.split(".")
    if name == INTEGRATIONS or parts[:2] != INTEGRATIONS.split("."):
        return name == INTEGRATIONS or (len(parts) == 2 and parts[1] in sparsekit.__all__)
    if any(part.startswith("_") for part in parts):
        return False
    module = importlib.import_module(".".join(parts[:3]))
    return len(parts) == 3 or (len(parts) == 4 and parts[3] in getattr(module, "__all__", vars(module)))


# A benchmark lets peers' cuts learn as ours do, and judges each step of ours: parts that no call gives out alone.
INSIDE = {
    "benchmarks/finished_model.py": (
        "sparsekit.finished.preparation.split",
        "sparsekit.repair.distillation.distill",
        "sparsekit.repair.divergence.divergence",
        "sparsekit.repair.held_out.HeldOut",
        "sparsekit.repair.held_out.outputs_of",
        "sparsekit.repair.refit.refit",
    ),
    # It compares all outputs of any model, called in any way.
    "benchmarks/networks.py": ("sparsekit.evaluation.as_inputs", "sparsekit.evaluation.flat_tensors"),
}


@pytest.mark.parametrize("file", [*PROGRAMS, *PAGES], ids=lambda file: str(file.relative_to(ROOT)))
def test_what_we_show_uses_only_what_is_public(file: Path) -> None:
    inside = INSIDE.get(str(file.relative_to(ROOT)), ())
    assert [n for source in _shown(file) for n in _private(source) if n not in inside] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import sparsekit as sk\nsk.find_groups", []),
        ("import sparsekit as sk\nsk._HOMES, sk.pruner", ["sparsekit._HOMES", "sparsekit.pruner"]),
        ("import sparsekit as s\ns.files", ["sparsekit.files"]),
        ("from sparsekit import find_groups, files", ["sparsekit.files"]),
        ("from sparsekit.structure.groups import ChannelGroup", ["sparsekit.structure.groups.ChannelGroup"]),
        ("import sparsekit.latency.search", ["sparsekit.latency.search"]),
        ("def late():\n    import sparsekit.files as f", ["sparsekit.files"]),
        ("import sparsekit.integrations.torch_pruning", []),
        ("from sparsekit import integrations", []),
        ("from sparsekit.integrations.lightning import SparsifierCallback", []),
        (
            "from sparsekit.integrations.torch_pruning import _roots, importance, output_shares",
            [f"{INTEGRATIONS}.torch_pruning.{name}" for name in ("_roots", "output_shares")],
        ),
        ("PROGRAM = 'from sparsekit.files import write_json'", ["sparsekit.files.write_json"]),
        ("'import nothing from sparsekit that is not public'", []),
        ("import sparksekit.files, torch.nn", []),
    ],
)
def test_what_is_not_public_is_found(source: str, found: list[str]) -> None:
    assert _private(source) == found
