"""Images with their targets, ready for the detector."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from detector.data.annotations import ImageRecord, LvisAnnotations
from detector.data.masks import InstanceMasks
from detector.data.sampler import SampleRef
from detector.data.transforms import Target

Sample = tuple[torch.Tensor, Target]
Transform = Callable[[torch.Tensor, Target, np.random.Generator], Sample]


class ImageError(RuntimeError):
    """An image missing, unreadable or of another size than annotated; the message names file and image id."""


class LvisDataset(Dataset[Sample]):
    """``dataset[SampleRef(index, seed)]`` (or a plain index, seed 0) gives (image, target).

    image: uint8 RGB [3, H, W]. target, in the pixels of that image:
      boxes float32 [M, 4] xyxy, clipped to the image; labels int64 [M]; masks InstanceMasks of length M;
      annotation_ids int64 [M]; crowd bool [M]; image_id, image_index int; original_size (height, width) of
      the file; scale (sx, sy) and flipped, how the image was made from the original: flipped first, then
      scaled; neg_labels, not_exhaustive_labels int64; seed int, the sample's.

    In training, crowd regions and boxes without area are left out. All chance comes from the sample's seed,
    so a sample is the same in whichever worker it is made. Raises ImageError.
    """

    def __init__(
        self,
        annotations: LvisAnnotations,
        image_root: str | Path,
        *,
        transform: Transform | None = None,
        training: bool,
    ) -> None:
        self.annotations = annotations
        self.image_root = Path(image_root)
        self.transform = transform
        self.training = training

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, ref: SampleRef | int) -> Sample:
        index, seed = ref if isinstance(ref, tuple) else SampleRef(int(ref), 0)
        record = self.annotations.image(index)
        image = read_image(self.image_root, record)
        target = {**self._target(index, record), "seed": seed}
        if self.transform is None:
            return image, target
        return self.transform(image, target, np.random.default_rng(seed))

    def _target(self, index: int, record: ImageRecord) -> Target:
        instances = self.annotations.instances(index)
        boxes = instances.boxes.copy()
        boxes[:, 0::2] = boxes[:, 0::2].clip(0, record.width)
        boxes[:, 1::2] = boxes[:, 1::2].clip(0, record.height)
        keep = np.arange(len(boxes))
        if self.training:
            has_area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
            keep = np.flatnonzero(has_area & ~instances.crowd)
        return {
            "boxes": torch.from_numpy(boxes[keep]),
            "labels": torch.from_numpy(instances.labels[keep]),
            "masks": InstanceMasks([instances.segmentations[k] for k in keep]),
            "annotation_ids": torch.from_numpy(instances.annotation_ids[keep]),
            "crowd": torch.from_numpy(instances.crowd[keep]),
            "image_id": record.image_id,
            "image_index": index,
            "original_size": (record.height, record.width),
            "scale": (1.0, 1.0),
            "flipped": False,
            "neg_labels": torch.from_numpy(record.neg_category_labels.copy()),
            "not_exhaustive_labels": torch.from_numpy(record.not_exhaustive_category_labels.copy()),
        }


def image_path(image_root: Path, record: ImageRecord) -> Path:
    """Where an image lies. Raises ImageError where a link leads out of the image folder (itself may be one).

    Neither the names in an annotation file are to be trusted, nor what was unpacked with it.
    """
    path = image_root / record.file_name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(image_root)):
        raise ImageError(
            f"{path} (image {record.image_id}) is behind a link that leads out of {image_root}: set "
            f"data.images to where the images really are"
        )
    return path


def read_image(image_root: Path, record: ImageRecord) -> torch.Tensor:
    """Decode an image as uint8 RGB [3, H, W], turned as its EXIF orientation says. Raises ImageError."""
    path = image_path(image_root, record)
    try:
        with Image.open(path) as file:
            pixels = np.array(ImageOps.exif_transpose(file).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be decoded ({error})"
        raise ImageError(f"{path} (image {record.image_id}) {reason}") from error
    if pixels.shape[:2] != (record.height, record.width):
        raise ImageError(
            f"{path} (image {record.image_id}) is {pixels.shape[1]} x {pixels.shape[0]} pixels, "
            f"annotated as {record.width} x {record.height}"
        )
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def collate(batch: list[Sample]) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """Lists of images (each of its own size) and targets."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)
