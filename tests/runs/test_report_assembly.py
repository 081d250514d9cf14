"""What a report warns of."""

from __future__ import annotations

import re

import pytest

from sparsekit.runs.report_assembly import lost_accuracy


@pytest.mark.parametrize(
    ("accuracies", "told"),
    [
        (
            (0.875, 0.104, 0.104, 0.11),
            "The model after sparsify is right on 0.1040 .* guessing among 10 classes",
        ),
        ((0.11, 0.8, 0.8, 0.8), "The dense model is right on 0.1100 .* has not learned"),
        ((0.9, 0.88, 0.1, 0.1), "The model after the cut is right on 0.1000 .* cut.repair"),
        ((0.9, 0.88, 0.88, 0.09), "The pruned model is right on 0.0900 .* finetune.lr"),
        ((0.9, 0.7, 0.5, 0.45), "lost more than half of what the dense one knew: 0.4500 of 0.9000"),
        ((0.9, 0.3, 0.3, 0.88), ""),
        ((0.9, 0.9, 0.9, 0.9), ""),
    ],
)
def test_a_model_that_guesses_is_told_where_it_first_does(
    accuracies: tuple[float, float, float, float], told: str
) -> None:
    found = list(lost_accuracy(*accuracies, classes=10, images=1000))
    assert len(found) == bool(told)
    if told:
        assert re.search(told, found[0])


def test_few_images_cannot_tell_a_model_from_guessing() -> None:
    weak = (0.15, 0.15, 0.15, 0.15)
    assert list(lost_accuracy(*weak, classes=10, images=100))
    assert not list(lost_accuracy(*weak, classes=10, images=10_000))
