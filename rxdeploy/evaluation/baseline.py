"""The stored baseline: a small JSON file to commit, with one bundle's prediction for each image.

Images are known by the first 64 bits of their sha256, so the file stays true when images are renamed or moved, and
stays small. Labels are not in it: both models are judged by the labels of the day.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from rxdeploy import __version__, atomic
from rxdeploy.errors import InputError, from_os_error
from rxdeploy.evaluation.accuracy import Evaluation
from rxdeploy.evaluation.predictions import Predicted
from rxdeploy.plainfile import read_plain

KIND: Literal["rxdeploy accuracy baseline"] = "rxdeploy accuracy baseline"
_DIGITS = 16  # of the hexadecimal digest: of 50 000 images, two share them with a probability of 7e-11
_MOST_BYTES = 1 << 30

Key = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]
Class = Annotated[int, msgspec.Meta(ge=0)]


class Baseline(msgspec.Struct, frozen=True, kw_only=True):
    """Predictions of one bundle, and of which; `right` and `right_in_top5` of `images` by the labels of that day."""

    kind: Literal["rxdeploy accuracy baseline"] = KIND
    schema: Literal[1] = 1
    model: str
    precision: str
    weights: str
    bundle: str  # the manifest's digest
    device: str  # Session.description
    rxdeploy: str = __version__
    num_classes: Annotated[int, msgspec.Meta(ge=1)]
    classes: Key | None = None  # `classes_digest` of the bundle's class names; older files have none
    images: Annotated[int, msgspec.Meta(ge=1)]
    right: Class
    right_in_top5: Class
    predictions: Annotated[dict[Key, Class], msgspec.Meta(min_length=1)]

    def of(self, image: Predicted) -> int | None:
        """The class that it gave to the image of another prediction; None when it has not seen it."""
        return self.predictions.get(image.sha256[:_DIGITS])

    def missing(self, images: Iterable[Predicted]) -> int:
        """How many of the images that it has seen are not among these."""
        return len(self.predictions.keys() - {image.sha256[:_DIGITS] for image in images})


def classes_digest(names: Sequence[str] | None) -> str | None:
    """What tells class names in the order of the logits from others, or from the same in another order."""
    if names is None:
        return None
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()[:_DIGITS]


def from_evaluation(evaluation: Evaluation) -> Baseline:
    """What is to be stored of an evaluation."""
    manifest = evaluation.bundle.manifest
    return Baseline(
        model=manifest.model,
        precision=manifest.precision,
        weights=manifest.weights.source,
        bundle=manifest.digest,
        device=evaluation.description,
        num_classes=manifest.num_classes,
        classes=classes_digest(evaluation.bundle.labels()),
        images=evaluation.images,
        right=evaluation.right,
        right_in_top5=evaluation.right_in_top5,
        predictions=dict(sorted((p.sha256[:_DIGITS], p.top[0]) for p in evaluation.predictions)),
    )


def read_baseline(path: Path) -> Baseline:
    """The baseline in a file; InputError when it is none."""
    makes = f"`rxdeploy evaluate BUNDLE --data DIR --save-baseline {path}` makes one"
    try:
        if not path.exists():
            raise InputError(f"baseline {path}: no such file or bundle; {makes}")
        if not path.is_file():
            raise InputError(f"baseline {path}: neither a bundle nor a plain file")
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise from_os_error(error, f"baseline {path}") from None
    data = read_plain(path, f"baseline {path}", _MOST_BYTES)
    try:
        return msgspec.json.decode(data, type=Baseline)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"baseline {path}: neither a bundle nor a baseline ({error}); {makes}") from None


def write_baseline(baseline: Baseline, path: Path) -> None:
    """Write it, an image a line in the order of the digests, so that version control shows what changed."""
    data = msgspec.json.format(msgspec.json.encode(baseline), indent=1)
    try:
        atomic.write_bytes(path, data + b"\n")
    except OSError as error:
        raise from_os_error(error, f"baseline {path}") from None
