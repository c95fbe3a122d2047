"""Pictures of a run: curves from its log, predictions beside the truth."""

from __future__ import annotations

from detector.visualize.curves import plot_curves
from detector.visualize.pictures import Example, class_colour, draw_detections, draw_page, draw_run_page

__all__ = ["Example", "class_colour", "draw_detections", "draw_page", "draw_run_page", "plot_curves"]
