"""sparsekit: train vision models to exact zeros, cut the zeros out, and measure the speed-up in ONNX Runtime."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsekit.artifact.load import load as load
    from sparsekit.artifact.save import save as save
    from sparsekit.coupling.find_groups import find_groups as find_groups
    from sparsekit.errors import DataError as DataError
    from sparsekit.errors import FileError as FileError
    from sparsekit.errors import InputError as InputError
    from sparsekit.errors import ModelError as ModelError
    from sparsekit.errors import RecipeError as RecipeError
    from sparsekit.errors import RunError as RunError
    from sparsekit.errors import SparsekitError as SparsekitError
    from sparsekit.errors import TrainingError as TrainingError
    from sparsekit.errors import VerificationError as VerificationError
    from sparsekit.export.graph_summary import GraphSummary as GraphSummary
    from sparsekit.export.graph_summary import summarise_graph as summarise_graph
    from sparsekit.export.onnx_file import export_onnx as export_onnx
    from sparsekit.export.parity import Parity as Parity
    from sparsekit.export.parity import check_parity as check_parity
    from sparsekit.finished.forecast import Forecast as Forecast
    from sparsekit.finished.forecast import SpeedForecast as SpeedForecast
    from sparsekit.finished.forecast import forecast as forecast
    from sparsekit.finished.prune_model import PruneResult as PruneResult
    from sparsekit.finished.prune_model import prune as prune
    from sparsekit.finished.steps import PruneStep as PruneStep
    from sparsekit.integrations.torch_pruning import importance as importance
    from sparsekit.latency.compare import Interval as Interval
    from sparsekit.latency.compare import Latency as Latency
    from sparsekit.latency.compare import LatencyComparison as LatencyComparison
    from sparsekit.latency.compare import compare_latency as compare_latency
    from sparsekit.latency.layers import measure_layers as measure_layers
    from sparsekit.latency.search import SpeedSearch as SpeedSearch
    from sparsekit.latency.search import SpeedTrial as SpeedTrial
    from sparsekit.latency.search import search_speed as search_speed
    from sparsekit.latency.table import LatencyTable as LatencyTable
    from sparsekit.machine import describe_machine as describe_machine
    from sparsekit.machine import library_versions as library_versions
    from sparsekit.repair.closed_form import repair_weights as repair_weights
    from sparsekit.repair.recalibration import recalibrate_batchnorms as recalibrate_batchnorms
    from sparsekit.repair.statistics import InputStatistics as InputStatistics
    from sparsekit.repair.statistics import input_statistics as input_statistics
    from sparsekit.report.schema import RunReport as RunReport
    from sparsekit.report.schema import read_report as read_report
    from sparsekit.selection.carriers import keep_carriers as keep_carriers
    from sparsekit.selection.costs import channel_latencies as channel_latencies
    from sparsekit.selection.costs import channel_macs as channel_macs
    from sparsekit.selection.keep_masks import keep_masks as keep_masks
    from sparsekit.selection.knapsack import choose_channels as choose_channels
    from sparsekit.sparsify.schedules import PhaseShares as PhaseShares
    from sparsekit.sparsify.sparsifier import Sparsifier as Sparsifier
    from sparsekit.sparsify.strength import AutoStrength as AutoStrength
    from sparsekit.sparsify.strength import ConstantStrength as ConstantStrength
    from sparsekit.structure.compose import compose as compose
    from sparsekit.structure.counting import count_macs as count_macs
    from sparsekit.structure.counting import count_params as count_params
    from sparsekit.structure.groups import ChannelGroup as ChannelGroup
    from sparsekit.structure.groups import ChannelGroups as ChannelGroups
    from sparsekit.structure.groups import Rounding as Rounding
    from sparsekit.structure.plan import PrunePlan as PrunePlan
    from sparsekit.structure.plan import make_plan as make_plan
    from sparsekit.surgery.cut import apply_plan as apply_plan
    from sparsekit.surgery.transplant import rebind_scheduler as rebind_scheduler
    from sparsekit.surgery.transplant import transplant as transplant
    from sparsekit.surgery.transplant import transplant_ema as transplant_ema
    from sparsekit.surgery.verify import Agreement as Agreement
    from sparsekit.surgery.verify import verify_cut as verify_cut
    from sparsekit.training.display import EpochMetrics as EpochMetrics
    from sparsekit.training.loop import fit as fit
    from sparsekit.training.options import Distillation as Distillation
    from sparsekit.training.options import StepHook as StepHook
    from sparsekit.training.options import TrainOptions as TrainOptions

__version__ = "0.1.0"
__all__ = [
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

# Imported on first use (PEP 562), so that `sparsekit --help` does not wait for torch.
_HOMES = {
    "Agreement": "surgery.verify",
    "AutoStrength": "sparsify.strength",
    "ChannelGroup": "structure.groups",
    "ChannelGroups": "structure.groups",
    "ConstantStrength": "sparsify.strength",
    "DataError": "errors",
    "Distillation": "training.options",
    "EpochMetrics": "training.display",
    "FileError": "errors",
    "Forecast": "finished.forecast",
    "GraphSummary": "export.graph_summary",
    "InputError": "errors",
    "InputStatistics": "repair.statistics",
    "Interval": "latency.compare",
    "Latency": "latency.compare",
    "LatencyComparison": "latency.compare",
    "LatencyTable": "latency.table",
    "ModelError": "errors",
    "Parity": "export.parity",
    "PhaseShares": "sparsify.schedules",
    "PrunePlan": "structure.plan",
    "PruneResult": "finished.prune_model",
    "PruneStep": "finished.steps",
    "RecipeError": "errors",
    "Rounding": "structure.groups",
    "RunError": "errors",
    "RunReport": "report.schema",
    "SparsekitError": "errors",
    "Sparsifier": "sparsify.sparsifier",
    "SpeedForecast": "finished.forecast",
    "SpeedSearch": "latency.search",
    "SpeedTrial": "latency.search",
    "StepHook": "training.options",
    "TrainOptions": "training.options",
    "TrainingError": "errors",
    "VerificationError": "errors",
    "apply_plan": "surgery.cut",
    "channel_latencies": "selection.costs",
    "channel_macs": "selection.costs",
    "check_parity": "export.parity",
    "choose_channels": "selection.knapsack",
    "compare_latency": "latency.compare",
    "compose": "structure.compose",
    "count_macs": "structure.counting",
    "count_params": "structure.counting",
    "describe_machine": "machine",
    "export_onnx": "export.onnx_file",
    "find_groups": "coupling.find_groups",
    "fit": "training.loop",
    "forecast": "finished.forecast",
    "importance": "integrations.torch_pruning",
    "input_statistics": "repair.statistics",
    "keep_carriers": "selection.carriers",
    "keep_masks": "selection.keep_masks",
    "library_versions": "machine",
    "load": "artifact.load",
    "make_plan": "structure.plan",
    "measure_layers": "latency.layers",
    "prune": "finished.prune_model",
    "read_report": "report.schema",
    "rebind_scheduler": "surgery.transplant",
    "recalibrate_batchnorms": "repair.recalibration",
    "repair_weights": "repair.closed_form",
    "save": "artifact.save",
    "search_speed": "latency.search",
    "summarise_graph": "export.graph_summary",
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
