"""The demo's images: augmented training batches that any run can replay, and a test set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data.mixup import Mixup
from torchvision import transforms
from torchvision.datasets import ImageFolder

TEST_IMAGES = 512  # at most


def seed_all(seed: int, step: int) -> None:
    torch.manual_seed(seed * 1_000_003 + step)
    np.random.seed((seed * 1_000_003 + step) % 2**32)


def _digits() -> tuple[list, list[str]]:
    """scikit-learn's 1797 handwritten digits, 8x8 pixels."""
    digits = load_digits()
    pictures = [Image.fromarray((image * 255 / 16).astype(np.uint8)).convert("RGB") for image in digits.images]
    return list(zip(pictures, digits.target.tolist())), [str(c) for c in digits.target_names]


def _folders(root: Path) -> tuple[ImageFolder, ImageFolder | None]:
    """An ImageFolder, or those of root/train and of root/val (or root/test)."""
    if not root.is_dir():
        raise ValueError(f"demo: data must be a folder with one folder of images for each class, got {root}")
    if not (root / "train").is_dir():
        return ImageFolder(root), None
    train, held_out = ImageFolder(root / "train"), [ImageFolder(root / n) for n in ("val", "test") if (root / n).is_dir()][:1]
    if held_out and held_out[0].classes != train.classes:
        raise ValueError(f"demo: {held_out[0].root} must hold the classes of {train.root}, got {held_out[0].classes} and {train.classes}")
    return train, held_out[0] if held_out else None


class OfClasses:
    """The images of some consecutive classes, counted from 0 anew."""

    def __init__(self, images: list | ImageFolder, classes: range):
        labels = images.targets if isinstance(images, ImageFolder) else [label for _, label in images]
        self.images, self.first = images, classes.start
        self.chosen = [i for i, label in enumerate(labels) if label in classes]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int):
        image, label = self.images[self.chosen[i]]
        return image, label - self.first


class Images:
    """Training batches augmented as in ConvNeXt's recipe, and a test set. Batch i of a seed is always the same.

    Without test images of its own, the data gives up every fifth image for testing. `half`: only the first (0) or the second
    (1) half of the classes.
    """

    def __init__(self, data: Path | None, image_size: int, batch_size: int, seed: int, half: int | None = None):
        self.seed, self.batch_size = seed, batch_size
        resize = transforms.Resize((image_size, image_size))
        finish = [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
        self.plain = transforms.Compose([resize, *finish])
        self.augment = transforms.Compose([resize, transforms.RandAugment(), *finish, transforms.RandomErasing(p=0.25)])
        if data is None:
            (self.images, self.classes), test = _digits(), None
        else:
            self.images, test = _folders(data)
            self.classes = self.images.classes
        if half is not None:
            middle = len(self.classes) // 2
            chosen = range(middle) if half == 0 else range(middle, len(self.classes))
            self.images, test = OfClasses(self.images, chosen), test and OfClasses(test, chosen)
            self.classes = [self.classes[c] for c in chosen]
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(self.images)).tolist()
        if test is None:
            held_out = len(order) // 5
            self.test = [self.images[i] for i in order[:held_out][:TEST_IMAGES]]
            order = order[held_out:]
        else:
            self.test = [test[i] for i in rng.permutation(len(test))[:TEST_IMAGES].tolist()]
        self.order = order
        if not self.order or not self.test:
            raise ValueError(f"demo: {data} holds too few images to train and to test on: {len(self.order)} and {len(self.test)}")
        self.mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=len(self.classes))

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (batch_size, 3, H, W) and soft labels (batch_size, classes)."""
        seed_all(self.seed, step)
        chosen = np.resize(np.random.permutation(self.order), self.batch_size).tolist()
        samples = [self.images[i] for i in chosen]
        images = torch.stack([self.augment(image) for image, _ in samples])
        return self.mixup(images, torch.tensor([label for _, label in samples]))

    def test_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(self.test), self.batch_size):
            samples = self.test[start : start + self.batch_size]
            yield torch.stack([self.plain(image) for image, _ in samples]), torch.tensor([label for _, label in samples])
