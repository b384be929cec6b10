"""Signing a bundle with the OpenSSF model-signing library, and asking it about a signature."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

from rxdeploy import atomic
from rxdeploy.engines.bundle import Bundle, check_signed, find_stranger, manifest_bytes, open_bundle
from rxdeploy.errors import CheckFailed, EnvironmentLacks, InputError, first_line, from_os_error, missing_module
from rxdeploy.signing.keys import TrustedKeys, is_encrypted, public_key, read_private_key, read_public_keys
from rxdeploy.signing.signature import SIGNATURE


def sign(path: Path, key: Path, password: bytes | None = None) -> Bundle:
    """Sign the bundle at `path`, manifest and all, with the private `key` (PEM); an earlier signature is replaced.

    A bundle that is damaged, or in whose folder something else lies, is not signed. InputError for those, and for a
    key that is none; EnvironmentLacks where model-signing is not installed.
    """
    public = public_key(f"key {key}", read_private_key(key, password).public_key())
    signing, hashing = _library("signing"), _library("hashing")
    try:
        bundle = open_bundle(path)
        atomic.sweep(path)
        if stranger := find_stranger(path, bundle.manifest):
            raise InputError(f"bundle {path}: {stranger} in it is not the bundle's; take it out, then sign the bundle")
        what = hashing.Config().use_file_serialization(hashing_algorithm="sha256", allow_symlinks=False)
        what.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
        config = signing.Config().set_hashing_config(what)
        config.use_elliptic_key_signer(private_key=key, password=password if is_encrypted(key) else None)
        with tempfile.TemporaryDirectory(prefix="rxdeploy-sign-") as folder:
            config.sign(path, Path(folder, SIGNATURE))
            signature = Path(folder, SIGNATURE).read_bytes()
        # What the library has read since is to be what was checked above.
        check_signed(path, signature, manifest_bytes(path), [public])
        atomic.write_bytes(path / SIGNATURE, signature)
    except OSError as error:
        raise from_os_error(error, f"signing {path}") from None
    return verify(path, public.pem)


def verify(path: Path, keys: TrustedKeys | str | Path | bytes) -> Bundle:
    """The bundle at `path`, whole and signed with one of `keys`, as both this program and model-signing find it.

    CheckFailed when it is unsigned, signed with another key, or not what was signed; InputError for what is no bundle
    and what is no key; EnvironmentLacks where model-signing is not installed.
    """
    trusted = read_public_keys(keys)
    verifying = _library("verifying")
    bundle = open_bundle(path, keys)
    pem = next(each.pem for each in trusted if each.fingerprint == bundle.signed_by)
    with tempfile.NamedTemporaryFile(prefix="rxdeploy-key-", suffix=".pem") as file:
        file.write(pem)
        file.flush()
        try:
            config = verifying.Config().use_elliptic_key_verifier(public_key=Path(file.name))
            config.verify(path, path / SIGNATURE)
        except Exception as error:  # its own ValueError, cryptography's and pydantic's
            raise CheckFailed(f"bundle {path}: model-signing refuses it: {first_line(error)}") from None
    return bundle


def _library(name: str) -> Any:
    """A module of model_signing, as Any: it annotates a password, which must be bytes, as str."""
    try:
        return importlib.import_module(f"model_signing.{name}")
    except ModuleNotFoundError as error:
        raise missing_module(error) from None
    except ImportError as error:
        raise EnvironmentLacks(f"model-signing does not load: {error}; pip install -U 'rxdeploy[sign]'") from None
