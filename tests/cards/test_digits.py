"""The trained digits model: what its card claims, measured through image files, preprocessing and PyTorch."""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rxdeploy.cards import ModelCard, find_card
from rxdeploy.cards.digits_images import NOISE, hard, main, split, write_files, write_held_out, write_npz
from rxdeploy.errors import EnvironmentLacks, InputError
from rxdeploy.runtime.preprocess import normalise, open_rgb, transform

HARD_SHA256 = "db3415a14b3a7c5b6e4abae5aa45986b827f7de9af913f46a50f56089e377e99"  # of the pixels; seen on x86-64
NAME = re.compile(r"digit-(\d)-(\d+)\.png")


@pytest.fixture(scope="module")
def card() -> ModelCard:
    return find_card("digits_resnext14_8x8d")


@pytest.fixture(scope="module")
def weights_file(card: ModelCard) -> Path:
    assert card.weights.file is not None
    return card.beside(card.weights.file)


def label_and_index(path: Path) -> tuple[int, int]:
    match = NAME.fullmatch(path.name)
    assert match, path.name
    return int(match[1]), int(match[2])


def test_card_describes_its_files(card: ModelCard, weights_file: Path) -> None:
    content = weights_file.read_bytes()
    assert len(content) == card.weights.file_size
    assert len(content) < 2_000_000
    assert hashlib.sha256(content).hexdigest() == card.weights.sha256_prefix
    assert card.class_names() == ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_name_states_the_architecture(card: ModelCard) -> None:
    arch = card.architecture
    # Three convolutions a block, the stem and the classifier.
    assert card.name == f"digits_resnext{3 * sum(arch.layers) + 2}_{arch.cardinality}x{arch.base_width}d"


def test_accuracy_and_parameters_are_those_of_the_card(card: ModelCard, weights_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")
    torch = pytest.importorskip("torch", reason="the model is a PyTorch module")
    safetensors = pytest.importorskip("safetensors.torch", reason="the weights are a safetensors file")
    from rxdeploy.export.module import ResNeXt

    model = ResNeXt(card).eval()
    state = safetensors.load_file(weights_file)
    model.load_state_dict(state)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) == card.figures.parameters

    # By way of the files, as a user's images come, rather than by the arrays that training used.
    paths = write_held_out(tmp_path, 540, seed=0)
    labels = torch.tensor([label_and_index(path)[0] for path in paths])
    inputs = card.input
    images = [transform(open_rgb(path), inputs.image_size, inputs.crop_pct, inputs.interpolation) for path in paths]
    with torch.inference_mode():
        logits = model(torch.from_numpy(normalise(np.stack(images), inputs.mean, inputs.std)))
    hits = logits.topk(5).indices == labels[:, None]
    top1, top5 = 100 * hits[:, 0].double().mean().item(), 100 * hits.any(1).double().mean().item()

    assert top1 >= 98.5
    assert card.accuracy is not None
    assert top1 == pytest.approx(card.accuracy.top1, abs=0.01)
    assert top5 == pytest.approx(card.accuracy.top5, abs=0.01)


def test_split_is_disjoint_complete_and_stratified() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="the digits are part of scikit-learn")
    train, held_out = split()

    assert sorted([*train.indices, *held_out.indices]) == list(range(1797))
    assert (len(train.indices), len(held_out.indices)) == (1257, 540)
    totals = Counter(datasets.load_digits().target.tolist())
    for label, count in Counter(held_out.labels.tolist()).items():
        assert abs(count - 0.3 * totals[label]) <= 1
    np.testing.assert_array_equal(split()[1].indices, held_out.indices)


def test_no_held_out_image_is_among_the_training_ones() -> None:
    """Different positions in the data set could still hold the same image."""
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")
    train, held_out = split()
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in held_out.images}


def test_images_are_the_data_sets() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="the digits are part of scikit-learn")
    data = datasets.load_digits()
    for part in split():
        assert part.images.dtype == np.uint8
        assert part.images.shape == (len(part.labels), 8, 8, 3)
        np.testing.assert_array_equal(part.labels, data.target[part.indices])
        for channel in range(3):
            # Half a grey level is the rounding.
            values = part.images[..., channel] * (16 / 255)
            np.testing.assert_allclose(values, data.images[part.indices], atol=0.5 * 16 / 255 + 1e-9)


def test_written_digits_are_held_out_8x8_pngs(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")
    held_out = split()[1]
    paths = write_held_out(tmp_path / "new" / "folder", 25, seed=3)

    assert len(set(paths)) == 25
    for path in paths:
        label, index = label_and_index(path)
        (place,) = np.flatnonzero(held_out.indices == index)
        assert held_out.labels[place] == label
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (8, 8))
        np.testing.assert_array_equal(np.asarray(open_rgb(path)), held_out.images[place])


def test_ten_files_show_ten_digits_and_the_seed_chooses_them(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")
    first, again, other = (write_held_out(tmp_path, 10, seed) for seed in (0, 0, 1))
    assert first == again != other
    for paths in first, other:
        assert [label_and_index(path)[0] for path in paths] == list(range(10))


@pytest.mark.parametrize("count", [0, -1, 541])
def test_an_impossible_count_is_an_input_error(tmp_path: Path, count: int) -> None:
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")
    with pytest.raises(InputError, match=f"count {count}: there are 540 of these digits"):
        write_held_out(tmp_path, count, seed=0)


def test_command_line_writes_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")
    assert main([str(tmp_path / "digits"), "--count", "12"]) == 0
    assert len(list((tmp_path / "digits").glob("digit-*.png"))) == 12
    assert capsys.readouterr().out == f"12 digits written to {tmp_path / 'digits'}\n"


def test_hard_digits_are_the_same_everywhere() -> None:
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")
    digits, held_out = hard(), split()[1]
    assert (digits.images.shape, digits.images.dtype) == ((5400, 8, 8, 3), np.uint8)
    assert hashlib.sha256(digits.images.tobytes()).hexdigest() == HARD_SHA256
    np.testing.assert_array_equal(digits.labels, np.tile(held_out.labels, 10))
    np.testing.assert_array_equal(digits.indices, np.tile(held_out.indices, 10))
    assert len({image.tobytes() for image in digits.images}) == 5400
    for part, first in zip(hard(700), digits, strict=True):
        np.testing.assert_array_equal(part, first[:700])
    assert not np.array_equal(hard(540, seed=1).images, digits.images[:540])


def test_hard_digits_are_the_digits_moved_and_noisy() -> None:
    """Against Pillow's rotation of the noiseless digit: noise is what is left, and its spread is as documented."""
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")
    digits, held_out = hard(540), split()[1]
    words = np.random.PCG64(0).random_raw(540 * 67).reshape(540, 67)[:, :3]
    angle, right, down = ((words / 2**64 * 2 - 1) * [30, 1, 1]).T
    rest = []
    for place in range(540):
        turn = np.deg2rad(angle[place])
        cos, sin = np.cos(turn), np.sin(turn)
        # Pillow maps (x + 0.5, y + 0.5) of the result; black around it, as far as it is looked at.
        start = (6 + right[place] - cos * 4 + sin * 4, 6 + down[place] - sin * 4 - cos * 4)
        source = Image.fromarray(np.pad(held_out.images[place][..., 0], 2)).convert("F")
        matrix = (cos, -sin, start[0], sin, cos, start[1])
        moved = source.transform((8, 8), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        grey = digits.images[place][..., 0].astype(float)
        inside = (
            (grey > 0) & (grey < 255) & (np.asarray(moved) > 99) & (np.asarray(moved) < 155)
        )  # where none is clipped
        rest.append((grey - np.asarray(moved))[inside])
    noise = np.concatenate(rest)
    spread = NOISE / 256 * np.sqrt(8 * (256**2 - 1) / 12)
    assert len(noise) > 2000
    assert abs(noise.mean()) < 4 * spread / np.sqrt(len(noise))
    assert noise.std() == pytest.approx(spread, rel=0.05)
    assert np.abs(noise).max() < 6 * spread


def test_the_model_gets_85_to_92_percent_of_the_hard_digits(card: ModelCard, weights_file: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")
    torch = pytest.importorskip("torch", reason="the model is a PyTorch module")
    safetensors = pytest.importorskip("safetensors.torch", reason="the weights are a safetensors file")
    from rxdeploy.export.module import ResNeXt

    model = ResNeXt(card).eval()
    model.load_state_dict(safetensors.load_file(weights_file))
    digits, inputs, hits = hard(), card.input, 0
    for begin in range(0, 5400, 540):
        images = [
            transform(Image.fromarray(image), inputs.image_size, inputs.crop_pct, inputs.interpolation)
            for image in digits.images[begin : begin + 540]
        ]
        with torch.inference_mode():
            logits = model(torch.from_numpy(normalise(np.stack(images), inputs.mean, inputs.std)))
        hits += int((logits.argmax(1).numpy() == digits.labels[begin : begin + 540]).sum())
    assert 0.85 < hits / 5400 < 0.92
    assert hits == pytest.approx(4853, abs=3)  # rounding may decide an image


@pytest.mark.parametrize(("name", "count"), [("held-out", 30), ("train", 1257), ("hard", 600)])
def test_command_line_writes_a_folder_a_class(name: str, count: int, card: ModelCard, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")
    assert main([str(tmp_path / "data"), "--set", name, "--count", str(count), "--folders"]) == 0
    train, held_out = split()
    images = hard(600) if name == "hard" else train if name == "train" else held_out
    of_index: dict[int, set[bytes]] = {}
    for image, index in zip(images.images, images.indices, strict=True):
        of_index.setdefault(int(index), set()).add(image.tobytes())
    names = card.class_names()
    assert names is not None
    paths = sorted((tmp_path / "data").rglob("*.png"))
    assert len(paths) == count
    for path in paths:
        match = re.fullmatch(r"digit-(\d)-(\d+)(-1)?\.png", path.name)
        assert match and path.parent.name == names[int(match[1])]
        assert bool(match[3]) <= (name == "hard")
        assert open_rgb(path).size == (8, 8) and np.asarray(open_rgb(path)).tobytes() in of_index[int(match[2])]


def test_command_line_writes_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")
    path = tmp_path / "new" / "hard.npz"
    assert main([str(path), "--set", "hard", "--count", "20", "--seed", "4"]) == 0
    assert capsys.readouterr().out == f"20 digits written to {path}\n"
    with np.load(path) as arrays:
        np.testing.assert_array_equal(arrays["images"], hard(20, seed=4).images)
        np.testing.assert_array_equal(arrays["labels"], hard(20, seed=4).labels)


def test_what_cannot_be_written_is_an_input_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")
    (tmp_path / "file").touch()
    digits = hard(2)
    for write in (
        lambda: write_npz(digits, tmp_path / "file" / "a.npz"),
        lambda: write_files(digits, tmp_path / "file"),
    ):
        with pytest.raises(InputError, match="writing digits to"):
            write()
    assert main([str(tmp_path / "x"), "--set", "hard", "--count", "0"]) == 2
    assert main([str(tmp_path / "x"), "--set", "train", "--count", "1258"]) == 2
    assert "there are 1257 of these digits" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_folder_that_is_a_file_is_an_input_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_without_scikit_learn_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "sklearn", None)  # makes the import raise ModuleNotFoundError
    with pytest.raises(EnvironmentLacks, match="pip install scikit-learn"):
        split()
    assert main([str(tmp_path)]) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_training_writes_loadable_weights_and_the_cards_values(
    tmp_path: Path, card: ModelCard, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")
    torch = pytest.importorskip("torch", reason="training needs PyTorch")
    safetensors = pytest.importorskip("safetensors.torch", reason="the weights are a safetensors file")
    from rxdeploy.cards import train_digits

    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        assert train_digits.main(["--output", str(tmp_path), "--seed", "5", "--epochs", "1"]) == 0
    finally:
        torch.use_deterministic_algorithms(deterministic)
    (path,) = tmp_path.iterdir()  # and no temporary file
    assert path.name == card.weights.file
    output = capsys.readouterr().out
    assert hashlib.sha256(path.read_bytes()).hexdigest() in output
    assert f"parameters = {card.figures.parameters:_}" in output
    assert all(tensor.isfinite().all() for tensor in safetensors.load_file(path).values())
