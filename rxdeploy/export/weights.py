"""Weights for a card: published, from a user's file, or synthetic; checked against the architecture.

Nothing is unpickled but tensors: `.pth` files are read with ``weights_only=True``, so a file that carries code is
refused, not run.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rxdeploy.cards import ModelCard
from rxdeploy.cards.card import Weights
from rxdeploy.engines.bundle import WeightsOrigin, sha256_of
from rxdeploy.errors import EnvironmentLacks, InputError, first_line, from_os_error, missing_module, printable
from rxdeploy.export.architecture import count_parameters, resnext

if TYPE_CHECKING:
    from torch import Tensor

StateDict = dict[str, NDArray[np.float32]]

# Keys under which training scripts store the model, tried in this order: an average of the weights first.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
# Prefixes that DataParallel, torch.compile and Lightning put before every name.
PREFIXES = ("module.", "_orig_mod.", "model.")
MAX_FILE_BYTES = 2**36  # of a weights file: the largest model 32 times over, for training state beside the weights
MAX_MODEL_BYTES = 2**31 - 2**20  # protobuf ends at 2 GiB; the graph itself needs far less than 1 MiB
LISTED = 20  # misfits of one kind that an error lists before it counts the rest


@dataclass(frozen=True)
class WeightsSource:
    """Where weights come from, settled before they are read."""

    origin: WeightsOrigin
    path: Path | None = None
    seed: int | None = None

    @property
    def identity(self) -> str:
        """What determines the weights, for cache keys: the file's sha256, or synthetic:SEED."""
        return self.origin.sha256 or self.origin.source


def resolve_weights(
    card: ModelCard, option: str | None, folder: Path, progress: Callable[[int, int | None], None] | None = None
) -> WeightsSource:
    """Settle where the weights of `card` come from.

    `option` is what --weights says: a path, ``synthetic[:SEED]``, or None for the card's own, which are
    fetched into `folder` when the card gives a URL.
    """
    if option is not None and (option == "synthetic" or option.startswith("synthetic:")):
        seed = _seed(option)
        return WeightsSource(WeightsOrigin(kind="synthetic", source=f"synthetic:{seed}", sha256=None), seed=seed)
    if option is not None:
        return _from_file(Path(option))
    if card.weights.file:
        return _from_file(card.beside(card.weights.file), card.weights)
    if card.weights.url:
        from rxdeploy.export.download import fetch_weights

        path = fetch_weights(card, folder, progress)
        url, licence = card.weights.url, card.weights.licence
        return WeightsSource(
            WeightsOrigin(kind="published", source=url, sha256=sha256_of(path), licence=licence), path=path
        )
    raise InputError(
        f"card {card.name}: names no weights (neither url nor file); pass --weights PATH, or --weights synthetic"
    )


def _seed(option: str) -> int:
    text = option.partition(":")[2] or "0"
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise InputError(f"--weights {option}: the seed must be a whole number from 0 to 999999999")
    return int(text)


def _from_file(path: Path, claims: Weights | None = None) -> WeightsSource:
    """Weights in a file; `claims` are what the card says of it, checked."""
    if path.exists() and not path.is_file():
        raise InputError(f"weights file {path}: not a plain file")  # reading a device or a pipe might never end
    try:
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise InputError(f"weights file {path}: {size:,} bytes; no model that one ONNX file can hold has so many")
        digest = sha256_of(path)
    except FileNotFoundError:
        raise InputError(f"weights file {path}: no such file") from None
    except OSError as error:
        raise from_os_error(error, f"reading weights file {path}") from None
    prefix = claims and claims.sha256_prefix
    if prefix and not digest.startswith(prefix):
        raise InputError(
            f"weights file {path}: sha256 begins {digest[: len(prefix)]}, the card says {prefix}; "
            "put the right file there, or correct the card"
        )
    if claims and claims.file_size not in (None, size):
        raise InputError(
            f"weights file {path}: has {size} bytes, the card says {claims.file_size}; correct one of them"
        )
    licence = claims.licence if claims else None
    return WeightsSource(WeightsOrigin(kind="file", source=path.name, sha256=digest, licence=licence), path=path)


def load_weights(card: ModelCard, source: WeightsSource) -> StateDict:
    """The weights, float32, one array for every tensor of `ResNeXt.state_shapes`; InputError when they do not fit."""
    if source.seed is not None:
        from rxdeploy.export.synthetic import synthetic_weights

        return synthetic_weights(card, source.seed)
    assert source.path is not None
    tensors = _plain_names(_read_tensors(source.path))
    _check_shapes(card, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, source.path)
    weights = {name: _array(source.path, name, tensors[name]) for name in resnext(card).state_shapes()}
    _check_values(weights, source.path)
    return weights


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors or PyTorch file, wrappers removed."""
    try:
        import safetensors.torch
        import torch
    except ModuleNotFoundError as error:
        raise missing_module(error) from None
    try:
        with path.open("rb") as file:
            head = file.read(9)
        # By content, not by name: a safetensors file begins with the length of its JSON header.
        if head[8:9] == b"{":
            stored = safetensors.torch.load_file(path)
        else:
            _refuse_inflating(path)
            with torch.serialization.safe_globals(_harmless()):
                stored = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise EnvironmentLacks(f"weights file {path}: does not fit into memory") from None
    except pickle.UnpicklingError as error:
        raise InputError(_unpickling(path, error)) from None
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise from_os_error(error, f"reading weights file {path}") from None
    except InputError:
        raise
    except Exception as error:  # what torch and safetensors raise depends on where in the file they stumble
        if "weights_only" in str(error):  # advice to run whatever is in it
            raise InputError(_unpickling(path, error)) from None
        reason = printable(first_line(error))
        raise InputError(f"weights file {path}: damaged or in no format we read: {reason}") from None
    tensors = _unwrap(stored)
    if not tensors:
        keys = _listed("it holds", [str(key) for key in stored]) if isinstance(stored, Mapping) else ""
        raise InputError(
            f"weights file {path}: holds no tensors by name; expected a state dict (.pth or .safetensors){keys}"
        )
    return tensors


def _refuse_inflating(path: Path) -> None:
    """InputError for a zip that is larger unpacked: torch.save does not compress, so somebody made a bomb."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > path.stat().st_size:
        raise InputError(
            f"weights file {path}: unpacks to {unpacked:,} bytes, more than it has, which no file of torch.save does"
        )


def _harmless() -> list[Any]:
    """What training scripts keep beside the weights, and cannot do anything: their arguments, and NumPy's numbers."""
    return [argparse.Namespace, np.float64(0).__reduce__()[0], np.dtype, *map(type, map(np.dtype, "fdil"))]


def _array(path: Path, name: str, tensor: Tensor) -> NDArray[np.float32]:
    import torch

    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex():
        raise InputError(f"weights file {path}: {name} is no plain tensor of real numbers, with data")
    return tensor.detach().to(torch.float32).contiguous().numpy()


def _unpickling(path: Path, error: Exception) -> str:
    """What to say of a file that torch refuses to unpickle; its own text would advise to do so all the same."""
    text = str(error)
    if "GLOBAL" in text or "Unsupported global" in text or "Unsupported class" in text:
        found = re.search(r"GLOBAL (\S+)", text)
        what = f" ({found.group(1)})" if found else ""
        return (
            f"weights file {path}: contains pickled code{what}, which rxdeploy does not run; save only the state dict: "
            "torch.save(model.state_dict(), path)"
        )
    return f"weights file {path}: damaged, no PyTorch file, or with more in it than tensors; nothing of it was run"


def _unwrap(stored: Any) -> dict[str, Tensor]:
    """The state dict inside what a training script saved; {} when there is none."""
    import torch

    for _ in range(len(WRAPPERS)):  # deeper nesting is none of the usual wrappers, and may be endless
        if not isinstance(stored, Mapping):
            break
        tensors = {name: value for name, value in stored.items() if isinstance(value, torch.Tensor)}
        inner = next((stored[key] for key in WRAPPERS if isinstance(stored.get(key), Mapping)), None)
        if inner is None:
            return {str(name): value for name, value in tensors.items()}
        stored = inner
    return {}


def _plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without wrappers' prefixes and without batch-norm's step counters."""
    names = {name: name for name in tensors}
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in names.values())), None):
        names = {original: name.removeprefix(prefix) for original, name in names.items()}
    return {name: tensors[original] for original, name in names.items() if not name.endswith("num_batches_tracked")}


def _check_shapes(card: ModelCard, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """InputError listing every name and shape that does not fit the card's architecture."""
    expected = resnext(card).state_shapes()
    misfits = [
        _listed("missing", [name for name in expected if name not in shapes]),
        _listed("unexpected", [name for name in shapes if name not in expected]),
        _listed(
            "of another shape",
            [
                f"{name} {list(shapes[name])} where the card needs {list(shape)}"
                for name, shape in expected.items()
                if name in shapes and shapes[name] != shape
            ],
        ),
    ]
    if any(misfits):
        found, hint = shapes.get("fc.bias", ()), ""
        if len(found) == 1 and found[0] != card.architecture.num_classes:
            hint = (
                f"\n  the file has {found[0]} classes: a card of your own with num_classes = {found[0]} can deploy it"
            )
        raise InputError(
            f"weights file {path}: does not fit {card.name} ({len(shapes)} tensors, {len(expected)} needed)"
            + "".join(misfits)
            + hint
        )


def _check_values(weights: StateDict, path: Path) -> None:
    bad = [name for name, array in weights.items() if not np.isfinite(array).all()]
    bad += [name for name, array in weights.items() if name.endswith("running_var") and (array < 0).any()]
    if bad:
        raise InputError(f"weights file {path}: holds NaN, infinity or a negative variance{_listed('in', bad)}")


def _listed(what: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f", and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return f"\n  {what}: {', '.join(map(printable, items[:LISTED]))}{more}"


def check_parameters(card: ModelCard) -> None:
    """InputError when the card's parameter figure is not that of its architecture, or too large for an ONNX file.

    The figure may be rounded: it has to agree within half of its last non-zero decimal place.
    """
    claimed, counted = card.figures.parameters, count_parameters(resnext(card))
    if counted * 4 > MAX_MODEL_BYTES:
        raise InputError(
            f"card {card.name}: its architecture has {counted:,} parameters, more than one ONNX file can hold (2 GiB)"
        )
    if claimed is None:
        return
    place = 10 ** (len(str(claimed)) - len(str(claimed).rstrip("0")))
    if abs(claimed - counted) > place / 2:
        raise InputError(
            f"card {card.name}: figures.parameters is {claimed:,}, but its architecture has {counted:,}; "
            "correct one of them"
        )
