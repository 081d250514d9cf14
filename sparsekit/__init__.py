"""sparsekit: train vision models to exact zeros, cut the zeros out, and measure the speed-up in ONNX Runtime."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsekit.artifact.load import load as load
    from sparsekit.artifact.save import save as save
    from sparsekit.coupling.find_groups import find_groups as find_groups
    from sparsekit.export.onnx_file import export_onnx as export_onnx
    from sparsekit.latency.compare import compare_latency as compare_latency
    from sparsekit.latency.layers import measure_layers as measure_layers
    from sparsekit.latency.search import search_speed as search_speed
    from sparsekit.latency.table import LatencyTable as LatencyTable
    from sparsekit.repair.recalibration import recalibrate_batchnorms as recalibrate_batchnorms
    from sparsekit.selection.costs import channel_latencies as channel_latencies
    from sparsekit.selection.costs import channel_macs as channel_macs
    from sparsekit.selection.importance import channel_worth as channel_worth
    from sparsekit.selection.keep_masks import keep_masks as keep_masks
    from sparsekit.selection.knapsack import choose_channels as choose_channels
    from sparsekit.sparsify.sparsifier import Sparsifier as Sparsifier
    from sparsekit.structure.plan import PrunePlan as PrunePlan
    from sparsekit.structure.plan import make_plan as make_plan
    from sparsekit.surgery.cut import apply_plan as apply_plan
    from sparsekit.surgery.transplant import rebind_scheduler as rebind_scheduler
    from sparsekit.surgery.transplant import transplant as transplant
    from sparsekit.surgery.transplant import transplant_ema as transplant_ema
    from sparsekit.surgery.verify import verify_cut as verify_cut

__version__ = "0.1.0"
__all__ = [
    "LatencyTable",
    "PrunePlan",
    "Sparsifier",
    "apply_plan",
    "channel_latencies",
    "channel_macs",
    "channel_worth",
    "choose_channels",
    "compare_latency",
    "export_onnx",
    "find_groups",
    "keep_masks",
    "load",
    "make_plan",
    "measure_layers",
    "rebind_scheduler",
    "recalibrate_batchnorms",
    "save",
    "search_speed",
    "transplant",
    "transplant_ema",
    "verify_cut",
]

# Imported on first use (PEP 562), so that `sparsekit --help` does not wait for torch.
_HOMES = {
    "LatencyTable": "latency.table",
    "PrunePlan": "structure.plan",
    "Sparsifier": "sparsify.sparsifier",
    "apply_plan": "surgery.cut",
    "channel_latencies": "selection.costs",
    "channel_macs": "selection.costs",
    "channel_worth": "selection.importance",
    "choose_channels": "selection.knapsack",
    "compare_latency": "latency.compare",
    "export_onnx": "export.onnx_file",
    "find_groups": "coupling.find_groups",
    "keep_masks": "selection.keep_masks",
    "load": "artifact.load",
    "make_plan": "structure.plan",
    "measure_layers": "latency.layers",
    "rebind_scheduler": "surgery.transplant",
    "recalibrate_batchnorms": "repair.recalibration",
    "save": "artifact.save",
    "search_speed": "latency.search",
    "transplant": "surgery.transplant",
    "transplant_ema": "surgery.transplant",
    "verify_cut": "surgery.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsekit' has no attribute {name!r}")
    return getattr(import_module(f"sparsekit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
