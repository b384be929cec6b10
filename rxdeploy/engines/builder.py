"""ONNX -> TensorRT plan, with one path for every flavour.

The network is strongly typed: each tensor has the type the ONNX graph gives it. TensorRT 11 and RTX know
nothing else, and TensorRT 10 does it when asked, so precision is decided in the graph and nowhere here.
"""

from __future__ import annotations

import contextlib
import importlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rxdeploy import atomic
from rxdeploy.engines.flavours import Flavour
from rxdeploy.engines.gpu import Gpu
from rxdeploy.engines.messages import Messages, log, logger_for
from rxdeploy.engines.options import EngineOptions
from rxdeploy.errors import CheckFailed, EnvironmentLacks, InputError, missing_module

# Called with the name of the phase TensorRT is in and the fraction (0 to 1) of the whole build that is done.
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Plan:
    """A serialised engine and what is known of it without running it."""

    data: bytes
    facts: dict[str, object]


def build_plan(
    model: bytes,
    flavour: Flavour,
    options: EngineOptions,
    progress: Progress | None = None,
    timings: Path | None = None,
) -> Plan:
    """Build a plan from a serialised ONNX `model`.

    `timings`, a `timing_cache`, is read and rewritten where the flavour times its kernels. Errors: CheckFailed when
    TensorRT refuses the model, with its own words; EnvironmentLacks when it cannot start; KeyboardInterrupt
    when the user pressed Ctrl-C, after TensorRT has stopped cleanly.
    """
    try:
        trt: Any = importlib.import_module(flavour.module)
    except ModuleNotFoundError as error:
        raise missing_module(error) from None
    except (ImportError, OSError) as error:
        raise EnvironmentLacks(f"{flavour.name} is installed but does not load: {error}; {flavour.install}") from None
    messages = Messages()
    logger = logger_for(trt, messages)
    try:
        builder = trt.Builder(logger)
    except TypeError:  # pybind's word for a null pointer
        raise EnvironmentLacks(f"{flavour.name} does not start: {messages.summary()}") from None
    with _interruptible() as interrupted:
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        parsed = bool(model) and parser.parse(model)
        if parsed and not interrupted.is_set():
            config = _configure(trt, builder, network, options)
            cache = _load_timing_cache(config, flavour, timings)
            config.progress_monitor = monitor = _monitor(trt, progress, interrupted)
            plan = builder.build_serialized_network(network, config)
    if interrupted.is_set():
        raise KeyboardInterrupt
    if not parsed:
        errors = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise CheckFailed(f"{flavour.name} cannot read the model: {'; '.join(errors) or messages.summary()}")
    if monitor.failure:
        raise monitor.failure
    if plan is None:
        raise _build_error(flavour, options, messages)
    if cache is not None and timings is not None:
        try:
            atomic.write_bytes(timings, bytes(config.get_timing_cache().serialize()))
        except OSError as error:  # a full or read-only disk is no reason to lose the plan
            log.warning("TensorRT's timings were not kept: %s", error)
    if progress:
        progress("done", 1.0)  # the outermost phase need not report its last step
    facts = {"flavour": flavour.name, "version": trt.__version__, "warnings": messages.warnings, **options.as_facts()}
    return Plan(bytes(plan), facts)


def timing_cache(folder: Path, flavour: Flavour, version: str | None, gpu: Gpu | None) -> Path | None:
    """The file in a cache folder for TensorRT's own timings on that GPU; None for a flavour that times nothing."""
    if flavour.builds_without_gpu:
        return None
    name = "-".join(gpu.name.split()) if gpu else "no-gpu"
    return folder / "timing" / f"{flavour.name}-{version}-{name}.cache"


def _parser_error(error: Any) -> str:
    node = f"{error.node_operator()} {error.node_name()}".strip()
    return f"{node}: {error.desc()}" if node else str(error.desc())


def _build_error(flavour: Flavour, options: EngineOptions, messages: Messages) -> CheckFailed | InputError:
    text = messages.summary()
    too_little = "OutOfMemory" in text or "workspace limit" in text
    if too_little and options.workspace_mib is not None:
        return InputError(
            f"--workspace {options.workspace_mib}: too little for this model: {text}; give more, or leave it out"
        )
    return CheckFailed(f"{flavour.name} did not build the engine: {text}")


def _configure(trt: Any, builder: Any, network: Any, options: EngineOptions) -> Any:
    config = builder.create_builder_config()
    tensor = network.get_input(0)
    for sizes in options.profiles:
        profile = builder.create_optimization_profile()
        rest = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, *[(size, *rest) for size in (sizes.min, sizes.opt, sizes.max)])
        config.add_optimization_profile(profile)
    # On by default; it would round float32 convolutions to 10 bits of mantissa, which is no float32 any more.
    config.clear_flag(trt.BuilderFlag.TF32)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        # RTX: without it an engine allocates while it runs, and cannot be captured into a CUDA graph.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    # Layer names and types in the plan, for TensorRT's inspector and profiler.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    for wanted, flag in (
        (options.version_compatible, "VERSION_COMPATIBLE"),
        (options.refit, "REFIT"),
        (options.strip_plan, "STRIP_PLAN"),
    ):
        if wanted:
            config.set_flag(getattr(trt.BuilderFlag, flag))
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.compute_capabilities:
        _set_compute_capabilities(trt, config, options.compute_capabilities)
    return config


def _set_compute_capabilities(trt: Any, config: Any, wanted: tuple[str, ...]) -> None:
    members = trt.ComputeCapability.__members__
    known = {f"{name[2:-1]}.{name[-1]}": member for name, member in members.items() if name.startswith("SM")}
    for capability in wanted:
        if capability not in known:
            raise InputError(f"--compute-capability {capability}: this TensorRT-RTX knows {', '.join(known)}")
    config.num_compute_capabilities = len(wanted)
    for index, capability in enumerate(wanted):
        config.set_compute_capability(known[capability], index)


def _load_timing_cache(config: Any, flavour: Flavour, path: Path | None) -> Any | None:
    """A timing cache, filled from `path` when it is there; None for a flavour that times nothing while building."""
    if flavour.builds_without_gpu:
        return None
    saved = path.read_bytes() if path is not None and path.exists() else b""
    cache = config.create_timing_cache(saved)
    if not config.set_timing_cache(cache, False):
        # Of another TensorRT or GPU: start afresh rather than fail.
        log.info("the timing cache %s does not fit this TensorRT and GPU; starting a new one", path)
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


class _Phases:
    """TensorRT's nested build phases, folded into one fraction."""

    def __init__(self) -> None:
        self.parents: dict[str, str | None] = {}
        self.steps: dict[str, int] = {}
        self.done: dict[str, int] = {}

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        self.parents[phase], self.steps[phase], self.done[phase] = parent, steps, 0

    def finish(self, phase: str) -> None:
        for table in (self.parents, self.steps, self.done):
            table.pop(phase, None)

    def fraction(self, phase: str | None = None) -> float:
        """How much of `phase` (None: of the whole build) is done, a phase's current step counted by its own phases."""
        inner = max((self.fraction(child) for child, parent in self.parents.items() if parent == phase), default=0.0)
        return inner if phase is None else min(1.0, (self.done[phase] + inner) / max(1, self.steps[phase]))


def _monitor(trt: Any, progress: Progress | None, interrupted: threading.Event) -> Any:
    """TensorRT's IProgressMonitor: reports progress, and stops the build when `interrupted` is set."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases = _Phases()
            self.furthest = 0.0  # a phase that ends early would turn the fraction back
            self.failure: BaseException | None = None
            self.lock = threading.Lock()  # TensorRT may call from several threads

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self.lock:
                self.phases.start(phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            with self.lock:
                self.phases.finish(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self.lock:
                self.phases.done[phase_name] = step + 1
                self.furthest = max(self.furthest, self.phases.fraction())
                try:
                    if progress:
                        progress(phase_name, self.furthest)
                except BaseException as error:  # kept: it must not fly through TensorRT's own frames
                    self.failure = error
            return not (interrupted.is_set() or self.failure)

    return Monitor()


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn Ctrl-C into an event while TensorRT works: an exception thrown through its C++ frames would not do."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def note(signum: int, frame: FrameType | None) -> None:
        interrupted.set()

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
