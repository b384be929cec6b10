"""TensorRT's enumerations, with their values. Like pybind11's they are no integers, but can be made one."""

from __future__ import annotations

import enum


class Member(enum.Enum):
    def __int__(self) -> int:
        return int(self.value)

    __index__ = __int__

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __le__(self, other: object) -> bool:
        return self.value <= other.value if type(other) is type(self) else NotImplemented

    def __lt__(self, other: object) -> bool:
        return self.value < other.value if type(other) is type(self) else NotImplemented


class Severity(Member):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class TensorIOMode(Member):
    NONE, INPUT, OUTPUT = range(3)


class DataType(Member):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64 = range(9)

    @property
    def itemsize(self) -> int:
        return {"FLOAT": 4, "HALF": 2, "INT32": 4, "BF16": 2, "INT64": 8}.get(self.name, 1)


class ExecutionContextAllocationStrategy(Member):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class EngineValidity(Member):
    VALID, SUBOPTIMAL, INVALID = range(3)


class EngineInvalidityDiagnostics(Member):
    VERSION_MISMATCH, UNSUPPORTED_CC, MALFORMED_ENGINE = 1, 2, 32


class CudaGraphStrategy(Member):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class DynamicShapesKernelSpecializationStrategy(Member):
    LAZY, EAGER, NONE = range(3)


class LayerInformationFormat(Member):
    ONELINE, JSON = range(2)


class ProfilingVerbosity(Member):
    LAYER_NAMES_ONLY, NONE, DETAILED = range(3)
