"""Learning rate as a pure function of the position in training, so that a checkpoint need not store it."""

from __future__ import annotations

from detector.config import TrainConfig

REFERENCE_BATCH = 16  # images per step that `train.lr` speaks of


def learning_rate(train: TrainConfig, step: int, epoch: int) -> float:
    """Rate of the update `step` (from 0) in `epoch` (from 0).

    Linear scaling with the batch (Goyal et al. 2017), linear warm-up from `warmup_factor` over
    `warmup_steps`, and a factor `lr_decay` at every milestone passed; milestones count steps when `max_steps`
    is set, else epochs.
    """
    position = step if train.max_steps else epoch
    passed = sum(position >= milestone for milestone in train.milestones)
    rate = train.lr * train.batch_size / REFERENCE_BATCH * train.lr_decay**passed
    if step < train.warmup_steps:
        rate *= 1 - (1 - step / train.warmup_steps) * (1 - train.warmup_factor)
    return rate


def is_finished(train: TrainConfig, step: int, epoch: int) -> bool:
    return step >= train.max_steps if train.max_steps else epoch >= train.epochs
