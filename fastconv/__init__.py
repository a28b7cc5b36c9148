"""fastconv makes other people's vision models train faster without changing what they compute."""

import torch  # noqa: F401  (loaded first: the compiled libraries need its symbols)

from . import ops
from .ops import disabled, use_backend
from .patching import Report, patch, report, unpatch, verify
from .zoo import create_model, list_models

__version__ = "0.1.0"
__all__ = ["Report", "__version__", "create_model", "disabled", "list_models", "ops", "patch", "report", "unpatch", "use_backend", "verify"]
