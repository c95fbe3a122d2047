from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

from detector.data.annotations import LvisAnnotations
from detector.data.check import check_data
from detector.data.drawing import MAX_CLASSES, Placement, appearance, ground, outlines, paint
from detector.data.synthetic import train_image_counts, val_image_counts, write_synthetic
from detector.evaluation.backends import lvis_package


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("synthetic")
    return write_synthetic(root, num_train=120, num_val=40, num_classes=24, image_size=96, seed=3)


def test_several_processes_write_what_one_writes(tmp_path, small, monkeypatch):
    monkeypatch.setattr("detector.data.synthetic.MANY_IMAGES", 100)
    again = write_synthetic(tmp_path, num_train=120, num_val=40, num_classes=24, image_size=96, seed=3)
    assert again.train.read_bytes() == small.train.read_bytes()
    for path in sorted((tmp_path / "images").iterdir()):
        assert path.read_bytes() == (small.image_root / "images" / path.name).read_bytes()


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def decode(polygons, size):
    return mask_utils.decode([mask_utils.merge(mask_utils.frPyObjects(polygons, size, size))])[:, :, 0]


def test_the_files_pass_the_check(small):
    for path, images in ((small.train, 120), (small.val, 40)):
        report = check_data(path, small.image_root, decode=True)
        assert report.ok, report
        assert report.version == "LVIS v1"
        assert report.num_images == images
        assert report.num_unused_categories == 0
        assert report.num_zero_area == report.num_outside == report.num_crowd == 0


def test_the_lvis_package_reads_them(small):
    with lvis_package() as lvis:
        api = lvis.LVIS(str(small.train))
    assert len(api.get_img_ids()) == 120
    assert len(api.get_cat_ids()) == 24
    for annotation in api.load_anns(api.get_ann_ids())[:50]:
        mask = api.ann_to_mask(annotation)
        assert mask.sum() == annotation["area"]
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        x, y, w, h = annotation["bbox"]
        np.testing.assert_allclose(
            [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], [x, y, x + w, y + h], atol=1
        )


def test_every_key_of_lvis_v1_is_there(small):
    content = read(small.val)
    assert set(content) == {"info", "licenses", "categories", "images", "annotations"}
    assert set(content["images"][0]) == {
        "id",
        "width",
        "height",
        "license",
        "coco_url",
        "flickr_url",
        "date_captured",
        "neg_category_ids",
        "not_exhaustive_category_ids",
    }
    assert set(content["annotations"][0]) == {"id", "image_id", "category_id", "area", "bbox", "segmentation"}
    assert set(content["categories"][0]) == {
        "id",
        "name",
        "synset",
        "synonyms",
        "def",
        "frequency",
        "image_count",
        "instance_count",
    }
    names = [category["name"] for category in content["categories"]]
    assert len(set(names)) == 24


def test_counts_in_both_files_are_those_of_the_training_split(small):
    train = LvisAnnotations.from_file(small.train)
    for path in (small.train, small.val):
        categories = read(path)["categories"]
        assert [category["id"] for category in categories] == list(range(1, 25))
        assert [category["image_count"] for category in categories] == train.image_count.tolist()
        assert [category["instance_count"] for category in categories] == train.instance_count.tolist()
        for category in categories:
            count = category["image_count"]
            assert category["frequency"] == ("r" if count <= 10 else "c" if count <= 100 else "f")


def test_negatives_are_federated(small):
    content = read(small.train)
    present: dict[int, set[int]] = {image["id"]: set() for image in content["images"]}
    for annotation in content["annotations"]:
        present[annotation["image_id"]].add(annotation["category_id"])
    for image in content["images"]:
        negatives = image["neg_category_ids"]
        assert len(negatives) == len(set(negatives)) == 12
        assert negatives == sorted(negatives)
        assert not present[image["id"]] & set(negatives)
        assert set(image["not_exhaustive_category_ids"]) <= present[image["id"]]
    objects = [len(ids) for ids in present.values()]
    assert objects.count(0) == 2  # 2 % of the images are ground alone
    assert any(image["not_exhaustive_category_ids"] for image in content["images"])


def digest(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_equal_seeds_give_equal_bytes(tmp_path):
    options = {"num_train": 12, "num_val": 6, "num_classes": 5, "image_size": 64}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_synthetic(tmp_path / name, seed=seed, **options)
    first, again, other = (digest(tmp_path / name) for name in "abc")
    assert len(first) == 20
    assert first == again
    assert first.keys() == other.keys()
    assert not set(first.values()) & set(other.values())


def test_the_demo_has_rare_common_and_frequent_classes():
    counts = train_image_counts(24, 1200)
    assert (counts <= 10).sum() >= 5
    assert ((counts > 10) & (counts <= 100)).sum() >= 6
    assert (counts > 100).sum() >= 6
    assert counts[0] == 1
    val = val_image_counts(counts, 200)
    assert val.min() >= 5  # rare classes can be measured
    assert val.max() / val.min() < 8 < counts.max() / counts.min()


def test_the_curve_is_that_of_lvis_v1():
    # Quantiles of the published image counts of its 1203 categories; a huge data set does not bend the curve.
    counts = train_image_counts(1203, 10_000_000)
    published = {0.1: 3, 0.2: 6, 0.3: 12, 0.4: 22, 0.5: 37, 0.6: 66.2, 0.7: 130.4, 0.8: 358.2, 0.9: 1400.6}
    for quantile, count in published.items():
        assert np.quantile(counts, quantile) == pytest.approx(count, rel=0.3, abs=1)
    groups = [(counts <= 10).sum(), ((counts > 10) & (counts <= 100)).sum(), (counts > 100).sum()]
    np.testing.assert_allclose(groups, [337, 461, 405], atol=30)


@pytest.mark.parametrize(("classes", "images"), [(1, 50), (5, 300), (24, 400), (1203, 1500), (1203, 20_000)])
def test_counts_fit_the_images(classes, images):
    counts = train_image_counts(classes, images)
    assert (np.diff(counts) >= 0).all()
    assert counts.min() >= 1
    assert counts.max() <= images
    assert counts.sum() <= max(2.3 * images, 1.01 * classes)


def test_all_classes_of_a_large_vocabulary_appear(tmp_path):
    files = write_synthetic(tmp_path, num_train=320, num_val=260, num_classes=1203, image_size=48, seed=0)
    for path in files[:2]:
        assert LvisAnnotations.from_file(path).instance_count.min() >= 1


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match=f"num_classes must lie in 1..{MAX_CLASSES}, got 0"):
        write_synthetic(tmp_path, num_classes=0)
    with pytest.raises(ValueError, match="expected num_train >= 1"):
        write_synthetic(tmp_path, num_train=0)
    with pytest.raises(ValueError, match="10 images cannot hold 100 classes"):
        write_synthetic(tmp_path, num_train=10, num_val=10, num_classes=100)


def test_appearances_are_distinct():
    looks = {appearance(k) for k in range(MAX_CLASSES)}
    assert len(looks) == MAX_CLASSES >= 1203
    with pytest.raises(ValueError, match=f"number {MAX_CLASSES} is not one of them"):
        appearance(MAX_CLASSES)


def test_appearances_differ_in_their_pixels():
    pictures = []
    for k in range(0, MAX_CLASSES, 7):
        canvas = np.full((40, 40, 3), 128, dtype=np.float32)
        paint(canvas, appearance(k), Placement(20, 20, 18, 0.0), np.random.default_rng(0))
        pictures.append(canvas)
    flat = np.stack(pictures).reshape(len(pictures), -1)
    squares = (flat**2).sum(axis=1)
    distance = np.sqrt((squares[:, None] + squares[None] - 2 * flat @ flat.T).clip(0) / flat.shape[1])
    np.fill_diagonal(distance, np.inf)
    assert distance.min() > 6  # root mean square over the picture, in grey levels


def test_an_object_lies_where_it_was_placed():
    canvas = np.zeros((100, 100, 3), dtype=np.float32)
    circle = appearance(0)
    assert circle.shape == "circle"
    cover = paint(canvas, circle, Placement(50.3, 48.9, 30, 0.0), np.random.default_rng(0))
    middle = np.arange(100) + 0.5  # of the pixels
    x, y = (cover.sum(axis=0) @ middle / cover.sum(), cover.sum(axis=1) @ middle / cover.sum())
    assert (x, y) == pytest.approx((50.3, 48.9), abs=0.05)


def test_annotated_masks_show_only_what_is_visible(small):
    occluded = 0
    with lvis_package() as lvis:
        api = lvis.LVIS(str(small.train))
    for image in api.img_ann_map.values():
        masks = [decode(annotation["segmentation"], 96) for annotation in image]
        claims = np.sum(masks, axis=0)
        # Two neighbours may both claim pixels that their common border cuts.
        assert (claims > 1).sum() <= 0.06 * (claims > 0).sum()
        occluded += sum(len(annotation["segmentation"]) > 1 for annotation in image)
    assert occluded >= 1  # some objects are cut into parts by others


def test_coverage_has_the_area_of_the_shape():
    rng = np.random.default_rng(0)
    canvas = ground(rng, 100)
    for name, area in (
        ("circle", np.pi * 30**2),
        ("square", 2 * 30**2),
        ("ring", np.pi * 30**2 * (1 - 0.52**2)),
    ):
        look = next(appearance(k) for k in range(12) if appearance(k).shape == name)
        cover = paint(canvas, look, Placement(50.3, 48.9, 30, 0.4), rng)
        assert cover.sum() == pytest.approx(area, rel=0.015)
        # The outline follows it to a fraction of a pixel, the hole included.
        assert float(decode(outlines(cover), 100).sum()) == pytest.approx(area, rel=0.03)


def test_outlines_of_an_occluded_ring_have_parts():
    rng = np.random.default_rng(0)
    canvas = ground(rng, 100)
    ring = next(appearance(k) for k in range(12) if appearance(k).shape == "ring")
    bar = next(appearance(k) for k in range(12) if appearance(k).shape == "bar")
    behind = paint(canvas, ring, Placement(50, 50, 40, 0.0), rng)
    front = paint(canvas, bar, Placement(50, 50, 49, 0.1), rng)
    visible = behind * (1 - front)
    polygons = outlines(visible)
    assert len(polygons) == 2
    drawn, expected = decode(polygons, 100) > 0, visible > 0.5
    assert (drawn & expected).sum() / (drawn | expected).sum() > 0.95
    assert outlines(np.zeros((10, 10), dtype=np.float32)) == []


def test_an_outline_at_the_border_reaches_it():
    plane = np.zeros((20, 30), dtype=np.float32)
    plane[:, :7] = 1
    (polygon,) = outlines(plane)
    points = np.reshape(polygon, (-1, 2))
    assert points.min(axis=0).tolist() == [0, 0]
    assert points.max(axis=0).tolist() == [7, 20]


def test_objects_stand_out_from_the_ground(small):
    content = read(small.train)
    by_image: dict[int, list] = {}
    for annotation in content["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    contrasts = []
    for image in content["images"][:40]:
        name = image["coco_url"].split("/")[-1]
        pixels = np.asarray(Image.open(small.image_root / "images" / name), dtype=np.float32)
        masks = [decode(a["segmentation"], 96) > 0 for a in by_image.get(image["id"], [])]
        if masks:
            rest = pixels[~np.any(masks, axis=0)].mean(axis=0)
            contrasts += [np.abs(pixels[mask].mean(axis=0) - rest).max() for mask in masks]
    assert np.median(contrasts) > 40
