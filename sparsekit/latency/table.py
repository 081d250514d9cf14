"""The latency table: times of operators on this machine, kept on disk so that each is measured once."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
from filelock import FileLock
from platformdirs import user_cache_path

from sparsekit.errors import RunError
from sparsekit.files import write_json
from sparsekit.latency.operators import Operator, time_operators
from sparsekit.machine import describe_machine

__all__ = ["LatencyTable", "step_width"]

_FORMAT = 1
_LOCK_SECONDS = 10
# Channels between two multiples of a step gain nothing. Without steps they gain in proportion, some over half.
_FLAT = 0.35
_STEPS = (32, 16, 8, 4)
# Channel counts that tell steps of 4, 8, 16 and 32 apart, for a convolution and for a matrix product.
_CONV_WIDTHS = (64, 63, 60, 56, 52, 48, 44, 40, 36, 32)
_PRODUCT_WIDTHS = (256, 254, 252, 248, 244, 240, 236, 232, 228, 224, 192)


class LatencyTable:
    """Milliseconds of operators on this machine. An operator is measured when it is first asked for.

    The table is a file in the folder `cache`, by default $SPARSEKIT_CACHE, else `sparsekit` in the user's cache folder.
    Its name is a fingerprint of all that the times depend on: processor, vector instructions, cores, version of ONNX
    Runtime, threads. So each machine has a file of its own. If the file is damaged or cannot be written, a warning says
    so, and what is needed is measured.
    """

    def __init__(self, *, threads: int = 1, cache: Path | None = None) -> None:
        machine = describe_machine()
        self.machine = {key: machine[key] for key in ("cpu", "physical_cores", "logical_cores", "simd")} | {
            "onnxruntime": onnxruntime.__version__,
            "threads": threads,
        }
        self.threads = threads
        text = json.dumps(self.machine, sort_keys=True)
        self.path = (
            cache or _cache_folder()
        ) / f"latency-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        self._ms = self._read()

    def ms(
        self, operators: Sequence[Operator], *, progress: Callable[[int, int], None] | None = None
    ) -> list[float]:
        """Return the milliseconds of each operator. Unknown ones are measured together and added to the file."""
        missing = list({o.key: o for o in operators if o.key not in self._ms}.values())
        if missing:
            measured = time_operators(missing, threads=self.threads, progress=progress)
            self._ms |= {operator.key: ms for operator, ms in zip(missing, measured, strict=True)}
            self._write()
        return [self._ms[operator.key] for operator in operators]

    def conv_step(self) -> int:
        """Measure the step of convolutions, in channels: 16 where ONNX Runtime has AVX-512, 1 without a staircase."""
        probes = [Operator((1, c, 28, 28), (c, c, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1)) for c in _CONV_WIDTHS]
        return step_width(dict(zip(_CONV_WIDTHS, self.ms(probes), strict=True)))

    def product_step(self) -> int:
        """Measure the step of matrix products, in channels."""
        probes = [Operator((196, c), (c, c)) for c in _PRODUCT_WIDTHS]
        return step_width(dict(zip(_PRODUCT_WIDTHS, self.ms(probes), strict=True)))

    def _read(self) -> dict[str, float]:
        """Read the file. If it cannot be used, warn and return nothing."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if (found["format"], found["machine"]) != (_FORMAT, self.machine):
                raise ValueError("it is of another machine, version or format")
            return {str(key): float(ms) for key, ms in found["ms"].items() if 0 < float(ms) < float("inf")}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(
                f"the latency table {self.path} is left out ({type(error).__name__}: {error}): measuring anew",
                stacklevel=3,
            )
            return {}

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_suffix(".lock"), timeout=_LOCK_SECONDS):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self._ms = self._read() | self._ms  # another process may have measured as well
                content: dict[str, Any] = {"format": _FORMAT, "machine": self.machine, "ms": self._ms}
                write_json(self.path, content)
        except (OSError, RunError, NotImplementedError) as error:  # a Timeout is an OSError
            warnings.warn(
                f"the latency table cannot be kept in {self.path.parent} ({error}): the next run measures again; "
                "set SPARSEKIT_CACHE to a folder that can be written",
                stacklevel=3,
            )


def step_width(ms: Mapping[int, float]) -> int:
    """Return the step of a latency staircase, in channels, from times in ms at some channel counts; 1 if there is none.

    It is the largest step for which no count between two multiples gains more than 35 % of what the lower multiple
    gains.
    """
    for step in _STEPS:
        gains = []
        for count, time in ms.items():
            above, below = -(-count // step) * step, count // step * step
            if above != below and above in ms and below in ms and ms[above] > ms[below]:
                gains.append((ms[above] - time) / (ms[above] - ms[below]))
        if gains and max(gains) < _FLAT:
            return step
    return 1


def _cache_folder() -> Path:
    named = os.environ.get("SPARSEKIT_CACHE")
    return Path(named).expanduser() if named else user_cache_path("sparsekit")
