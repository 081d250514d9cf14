"""Every choice that stands as a word in a recipe or an argument, once."""

from __future__ import annotations

from typing import Literal

Penalty = Literal["group_lasso", "l1", "scale_l1", "sparse_group_lasso", "group_mcp"]
# What an automatic strength learns from.
LearnedImportance = Literal["taylor", "magnitude"]
# How a recipe ranks the channels that an automatic strength takes to zero: also by measured loss curves.
TrainingImportance = Literal["taylor", "magnitude", "curves"]
# What importance can be computed by at a cut.
Importance = Literal[
    "magnitude", "group_magnitude", "bn_scale", "lamp", "fpgm", "taylor", "hessian", "random"
]
# How the channels of a finished model are ordered: one after the other, or by the path of the LASSO.
FinishedImportance = Literal["greedy", "lasso"]
# In a recipe "lasso" is for a finished model; there "magnitude", the default, leaves the order to the repair.
CutImportance = Literal[Importance, "lasso"]
MaskMethod = Literal["auto", "zeros", "threshold", "gap", "budget"]
# In multiples of how many channels of a layer are kept; "auto" is the step of the latency staircase.
RoundTo = int | Literal["auto"]
# Which whole residual blocks are groups: none, those with layer scales, and "all" those with an identity shortcut.
Blocks = bool | Literal["all"]
# What an output of two dimensions is: scores of classes, or other numbers, such as an embedding or a regression.
Outputs = Literal["classes", "values"]
Quantity = Literal["macs", "params", "channels", "latency"]
Provider = Literal["cpu", "cuda", "tensorrt", "openvino", "coreml", "directml"]
Precision = Literal["int8", "fp16"]
MixedPrecision = Literal["no", "bf16", "fp16"]
Schedule = Literal["cosine", "linear", "constant"]
WeighBy = Literal["size", "macs", "latency"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
