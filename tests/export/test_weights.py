"""Reading weights: every form training scripts save, and every way a file can be wrong, hostile ones included."""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from rxdeploy.cards import ModelCard
from rxdeploy.errors import EnvironmentLacks, InputError
from rxdeploy.export.module import ResNeXt
from rxdeploy.export.weights import check_parameters, load_weights, resolve_weights

State = dict[str, Tensor]
Save = Callable[[Any, Path], None]


def save_zip(state: Any, path: Path) -> None:
    torch.save(state, path)


def save_legacy(state: Any, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def save_safetensors(state: Any, path: Path) -> None:
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


FORMATS: dict[str, tuple[Save, str]] = {
    "zip": (save_zip, "net.pth"),
    "legacy": (save_legacy, "net.pth"),
    "safetensors": (save_safetensors, "net.safetensors"),
    "safetensors under another name": (save_safetensors, "net.pth"),
}


@pytest.fixture
def card(make_card: Callable[..., ModelCard]) -> ModelCard:
    return make_card(layers=[1, 1], channels=[16, 32], image_size=32)


@pytest.fixture
def state(card: ModelCard) -> State:
    """The module's state dict as training leaves it, step counters included."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(tensor.shape, generator=generator) + 0.5 if tensor.is_floating_point() else tensor + 100
        for name, tensor in ResNeXt(card).state_dict().items()
    }


def load(card: ModelCard, path: Path) -> dict[str, NDArray[np.float32]]:
    return load_weights(card, resolve_weights(card, str(path), path.parent))


def assert_same(loaded: dict[str, NDArray[np.float32]], state: State) -> None:
    expected = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    assert set(loaded) == set(expected)
    for name, array in loaded.items():
        assert array.dtype == np.float32 and array.flags.c_contiguous, name
        np.testing.assert_array_equal(array, expected[name].to(torch.float32).numpy(), err_msg=name)


def complaint(card: ModelCard, path: Path) -> str:
    """The one message about the weights at `path`."""
    with pytest.raises(InputError) as caught:
        load(card, path)
    error = caught.value
    assert error.__suppress_context__ or error.__context__ is None, "no traceback of what lies below"
    text = str(error)
    assert text.startswith((f"weights file {path}: ", f"reading weights file {path}: "))
    assert "Traceback" not in text and 'File "' not in text
    return text


@pytest.mark.parametrize("form", FORMATS)
def test_formats(form: str, card: ModelCard, state: State, tmp_path: Path) -> None:
    save, name = FORMATS[form]
    save(state, tmp_path / name)
    assert_same(load(card, tmp_path / name), state)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema"])
@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_wrappers(wrapper: str, save: Save, card: ModelCard, state: State, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    save({"epoch": 90, "best": 79.35, wrapper: state, "lr": torch.tensor(0.1), "optimizer": {"state": {}}}, path)
    assert_same(load(card, path), state)


def test_average_comes_first(card: ModelCard, state: State, tmp_path: Path) -> None:
    latest = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"model": latest, "state_dict": latest, "state_dict_ema": state}, tmp_path / "checkpoint.pth")
    assert_same(load(card, tmp_path / "checkpoint.pth"), state)


def test_empty_average_is_none(card: ModelCard, state: State, tmp_path: Path) -> None:
    torch.save({"state_dict": state, "state_dict_ema": None}, tmp_path / "checkpoint.pth")
    assert_same(load(card, tmp_path / "checkpoint.pth"), state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.model."])
@pytest.mark.parametrize("form", FORMATS)
def test_prefixes(prefix: str, form: str, card: ModelCard, state: State, tmp_path: Path) -> None:
    save, name = FORMATS[form]
    save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / name)
    assert_same(load(card, tmp_path / name), state)


def test_prefix_of_some_is_part_of_the_name(card: ModelCard, state: State, tmp_path: Path) -> None:
    torch.save({**state, "module.extra": torch.zeros(1)}, tmp_path / "net.pth")
    assert "unexpected: module.extra" in complaint(card, tmp_path / "net.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", FORMATS)
def test_stored_types(dtype: torch.dtype, form: str, card: ModelCard, state: State, tmp_path: Path) -> None:
    stored = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    save, name = FORMATS[form]
    save(stored, tmp_path / name)
    assert_same(load(card, tmp_path / name), stored)


def test_parameters_and_strides(card: ModelCard, state: State, tmp_path: Path) -> None:
    """What torch.save keeps beyond values: gradients wanted, memory order."""
    stored = {
        name: torch.nn.Parameter(tensor.to(memory_format=torch.channels_last))
        if tensor.ndim == 4
        else tensor.detach().clone()
        for name, tensor in state.items()
    }
    torch.save(stored, tmp_path / "net.pth")
    assert_same(load(card, tmp_path / "net.pth"), state)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_truncated(share: float, form: str, card: ModelCard, state: State, tmp_path: Path) -> None:
    save, name = FORMATS[form]
    path = tmp_path / name
    save(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    complaint(card, path)


def test_every_truncated_zip_is_damaged(card: ModelCard, state: State, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    save_zip(state, path)
    content = path.read_bytes()
    for percent in range(2, 100, 4):
        path.write_bytes(content[: len(content) * percent // 100])
        assert "damaged" in complaint(card, path), f"{percent} %"


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes(seed: int, card: ModelCard, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    content = random.Random(seed).randbytes(5000)
    # Half of them look like the start of a format: a pickle, a zip, safetensors with an absurd or a small header.
    starts = (b"\x80\x02", b"PK\x03\x04", b"\xff" * 8 + b"{", (40).to_bytes(8, "little") + b'{"a":')
    path.write_bytes((starts[seed // 2 % len(starts)] if seed % 2 else b"") + content)
    complaint(card, path)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"]
)
def test_no_weights_at_all(content: bytes, card: ModelCard, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    path.write_bytes(content)
    assert "\n" not in complaint(card, path)


@pytest.mark.parametrize("stored", [{}, [], None, 5, "net", {"epoch": 3}, {"state_dict": {}}], ids=repr)
def test_no_state_dict(stored: Any, card: ModelCard, tmp_path: Path) -> None:
    torch.save(stored, tmp_path / "net.pth")
    assert "holds no tensors by name; expected a state dict" in complaint(card, tmp_path / "net.pth")


def test_no_file(card: ModelCard, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"weights file .*nowhere\.pth: no such file"):
        resolve_weights(card, str(tmp_path / "nowhere.pth"), tmp_path)
    with pytest.raises(InputError, match=rf"weights file {tmp_path}: not a plain file"):
        resolve_weights(card, str(tmp_path), tmp_path)


class Burglar:
    """Runs code on whoever unpickles it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_code_is_refused_not_run(save: Save, card: ModelCard, state: State, tmp_path: Path) -> None:
    path, trace = tmp_path / "net.pth", tmp_path / "burgled"
    save({"state_dict": state, "hello": Burglar(trace)}, path)
    text = complaint(card, path)
    assert not trace.exists()
    assert "contains pickled code" in text and "does not run" in text
    assert "torch.save(model.state_dict(), path)" in text
    # The trap would have worked on an unwary reader.
    torch.load(path, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_plain_pickle_is_not_run(protocol: int, card: ModelCard, tmp_path: Path) -> None:
    path, trace = tmp_path / "net.pth", tmp_path / "burgled"
    path.write_bytes(pickle.dumps(Burglar(trace), protocol))
    complaint(card, path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()


def test_nobody_is_told_to_run_the_code(card: ModelCard, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    path.write_bytes(pickle.dumps({"hello": Burglar(tmp_path / "burgled")}, 0))
    assert "weights_only" not in complaint(card, path)


def test_whole_module_is_refused(card: ModelCard, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "net.pth")
    text = complaint(card, tmp_path / "net.pth")
    assert "contains pickled code (torch.nn.modules.linear.Linear)" in text


def test_misfits_are_listed(card: ModelCard, state: State, tmp_path: Path) -> None:
    del state["layer1.0.conv2.weight"], state["fc.bias"]
    state["layer1.0.se.weight"] = torch.zeros(3)
    state["conv1.weight"] = torch.zeros(16, 3, 3, 3)
    state["layer2.0.bn3.bias"] = torch.zeros(5)
    torch.save(state, tmp_path / "net.pth")
    text = complaint(card, tmp_path / "net.pth")
    needed = sum(1 for name in ResNeXt(card).state_dict() if not name.endswith("num_batches_tracked"))
    assert text.splitlines() == [
        f"weights file {tmp_path / 'net.pth'}: does not fit small ({needed - 1} tensors, {needed} needed)",
        "  missing: layer1.0.conv2.weight, fc.bias",
        "  unexpected: layer1.0.se.weight",
        "  of another shape: conv1.weight [16, 3, 3, 3] where the card needs [16, 3, 7, 7], "
        "layer2.0.bn3.bias [5] where the card needs [128]",
    ]


def test_long_lists_are_cut(card: ModelCard, make_card: Callable[..., ModelCard], tmp_path: Path) -> None:
    deep = make_card("deep", layers=[9, 1], channels=[16, 32], image_size=32)
    torch.save(ResNeXt(deep).state_dict(), tmp_path / "net.pth")
    text = complaint(card, tmp_path / "net.pth")
    # 8 blocks too many of three convolutions and batch-norms, five tensors a pair: 120, of which 20 are shown.
    (line,) = text.splitlines()[1:]
    assert line.startswith("  unexpected: layer1.1.conv1.weight, ")
    assert line.endswith(", and 100 more")
    assert line.count("layer1.") == 20
    torch.save(ResNeXt(card).state_dict(), tmp_path / "net.pth")
    assert ", and 100 more" in complaint(deep, tmp_path / "net.pth").splitlines()[1]


def test_class_count(card: ModelCard, state: State, tmp_path: Path) -> None:
    state["fc.weight"], state["fc.bias"] = torch.zeros(3, 128), torch.zeros(3)
    torch.save(state, tmp_path / "net.pth")
    text = complaint(card, tmp_path / "net.pth")
    assert "fc.weight [3, 128] where the card needs [7, 128]" in text
    hint = text.splitlines()[-1]
    assert "has 3 classes" in hint and "a card of your own" in hint and "num_classes = 3" in hint


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("conv1.weight", float("nan")),
        ("fc.bias", float("inf")),
        ("layer1.0.bn2.running_var", -1e-6),
        ("layer2.0.downsample.1.running_mean", float("-inf")),
    ],
)
def test_values_that_cannot_be(name: str, value: float, card: ModelCard, state: State, tmp_path: Path) -> None:
    state[name].view(-1)[1] = value
    torch.save(state, tmp_path / "net.pth")
    assert complaint(card, tmp_path / "net.pth").endswith(f"NaN, infinity or a negative variance\n  in: {name}")


def test_double_beyond_float32(card: ModelCard, state: State, tmp_path: Path) -> None:
    state["fc.bias"] = state["fc.bias"].double() * 1e300
    torch.save(state, tmp_path / "net.pth")
    assert complaint(card, tmp_path / "net.pth").endswith("in: fc.bias")


@pytest.mark.parametrize(
    "odd",
    [
        "sparse",
        "meta",
        "0-dimensional",
        pytest.param(
            "complex",
        ),
    ],
)
def test_odd_tensors(odd: str, card: ModelCard, state: State, tmp_path: Path) -> None:
    weight = state["fc.weight"]
    state["fc.weight"] = {
        "sparse": weight.to_sparse(),
        "meta": weight.to("meta"),
        "0-dimensional": torch.tensor(1.0),
        "complex": weight.to(torch.complex64),
    }[odd]
    torch.save(state, tmp_path / "net.pth")
    told = complaint(card, tmp_path / "net.pth")
    # torch 2.15 and later do not read a file with sparse tensors at all.
    assert "fc.weight" in told or (odd == "sparse" and "damaged" in told)


def test_wrapper_around_itself(card: ModelCard, tmp_path: Path) -> None:
    stored: dict[str, Any] = {}
    stored["state_dict"] = stored
    torch.save(stored, tmp_path / "net.pth")

    def give_up(*_args: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        complaint(card, tmp_path / "net.pth")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("option", "seed"), [("synthetic", 0), ("synthetic:0", 0), ("synthetic:7", 7), ("synthetic:007", 7)]
)
def test_synthetic(option: str, seed: int, card: ModelCard, tmp_path: Path) -> None:
    source = resolve_weights(card, option, tmp_path)
    assert (source.origin.kind, source.seed, source.path) == ("synthetic", seed, None)
    assert source.identity == source.origin.source == f"synthetic:{seed}"
    assert source.origin.sha256 is None


@pytest.mark.parametrize("option", ["synthetic:x", "synthetic:-1", "synthetic:1.5", "synthetic:1:2", "synthetic:1" * 9])
def test_synthetic_seed_that_is_none(option: str, card: ModelCard, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--weights {option}: the seed must be a whole number"):
        resolve_weights(card, option, tmp_path)


def test_file_option(card: ModelCard, state: State, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save(state, path)
    source = resolve_weights(card, str(path), tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (source.origin.kind, source.path, source.identity, source.seed) == ("file", path, digest, None)
    assert (source.origin.kind, source.origin.source, source.origin.licence) == ("file", "net.pth", None)


def own_card(make_card: Callable[..., ModelCard], **weights: Any) -> ModelCard:
    return make_card(layers=[1, 1], channels=[16, 32], image_size=32, weights=weights)


def test_file_beside_the_card(
    make_card: Callable[..., ModelCard], state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").mkdir()
    path = tmp_path / "weights" / "net.safetensors"
    save_safetensors(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.chdir("/")  # beside the card, not beside whoever runs
    card = own_card(make_card, file="weights/net.safetensors", sha256_prefix=digest[:12], licence="MIT")
    source = resolve_weights(card, None, tmp_path / "cache")
    assert (source.origin.kind, source.identity, source.origin.licence) == ("file", digest, "MIT")
    assert_same(load_weights(card, source), state)
    assert not (tmp_path / "cache").exists()


def test_file_beside_the_card_of_another_checksum(
    make_card: Callable[..., ModelCard], state: State, tmp_path: Path
) -> None:
    path = tmp_path / "net.pth"
    torch.save(state, path)
    begins = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    card = own_card(make_card, file="net.pth", sha256_prefix="00000000")
    with pytest.raises(InputError, match=f"weights file {path}: sha256 begins {begins}, the card says 00000000"):
        resolve_weights(card, None, tmp_path)


def test_file_beside_the_card_that_is_not_there(make_card: Callable[..., ModelCard], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"weights file .*net\.pth: no such file"):
        resolve_weights(own_card(make_card, file="net.pth"), None, tmp_path)


def test_no_weights_named(card: ModelCard, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"card small: names no weights .*--weights PATH, or --weights synthetic"):
        resolve_weights(card, None, tmp_path)


def test_too_large_for_memory(card: ModelCard, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(state, tmp_path / "net.pth")

    def full(*_args: object, **_options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(EnvironmentLacks, match="does not fit into memory"):
        load(card, tmp_path / "net.pth")


def test_what_training_scripts_keep_beside_the_weights(card: ModelCard, state: State, tmp_path: Path) -> None:
    """Their arguments and NumPy's numbers are pickled objects, and harmless."""
    beside = {"args": argparse.Namespace(lr=0.1), "best_acc": np.float64(0.9), "epoch": np.int64(3)}
    torch.save({"state_dict": state, **beside}, tmp_path / "net.pth")
    assert load_weights(card, resolve_weights(card, str(tmp_path / "net.pth"), tmp_path)).keys()


def test_a_model_too_large_for_onnx_is_refused(card: ModelCard) -> None:
    architecture = msgspec.structs.replace(card.architecture, num_classes=1_000_000, channels=(64, 512))
    with pytest.raises(InputError, match=r"more than one ONNX file can hold \(2 GiB\)"):
        check_parameters(msgspec.structs.replace(card, architecture=architecture))


def test_the_cards_file_size_is_checked(card: ModelCard, state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "net.pth")
    weights = msgspec.structs.replace(card.weights, file="net.pth", url=None, sha256_prefix=None, file_size=5)
    card = msgspec.structs.replace(card, weights=weights, path=tmp_path / "card.toml")
    with pytest.raises(InputError, match=r"net\.pth: has [0-9]+ bytes, the card says 5"):
        resolve_weights(card, None, tmp_path)
