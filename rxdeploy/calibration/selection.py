"""Which images to calibrate with."""

from __future__ import annotations

import numpy as np

from rxdeploy.calibration.options import LEAST, CalibrationOptions
from rxdeploy.datasets import Dataset, Item, listed, sample
from rxdeploy.errors import InputError


def choose_images(dataset: Dataset, options: CalibrationOptions) -> tuple[Item, ...]:
    """The images to calibrate with: those listed, or a seeded sample. InputError when there are too few."""
    if options.listed:
        found = listed(dataset, options.listed)
        # A list may be sorted by class, and its last images are held out.
        items = tuple(found[i] for i in np.argsort(np.random.PCG64(options.seed).random_raw(len(found)), kind="stable"))
    else:
        items = sample(dataset, options.images, options.seed)
    if len(items) < LEAST:
        raise InputError(
            f"data {dataset.root}: {len(items)} image{'s' * (len(items) != 1)} to calibrate with; at least {LEAST} are "
            "needed, and some hundred are good"
        )
    return items
