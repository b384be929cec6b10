"""`rxdeploy sign` and `verify`: what they write any OpenSSF tool takes, and what they say can be relied on."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("model_signing", reason="these tests need rxdeploy[sign]")

from rxdeploy.cli import run
from rxdeploy.engines.bundle import open_bundle
from rxdeploy.errors import CheckFailed, EnvironmentLacks, InputError
from rxdeploy.signing.sign import sign, verify

from .conftest import GOLDEN, Key, digests_of, reseal, statement_of


def resources(folder: Path) -> dict[str, str]:
    """What a signature says it is of, read without rxdeploy."""
    signature = json.loads((folder / "model.sig").read_text())
    statement = json.loads(base64.b64decode(signature["dsseEnvelope"]["payload"]))
    return {each["name"]: each["digest"] for each in statement["predicate"]["resources"]}


def test_everything_is_signed(unsigned: Path, ours: Key) -> None:
    before = digests_of(unsigned)
    bundle = sign(unsigned, ours.private)
    assert resources(unsigned) == before == digests_of(unsigned)
    assert "manifest.json" in before
    assert bundle.signed_by == ours.fingerprint
    assert open_bundle(unsigned, ours.public).signed_by == verify(unsigned, [ours.public]).signed_by == ours.fingerprint


@pytest.mark.parametrize("name", ["a-256", "a-384", "a-521"])
def test_the_librarys_own_command_takes_it(unsigned: Path, keys: Callable[..., Key], name: str) -> None:
    """And the other way round."""
    key, signature = keys(name), unsigned / "model.sig"
    command = [sys.executable, "-m", "model_signing"]
    sign(unsigned, key.private)
    check = [*command, "verify", "key", unsigned, "--signature", signature, "--public_key", key.public]
    assert subprocess.run(check, capture_output=True).returncode == 0
    signature.unlink()
    make = [*command, "sign", "key", unsigned, "--signature", signature, "--private_key", key.private]
    subprocess.run(make, check=True, capture_output=True)
    assert verify(unsigned, key.pem).signed_by == key.fingerprint


def test_signing_again_replaces_the_signature(signed: Path, ours: Key, theirs: Key) -> None:
    sign(signed, theirs.private)
    assert open_bundle(signed, theirs.pem)
    with pytest.raises(CheckFailed):
        open_bundle(signed, ours.pem)


def test_an_encrypted_key(unsigned: Path, keys: Callable[..., Key], tmp_path: Path) -> None:
    key = keys("locked", b"secret word")
    with pytest.raises(InputError, match="is encrypted; give its password with --password-file"):
        sign(unsigned, key.private)
    with pytest.raises(InputError, match="the password is another one"):
        sign(unsigned, key.private, b"other")
    assert not (unsigned / "model.sig").exists()
    assert sign(unsigned, key.private, b"secret word").signed_by == key.fingerprint
    (unsigned / "model.sig").unlink()
    (tmp_path / "password").write_bytes(b"secret word\r\n")
    assert run(["sign", str(unsigned), "--key", str(key.private), "--password-file", str(tmp_path / "password")]) == 0


def test_a_needless_password_is_none(unsigned: Path, ours: Key) -> None:
    assert sign(unsigned, ours.private, b"anything").signed_by == ours.fingerprint


def test_keys_that_cannot_sign(unsigned: Path, ours: Key, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    for index, other in enumerate([ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256K1())]):
        pem = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (tmp_path / f"{index}.pem").write_bytes(pem)
    (tmp_path / "text").write_text("secret")
    for path, words in (
        (tmp_path / "0.pem", "P-256"),
        (tmp_path / "1.pem", "P-256"),
        (tmp_path / "text", "no private key"),
        (ours.public, "no private key"),
        (tmp_path / "absent", "no such file"),
        (tmp_path, "not a plain file"),
    ):
        with pytest.raises(InputError, match=words):
            sign(unsigned, path)
    assert not (unsigned / "model.sig").exists()


def test_what_is_not_signed(unsigned: Path, ours: Key, tmp_path: Path) -> None:
    """No signature for a bundle that is damaged, or has more in it than it should."""
    (unsigned / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt in it is not the bundle's"):
        sign(unsigned, ours.private)
    (unsigned / "notes.txt").unlink()
    (unsigned / "labels.txt").write_text("x")
    with pytest.raises(InputError, match=r"labels\.txt has 1 bytes"):
        sign(unsigned, ours.private)
    with pytest.raises(InputError, match="not a bundle"):
        sign(tmp_path / "absent", ours.private)
    assert not (unsigned / "model.sig").exists()


def test_a_bundle_that_changes_while_it_is_signed(unsigned: Path, ours: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library reads is not what was checked before: no signature is left behind."""
    import model_signing.signing

    library = model_signing.signing.Config.sign

    def meanwhile(self: Any, path: Path, signature: Path) -> None:
        (unsigned / "labels.txt").write_text("changed\n" * 7)
        library(self, path, signature)

    monkeypatch.setattr(model_signing.signing.Config, "sign", meanwhile)
    with pytest.raises(CheckFailed, match="list different files"):
        sign(unsigned, ours.private)
    assert not (unsigned / "model.sig").exists()
    assert {path.name for path in unsigned.iterdir()} == {"manifest.json", "model.onnx", "labels.txt"}


def test_the_library_has_its_say(signed: Path, ours: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify` refuses what either of the two refuses."""
    import model_signing.verifying

    def refuse(self: object, *given: object) -> None:
        raise ValueError("not mine")

    monkeypatch.setattr(model_signing.verifying.Config, "verify", refuse)
    with pytest.raises(CheckFailed, match="model-signing refuses it: not mine"):
        verify(signed, ours.pem)


def test_without_the_library(signed: Path, ours: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "model_signing"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for call in (lambda: sign(signed, ours.private), lambda: verify(signed, ours.pem)):
        with pytest.raises(EnvironmentLacks, match=r"pip install 'rxdeploy\[sign\]' adds it"):
            call()


# The command line


def test_sign_and_verify(unsigned: Path, ours: Key, theirs: Key, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(unsigned), "--key", str(ours.public)]) == 1
    assert "is not signed" in capsys.readouterr().err
    assert run(["sign", str(unsigned), "--key", str(ours.private)]) == 0
    assert ours.fingerprint in capsys.readouterr().out
    assert run(["verify", str(unsigned), "--key", str(theirs.public), "--key", str(ours.public)]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in digests_of(unsigned))
    assert run(["verify", str(unsigned), "--key", str(ours.public), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["signed_by"] == ours.fingerprint
    files = {name: file["sha256"] for name, file in facts["files"].items()}
    assert files == {name: digest for name, digest in digests_of(unsigned).items() if name != "manifest.json"}
    assert run(["verify", str(unsigned), "--key", str(theirs.public)]) == 1
    assert "trusted" in capsys.readouterr().err
    assert run(["verify", str(unsigned), "--key", str(ours.private)]) == 2
    assert run(["verify", str(unsigned / "absent"), "--key", str(ours.public)]) == 2
    (unsigned / "model.onnx").write_bytes(b"")
    assert run(["verify", str(unsigned), "--key", str(ours.public)]) == 1


@pytest.mark.parametrize(
    "command",
    [
        ["classify", "BUNDLE", "image.png"],
        ["bench", "BUNDLE", "--seconds", "0.01"],
        ["evaluate", "BUNDLE", "--data", "data.npz"],
        ["package", "BUNDLE", "--format", "triton", "-o", "repository"],
    ],
    ids=lambda command: command[0],
)
def test_commands_that_load_refuse_too(
    signed: Path, theirs: Key, command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before they do anything else."""
    monkeypatch.chdir(signed.parent)
    shutil.copyfile(GOLDEN / "expected.npz", signed.parent / "data.npz")
    arguments = [str(signed) if part == "BUNDLE" else part for part in command]
    assert run([*arguments, "--trusted-key", str(theirs.public)]) == 1
    assert "is no signature of a trusted key" in capsys.readouterr().err
    assert not (signed.parent / "repository").exists()


def test_the_baseline_must_be_signed_too(
    signed: Path, ours: Key, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(GOLDEN / "int8-tuned", tmp_path / "other")
    arguments = ["evaluate", str(signed), "--data", str(GOLDEN / "expected.npz"), "--baseline", str(other)]
    assert run([*arguments, "--trusted-key", str(ours.public)]) == 1
    assert f"bundle {other}: is not signed" in capsys.readouterr().err


def test_packaging_a_signed_bundle_says_that_the_model_is_not(
    signed: Path, ours: Key, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["package", str(signed), "--format", "triton", "-o", str(tmp_path / "repository")]
    assert run([*arguments, "--trusted-key", str(ours.public)]) == 0
    assert "carries no signature" in capsys.readouterr().err


def test_tuning_a_signed_bundle_drops_the_signature(
    signed: Path, ours: Key, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rewritten bundle is whole and unsigned, and that is said."""
    pytest.importorskip("onnx_ir", reason="tuning needs rxdeploy[build]")
    from rxdeploy.engines.bundle import write_bundle
    from rxdeploy.tuning import retune

    tuning = open_bundle(GOLDEN / "int8-tuned").manifest.tuning

    def tune(path: Path, *_: Any) -> Any:
        bundle = open_bundle(path)
        manifest = type(bundle.manifest)(
            **{name: getattr(bundle.manifest, name) for name in bundle.manifest.__struct_fields__} | {"tuning": tuning}
        )
        return write_bundle(path, manifest, {name: bundle.file(name) for name in manifest.files}, False)

    monkeypatch.setattr(retune, "tune", tune)
    assert run(["tune", str(signed)]) == 0
    assert f"{signed} is not signed" in capsys.readouterr().err
    assert open_bundle(signed).manifest.tuning == tuning
    assert not (signed / "model.sig").exists()
    with pytest.raises(CheckFailed, match="is not signed"):
        open_bundle(signed, ours.pem)
    assert run(["tune", str(signed)]) == 0
    assert "signed" not in capsys.readouterr().err


def test_a_sealed_lie_is_signed_by_nobody(unsigned: Path, ours: Key, theirs: Key) -> None:
    """The digest in a manifest is no signature: whoever changes a bundle can make it anew."""
    (unsigned / "model.onnx").write_bytes(b"anything")
    reseal(unsigned, lambda manifest: None)
    assert open_bundle(unsigned)
    (unsigned / "model.sig").write_bytes(theirs.sign(statement_of(digests_of(unsigned))))
    with pytest.raises(CheckFailed):
        verify(unsigned, ours.pem)
