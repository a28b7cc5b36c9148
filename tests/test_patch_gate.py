"""csatv2's blocks: a gate of their own, resized to the map, between the MLP and the residual sum."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from patch_contract import V2, SingleProcessContract
from patch_helpers import assert_agree, randomise_, step
from patch_small import images
from torch import nn

import fastconv

csatv2 = importlib.import_module("timm.models.csatv2")  # timm.models.csatv2 is the function
pytestmark = pytest.mark.usefixtures("one_thread")


def gated_block(kind, drop_path=0.0, stride=2):
    """A block of csatv2 with a small gate: its own normalises single channels, whose gradients are rounding errors."""
    block = kind(8, drop_path, ls_init_value=0.5)
    block.attn = nn.Sequential(nn.Conv2d(8, 1, 3, stride, padding=1, bias=False), nn.Sigmoid())
    return block


class TestGated(SingleProcessContract):
    blocks = 2
    ops = V2

    def make(self, drop_path=0.0):
        return nn.Sequential(nn.Conv2d(3, 8, 4, 4), *(gated_block(csatv2.Block, drop_path) for _ in range(self.blocks)))


class GateVariant(csatv2.Block):
    def forward(self, x):
        shortcut = x
        x = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        x = self.pwconv2(self.grn(self.act(self.pwconv1(x)))).permute(0, 3, 1, 2)
        return shortcut + self.drop_path(self.ls(self.gated(x, self.attn(x))))


@pytest.mark.parametrize(
    ("gated", "reason"),
    [
        (lambda _, x, gate: F.interpolate(gate, size=x.shape[2:], mode="bicubic") * x, ""),
        (lambda _, x, gate: x * F.interpolate(gate, scale_factor=1, mode="bilinear"), "is used twice"),
        (lambda _, x, gate: x * F.interpolate(gate, size=x.shape[2:], mode="bilinear", antialias=True), "is used twice"),
        (lambda _, x, gate: x * F.interpolate(gate, size=x.shape[-2:], mode="bilinear"), "is used twice"),
        (lambda _, x, gate: x + F.interpolate(gate, size=x.shape[2:], mode="bilinear"), "does not know"),
        (lambda _, x, gate: x * x * F.interpolate(gate, size=x.shape[2:], mode="bilinear"), "is used twice"),
    ],
)
def test_what_a_gate_computes_is_read(gated, reason, monkeypatch):
    monkeypatch.setattr(GateVariant, "gated", gated, raising=False)
    monkeypatch.setattr(csatv2, "Block", GateVariant)
    torch.manual_seed(0)
    plain = randomise_(nn.Sequential(gated_block(GateVariant, stride=1 if reason else 2)))
    model = copy.deepcopy(plain)
    report = fastconv.patch(model)
    assert all(reason in s.reason for s in report.sites) if reason else not report.declined
    assert bool(report.fused) == (not reason)
    assert_agree(step(model, images()), step(plain, images()))
