"""The report as a terminal table and as one self-contained HTML page.

Every number in them is taken from the `RunReport`; nothing is measured here. Numbers are rounded to what the
measurement supports: a speed-up gets as many decimals as its interval is wide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from sparsekit import files, readable
from sparsekit.report import EpochCounts, IntervalFigures, ParityFigures, RunReport, VariantFigures
from sparsekit.report_figures import attempts_svg, channels_svg, curves_svg, latency_svg

if TYPE_CHECKING:
    from rich.console import RenderableType


def _decimals(interval: IntervalFigures) -> int:
    """Decimals that the width of the interval supports: one digit of its half-width, at most three."""
    half = (interval.high - interval.low) / 2
    return min(3, max(0, -math.floor(math.log10(half)))) if half > 0 else 2


def _value(interval: IntervalFigures) -> str:
    return f"{interval.value:.{_decimals(interval)}f}"


def _range(interval: IntervalFigures) -> str:
    digits = _decimals(interval)
    return f"{interval.low:.{digits}f} to {interval.high:.{digits}f}"


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
    size = readable.change(dense.onnx_bytes / pruned.onnx_bytes, "smaller", "larger")
    return [
        row("test accuracy", readable.fraction, "accuracy", f"{loss:+.4f}"),
        row("same, ONNX Runtime", readable.fraction, "accuracy_onnx", f"{loss_onnx:+.4f}"),
        row("params", readable.count, "params", readable.change(report.params_ratio, "fewer", "more")),
        row("MACs", readable.count, "macs", readable.change(report.macs_ratio, "fewer", "more")),
        row("ONNX size", readable.size, "onnx_bytes", size),
        row(
            "latency, median",
            lambda latency: readable.milliseconds(latency.median),
            "latency_ms",
            _faster(report),
        ),
    ]


def _faster(report: RunReport) -> str:
    if not report.benchmark.trustworthy:
        return "not trustworthy"
    if report.speedup.low <= 1 <= report.speedup.high:
        return "no difference"
    if report.speedup.value < 1:
        return readable.change(report.speedup.value, "faster", "slower")
    return f"{_value(report.speedup)}× faster"


def _speedup_text(report: RunReport) -> str:
    speedup, null, benchmark = report.speedup, report.null, report.benchmark
    measured = f"{_value(speedup)} (95 % interval {_range(speedup)})"
    itself = f"dense against itself: {_value(null)} ({_range(null)})"
    if not benchmark.trustworthy:
        reason = benchmark.reason or "the benchmark was too noisy"
        return f"not trustworthy: {reason}; measured {measured}, {itself}"
    return f"{measured}, batch {benchmark.batch}, {readable.plural(benchmark.threads, 'thread')}; {itself}"


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
        f"{readable.fraction(variant.accuracy_onnx)}, {readable.milliseconds(variant.latency_ms.median)}, "
        f"{readable.size(variant.onnx_bytes)}"
    )


def _attempt_rows(report: RunReport) -> list[tuple[str, str]]:
    rows = []
    for attempt in report.attempts:
        measured = "" if attempt.speedup is None else f", measured {readable.significant(attempt.speedup)}"
        verdict = "taken" if attempt.taken else "within the budget" if attempt.accepted else "too much"
        outcome = attempt.failure
        if attempt.accuracy is not None:
            outcome = (
                f"validation accuracy {readable.fraction(attempt.accuracy)}, {-attempt.drop:+.4f} against dense; "
                f"{verdict}"
            )
        rows.append((f"attempt {attempt.number}", f"{_asked_text(attempt.target)}{measured}: {outcome}"))
    return [*rows, *([("limited by", report.binds)] if report.binds else [])]


def _graph_rows(report: RunReport) -> list[tuple[str, str]]:
    if report.dense_graph is None or report.pruned_graph is None:
        return []
    texts = [
        f"{graph.blocked} of {readable.plural(graph.blocked + graph.plain, 'convolution')} in the blocked layout, "
        f"{readable.plural(graph.reorders, 'reorder')}, {graph.activations + graph.norms} not fused"
        for graph in (report.pruned_graph, report.dense_graph)
    ]
    return [("graph, pruned", texts[0]), *([("graph, dense", texts[1])] if texts[1] != texts[0] else [])]


def _parity_text(parity: ParityFigures) -> str:
    return (
        f"{readable.tiny(parity.max_rel)} of the largest logit ({readable.tiny(parity.max_abs)} absolute), "
        f"same class for {readable.fraction(parity.top1_agreement)} of the images"
    )


def _findings(report: RunReport) -> list[tuple[str, str]]:
    """(label, text): what stands below the figures of the two models."""
    sparse = report.sparse
    speed = (
        readable.significant(report.speed_efficiency, 2)
        if report.benchmark.trustworthy
        else "not trustworthy"
    )
    return [
        *([("asked for", _asked_text(report.asked))] if report.asked else []),
        *_attempt_rows(report),
        ("speed-up", _speedup_text(report)),
        *((f"pruned, {variant.precision}", _variant_text(report, variant)) for variant in report.variants),
        ("speed efficiency", f"{speed} (speed-up / MACs ratio of {readable.significant(report.macs_ratio)})"),
        ("near-zero channels", f"{sparse.near_zero_channels:,} of {sparse.channels:,}"),
        (
            "accuracy at the cut",
            f"{readable.fraction(sparse.accuracy_before_cut)} before, "
            f"{readable.fraction(sparse.accuracy_after_cut)} after",
        ),
        (
            "largest logit change",
            f"{readable.tiny(sparse.max_abs_logit_change)} (largest logit "
            f"{readable.significant(sparse.max_abs_logit)})",
        ),
        ("parity, pruned", _parity_text(report.parity)),
        ("parity, dense", _parity_text(report.dense_parity)),
        *_graph_rows(report),
        ("saved and reloaded", f"logits differ by {readable.tiny(report.round_trip_max_abs)}"),
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
    start = (
        f"after {readable.plural(epochs.dense, 'epoch')}"
        if epochs.dense
        else "as it was given, without training"
    )
    return f"taken {start}; the pruned model was trained for {readable.plural(extra, 'further epoch')}"


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
    return (
        f"{report.model.name}, {size}, run {report.recipe}, {readable.plural(report.data.test, 'test image')}"
    )


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
        "count": readable.count,
        "fraction": readable.fraction,
        "significant": readable.significant,
        "interval_value": _value,
        "interval_range": _range,
        "milliseconds": readable.milliseconds,
        "seconds": readable.duration,
        "plural": readable.plural,
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
        "latency_figure": Markup(latency_svg(report)),
        "attempts_figure": Markup(attempts_svg(report)) if report.attempts else "",
        "channels_figure": Markup(channels_svg(report.layers)) if report.layers else "",
        "curves_figure": Markup(curves_svg(report.curves)) if report.curves else "",
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
        return readable.size(value)
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
