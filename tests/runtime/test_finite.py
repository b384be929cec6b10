"""What is no number comes to nobody as a result: neither from images that hold it nor from a model that makes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from rxdeploy import runtime
from rxdeploy.engines import bundle as bundles
from rxdeploy.errors import CheckFailed, InputError
from rxdeploy.runtime import Session

Bundles = Callable[..., Path]
Way = Callable[[Session, NDArray], Any]
SIZE, CLASSES = 64, 10
ENGINES = ("onnxruntime", "openvino")
LARGEST = 65504.0  # float16's

# Every way in for an array on the host.
WAYS: dict[str, Way] = {
    "run": lambda session, images: session.run(images),
    "run into": lambda session, images: session.run(images, np.empty((len(images), CLASSES), np.float32)),
    "map": lambda session, images: list(session.map([images[:1], images])),
    "submit": lambda session, images: [session.submit(image).result() for image in images],
    "submit_async": lambda session, images: [asyncio.run(session.submit_async(image)) for image in images],
}


@pytest.fixture(
    scope="module", params=[(engine, precision) for engine in ENGINES for precision in ("fp32", "int8")], ids=str
)
def session(request: pytest.FixtureRequest, digits_bundle: Bundles) -> Iterator[Session]:
    """A bundle that takes normalised float32."""
    engine, precision = request.param
    pytest.importorskip(engine)
    with runtime.load(digits_bundle(precision, "float32"), engine) as session:
        yield session


def normalised(*, images: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((images, 3, SIZE, SIZE)).astype(np.float32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("value", "what"),
    [
        (np.nan, "NaN or infinity"),
        (np.inf, "NaN or infinity"),
        (-np.inf, "NaN or infinity"),
        (1e6, "values beyond 65504"),
        (-65505, "values beyond 65504"),
    ],
)
def test_one_value_that_is_none_refuses_its_images(session: Session, way: str, value: float, what: str) -> None:
    images = normalised()
    images[2, 1, 7, 5] = value
    with pytest.raises(InputError, match=rf"^images?: holds {what}"):
        WAYS[way](session, images)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_finite_and_within_float16_is_computed(session: Session, way: str) -> None:
    images = normalised()
    images[0, 0, 0, 0], images[0, 0, 0, 1] = LARGEST, -LARGEST
    images[1, 0, 0, 0] = 1e-40  # a denormal is a number
    assert np.isfinite(np.concatenate([np.ravel(each) for each in WAYS[way](session, images)])).all()


def test_a_refused_image_is_its_callers_matter_alone(session: Session) -> None:
    good, bad = normalised(images=1)[0], np.full((3, SIZE, SIZE), np.nan, np.float32)
    future = session.submit(good)
    with pytest.raises(InputError, match="NaN"):
        session.submit(bad)
    np.testing.assert_allclose(future.result(), session.run(good[None])[0], rtol=1e-4, atol=1e-4)
    assert session.metrics.snapshot().failed == 0


def test_no_images_hold_nothing(session: Session) -> None:
    assert session.run(normalised(images=0)).shape == (0, CLASSES)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_probabilities_of_what_is_no_number(digits_bundle: Bundles, value: float) -> None:
    """`run` does not look at logits that stay on a GPU, so `top` may meet them."""
    logits = np.zeros((3, CLASSES), np.float32)
    logits[1, 4] = value
    with runtime.load(digits_bundle("fp32"), "cpu") as session, pytest.raises(CheckFailed, match="NaN or infinity"):
        session.top(logits)


@pytest.mark.parametrize("engine", ENGINES)
def test_files_get_no_classes_from_a_model_of_nans(digits_bundle: Bundles, tmp_path: Path, engine: str) -> None:
    ir = pytest.importorskip("onnx_ir")
    pytest.importorskip(engine)
    source = digits_bundle("fp32")
    model = ir.load(source / bundles.MODEL)
    bias = model.graph.initializers["fc.bias"]
    bias.const_value = ir.tensor(np.full_like(bias.const_value.numpy(), np.nan), name="fc.bias")
    manifest = bundles.open_bundle(source).manifest
    files: dict[str, Path | bytes] = {name: source / name for name in manifest.files}
    files[bundles.MODEL] = ir.to_proto(model).SerializeToString()
    bundles.write_bundle(tmp_path / "nans", manifest, files, overwrite=False)
    path = tmp_path / "image.png"
    Image.fromarray(np.zeros((SIZE, SIZE, 3), np.uint8)).save(path)
    with runtime.load(tmp_path / "nans", engine) as session:
        with pytest.raises(CheckFailed, match="the logits hold NaN or infinity"):
            list(session.classify([path]))
        assert session.metrics.snapshot().errors == 1
