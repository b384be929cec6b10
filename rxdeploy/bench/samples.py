"""Images to measure with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rxdeploy.engines.bundle import Manifest


def sample_images(manifest: Manifest, size: int) -> NDArray:
    """Random images of the declared input's type and shape; what they show makes no difference to the speed."""
    tensor = manifest.inputs[0]
    shape = (size, *(side for side in tensor.shape[1:] if side is not None))
    random = np.random.default_rng(0)
    if tensor.dtype == "uint8":
        return random.integers(0, 256, shape, np.uint8)
    return random.standard_normal(shape, np.float32)
