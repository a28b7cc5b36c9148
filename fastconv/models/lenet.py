"""LeNet-5.

LeCun, Bottou, Bengio, Haffner: Gradient-Based Learning Applied to Document Recognition, Proceedings of the IEEE 86(11), 1998.

The convolutional network in its first lasting form, CONV-POOL-CONV-POOL-FC-FC: 5x5 filters at stride 1, 2x2 subsampling at
stride 2, tanh between, for digits of 28x28 padded to 32x32.

                            params       MACs at 32     test error % (MNIST)
    as published            60,000                      0.95 (0.8 with distorted images)
    lenet5                  61,706          416,520

The published network differs in three layers that have gone out of use: subsampling scales and shifts its averages
(+ 44 parameters), C3 sees chosen subsets of S2's maps (- 900), and the output layer measures the distance to ten fixed
prototypes (- 850). Here, as in every later account, they are plain averages, a full convolution and a linear layer. Layers have
the paper's names.
"""

from __future__ import annotations

import torch
from torch import nn


class LeNet5(nn.Module):
    """Images (N, in_chans, 32, 32) to logits (N, num_classes)."""

    def __init__(self, *, in_chans: int = 1, num_classes: int = 10):
        super().__init__()
        self.c1 = nn.Conv2d(in_chans, 6, kernel_size=5)
        self.s2 = nn.AvgPool2d(2)
        self.c3 = nn.Conv2d(6, 16, kernel_size=5)
        self.s4 = nn.AvgPool2d(2)
        self.c5 = nn.Conv2d(16, 120, kernel_size=5)  # the whole of its 5x5 input: a linear layer
        self.f6 = nn.Linear(120, 84)
        self.output = nn.Linear(84, num_classes)
        self.act = nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.s2(self.act(self.c1(x)))
        x = self.s4(self.act(self.c3(x)))
        x = self.act(self.c5(x)).flatten(1)
        return self.output(self.act(self.f6(x)))


def lenet5(**kw) -> LeNet5:
    return LeNet5(**kw)
