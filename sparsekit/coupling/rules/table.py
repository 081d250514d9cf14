"""Which rule each of torch's operators follows.

Some kinds: pointwise (labels of all operands meet), moving (labels move as values do), reductions and norms (what is
added up goes together or stays), contractions (a weight's columns meet what they read, its rows are new channels).
An operator without a rule fixes everything that enters it; the reason gives its name.
"""

from __future__ import annotations

import torch
from torch._ops import OpOverload

from sparsekit.coupling.rules.contractions import (
    convolution,
    deformable_convolution,
    linear_layer,
    matrix_product,
    standardised_convolution,
)
from sparsekit.coupling.rules.maps import (
    complex_parts,
    drawn_pooling,
    grid_making,
    per_map,
    position_pooling,
    region_pooling,
    sampling,
    transforming,
    unpooling,
)
from sparsekit.coupling.rules.meeting import unknown
from sparsekit.coupling.rules.movement import (
    concatenating,
    folding,
    halving,
    moving,
    padding,
    picking,
    rolling,
    shuffling,
    striding,
    unfolding,
)
from sparsekit.coupling.rules.norms import (
    batch_norm,
    group_norm,
    layer_norm,
    local_response_norm,
    response_norm,
    rms_norm,
    root_mean_square_norm,
    zero_counting_layer_norm,
)
from sparsekit.coupling.rules.placement import (
    gathering,
    index_writing,
    mask_writing,
    scattering,
    writing,
)
from sparsekit.coupling.rules.pointwise import pointwise
from sparsekit.coupling.rules.quantization import fake_quantising, observed_quantising
from sparsekit.coupling.rules.recurrence import packing, recurrent
from sparsekit.coupling.rules.reductions import adding_up, along_dim, distance, reducing, softmax_rule
from sparsekit.coupling.tracer import OperatorCall, Rule, Tracer


def rule_for(name: str, operator: OpOverload) -> Rule:
    """The rule of an operator; a name that ends in "_" is that of the operator in place."""
    rule = _RULES.get(name.rstrip("_"))
    if rule is None and torch.Tag.pointwise in operator.tags:
        return pointwise
    return rule or (moving if operator.is_view else unknown)


def apply_rule(tracer: Tracer, call: OperatorCall) -> None:
    """Note in `tracer` what is seen in one call, and what is known of its outputs."""
    rule = rule_for(call.name, call.operator)
    for tensor in call.tensors:
        tracer.settle(tensor)
    if not call.outputs:  # a look at a value: `item`, or an assertion
        return
    try:
        rule(tracer, call)
    except Exception:  # an unusual form of a known operator: it is safe to treat it as unknown
        unknown(tracer, call)


def _nothing(tracer: Tracer, call: OperatorCall) -> None:
    """A new tensor: it has sizes of its own."""


# The names of operators by the rule they follow. docs/reference/operators.md shows them.
KINDS: dict[Rule, str] = {
    pointwise: "hardswish hardsigmoid dropout native_dropout detach alias lift_fresh zeros_like ones_like empty_like "
    "full_like rand_like randn_like new_empty_strided feature_dropout prelu _prelu_kernel softplus fill copy "
    "clone _to_copy contiguous where masked_fill leaky_relu elu gelu silu mish clamp maximum minimum bernoulli "
    "hardtanh nan_to_num log_sigmoid_forward rsub zero addcmul addcdiv lerp pow complex polar _conj _conj_physical "
    "conj_physical resolve_conj resolve_neg rrelu_with_noise heaviside celu selu hypot logit",
    moving: "view _unsafe_view reshape _reshape_alias flip repeat repeat_interleave "
    "pixel_shuffle pixel_unshuffle rot90 tril triu slice select permute transpose t expand split "
    "split_with_sizes unbind unsqueeze squeeze unfold narrow diagonal movedim unsafe_split unsafe_split_with_sizes "
    "split_copy split_with_sizes_copy unsafe_chunk embedding",
    picking: "index index_select _unsafe_index",
    rolling: "roll",
    shuffling: "channel_shuffle native_channel_shuffle",
    halving: "glu",
    striding: "as_strided",
    padding: "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
    "replication_pad2d replication_pad3d",
    concatenating: "cat stack concat",
    unfolding: "im2col",
    folding: "col2im",
    per_map: "max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices mkldnn_max_pool2d max_pool3d "
    "max_pool3d_with_indices mkldnn_max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d _adaptive_avg_pool2d mkldnn_adaptive_avg_pool2d adaptive_avg_pool3d "
    "_adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d "
    "upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
    "_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_lanczos2d_aa",
    drawn_pooling: "fractional_max_pool2d fractional_max_pool3d",
    unpooling: "max_unpool2d max_unpool3d",
    sampling: "grid_sampler grid_sampler_2d grid_sampler_3d cudnn_grid_sampler _grid_sampler_2d_cpu_fallback",
    grid_making: "affine_grid_generator",
    region_pooling: "roi_align roi_pool",
    position_pooling: "ps_roi_align ps_roi_pool",
    transforming: "_fft_r2c _fft_c2r _fft_c2c",
    complex_parts: "view_as_real view_as_complex",
    gathering: "gather take_along_dim",
    scattering: "scatter scatter_add scatter_reduce",
    writing: "index_add index_copy index_fill index_reduce slice_scatter select_scatter",
    index_writing: "index_put _index_put_impl _unsafe_index_put",
    mask_writing: "masked_scatter",
    adding_up: "sum nansum norm linalg_vector_norm",
    reducing: "mean amax amin max min argmax argmin aminmax median nanmedian mode kthvalue var std var_mean std_mean "
    "logsumexp prod all any count_nonzero",
    softmax_rule: "_softmax _log_softmax _safe_softmax softmax log_softmax",
    along_dim: "cumsum cumprod cummax cummin logcumsumexp sort topk argsort",
    distance: "cdist _cdist_forward _euclidean_dist",
    batch_norm: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "miopen_batch_norm batch_norm",
    layer_norm: "native_layer_norm layer_norm",
    rms_norm: "_fused_rms_norm rms_norm",
    group_norm: "native_group_norm group_norm",
    local_response_norm: "local_response_norm",
    response_norm: "global_response_norm",
    root_mean_square_norm: "root_mean_square_norm",
    zero_counting_layer_norm: "zero_counting_layer_norm",
    matrix_product: "mm addmm bmm baddbmm",
    linear_layer: "linear",
    convolution: "convolution _convolution",
    deformable_convolution: "deform_conv2d",
    standardised_convolution: "standardised_convolution",
    recurrent: "recurrent_layer",
    packing: "_pack_padded_sequence _pad_packed_sequence",
    fake_quantising: "fake_quantize_per_tensor_affine_cachemask fake_quantize_per_channel_affine_cachemask "
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams _fake_quantize_learnable_per_tensor_affine "
    "_fake_quantize_learnable_per_channel_affine",
    observed_quantising: "_fused_moving_avg_obs_fq_helper",
    _nothing: "arange zeros ones empty full new_zeros new_ones new_empty new_full rand randn eye linspace "
    "scalar_tensor empty_strided empty_permuted",
}
_RULES: dict[str, Rule] = {name: rule for rule, names in KINDS.items() for name in names.split()}
# Functions and modules that are told as a whole, not operator by operator.
OURS = frozenset(
    (
        "local_response_norm",
        "global_response_norm",
        "root_mean_square_norm",
        "zero_counting_layer_norm",
        "standardised_convolution",
        "recurrent_layer",
    )
)
