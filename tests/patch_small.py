"""A ConvNeXt of a few tiny blocks, patched and not, for tests of what `fastconv.patch` does apart from any family."""

import copy

import timm
import torch
from patch_helpers import randomise_
from torch import nn

import fastconv

OPS = ("depthwise_conv_norm", "residual_scale", "gelu_linear")


def make(blocks=2, drop_path=0.0, **kw):
    torch.manual_seed(0)
    kind = timm.models.convnext.ConvNeXtBlock
    return randomise_(nn.Sequential(*(kind(8, ls_init_value=0.5, drop_path=drop_path, **kw) for _ in range(blocks))))


def images(batch=2):
    return torch.randn(batch, 8, 7, 5, generator=torch.Generator().manual_seed(3))


def pair(**kw):
    plain = make(**kw)
    model = copy.deepcopy(plain)
    fastconv.patch(model)
    return model, plain


def backends(model):
    return {s.op: s.backend for s in fastconv.report(model).sites}
