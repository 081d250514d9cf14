"""The judge of every step: images kept apart, and how far a model's outputs on them are from the dense model's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparsekit.errors import ModelError
from sparsekit.evaluation import copied, evaluating
from sparsekit.options import Outputs
from sparsekit.repair.divergence import Divergence, compared, confidence, divergence, look_like_values
from sparsekit.repair.replay import Recording, Stations, batches_of
from sparsekit.structure.groups import ChannelGroups

# What the recordings of a model may take.
_MOST_BYTES = 256 * 2**20
# Images that the curves are measured on, where memory allows.
_MOST_RECORDED = 64
_BATCH = 16
_STAGES = 5
# Of the way to weights that were fitted.
_SHARES = (1.0, 0.75, 0.5, 0.25)


class HeldOut:
    """Images kept apart, with the outputs of the dense model for them.

    `inputs` have the images along their first dimension, on the model's device. What each part of the model gave is
    recorded, at its `stations`, for the first `recorded` of them, or as many as fit in 256 MB. `kind` says what outputs
    of two dimensions are.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: ChannelGroups,
        inputs: tuple[Tensor, ...],
        *,
        recorded: int = _MOST_RECORDED,
        kind: Outputs = "classes",
    ) -> None:
        self._inputs, self.kind = inputs, kind
        self._dense = [outputs_of(model, batch, kind) for batch in batches_of(inputs, _BATCH)]
        if not self._dense[0] or not all(bool(t.isfinite().all()) for one in self._dense for t in one):
            raise ModelError(
                f"{type(model).__name__} gives no finite floating-point outputs for the images, so no cut can be "
                "judged by them; give a model that returns logits, not decisions"
            )
        first = next(batches_of(inputs, _BATCH))
        self.stations = Stations.of(model, groups, tuple(x[:1] for x in first))
        self._recorded = recorded
        self._recordings = self._record(model)
        # What the dense model gives for the recorded images.
        self._targets = [one.outputs for one in self._recordings]

    def _record(self, model: nn.Module) -> list[Recording]:
        recordings: list[Recording] = []
        used = 0
        for batch in (
            batches_of(tuple(x[: self._recorded] for x in self._inputs), _BATCH) if self._recorded else ()
        ):
            recording = Recording(model, self.stations, batch, self.kind)
            if recordings and used + recording.n_bytes > _MOST_BYTES:
                break
            used += recording.n_bytes
            recordings.append(recording)
        return recordings

    def record_(self, model: nn.Module) -> None:
        """Record another model of the same modules in the dense one's place; `of_change` still compares with that."""
        self._recordings = []
        self._recordings = self._record(model)

    @property
    def n_images(self) -> int:
        """How many images are kept apart."""
        return len(self._inputs[0])

    @property
    def stages(self) -> tuple[str, ...]:
        """Up to five modules spread over the second half of the network, whose outputs may be compared too."""
        names = self.stations.names[:-1]
        half = names[len(names) // 2 :]
        step = max(len(half) // _STAGES, 1)
        return tuple(half[::-1][::step][:_STAGES][::-1])

    @property
    def look_like_values(self) -> bool:
        """Whether outputs that count as scores of classes are probably something else."""
        return look_like_values(self._dense[0])

    @property
    def confidence(self) -> float:
        """How sure the dense model is of its answers: its largest probability, on average; NaN without classes."""
        found = [confidence(outputs) * len(outputs[0]) for outputs in self._dense]
        return sum(found) / self.n_images

    def forget(self) -> None:
        """Give back the memory of the recordings; changes cannot be asked for any more."""
        self._recordings, self._targets = [], []

    def of(self, model: nn.Module) -> Divergence:
        """Compare a model with the dense one, on all images kept apart."""
        ours = [outputs_of(model, batch, self.kind) for batch in batches_of(self._inputs, _BATCH)]
        return _weighted([(divergence(d, o), len(d[0])) for d, o in zip(self._dense, ours, strict=True)])

    def of_recorded(self, model: nn.Module) -> Divergence:
        """Compare a model with the dense one, on the images that `of_change` looks at."""
        found = [
            (divergence(target, outputs_of(model, one.inputs, self.kind)), len(one.inputs[0]))
            for target, one in zip(self._targets, self._recordings, strict=True)
        ]
        return _weighted(found)

    def nearest_between(self, start: nn.Module, end: nn.Module) -> tuple[nn.Module, Divergence]:
        """Return the model on the way from `start` to `end`, at a quarter, half, three or all of it, that is nearest.

        Weights fitted to few images go too far in directions that only these images show; what lies between is often
        nearer on others (Wortsman et al., "Robust fine-tuning of zero-shot models", 2022). A bias that `start` does not
        have is zero there.
        """
        found = ((model, self.of(model)) for model in (_between(start, end, share) for share in _SHARES))
        return min(found, key=lambda one: one[1].kl)  # of a generator: two models at a time, not four

    def of_change(self, model: nn.Module, tensors: Iterable[str]) -> Divergence:
        """Compare the recorded model, of which only `tensors` were changed, with the dense one, on recorded images."""
        first = self.stations.first_of(tensors)
        found = [
            (divergence(target, one.outputs_from(model, first)), len(one.inputs[0]))
            for target, one in zip(self._targets, self._recordings, strict=True)
        ]
        return _weighted(found)


def _between(start: nn.Module, end: nn.Module, share: float) -> nn.Module:
    """A model with weights at this share of the way."""
    between, before = copied(end), dict(start.named_parameters())
    with torch.no_grad():
        for name, ours in between.named_parameters():
            if ours.is_floating_point():
                theirs = before[name].to(ours) if name in before else torch.zeros_like(ours)
                ours.copy_(theirs.lerp(ours, share))
    return between


def outputs_of(model: nn.Module, inputs: tuple[Tensor, ...], kind: Outputs = "classes") -> list[Tensor]:
    """Return the outputs of a model that are compared, in eval mode."""
    with evaluating(model):
        return compared(model(*inputs), kind)


def _weighted(parts: list[tuple[Divergence, int]]) -> Divergence:
    n = sum(count for _, count in parts)
    return Divergence(
        sum(one.kl * count for one, count in parts) / n,
        sum(one.agreement * count for one, count in parts) / n,
    )
