"""The command line: python -m detector train | evaluate | predict | analyze | check-data | make-synthetic."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from detector.config import ConfigError, load_config, presets

BAD_INPUT = 2
FAILED = 1
KILLED_BY = 128  # plus the signal's number, as shells report it

# An add_parser() factory; argparse has no public name for it.
Commands = Any

OVERRIDES = "section.key=value"
OVERRIDE_HELP = "changes to the configuration, such as train.lr=0.01 loss.name=seesaw"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Bad input is one line on stderr and code 2."""
    # Threads that wait by spinning starve those that work as soon as another process wants a core: on two
    # shared cores a training step took 15 times as long. OpenMP reads this when torch is loaded, later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options = _parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return options.command(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return KILLED_BY + 2
    except Exception as error:
        code = _exit_code(error)
        if code is None or options.debug:
            raise
        print(_one_line(error), file=sys.stderr)
        return code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse alone takes the overrides only in one place; here they may stand before and after options."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in options]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _exit_code(error: Exception) -> int | None:
    """None for what is a fault of the program and deserves its traceback."""
    from detector.data.dataset import ImageError
    from detector.engine.distributed import LostProcess
    from detector.engine.train import Interrupted

    if isinstance(error, Interrupted):
        return KILLED_BY + error.signum
    if isinstance(error, (FloatingPointError, LostProcess)):
        return FAILED
    return BAD_INPUT if isinstance(error, (ValueError, OSError, ImageError)) else None


def _one_line(error: Exception) -> str:
    """The message; of an error from a loader process, which carries its traceback as text, the last line."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    message = lines[-1] if "Original Traceback" in str(error) else " ".join(line.strip() for line in lines)
    return message if "Interrupted" in type(error).__name__ else f"error: {message}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m detector",
        description="Train Mask R-CNN on LVIS annotation files with long-tail losses, and use it.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    _add_analyze(commands)
    _add_check_data(commands)
    _add_make_synthetic(commands)
    return parser


def _command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], summary: str, **arguments: Any
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", **arguments
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=run)
    return parser


def _add_train(commands: Commands) -> None:
    parser = _command(
        commands,
        "train",
        _train,
        "train a detector, evaluate it, and leave everything in a run's folder",
        epilog=f"presets: {', '.join(presets())}; and one for each row of the papers' tables, such as "
        "gol/gumbel_r50_1x_random, listed in detector/configs/README.md. All keys with their defaults: "
        "detector/config.py. Several processes: torchrun --nproc-per-node 8 -m detector train ...",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="NAME", help="a preset or a YAML file")
    source.add_argument(
        "--resume", metavar="RUN", type=Path, help="continue the run in this folder where it stopped"
    )
    parser.add_argument("--output", metavar="RUN", type=Path, help="the run's folder (default: runs/<name>)")
    parser.add_argument(
        "--weights",
        metavar="NAME",
        help="of the backbone: imagenet, another of torchvision's names, none, or a file (model.weights)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is in the folder")
    parser.add_argument("overrides", nargs="*", metavar=OVERRIDES, help=OVERRIDE_HELP)


def _train(options: argparse.Namespace) -> int:
    from detector.engine.train import train

    if options.resume:
        if options.output or options.overwrite or options.weights:
            raise ConfigError(
                "--resume continues a run in its own folder: it takes no --output, --overwrite or --weights"
            )
        if not (options.resume / "config.yaml").is_file():
            raise ConfigError(f"{options.resume} holds no run: there is no {options.resume / 'config.yaml'}")
        config = load_config(options.resume / "config.yaml", options.overrides)
        train(replace(config, output=str(options.resume)), resume=True)
    else:
        config = load_config(options.config, options.overrides)
        if options.output:
            config = replace(config, output=str(options.output))
        if options.weights:
            config = replace(config, model=replace(config.model, weights=options.weights))
        train(config, overwrite=options.overwrite)
    return 0


def _add_evaluate(commands: Commands) -> None:
    parser = _command(
        commands,
        "evaluate",
        _evaluate,
        "judge a trained run, or a results file, by the LVIS protocol",
        epilog="Several processes: torchrun --nproc-per-node 8 -m -- detector evaluate --run RUN "
        "(without the --, torchrun takes --run for its own)",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="RUN", type=Path, help="a run's folder, or a checkpoint file")
    source.add_argument(
        "--results", metavar="JSON", type=Path, help="a LVIS results file; needs --annotations"
    )
    parser.add_argument(
        "--annotations", metavar="JSON", type=Path, help="the truth that --results is held against"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", type=Path, help="where the report goes (default: the run's folder)"
    )
    parser.add_argument("overrides", nargs="*", metavar=OVERRIDES, help=OVERRIDE_HELP)


def _evaluate(options: argparse.Namespace) -> int:
    from detector.data.annotations import LvisAnnotations
    from detector.engine.infer import evaluate_run
    from detector.engine.report import print_evaluation
    from detector.evaluation import run_evaluation

    if options.results:
        if not options.annotations or options.overrides or options.output:
            raise ConfigError("--results needs --annotations, and takes no --output and no overrides")
        LvisAnnotations.from_file(
            options.annotations
        )  # names what is broken; the judge takes all as it comes
        print_evaluation(run_evaluation(options.annotations, options.results))
        return 0
    evaluate_run(options.run, options.overrides, options.output)
    return 0


def _add_predict(commands: Commands) -> None:
    parser = _command(
        commands, "predict", _predict, "detect objects on images: writes drawn pictures and predictions.json"
    )
    parser.add_argument(
        "--run", metavar="RUN", type=Path, required=True, help="a run's folder, or a checkpoint file"
    )
    parser.add_argument("--output", metavar="FOLDER", type=Path, required=True, help="where the pictures go")
    parser.add_argument(
        "--threshold", type=float, default=0.3, help="lowest score shown and written (default: 0.3)"
    )
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them"
    )


def _predict(options: argparse.Namespace) -> int:
    from detector.engine.predict import predict

    count = predict(options.run, options.images, options.output, options.threshold)
    print(f"{count} images; pictures and predictions.json are in {options.output}")
    return 0


ANALYZE_TEXT = """\
Of finished runs: where the objects of a class lie in the image, true and as
each run predicts them, and the KL divergence between the two; the norms of
the classifier's weights against the training images of the classes; the mean
gradient of each class's positives over training, where
train.gradient_interval was set. With --curves: the activations and the
gradients of their losses, and the temperature of the Gumbel. Pictures, their
numbers in analysis.json, and tables."""

ANALYZE_EXAMPLES = """\
examples:
  python -m detector analyze runs/gumbel runs/softmax --output comparison
  python -m detector analyze runs/gumbel --classes cat 12
  python -m detector analyze --detections theirs=results.json --annotations lvis_v1_val.json
  python -m detector analyze --curves --temperatures 0.5 1 2"""


def _add_analyze(commands: Commands) -> None:
    parser = _command(
        commands,
        "analyze",
        _analyze,
        "compare finished runs: object locations, weight norms, gradients, activations",
        epilog=ANALYZE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.description = ANALYZE_TEXT
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs on the same data")
    parser.add_argument(
        "--detections",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="another LVIS results file to compare; may be given several times",
    )
    parser.add_argument(
        "--annotations", metavar="JSON", type=Path, help="the truth (default: the runs' validation file)"
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        default=[],
        metavar="CLASS",
        help="names or category ids drawn one by one (default: the two of each group with the most objects)",
    )
    parser.add_argument(
        "--grid", type=int, default=32, metavar="G", help="cells of a map along each axis (default: 32)"
    )
    parser.add_argument(
        "--smoothing",
        type=float,
        default=1e-3,
        metavar="S",
        help="share of the uniform distribution mixed into both maps before the divergence (default: 0.001)",
    )
    parser.add_argument("--curves", action="store_true", help="also activations and gradients; needs no run")
    parser.add_argument(
        "--temperatures", nargs="+", type=float, metavar="T", help="of the Gumbel (default: 0.5 1 2 4)"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", type=Path, help="where all goes (default: analysis/ in the first run)"
    )


def _analyze(options: argparse.Namespace) -> int:
    from detector.analysis.activations import TEMPERATURES
    from detector.analysis.analyze import analyze

    detections = {}
    for word in options.detections:
        name, separator, path = word.partition("=")
        if not (name and separator and path) or name in detections:
            raise ConfigError(f"--detections needs NAME=JSON with a name of its own, got {word!r}")
        detections[name] = Path(path)
    if options.temperatures and not options.curves:
        raise ConfigError("--temperatures belongs to --curves")
    analyze(
        options.runs,
        detections=detections,
        annotations=options.annotations,
        classes=options.classes,
        grid=options.grid,
        smoothing=options.smoothing,
        curves=options.curves,
        temperatures=options.temperatures or TEMPERATURES,
        output=options.output,
    )
    return 0


def _add_check_data(commands: Commands) -> None:
    parser = _command(
        commands, "check-data", _check_data, "check an annotation file and that its images are there"
    )
    parser.add_argument(
        "annotations", type=Path, metavar="JSON", help="an annotation file in LVIS or COCO format"
    )
    parser.add_argument("images", type=Path, metavar="FOLDER", help="the folder its image paths start from")
    parser.add_argument("--decode", action="store_true", help="also open every image")


def _check_data(options: argparse.Namespace) -> int:
    from detector.data.check import check_data, format_report

    report = check_data(options.annotations, options.images, decode=options.decode)
    print(format_report(report))
    return 0 if report.ok else FAILED


def _add_make_synthetic(commands: Commands) -> None:
    parser = _command(
        commands,
        "make-synthetic",
        _make_synthetic,
        "write a small long-tailed data set of drawn shapes in LVIS format",
    )
    parser.add_argument("root", type=Path, metavar="FOLDER", help="where the data set goes")
    parser.add_argument("--config", default="demo", help="a preset or YAML file with a synthetic section")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar=OVERRIDES, help="such as synthetic.num_classes=12")


def _make_synthetic(options: argparse.Namespace) -> int:
    from detector.data.synthetic import write_synthetic

    shape = load_config(options.config, options.overrides).synthetic
    files = write_synthetic(
        options.root,
        num_train=shape.num_train,
        num_val=shape.num_val,
        num_classes=shape.num_classes,
        image_size=shape.image_size,
        seed=options.seed,
    )
    print(
        f"{shape.num_train} + {shape.num_val} images of {shape.num_classes} classes: {files.train}, "
        f"{files.val}"
    )
    return 0
