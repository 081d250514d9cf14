"""What a run found, as data (`RunReport`), as JSON, as one self-contained HTML page and as a terminal table.

Every number on the page and in the table is taken from the `RunReport`; nothing is measured here. Numbers are
rounded to what the measurement supports: a speed-up gets as many decimals as its interval is wide.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from io import StringIO
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError

from sparsekit import files
from sparsekit.errors import FileError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import RenderableType

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

    precision: Literal["int8", "fp16"]
    accuracy_onnx: Fraction
    onnx_bytes: PositiveCount
    latency_ms: LatencyFigures
    speedup: IntervalFigures


class AttemptFigures(_Record):
    """A model that was trained on the way to a budget of accuracy: what was asked of it, and what came out.

    `speedup` is what was measured when its channels were chosen (null: no speed was asked for), `accuracy` that of
    validation images, `drop` how much lower than dense; `accepted`: within the budget.
    """

    number: PositiveCount
    target: dict[str, float]
    speedup: Positive | None
    macs: PositiveCount
    accuracy: Fraction
    drop: float
    accepted: bool
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
    same benchmark. `round_trip_max_abs` is the largest logit difference after a fresh process loaded the
    saved model. `asked` is the recipe's target, `binds` the key of the recipe that kept the best of `attempts` from
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


# ----------------------------------------------------------------------------- numbers as a person reads them


def _significant(value: float, digits: int = 3) -> str:
    """`digits` significant digits, with thousands separators and without an exponent."""
    if value == 0:
        return "0"
    # Rounding first: 9.996 has one digit before the point, but reads 10.0.
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}"


def _scaled(value: float, units: Sequence[str]) -> str:
    step = 0
    while step + 1 < len(units) and float(f"{value:.2e}") >= 1000:
        value, step = value / 1000, step + 1
    return f"{_significant(value)} {units[step]}".strip()


def _count(value: int) -> str:
    return f"{value:,}" if value < 10_000 else _scaled(value, ("", "k", "M", "G", "T"))


def _bytes(value: float) -> str:
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def _milliseconds(value: float) -> str:
    return f"{_significant(value)} ms"


def _seconds(value: float) -> str:
    if value >= 3600:
        return f"{int(value // 3600)} h {int(value % 3600 // 60)} min"
    return f"{int(value // 60)} min {int(value % 60)} s" if value >= 60 else f"{value:.1f} s"


def _fraction(value: float) -> str:
    return f"{value:.4f}"


def _tiny(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _decimals(interval: IntervalFigures) -> int:
    """Decimals that the width of the interval supports: one digit of its half-width, at most three."""
    half = (interval.high - interval.low) / 2
    return min(3, max(0, -math.floor(math.log10(half)))) if half > 0 else 2


def _value(interval: IntervalFigures) -> str:
    return f"{interval.value:.{_decimals(interval)}f}"


def _range(interval: IntervalFigures) -> str:
    digits = _decimals(interval)
    return f"{interval.low:.{digits}f} to {interval.high:.{digits}f}"


def _change(ratio: float, less: str, more: str) -> str:
    """`ratio` = dense / pruned, in words: "2.50× fewer", "1.10× more", or "the same"."""
    shown, word = (ratio, less) if ratio >= 1 else (1 / ratio, more)
    return "the same" if f"{shown:.2f}" == "1.00" else f"{_significant(shown)}× {word}"


# -------------------------------------------------------------------------- what table and page say in common


@dataclass(frozen=True)
class _Row:
    label: str
    dense: str
    pruned: str
    change: str


def _rows(report: RunReport) -> list[_Row]:
    dense, pruned = report.dense, report.pruned

    def row(label: str, show: Any, name: str, change: str) -> _Row:
        return _Row(label, show(getattr(dense, name)), show(getattr(pruned, name)), change)

    loss, loss_onnx = pruned.accuracy - dense.accuracy, pruned.accuracy_onnx - dense.accuracy_onnx
    size = _change(dense.onnx_bytes / pruned.onnx_bytes, "smaller", "larger")
    return [
        row("test accuracy", _fraction, "accuracy", f"{loss:+.4f}"),
        row("same, ONNX Runtime", _fraction, "accuracy_onnx", f"{loss_onnx:+.4f}"),
        row("params", _count, "params", _change(report.params_ratio, "fewer", "more")),
        row("MACs", _count, "macs", _change(report.macs_ratio, "fewer", "more")),
        row("ONNX size", _bytes, "onnx_bytes", size),
        row("latency, median", lambda latency: _milliseconds(latency.median), "latency_ms", _faster(report)),
    ]


def _faster(report: RunReport) -> str:
    if not report.benchmark.trustworthy:
        return "not trustworthy"
    if report.speedup.low <= 1 <= report.speedup.high:
        return "no difference"
    if report.speedup.value < 1:
        return _change(report.speedup.value, "faster", "slower")
    return f"{_value(report.speedup)}× faster"


def _speedup_text(report: RunReport) -> str:
    speedup, null, benchmark = report.speedup, report.null, report.benchmark
    measured = f"{_value(speedup)} (95 % interval {_range(speedup)})"
    itself = f"dense against itself: {_value(null)} ({_range(null)})"
    if not benchmark.trustworthy:
        reason = benchmark.reason or "the benchmark was too noisy"
        return f"not trustworthy: {reason}; measured {measured}, {itself}"
    return f"{measured}, batch {benchmark.batch}, {_plural(benchmark.threads, 'thread')}; {itself}"


def _asked_text(asked: Mapping[str, float]) -> str:
    phrases = {
        "speedup": "a speed-up of {:g}",
        "latency_ms": "{:g} ms",
        "max_accuracy_drop": "at most {:g} of validation accuracy lost",
    }
    return ", ".join(phrases.get(key, f"{{:g}} of the {key}").format(value) for key, value in asked.items())


def _variant_text(report: RunReport, variant: VariantFigures) -> str:
    speed = f"{_value(variant.speedup)} times as fast as dense ({_range(variant.speedup)})"
    return (
        f"{speed if report.benchmark.trustworthy else 'speed-up not trustworthy'}, accuracy "
        f"{_fraction(variant.accuracy_onnx)}, {_milliseconds(variant.latency_ms.median)}, {_bytes(variant.onnx_bytes)}"
    )


def _attempt_rows(report: RunReport) -> list[tuple[str, str]]:
    rows = []
    for attempt in report.attempts:
        measured = "" if attempt.speedup is None else f", measured {_significant(attempt.speedup)}"
        verdict = "taken" if attempt.taken else "within the budget" if attempt.accepted else "too much"
        rows.append(
            (
                f"attempt {attempt.number}",
                f"{_asked_text(attempt.target)}{measured}: validation accuracy {_fraction(attempt.accuracy)}, "
                f"{-attempt.drop:+.4f} against dense; {verdict}",
            )
        )
    return [*rows, *([("limited by", report.binds)] if report.binds else [])]


def _graph_rows(report: RunReport) -> list[tuple[str, str]]:
    if report.dense_graph is None or report.pruned_graph is None:
        return []
    texts = [
        f"{graph.blocked} of {_plural(graph.blocked + graph.plain, 'convolution')} in the blocked layout, "
        f"{_plural(graph.reorders, 'reorder')}, {graph.activations + graph.norms} not fused"
        for graph in (report.pruned_graph, report.dense_graph)
    ]
    return [("graph, pruned", texts[0]), *([("graph, dense", texts[1])] if texts[1] != texts[0] else [])]


def _parity_text(parity: ParityFigures) -> str:
    return (
        f"{_tiny(parity.max_rel)} of the largest logit ({_tiny(parity.max_abs)} absolute), "
        f"same class for {_fraction(parity.top1_agreement)} of the images"
    )


def _findings(report: RunReport) -> list[tuple[str, str]]:
    """(label, text): what stands below the figures of the two models."""
    sparse = report.sparse
    speed = _significant(report.speed_efficiency, 2) if report.benchmark.trustworthy else "not trustworthy"
    return [
        *([("asked for", _asked_text(report.asked))] if report.asked else []),
        *_attempt_rows(report),
        ("speed-up", _speedup_text(report)),
        *((f"pruned, {variant.precision}", _variant_text(report, variant)) for variant in report.variants),
        ("speed efficiency", f"{speed} (speed-up / MACs ratio of {_significant(report.macs_ratio)})"),
        ("near-zero channels", f"{sparse.near_zero_channels:,} of {sparse.channels:,}"),
        (
            "accuracy at the cut",
            f"{_fraction(sparse.accuracy_before_cut)} before, {_fraction(sparse.accuracy_after_cut)} after",
        ),
        (
            "largest logit change",
            f"{_tiny(sparse.max_abs_logit_change)} (largest logit {_significant(sparse.max_abs_logit)})",
        ),
        ("parity, pruned", _parity_text(report.parity)),
        ("parity, dense", _parity_text(report.dense_parity)),
        *_graph_rows(report),
        ("saved and reloaded", f"logits differ by {_tiny(report.round_trip_max_abs)}"),
        ("dense baseline", _baseline_text(report.epochs)),
    ]


def _baseline_text(epochs: EpochCounts) -> str:
    """Is the comparison fair? Says what the dense model was given."""
    extra = epochs.sparsify + epochs.finetune
    if epochs.baseline > 0:
        total = f"{epochs.dense} + {epochs.baseline} epochs; pruned {epochs.dense} + {extra}"
        if epochs.baseline >= extra:
            return f"trained as long in total as the pruned model (dense {total})"
        return f"trained on, but shorter than the pruned model (dense {total})"
    start = f"after {_plural(epochs.dense, 'epoch')}" if epochs.dense else "as it was given, without training"
    return f"taken {start}; the pruned model was trained for {_plural(extra, 'further epoch')}"


def _plural(count: int, noun: str, ending: str = "s") -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}{ending}"


# --------------------------------------------------------------------------------------------- terminal table


def terminal_table(report: RunReport, directory: Path | None = None) -> RenderableType:
    """The report for a terminal of 80 columns or more; it ends with the files, in `directory` if given."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    trustworthy = report.benchmark.trustworthy
    figures = Table()
    figures.add_column("")
    for name in ("dense", "pruned", "change"):
        figures.add_column(name, justify="right")
    for row in _rows(report):
        # Text, not str: names from outside may hold square brackets, which rich reads as markup.
        figures.add_row(*(Text(cell) for cell in (row.label, row.dense, row.pruned, row.change)))

    notes = Table.grid(padding=(0, 2))
    notes.add_column(no_wrap=True, style="bold")
    notes.add_column(overflow="fold")
    for label, text in _findings(report):
        doubtful = label == "speed-up" and not trustworthy
        notes.add_row(label, Text(text, style="bold yellow" if doubtful else ""))
    for warning in report.warnings:
        notes.add_row(Text("warning", style="yellow"), Text(warning, style="yellow"))
    names = "report.html  report.json  pruned.onnx  dense.onnx  pruned/"
    notes.add_row("files", Text(f"{directory}/\n{names}" if directory else f"{names}"))
    return Group(Text(_title(report), style="bold"), figures, Padding(notes, (0, 1)))


def _title(report: RunReport) -> str:
    channels, height, width = report.input_shape
    size = f"{channels}×{height}×{width}"
    return f"{report.model.name}, {size}, run {report.recipe}, {_plural(report.data.test, 'test image')}"


# -------------------------------------------------------------------------------------------------- HTML page


def write_html(report: RunReport, path: Path) -> None:
    """Write the report as one HTML file that needs nothing else: no network, no script, no font. Atomic."""
    import jinja2

    source = resources.files("sparsekit").joinpath("report.html.jinja").read_text(encoding="utf-8")
    # Class names, paths and recipe names come from outside: everything is escaped unless it is Markup.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "count": _count,
        "fraction": _fraction,
        "significant": _significant,
        "interval_value": _value,
        "interval_range": _range,
        "milliseconds": _milliseconds,
        "seconds": _seconds,
        "plural": _plural,
    }
    files.write_text(path, environment.from_string(source).render(_page(report)) + "\n")


def _page(report: RunReport) -> dict[str, Any]:
    from markupsafe import Markup

    return {
        "report": report,
        "title": _title(report),
        "rows": _rows(report),
        "findings": _findings(report),
        "baseline": _baseline_text(report.epochs),
        "latency_figure": Markup(_latency_svg(report)),
        "attempts_figure": Markup(_attempts_svg(report)) if report.attempts else "",
        "channels_figure": Markup(_channels_svg(report.layers)) if report.layers else "",
        "curves_figure": Markup(_curves_svg(report.curves)) if report.curves else "",
        "baseline_drawn": any(point.phase == "baseline" for point in report.curves),
        "kept": sum(layer.kept for layer in report.layers),
        "channels": sum(layer.channels for layer in report.layers),
        "frozen": sum(bool(layer.reason) for layer in report.layers),
        "torch_snippet": _torch_snippet(report),
        "onnx_snippet": _onnx_snippet(report),
        "machine": _facts(report.machine),
        "model_args": [(key, _fact("", value)) for key, value in report.model.args.items()],
    }


def _facts(values: Mapping[str, JsonValue]) -> list[tuple[str, str]]:
    """(label, text) of each entry: `_bytes` becomes a size, a list is joined."""
    return [
        (key.removesuffix("_bytes").replace("_", " "), _fact(key, value)) for key, value in values.items()
    ]


def _fact(key: str, value: JsonValue) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_fact("", item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_fact('', item)}" for name, item in value.items()) or "none"
    if key.endswith("_bytes") and not isinstance(value, str):
        return _bytes(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


_TORCH_SNIPPET = """\
import torch
import sparsekit

model = sparsekit.load("pruned/").eval()
images = torch.zeros(1, {channels}, {height}, {width})  # (pixels / 255 - mean) / std, see below
with torch.inference_mode():
    probabilities = model(images).softmax(dim=1)
"""

_ONNX_SNIPPET = """\
{imports}import numpy as np
import onnxruntime
from PIL import Image

class_names = {class_names}
mean = np.array({mean}, dtype=np.float32)
std = np.array({std}, dtype=np.float32)

image = Image.open("photo.jpg").convert("{mode}")
# Resize to cover {resize_width} x {resize_height}, then cut {width} x {height} out of the middle.
scale = max({resize_width} / image.width, {resize_height} / image.height)
size = (int(image.width * scale + 1e-6), int(image.height * scale + 1e-6))
image = image.resize(size, Image.Resampling.{resampling})
left, top = round((size[0] - {width}) / 2), round((size[1] - {height}) / 2)
image = image.crop((left, top, left + {width}, top + {height}))

pixels = np.asarray(image, dtype=np.float32).reshape({height}, {width}, {channels}) / 255
batch = ((pixels - mean) / std).transpose(2, 0, 1)[np.newaxis]{repeat}
session = onnxruntime.InferenceSession("pruned.onnx", providers=["CPUExecutionProvider"])
logits = session.run(None, {{session.get_inputs()[0].name: batch}})[0]
print(class_names[int(logits[0].argmax())])
"""

# Above this a list of names would bury the code; report.json holds them all.
_MOST_NAMES_IN_SNIPPET = 20
_RESAMPLING = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


def _torch_snippet(report: RunReport) -> str:
    channels, height, width = report.input_shape
    return _TORCH_SNIPPET.format(channels=channels, height=height, width=width)


def _onnx_snippet(report: RunReport) -> str:
    """Preprocessing as timm's for evaluation (resize, centre crop, normalise), in PIL and numpy."""
    channels, height, width = report.input_shape
    few = len(report.data.class_names) <= _MOST_NAMES_IN_SNIPPET
    batch = report.benchmark.batch
    known = report.interpolation.lower() in _RESAMPLING
    return _ONNX_SNIPPET.format(
        imports="" if few else "import json\nfrom pathlib import Path\n\n",
        class_names=repr(list(report.data.class_names))
        if few
        else 'json.loads(Path("report.json").read_text(encoding="utf-8"))["data"]["class_names"]',
        mean=list(report.mean),
        std=list(report.std),
        mode="L" if channels == 1 else "RGB",
        height=height,
        width=width,
        channels=channels,
        resize_height=math.floor(height / report.crop_pct),
        resize_width=math.floor(width / report.crop_pct),
        resampling=report.interpolation.upper() if known else "BICUBIC",
        repeat=f".repeat({batch}, axis=0)  # the file takes {batch} images at once" if batch > 1 else "",
    )


# ---------------------------------------------------------------------------------------------------- figures

# The page colours the figures: matplotlib draws with these stand-ins, each replaced by what CSS resolves,
# so that one SVG reads well on a light and on a dark page.
_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_DENSE, _PRUNED, _TRACK, _FROZEN = "#040404", "#050505", "#060606", "#070707"
_CSS = {
    _INK: "currentColor",
    _MUTED: "var(--muted)",
    _GRID: "var(--line)",
    _DENSE: "var(--dense)",
    _PRUNED: "var(--pruned)",
    _TRACK: "var(--track)",
    _FROZEN: "var(--frozen)",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sparsekit",
    "text.parse_math": False,
    "font.size": 12,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "grid.color": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_WIDTH_PT = 900.0


@contextmanager
def _drawing(height_pt: float) -> Iterator[Figure]:
    """A figure as wide as the page, in points; the settings last for the block only; no pyplot."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(_WIDTH_PT / 72, height_pt / 72))


def _svg(figure: Figure, name: str, label: str) -> str:
    """`figure` as an inline SVG that scales with the page; `name` keeps ids apart, `label` describes it."""
    from markupsafe import escape

    stream = StringIO()
    figure.savefig(stream, format="svg", transparent=True)
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'id="', f'id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    for stand_in, css in _CSS.items():
        text = text.replace(stand_in, css)
    view = re.search(r'viewBox="[^"]*"', text)
    box = view.group(0) if view else ""
    head = f'<svg {box} role="img" aria-label="{escape(label)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return head + text[text.index(">") + 1 :].strip()


def _shorten(text: str, limit: int) -> str:
    """At most `limit` characters: the middle goes, because names differ at their ends."""
    if len(text) <= limit:
        return text
    left = (limit - 1) // 2
    return f"{text[:left]}…{text[len(text) - (limit - 1 - left) :]}"


def _cut_off(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1].rstrip()}…"


def _latency_svg(report: RunReport) -> str:
    """Left: median latency with its 10th to 90th percentile. Right: the speed-up beside its null."""
    with _drawing(150) as figure:
        times, ratio = figure.add_axes((0.08, 0.3, 0.5, 0.56)), figure.add_axes((0.73, 0.3, 0.25, 0.56))
        for place, model, colour in ((1, report.dense, _DENSE), (0, report.pruned, _PRUNED)):
            latency = model.latency_ms
            times.barh(place, latency.median, height=0.6, color=colour)
            times.plot([latency.p10, latency.p90], [place, place], color=_INK, linewidth=1.5)
            ends = [latency.p10, latency.p90]
            times.plot(ends, [place, place], "|", color=_INK, markersize=10, markeredgewidth=1.5)
            right = max(latency.median, latency.p90)
            times.annotate(
                _milliseconds(latency.median), (right, place), (8, 0), textcoords="offset points", va="center"
            )
        longest = max(model.latency_ms.p90 for model in (report.dense, report.pruned))
        times.set(yticks=[0, 1], yticklabels=["pruned", "dense"], xlim=(0, 1.2 * longest), ylim=(-0.6, 1.6))
        times.set_xlabel("latency in ms: median, 10th to 90th percentile")
        for place, interval, colour in ((1, report.null, _DENSE), (0, report.speedup, _PRUNED)):
            ratio.plot([interval.low, interval.high], [place, place], color=colour, linewidth=5)
            ratio.plot(interval.value, place, "o", color=colour, markersize=9)
        ratio.axvline(1, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        ratio.set(yticks=[0, 1], yticklabels=["dense / pruned", "dense / dense"], ylim=(-0.6, 1.6))
        low, high = (
            min(1, report.speedup.low, report.null.low),
            max(1, report.speedup.high, report.null.high),
        )
        ratio.set_xlim(low - 0.1 * (high - low) - 0.02, high + 0.1 * (high - low) + 0.02)
        ratio.set_xlabel("ratio of latencies, 95 % interval")
        _plain_axes([times, ratio])
        return _svg(figure, "latency", "Latency of the dense and the pruned model")


def _attempts_svg(report: RunReport) -> str:
    """Validation accuracy over speed, or over MACs saved where no speed was asked for; dense first; the budget."""
    attempts = sorted(report.attempts, key=lambda attempt: -attempt.macs)
    dense, budget = attempts[0].accuracy + attempts[0].drop, report.asked["max_accuracy_drop"]
    timed = all(attempt.speedup is not None for attempt in attempts)
    xs = [attempt.speedup or report.dense.macs / attempt.macs for attempt in attempts]
    with _drawing(230) as figure:
        axes = figure.add_axes((0.075, 0.2, 0.905, 0.74))
        axes.axhline(dense - budget, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(
            [1.0, *xs], [dense, *(attempt.accuracy for attempt in attempts)], color=_GRID, linewidth=1.5
        )
        axes.plot(1.0, dense, "o", color=_DENSE, markersize=9)
        for x, attempt in zip(xs, attempts, strict=True):
            face = _PRUNED if attempt.taken else "none"
            axes.plot(
                x,
                attempt.accuracy,
                "o",
                color=_PRUNED,
                markerfacecolor=face,
                markersize=9,
                markeredgewidth=1.5,
            )
            axes.annotate(
                f"{attempt.number}",
                (x, attempt.accuracy),
                (8, 6),
                textcoords="offset points",
                color=_INK if attempt.taken else _MUTED,
            )
        axes.set_xlabel("measured speed-up" if timed else "MACs ratio")
        axes.margins(x=0.06, y=0.15)
        axes.grid(axis="y", linewidth=0.8)
        axes.tick_params(length=0, pad=6)
        axes.spines["left"].set_visible(False)
        return _svg(figure, "attempts", "Validation accuracy of the attempts over their speed")


def _plain_axes(axes: Iterable[Axes]) -> None:
    for one in axes:
        one.grid(axis="x", linewidth=0.8)
        one.set_axisbelow(True)
        one.tick_params(length=0, pad=6)
        one.spines["left"].set_visible(False)
        one.tick_params(axis="y", labelcolor=_INK)


def _channels_svg(layers: Sequence[LayerFigures]) -> str:
    """One bar per group: the fraction of its channels kept; the counts, or why it is frozen, beside it."""
    row_pt, edge_pt = 20.0, 26.0
    names = [_shorten(layer.name, 40) for layer in layers]
    height = row_pt * len(layers) + edge_pt
    # 6.6 pt is a generous width of a 11 pt character; SVG text is laid out by the browser, not here.
    left = (6.6 * max(map(len, names)) + 12) / _WIDTH_PT
    room = 0.36 if any(layer.reason for layer in layers) else 0.12
    with _drawing(height) as figure:
        axes = figure.add_axes((left, edge_pt / height, 1 - left - room, 1 - edge_pt / height))
        axes.barh(range(len(layers)), [1.0] * len(layers), height=0.62, color=_TRACK)
        shares = [layer.kept / layer.channels for layer in layers]
        colours = [_FROZEN if layer.reason else _PRUNED for layer in layers]
        axes.barh(range(len(layers)), shares, height=0.62, color=colours)
        for place, layer in enumerate(layers):
            text = f"{layer.kept:,} of {layer.channels:,}"
            if layer.reason:
                text = _cut_off(f"{text}  frozen: {layer.reason}", 57)
            colour = _MUTED if layer.reason else _INK
            axes.annotate(
                text,
                (1, place),
                (10, 0),
                textcoords="offset points",
                va="center",
                fontsize=11,
                color=colour,
                annotation_clip=False,
            )
        axes.set(xlim=(0, 1), ylim=(len(layers) - 0.5, -0.5), xticks=[0, 0.25, 0.5, 0.75, 1])
        axes.set_yticks(range(len(layers)), names, fontsize=11)
        _plain_axes([axes])
        axes.spines["bottom"].set_visible(False)
        return _svg(figure, "channels", "Fraction of the channels kept in each group")


@dataclass(frozen=True)
class _Span:
    """A phase on the axis of epochs: its points stand at start + 1, start + 2, ..."""

    phase: str
    start: int
    points: tuple[CurvePoint, ...]

    @property
    def end(self) -> int:
        return self.start + len(self.points)


def _timeline(curves: Sequence[CurvePoint]) -> tuple[list[_Span], _Span | None]:
    """The phases one after the other, and the baseline, a branch beside those that follow `dense`."""
    phases: dict[str, list[CurvePoint]] = {}
    for point in curves:
        phases.setdefault(point.phase, []).append(point)
    branch = phases.pop("baseline", None)
    spans: list[_Span] = []
    for phase, points in phases.items():
        spans.append(_Span(phase, spans[-1].end if spans else 0, tuple(points)))
    fork = next((span.end for span in spans if span.phase == "dense"), 0)
    return spans, _Span("baseline", fork, tuple(branch)) if branch else None


_PANELS = (("loss", "training loss"), ("accuracy", "validation accuracy"), ("zero_share", "zero share"))


def _curves_svg(curves: Sequence[CurvePoint]) -> str:
    """Loss, validation accuracy and zero share over the epochs of all phases, one panel each."""
    spans, branch = _timeline(curves)
    panels = [(name, title) for name, title in _PANELS if any(getattr(p, name) is not None for p in curves)]
    panel_pt, gap_pt, top_pt, bottom_pt = 150.0, 22.0, 34.0, 44.0
    height = len(panels) * (panel_pt + gap_pt) - gap_pt + top_pt + bottom_pt
    last = max([span.end for span in spans] + ([branch.end] if branch else []))
    with _drawing(height) as figure:
        for index, (name, title) in enumerate(panels):
            bottom = height - top_pt - panel_pt - index * (panel_pt + gap_pt)
            axes = figure.add_axes((0.075, bottom / height, 0.905, panel_pt / height))
            _panel(axes, name, spans, branch)
            # Room at the left even for a run of one epoch.
            axes.set_xlim(0.5, last + 0.5)
            axes.set_ylabel(title)
            axes.yaxis.set_label_coords(-0.055, 0.5)
            if index == 0:
                _name_phases(axes, spans, last)
            if index == len(panels) - 1:
                axes.set_xlabel("epoch")
            else:
                axes.set_xticklabels([])
        return _svg(figure, "curves", "Loss, validation accuracy and zero share over the epochs")


def _scale(axes: Axes, name: str, values: Sequence[float]) -> None:
    """Show what matters at the end of training: the first epochs from scratch would flatten all the rest."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = min(values), max(values)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    if name == "zero_share":
        axes.set_ylim(0, max(1.08 * high, 0.05))
    elif name == "accuracy":
        reach = max(0.01, 4 * (high - median(values)))
        axes.set_ylim(max(low, high - reach) - 0.06 * reach, high + 0.06 * reach)
    elif low > 0 and high > 20 * low:
        axes.set_yscale("log")
        # Plain numbers: the default labels are mathematics, which is switched off.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", which="minor", length=0)


def _panel(axes: Axes, name: str, spans: Sequence[_Span], branch: _Span | None) -> None:
    from matplotlib.ticker import MaxNLocator

    def line(parts: Sequence[_Span]) -> tuple[list[int], list[float]]:
        points = [(span.start + 1 + i, getattr(p, name)) for span in parts for i, p in enumerate(span.points)]
        return [x for x, _ in points], [math.nan if y is None else y for _, y in points]

    # A line through few points needs dots: one epoch alone would be invisible.
    marker = "o" if sum(len(span.points) for span in spans) <= 60 else ""
    if branch:
        before = [span for span in spans if span.end == branch.start][-1:]
        xs, ys = line([*before, branch])
        keep = len(branch.points) + bool(before)
        style: dict[str, Any] = {"color": _DENSE, "linestyle": (0, (5, 2)), "marker": marker, "markersize": 3}
        axes.plot(xs[-keep:], ys[-keep:], **style)
    axes.plot(*line(spans), color=_PRUNED, marker=marker, markersize=4)
    for span in spans[1:]:
        axes.axvline(span.start + 0.5, color=_MUTED, linewidth=1, linestyle=(0, (2, 3)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    _scale(
        axes, name, [y for y in [*line(spans)[1], *line([branch] if branch else [])[1]] if not math.isnan(y)]
    )
    axes.grid(axis="y", linewidth=0.8)
    axes.tick_params(length=0, pad=6)
    axes.spines["left"].set_visible(False)


def _name_phases(axes: Axes, spans: Sequence[_Span], last: int) -> None:
    for span in spans:
        narrow = len(span.points) / last < 0.013 * len(span.phase)
        axes.annotate(
            span.phase,
            ((span.start + span.end + 1) / 2, 1),
            (0, 6),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="left" if narrow else "center",
            rotation=25 if narrow else 0,
            color=_MUTED,
            annotation_clip=False,
        )
