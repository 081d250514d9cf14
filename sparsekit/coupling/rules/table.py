"""Which rule each of torch's operators follows.

Kinds: pointwise (labels of all operands meet), moving (labels move as values do), reductions and norms (what is
added up goes together or stays), contractions (a weight's columns meet what they read, its rows are new channels).
An operator without a rule fixes everything that enters it; the reason gives its name.
"""

from __future__ import annotations

import torch

from sparsekit.coupling.rules.contractions import (
    convolution,
    linear_layer,
    matrix_product,
    standardised_convolution,
)
from sparsekit.coupling.rules.meeting import unknown
from sparsekit.coupling.rules.movement import (
    concatenating,
    folding,
    moving,
    padding,
    per_map,
    striding,
    unfolding,
)
from sparsekit.coupling.rules.norms import (
    batch_norm,
    group_norm,
    layer_norm,
    response_norm,
    rms_norm,
    root_mean_square_norm,
)
from sparsekit.coupling.rules.pointwise import pointwise
from sparsekit.coupling.rules.reductions import along_dim, reducing, softmax_rule
from sparsekit.coupling.tracer import OperatorCall, Rule, Tracer


def apply_rule(tracer: Tracer, call: OperatorCall) -> None:
    """Note in `tracer` what is seen in one call, and what is known of its outputs."""
    name = call.name.rstrip("_") if call.name.endswith("_") else call.name
    rule = _RULES.get(name)
    if rule is None and torch.Tag.pointwise in call.operator.tags:
        rule = pointwise
    if rule is None and call.operator.is_view:
        rule = moving
    for tensor in call.tensors:
        tracer.settle(tensor)
    if not call.outputs:  # a look at a value: `item`, or an assertion
        return
    try:
        (rule or unknown)(tracer, call)
    except Exception:  # an unusual form of a known operator: it is safe to treat it as unknown
        unknown(tracer, call)


def _nothing(tracer: Tracer, call: OperatorCall) -> None:
    """The result has sizes of its own."""


_KINDS: dict[Rule, str] = {
    pointwise: "hardswish hardsigmoid dropout native_dropout detach alias lift_fresh zeros_like ones_like empty_like "
    "full_like rand_like randn_like new_empty_strided feature_dropout prelu _prelu_kernel softplus fill copy "
    "clone _to_copy contiguous where masked_fill leaky_relu elu gelu silu mish clamp maximum minimum bernoulli "
    "hardtanh nan_to_num log_sigmoid_forward rsub zero addcmul addcdiv lerp pow",
    moving: "view _unsafe_view reshape _reshape_alias roll flip repeat index index_select repeat_interleave "
    "pixel_shuffle pixel_unshuffle channel_shuffle rot90 tril triu slice select permute transpose t expand split "
    "split_with_sizes unbind unsqueeze squeeze unfold narrow diagonal movedim unsafe_split unsafe_split_with_sizes "
    "split_copy split_with_sizes_copy unsafe_chunk native_channel_shuffle embedding",
    padding: "pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d",
    concatenating: "cat stack concat",
    unfolding: "im2col",
    folding: "col2im",
    per_map: "max_pool2d_with_indices max_pool2d avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d "
    "adaptive_max_pool2d avg_pool1d max_pool1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d "
    "_upsample_bicubic2d_aa _upsample_bilinear2d_aa upsample_nearest1d avg_pool3d max_pool3d_with_indices "
    "mkldnn_max_pool2d upsample_linear1d _upsample_nearest_exact2d",
    reducing: "mean sum amax amin max min argmax argmin norm linalg_vector_norm var std var_mean logsumexp prod "
    "all any",
    softmax_rule: "_softmax _log_softmax _safe_softmax softmax",
    along_dim: "cumsum sort topk argsort cumprod",
    batch_norm: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "miopen_batch_norm batch_norm",
    layer_norm: "native_layer_norm layer_norm",
    rms_norm: "_fused_rms_norm rms_norm",
    group_norm: "native_group_norm group_norm",
    response_norm: "global_response_norm",
    root_mean_square_norm: "root_mean_square_norm",
    matrix_product: "mm addmm bmm baddbmm",
    linear_layer: "linear",
    convolution: "convolution _convolution",
    standardised_convolution: "standardised_convolution",
    striding: "as_strided",
    unknown: "view_as_real view_as_complex",
    _nothing: "arange zeros ones empty full new_zeros new_ones new_empty new_full rand randn eye linspace "
    "scalar_tensor empty_strided empty_permuted",
}
_RULES: dict[str, Rule] = {name: rule for rule, names in _KINDS.items() for name in names.split()}
