"""Does the ONNX model compute what the PyTorch module computes? Measured, on ONNX Runtime.

Images are photographs and noise; batch sizes are 1, the optimum, and one beyond it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rxdeploy.cards import ModelCard
from rxdeploy.engines.bundle import CpuSettings, Precision
from rxdeploy.errors import CheckFailed, EnvironmentLacks, InputError
from rxdeploy.export.samples import noise, photographs
from rxdeploy.runtime import openvino
from rxdeploy.runtime.onnxrt import CPU, available_providers, open_session, run_session
from rxdeploy.runtime.preprocess import normalise

if TYPE_CHECKING:
    import onnx_ir as ir

NOISE_IMAGES = 4
MAX_BATCH = 64  # of what is validated: memory grows with it, and there are few different images anyway
log = logging.getLogger("rxdeploy.validate")
ROUNDING = "CPU, every tensor rounded to float16"  # how the figures of the rounding model are labelled


@dataclass(frozen=True)
class Limits:
    """The largest deviation that still counts as the same model."""

    relative_l2: float  # |x - reference| / |reference|, over all logits
    layer_l2: float  # the same for a tensor inside: small branches deviate more than what they are added to
    # A lead of the first class over the second, as a share of the logits' spread, below which rounding may
    # decide between the two: such images are ties and do not count against agreement.
    tie: float


# Measured by benchmarks/limits.py, synthetic weights, 50 and 101 layers. float32 differs from PyTorch by rounding to
# 2^-24 and by its order of summation: 2e-6 to 5e-6. float16 rounds weights and activations to 2^-11 (4.9e-4), which
# adds up through the layers: 4e-3 to 7e-3 (2e-2 in a narrow model as deep, tests/export/test_layers.py). A batch-norm
# epsilon of 1e-3 for 1e-5 gives 4e-2 and more, a stride on the wrong convolution or a lost branch 0.3. Tensors inside
# a correct model: up to 2e-5 and 2.4e-2 (`rxdeploy validate --layers`).
LIMITS: dict[Precision, Limits] = {
    "fp32": Limits(relative_l2=1e-4, layer_l2=1e-4, tie=1e-3),
    "fp16": Limits(relative_l2=5e-2, layer_l2=1e-1, tie=1e-1),
    "int8": Limits(relative_l2=2.5e-1, layer_l2=5e-1, tie=5e-1),
}


@dataclass(frozen=True)
class Samples:
    """The images of a validation and what the reference says of them."""

    images: NDArray[np.uint8]
    kinds: tuple[str, ...]  # an image each: "photographs", "noise", or "held out" of those a model is calibrated with


def validation_samples(card: ModelCard) -> Samples:
    """Photographs, then noise."""
    photos, grain = photographs(card), noise(card, NOISE_IMAGES)
    kinds = ("photographs",) * len(photos) + ("noise",) * len(grain)
    return Samples(np.concatenate([photos, grain]), kinds)


def held_out_samples(images: NDArray[np.uint8]) -> Samples:
    """Of a quantised model: what it was calibrated for, as ranges clip anything else on purpose."""
    return Samples(images, ("held out",) * len(images))


def validation_batches(optimum: int) -> tuple[int, ...]:
    """The batch sizes to run: 1, the optimum (at most MAX_BATCH), and one beyond it."""
    optimum = min(optimum, MAX_BATCH)
    return tuple(sorted({1, optimum, optimum + 1}))


def deviation(result: NDArray[np.float32], reference: NDArray[np.float32], tie: float) -> dict[str, Any]:
    """Max absolute error, relative L2 error and top-1 agreement of logits (n, classes)."""
    result, reference = result.astype(np.float64), reference.astype(np.float64)
    if reference.shape[1] > 1:
        ranked = np.sort(reference, axis=1)
        decided = ranked[:, -1] - ranked[:, -2] > tie * reference.std(axis=1)
    else:
        decided = np.ones(len(reference), bool)
    agree = result.argmax(1) == reference.argmax(1)
    with np.errstate(invalid="ignore"):  # as in relative_l2
        error = np.abs(result - reference)
    return {
        "images": len(reference),
        "max_abs_error": float(error.max()),
        "relative_l2": relative_l2(result, reference),
        "top1_agreement": float(agree.mean()),
        "ties": int((~decided).sum()),
        "flipped": int((decided & ~agree).sum()),
    }


def validate_model(
    card: ModelCard,
    model: Path,
    precision: Precision,
    reference: NDArray[np.float32],
    batches: tuple[int, ...],
    samples: Samples | None = None,
    cpu: CpuSettings | None = None,
) -> dict[str, Any]:
    """Run the ONNX file on every batch size and every provider that is here, and compare with `reference`.

    Where tuning found `cpu`, with OpenVINO for its engine, it is run on that too.
    `reference` are the PyTorch logits of `samples`, `validation_samples` by default. A model with float16 tensors is
    also run with every one rounded (see `round_everywhere`), on one batch. Returns the figures for the manifest:
    ``passed``, ``limits``, and per provider the deviation over all images, by kind and by batch size; of a model with
    float16 tensors, ``float16``: see `headroom`. One that overflows on these images does not pass.
    """
    samples, limits = samples or validation_samples(card), LIMITS[precision]
    providers = {}
    for provider in available_providers():
        try:
            session = open_session(model, provider, integers=not is_for_tensorrt(model))
        except EnvironmentLacks as error:
            if provider == CPU:
                raise
            log.warning("not validated on %s: %s", provider, error)
            continue
        rows = {batch: _run(card, session, samples, batch) for batch in batches}
        providers[provider] = _figures(samples, reference, rows, limits)
        del session  # before the next one is made: each holds the weights
    if cpu and cpu.engine == "openvino":
        rows = _run_openvino(card, model, cpu, samples, batches)
        providers["OpenVINO"] = _figures(samples, reference, rows, limits)
    half = None
    if precision == "fp16" or (precision == "int8" and is_for_tensorrt(model)):
        logits, half = _run_rounding(card, model, samples.images)
        providers[ROUNDING] = _figures(samples, reference, {len(logits): logits}, limits)
    worst = [figures["all"] for figures in providers.values()]
    return {
        "precision": precision,
        "passed": all(within(figures, limits) for figures in worst) and not (half and half["overflowed"]),
        "limits": {"relative_l2": limits.relative_l2, "tie": limits.tie, "flipped": 0},
        "reference": "PyTorch in float32",
        "providers": providers,
        **({"float16": half} if half else {}),
    }


def within(figures: dict[str, Any], limits: Limits) -> bool:
    """Whether a deviation is within the limits; NaN is not."""
    return figures["relative_l2"] <= limits.relative_l2 and figures["flipped"] == 0


def relative_l2(result: NDArray, reference: NDArray) -> float:
    """|result - reference| / |reference|, in float64; 0 when both are nothing, NaN when a value is none."""
    with np.errstate(invalid="ignore"):  # infinite minus infinite: NaN is the answer, and fails every check
        error = float(np.linalg.norm(result.astype(np.float64) - reference))
        norm = float(np.linalg.norm(reference.astype(np.float64)))
        return error / norm if norm else float(error > 0)


def check_interface(card: ModelCard, path: Path) -> None:
    """InputError unless the ONNX file at `path` has the input and output that validation feeds and reads."""
    size = card.input.image_size
    wanted = {"image": ("tensor(uint8)", [size, size, 3]), "input": ("tensor(float)", [3, size, size])}
    if not path.is_file():
        raise InputError(f"ONNX file {path}: {'not a plain file' if path.exists() else 'no such file'}")
    try:
        session = open_session(path)
    except CheckFailed as error:
        raise InputError(f"ONNX file {path}: {error}") from None
    inputs, outputs = session.get_inputs(), session.get_outputs()
    classes = card.architecture.num_classes
    fits = len(inputs) == 1 and wanted.get(inputs[0].name) == (inputs[0].type, inputs[0].shape[1:])
    fixed_batch = fits and isinstance(inputs[0].shape[0], int)
    logits = next((output.shape[1:] for output in outputs if output.name == "logits"), None)
    if not fits or fixed_batch or logits != [classes]:
        found = (", ".join(f"{t.name} {t.type} {t.shape}" for t in tensors) for tensors in (inputs, outputs))
        raise InputError(
            f"ONNX file {path}: has input {next(found)} and output {next(found)}; {card.name} needs `image` uint8 "
            f"(batch, {size}, {size}, 3) or `input` float32 (batch, 3, {size}, {size}), and `logits` "
            f"(batch, {classes}), with any batch"
        )


def _run_rounding(card: ModelCard, path: Path, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Logits of the float16 model at `path` with every tensor rounded, and how near they come to float16's end."""
    import onnx_ir as ir

    from rxdeploy.export.float16 import round_everywhere
    from rxdeploy.export.headroom import add_largest, headroom

    model = round_everywhere(load_model(path))
    tensors = add_largest(model)
    session = open_session(ir.to_proto(model).SerializeToString(), integers=False)
    logits, *largest = run_session(session, ["logits", *tensors], model_input(session, card, images))
    return logits, headroom(dict(zip(tensors.values(), largest, strict=True)))


def precision_of(path: Path) -> Precision:
    """The precision of the ONNX file at `path`: int8 when it has Q/DQ nodes, fp16 when it has weights in float16."""
    import onnx_ir as ir

    graph = ir.load(path).graph
    if any(node.op_type == "QuantizeLinear" for node in graph):
        return "int8"
    return "fp16" if any(each.dtype == ir.DataType.FLOAT16 for each in graph.initializers.values()) else "fp32"


def is_for_tensorrt(path: Path) -> bool:
    """Whether the ONNX file at `path` is quantised with signed activations, as TensorRT wants them."""
    import onnx_ir as ir

    graph = ir.load(path).graph
    zero_points = [node.inputs[2] for node in graph if node.op_type == "QuantizeLinear" and len(node.inputs) > 2]
    return any(each is not None and each.dtype == ir.DataType.INT8 for each in zero_points)


def load_model(path: Path) -> ir.Model:
    """The model at `path` with its weights in memory, wherever the file keeps them."""
    import onnx_ir as ir

    return ir.external_data.load_to_model(ir.load(path))


def _run(card: ModelCard, session: Any, samples: Samples, batch: int) -> NDArray[np.float32]:
    return _in_batches(
        lambda images: run_session(session, ["logits"], model_input(session, card, images))[0], samples, batch
    )


def _run_openvino(
    card: ModelCard, path: Path, cpu: CpuSettings, samples: Samples, batches: tuple[int, ...]
) -> dict[int, NDArray[np.float32]]:
    model = openvino.read_model(path)
    wants_bytes = model.input().get_element_type().to_dtype() == np.uint8

    def compute(requests: openvino.Requests, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return requests.run(images if wants_bytes else normalise(images, card.input.mean, card.input.std))

    rows = {}
    for batch in batches:
        compiled = openvino.compile_model(openvino.of_size(model, batch), cpu)
        rows[batch] = _in_batches(partial(compute, openvino.Requests(compiled, 1)), samples, batch)
    return rows


def _in_batches(
    compute: Callable[[NDArray[np.uint8]], NDArray[np.float32]], samples: Samples, batch: int
) -> NDArray[np.float32]:
    """Logits of every sample, in batches of exactly `batch` images: the samples are repeated to fill the last."""
    count = len(samples.images)
    outputs = []
    for start in range(0, count, batch):
        indices = np.arange(start, start + batch) % count
        outputs.append(compute(samples.images[indices]))
    return np.concatenate(outputs)[:count]


def model_input(session: Any, card: ModelCard, images: NDArray[np.uint8]) -> dict[str, NDArray]:
    """The feed for a session: the images as they are, or normalised when the model wants float32."""
    first = session.get_inputs()[0]
    wants_bytes = first.type == "tensor(uint8)"
    return {first.name: images if wants_bytes else normalise(images, card.input.mean, card.input.std)}


def _figures(
    samples: Samples, reference: NDArray[np.float32], rows: dict[int, NDArray[np.float32]], limits: Limits
) -> dict[str, Any]:
    logits, expected = np.concatenate(list(rows.values())), np.tile(reference, (len(rows), 1))
    kinds = np.tile(np.asarray(samples.kinds), len(rows))
    return {
        "all": deviation(logits, expected, limits.tie),
        **{
            kind: deviation(logits[kinds == kind], expected[kinds == kind], limits.tie)
            for kind in dict.fromkeys(samples.kinds)
        },
        "by_batch": {str(batch): deviation(part, reference, limits.tie) for batch, part in rows.items()},
    }
