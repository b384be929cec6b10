"""The stages in order, from a card to a bundle, and what each keeps in the cache.

    weights -> export ------> precision -> tune -> engine -> bundle
                  |                          |
               validate                   validate
    images -> calibrate -> (int8 only)

A stage's cache key names everything that determines its result: the card, the weights, the options, the
versions of the tools, and rxdeploy's own code. Keys are made of the keys before them, so that a build in
which nothing changed looks its results up without computing, or reading, anything in between.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from rxdeploy import __version__, atomic
from rxdeploy.cache import Cache, Entry, recipe_digest
from rxdeploy.calibration.options import HELD_OUT, CalibrationOptions, SchemeName
from rxdeploy.cards import ModelCard, read_labels
from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.builder import timing_cache
from rxdeploy.engines.bundle import Bundle, InputKind, Manifest, Precision, Tuning
from rxdeploy.engines.flavours import Choice, Target, choose, installed_version
from rxdeploy.engines.gpu import find_driver
from rxdeploy.engines.options import EngineOptions
from rxdeploy.errors import CheckFailed, EnvironmentLacks, InputError, from_os_error, missing_module
from rxdeploy.export.architecture import count_multiply_adds, count_parameters, resnext
from rxdeploy.export.weights import StateDict, WeightsSource, check_parameters, load_weights, resolve_weights
from rxdeploy.tuning.options import AUTO, batches, parse_groups

if TYPE_CHECKING:
    from rxdeploy.calibration.sensitivity import Sensitivity
    from rxdeploy.calibration.stage import CalibrationStage
    from rxdeploy.export.validate import Samples

MODEL = bundles.MODEL
# Packages whose version can change what a stage computes, and which the manifest records.
TOOLS = ("numpy", "torch", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "Pillow")


@dataclass(frozen=True)
class Request:
    """What to build."""

    card: ModelCard
    precision: Precision = "fp16"
    input_kind: InputKind = "uint8"
    weights: str | None = None  # as --weights takes it
    target: Target = "auto"
    engine: EngineOptions = field(default_factory=EngineOptions)
    labels: Path | None = None
    calibration: CalibrationOptions | None = None  # needed for int8
    placement: SchemeName | None = None  # of Q/DQ nodes; None: as the target that is built for wants it
    groups: str = AUTO  # of grouped convolutions: as measured or by rule, "native", or the channels a group
    tune: bool = False  # measure here which graph is fastest
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """What the output says of a stage that is done."""

    name: str
    seconds: float
    reused: bool
    detail: str


class Reporter:
    """Told what happens; the command line's prints it. Every method may be ignored."""

    def started(self, stage: str) -> None:
        """A stage that may take a while begins."""

    def finished(self, stage: Stage) -> None:
        """A stage is done."""

    def progress(self, text: str, fraction: float | None) -> None:
        """Inside a stage: what it does, and how far it is (0 to 1, None when unknown)."""


class Pipeline:
    """One build. Every method is a stage; it runs the stages it needs, once, or finds them in the cache."""

    def __init__(self, request: Request, cache: Cache, reporter: Reporter | None = None) -> None:
        check_parameters(request.card)
        self.request = request
        self.cache = cache
        self.reporter = reporter or Reporter()
        self.stages: list[Stage] = []
        self._network = resnext(request.card)
        if request.precision == "int8" and request.calibration is None:
            raise InputError("int8 needs a calibration")
        self._channels = parse_groups(request.groups)
        if request.tune and self._channels is not None:
            raise InputError(
                f"--tune chooses the groups, and --groups {request.groups} says them; leave one of them out"
            )

    # Weights

    @functools.cached_property
    def source(self) -> WeightsSource:
        """Where the weights come from; fetches published ones."""

        def on_bytes(done: int, total: int | None) -> None:
            self.reporter.progress("downloading weights", done / total if total else None)

        return resolve_weights(self.request.card, self.request.weights, self.cache.folder / "weights", on_bytes)

    @functools.cached_property
    def weights(self) -> StateDict:
        """The weights themselves, read when a stage first needs them."""
        self.reporter.progress(
            "making synthetic weights" if self.source.origin.kind == "synthetic" else "reading weights", None
        )
        return load_weights(self.request.card, self.source)

    # Export

    @functools.cached_property
    def _export_key(self) -> str:
        return recipe_digest(
            card=self.request.card.digest,
            # The whole origin, not only the content's identity: it is written into the model.
            weights=msgspec.to_builtins(self.source.origin),
            input=self.request.input_kind,
            code=code_digest(),
            # Synthetic weights are made with torch and Pillow.
            tools=versions("numpy", "onnx", "onnx-ir", "torch", "Pillow"),
        )

    def export(self) -> Entry:
        """The float32 model: model.onnx."""
        with self._stage("export") as done:
            entry = self._export(verify=False)
            return done(entry, f"float32 ONNX, {file_size(entry.folder / MODEL)}")

    def _export(self, verify: bool) -> Entry:
        def produce(folder: Path) -> dict[str, Any]:
            from rxdeploy.export.graph import build_graph, serialise

            weights = self.weights
            self.reporter.progress("building the graph", None)
            model = build_graph(self.request.card, weights, self.request.input_kind, self.source.origin)
            (folder / MODEL).write_bytes(serialise(model))
            return {}

        return self.cache.stage("export", self._export_key, produce, verify)

    # Precision

    def _model_key(self, precision: Precision) -> str:
        if precision == "fp32":
            return self._export_key
        calibration = self._calibration_key if precision == "int8" else None
        return recipe_digest(model=self._export_key, precision=precision, calibration=calibration)

    def precision(self) -> Entry:
        """The model in the precision asked for: model.onnx."""
        precision = self.request.precision
        if precision == "fp32":
            return self._model(precision)
        if precision == "int8":
            self.calibrate()
        with self._stage("precision") as done:
            entry = self._model(precision)
            facts = entry.facts
            if precision == "int8":
                return done(entry, f"int8 ONNX, {file_size(entry.folder / MODEL)}; {facts['convolutions']}")
            flushed = f", {facts['flushed']} rounded to zero" if facts["flushed"] else ""
            return done(
                entry, f"float16 ONNX, {file_size(entry.folder / MODEL)}; {facts['constants']:,} weights{flushed}"
            )

    def _model(self, precision: Precision) -> Entry:
        """The model in `precision`, its file checked."""
        if precision == "fp32":
            return self._export(verify=True)
        if precision == "int8":
            return self.cache.stage("precision", self._model_key(precision), self._quantise)

        def produce(folder: Path) -> dict[str, Any]:
            import onnx_ir as ir

            from rxdeploy.export.float16 import to_float16
            from rxdeploy.export.graph import serialise

            model, rounding = to_float16(ir.load(self._export(verify=True).folder / MODEL))
            (folder / MODEL).write_bytes(serialise(model))
            return {"constants": rounding.constants, "flushed": rounding.flushed}

        return self.cache.stage("precision", self._model_key(precision), produce)

    # Calibration

    @functools.cached_property
    def _choice(self) -> Choice:
        return choose(self.request.target, self.request.engine)

    @property
    def _scheme(self) -> SchemeName:
        if self.request.placement:
            return self.request.placement
        return "tensorrt" if self._choice.flavour else "onnxruntime"

    @functools.cached_property
    def _calibrating(self) -> CalibrationStage:
        from rxdeploy.calibration.stage import CalibrationStage

        assert self.request.calibration is not None
        options = self.request.calibration
        return CalibrationStage(self.request.card, options, self._scheme, self.cache.writing, self.reporter.progress)

    @functools.cached_property
    def _calibration_key(self) -> str:
        return recipe_digest(
            card=self.request.card.digest,
            weights=self.source.identity,
            options=self._calibrating.key(),
            code=code_digest(),
            tools=versions("numpy", "torch", "Pillow"),
        )

    def calibrate(self) -> Entry:
        """The ranges and everything else that decides the int8 model: calibration.json."""
        with self._stage("calibrate") as done:
            entry = self._calibration()
            return done(entry, self._calibrating.describe(entry.facts))

    def _calibration(self) -> Entry:
        def produce(folder: Path) -> dict[str, Any]:
            return self._calibrating.run(self.weights, self._calibration_key, folder)

        return self.cache.stage("calibrate", self._calibration_key, produce)

    def sensitivity(self) -> list[Sensitivity]:
        """How much each layer of the calibrated model pays for its eight bits."""
        with self._stage("sensitivity") as done:
            record = self._calibration().folder / bundles.CALIBRATION
            return done(self._calibrating.sensitivity(self.weights, record), "of every quantised layer")

    def _quantise(self, folder: Path) -> dict[str, Any]:
        import onnx_ir as ir

        from rxdeploy.calibration.apply import apply
        from rxdeploy.calibration.network import Network
        from rxdeploy.calibration.record import load_recipe
        from rxdeploy.export.graph import serialise

        recipe = load_recipe(self._calibration().folder / bundles.CALIBRATION, self._scheme)
        network = Network(self.request.card, self.weights)
        model, _ = apply(ir.load(self._export(verify=True).folder / MODEL), network, recipe)
        (folder / MODEL).write_bytes(serialise(model))
        total, kept = len(list(self._network.convs())), sum(conv.name in recipe.keep for conv in self._network.convs())
        return {"convolutions": f"{total - kept} of {total} convolutions in int8, placed for {recipe.scheme}"}

    # Tuning

    def tune(self) -> Entry:
        """The model that is deployed, of all graphs that compute the same: model.onnx."""
        from rxdeploy.tuning.describe import describe

        if not self.request.tune and self._as_it_is:
            return self._deployed()
        with self._stage("tune" if self.request.tune else "pack") as done:
            tuning, known = self._found_tuning
            entry = self._deployed()
            return done(Entry(entry.folder, entry.facts, entry.reused and known), describe(tuning))

    @property
    def _tuning(self) -> Tuning:
        return self._found_tuning[0]

    @functools.cached_property
    def _found_tuning(self) -> tuple[Tuning, bool]:
        """The tuning, and whether it took no measuring."""
        import onnx_ir as ir

        from rxdeploy.tuning import stage
        from rxdeploy.tuning.device import device_for

        def model() -> ir.Model:
            return ir.load(self._model(self.request.precision).folder / MODEL)

        if not self.request.tune:
            engine: SchemeName = "tensorrt" if self._choice.flavour else "onnxruntime"
            if int8 := self.request.precision == "int8":
                engine = self._scheme
            keep = self._calibration().facts["keep"] if int8 else ()
            return stage.by_rule(self._network, engine, self.request.precision, self._channels, keep), True
        options, flavour = self.request.engine, self._choice.flavour
        draft = self._manifest(self._choice, {}, None, None)
        sizes, report = batches(options), self.reporter.progress
        device = device_for(draft, flavour, options, sizes, self.cache.folder)
        return stage.by_measuring(model, device, sizes, draft, code_digest(), self.cache, report)

    @property
    def _as_it_is(self) -> bool:
        return not (self._tuning.groups or self._tuning.passes)

    @property
    def _deployed_key(self) -> str:
        model, tuning = self._model_key(self.request.precision), self._tuning
        if self._as_it_is:
            return model
        return recipe_digest(model=model, groups=tuning.groups, passes=tuning.passes, code=code_digest())

    def _deployed(self) -> Entry:
        tuning = self._tuning
        if self._as_it_is:
            return self._model(self.request.precision)

        def produce(folder: Path) -> dict[str, Any]:
            import onnx_ir as ir

            from rxdeploy.export.graph import serialise
            from rxdeploy.tuning.variant import Variant, apply

            model = ir.load(self._model(self.request.precision).folder / MODEL)
            (folder / MODEL).write_bytes(serialise(apply(model, Variant(tuning.groups, tuning.passes))))
            return {}

        return self.cache.stage("tuned", self._deployed_key, produce)

    # Validation

    def validate(self, precision: Precision | None = None) -> Entry:
        """Figures of the model against PyTorch; CheckFailed when they are beyond the limits.

        `precision` "fp32" checks the export alone; by default the model that is deployed.
        """
        precision = precision or self.request.precision
        with self._stage(f"validate {precision}") as done:
            entry = self._validation(precision)
            if not entry.facts["passed"]:
                raise CheckFailed(self.validation_failure(entry.facts, self._tested(precision).folder / MODEL))
            figures = list(entry.facts["providers"].values())[-1]["all"]
            decided = figures["images"] - figures["ties"]
            ties = f" ({figures['ties']} tied)" if figures["ties"] else ""
            agreement = f"top-1 agrees on all {decided} decided of {figures['images']} images{ties}"
            half = entry.facts.get("float16")
            room = f", float16 headroom {half['headroom']:.3g}" if half and half["headroom"] else ""
            return done(entry, f"relative L2 {figures['relative_l2']:.1e} against PyTorch, {agreement}{room}")

    def _tested(self, precision: Precision) -> Entry:
        """The model in the precision asked for as it is deployed; in another as it was exported."""
        return self._deployed() if precision == self.request.precision else self._model(precision)

    def _validation(self, precision: Precision) -> Entry:
        deployed = precision == self.request.precision
        cpu = self._tuning.cpu if deployed else None
        key = recipe_digest(
            model=self._deployed_key if deployed else self._model_key(precision),
            reference=self._reference_key,
            batches=self._batches,
            cpu=msgspec.to_builtins(cpu),
            tools=versions("onnxruntime", "onnxruntime-gpu", "openvino"),
            gpus=[gpu.name for gpu in find_driver().gpus],
        )

        def produce(folder: Path) -> dict[str, Any]:
            import numpy as np

            from rxdeploy.export.validate import validate_model

            samples = self._samples(precision)
            reference = self._reference(verify=True, samples=samples)
            model = self._tested(precision)
            self.reporter.progress("running ONNX Runtime", None)
            logits = np.load(reference.folder / "logits.npy")
            path, batches = model.folder / MODEL, self._batches
            facts = validate_model(self.request.card, path, precision, logits, batches, samples, cpu)
            largest = reference.facts["largest"]
            layer = max(largest, key=largest.__getitem__)
            return facts | {"largest_activation": {"layer": layer, "magnitude": largest[layer]}}

        return self.cache.stage("validate", key, produce)

    @property
    def _batches(self) -> tuple[int, ...]:
        from rxdeploy.export.validate import validation_batches

        return validation_batches(max(profile.opt for profile in self.request.engine.profiles))

    @functools.cached_property
    def _reference_key(self) -> str:
        return recipe_digest(
            card=self.request.card.digest,
            weights=self.source.identity,
            code=code_digest(),
            tools=versions("numpy", "torch", "Pillow"),
        )

    def _samples(self, precision: Precision) -> Samples | None:
        """The images to validate with, where they are not the usual ones."""
        import numpy as np

        from rxdeploy.export.validate import held_out_samples

        if precision != "int8" or self.request.precision != "int8":  # a file of somebody's own
            return None
        if not (file := self._calibration().folder / HELD_OUT).is_file():
            return None
        return held_out_samples(np.load(file))

    def _reference(self, verify: bool, samples: Samples | None = None) -> Entry:
        """PyTorch's logits for the validation samples, and the largest magnitude each layer reaches."""

        def produce(folder: Path) -> dict[str, Any]:
            import numpy as np

            from rxdeploy.export.reference import run_reference
            from rxdeploy.export.validate import validation_samples

            weights = self.weights
            self.reporter.progress("running PyTorch", None)
            largest: dict[str, float] = {}

            def note(layer: str, output: Any) -> None:
                largest[layer] = max(largest.get(layer, 0.0), float(np.abs(output).max()))

            images = (samples or validation_samples(self.request.card)).images
            logits = run_reference(self.request.card, weights, images, note)
            np.save(folder / "logits.npy", logits)
            return {"largest": largest}

        key = self._reference_key
        if samples:
            key = recipe_digest(reference=key, calibration=self._calibration_key)
        return self.cache.stage("reference", key, produce, verify)

    def validation_failure(self, facts: dict[str, Any], model: Path) -> str:
        """Why a validation failed, with the first tensor that departs."""
        from rxdeploy.export.headroom import describe
        from rxdeploy.export.layers import first_departure

        precision = facts["precision"]
        provider, figures = max(
            ((provider, group["all"]) for provider, group in facts["providers"].items()),
            key=lambda item: (item[1]["relative_l2"] != item[1]["relative_l2"], item[1]["relative_l2"]),  # NaN first
        )
        half = facts.get("float16")
        if half and half["overflowed"]:
            where = f"{describe(half)}; use --fp32"
        elif (first := first_departure(self.compare_layers(model, precision))) is None:
            where = "on two of the images no single layer departs"
        else:
            where = f"the first tensor that departs is {first.name} (relative L2 {first.relative_l2:.2g})"
        return (
            f"validation of the {precision} model on {provider} failed: relative L2 error of the logits "
            f"{figures['relative_l2']:.2g} (limit {facts['limits']['relative_l2']:g}), {figures['flipped']} of "
            f"{figures['images']} images change class (limit 0); {where}; "
            "`rxdeploy validate --layers` shows every layer"
        )

    def compare_layers(self, model: Path, precision: Precision) -> list[Any]:
        """Deviation of every layer of an ONNX file from the PyTorch module, on a photograph and noise."""
        from rxdeploy.export.layers import compare_layers
        from rxdeploy.export.validate import validation_samples

        images = (self._samples(precision) or validation_samples(self.request.card)).images[[0, -1]]
        found = compare_layers(self.request.card, self.weights, model, precision, images)
        if precision != "int8" or self.request.precision != "int8":
            return found
        from rxdeploy.calibration.record import load_recipe

        recipe = load_recipe(self._calibration().folder / bundles.CALIBRATION, self._scheme)
        scaled = {conv.bn for conv in self._network.convs() if conv.name in recipe.equalisation}
        return [layer for layer in found if layer.name not in scaled]  # these are divided by what the next multiplies

    def validate_file(self, path: Path) -> dict[str, Any]:
        """Figures of a user's own ONNX file against PyTorch, passed or not."""
        import numpy as np

        from rxdeploy.export.validate import check_interface, precision_of, validate_model

        check_interface(self.request.card, path)
        with self._stage("validate file") as done:
            logits = np.load(self._reference(verify=True).folder / "logits.npy")
            facts = validate_model(self.request.card, path, precision_of(path), logits, self._batches)
            return done(facts, str(path))

    def validate_export(self) -> tuple[dict[str, Any], Path]:
        """Figures of the model that would be deployed, passed or not, and the model."""
        self.export()
        self.precision()
        model = self.tune().folder / MODEL
        with self._stage(f"validate {self.request.precision}") as done:
            entry = self._validation(self.request.precision)
            return done(entry, "passed" if entry.facts["passed"] else "failed").facts, model

    def export_to(self, output: Path) -> None:
        """Export, in the precision asked for, to an ONNX file."""
        self.export()
        self.precision()
        model = self.tune()
        with self._stage("write") as done, atomic.new_file(output) as temporary:
            shutil.copyfile(model.folder / MODEL, temporary)
            done(output, f"{output}, {file_size(temporary)}")

    # Engine

    def engine(self, choice: Choice) -> Entry | None:
        """The TensorRT plan for `choice`: engine.plan; None when it is ONNX Runtime only."""
        flavour = choice.flavour
        if flavour is None:
            return None
        driver = find_driver()
        options = self.request.engine
        for_this_gpu = not flavour.builds_without_gpu or options.refit or options.strip_plan
        gpu = driver.gpus[0] if for_this_gpu and driver.gpus else None
        timing = timing_cache(self.cache.folder, flavour, choice.version, gpu)

        def produce(folder: Path) -> dict[str, Any]:
            from rxdeploy.engines.builder import build_plan

            model = (self._deployed().folder / MODEL).read_bytes()
            plan = build_plan(model, flavour, options, self.reporter.progress, timing)
            (folder / bundles.PLAN).write_bytes(plan.data)
            return plan.facts

        key = recipe_digest(
            model=self._deployed_key,
            options=options.as_facts(),
            flavour=flavour.name,
            version=choice.version,
            gpu=gpu and [gpu.name, gpu.compute_capability],
            driver=gpu and driver.cuda_version,
        )
        with self._stage("engine") as done:
            entry = self.cache.stage("engine", key, produce)
            where = "" if driver.gpus else ", built without a GPU"
            size = file_size(entry.folder / bundles.PLAN)
            return done(entry, f"{flavour.name} {choice.version} plan, {size}{where}")

    # Bundle

    def build(self, output: Path, overwrite: bool = False) -> Bundle:
        """Everything: export, precision, validation, engine, and the bundle at `output`."""
        request = self.request
        bundles.check_destination(output, request.card.name, request.precision, overwrite)
        choice = self._choice
        labels = self._labels()
        self.export()
        if request.precision != "fp32":
            self.validate("fp32")
        self.precision()
        model = self.tune()
        validation = self.validate()
        engine = self.engine(choice)
        with self._stage("bundle") as done:
            files: dict[str, Path | bytes] = {MODEL: model.folder / MODEL}
            if engine:
                files[bundles.PLAN] = engine.folder / bundles.PLAN
            if request.precision == "int8":
                files[bundles.CALIBRATION] = self._calibration().folder / bundles.CALIBRATION
            if labels:
                files[bundles.LABELS] = ("\n".join(labels) + "\n").encode()
            manifest = self._manifest(choice, validation.facts, engine.facts if engine else None, self._tuning)
            bundle = bundles.write_bundle(output, manifest, files, overwrite)
            total = sum(file.bytes for file in bundle.manifest.files.values())
            return done(bundle, f"{output}, {size_text(total)}")

    def _labels(self) -> tuple[str, ...] | None:
        card = self.request.card
        if self.request.labels is not None:
            return read_labels(self.request.labels, card.architecture.num_classes)
        return card.class_names()

    def _manifest(
        self, choice: Choice, validation: dict[str, Any], engine: dict[str, Any] | None, tuning: Tuning | None
    ) -> Manifest:
        request, card = self.request, self.request.card
        size, classes = card.input.image_size, card.architecture.num_classes
        profiles = request.engine.profiles
        batch = (min(p.min for p in profiles), max(p.max for p in profiles)) if engine else None
        image = (
            bundles.Tensor(name="image", dtype="uint8", layout="NHWC", shape=(None, size, size, 3), batch=batch)
            if request.input_kind == "uint8"
            else bundles.Tensor(name="input", dtype="float32", layout="NCHW", shape=(None, 3, size, size), batch=batch)
        )
        logits = bundles.Tensor(name="logits", dtype="float32", layout="NC", shape=(None, classes), batch=batch)
        gpus = find_driver().gpus
        return Manifest(
            schema=bundles.SCHEMA,
            model=card.name,
            precision=request.precision,
            target=bundles.TargetFacts(
                name=choice.flavour.name if choice.flavour else "onnxruntime",
                version=choice.version,
                reason=choice.reason,
                gpu=gpus[0].name if gpus else None,
            ),
            weights=self.source.origin,
            card=bundles.card_facts(card),
            counts=bundles.Counts(
                parameters=count_parameters(self._network), multiply_adds=count_multiply_adds(self._network)
            ),
            preprocessing=card.input,
            normalisation_in_graph=request.input_kind == "uint8",
            num_classes=classes,
            inputs=(image,),
            outputs=(logits,),
            validation=validation,
            quantisation=self._calibration().facts if request.precision == "int8" else None,
            engine=engine,
            tuning=tuning,
            tools={"rxdeploy": __version__, "python": platform.python_version(), **versions(*TOOLS)},
            command=request.command,
            files={},
        )

    def _stage(self, name: str) -> _StageTimer:
        return _StageTimer(self, name)


class _StageTimer:
    """Times a stage, reports it, and puts a name to what a missing package or a full disk did to it."""

    def __init__(self, pipeline: Pipeline, name: str) -> None:
        self._pipeline, self._name = pipeline, name

    def __enter__(self) -> Callable[[Any, str], Any]:
        self._start = time.perf_counter()
        self._pipeline.reporter.started(self._name)
        return self._done

    def _done(self, result: Any, detail: str) -> Any:
        reused = isinstance(result, Entry) and result.reused
        stage = Stage(self._name, time.perf_counter() - self._start, reused, detail)
        self._pipeline.stages.append(stage)
        self._pipeline.reporter.finished(stage)
        return result

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, ModuleNotFoundError):
            raise missing_module(error) from None
        if isinstance(error, MemoryError):
            raise EnvironmentLacks(f"{self._name}: not enough memory") from None
        if isinstance(error, OSError):
            raise from_os_error(error, f"running the stage {self._name}") from None


@functools.cache
def code_digest() -> str:
    """sha256 of rxdeploy's own code and data: a changed program does not reuse what the old one computed."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.jpg")]):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of those of `packages` that are installed, without importing them."""
    found = ((package, installed_version((package,))) for package in packages)
    return {package: version for package, version in found if version is not None}


def file_size(path: Path) -> str:
    """A file's size for people."""
    return size_text(path.stat().st_size)


def size_text(size: int) -> str:
    """Bytes for people: 167.3 MB or 21.7 kB (powers of ten, as the card and pip count)."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
