"""Bundled architectures in plain PyTorch, one file a family, and what is published about each."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from torch import nn


class Spec(NamedTuple):
    """One bundled model: the function `name` in the file `module`, parameters (millions), GMACs an image at `resolution` (of a
    pretraining those of its own forward, three quarters masked), and the ops that it gains from."""

    name: str
    module: str
    family: str
    params: float
    gmacs: float
    resolution: int
    ops: tuple[str, ...]

    def build(self, **kw) -> nn.Module:
        """The model with random weights. Its file is imported here: `import fastconv` loads no architecture."""
        return getattr(importlib.import_module(f".{self.module}", __name__), self.name)(**kw)


MODELS: dict[str, Spec] = {}


def _family(module: str, family: str, ops: tuple[str, ...], **models: tuple[float, float, int]) -> None:
    """Add models of one file: name=(parameters in millions, GMACs, resolution)."""
    MODELS.update({name: Spec(name, module, family, *published, ops) for name, published in models.items()})


_CONVNEXT = ("depthwise_conv_norm", "residual_scale", "gelu_linear")
_GATED, _GROUPED = ("squeeze_excite",), ("grouped_conv",)
_GROUPED_GATED = _GATED + _GROUPED
_UNSCALED = ("depthwise_conv_norm", "gelu_linear")  # without layer scale a block's tail is a plain sum
_family(
    "convnext",
    "ConvNeXt",
    _CONVNEXT,
    convnext_tiny=(28.59, 4.46, 224),
    convnext_small=(50.22, 8.68, 224),
    convnext_base=(88.59, 15.35, 224),
    convnext_large=(197.77, 34.36, 224),
    convnext_xlarge=(350.20, 60.92, 224),
)
_family(
    "convnext",
    "ConvNeXt isotropic",
    _UNSCALED,
    convnext_isotropic_small=(22.31, 4.29, 224),
    convnext_isotropic_base=(87.08, 16.90, 224),
)
_family("convnext", "ConvNeXt isotropic", _CONVNEXT, convnext_isotropic_large=(305.94, 59.70, 224))
_family(
    "convnextv2",
    "ConvNeXt V2",
    ("depthwise_conv_norm", "global_response_norm"),
    convnextv2_atto=(3.71, 0.55, 224),
    convnextv2_femto=(5.23, 0.78, 224),
    convnextv2_pico=(9.07, 1.37, 224),
    convnextv2_nano=(15.62, 2.45, 224),
    convnextv2_tiny=(28.64, 4.46, 224),
    convnextv2_base=(88.72, 15.35, 224),
    convnextv2_large=(197.96, 34.36, 224),
    convnextv2_huge=(660.29, 114.92, 224),
)
_family(
    "swin",
    "Swin",
    ("gelu_linear", "window_attention"),
    swin_tiny_patch4_window7_224=(28.29, 4.49, 224),
    swin_small_patch4_window7_224=(49.61, 8.74, 224),
    swin_base_patch4_window7_224=(87.77, 15.43, 224),
    swin_large_patch4_window7_224=(196.53, 34.48, 224),
)
_family(
    "swin_v2",
    "Swin V2",
    ("gelu_linear", "window_attention"),
    swinv2_tiny_window8_256=(28.35, 5.94, 256),
    swinv2_small_window8_256=(49.73, 11.55, 256),
    swinv2_base_window8_256=(87.92, 20.33, 256),
    swinv2_large_window12_192=(196.74, 26.10, 192),
)
_family(
    "vit",
    "ViT",
    ("gelu_linear",),
    vit_tiny_patch16_224=(5.72, 1.25, 224),
    vit_small_patch16_224=(22.05, 4.60, 224),
    vit_base_patch16_224=(86.57, 17.56, 224),
    vit_large_patch16_224=(304.33, 61.55, 224),
    vit_huge_patch14_224=(632.05, 167.30, 224),
)
_family("vit", "DeiT", ("gelu_linear",), deit_base_distilled_patch16_224=(87.34, 17.66, 224))
_family(
    "mae",
    "MAE",
    ("gelu_linear",),
    mae_vit_base_patch16=(111.91, 9.78, 224),
    mae_vit_large_patch16=(329.54, 20.76, 224),
    mae_vit_huge_patch14=(657.07, 48.56, 224),
)
_family("beit", "BEiT", ("gelu_linear",), beit_base_patch16_224=(86.53, 17.56, 224), beit_large_patch16_224=(304.43, 61.55, 224))
_family("eva", "EVA", ("gelu_linear",), eva_giant_patch14_224=(1012.56, 267.03, 224))
_family(
    "eva",
    "EVA-02",
    (),
    eva02_tiny_patch14_336=(5.76, 4.66, 336),
    eva02_small_patch14_336=(22.13, 15.45, 336),
    eva02_base_patch14_448=(87.12, 106.89, 448),
    eva02_large_patch14_448=(305.08, 361.75, 448),
)
_family(
    "maxvit",
    "MaxViT",
    ("gelu_linear", "squeeze_excite"),
    maxvit_tiny_tf_224=(30.92, 5.55, 224),
    maxvit_small_tf_224=(68.93, 11.58, 224),
    maxvit_base_tf_224=(119.47, 23.90, 224),
    maxvit_large_tf_224=(211.79, 43.49, 224),
    maxvit_xlarge_tf_224=(474.95, 97.21, 224),
)
_family(
    "coatnet",
    "CoAtNet",
    _GATED,
    coatnet_0_224=(25.04, 4.55, 224),
    coatnet_1_224=(42.23, 8.64, 224),
    coatnet_2_224=(74.68, 16.43, 224),
    coatnet_3_224=(166.97, 36.45, 224),
    coatnet_4_224=(275.43, 62.32, 224),
)
_family(
    "mvitv2",
    "MViTv2",
    ("gelu_linear",),
    mvitv2_tiny=(24.17, 4.68, 224),
    mvitv2_small=(34.87, 6.96, 224),
    mvitv2_base=(51.47, 10.10, 224),
    mvitv2_large=(217.99, 43.71, 224),
)
_family("lenet", "LeNet", (), lenet5=(0.0617, 0.000417, 32))
_family("vgg", "VGG", (), vgg16=(138.36, 15.47, 224), vgg19=(143.67, 19.63, 224))
_family("googlenet", "GoogLeNet", (), googlenet=(13.0, 1.5, 224))
_family(
    "densenet",
    "DenseNet",
    (),
    densenet121=(7.98, 2.83, 224),
    densenet161=(28.68, 7.73, 224),
    densenet169=(14.15, 3.36, 224),
    densenet201=(20.01, 4.29, 224),
)
_family("inception", "Inception v3", (), inception_v3=(23.83, 5.71, 299))
_family("shufflenet", "ShuffleNet", _GROUPED, shufflenet_v1_x1_0=(1.86, 0.137, 224))
_family(
    "shufflenet",
    "ShuffleNet V2",
    (),
    shufflenet_v2_x0_5=(1.37, 0.0405, 224),
    shufflenet_v2_x1_0=(2.28, 0.145, 224),
    shufflenet_v2_x1_5=(3.5, 0.296, 224),
    shufflenet_v2_x2_0=(7.39, 0.583, 224),
)
_family(
    "resnet",
    "ResNet",
    (),
    resnet18=(11.69, 1.81, 224),
    resnet34=(21.80, 3.66, 224),
    resnet50=(25.56, 4.09, 224),
    resnet101=(44.55, 7.80, 224),
    resnet152=(60.19, 11.51, 224),
)
_family("resnet", "Wide ResNet", (), wide_resnet50_2=(68.88, 11.40, 224), wide_resnet101_2=(126.89, 22.75, 224))
_family(
    "resnet",
    "ResNeXt",
    _GROUPED,
    resnext50_32x4d=(25.03, 4.23, 224),
    resnext101_32x4d=(44.18, 7.97, 224),
    resnext101_32x8d=(88.79, 16.41, 224),
    resnext101_64x4d=(83.46, 15.46, 224),
)
_family(
    "resnet",
    "SE-ResNet",
    _GATED,
    seresnet50=(28.09, 4.09, 224),
    seresnet101=(49.33, 7.81, 224),
    seresnet152=(66.82, 11.52, 224),
)
_family("resnet", "SE-ResNet", _GROUPED_GATED, seresnext50_32x4d=(27.56, 4.23, 224))
_family("zfnet", "ZFNet", (), zfnet=(62.36, 1.17, 224), zfnet_wide=(107.63, 2.48, 224))
_family("nin", "NiN", (), nin_cifar=(0.967, 0.222, 32), nin_imagenet=(7.6, 1.1, 224))
_family(
    "resnest",
    "ResNeSt",
    _GROUPED,
    resnest50d=(27.48, 5.37, 224),
    resnest101e=(48.28, 13.32, 256),
    resnest200e=(70.2, 35.52, 320),
    resnest269e=(110.93, 77.35, 416),
)
_family("sknet", "SKNet", _GROUPED, skresnext50_32x4d=(27.48, 4.46, 224))
_family("inception_v4", "Inception v4", (), inception_v4=(42.68, 12.25, 299))
_family("inception_resnet", "Inception-ResNet v2", (), inception_resnet_v2=(55.84, 13.16, 299))
_family("fractalnet", "FractalNet", (), fractalnet20=(33.72, 0.845, 32))
_family("nasnet", "NASNet-A", (), nasnet_a_mobile=(5.29, 0.564, 224), nasnetalarge=(88.75, 23.78, 331))
_family(
    "efficientnet",
    "EfficientNet",
    _GATED,
    efficientnet_b0=(5.29, 0.386, 224),
    efficientnet_b1=(7.79, 0.687, 240),
    efficientnet_b2=(9.11, 0.994, 260),
    efficientnet_b3=(12.23, 1.83, 300),
    efficientnet_b4=(19.34, 4.39, 380),
    efficientnet_b5=(30.39, 10.27, 456),
    efficientnet_b6=(43.04, 19.07, 528),
    efficientnet_b7=(66.35, 37.75, 600),
)
_family(
    "efficientnet",
    "EfficientNetV2",
    _GATED,
    efficientnetv2_s=(21.46, 8.37, 384),
    efficientnetv2_m=(54.14, 24.58, 480),
    efficientnetv2_l=(118.52, 56.08, 480),
    efficientnetv2_xl=(208.12, 52.53, 384),
)
_family(
    "regnet",
    "RegNetX",
    _GROUPED,
    regnetx_002=(2.68, 0.199, 224),
    regnetx_004=(5.16, 0.398, 224),
    regnetx_006=(6.2, 0.601, 224),
    regnetx_008=(7.26, 0.8, 224),
    regnetx_016=(9.19, 1.6, 224),
    regnetx_032=(15.3, 3.18, 224),
    regnetx_040=(22.12, 3.96, 224),
    regnetx_064=(26.21, 6.46, 224),
    regnetx_080=(39.57, 8.0, 224),
    regnetx_120=(46.11, 12.09, 224),
    regnetx_160=(54.28, 15.94, 224),
)
_family("regnet", "RegNetX", (), regnetx_320=(107.81, 31.74, 224))  # 168 channels a group
_family(
    "regnet",
    "RegNetY",
    _GROUPED_GATED,
    regnety_002=(3.16, 0.2, 224),
    regnety_004=(4.34, 0.402, 224),
    regnety_006=(6.06, 0.601, 224),
    regnety_008=(6.26, 0.797, 224),
    regnety_016=(11.2, 1.61, 224),
    regnety_032=(19.44, 3.18, 224),
    regnety_040=(20.65, 3.97, 224),
    regnety_064=(30.58, 6.36, 224),
    regnety_080=(39.18, 7.96, 224),
    regnety_120=(51.82, 12.09, 224),
    regnety_160=(83.59, 15.91, 224),
)
_family("regnet", "RegNetY", _GATED, regnety_320=(145.05, 32.28, 224))  # 232 channels a group
_family("mobilenet", "MobileNet", (), mobilenetv1_100=(4.23, 0.569, 224))
_family("mobilenet", "MobileNetV2", (), mobilenetv2_100=(3.50, 0.301, 224), mobilenetv2_140=(6.11, 0.582, 224))
_family("mobilenet", "MobileNetV3", _GATED, mobilenetv3_large_100=(5.48, 0.217, 224), mobilenetv3_small_100=(2.54, 0.0565, 224))
_family("senet", "SENet", _GROUPED_GATED, senet154=(115.09, 20.69, 224))
_family(
    "resnet_rs",
    "ResNet-RS",
    _GATED,
    resnetrs50=(35.69, 2.28, 160),
    resnetrs101=(63.62, 6.01, 192),
    resnetrs152=(86.62, 15.53, 256),
    resnetrs200=(93.21, 20.09, 256),
    resnetrs270=(129.86, 26.95, 256),
    resnetrs350=(163.96, 43.49, 288),
    resnetrs420=(191.89, 63.94, 320),
)
_family("alexnet", "AlexNet", _GROUPED, alexnet_two_groups=(60.97, 0.724, 227))
_family("alexnet", "AlexNet", (), alexnet=(61.10, 0.714, 224))
_family(
    "preact_resnet",
    "ResNet V2",
    (),
    resnetv2_50=(25.55, 4.09, 224),
    resnetv2_101=(44.54, 7.80, 224),
    resnetv2_152=(60.19, 11.51, 224),
    preact_resnet164=(1.70, 0.245, 32),
    preact_resnet1001=(10.33, 1.49, 32),
)
_family("preact_resnet", "Wide ResNet", (), wide_resnet28_10=(36.48, 5.24, 32))
_family(
    "nfnet",
    "NFNet",
    _GROUPED_GATED,
    nfnet_f0=(71.49, 12.38, 256),
    nfnet_f1=(132.63, 17.44, 224),
    nfnet_f2=(193.78, 33.14, 256),
    nfnet_f3=(254.92, 67.94, 320),
    nfnet_f4=(316.07, 121.12, 384),
    nfnet_f5=(377.21, 169.50, 416),
    nfnet_f6=(438.36, 228.29, 448),
)
