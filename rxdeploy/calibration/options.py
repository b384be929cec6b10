"""What a user can ask of a calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rxdeploy.errors import InputError
from rxdeploy.export.architecture import ResNeXt

SchemeName = Literal["tensorrt", "onnxruntime"]
Method = Literal["minmax", "percentile", "entropy", "mse"]
METHODS: tuple[Method, ...] = get_args(Method)
MethodChoice = Literal["auto", "minmax", "percentile", "entropy", "mse"]

HELD_OUT = "held_out.npy"  # beside calibration.json in the cache: the images that methods were chosen on
LEAST = 8  # images: a batch; ranges of fewer are the images' own, not the model's


def quantisable(network: ResNeXt, scheme: SchemeName) -> list[str]:
    """The layers that a scheme quantises and that may be kept from it, in order of computation.

    Convolutions; for TensorRT shortcuts too, by their block's name, and for a CPU the classifier.
    """
    layers = [network.stem.name]
    for block in network.blocks:
        layers += [conv.name for conv in (*block.convs, block.downsample) if conv]
        layers += [block.name] if scheme == "tensorrt" else []
    return layers + ([] if scheme == "tensorrt" else ["fc"])


@dataclass(frozen=True)
class CalibrationOptions:
    """Where the images come from and what is wanted of the result. InputError for what contradicts itself."""

    data: Path | None = None
    labels: Path | None = None  # for data that is not sorted into class folders
    images: int = 512
    listed: Path | None = None  # names of the images to use, instead of a sample
    seed: int = 0
    file: Path | None = None  # an earlier calibration, used instead of data
    method: MethodChoice = "auto"
    keep: tuple[str, ...] = ()  # layers that stay in float16
    min_sqnr: float | None = None  # dB of the held-out logits
    max_drop: float | None = None  # points of top-1 accuracy, on labelled images

    def __post_init__(self) -> None:
        if self.data and self.file:
            raise InputError("--calibration-data and --calibration exclude each other: images, or what came of them")
        if not self.data and not self.file:
            raise InputError(
                "int8 needs images to calibrate with: --calibration-data FOLDER (some hundred that look like what the "
                "model will see), or --calibration FILE of an earlier one"
            )
        if self.images < LEAST:
            raise InputError(f"--calibration-images {self.images}: it must be at least {LEAST}")
        if self.min_sqnr is not None and not math.isfinite(self.min_sqnr):
            raise InputError(f"--min-sqnr {self.min_sqnr}: it must be a number of dB")
        if self.max_drop is not None and not 0 < self.max_drop <= 100:
            raise InputError(f"--max-drop {self.max_drop:g}: points of accuracy, more than 0 and at most 100")
        if (self.min_sqnr is not None or self.max_drop is not None) and not self.data:
            raise InputError("--min-sqnr and --max-drop need images: --calibration-data")
        if self.min_sqnr is not None and self.max_drop is not None:
            raise InputError("--min-sqnr and --max-drop exclude each other")
