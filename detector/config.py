"""The one configuration of a run: nested dataclasses, small YAML files that state only what differs, dotted
overrides.

The defaults are Mask R-CNN ResNet-50-FPN on LVIS v1 with the 1x schedule. A YAML file may name another one (a
preset or a path relative to itself) under ``base:``; later statements win: defaults < base < file <
overrides. A file that states no ``name:`` gives its own: a preset's is its path below configs/.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

PRESETS = Path(__file__).resolve().parent / "configs"


class ConfigError(ValueError):
    """A key, value or file of a configuration that cannot be used."""


@dataclass(frozen=True)
class DataConfig:
    """Where the data lies and how images are prepared. Sizes are pixels, paths are relative to `root`."""

    root: str = "data"
    train: str = "lvis/lvis_v1_train.json"
    val: str = "lvis/lvis_v1_val.json"
    images: str = "coco"  # folder that holds train2017/ and val2017/
    min_sizes: tuple[int, ...] = (640, 672, 704, 736, 768, 800)  # short side in training, one drawn per image
    test_size: int = 800  # short side when evaluating
    max_size: int = 1333  # the long side never exceeds this
    flip: float = 0.5  # probability of a horizontal flip
    repeat_threshold: float = 1e-3  # repeat-factor sampling (Gupta et al. 2019, section 4.2); 0 turns it off
    workers: int = 4  # loader processes per training process

    @property
    def train_file(self) -> Path:
        return Path(self.root) / self.train

    @property
    def val_file(self) -> Path:
        return Path(self.root) / self.val

    @property
    def image_folder(self) -> Path:
        return Path(self.root) / self.images


@dataclass(frozen=True)
class ModelConfig:
    """Mask R-CNN or a cascade of it, on a ResNet or ResNeXt with a feature pyramid."""

    # htc: Hybrid Task Cascade without the semantic branch; both cascades have three stages
    architecture: Literal["mask_rcnn", "cascade_mask_rcnn", "htc"] = "mask_rcnn"
    backbone: Literal[
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnext101_32x4d",
        "resnext101_32x8d",
        "resnext101_64x4d",
    ] = "resnet50"
    # of the backbone: "imagenet" (torchvision's IMAGENET1K_V1), another of its names, "none", or a file
    weights: str = "imagenet"
    norm: Literal["frozen_bn", "gn"] = "frozen_bn"  # gn (32 groups) learns from scratch, at any batch size
    trainable_stages: int = 3  # stages of the backbone that learn, counted from the last; 5 = all
    trainable: Literal["all", "classifier"] = "all"  # classifier: the second phase of decoupled training
    first_level: int = 1  # first ResNet stage given to the pyramid: 1 = stride 4, 2 = stride 8
    fpn_channels: int = 256
    anchor_sizes: tuple[int, ...] = (
        32,
        64,
        128,
        256,
        512,
    )  # one per pyramid level, the pooled last one included
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_rois: int = 256  # anchors sampled per image for the proposal loss
    pre_nms_train: int = 2000  # proposals per level before NMS
    pre_nms_test: int = 1000
    post_nms_train: int = 2000  # proposals per image after NMS
    post_nms_test: int = 1000
    canonical_size: int = 224  # side of a box pooled from level 4, FPN equation 1
    rois_per_image: int = 512
    positive_fraction: float = 0.25
    box_head_width: int = 1024
    mask_head_width: int = 256
    mask_head_layers: int = 4
    class_agnostic_boxes: bool = False
    normed_classifier: bool = False  # cosine classifier, temperature 20
    normed_mask: bool = False  # cosine mask predictor, temperature 20


@dataclass(frozen=True)
class LossConfig:
    """The classification loss of the box head."""

    name: Literal[
        "softmax",
        "sigmoid",
        "gumbel",
        "eql",
        "droploss",
        "gol",
        "gol_star",
        "seesaw",
        "gumbel_seesaw",
        "eqlv2",
        "federated",
        "gumbel_federated",
        "acsl",
        "gumbel_acsl",
        "balanced_softmax",
        "equilibrium",
    ] = "softmax"
    threshold: float = (
        1.1e-3  # classes in a smaller share of the training images are the tail (eql, droploss, gol)
    )
    # The Gumbel link's, with a loss that has it; see gol_kernels.gumbel_loss.
    temperature: float = 1.0
    outside: Literal["zero", "straight_through"] = "zero"  # its slope beyond the clip
    compat: Literal["none", "gol"] = "none"  # gol: the gradients of the paper's released code
    # Exponent of Seesaw's compensation factor, 0 turns it off; negative: the loss's own, 2 of seesaw, 0 of
    # gumbel_seesaw.
    q: float = -1.0
    weight: float = 1.0
    norcal: float = 0.0  # gamma of NorCal, which calibrates softmax scores when detecting; 0 turns it off


@dataclass(frozen=True)
class TrainConfig:
    """Optimiser, schedule and bookkeeping."""

    batch_size: int = 16  # images per step over all processes
    lr: float = 0.02  # at a batch of 16; scaled linearly with batch_size
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int = 500
    warmup_factor: float = 1e-3
    epochs: int = 12
    max_steps: int = 0  # > 0: the run ends after this many steps, whatever `epochs` says
    milestones: tuple[int, ...] = (
        8,
        11,
    )  # lr is multiplied by lr_decay there; in epochs, or steps with max_steps
    lr_decay: float = 0.1
    clip_grad_norm: float = 0.0  # 0 turns clipping off
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    on_bad_loss: Literal["stop", "skip"] = "stop"  # at a loss that is not finite or above max_loss
    max_loss: float = 1e4  # of one step and process; a healthy loss is below 100
    log_interval: int = 20  # steps between log rows
    checkpoint_interval: int = 1000  # steps between checkpoints; one is also written at the end
    timeout: float = 30.0  # minutes that one process may let the others wait before the run ends
    init_from: str = ""  # a checkpoint whose weights start this run (not a resume)
    gradient_interval: int = 0  # steps between rows of gradients.jsonl, for `analyze`; 0 gathers none
    capture_steps: tuple[int, ...] = ()  # steps whose classification batches are saved for the benches


@dataclass(frozen=True)
class EvalConfig:
    """How images are turned into detections, and how and when these are judged."""

    interval: int = 0  # epochs between evaluations, or steps with train.max_steps; 0 = only at the end
    score_threshold: float = 1e-4  # strict
    nms_threshold: float = 0.5
    max_detections: int = 300  # per image over all classes
    backend: Literal["auto", "hotcoco", "lvis"] = "auto"
    pictures: int = 12  # validation images drawn on the page of predictions


@dataclass(frozen=True)
class SyntheticConfig:
    """The data set that make-synthetic writes."""

    num_train: int = 600
    num_val: int = 100
    num_classes: int = 24
    image_size: int = 160


@dataclass(frozen=True)
class Config:
    """Everything a run needs; saved in full with the run."""

    name: str = "mask_rcnn_r50_fpn_1x"
    output: str = ""  # the run's folder; empty = runs/<name>
    seed: int = 0
    device: str = "auto"  # auto = the GPU of this process if there is one, else the CPU
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.output or f"runs/{self.name}")

    def __post_init__(self) -> None:
        _check_values(self)


def _check_values(config: Config) -> None:
    """Refuse combinations that would only fail after minutes of work."""
    model, train, data = config.model, config.train, config.data
    rules = [
        (bool(config.name), "name must not be empty"),
        (len(data.min_sizes) > 0, "data.min_sizes needs at least one size"),
        (min(data.min_sizes, default=1) > 0, "data.min_sizes must be positive"),
        (0 <= model.trainable_stages <= 5, "model.trainable_stages must lie in 0..5"),
        (1 <= model.first_level <= 3, "model.first_level must lie in 1..3"),
        (
            len(model.anchor_sizes) == 6 - model.first_level,
            f"model.anchor_sizes needs one size per pyramid level, {6 - model.first_level} with "
            f"model.first_level={model.first_level}, got {len(model.anchor_sizes)}",
        ),
        (model.norm != "gn" or model.fpn_channels % 32 == 0, "model.fpn_channels must be a multiple of 32"),
        (
            model.architecture == "mask_rcnn" or model.class_agnostic_boxes,
            f"model.architecture={model.architecture} refines one box for all classes: it needs "
            f"model.class_agnostic_boxes=true",
        ),
        (config.loss.norcal >= 0, "loss.norcal must not be negative"),
        (
            config.loss.norcal == 0 or config.loss.name == "softmax",
            f"loss.norcal calibrates softmax scores, loss.name={config.loss.name} has none",
        ),
        (0 < model.positive_fraction <= 1, "model.positive_fraction must lie in (0, 1]"),
        (train.batch_size > 0, "train.batch_size must be positive"),
        (train.epochs > 0 or train.max_steps > 0, "train.epochs or train.max_steps must be positive"),
        (train.max_loss > 0, "train.max_loss must be positive"),
        (train.timeout > 0, "train.timeout must be positive"),
        (train.log_interval > 0, "train.log_interval must be positive"),
        (train.checkpoint_interval > 0, "train.checkpoint_interval must be positive"),
        (list(train.milestones) == sorted(train.milestones), "train.milestones must ascend"),
        (train.gradient_interval >= 0, "train.gradient_interval must not be negative"),
        (min(train.capture_steps, default=1) > 0, "train.capture_steps are counted from 1"),
        (config.eval.interval >= 0, "eval.interval must not be negative"),
        (config.eval.max_detections > 0, "eval.max_detections must be positive"),
    ]
    for holds, message in rules:
        if not holds:
            raise ConfigError(message)


def load_config(source: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a preset name or a YAML file and apply ``section.key=value`` overrides.

    Raises ConfigError naming the file, the key, and the nearest known name when there is one.
    """
    return _apply(_read_tree(_find(source, Path()), seen=()), overrides)


def with_overrides(config: Config, overrides: typing.Sequence[str]) -> Config:
    """`config` with ``section.key=value`` overrides. Raises ConfigError as `load_config`."""
    return _apply(to_dict(config), overrides)


def _apply(tree: dict[str, Any], overrides: typing.Sequence[str]) -> Config:
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r} must look like section.key=value")
        _set(tree, key.strip().split("."), _parse_yaml(text, where=f"override {override!r}"))
    return from_dict(tree)


def from_dict(tree: dict[str, Any]) -> Config:
    """Build a Config from nested plain dictionaries (what `to_dict` gives)."""
    return _build(Config, tree, prefix="")


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dictionaries and lists, ready for YAML or a checkpoint."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def save_config(config: Config, path: Path) -> None:
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def presets(*, rows: bool = False) -> list[str]:
    """Names of the presets; with `rows` also of those in folders, one for each row of a paper's tables."""
    return sorted(map(_name_of, PRESETS.rglob("*.yaml") if rows else PRESETS.glob("*.yaml")))


def _name_of(path: Path) -> str:
    """What a file is called that does not say it."""
    inside = path.is_relative_to(PRESETS)
    return path.relative_to(PRESETS).with_suffix("").as_posix() if inside else path.stem


def _find(source: str | Path, folder: Path) -> Path:
    for path in (folder / source, PRESETS / f"{source}.yaml"):
        if path.is_file():
            return path
    raise ConfigError(
        f"no configuration {str(source)!r}: neither a file nor a preset"
        f"{nearest(str(source), presets(rows=True))}; presets: {', '.join(presets())}, and those "
        f"in {PRESETS / 'README.md'}"
    )


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: `base:` leads back to itself")
    tree = _parse_yaml(path.read_text(encoding="utf-8"), where=str(path))
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, got {type(tree).__name__}")
    base = tree.pop("base", None)
    tree.setdefault("name", _name_of(path))
    try:
        _build(Config, tree, prefix="", partial=True)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if base is None:
        return tree
    merged = _read_tree(_find(base, path.parent), (*seen, path))
    for key, value in _leaves(tree):
        _set(merged, key, value)
    return merged


def _leaves(tree: dict[str, Any], prefix: tuple[str, ...] = ()) -> typing.Iterator[tuple[list[str], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*prefix, key))
        else:
            yield [*prefix, key], value


def _set(tree: dict[str, Any], key: list[str], value: Any) -> None:
    for depth, part in enumerate(key[:-1]):
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{'.'.join(key[: depth + 1])} is a value, not a section")
    tree[key[-1]] = value


def _build(cls: type, tree: Any, prefix: str, partial: bool = False) -> Any:
    """Dataclass `cls` from a mapping, every key and type checked; `partial` only checks."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{prefix.rstrip('.')} is a section, expected keys and values, got {tree!r}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            raise ConfigError(f"unknown key {prefix}{key}{nearest(str(key), list(hints), prefix)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            values[key] = _build(typing.cast(type, hint), value, f"{prefix}{key}.", partial)
        else:
            values[key] = _convert(value, hint, prefix + key)
    return None if partial else cls(**values)


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the annotated type; only conversions that lose nothing."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(
                f"{key} must be one of {', '.join(choices)}, got {value!r}{nearest(str(value), choices)}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key} must be a list such as [1, 2], got {value!r}")
        return tuple(_convert(item, typing.get_args(hint)[0], f"{key}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-4, without a dot, as a string
        except ValueError:
            pass
    if hint is str and value is None:
        return ""
    if type(value) is not hint:
        raise ConfigError(f"{key} must be {_name(hint)}, got {value!r} ({type(value).__name__})")
    return value


def _name(hint: Any) -> str:
    return {bool: "true or false", int: "an integer", float: "a number", str: "text"}.get(hint, str(hint))


def nearest(word: str, known: typing.Sequence[str], prefix: str = "") -> str:
    """The end of a message: the known word that was probably meant, if one is close."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""
