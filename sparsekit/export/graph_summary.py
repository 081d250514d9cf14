"""Count what ONNX Runtime makes of a graph: convolutions in its blocked layout, and operators left unfused."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

from sparsekit.export.session import open_session

__all__ = ["GraphSummary", "summarise_graph"]

_BLOCKED = "com.microsoft.nchwc"
_CONVOLUTIONS = ("Conv", "FusedConv", "ConvTranspose")
_REORDERS = ("ReorderInput", "ReorderOutput")
_NORMS = ("BatchNormalization",)
_ACTIVATIONS = (
    *(
        "Relu",
        "LeakyRelu",
        "PRelu",
        "Clip",
        "Sigmoid",
        "HardSigmoid",
        "HardSwish",
        "Elu",
        "Selu",
        "Celu",
        "Mish",
    ),
    *("Gelu", "FastGelu", "QuickGelu", "BiasGelu", "Softplus", "Softsign", "Tanh", "Erf"),
)


@dataclass(frozen=True)
class GraphSummary:
    """Numbers of operators in a graph as ONNX Runtime runs it on the CPU.

    operators: all. blocked, plain: convolutions inside and outside the blocked layout (NCHWc). reorders: operators that
    bring maps into that layout and back. activations, norms: those not fused into the operator before them.
    """

    operators: int
    blocked: int
    plain: int
    reorders: int
    activations: int
    norms: int


def summarise_graph(path: str | os.PathLike[str]) -> GraphSummary:
    """Optimise the ONNX file as a session does, and count its operators. Raises FileError if it cannot be loaded."""
    with TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        open_session(path, optimised=optimised)
        nodes = onnx.load(optimised, load_external_data=False).graph.node
    counts = Counter((node.domain == _BLOCKED, node.op_type) for node in nodes)

    def number(kinds: tuple[str, ...], *layouts: bool) -> int:
        return sum(counts[layout, kind] for layout in layouts for kind in kinds)

    return GraphSummary(
        operators=len(nodes),
        blocked=number(_CONVOLUTIONS, True),
        plain=number(_CONVOLUTIONS, False),
        reorders=number(_REORDERS, True, False),
        activations=number(_ACTIVATIONS, True, False),
        norms=number(_NORMS, True, False),
    )
