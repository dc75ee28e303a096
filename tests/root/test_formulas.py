"""The tutorial's formulas, computed by hand in a few lines, against the layers that the models are made of."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_lightning.convnet import ConvNet


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def correlate(image: Tensor, kernel: Tensor) -> Tensor:
    """(I * K)(i, j) = Σ_m Σ_n I(i + m, j + n) K(m, n)"""
    rows, columns = (a - b + 1 for a, b in zip(image.shape, kernel.shape, strict=True))
    out = torch.zeros(rows, columns, dtype=image.dtype)
    for i, j, m, n in np.ndindex(rows, columns, *kernel.shape):
        out[i, j] += image[i + m, j + n] * kernel[m, n]
    return out


def softmax(z: Tensor) -> list[float]:
    """p_k = exp(z_k) / Σ_j exp(z_j)"""
    exps = [math.exp(value) for value in z.tolist()]
    return [value / sum(exps) for value in exps]


def test_convolution_of_the_tutorials_example() -> None:
    image, kernel = torch.arange(1, 10).view(3, 3), torch.tensor([[1, 0], [0, -1]])
    assert correlate(image, kernel).tolist() == [[-4, -4], [-4, -4]]
    assert F.conv2d(image[None, None], kernel[None, None])[0, 0].tolist() == [[-4, -4], [-4, -4]]


@torch.no_grad()
def test_convolutions_sum_over_the_maps_with_a_border_of_zeros_and_a_bias() -> None:
    model = ConvNet()
    for conv, maps in ((model.conv1, torch.randn(1, 28, 28)), (model.conv2, torch.randn(32, 8, 8))):
        padded = F.pad(maps, (1, 1, 1, 1))
        by_hand = sum(correlate(map, kernel) for map, kernel in zip(padded, conv.weight[3])) + conv.bias[3]
        torch.testing.assert_close(conv(maps)[3], by_hand, rtol=0, atol=1e-5)


def test_pooling_takes_the_largest_of_each_four_and_commutes_with_relu() -> None:
    maps = torch.randn(2, 6, 6)
    pooled = F.max_pool2d(maps, 2)
    for c, i, j in np.ndindex(2, 3, 3):
        assert pooled[c, i, j] == max(maps[c, 2 * i + m, 2 * j + n] for m in (0, 1) for n in (0, 1))
    assert torch.equal(F.max_pool2d(maps.relu(), 2), pooled.relu())


@torch.no_grad()
def test_fc1_is_a_matrix_times_a_vector_plus_a_bias() -> None:
    model, x = ConvNet(), torch.randn(64 * 7 * 7)
    by_hand = [math.fsum((row * x).tolist()) + bias.item() for row, bias in zip(model.fc1.weight, model.fc1.bias)]
    torch.testing.assert_close(model.fc1(x), torch.tensor(by_hand), rtol=0, atol=1e-5)


def test_moving_the_image_moves_the_maps() -> None:
    model, image = ConvNet(), torch.zeros(1, 28, 28)
    image[:, 8:16, 8:16] = torch.rand(8, 8)
    moved = model.conv1(image.roll((3, 2), dims=(1, 2)))
    torch.testing.assert_close(moved, model.conv1(image).roll((3, 2), dims=(1, 2)), rtol=0, atol=1e-5)


def test_cross_entropy_is_minus_log_p_and_its_gradient_p_minus_one_hot() -> None:
    logits, label = torch.randn(10, requires_grad=True), 3
    p = softmax(logits.detach())
    loss = F.cross_entropy(logits, torch.tensor(label))
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(p[label]))
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([value - (k == label) for k, value in enumerate(p)], abs=1e-6)


def test_sgd_with_momentum_is_v_and_w() -> None:
    """v ← 0.9 v + g;  w ← w - 0.01 v"""
    weight = torch.nn.Parameter(torch.randn(10))
    optimizer = ConvNet().optimizer([weight])
    w, v = weight.detach().clone(), torch.zeros(10)
    for _ in range(3):
        weight.grad = g = torch.randn(10)
        optimizer.step()
        v = 0.9 * v + g
        w = w - 0.01 * v
    torch.testing.assert_close(weight.detach(), w)
