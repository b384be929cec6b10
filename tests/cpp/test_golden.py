"""The C library on bundles that released versions wrote: they open, and compute what they did; see tests/golden."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rxdeploy_c import INPUT_ERROR, Failed, Library, Session

GOLDEN = Path(__file__).parents[1] / "golden"
BUNDLES = sorted(path.parent for path in GOLDEN.glob("schema*/*/manifest.json"))
SAME = {"fp32": 1e-4, "int8": 0.25}  # relative L2 of the logits, as in tests/golden


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_an_old_bundle_computes_what_it_did(library: Library, onnxruntime_library: bytes, path: Path) -> None:
    expected = np.load(path.parent / "expected.npz")
    with Session(library, path, device=b"cpu", onnxruntime=onnxruntime_library) as session:
        logits = session.run(expected["images"], 7)
    limit = SAME[json.loads((path / "manifest.json").read_text())["precision"]]
    for name in (path.name, "pytorch"):
        assert np.linalg.norm(logits - expected[name]) < limit * np.linalg.norm(expected[name])


def test_a_newer_bundle_says_which_version_to_install(
    library: Library, onnxruntime_library: bytes, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(BUNDLES[0], tmp_path / "it"))
    for tools, words in (({"rxdeploy": "3.1.4"}, "pip install 'rxdeploy>=3.1.4'"), ([], "install a newer one")):
        (bundle / "manifest.json").write_text(json.dumps({"schema": 2, "tools": tools}))
        with pytest.raises(Failed) as caught:
            Session(library, bundle, device=b"cpu", onnxruntime=onnxruntime_library)
        assert caught.value.status == INPUT_ERROR
        assert words in str(caught.value)
