"""With `trusted_keys` nothing opens but what a trusted key signed; the OpenSSF library judges the same of each case."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rxdeploy import runtime
from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.bundle import open_bundle
from rxdeploy.errors import CheckFailed, EnvironmentLacks, InputError
from rxdeploy.runtime.plan import Plan
from rxdeploy.signing.keys import read_public_keys
from rxdeploy.signing.signature import check_signature

from .conftest import GOLDEN, Key, digests_of, reseal, statement_of


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# What is accepted


@pytest.mark.parametrize("as_given", [lambda key: key.public, lambda key: [str(key.public)], lambda key: [key.pem]])
def test_a_signed_bundle_opens(signed: Path, ours: Key, as_given: Callable[[Key], Any]) -> None:
    assert open_bundle(signed, as_given(ours)).signed_by == ours.fingerprint
    assert open_bundle(signed).signed_by is None, "without trusted keys nobody asked"


@pytest.mark.parametrize("name", ["on-256", "on-384", "on-521"])
def test_every_curve_of_the_format(
    unsigned: Path, keys: Callable[..., Key], theirs: Key, library: Callable[[Path, Path], bool], name: str
) -> None:
    key = keys(name)
    (unsigned / "model.sig").write_bytes(key.sign(statement_of(digests_of(unsigned))))
    assert open_bundle(unsigned, [theirs.pem, key.pem]).signed_by == key.fingerprint
    assert library(unsigned, key.public)


def test_a_signed_bundle_may_be_renamed(signed: Path, ours: Key, library: Callable[[Path, Path], bool]) -> None:
    moved = signed.rename(signed.with_name("elsewhere"))
    assert open_bundle(moved, ours.pem).signed_by
    assert library(moved, ours.public)


def test_a_link_to_a_bundle_is_none_in_it(signed: Path, ours: Key, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(signed)
    assert open_bundle(tmp_path / "current", ours.pem).signed_by


def test_the_session_of_a_signed_bundle(signed: Path, ours: Key) -> None:
    pytest.importorskip("onnxruntime")
    expected = np.load(GOLDEN / "expected.npz")
    with runtime.load(signed, "onnxruntime", trusted_keys=[ours.public]) as session:
        logits = session.run(expected["images"])
    assert np.linalg.norm(logits - expected["float32"]) < 1e-4 * np.linalg.norm(expected["float32"])


# What is refused: by us, and by the library unless the case says why not


def altered_and_resealed(folder: Path, key: Key) -> None:
    flip(folder / "model.onnx")
    reseal(folder, lambda manifest: None)


def resigned(folder: Path, key: Key) -> None:
    altered_and_resealed(folder, key)
    (folder / "model.sig").write_bytes(key.sign(statement_of(digests_of(folder))))


def resigned_under_our_name(folder: Path, key: Key) -> None:
    hint = json.loads((folder / "model.sig").read_text())["verificationMaterial"]
    altered_and_resealed(folder, key)
    (folder / "model.sig").write_bytes(key.sign(statement_of(digests_of(folder)), verificationMaterial=hint))


def resigned_without_a_name(folder: Path, key: Key) -> None:
    altered_and_resealed(folder, key)
    material: dict[str, Any] = {"publicKey": {}, "tlogEntries": []}
    (folder / "model.sig").write_bytes(key.sign(statement_of(digests_of(folder)), verificationMaterial=material))


def signature_under_another_name(folder: Path, key: Key) -> None:
    """Who signed is not signed itself; so this harms nobody, but the library refuses it."""
    signature = json.loads((folder / "model.sig").read_text())
    signature["verificationMaterial"]["publicKey"]["hint"] = key.fingerprint
    (folder / "model.sig").write_text(json.dumps(signature))


def new_payload_under_the_old_signature(folder: Path, key: Key) -> None:
    altered_and_resealed(folder, key)
    signature = json.loads((folder / "model.sig").read_text())
    payload = json.dumps(statement_of(digests_of(folder))).encode()
    signature["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    (folder / "model.sig").write_text(json.dumps(signature))


def file_added_to_the_manifest(folder: Path, key: Key) -> None:
    (folder / "engine.plan").write_bytes(b"native code")
    reseal(folder, lambda manifest: manifest["files"].update({"engine.plan": {}}))


def replaced_by_a_link(name: str) -> Callable[[Path, Key], object]:
    def replace(folder: Path, key: Key) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return replace


ATTACKS: dict[str, Callable[[Path, Key], object]] = {
    "no signature": lambda folder, key: (folder / "model.sig").unlink(),
    "an empty signature": lambda folder, key: (folder / "model.sig").write_bytes(b""),
    "another key's": resigned,
    "another key's under our name": resigned_under_our_name,
    "another key's without a name": resigned_without_a_name,
    "our key's under another name": signature_under_another_name,
    "a new payload under the old signature": new_payload_under_the_old_signature,
    "an altered model": lambda folder, key: flip(folder / "model.onnx"),
    "an altered model with its digest": altered_and_resealed,
    "altered labels": lambda folder, key: (folder / "labels.txt").write_text("x\n" * 7),
    "an altered manifest": lambda folder, key: reseal(folder, lambda manifest: manifest.update(model="other")),
    "a file more, in the manifest too": file_added_to_the_manifest,
    "a file less, in the manifest too": lambda folder, key: (
        (folder / "labels.txt").unlink(),
        reseal(folder, lambda manifest: manifest["files"].pop("labels.txt")),
    ),
    "a missing file": lambda folder, key: (folder / "labels.txt").unlink(),
    "a file besides": lambda folder, key: (folder / "engine.plan").write_bytes(b"native code"),
    "a file in a folder besides": lambda folder, key: (
        (folder / "sub").mkdir(),
        (folder / "sub" / "x").write_text("x"),
    ),
    "a link besides": lambda folder, key: (folder / "extra").symlink_to(folder / "labels.txt"),
    "a dead link besides": lambda folder, key: (folder / "extra").symlink_to("nowhere"),
    "a link to the same model": replaced_by_a_link("model.onnx"),
}
# The library lets pass git's own files, empty folders and a linked signature; we need not.
OURS_ALONE: dict[str, Callable[[Path, Key], object]] = {
    "a hidden file besides": lambda folder, key: (folder / ".gitattributes").write_text("x"),
    "an empty folder besides": lambda folder, key: (folder / "sub").mkdir(),
    "a link to the same signature": replaced_by_a_link("model.sig"),
    "bytes behind a NUL": lambda folder, key: (folder / "model.sig").write_bytes(
        (folder / "model.sig").read_bytes() + b"\0more"
    ),
    "a value of another type, and then the right one": lambda folder, key: (folder / "model.sig").write_text(
        '{"mediaType": 5, ' + (folder / "model.sig").read_text().lstrip("{")
    ),
    "a pipe for a signature": lambda folder, key: (
        (folder / "model.sig").unlink(),
        os.mkfifo(folder / "model.sig"),
    ),
    "a folder for a signature": lambda folder, key: ((folder / "model.sig").unlink(), (folder / "model.sig").mkdir()),
    "an endless signature": lambda folder, key: (folder / "model.sig").write_bytes(b" " * (2 << 20)),
    "a pipe besides": lambda folder, key: os.mkfifo(folder / "extra"),
}


@pytest.mark.parametrize("name", [*ATTACKS, *OURS_ALONE])
def test_what_is_not_as_it_was_signed(signed: Path, ours: Key, theirs: Key, name: str) -> None:
    assert open_bundle(signed, ours.pem)
    (ATTACKS | OURS_ALONE)[name](signed, theirs)
    with pytest.raises(CheckFailed, match=rf"^bundle {signed}: "):
        open_bundle(signed, ours.pem)
    with pytest.raises(CheckFailed):
        runtime.load(signed, trusted_keys=[ours.public])


@pytest.mark.parametrize("name", ATTACKS)
def test_the_library_says_the_same(
    signed: Path, ours: Key, theirs: Key, library: Callable[[Path, Path], bool], name: str
) -> None:
    assert library(signed, ours.public)
    ATTACKS[name](signed, theirs)
    assert not library(signed, ours.public)


def test_a_bundle_of_the_attackers_own_is_fine_to_who_trusts_the_attacker(signed: Path, ours: Key, theirs: Key) -> None:
    """The refusals above are of the key, not of a signature that was made wrong."""
    reseal(signed, lambda manifest: manifest.update(model="theirs"))
    (signed / "model.sig").write_bytes(theirs.sign(statement_of(digests_of(signed))))
    assert open_bundle(signed, theirs.pem).signed_by == theirs.fingerprint
    with pytest.raises(CheckFailed, match=f"made with the key {theirs.fingerprint[:8]}, trusted is"):
        open_bundle(signed, ours.pem)


def test_signatures_are_of_one_bundle(signed: Path, ours: Key, tmp_path: Path) -> None:
    """Parts of two bundles, both signed with the trusted key, make none."""
    other = Path(shutil.copytree(GOLDEN / "int8-tuned", tmp_path / "other"))
    (other / "model.sig").write_bytes(ours.sign(statement_of(digests_of(other))))
    assert open_bundle(other, ours.pem)
    for part in ("model.sig", "manifest.json", "model.onnx"):
        mixed = Path(shutil.copytree(signed, tmp_path / f"mixed-{part}"))
        shutil.copyfile(other / part, mixed / part)
        with pytest.raises(CheckFailed):
            open_bundle(mixed, ours.pem)


# What a trusted key signed, and is no list of a bundle's files


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], Any]:
    def make(statement: dict[str, Any]) -> Any:
        change(statement)
        return statement

    return make


def serialised(**keys: Any) -> Callable[[dict[str, Any]], Any]:
    return changed(lambda s: s["predicate"]["serialization"].update(keys))


def listed_twice(statement: dict[str, Any]) -> dict[str, Any]:
    resources = statement["predicate"]["resources"]
    resources.append(resources[0])
    digests = b"".join(bytes.fromhex(each["digest"]) for each in resources)
    statement["subject"][0]["digest"]["sha256"] = hashlib.sha256(digests).hexdigest()
    return statement


STATEMENTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": lambda s: b"",
    "no object": lambda s: [],
    "nested deep": lambda s: b"[" * 50_000 + b"]" * 50_000,
    "another type": changed(lambda s: s.update(_type="https://in-toto.io/Statement/v0.1")),
    "another predicate": changed(lambda s: s.update(predicateType="https://slsa.dev/provenance/v1")),
    "the old format": changed(lambda s: s.update(predicateType="https://model_signing/Digests/v0.1")),
    "shards": serialised(method="shards"),
    "another hash": serialised(hash_type="blake3"),
    "links allowed": serialised(allow_symlinks=True),
    "two subjects": changed(lambda s: s["subject"].append(s["subject"][0])),
    "another root": changed(lambda s: s["subject"][0]["digest"].update(sha256="0" * 64)),
    "a file twice": listed_twice,
    "a digest that is none": changed(lambda s: s["predicate"]["resources"][0].update(digest="xyz")),
    "a digest of another kind": changed(lambda s: s["predicate"]["resources"][0].update(algorithm="md5")),
    "no manifest": lambda s: statement_of(
        {r["name"]: r["digest"] for r in s["predicate"]["resources"] if r["name"] != "manifest.json"}
    ),
    "a file outside": lambda s: statement_of(
        {r["name"]: r["digest"] for r in s["predicate"]["resources"]} | {"../x": "0" * 64}
    ),
    "no files": lambda s: statement_of({}),
    "bytes behind a NUL": lambda s: json.dumps(s).encode() + b"\0more",
    "a value of another type, and then the right one": lambda s: b'{"predicate": 5, ' + json.dumps(s).encode()[1:],
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_other_things_that_the_key_signed(signed: Path, ours: Key, name: str) -> None:
    statement = STATEMENTS[name](statement_of(digests_of(signed)))
    (signed / "model.sig").write_bytes(ours.sign(statement))
    with pytest.raises(CheckFailed, match=rf"^bundle {signed}: "):
        open_bundle(signed, ours.pem)


FORMS: dict[str, dict[str, Any]] = {
    "another payload": {"kind": "text/plain"},
    "a payload that says to be another": {"envelope": {"payloadType": "text/plain"}},
    "another bundle": {"mediaType": "application/vnd.dev.sigstore.bundle.v0.2+json"},
    "a certificate": {"verificationMaterial": {"certificate": {"rawBytes": ""}}},
    "no signature": {"envelope": {"signatures": []}},
    "two": {"envelope": {"signatures": [{"sig": "AAAA"}, {"sig": "AAAA"}]}},
    "no ECDSA": {"envelope": {"signatures": [{"sig": "AAAA"}]}},
    "no base64": {"envelope": {"signatures": [{"sig": "!"}]}},
    "no ASCII": {"envelope": {"payload": "é"}},
}


@pytest.mark.parametrize("name", FORMS)
def test_signatures_of_another_form(signed: Path, ours: Key, name: str) -> None:
    (signed / "model.sig").write_bytes(ours.sign(statement_of(digests_of(signed)), **FORMS[name]))
    with pytest.raises(CheckFailed, match=rf"^bundle {signed}: "):
        open_bundle(signed, ours.pem)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 7)), min_size=1, max_size=3))
def test_no_damage_to_a_signature_changes_what_it_says(ours: Key, flips: list[tuple[int, int]]) -> None:
    files = {"manifest.json": "ab" * 32, "model.onnx": "cd" * 32}
    signature = bytearray(ours.sign(statement_of(files)))
    for position, bit in flips:
        signature[position % len(signature)] ^= 1 << bit
    try:
        found = check_signature(bytes(signature), read_public_keys(ours.pem))
    except CheckFailed:
        return
    assert found.files == files


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_any_bytes_are_no_signature(ours: Key, data: bytes) -> None:
    with pytest.raises(CheckFailed):
        check_signature(data, read_public_keys(ours.pem))


# Keys


def no_keys(ours: Key) -> list[tuple[bytes, str]]:
    """What is no public key to trust, and a word of the refusal."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    def pem(key: Any) -> bytes:
        return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    return [
        (b"", "no public key"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "no public key"),
        (ours.private.read_bytes(), "is a private key"),
        (pem(ed25519.Ed25519PrivateKey.generate()), "P-256"),
        (pem(ec.generate_private_key(ec.SECP256K1())), "P-256"),
    ]


def test_keys_that_are_none(signed: Path, ours: Key, tmp_path: Path) -> None:
    for keys, words in (
        ([], "none given"),
        ([tmp_path / "absent"], "no such file"),
        ([tmp_path], "not a plain file"),
        ([ours.pem, b"x"], "no public key"),
        *(([key], words) for key, words in no_keys(ours)),
    ):
        with pytest.raises(InputError, match=words):
            open_bundle(signed, keys)


def test_what_is_no_bundle_is_bad_input_all_the_same(tmp_path: Path, ours: Key) -> None:
    with pytest.raises(InputError, match="not a bundle"):
        open_bundle(tmp_path, ours.pem)


def test_without_cryptography(signed: Path, ours: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(EnvironmentLacks, match=r"pip install 'rxdeploy\[verify\]' adds it"):
        runtime.load(signed, trusted_keys=ours.pem)
    assert open_bundle(signed)


def test_a_light_runtime(signed: Path, ours: Key) -> None:
    """What a serving host imports: nothing for signatures before one is checked, and then only cryptography."""
    code = (
        "import sys, rxdeploy.runtime; from rxdeploy.engines.bundle import open_bundle\n"
        "heavy = lambda: {m.partition('.')[0] for m in sys.modules} & "
        "{'torch', 'onnx', 'model_signing', 'sigstore', 'pydantic', 'google', 'cryptography'}\n"
        "assert not heavy(), heavy()\n"
        f"open_bundle(__import__('pathlib').Path({str(signed)!r}), {str(ours.public)!r})\n"
        "assert heavy() == {'cryptography'}, heavy()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# What was checked is what is loaded


class _Recorder:
    """TensorRT's runtime, as far as reaching it with a plan; it keeps what it is handed."""

    handed: list[bytes]

    def __init__(self, logger: object) -> None:
        type(self).handed = []

    def deserialize_cuda_engine(self, data: bytes) -> None:
        self.handed.append(bytes(data))


def open_plan(bundle: bundles.Bundle, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Do what a session does with a plan, on a TensorRT that takes none: EnvironmentLacks where it gets that far."""
    trt = SimpleNamespace(__version__="1", Runtime=_Recorder)
    monkeypatch.setitem(sys.modules, "tensorrt_of_this_test", trt)  # type: ignore[arg-type]
    monkeypatch.setattr("rxdeploy.runtime.plan.logger_for", lambda trt, messages: None)
    plan = Plan.__new__(Plan)
    plan._gpu = SimpleNamespace(compute_capability=(8, 6), name="Test")  # type: ignore[assignment]
    plan._messages = SimpleNamespace(summary=lambda: "refused")  # type: ignore[assignment]
    plan._open(bundle, SimpleNamespace(module="tensorrt_of_this_test", install=""))  # type: ignore[arg-type]
    return plan


@pytest.fixture
def with_plan(signed: Path, ours: Key) -> Path:
    (signed / "engine.plan").write_bytes(b"a plan")
    engine = json.loads((GOLDEN / "float16-rtx-manifest.json").read_text())["engine"]
    reseal(signed, lambda manifest: manifest["files"].update({"engine.plan": {}}) or manifest.update(engine=engine))
    (signed / "model.sig").write_bytes(ours.sign(statement_of(digests_of(signed))))
    return signed


@pytest.mark.parametrize("trusting", [True, False])
def test_an_exchanged_plan_never_reaches_tensorrt(
    with_plan: Path, ours: Key, monkeypatch: pytest.MonkeyPatch, trusting: bool
) -> None:
    bundle = open_bundle(with_plan, ours.pem if trusting else None)
    with pytest.raises(EnvironmentLacks, match="refused"):
        open_plan(bundle, monkeypatch)
    assert _Recorder.handed == [b"a plan"]
    (with_plan / "engine.plan").write_bytes(b"a PLAN")  # after everything was checked
    with pytest.raises(CheckFailed if trusting else InputError, match=r"engine\.plan was altered"):
        open_plan(bundle, monkeypatch)
    assert _Recorder.handed == []


def test_an_exchanged_plan_is_not_read_twice(with_plan: Path, ours: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that are digested are those that are handed over; what is there a moment later does not matter."""
    bundle, compute = open_bundle(with_plan, ours.pem), hashlib.sha256

    def exchange(data: bytes = b"") -> Any:
        (with_plan / "engine.plan").write_bytes(b"a PLAN")
        return compute(data)

    monkeypatch.setattr(hashlib, "sha256", exchange)
    with pytest.raises(EnvironmentLacks, match="refused"):
        open_plan(bundle, monkeypatch)
    assert _Recorder.handed == [b"a plan"]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_exchanged_model_never_reaches_an_engine(
    signed: Path, ours: Key, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    from rxdeploy.runtime.cpu import open_cpu_engine

    pytest.importorskip(engine)
    bundle = open_bundle(signed, ours.pem)
    open_cpu_engine(bundle, engine=engine).close()  # type: ignore[arg-type]
    flip(signed / "model.onnx")
    reached: list[object] = []
    monkeypatch.setattr("rxdeploy.runtime.onnxrt.open_session", lambda *given, **more: reached.append(given))
    monkeypatch.setattr("rxdeploy.runtime.openvino.read_model", lambda *given, **more: reached.append(given))
    with pytest.raises(CheckFailed, match=r"model\.onnx was altered.*it is not what was signed"):
        open_cpu_engine(bundle, engine=engine)  # type: ignore[arg-type]
    assert not reached


def test_exchanged_labels_are_not_taken(signed: Path, ours: Key) -> None:
    bundle = open_bundle(signed, ours.pem)
    (signed / "labels.txt").write_text((signed / "labels.txt").read_text().replace("a", "b"))
    with pytest.raises(CheckFailed, match=r"labels\.txt was altered"):
        bundle.labels()
