"""A small model around the gates that a test gives it. It loads where fastconv is not installed."""

import timm
from torch import nn


class Stack(nn.Module):
    """Convolutions with a gate after each, and drop path around them, on maps of other sizes than the gates' channels."""

    def __init__(self, gates, channels, drop_path=0.0):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=4)
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, groups=channels) for _ in gates)
        self.gates = nn.ModuleList(gates)
        self.drop_path = timm.layers.DropPath(drop_path)

    def forward(self, x):
        x = self.stem(x)
        for conv, gate in zip(self.convs, self.gates):
            x = x + self.drop_path(gate(conv(x)))
        return x.mean((2, 3))
