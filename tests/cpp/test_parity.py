"""The C library against the Python runtime on the same ONNX Runtime: the same logits, bit for bit.

The wheel's libonnxruntime.so and its Python module are two builds of one version; threads are set alike.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from rxdeploy_c import ENVIRONMENT_LACKS, INPUT_ERROR, Failed, Library, Session

from rxdeploy.engines import bundle as bundles
from rxdeploy.errors import InputError
from rxdeploy.runtime import onnxrt
from rxdeploy.runtime.cpu import in_words
from rxdeploy.runtime.preprocess import normalise, open_rgb
from rxdeploy.runtime.session import Session as PythonSession
from rxdeploy.runtime.session import load

PHOTOS = sorted((Path(__file__).parents[2] / "rxdeploy/export/photos").glob("*.jpg"))
Build = Callable[..., Path]


def images_for(session: PythonSession, count: int) -> NDArray[np.uint8]:
    """The photographs as the model wants them, and noise."""
    size = session.bundle.manifest.preprocessing.image_size
    photos = [session.preprocess(path) for path in PHOTOS]
    noise = np.random.default_rng(0).integers(0, 256, (count - len(photos), size, size, 3), np.uint8)
    return np.concatenate([np.stack(photos), noise])


def python_logits(bundle: Path, images: NDArray, threads: int) -> NDArray[np.float32]:
    """What the Python runtime's engine gives with so many threads."""
    settings = bundles.CpuSettings(threads=threads)
    engine = onnxrt.OnnxEngine(bundles.open_bundle(bundle), "cpu", settings=settings)
    logits = engine.run(images, None, None)
    engine.close()
    assert isinstance(logits, np.ndarray)
    return logits


def assert_same(library: Library, onnxruntime: bytes, bundle: Path, count: int, threads: int) -> None:
    with load(bundle, "cpu") as session:
        images, classes = images_for(session, count), session.bundle.manifest.num_classes
        theirs = python_logits(bundle, images, threads)
        options = {"device": b"cpu", "onnxruntime": onnxruntime, "threads": threads, "max_batch": 1}
        with Session(library, bundle, **options) as ours:
            logits = ours.run(images, classes)
            assert np.array_equal(logits, theirs)
            single = python_logits(bundle, images[:1], threads)
            assert np.array_equal(ours.run(images[:1], classes), single)
            for row, expected in zip(ours.top(logits, 5), session.top(theirs, 5), strict=True):
                assert [p[0] for p in row] == [p.index for p in expected]
                assert [p[2] for p in row] == [p.logit for p in expected]
                assert np.allclose([p[1] for p in row], [p.probability for p in expected], rtol=1e-12, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_digits(
    library: Library, onnxruntime_library: bytes, build_bundle: Build, precision: str, threads: int
) -> None:
    """More images than are computed at once, so that batches are split alike."""
    assert_same(library, onnxruntime_library, build_bundle(precision), 70, threads)


@pytest.mark.slow
def test_resnext50(library: Library, onnxruntime_library: bytes, build_bundle: Build) -> None:
    bundle = build_bundle("fp32", "uint8", "gluon_resnext50_32x4d")
    for threads in (1, 2):
        assert_same(library, onnxruntime_library, bundle, 6, threads)


def test_float32_input(library: Library, onnxruntime_library: bytes, build_bundle: Build) -> None:
    """uint8 is normalised on the host with NumPy's roundings; the declared input is taken as it is."""
    bundle = build_bundle("fp32", "float32")
    with load(bundle, "cpu") as session:
        images = images_for(session, 9)
        inputs = session.bundle.manifest.preprocessing
    normalised = normalise(images, inputs.mean, inputs.std)
    theirs = python_logits(bundle, normalised, 1)
    options = {"device": b"cpu", "onnxruntime": onnxruntime_library, "threads": 1, "max_batch": 1}
    with Session(library, bundle, **options) as ours:
        assert np.array_equal(ours.run(images, 10), theirs)
        assert np.array_equal(ours.run(normalised, 10), theirs)
        assert np.array_equal(ours.submit(images[3], 10), ours.run(images[3:4], 10)[0])
        with load(bundle, "cpu") as session:
            for value in (np.nan, -np.inf, 65505):
                normalised[-1, -1, -1, -1] = value
                with pytest.raises(Failed, match="images: holds ") as caught:
                    ours.run(normalised, 10)
                with pytest.raises(InputError) as same:
                    session.run(normalised)
                assert (caught.value.status, str(caught.value)) == (INPUT_ERROR, str(same.value))


def tuned(bundle: Path, destination: Path, cores: int | None, **cpu: Any) -> Path:
    """A copy of a bundle with such a tuning in its manifest."""
    manifest = bundles.open_bundle(bundle).manifest
    found = bundles.Tuning(
        tuned=True,
        device="a CPU",
        cores=cores,
        versions={},
        batch=(1, 8),
        groups={},
        passes=(),
        cpu=bundles.CpuSettings(**cpu),
        report={},
    )
    files: dict[str, Path | bytes] = {name: bundle / name for name in manifest.files}
    bundles.write_bundle(destination, msgspec.structs.replace(manifest, tuning=found), files, overwrite=False)
    return destination


@pytest.mark.parametrize(
    "cpu",
    [
        {"threads": 1, "sessions": 2},
        {"threads": 2, "sessions": 3, "spinning": False},
        {"threads": 1, "arena": False, "denormals_as_zero": True},
    ],
)
@pytest.mark.parametrize("images", [1, 2, 7, 131])
def test_tuned(
    library: Library, onnxruntime_library: bytes, build_bundle: Build, tmp_path: Path, cpu: dict[str, Any], images: int
) -> None:
    """The settings that tuning found are followed alike: batches are split over sessions in the same shares."""
    cores = len(os.sched_getaffinity(0))
    bundle = tuned(build_bundle("fp32"), tmp_path / "tuned", cores, **cpu)
    batch = np.random.default_rng(1).integers(0, 256, (images, 64, 64, 3), np.uint8)
    engine = onnxrt.OnnxEngine(bundles.open_bundle(bundle), "cpu", settings=bundles.CpuSettings(**cpu))
    theirs, theirs_words = engine.run(batch, None, None), in_words(engine.settings)
    engine.close()
    with Session(library, bundle, device=b"cpu", onnxruntime=onnxruntime_library) as ours:
        assert np.array_equal(ours.run(batch, 10), theirs)
        assert library.c.rxdeploy_description(ours.handle).decode().endswith(theirs_words)


def test_tuned_on_other_cores(
    library: Library, onnxruntime_library: bytes, build_bundle: Build, tmp_path: Path
) -> None:
    bundle = tuned(build_bundle("fp32"), tmp_path / "tuned", 1000, threads=2, sessions=3, spinning=False)
    with Session(library, bundle, device=b"cpu", onnxruntime=onnxruntime_library) as ours:
        assert library.c.rxdeploy_description(ours.handle).endswith(b" on CPU (no spinning)")


def test_single_requests(library: Library, onnxruntime_library: bytes, build_bundle: Build) -> None:
    bundle = build_bundle("fp32")
    with load(bundle, "cpu") as session:
        image = images_for(session, 5)[4]
        expected = session.submit(image).result()
    with Session(library, bundle, device=b"cpu", onnxruntime=onnxruntime_library) as ours:
        assert np.array_equal(ours.submit(image, 10), expected)


def test_example_programs(library: Library, onnxruntime_library: bytes, build_bundle: Build, tmp_path: Path) -> None:
    """The examples in C and C++ say of a photograph what the Python runtime says of it."""
    programs = library.path.parent / "examples"
    if not programs.exists():
        pytest.skip("the examples are not built")
    bundle = build_bundle("fp32")
    image = open_rgb(PHOTOS[0])
    image.save(tmp_path / "image.ppm")
    (tmp_path / "image.rgb").write_bytes(image.tobytes())
    with load(bundle, "cpu") as session:
        [best] = next(iter(session.classify(PHOTOS[0], k=1))).predictions or ()
    environment = os.environ | {"RXDEPLOY_ONNXRUNTIME": os.fsdecode(onnxruntime_library)}

    def run(*command: object) -> str:
        found = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=True)
        return found.stdout

    lines = run(programs / "classify", bundle, tmp_path / "image.ppm").splitlines()
    assert len(lines) == 5
    assert lines[0].split() == [f"{100 * best.probability:.2f}", "%", best.label]
    line = run(programs / "classify_c", bundle, tmp_path / "image.rgb", image.width, image.height)
    assert line.split() == [str(best.index), best.label, f"{best.probability:.4f}"]


def test_metrics_have_the_same_names(library: Library, onnxruntime_library: bytes, build_bundle: Build) -> None:
    """And the C library's are a superset: it knows the card."""
    bundle = build_bundle("fp32")
    with load(bundle, "cpu") as session:
        image = images_for(session, 5)[0]
        session.submit(image).result()
        theirs = json.loads(session.metrics.json())
    with Session(library, bundle, device=b"cpu", onnxruntime=onnxruntime_library) as ours:
        ours.submit(image, 10)
        text = ctypes.c_char_p()
        library.call("metrics_json", ours.handle, ctypes.byref(text))
        found = json.loads(text.value or b"")
        library.c.rxdeploy_text_free(text)
    assert set(found) == set(theirs) | {"card_flops_per_second_recent", "flops_per_second_recent"}
    assert found["batches"] == theirs["batches"]
    assert set(found["requests"]) == set(theirs["requests"])
    edges = [edge for edge, _ in theirs["requests"]["buckets"]]
    assert [edge for edge, _ in found["requests"]["buckets"]] == edges


def test_devices_that_are_not_here(library: Library, onnxruntime_library: bytes, build_bundle: Build) -> None:
    bundle = build_bundle("fp32")
    for device, status in ((b"tensorrt", ENVIRONMENT_LACKS), (b"cuda", INPUT_ERROR)):
        with pytest.raises(Failed) as caught:
            Session(library, bundle, device=device, onnxruntime=onnxruntime_library)
        assert caught.value.status == status
    with Session(library, bundle, onnxruntime=onnxruntime_library) as ours:
        assert library.c.rxdeploy_device(ours.handle) == b"cpu"
        assert b"tensorrt: the bundle has no plan" in library.c.rxdeploy_passed_over(ours.handle)


# ONNX Runtime, which says that it is of an older version.
OLDER = """
#include <dlfcn.h>
typedef struct { const void *(*api)(unsigned); const char *(*version)(void); } Base;
static const char *version(void) { return "1.29.1"; }
const Base *OrtGetApiBase(void) {
    static Base base;
    const Base *(*real)(void) = (const Base *(*)(void))dlsym(dlopen(ONNXRUNTIME, RTLD_NOW), "OrtGetApiBase");
    base.api = real()->api;
    base.version = version;
    return &base;
}
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_onnx_runtime_that_truncates_float16(
    library: Library, onnxruntime_library: bytes, build_bundle: Build, tmp_path: Path
) -> None:
    """For a bundle quantised for TensorRT it would give other answers than the Python runtime, which corrects it."""
    source, older = tmp_path / "older.c", tmp_path / "libonnxruntime.so"
    source.write_text(OLDER)
    name = f'-DONNXRUNTIME="{os.fsdecode(onnxruntime_library)}"'
    subprocess.run(["cc", "-shared", "-fPIC", name, source, "-o", older, "-ldl"], check=True)
    plain, signed = build_bundle("fp32"), tmp_path / "signed"
    manifest = bundles.open_bundle(plain).manifest
    files: dict[str, Path | bytes] = {name: plain / name for name in manifest.files}
    quantised = msgspec.structs.replace(manifest, precision="int8", quantisation={"scheme": "tensorrt"})
    bundles.write_bundle(signed, quantised, files, overwrite=False)
    with Session(library, plain, device=b"cpu", onnxruntime=os.fsencode(older)):
        pass
    with Session(library, signed, device=b"cpu", onnxruntime=onnxruntime_library):
        pass
    with pytest.raises(Failed, match=r"1\.29\.1 truncates .* install 1\.30 or later") as caught:
        Session(library, signed, device=b"cpu", onnxruntime=os.fsencode(older))
    assert caught.value.status == ENVIRONMENT_LACKS


def test_weights_in_other_files(
    library: Library, onnxruntime_library: bytes, build_bundle: Build, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    plain = build_bundle("fp32")
    model, elsewhere = onnx.load(plain / "model.onnx"), tmp_path / "model.onnx"
    onnx.save(model, elsewhere, save_as_external_data=True, location="weights.bin", size_threshold=0)
    files = {name: plain / name for name in bundles.open_bundle(plain).manifest.files} | {"model.onnx": elsewhere}
    bundles.write_bundle(tmp_path / "bundle", bundles.open_bundle(plain).manifest, files, overwrite=False)
    for opened in (
        lambda: Session(library, tmp_path / "bundle", device=b"cpu", onnxruntime=onnxruntime_library),
        lambda: load(tmp_path / "bundle", "cpu"),
    ):
        with pytest.raises(
            (Failed, InputError), match=r"model\.onnx has weights in other files, which no digest covers"
        ):
            opened()


def test_bundle_of_another_size(library: Library, build_bundle: Build, tmp_path: Path) -> None:
    """An altered bundle is refused with the Python runtime's sentence."""
    bundle = tmp_path / "altered"
    shutil.copytree(build_bundle("fp32"), bundle)
    model = bundle / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    with pytest.raises(InputError) as theirs:
        bundles.open_bundle(bundle)
    with pytest.raises(Failed) as ours:
        library.call("check_bundle", os.fsencode(bundle))
    assert str(ours.value) == str(theirs.value)
