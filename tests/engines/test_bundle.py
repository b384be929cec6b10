"""A bundle read back is the one that was written, or an InputError that names what is wrong with it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rxdeploy.cards.card import Accuracy, Figures, Input, Source
from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.bundle import Bundle, Manifest, check_destination, manifest_json, open_bundle, write_bundle
from rxdeploy.errors import InputError

FILES = {
    "model.onnx": random.Random(1).randbytes(3000),
    "engine.plan": random.Random(2).randbytes(2000),
    "labels.txt": "Schäfer\ncat\n".encode(),
}


TUNING = bundles.Tuning(
    tuned=True,
    device="Some CPU",
    cores=2,
    versions={"openvino": "2026.4.1"},
    batch=(1, 8),
    groups={"layer1.0.conv2": 16},
    passes=("pack",),
    cpu=bundles.CpuSettings(engine="openvino", threads=1, sessions=2, denormals_as_zero=True),
    report={"gains": [{"what": "groups", "ratio": 0.8}]},
)


def make_manifest(**changes: Any) -> Manifest:
    facts: dict[str, Any] = {
        "schema": 1,
        "model": "tiny",
        "precision": "fp16",
        "target": bundles.TargetFacts(name="tensorrt-rtx", version="1.7.1", reason="asked for", gpu=None),
        "weights": bundles.WeightsOrigin(kind="synthetic", source="synthetic:0", sha256=None),
        "card": bundles.CardFacts(
            sha256="0" * 64,
            description="ein kleines Modell für Tests",
            figures=Figures(parameters=1000, flops=2000),
            accuracy=Accuracy(dataset="none", top1=50.0, top5=75.5),
            source=Source(collection="tests", training_data=("a", "b")),
        ),
        "counts": bundles.Counts(parameters=1000, multiply_adds=12345),
        "preprocessing": Input(
            image_size=32, crop_pct=0.875, interpolation="bicubic", mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0)
        ),
        "normalisation_in_graph": True,
        "num_classes": 2,
        "inputs": (bundles.Tensor(name="image", dtype="uint8", layout="NHWC", shape=(None, 32, 32, 3), batch=(1, 32)),),
        "outputs": (bundles.Tensor(name="logits", dtype="float32", layout="NC", shape=(None, 2), batch=(1, 32)),),
        "validation": {"passed": True, "providers": {"CPU": {"relative_l2": 1.25e-4}}},
        "engine": {"flavour": "tensorrt-rtx", "profiles": [{"min": 1, "opt": 8, "max": 32}]},
        "tools": {"rxdeploy": "0.1.0", "python": "3.11"},
        "command": ("rxdeploy", "build", "tiny"),
        "files": {},
    }
    return Manifest(**facts | changes)


def write(path: Path, overwrite: bool = False, **changes: Any) -> Bundle:
    return write_bundle(path, make_manifest(**changes), dict(FILES), overwrite)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A bundle, alone in its folder."""
    return write(tmp_path / "it").path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a bundle as JSON, without rxdeploy, and give it the digest of what it says now."""
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    manifest["digest"] = "0" * 64
    change(manifest)
    text = json.dumps(manifest)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (path / "manifest.json").write_text(text.replace("0" * 64, digest, 1), encoding="utf-8")


# Round trip


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(FILES["engine.plan"])
    written = write_bundle(tmp_path / "parent" / "it", make_manifest(), {**FILES, "engine.plan": source}, False)
    opened = open_bundle(tmp_path / "parent" / "it")
    assert opened == written
    assert opened.path == tmp_path / "parent" / "it"
    made = {name: (opened.path / name).read_bytes() for name in ("manifest.json", "sbom.cdx.json")}
    assert content(opened.path) == {**FILES, **made}
    assert names(tmp_path / "parent") == ["it"]
    assert source.read_bytes() == FILES["engine.plan"], "files are copied, not moved"
    sealed = {**FILES, "sbom.cdx.json": made["sbom.cdx.json"]}
    expected = make_manifest(
        digest=opened.manifest.digest,
        files={name: bundles.FileDigest(hashlib.sha256(data).hexdigest(), len(data)) for name, data in sealed.items()},
    )
    assert opened.manifest == expected


@pytest.mark.parametrize("cpu", [TUNING.cpu, bundles.CpuSettings(spinning=False, arena=False), None])
def test_a_tuning_is_read_back(tmp_path: Path, cpu: bundles.CpuSettings | None) -> None:
    tuning = msgspec.structs.replace(TUNING, cpu=cpu)
    written = write(tmp_path / "it", tuning=tuning)
    assert open_bundle(written.path).manifest.tuning == tuning
    assert json.loads((written.path / "manifest.json").read_text())["tuning"]["batch"] == [1, 8]


def test_a_bundle_from_before_there_was_tuning(path: Path) -> None:
    edit(path, lambda manifest: manifest.pop("tuning"))
    assert open_bundle(path).manifest.tuning is None


@pytest.mark.parametrize("wrong", [{"engine": "tflite"}, {"threads": "2"}, {"spinning": 1}, {"sessions": None}])
def test_settings_that_are_none(path: Path, wrong: dict[str, Any]) -> None:
    tuning = msgspec.to_builtins(TUNING)
    tuning["cpu"] |= wrong
    edit(path, lambda manifest: manifest.update(tuning=tuning))
    with pytest.raises(InputError, match=rf"damaged: .*tuning\.cpu\.{next(iter(wrong))}"):
        open_bundle(path)


def test_the_manifest_is_plain_readable_json(path: Path) -> None:
    text = (path / "manifest.json").read_text(encoding="utf-8")
    manifest = json.loads(text)
    assert manifest["schema"] == 1
    assert manifest["model"] == "tiny"
    assert manifest["inputs"][0]["shape"] == [None, 32, 32, 3]
    assert manifest["files"]["labels.txt"] == {
        "sha256": hashlib.sha256(FILES["labels.txt"]).hexdigest(),
        "bytes": len(FILES["labels.txt"]),
    }
    assert "manifest.json" not in manifest["files"]
    assert "für" in text and text.endswith("}\n") and "\n  " in text


def test_files_and_labels(path: Path) -> None:
    bundle = open_bundle(path)
    assert bundle.file("model.onnx").read_bytes() == FILES["model.onnx"]
    assert bundle.labels() == ("Schäfer", "cat")
    for name in ("absent", "manifest.json", "../it/model.onnx"):
        with pytest.raises(KeyError, match=re.escape(name)):
            bundle.file(name)


def test_a_bundle_without_plan_and_labels(tmp_path: Path) -> None:
    write_bundle(tmp_path / "it", make_manifest(engine=None), {"model.onnx": b"model"}, False)
    bundle = open_bundle(tmp_path / "it")
    assert bundle.labels() is None
    assert list(bundle.manifest.files) == ["model.onnx", "sbom.cdx.json"]


def test_a_bundle_may_be_moved(path: Path, tmp_path: Path) -> None:
    path.rename(tmp_path / "elsewhere")
    assert open_bundle(tmp_path / "elsewhere").labels() == ("Schäfer", "cat")


def test_the_same_build_gives_the_same_manifest(tmp_path: Path) -> None:
    """The order in which files were handed over, and the folder, must not show."""
    first = write_bundle(tmp_path / "1", make_manifest(), dict(FILES), False)
    second = write_bundle(tmp_path / "2", make_manifest(), dict(reversed(FILES.items())), False)
    assert content(first.path) == content(second.path)
    assert manifest_json(first.manifest).encode() == (first.path / "manifest.json").read_bytes()


# Damaged files


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_link(path: Path) -> None:
    """A link to the very same bytes: what it points to may change after the check."""
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_dead_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


DAMAGE = [
    pytest.param(flip, "was altered: its sha256 begins", id="flipped"),
    pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-1]), "the manifest says", id="truncated"),
    pytest.param(lambda path: path.write_bytes(b""), "has 0 bytes", id="empty"),
    pytest.param(append, "the manifest says", id="longer"),
    pytest.param(Path.unlink, "is missing", id="missing"),
    pytest.param(replace_by_link, "is not a plain file", id="link"),
    pytest.param(replace_by_dead_link, "is ", id="dead link"),
    pytest.param(replace_by_folder, "is not a plain file", id="folder"),
    pytest.param(replace_by_pipe, "is not a plain file", id="pipe"),
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_a_damaged_file_is_named(path: Path, name: str, damage: Callable[[Path], object], words: str) -> None:
    damage(path / name)
    with pytest.raises(InputError) as caught:
        open_bundle(path)
    assert str(caught.value).startswith(f"bundle {path}: {name} ")
    assert words in str(caught.value)
    assert "build the bundle again" in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_every_byte_counts(path: Path, name: str) -> None:
    data = (path / name).read_bytes()
    for position in random.Random(3).sample(range(len(data)), min(len(data), 40)):
        altered = bytearray(data)
        altered[position] ^= 1 << position % 8
        (path / name).write_bytes(altered)
        with pytest.raises(InputError, match=re.escape(name)):
            open_bundle(path)
    (path / name).write_bytes(data)
    open_bundle(path)


def test_a_file_the_manifest_does_not_list_changes_nothing(path: Path) -> None:
    (path / "notes.txt").write_text("mine")
    assert list(open_bundle(path).manifest.files) == sorted([*FILES, "sbom.cdx.json"])


# Damaged manifests


@pytest.mark.parametrize("missing", ["manifest", "folder", "is a file"])
def test_no_bundle(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "it"
    if missing == "manifest":
        path.mkdir()
    elif missing == "is a file":
        path.write_text("")
    with pytest.raises(InputError, match=r"not a bundle \(there is no manifest.json\); `rxdeploy build` makes one"):
        open_bundle(path)


def test_a_manifest_that_is_a_folder(path: Path) -> None:
    replace_by_folder(path / "manifest.json")
    with pytest.raises(InputError, match=r"manifest.json: not a plain file"):
        open_bundle(path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\0",
        b"null",
        b"[]",
        b"{}",
        b'"manifest"',
        b"1",
        b'{"schema": 1}',
        b'{"schema": "1"}',
        b'{"schema": null}',
        b"\xff\xfe{}",
        b'{"model": "\xff"}',
        b'{"schema": 1e999}',
        b'{"schema": NaN}',
        pytest.param(
            b"[" * 100_000,
            id="deep",
        ),
    ],
)
def test_a_manifest_that_is_none(path: Path, text: bytes) -> None:
    (path / "manifest.json").write_bytes(text)
    with pytest.raises(InputError, match=r"manifest.json is damaged: .*; build the bundle again"):
        open_bundle(path)


def opens(path: Path) -> bool:
    """Whether the bundle opens, as a valid manifest of this schema; any other way to fail is not allowed."""
    try:
        bundle = open_bundle(path)
    except InputError as error:
        assert str(path) in str(error)
        return False
    assert bundle.manifest.schema == 1
    assert json.loads((path / "manifest.json").read_bytes())["schema"] == 1
    assert msgspec.convert(msgspec.to_builtins(bundle.manifest), Manifest) == bundle.manifest
    return True


def test_a_manifest_with_one_altered_byte(path: Path) -> None:
    chance = random.Random(4)
    data = (path / "manifest.json").read_bytes()
    outcomes = set()
    for _ in range(500):
        altered = bytearray(data)
        altered[chance.randrange(len(data))] = chance.randrange(256)
        (path / "manifest.json").write_bytes(altered)
        outcomes.add(opens(path))
    assert outcomes == {True, False}


def test_a_manifest_with_bytes_lost_or_doubled(path: Path) -> None:
    chance = random.Random(5)
    data = (path / "manifest.json").read_bytes()
    for _ in range(200):
        start = chance.randrange(len(data))
        end = min(len(data), start + chance.randrange(1, 50))
        (path / "manifest.json").write_bytes(data[:start] + chance.choice([b"", 2 * data[start:end]]) + data[end:])
        opens(path)


def test_a_truncated_manifest(path: Path) -> None:
    data = (path / "manifest.json").read_bytes()
    for end in range(0, len(data) - 2, 7):
        (path / "manifest.json").write_bytes(data[:end])
        assert not opens(path)


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/hostname", "..", ".", "", "manifest.json", "a\\b", "sub/../x"])
def test_a_manifest_that_lists_what_no_bundle_has(path: Path, tmp_path: Path, name: str) -> None:
    """Even where there is a file of that name with the digest it says."""
    (tmp_path / "x").write_bytes(b"outside")
    digest = {"sha256": hashlib.sha256(b"outside").hexdigest(), "bytes": 7}
    edit(path, lambda manifest: manifest["files"].update({name: digest}))
    with pytest.raises(InputError, match=r"manifest.json lists a file named .*, which no bundle has"):
        open_bundle(path)


@pytest.mark.parametrize(
    "name",
    [
        "nul\0",
        "\ud800",
        "new\nline",
        pytest.param("long" * 100, id="too long"),
    ],
)
def test_a_manifest_that_lists_an_odd_name(path: Path, name: str) -> None:
    edit(path, lambda manifest: manifest["files"].update({name: {"sha256": "0" * 64, "bytes": 0}}))
    with pytest.raises(InputError):
        open_bundle(path)


def test_a_manifest_without_a_model(path: Path) -> None:
    edit(path, lambda manifest: manifest["files"].pop("model.onnx"))
    with pytest.raises(InputError, match=r"manifest.json lists no model.onnx"):
        open_bundle(path)


@pytest.mark.parametrize("schema", [2, 99, 10**30])
def test_a_newer_schema_says_to_upgrade(path: Path, schema: int) -> None:
    """Also when nothing else in it is as this version expects."""
    edit(path, lambda manifest: (manifest.clear(), manifest.update(schema=schema, nets=[])))
    with pytest.raises(InputError, match=rf"schema {schema}, this rxdeploy reads up to 1; install a newer one"):
        open_bundle(path)


@pytest.mark.parametrize(
    "schema",
    [
        "1",
        1.0,
        True,
        None,
        0,
        -1,
    ],
)
def test_a_schema_that_never_was(path: Path, schema: Any) -> None:
    edit(path, lambda manifest: manifest.update(schema=schema))
    with pytest.raises(InputError):
        open_bundle(path)


@pytest.mark.parametrize(
    "place",
    [
        (),
        ("target",),
        ("weights",),
        ("card",),
        ("counts",),
        ("inputs", 0),
        ("outputs", 0),
        ("tuning",),
        ("tuning", "cpu"),
    ],
    ids=lambda place: ".".join(map(str, place)) or "top",
)
def test_unknown_keys_are_tolerated(path: Path, place: tuple[str | int, ...]) -> None:
    edit(path, lambda manifest: manifest.update(tuning=msgspec.to_builtins(TUNING)))
    before = open_bundle(path).manifest

    def add(manifest: dict[str, Any]) -> None:
        part: Any = manifest
        for key in place:
            part = part[key]
        part["of a later version"] = [1, {"a": None}]

    edit(path, add)
    assert msgspec.structs.replace(open_bundle(path).manifest, digest=before.digest) == before


# Where a bundle may go


def test_an_absent_destination(tmp_path: Path) -> None:
    check_destination(tmp_path / "absent", "tiny", "fp16", False)
    check_destination(tmp_path / "no" / "parent", "tiny", "fp16", False)
    assert names(tmp_path) == [], "checking creates nothing"


@pytest.mark.parametrize("inside", ["in", "deeper/in"])
def test_nothing_is_put_into_a_bundle(tmp_path: Path, inside: str) -> None:
    write(tmp_path / "it")
    (tmp_path / "link").symlink_to(tmp_path / "it")
    before = names(tmp_path / "it")
    for way in ("it", "link"):
        with pytest.raises(InputError, match=rf"lies in the bundle {tmp_path / 'it'}; choose a place outside"):
            check_destination(tmp_path / way / inside, "tiny", "fp16", True)
    assert names(tmp_path / "it") == before


@pytest.mark.parametrize("manifest", ['{"name": "My web app"}', '{"files": {}, "schema": 1}', "[]", "no JSON", ""])
def test_other_programs_have_a_manifest_too(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "model.onnx").write_text("theirs")
    check_destination(tmp_path / "build" / "it", "tiny", "fp16", False)
    write(tmp_path / "build" / "it")


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    check_destination(tmp_path / "it", "tiny", "fp16", False)
    assert open_bundle(write(tmp_path / "it").path)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("what", ["file", "link", "dead link", "foreign folder"])
def test_what_is_no_bundle_is_never_replaced(tmp_path: Path, what: str, overwrite: bool) -> None:
    destination, elsewhere = tmp_path / "it", tmp_path / "elsewhere"
    write(elsewhere)
    if what == "file":
        destination.write_text("mine")
    elif what == "link":
        destination.symlink_to(elsewhere)
    elif what == "dead link":
        destination.symlink_to(tmp_path / "nowhere")
    else:
        destination.mkdir()
        (destination / "mine").write_text("mine")
    before = names(tmp_path)
    reason = (
        r"the folder exists and is no bundle \(it holds mine\)"
        if what == "foreign folder"
        else "exists and is not a folder"
    )
    with pytest.raises(InputError, match=rf"output {destination}: {reason}; choose another with -o"):
        write(destination, overwrite)
    assert names(tmp_path) == before
    if what == "foreign folder":
        assert content(destination) == {"mine": b"mine"}


def test_the_same_model_is_replaced(path: Path, tmp_path: Path) -> None:
    write_bundle(path, make_manifest(num_classes=3), {"model.onnx": b"new"}, overwrite=False)
    assert open_bundle(path).manifest.num_classes == 3
    assert names(path) == ["manifest.json", "model.onnx", "sbom.cdx.json"], "nothing of the old bundle stays"
    assert names(tmp_path) == ["it"]


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"model": "other"}, "a bundle of other in fp16"), ({"precision": "fp32"}, "a bundle of tiny in fp32")],
)
def test_another_model_is_replaced_only_when_told_so(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    path = write(tmp_path / "it", **changes).path
    before = content(path)
    with pytest.raises(InputError, match=rf"output {path}: holds {what}; choose another with -o, or pass --overwrite"):
        write(path)
    assert content(path) == before
    write(path, overwrite=True)
    assert (open_bundle(path).manifest.model, open_bundle(path).manifest.precision) == ("tiny", "fp16")


@pytest.mark.parametrize("damage", ["no JSON", "newer schema"])
def test_a_damaged_bundle_is_replaced_only_when_told_so(path: Path, damage: str) -> None:
    if damage == "no JSON":
        (path / "manifest.json").write_text("{")
    else:
        edit(path, lambda manifest: manifest.update(schema=2))
    with pytest.raises(InputError, match=r"holds a damaged or newer bundle; .*--overwrite"):
        write(path)
    written = write(path, overwrite=True)
    assert open_bundle(path) == written


def test_a_web_apps_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "manifest.json").write_text('{"name": "a web app", "icons": []}')
    (tmp_path / "it" / "index.html").write_text("mine")
    with pytest.raises(InputError, match="is no bundle"):
        write(tmp_path / "it", overwrite=True)


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_a_bundle_with_damaged_files_is_built_again_without_asking(path: Path, damage: Callable[[Path], None]) -> None:
    """As its errors say: build the bundle again."""
    damage(path / "engine.plan")
    write(path)
    open_bundle(path)


def test_the_working_directory_when_it_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle there, or an error about -o: not an exception that is no RxDeployError."""
    (tmp_path / "it").mkdir()
    monkeypatch.chdir(tmp_path / "it")
    try:
        write(Path("."))
    except InputError as error:
        assert "-o" in str(error)
    else:
        open_bundle(tmp_path / "it")


# Failures in the middle


def no_room(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("failure", ["source missing", "disk full", "disk full for the manifest", "interrupted"])
def test_a_failure_in_the_middle_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str, old: bool
) -> None:
    path = tmp_path / "it"
    if old:
        write(path)
        before = content(path)
    source = tmp_path / "source"
    source.write_bytes(b"new")
    error: type[BaseException] = OSError
    if failure == "source missing":
        source.unlink()
    elif failure == "disk full":
        monkeypatch.setattr(shutil, "copyfile", no_room)
    elif failure == "disk full for the manifest":
        monkeypatch.setattr(Path, "write_text", no_room)
    else:
        error = KeyboardInterrupt

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(shutil, "copyfile", interrupted)
    with pytest.raises(error):
        write_bundle(path, make_manifest(), {"model.onnx": b"new", "engine.plan": source}, overwrite=False)
    assert names(tmp_path) == [*(["it"] if old else []), *(["source"] if source.exists() else [])]
    if old:
        assert content(path) == before
        monkeypatch.undo()
        open_bundle(path)
