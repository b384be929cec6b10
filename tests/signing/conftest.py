"""Keys, a small bundle, and signatures made without rxdeploy and without the library, as an attacker would."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography", reason="these tests need rxdeploy[verify]")

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "schema1"
DIGESTS = {256: hashes.SHA256, 384: hashes.SHA384, 521: hashes.SHA512}


class Key:
    """A private key with its files; `sign` makes a model.sig as the format's documents say it."""

    def __init__(self, folder: Path, name: str, curve: ec.EllipticCurve, password: bytes | None = None) -> None:
        self.key = ec.generate_private_key(curve)
        self.private, self.public = folder / f"{name}.pem", folder / f"{name}.pub"
        encryption = BestAvailableEncryption(password) if password else NoEncryption()
        self.private.write_bytes(self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
        self.pem = self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        self.public.write_bytes(self.pem)
        self.fingerprint = hashlib.sha256(self.pem).hexdigest()

    def sign(self, statement: Any, kind: str = "application/vnd.in-toto+json", **changes: Any) -> bytes:
        payload = statement if isinstance(statement, bytes) else json.dumps(statement).encode()
        message = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
        made = self.key.sign(message, ec.ECDSA(DIGESTS[self.key.curve.key_size]()))
        envelope = {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": kind,
            "signatures": [{"sig": base64.b64encode(made).decode(), "keyid": ""}],
        }
        bundle = {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {"publicKey": {"hint": self.fingerprint}, "tlogEntries": []},
            "dsseEnvelope": envelope | changes.pop("envelope", {}),
        }
        return json.dumps(bundle | changes).encode()


def statement_of(files: dict[str, str], **changes: Any) -> dict[str, Any]:
    """What is signed, of these files' digests."""
    files = dict(sorted(files.items()))
    root = hashlib.sha256(b"".join(map(bytes.fromhex, files.values()))).hexdigest()
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "it", "digest": {"sha256": root}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": ["model.sig"],
            },
            "resources": [{"name": name, "algorithm": "sha256", "digest": d} for name, d in files.items()],
        },
    } | changes


def digests_of(folder: Path) -> dict[str, str]:
    """sha256 of every file but the signature, in the order of their names."""
    files = sorted(path for path in folder.iterdir() if path.name != "model.sig")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and give it, and every file in it, the digests of what is there now, without rxdeploy."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    for name, file in manifest["files"].items():
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            file |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest["digest"] = "0" * 64
    text = json.dumps(manifest)
    (folder / "manifest.json").write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1))


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Key]:
    """Makes a key once for each name: P-256 unless its name ends in 384 or 521."""
    folder, made = tmp_path_factory.mktemp("keys"), {}

    def make(name: str = "ours", password: bytes | None = None) -> Key:
        if name not in made:
            curve = {"384": ec.SECP384R1, "521": ec.SECP521R1}.get(name[-3:], ec.SECP256R1)
            made[name] = Key(folder, name, curve(), password)
        return made[name]

    return make


@pytest.fixture
def ours(keys: Callable[..., Key]) -> Key:
    """The key that is trusted."""
    return keys("ours")


@pytest.fixture
def theirs(keys: Callable[..., Key]) -> Key:
    """An attacker's."""
    return keys("theirs")


@pytest.fixture
def unsigned(tmp_path: Path) -> Path:
    """A bundle that is whole, and not signed."""
    return Path(shutil.copytree(GOLDEN / "float32", tmp_path / "it"))


@pytest.fixture
def signed(unsigned: Path, ours: Key) -> Path:
    """A bundle signed with the trusted key."""
    (unsigned / "model.sig").write_bytes(ours.sign(statement_of(digests_of(unsigned))))
    return unsigned


@pytest.fixture
def library() -> Callable[[Path, Path], bool]:
    """What the OpenSSF library says of a bundle and a public key."""
    verifying = pytest.importorskip("model_signing.verifying", reason="this test needs rxdeploy[sign]")

    def accepts(folder: Path, key: Path) -> bool:
        try:
            verifying.Config().use_elliptic_key_verifier(public_key=key).verify(folder, folder / "model.sig")
        except Exception:
            return False
        return True

    return accepts
