"""The tutorial's formulas, computed by hand in a few lines, against the layers that the models are made of."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_lightning import ConvNet, ResNet18
from mnist_lightning.convnet import MEAN, STD


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def correlate(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """(I * K)(i, j) = Σ_m Σ_n I(i + m, j + n) K(m, n)"""
    rows, columns = (a - b + 1 for a, b in zip(image.shape, kernel.shape, strict=True))
    return np.array([
        [
            sum(image[i + m, j + n] * kernel[m, n] for m in range(kernel.shape[0]) for n in range(kernel.shape[1]))
            for j in range(columns)
        ]
        for i in range(rows)
    ])  # fmt: skip


def test_convolution_of_the_tutorials_example() -> None:
    image, kernel = np.arange(1, 10).reshape(3, 3), np.array([[1, 0], [0, -1]])
    assert correlate(image, kernel).tolist() == [[-4, -4], [-4, -4]]
    by_torch = F.conv2d(torch.tensor(image)[None, None].float(), torch.tensor(kernel)[None, None].float())
    assert by_torch[0, 0].tolist() == [[-4, -4], [-4, -4]]


def test_conv1_is_a_cross_correlation_with_a_border_of_zeros_and_a_bias() -> None:
    model, image = ConvNet(), torch.randn(1, 1, 28, 28)
    weight, bias = model.conv1.weight.detach().numpy(), model.conv1.bias.detach().numpy()
    padded = np.pad(image[0, 0].numpy(), 1)
    by_hand = np.stack([correlate(padded, weight[k, 0]) + bias[k] for k in range(3)])
    np.testing.assert_allclose(by_hand, model.conv1(image)[0, :3].detach().numpy(), atol=1e-5)


def test_conv2_sums_over_the_32_maps_of_conv1() -> None:
    model, maps = ConvNet(), torch.randn(1, 32, 14, 14)
    padded = np.pad(maps[0].numpy(), ((0, 0), (1, 1), (1, 1)))
    weight = model.conv2.weight.detach().numpy()
    by_hand = sum(correlate(padded[c], weight[0, c]) for c in range(32)) + model.conv2.bias[0].item()
    np.testing.assert_allclose(by_hand, model.conv2(maps)[0, 0].detach().numpy(), atol=1e-5)


def test_pooling_takes_the_largest_of_each_four_and_commutes_with_relu() -> None:
    maps = torch.randn(1, 2, 6, 6)
    by_hand = torch.tensor([
        [[maps[0, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max().item() for j in range(3)] for i in range(3)]
        for c in range(2)
    ])  # fmt: skip
    assert torch.equal(F.max_pool2d(maps, 2)[0], by_hand)
    assert torch.equal(F.max_pool2d(maps.relu(), 2), F.max_pool2d(maps, 2).relu())


def test_fc1_is_a_matrix_times_a_vector_plus_a_bias() -> None:
    model, x = ConvNet(), torch.randn(64 * 7 * 7)
    by_hand = model.fc1.weight.detach().numpy() @ x.numpy() + model.fc1.bias.detach().numpy()
    np.testing.assert_allclose(by_hand, model.fc1(x).detach().numpy(), atol=1e-5)


def test_convnet_is_those_formulas_one_after_the_other() -> None:
    model = ConvNet()
    image = torch.randint(0, 256, (1, 1, 28, 28), dtype=torch.uint8)
    x = (image / 255 - MEAN) / STD
    for conv in (model.conv1, model.conv2):
        x = F.max_pool2d(conv(x).relu(), 2)
    by_hand = model.fc2(model.fc1(x.flatten(1)).relu())
    torch.testing.assert_close(model(image), by_hand, rtol=0, atol=1e-5)


def test_moving_the_image_moves_the_maps() -> None:
    model, image = ConvNet(), torch.zeros(1, 1, 28, 28)
    image[..., 8:16, 8:16] = torch.rand(8, 8)
    moved = torch.roll(image, (3, 2), dims=(2, 3))
    expected = torch.roll(model.conv1(image), (3, 2), dims=(2, 3))
    torch.testing.assert_close(model.conv1(moved), expected, rtol=0, atol=1e-5)


def softmax(z: Tensor) -> list[float]:
    """p_k = exp(z_k) / Σ_j exp(z_j)"""
    exps = [math.exp(value) for value in z.tolist()]
    return [value / sum(exps) for value in exps]


def test_cross_entropy_is_minus_the_log_of_the_labels_probability() -> None:
    logits, label = torch.randn(10), 3
    assert F.cross_entropy(logits, torch.tensor(label)).item() == pytest.approx(-math.log(softmax(logits)[label]))


def test_gradient_of_cross_entropy_is_probability_minus_one_hot() -> None:
    logits, label = torch.randn(10, requires_grad=True), 3
    F.cross_entropy(logits, torch.tensor(label)).backward()
    by_hand = [p - (k == label) for k, p in enumerate(softmax(logits.detach()))]
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx(by_hand, abs=1e-6)


def test_sgd_with_momentum_is_v_and_w() -> None:
    """v ← 0.9 v + g;  w ← w - 0.01 v"""
    model = ConvNet()
    optimizer = model.optimizer([model.fc2.bias])
    w, v = model.fc2.bias.detach().clone(), torch.zeros(10)
    for _ in range(3):
        g = torch.randn(10)
        model.fc2.bias.grad = g.clone()
        optimizer.step()
        v = 0.9 * v + g
        w = w - 0.01 * v
    torch.testing.assert_close(model.fc2.bias.detach(), w)


def test_frozen_resnet_is_a_fixed_map_and_a_linear_layer() -> None:
    """logits = W φ(x) + b, and only W and b have gradients."""
    model = ResNet18(weights="none", image_size=28)
    model.load_pretrained()
    images = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)
    features = model.features(images)
    by_hand = features @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(images), by_hand)
    model(images).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    alone = torch.cat([model.features(image[None]) for image in images])  # no image depends on its batch
    torch.testing.assert_close(features, alone, rtol=0, atol=1e-4)
