from __future__ import annotations

import pytest

from detector.data.annotations import AnnotationError, LvisAnnotations
from detector.data.check import check_data, format_report
from tests.detector.lvis_files import (
    annotation_entry,
    category_entry,
    image_entry,
    lvis_file,
    write_image,
    write_json,
)


@pytest.fixture
def mixed(tmp_path):
    """Four images in two folders, one of them without annotations; all files are there."""
    images = [image_entry(k) for k in (1, 2, 3)]
    images.append(image_entry(4, coco_url="http://images.cocodataset.org/val2017/000000000004.jpg"))
    annotations = [
        annotation_entry(1, 1),
        annotation_entry(2, 1, iscrowd=1),
        annotation_entry(3, 2, bbox=[5, 5, 0, 4]),
        annotation_entry(4, 4, bbox=[50, 10, 15.5, 10]),  # reaches 1.5 pixels over the right border
        annotation_entry(5, 4, bbox=[50, 10, 14.5, 10]),  # 0.5 pixels: rounding, not worth a word
    ]
    categories = [category_entry(3, "f"), category_entry(7, "c"), category_entry(9, "c")]
    path = write_json(tmp_path, lvis_file(images, annotations, categories))
    for image in images[:3]:
        write_image(tmp_path, image)
    (tmp_path / "val2017").mkdir()
    write_image(tmp_path, images[3]).rename(tmp_path / "val2017" / "000000000004.jpg")
    return path


def test_a_sound_data_set(mixed, tmp_path):
    report = check_data(mixed, tmp_path)
    assert report.ok
    assert report.version == "LVIS v1"
    assert (report.num_images, report.num_images_without_annotations) == (4, 1)
    assert (report.num_instances, report.num_crowd, report.num_zero_area, report.num_outside) == (5, 1, 1, 1)
    assert (report.num_categories, report.num_unused_categories) == (3, 2)
    assert report.groups == {"r": 0, "c": 2, "f": 1}
    assert report.images_per_folder == {"train2017": 3, "val2017": 1}
    text = format_report(report)
    assert "images       4, 1 without annotations" in text
    assert "categories   3: 0 rare, 2 common, 1 frequent; 2 without an instance here" in text
    assert "train2017/   3" in text
    assert text.endswith("no problems found (images were not opened)")


def test_missing_images_are_counted_and_the_first_named(tmp_path):
    images = [image_entry(k) for k in range(1, 16)]
    path = write_json(tmp_path, lvis_file(images))
    for image in images[:2]:
        write_image(tmp_path, image)
    report = check_data(path, tmp_path)
    assert not report.ok
    assert report.images_per_folder == {"train2017": 15}
    assert len(report.missing_images) == 13
    assert report.missing_images[0] == "train2017/000000000003.jpg"
    text = format_report(report)
    assert "missing images: 13" in text
    assert "  train2017/000000000012.jpg\n" in text
    assert "000000000013" not in text
    assert "... and 3 more" in text


def test_all_broken_entries_are_collected(tmp_path):
    annotations = [
        annotation_entry(1),
        annotation_entry(2, segmentation=[[1, 2, 3]]),
        annotation_entry(3, category_id=55),
        annotation_entry(4, bbox=[0, 0, float("nan"), 1]),
        annotation_entry(5, image_id=66),
        annotation_entry(1),
        annotation_entry(6, segmentation={"size": [48, 64], "counts": [1]}),
        annotation_entry(7),
    ]
    images = [image_entry(1, neg_category_ids=[3, 99]), image_entry(2, file_name="/abs.jpg")]
    path = write_json(tmp_path, lvis_file(images, annotations))
    write_image(tmp_path, images[0])
    report = check_data(path, tmp_path)
    assert not report.ok
    found = {(problem.kind, problem.id) for problem in report.problems}
    assert found == {("annotation", k) for k in (1, 2, 3, 4, 5, 6)} | {("image", 1), ("image", 2)}
    assert len(report.problems) == 8
    assert report.num_instances == 2  # 1 and 7 are sound
    text = format_report(report)
    assert "broken entries: 8" in text
    for reason in (
        "annotation 2: broken segmentation: a polygon needs an even count",
        "annotation 3: unknown category id 55",
        "annotation 4: bbox must be four finite numbers",
        "annotation 5: unknown image id 66",
        "annotation 1: the id appears twice",
        "annotation 6: broken segmentation: RLE counts",
        "image 1: unknown category id 99 in neg_category_ids",
        "image 2: the image path '/abs.jpg' must be relative",
    ):
        assert reason in text
    # Reading for training refuses the same file at the first of them.
    with pytest.raises(AnnotationError, match="annotation 2: broken segmentation"):
        LvisAnnotations.from_file(path)


def test_decoding_finds_broken_images(mixed, tmp_path):
    folder = tmp_path / "train2017"
    (folder / "000000000002.jpg").write_bytes(b"no picture")
    write_image(tmp_path, image_entry(3, width=10, height=10))
    assert check_data(mixed, tmp_path).ok
    report = check_data(mixed, tmp_path, decode=True)
    assert not report.ok
    assert len(report.broken_images) == 2
    assert "(image 2) cannot be decoded" in report.broken_images[0]
    assert "(image 3) is 10 x 10 pixels, annotated as 64 x 48" in report.broken_images[1]
    assert "broken images: 2" in format_report(report)


def test_an_unreadable_file_is_a_finding(tmp_path):
    path = write_json(tmp_path, lvis_file())
    path.write_text(path.read_text()[:-20])
    report = check_data(path, tmp_path)
    assert not report.ok
    assert report.version == ""
    assert len(report.problems) == 1
    assert "at character" in format_report(report)
    absent = format_report(check_data(tmp_path / "absent.json", tmp_path))
    assert "file: No such file or directory" in absent


def test_a_file_without_categories(tmp_path):
    content = lvis_file(annotations=[])
    del content["categories"]
    report = check_data(write_json(tmp_path, content), tmp_path)
    assert [str(problem) for problem in report.problems] == ["file: the key 'categories' is missing"]
    assert report.num_categories == 0
    assert report.num_images == 1
