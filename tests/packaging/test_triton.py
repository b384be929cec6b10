"""Triton model repositories, read back with the schema that Triton's own client brings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rxdeploy import cli
from rxdeploy.engines.bundle import MODEL, PLAN, Bundle, Manifest, open_bundle, write_bundle
from rxdeploy.errors import InputError
from rxdeploy.packaging.triton import package

DIGITS = "digits_resnext14_8x8d"

for _name in ("torch", "onnx_ir", "onnxruntime", "safetensors", "filelock"):
    pytest.importorskip(_name, reason="these tests build a bundle")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The digits model in float32, without a plan."""
    folder = tmp_path_factory.mktemp("bundle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RXDEPLOY_CACHE", str(folder / "cache"))
        assert cli.run(["build", DIGITS, "--fp32", "--target", "onnxruntime", "-o", str(folder / "it")]) == 0
    return open_bundle(folder / "it")


@pytest.fixture
def changed(plain: Bundle, tmp_path: Path) -> Callable[..., Bundle]:
    """The same bundle with another manifest, and a plan when it says so."""

    def change(**changes: Any) -> Bundle:
        manifest: Manifest = msgspec.structs.replace(plain.manifest, files={}, **changes)
        files: dict[str, Any] = {name: plain.file(name) for name in plain.manifest.files}
        if manifest.engine:
            files[PLAN] = b"a plan"
        return write_bundle(tmp_path / "changed", manifest, files, overwrite=True)

    return change


@pytest.fixture
def with_plan(plain: Bundle, changed: Callable[..., Bundle]) -> Callable[..., Bundle]:
    def make(*profiles: tuple[int, int, int], name: Any = "tensorrt", **facts: Any) -> Bundle:
        target = msgspec.structs.replace(plain.manifest.target, name=name, version="10.13", gpu="NVIDIA L4")
        engine = {"profiles": [{"min": a, "opt": b, "max": c} for a, b, c in profiles], "strip_plan": False, **facts}
        return changed(target=target, engine=engine)

    return make


def read(path: Path) -> Any:
    """config.pbtxt as Triton's own schema has it."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="the schema is in tritonclient[grpc]")
    from google.protobuf import text_format

    return text_format.Parse((path / "config.pbtxt").read_text(encoding="utf-8"), schema.ModelConfig())


def kind(config: Any) -> str:
    (group,) = config.instance_group
    return type(group).Kind.Name(group.kind)


def test_without_a_plan(plain: Bundle, tmp_path: Path) -> None:
    made = package(plain, tmp_path / "models")
    assert made.path == tmp_path / "models" / DIGITS and made.backend == "onnxruntime"
    assert sorted(str(path.relative_to(made.path)) for path in made.path.rglob("*") if path.is_file()) == [
        "1/model.onnx",
        "config.pbtxt",
        "labels.txt",
    ]
    assert (made.path / "1" / "model.onnx").read_bytes() == plain.file(MODEL).read_bytes()
    assert tuple((made.path / "labels.txt").read_text().splitlines()) == plain.labels()
    config = read(made.path)
    assert (config.name, config.backend, config.max_batch_size) == (DIGITS, "onnxruntime", 32)
    (image,), (logits,) = config.input, config.output
    types = type(image).DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number
    assert (image.name, types[image.data_type].name, list(image.dims)) == ("image", "TYPE_UINT8", [64, 64, 3])
    assert (logits.name, types[logits.data_type].name, list(logits.dims)) == ("logits", "TYPE_FP32", [10])
    assert logits.label_filename == "labels.txt"
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    assert not config.dynamic_batching.preferred_batch_size and kind(config) == "KIND_AUTO"


def test_the_packaged_model_is_what_its_config_says(plain: Bundle, tmp_path: Path) -> None:
    """Against ONNX Runtime's own view of the file."""
    import onnxruntime

    made = package(plain, tmp_path / "models")
    session = onnxruntime.InferenceSession(made.path / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    config = read(made.path)
    for tensor, found in zip(
        [*config.input, *config.output], [*session.get_inputs(), *session.get_outputs()], strict=True
    ):
        assert tensor.name == found.name and list(tensor.dims) == found.shape[1:]


def test_with_a_plan(with_plan: Callable[..., Bundle], tmp_path: Path) -> None:
    made = package(with_plan((1, 1, 1), (1, 8, 64)), tmp_path, name="digits.v1", max_delay_ms=0.25)
    config = read(made.path)
    assert (made.backend, config.backend, config.name) == ("tensorrt", "tensorrt", "digits.v1")
    # Not 1: Triton would send every request alone, at once.
    assert config.max_batch_size == 64 and list(config.dynamic_batching.preferred_batch_size) == [8, 64]
    assert config.dynamic_batching.max_queue_delay_microseconds == 250
    assert kind(config) == "KIND_GPU" and list(config.instance_group[0].profile) == ["0", "1"]
    assert config.optimization.cuda.graphs
    assert (made.path / "1" / "model.plan").read_bytes() == b"a plan"


@pytest.mark.parametrize(
    ("profiles", "max_batch", "expected"),
    [
        ([(1, 1, 32)], None, [32]),
        ([(1, 1, 1)], None, []),
        ([(1, 8, 32)], 4, [4]),
        ([(1, 8, 32)], 1, []),
        ([(1, 32, 32)], None, [32]),
    ],
)
def test_preferred_sizes(
    with_plan: Callable[..., Bundle],
    tmp_path: Path,
    profiles: list[tuple[int, int, int]],
    max_batch: int | None,
    expected: list[int],
) -> None:
    config = read(package(with_plan(*profiles), tmp_path / "models", max_batch=max_batch).path)
    assert list(config.dynamic_batching.preferred_batch_size) == expected
    assert config.HasField("dynamic_batching")


def test_sizes_that_no_profile_takes(with_plan: Callable[..., Bundle], tmp_path: Path) -> None:
    bundle = with_plan((1, 2, 4), (8, 16, 32), (6, 6, 7))
    with pytest.raises(InputError, match=r"the plan takes no batch of 5, .* pass --max-batch 4, "):
        package(bundle, tmp_path / "models")
    with pytest.raises(InputError, match="no batch of 5"):
        package(bundle, tmp_path / "models", max_batch=5)
    assert not (tmp_path / "models").exists()
    assert read(package(bundle, tmp_path / "models", max_batch=4).path).max_batch_size == 4
    whole = with_plan((1, 2, 4), (8, 16, 32), (5, 6, 7))
    assert read(package(whole, tmp_path / "models", name="whole").path).max_batch_size == 32


@pytest.mark.parametrize("compatible", [False, True])
def test_what_a_version_compatible_plan_needs(
    with_plan: Callable[..., Bundle], tmp_path: Path, compatible: bool
) -> None:
    path = package(with_plan((1, 2, 4), version_compatible=compatible), tmp_path / "models").path
    read(path)
    text = (path / "config.pbtxt").read_text(encoding="utf-8")
    assert ("--backend-config=tensorrt,version-compatible=true" in text) is compatible


def test_a_manifest_does_not_write_configuration(changed: Callable[..., Bundle], plain: Bundle, tmp_path: Path) -> None:
    bundle = changed(model='x\nversion_policy: { all {} }\u2028"', tools={})
    config = read(package(bundle, tmp_path, name="digits").path)
    assert config.name == "digits" and not config.HasField("version_policy")
    with pytest.raises(InputError, match="--max-batch -1: must be at least 1"):
        package(plain, tmp_path, name="other", max_batch=-1)


def test_a_plan_that_triton_does_not_run(with_plan: Callable[..., Bundle], tmp_path: Path) -> None:
    rtx = with_plan((1, 8, 32), name="tensorrt-rtx")
    made = package(rtx, tmp_path / "a")
    assert made.backend == "onnxruntime" and "no tensorrt-rtx plan" in made.reason
    with pytest.raises(InputError, match=r"--backend tensorrt: Triton's tensorrt backend runs no tensorrt-rtx plan"):
        package(rtx, tmp_path / "b", backend="tensorrt")
    with pytest.raises(InputError, match="the plan has no weights"):
        package(with_plan((1, 8, 32), strip_plan=True), tmp_path / "b", backend="tensorrt")
    with pytest.raises(InputError, match="takes batches of 4 and more"):
        package(with_plan((4, 8, 32)), tmp_path / "b")
    with pytest.raises(InputError, match="--max-batch 33: the plan takes up to 32"):
        package(with_plan((1, 8, 32)), tmp_path / "b", max_batch=33)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("scheme", "expected"), [("onnxruntime", "KIND_CPU"), ("tensorrt", "KIND_GPU")])
def test_int8_runs_where_it_was_placed_for(
    changed: Callable[..., Bundle], tmp_path: Path, scheme: str, expected: str
) -> None:
    made = package(changed(precision="int8", quantisation={"scheme": scheme}), tmp_path)
    assert kind(read(made.path)) == expected


def test_a_float32_input(changed: Callable[..., Bundle], plain: Bundle, tmp_path: Path) -> None:
    tensor = msgspec.structs.replace(plain.manifest.inputs[0], name="input", dtype="float32", shape=(None, 3, 64, 64))
    made = package(changed(inputs=(tensor,), normalisation_in_graph=False), tmp_path)
    assert list(read(made.path).input[0].dims) == [3, 64, 64]
    assert "divided by 255" in (made.path / "config.pbtxt").read_text()


def test_what_is_there_stays(plain: Bundle, tmp_path: Path) -> None:
    package(plain, tmp_path)
    other = package(plain, tmp_path, name="other")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="exists; choose another with --name, or pass --overwrite"):
        package(plain, tmp_path, name="other")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    again = package(plain, tmp_path, name="other", max_batch=4, overwrite=True)
    assert again.path == other.path and read(again.path).max_batch_size == 4
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(InputError, match="is no model of Triton's"):
        package(plain, tmp_path, name="mine", overwrite=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize("name", ["", "..", "../up", "a/b", "-x", ".hidden", "x" * 129, "ünicode", 'a"b'])
def test_names(plain: Bundle, tmp_path: Path, name: str) -> None:
    if name:
        with pytest.raises(InputError, match=r"^--name "):
            package(plain, tmp_path / "models", name=name)
        assert not (tmp_path / "models").exists()
    else:
        assert package(plain, tmp_path / "models", name=name).path.name == DIGITS


def test_the_command(plain: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["package", str(plain.path), "--format", "triton", "-o", str(tmp_path / "models")]
    assert cli.run(arguments) == 0
    assert str(tmp_path / "models" / DIGITS) in capsys.readouterr().out
    assert cli.run(arguments) == 2
    assert cli.run([*arguments, "--overwrite", "--max-batch", "0"]) == 2
    assert cli.run(["package", str(tmp_path / "nothing"), "--format", "triton", "-o", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()
