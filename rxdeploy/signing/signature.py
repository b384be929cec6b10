"""Checking a signature in OpenSSF model signing's format, with nothing but `cryptography`.

    model.sig: a Sigstore bundle 0.3 (JSON) around a DSSE envelope around an in-toto statement, whose predicate
    lists every file with its sha256; signed is the envelope's payload.

Formats: https://github.com/sigstore/model-transparency (README, "Model Signing Format"),
https://github.com/secure-systems-lab/dsse/blob/v1.0.2/protocol.md. Of what the format allows, only what
`rxdeploy sign` and `model_signing sign key` write by default is taken: keys (no certificates, no Sigstore), whole
files, SHA-256, no symbolic links. Nothing of the payload is read before its signature was found right.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from rxdeploy.errors import CheckFailed
from rxdeploy.signing.keys import PublicKey

SIGNATURE = "model.sig"
LARGEST_SIGNATURE = 1 << 20  # bytes; that of a bundle has about 3000

_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"


class _Part(msgspec.Struct, frozen=True, rename="camel"):
    pass


class _Hint(_Part, frozen=True):
    hint: str | None = None


class _Material(_Part, frozen=True):
    public_key: _Hint


class _Sig(_Part, frozen=True):
    sig: str


class _Envelope(_Part, frozen=True):
    payload: str
    payload_type: str
    signatures: tuple[_Sig]


class _SigstoreBundle(_Part, frozen=True):
    media_type: str
    verification_material: _Material
    dsse_envelope: _Envelope


class _Digest(msgspec.Struct, frozen=True):
    sha256: str


class _Subject(msgspec.Struct, frozen=True):
    digest: _Digest


class _Resource(msgspec.Struct, frozen=True):
    name: str
    algorithm: str
    digest: str


class _Serialization(msgspec.Struct, frozen=True):
    method: str
    hash_type: str
    allow_symlinks: bool


class _Predicate(msgspec.Struct, frozen=True):
    serialization: _Serialization
    resources: tuple[_Resource, ...]


class _Statement(msgspec.Struct, frozen=True):
    type: str = msgspec.field(name="_type")
    predicate_type: str = msgspec.field(name="predicateType")
    subject: tuple[_Subject]
    predicate: _Predicate


class Signed(NamedTuple):
    """The files that a signature vouches for, with their sha256, and the trusted key that it was made with."""

    files: dict[str, str]
    key: PublicKey


def check_signature(data: bytes, keys: Sequence[PublicKey]) -> Signed:
    """What the contents of a model.sig vouch for; CheckFailed unless one of `keys` signed that."""
    try:
        bundle = msgspec.json.decode(data, type=_SigstoreBundle)
        envelope, hint = bundle.dsse_envelope, bundle.verification_material.public_key.hint
        payload = base64.b64decode(envelope.payload, validate=True)
        signature = base64.b64decode(envelope.signatures[0].sig, validate=True)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, binascii.Error, ValueError) as error:
        raise CheckFailed(f"{SIGNATURE} is no signature with a key: {error}; sign the bundle again") from None
    if (bundle.media_type, envelope.payload_type) != (_BUNDLE, _PAYLOAD):
        raise CheckFailed(f"{SIGNATURE} is of another format than model signing's 1.0; sign the bundle again")
    # DSSE's pre-authentication encoding
    message = b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD), _PAYLOAD.encode(), len(payload), payload)
    for key in keys:
        # The hint is not signed; model_signing refuses another key's, and so that both say the same, so is it here.
        if hint in (None, key.fingerprint) and key.signed(signature, message):
            return Signed(_files(payload), key)
    by = f"with the key {hint[:8]}" if hint else "with an unnamed key"
    trusted = ", ".join(key.fingerprint[:8] for key in keys)
    raise CheckFailed(f"{SIGNATURE} is no signature of a trusted key: it was made {by}, trusted is {trusted}")


def _files(payload: bytes) -> dict[str, str]:
    """The files of a payload that is signed."""
    try:
        statement = msgspec.json.decode(payload, type=_Statement)
        digests = b"".join(bytes.fromhex(resource.digest) for resource in statement.predicate.resources)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise CheckFailed(f"{SIGNATURE} is signed, but lists no files: {error}; sign the bundle again") from None
    how, resources = statement.predicate.serialization, statement.predicate.resources
    if (
        (statement.type, statement.predicate_type) != (_STATEMENT, _PREDICATE)
        or (how.method, how.hash_type, how.allow_symlinks) != ("files", "sha256", False)
        or any(resource.algorithm != "sha256" for resource in resources)
    ):
        raise CheckFailed(f"{SIGNATURE} is signed in a way that is not taken here; `rxdeploy sign` signs it again")
    files = {resource.name: resource.digest for resource in resources}
    consistent = hashlib.sha256(digests).hexdigest() == statement.subject[0].digest.sha256
    if len(files) != len(resources) or not consistent:
        raise CheckFailed(f"{SIGNATURE} is signed, but contradicts itself; sign the bundle again")
    return files
