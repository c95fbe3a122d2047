from __future__ import annotations

import copy
import json
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils

from detector.data import json_stream
from detector.data.annotations import AnnotationError, LvisAnnotations, frequency_group
from detector.data.json_stream import JsonError, iter_members
from detector.data.masks import InstanceMasks
from tests.detector.lvis_files import (
    TRIANGLE,
    annotation_entry,
    category_entry,
    image_entry,
    lvis_file,
    write_json,
)


def load(tmp_path, **lists):
    return LvisAnnotations.from_file(write_json(tmp_path, lvis_file(**lists)))


def test_reads_lvis_v1(tmp_path):
    annotations = load(
        tmp_path,
        images=[
            image_entry(20, neg_category_ids=[9, 3], not_exhaustive_category_ids=[7]),
            image_entry(10, width=30, height=60),
        ],
        annotations=[
            annotation_entry(5, 10, category_id=7, bbox=[1.5, 2, 3.25, 4], area=6.5),
            annotation_entry(2, 20),
            annotation_entry(9, 10, category_id=9),
            annotation_entry(4, 10, category_id=9),
        ],
    )
    assert annotations.version == "LVIS v1"
    assert annotations.num_classes == 3
    np.testing.assert_array_equal(annotations.category_ids, [3, 7, 9])
    assert annotations.category_names == ["thing 3", "thing 7", "thing 9"]
    np.testing.assert_array_equal(annotations.image_ids, [20, 10])
    np.testing.assert_allclose(annotations.aspect_ratios, [64 / 48, 0.5], rtol=1e-15)
    np.testing.assert_array_equal(annotations.image_count, [1, 1, 1])
    np.testing.assert_array_equal(annotations.instance_count, [1, 1, 2])
    assert annotations.num_images_with_annotations == 2

    record = annotations.image(0)
    assert (record.image_id, record.height, record.width) == (20, 48, 64)
    assert record.file_name == "train2017/000000000020.jpg"
    np.testing.assert_array_equal(record.neg_category_labels, [2, 0])
    np.testing.assert_array_equal(record.not_exhaustive_category_labels, [1])
    assert len(annotations.image(1).neg_category_labels) == 0

    found = annotations.instances(1)
    np.testing.assert_array_equal(found.annotation_ids, [5, 9, 4])  # file order
    np.testing.assert_array_equal(found.labels, [1, 2, 2])
    np.testing.assert_array_equal(found.boxes[0], np.array([1.5, 2, 4.75, 6], dtype=np.float32))
    np.testing.assert_array_equal(found.areas, [6.5, 300, 300])
    np.testing.assert_array_equal(found.segmentations[0][0], np.array(TRIANGLE, dtype=np.float32))
    assert found.boxes.dtype == np.float32
    assert not found.crowd.any()


def test_instances_keep_the_order_of_the_file(tmp_path):
    annotations = load(
        tmp_path,
        images=[image_entry(k) for k in range(3)],
        annotations=[annotation_entry(1000 - k, k * k % 3) for k in range(600)],
    )
    for image in range(3):
        expected = [1000 - k for k in range(600) if k * k % 3 == image]
        np.testing.assert_array_equal(annotations.instances(image).annotation_ids, expected)


def test_lvis_v05_has_file_names_of_2014(tmp_path):
    # v0.5 repeats COCO's 2014 names, but its images are published as train2017/<number>.jpg.
    url = "http://images.cocodataset.org/train2017/000000391895.jpg"
    annotations = load(
        tmp_path,
        images=[
            image_entry(1, file_name="COCO_val2014_000000391895.jpg", coco_url=url),
            image_entry(2, file_name="own/folder/picture.png"),
        ],
    )
    assert annotations.version == "LVIS v0.5"
    assert annotations.image(0).file_name == "train2017/000000391895.jpg"
    assert annotations.image(1).file_name == "own/folder/picture.png"


def test_reads_plain_coco(tmp_path):
    image = {"id": 1, "width": 64, "height": 48, "file_name": "a.jpg"}
    categories = [{"id": 3, "name": "cat"}, {"id": 90, "name": "brush"}]
    annotations = load(tmp_path, images=[image], categories=categories)
    assert annotations.version == "COCO"
    assert annotations.image(0).file_name == "a.jpg"
    assert annotations.category_frequency == ["r", "r"]  # by the images in this file: 1 and 0
    np.testing.assert_array_equal(annotations.image_count, [1, 0])


def test_frequency_comes_from_the_file_if_every_category_states_it(tmp_path):
    stated = [category_entry(3, "c"), category_entry(7, "f")]
    assert load(tmp_path, categories=stated).category_frequency == ["c", "f"]
    partly = [category_entry(3, "c"), {"id": 7, "name": "x"}]
    assert load(tmp_path, categories=partly).category_frequency == ["r", "r"]


@pytest.mark.parametrize(("images", "group"), [(0, "r"), (10, "r"), (11, "c"), (100, "c"), (101, "f")])
def test_frequency_groups(images, group):
    assert frequency_group(images) == group


def test_images_without_annotations_are_kept(tmp_path):
    annotations = load(tmp_path, images=[image_entry(1), image_entry(2), image_entry(3)])
    assert len(annotations) == 3
    assert annotations.num_images_with_annotations == 1
    empty = annotations.instances(1)
    assert empty.boxes.shape == (0, 4)
    assert empty.segmentations == []
    file_without_any = load(tmp_path, annotations=[])
    assert file_without_any.instances(0).boxes.shape == (0, 4)
    np.testing.assert_array_equal(file_without_any.instance_count, [0, 0, 0])


def test_crowd_zero_area_and_multi_part(tmp_path):
    second_part = [40.0, 5.0, 50.0, 5.0, 50.0, 8.0, 40.0, 8.0]
    annotations = load(
        tmp_path,
        annotations=[
            annotation_entry(1, segmentation=[TRIANGLE, second_part]),
            annotation_entry(2, bbox=[5, 5, 0, 3], area=0),
            annotation_entry(3, iscrowd=1, category_id=7),
        ],
    )
    found = annotations.instances(0)
    np.testing.assert_array_equal(found.crowd, [False, False, True])
    np.testing.assert_array_equal(found.boxes[1], [5, 5, 5, 8])
    assert [part.tolist() for part in found.segmentations[0]] == [TRIANGLE, second_part]
    # A crowd region is no instance of its class.
    np.testing.assert_array_equal(annotations.image_count, [1, 0, 0])
    np.testing.assert_array_equal(annotations.instance_count, [2, 0, 0])


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e39, 1e30])
def test_outlines_may_be_huge_but_must_be_finite(tmp_path, number):
    polygon = [*TRIANGLE, number, 1.0]
    entries = [annotation_entry(5, segmentation=[TRIANGLE, polygon])]
    if number == 1e30:
        found = load(tmp_path, annotations=entries).instances(0).segmentations[0][1]
        np.testing.assert_array_equal(found, np.array(polygon, dtype=np.float32))
    else:
        with pytest.raises(AnnotationError, match=r"annotation 5: broken segmentation: .* not finite"):
            load(tmp_path, annotations=entries)


def test_both_kinds_of_rle_give_the_same_mask(tmp_path):
    plane = np.zeros((48, 64), dtype=np.uint8, order="F")
    plane[7:31, 12:50] = 1
    plane[10:12, 20:22] = 0
    compressed = mask_utils.encode(plane)
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], plane.ravel(order="F"), [2]]))))
    text = {"size": [48, 64], "counts": compressed["counts"].decode()}
    annotations = load(
        tmp_path,
        annotations=[
            annotation_entry(1, segmentation=text),
            annotation_entry(2, segmentation={"size": [48, 64], "counts": runs.tolist()}),
        ],
    )
    first, second = annotations.instances(0).segmentations
    assert first == second == {"size": [48, 64], "counts": compressed["counts"]}
    np.testing.assert_array_equal(mask_utils.decode(first), plane)


BROKEN = {
    "unknown category": (annotation_entry(77, category_id=4), "annotation 77: unknown category id 4"),
    "unknown image": (annotation_entry(77, image_id=8), "annotation 77: unknown image id 8"),
    "no bbox": (
        {k: v for k, v in annotation_entry(77).items() if k != "bbox"},
        "annotation 77: missing key 'bbox'",
    ),
    "no segmentation": (
        {k: v for k, v in annotation_entry(77).items() if k != "segmentation"},
        "annotation 77: missing key 'segmentation'",
    ),
    "duplicate": (annotation_entry(1), "annotation 1: the id appears twice"),
    "no id": (
        {k: v for k, v in annotation_entry(77).items() if k != "id"},
        "annotation None: entry 1 of 'annotations' has no integer 'id'",
    ),
    "nan bbox": (
        annotation_entry(77, bbox=[1, float("nan"), 2, 3]),
        "annotation 77: bbox must be four finite",
    ),
    "inf bbox": (
        annotation_entry(77, bbox=[1, 2, float("inf"), 3]),
        "annotation 77: bbox must be four finite",
    ),
    "text bbox": (annotation_entry(77, bbox="1 2 3 4"), "annotation 77: bbox must be four finite"),
    "short bbox": (annotation_entry(77, bbox=[1, 2, 3]), "annotation 77: bbox must be four finite"),
    "negative width": (
        annotation_entry(77, bbox=[1, 2, -3, 4]),
        "annotation 77: bbox must not have a negative",
    ),
    "area": (annotation_entry(77, area=None), "annotation 77: area must be a finite number"),
    "crowd": (annotation_entry(77, iscrowd=2), "annotation 77: iscrowd must be 0 or 1"),
    "odd polygon": (
        annotation_entry(77, segmentation=[[1, 2, 3, 4, 5, 6, 7]]),
        "annotation 77: broken segmentation: a polygon needs an even count of at least 6 numbers, got 7",
    ),
    "short polygon": (
        annotation_entry(77, segmentation=[TRIANGLE, [1, 2, 3, 4]]),
        "annotation 77: broken segmentation: a polygon needs an even count of at least 6 numbers, got 4",
    ),
    "flat polygon": (
        annotation_entry(77, segmentation=TRIANGLE),
        "annotation 77: broken segmentation: a polygon",
    ),
    "text in polygon": (
        annotation_entry(77, segmentation=[[1, 2, 3, 4, 5, "6"]]),
        "annotation 77: broken segmentation: a polygon holds something that is not a number",
    ),
    "nan polygon": (
        annotation_entry(77, segmentation=[[1, 2, 3, 4, 5, float("nan")]]),
        "annotation 77: broken segmentation: a polygon holds a number that is not finite",
    ),
    "empty segmentation": (
        annotation_entry(77, segmentation=[]),
        "annotation 77: segmentation must be an RLE or",
    ),
    "rle of another size": (
        annotation_entry(77, segmentation={"size": [64, 48], "counts": [64 * 48]}),
        r"annotation 77: RLE size \[64, 48\] differs from the image's \[48, 64\]",
    ),
    "rle too short": (
        annotation_entry(77, segmentation={"size": [48, 64], "counts": [48 * 64 - 1]}),
        "annotation 77: broken segmentation: RLE counts must be runs that sum to 48 \\* 64",
    ),
    "rle negative": (
        annotation_entry(77, segmentation={"size": [48, 64], "counts": [-1, 48 * 64 + 1]}),
        "annotation 77: broken segmentation: RLE counts must be runs",
    ),
    "rle string cut": (
        annotation_entry(77, segmentation={"size": [48, 64], "counts": "Pb"}),
        "annotation 77: broken segmentation: the compressed RLE counts",
    ),
    "rle string alien": (
        annotation_entry(77, segmentation={"size": [48, 64], "counts": "1 2"}),
        "annotation 77: broken segmentation: the compressed RLE counts",
    ),
    "rle without counts": (
        annotation_entry(77, segmentation={"size": [48, 64]}),
        "annotation 77: broken segmentation: RLE counts must be",
    ),
}


@pytest.mark.parametrize(("entry", "message"), BROKEN.values(), ids=list(BROKEN))
def test_a_broken_annotation_is_named(tmp_path, entry, message):
    path = write_json(tmp_path, lvis_file(annotations=[annotation_entry(1), entry, annotation_entry(2)]))
    with pytest.raises(AnnotationError, match=message) as caught:
        LvisAnnotations.from_file(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"coco_url": None, "file_name": "/etc/passwd"},
            "image 1: the image path '/etc/passwd' must be relative",
        ),
        ({"file_name": "../../secret.jpg"}, "image 1: the image path '../../secret.jpg' must be relative"),
        ({"file_name": "a/../b.jpg"}, "image 1: the image path 'a/../b.jpg' must be relative"),
        ({"file_name": "C:\\x.jpg"}, "image 1: the image path .* must be relative"),
        ({"file_name": ""}, "image 1: the image path '' must be relative"),
        (
            {"coco_url": "http://host/../../x.jpg", "file_name": None},
            "image 1: the image path '../x.jpg' must be",
        ),
        ({"coco_url": None}, "image 1: it has neither 'file_name' nor 'coco_url'"),
        ({"height": 0}, "image 1: height and width must be positive integers"),
        ({"width": "64"}, "image 1: height and width must be positive integers"),
        ({"neg_category_ids": [3, 4]}, "image 1: unknown category id 4 in neg_category_ids"),
        (
            {"not_exhaustive_category_ids": [5]},
            "image 1: unknown category id 5 in not_exhaustive_category_ids",
        ),
        ({"neg_category_ids": "3"}, "image 1: neg_category_ids and .* must be lists of integers"),
    ],
)
def test_a_broken_image_is_named(tmp_path, changes, message):
    path = write_json(tmp_path, lvis_file(images=[image_entry(2), image_entry(1, **changes)]))
    with pytest.raises(AnnotationError, match=message):
        LvisAnnotations.from_file(path)


def test_other_broken_entries_are_named(tmp_path):
    with pytest.raises(AnnotationError, match="image 1: the id appears twice"):
        load(tmp_path, images=[image_entry(), image_entry()])
    with pytest.raises(AnnotationError, match="category 3: the id appears twice"):
        load(tmp_path, categories=[category_entry(3), category_entry(3)])
    with pytest.raises(AnnotationError, match="category 3: missing key 'name'"):
        load(tmp_path, categories=[{"id": 3}])
    with pytest.raises(
        AnnotationError, match="annotation None: entry 0 of 'annotations' has no integer 'id'"
    ):
        load(tmp_path, annotations=["nonsense"])


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_a_missing_list_is_named(tmp_path, key):
    content = lvis_file(annotations=[])
    del content[key]
    with pytest.raises(AnnotationError, match=f"file: the key '{key}' is missing"):
        LvisAnnotations.from_file(write_json(tmp_path, content))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.999])
def test_a_truncated_file_is_named(tmp_path, share):
    path = write_json(tmp_path, lvis_file(annotations=[annotation_entry(k) for k in range(50)]))
    text = path.read_text()
    path.write_text(text[: int(share * len(text))])
    with pytest.raises(AnnotationError, match=r"annotations\.json: .*\(at character \d+\)"):
        LvisAnnotations.from_file(path)


@pytest.mark.parametrize(
    "text", ["[]", "12", "{} {}", '{"images": [}', '{"a": 1 "b": 2}', '{"a": [1,]}', "{1: 2}"]
)
def test_malformed_json_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(JsonError, match="at character"):
        list(iter_members(path))


def test_not_text_and_too_deep_are_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(JsonError, match="not UTF-8"):
        list(iter_members(path))
    path.write_text('{"a": [' + "[" * 200_000)
    with pytest.raises(JsonError, match="nested too deeply"):
        list(iter_members(path))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
def test_the_stream_equals_json_load_whatever_the_chunks(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    content = {
        "a": [1, 23, {"x": [4, -5.5e3]}, 'é"],'],
        "n": 123456,
        "o": {"k": [None, True]},
        "e": [],
        "z": "…",
    }
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    expected = []
    for key, value in content.items():
        expected += [(key, item) for item in value] if isinstance(value, list) and value else [(key, value)]
    assert list(iter_members(path)) == expected


JUNK = [
    None,
    True,
    -1,
    10**30,
    1e400,
    float("nan"),
    1e300,
    "x",
    "\ud800",
    "../..",
    [],
    {},
    [[]],
    [{}],
    [1, 2],
]


def places(node, path=()):
    """The path of every value inside nested lists and dictionaries."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def test_junk_anywhere_is_refused_or_harmless(tmp_path):
    rle = {"size": [48, 64], "counts": [100, 48 * 64 - 100]}
    content = lvis_file(
        [image_entry(1, neg_category_ids=[7])], [annotation_entry(1), annotation_entry(2, segmentation=rle)]
    )
    refused = 0
    for path in places(content):
        for junk in JUNK:
            spoiled = copy.deepcopy(content)
            node = spoiled
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = junk
            try:
                annotations = LvisAnnotations.from_file(write_json(tmp_path, spoiled))
            except AnnotationError:
                refused += 1
                continue
            for i in range(len(annotations)):
                annotations.image(i)
                found = annotations.instances(i)
                assert np.isfinite(found.boxes).all()
                masks = InstanceMasks(found.segmentations)
                masks.crop(torch.from_numpy(found.boxes), torch.arange(len(masks)), 4)
    assert refused > 300


def test_an_index_outside_is_refused(tmp_path):
    annotations = load(tmp_path)
    for i in (-1, 1):
        with pytest.raises(IndexError, match=f"image index {i} does not lie in 0..0"):
            annotations.image(i)
        with pytest.raises(IndexError, match=f"image index {i} does not lie in 0..0"):
            annotations.instances(i)


def test_pickled_annotations_are_equal(tmp_path):
    annotations = load(tmp_path, annotations=[annotation_entry(k) for k in range(3)])
    twin = pickle.loads(pickle.dumps(annotations))
    np.testing.assert_array_equal(twin.instances(0).annotation_ids, [0, 1, 2])
    np.testing.assert_array_equal(twin.instances(0).segmentations[2][0], TRIANGLE)
    assert twin.image(0).file_name == "train2017/000000000001.jpg"


def test_memory_stays_near_the_size_of_the_outlines(tmp_path, monkeypatch):
    # 8,000 outlines of 100 float32 are 3.2 MB; as Python lists of floats they would be 26 MB.
    monkeypatch.setattr(json_stream, "CHUNK", 1 << 16)
    polygon = [round(0.37 * k, 2) for k in range(100)]
    path = write_json(
        tmp_path, lvis_file(annotations=[annotation_entry(k, segmentation=[polygon]) for k in range(8_000)])
    )
    tracemalloc.start()
    annotations = LvisAnnotations.from_file(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert annotations.num_instances == 8_000
    assert peak < 10e6
