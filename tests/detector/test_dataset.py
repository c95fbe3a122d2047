from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_utils

from detector.data.annotations import LvisAnnotations
from detector.data.dataset import ImageError, LvisDataset, collate
from detector.data.loader import build_eval_loader, build_train_loader
from detector.data.sampler import SampleRef
from detector.data.transforms import FlipAndResize, resized_size
from tests.detector.lvis_files import annotation_entry, image_entry, lvis_file, write_image, write_json

EXIF_ORIENTATION = 0x0112


def make_dataset(root, images, annotations, *, training=True, transform=None, mode="RGB"):
    path = write_json(root, lvis_file(images, annotations))
    for image in images:
        write_image(root, image, mode)
    return LvisDataset(LvisAnnotations.from_file(path), root, transform=transform, training=training)


def rectangle_entry(annotation_id, image_id, x, y, w, h, **changes):
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return annotation_entry(
        annotation_id, image_id, bbox=[x, y, w, h], area=w * h, segmentation=[polygon], **changes
    )


def test_a_sample_without_transform(tmp_path):
    image = image_entry(5, neg_category_ids=[9, 7], not_exhaustive_category_ids=[3])
    dataset = make_dataset(tmp_path, [image_entry(1), image], [rectangle_entry(8, 5, 10, 12, 20, 6)])
    picture, target = dataset[1]
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, 48, 64)
    assert int(picture[0, 24, 60]) > 200 > 60 > int(picture[0, 24, 4])  # the red ramp of the file
    assert abs(int(picture[1, 20, 20]) - 40) <= 6
    assert abs(int(picture[2, 20, 20]) - 90) <= 6
    assert target["boxes"].tolist() == [[10, 12, 30, 18]]
    assert target["labels"].tolist() == [0]
    assert (target["image_id"], target["image_index"], target["original_size"]) == (5, 1, (48, 64))
    assert (target["scale"], target["flipped"]) == ((1.0, 1.0), False)
    assert target["neg_labels"].tolist() == [2, 1]
    assert target["not_exhaustive_labels"].tolist() == [0]
    assert target["annotation_ids"].tolist() == [8]
    whole = target["masks"].crop(torch.tensor([[0.0, 0.0, 64.0, 64.0]]), torch.tensor([0]), 64)[0]
    assert whole.sum() == 120
    assert whole[12:18, 10:30].min() == 1


def test_crowd_and_zero_area_are_left_out_in_training_only(tmp_path):
    annotations = [
        rectangle_entry(1, 1, 10, 10, 5, 5, iscrowd=1),
        rectangle_entry(2, 1, 20, 10, 5, 5, category_id=7),
        annotation_entry(3, 1, bbox=[5, 5, 0, 9]),
        annotation_entry(4, 1, bbox=[64, 5, 10, 9]),  # beyond the right border: clipped to nothing
        rectangle_entry(5, 1, 40, 20, 9, 9, category_id=9),
    ]
    training = make_dataset(tmp_path, [image_entry(1)], annotations)[0][1]
    assert training["annotation_ids"].tolist() == [2, 5]
    assert training["labels"].tolist() == [1, 2]
    assert training["crowd"].tolist() == [False, False]
    assert len(training["masks"]) == 2
    second = training["masks"].crop(training["boxes"], torch.tensor([0, 1]), 4)
    assert second.min() == 1  # masks stay with their boxes
    evaluation = make_dataset(tmp_path, [image_entry(1)], annotations, training=False)[0][1]
    assert evaluation["annotation_ids"].tolist() == [1, 2, 3, 4, 5]
    assert evaluation["crowd"].tolist() == [True, False, False, False, False]


def test_an_image_without_annotations(tmp_path):
    picture, target = make_dataset(tmp_path, [image_entry(1)], [], transform=FlipAndResize(96, 200, 1.0))[0]
    assert picture.shape == (3, 96, 128)
    assert target["boxes"].shape == (0, 4)
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].shape == (0,)
    assert target["labels"].dtype == torch.int64
    assert len(target["masks"]) == 0


def test_boxes_are_clipped_to_the_image(tmp_path):
    annotations = [rectangle_entry(1, 1, -5, 40, 20, 30)]
    assert make_dataset(tmp_path, [image_entry(1)], annotations)[0][1]["boxes"].tolist() == [[0, 40, 15, 48]]


def test_flip_and_resize_move_image_boxes_and_masks_together(tmp_path):
    transform = FlipAndResize(96, 1000, flip_probability=1.0)
    annotations = [rectangle_entry(1, 1, 8, 12, 16, 6)]
    dataset = make_dataset(tmp_path, [image_entry(1)], annotations, transform=transform)
    picture, target = dataset[SampleRef(0, 3)]
    assert picture.shape == (3, 96, 128)
    assert int(picture[0, 48, 8]) > 200 > 60 > int(picture[0, 48, 120])  # the ramp runs the other way
    assert target["boxes"].tolist() == [[80, 24, 112, 36]]  # 2 * (64 - 24), 2 * 12, 2 * (64 - 8), 2 * 18
    assert target["flipped"] is True
    assert target["scale"] == (2.0, 2.0)
    assert target["original_size"] == (48, 64)
    whole = target["masks"].crop(torch.tensor([[0.0, 0.0, 128.0, 128.0]]), torch.tensor([0]), 128)[0]
    assert whole.sum() == 32 * 12
    assert whole[24:36, 80:112].min() == 1


def test_rounding_to_whole_pixels_stretches_each_axis_by_its_own_factor(tmp_path):
    # 100 x 3 pixels with the long side bounded to 50: 50 x 1.5, rounded to 50 x 2.
    image = image_entry(1, width=100, height=3)
    annotations = [rectangle_entry(1, 1, 20, 0, 40, 3)]
    transform = FlipAndResize(800, 50)
    picture, target = make_dataset(tmp_path, [image], annotations, transform=transform)[0]
    assert picture.shape == (3, 2, 50)
    assert target["scale"] == pytest.approx((0.5, 2 / 3))
    np.testing.assert_allclose(target["boxes"].numpy(), [[10, 0, 30, 2]], rtol=1e-6)
    whole = target["masks"].crop(torch.tensor([[0.0, 0.0, 50.0, 50.0]]), torch.tensor([0]), 50)[0]
    assert whole.sum() == 2 * 20
    assert whole[:2, 10:30].min() == 1


def test_chance_comes_from_the_sample_seed(tmp_path):
    transform = FlipAndResize((40, 48, 56, 64), 200, flip_probability=0.5)
    dataset = make_dataset(tmp_path, [image_entry(1)], [annotation_entry(1)], transform=transform)

    def look(seed):
        picture, target = dataset[SampleRef(0, seed)]
        return tuple(picture.shape), target["flipped"]

    looks = [look(seed) for seed in range(40)]
    assert len(set(looks)) == 8
    assert looks == [look(seed) for seed in range(40)]


def test_a_drawn_object_stays_under_its_mask(tmp_path):
    # A white rectangle in the file; after every transform the bright pixels are those of the mask.
    image = image_entry(1, width=120, height=80)
    dataset = make_dataset(tmp_path, [image], [rectangle_entry(1, 1, 20, 10, 40, 50)])
    canvas = Image.new("RGB", (120, 80))
    canvas.paste((255, 255, 255), (20, 10, 60, 60))
    canvas.save(tmp_path / "train2017" / "000000000001.jpg", quality=95)
    dataset.transform = FlipAndResize(range(90, 140), 160, flip_probability=0.5)
    for seed in range(12):
        picture, target = dataset[SampleRef(0, seed)]
        height, width = picture.shape[1:]
        (plane,) = target["masks"].to_rle(height, width)
        drawn = torch.from_numpy(np.asarray(mask_utils.decode([plane]))[:, :, 0]).bool()
        bright = picture[0] > 127
        assert (drawn & bright).sum() / (drawn | bright).sum() > 0.97


@pytest.mark.parametrize(
    ("size", "min_size", "max_size", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),  # 640 * 800 / 480 = 1066.7
        ((640, 480), 640, 1333, (853, 640)),
        ((400, 1000), 800, 1333, (533, 1333)),  # bounded by the long side: 400 * 1.333 = 533.2
        ((160, 160), 160, 266, (160, 160)),
        ((1, 5000), 800, 1333, (1, 1333)),
    ],
)
def test_resized_size(size, min_size, max_size, expected):
    assert resized_size(*size, min_size, max_size) == expected


def test_scales_and_flips_are_drawn_evenly():
    image = torch.zeros(3, 30, 40, dtype=torch.uint8)
    transform = FlipAndResize((30, 36, 42), 100, flip_probability=0.25)

    class NoMasks:
        def flip(self, width):
            return self

        def scale(self, sx, sy):
            return self

    target = {"boxes": torch.zeros(0, 4), "masks": NoMasks(), "flipped": False, "scale": (1.0, 1.0)}
    drawn = [transform(image, target, np.random.default_rng(seed)) for seed in range(900)]
    heights = np.array([picture.shape[1] for picture, _ in drawn])
    flips = np.array([made["flipped"] for _, made in drawn])
    for size in (30, 36, 42):
        assert (heights == size).mean() == pytest.approx(1 / 3, abs=0.063)  # four standard deviations
    assert flips.mean() == pytest.approx(0.25, abs=0.058)
    assert target["flipped"] is False  # the caller's target is not changed


def test_bad_transform_arguments_are_refused():
    with pytest.raises(ValueError, match="sizes must be positive"):
        FlipAndResize((), 100)
    with pytest.raises(ValueError, match="sizes must be positive"):
        FlipAndResize((0, 10), 100)
    with pytest.raises(ValueError, match="flip probability must lie in"):
        FlipAndResize(10, 100, 1.5)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colour_modes_become_rgb(tmp_path, mode):
    picture, _ = make_dataset(tmp_path, [image_entry(1)], [], mode=mode)[0]
    assert picture.shape == (3, 48, 64)
    assert int(picture[0, 24, 60]) - int(picture[0, 24, 4]) > 40  # brighter to the right, as the file is
    if mode == "L":
        assert torch.equal(picture[0], picture[1])
        assert torch.equal(picture[0], picture[2])


def test_exif_orientation_is_applied(tmp_path):
    dataset = make_dataset(tmp_path, [image_entry(1, width=48, height=64)], [])
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # to be turned by 90 degrees clockwise: the left becomes the top
    write_image(tmp_path, image_entry(1, width=64, height=48), exif=exif)
    picture, _ = dataset[0]
    assert picture.shape == (3, 64, 48)
    assert int(picture[0, 60, 24]) > 200 > 60 > int(picture[0, 4, 24])


def test_bad_images_are_named(tmp_path):
    dataset = make_dataset(tmp_path, [image_entry(k) for k in (4, 5, 6, 7)], [])
    folder = tmp_path / "train2017"
    (folder / "000000000004.jpg").unlink()
    (folder / "000000000005.jpg").write_bytes(b"this is no picture")
    whole = (folder / "000000000006.jpg").read_bytes()
    (folder / "000000000006.jpg").write_bytes(whole[: len(whole) // 2])
    write_image(tmp_path, image_entry(7, width=60, height=48))
    with pytest.raises(ImageError, match=r"train2017/000000000004\.jpg \(image 4\) does not exist"):
        dataset[0]
    with pytest.raises(ImageError, match=r"000000000005\.jpg \(image 5\) cannot be decoded"):
        dataset[1]
    with pytest.raises(ImageError, match=r"000000000006\.jpg \(image 6\) cannot be decoded"):
        dataset[2]
    with pytest.raises(ImageError, match=r"\(image 7\) is 60 x 48 pixels, annotated as 64 x 48"):
        dataset[3]


@pytest.fixture
def dozen(tmp_path):
    """Twelve images, five of them portrait, with one object each."""
    images = [image_entry(k, width=48 if k <= 5 else 64, height=64 if k <= 5 else 48) for k in range(1, 13)]
    annotations = [rectangle_entry(k, k, 5 + k, 10, 20, 12) for k in range(1, 13)]
    dataset = make_dataset(tmp_path, images, annotations)
    return dataset.annotations, tmp_path


def train_batches(dozen, num_workers, epoch=2, start=0, **options):
    loader, sampler = build_train_loader(
        *dozen, batch_size=2, min_sizes=(40, 48, 56), max_size=90, seed=11, num_workers=num_workers, **options
    )
    sampler.set_position(epoch, start)
    return list(loader)


def assert_same_batches(one, other):
    assert len(one) == len(other) > 0
    for (images, targets), (other_images, other_targets) in zip(one, other, strict=True):
        for image, other_image in zip(images, other_images, strict=True):
            assert torch.equal(image, other_image)
        for target, other_target in zip(targets, other_targets, strict=True):
            assert target["image_id"] == other_target["image_id"]
            assert torch.equal(target["boxes"], other_target["boxes"])
            grid = torch.tensor([[0.0, 0.0, 90.0, 90.0]])
            planes = [t["masks"].crop(grid, torch.tensor([0]), 90) for t in (target, other_target)]
            assert torch.equal(*planes)


def test_batches_do_not_depend_on_the_number_of_workers(dozen):
    alone = train_batches(dozen, 0)
    assert len(alone) == 6
    assert_same_batches(alone, train_batches(dozen, 2))
    ids = [target["image_id"] for _, targets in alone for target in targets]
    assert sorted(ids) == list(range(1, 13))
    other = [target["image_id"] for _, targets in train_batches(dozen, 0, epoch=3) for target in targets]
    assert ids != other


def test_a_resumed_loader_gives_the_rest(dozen):
    assert_same_batches(train_batches(dozen, 0)[4:], train_batches(dozen, 2, start=4))


def test_the_global_random_state_has_no_say(dozen):
    torch.manual_seed(0)
    np.random.seed(0)
    first = train_batches(dozen, 0)
    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.get_rng_state()
    assert_same_batches(first, train_batches(dozen, 0))
    assert torch.equal(state, torch.get_rng_state())  # nor is it moved


def test_workers_keep_the_collector_off_the_parents_objects(dozen):
    """Those of every imported module, of which a worker would otherwise copy page after page."""
    before = gc.get_freeze_count()
    loader, sampler = build_train_loader(*dozen, batch_size=2, min_sizes=(40,), max_size=90, num_workers=1)
    loader.dataset.transform = lambda image, target, rng: (image, {"frozen": gc.get_freeze_count()})
    sampler.set_position(0)
    assert all(target["frozen"] > before + 10_000 for _, targets in loader for target in targets)
    assert gc.get_freeze_count() == before


def test_the_eval_loader_gives_every_image_once_over_all_ranks(dozen):
    seen = []
    for rank in range(5):
        for images, targets in build_eval_loader(
            *dozen, min_size=96, max_size=200, batch_size=2, rank=rank, world_size=5
        ):
            assert all(min(image.shape[1:]) == 96 for image in images)
            assert not any(target["flipped"] for target in targets)
            seen += [target["image_id"] for target in targets]
    assert sorted(seen) == list(range(1, 13))
    with pytest.raises(ValueError, match="0 <= rank < world_size"):
        build_eval_loader(*dozen, min_size=96, max_size=200, rank=1, world_size=1)


def test_errors_in_workers_name_the_image(dozen):
    _annotations, root = dozen
    (root / "train2017" / "000000000003.jpg").unlink()
    with pytest.raises(ImageError, match=r"000000000003\.jpg \(image 3\) does not exist"):
        train_batches(dozen, 2)


def test_collate_keeps_images_of_different_sizes():
    images, targets = collate(
        [(torch.zeros(3, 2, 5), {"image_id": 1}), (torch.ones(3, 4, 3), {"image_id": 2})]
    )
    assert [tuple(image.shape) for image in images] == [(3, 2, 5), (3, 4, 3)]
    assert [target["image_id"] for target in targets] == [1, 2]
