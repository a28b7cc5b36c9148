"""The distillation losses against their formulas, and what they teach."""

import math

import pytest
import torch
from torch import nn

from fastconv.distillation import cosine_feature_loss, soft_label_loss


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_labels(temperature):
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 10, generator=g, dtype=torch.float64) for _ in range(2))
    p, q = ((logits / temperature).softmax(1) for logits in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(soft_label_loss(student, teacher, temperature), expected)
    assert soft_label_loss(teacher, teacher + 3, temperature).abs() < 1e-12
    torch.testing.assert_close(soft_label_loss(student.float(), teacher.float(), temperature), expected.float())


def test_gradients_of_soft_labels_hardly_depend_on_the_temperature():
    """For logits that are small against T: (q - p) / T times T^2 / T."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (1e-3 * torch.randn(4, 5, generator=g, dtype=torch.float64) for _ in range(2))
    gradients = []
    for temperature in (1.0, 8.0):
        x, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        soft_label_loss(x, t, temperature).backward()
        gradients.append(x.grad)
        assert t.grad is None
    assert (gradients[0] - gradients[1]).norm() <= 1e-2 * gradients[1].norm()


def test_cosine_of_features():
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 8, generator=g, dtype=torch.float64) for _ in range(2))
    cosine = (student * teacher).sum(-1) / (student.norm(dim=-1) * teacher.norm(dim=-1))
    torch.testing.assert_close(cosine_feature_loss(student, teacher), (1 - cosine).mean())
    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    torch.testing.assert_close(cosine_feature_loss(student, teacher, mask), (1 - cosine)[mask].mean())
    assert cosine_feature_loss(student, teacher, torch.zeros_like(mask)) == 0
    assert cosine_feature_loss(3 * teacher, teacher) < 1e-12 and math.isclose(cosine_feature_loss(-teacher, teacher).item(), 2)
    teacher.requires_grad_()
    x = student.clone().requires_grad_()
    cosine_feature_loss(x, teacher, mask).backward()
    assert teacher.grad is None and torch.equal(x.grad.abs().sum(-1) > 0, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_wide(dtype):
    a, b = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).mul(30).to(dtype)
    for loss in (soft_label_loss, cosine_feature_loss):
        assert loss(a, b).dtype == torch.float32
        torch.testing.assert_close(loss(a, b), loss(a.float(), b.float()))


def test_a_student_learns_its_teacher():
    torch.manual_seed(0)
    teacher, student = (nn.Linear(6, 4) for _ in range(2))
    x = torch.randn(256, 6)
    optimizer = torch.optim.Adam(student.parameters(), 0.05)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = soft_label_loss(student(x), teacher(x), 2.0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0]
    assert (student(x).argmax(1) == teacher(x).argmax(1)).float().mean() > 0.97


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: soft_label_loss(a, a[:, 1:]), r"must be \(N, classes\), got \(2, 3\) and \(2, 2\)"),
        (lambda a: soft_label_loss(a[0], a[0]), r"must be \(N, classes\), got \(3,\)"),
        (lambda a: soft_label_loss(a, a, 0), "temperature must be positive, got 0"),
        (lambda a: cosine_feature_loss(a, a[:1]), "must have one shape"),
        (lambda a: cosine_feature_loss(a, a, torch.ones(2)), r"mask must be bool \(2,\), got torch.float32 \(2,\)"),
        (lambda a: cosine_feature_loss(a, a, a > 0), r"mask must be bool \(2,\), got torch.bool \(2, 3\)"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))
