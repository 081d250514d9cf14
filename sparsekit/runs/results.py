"""The results of the stages: frozen dataclasses, each with a JSON form for the journal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import JsonValue, TypeAdapter

from sparsekit.export.graph_summary import GraphSummary
from sparsekit.export.parity import Parity
from sparsekit.latency.compare import LatencyComparison
from sparsekit.latency.search import SpeedTrial
from sparsekit.options import Precision
from sparsekit.training.models import InputConfig

Result = TypeVar("Result")


def as_json(result: Any) -> dict[str, Any]:
    """Return a result as plain data. `from_json` gives back an equal one."""
    plain: dict[str, Any] = TypeAdapter(type(result)).dump_python(result, mode="json")
    return plain


def from_json(kind: type[Result], plain: Mapping[str, Any]) -> Result:
    """Read a result of this kind that `as_json` wrote. Raises ValueError for other data."""
    return TypeAdapter(kind).validate_python(plain)


@dataclass(frozen=True)
class DataFound:
    """The data of a run: a description, the classes, the number of images in each split, and if they have labels."""

    description: str
    class_names: tuple[str, ...]
    train: int
    validation: int
    test: int
    labels: bool = True


@dataclass(frozen=True)
class DenseFigures:
    """A dense model on the test images: accuracy in [0, 1], params, and MACs at batch 1."""

    accuracy: float
    params: int
    macs: int


@dataclass(frozen=True)
class DenseResult:
    """The dense model and the data. `figures` is None where the baseline is measured instead.

    Without labels `commonest_answer` is the share of the test images that get the commonest of its answers; else 0.
    `answers` are the outputs of a network of one's own for two fixed inputs, by which a resumed run knows it again.
    """

    data: DataFound
    config: InputConfig
    model_args: dict[str, JsonValue]
    figures: DenseFigures | None
    commonest_answer: float = 0.0
    answers: tuple[float, ...] = ()


@dataclass(frozen=True)
class BaselineResult:
    """The dense model, trained on for as long as the pruned one."""

    figures: DenseFigures


@dataclass(frozen=True)
class ChoiceFound:
    """How the knapsack chose masks.

    A group keeps a multiple of `multiples` of its name. `asked` is the speed-up that was asked for, `found` the trial
    of these masks, `trials` are all trials; None and empty where no speed was asked for. `remark` says why the target
    was not met; empty if it was.
    """

    multiples: dict[str, int]
    asked: float | None = None
    found: SpeedTrial | None = None
    trials: tuple[SpeedTrial, ...] = ()
    remark: str = ""


@dataclass(frozen=True)
class SparsifyResult:
    """The sparse model. `shortfall` says how far from its target the phase ended; empty if it met it."""

    zero_channels: int
    channels: int
    shortfall: str = ""
    choice: ChoiceFound | None = None


@dataclass(frozen=True)
class LayerKept:
    """The channels of a group and how many were kept. `reason` says why it is frozen; empty if it is not."""

    name: str
    channels: int
    kept: int
    reason: str = ""


@dataclass(frozen=True)
class CutResult:
    """The cut: how many channels were zero, were removed, and were removed though not zero (`removed_live`)."""

    proof_max_rel: float
    near_zero_channels: int
    channels: int
    removed: int
    removed_live: int
    choice: ChoiceFound | None
    layers: tuple[LayerKept, ...]

    def __str__(self) -> str:
        """What the run's log says of it."""
        return f"{self.removed} of {self.channels} channels removed"


@dataclass(frozen=True)
class CutEffect:
    """What the cut changed on the test images: the accuracy and the largest change of a logit."""

    accuracy_before_cut: float
    accuracy_after_cut: float
    max_abs_logit_change: float
    max_abs_logit: float


@dataclass(frozen=True)
class TestedCut:
    """The cut of a run, and what it changed on the test images."""

    cut: CutResult
    effect: CutEffect

    def __str__(self) -> str:
        """One line for the log of the run."""
        effect = self.effect
        return (
            f"{self.cut}, on the test images "
            f"{effect.accuracy_before_cut:.4f} -> {effect.accuracy_after_cut:.4f}, largest logit change "
            f"{effect.max_abs_logit_change:.1e}"
        )


@dataclass(frozen=True)
class FinetuneResult:
    """The pruned model. `accuracy` is on the test images; `round_trip_max_abs` compares it with its artifact."""

    accuracy: float
    params: int
    macs: int
    round_trip_max_abs: float


@dataclass(frozen=True)
class ExportedModel:
    """An ONNX file: parity with torch, accuracy on the test images, size, and the operators that run."""

    parity: Parity
    accuracy_onnx: float
    onnx_bytes: int
    graph: GraphSummary


@dataclass(frozen=True)
class ExportedVariant:
    """The ONNX file of the pruned model in fewer bits."""

    precision: Precision
    onnx_bytes: int
    accuracy_onnx: float


@dataclass(frozen=True)
class ExportResult:
    """The files of a run."""

    dense: ExportedModel
    pruned: ExportedModel
    variants: tuple[ExportedVariant, ...] = ()


@dataclass(frozen=True)
class BenchmarkResult:
    """Latencies of all files, interleaved: dense, pruned, and the variants in their order; and of which machine."""

    latency: LatencyComparison
    machine: dict[str, JsonValue]
    versions: dict[str, str]


@dataclass(frozen=True)
class Attempt:
    """One attempt of the search for a budget of accuracy: its target, and how it ended.

    `target` is the full target at `pressure` (`accuracy_search.target_at`). `accuracy` is that of the validation
    images, `drop` how much lower it is than the dense model's. `speedup` was measured when the channels were chosen;
    None where no speed was asked for. An attempt that failed has no figures; `failure` says why, and `drop` is 0 where
    there was nothing to cut, else 1.
    """

    number: int
    pressure: float
    target: dict[str, float]
    drop: float
    accepted: bool = False
    speedup: float | None = None
    macs: int | None = None
    accuracy: float | None = None
    failure: str = ""


@dataclass(frozen=True)
class AttemptsResult:
    """The search for a budget of accuracy, finished or not.

    `full` is the target at pressure 1, `most` the highest pressure to try. `taken` is the number of the attempt that
    the run goes on with (0: not decided yet). `binds` are the keys of the recipe that kept the search from going
    further.
    """

    full: dict[str, float]
    most: float
    dense_accuracy: float
    attempts: tuple[Attempt, ...] = ()
    taken: int = 0
    binds: str = ""
    remark: str = ""


@dataclass(frozen=True)
class AttemptFinetuned:
    """A fine-tuned attempt, evaluated on the validation images."""

    validation_accuracy: float
    macs: int


@dataclass(frozen=True)
class Nothing:
    """The result of a stage that leaves only files, and of processes that do not write."""
