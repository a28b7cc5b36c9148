"""The fused ops and their autograd Functions. Each takes logical NHWC tensors; see the docstrings."""

from ._registry import Choice, check_environment, disabled, is_disabled, select, use_backend
from .depthwise_conv import DepthwiseConv, depthwise_conv
from .depthwise_conv_norm import DepthwiseConvNorm, depthwise_conv_norm
from .gelu_linear import GeluLinear, gelu_linear
from .global_response_norm import GlobalResponseNorm, global_response_norm
from .grouped_conv import GroupedConv, grouped_conv
from .residual_scale import ResidualScale, residual_scale
from .squeeze_excite import SqueezeExcite, squeeze_excite
from .window_attention import WindowAttention, window_attention

__all__ = [
    "Choice",
    "DepthwiseConv",
    "DepthwiseConvNorm",
    "GeluLinear",
    "GlobalResponseNorm",
    "GroupedConv",
    "ResidualScale",
    "SqueezeExcite",
    "WindowAttention",
    "depthwise_conv",
    "depthwise_conv_norm",
    "disabled",
    "gelu_linear",
    "global_response_norm",
    "grouped_conv",
    "is_disabled",
    "residual_scale",
    "select",
    "squeeze_excite",
    "use_backend",
    "window_attention",
]

check_environment()
