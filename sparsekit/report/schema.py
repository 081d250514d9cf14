"""The report of a run as data: the schema of report.json, and how it is written and read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError

from sparsekit import files
from sparsekit.errors import FileError
from sparsekit.options import Precision

# ----------------------------------------------------------------------------------------------------- schema

Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(gt=0)]


class _Record(BaseModel):
    """Base of all records: immutable, without unknown keys, NaN or infinity (JSON has neither)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelInfo(_Record):
    """The timm name of the model and the extra arguments it was created with.

    Of a person's `own` network the name is the function that builds it, and the arguments are all that it was called
    with.
    """

    name: str
    args: dict[str, JsonValue] = {}
    own: bool = False


class DataInfo(_Record):
    """The data of a run. `train`, `validation` and `test` count images.

    Without `labels` the dense model's answers take their place: every accuracy is agreement with it.
    """

    description: str
    class_names: tuple[str, ...]
    train: Count
    validation: Count
    test: Count
    labels: bool = True

    @property
    def measure(self) -> str:
        """What the figures called accuracy are: that, or agreement with the dense model."""
        return "accuracy" if self.labels else "agreement"


class LatencyFigures(_Record):
    """Wall time of one run in ONNX Runtime, in ms: median, 10th and 90th percentile over the rounds."""

    median: Positive
    p10: Positive
    p90: Positive


class ModelFigures(_Record):
    """The figures of one model.

    `accuracy` (torch) and `accuracy_onnx` (ONNX Runtime) are fractions of the test images. `macs` are those of one
    forward pass at batch 1. `onnx_bytes` is the size of the file.
    """

    accuracy: Fraction
    params: PositiveCount
    macs: PositiveCount
    onnx_bytes: PositiveCount
    latency_ms: LatencyFigures
    accuracy_onnx: Fraction


class SparseFigures(_Record):
    """The sparse model at the cut: test accuracy with its near-zero channels masked, and with them removed.

    `max_abs_logit_change` is the largest |logit before - logit after|, `max_abs_logit` the largest |logit before|.
    """

    accuracy_before_cut: Fraction
    accuracy_after_cut: Fraction
    max_abs_logit_change: NonNegative
    max_abs_logit: NonNegative
    near_zero_channels: Count
    channels: Count


class IntervalFigures(_Record):
    """A ratio of latencies and its 95 % bootstrap interval."""

    value: Positive
    low: Positive
    high: Positive


class VariantFigures(_Record):
    """The pruned model in fewer bits. `speedup` is against the dense model in float32."""

    precision: Precision
    accuracy_onnx: Fraction
    onnx_bytes: PositiveCount
    latency_ms: LatencyFigures
    speedup: IntervalFigures


class AttemptFigures(_Record):
    """One attempt of the search for a budget of accuracy: its target, and what came out.

    `speedup` was measured when the channels were chosen; it is null where no speed was asked for. `accuracy` is that of
    the validation images, `drop` how much lower it is than the dense model's. `accepted`: `drop` is within the budget.
    An attempt that failed has no figures; `failure` says why.
    """

    number: PositiveCount
    target: dict[str, float]
    speedup: Positive | None = None
    macs: PositiveCount | None = None
    accuracy: Fraction | None = None
    drop: float
    accepted: bool
    failure: str = ""
    taken: bool


class ParityFigures(_Record):
    """Torch and ONNX Runtime on the same images: the largest |difference| of a logit, absolute (`max_abs`) and over
    the largest |logit| (`max_rel`), and the fraction of images with the same top class."""

    max_abs: NonNegative
    max_rel: NonNegative
    top1_agreement: Fraction


class BenchmarkInfo(_Record):
    """How latency was measured. `reason` says why the figures are not `trustworthy`; empty if they are."""

    batch: PositiveCount
    threads: PositiveCount
    rounds: PositiveCount
    trustworthy: bool
    reason: str = ""


class GraphFigures(_Record):
    """How many operators ONNX Runtime runs for an ONNX file.

    `blocked` convolutions are in its blocked layout, `plain` ones are not; `reorders` change the layout. `activations`
    and `norms` are those that were not fused into the operator before them.
    """

    operators: Count
    blocked: Count
    plain: Count
    reorders: Count
    activations: Count
    norms: Count


class EpochCounts(_Record):
    """Epochs of each phase. `baseline` are those of the dense model after its own, without a penalty."""

    dense: Count
    baseline: Count
    sparsify: Count
    finetune: Count


class StageInfo(_Record):
    """One stage of the run: its wall time in seconds and how it ended."""

    name: str
    seconds: NonNegative
    status: str


class LayerFigures(_Record):
    """One channel group: its channels and how many were kept. `reason` says why it is frozen; empty if it is not."""

    name: str
    channels: PositiveCount
    kept: Count
    reason: str = ""


def _finite(value: object) -> object:
    """Read an infinite validation loss as none: one such epoch must not cost the whole report."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class CurvePoint(_Record):
    """One epoch of a phase. `accuracy` is that of the validation images, `zero_share` the fraction of penalised
    channels at zero."""

    phase: str
    epoch: Count
    loss: float
    accuracy: Fraction | None = None
    validation_loss: Annotated[float | None, BeforeValidator(_finite)] = None
    train_accuracy: Fraction | None = None
    zero_share: Fraction | None = None
    strength: NonNegative | None = None
    lr: NonNegative
    seconds: NonNegative


class RunReport(_Record):
    """Everything a run found.

    - `input_shape` is (channels, height, width) of one image.
    - `speedup` is dense latency / pruned latency. `null` is the same of the dense model and a second copy of it.
    - `round_trip_max_abs` is the largest change of a logit when the saved model was loaded again.
    - `asked` is the recipe's target. `attempts` and `binds`, the keys of the recipe that kept the model from being
      pruned further, are empty unless the target is a budget of accuracy.
    - `dense_graph` and `pruned_graph` are null in older reports.

    The ratios are computed from the figures, so that they cannot disagree with them.
    """

    schema_version: Literal[1] = 1
    recipe: str
    model: ModelInfo
    data: DataInfo
    input_shape: tuple[PositiveCount, PositiveCount, PositiveCount]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: Positive = 1.0
    dense: ModelFigures
    sparse: SparseFigures
    pruned: ModelFigures
    speedup: IntervalFigures
    null: IntervalFigures
    parity: ParityFigures
    dense_parity: ParityFigures
    benchmark: BenchmarkInfo
    round_trip_max_abs: NonNegative
    machine: dict[str, JsonValue]
    seed: int
    versions: dict[str, str]
    epochs: EpochCounts
    stages: tuple[StageInfo, ...]
    layers: tuple[LayerFigures, ...]
    curves: tuple[CurvePoint, ...]
    warnings: tuple[str, ...] = ()
    asked: dict[str, float] = {}
    variants: tuple[VariantFigures, ...] = ()
    attempts: tuple[AttemptFigures, ...] = ()
    binds: str = ""
    dense_graph: GraphFigures | None = None
    pruned_graph: GraphFigures | None = None

    @property
    def macs_ratio(self) -> float:
        """MACs of the dense model / MACs of the pruned model."""
        return self.dense.macs / self.pruned.macs

    @property
    def params_ratio(self) -> float:
        """Params of the dense model / params of the pruned model."""
        return self.dense.params / self.pruned.params

    @property
    def speed_efficiency(self) -> float:
        """Speed-up / MACs ratio: how much of the arithmetic saved became time saved."""
        return self.speedup.value / self.macs_ratio


# ------------------------------------------------------------------------------------------------------- JSON

_DERIVED = ("macs_ratio", "params_ratio", "speed_efficiency")


def write_json(report: RunReport, path: Path) -> None:
    """Write a report and its ratios as JSON, atomically."""
    ratios = {name: getattr(report, name) for name in _DERIVED}
    files.write_json(path, report.model_dump(mode="json") | ratios)


def read_report(path: Path) -> RunReport:
    """Read a report that `write_json` wrote. The ratios in the file are ignored and computed again.

    Raises FileError if the file is missing, is not JSON, or holds no report.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(
            f"{path} does not exist; a run writes it in its last stage (finish it with `--resume`)"
        ) from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged: it must be JSON, got {error}; {_RERUN}") from error
    if not isinstance(value, dict):
        raise FileError(f"{path} must hold a JSON object, got {type(value).__name__}; {_RERUN}")
    try:
        return RunReport.model_validate({key: part for key, part in value.items() if key not in _DERIVED})
    except ValidationError as error:
        raise FileError(f"{path} is not a report of this version: {_faults(error)}; {_RERUN}") from error


_RERUN = "write it again with `sparsekit prune RECIPE --resume`"


def _faults(error: ValidationError, limit: int = 3) -> str:
    found = error.errors(include_url=False)
    shown = [f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg'].lower()}" for fault in found]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return "; ".join(shown[:limit]) + more
