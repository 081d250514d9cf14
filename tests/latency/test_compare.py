"""The statistics are right on data whose answer is known; the measurement has the promised structure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsekit.errors import FileError, InputError
from sparsekit.export.onnx_file import export_onnx
from sparsekit.latency import compare as latency
from sparsekit.latency.compare import Interval, Latency, LatencyComparison, bootstrap_median, compare_latency
from sparsekit.machine import usable_cores


class _Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 4)

    def forward(self, image: Tensor, index: Tensor) -> Tensor:
        out: Tensor = self.table(index) + image.mean((2, 3))
        return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    for width in (4, 32):
        model = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3))
        export_onnx(model, folder / f"{width}.onnx", torch.randn(1, 3, 12, 12))
    export_onnx(model, folder / "open.onnx", torch.randn(1, 3, 12, 12), dynamic_batch=True)
    export_onnx(
        _Lookup(),
        folder / "two.onnx",
        (torch.randn(2, 4, 3, 3), torch.tensor([0, 2])),
        input_names=("a", "b"),
    )
    return folder


def test_interval_of_a_constant_is_a_point() -> None:
    assert bootstrap_median(np.full(17, 2.5)) == Interval(2.5, 2.5, 2.5)


def test_interval_covers_the_true_median_about_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    samples = generator.normal(2.0, 0.1, size=(300, 100))
    intervals = [bootstrap_median(sample, resamples=500, seed=1) for sample in samples]
    covered = np.mean([interval.low <= 2.0 <= interval.high for interval in intervals])
    assert 0.88 <= covered <= 0.99
    # The median of n normal values has the standard error sigma * sqrt(pi / (2 n)).
    expected_width = 2 * 1.96 * 0.1 * np.sqrt(np.pi / 200)
    assert np.mean([i.high - i.low for i in intervals]) == pytest.approx(expected_width, rel=0.2)


def test_disturbances_that_last_widen_the_interval() -> None:
    generator = np.random.default_rng(0)
    # Each draw stays for five rounds: there are a fifth as many independent values as rounds.
    lasting = np.repeat(generator.normal(1.0, 0.1, 40), 5)
    shuffled = generator.permutation(lasting)
    kept, mixed = bootstrap_median(lasting), bootstrap_median(shuffled)
    assert kept.value == mixed.value
    assert kept.high - kept.low > 1.4 * (mixed.high - mixed.low)


def test_interval_depends_on_the_seed_alone_and_follows_the_scale() -> None:
    values = np.random.default_rng(0).normal(1.0, 0.1, 43)
    once, again = bootstrap_median(values, seed=3), bootstrap_median(values, seed=3)
    assert once == again
    scaled = bootstrap_median(4 * values, seed=3)
    assert (scaled.value, scaled.low, scaled.high) == pytest.approx(
        (4 * once.value, 4 * once.low, 4 * once.high)
    )


def test_speedups_are_medians_of_ratios_within_rounds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With made-up times (weather that slows whole rounds) the true ratios come out exactly."""

    weather = np.random.default_rng(0)

    def made_up(runners: list[object], generator: np.random.Generator) -> np.ndarray:
        return weather.lognormal(0, 1) * np.array([3.0, 1.5, 3.0])

    monkeypatch.setattr(latency, "_time_round", made_up)
    found = compare_latency([folder / "32.onnx", folder / "4.onnx"], rounds=50)
    assert found.speedups == (Interval(2.0, 2.0, 2.0),)
    assert found.null == Interval(1.0, 1.0, 1.0)
    assert found.trustworthy
    assert found.reason == ""


@pytest.mark.parametrize(
    ("rounds", "sessions", "shares"), [(12, 4, [3, 3, 3, 3]), (10, 3, [4, 3, 3]), (10, 1, [10])]
)
def test_rounds_are_shared_out_among_sessions_of_their_own(
    rounds: int, sessions: int, shares: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def noted(runners: list[latency._Runner], generator: np.random.Generator) -> np.ndarray:
        seen.extend(id(runner.session) for runner in runners)
        return np.ones(len(runners))

    monkeypatch.setattr(latency, "_time_round", noted)
    found = compare_latency([folder / "32.onnx"], rounds=rounds, sessions=sessions)
    assert found.rounds == rounds
    counts = [seen.count(session) for session in dict.fromkeys(seen)]
    assert counts == [share for share in shares for _ in range(2)], "each lies in memory of its own"


@pytest.mark.parametrize("sessions", [0, 11])
def test_there_are_as_many_sessions_as_rounds_at_most(sessions: int, folder: Path) -> None:
    with pytest.raises(InputError, match="sessions must be between 1 and 10"):
        compare_latency([folder / "32.onnx"], rounds=10, sessions=sessions)


@pytest.mark.parametrize(
    ("null", "words"),
    [
        (Interval(1.0, 0.99, 1.01), ""),
        (Interval(1.008, 1.003, 1.012), ""),
        (Interval(1.0, 0.97, 1.03), "busy"),
        (Interval(1.03, 1.02, 1.04), "excludes 1"),
        (Interval(0.97, 0.96, 0.98), "excludes 1"),
    ],
)
def test_null_decides_whether_to_trust(null: Interval, words: str) -> None:
    reason = latency._distrust(null)
    assert words in reason
    assert bool(reason) == bool(words)


def test_comparison_has_the_promised_structure(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    paths = [folder / "32.onnx", folder / "4.onnx", folder / "open.onnx"]
    seen: list[tuple[int, int]] = []
    found = compare_latency(paths, rounds=12, warmup=2, progress=lambda *step: seen.append(step))
    assert [entry.path for entry in found.latencies] == [str(path) for path in paths]
    assert all(0 < entry.p10_ms <= entry.median_ms <= entry.p90_ms for entry in found.latencies)
    assert len(found.speedups) == 2
    assert all(0 < i.low <= i.value <= i.high for i in (*found.speedups, found.null))
    assert (found.threads, found.batch, found.rounds) == (1, 1, 12)
    assert found.trustworthy == (found.reason == "")
    assert seen == [(done, 12) for done in range(1, 13)]
    assert LatencyComparison.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found
    assert capfd.readouterr() == ("", "")


def test_one_file_open_batch_and_several_inputs(folder: Path) -> None:
    alone = compare_latency([folder / "open.onnx"], rounds=10, batch=3)
    assert (alone.batch, alone.speedups, len(alone.latencies)) == (3, (), 1)
    assert isinstance(alone.latencies[0], Latency)
    assert compare_latency([folder / "two.onnx"], rounds=10).batch == 2


def test_bound_runs_compute_the_same_as_plain_ones(folder: Path) -> None:
    session = latency.open_session(folder / "32.onnx")
    fed = latency._random_inputs(session, folder / "32.onnx", None, 0)
    runner = latency._prepare(session, fed, warmup=3)
    runner.measure_ms()
    np.testing.assert_array_equal(runner.binding.copy_outputs_to_cpu()[0], session.run(None, fed)[0])


def test_bad_files_and_counts(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good, garbage = folder / "4.onnx", tmp_path / "garbage.onnx"
    garbage.write_bytes(b"no ONNX file")
    with pytest.raises(FileError, match=r"garbage\.onnx"):
        compare_latency([good, garbage])
    with pytest.raises(FileError, match="does not exist"):
        compare_latency([good, tmp_path / "missing.onnx"])
    with pytest.raises(FileError, match=r"4\.onnx has the batch size 1 built in, got batch 8"):
        compare_latency([good], batch=8)
    with pytest.raises(FileError, match="different batch sizes"):
        compare_latency([good, folder / "two.onnx"])
    with pytest.raises(InputError, match="threads"):
        compare_latency([good], threads=usable_cores() + 1)
    with pytest.raises(InputError, match="at least one ONNX file"):
        compare_latency([])
    with pytest.raises(InputError, match="rounds"):
        compare_latency([good], rounds=3)
    with pytest.raises(InputError, match="batch"):
        compare_latency([good], batch=0)
    with pytest.raises(InputError, match="warmup"):
        compare_latency([good], warmup=-1)
    assert capfd.readouterr() == ("", "")
