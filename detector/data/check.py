"""check-data: what an annotation file holds, whether its images are there, and every entry that is broken."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from detector.data.annotation_reader import AnnotationError, Problem, read_columns
from detector.data.annotations import LvisAnnotations
from detector.data.dataset import ImageError, image_path, read_image

SHOWN = 10  # problems and missing images named in the text


@dataclass
class Report:
    """The findings. Counts are of the entries that are not broken."""

    annotation_file: str
    image_root: str
    version: str = ""  # "LVIS v1", "LVIS v0.5" or "COCO"; empty if the file cannot be read
    num_images: int = 0
    num_images_without_annotations: int = 0
    num_instances: int = 0
    num_categories: int = 0
    groups: dict[str, int] = field(default_factory=dict)  # categories per frequency group
    num_unused_categories: int = 0  # without an instance in this file
    num_crowd: int = 0
    num_zero_area: int = 0
    num_outside: int = 0  # boxes that reach over the image's border by more than a pixel
    images_per_folder: dict[str, int] = field(default_factory=dict)
    missing_images: list[str] = field(default_factory=list)
    broken_images: list[str] = field(default_factory=list)  # not decodable, if it was tried; or behind a link
    decoded: bool = False
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether training can start."""
        return not (self.problems or self.missing_images or self.broken_images)


def check_data(annotation_file: str | Path, image_root: str | Path, *, decode: bool = False) -> Report:
    """Check a whole annotation file and its images; collects all problems where training raises at the first.

    decode: also open every image, and compare its size with the annotated one.
    """
    report = Report(str(annotation_file), str(image_root), decoded=decode)
    try:
        columns = read_columns(annotation_file, report.problems.append)
    except (AnnotationError, OSError) as error:
        reason = (
            error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"{annotation_file}: ")
        )
        report.problems.append(Problem("file", None, str(reason)))
        return report
    annotations = LvisAnnotations(columns)
    sides = columns.boxes[:, 2:] - columns.boxes[:, :2]
    per_image = np.diff(columns.instance_offsets)
    limits = np.repeat(columns.sizes[:, ::-1], per_image, axis=0) + 1
    groups = Counter(annotations.category_frequency)
    report.version = annotations.version
    report.num_images = len(annotations)
    report.num_images_without_annotations = int((per_image == 0).sum())
    report.num_instances = annotations.num_instances
    report.num_categories = annotations.num_classes
    report.groups = {group: groups[group] for group in "rcf"}
    report.num_unused_categories = int((annotations.instance_count == 0).sum())
    report.num_crowd = int(columns.crowd.sum())
    report.num_zero_area = int((sides <= 0).any(axis=1).sum())
    report.num_outside = int(
        ((columns.boxes[:, :2] < -1) | (columns.boxes[:, 2:] > limits)).any(axis=1).sum()
    )
    _check_images(annotations, Path(image_root), report)
    return report


def _check_images(annotations: LvisAnnotations, image_root: Path, report: Report) -> None:
    folders: Counter[str] = Counter()
    for i in range(len(annotations)):
        record = annotations.image(i)
        folders[str(PurePosixPath(record.file_name).parent)] += 1
        try:
            if not os.path.isfile(image_path(image_root, record)):
                report.missing_images.append(record.file_name)
            elif report.decoded:
                read_image(image_root, record)
        except ImageError as error:
            report.broken_images.append(str(error))
    report.images_per_folder = dict(sorted(folders.items()))


def format_report(report: Report) -> str:
    """The report as lines of text for a person."""
    lines = [f"{report.annotation_file}: {report.version or 'not readable'}"]
    if report.version:
        r, c, f = (report.groups[group] for group in "rcf")
        empty = report.num_images_without_annotations
        lines += [
            f"  images       {report.num_images}, {empty} without annotations",
            f"  annotations  {report.num_instances}: {report.num_crowd} crowd, "
            f"{report.num_zero_area} of zero area, {report.num_outside} reaching outside the image",
            f"  categories   {report.num_categories}: {r} rare, {c} common, {f} frequent; "
            f"{report.num_unused_categories} without an instance here",
            f"images below {report.image_root}:",
            *(f"  {folder + '/':<12} {count}" for folder, count in report.images_per_folder.items()),
        ]
    lines += _listed("missing images", report.missing_images)
    lines += _listed("broken images", report.broken_images)
    lines += _listed("broken entries", [str(problem) for problem in report.problems])
    if report.ok:
        lines.append("no problems found" + ("" if report.decoded else " (images were not opened)"))
    return "\n".join(lines)


def _listed(title: str, entries: list[str]) -> list[str]:
    if not entries:
        return []
    more = [f"  ... and {len(entries) - SHOWN} more"] if len(entries) > SHOWN else []
    return [f"{title}: {len(entries)}", *(f"  {entry}" for entry in entries[:SHOWN]), *more]
