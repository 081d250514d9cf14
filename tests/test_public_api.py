"""The public names are few, documented and guarded; importing them costs nothing until they are used."""

from __future__ import annotations

import inspect
import subprocess
import sys

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
        "FileError",
        "GraphSummary",
        "InputError",
        "Interval",
        "Latency",
        "LatencyComparison",
        "LatencyTable",
        "ModelError",
        "Parity",
        "PhaseShares",
        "PrunePlan",
        "RecipeError",
        "Rounding",
        "RunError",
        "RunReport",
        "SparsekitError",
        "Sparsifier",
        "SpeedSearch",
        "SpeedTrial",
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
        "importance",
        "keep_carriers",
        "keep_masks",
        "library_versions",
        "load",
        "make_plan",
        "measure_layers",
        "read_report",
        "rebind_scheduler",
        "recalibrate_batchnorms",
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
