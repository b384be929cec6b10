"""A bundle's TensorRT plan: whether it can run here, and with which TensorRT.

The driver is looked for first, always: creating TensorRT's Runtime without one crashes the process.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import shlex
from dataclasses import dataclass
from typing import Any

import numpy as np

from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.bundle import Bundle, Manifest
from rxdeploy.engines.flavours import TENSORRT, TENSORRT_RTX, installed_version
from rxdeploy.engines.messages import Messages, logger_for
from rxdeploy.engines.options import Profile
from rxdeploy.errors import EnvironmentLacks
from rxdeploy.runtime.cuda import Gpu


def is_installed(module: str) -> bool:
    """Whether a module could be imported; only a package it lies in is imported for that."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package it would lie in is not there
        return False


@dataclass(frozen=True)
class Runner:
    """A Python module that runs plans."""

    module: str
    distributions: tuple[str, ...]
    install: str

    def version(self) -> str | None:
        """The installed version, None when it is not installed; nothing is imported."""
        return (installed_version(self.distributions) or "unknown") if is_installed(self.module) else None


LEAN = Runner(
    "tensorrt_lean",
    ("tensorrt-lean", "tensorrt-lean-cu13", "tensorrt-lean-cu12", "tensorrt-lean-cu13-bindings"),
    "pip install 'rxdeploy[lean]'",
)
# Which modules run the plans of a target, best first.
RUNNERS = {
    "tensorrt": (Runner("tensorrt", TENSORRT.distributions, TENSORRT.install), LEAN),
    "tensorrt-rtx": (Runner("tensorrt_rtx", TENSORRT_RTX.distributions, TENSORRT_RTX.install),),
}


def rebuild_command(manifest: Manifest) -> str:
    """The command that built the bundle, to build it again here."""
    return shlex.join(manifest.command)


def find_runner(manifest: Manifest, gpu: Gpu) -> Runner:
    """The module that runs this bundle's plan on `gpu`; EnvironmentLacks says why there is none and what to do."""
    target, engine = manifest.target, manifest.engine
    if engine is None or bundles.PLAN not in manifest.files:
        raise EnvironmentLacks(
            f"the bundle has no plan; `{rebuild_command(manifest)}` with TensorRT installed makes one"
        )
    if engine.get("strip_plan"):
        raise EnvironmentLacks(
            "the plan has no weights (it was built with --strip-plan), and rxdeploy does not refit plans; build it "
            "without that option"
        )
    rebuild = f"build it again here: {rebuild_command(manifest)}"
    if (built_on := target.gpu) and target.name == "tensorrt" and built_on != gpu.name:
        wide = engine.get("hardware_compatible") and gpu.compute_capability >= (8, 0)
        if not wide:
            raise EnvironmentLacks(f"the plan was built for {built_on}, and the GPU here is {gpu.name}; {rebuild}")
    problems = []
    for runner in RUNNERS[target.name]:
        installed = runner.version()
        if installed is None:
            problems.append(f"{runner.module} is not installed ({runner.install} adds it)")
        elif problem := _version_problem(runner, installed, str(engine["version"]), engine["version_compatible"]):
            problems.append(problem)
        else:
            return runner
    raise EnvironmentLacks(
        f"the plan needs {target.name} {engine['version']}: {'; '.join(problems)}; install that version, or {rebuild}"
    )


def _version_problem(runner: Runner, installed: str, built: str, version_compatible: bool) -> str | None:
    if not version_compatible:
        if runner is LEAN:
            return "tensorrt_lean runs only plans built with --version-compatible"
        return None if installed in (built, "unknown") else f"{runner.module} {installed} is installed"
    older = installed != "unknown" and _numbers(installed) < _numbers(built)
    return f"{runner.module} {installed} is installed, which is older" if older else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _way_out(manifest: Manifest, gpu: Gpu) -> str:
    """What makes a plan that runs on `gpu`, where this one does not."""
    engine = manifest.engine
    assert engine is not None  # find_runner saw to it
    listed = engine.get("compute_capabilities") or TENSORRT_RTX.compute_capabilities
    here = ".".join(map(str, gpu.compute_capability))
    if manifest.target.name != "tensorrt-rtx" or here in listed:
        return f"build it again here: {rebuild_command(manifest)}"
    known = here in TENSORRT_RTX.compute_capabilities
    option = f"--compute-capability {here}" if known else "--target tensorrt: tensorrt-rtx does not list this GPU's"
    return f"it is for compute capability {', '.join(listed)}, and this GPU has {here}: build with {option}"


class Plan:
    """A deserialised plan. `runner` says with what; `profiles` are its batch sizes; shapes are without the batch."""

    def __init__(self, bundle: Bundle, gpu: Gpu) -> None:
        manifest = bundle.manifest
        self.runner = find_runner(manifest, gpu)
        self._gpu, self._messages = gpu, Messages()
        self.engine: Any = None
        self._config: Any = None  # of TensorRT-RTX, for all execution contexts
        self._compiled: Any = None
        self._runtime: Any = None
        try:
            with gpu.current():
                self._open(bundle, self.runner)
            self._read_tensors(manifest)
        except BaseException:
            self.close()
            raise

    def _open(self, bundle: Bundle, runner: Runner) -> None:
        manifest = bundle.manifest
        try:
            self.trt: Any = importlib.import_module(runner.module)
        except (ImportError, OSError) as error:
            raise EnvironmentLacks(
                f"{runner.module} is installed but does not load: {error}; {runner.install}"
            ) from None
        self.version = str(self.trt.__version__)
        # Kept: TensorRT's objects hold bare pointers to these.
        self._logger = logger_for(self.trt, self._messages)
        try:
            self._runtime = self.trt.Runtime(self._logger)
        except TypeError:  # pybind's word for a null pointer: a driver older than this TensorRT's CUDA, most often
            raise EnvironmentLacks(f"{runner.module} does not start: {self._messages.summary()}") from None
        assert manifest.engine is not None  # find_runner saw to it
        if manifest.engine["version_compatible"]:
            # Such a plan carries code; whoever is trusted with the bundle is trusted with that (docs/security.md).
            self._runtime.engine_host_code_allowed = True
        self.engine = self._runtime.deserialize_cuda_engine(bundle.read(bundles.PLAN))
        if self.engine is None:
            raise EnvironmentLacks(
                f"{runner.module} {self.version} does not take the plan on this GPU: {self._messages.summary()}; "
                + _way_out(manifest, self._gpu)
            )

    def _read_tensors(self, manifest: Manifest) -> None:
        trt = self.trt  # and no name for the engine: an error's traceback would keep it longer than its context
        names = {
            self.engine.get_tensor_mode(n): n
            for n in map(self.engine.get_tensor_name, range(self.engine.num_io_tensors))
        }
        self.input, self.output = names[trt.TensorIOMode.INPUT], names[trt.TensorIOMode.OUTPUT]
        expected = (manifest.inputs[0].name, manifest.outputs[0].name)
        if self.engine.num_io_tensors != 2 or (self.input, self.output) != expected:
            raise EnvironmentLacks(f"the plan's tensors are {sorted(names.values())}, the manifest says {expected}")
        self.input_shape = tuple(self.engine.get_tensor_shape(self.input))[1:]
        self.output_shape = tuple(self.engine.get_tensor_shape(self.output))[1:]
        self.input_dtype = np.dtype(trt.nptype(self.engine.get_tensor_dtype(self.input)))
        self.output_dtype = np.dtype(trt.nptype(self.engine.get_tensor_dtype(self.output)))
        self._check_tensors(manifest)
        self.input_bytes = math.prod(self.input_shape) * self.input_dtype.itemsize  # of one image
        self.output_bytes = math.prod(self.output_shape) * self.output_dtype.itemsize
        self.profiles = tuple(
            Profile(*(int(shape[0]) for shape in self.engine.get_tensor_profile_shape(self.input, index)))
            for index in range(self.engine.num_optimization_profiles)
        )
        self.scratch = int(self.engine.device_memory_size_v2)  # the most that any profile needs, in bytes

    def _check_tensors(self, manifest: Manifest) -> None:
        for tensor, shape, dtype in (
            (manifest.inputs[0], self.input_shape, self.input_dtype),
            (manifest.outputs[0], self.output_shape, self.output_dtype),
        ):
            declared = tensor.shape[1:]
            if (shape, dtype) != (declared, np.dtype(tensor.dtype)):
                raise EnvironmentLacks(
                    f"the plan's {tensor.name} is {dtype} {shape}, the manifest says {tensor.dtype} {declared}; "
                    f"build it again here: {rebuild_command(manifest)}"
                )

    def create_context(self, profile: int, scratch: int, stream: int) -> Any:
        """An execution context for one profile, with its scratch memory at `scratch` on the device.

        The GPU's context must be current; `stream` is used to set it up, and must be waited for.
        """
        trt = self.trt
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            # RTX compiles for a shape when it first meets it: at once, so that nothing is captured with the slower
            # kernels that stand in meanwhile.
            if self._config is None:
                self._config = self.engine.create_runtime_config()
                self._config.set_execution_context_allocation_strategy(managed)
                eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
                self._config.dynamic_shapes_kernel_specialization_strategy = eager
                # What one context has compiled, the others need not.
                self._compiled = self._config.create_runtime_cache()
                self._config.set_runtime_cache(self._compiled)
            context = self.engine.create_execution_context(self._config)
        else:
            context = self.engine.create_execution_context(managed)
        if context is None:
            raise self.error("makes no execution context")
        context.set_device_memory(scratch, self.scratch)
        if not context.set_optimization_profile_async(profile, stream):
            raise self.error(f"does not take its profile {profile}")
        return context

    def error(self, what: str) -> EnvironmentLacks:
        """The error for something TensorRT refused to do, with its own words."""
        return EnvironmentLacks(f"the plan {what}: {self._messages.latest()}")

    def layers(self) -> str:
        """TensorRT's own description of the plan's layers, JSON; EnvironmentLacks with tensorrt_lean: it has none."""
        if self.runner is LEAN:
            raise EnvironmentLacks("tensorrt_lean tells nothing of a plan's layers; the full TensorRT does")
        return self.engine.create_engine_inspector().get_engine_information(self.trt.LayerInformationFormat.JSON)

    def close(self) -> None:
        """Let TensorRT free the plan, while its CUDA context still is; execution contexts must be gone."""
        with self._gpu.current():
            self._config = self._compiled = self.engine = None
            self._runtime = None
