"""What a run found, as data: `RunReport`, its schema, and the JSON of it."""

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
    """Closed and immutable; NaN and infinity are refused, because JSON has neither."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelInfo(_Record):
    """timm name of the model and the extra arguments it was created with."""

    name: str
    args: dict[str, JsonValue] = {}


class DataInfo(_Record):
    """What the run trained and tested on; `train`, `validation`, `test` count images."""

    description: str
    class_names: tuple[str, ...]
    train: Count
    validation: Count
    test: Count


class LatencyFigures(_Record):
    """Wall time of one run in ONNX Runtime, in ms: median, 10th and 90th percentile over the rounds."""

    median: Positive
    p10: Positive
    p90: Positive


class ModelFigures(_Record):
    """One model, measured. Accuracies are fractions of the test images, by torch and by ONNX Runtime.

    `macs` and `params` are those of one forward pass at batch 1; `onnx_bytes` is the size of the file.
    """

    accuracy: Fraction
    params: PositiveCount
    macs: PositiveCount
    onnx_bytes: PositiveCount
    latency_ms: LatencyFigures
    accuracy_onnx: Fraction


class SparseFigures(_Record):
    """The trained model at the cut: test accuracy with its near-zero channels masked, and with them removed.

    `max_abs_logit_change` is the largest |logit before - logit after|, `max_abs_logit` the largest
    |logit before|.
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
    """The pruned model in fewer bits; `speedup` is over the dense model in float32."""

    precision: Precision
    accuracy_onnx: Fraction
    onnx_bytes: PositiveCount
    latency_ms: LatencyFigures
    speedup: IntervalFigures


class AttemptFigures(_Record):
    """A model that was trained on the way to a budget of accuracy: what was asked of it, and what came out.

    `speedup` is what was measured when its channels were chosen (null: no speed was asked for), `accuracy` that of
    validation images, `drop` how much lower than dense; `accepted`: within the budget. What could not be made says why
    not in `failure` and has no figures.
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
    """Torch against ONNX Runtime on the same input: largest |difference|, the same over the largest |logit|,
    and the fraction of images with the same top class."""

    max_abs: NonNegative
    max_rel: NonNegative
    top1_agreement: Fraction


class BenchmarkInfo(_Record):
    """How latency was measured; `reason` says why the figures are not `trustworthy`, or is empty."""

    batch: PositiveCount
    threads: PositiveCount
    rounds: PositiveCount
    trustworthy: bool
    reason: str = ""


class GraphFigures(_Record):
    """Operators of an ONNX file as ONNX Runtime runs it.

    `blocked` and `plain` convolutions lie inside and outside its blocked layout; `activations` and `norms` were not
    fused into what comes before them.
    """

    operators: Count
    blocked: Count
    plain: Count
    reorders: Count
    activations: Count
    norms: Count


class EpochCounts(_Record):
    """Epochs of each phase. `baseline`: for how long the dense model was trained on, without a penalty."""

    dense: Count
    baseline: Count
    sparsify: Count
    finetune: Count


class StageInfo(_Record):
    """One stage of the pipeline: wall time in seconds and how it ended."""

    name: str
    seconds: NonNegative
    status: str


class LayerFigures(_Record):
    """One channel group: its channels, how many were kept, and why it is frozen (empty: it is not)."""

    name: str
    channels: PositiveCount
    kept: Count
    reason: str = ""


def _finite(value: object) -> object:
    """One epoch with an infinite validation loss must not cost the report of a whole run."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class CurvePoint(_Record):
    """One epoch of a phase; `accuracy` is on validation images, `zero_share` the fraction of zero groups."""

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
    """Everything a run found. `input_shape` is (channels, height, width) of one image.

    `speedup` is dense latency over pruned latency, `null` the dense model against a copy of itself in the
    same benchmark. `round_trip_max_abs` is the largest logit difference after the saved model was loaded
    again. `asked` is the recipe's target, `binds` the key of the recipe that kept the best of `attempts` from
    being pruned further (both empty but for a budget of accuracy), the graphs what ONNX Runtime makes of the
    files (runs of before that was counted have none). The ratios are computed from the figures, so that they
    cannot disagree with them.
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
        """MACs of the dense model / MACs of the pruned one."""
        return self.dense.macs / self.pruned.macs

    @property
    def params_ratio(self) -> float:
        """Parameters of the dense model / parameters of the pruned one."""
        return self.dense.params / self.pruned.params

    @property
    def speed_efficiency(self) -> float:
        """Speed-up / MACs ratio: how much of the arithmetic saved became time saved."""
        return self.speedup.value / self.macs_ratio


# ------------------------------------------------------------------------------------------------------- JSON

_DERIVED = ("macs_ratio", "params_ratio", "speed_efficiency")


def write_json(report: RunReport, path: Path) -> None:
    """Write `report` and its computed ratios as JSON, atomically."""
    ratios = {name: getattr(report, name) for name in _DERIVED}
    files.write_json(path, report.model_dump(mode="json") | ratios)


def read_report(path: Path) -> RunReport:
    """Read what `write_json` wrote; the ratios in the file are ignored and computed again.

    Raises FileError if the file is missing, is not JSON, or does not hold a report.
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
