"""The errors a user can meet, one hierarchy, each with the exit code of the command line.

An error's text names the thing, the cause and the way out; it is printed as it stands, without a
traceback. Anything that is not an RxDeployError reaching the command line is a bug of ours.
"""

from __future__ import annotations

import errno


class RxDeployError(Exception):
    """Base of every error rxdeploy raises on purpose."""

    exit_code = 2


class CheckFailed(RxDeployError):
    """A check ran and the answer is no: validation, accuracy, integrity of what was computed."""

    exit_code = 1


class InputError(RxDeployError):
    """What the user gave cannot be used: an option, a card, weights, an image, a bundle."""

    exit_code = 2


class EnvironmentLacks(RxDeployError):
    """This machine lacks something: TensorRT, a GPU, the network, a package, room on the disk."""

    exit_code = 3


# What each extra brings, so that an error about a missing module can name the command that adds it.
EXTRA_OF_MODULE = {
    "torch": "build",
    "onnx": "build",
    "onnx_ir": "build",
    "safetensors": "build",
    "httpx": "build",
    "filelock": "build",
    "platformdirs": "build",
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "matplotlib": "bench",
    "tensorrt_rtx": "rtx",
    "tensorrt": "tensorrt",
    "cryptography": "verify",
    "model_signing": "sign",
    "OpenSSL": "sign",
}


# And of those that several extras bring.
_PACKAGES_OF_MODULE = {"cuda": "cuda-bindings cuda-core"}


def first_line(error: Exception) -> str:
    """The first line of another library's error, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_LONGEST = 300  # characters of a text from a file, in an error or a table


def printable(text: str) -> str:
    """`text` from a file we did not write, fit for a terminal: control characters become question marks, and what is
    longer than a line can be ends in "..."."""
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return one_line(text)


def one_line(text: str) -> str:
    """`text` without any control character: each becomes "?"."""
    return inert(text).replace("\n", "?")


def inert(text: str) -> str:
    """`text` without what a terminal would take for a command: control characters but line feeds become "?"."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def missing_module(error: ModuleNotFoundError) -> EnvironmentLacks:
    """The error for a module that is not installed, with the command that installs it."""
    module = (error.name or "?").partition(".")[0]
    extra = EXTRA_OF_MODULE.get(module)
    way_out = f"pip install 'rxdeploy[{extra}]'" if extra else f"pip install {_PACKAGES_OF_MODULE.get(module, module)}"
    return EnvironmentLacks(f"the Python module {module} is not installed here; {way_out} adds it")


def from_os_error(error: OSError, doing: str) -> RxDeployError:
    """Translate an operating-system error met while `doing` something (a gerund phrase)."""
    reason = error.strerror or str(error)
    name = error.filename2 or error.filename  # a copy fails for its destination
    where = f" ({name})" if name else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EnvironmentLacks(f"{doing}: {reason}{where}; free some room, or choose another folder")
    return InputError(f"{doing}: {reason}{where}")
