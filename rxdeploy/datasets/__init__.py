"""Labelled images, as people have them: read, sampled and decoded in a stream. Needs NumPy and Pillow only."""

from rxdeploy.datasets.arrays import from_arrays
from rxdeploy.datasets.choosing import listed, sample
from rxdeploy.datasets.dataset import Dataset, Item
from rxdeploy.datasets.opening import open_dataset
from rxdeploy.datasets.stream import Batch, Stream

__all__ = ["Batch", "Dataset", "Item", "Stream", "from_arrays", "listed", "open_dataset", "sample"]
