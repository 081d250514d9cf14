"""Keep-masks and importance, both by the name of a channel group."""

from __future__ import annotations

from torch import Tensor

# Bool (n_channels,) of each group, True = keep.
Masks = dict[str, Tensor]
# Float (n_channels,) >= 0 of each group: the importance of each channel.
Scores = dict[str, Tensor]
