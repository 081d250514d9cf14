"""What the stages of a run find and hand on: frozen dataclasses, each with a JSON form for the journal."""

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
    """A result as plain data; `from_json` gives back an equal one."""
    plain: dict[str, Any] = TypeAdapter(type(result)).dump_python(result, mode="json")
    return plain


def from_json(kind: type[Result], plain: Mapping[str, Any]) -> Result:
    """Inverse of `as_json`. Raises ValueError for data that are no such result."""
    return TypeAdapter(kind).validate_python(plain)


@dataclass(frozen=True)
class DataFound:
    """The images of a run: what they are, their classes, and how many each split has."""

    description: str
    class_names: tuple[str, ...]
    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class DenseFigures:
    """A dense model on the test images: accuracy in [0, 1], params, and MACs at batch 1."""

    accuracy: float
    params: int
    macs: int


@dataclass(frozen=True)
class DenseResult:
    """What the first stage found; `figures` only where no baseline takes the model's place."""

    data: DataFound
    config: InputConfig
    model_args: dict[str, JsonValue]
    figures: DenseFigures | None


@dataclass(frozen=True)
class BaselineResult:
    """The dense model, trained on for as long as the pruned one."""

    figures: DenseFigures


@dataclass(frozen=True)
class ChoiceFound:
    """How masks were chosen as a whole: in multiples of how many channels each group is kept, and for which speed.

    `asked` is the speed-up that was asked for, `found` the trial of these masks and `trials` all of them; None and
    empty where no speed was asked for. `remark` says why the target was not met, if it was not.
    """

    multiples: dict[str, int]
    asked: float | None = None
    found: SpeedTrial | None = None
    trials: tuple[SpeedTrial, ...] = ()
    remark: str = ""


@dataclass(frozen=True)
class SparsifyResult:
    """The sparse model: channels at zero, and how far from its target the phase ended ("": it met it)."""

    zero_channels: int
    channels: int
    shortfall: str = ""
    choice: ChoiceFound | None = None


@dataclass(frozen=True)
class LayerKept:
    """How many channels of a group were kept; `reason` says why it is frozen, if it is."""

    name: str
    channels: int
    kept: int
    reason: str = ""


@dataclass(frozen=True)
class CutResult:
    """The cut: channels that were zero, removed, and removed though they were not zero; and the proof."""

    proof_max_rel: float
    near_zero_channels: int
    channels: int
    removed: int
    removed_live: int
    choice: ChoiceFound | None
    layers: tuple[LayerKept, ...]


@dataclass(frozen=True)
class CutEffect:
    """The test images right before and right after the cut: accuracies, and the largest change of any logit."""

    accuracy_before_cut: float
    accuracy_after_cut: float
    max_abs_logit_change: float
    max_abs_logit: float


@dataclass(frozen=True)
class TestedCut:
    """The cut of a run, and what it did to the test images."""

    cut: CutResult
    effect: CutEffect

    def __str__(self) -> str:
        """For the run's log."""
        effect = self.effect
        return (
            f"{self.cut.removed} of {self.cut.channels} channels removed, test accuracy "
            f"{effect.accuracy_before_cut:.4f} -> {effect.accuracy_after_cut:.4f}, largest logit change "
            f"{effect.max_abs_logit_change:.1e}"
        )


@dataclass(frozen=True)
class FinetuneResult:
    """The pruned model on the test images, and how far the artifact's logits are from its own."""

    accuracy: float
    params: int
    macs: int
    round_trip_max_abs: float


@dataclass(frozen=True)
class ExportedModel:
    """An ONNX file: parity with torch, accuracy on the test images, size, and what ONNX Runtime makes of it."""

    parity: Parity
    accuracy_onnx: float
    onnx_bytes: int
    graph: GraphSummary


@dataclass(frozen=True)
class ExportedVariant:
    """The pruned model's file in fewer bits."""

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
    """What was asked of an attempt within a budget of accuracy, and how it ended.

    `pressure` is what its target is raised to (`accuracy_search.target_at`). `accuracy` is that of validation images,
    `drop` how much lower than the dense model's; `speedup` is what was measured when channels were chosen, None where
    no speed was asked for. What could not be made has no figures, and says why not in `failure`; its `drop` is 0 where
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

    `full` is the target at pressure 1 and `most` the highest pressure to try. `taken` is the attempt that the run goes
    on with (0: not decided yet), `binds` the keys of the recipe that kept the search from going further.
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
    """An attempt after its fine-tuning, judged by validation images."""

    validation_accuracy: float
    macs: int


@dataclass(frozen=True)
class Nothing:
    """Of a stage that leaves files only, and of processes that do not write."""
