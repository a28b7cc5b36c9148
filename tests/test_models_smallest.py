"""The smallest bundled member of each family, whole: with equal weights its peer's logits, and patched the same training step."""

import copy
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from convnet_helpers import images, randomize
from model_helpers import check_same_logits, shapes, smallest_of_each_family
from test_models_vit import to_huggingface
from transformers import ViTMAEConfig, ViTMAEForPreTraining

import fastconv
from fastconv.models import MODELS, nfnet

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# The other families' whole smallest members are compared in their own files.
PEERS = {
    "resnet18": torchvision,
    "resnext50_32x4d": torchvision,
    "wide_resnet50_2": torchvision,
    "vgg16": torchvision,
    "seresnet50": timm,
    "senet154": timm,
    "resnetv2_50": timm,
    "resnetrs50": timm,
    "nfnet_f0": timm,
}


def randomized(model):
    """NFNet's signal keeps its scale under the convolutions' own weights alone: there everything else varies."""
    if not isinstance(model, nfnet.NormFreeNet):
        return randomize(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter[0].numel() == 1:  # gains and biases
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", PEERS)
def test_parity(name):
    torch.manual_seed(0)
    ours = randomized(MODELS[name].build(num_classes=10))
    theirs = PEERS[name].models.get_model(name, num_classes=10) if PEERS[name] is torchvision else timm.create_model(name, num_classes=10)
    assert shapes(ours.state_dict()) == shapes(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    check_same_logits(ours, theirs, images(2, 3, 64, 96))


def test_mae_parity():
    """The smallest bundled MAE; transformers' default configuration is the same network."""
    torch.manual_seed(0)
    ours = MODELS["mae_vit_base_patch16"].build(img_size=64).eval()
    theirs = ViTMAEForPreTraining(ViTMAEConfig(image_size=64, layer_norm_eps=1e-6)).eval()
    theirs.load_state_dict(to_huggingface(ours.state_dict()))
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        loss, pred, _ = ours(x, generator=torch.Generator().manual_seed(3))
        expected = theirs(x, noise=torch.rand(2, 16, generator=torch.Generator().manual_seed(3)))
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=0)
    assert torch.linalg.norm(pred - expected.logits) <= 1e-5 * torch.linalg.norm(pred)


SIZED = {"vit", "mae", "beit", "eva", "maxvit", "coatnet", "mvitv2", "swin", "swin_v2"}  # modules whose models are told the image's size
STEPS = [n for n in smallest_of_each_family() if MODELS[n].ops and n != "eva_giant_patch14_224"]  # a billion parameters: ViT's code


@pytest.mark.parametrize("name", STEPS)
def test_a_patched_training_step_is_the_same(name):
    """Loss and every gradient in float64, each site by its own kernel."""
    spec, size = MODELS[name], 67 if name.startswith("alexnet") else 64
    torch.manual_seed(0)
    kw = {"img_size": size} if spec.module in SIZED else {}
    kw |= {} if spec.family == "MAE" else {"num_classes": 10}
    plain = randomized(spec.build(**kw)).double().train()
    for module in plain.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    patched = copy.deepcopy(plain)
    fastconv.patch(patched)
    x, labels = images(4, 3, size, size).double(), torch.arange(4)
    losses = []
    for model in (plain, patched):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            output = model(x)
        losses.append(output[0] if spec.family == "MAE" else F.cross_entropy(output, labels))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=0)
    bound = 1e-7 if spec.family == "MobileNetV3" else 1e-8  # torch's hardsigmoid has a 1/6 of float32
    scale = max(p.grad.norm() for p in plain.parameters() if p.grad is not None)
    for (key, a), b in zip(plain.named_parameters(), patched.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == (not a.requires_grad), key
        if a.requires_grad:
            assert torch.linalg.norm(b.grad - a.grad) <= bound * torch.linalg.norm(a.grad) + 1e-12 * scale, key
    report = fastconv.report(patched)
    assert {site.op for site in report.fused} == set(spec.ops)
    for site in report.fused:
        assert site.backend == "cpu" and not site.fallbacks, site
