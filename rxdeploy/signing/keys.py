"""Keys: elliptic curves P-256, P-384 and P-521, in PEM, which are those that OpenSSF model signing takes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rxdeploy.errors import InputError, first_line, missing_module
from rxdeploy.plainfile import read_plain

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.hashes import HashAlgorithm

TrustedKeys = Sequence[str | Path | bytes]  # public keys: files, or the PEM itself

_CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}  # and the digest that goes with each
_LARGEST_KEY = 1 << 16  # bytes of a file; no key is as long
_ENCRYPTED = re.compile(rb"BEGIN ENCRYPTED PRIVATE KEY|Proc-Type: 4,ENCRYPTED")  # PKCS 8, and OpenSSL's older way


@dataclass(frozen=True)
class PublicKey:
    """A public key, and what it is called in messages."""

    name: str
    pem: bytes
    key: EllipticCurvePublicKey = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """What signatures call it: the sha256 of its PEM, which ends in a line feed."""
        return hashlib.sha256(self.pem).hexdigest()

    def signed(self, signature: bytes, message: bytes) -> bool:
        """Whether `signature` (ECDSA, DER) is this key's of `message`."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        algorithm: HashAlgorithm = getattr(hashes, _CURVES[self.key.curve.name])()
        try:
            self.key.verify(signature, message, ec.ECDSA(algorithm))
        except InvalidSignature:
            return False
        return True


def read_public_keys(keys: TrustedKeys | str | Path | bytes) -> tuple[PublicKey, ...]:
    """The keys, in their order, one at least.

    InputError for what is no public key of these curves; EnvironmentLacks where `cryptography` is not installed.
    """
    given = [keys] if isinstance(keys, str | Path | bytes) else list(keys)
    if not given:
        raise InputError("trusted keys: none given, so that no bundle could be trusted; give a public key")
    return tuple(map(_read_public_key, given))


def _read_public_key(given: str | Path | bytes) -> PublicKey:
    name, pem = ("key", given) if isinstance(given, bytes) else (f"key {given}", _read(Path(given)))
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ModuleNotFoundError as error:
        raise missing_module(error) from None
    if b"PRIVATE KEY-----" in pem:
        raise InputError(f"{name}: is a private key; `openssl ec -in KEY -pubout` gives the public one")
    try:
        found = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{name}: is no public key in PEM: {first_line(error)}") from None
    return public_key(name, found)


def public_key(name: str, key: object) -> PublicKey:
    """`key` as it is used here; InputError when it is of another kind."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        kind = key.curve.name if isinstance(key, EllipticCurvePublicKey) else type(key).__name__.strip("_")
        raise InputError(f"{name}: is of the kind {kind}; model signing takes the curves P-256, P-384 and P-521")
    return PublicKey(name, key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), key)


def read_private_key(path: Path, password: bytes | None) -> EllipticCurvePrivateKey:
    """The private key in the file at `path`.

    InputError for what is none, of another curve, or encrypted with another password or without one given.
    """
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ModuleNotFoundError as error:
        raise missing_module(error) from None
    pem = _read(path)
    if b"PRIVATE KEY-----" not in pem:
        raise InputError(f"key {path}: is no private key in PEM")
    try:
        key = load_pem_private_key(pem, password if _ENCRYPTED.search(pem) else None)  # it takes no needless one
    except TypeError:  # its word for a password that is missing
        raise InputError(f"key {path}: is encrypted; give its password with --password-file") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        reason = "the password is another one" if password is not None else first_line(error)
        raise InputError(f"key {path}: cannot be read: {reason}") from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise InputError(f"key {path}: is no elliptic curve's; model signing takes P-256, P-384 and P-521")
    public_key(f"key {path}", key.public_key())
    return key


def is_encrypted(path: Path) -> bool:
    """Whether the private key in the file at `path` needs a password; InputError when the file cannot be read."""
    return _ENCRYPTED.search(_read(path)) is not None


def read_password(path: Path) -> bytes:
    """The first line of a file, without its end."""
    return (read_plain(path, f"password file {path}", _LARGEST_KEY).splitlines() or [b""])[0]


def _read(path: Path) -> bytes:
    return read_plain(path, f"key {path}", _LARGEST_KEY)
