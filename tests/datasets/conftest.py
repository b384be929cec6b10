"""Small image files, whose content tells which one it is."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def image_bytes(name: str) -> bytes:
    """A PNG of 12 x 10 pixels that no other name has."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def image() -> Callable[[str], bytes]:
    """The image file of a name."""
    return image_bytes


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    """Writes the images of these names below a new folder of tmp_path."""

    def write(*names: str, folder: str = "data") -> Path:
        root = tmp_path / folder
        root.mkdir(exist_ok=True)
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_bytes(name.rpartition("/")[2]))
        return root

    return write


@pytest.fixture
def tar(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tar with these members, bytes each, or the image of its base name for None."""

    def write(members: Mapping[str, bytes | None], name: str = "data.tar", form: int = tarfile.GNU_FORMAT) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=form) as file:
            for member, content in members.items():
                content = image_bytes(member.rpartition("/")[2]) if content is None else content
                info = tarfile.TarInfo(member)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
        return path

    return write
