"""What was found out about a signed bundle, for people and for programs."""

from __future__ import annotations

from typing import Any

import msgspec

from rxdeploy.engines.bundle import MANIFEST, Bundle
from rxdeploy.engines.flavours import installed_version


def describe(bundle: Bundle) -> str:
    """A line for the signature and one for each file that it vouches for."""
    lines = [f"{bundle.path}: signed with the key {bundle.signed_by}", f"{MANIFEST}  sha256 as signed"]
    lines += [f"{name}  {file.bytes:,} bytes, sha256 {file.sha256}" for name, file in bundle.manifest.files.items()]
    return "\n".join([*lines, f"Checked by rxdeploy and by model-signing {_library_version()}; nothing else is there."])


def as_facts(bundle: Bundle) -> dict[str, Any]:
    """The same as JSON's values."""
    return {
        "bundle": str(bundle.path),
        "model": bundle.manifest.model,
        "signed_by": bundle.signed_by,
        "manifest_digest": bundle.manifest.digest,
        "files": msgspec.to_builtins(bundle.manifest.files),
        "checked_by": {"model-signing": _library_version()},
    }


def _library_version() -> str | None:
    return installed_version(("model-signing",))
