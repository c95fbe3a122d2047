"""The reference Mask R-CNN trainer for LVIS: torchvision's detection parts with the loss injected."""
