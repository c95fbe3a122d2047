"""The modules: sizes, scores, initialisation, state; and the layers that go with them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import gol_kernels as gk


def _stats() -> gk.ClassStats:
    return gk.ClassStats(image_count=[900, 40, 1], instance_count=[2000, 50, 1], num_images=1000)


def _losses() -> list[gk.losses.LongTailLoss]:
    return [
        gk.GumbelLoss(3),
        gk.SigmoidLoss(3),
        gk.SoftmaxLoss(3),
        gk.SeesawLoss(3),
        gk.EQLLoss(_stats(), link="gumbel"),
        gk.DropLoss(_stats(), link="sigmoid"),
    ]


@pytest.mark.parametrize(
    ("loss", "num_logits"),
    list(zip(_losses(), [4, 4, 4, 5, 3, 3], strict=True)),
    ids=lambda x: type(x).__name__,
)
def test_number_of_logits(loss: gk.losses.LongTailLoss, num_logits: int) -> None:
    assert loss.num_logits == num_logits
    assert loss.activation(torch.randn(7, num_logits)).shape == (7, 3)
    parts = loss(torch.randn(7, num_logits), torch.arange(7) % 4, return_parts=True)
    total = sum(part.item() for part in parts.values())
    assert total > 0
    assert ("objectness" in parts) == isinstance(loss, gk.SeesawLoss)


def test_scores() -> None:
    z = torch.tensor([[0.5, -1.0, 2.0, 0.3, -0.4]], dtype=torch.float64)
    e = [math.exp(-math.exp(-v)) for v in (0.5, -1.0, 2.0)]
    torch.testing.assert_close(gk.GumbelLoss(3).activation(z[:, :4]), torch.tensor([e], dtype=torch.float64))
    e = [math.exp(-math.exp(-v / 2)) for v in (0.5, -1.0, 2.0)]
    scores = gk.GumbelLoss(3, temperature=2.0).activation(z[:, :4])
    torch.testing.assert_close(scores, torch.tensor([e], dtype=torch.float64))
    e = [1 / (1 + math.exp(-v)) for v in (0.5, -1.0, 2.0)]
    torch.testing.assert_close(gk.SigmoidLoss(3).activation(z[:, :4]), torch.tensor([e], dtype=torch.float64))
    e = [math.exp(v) for v in (0.5, -1.0, 2.0, 0.3)]
    expected = torch.tensor([[v / sum(e) for v in e[:3]]], dtype=torch.float64)
    torch.testing.assert_close(gk.SoftmaxLoss(3).activation(z[:, :4]), expected)
    is_object = math.exp(0.3) / (math.exp(0.3) + math.exp(-0.4))
    expected = torch.tensor([[v / sum(e[:3]) * is_object for v in e[:3]]], dtype=torch.float64)
    torch.testing.assert_close(gk.SeesawLoss(3).activation(z), expected)


def test_gumbel_scores_are_not_clipped() -> None:
    scores = gk.GumbelLoss(1).activation(torch.tensor([[-8.0, 0.0], [14.0, 0.0]], dtype=torch.float64))
    assert scores[0].item() == 0
    assert 1 - scores[1].item() == pytest.approx(math.exp(-14), rel=1e-6)


def test_initialisation() -> None:
    layer = nn.Linear(16, 4)
    assert gk.GumbelLoss(3).init_classifier_(layer) is layer
    assert bool((layer.weight == 0.001).all())
    assert bool((layer.bias == -2).all())
    gk.GumbelLoss(3).init_classifier_(layer, bias=gk.gumbel_prior_bias(3))
    assert layer.bias[0].item() == pytest.approx(-math.log(math.log(4)))
    gk.SigmoidLoss(3).init_classifier_(layer)
    assert layer.bias[0].item() == pytest.approx(-math.log(999))
    assert 0.005 < layer.weight.std().item() < 0.02
    gk.SeesawLoss(2).init_classifier_(layer)
    assert not layer.bias.any()
    cosine = gk.NormedLinear(16, 4)
    gk.GumbelLoss(3).init_classifier_(cosine)
    assert cosine.weight.std() > 0.005  # a constant would give every class the same direction
    assert bool((cosine.bias == -2).all())
    gk.SoftmaxLoss(3).init_classifier_(nn.Linear(16, 4, bias=False))


def test_the_prior_bias_balances_gradients() -> None:
    """One positive and C negatives at the rule's bias: the gradient sums to zero."""
    c = 50
    logits = torch.full((1, c + 1), gk.gumbel_prior_bias(c), dtype=torch.float64, requires_grad=True)
    gk.gumbel_loss(logits, torch.tensor([0])).backward()
    assert logits.grad.sum().abs().item() < 1e-12


def test_eql_rare_classes() -> None:
    assert gk.EQLLoss(_stats(), 0.04).rare.tolist() == [False, False, True]  # strict: 0.04 is not below 0.04
    assert gk.EQLLoss(_stats(), 0.0401).rare.tolist() == [False, True, True]
    with pytest.raises(ValueError, match="num_images is 0"):
        gk.EQLLoss(gk.ClassStats(3))
    with pytest.raises(ValueError, match="link must be"):
        gk.EQLLoss(_stats(), link="softmax")


def test_seesaw_counts_in_training_only() -> None:
    loss = gk.SeesawLoss(3)
    logits, labels = torch.randn(6, 5), torch.tensor([0, 0, 2, 3, 3, -100])
    loss(logits, labels)
    assert loss.class_stats.label_counts.tolist() == [2, 0, 1, 2]
    loss.eval()
    before = loss(logits, labels)
    assert loss.class_stats.label_counts.tolist() == [2, 0, 1, 2]
    direct = sum(gk.seesaw_loss(logits, labels, torch.tensor([2, 0, 1])))
    assert torch.equal(before, direct)


def test_saved_state_gives_the_same_next_step() -> None:
    first = gk.SeesawLoss(6)
    for _ in range(3):
        first(torch.randn(40, 8), torch.randint(0, 7, (40,)))
    second = gk.SeesawLoss(6)
    second.load_state_dict(first.state_dict())
    logits, labels = torch.randn(40, 8), torch.randint(0, 7, (40,))
    losses, grads = [], []
    for loss in (first, second):
        leaf = logits.clone().requires_grad_(True)
        value = loss(leaf, labels)
        value.backward()
        losses.append(value.detach())
        grads.append(leaf.grad)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(first.class_stats.label_counts, second.class_stats.label_counts)


# --- ClassStats -------------------------------------------------------------------------------------
def _coco(tmp_path, **changes: object):
    content: dict[str, object] = {
        "images": [{"id": i} for i in (5, 6, 7, 8)],
        "categories": [{"id": 20, "name": "b"}, {"id": 3, "name": "a"}, {"id": 40, "name": "c"}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 20},
            {"id": 2, "image_id": 5, "category_id": 20},
            {"id": 3, "image_id": 6, "category_id": 20},
            {"id": 4, "image_id": 7, "category_id": 3},
        ],
    } | changes
    path = tmp_path / "file.json"
    path.write_text(json.dumps(content))
    return path


def test_stats_of_a_coco_file(tmp_path) -> None:
    stats = gk.ClassStats.from_coco_json(_coco(tmp_path))
    assert stats.image_count.tolist() == [1, 2, 0]  # by ascending id: 3, 20, 40
    assert stats.instance_count.tolist() == [1, 3, 0]
    assert stats.num_images == 3  # of four images one has no annotation
    torch.testing.assert_close(stats.image_frequency, torch.tensor([1 / 3, 2 / 3, 0], dtype=torch.float64))
    assert stats.rare(0.5).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"annotations": [{"id": 9, "image_id": 5, "category_id": 99}]},
            "annotation 9 lacks or does not know 99",
        ),
        (
            {"annotations": [{"id": 9, "image_id": 5, "category_id": [3]}]},
            "annotation 9 lacks or does not know",
        ),
        ({"annotations": [{"id": 9, "category_id": 3}]}, "annotation 9 lacks or does not know 'image_id'"),
        ({"annotations": [7]}, r"annotations\[0\] is no object, got 7"),
        ({"annotations": None}, "expected an object with the lists"),
        ({"categories": 3}, "expected an object with the lists"),
        ({"categories": [{"name": "cat"}]}, "lacks 'id'"),
    ],
)
def test_stats_of_a_bad_file(tmp_path, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        gk.ClassStats.from_coco_json(_coco(tmp_path, **changes))


def test_stats_of_another_file(tmp_path) -> None:
    path = tmp_path / "list.json"
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="not a COCO or LVIS annotation file"):
        gk.ClassStats.from_coco_json(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs num_classes or image_count"),
        ({"num_classes": 0}, "at least 1"),
        ({"num_classes": 3, "image_count": [1, 2]}, r"image_count must be \[3\]"),
        ({"image_count": [4, 2], "num_images": 3}, "a class is in 4 images, but num_images is 3"),
        ({"num_classes": 3, "sync": "ring"}, "sync must be one of"),
    ],
)
def test_stats_refuse(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        gk.ClassStats(**options)


def test_label_counts(backend: str) -> None:
    labels = torch.tensor([0, 2, 2, 3, -100, 3, 3], dtype=torch.int32)
    counts = gk.label_counts(labels, 3, backend=backend)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [1, 0, 2, 3]
    with pytest.raises(ValueError, match="got 4 in row 1"):
        gk.label_counts(torch.tensor([0, 4]), 3, backend=backend)
    assert gk.label_counts(torch.tensor([0, 4, -7]), 3, validate=False, backend=backend).tolist() == [
        1,
        0,
        0,
        0,
    ]


# --- cosine layers ----------------------------------------------------------------------------------
def test_normed_linear() -> None:
    layer = gk.NormedLinear(5, 3, temperature=7.0, power=0.5).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    nn.init.uniform_(layer.bias)
    expected = torch.empty(4, 3, dtype=torch.float64)
    for i in range(4):
        for k in range(3):
            xi, wk = x[i], layer.weight[k].detach()
            scale = (xi.norm().sqrt() + 1e-6) * (wk.norm().sqrt() + 1e-6)
            expected[i, k] = 7 * (xi @ wk) / scale + layer.bias[k].item()
    torch.testing.assert_close(layer(x).detach(), expected, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(layer, (x.requires_grad_(True),))


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_normed_linear_with_a_dead_feature(power: float) -> None:
    """A row of zeros (after a ReLU) scores the bias and sends back nothing, not 1/eps."""
    layer = gk.NormedLinear(5, 3, power=power)
    x = torch.zeros(2, 5)
    x[1] = 1
    x.requires_grad_(True)
    out = layer(x)
    assert torch.equal(out[0], layer.bias)
    out.sum().backward()
    assert not x.grad[0].any()
    assert bool(x.grad[1].any())
    assert bool(layer.weight.grad.isfinite().all())


def test_normed_linear_half_precision() -> None:
    """256 features of 20 have a sum of squares beyond float16."""
    layer = gk.NormedLinear(256, 3).half()
    out = layer(torch.full((1, 256), 20.0, dtype=torch.float16))
    assert bool(out.isfinite().all())
    expected = layer.float()(torch.full((1, 256), 20.0))
    torch.testing.assert_close(out.float(), expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("over_kernel", [False, True])
def test_normed_conv(over_kernel: bool) -> None:
    layer = gk.NormedConv2d(4, 2, 3, padding=1, norm_over_kernel=over_kernel).double()
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    w = layer.weight.detach()
    norm = w.flatten(1).norm(dim=1)[:, None, None, None] if over_kernel else w.norm(dim=1, keepdim=True)
    xn = 20 * x / (x.norm(dim=1, keepdim=True) + 1e-6)
    expected = nn.functional.conv2d(xn, w / (norm + 1e-6), padding=1)
    torch.testing.assert_close(layer(x).detach(), expected, rtol=1e-12, atol=1e-12)
    one = gk.NormedConv2d(4, 2, 1)
    over = gk.NormedConv2d(4, 2, 1, norm_over_kernel=True)
    over.load_state_dict(one.state_dict())
    torch.testing.assert_close(one(x.float()), over(x.float()))
