"""One thread a test process: small tensors gain nothing from more, and waiting threads starve a busy machine."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
