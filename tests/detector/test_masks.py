from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as PlanePath
from pycocotools import mask as mask_utils

from detector.data.masks import InstanceMasks, rle_counts

HEIGHT, WIDTH = 40, 50


def rectangle(x0, y0, x1, y1):
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def blob(rng, centre=(25.0, 20.0), radius=15.0, corners=17):
    angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
    reach = radius * rng.uniform(0.4, 1, corners)
    return np.stack([centre[0] + reach * np.cos(angle), centre[1] + reach * np.sin(angle)], axis=1).ravel()


def encoded(plane):
    rle = mask_utils.encode(np.asfortranarray(plane.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"]}


def decoded(rle):
    return np.asarray(mask_utils.decode([rle]))[:, :, 0]


def crop(masks, box, size, index=0):
    return masks.crop(torch.tensor([box], dtype=torch.float64), torch.tensor([index]), size)[0].numpy()


def centres(box, size):
    x0, y0, x1, y1 = box
    steps = (np.arange(size) + 0.5) / size
    return np.meshgrid(x0 + steps * (x1 - x0), y0 + steps * (y1 - y0))


def test_an_integer_rectangle_covers_exactly_its_pixels():
    masks = InstanceMasks([[rectangle(2, 3, 5, 9)]])
    plane = crop(masks, [0, 0, 12, 12], 12)
    expected = np.zeros((12, 12))
    expected[3:9, 2:5] = 1
    np.testing.assert_array_equal(plane, expected)


def test_a_cell_belongs_to_the_mask_if_its_centre_does():
    # Centres lie at 0.5, 1.5, 2.5, 3.5; the rectangle reaches from 0.6 to 2.4 and from 1.4 to 3.6.
    plane = crop(InstanceMasks([[rectangle(0.6, 1.4, 2.4, 3.6)]]), [0, 0, 4, 4], 4)
    np.testing.assert_array_equal(plane, [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]])


def test_a_crop_is_laid_over_the_box():
    # The box is 8 x 4 pixels on a 4 x 4 grid: cells of 2 x 1. The mask is the left half of the box.
    masks = InstanceMasks([[rectangle(10, 0, 14, 30)]])
    np.testing.assert_array_equal(crop(masks, [10, 20, 18, 24], 4), [[1, 1, 0, 0]] * 4)
    np.testing.assert_array_equal(crop(masks, [10, 28, 18, 32], 4), [[1, 1, 0, 0]] * 2 + [[0] * 4] * 2)


def test_polygons_against_the_exact_point_in_polygon_test():
    rng = np.random.default_rng(0)
    polygons = [blob(rng) for _ in range(40)]
    boxes = [sorted(rng.uniform(0, 50, 2)) + sorted(rng.uniform(0, 40, 2)) for _ in polygons]
    boxes = [[x0, y0, x1, y1] for x0, x1, y0, y1 in boxes]
    planes = InstanceMasks([[p] for p in polygons]).crop(torch.tensor(boxes).double(), torch.arange(40), 28)
    assert planes.dtype == torch.float32
    assert 0.05 < planes.mean() < 0.95
    for polygon, box, plane in zip(polygons, boxes, planes.numpy(), strict=True):
        x, y = centres(box, 28)
        inside = PlanePath(polygon.reshape(-1, 2)).contains_points(np.stack([x.ravel(), y.ravel()], axis=1))
        np.testing.assert_array_equal(plane.ravel(), inside)


def test_polygons_against_the_full_image_rasterised_and_resized():
    # The classic way: draw the whole mask finely with pycocotools, cut the box out, take the nearest pixel.
    rng = np.random.default_rng(1)
    fine = 16
    differing = 0
    for _ in range(20):
        polygon = blob(rng, radius=18)
        box = [8.0, 5.0, 42.0, 36.0]
        drawn = mask_utils.frPyObjects([(fine * polygon).tolist()], HEIGHT * fine, WIDTH * fine)
        whole = decoded(mask_utils.merge(drawn))
        x, y = centres(box, 28)
        reference = whole[(y * fine).astype(int), (x * fine).astype(int)]
        differing += int((crop(InstanceMasks([[polygon]]), box, 28) != reference).sum())
    assert differing <= 0.002 * 20 * 28 * 28  # cells whose centre is within 1/16 pixel of the outline


def test_parts_are_united_and_a_bridged_hole_stays_open():
    two = InstanceMasks([[rectangle(0, 0, 4, 4), rectangle(2, 2, 6, 6)]])
    expected = np.zeros((6, 6))
    expected[:4, :4] = expected[2:, 2:] = 1
    np.testing.assert_array_equal(crop(two, [0, 0, 6, 6], 6), expected)
    # One ring: the outer square, a bridge to the inner one, around it the other way, and back.
    bridged = [0, 0, 6, 0, 6, 6, 0, 6, 0, 0, 2, 2, 2, 4, 4, 4, 4, 2, 2, 2]
    expected = np.ones((6, 6))
    expected[2:4, 2:4] = 0
    np.testing.assert_array_equal(crop(InstanceMasks([[bridged]]), [0, 0, 6, 6], 6), expected)


def test_rle_against_the_decoded_mask():
    rng = np.random.default_rng(2)
    plane = rng.random((HEIGHT, WIDTH)) < 0.4
    masks = InstanceMasks([encoded(plane)])
    np.testing.assert_array_equal(crop(masks, [0, 0, 40, 40], 40), plane[:, :40])
    for box in ([3.2, 4.7, 33.3, 21.9], [-5.0, -6.0, 60.0, 44.0]):
        x, y = (np.floor(v).astype(int) for v in centres(box, 28))
        inside = (x >= 0) & (x < WIDTH) & (y >= 0) & (y < HEIGHT)
        reference = np.where(inside, plane[y.clip(0, HEIGHT - 1), x.clip(0, WIDTH - 1)], 0)
        np.testing.assert_array_equal(crop(masks, box, 28), reference)


def test_an_rle_and_its_polygon_agree():
    plane = np.zeros((HEIGHT, WIDTH))
    plane[5:30, 10:35] = 1
    masks = InstanceMasks([encoded(plane), [rectangle(10, 5, 35, 30)]])
    box = torch.tensor([[7.3, 2.1, 41.0, 33.3]] * 2)
    first, second = masks.crop(box, torch.tensor([0, 1]), 28)
    np.testing.assert_array_equal(first.numpy(), second.numpy())


@pytest.mark.parametrize("kind", ["polygon", "rle"])
def test_flip_and_scale_move_the_mask_with_its_box(kind):
    rng = np.random.default_rng(3)
    if kind == "polygon":
        masks = InstanceMasks([[blob(rng)]])
    else:
        masks = InstanceMasks([encoded(rng.random((HEIGHT, WIDTH)) < 0.5)])
    x0, y0, x1, y1 = 9.5, 7.25, 38.0, 31.0  # binary fractions, so that no cell centre moves by rounding
    before = crop(masks, [x0, y0, x1, y1], 14)
    assert 0 < before.mean() < 1
    flipped = crop(masks.flip(WIDTH), [WIDTH - x1, y0, WIDTH - x0, y1], 14)
    np.testing.assert_array_equal(flipped, before[:, ::-1])
    scaled = crop(masks.scale(2.0, 0.5), [2 * x0, 0.5 * y0, 2 * x1, 0.5 * y1], 14)
    np.testing.assert_array_equal(scaled, before)
    both = crop(masks.flip(WIDTH).scale(2.0, 4.0), [2 * (WIDTH - x1), 4 * y0, 2 * (WIDTH - x0), 4 * y1], 14)
    np.testing.assert_array_equal(both, before[:, ::-1])
    back = crop(masks.scale(4.0, 4.0).flip(4 * WIDTH).flip(4 * WIDTH).scale(0.25, 0.25), [x0, y0, x1, y1], 14)
    np.testing.assert_array_equal(back, before)
    np.testing.assert_array_equal(crop(masks, [x0, y0, x1, y1], 14), before)  # nothing was changed in place


def test_index_kinds_choose_instances():
    masks = InstanceMasks([[rectangle(k, 0, k + 1, 1)] for k in range(5)])

    def chosen(some):
        grid = torch.tensor([[0.0, 0.0, 5.0, 5.0]]).expand(len(some), 4)
        return some.crop(grid, torch.arange(len(some)), 5)[:, 0].argmax(dim=1).tolist()

    assert chosen(masks) == [0, 1, 2, 3, 4]
    assert chosen(masks[torch.tensor([3, 1, 1])]) == [3, 1, 1]
    assert chosen(masks[torch.tensor([True, False, False, True, False])]) == [0, 3]
    assert chosen(masks[1:4]) == [1, 2, 3]
    assert chosen(masks[[4, 0]]) == [4, 0]
    assert chosen(masks[np.array([2])]) == [2]
    assert len(masks[torch.empty(0, dtype=torch.int64)]) == 0
    with pytest.raises(IndexError, match="boolean index needs shape"):
        masks[torch.tensor([True])]


def test_crop_repeats_and_orders_instances():
    masks = InstanceMasks([[rectangle(0, 0, 4, 2)], encoded(np.eye(4)), [rectangle(0, 2, 4, 4)]])
    planes = masks.crop(torch.tensor([[0.0, 0.0, 4.0, 4.0]] * 4), torch.tensor([2, 0, 1, 2]), 4)
    top = np.array([[1] * 4] * 2 + [[0] * 4] * 2)
    np.testing.assert_array_equal(planes.numpy(), np.stack([top[::-1], top, np.eye(4), top[::-1]]))


def test_nothing_to_crop_and_boxes_without_extent():
    masks = InstanceMasks([[rectangle(0, 0, 4, 4)]])
    assert masks.crop(torch.empty(0, 4), torch.empty(0, dtype=torch.int64), 7).shape == (0, 7, 7)
    empty = InstanceMasks()
    assert empty.crop(torch.empty(0, 4), torch.empty(0, dtype=torch.int64), 7).shape == (0, 7, 7)
    boxes = torch.tensor(
        [[1.0, 1.0, 1.0, 3.0], [1.0, 3.0, 3.0, 3.0], [3.0, 1.0, 2.0, 3.0], [1.0, 1.0, 3.0, 3.0]]
    )
    assert masks.crop(boxes, torch.zeros(4, dtype=torch.int64), 3).sum(dim=(1, 2)).tolist() == [0, 0, 0, 9]


def test_a_tiny_box_on_a_huge_mask_costs_no_more():
    # Millions of grid cells long if the outline were walked in cells.
    huge = InstanceMasks([[rectangle(0, 0, 1e6, 1e6)]])
    assert crop(huge, [5.0, 5.0, 5.001, 5.001], 28).min() == 1


def test_bad_arguments_are_refused():
    masks = InstanceMasks([[rectangle(0, 0, 4, 4)]])
    with pytest.raises(ValueError, match=r"expected boxes \[P, 4\] and indices \[P\]"):
        masks.crop(torch.zeros(2, 4), torch.zeros(1, dtype=torch.int64), 4)
    with pytest.raises(IndexError, match=r"indices must lie in 0\.\.0, got 0\.\.1"):
        masks.crop(torch.zeros(2, 4), torch.tensor([0, 1]), 4)
    with pytest.raises(ValueError, match="scales must be positive"):
        masks.scale(0.0, 1.0)
    with pytest.raises(ValueError, match="instance 1: a polygon needs an even count of at least 6"):
        InstanceMasks([[rectangle(0, 0, 4, 4)], [[1, 2, 3, 4]]])


def test_to_rle_is_what_the_evaluation_draws():
    rng = np.random.default_rng(4)
    polygon = blob(rng)
    plane = rng.random((HEIGHT, WIDTH)) < 0.5
    parts = [rectangle(1, 1, 9, 9), rectangle(20, 20, 30, 25)]
    masks = InstanceMasks([[polygon], encoded(plane), parts])
    first, second, third = masks.to_rle(HEIGHT, WIDTH)
    drawn = mask_utils.merge(mask_utils.frPyObjects([polygon.tolist()], HEIGHT, WIDTH))
    assert first["counts"] == drawn["counts"]
    np.testing.assert_array_equal(decoded(second), plane)
    assert int(mask_utils.area(third)) == 64 + 50
    flipped = masks.flip(WIDTH).to_rle(HEIGHT, WIDTH)
    np.testing.assert_array_equal(decoded(flipped[1]), plane[:, ::-1])
    np.testing.assert_array_equal(decoded(flipped[2]), decoded(third)[:, ::-1])
    doubled = masks.scale(2, 2).to_rle(2 * HEIGHT, 2 * WIDTH)
    np.testing.assert_array_equal(decoded(doubled[1]), plane.repeat(2, axis=0).repeat(2, axis=1))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 60), st.floats(0, 1))
def test_compressed_counts_are_read_as_pycocotools_reads_them(seed, height, width, share):
    plane = np.random.default_rng(seed).random((height, width)) < share
    rle = mask_utils.encode(np.asfortranarray(plane.astype(np.uint8)))
    runs = rle_counts(rle["counts"], height, width)
    np.testing.assert_array_equal(np.repeat(np.arange(len(runs)) % 2, runs), plane.ravel(order="F"))
    again = mask_utils.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
    assert again["counts"] == rle["counts"]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=30))
def test_any_bytes_are_either_refused_or_valid_runs(text):
    try:
        runs = rle_counts(text, 4, 5)
    except ValueError:
        return
    assert runs.sum() == 20
    assert (runs >= 0).all()
