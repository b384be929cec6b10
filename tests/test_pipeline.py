"""Whole builds of the digits model and of small user models: what comes out, what is reused, and what fails how.

They run as on any machine without a GPU; where TensorRT-RTX is not installed, no plan is expected.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rxdeploy
from rxdeploy.cache import Cache
from rxdeploy.cards import ModelCard, find_card
from rxdeploy.engines.builder import Plan
from rxdeploy.engines.bundle import Bundle, open_bundle
from rxdeploy.engines.flavours import TENSORRT, Choice
from rxdeploy.engines.gpu import Driver, Gpu, find_driver
from rxdeploy.engines.options import EngineOptions, Profile
from rxdeploy.errors import CheckFailed, EnvironmentLacks, InputError, RxDeployError
from rxdeploy.pipeline import Pipeline, Reporter, Request, Stage

for _name in ("onnx_ir", "onnxruntime", "torch"):
    pytest.importorskip(_name, reason="builds need rxdeploy[build] and ONNX Runtime")

ROOM = 10**12
DIGITS = "digits_resnext14_8x8d"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(rxdeploy.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
RTX = importlib.util.find_spec("tensorrt_rtx") is not None
TARGET: Any = "tensorrt-rtx" if RTX else "onnxruntime"
ENGINE = ["engine"] if RTX else []
PACKED = ["pack"] if RTX else []  # for tensor cores
FP16_STAGES = ["export", "validate fp32", "precision", *PACKED, "validate fp16", *ENGINE, "bundle"]
FP32_STAGES = ["export", "validate fp32", *ENGINE, "bundle"]


def request_for(card: ModelCard | None = None, **changes: Any) -> Request:
    return Request(card or find_card(DIGITS), **{"target": TARGET, **changes})


def run(request: Request, cache: Path, output: Path, force: bool = False, **options: Any) -> tuple[Bundle, list[Stage]]:
    """A build with a cache of its own, as a process would make it."""
    with contextlib.closing(Cache(cache, ROOM, force)) as opened:
        pipeline = Pipeline(request, opened)
        return pipeline.build(output, **options), pipeline.stages


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def reused(stages: list[Stage]) -> dict[str, bool]:
    return {stage.name: stage.reused for stage in stages}


def entries(cache: Path, stage: str) -> int:
    return len(list((cache / "stages").glob(f"{stage}-*")))


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache in which the digits model was built in float16, and the bundle."""
    folder = tmp_path_factory.mktemp("warm")
    run(request_for(), folder / "cache", folder / "bundle")
    return folder


@pytest.fixture
def cache(warm: Path, tmp_path: Path) -> Path:
    """A copy of that cache, for one test."""
    shutil.copytree(warm / "cache", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """Where a bundle may go; nothing but it, whole, may be found in its folder after the test."""
    path = tmp_path / "output" / "it"
    path.parent.mkdir()
    yield path
    assert names(path.parent) in ([], ["it"])
    if path.exists():
        open_bundle(path)


# What comes out


def test_a_bundle_has_everything(warm: Path) -> None:
    bundle = open_bundle(warm / "bundle")
    manifest = bundle.manifest
    plan = ["engine.plan"] if RTX else []
    assert names(bundle.path) == [*plan, "labels.txt", "manifest.json", "model.onnx", "sbom.cdx.json"]
    assert list(manifest.files) == [*plan, "labels.txt", "model.onnx", "sbom.cdx.json"]
    assert bundle.labels() == ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    card = find_card(DIGITS)
    assert card.weights.file
    assert (manifest.model, manifest.precision, manifest.num_classes) == (DIGITS, "fp16", 10)
    assert (manifest.weights.kind, manifest.weights.source) == ("file", card.weights.file)
    assert manifest.weights.sha256 == hashlib.sha256(card.beside(card.weights.file).read_bytes()).hexdigest()
    assert manifest.card.sha256 == card.digest
    assert manifest.card.accuracy == card.accuracy
    assert manifest.counts.parameters == card.figures.parameters
    assert manifest.preprocessing == card.input
    assert manifest.normalisation_in_graph
    (image,), (logits,) = manifest.inputs, manifest.outputs
    batch = (1, 32) if RTX else None
    assert (image.name, image.dtype, image.layout, image.shape, image.batch) == (
        "image",
        "uint8",
        "NHWC",
        (None, 64, 64, 3),
        batch,
    )
    assert (logits.name, logits.dtype, logits.layout, logits.shape, logits.batch) == (
        "logits",
        "float32",
        "NC",
        (None, 10),
        batch,
    )
    assert manifest.tools["rxdeploy"] == rxdeploy.__version__
    assert {"python", "numpy", "torch", "onnx", "onnx-ir"} <= set(manifest.tools)
    assert manifest.target.name == TARGET
    assert manifest.target.gpu == (find_driver().gpus[0].name if find_driver().gpus else None)


def test_the_manifest_has_the_validations_figures(warm: Path) -> None:
    validation = open_bundle(warm / "bundle").manifest.validation
    assert validation["passed"] is True
    assert validation["limits"] == {"relative_l2": 0.05, "tie": 0.1, "flipped": 0}
    figures = validation["providers"]["CPUExecutionProvider"]
    assert set(figures["by_batch"]) == {"1", "8", "9"}, "one, the optimum, and one beyond it"
    assert 1e-5 < figures["all"]["relative_l2"] < 0.02, "float16 rounds, and not more"
    assert figures["all"]["flipped"] == 0


def test_the_largest_activation_is_pytorchs(warm: Path) -> None:
    """Found again without the pipeline's hooks: over all batch-norms, blocks and the max-pool of the module."""
    import torch

    from rxdeploy.export.module import Bottleneck
    from rxdeploy.export.reference import reference_module
    from rxdeploy.export.validate import validation_samples
    from rxdeploy.export.weights import load_weights, resolve_weights
    from rxdeploy.runtime.preprocess import normalise

    card = find_card(DIGITS)
    module = reference_module(card, load_weights(card, resolve_weights(card, None, Path("unused"))))
    largest: dict[str, float] = {}
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.BatchNorm2d | torch.nn.MaxPool2d | Bottleneck):
            part.register_forward_hook(
                lambda _part, _inputs, output, name=name: largest.update({name: float(output.abs().max())})
            )
    images = validation_samples(card).images
    with torch.inference_mode():
        module(torch.from_numpy(normalise(images, card.input.mean, card.input.std)))
    found = open_bundle(warm / "bundle").manifest.validation["largest_activation"]
    assert found["layer"] == max(largest, key=largest.__getitem__)
    assert found["magnitude"] == pytest.approx(max(largest.values()), rel=1e-5)


def test_the_bundled_model_computes_what_pytorch_computes(warm: Path) -> None:
    import onnxruntime
    import torch

    from rxdeploy.export.reference import reference_module
    from rxdeploy.export.weights import load_weights, resolve_weights

    card = find_card(DIGITS)
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(str(warm / "bundle" / "model.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": images})
    module = reference_module(card, load_weights(card, resolve_weights(card, None, Path("unused"))))
    scaled = (images.transpose(0, 3, 1, 2) / 255 - card.input.mean[0]) / card.input.std[0]  # all channels are equal
    with torch.inference_mode():
        expected = module(torch.from_numpy(scaled.astype(np.float32))).numpy()
    assert logits.dtype == np.float32
    assert np.linalg.norm(logits - expected) / np.linalg.norm(expected) < 0.01


@pytest.mark.skipif(not RTX, reason="TensorRT-RTX is not installed")
def test_the_manifest_has_the_engines_facts(warm: Path) -> None:
    engine = open_bundle(warm / "bundle").manifest.engine
    assert engine is not None
    assert engine["flavour"] == "tensorrt-rtx"
    assert engine["profiles"] == [{"min": 1, "opt": 8, "max": 32}]


@pytest.mark.skipif(not RTX, reason="TensorRT-RTX is not installed")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_plan_is_built_from_the_bundled_model(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    asked: list[tuple[Any, ...]] = []

    def build_plan(model: bytes, flavour: Any, options: EngineOptions, progress: Any, timing: Path | None) -> Plan:
        asked.append((model, flavour.name, options, timing))
        return Plan(b"a plan", {"flavour": flavour.name, "profiles": []})

    monkeypatch.setattr("rxdeploy.engines.builder.build_plan", build_plan)
    options = EngineOptions(profiles=(Profile(2, 4, 6), Profile(1, 1, 1)), workspace_mib=64)
    bundle, _ = run(request_for(precision=precision, engine=options), tmp_path / "cache", output)
    assert asked == [((output / "model.onnx").read_bytes(), "tensorrt-rtx", options, None)]
    assert (output / "engine.plan").read_bytes() == b"a plan"
    assert bundle.manifest.engine == {"flavour": "tensorrt-rtx", "profiles": []}
    assert bundle.manifest.inputs[0].batch == (1, 6), "over all profiles"


def test_a_full_tensorrt_plan_belongs_to_its_gpu(cache: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its timings are kept by version and GPU; another GPU, driver or version means another plan."""
    timings: list[Path | None] = []

    def build_plan(model: bytes, flavour: Any, options: EngineOptions, progress: Any, timing: Path | None) -> Plan:
        timings.append(timing)
        return Plan(b"a plan", {"flavour": flavour.name, "profiles": []})

    monkeypatch.setattr("rxdeploy.engines.builder.build_plan", build_plan)
    for gpu, cuda, version, file in [
        ("NVIDIA Test", (13, 0), "10.13", "tensorrt-10.13-NVIDIA-Test.cache"),
        ("NVIDIA Test", (13, 0), "10.13", None),  # reused
        ("NVIDIA Other", (13, 0), "10.13", "tensorrt-10.13-NVIDIA-Other.cache"),
        ("NVIDIA Test", (13, 1), "10.13", "tensorrt-10.13-NVIDIA-Test.cache"),
        ("NVIDIA Test", (13, 0), "11.4", "tensorrt-11.4-NVIDIA-Test.cache"),
    ]:
        driver = Driver(cuda, (Gpu(gpu, (9, 0), 80 << 30),), None)
        choice = Choice(TENSORRT, version, "a test")
        monkeypatch.setattr("rxdeploy.pipeline.find_driver", lambda driver=driver: driver)
        monkeypatch.setattr("rxdeploy.pipeline.choose", lambda *_, choice=choice: choice)
        timings.clear()
        bundle, _ = run(request_for(), cache, output)
        assert timings == ([cache / "timing" / file] if file else [])
        assert (bundle.manifest.target.name, bundle.manifest.target.gpu) == ("tensorrt", gpu)
        assert bundle.manifest.target.version == version


def test_for_onnxruntime_there_is_no_plan(cache: Path, output: Path) -> None:
    bundle, stages = run(request_for(target="onnxruntime"), cache, output)
    assert names(output) == ["labels.txt", "manifest.json", "model.onnx", "sbom.cdx.json"]
    assert (bundle.manifest.target.name, bundle.manifest.engine) == ("onnxruntime", None)
    assert bundle.manifest.inputs[0].batch is None
    assert reused(stages) == {
        "export": True,
        "validate fp32": True,
        "precision": True,
        "validate fp16": not RTX,  # whose groups were packed
        "bundle": False,
    }


def test_a_float32_input(tmp_path: Path, output: Path) -> None:
    bundle, _ = run(request_for(input_kind="float32"), tmp_path / "cache", output)
    (tensor,) = bundle.manifest.inputs
    assert (tensor.name, tensor.dtype, tensor.layout, tensor.shape) == ("input", "float32", "NCHW", (None, 3, 64, 64))
    assert not bundle.manifest.normalisation_in_graph


def test_labels_of_the_users_own(cache: Path, output: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("\n".join("abcdefghij") + "\n", encoding="utf-8")
    bundle, stages = run(request_for(labels=tmp_path / "mine.txt"), cache, output)
    assert bundle.labels() == tuple("abcdefghij")
    assert all(stage.reused for stage in stages[:-1]), "labels change nothing that is computed"


def test_a_model_without_labels(make_card: Callable[..., ModelCard], tmp_path: Path, output: Path) -> None:
    bundle, _ = run(request_for(make_card(), weights="synthetic", precision="fp32"), tmp_path / "cache", output)
    assert bundle.labels() is None
    assert "labels.txt" not in names(output)
    assert (bundle.manifest.weights.kind, bundle.manifest.weights.sha256) == ("synthetic", None)


def test_command_and_gpu_are_recorded(cache: Path, output: Path) -> None:
    bundle, _ = run(request_for(command=("rxdeploy", "build", DIGITS)), cache, output)
    assert bundle.manifest.command == ("rxdeploy", "build", DIGITS)


# What is reported


def test_the_reporter_hears_of_every_stage(tmp_path: Path, output: Path) -> None:
    heard: list[str] = []

    class Listener(Reporter):
        def started(self, stage: str) -> None:
            heard.append(f"started {stage}")

        def finished(self, stage: Stage) -> None:
            assert stage.detail and stage.seconds >= 0
            heard.append(f"finished {stage.name}")

        def progress(self, text: str, fraction: float | None) -> None:
            assert text and (fraction is None or 0 <= fraction <= 1)

    with contextlib.closing(Cache(tmp_path / "cache", ROOM)) as opened:
        pipeline = Pipeline(request_for(), opened, Listener())
        pipeline.build(output)
    assert heard == [f"{what} {stage}" for stage in FP16_STAGES for what in ("started", "finished")]
    assert [stage.name for stage in pipeline.stages] == FP16_STAGES


# What is reused


def test_a_second_build_computes_nothing_and_gives_the_same_bytes(warm: Path, cache: Path, output: Path) -> None:
    _, stages = run(request_for(), cache, output)
    assert reused(stages) == {name: name != "bundle" for name in FP16_STAGES}
    assert content(output) == content(warm / "bundle")
    run(request_for(), cache, output)
    assert content(output) == content(warm / "bundle")


def test_a_fresh_cache_gives_the_same_model_and_manifest(warm: Path, tmp_path: Path, output: Path) -> None:
    """All but the plan: TensorRT-RTX does not promise the same bytes twice."""
    bundle, stages = run(request_for(), tmp_path / "cache", output)
    assert not any(stage.reused for stage in stages)
    first, again = content(warm / "bundle"), content(output)
    assert {name: again[name] for name in ("model.onnx", "labels.txt")} == {
        name: first[name] for name in ("model.onnx", "labels.txt")
    }
    warm_manifest = open_bundle(warm / "bundle").manifest
    assert bundle.manifest.engine == warm_manifest.engine
    assert bundle.manifest.validation == warm_manifest.validation


def only_bundle(*computed: str) -> dict[str, bool]:
    return {name: name not in computed and name != "bundle" for name in FP16_STAGES}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # Other weights and another input change the model, and with it everything made of it.
        ({"weights": "synthetic:1"}, dict.fromkeys(FP16_STAGES, False)),
        ({"input_kind": "float32"}, dict.fromkeys(FP16_STAGES, False)),
        # Of the float32 build, the export and its validation are shared with the float16 one.
        (
            {"precision": "fp32"},
            {name: name in ("export", "validate fp32") for name in FP32_STAGES},
        ),
        # A profile is the engine's business; its optimum is also a batch size that is validated.
        ({"engine": EngineOptions(profiles=(Profile(1, 8, 16),))}, only_bundle("engine")),
        (
            {"engine": EngineOptions(profiles=(Profile(1, 4, 32),))},
            only_bundle("validate fp32", "validate fp16", "engine"),
        ),
        ({"command": ("another",)}, only_bundle()),
        *([({"engine": EngineOptions(optimization_level=0)}, only_bundle("engine"))] if RTX else []),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) and "bundle" not in value else "",
)
def test_a_change_computes_what_depends_on_it(
    cache: Path, output: Path, changes: dict[str, Any], expected: dict[str, bool]
) -> None:
    _, stages = run(request_for(**changes), cache, output)
    assert reused(stages) == expected
    _, stages = run(request_for(**changes), cache, output)
    assert all(stage.reused for stage in stages if stage.name != "bundle")


def test_another_seed_is_another_model(make_card: Callable[..., ModelCard], tmp_path: Path, output: Path) -> None:
    card, models = make_card(), []
    for seed in (1, 2, 1):
        run(request_for(card, weights=f"synthetic:{seed}", precision="fp32"), tmp_path / "cache", output)
        models.append((output / "model.onnx").read_bytes())
    assert models[0] == models[2] != models[1]
    assert entries(tmp_path / "cache", "export") == 2


def test_pytorch_runs_once_for_all_inputs_and_precisions(cache: Path, output: Path) -> None:
    for changes in ({"input_kind": "float32"}, {"precision": "fp32"}):
        run(request_for(**changes), cache, output, overwrite=True)
    assert entries(cache, "reference") == 1


def test_a_changed_weights_file_is_noticed(
    make_card: Callable[..., ModelCard], random_weights: Callable[..., Any], tmp_path: Path, output: Path
) -> None:
    """Of the same name and size."""
    card = make_card()
    for seed in (1, 2):
        save(tmp_path / "net.safetensors", random_weights(card, seed))
        request = request_for(card, weights=str(tmp_path / "net.safetensors"), precision="fp32")
        bundle, stages = run(request, tmp_path / "cache", output)
        assert not any(stage.reused for stage in stages)
    digest = hashlib.sha256((tmp_path / "net.safetensors").read_bytes()).hexdigest()
    assert bundle.manifest.weights.sha256 == digest
    assert (bundle.manifest.weights.kind, bundle.manifest.weights.source) == ("file", "net.safetensors")


def test_a_changed_card_is_noticed(make_card: Callable[..., ModelCard], tmp_path: Path, output: Path) -> None:
    for mean in ([0.5, 0.5, 0.5], [0.5, 0.5, 0.4]):
        request = request_for(make_card(mean=mean), weights="synthetic", precision="fp32")
        _, stages = run(request, tmp_path / "cache", output)
        assert not any(stage.reused for stage in stages)


def test_changed_code_is_noticed(cache: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rxdeploy.pipeline.code_digest", lambda: "of another rxdeploy")
    _, stages = run(request_for(), cache, output)
    assert not any(stage.reused for stage in stages)


@pytest.mark.parametrize(
    ("package", "computed"),
    [
        ("onnx-ir", FP16_STAGES),
        ("torch", FP16_STAGES),
        ("onnxruntime", ["validate fp32", "validate fp16", "bundle"]),
    ],
)
def test_another_version_of_a_tool_is_noticed(
    cache: Path, output: Path, monkeypatch: pytest.MonkeyPatch, package: str, computed: list[str]
) -> None:
    import importlib.metadata

    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.0" if name.startswith(package) else version(name)
    )
    _, stages = run(request_for(), cache, output)
    assert [stage.name for stage in stages if not stage.reused] == computed


def test_force_computes_everything_again(cache: Path, output: Path) -> None:
    _, stages = run(request_for(), cache, output, force=True)
    assert not any(stage.reused for stage in stages)
    assert entries(cache, "export") == 1


@pytest.mark.parametrize("stage", ["export", "reference", "precision", "validate", *ENGINE])
def test_a_damaged_cache_entry_does_not_reach_a_bundle(warm: Path, cache: Path, output: Path, stage: str) -> None:
    for entry in (cache / "stages").glob(f"{stage}-*"):
        for path in entry.iterdir():
            if path.name != "entry.json" or stage == "validate":
                path.write_bytes(path.read_bytes()[:-1] + b"\0")
    bundle, _ = run(request_for(), cache, output)
    ours, good = content(output), content(warm / "bundle")
    assert ours["model.onnx"] == good["model.onnx"]
    assert bundle.manifest.validation == open_bundle(warm / "bundle").manifest.validation
    if RTX:
        assert (ours["engine.plan"] == good["engine.plan"]) or stage == "engine"


# Checks that fail


def fails(error: type[RxDeployError], request: Request, cache: Path, output: Path) -> str:
    with pytest.raises(error) as caught:
        run(request, cache, output)
    assert type(caught.value) is error
    assert not output.exists()
    # Nothing half done in the cache: every entry is whole, and there is nothing else.
    assert all((path / "entry.json").exists() for path in (cache / "stages").iterdir())
    return str(caught.value)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_wrong_epsilon_is_found(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr("rxdeploy.export.graph.BN_EPS", 1e-2)
    request = request_for(precision=precision)
    for _ in range(2):  # the second time from the cache
        message = fails(CheckFailed, request, tmp_path / "cache", output)
        assert "validation of the fp32 model on CPUExecutionProvider failed: relative L2 error" in message
        assert "the first tensor that departs is bn1 (relative L2 " in message
        assert "`rxdeploy validate --layers`" in message


def test_the_first_tensor_that_departs_is_named(tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rxdeploy.export import graph

    fold = graph.fold_batch_norm

    def sabotaged(weights: Any, conv: Any) -> Any:
        weight, bias = fold(weights, conv)
        return (weight * 1.5 if conv.name == "layer3.0.conv2" else weight), bias

    monkeypatch.setattr(graph, "fold_batch_norm", sabotaged)
    message = fails(CheckFailed, request_for(precision="fp32"), tmp_path / "cache", output)
    assert "the first tensor that departs is layer3.0.bn2 (relative L2 0." in message


def test_a_float16_pass_that_loses_something_is_found(
    cache: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rxdeploy.export import float16

    ir = pytest.importorskip("onnx_ir")
    convert = float16.to_float16

    def sabotaged(model: Any) -> Any:
        value = model.graph.initializers["layer2.0.conv3.bias"]
        value.const_value = ir.tensor(value.const_value.numpy() + np.float32(1), name=value.name)
        return convert(model)

    monkeypatch.setattr(float16, "to_float16", sabotaged)
    shutil.rmtree(next((cache / "stages").glob("precision-*")))
    for stage in ("validate", "tuned"):
        for path in (cache / "stages").glob(f"{stage}-*"):
            shutil.rmtree(path)
    message = fails(CheckFailed, request_for(), cache, output)
    assert message.startswith("validation of the fp16 model ")
    assert "the first tensor that departs is layer2.0.bn3 " in message


def save(path: Path, tensors: dict[str, Any]) -> None:
    save_file = pytest.importorskip("safetensors.numpy", reason="the weights are a safetensors file").save_file
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("layer3.0.bn3", "; layer3.0.bn3 overflows: it reaches "),
        ("bn1", "; bn1 overflows: it reaches "),
        ("fc", "; logits overflows: it reaches "),
    ],
)
def test_an_activation_beyond_float16_is_named(
    make_card: Callable[..., ModelCard],
    random_weights: Callable[..., Any],
    tmp_path: Path,
    output: Path,
    layer: str,
    words: str,
) -> None:
    """Weights that float16 holds well, whose products it does not."""
    card = make_card()
    weights = random_weights(card)
    if layer == "fc":
        weights["fc.weight"][0] = 5e4  # features are not negative, so nothing cancels
    else:
        # Outputs ten thousand times as large, of which the folded weights, below 65504, give no hint.
        weights[f"{layer}.weight"] *= np.float32(1e5)
        weights[f"{layer.replace('bn', 'conv')}.weight"] *= np.float32(1e-1)
        weights[f"{layer}.running_mean"][:] = 0
    if layer == "bn1":
        for behind in ("layer1.0.bn1", "layer1.0.downsample.1"):  # which take it back, so that it is the largest
            weights[f"{behind}.running_var"] *= np.float32(1e10)
            weights[f"{behind}.running_mean"] *= np.float32(1e5)
    save(tmp_path / "net.safetensors", weights)
    request = request_for(card, weights=str(tmp_path / "net.safetensors"))
    message = fails(CheckFailed, request, tmp_path / "cache", output)
    assert words in message
    assert "float16 ends at 65504; use --fp32" in message
    request = request_for(card, weights=str(tmp_path / "net.safetensors"), precision="fp32")
    assert run(request, tmp_path / "cache", output)[0].manifest.validation["passed"], "as the message says"


@pytest.mark.parametrize("layer", ["layer1.0.conv2", "fc"])
def test_a_weight_beyond_float16_is_named(
    make_card: Callable[..., ModelCard], random_weights: Callable[..., Any], tmp_path: Path, output: Path, layer: str
) -> None:
    card = make_card()
    weights = random_weights(card)
    weights[f"{layer}.weight"].flat[0] = 1e7
    save(tmp_path / "net.safetensors", weights)
    request = request_for(card, weights=str(tmp_path / "net.safetensors"))
    message = fails(CheckFailed, request, tmp_path / "cache", output)
    assert f"{layer}.weight (largest magnitude " in message and "build with --fp32" in message


# Refused before anything is computed


@pytest.mark.parametrize("what", ["destination", "labels", "target", "option", "weights", "figures"])
def test_what_cannot_work_is_refused_at_once(
    make_card: Callable[..., ModelCard],
    tmp_path: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    from rxdeploy.engines.flavours import Flavour

    card, changes, error, words = make_card(), {"weights": "synthetic"}, InputError, ""
    to = output
    if what == "destination":
        to, words = tmp_path / "folder", "is no bundle"
        to.mkdir()
        (to / "mine").touch()
    elif what == "labels":
        (tmp_path / "labels.txt").write_text("one\n")
        changes, words = changes | {"labels": tmp_path / "labels.txt"}, "1 lines, but the model has 7 classes"
    elif what == "target":
        monkeypatch.setattr(Flavour, "version", lambda self: None)
        changes, error, words = changes | {"target": "tensorrt-rtx"}, EnvironmentLacks, "rxdeploy[rtx]"
    elif what == "option":
        options = EngineOptions(refit=True)
        changes, words = changes | {"target": "onnxruntime", "engine": options}, "--refit is not possible"
    elif what == "weights":
        changes, words = {"weights": str(tmp_path / "absent.pth")}, "absent.pth: no such file"
    else:
        card, words = make_card(figures={"parameters": 1000}), "figures.parameters is 1,000"
    with pytest.raises(error) as caught:
        run(request_for(card, **changes), tmp_path / "cache", to)
    assert words in str(caught.value)
    assert not (tmp_path / "cache" / "stages").exists()


# What the machine lacks


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


NO_TORCH = ModuleNotFoundError("No module named 'torch'", name="torch")
NO_ROOM = OSError(errno.ENOSPC, "No space left on device", "/somewhere/model.onnx")
# Every place where a stage computes, and the name under which it is known.
PLACES = [
    ("rxdeploy.pipeline.load_weights", "export"),
    ("rxdeploy.export.graph.serialise", "export"),
    ("rxdeploy.export.reference.run_reference", "validate fp32"),
    ("rxdeploy.export.validate.validate_model", "validate fp32"),
    ("rxdeploy.export.float16.to_float16", "precision"),
    *([("rxdeploy.engines.builder.build_plan", "engine")] if RTX else []),
    ("shutil.copyfile", "bundle"),
]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (NO_TORCH, "the Python module torch is not installed here; pip install 'rxdeploy[build]' adds it"),
        (
            NO_ROOM,
            "running the stage STAGE: No space left on device (/somewhere/model.onnx); free some room, or choose "
            "another folder",
        ),
        (MemoryError(), "STAGE: not enough memory"),
    ],
    ids=["module", "room", "memory"],
)
@pytest.mark.parametrize(("place", "stage"), PLACES)
def test_what_a_stage_lacks_is_named(
    tmp_path: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    stage: str,
    error: BaseException,
    words: str,
) -> None:
    monkeypatch.setattr(place, raising(error))
    message = fails(EnvironmentLacks, request_for(), tmp_path / "cache", output)
    assert message == words.replace("STAGE", stage)
    monkeypatch.undo()
    _, stages = run(request_for(), tmp_path / "cache", output)
    assert reused(stages)["export"] == (stage != "export"), "what was done before the failure is reused"


@pytest.mark.parametrize("error", [NO_TORCH, NO_ROOM, MemoryError()], ids=["module", "room", "memory"])
def test_what_the_reference_of_a_float32_build_lacks_is_named(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr("rxdeploy.export.reference.run_reference", raising(error))
    fails(EnvironmentLacks, request_for(precision="fp32"), tmp_path / "cache", output)


@pytest.mark.parametrize(("place", "stage"), PLACES)
def test_ctrl_c_leaves_nothing_half_done(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch, place: str, stage: str
) -> None:
    monkeypatch.setattr(place, raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(request_for(), tmp_path / "cache", output)
    assert not output.exists()
    assert all((path / "entry.json").exists() for path in (tmp_path / "cache").glob("stages/*"))
    monkeypatch.undo()
    run(request_for(), tmp_path / "cache", output)


def test_a_failure_leaves_the_old_bundle(
    warm: Path, cache: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(request_for(), cache, output)
    monkeypatch.setattr("shutil.copyfile", raising(NO_ROOM))
    with pytest.raises(EnvironmentLacks, match="No space left"):
        run(request_for(command=("another",)), cache, output)
    assert content(output) == content(warm / "bundle")


# Several builds at once

BUILD = f"""
import sys
from pathlib import Path
from rxdeploy.cache import Cache
from rxdeploy.cards import find_card
from rxdeploy.pipeline import Pipeline, Request
cache = Cache(Path(sys.argv[1]), 10**12)
pipeline = Pipeline(Request(find_card("{DIGITS}"), target="{TARGET}"), cache)
print("ready", flush=True)
sys.stdin.readline()
pipeline.build(Path(sys.argv[2]))
cache.close()
print(sum(stage.reused for stage in pipeline.stages))
"""


def test_two_builds_at_once_to_the_same_place_both_succeed(tmp_path: Path, output: Path) -> None:
    command = [sys.executable, "-c", BUILD, str(tmp_path / "cache"), str(output)]
    pipe = subprocess.PIPE
    builds = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=ENVIRONMENT) for _ in range(2)]
    try:
        for build in builds:
            assert build.stdout and build.stdout.readline() == "ready\n"
        for build in builds:
            assert build.stdin
            build.stdin.write("\n")
            build.stdin.flush()
        shared = [int(build.communicate(timeout=100)[0]) for build in builds]
    finally:
        for build in builds:
            build.kill()
            build.communicate()
    assert [build.returncode for build in builds] == [0, 0]
    assert sum(shared) == len(FP16_STAGES) - 1, "every stage was computed by one and reused by the other"
    assert open_bundle(output).manifest.model == DIGITS
    assert all(entries(tmp_path / "cache", stage) == 1 for stage in ("export", "reference", "precision", *ENGINE))


# Other ways through


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_export_to_a_file(cache: Path, tmp_path: Path, precision: Any) -> None:
    with contextlib.closing(Cache(cache, ROOM)) as opened:
        Pipeline(request_for(precision=precision), opened).export_to(tmp_path / "new" / "model.onnx")
    digest = hashlib.sha256((tmp_path / "new" / "model.onnx").read_bytes()).digest()
    stage = "export" if precision == "fp32" else "tuned" if RTX else "precision"
    (entry,) = (cache / "stages").glob(f"{stage}-*")
    assert digest == hashlib.sha256((entry / "model.onnx").read_bytes()).digest()
    assert names(tmp_path / "new") == ["model.onnx"]


def test_validation_of_a_file(cache: Path, tmp_path: Path, warm: Path) -> None:
    with contextlib.closing(Cache(cache, ROOM)) as opened:
        pipeline = Pipeline(request_for(), opened)
        assert pipeline.validate_file(warm / "bundle" / "model.onnx")["passed"]
        other = Pipeline(request_for(weights="synthetic"), opened)
        assert not other.validate_file(warm / "bundle" / "model.onnx")["passed"]
        (tmp_path / "bad.onnx").write_bytes(b"garbage")
        with pytest.raises(InputError, match=r"bad.onnx"):
            pipeline.validate_file(tmp_path / "bad.onnx")
