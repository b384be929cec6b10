"""The predictions file: whole, half done, damaged, and somebody else's."""

from __future__ import annotations

import errno
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rxdeploy.errors import EnvironmentLacks, InputError
from rxdeploy.evaluation.predictions import Header, Predicted, PredictionsFile, Skipped

HEADER = Header(model="m", precision="fp16", bundle="b" * 64, device="ONNX Runtime on CPU", data="d" * 64, images=4)
ONE, TWO, THREE = (Predicted(f"{n}.jpg", f"{n:064x}", n, (n, 7), 0.5) for n in range(3))
BAD = Skipped("4.jpg", "truncated")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "predictions.jsonl"


def test_it_appears_whole(path: Path) -> None:
    with PredictionsFile(path, HEADER) as file:
        file.add([ONE, TWO])
        assert not path.exists()
        file.add([THREE])
        file.finish([BAD])
    assert [entry.name for entry in path.parent.iterdir()] == ["predictions.jsonl"]
    header, *lines = map(json.loads, path.read_text().splitlines())
    assert (header["kind"], header["schema"], header["images"]) == ("rxdeploy predictions", 1, 4)
    assert lines[0] == {"image": "0.jpg", "sha256": "0" * 64, "label": 0, "top": [0, 7], "probability": 0.5}
    assert lines[3] == {"image": "4.jpg", "skipped": "truncated"}
    with PredictionsFile(path, HEADER) as again:
        assert again.whole and list(again.done.values()) == [ONE, TWO, THREE] and again.skipped == [BAD]


@pytest.mark.parametrize("torn", [b"", b'{"image":"2.jp', b"\xff\xfe{"])
def test_it_goes_on_from_the_last_whole_line(path: Path, torn: bytes) -> None:
    with PredictionsFile(path, HEADER) as file:
        file.add([ONE, TWO])
    partial = path.with_name("predictions.jsonl.partial")
    partial.write_bytes(partial.read_bytes() + torn)
    with PredictionsFile(path, HEADER) as file:
        assert not file.whole and list(file.done) == ["0.jpg", "1.jpg"]
        file.add([THREE])
        file.finish([])
    assert [json.loads(line)["image"] for line in path.read_text().splitlines()[1:]] == ["0.jpg", "1.jpg", "2.jpg"]
    assert not partial.exists()


def test_a_header_cut_off_is_a_new_beginning(path: Path) -> None:
    path.parent.mkdir()
    path.with_name("predictions.jsonl.partial").write_bytes(b'{"kind":"rxdep')
    with PredictionsFile(path, HEADER) as file:
        assert not file.done
        file.add([ONE])
        file.finish([])
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("key", ["bundle", "device", "data", "images"])
def test_another_evaluations_file_is_refused_and_kept(path: Path, key: str, finished: bool) -> None:
    with PredictionsFile(path, HEADER) as file:
        file.add([ONE])
        if finished:
            file.finish([])
    there = next(path.parent.iterdir())
    before = there.read_bytes()
    other = msgspec.structs.replace(HEADER, **{key: 5 if key == "images" else "other"})
    with pytest.raises(InputError, match=rf"predictions .*another bundle, device or data \(its {key} is .*delete it"):
        PredictionsFile(path, other)
    assert there.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no predictions file"),
        (b"name,label\n", "is no predictions file"),
        (b'{"kind":"something else"}\n', "is no predictions file"),
        (msgspec.json.encode(HEADER) + b"\n{}\n", "line 2 is damaged"),
        (
            msgspec.json.encode(HEADER) + b'\n{"image":"0.jpg","label":1}\n',
            "line 2 is damaged: the line of 0.jpg lacks",
        ),
        (msgspec.json.encode(HEADER) + b"\n\xff\n", "line 2 is damaged"),
    ],
)
def test_what_is_none_is_refused_and_kept(path: Path, content: bytes, message: str) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        PredictionsFile(path, HEADER)
    assert path.read_bytes() == content


def test_two_writers(path: Path) -> None:
    with PredictionsFile(path, HEADER), pytest.raises(InputError, match="another process is writing it"):
        PredictionsFile(path, HEADER)
    PredictionsFile(path, HEADER).close()


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        PredictionsFile(tmp_path, HEADER)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="predictions"):
        PredictionsFile(tmp_path / "file" / "p.jsonl", HEADER)
    for nameless in (Path("."), Path("/"), Path("..")):
        with pytest.raises(InputError, match="is a folder"):
            PredictionsFile(nameless, HEADER)


def finished(path: Path) -> list[bytes]:
    """The lines of a whole file of four images."""
    with PredictionsFile(path, HEADER) as file:
        file.add([ONE, TWO, THREE])
        file.finish([BAD])
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_a_whole_file_that_was_cut_off_is_refused(path: Path, kept: int) -> None:
    lines = finished(path)
    path.write_bytes(b"".join(lines[:kept]))
    with pytest.raises(InputError, match=rf"has {kept - 1} of its 4 images, so it was cut off; rename it to .*partial"):
        PredictionsFile(path, HEADER)
    path.rename(path.with_name(path.name + ".partial"))  # the way out
    with PredictionsFile(path, HEADER) as file:
        assert len(file.done) == kept - 1


def test_a_whole_file_with_a_line_too_many_is_refused(path: Path) -> None:
    lines = finished(path)
    path.write_bytes(b"".join([*lines, lines[1]]))
    with pytest.raises(InputError, match="5 lines for 4 images, so it is damaged"):
        PredictionsFile(path, HEADER)


def test_killed_before_the_rename_nothing_is_doubled(path: Path) -> None:
    lines = finished(path)
    path.rename(path.with_name(path.name + ".partial"))
    with PredictionsFile(path, HEADER) as file:
        assert len(file.done) == 3 and not file.skipped
        file.finish([BAD])
    assert path.read_bytes().splitlines(keepends=True) == lines


class FullDisk:
    """An open file on a disk without room: what is buffered cannot be written when it is closed either."""

    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    flush = close = write


def test_a_full_disk_is_said_once_and_cleanly(path: Path) -> None:
    full: Any = FullDisk()
    full.close = lambda: full.write(b"")
    file = PredictionsFile(path, HEADER)
    with pytest.raises(EnvironmentLacks, match="No space left on device; free some room") as caught, file:
        file.close()
        file._file = full
        file.add([ONE])
    assert caught.value.exit_code == 3
    file._file = full
    with pytest.raises(EnvironmentLacks, match="No space left"):
        file.close()


def test_what_is_no_plain_file(path: Path) -> None:
    path.parent.mkdir()
    os.mkfifo(path)
    with pytest.raises(InputError, match="no plain file"):
        PredictionsFile(path, HEADER)
    with pytest.raises(InputError, match="File name too long"):
        PredictionsFile(path.with_name("x" * 300), HEADER)


def test_a_large_file_is_not_held_in_memory_twice(path: Path) -> None:
    count = 20_000
    header = msgspec.structs.replace(HEADER, images=count)
    with PredictionsFile(path, header) as file:
        file.add([msgspec.structs.replace(ONE, image=f"{n}.jpg") for n in range(count)])
        file.finish([])
    size = path.stat().st_size
    tracemalloc.start()
    try:
        with PredictionsFile(path, header) as file:
            kept, peak = tracemalloc.get_traced_memory()
            assert len(file.done) == count
    finally:
        tracemalloc.stop()
    assert peak - kept < size / 2
