"""Keep-masks and importance, both by the name of a channel group."""

from __future__ import annotations

from torch import Tensor

Masks = dict[str, Tensor]
