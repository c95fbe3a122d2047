"""Untrusted files give a message or a usable result, and nothing outside the image folder is opened."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_utils

from detector.cli import main
from detector.data.annotations import AnnotationError, LvisAnnotations
from detector.data.check import check_data
from detector.data.dataset import ImageError, LvisDataset
from detector.engine.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from detector.visualize import draw_run_page
from tests.detector.lvis_files import annotation_entry, category_entry, image_entry, lvis_file
from tests.detector.tiny_detector import run_config

SEEDS = 400
TOKENS = (
    *(
        "null",
        "true",
        "-1",
        "0",
        "1e999",
        "NaN",
        "-Infinity",
        "9" * 30,
        "0.5",
        '""',
        "[]",
        "{}",
        '"x"',
        "[[[]]]",
    ),
    *("{", "}", "[", "]", ",", ":", '"', "\\", "\n", "\0", "\ufeff", "é", '"\\u0000"', '"\\ud800"'),
    *('"file_name": "../outside/secret.png",', '"file_name": "out/secret.png",', '"file_name": "link.png",'),
    *('"/etc/passwd"', '"../../outside/secret.png"', '"coco_url": "http://h/../outside/secret.png",'),
    *(
        '"file_name": ".",',
        '"file_name": "' + "a" * 300 + '.png",',
        '"id": 1,',
        '"size": [1, 1]',
        '"counts": "0"',
    ),
)
NAMES = (
    "../outside/secret.png",
    "out/secret.png",
    "link.png",
    "train2017/../../outside/secret.png",
    "real.png",
)

opened: list[str] = []
listening = False


def _hook(event: str, arguments: tuple) -> None:
    if listening and event == "open" and isinstance(arguments[0], (str, bytes)):
        opened.append(arguments[0] if isinstance(arguments[0], str) else arguments[0].decode())


sys.addaudithook(_hook)  # cannot be taken away again


@contextmanager
def audited() -> Iterator[list[str]]:
    """The names of all files that are opened inside the block."""
    global listening
    opened.clear()
    listening = True
    try:
        yield opened
    finally:
        listening = False


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder with good images, and links that lead to an image outside of it."""
    top = tmp_path_factory.mktemp("fuzz")
    root, outside = top / "coco", top / "outside"
    for folder in (root / "train2017", outside):
        folder.mkdir(parents=True)
    for path in (outside / "secret.png", root / "real.png", root / "train2017" / "000000000001.jpg"):
        Image.new("RGB", (64, 48), (1, 2, 3)).save(path)
    (root / "link.png").symlink_to(outside / "secret.png")
    (root / "out").symlink_to(outside)
    return root


COMPRESSED = mask_utils.encode(np.eye(48, 64, dtype=np.uint8, order="F"))["counts"].decode()


def content() -> str:
    """A small file with everything in it that a file may have."""
    rle = {"size": [48, 64], "counts": [100, 48 * 64 - 100]}
    return json.dumps(
        lvis_file(
            [
                image_entry(1, neg_category_ids=[7], not_exhaustive_category_ids=[3]),
                image_entry(2, file_name="real.png"),
            ],
            [
                annotation_entry(1),
                annotation_entry(2, 2, segmentation=rle, iscrowd=1),
                annotation_entry(
                    3, 2, segmentation={"size": [48, 64], "counts": COMPRESSED}, bbox=[0, 0, 1, 0], area=0
                ),
            ],
            [category_entry(3, "r"), category_entry(7)],
        )
    )


def mutated(text: str, seed: int) -> str:
    """The text with a few spans cut out, doubled, swapped, changed, or replaced by what may hurt."""
    draw = random.Random(seed)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        a, b = sorted(draw.randrange(len(text) + 1) for _ in range(2))
        b = min(b, a + draw.choice((0, 1, 5, 40)))
        token = draw.choice(TOKENS)
        span = draw.choice(
            ("", text[a:b] * 2, token, token + text[a:b], text[a:b][::-1], chr(draw.randrange(1, 300)))
        )
        text = text[:a] + span + text[b:]
    if draw.random() < 0.3:
        text = text.replace('"real.png"', json.dumps(draw.choice(NAMES)))
    return text


def use(annotations: LvisAnnotations, root: Path) -> int:
    """Go through all that training and evaluation take from a file; the number of images that were there."""
    read, messages = 0, []
    for training in (True, False):
        dataset = LvisDataset(annotations, root, training=training)
        for index in range(len(dataset)):
            found = annotations.instances(index)
            assert np.isfinite(found.boxes).all()
            assert (found.labels < annotations.num_classes).all()
            try:
                _, target = dataset[index]
            except ImageError as error:
                messages.append(str(error))
                continue
            read += 1
            target["masks"].crop(target["boxes"], torch.arange(len(target["boxes"])), 4)
    assert all(" (image " in message for message in messages)
    return read


@pytest.mark.parametrize("block", range(4))
def test_mutated_annotation_files(root, tmp_path, block):
    path, good = tmp_path / "annotations.json", content()
    path.write_text(good, encoding="utf-8")
    assert use(LvisAnnotations.from_file(path), root) == 4
    messages, read = [], 0
    with audited() as names:
        for seed in range(block * SEEDS, (block + 1) * SEEDS):
            path.write_text(mutated(good, seed), encoding="utf-8", errors="surrogatepass")
            report = check_data(path, root, decode=True)
            try:
                annotations = LvisAnnotations.from_file(path)
            except AnnotationError as error:
                messages.append(str(error))
                assert report.problems, seed
                continue
            assert not report.problems, seed
            read += use(annotations, root)
    assert len(messages) > SEEDS / 2
    assert all(message.startswith(f"{path}: ") for message in messages)
    assert read > SEEDS / 4
    outside = root.with_name("outside")
    assert not [name for name in names if Path(name).resolve().is_relative_to(outside)]
    assert {Path(name).resolve().parent for name in names if "coco" in name} <= {root, root / "train2017"}


def test_what_is_judged_is_checked_first(tmp_path, capsys):
    path, results = tmp_path / "annotations.json", tmp_path / "results.json"
    path.write_text(
        json.dumps(lvis_file(annotations=[annotation_entry(4), annotation_entry(5, area="large")]))
    )
    results.write_text("[]")
    assert main(["evaluate", "--results", str(results), "--annotations", str(path)]) == 2
    expected = f"error: {path}: annotation 5: area must be a finite number of at least 0, got 'large'\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("name", ["link.png", "out/secret.png"])
def test_a_link_out_of_the_folder_is_not_followed(root, tmp_path, name):
    """Not in training, not in check-data, and not for the page of predictions."""
    path = tmp_path / "data" / "all.json"
    path.parent.mkdir()
    path.write_text(json.dumps(lvis_file([image_entry(1, coco_url=None, file_name=name)])))
    with audited() as names, pytest.raises(ImageError, match="behind a link that leads out of"):
        LvisDataset(LvisAnnotations.from_file(path), root, training=True)[0]
    report = check_data(path, root)
    assert not report.ok
    assert f"{root / name} (image 1) is behind a link" in report.broken_images[0]

    config = run_config(tmp_path, f"data.images={root}")
    config.run_dir.mkdir()
    (config.run_dir / "results.json").write_text("[]")
    classes = type("Classes", (), {"category_ids": [3, 7, 9], "names": ["a", "b", "c"]})
    with audited() as more, pytest.raises(ImageError, match="behind a link"):
        draw_run_page(config, classes)
    assert not [opened for opened in (*names, *more) if "secret" in opened or "link.png" in opened]


def test_the_folder_itself_and_links_inside_it_may_be_used(root, tmp_path):
    (tmp_path / "images").symlink_to(root)
    (root / "again.png").symlink_to(root / "real.png")
    path = tmp_path / "all.json"
    path.write_text(json.dumps(lvis_file([image_entry(1, coco_url=None, file_name="again.png")])))
    assert LvisDataset(LvisAnnotations.from_file(path), tmp_path / "images", training=True)[0][0].shape == (
        3,
        48,
        64,
    )
    assert check_data(path, tmp_path / "images", decode=True).ok


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_mutated_checkpoints(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 3, "model": {"a": torch.arange(300.0)}, "config": {"x": [1, (2.5, None)]}})
    good, messages = path.read_bytes(), []
    for seed in range(SEEDS):
        draw, data = random.Random(seed), bytearray(good)
        for _ in range(draw.choice((1, 2, 5))):
            at = draw.randrange(len(data))
            data[at : at + draw.choice((0, 1, 30))] = draw.randbytes(draw.choice((0, 1, 30)))
        path.write_bytes(data)
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > SEEDS / 2
    assert all(str(path) in message for message in messages)
