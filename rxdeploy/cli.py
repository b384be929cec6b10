"""The command line: parse, call, print. Results go to stdout, progress and logs to stderr.

Everything heavy is imported inside the command that needs it, so that `rxdeploy --help` is quick.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rxdeploy import __version__
from rxdeploy.__main__ import INTERRUPTED
from rxdeploy.errors import (
    EXTRA_OF_MODULE,
    CheckFailed,
    InputError,
    RxDeployError,
    from_os_error,
    inert,
    missing_module,
)

if TYPE_CHECKING:
    from rxdeploy.cards import ModelCard
    from rxdeploy.pipeline import Request

INTERNAL = 70  # EX_SOFTWARE of sysexits.h


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code.

    Every error becomes one message, never a traceback (-v shows it).
    """
    try:
        cli.main(arguments, prog_name="rxdeploy", standalone_mode=False, obj=tuple(arguments))
    except BaseException as error:
        return _report(error)
    return 0


def _report(error: BaseException) -> int:
    """Say what went wrong and return the exit code for it."""
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, SystemExit):
        return 0  # click's way to say that the reader of stdout went away (`| head`), which is no error
    if _was_interrupted(error):
        _complain("interrupted; no result was left half done")
        return INTERRUPTED
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if isinstance(error, OSError):
        error = from_os_error(error, "rxdeploy")
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in EXTRA_OF_MODULE:
        error = missing_module(error)
    if isinstance(error, RxDeployError):
        _complain(str(error))
        return error.exit_code
    if isinstance(error, click.Abort):  # click's for an end of input at a prompt, of which we have none
        error = error.__cause__ or error
    logging.getLogger("rxdeploy").debug("unexpected", exc_info=error)
    _complain(f"unexpected {type(error).__name__}: {error}; this is a bug in rxdeploy: -v shows where")
    return INTERNAL


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: C extensions turn it into an ImportError, for one."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _complain(text: str) -> None:
    click.echo(f"error: {inert(text)}", err=True)  # names of files, and texts from them, are in it


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="rxdeploy")
@click.option("-v", "--verbose", count=True, help="Log more to stderr (-vv: everything TensorRT says).")
def cli(verbose: int) -> None:
    """Compile Gluon ResNeXt classifiers to ONNX, validated against PyTorch, and to TensorRT engines."""
    level = (logging.WARNING, logging.DEBUG)[min(verbose, 1)]
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged metadata, which does not concern the picture
    logging.basicConfig(level=level, stream=sys.stderr, format="%(name)s: %(message)s", force=True)
    for name in ("rxdeploy.tensorrt", "PIL", "httpx", "httpcore", "filelock", "onnx_ir", "onnxscript"):
        logging.getLogger(name).setLevel(logging.DEBUG if verbose > 1 else logging.WARNING)


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable result on stdout.")

device_option = click.option(
    "--device",
    metavar="auto|tensorrt|cuda|cpu|onnxruntime|openvino",
    default="auto",
    show_default=True,
    help="tensorrt: the plan; cuda: ONNX Runtime; cpu: the engine it was tuned to, or ONNX Runtime; onnxruntime, "
    "openvino: the CPU with that one; auto: the first that works. Another GPU: tensorrt:1.",
)

trusted_option = click.option(
    "--trusted-key",
    "trusted_keys",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PEM",
    callback=lambda context, parameter, keys: keys or None,
    help="Refuse a bundle that is not signed with this public key. May be repeated: one of them.",
)

_weights_option = click.option(
    "--weights",
    metavar="PATH|synthetic[:SEED]",
    help="A .pth or .safetensors file, or made-up weights; by default the card's own, downloaded.",
)

model_options = _options(
    click.argument("model"),
    click.option("--fp32", "precision", flag_value="fp32", help="Keep the model in float32."),
    click.option(
        "--fp16", "precision", flag_value="fp16", default=True, help="Convert the model to float16 (default)."
    ),
    click.option("--int8", "precision", flag_value="int8", help="Quantise the convolutions; needs images."),
    _weights_option,
    click.option(
        "--input",
        "input_kind",
        type=click.Choice(["uint8", "float32"]),
        default="uint8",
        show_default=True,
        help="uint8 NHWC RGB with normalisation in the graph, or normalised float32 NCHW.",
    ),
    click.option("--force", is_flag=True, help="Compute every stage again instead of reusing the cache."),
)

calibration_options = _options(
    click.option(
        "--calibration-data",
        type=click.Path(path_type=Path),
        metavar="DIR|TAR|NPZ",
        help="int8: images like those the model will see; class folders, ImageNet's layouts, or just images.",
    ),
    click.option(
        "--calibration-labels",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="The images' classes, where folders do not say them; only --max-drop needs any.",
    ),
    click.option(
        "--calibration-images",
        type=click.IntRange(1),
        default=512,
        show_default=True,
        help="How many, drawn evenly from the classes.",
    ),
    click.option(
        "--calibration-list",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="The names of those to use, one a line, instead.",
    ),
    click.option("--seed", "calibration_seed", type=int, default=0, show_default=True, help="Of the draw."),
    click.option(
        "--calibration",
        "calibration_file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="A calibration.json of this model, instead of images.",
    ),
    click.option(
        "--method",
        type=click.Choice(["auto", "minmax", "percentile", "entropy", "mse"]),
        default="auto",
        show_default=True,
        help="How ranges are found; auto takes what leaves the smallest error on images held out.",
    ),
    click.option("--keep", multiple=True, metavar="LAYER", help="A layer to leave in floating point. May be repeated."),
    click.option("--min-sqnr", type=float, metavar="DB", help="Leave as many layers in floating point as that needs."),
    click.option(
        "--max-drop", type=float, metavar="POINTS", help="The same for top-1 accuracy, on labelled --calibration-data."
    ),
)

placement_option = click.option(
    "--placement",
    type=click.Choice(["tensorrt", "onnxruntime"]),
    default="tensorrt",
    show_default=True,
    help="int8: for which engine Q/DQ nodes are placed.",
)

engine_options = _options(
    click.option(
        "--batch",
        multiple=True,
        metavar="MIN,OPT,MAX|N",
        help="An optimization profile: a range with its optimum, or one exact size. May be repeated. [default: 1,8,32]",
    ),
    click.option(
        "--target",
        type=click.Choice(["auto", "tensorrt", "tensorrt-rtx", "onnxruntime"]),
        default="auto",
        show_default=True,
        help="What to build an engine with; auto takes the best that is here.",
    ),
    click.option("--workspace", type=click.IntRange(1, 1 << 20), metavar="MIB", help="Scratch memory limit."),
    click.option("--opt-level", type=click.IntRange(0, 5), help="0 builds fast, 5 runs fast. [TensorRT's default: 3]"),
    click.option("--version-compatible", is_flag=True, help="A plan for later TensorRT versions too."),
    click.option("--hardware-compatible", is_flag=True, help="A plan for every GPU from Ampere on."),
    click.option("--refit", is_flag=True, help="A plan whose weights can be replaced."),
    click.option("--strip-plan", is_flag=True, help="A plan without weights, to be refitted."),
    click.option(
        "--compute-capability",
        multiple=True,
        metavar="X.Y",
        help="TensorRT-RTX: build for this GPU generation (7.5, 8.6, ...). May be repeated.",
    ),
)

groups_option = click.option(
    "--groups",
    metavar="auto|native|N",
    default="auto",
    show_default=True,
    help="Channels a group of grouped convolutions: by rule, or measured with --tune; native: the model's own.",
)


@cli.command()
@json_option
def models(as_json: bool) -> None:
    """List the built-in models."""
    from rxdeploy.cards import builtin_cards
    from rxdeploy.export.architecture import count_multiply_adds, count_parameters, resnext

    cards = builtin_cards()
    if as_json:
        import msgspec

        facts = [
            {key: value for key, value in msgspec.to_builtins(card, enc_hook=str).items() if key != "path"}
            | {
                "counted_parameters": count_parameters(resnext(card)),
                "counted_multiply_adds": count_multiply_adds(resnext(card)),
            }
            for card in cards
        ]
        return _print_json(facts)
    from rich.table import Table

    table = Table("model", "alias", "input", "classes", "parameters", "card FLOPs", "top-1", "top-5", "weights")
    for card in cards:
        accuracy, flops = card.accuracy, card.figures.flops
        table.add_row(
            card.name,
            ", ".join(card.aliases) or "-",
            f"{card.input.image_size}x{card.input.image_size}",
            str(card.architecture.num_classes),
            f"{count_parameters(resnext(card)) / 1e6:.2f} M",
            f"{flops / 1e9:.2f} G" if flops else "-",
            f"{accuracy.top1:.2f}" if accuracy else "-",
            f"{accuracy.top5:.2f}" if accuracy and accuracy.top5 is not None else "-",
            f"{card.weights.file_size / 1e6:.1f} MB" if card.weights.file_size else "-",
        )
    _print(table)


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show what is here: GPU, driver, TensorRT, ONNX Runtime, and what is missing."""
    from rxdeploy import doctor as examination

    findings, choice = examination.examine(), examination.automatic_target()
    if as_json:
        return _print_json(examination.as_facts(findings, choice))
    from rich.table import Table

    table = Table("piece", "state", "found", "what it adds", "how to get it")
    colours = {"ok": "green", "missing": "yellow", "unusable": "red"}
    for finding in findings:
        state = f"[{colours[finding.state]}]{finding.state}[/]"
        table.add_row(finding.piece, state, *map(_plain, (finding.detail, finding.adds, finding.install)))
    _print(table)
    target = choice.flavour.name if choice.flavour else "onnxruntime"
    click.echo(f"--target auto takes {target} here ({choice.reason}).")


@cli.command()
@model_options
@calibration_options
@engine_options
@groups_option
@click.option("--tune", is_flag=True, help="Measure on this machine which graph and settings are fastest: minutes.")
@click.option("--labels", type=click.Path(path_type=Path), help="Class names, one a line, to put into the bundle.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The bundle. [default: <model>-<precision>]")
@click.option("--overwrite", is_flag=True, help="Replace a bundle of another model or precision.")
@json_option
def build(as_json: bool, output: Path | None, overwrite: bool, force: bool, **choices: Any) -> None:
    """Export, validate and compile MODEL (a name, or a path to a card file) into a bundle."""
    from rxdeploy.cache import open_cache
    from rxdeploy.engines.bundle import manifest_json
    from rxdeploy.pipeline import Pipeline
    from rxdeploy.terminal import TerminalReporter, stage_facts

    request = _request(**choices)
    output = output or Path(f"{request.card.name}-{request.precision}")
    signed = _is_signed(output)
    with open_cache(force) as cache, TerminalReporter() as reporter:
        pipeline = Pipeline(request, cache, reporter)
        bundle = pipeline.build(output, overwrite)
    if signed:
        _warn_unsigned(output)
    _warn_synthetic(bundle.manifest.weights.kind, bundle.manifest.weights.source)
    if as_json:
        import json

        return _print_json(
            {
                "bundle": str(output),
                "stages": [stage_facts(stage) for stage in pipeline.stages],
                "manifest": json.loads(manifest_json(bundle.manifest)),
            }
        )
    from rxdeploy.terminal import describe_bundle

    click.echo(describe_bundle(bundle))


@cli.command()
@model_options
@calibration_options
@placement_option
@groups_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[default: <model>-<precision>.onnx]")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@json_option
def export(as_json: bool, output: Path | None, overwrite: bool, force: bool, **choices: Any) -> None:
    """Export MODEL to an ONNX file, and stop there."""
    from rxdeploy.cache import open_cache
    from rxdeploy.pipeline import Pipeline
    from rxdeploy.terminal import TerminalReporter, stage_facts

    request = _request(**choices)
    output = output or Path(f"{request.card.name}-{request.precision}.onnx")
    _refuse_existing(output, overwrite)
    with open_cache(force) as cache, TerminalReporter() as reporter:
        pipeline = Pipeline(request, cache, reporter)
        pipeline.export_to(output)
    origin = pipeline.source.origin
    _warn_synthetic(origin.kind, origin.source)
    if as_json:
        facts = {"model": str(output), "weights": origin.source, "stages": [stage_facts(s) for s in pipeline.stages]}
        return _print_json(facts)
    click.echo(output)


@cli.command()
@model_options
@calibration_options
@placement_option
@click.option(
    "--batch", multiple=True, metavar="MIN,OPT,MAX|N", help="Validate for these batch sizes. [default: 1,8,32]"
)
@click.option(
    "--onnx",
    type=click.Path(path_type=Path),
    help="Check this ONNX file, float32 or float16, instead of a fresh export.",
)
@click.option("--layers", is_flag=True, help="Compare every layer with PyTorch, and name the first that departs.")
@json_option
def validate(as_json: bool, onnx: Path | None, layers: bool, force: bool, **choices: Any) -> None:
    """Check the exported MODEL against PyTorch on ONNX Runtime; exit code 1 when it is not the same."""
    from rxdeploy.cache import open_cache
    from rxdeploy.pipeline import Pipeline
    from rxdeploy.terminal import TerminalReporter, layer_table, validation_table

    request = _request(**choices)
    with open_cache(force) as cache, TerminalReporter() as reporter:
        pipeline = Pipeline(request, cache, reporter)
        facts, model = (pipeline.validate_file(onnx), onnx) if onnx else pipeline.validate_export()
        deviations = pipeline.compare_layers(model, facts["precision"]) if layers else []
        failed = not facts["passed"] or any(layer.departs for layer in deviations)
        failure = pipeline.validation_failure(facts, model) if failed else None
    origin = pipeline.source.origin
    _warn_synthetic(origin.kind, origin.source)
    if as_json:
        found = {"layers": [layer.as_facts() for layer in deviations]} if layers else {}
        _print_json({"model": request.card.name, "weights": origin.source, **facts, **found})
    else:
        if layers:
            _print(layer_table(deviations))
        _print(validation_table(facts))
    if failure:
        raise CheckFailed(failure)


@cli.command()
@click.argument("model")
@_weights_option
@calibration_options
@placement_option
@click.option("--force", is_flag=True, help="Compute every stage again instead of reusing the cache.")
@click.option("--sensitivity", is_flag=True, help="Show what each layer pays for its eight bits.")
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw the sensitivity to a .png or .svg.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[default: <model>-calibration.json]")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@json_option
def calibrate(
    as_json: bool,
    output: Path | None,
    overwrite: bool,
    force: bool,
    sensitivity: bool,
    plot_file: Path | None,
    **choices: Any,
) -> None:
    """Find the ranges that MODEL's eight bits are to span, and write them to a calibration.json."""
    import json
    import shutil

    from rxdeploy.atomic import new_file
    from rxdeploy.cache import open_cache
    from rxdeploy.calibration import report
    from rxdeploy.engines.bundle import CALIBRATION
    from rxdeploy.pipeline import Pipeline
    from rxdeploy.terminal import TerminalReporter, stage_facts

    request = _request(precision="int8", input_kind="uint8", **choices)
    output = output or Path(f"{request.card.name}-calibration.json")
    _refuse_existing(output, overwrite)
    if plot_file:
        from rxdeploy.bench.plot import check_plot

        check_plot(plot_file)
    with open_cache(force) as cache, TerminalReporter() as reporter:
        pipeline = Pipeline(request, cache, reporter)
        entry = pipeline.calibrate()
        layers = pipeline.sensitivity() if sensitivity or plot_file else []
        with new_file(output) as temporary:
            shutil.copyfile(entry.folder / CALIBRATION, temporary)
    record = json.loads(output.read_text(encoding="utf-8"))
    if plot_file:
        report.plot_sensitivity(layers, f"{request.card.name}, {entry.facts['scheme']}", plot_file)
    _warn_synthetic(pipeline.source.origin.kind, pipeline.source.origin.source)
    if as_json:
        found = {"layers": [layer.as_facts() for layer in layers]} if layers else {}
        stages = [stage_facts(stage) for stage in pipeline.stages]
        return _print_json({"calibration": str(output), "stages": stages, **entry.facts, **found})
    _print(report.trials_table(record, entry.facts["scheme"]))
    _print(report.clipped_table(record, entry.facts["scheme"]))
    if layers:
        _print(report.sensitivity_table(layers))
    click.echo(output)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-k", "--top", default=5, show_default=True, type=click.IntRange(1), help="Classes to show an image.")
@click.option("--labels", type=click.Path(path_type=Path), help="Class names, one a line, instead of the bundle's.")
@device_option
@trusted_option
@json_option
def classify(
    bundle: Path,
    images: tuple[Path, ...],
    top: int,
    labels: Path | None,
    device: str,
    trusted_keys: tuple[Path, ...] | None,
    as_json: bool,
) -> None:
    """Classify IMAGES with a bundle."""
    from rxdeploy import runtime
    from rxdeploy.terminal import classification_table

    with runtime.load(bundle, device, labels, trusted_keys=trusted_keys) as session:
        found = list(session.classify(images, top))
    manifest = session.bundle.manifest
    results = [(image.path, image.predictions) for image in found if image.predictions is not None]
    failures = [image.error for image in found if image.error is not None]
    _warn_synthetic(manifest.weights.kind, manifest.weights.source)
    if as_json:
        from dataclasses import asdict

        _print_json(
            {
                "model": manifest.model,
                "weights": manifest.weights.source,
                "device": session.device,
                "ran_on": session.description,
                "passed_over": list(session.passed_over),
                "images": [
                    {"image": str(path), "predictions": [asdict(prediction) for prediction in predictions]}
                    for path, predictions in results
                ],
                "errors": [str(failure) for failure in failures],
            }
        )
    elif results:
        _print(classification_table(results, session.description))
    for failure in failures[:-1]:
        _complain(str(failure))
    if failures:
        raise failures[-1]


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--batch", multiple=True, metavar="N,N,...", help="Batch sizes to measure. [default: of 1,8,32 those a plan takes]"
)
@click.option("--seconds", type=float, default=3.0, show_default=True, help="How long to measure each batch size.")
@device_option
@trusted_option
@click.option("--layers", is_flag=True, help="Profile the layers too, at the largest batch size.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write everything to FILE too; - is stdout instead of the tables.",
)
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw throughput and latency to a .png or .svg.",
)
def bench(
    bundle: Path,
    batch: tuple[str, ...],
    seconds: float,
    device: str,
    trusted_keys: tuple[Path, ...] | None,
    layers: bool,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Measure a bundle's speed, and hold it against FLOPs and the machine's limits."""
    from rxdeploy.bench import benchmark, facts, report
    from rxdeploy.bench.plot import check_plot, plot
    from rxdeploy.terminal import TerminalReporter

    sizes = benchmark.parse_batches(",".join(batch)) if batch else None
    benchmark.check_seconds(seconds)
    to_stdout = json_file == Path("-")
    if json_file and not to_stdout:
        facts.check_output(json_file, "--json")
    if plot_file:
        check_plot(plot_file)
    with TerminalReporter() as reporter:
        result = benchmark.benchmark(bundle, device, sizes, seconds, layers, reporter, trusted_keys)
    if json_file and not to_stdout:
        facts.write_json(result, json_file)
    if plot_file:
        plot(result, plot_file)
    if to_stdout:
        _print_json(facts.as_facts(result))
    else:
        click.echo(report.headline(result))
        for table in report.tables(result):
            _print(table)
        for note in report.notes(result):
            click.echo(note)
    for failure in result.failures.values():
        raise failure


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), help="Labelled images: a folder, a tar or an .npz."
)
@click.option("--labels", type=click.Path(path_type=Path), help="The images' classes, where folders do not say them.")
@device_option
@click.option("--batch", type=click.IntRange(1, 4096), metavar="N", help="Images to run at once. [default: 8 or 32]")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only N images, of every class its share.")
@click.option(
    "--baseline", type=click.Path(path_type=Path), metavar="BUNDLE|JSON", help="What to compare with, image by image."
)
@click.option(
    "--max-drop",
    type=float,
    metavar="POINTS",
    help="Exit code 1 when top-1 is more than this below the baseline's, with 95% confidence.",
)
@click.option(
    "--predictions",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write each image's classes there (JSON lines); after an interruption, go on from there.",
)
@click.option(
    "--save-baseline",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Store the result as a baseline to commit (JSON).",
)
@click.option(
    "--too-few",
    type=click.Choice(["warn", "fail"]),
    default="warn",
    show_default=True,
    help="What to do when the images are too few to tell.",
)
@trusted_option
@json_option
def evaluate(bundle: Path, as_json: bool, **choices: Any) -> None:
    """Measure a bundle's accuracy, and whether it dropped against a baseline's."""
    from rxdeploy.evaluation import assess, facts, report
    from rxdeploy.evaluation.progress import EvaluationProgress

    with EvaluationProgress() as progress:
        found = assess(bundle, progress=progress, **choices)
    weights, verdict = found.evaluation.bundle.manifest.weights, found.verdict
    _warn_synthetic(weights.kind, weights.source)
    for note in found.evaluation.dataset.notes:
        click.echo(note, err=True)
    if as_json:
        _print_json(facts.as_facts(found))
    else:
        click.echo(report.headline(found))
        for table in report.tables(found):
            _print(table)
    for doubt in found.doubts:
        click.echo(f"WARNING: {doubt}", err=True)
    if choices["save_baseline"] and not found.stored:
        click.echo(f"not stored as a baseline: {choices['save_baseline']}, since the check failed", err=True)
    if verdict and verdict.fails(choices["too_few"]):
        raise CheckFailed(verdict.text)
    if verdict and verdict.outcome != "pass":
        click.echo(f"WARNING: {verdict.text}", err=True)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--layers", is_flag=True, help="The precision that each layer computes in.")
@json_option
def inspect(bundle: Path, layers: bool, as_json: bool) -> None:
    """Check a bundle's digests and show what is in it."""
    import json

    from rxdeploy.engines.bundle import MODEL, manifest_json, open_bundle

    opened = open_bundle(bundle)
    found = []
    if layers:
        from rxdeploy.export.precisions import layer_precisions

        found = layer_precisions(opened.file(MODEL))
    if as_json:
        facts = json.loads(manifest_json(opened.manifest))
        return _print_json(facts | ({"layers": [layer.as_facts() for layer in found]} if layers else {}))
    from rxdeploy.terminal import describe_bundle, precision_table

    click.echo(describe_bundle(opened, whole=True))
    if layers:
        _print(precision_table(found))


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[default: BUNDLE itself]")
@click.option(
    "--batch", metavar="N,N,...", help="Batch sizes to tune for, all alike. [default: the plan's MIN and OPT, or 1,8]"
)
@click.option("--force", is_flag=True, help="Measure again instead of using what was measured here before.")
@json_option
def tune(bundle: Path, output: Path | None, batch: str | None, force: bool, as_json: bool) -> None:
    """Make BUNDLE as fast as it gets on this machine, by measuring which graph and settings are."""
    import json

    from rxdeploy.bench.benchmark import parse_batches
    from rxdeploy.cache import open_cache
    from rxdeploy.engines.bundle import manifest_json
    from rxdeploy.terminal import TerminalReporter
    from rxdeploy.tuning import report, retune
    from rxdeploy.tuning.describe import describe

    sizes = None if batch is None else parse_batches(batch)
    signed = _is_signed(bundle)
    with open_cache(force) as cache, TerminalReporter() as reporter:
        found = retune.tune(bundle, output, sizes, cache, reporter)
    if signed:
        _warn_unsigned(found.path)
    if as_json:
        return _print_json({"bundle": str(found.path), "manifest": json.loads(manifest_json(found.manifest))})
    assert found.manifest.tuning is not None
    for table in report.tables(found.manifest.tuning):
        _print(table)
    click.echo(describe(found.manifest.tuning))


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--key", required=True, type=click.Path(path_type=Path), metavar="PEM", help="The private key, on P-256 to P-521."
)
@click.option(
    "--password-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Whose first line is the key's password. [default: asked for, where the key has one]",
)
@json_option
def sign(bundle: Path, key: Path, password_file: Path | None, as_json: bool) -> None:
    """Sign BUNDLE with a private key, so that who has the public one can tell it from others."""
    from rxdeploy.signing import report
    from rxdeploy.signing.keys import read_password
    from rxdeploy.signing.sign import sign

    signed = sign(bundle, key, read_password(password_file) if password_file else _ask_password(key))
    if as_json:
        return _print_json(report.as_facts(signed))
    click.echo(report.describe(signed))


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--key",
    "keys",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PEM",
    help="A public key that is trusted. May be repeated: one of them.",
)
@json_option
def verify(bundle: Path, keys: tuple[Path, ...], as_json: bool) -> None:
    """Check that BUNDLE is signed with a key that is trusted, and is what was signed; exit code 1 when not."""
    from rxdeploy.signing import report
    from rxdeploy.signing.sign import verify

    verified = verify(bundle, keys)
    if as_json:
        return _print_json(report.as_facts(verified))
    click.echo(report.describe(verified))


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--format", "kind", type=click.Choice(["triton"]), required=True, help="Triton's model repository.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The repository; others stay.")
@click.option("--name", help="The model's name there. [default: the bundle's model]")
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt", "onnxruntime"]),
    default="auto",
    show_default=True,
    help="auto: the plan, where Triton can run it, else model.onnx.",
)
@click.option("--max-batch", type=click.IntRange(1, 4096), help="[default: the plan's largest, or 32]")
@click.option(
    "--max-delay-ms", type=float, default=2.0, show_default=True, help="How long a request may wait for others."
)
@click.option("--overwrite", is_flag=True, help="Replace a model of that name.")
@trusted_option
@json_option
def package(
    bundle: Path,
    kind: str,
    output: Path,
    overwrite: bool,
    trusted_keys: tuple[Path, ...] | None,
    as_json: bool,
    **choices: Any,
) -> None:
    """Write BUNDLE as another server wants it."""
    from rxdeploy.engines.bundle import open_bundle
    from rxdeploy.packaging import triton

    made = triton.package(open_bundle(bundle, trusted_keys), output, overwrite=overwrite, **choices)
    if _is_signed(bundle):
        click.echo(f"{made.path} carries no signature: that of {bundle} is of the bundle's own files", err=True)
    if as_json:
        return _print_json({"format": kind, "model": str(made.path), "backend": made.backend, "reason": made.reason})
    click.echo(f"{made.path}, for Triton's {made.backend} backend ({made.reason})")


@cli.command()
@click.option("--clear", is_flag=True, help="Remove what no other process uses, downloaded weights included.")
@json_option
def cache(clear: bool, as_json: bool) -> None:
    """Show the cache: where it is, how large, and its limit."""
    from rxdeploy.cache import open_cache

    with open_cache() as opened:
        if clear:
            opened.clear()
        usage = opened.usage()
        if as_json:
            return _print_json({"folder": str(opened.folder), **usage, "limit_bytes": opened.limit})
        click.echo(
            f"{opened.folder}: {usage['stage_results']} stage results, {usage['stage_bytes'] / 1e9:.2f} GB of at most "
            f"{opened.limit / 1e9:g} GB; downloaded weights {usage['weights_bytes'] / 1e9:.2f} GB"
        )


def _request(
    model: str,
    precision: Any,
    weights: str | None,
    input_kind: Any,
    batch: tuple[str, ...] = (),
    target: Any = "onnxruntime",
    labels: Path | None = None,
    workspace: int | None = None,
    opt_level: int | None = None,
    compute_capability: tuple[str, ...] = (),
    calibration_data: Path | None = None,
    calibration_labels: Path | None = None,
    calibration_images: int = 512,
    calibration_list: Path | None = None,
    calibration_seed: int = 0,
    calibration_file: Path | None = None,
    method: Any = "auto",
    keep: tuple[str, ...] = (),
    min_sqnr: float | None = None,
    max_drop: float | None = None,
    placement: Any = None,
    groups: str = "auto",
    tune: bool = False,
    **flags: bool,
) -> Request:
    from rxdeploy.calibration.options import CalibrationOptions
    from rxdeploy.cards import find_card
    from rxdeploy.engines.options import DEFAULT_PROFILES, EngineOptions, Profile
    from rxdeploy.pipeline import Request

    card: ModelCard = find_card(model)
    profiles = tuple(dict.fromkeys(Profile.parse(text) for text in batch)) or DEFAULT_PROFILES
    engine = EngineOptions(
        profiles=profiles,
        workspace_mib=workspace,
        optimization_level=opt_level,
        compute_capabilities=compute_capability,
        **flags,
    )
    calibration = None
    if precision == "int8":
        calibration = CalibrationOptions(
            data=calibration_data,
            labels=calibration_labels,
            images=calibration_images,
            listed=calibration_list,
            seed=calibration_seed,
            file=calibration_file,
            method=method,
            keep=keep,
            min_sqnr=min_sqnr,
            max_drop=max_drop,
        )
    elif any((calibration_data, calibration_file, calibration_list, calibration_labels, keep, method != "auto")) or (
        min_sqnr,
        max_drop,
    ) != (None, None):
        raise InputError(f"the options on calibration are for --int8, and this is --{precision}")
    return Request(
        card=card,
        precision=precision,
        input_kind=input_kind,
        weights=weights,
        target=target,
        engine=engine,
        labels=labels,
        calibration=calibration,
        placement=placement,
        groups=groups,
        tune=tune,
        command=("rxdeploy", *click.get_current_context().obj),
    )


def _refuse_existing(output: Path, overwrite: bool) -> None:
    from rxdeploy.atomic import check_writable
    from rxdeploy.engines.bundle import check_outside

    if output.is_dir():
        raise InputError(f"output {output}: is a folder; choose a file name with -o")
    if output.exists() and not overwrite:
        raise InputError(f"output {output}: exists; choose another with -o, or pass --overwrite")
    check_outside(output)
    try:
        check_writable(output)
    except OSError as error:
        raise from_os_error(error, f"output {output}") from None


def _is_signed(bundle: Path) -> bool:
    from rxdeploy.signing.signature import SIGNATURE

    return (bundle / SIGNATURE).exists()


def _warn_unsigned(bundle: Path) -> None:
    click.echo(f"{bundle} is not signed: the signature was of what it was before; sign it again", err=True)


def _ask_password(key: Path) -> bytes | None:
    """The password of a private key that has one, typed in without being shown."""
    from rxdeploy.signing.keys import is_encrypted

    if not is_encrypted(key) or not sys.stdin.isatty():
        return None
    password: str = click.prompt(f"Password of {key}", hide_input=True, err=True)
    return password.encode()


def _warn_synthetic(kind: str, source: str) -> None:
    if kind == "synthetic":
        click.echo(f"SYNTHETIC WEIGHTS ({source}): made up, not trained; predictions mean nothing.", err=True)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _print(renderable: Any) -> None:
    from rxdeploy.terminal import stdout

    stdout().print(renderable)


def _print_json(value: Any) -> None:
    import msgspec

    # msgspec writes NaN and infinity as null, which JSON has no word for.
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
