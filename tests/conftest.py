"""One thread a test process: small tensors gain nothing from more, and waiting threads starve a busy machine."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded, and for the commands that tests start

import torch

torch.set_num_threads(1)
