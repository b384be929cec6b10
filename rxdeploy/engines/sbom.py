"""The bundle's bill of materials: CycloneDX 1.6 in JSON (https://cyclonedx.org/docs/1.6/json/), made of its manifest.

Package URLs are those of https://github.com/package-url/purl-spec. The same manifest gives the same bytes: there is no
time in it, and its serial number is made from its content.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from rxdeploy.engines.bundle import FileDigest, Manifest

_MODEL = "model"  # the bom-ref
_FILES = {  # what each is for
    "model.onnx": "The model as it is deployed, in ONNX, weights inside",
    "engine.plan": "The TensorRT plan: native code",
    "calibration.json": "Activation ranges, and where they came from",
    "labels.txt": "Class names, in the order of the logits",
}
_NOT_FROM_PYPI = ("python", "tensorrt")  # how names begin; TensorRT may be NVIDIA's packages for the system as well


def bill_of_materials(manifest: Manifest, digests: dict[str, FileDigest]) -> bytes:
    """The bill of the bundle with this manifest and these files, as sbom.cdx.json holds it."""
    tools = [_tool(name, version) for name, version in sorted(_versions(manifest).items())]
    images = _calibration_images(manifest)
    data = [*_weights(manifest), *images]
    files = [_file(name, digest) for name, digest in sorted(digests.items())]
    bill: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"tools": {"components": tools}, "component": _model(manifest, images)},
        "components": [*files, *data],
        "dependencies": [
            {"ref": _MODEL, "dependsOn": [part["bom-ref"] for part in (*files, *data)]},
            *({"ref": part["bom-ref"]} for part in (*files, *data)),
        ],
    }
    digest = hashlib.sha256(json.dumps(bill, sort_keys=True).encode()).digest()
    serial = {"serialNumber": f"urn:uuid:{uuid.UUID(bytes=digest[:16], version=5)}"}
    return (json.dumps(bill | serial, indent=2, ensure_ascii=False) + "\n").encode()


def _model(manifest: Manifest, images: list[dict[str, Any]]) -> dict[str, Any]:
    card = manifest.card
    pages = [
        {"type": kind, "url": _url(url)}
        for kind, url in (("documentation", card.source.paper_url), ("source-distribution", card.source.code))
        if url and url.startswith(("https://", "http://"))
    ]
    facts = {
        "rxdeploy:precision": manifest.precision,
        "rxdeploy:target": manifest.target.name,
        "rxdeploy:weights": manifest.weights.kind,
        "rxdeploy:card:sha256": card.sha256,
        "rxdeploy:parameters": manifest.counts.parameters,
        "rxdeploy:multiply_adds": manifest.counts.multiply_adds,
        "rxdeploy:card:flops": card.figures.flops,
    }
    return {
        "type": "machine-learning-model",
        "bom-ref": _MODEL,
        "name": manifest.model,
        "description": card.description,
        **_licence(manifest.weights.licence),
        **({"externalReferences": pages} if pages else {}),
        "properties": _properties(facts),
        "modelCard": _card(manifest, images),
    }


def _card(manifest: Manifest, images: list[dict[str, Any]]) -> dict[str, Any]:
    accuracy, source = manifest.card.accuracy, manifest.card.source
    trained_on = [{"type": "dataset", "name": name} for name in source.training_data]
    parameters: dict[str, Any] = {
        "task": "image classification",
        "architectureFamily": "ResNeXt",
        "modelArchitecture": manifest.model,
        "datasets": [*trained_on, *({"ref": part["bom-ref"]} for part in images)],
        "inputs": [{"format": _tensor(tensor)} for tensor in manifest.inputs],
        "outputs": [{"format": _tensor(tensor)} for tensor in manifest.outputs],
    }
    card: dict[str, Any] = {"modelParameters": {key: value for key, value in parameters.items() if value}}
    if accuracy is not None:
        published = {"top-1 accuracy, %": accuracy.top1, "top-5 accuracy, %": accuracy.top5}
        card["quantitativeAnalysis"] = {
            "performanceMetrics": [
                {"type": f"{kind}, as the model's card claims", "value": f"{value:g}", "slice": accuracy.dataset}
                for kind, value in published.items()
                if value is not None
            ]
        }
    return card


def _weights(manifest: Manifest) -> list[dict[str, Any]]:
    """The file with the weights that went in; none where they were made up."""
    weights = manifest.weights
    if weights.sha256 is None:
        return []
    part = {
        "type": "data",
        "bom-ref": "weights",
        "name": weights.source.rpartition("/")[2] or weights.source,
        "description": f"The weights that the model was built with ({weights.kind})",
        **_hashes(weights.sha256),
        **_licence(weights.licence),
    }
    if weights.kind == "published":
        part["externalReferences"] = [{"type": "distribution", "url": _url(weights.source)}]
    return [part]


def _calibration_images(manifest: Manifest) -> list[dict[str, Any]]:
    found = manifest.quantisation or {}
    digest, images = found.get("content_sha256"), found.get("images")
    if not isinstance(digest, str):
        return []
    facts = {"rxdeploy:content_sha256": digest, "rxdeploy:images": images}
    return [
        {
            "type": "data",
            "bom-ref": "calibration-images",
            "name": "calibration images",
            "description": "The images that int8 ranges were found on; their digest is of the pixels that were used",
            "properties": _properties(facts),
        }
    ]


def _file(name: str, digest: FileDigest) -> dict[str, Any]:
    return {
        "type": "file",
        "bom-ref": f"file:{name}",
        "name": name,
        **({"description": _FILES[name]} if name in _FILES else {}),
        **_hashes(digest.sha256),
        "properties": _properties({"rxdeploy:bytes": digest.bytes}),
    }


def _versions(manifest: Manifest) -> dict[str, str]:
    """Name and version of everything that had a part in building the bundle."""
    found: dict[str, str] = dict(manifest.tools)
    if manifest.engine is not None and manifest.target.version:
        found[manifest.target.name] = manifest.target.version
    return found


def _tool(name: str, version: str) -> dict[str, Any]:
    kind = "generic" if name.startswith(_NOT_FROM_PYPI) else "pypi"
    purl_name = name.lower().replace("_", "-") if kind == "pypi" else name
    return {
        "type": "application" if name in ("rxdeploy", "python") else "library",
        "name": name,
        "version": version,
        "purl": f"pkg:{kind}/{quote(purl_name, safe='')}@{quote(version, safe='')}",
    }


def _tensor(tensor: Any) -> str:
    sides = ", ".join("batch" if side is None else str(side) for side in tensor.shape)
    return f"{tensor.name}: {tensor.dtype} {tensor.layout} ({sides})"


def _hashes(sha256: str) -> dict[str, Any]:
    return {"hashes": [{"alg": "SHA-256", "content": sha256}]}


def _url(text: str) -> str:
    return quote(text, safe="/:?#[]@!$&'()*+,;=%~")


def _licence(licence: str | None) -> dict[str, Any]:
    # By name: what a card says need not be an identifier of SPDX's list.
    return {"licenses": [{"license": {"name": licence}}]} if licence else {}


def _properties(facts: dict[str, Any]) -> list[dict[str, str]]:
    return [{"name": name, "value": str(value)} for name, value in facts.items() if value is not None]
