"""Builds models by name: the bundled ones, and those of other installed libraries."""

from __future__ import annotations

import difflib
import fnmatch
import importlib

from torch import nn

from . import patching
from .models import MODELS

_LIBRARIES = {"timm": "timm", "torchvision": "torchvision", "hf": "transformers"}  # prefix -> package


def _library(prefix: str, name: str):
    """The module of a prefix that lists and builds models."""
    if prefix not in _LIBRARIES:
        raise ValueError(
            f"create_model: unknown prefix {prefix!r} in {name!r}; use one of {', '.join(p + ':' for p in _LIBRARIES)} or no prefix"
        )
    package = _LIBRARIES[prefix]
    try:
        return importlib.import_module("torchvision.models" if package == "torchvision" else package)
    except ImportError as error:
        raise ImportError(f"create_model: {name!r} needs {package}, which cannot be imported ({error}); pip install {package}") from error


def _hf_classifiers() -> dict[str, str]:
    """Hugging Face image classifiers: model type -> name of its config class."""
    auto = importlib.import_module("transformers.models.auto.configuration_auto")
    modeling = importlib.import_module("transformers.models.auto.modeling_auto")
    return {
        t: auto.CONFIG_MAPPING_NAMES[t] for t in modeling.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES if t in auto.CONFIG_MAPPING_NAMES
    }


def _names(prefix: str, pattern: str) -> list[str]:
    library = _library(prefix, f"{prefix}:{pattern}")
    if prefix == "timm":
        return library.list_models()
    if prefix == "torchvision":
        return library.list_models(module=library)
    classifiers = _hf_classifiers()
    return sorted({*classifiers, *classifiers.values()})


def _build_elsewhere(prefix: str, name: str, kw: dict) -> nn.Module:
    library = _library(prefix, f"{prefix}:{name}")
    names = _names(prefix, name)
    if name not in names:
        raise ValueError(_unknown(f"{prefix}:{name}", [f"{prefix}:{n}" for n in names]))
    if prefix == "timm":
        return library.create_model(name, **kw)
    if prefix == "torchvision":
        return library.get_model(name, **kw)
    if "num_classes" in kw:
        kw["num_labels"] = kw.pop("num_classes")
    config = library.AutoConfig.for_model(name, **kw) if name in _hf_classifiers() else getattr(library, name)(**kw)
    return library.AutoModelForImageClassification.from_config(config)


def _unknown(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3)
    hint = f"; did you mean {', '.join(close)}?" if close else "."
    return f"create_model: unknown model {name!r}{hint} fastconv.list_models(pattern) lists names; prefixes: timm:, torchvision:, hf:"


def list_models(pattern: str = "*") -> list[str]:
    """Names for `create_model` that match a shell pattern.

    Without a prefix the bundled models ("convnext_*"); with one the models of that library ("timm:convnext*",
    "torchvision:*", "hf:*"), which must be installed.
    """
    if ":" not in pattern:
        return fnmatch.filter(MODELS, pattern)
    prefix, inner = pattern.split(":", 1)
    return [f"{prefix}:{name}" for name in fnmatch.filter(_names(prefix, inner), inner)]


def create_model(name: str, fused: bool = True, **kw) -> nn.Module:
    """Build a model with random weights and, by default, swap the fused ops in.

    Args:
        name: a bundled model ("convnext_tiny"), or one of another installed library: "timm:<model>", "torchvision:<model>",
            "hf:<model type or config class>" ("hf:convnext", "hf:ConvNextConfig"). Nothing is downloaded unless `kw` asks
            that library to.
        fused: apply `fastconv.patch`; `fastconv.report(model)` then tells what was fused. The state_dict is the same
            either way.
        **kw: for the model's constructor (for "hf:", its config); `num_classes` works everywhere.

    Raises:
        ValueError: the name is unknown; the message lists close matches. ImportError: the library is not installed.
    """
    prefix, _, rest = name.rpartition(":") if ":" not in name else name.partition(":")
    if prefix:
        model = _build_elsewhere(prefix, rest, dict(kw))
    elif name in MODELS:
        model = MODELS[name].build(**kw)
    else:
        raise ValueError(_unknown(name, list(MODELS)))
    if fused:
        patching.patch(model)
    return model
