"""Numbers that no benchmark should pass over in silence: NaN and infinity, and those so small that a CPU slows down.

A float32 magnitude below 2^-126 but not zero is denormal. Many CPUs compute such numbers far more slowly, unless the
engine has them flush them to zero. So model.onnx is run once on ONNX Runtime, on one of the benchmark's images, with
every tensor between its layers as an output, and its constants are looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rxdeploy.bench.samples import sample_images
from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.bundle import Bundle
from rxdeploy.errors import RxDeployError
from rxdeploy.runtime.onnxrt import open_session, run_session

SMALLEST_NORMAL = 2.0**-126  # of float32


@dataclass(frozen=True)
class Numerics:
    """What is found in one image's tensors, and in the constants. `not_finite` and `denormal` are in their order."""

    tensors: int  # looked at
    not_finite: tuple[str, ...]
    denormal: dict[str, float]  # tensor -> the share of its values that are
    denormal_constants: dict[str, float]


def try_examine(bundle: Bundle) -> Numerics | str:
    """What `examine` finds, or why it cannot: a benchmark does not fail for that."""
    try:
        return examine(bundle)
    except RxDeployError as error:
        return str(error)
    except MemoryError:
        return "there is not enough memory to hold all tensors of an image"


def examine(bundle: Bundle) -> Numerics:
    """Run it once, for which onnx must be installed. Errors are those of opening and running a session."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(bundle.file(bundles.MODEL))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    arrays = _tensors(model, bundle)
    return Numerics(
        tensors=len(arrays),
        not_finite=tuple(name for name, array in arrays.items() if not np.isfinite(array).all()),
        denormal=_denormal(arrays),
        denormal_constants=_denormal({name: array for name, array in constants.items() if _is_float32(array)}),
    )


def _tensors(model: Any, bundle: Bundle) -> dict[str, NDArray]:
    """All floating-point tensors that the nodes of the model make of one image."""
    present = [output.name for output in model.graph.output]
    made = [name for node in model.graph.node for name in node.output if name and name not in present]
    model.graph.output.extend(type(model.graph.output[0])(name=name) for name in made)
    names = [*made, *present]
    session = open_session(model.SerializeToString(), integers=bundle.manifest.for_integers)
    feed = {session.get_inputs()[0].name: sample_images(bundle.manifest, 1)}
    arrays = zip(names, run_session(session, names, feed), strict=True)
    return {name: array for name, array in arrays if np.issubdtype(array.dtype, np.floating)}


def _denormal(arrays: dict[str, NDArray]) -> dict[str, float]:
    shares = {
        name: float(((array != 0) & (np.abs(array) < SMALLEST_NORMAL)).mean())
        for name, array in arrays.items()
        if array.size and _is_float32(array)  # those of float16 are ordinary numbers of float32, which computes them
    }
    return {name: share for name, share in shares.items() if share}


def _is_float32(array: NDArray) -> bool:
    return bool(array.dtype == np.float32)
