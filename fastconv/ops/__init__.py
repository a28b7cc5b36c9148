"""The fused ops and their autograd Functions. Each takes logical NHWC tensors; see the docstrings."""

from ._registry import Choice, check_environment, disabled, is_disabled, select, use_backend
from .depthwise_conv import DepthwiseConv, depthwise_conv
from .depthwise_conv_norm import DepthwiseConvNorm, depthwise_conv_norm
from .residual_scale import ResidualScale, residual_scale
from .squeeze_excite import SqueezeExcite, squeeze_excite

__all__ = [
    "Choice",
    "DepthwiseConv",
    "DepthwiseConvNorm",
    "ResidualScale",
    "SqueezeExcite",
    "depthwise_conv",
    "depthwise_conv_norm",
    "disabled",
    "is_disabled",
    "residual_scale",
    "select",
    "squeeze_excite",
    "use_backend",
]

check_environment()
