"""The predictions file: whole, half done, damaged, and somebody else's."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from rxdeploy.errors import InputError
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
        file.finish([])
    assert len(path.read_text().splitlines()) == 1


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
