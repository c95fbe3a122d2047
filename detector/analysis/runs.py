"""The finished runs that are compared: what their checkpoints and folders say, checked to belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from detector.analysis.classifier import WeightNorms, classifier_norms
from detector.analysis.gradients import GradientHistory, read_gradients
from detector.config import Config, ConfigError, from_dict, nearest
from detector.data.annotations import LvisAnnotations
from detector.engine.checkpoint import load_checkpoint
from detector.engine.run_folder import CHECKPOINT, CONFIG, GRADIENTS, RESULTS
from detector.model import ClassTable
from detector.model.losses import build_loss
from gol_kernels.losses.bernoulli import BernoulliLoss


@dataclass(frozen=True)
class Run:
    """A run's folder, and what is taken from it."""

    name: str
    folder: Path
    config: Config
    classes: ClassTable
    norms: list[WeightNorms]  # by stage
    gradients: list[GradientHistory]  # by stage; empty where they were not gathered
    note: str  # why not

    @property
    def results(self) -> Path:
        """Its detections. Raises ConfigError where it has none yet."""
        path = self.folder / RESULTS
        if not path.is_file():
            raise ConfigError(
                f"{path} does not exist: make it with python -m detector evaluate --run {self.folder}"
            )
        return path


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders.

    Raises ConfigError for a folder without a run, and for runs of different data; CheckpointError.
    """
    runs = [_load(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    for run in runs[1:]:
        _check_same_data(runs[0], run)
    return runs


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names where these differ, else the paths as given."""
    names = [folder.resolve().name for folder in folders]
    names = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise ConfigError(f"a run is given twice: {', '.join(names)}")
    return names


def _load(folder: Path, name: str) -> Run:
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} holds no run: there is no {folder / CONFIG}")
    path = folder / CHECKPOINT
    state = load_checkpoint(path)
    config, classes = from_dict(state["config"]), ClassTable.from_dict(state["classes"])
    try:
        norms = classifier_norms(state["model"], classes.num_classes)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    gradients, note = _gradients(folder / GRADIENTS, config, classes)
    return Run(name, folder, config, classes, norms, gradients, note)


def _gradients(path: Path, config: Config, classes: ClassTable) -> tuple[list[GradientHistory], str]:
    if path.is_file():
        return read_gradients(path, classes.num_classes), ""
    if isinstance(build_loss(config.loss, classes.stats), BernoulliLoss):
        return [], "were not gathered: train with train.gradient_interval=100 or so"
    return [], f"do not exist: the {config.loss.name} loss is not a sum of binary terms"


def _check_same_data(first: Run, other: Run) -> None:
    one, two = first.classes.to_dict(), other.classes.to_dict()
    if any(one[key] != two[key] for key in ("category_ids", "names", "frequency")) or (
        one["image_count"].tolist() != two["image_count"].tolist()
    ):
        raise ConfigError(
            f"{first.folder} and {other.folder} were trained on different data: "
            f"{first.config.data.train_file} ({first.classes.num_classes} classes) and "
            f"{other.config.data.train_file} ({other.classes.num_classes} classes)"
        )


def annotation_file(runs: Sequence[Run], given: Path | None) -> Path:
    """The validation annotations of all runs, or the `given` ones. Raises ConfigError where runs differ."""
    if given is not None:
        return given
    files = list(dict.fromkeys(run.config.data.val_file for run in runs))
    if not files:
        raise ConfigError("--detections without a run needs --annotations")
    if len({file.resolve() for file in files}) > 1:
        raise ConfigError(
            f"the runs were evaluated on different files: {', '.join(map(str, files))}; if they hold the "
            f"same, name one with --annotations"
        )
    return files[0]


def load_annotations(path: Path, runs: Sequence[Run]) -> LvisAnnotations:
    """The annotations, of the classes of the runs. Raises ConfigError, AnnotationError, OSError."""
    annotations = LvisAnnotations.from_file(path)
    if runs and [int(i) for i in annotations.category_ids] != runs[0].classes.category_ids:
        raise ConfigError(
            f"{path} has {annotations.num_classes} categories that are not the "
            f"{runs[0].classes.num_classes} of {runs[0].folder}"
        )
    return annotations


def detection_files(runs: Sequence[Run], others: Mapping[str, Path]) -> dict[str, Path]:
    """Results files by name: those of the runs, and others. Raises ConfigError for a name or file that is
    not."""
    taken = [name for name in others if name in {run.name for run in runs}]
    if taken:
        raise ConfigError(f"--detections {taken[0]}: a run has that name already")
    for name, path in others.items():
        if not path.is_file():
            raise ConfigError(f"--detections {name}: {path} does not exist")
    return {run.name: run.results for run in runs} | dict(others)


def find_classes(wanted: Sequence[str], names: Sequence[str], category_ids: Sequence[int]) -> list[int]:
    """Labels of classes given by name or category id. Raises ConfigError for one that is not there."""
    label_of = {str(category_id): label for label, category_id in enumerate(category_ids)}
    label_of |= {name: label for label, name in enumerate(names)}
    for word in wanted:
        if word not in label_of:
            raise ConfigError(f"there is no class {word!r}, by name or id{nearest(word, list(label_of))}")
    return list(dict.fromkeys(label_of[word] for word in wanted))
