"""What this machine has, what each missing piece would add, and the command that installs it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from rxdeploy.engines.flavours import FLAVOURS, Choice, Flavour, choose, installed_version, lacking
from rxdeploy.engines.gpu import find_driver
from rxdeploy.engines.options import EngineOptions
from rxdeploy.errors import EnvironmentLacks, RxDeployError
from rxdeploy.runtime import plan
from rxdeploy.runtime.onnxrt import import_onnxruntime
from rxdeploy.runtime.openvino import import_openvino


@dataclass(frozen=True)
class Finding:
    """One piece: `state` is for the eye, `detail` says what was found, `adds` and `install` what to do about it."""

    piece: str
    state: Literal["ok", "missing", "unusable"]
    detail: str
    adds: str = ""
    install: str = ""


# Piece, module, pip packages that bring it, what it adds, the extra that installs it ("": several do).
_PACKAGES = (
    ("PyTorch", "torch", ("torch",), "reading checkpoints, validation", "build"),
    ("ONNX", "onnx", ("onnx",), "export", "build"),
    ("onnx-ir", "onnx_ir", ("onnx-ir",), "export and graph passes", "build"),
    ("httpx", "httpx", ("httpx",), "downloading published weights", "build"),
    ("filelock", "filelock", ("filelock",), "the cache", "build"),
    ("platformdirs", "platformdirs", ("platformdirs",), "finding the cache's folder", "build"),
    ("safetensors", "safetensors", ("safetensors",), "reading .safetensors weights", "build"),
    ("cuda-bindings", "cuda.bindings", ("cuda-bindings",), "running plans", ""),
    ("cuda-core", "cuda.core", ("cuda-core",), "arrays on the GPU", ""),
    ("tensorrt-lean", "tensorrt_lean", plan.LEAN.distributions, "running --version-compatible plans", "lean"),
    ("matplotlib", "matplotlib", ("matplotlib",), "plots of `rxdeploy bench`", "bench"),
)


def examine() -> list[Finding]:
    """Look at everything rxdeploy can use; what can be tested without a GPU is."""
    driver = find_driver()
    findings = [_driver_finding()]
    findings += [
        Finding(
            "GPU",
            "ok",
            f"{gpu.name}, compute capability {'.'.join(map(str, gpu.compute_capability))}, "
            f"{gpu.memory / 2**30:.0f} GiB",
        )
        for gpu in driver.gpus
    ]
    findings += [_flavour_finding(flavour) for flavour in FLAVOURS]
    findings += [_onnxruntime_finding(), _openvino_finding()]
    findings += [_package_finding(*package) for package in _PACKAGES]
    return findings


def automatic_target() -> Choice:
    """What `--target auto` would take here."""
    return choose("auto", EngineOptions())


def _driver_finding() -> Finding:
    driver = find_driver()
    adds = "the full TensorRT, and ONNX Runtime on the GPU; TensorRT-RTX builds plans without"
    if driver.problem:
        return Finding("NVIDIA driver", "missing", driver.problem, adds, "install NVIDIA's driver for your GPU")
    cuda = ".".join(map(str, driver.cuda_version)) if driver.cuda_version else "unknown"
    return Finding("NVIDIA driver", "ok", f"CUDA {cuda}, {len(driver.gpus)} GPU(s)")


def _flavour_finding(flavour: Flavour) -> Finding:
    adds = {
        "tensorrt": "plans whose kernels were timed on the GPU they run on",
        "tensorrt-rtx": "plans built on any machine, without a GPU, for several GPU generations",
    }[flavour.name]
    version = flavour.version()
    if version is None:
        return Finding(flavour.name, "missing", "not installed", adds, flavour.install)
    if problem := lacking(flavour, version, find_driver()):
        return Finding(flavour.name, "unusable", problem, adds, flavour.install)
    if problem := self_test(flavour):
        return Finding(flavour.name, "unusable", problem, adds, flavour.install)
    return Finding(flavour.name, "ok", f"version {version}; built a one-layer engine")


def self_test(flavour: Flavour) -> str | None:
    """Build a one-layer engine with `flavour`; what went wrong, or None."""
    from rxdeploy.engines.builder import build_plan

    try:
        import onnx_ir as ir

        from rxdeploy.export.graph import IR_VERSION, OPSET
    except ModuleNotFoundError:
        return "not tested: onnx-ir is missing; pip install 'rxdeploy[build]' adds it"
    image = ir.Value(name="image", shape=ir.Shape(("batch", 4)), type=ir.TensorType(ir.DataType.FLOAT16))
    relu = ir.node("Relu", [image])
    output = relu.outputs[0]
    output.name, output.shape, output.dtype = "logits", image.shape, ir.DataType.FLOAT16
    graph = ir.Graph([image], [output], nodes=[relu], opset_imports={"": OPSET}, name="self_test")
    try:
        build_plan(ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString(), flavour, EngineOptions())
    except RxDeployError as error:
        return str(error)
    return None


def _onnxruntime_finding() -> Finding:
    adds = "validation, and running bundles without TensorRT"
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if installed_version((name,))]
    if not installed:
        return Finding("ONNX Runtime", "missing", "not installed", adds, "pip install 'rxdeploy[cpu]'")
    if len(installed) == 2:
        return Finding(
            "ONNX Runtime",
            "unusable",
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files",
            adds,
            "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'rxdeploy[cpu]' or 'rxdeploy[gpu]'",
        )
    try:
        providers = ", ".join(import_onnxruntime().get_available_providers())
    except (EnvironmentLacks, ImportError, OSError, AttributeError) as error:
        return Finding("ONNX Runtime", "unusable", f"does not load: {error}", adds, f"pip install -U {installed[0]}")
    unused = " (without a GPU it runs on the CPU)" if "CUDA" in providers and find_driver().problem else ""
    return Finding("ONNX Runtime", "ok", f"{installed[0]} {installed_version(tuple(installed))}: {providers}{unused}")


def _openvino_finding() -> Finding:
    adds, install = "a second engine for bundles on a CPU, often the faster one", "pip install 'rxdeploy[openvino]'"
    if not plan.is_installed("openvino"):
        return Finding("OpenVINO", "missing", "not installed", adds, install)
    try:
        import_openvino()
    except EnvironmentLacks as error:
        return Finding("OpenVINO", "unusable", str(error), adds, install)
    return Finding("OpenVINO", "ok", f"version {installed_version(('openvino',)) or 'unknown'}")


def _package_finding(piece: str, module: str, packages: tuple[str, ...], adds: str, extra: str) -> Finding:
    if plan.is_installed(module):
        return Finding(piece, "ok", f"version {installed_version(packages) or 'unknown'}")
    install = f"pip install 'rxdeploy[{extra}]'" if extra else f"pip install {piece}"
    return Finding(piece, "missing", "not installed", adds, install)


def as_facts(findings: list[Finding], choice: Choice) -> dict[str, Any]:
    """For --json."""
    target = choice.flavour.name if choice.flavour else "onnxruntime"
    return {"pieces": [asdict(finding) for finding in findings], "auto": {"target": target, "reason": choice.reason}}
