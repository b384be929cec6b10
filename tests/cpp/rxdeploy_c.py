"""The C library through ctypes, for the tests here: its structs, its calls, its sessions."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

INPUT_ERROR, ENVIRONMENT_LACKS, CLOSED = 2, 3, 4
SESSION_TEXTS = ("model", "precision", "device", "description", "passed_over", "label")
PILLOW = int(PIL.__version__.partition(".")[0])


class Options(ctypes.Structure):
    """rxdeploy_options."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("device", ctypes.c_char_p),
        ("onnxruntime", ctypes.c_char_p),
        ("tensorrt", ctypes.c_char_p),
        ("labels", ctypes.c_char_p),
        ("threads", ctypes.c_int),
        ("max_batch", ctypes.c_size_t),
        ("max_delay_ms", ctypes.c_double),
        ("queue_size", ctypes.c_size_t),
        ("when_full", ctypes.c_int),
        ("workers", ctypes.c_size_t),
        ("trusted_keys", ctypes.POINTER(ctypes.c_char_p)),
        ("trusted_key_count", ctypes.c_size_t),
    )


class Frame(ctypes.Structure):
    """rxdeploy_frame."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
        ("stride", ctypes.c_ssize_t),
        ("pixels", ctypes.c_int),
    )


class Prediction(ctypes.Structure):
    """rxdeploy_prediction."""

    _fields_ = (("index", ctypes.c_size_t), ("probability", ctypes.c_double), ("logit", ctypes.c_float))


class Failed(Exception):
    """A call that did not return RXDEPLOY_OK."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Library:
    """librxdeploy.so; every function may be called by its name, without the prefix."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.c = ctypes.CDLL(str(path))
        for name in (*SESSION_TEXTS, "last_error", "version", "tensorrt"):
            getattr(self.c, f"rxdeploy_{name}").restype = ctypes.c_char_p
        self.c.rxdeploy_free.restype = self.c.rxdeploy_text_free.restype = None

    def call(self, name: str, *arguments: Any) -> None:
        """Call it; Failed with the library's message."""
        status = getattr(self.c, f"rxdeploy_{name}")(*arguments)
        if status:
            raise Failed(status, self.c.rxdeploy_last_error().decode())

    def transform(
        self,
        frame: NDArray[np.uint8],
        pixels: int,
        size: int,
        crop: float,
        how: int,
        stride: int = 0,
        pillow: int = PILLOW,
    ) -> NDArray[np.uint8]:
        """rxdeploy_transform of (height, width[, channels])."""
        out = np.empty((size, size, 3), np.uint8)
        given = Frame(frame.ctypes.data, frame.shape[1], frame.shape[0], stride or frame.strides[0], pixels)
        where = ctypes.byref(given)
        self.call("transform", where, ctypes.c_size_t(size), ctypes.c_double(crop), how, pillow, pointer(out))
        return out


def pointer(array: NDArray) -> ctypes.c_void_p:
    """The address of an array's memory."""
    return ctypes.c_void_p(array.ctypes.data)


class Session:
    """A rxdeploy_session."""

    def __init__(self, library: Library, bundle: Path, **options: Any) -> None:
        self.library, self.handle = library, ctypes.c_void_p()
        given = Options()
        library.c.rxdeploy_options_init(ctypes.byref(given), ctypes.c_size_t(ctypes.sizeof(given)))
        for name, value in options.items():
            setattr(given, name, value)
        library.call("open", os.fsencode(bundle), ctypes.byref(given), ctypes.byref(self.handle))

    def run(self, images: NDArray, classes: int) -> NDArray[np.float32]:
        """rxdeploy_run or, for float32 images, rxdeploy_run_float32."""
        images = np.ascontiguousarray(images)
        logits = np.empty((len(images), classes), np.float32)
        name = "run" if images.dtype == np.uint8 else "run_float32"
        self.library.call(name, self.handle, pointer(images), ctypes.c_size_t(len(images)), pointer(logits))
        return logits

    def submit(self, image: NDArray, classes: int) -> NDArray[np.float32]:
        """rxdeploy_submit, and wait."""
        request, logits = ctypes.c_void_p(), np.empty(classes, np.float32)
        self.library.call("submit", self.handle, pointer(image), None, ctypes.byref(request))
        self.library.call("request_wait", request, ctypes.c_double(60), pointer(logits))
        self.library.c.rxdeploy_request_free(request)
        return logits

    def top(self, logits: NDArray[np.float32], k: int) -> list[list[tuple[int, float, float]]]:
        """rxdeploy_top: (class, probability, logit)."""
        found = (Prediction * (len(logits) * k))()
        n, most = ctypes.c_size_t(len(logits)), ctypes.c_size_t(k)
        self.library.call("top", self.handle, pointer(logits), n, most, found)
        flat = [(p.index, p.probability, p.logit) for p in found]
        return [flat[row * k : (row + 1) * k] for row in range(len(logits))]

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.library.c.rxdeploy_free(self.handle)
