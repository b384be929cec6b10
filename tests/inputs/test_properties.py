"""Whatever a file holds, its reader gives something sound or one of our errors: the same inputs each time.

`reliability/fuzz.py` looks for more, with coverage for a guide; what it found is among the examples here.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from rxdeploy.bench.benchmark import parse_batches  # noqa: E402
from rxdeploy.cards import load_card, read_labels  # noqa: E402
from rxdeploy.datasets.arrays import open_npz  # noqa: E402
from rxdeploy.datasets.devkit import read_kit  # noqa: E402
from rxdeploy.datasets.labels import label_images  # noqa: E402
from rxdeploy.datasets.tars import index_tar  # noqa: E402
from rxdeploy.engines.bundle import open_bundle, read_manifest  # noqa: E402
from rxdeploy.engines.external import keeps_weights_elsewhere  # noqa: E402
from rxdeploy.engines.options import MAX_BATCH, Profile  # noqa: E402
from rxdeploy.errors import InputError, RxDeployError, inert, printable  # noqa: E402
from rxdeploy.evaluation.baseline import read_baseline  # noqa: E402
from rxdeploy.runtime.preprocess import open_rgb, transform  # noqa: E402
from rxdeploy.runtime.session import parse_device  # noqa: E402
from rxdeploy.terminal import describe_bundle  # noqa: E402
from rxdeploy.tuning.options import parse_groups  # noqa: E402

quick = settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
NAMES = ("ant", "bee", "cat")
IMAGES = [f"{name}{number}.png" for name in NAMES for number in range(4)]
texts = st.text(max_size=30) | st.sampled_from(["\x1b[2J", "..", "/etc/passwd", "\0", "a" * 400])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
# Places of a file, as shares of its length, and what bytes there become.
damages = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6)
cuts = st.floats(0, 1) | st.just(1.0)


def damaged(data: bytes, damage: list[tuple[float, int]], cut: float) -> bytes:
    spoilt = bytearray(data)
    for place, byte in damage:
        spoilt[int(place * len(spoilt))] = byte
    return bytes(spoilt[: int(cut * len(spoilt))])


def spoil(value: Any, path: list[float], new: Any) -> None:
    """Replace something in a JSON value: `path` says which key to follow, as a share of their number."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys:
        return
    key = keys[int(path[0] * len(keys))]
    if len(path) > 1 and isinstance(value[key], dict | list):
        spoil(value[key], path[1:], new)
    else:
        value[key] = new


def outcome(read: Callable[[], Any]) -> Any:
    """What a reader gives, or None for one of our errors, which must be fit for a terminal once it is printed."""
    try:
        return read()
    except RxDeployError as error:
        assert not CONTROL.search(inert(str(error)))
        return None


@given(st.text())
@quick
def test_no_text_commands_a_terminal(text: str) -> None:
    assert not CONTROL.search(printable(text)) and "\n" not in printable(text)
    assert len(printable(text)) <= 303
    assert not CONTROL.search(inert(text))
    assert inert(text).count("\n") == text.count("\n")


@given(st.text("0123456789,- +e\u0661\u00b2", max_size=12) | st.lists(st.integers(0, 5000), min_size=1, max_size=4))
@example("9" * 5000)
@quick
def test_options(given: str | list[int]) -> None:
    text = given if isinstance(given, str) else ",".join(map(str, given))
    profile = outcome(lambda: Profile.parse(text))
    assert profile is None or 1 <= profile.min <= profile.opt <= profile.max <= MAX_BATCH
    assert profile is None or Profile.parse(str(profile)) == profile
    sizes = outcome(lambda: parse_batches(text))
    assert sizes is None or (list(sizes) == sorted(set(sizes)) and sizes[0] >= 1 and sizes[-1] <= MAX_BATCH)
    groups = outcome(lambda: parse_groups(text))
    assert groups is None or 0 < groups <= 1 << 16
    device = outcome(lambda: parse_device(f"cuda:{text}"))
    assert device is None or (device[0] == "cuda" and 0 <= device[1] < 10_000)


@given(st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()))
@quick
def test_any_bytes_and_any_json(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(data)
    for read in (read_manifest, lambda folder: read_baseline(path), lambda folder: load_card(path)):
        with pytest.raises(InputError):
            read(tmp_path)
    outcome(lambda: read_labels(path, 1))
    outcome(lambda: index_tar(path))


@given(st.lists(st.tuples(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4), values), max_size=3))
@quick
def test_sealed_manifests(good: Path, tmp_path: Path, changes: list[tuple[list[float], Any]]) -> None:
    manifest = json.loads((good / "planned" / "manifest.json").read_text())
    for where, new in changes:
        spoil(manifest, where, new)
    for file in (good / "planned").iterdir():
        if not (tmp_path / file.name).exists():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    unsealed = json.dumps(manifest | {"digest": "0" * 64}).encode()
    digest = hashlib.sha256(unsealed).hexdigest().encode()
    (tmp_path / "manifest.json").write_bytes(unsealed.replace(b"0" * 64, digest, 1))
    text = outcome(lambda: describe_bundle(open_bundle(tmp_path), whole=True))
    assert text is not None or changes
    assert not CONTROL.search(text or "")


@given(damages, cuts)
@quick
def test_damaged_calibrations(good: Path, tmp_path: Path, damage: list[tuple[float, int]], cut: float) -> None:
    from rxdeploy.calibration.network import Network
    from rxdeploy.calibration.record import read_record
    from rxdeploy.export.weights import load_weights, resolve_weights

    card = load_card(good / "card.toml")
    network = Network(card, load_weights(card, resolve_weights(card, str(good / "weights.safetensors"), good)))
    (tmp_path / "calibration.json").write_bytes(damaged((good / "calibration.json").read_bytes(), damage, cut))
    outcome(lambda: read_record(tmp_path / "calibration.json", network))


@given(damages, cuts)
@quick
def test_damaged_cards(good: Path, tmp_path: Path, damage: list[tuple[float, int]], cut: float) -> None:
    (tmp_path / "card.toml").write_bytes(damaged((good / "card.toml").read_bytes(), damage, cut))
    outcome(lambda: load_card(tmp_path / "card.toml"))


@given(damages, cuts)
@quick
def test_damaged_tars(good: Path, tmp_path: Path, damage: list[tuple[float, int]], cut: float) -> None:
    path = tmp_path / "data.tar"
    path.write_bytes(damaged((good / "data.tar").read_bytes(), damage, cut))
    members = outcome(lambda: index_tar(path))
    for name, size, _ in members.facts() if members else ():
        assert ".." not in name.split("/")
        assert not name.startswith("/")
        assert size <= path.stat().st_size


@given(
    st.integers(0, 511), st.binary(min_size=1, max_size=12), st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
)
@quick
def test_headers_with_the_right_checksum(tmp_path: Path, at: int, new: bytes, form: int) -> None:
    info = tarfile.TarInfo("ant/" + "a" * 150 + ".png")
    info.pax_headers = {"GNU.sparse.map": "0,1"}
    blocks = bytearray(info.tobuf(form))
    for start in range(0, len(blocks), 512):
        block = blocks[start : start + 512]
        if block[257:262] == b"ustar":
            block[at : at + len(new)] = new
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block[:512])
            blocks[start : start + 512] = block[:512]
    path = tmp_path / "data.tar"
    path.write_bytes(bytes(blocks) + bytes(1024))
    outcome(lambda: index_tar(path))
    outcome(lambda: read_kit(path))


@given(damages, cuts)
@quick
def test_damaged_npz(good: Path, tmp_path: Path, damage: list[tuple[float, int]], cut: float) -> None:
    (tmp_path / "data.npz").write_bytes(damaged((good / "data.npz").read_bytes(), damage, cut))
    outcome(lambda: open_npz(tmp_path / "data.npz", 3, True))


@given(st.lists(st.lists(texts | st.sampled_from([*NAMES, *IMAGES]), max_size=3).map(",".join), max_size=14))
@quick
def test_labels_are_classes_of_the_model(tmp_path: Path, lines: list[str]) -> None:
    for name in ("labels.csv", "labels.txt"):
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8", errors="replace")
        found = outcome(lambda name=name: label_images(IMAGES, tmp_path / name, 3, NAMES, "data"))
        assert found is None or (len(found[0]) == len(IMAGES) and set(found[0]) <= {0, 1, 2})


@given(damages, cuts, st.sampled_from(["image.png", "image.jpg"]))
@quick
def test_damaged_images(good: Path, tmp_path: Path, damage: list[tuple[float, int]], cut: float, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(damaged((good / name).read_bytes(), damage, cut))
    pixels = outcome(lambda: transform(open_rgb(path), 32, 1.0, "bicubic"))
    assert pixels is None or (pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8)


# Weights outside of a model: what the file says is read by onnx, the reference


@given(st.lists(st.sampled_from(["weights", "constant", "branch", "sparse", "function"]), max_size=3), st.booleans())
@quick
def test_weights_in_other_files_are_seen(tmp_path: Path, places: list[str], elsewhere: bool) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx import helper

    def tensor(name: str) -> Any:
        made = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=[1])
        if elsewhere:
            made.data_location = onnx.TensorProto.EXTERNAL
            made.external_data.add(key="location", value="../secret")
        else:
            made.float_data.append(1.0)
        return made

    graph, functions = helper.make_graph([], "g", [], []), []
    for number, place in enumerate(places):
        name = f"{place}{number}"
        if place == "weights":
            graph.initializer.append(tensor(name))
        elif place == "constant":
            graph.node.append(helper.make_node("Constant", [], [name], value=tensor(name)))
        elif place == "branch":
            inner = helper.make_graph([], "inner", [], [], [tensor(name)])
            graph.node.append(helper.make_node("If", ["x"], [name], then_branch=inner, else_branch=inner))
        elif place == "sparse":
            graph.sparse_initializer.append(onnx.SparseTensorProto(values=tensor(name), dims=[4]))
        else:
            node = helper.make_node("Constant", [], ["y"], value=tensor(name))
            functions.append(helper.make_function("d", name, [], ["y"], [node], [helper.make_opsetid("", 21)]))
    model = helper.make_model(graph, functions=functions)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert keeps_weights_elsewhere(tmp_path / "model.onnx") == bool(elsewhere and places)


@given(damages, cuts)
@quick
def test_damaged_models_are_walked_to_an_end(
    good: Path, tmp_path: Path, damage: list[tuple[float, int]], cut: float
) -> None:
    (tmp_path / "model.onnx").write_bytes(damaged((good / "model.onnx").read_bytes(), damage, cut))
    assert keeps_weights_elsewhere(tmp_path / "model.onnx") in (True, False)
