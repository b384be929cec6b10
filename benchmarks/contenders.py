"""The engines that benchmarks/peers.py times, each used as its own documentation recommends, and the files they read.

All take the same uint8 images and give logits; the normalisation is part of every model. All use every core that this
process may use, which is what each does by itself.

- PyTorch: channels last, `inference_mode`. Compiled: inductor with `freezing`, which folds batch-norms and packs
  weights ahead of the first call.
- ONNX Runtime: its defaults, all optimisations on. The plain model is our export; what torch.onnx.export makes of the
  module was as fast in ONNX Runtime and OpenVINO, within 1 % (resnext50, batch 8).
- OpenVINO: shapes fixed before compiling, the latency hint for one call after the other, tensors shared and not
  copied. By itself it computes a float32 model in bfloat16 where the CPU can (its "inference precision"): for a
  float32 model that is forbidden here, and timed as a contender of its own that is not counted as float32. With the
  throughput hint a batch is divided among its streams.
- int8: `quantize_static` in three ways. "unsigned" is as ONNX Runtime's documentation has it for x86: pre-processed,
  Q/DQ, unsigned activations, signed weights, of 7 bits where the CPU has no VNNI, all else as it comes; "default" is a
  call with no options at all (signed activations); "per-channel" is the "cpu" style of quantize_static.py, with what
  this project found to suit a CPU best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rxdeploy
from rxdeploy.bench.machine import cores
from rxdeploy.bench.peaks import product_model
from rxdeploy.cards import ModelCard, find_card
from rxdeploy.engines.bundle import Precision
from rxdeploy.runtime.onnxrt import import_onnxruntime, open_session
from rxdeploy.runtime.openvino import import_openvino

Images = NDArray[np.uint8]
Run = Callable[[Images], Any]  # uint8 (n, size, size, 3) to logits; what a product is given, it does not look at

LARGEST = 8  # images
CALIBRATED_ON = 24
PRODUCT_SIDE = 2048  # of square matrices
IMAGES, CALIBRATION, WEIGHTS = "images.npy", "calibration.npz", "weights.npz"
PLAIN, REFERENCE = "plain.onnx", "logits.npy"  # the float32 model, and what it gives for the images
QUANTISED = ("unsigned", "default", "per-channel")


# Files


def build_ours(model: str, precision: Precision, folder: Path) -> Path:
    """The bundle of rxdeploy that stands against the others; made if it is not in `folder` yet."""
    from rxdeploy.cache import open_cache
    from rxdeploy.calibration.options import CalibrationOptions
    from rxdeploy.pipeline import Pipeline, Request

    output = folder / f"ours-{precision}"
    if output.exists():
        return output
    card = find_card(model)
    options = CalibrationOptions(data=_calibration(card, folder), images=CALIBRATED_ON, method="mse")
    request = Request(
        card,
        precision,
        weights=None if card.weights.file else "synthetic",  # nothing is downloaded
        target="onnxruntime",
        calibration=options if precision == "int8" else None,
        tune=True,
    )
    with open_cache() as cache:
        return Pipeline(request, cache).build(output).path


def _calibration(card: ModelCard, folder: Path) -> Path:
    from int8 import crops

    from rxdeploy.cards import digits_images

    path = folder / CALIBRATION
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        own = card.name == digits_images.CARD
        np.savez(path, images=digits_images.split()[0].images if own else crops(card, CALIBRATED_ON, 1))
    return path


def prepare(model: str, precision: Precision, folder: Path) -> None:
    """Make what the contenders of this precision read, as far as it is not in `folder` yet."""
    from int8 import crops

    from rxdeploy.export.graph import build_graph, serialise
    from rxdeploy.export.synthetic import synthetic_weights

    card = find_card(model)
    build_ours(model, precision, folder)
    if not (folder / REFERENCE).exists():
        weights, images = synthetic_weights(card), crops(card, LARGEST, 3)
        np.savez(folder / WEIGHTS, **weights)
        np.save(folder / IMAGES, images)
        (folder / PLAIN).write_bytes(serialise(build_graph(card, weights)))
        np.save(folder / REFERENCE, onnx_runtime(PLAIN, model, folder, LARGEST)(images))
    if precision == "int8":
        _calibration(card, folder)
        _quantise(folder)


def _quantise(folder: Path) -> None:
    """The models of QUANTISED."""
    import quantize_static as others
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from rxdeploy.calibration.cpu import weight_bits

    images = np.load(folder / CALIBRATION)["images"]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(np.split(images, len(images) // 4))

        def get_next(self) -> dict[str, Images] | None:
            return next(({"image": batch} for batch in self._batches), None)

    ways: dict[str, dict[str, Any]] = {
        "default": {},
        "unsigned": {
            "activation_type": QuantType.QUInt8,
            "weight_type": QuantType.QInt8,
            "reduce_range": weight_bits() == 7,
        },
    }
    processed = folder / "pre-processed.onnx"
    for way, options in ways.items():
        target = folder / f"{way}.onnx"
        if not target.exists():
            quant_pre_process(folder / PLAIN, processed)
            quantize_static(processed, target, Reader(), **options)
    target = folder / "per-channel.onnx"
    if not target.exists():
        (made,) = others.quantise(folder / PLAIN, images, folder, methods=("MinMax",), styles=("cpu",))
        if made.model is None:
            raise RuntimeError(f"quantize_static: {made.problem}")
        made.model.rename(target)


# Contenders


@dataclass(frozen=True)
class Contender:
    """One engine with one model. `open` gives what runs it, for `batch` images, from the files in a folder.

    `operations` are those of one call where that is a matrix product. `peer` is False for what is only shown beside
    the others, as it does not compute in the precision.
    """

    name: str
    open: Callable[[str, Path, int], Run]
    operations: int | None = None
    peer: bool = True


def ours(precision: Precision, model: str, folder: Path, batch: int) -> Run:
    return rxdeploy.load(build_ours(model, precision, folder), "cpu").run


def torch_module(model: str, folder: Path) -> Any:
    """The published module behind its normalisation, channels last."""
    import torch

    from rxdeploy.export.reference import reference_module

    card = find_card(model)
    mean, std = (255 * torch.tensor(each).reshape(1, 3, 1, 1) for each in (card.input.mean, card.input.std))

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with np.load(folder / WEIGHTS) as weights:
                self.inner = reference_module(card, dict(weights))
            self.register_buffer("mean", mean)
            self.register_buffer("scale", 1 / std)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = images.permute(0, 3, 1, 2).float()  # a view: the images are channels last already
            return self.inner((x - self.mean) * self.scale)

    return Whole().eval().to(memory_format=torch.channels_last)


def torch_eager(model: str, folder: Path, batch: int) -> Run:
    import torch

    torch.set_num_threads(cores())
    module = torch_module(model, folder)

    def run(images: Images) -> NDArray[np.float32]:
        with torch.inference_mode():
            return module(torch.from_numpy(images)).numpy()

    return run


def torch_compiled(model: str, folder: Path, batch: int) -> Run:
    import torch
    import torch._inductor.config as inductor

    torch.set_num_threads(cores())
    inductor.freezing = True
    module = torch.compile(torch_module(model, folder))

    def run(images: Images) -> NDArray[np.float32]:
        with torch.no_grad():
            return module(torch.from_numpy(images)).numpy()

    return run


def onnx_runtime(file: str, model: str, folder: Path, batch: int) -> Run:
    session = import_onnxruntime().InferenceSession(str(folder / file), providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"image": images})[0]


def openvino(file: str, options: dict[str, Any], model: str, folder: Path, batch: int) -> Run:
    """One call after the other."""
    compiled = _compiled(folder / file, batch, options | {"PERFORMANCE_HINT": "LATENCY"})
    request = compiled.create_infer_request()
    return lambda images: request.infer([images], share_inputs=True)[0]


def openvino_streams(file: str, options: dict[str, Any], model: str, folder: Path, batch: int) -> Run:
    """A batch divided among as many requests at once as OpenVINO thinks best."""
    hint = options | {"PERFORMANCE_HINT": "THROUGHPUT"}
    least = _compiled(folder / file, 1, hint)
    jobs = min(batch, least.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
    while batch % jobs:
        jobs -= 1
    queue = import_openvino().AsyncInferQueue(_compiled(folder / file, batch // jobs, hint), jobs)
    results: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * jobs
    queue.set_callback(lambda request, part: results.__setitem__(part, request.get_output_tensor().data.copy()))

    def run(images: Images) -> NDArray[np.float32]:
        for part, some in enumerate(np.split(images, jobs)):
            queue.start_async([some], part, share_inputs=True)
        queue.wait_all()
        return np.concatenate(results)

    return run


def _compiled(file: Path, batch: int, options: dict[str, Any]) -> Any:
    core = import_openvino().Core()
    model = core.read_model(file)
    model.reshape({"image": [batch, *list(model.input("image").partial_shape)[1:]]})
    return core.compile_model(model, "CPU", options | {"INFERENCE_NUM_THREADS": cores()})


# Matrix products, to measure what the machine can do


def product_onnx(precision: Precision, model: str, folder: Path, batch: int) -> Run:
    session = open_session(product_model(precision, PRODUCT_SIDE, on_cpu=True))
    matrix = _matrix(precision)
    return lambda _: session.run(["c"], {"a": matrix})[0]


def product_openvino(precision: Precision, model: str, folder: Path, batch: int) -> Run:
    product = _product_in_qdq() if precision == "int8" else product_model(precision, PRODUCT_SIDE)
    core, options = import_openvino().Core(), F32 if precision == "fp32" else {}
    compiled = core.compile_model(core.read_model(product, b""), "CPU", options | {"INFERENCE_NUM_THREADS": cores()})
    request, matrix = compiled.create_infer_request(), _matrix(precision)
    return lambda _: request.infer([matrix], share_inputs=True)[0]


def _product_in_qdq() -> bytes:
    """uint8 by int8 to uint8 between Q/DQ nodes, of which OpenVINO makes an integer product."""
    import onnx

    make, array, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array, onnx.helper.make_tensor_value_info
    constants = {"b": _matrix("int8").view(np.int8), "scale": np.float32(1), "result.scale": np.float32(PRODUCT_SIDE)}
    constants |= {"zero": np.uint8(0), "b.zero": np.int8(0)}
    nodes = [
        make("DequantizeLinear", ["a", "scale", "zero"], ["a.float"]),
        make("DequantizeLinear", ["b", "scale", "b.zero"], ["b.float"]),
        make("MatMul", ["a.float", "b.float"], ["c.float"]),
        make("QuantizeLinear", ["c.float", "result.scale", "zero"], ["c"]),
    ]
    inputs, outputs = ([tensor(name, onnx.TensorProto.UINT8, [PRODUCT_SIDE] * 2)] for name in "ac")
    initializers = [array(np.asarray(value), name) for name, value in constants.items()]
    graph = onnx.helper.make_graph(nodes, "product", inputs, outputs, initializers)
    opsets = [onnx.helper.make_opsetid("", 21)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def _matrix(precision: Precision) -> NDArray:
    random, shape = np.random.default_rng(0), (PRODUCT_SIDE, PRODUCT_SIDE)
    return random.integers(0, 256, shape, np.uint8) if precision == "int8" else random.random(shape, np.float32)


OURS = "rxdeploy"
UNSIGNED = "unsigned"  # of QUANTISED, the file that the targets speak of
F32, BF16 = {"INFERENCE_PRECISION_HINT": "f32"}, {"INFERENCE_PRECISION_HINT": "bf16"}


def contenders(precision: Precision, batch: int) -> tuple[Contender, ...]:
    """All that take part with this precision and batch, ours first, matrix products last."""
    if precision == "int8":
        peers = {f"ONNX Runtime, {way}": partial(onnx_runtime, f"{way}.onnx") for way in QUANTISED}
        peers |= {f"OpenVINO, {way}": partial(openvino, f"{way}.onnx", {}) for way in QUANTISED}
        streams = {f"OpenVINO streams, {UNSIGNED}": partial(openvino_streams, f"{UNSIGNED}.onnx", {})}
    else:
        peers = {"torch eager": torch_eager, "torch.compile": torch_compiled}
        peers |= {"ONNX Runtime": partial(onnx_runtime, PLAIN), "OpenVINO": partial(openvino, PLAIN, F32)}
        streams = {"OpenVINO streams": partial(openvino_streams, PLAIN, F32)}
    return (
        Contender(OURS, partial(ours, precision)),
        *(Contender(name, way) for name, way in (peers | (streams if batch > 1 else {})).items()),
        *([Contender("OpenVINO bfloat16", partial(openvino, PLAIN, BF16), peer=False)] if precision == "fp32" else []),
        *products(precision),
    )


def products(precision: Precision) -> tuple[Contender, ...]:
    """Large matrix products: the fastest is the machine's rate."""
    ways = {"ONNX Runtime": product_onnx, "OpenVINO": product_openvino}
    return tuple(
        Contender(f"product, {name}", partial(way, precision), operations=2 * PRODUCT_SIDE**3)
        for name, way in ways.items()
    )
