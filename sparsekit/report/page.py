"""The report as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from sparsekit import files
from sparsekit.report import numbers
from sparsekit.report.figures import attempts_svg, channels_svg, curves_svg, latency_svg
from sparsekit.report.rows import baseline_text, findings, interval_range, interval_value, main_rows, title_of
from sparsekit.report.schema import RunReport


def write_html(report: RunReport, path: Path) -> None:
    """Write the report as one HTML file, atomically. The page loads no script, no font and nothing from the network."""
    import jinja2

    source = resources.files("sparsekit.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    # Class names, paths and recipe names come from outside: everything is escaped unless it is Markup.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "count": numbers.count,
        "fraction": numbers.fraction,
        "significant": numbers.significant,
        "interval_value": interval_value,
        "interval_range": interval_range,
        "milliseconds": numbers.milliseconds,
        "seconds": numbers.duration,
        "plural": numbers.plural,
    }
    files.write_text(path, environment.from_string(source).render(_page(report)) + "\n")


def _page(report: RunReport) -> dict[str, Any]:
    from markupsafe import Markup

    return {
        "report": report,
        "title": title_of(report),
        "rows": main_rows(report),
        "findings": findings(report),
        "baseline": baseline_text(report.epochs),
        "latency_figure": Markup(latency_svg(report)),
        "attempts_figure": Markup(attempts_svg(report)) if report.attempts else "",
        "channels_figure": Markup(channels_svg(report.layers)) if report.layers else "",
        "curves_figure": Markup(curves_svg(report.curves, report.data.measure)) if report.curves else "",
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
    """Return (label, text) of each entry. `_bytes` becomes a size, a list is joined."""
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
        return numbers.size(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


_TORCH_SNIPPET = """\
import torch
import sparsekit
{imports}
model = sparsekit.load("pruned/"{factory}).eval()
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
# More names than this would bury the code. report.json has them all.
_MOST_NAMES_IN_SNIPPET = 20
_RESAMPLING = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


def _torch_snippet(report: RunReport) -> str:
    channels, height, width = report.input_shape
    imports = factory = ""
    if report.model.own:
        module, _, function = report.model.name.partition(":")
        imports = f"from {module} import {function}\n"
        called = ", ".join(f"{key}={value!r}" for key, value in report.model.args.items())
        factory = f", factory=lambda: {function}({called})"
    return _TORCH_SNIPPET.format(
        channels=channels, height=height, width=width, imports=imports, factory=factory
    )


def _onnx_snippet(report: RunReport) -> str:
    """Fill in the code that preprocesses as timm does for evaluation: resize, centre crop, normalise."""
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
