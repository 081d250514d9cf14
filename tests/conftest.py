"""One thread a test process: small tensors gain nothing from more, and waiting threads starve a busy machine."""

from __future__ import annotations

import copy
import functools
import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

# Tests leave no latencies in the user's cache, and take none from it; all processes of a session share one.
os.environ.setdefault("PYTEST_SPARSEKIT_CACHE", tempfile.mkdtemp(prefix="sparsekit-tests-"))
os.environ["SPARSEKIT_CACHE"] = os.environ["PYTEST_SPARSEKIT_CACHE"]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded, and for the commands that tests start

import pytest
import torch
from filelock import FileLock

torch.set_num_threads(1)

# Modules and thousands of tests are objects that stay: the garbage collector need not look at them while they are made,
# nor ever again. It took 3 of the 12 s that collecting the tests takes, in each process.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def operators_read_once() -> Iterator[None]:
    """For each export torch reads its table of ONNX operators anew, a third of the time that a small model takes."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        read = functools.cache(ONNXRegistry.from_torchlib)
    except (ImportError, AttributeError):  # it is torch's own affair, and may go
        yield
        return

    def from_torchlib(*args: Any, **kwargs: Any) -> ONNXRegistry:
        registry = copy.copy(read(*args, **kwargs))
        # An export may add to its table.
        registry.functions = {operator: list(entries) for operator, entries in registry.functions.items()}
        return registry

    with mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib)):
        yield


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """A folder that `make` fills once, whichever test process comes first; for tests that only read it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def made(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made
