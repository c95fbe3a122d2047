"""What is known of each class: counts of a data set, and counts that grow while a loss trains."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .functional import label_counts

SYNC = ("global", "local")
COUNTED = ("categories", "annotations", "id", "category_id", "image_id")
"""Keys of a COCO file that counting needs."""


class ClassStats(nn.Module):
    """Statistics of C classes, as buffers: they follow ``.to()`` and are in the state dict.

    Attributes:
        image_count: int64 [C], images that hold the class; zeros when unknown.
        instance_count: int64 [C], annotated instances.
        num_images: int64 0-d, images with at least one annotation.
        label_counts: int64 [C+1], labels seen in training so far, background last.
        positive_gradient, negative_gradient: float64 [C], sums of |d loss / d z| over the terms seen in
            training so far in which the class was the label, and in which it was not.
        mean_score: float64 [C], moving mean of the label's score (LOCE); starts at INITIAL_SCORE.

    Args:
        num_classes: C; may be left out where ``image_count`` is given.
        sync: "global" adds the counts of all ranks, so that every rank holds the same; "local" counts
            this rank alone. Without a process group both count what is here.
        process_group: of the "global" sum; None is the default group.
    """

    INITIAL_SCORE = 0.01
    image_count: Tensor
    instance_count: Tensor
    num_images: Tensor
    label_counts: Tensor
    positive_gradient: Tensor
    negative_gradient: Tensor
    mean_score: Tensor

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        image_count: Sequence[int] | Tensor | None = None,
        instance_count: Sequence[int] | Tensor | None = None,
        num_images: int = 0,
        sync: str = "global",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if num_classes is None:
            if image_count is None:
                raise ValueError("ClassStats needs num_classes or image_count")
            num_classes = len(image_count)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if sync not in SYNC:
            raise ValueError(f"sync must be one of {SYNC}, got {sync!r}")
        self.num_classes = num_classes
        self.sync = sync
        self.process_group = process_group
        self.register_buffer("image_count", self._counts("image_count", image_count))
        self.register_buffer("instance_count", self._counts("instance_count", instance_count))
        self.register_buffer("num_images", torch.tensor(int(num_images), dtype=torch.int64))
        self.register_buffer("label_counts", torch.zeros(num_classes + 1, dtype=torch.int64))
        # Head classes gather millions of tiny terms, which float32 sums would stop noticing.
        zeros = torch.zeros(num_classes, dtype=torch.float64)
        self.register_buffer("positive_gradient", zeros)
        self.register_buffer("negative_gradient", zeros.clone())
        self.register_buffer("mean_score", torch.full_like(zeros, self.INITIAL_SCORE))
        if int(self.image_count.max()) > num_images:
            raise ValueError(
                f"a class is in {int(self.image_count.max())} images, but num_images is {num_images}"
            )

    def _counts(self, name: str, values: Sequence[int] | Tensor | None) -> Tensor:
        if values is None:
            return torch.zeros(self.num_classes, dtype=torch.int64)
        counts = torch.as_tensor(values).to(torch.int64).clone()
        if tuple(counts.shape) != (self.num_classes,) or bool((counts < 0).any()):
            raise ValueError(
                f"{name} must be [{self.num_classes}] and not negative, got {list(counts.shape)}"
            )
        return counts

    @classmethod
    def from_coco_json(cls, path: str | os.PathLike[str], **options: object) -> ClassStats:
        """Counts of a COCO or LVIS annotation file; classes in ascending order of category id.

        Raises: ValueError for a file without the needed keys or with an unknown category, by annotation id.
        """
        with open(path, encoding="utf-8") as file:
            content = json.load(file, object_hook=_without_shapes)
        try:
            class_of = {c: i for i, c in enumerate(sorted(c["id"] for c in content["categories"]))}
            annotations = list(content["annotations"])
        except KeyError as error:
            raise ValueError(f"{path}: not a COCO or LVIS annotation file, it lacks {error}") from error
        except TypeError as error:
            raise ValueError(
                f"{path}: not a COCO or LVIS annotation file, expected an object with the lists categories "
                f"and annotations: {error}"
            ) from error
        instances = [0] * len(class_of)
        images: list[set[int]] = [set() for _ in class_of]
        for number, annotation in enumerate(annotations):
            if not isinstance(annotation, dict):
                raise ValueError(f"{path}: annotations[{number}] is no object, got {annotation!r}")
            try:
                index = class_of[annotation["category_id"]]
                images[index].add(annotation["image_id"])
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}: annotation {annotation.get('id')} lacks or does not know {error}"
                ) from error
            instances[index] += 1
        return cls(
            len(class_of),
            image_count=[len(ids) for ids in images],
            instance_count=instances,
            num_images=len(set().union(*images)),
            **options,  # type: ignore[arg-type]
        )

    @property
    def image_frequency(self) -> Tensor:
        """float64 [C]: image_count / num_images, the f_j of EQL and DropLoss."""
        if int(self.num_images) == 0:
            raise ValueError("image frequencies are unknown: num_images is 0")
        return self.image_count.to(torch.float64) / self.num_images

    def rare(self, threshold: float) -> Tensor:
        """bool [C]: image_frequency < threshold (EQL eq. 4, strict)."""
        return self.image_frequency < threshold

    def count(self, labels: Tensor, *, ignore_index: int = -100, validate: bool | None = None) -> Tensor:
        """Adds a batch of labels to ``label_counts``, over all ranks when ``sync`` is "global".

        Every rank must call it the same number of times. Labels are checked first: a bad one raises and
        counts nothing.
        Args: labels [N] int64 or int32 in 0..C or ignore_index. Returns: the updated counts.
        """
        step = label_counts(labels, self.num_classes, ignore_index=ignore_index, validate=validate)
        return self.label_counts.add_(self._over_ranks(step))

    @torch.no_grad()
    def add_gradients(self, sums: Tensor) -> None:
        """Adds a batch's sums, over all ranks when ``sync`` is "global", as ``count`` does.

        Args: sums float64 [2, K], of positives and of negatives, K >= C; columns beyond C are left out.
        """
        sums = self._over_ranks(sums)[:, : self.num_classes]
        self.positive_gradient.add_(sums[0])
        self.negative_gradient.add_(sums[1])

    @property
    def gradient_ratio(self) -> Tensor:
        """float64 [C]: positive / negative gradient, EQLv2's g; 100 for a class that has had neither."""
        positive, negative = self.positive_gradient, self.negative_gradient
        ratio = positive / (negative + 1e-10)
        return torch.where((positive == 0) & (negative == 0), torch.full_like(ratio, 100.0), ratio)

    @property
    def mean_positive_gradient(self) -> Tensor:
        """float64 [C]: |d loss / d z| of a class's positives, averaged over them; NaN without any."""
        return self.positive_gradient / self.label_counts[:-1]

    @torch.no_grad()
    def follow_scores(
        self, scores: Tensor, labels: Tensor, *, alpha: float = 0.9, instance_ids: Tensor | None = None
    ) -> Tensor:
        """Moves ``mean_score`` to the label's scores (LOCE, ICCV 2021, eq. 3), over all ranks as ``count``.

        m_c <- alpha^k m_c + (1 - alpha^k) mean, where class c had k instances in the batch and mean is the
        mean of their scores, each the mean over its rows.

        Args:
            scores: [N], of each row's label. labels: [N]; rows outside 0..C-1 are left out.
            instance_ids: int64 [N] in 0..N-1, equal for the rows of one instance; None: each row is one.

        Returns: the updated means.
        """
        foreground = (labels >= 0) & (labels < self.num_classes)
        weight = foreground.to(torch.float64)
        if instance_ids is not None:
            rows = torch.zeros_like(weight).scatter_add_(0, instance_ids, weight)
            weight = weight / rows[instance_ids].clamp(min=1)
        column = labels.to(torch.int64).clamp(0, self.num_classes - 1)
        # Every instance adds a weight of 1 to its class.
        sums = torch.zeros((2, self.num_classes), dtype=torch.float64, device=scores.device)
        sums[0].index_add_(0, column, weight)
        sums[1].index_add_(0, column, weight * scores.to(torch.float64).masked_fill(~foreground, 0.0))
        count, total = self._over_ranks(sums)
        decay = alpha**count
        self.mean_score.copy_(decay * self.mean_score + (1 - decay) * total / count.clamp(min=1))
        return self.mean_score

    def _over_ranks(self, step: Tensor) -> Tensor:
        if self.sync == "global" and dist.is_available() and dist.is_initialized():
            dist.all_reduce(step, group=self.process_group)
        return step

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, sync={self.sync!r}"


def _without_shapes(item: dict[str, object]) -> dict[str, object]:
    """For json.load: polygons, nearly all of a file, go as soon as they are parsed and not at the end."""
    return {key: item[key] for key in COUNTED if key in item}
