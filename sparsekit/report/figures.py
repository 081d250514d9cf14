"""The figures of a report, as SVG. The page gives them their colours."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from statistics import median
from typing import TYPE_CHECKING, Any

from sparsekit.report import numbers
from sparsekit.report.schema import CurvePoint, LayerFigures, RunReport

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


_PANELS = (("loss", "training loss"), ("accuracy", "validation {measure}"), ("zero_share", "zero share"))


def latency_svg(report: RunReport) -> str:
    """Draw the latencies (left: median, 10th to 90th percentile) and the speed-up beside its null (right)."""
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
                numbers.milliseconds(latency.median),
                (right, place),
                (8, 0),
                textcoords="offset points",
                va="center",
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


def attempts_svg(report: RunReport) -> str:
    """Draw the validation accuracy of each attempt over its speed-up, from the dense model on, and the budget.

    Without a measured speed-up the horizontal axis is the MACs ratio.
    """
    timed = all(attempt.speedup is not None for attempt in report.attempts if not attempt.failure)
    made = sorted(
        (attempt.speedup or report.dense.macs / attempt.macs, attempt.accuracy, attempt)
        for attempt in report.attempts
        if attempt.accuracy is not None and attempt.macs is not None
    )
    dense = made[0][1] + made[0][2].drop
    budget = report.asked["max_accuracy_drop"]
    with _drawing(230) as figure:
        axes = figure.add_axes((0.075, 0.2, 0.905, 0.74))
        axes.axhline(dense - budget, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(
            [1.0, *(x for x, *_ in made)], [dense, *(y for _, y, _ in made)], color=_GRID, linewidth=1.5
        )
        axes.plot(1.0, dense, "o", color=_DENSE, markersize=9)
        for x, y, attempt in made:
            face = _PRUNED if attempt.taken else "none"
            axes.plot(
                x,
                y,
                "o",
                color=_PRUNED,
                markerfacecolor=face,
                markersize=9,
                markeredgewidth=1.5,
            )
            axes.annotate(
                f"{attempt.number}",
                (x, y),
                (8, 6),
                textcoords="offset points",
                color=_INK if attempt.taken else _MUTED,
            )
        axes.set_xlabel("measured speed-up" if timed else "MACs ratio")
        axes.margins(x=0.06, y=0.15)
        axes.grid(axis="y", linewidth=0.8)
        axes.tick_params(length=0, pad=6)
        axes.spines["left"].set_visible(False)
        return _svg(figure, "attempts", f"Validation {report.data.measure} of the attempts over their speed")


def channels_svg(layers: Sequence[LayerFigures]) -> str:
    """Draw one bar for each group: the fraction of its channels kept. Beside it: counts, or why it is frozen."""
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


def curves_svg(curves: Sequence[CurvePoint], measure: str = "accuracy") -> str:
    """Draw loss, validation accuracy and zero share over the epochs of all phases, one panel each."""
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
            # A run of one epoch needs room at the left too.
            axes.set_xlim(0.5, last + 0.5)
            axes.set_ylabel(title.format(measure=measure))
            axes.yaxis.set_label_coords(-0.055, 0.5)
            if index == 0:
                _name_phases(axes, spans, last)
            if index == len(panels) - 1:
                axes.set_xlabel("epoch")
            else:
                axes.set_xticklabels([])
        return _svg(figure, "curves", f"Loss, validation {measure} and zero share over the epochs")


@contextmanager
def _drawing(height_pt: float) -> Iterator[Figure]:
    """Yield a figure as wide as the page, without pyplot. The settings last while it is open."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(_WIDTH_PT / 72, height_pt / 72))


def _plain_axes(axes: Iterable[Axes]) -> None:
    for one in axes:
        one.grid(axis="x", linewidth=0.8)
        one.set_axisbelow(True)
        one.tick_params(length=0, pad=6)
        one.spines["left"].set_visible(False)
        one.tick_params(axis="y", labelcolor=_INK)


def _svg(figure: Figure, name: str, label: str) -> str:
    """Return `figure` as an inline SVG. `name` keeps its ids apart, `label` describes it to screen readers."""
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
    """Cut the middle out of a text of over `limit` characters, because names differ at their ends."""
    if len(text) <= limit:
        return text
    left = (limit - 1) // 2
    return f"{text[:left]}…{text[len(text) - (limit - 1 - left) :]}"


def _cut_off(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1].rstrip()}…"


@dataclass(frozen=True)
class _Span:
    """A phase on the axis of epochs. Its points stand at start + 1, start + 2, ..."""

    phase: str
    start: int
    points: tuple[CurvePoint, ...]

    @property
    def end(self) -> int:
        return self.start + len(self.points)


def _timeline(curves: Sequence[CurvePoint]) -> tuple[list[_Span], _Span | None]:
    """Place the phases one after the other; the baseline is a branch that starts where `dense` ends."""
    phases: dict[str, list[CurvePoint]] = {}
    for point in curves:
        phases.setdefault(point.phase, []).append(point)
    branch = phases.pop("baseline", None)
    spans: list[_Span] = []
    for phase, points in phases.items():
        spans.append(_Span(phase, spans[-1].end if spans else 0, tuple(points)))
    fork = next((span.end for span in spans if span.phase == "dense"), 0)
    return spans, _Span("baseline", fork, tuple(branch)) if branch else None


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


def _scale(axes: Axes, name: str, values: Sequence[float]) -> None:
    """Choose the range for the end of training: the first epochs would flatten the rest."""
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
