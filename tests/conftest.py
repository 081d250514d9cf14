"""One thread a test process: small tensors gain nothing from more, and waiting threads starve a busy machine."""

from __future__ import annotations

import os
import tempfile

# Tests leave no latencies in the user's cache, and take none from it; all processes of a session share one.
os.environ.setdefault("PYTEST_SPARSEKIT_CACHE", tempfile.mkdtemp(prefix="sparsekit-tests-"))
os.environ["SPARSEKIT_CACHE"] = os.environ["PYTEST_SPARSEKIT_CACHE"]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded, and for the commands that tests start

import torch

torch.set_num_threads(1)
