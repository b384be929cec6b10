"""sbom.cdx.json is valid CycloneDX, says what is in the bundle, and is the same for the same build."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rxdeploy.cards.card import Accuracy, Figures, Source
from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.bundle import Manifest, open_bundle, parse_manifest, write_bundle

GOLDEN = Path(__file__).parent / "golden" / "schema1"
FILES: dict[str, Path | bytes] = {"model.onnx": b"a model", "labels.txt": b"a\nb\n", "engine.plan": b"a plan"}


@pytest.fixture
def manifest() -> Manifest:
    """A manifest with everything in it that a bill of materials speaks of."""
    path = GOLDEN / "float16-rtx-manifest.json"
    int8 = parse_manifest(GOLDEN, (GOLDEN / "int8-tuned" / "manifest.json").read_bytes())
    card = bundles.CardFacts(
        sha256="ab" * 32,
        description="Ein Modell <für> Tests",
        figures=Figures(parameters=1000, flops=2000),
        accuracy=Accuracy(dataset="ImageNet-1k", top1=79.3, top5=94.5),
        source=Source(
            paper="A paper", paper_url="https://example.org/a paper", code="not a page", training_data=("ImageNet-1k",)
        ),
    )
    weights = bundles.WeightsOrigin(
        kind="published", source="https://example.org/w/model.pth", sha256="cd" * 32, licence="Apache-2.0"
    )
    plain = parse_manifest(path, path.read_bytes())
    return msgspec.structs.replace(plain, card=card, weights=weights, quantisation=int8.quantisation)


def bill_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sbom.cdx.json").read_text(encoding="utf-8"))


def parts(bill: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {part["bom-ref"]: part for part in bill["components"]}


def facts(part: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in part["properties"]}


def complaint(text: str) -> object:
    """What CycloneDX's own schema has against it; None for nothing."""
    validation = pytest.importorskip("cyclonedx.validation.json", reason="the schema is in cyclonedx-python-lib")
    from cyclonedx.schema import SchemaVersion

    return validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)


def test_it_is_valid(manifest: Manifest, tmp_path: Path) -> None:
    write_bundle(tmp_path / "full", manifest, FILES, False)
    # What is least known: made-up weights, no accuracy, no source, no plan.
    bare = parse_manifest(GOLDEN, (GOLDEN / "float32" / "manifest.json").read_bytes())
    write_bundle(tmp_path / "bare", bare, {"model.onnx": b"a model"}, False)
    for name in ("full", "bare"):
        text = (tmp_path / name / "sbom.cdx.json").read_text(encoding="utf-8")
        assert complaint(text) is None
        assert complaint(text.replace('"bomFormat": "CycloneDX"', '"bomFormat": "CycloneDY"')) is not None
        assert complaint(text.replace('"SHA-256"', '"SHA-257"')) is not None


def test_the_library_reads_it(manifest: Manifest, tmp_path: Path) -> None:
    model = pytest.importorskip("cyclonedx.model.bom", reason="the reader is in cyclonedx-python-lib")
    write_bundle(tmp_path / "it", manifest, FILES, False)
    bill = bill_of(tmp_path / "it")
    bill["metadata"]["component"].pop("modelCard")  # which it does not know
    read = model.Bom.from_json(bill)
    assert {part.name for part in read.components} >= set(FILES)
    purls = {str(tool.purl) for tool in read.metadata.tools.components}
    assert {"pkg:pypi/torch@2.13.0%2Bcpu", "pkg:pypi/rxdeploy@0.1.0", "pkg:generic/tensorrt-rtx@1.7.1.116"} <= purls
    assert purls == {tool["purl"] for tool in bill["metadata"]["tools"]["components"]}, "they are written as it would"


def test_every_file_has_its_digest(manifest: Manifest, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "it", manifest, FILES, False)
    found = {part["name"]: part["hashes"] for part in bill_of(bundle.path)["components"] if part["type"] == "file"}
    assert found == {
        name: [{"alg": "SHA-256", "content": hashlib.sha256(data).hexdigest()}]
        for name, data in FILES.items()
        if isinstance(data, bytes)
    }
    digest = hashlib.sha256((bundle.path / "sbom.cdx.json").read_bytes()).hexdigest()
    assert open_bundle(bundle.path).manifest.files["sbom.cdx.json"].sha256 == digest


def test_what_it_says(manifest: Manifest, tmp_path: Path) -> None:
    bill = bill_of(write_bundle(tmp_path / "it", manifest, FILES, False).path)
    model, found = bill["metadata"]["component"], parts(bill)
    assert (model["type"], model["name"]) == ("machine-learning-model", "golden")
    assert facts(model)["rxdeploy:card:sha256"] == "ab" * 32
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert [metric["value"] for metric in metrics] == ["79.3", "94.5"]
    assert model["externalReferences"] == [{"type": "documentation", "url": "https://example.org/a%20paper"}]
    assert model["modelCard"]["modelParameters"]["datasets"] == [
        {"type": "dataset", "name": "ImageNet-1k"},
        {"ref": "calibration-images"},
    ]
    assert found["weights"]["name"] == "model.pth"
    assert found["weights"]["hashes"][0]["content"] == "cd" * 32
    assert found["weights"]["externalReferences"][0]["url"] == "https://example.org/w/model.pth"
    assert found["weights"]["licenses"] == [{"license": {"name": "Apache-2.0"}}]
    quantisation = manifest.quantisation
    assert quantisation is not None
    assert facts(found["calibration-images"])["rxdeploy:content_sha256"] == quantisation["content_sha256"]
    versions = {tool["name"]: tool["version"] for tool in bill["metadata"]["tools"]["components"]}
    assert versions == {**manifest.tools, "tensorrt-rtx": "1.7.1.116"}
    assert bill["dependencies"][0]["dependsOn"] == [part["bom-ref"] for part in bill["components"]]


def test_made_up_weights_have_no_file(tmp_path: Path) -> None:
    manifest = parse_manifest(GOLDEN, (GOLDEN / "float32" / "manifest.json").read_bytes())
    bill = bill_of(write_bundle(tmp_path / "it", manifest, FILES, False).path)
    assert "weights" not in parts(bill)
    assert facts(bill["metadata"]["component"])["rxdeploy:weights"] == "synthetic"


def test_the_same_bundle_has_the_same_bill(manifest: Manifest, tmp_path: Path) -> None:
    first, second = (write_bundle(tmp_path / name, manifest, dict(FILES), False) for name in "ab")
    assert first.read("sbom.cdx.json") == second.read("sbom.cdx.json")
    other = write_bundle(tmp_path / "c", manifest, FILES | {"labels.txt": b"c\nd\n"}, False)
    assert bill_of(other.path)["serialNumber"] != bill_of(first.path)["serialNumber"]


def test_a_rewritten_bundle_has_a_new_bill(manifest: Manifest, tmp_path: Path) -> None:
    """`rxdeploy tune` hands every file of the old bundle on, the bill among them."""
    first = write_bundle(tmp_path / "it", manifest, FILES, False)
    files: dict[str, Path | bytes] = {name: first.file(name) for name in first.manifest.files}
    second = write_bundle(tmp_path / "it", manifest, files | {"model.onnx": b"tuned"}, False)
    found = parts(bill_of(second.path))["file:model.onnx"]["hashes"][0]["content"]
    assert found == hashlib.sha256(b"tuned").hexdigest()
    assert list(open_bundle(second.path).manifest.files) == ["engine.plan", "labels.txt", "model.onnx", "sbom.cdx.json"]


def test_an_old_bundle_has_none_and_opens(tmp_path: Path) -> None:
    path = Path(shutil.copytree(GOLDEN / "float32", tmp_path / "it"))
    assert "sbom.cdx.json" not in open_bundle(path).manifest.files
