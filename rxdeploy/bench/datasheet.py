"""Peaks as NVIDIA publishes them: dense (no 2:4 sparsity), at the boost clock, so above what a kernel reaches.

`source` names NVIDIA's document. Those could not be read from where this table was made: each figure was found alike in
at least two independent compilations of them, and what was not is left out; a test checks the float16 figures against
multiprocessors x rate x clock. A GPU is found by the exact name that the driver gives: a relative with a longer name (a
Ti, a laptop's, a MIG slice) has other figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# fp32 on the CUDA cores, since rxdeploy lets no engine round it to TF32; the others on the tensor cores, fp16 with sums
# in fp32.
Arithmetic = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True)
class Datasheet:
    """Operations a second by arithmetic, and bytes a second of its memory."""

    source: str
    fp32: float
    fp16: float
    int8: float
    bandwidth: float

    def peak(self, arithmetic: Arithmetic) -> float:
        """Operations a second (a multiply-add is two)."""
        return {"fp32": self.fp32, "fp16": self.fp16, "int8": self.int8}[arithmetic]


_H100 = "NVIDIA H100 Tensor Core GPU datasheet"
_H100_SXM = (66.9e12, 989.4e12, 1978.9e12)
_A100 = "NVIDIA A100 Tensor Core GPU datasheet"
_A100_CHIP = (19.5e12, 312e12, 624e12)

DATASHEETS = {
    "NVIDIA H100 80GB HBM3": Datasheet(_H100, *_H100_SXM, 3350e9),
    "NVIDIA H100 PCIe": Datasheet(_H100, 51.2e12, 756e12, 1513e12, 2000e9),
    "NVIDIA H200": Datasheet("NVIDIA H200 Tensor Core GPU datasheet", *_H100_SXM, 4800e9),
    "NVIDIA A100-SXM4-40GB": Datasheet(_A100, *_A100_CHIP, 1555e9),
    "NVIDIA A100-PCIE-40GB": Datasheet(_A100, *_A100_CHIP, 1555e9),
    "NVIDIA A100-SXM4-80GB": Datasheet(_A100, *_A100_CHIP, 2039e9),
    "NVIDIA A100 80GB PCIe": Datasheet(_A100, *_A100_CHIP, 1935e9),
    "NVIDIA L4": Datasheet("NVIDIA L4 Tensor Core GPU datasheet", 30.3e12, 121e12, 242e12, 300e9),
    "NVIDIA L40": Datasheet("NVIDIA L40 GPU datasheet", 90.5e12, 181e12, 362e12, 864e9),
    "NVIDIA L40S": Datasheet("NVIDIA L40S GPU datasheet", 91.6e12, 362e12, 733e12, 864e9),
    "NVIDIA A10": Datasheet("NVIDIA A10 Tensor Core GPU datasheet", 31.2e12, 125e12, 250e12, 600e9),
    "Tesla T4": Datasheet("NVIDIA T4 Tensor Core GPU datasheet", 8.1e12, 65e12, 130e12, 320e9),
    "NVIDIA GeForce RTX 3090": Datasheet(
        "NVIDIA Ampere GA102 GPU architecture whitepaper", 35.6e12, 71e12, 284e12, 936e9
    ),
    "NVIDIA GeForce RTX 4090": Datasheet("NVIDIA Ada GPU architecture whitepaper", 82.6e12, 165.2e12, 660.6e12, 1008e9),
    "NVIDIA GeForce RTX 5090": Datasheet(
        "NVIDIA RTX Blackwell GPU architecture whitepaper", 104.8e12, 209.5e12, 838e12, 1792e9
    ),
}
