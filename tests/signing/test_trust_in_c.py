"""The C library trusts what the Python runtime trusts, and refuses the rest in its words.

`make cpp-test` builds it and runs these; without a build they are skipped. RXDEPLOY_CPP_LIBRARY names another one.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rxdeploy.engines.bundle import open_bundle
from rxdeploy.errors import CheckFailed, InputError, RxDeployError

from .conftest import Key, digests_of, reseal, statement_of
from .test_trust import ATTACKS, FORMS, OURS_ALONE, STATEMENTS, no_keys

sys.path.insert(0, str(Path(__file__).parents[1] / "cpp"))
from rxdeploy_c import Failed, Library, Session

BUILT = Path(os.environ.get("RXDEPLOY_CPP_LIBRARY") or Path(__file__).parents[2] / "cpp/build/release/librxdeploy.so")
# What follows these words is a JSON reader's, or the system's.
REASONS = re.compile(r"(with a key|lists no files|cannot be read|model\.sig): .*")

pytestmark = pytest.mark.skipif(not BUILT.exists(), reason="the C library is not built; `make cpp-test` builds it")
InC = Callable[..., "tuple[int, str]"]


@pytest.fixture(scope="session")
def in_c() -> InC:
    """What rxdeploy_verify_bundle gives for a bundle and files of public keys: the status and the message."""
    library = Library(BUILT)

    def verify(folder: Path, *keys: Path) -> tuple[int, str]:
        given = (ctypes.c_char_p * len(keys))(*map(os.fsencode, keys))
        try:
            library.call("verify_bundle", os.fsencode(folder), given, ctypes.c_size_t(len(keys)))
        except Failed as failed:
            return failed.status, str(failed)
        return 0, ""

    return verify


def in_python(folder: Path, *keys: Path) -> tuple[int, str]:
    try:
        open_bundle(folder, list(keys))
    except RxDeployError as error:
        return error.exit_code, str(error)
    return 0, ""


def agree(in_c: InC, folder: Path, *keys: Path) -> int:
    """Their common status; the messages are the same, but for reasons of others."""
    theirs, ours = in_python(folder, *keys), in_c(folder, *keys)
    assert ours[0] == theirs[0], (ours, theirs)
    assert REASONS.sub(r"\1", ours[1]) == REASONS.sub(r"\1", theirs[1])
    return ours[0]


@pytest.mark.parametrize("name", [*ATTACKS, *OURS_ALONE])
def test_what_is_not_as_it_was_signed(signed: Path, ours: Key, theirs: Key, in_c: InC, name: str) -> None:
    assert agree(in_c, signed, ours.public) == 0
    (ATTACKS | OURS_ALONE)[name](signed, theirs)
    assert agree(in_c, signed, ours.public) == CheckFailed.exit_code


def test_a_link_to_the_manifest(signed: Path, ours: Key, in_c: InC, tmp_path: Path) -> None:
    (signed / "manifest.json").rename(tmp_path / "manifest.json")
    (signed / "manifest.json").symlink_to(tmp_path / "manifest.json")
    assert agree(in_c, signed, ours.public) == InputError.exit_code


def test_a_name_twice_is_refused_in_c(signed: Path, ours: Key, in_c: InC) -> None:
    """Python takes the last one; what it means is what was signed all the same."""
    text = (signed / "model.sig").read_text()
    (signed / "model.sig").write_text('{"mediaType": "x", ' + text.lstrip("{"))
    status, message = in_c(signed, ours.public)
    assert status == CheckFailed.exit_code and "it has a name twice: mediaType" in message


@pytest.mark.parametrize("file", ["a\x01b", "a\x7fb", "\u200b"])
def test_files_with_names_that_nobody_sees(signed: Path, ours: Key, in_c: InC, file: str) -> None:
    (signed / file).write_text("more")
    reseal(signed, lambda manifest: manifest["files"].update({file: {"sha256": "", "bytes": 0}}))
    (signed / "model.sig").write_bytes(ours.sign(statement_of(digests_of(signed))))
    assert in_python(signed, ours.public)[0] == in_c(signed, ours.public)[0] == CheckFailed.exit_code


@pytest.mark.parametrize("tag", [b"\x6a", b"\xea\x00", b"\xea\x80\x80\x80\x10"])
def test_weights_in_other_files(signed: Path, ours: Key, in_c: InC, tag: bytes) -> None:
    """Also where the field's tag is written in another way, which parsers take for the same."""
    onnx = pytest.importorskip("onnx")
    graph = onnx.GraphProto()
    tensor = graph.initializer.add(name="elsewhere", dims=[1], data_type=1)
    entry = onnx.StringStringEntryProto(key="location", value="weights.bin").SerializeToString()
    outside = tensor.SerializeToString() + tag + bytes([len(entry)]) + entry + b"\x70\x01"
    more = b"\x2a" + bytes([len(outside)]) + outside  # an initializer of another piece of the graph
    with (signed / "model.onnx").open("ab") as file:
        file.write(b"\x3a" + bytes([len(more)]) + more)
    reseal(signed, lambda manifest: None)
    (signed / "model.sig").write_bytes(ours.sign(statement_of(digests_of(signed))))
    assert agree(in_c, signed, ours.public) == InputError.exit_code
    assert "weights in other files" in in_c(signed, ours.public)[1]


@pytest.mark.parametrize("name", STATEMENTS)
def test_other_things_that_the_key_signed(signed: Path, ours: Key, in_c: InC, name: str) -> None:
    (signed / "model.sig").write_bytes(ours.sign(STATEMENTS[name](statement_of(digests_of(signed)))))
    assert agree(in_c, signed, ours.public) == CheckFailed.exit_code


@pytest.mark.parametrize("name", FORMS)
def test_signatures_of_another_form(signed: Path, ours: Key, in_c: InC, name: str) -> None:
    (signed / "model.sig").write_bytes(ours.sign(statement_of(digests_of(signed)), **FORMS[name]))
    assert agree(in_c, signed, ours.public) == CheckFailed.exit_code


def test_every_part_of_a_signature_missing_or_of_another_type(signed: Path, ours: Key, in_c: InC) -> None:
    whole = json.loads(ours.sign(statement_of(digests_of(signed))))
    statement = statement_of(digests_of(signed))
    seen = set()

    def paths(value: object, path: tuple = ()) -> list[tuple]:
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [*([path] if path else []), *(each for key, part in inner for each in paths(part, (*path, key)))]

    def changed(value: object, path: tuple, new: object) -> object:
        copy = json.loads(json.dumps(value))
        place = copy
        for key in path[:-1]:
            place = place[key]
        if new is None and isinstance(place, dict):
            del place[path[-1]]
        else:
            place[path[-1]] = new
        return copy

    for new in (None, 1, "", [], {}, True, ["x"], {"x": 1}):
        for path in paths(whole):
            (signed / "model.sig").write_text(json.dumps(changed(whole, path, new)))
            seen.add(agree(in_c, signed, ours.public))
        for path in paths(statement):
            (signed / "model.sig").write_bytes(ours.sign(changed(statement, path, new)))
            seen.add(agree(in_c, signed, ours.public))
    assert seen == {0, 1}  # some parts are not needed


def test_damaged_signatures(signed: Path, ours: Key, in_c: InC) -> None:
    """A thousand flips and cuts, among them of the base64 and the DER inside."""
    chance, data = random.Random(7), (signed / "model.sig").read_bytes()
    envelope = json.loads(data)["dsseEnvelope"]
    for number in range(1000):
        damaged = bytearray(data)
        if number % 4 == 0:
            der = bytearray(base64.b64decode(envelope["signatures"][0]["sig"]))
            der[chance.randrange(len(der))] ^= 1 << chance.randrange(8)
            old = envelope["signatures"][0]["sig"].encode()
            damaged = bytearray(data.replace(old, base64.b64encode(der)))
        elif number % 4 == 1:
            del damaged[chance.randrange(len(damaged)) :]
        else:
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        (signed / "model.sig").write_bytes(damaged)
        agree(in_c, signed, ours.public)


@pytest.mark.parametrize("name", ["in-c-256", "in-c-384", "in-c-521"])
def test_every_curve_and_several_keys(
    unsigned: Path, keys: Callable[..., Key], theirs: Key, in_c: InC, name: str
) -> None:
    key = keys(name)
    (unsigned / "model.sig").write_bytes(key.sign(statement_of(digests_of(unsigned))))
    assert agree(in_c, unsigned, theirs.public, key.public) == 0
    assert agree(in_c, unsigned, theirs.public) == CheckFailed.exit_code


def test_a_key_written_in_another_way(signed: Path, ours: Key, in_c: InC, tmp_path: Path) -> None:
    """Its name is of the key, not of the file: with a text before it, and its point compressed."""
    compressed = tmp_path / "compressed.pub"
    command = ["openssl", "ec", "-pubin", "-in", ours.public, "-conv_form", "compressed", "-out", compressed]
    if subprocess.run([*command], capture_output=True).returncode:
        pytest.skip("needs the openssl command")
    compressed.write_bytes(b"the release key\n" + compressed.read_bytes())
    assert compressed.read_bytes() != ours.pem
    assert agree(in_c, signed, compressed) == 0


def test_keys_that_are_none(signed: Path, ours: Key, in_c: InC, tmp_path: Path) -> None:
    file = tmp_path / "key"
    cases = [*no_keys(ours), (b"x" * (1 << 17), "")]
    for content, words in cases:
        file.write_bytes(content)
        status, message = in_c(signed, file)
        assert status == InputError.exit_code and message.startswith(f"key {file}: ") and words in message
        assert in_python(signed, file)[0] == status
    (signed / "model.sig").unlink()  # the key is looked at first
    assert in_c(signed, file)[0] == InputError.exit_code
    for path in (tmp_path, tmp_path / "absent"):
        assert agree(in_c, signed, path) == InputError.exit_code
    assert agree(in_c, signed) == InputError.exit_code


def test_what_is_no_bundle(tmp_path: Path, ours: Key, in_c: InC) -> None:
    assert agree(in_c, tmp_path, ours.public) == InputError.exit_code


def test_a_session_opens_what_is_trusted(signed: Path, ours: Key, theirs: Key) -> None:
    library = Library(BUILT)
    for key, status in ((ours, None), (theirs, CheckFailed.exit_code)):
        trusted = (ctypes.c_char_p * 1)(os.fsencode(key.public))
        options = {"trusted_keys": trusted, "trusted_key_count": 1, "device": b"cpu"}
        try:
            Session(library, signed, **options)
            found = None
        except Failed as failed:
            # 3: trusted, and no ONNX Runtime where the library looks for it
            found = None if failed.status == 3 else failed.status
        assert found == status
    with pytest.raises(Failed, match="none given"):
        Session(library, signed, trusted_keys=trusted, trusted_key_count=0)
    with pytest.raises(Failed, match="trusted_keys is NULL"):
        Session(library, signed, trusted_key_count=1)
