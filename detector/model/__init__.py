"""Mask R-CNN and its cascades on torchvision's parts with the classification loss injected."""

from detector.model.classes import ClassTable
from detector.model.mask_rcnn import MaskRCNN, build_model

__all__ = ["ClassTable", "MaskRCNN", "build_model"]
