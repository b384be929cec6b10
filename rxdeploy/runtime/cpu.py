"""Which engine runs model.onnx on a CPU, and with which settings: those that tuning found, or plain ones."""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

import msgspec

from rxdeploy.engines.bundle import Bundle, CpuSettings, Tuning
from rxdeploy.errors import EXTRA_OF_MODULE, InputError
from rxdeploy.runtime.onnxrt import OnnxEngine
from rxdeploy.runtime.openvino import OpenVinoEngine
from rxdeploy.runtime.plan import is_installed

EngineName = Literal["onnxruntime", "openvino"]
CpuEngine = OnnxEngine | OpenVinoEngine

ENGINES: dict[EngineName, str] = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}  # the better known first


class Chosen(NamedTuple):
    """Settings, the batch sizes to be ready for, and what of the bundle's tuning cannot be followed, and why."""

    settings: CpuSettings
    sizes: tuple[int, ...] = ()
    remark: str = ""


def open_cpu_engine(bundle: Bundle, settings: CpuSettings | None = None, engine: EngineName | None = None) -> CpuEngine:
    """The bundle's model.onnx on a CPU; `description` says on what engine, how, and what of its tuning is not followed.

    `settings` are followed as they are; without them, see `choose`. InputError for settings that cannot be;
    EnvironmentLacks, with the command that installs it, for an engine that is not here; CheckFailed when the engine
    cannot load the model.
    """
    chosen = Chosen(settings) if settings else choose(bundle.manifest.tuning, engine)
    settings = chosen.settings
    if settings.threads < 0 or settings.sessions < 1:
        raise InputError(
            f"CPU settings: {settings.sessions} session(s) of {settings.threads} thread(s); there must be 1 session or "
            "more, and 0 threads (one a core) or more"
        )
    opened: CpuEngine
    if settings.engine == "openvino":
        opened = OpenVinoEngine(bundle, settings, chosen.sizes)
    else:
        opened = OnnxEngine(bundle, "cpu", settings=settings)
    opened.description += in_words(settings) + chosen.remark
    return opened


def choose(tuning: Tuning | None, engine: EngineName | None = None) -> Chosen:
    """The settings for a bundle tuned so, here: those of its tuning as far as they fit.

    Plain ones of the first engine that is installed, or of `engine` where that is given, when the bundle was not tuned
    for a CPU, or to another engine, or to one that is not installed. How many threads are best depends on how many
    cores there are: with others than were tuned on, that part is left.
    """
    installed: list[EngineName] = [name for name in ENGINES if is_installed(name)]
    plain = Chosen(CpuSettings(engine=engine or (installed or ["onnxruntime"])[0]))
    if tuning is None or tuning.cpu is None or engine not in (None, tuning.cpu.engine):
        return plain
    found = tuning.cpu
    if found.engine not in installed:
        way_out = f"pip install 'rxdeploy[{EXTRA_OF_MODULE[found.engine]}]' adds it"
        return plain._replace(remark=f"; it is tuned to {ENGINES[found.engine]}, which is not installed: {way_out}")
    if (here := len(os.sched_getaffinity(0))) != tuning.cores:
        untuned = msgspec.structs.replace(found, threads=0, sessions=1, split_from=0)
        return Chosen(untuned, tuning.batch, f"; its threads were tuned on {tuning.cores} core(s), here are {here}")
    return Chosen(found, tuning.batch)


def in_words(settings: CpuSettings) -> str:
    """How settings differ from plain ones, in parentheses; nothing where they do not."""
    threads = f"{settings.threads} thread(s)" if settings.threads else "a thread a core"
    begin = f" for {settings.split_from} images or more" if settings.split_from else ""
    found = {
        f"{settings.sessions} session(s) of {threads}{begin}": settings.sessions > 1 or settings.threads,
        "no spinning": not settings.spinning,
        "no arena": not settings.arena,
        "denormals as zero": settings.denormals_as_zero,
    }
    told = ", ".join(text for text, differs in found.items() if differs)
    return f" ({told})" if told else ""
