"""Evaluation of the digits model, against ONNX Runtime and Pillow used directly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from rxdeploy.cards.digits_images import Digits
from rxdeploy.datasets import Dataset, from_arrays, open_dataset, sample
from rxdeploy.engines.bundle import sha256_of
from rxdeploy.errors import InputError
from rxdeploy.evaluation.accuracy import Evaluation, evaluate
from rxdeploy.evaluation.confusion import ClassResult, worst_classes
from rxdeploy.evaluation.predictions import Predicted
from rxdeploy.evaluation.published import published
from rxdeploy.runtime import Session, load

Bundles = Callable[..., Path]


@pytest.fixture
def session(bundle: Bundles) -> Iterator[Session]:
    with load(bundle("fp32", noise=0.4), "cpu") as session:
        yield session


@pytest.fixture
def reference(bundle: Bundles, held_out: Digits) -> NDArray[np.float32]:
    """Logits of the damaged model, by nothing of ours."""
    import onnxruntime

    large = [np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC)) for image in held_out.images]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = onnxruntime.InferenceSession(
        bundle("fp32", noise=0.4) / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    return model.run(None, {model.get_inputs()[0].name: np.stack(large)})[0]


def test_counts_are_those_of_the_reference(
    session: Session, digits: Dataset, held_out: Digits, reference: NDArray[np.float32]
) -> None:
    found = evaluate(session, digits, batch=32)
    order = np.argsort(-reference, axis=1)
    assert found.images == 540 and found.whole and not found.skipped
    assert found.right == np.count_nonzero(reference.argmax(axis=1) == held_out.labels)
    assert found.right_in_top5 == np.count_nonzero((order[:, :5] == held_out.labels[:, None]).any(axis=1))
    assert found.right < found.right_in_top5 < 540
    assert found.top1.value == found.right / 540
    for place in (0, 17, 539):
        assert found.predictions[place].top == tuple(order[place, :5])
        exponentials = np.exp(reference[place].astype(np.float64))
        assert found.predictions[place].probability == pytest.approx(exponentials.max() / exponentials.sum(), abs=1e-5)
    assert found.speed and found.speed.images == 540 and 0 < found.speed.inference_seconds < found.speed.seconds


def test_files_and_a_corrupt_one(session: Session, held_out: Digits, tmp_path: Path) -> None:
    for index in range(20):
        folder = tmp_path / "data" / str(held_out.labels[index])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(held_out.images[index]).save(folder / f"{index}.png")
    for label in range(10):
        (tmp_path / "data" / str(label)).mkdir(exist_ok=True)
    broken = tmp_path / "data" / "0" / "broken.png"
    broken.write_bytes(b"no picture")
    found = evaluate(session, open_dataset(tmp_path / "data", 10), predictions=tmp_path / "p.jsonl")
    assert found.images == 20 and [skipped.image for skipped in found.skipped] == ["0/broken.png"]
    for prediction in found.predictions:
        assert prediction.sha256 == sha256_of(tmp_path / "data" / prediction.image)
        assert str(prediction.label) == prediction.image[0]
    again = evaluate(session, open_dataset(tmp_path / "data", 10), predictions=tmp_path / "p.jsonl")
    assert (again.predictions, again.skipped, again.speed) == (found.predictions, found.skipped, None)


@pytest.mark.parametrize("kept", [1, 5])
def test_a_predictions_file_that_was_cut_off_gives_no_accuracy(
    session: Session, digits: Dataset, tmp_path: Path, kept: int
) -> None:
    file = tmp_path / "p.jsonl"
    items = digits.items[:10]
    evaluate(session, digits, items, predictions=file)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:kept]))
    with pytest.raises(InputError, match=f"it has {kept - 1} of its 10 images"):
        evaluate(session, digits, items, predictions=file)
    file.write_bytes(b"".join(lines).replace(b'"000003"', b'"x"'))
    with pytest.raises(InputError, match="it lacks 000003, so it is damaged"):
        evaluate(session, digits, items, predictions=file)
    skipped = b"".join(b'{"image":"%06d","skipped":"cut off"}\n' % n for n in range(10))
    file.write_bytes(lines[0] + skipped)
    with pytest.raises(InputError, match="every image in it is skipped"):
        evaluate(session, digits, items, predictions=file)


class Interrupted(BaseException):
    """As Ctrl-C is."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> list[int]:
    """From the call after `calls` on Session.run is interrupted; the images of each call are counted."""
    original, sizes = Session.run, []

    def run(self: Session, images: Any, *more: Any) -> Any:
        if len(sizes) == calls:
            raise Interrupted
        sizes.append(len(images))
        return original(self, images, *more)

    monkeypatch.setattr(Session, "run", run)
    return sizes


def test_an_interrupted_evaluation_goes_on(
    session: Session, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate(session, digits, batch=50)
    file = tmp_path / "p.jsonl"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Interrupted):
            evaluate(session, digits, batch=50, predictions=file)
    assert not file.exists()
    steps: list[tuple[int, int]] = []
    with monkeypatch.context() as patch:
        sizes = interrupt_after(patch, 1000)
        found = evaluate(
            session, digits, batch=50, predictions=file, progress=lambda what, done, total: steps.append((done, total))
        )
    assert sum(sizes) == 390 and found.speed and found.speed.images == 390
    assert steps[0] == (150, 540) and steps[-1] == (540, 540)
    assert found.predictions == expected.predictions
    assert file.exists() and len(file.read_text().splitlines()) == 541


def test_only_bad_images_left_after_an_interruption(
    session: Session, held_out: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data" / "0"
    for label in range(10):
        (tmp_path / "data" / str(label)).mkdir(parents=True, exist_ok=True)
    for index in range(4):
        Image.fromarray(held_out.images[index]).save(folder / f"{index}.png")
    (folder / "9.png").write_bytes(b"no picture")
    data = open_dataset(tmp_path / "data", 10)
    finished = evaluate(session, data, batch=2, predictions=tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "p.jsonl.partial").write_bytes(b"".join(lines[:-1]))  # all but the line of what was skipped
    found = evaluate(session, data, batch=2, predictions=tmp_path / "p.jsonl")
    assert (found.predictions, found.skipped, found.speed) == (finished.predictions, finished.skipped, None)
    assert (tmp_path / "p.jsonl").read_bytes() == b"".join(lines)


def test_too_many_bad_images_lose_no_work(session: Session, held_out: Digits, tmp_path: Path) -> None:
    for label in range(10):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
    for index in range(6):
        Image.fromarray(held_out.images[index]).save(tmp_path / "data" / "0" / f"{index}.png")
    for index in (7, 8):
        (tmp_path / "data" / "0" / f"{index}.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"0/7\.png"):
        evaluate(session, open_dataset(tmp_path / "data", 10), batch=2, predictions=tmp_path / "p.jsonl")
    assert len((tmp_path / "p.jsonl.partial").read_text().splitlines()) == 1 + 6


def test_a_sample(session: Session, digits: Dataset) -> None:
    items = sample(digits, 40)
    found = evaluate(session, digits, items)
    assert found.images == 40 and not found.whole
    assert [prediction.image for prediction in found.predictions] == [item.name for item in items]


def test_labels_are_needed_and_must_fit(session: Session, held_out: Digits) -> None:
    with pytest.raises(InputError, match=r"000000 has no label.*labels file"):
        evaluate(session, from_arrays(held_out.images[:3]))
    with pytest.raises(InputError, match="has class 10, and the model has classes 0 to 9"):
        evaluate(session, from_arrays(held_out.images[:3], np.array([0, 1, 10])))
    with pytest.raises(InputError, match="no images to evaluate"):
        evaluate(session, from_arrays(held_out.images[:3], np.arange(3)), items=())


def test_equal_logits_count_for_the_first(session: Session, digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.zeros((8, 1000), np.float32)
    logits[:, ::2] = 1
    monkeypatch.setattr(Session, "run", lambda self, images: logits[: len(images)])
    found = evaluate(session, digits, digits.items[:20], batch=8)
    assert {prediction.top for prediction in found.predictions} == {(0, 2, 4, 6, 8)}
    best = np.e / (500 * np.e + 500)
    assert {prediction.probability for prediction in found.predictions} == {round(best, 6)}


def predicted(pairs: list[tuple[int, int]]) -> list[Predicted]:
    """Predictions of (label, class)."""
    return [Predicted(str(n), f"{n:064x}", label, (top,), 1.0) for n, (label, top) in enumerate(pairs)]


def test_worst_classes() -> None:
    # class 0: 1 of 4 right; 1: all right; 2: 0 of 1; 3: 0 of 2; 4: 3 of 4
    pairs = [(0, 0), (0, 1), (0, 2), (0, 2), (1, 1), (2, 0), (3, 4), (3, 1), (4, 4), (4, 4), (4, 4), (4, 0)]
    found = worst_classes(predicted(pairs), 3)
    assert found == [
        ClassResult(3, 2, 0, ((1, 1), (4, 1))),
        ClassResult(2, 1, 0, ((0, 1),)),
        ClassResult(0, 4, 1, ((2, 2), (1, 1))),
    ]
    assert [result.label for result in worst_classes(predicted(pairs), 10)] == [3, 2, 0, 4]
    assert worst_classes(predicted([(1, 1)]), 3) == []


@pytest.fixture
def found(session: Session, digits: Dataset) -> Evaluation:
    return evaluate(session, digits, digits.items[:2])


class ImageNetVal:
    """What is asked of a data set here."""

    is_imagenet_val, not_imagenet_val = True, ""


def of_manifest(found: Evaluation, **changes: Any) -> Evaluation:
    manifest = msgspec.structs.replace(found.bundle.manifest, **changes)
    return dataclasses.replace(found, bundle=dataclasses.replace(found.bundle, manifest=manifest))


def test_the_cards_accuracy_is_compared_on_imagenet_val_only(found: Evaluation) -> None:
    card, weights = found.bundle.manifest.card, found.bundle.manifest.weights
    assert card.accuracy
    claim = published(found)
    assert claim and (claim.top1, claim.top5) == (99.63, 100)
    assert claim.why_not == "this is not the ImageNet validation set: the model has 10 classes, not 1000"
    on_val = dataclasses.replace(found, dataset=ImageNetVal())  # type: ignore[arg-type]
    assert "and the card's figure is of UCI" in published(on_val).why_not  # type: ignore[union-attr]
    imagenet = msgspec.structs.replace(card, accuracy=msgspec.structs.replace(card.accuracy, dataset="ImageNet"))
    other_weights = of_manifest(on_val, card=imagenet)
    assert "and these are 0.4.safetensors" in published(other_weights).why_not  # type: ignore[union-attr]
    own = of_manifest(on_val, card=imagenet, weights=msgspec.structs.replace(weights, kind="published"))
    assert published(own).why_not == ""  # type: ignore[union-attr]
    silent = of_manifest(found, card=msgspec.structs.replace(card, accuracy=None))
    assert published(silent) is None
