"""A recipe: what one run does, completely described."""

from __future__ import annotations

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from sparsekit.options import MixedPrecision
from sparsekit.recipe.consistency import contradictions
from sparsekit.recipe.specs import (
    BenchmarkSpec,
    CutSpec,
    DataSpec,
    DenseSpec,
    ExportSpec,
    FinetuneSpec,
    ModelSpec,
    Name,
    SparsifySpec,
    StrictSpec,
    TrainingSpec,
    UserPath,
)


class Recipe(StrictSpec):
    """One run, completely described. Build it with `load_recipe`, or from Python with these specs.

    Raises:
        pydantic.ValidationError: built from Python with a wrong value, or values that contradict each other.
    """

    seed: int = Field(
        default=0, ge=0, le=2**32 - 1, description="seed of weights, splits, order and augmentation"
    )
    output: UserPath | None = Field(
        default=None, description="run directory; null is runs/<name of the recipe file>"
    )
    device: Name = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps, ...")
    precision: MixedPrecision = Field(default="no", description="mixed precision")
    model: ModelSpec = Field(description="the architecture and its weights")
    data: DataSpec = Field(default=DataSpec(), description="the images")
    training: TrainingSpec = Field(default=TrainingSpec(), description="how every phase trains")
    dense: DenseSpec = Field(description="stage 1: the dense model")
    sparsify: SparsifySpec = Field(description="stage 2: train with the penalty")
    cut: CutSpec = Field(default=CutSpec(), description="stage 3: which channels go")
    finetune: FinetuneSpec = Field(description="stage 4: train the cut model")
    export: ExportSpec = Field(default=ExportSpec(), description="stage 5: the ONNX files")
    benchmark: BenchmarkSpec = Field(default=BenchmarkSpec(), description="stage 6: measure")

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Recipe:
        found = list(contradictions(self))
        if found:
            text = "; ".join(one.text for one in found)
            raise PydanticCustomError("contradiction", "{text}", {"text": text, "found": found})
        return self
