"""What a user can ask of an engine."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from rxdeploy.errors import InputError

MAX_BATCH = 4096


@dataclass(frozen=True)
class Profile:
    """The batch sizes an optimization profile covers, and the one TensorRT tunes it for."""

    min: int
    opt: int
    max: int

    @classmethod
    def parse(cls, text: str) -> Profile:
        """``MIN,OPT,MAX``, or ``N`` for one exact batch size."""
        if not re.fullmatch(r"[0-9]{1,6}|[0-9]{1,6},[0-9]{1,6},[0-9]{1,6}", text):
            raise InputError(f"--batch {text}: expected MIN,OPT,MAX (1,8,32) or one exact batch size (8)")
        sizes = [int(part) for part in text.split(",")]
        low, opt, high = sizes * 3 if len(sizes) == 1 else sizes
        if not 1 <= low <= opt <= high <= MAX_BATCH:
            raise InputError(f"--batch {text}: must satisfy 1 <= MIN <= OPT <= MAX <= {MAX_BATCH}")
        return cls(low, opt, high)

    def __str__(self) -> str:
        return str(self.opt) if self.min == self.max else f"{self.min},{self.opt},{self.max}"


DEFAULT_PROFILES = (Profile(1, 8, 32),)


@dataclass(frozen=True)
class EngineOptions:
    """Everything besides the model that decides what the plan looks like."""

    profiles: tuple[Profile, ...] = DEFAULT_PROFILES
    workspace_mib: int | None = None  # scratch memory a layer may use; None leaves TensorRT's default
    optimization_level: int | None = None  # 0 (fast build) to 5 (fast engine); TensorRT's default is 3
    version_compatible: bool = False
    hardware_compatible: bool = False  # runs on every GPU from Ampere on
    refit: bool = False
    strip_plan: bool = False
    compute_capabilities: tuple[str, ...] = ()  # "8.6", ...; empty leaves the flavour's default

    def as_facts(self) -> dict[str, object]:
        """For manifests and cache keys."""
        return asdict(self)
