"""`fastconv demo --pretrain`: FCMAE or MAE, a ConvNeXt V2 or a ViT that learns to fill in the hidden patches of real images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torchvision import transforms

from ..models import mae
from ..models.convnextv2 import SIZES
from ..models.fcmae import PATCH, fcmae
from .data import Images, seed_all
from .run import Options, Run

SHOWN = 8  # images in the picture
GRN_WEIGHT = 0.5  # at its initial 0 GRN is the identity, and errors in it would not show


class Unlabelled(Images):
    """Random crops, the only augmentation of the paper's recipe but flips, which make other digits; labels are all 0."""

    def __init__(self, data: Path | None, image_size: int, batch_size: int, seed: int):
        super().__init__(data, image_size, batch_size, seed)
        crop = transforms.RandomResizedCrop((image_size, image_size), scale=(0.5, 1.0))
        self.augment = transforms.Compose([crop, *self.plain.transforms[1:]])

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        seed_all(self.seed, step)
        chosen = np.resize(np.random.permutation(self.order), self.batch_size).tolist()
        images = torch.stack([self.augment(self.images[i][0]) for i in chosen])
        return images, torch.zeros(self.batch_size, dtype=torch.long)


class Pretraining(Run):
    """A run of FCMAE or MAE. The masks are drawn from torch's own generator, which every step seeds: all runs hide the same."""

    learning_rate = 1e-3

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            return self.model(images)[0].float()

    def evaluate(self, data: Images) -> None:
        self.model.eval()
        seed_all(self.options.seed, 0)
        with torch.inference_mode():
            losses = [self.loss(self.to_device(images), labels).item() for images, labels in data.test_batches()]
        self.score = "test loss", f"{sum(losses) / len(losses):.4f}"


MAES = {"mae_vit_base_patch16": 16, "mae_vit_large_patch16": 16, "mae_vit_huge_patch14": 14}  # side of a patch


def prepare(options: Options) -> tuple[Images, nn.Module]:
    """The images and the unpatched model. ValueError for a bad option."""
    size = options.model.removeprefix("convnextv2_")
    if options.model not in MAES and (size == options.model or size not in SIZES):
        names = f"convnextv2_<{', '.join(SIZES)}> or {', '.join(MAES)}"
        raise ValueError(f"demo: pretraining is that of ConvNeXt V2 or of a ViT: model must be {names}, got {options.model!r}")
    patch = MAES.get(options.model, PATCH)
    if options.image_size % patch or options.image_size < 2 * patch:
        raise ValueError(f"demo: pretraining hides patches of {patch}x{patch}: image_size must be a multiple, got {options.image_size}")
    data = Unlabelled(options.data, options.image_size, options.batch_size, options.seed)
    torch.manual_seed(options.seed)
    if options.model in MAES:
        model = getattr(mae, options.model)(img_size=options.image_size, norm_pix_loss=True)
    else:
        model = fcmae(size, drop_path_rate=0.1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("grn.gamma"):
                parameter.fill_(GRN_WEIGHT)
    return data, model.to(options.device).train()


def draw(run: Run, data: Images, path: Path) -> None:
    """Test images, what the encoder sees of them, and what the model makes of it, as a PNG."""
    images = run.to_device(next(data.test_batches())[0][:SHOWN])
    run.model.eval()
    seed_all(run.options.seed, 1)
    with torch.inference_mode(), run.autocast():
        _, pred, mask = run.model(images)
        filled = run.model.reconstruct(images, pred, mask)
    side = round(mask[0].numel() ** 0.5)
    mask = mask.view(-1, side, side) > 0
    hidden = mask.repeat_interleave(images.shape[2] // side, 1).repeat_interleave(images.shape[3] // side, 2)[:, None]
    rows = {"original": images, f"{mask.float().mean():.0%} hidden": images.masked_fill(hidden, 0), "reconstructed": filled}
    figure = Figure(figsize=(1.5 * len(images), 4.8), dpi=100, layout="constrained")
    grid = figure.subplots(len(rows), len(images), squeeze=False)
    for axes, (title, pictures) in zip(grid, rows.items()):
        for axis, picture in zip(axes, pictures.float().cpu()):
            axis.imshow((picture.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy())
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
