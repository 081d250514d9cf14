"""The report: closed schema, exact round trip, honest numbers, a page that needs nothing."""

from __future__ import annotations

import html
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from pydantic import ValidationError
from rich.console import Console

from sparsekit.errors import FileError
from sparsekit.report import figures, numbers, page, rows
from sparsekit.report.page import write_html
from sparsekit.report.schema import CurvePoint, IntervalFigures, RunReport, read_report, write_json
from sparsekit.report.terminal import terminal_table

LAYERS: list[dict[str, Any]] = [
    {"name": "conv1", "channels": 64, "kept": 64, "reason": "coupled to the input of every block"},
    {"name": "layer1.0.conv1", "channels": 64, "kept": 16, "reason": ""},
    {"name": "layer4.1.conv1", "channels": 512, "kept": 208, "reason": ""},
]


def _curves(**phases: int) -> list[dict[str, Any]]:
    return [
        {
            "phase": phase,
            "epoch": epoch,
            "loss": 2.0 / epoch,
            "accuracy": 1 - 0.5 / epoch,
            "lr": 0.1,
            "seconds": 2.0,
        }
        | ({"zero_share": 0.5, "strength": 1e-3} if phase == "sparsify" else {})
        for phase, count in phases.items()
        for epoch in range(1, count + 1)
    ]


def _figures(**changes: Any) -> dict[str, Any]:
    latency = {"median": 1.8234567, "p10": 1.79, "p90": 1.91}
    return {
        "accuracy": 0.9825,
        "params": 11_172_042,
        "macs": 37_068_000,
        "onnx_bytes": 44_700_000,
        "latency_ms": latency,
        "accuracy_onnx": 0.9825,
    } | changes


def make_values(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "recipe": "quickstart",
        "model": {"name": "resnet18", "args": {"drop_rate": 0.1}},
        "data": {
            "description": "handwritten digits",
            "class_names": [str(digit) for digit in range(10)],
            "train": 1197,
            "validation": 200,
            "test": 400,
        },
        "input_shape": [3, 32, 32],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "dense": _figures(),
        "sparse": {
            "accuracy_before_cut": 0.9775,
            "accuracy_after_cut": 0.9775,
            "max_abs_logit_change": 3.8147e-06,
            "max_abs_logit": 12.345,
            "near_zero_channels": 2304,
            "channels": 4800,
        },
        "pruned": _figures(
            accuracy=0.98,
            params=3_456_789,
            macs=12_000_000,
            onnx_bytes=13_900_000,
            latency_ms={"median": 0.7891, "p10": 0.77, "p90": 0.85},
            accuracy_onnx=0.98,
        ),
        "speedup": {"value": 2.3141592, "low": 2.2512345, "high": 2.3834567},
        "null": {"value": 1.00123, "low": 0.9954, "high": 1.0061},
        "parity": {"max_abs": 8.1e-06, "max_rel": 6.3e-07, "top1_agreement": 1.0},
        "dense_parity": {"max_abs": 9.2e-06, "max_rel": 7.1e-07, "top1_agreement": 1.0},
        "benchmark": {"batch": 1, "threads": 1, "rounds": 100, "trustworthy": True, "reason": ""},
        "round_trip_max_abs": 0.0,
        "machine": {
            "cpu": "A processor",
            "simd": ["avx2", "avx512f"],
            "memory_bytes": 16_000_000_000,
            "gpu": None,
        },
        "seed": 0,
        "versions": {"sparsekit": "0.1.0", "torch": "2.6.0"},
        "epochs": {"dense": 10, "baseline": 12, "sparsify": 8, "finetune": 4},
        "stages": [{"name": "dense", "seconds": 61.25, "status": "done"}],
        "layers": LAYERS,
        "curves": _curves(dense=10, baseline=12, sparsify=8, finetune=4),
        "warnings": [],
    }
    return values | changes


def make_report(**changes: Any) -> RunReport:
    return RunReport.model_validate(make_values(**changes))


def doubtful() -> dict[str, Any]:
    return {
        "batch": 1,
        "threads": 2,
        "rounds": 100,
        "trustworthy": False,
        "reason": "dense differs from its copy",
    }


def table_text(report: RunReport, width: int = 80, directory: Path | None = None) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(terminal_table(report, directory))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def page_text(report: RunReport, folder: Path) -> str:
    write_html(report, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Collects the elements of a page and checks that they nest."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def names(self) -> set[str]:
        return {tag for tag, _ in self.seen}

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.seen if attribute in attrs]


# ---- JSON


def test_json_round_trip_is_exact(tmp_path: Path) -> None:
    report = make_report(warnings=["a warning"])
    write_json(report, tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == report


def test_json_holds_the_promised_keys(tmp_path: Path) -> None:
    write_json(make_report(), tmp_path / "report.json")
    value = json.loads((tmp_path / "report.json").read_text())
    figures = {"accuracy", "params", "macs", "onnx_bytes", "latency_ms", "accuracy_onnx"}
    promised = {
        "dense": figures,
        "pruned": figures,
        "sparse": {
            "accuracy_before_cut",
            "accuracy_after_cut",
            "max_abs_logit_change",
            "near_zero_channels",
            "channels",
        },
        "speedup": {"value", "low", "high"},
        "null": {"value", "low", "high"},
        "parity": {"max_abs", "max_rel", "top1_agreement"},
    }
    for key, inner in promised.items():
        assert inner <= value[key].keys(), key
    assert value["dense"]["latency_ms"].keys() == {"median", "p10", "p90"}
    assert value["stages"][0].keys() == {"name", "seconds", "status"}
    top = {
        "macs_ratio",
        "params_ratio",
        "speed_efficiency",
        "machine",
        "seed",
        "versions",
        "layers",
        "curves",
    }
    assert top <= value.keys()
    assert value["macs_ratio"] == 37_068_000 / 12_000_000
    assert value["params_ratio"] == 11_172_042 / 3_456_789
    assert value["speed_efficiency"] == pytest.approx(2.3141592 / 3.089, rel=1e-12)


def test_ratios_in_the_file_are_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(make_report(), path)
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"macs_ratio": 99.0, "speed_efficiency": 99.0}))
    assert read_report(path) == make_report()
    with pytest.raises(ValidationError):
        make_report(macs_ratio=99.0)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "must be JSON"),
        (b"", "must be JSON"),
        (b"\xff\xfe\x00", "must be JSON"),
        (b"[1, 2]", "must hold a JSON object, got list"),
        (b"{}", "recipe: field required"),
        (json.dumps(make_values(unknown=1)).encode(), "unknown: extra inputs"),
        (json.dumps(make_values(round_trip_max_abs=math.nan)).encode(), "round_trip_max_abs"),
        (json.dumps(make_values(dense=_figures(accuracy=98.3))).encode(), "dense.accuracy"),
        (json.dumps(make_values(schema_version=2)).encode(), "schema_version"),
    ],
)
def test_damaged_file_is_told_plainly(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(FileError) as caught:
        read_report(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="does not exist"):
        read_report(tmp_path / "report.json")
    with pytest.raises(FileError, match="cannot be read"):
        read_report(tmp_path)


def test_report_is_closed_and_immutable() -> None:
    report = make_report()
    with pytest.raises(ValidationError):
        report.seed = 1  # type: ignore[misc]
    for wrong in ({"dense": _figures(macs=0)}, {"mean": [math.inf]}, {"input_shape": [1, 3, 32, 32]}):
        with pytest.raises(ValidationError):
            make_report(**wrong)


def test_an_infinite_validation_loss_becomes_a_gap() -> None:
    point = _curves(dense=1)[0] | {"validation_loss": math.inf}
    assert make_report(curves=[point]).curves[0].validation_loss is None
    with pytest.raises(ValidationError):
        make_report(curves=[point | {"loss": math.nan}])


def test_curve_points_take_the_metrics_of_training() -> None:
    from dataclasses import asdict, fields

    from sparsekit.training.display import EpochMetrics

    metrics = EpochMetrics(
        phase="dense",
        epoch=1,
        loss=1.0,
        accuracy=0.5,
        validation_loss=1.2,
        train_accuracy=None,
        lr=0.1,
        seconds=2.0,
        zero_share=None,
        strength=None,
    )
    assert {field.name for field in fields(metrics)} == CurvePoint.model_fields.keys()
    assert make_report(curves=[asdict(metrics)]).curves[0].validation_loss == 1.2


# ---- numbers


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (9.996, "10.0"), (1234.5, "1,230"), (0.08347, "0.0835"), (99.96, "100"), (1.8234567, "1.82")],
)
def test_three_significant_digits(value: float, expected: str) -> None:
    assert numbers.significant(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(999, "999"), (9_999, "9,999"), (37_068_000, "37.1 M"), (999_999, "1.00 M"), (4_089_184_256, "4.09 G")],
)
def test_counts(value: int, expected: str) -> None:
    assert numbers.count(value) == expected


@pytest.mark.parametrize(
    ("value", "low", "high", "shown", "interval"),
    [
        (2.3141592, 2.25, 2.38, "2.31", "2.25 to 2.38"),
        (2.3141592, 2.1, 2.5, "2.3", "2.1 to 2.5"),
        (1.00123, 0.9954, 1.0061, "1.001", "0.995 to 1.006"),
        (31.4, 10.0, 60.0, "31", "10 to 60"),
        (2.0, 2.0, 2.0, "2.00", "2.00 to 2.00"),
    ],
)
def test_speedup_has_the_digits_of_its_interval(
    value: float, low: float, high: float, shown: str, interval: str
) -> None:
    figures = IntervalFigures(value=value, low=low, high=high)
    assert (rows.interval_value(figures), rows.interval_range(figures)) == (shown, interval)


# ---- terminal table


def test_table_shows_the_figures_in_80_columns() -> None:
    text = table_text(make_report(), directory=Path("runs/quickstart"))
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    for shown in (
        "0.9825 │ 0.9800 │ -0.0025",
        "11.2 M │ 3.46 M │ 3.23× fewer",
        "37.1 M │ 12.0 M │ 3.09× fewer",
        "44.7 MB │ 13.9 MB │ 3.22× smaller",
        "1.82 ms │ 0.789 ms │ 2.31× faster",
        "2.31 (95 % interval 2.25 to 2.38), batch 1, 1 thread",
        "0.75 (speed-up / MACs ratio of 3.09)",
        "0.9775 before, 0.9775 after",
        "3.8e-06 (largest logit 12.3)",
        "6.3e-07 of the largest logit",
        "trained as long in total as the pruned model",
        "runs/quickstart/",
    ):
        assert shown in flat, shown
    assert "2.314" not in text


def test_untrustworthy_benchmark_does_not_brag(tmp_path: Path) -> None:
    report = make_report(benchmark=doubtful())
    flat = " ".join(table_text(report).split())
    assert "not trustworthy: dense differs from its copy" in flat
    assert "faster" not in flat
    page = page_text(report, tmp_path)
    assert 'class="card doubtful"' in page
    assert 'class="card main"' not in page
    assert "× faster" not in page


def test_a_worse_model_is_not_praised() -> None:
    slower = {"value": 0.8, "low": 0.79, "high": 0.81}
    flat = " ".join(table_text(make_report(speedup=slower, pruned=_figures(onnx_bytes=50_000_000))).split())
    assert "1.25× slower" in flat
    assert "1.12× larger" in flat
    assert "the same" in flat
    level = {"value": 1.01, "low": 0.98, "high": 1.03}
    assert "no difference" in table_text(make_report(speedup=level))


def test_table_takes_brackets_literally() -> None:
    report = make_report(recipe="[red]", warnings=["[/] is not [bold]markup"])
    text = table_text(report, 100)
    assert "run [red]" in text
    assert "[/] is not [bold]markup" in text


@pytest.mark.parametrize(
    ("dense", "baseline", "expected"),
    [
        (10, 12, "trained as long in total as the pruned model (dense 10 + 12 epochs; pruned 10 + 12)"),
        (10, 5, "shorter than the pruned model (dense 10 + 5 epochs; pruned 10 + 12)"),
        (1, 0, "taken after 1 epoch; the pruned model was trained for 12 further epochs"),
        (0, 0, "taken as it was given, without training"),
    ],
)
def test_baseline_is_explained(dense: int, baseline: int, expected: str, tmp_path: Path) -> None:
    report = make_report(epochs={"dense": dense, "baseline": baseline, "sparsify": 8, "finetune": 4})
    assert expected in " ".join(table_text(report, 200).split())
    assert expected in page_text(report, tmp_path)


# ---- page


def test_page_is_well_formed_and_needs_nothing(tmp_path: Path) -> None:
    page = page_text(make_report(), tmp_path)
    elements = Elements(page)
    assert not {"script", "link", "img", "iframe", "object", "image"} & elements.names()
    assert "src" not in {name for _, attrs in elements.seen for name in attrs}
    for target in elements.values("href") + elements.values("xlink:href"):
        assert target.startswith("#")
    assert not re.search(r"@import|@font-face|url\((?!#)", page)
    assert len([tag for tag, _ in elements.seen if tag == "svg"]) == 3


def test_ids_are_unique_and_references_resolve(tmp_path: Path) -> None:
    page = page_text(make_report(), tmp_path)
    ids = Elements(page).values("id")
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)


def test_figures_take_their_colours_from_the_page(tmp_path: Path) -> None:
    page = page_text(make_report(), tmp_path)
    for figure in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r"\"#[^\"]*\"|url\(#[^)]*\)", "", figure))
        assert "var(--" in figure
    assert page.count("prefers-color-scheme: dark") == 1


def test_text_from_outside_is_escaped_everywhere(tmp_path: Path) -> None:
    attack = "<script>alert('x')</script>\"&$a_b$"
    values = make_values()
    report = make_report(
        recipe=attack,
        model={"name": attack, "args": {attack: [attack]}},
        data=values["data"] | {"description": attack, "class_names": [attack, "b"]},
        benchmark=doubtful() | {"reason": attack},
        machine={attack: {attack: attack}},
        versions={attack: attack},
        stages=[{"name": attack, "seconds": 1.0, "status": attack}],
        layers=[{"name": attack, "channels": 8, "kept": 8, "reason": attack}],
        curves=[{"phase": attack, "epoch": 1, "loss": 1.0, "lr": 0.1, "seconds": 1.0}],
        interpolation=attack,
        warnings=[attack],
    )
    page = page_text(report, tmp_path)
    assert "script" not in Elements(page).names()
    assert "<script" not in page
    # The dollar signs stand: nothing was read as mathematics.
    assert html.unescape(page).count("$a_b$") >= 12


def test_page_is_reproducible_and_leaves_matplotlib_alone(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    first = page_text(make_report(), tmp_path)
    assert page_text(make_report(), tmp_path) == first
    assert dict(matplotlib.rcParams) == before


ATTEMPTS: dict[str, Any] = {
    "asked": {"max_accuracy_drop": 0.01},
    "binds": "cut.target.max_accuracy_drop",
    "attempts": [
        {
            "number": number,
            "target": {"speedup": speed},
            "speedup": speed * 1.004,
            "macs": round(37_068_000 / speed),
            "accuracy": accuracy,
            "drop": 0.98 - accuracy,
            "accepted": accuracy >= 0.97,
            "taken": number == 2,
        }
        for number, speed, accuracy in ((1, 2.0, 0.955), (2, 1.41, 0.9725))
    ],
}


def test_attempts_are_listed_and_drawn(tmp_path: Path) -> None:
    report = make_report(**ATTEMPTS)
    text = " ".join(table_text(report).split())
    for shown in (
        "asked for at most 0.01 of validation accuracy lost",
        "attempt 1 a speed-up of 2, measured 2.01: validation accuracy 0.9550, -0.0250 against dense; too much",
        "attempt 2 a speed-up of 1.41, measured 1.42: validation accuracy 0.9725, -0.0075 against dense; taken",
        "limited by cut.target.max_accuracy_drop",
    ):
        assert shown in text, shown
    page = page_text(report, tmp_path)
    Elements(page)
    assert "<h2>Attempts</h2>" in page
    assert "MACs ratio</text>" not in page
    shares = [one | {"speedup": None} for one in ATTEMPTS["attempts"]]
    assert "MACs ratio</text>" in page_text(make_report(**ATTEMPTS | {"attempts": shares}), tmp_path)


def test_page_without_training_or_groups(tmp_path: Path) -> None:
    page = page_text(make_report(layers=[], curves=[]), tmp_path)
    Elements(page)
    assert "<h2>Training</h2>" not in page
    assert "<h2>Channels kept" not in page


def test_every_layer_is_named_with_its_reason(tmp_path: Path) -> None:
    layers = [
        {"name": f"stages.{i}.conv", "channels": 64 + i, "kept": 32, "reason": "" if i % 5 else f"reason {i}"}
        for i in range(60)
    ]
    page = page_text(make_report(layers=layers), tmp_path)
    figure = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)[1]
    for i, layer in enumerate(layers):
        assert f">{layer['name']}<" in figure
        reason = "" if i % 5 else f"  frozen: reason {i}"
        assert f">32 of {64 + i}{reason}<" in re.sub(r"<text[^>]*>", ">", figure)


def test_one_epoch_is_drawn(tmp_path: Path) -> None:
    page = page_text(make_report(curves=_curves(sparsify=1)), tmp_path)
    assert "zero share</text>" in page


def test_timeline_runs_the_baseline_beside_the_later_phases() -> None:
    report = make_report()
    spans, branch = figures._timeline(report.curves)
    assert [(span.phase, span.start, span.end) for span in spans] == [
        ("dense", 0, 10),
        ("sparsify", 10, 18),
        ("finetune", 18, 22),
    ]
    assert branch is not None
    assert (branch.start, branch.end) == (10, 22)
    spans, branch = figures._timeline(make_report(curves=_curves(finetune=3)).curves)
    assert branch is None
    assert spans[0].start == 0


def test_machine_facts_are_readable(tmp_path: Path) -> None:
    page = page_text(make_report(), tmp_path)
    for shown in ("16.0 GB", "avx2, avx512f", ">unknown<", "<th>drop_rate</th>"):
        assert shown in page
    assert "memory_bytes" not in page


@pytest.mark.parametrize("limit", [1, 5, 6, 40])
def test_shortened_names_fit(limit: int) -> None:
    name = "stages.3.blocks.17.attention.projection.weight"
    short = figures._shorten(name, limit)
    assert len(short) == limit
    assert figures._shorten(short, limit) == short


# ---- snippets


@pytest.mark.parametrize("count", [2, 30])
@pytest.mark.parametrize("batch", [1, 4])
def test_onnx_snippet_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    count: int,
    batch: int,
) -> None:
    names = [f"class '{i}'" for i in range(count)]
    data = make_values()["data"] | {"class_names": names}
    report = make_report(data=data, benchmark=make_values()["benchmark"] | {"batch": batch}, crop_pct=0.875)
    write_json(report, tmp_path / "report.json")
    _save_constant_model(tmp_path / "pruned.onnx", batch, np.eye(count, dtype=np.float32)[1])
    Image.effect_noise((50, 40), 80).convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(page._onnx_snippet(report), "snippet", "exec"), {})
    assert capsys.readouterr().out == "class '1'\n"


def _save_constant_model(path: Path, batch: int, logits: np.ndarray) -> None:
    """A model of (batch, 3, 32, 32) whose logits are `logits` whatever the input."""
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, 32, 32])
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, len(logits)])
    constants = [
        onnx.numpy_helper.from_array(logits, "bias"),
        onnx.numpy_helper.from_array(np.float32(0), "zero"),
    ]
    nodes = [
        helper.make_node("ReduceMean", ["input"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("ReduceMean", ["mean"], ["one"], axes=[1], keepdims=1),
        helper.make_node("Mul", ["one", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "bias"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "constant", [image], [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(path))


@pytest.mark.parametrize("size", [(50, 40), (333, 217), (17, 90)])
@pytest.mark.parametrize(("channels", "crop_pct"), [(3, 0.875), (3, 1.0), (1, 0.95)])
def test_onnx_snippet_prepares_images_like_the_evaluation(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    channels: int,
    crop_pct: float,
) -> None:
    from timm.data import create_transform

    image = Image.effect_noise(size, 80).convert("L" if channels == 1 else "RGB")
    image.save(tmp_path / "photo.png")
    mean, std = [0.4] * channels, [0.2] * channels
    expected = create_transform(
        (channels, 32, 32), mean=mean, std=std, interpolation="bilinear", crop_pct=crop_pct
    )(image)
    report = make_report(
        input_shape=[channels, 32, 32], mean=mean, std=std, interpolation="bilinear", crop_pct=crop_pct
    )
    snippet = page._onnx_snippet(report).replace("photo.jpg", "photo.png")
    scope: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    exec(snippet[: snippet.index("session =")], scope)
    np.testing.assert_allclose(scope["batch"][0], expected.numpy(), atol=1e-5)


def test_torch_snippet_is_python() -> None:
    snippet = page._torch_snippet(make_report())
    compile(snippet, "snippet", "exec")
    assert 'sparsekit.load("pruned/")' in snippet
    assert "torch.zeros(1, 3, 32, 32)" in snippet
