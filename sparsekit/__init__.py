"""sparsekit: train vision models to exact zeros, cut the zeros out, and measure the speed-up in ONNX Runtime."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsekit.analysis import find_groups
    from sparsekit.artifact import load, save
    from sparsekit.choice import choose_channels
    from sparsekit.complexity import channel_latencies, channel_macs
    from sparsekit.continuation import rebind_scheduler, transplant, transplant_ema
    from sparsekit.export import export_onnx
    from sparsekit.latency import compare_latency
    from sparsekit.latency_table import LatencyTable
    from sparsekit.layer_latency import measure_layers
    from sparsekit.masks import keep_masks
    from sparsekit.plan import PrunePlan, make_plan
    from sparsekit.recalibration import recalibrate_batchnorms
    from sparsekit.scores import channel_worth
    from sparsekit.sparsifier import Sparsifier
    from sparsekit.speed_search import search_speed
    from sparsekit.surgery import apply_plan, verify_cut

__version__ = version("sparsekit")
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
    "LatencyTable": "latency_table",
    "PrunePlan": "plan",
    "Sparsifier": "sparsifier",
    "apply_plan": "surgery",
    "channel_latencies": "complexity",
    "channel_macs": "complexity",
    "channel_worth": "scores",
    "choose_channels": "choice",
    "compare_latency": "latency",
    "export_onnx": "export",
    "find_groups": "analysis",
    "keep_masks": "masks",
    "load": "artifact",
    "make_plan": "plan",
    "measure_layers": "layer_latency",
    "rebind_scheduler": "continuation",
    "recalibrate_batchnorms": "recalibration",
    "save": "artifact",
    "search_speed": "speed_search",
    "transplant": "continuation",
    "transplant_ema": "continuation",
    "verify_cut": "surgery",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsekit' has no attribute {name!r}")
    return getattr(import_module(f"sparsekit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
