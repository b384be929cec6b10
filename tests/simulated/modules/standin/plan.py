"""What stands for an engine plan: a JSON header and the ONNX model."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

MAGIC = b"stand-in plan\n"
VERSIONS = {"tensorrt": "11.4.0.106", "tensorrt_lean": "11.4.0.106", "tensorrt_rtx": "1.7.1.116"}


def make_plan(
    onnx: bytes,
    *,
    flavour: str = "tensorrt_rtx",
    version: str | None = None,
    profiles: Sequence[tuple[int, int, int]] = ((1, 8, 32),),
    compute_capability: str | None = None,
    version_compatible: bool = False,
    scratch: int = 1 << 20,
    us_per_batch: float = 0,
    us_per_image: float = 0,
) -> bytes:
    """A plan for one module: "tensorrt" or "tensorrt_rtx".

    `version` is that module's own when left out; `profiles` are (min, opt, max) batch sizes; `compute_capability`
    ("8.9") is the only one it runs on, None is any. A `version_compatible` plan of "tensorrt" also loads in
    tensorrt_lean. `scratch` is in bytes. Executing takes the microseconds given on top of ONNX Runtime's.
    """
    header = {
        "flavour": flavour,
        "version": version or VERSIONS[flavour],
        "profiles": [list(sizes) for sizes in profiles],
        "compute_capability": compute_capability,
        "version_compatible": version_compatible,
        "scratch": scratch,
        "us_per_batch": us_per_batch,
        "us_per_image": us_per_image,
        "layers": _layers(onnx),
    }
    text = json.dumps(header).encode()
    return MAGIC + struct.pack("<Q", len(text)) + text + onnx


def read_plan(plan: Any) -> tuple[dict[str, Any], bytes]:
    """The header and the ONNX model; ValueError when it is no plan."""
    data = bytes(plan)
    if not data.startswith(MAGIC):
        raise ValueError("no plan")
    (length,) = struct.unpack_from("<Q", data, len(MAGIC))
    start = len(MAGIC) + 8
    return json.loads(data[start : start + length]), data[start + length :]


def _layers(onnx: bytes) -> list[dict[str, Any]]:
    """What the inspector tells: a layer for each node, but activations belong to the layer before them."""
    import onnx as onnx_package

    layers: list[dict[str, Any]] = []
    for index, node in enumerate(onnx_package.load_from_string(onnx).graph.node):
        name = node.name or f"{node.op_type}_{index}"
        if node.op_type == "Relu" and layers:
            layers[-1]["Name"] += f" + {name}"
            layers[-1]["Metadata"] += f"\x1e[ONNX Layer: {name}]"
            layers[-1]["Outputs"] = [{"Name": tensor} for tensor in node.output]
            continue
        layers.append(
            {
                "Name": name,
                "LayerType": {"Conv": "CaskConvolution", "Gemm": "gemm"}.get(node.op_type, node.op_type),
                "Inputs": [{"Name": tensor} for tensor in node.input],
                "Outputs": [{"Name": tensor} for tensor in node.output],
                "Metadata": f"[ONNX Layer: {name}]",
            }
        )
    return layers
