"""Losses that teach a student what a teacher sees: its soft labels, or its features."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def soft_label_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Cross entropy's excess over the teacher's own: T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over images.

    The factor T^2 keeps gradients alike for every temperature, so that this can be added to the loss of the hard labels. The
    teacher gets no gradient.

    Args:
        student, teacher: logits (N, classes), any floating-point dtype; computed in float32 or wider.
        temperature: T > 0; higher values show more of what the teacher takes for similar.

    Returns: a scalar. Raises ValueError for shapes that differ or a temperature that is not positive.

    Source: Hinton, Vinyals, Dean 2015 (Distilling the Knowledge in a Neural Network), section 2.
    """
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"soft_label_loss: student and teacher must be (N, classes), got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"soft_label_loss: temperature must be positive, got {temperature}")
    log_student, log_teacher = (F.log_softmax(_wide(logits) / temperature, 1) for logits in (student, teacher.detach()))
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def cosine_feature_loss(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """1 - cos(student, teacher) over the last dimension, the mean over all tokens or over those that the mask selects.

    EVA's pretraining: the teacher (CLIP's vision tower) sees the whole image, the student one with 40% of its patches masked,
    and the loss is taken where they are masked. The teacher gets no gradient.

    Args:
        student, teacher: features (..., channels), any floating-point dtype; computed in float32 or wider.
        mask: bool (...), true where the loss is taken; None for everywhere. 0 where it selects nothing.

    Returns: a scalar between 0 and 2. Raises ValueError for shapes that differ.

    Source: Fang et al. 2023 (EVA), section 2.1.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"cosine_feature_loss: student and teacher must have one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    distance = 1 - F.cosine_similarity(_wide(student), _wide(teacher.detach()), -1)
    if mask is None:
        return distance.mean()
    if mask.shape != distance.shape or mask.dtype != torch.bool:
        raise ValueError(f"cosine_feature_loss: mask must be bool {tuple(distance.shape)}, got {mask.dtype} {tuple(mask.shape)}")
    return torch.where(mask, distance, 0).sum() / mask.sum().clamp(min=1)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
