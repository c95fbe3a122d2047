"""Data of the detector: LVIS annotations, images and targets, masks, sampling, checking, synthetic data."""

from detector.data.annotation_reader import AnnotationError
from detector.data.annotations import ImageRecord, InstanceRecord, LvisAnnotations
from detector.data.check import Report, check_data, format_report
from detector.data.dataset import ImageError, LvisDataset, collate
from detector.data.loader import build_eval_loader, build_train_loader
from detector.data.masks import InstanceMasks
from detector.data.sampler import SampleRef, TrainBatchSampler, repeat_factors
from detector.data.synthetic import write_synthetic
from detector.data.transforms import FlipAndResize

__all__ = [
    "AnnotationError",
    "FlipAndResize",
    "ImageError",
    "ImageRecord",
    "InstanceMasks",
    "InstanceRecord",
    "LvisAnnotations",
    "LvisDataset",
    "Report",
    "SampleRef",
    "TrainBatchSampler",
    "build_eval_loader",
    "build_train_loader",
    "check_data",
    "collate",
    "format_report",
    "repeat_factors",
    "write_synthetic",
]
