"""The UCI handwritten digits that come with scikit-learn, as images: the data set of the card
digits_resnext14_8x8d, and real image files for a demonstration without a download.

They are the 1797 test digits of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998,
UCI Machine Learning Repository). The writers are mixed here, so the held-out part tells how the model does on new
digits of these 13 people, not on new people.

``python -m rxdeploy.cards.digits_images DIR --count 10`` writes digits that the model has not been trained on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rxdeploy.errors import EnvironmentLacks, InputError, RxDeployError, from_os_error

SPLIT_SEED = 0  # fixed before the first training; another seed would put training images into the held-out part
HELD_OUT = 0.3
LEVELS = 16  # the data set's values are 0..16: the set pixels of each 4x4 cell of the scanned 32x32 bitmap


class Digits(NamedTuple):
    """Images with their classes; the first axes correspond."""

    images: NDArray[np.uint8]  # (n, 8, 8, 3), RGB with equal channels, white digit on black
    labels: NDArray[np.int64]  # (n,), 0..9
    indices: NDArray[np.int64]  # (n,), position in scikit-learn's data set


def split() -> tuple[Digits, Digits]:
    """The 1257 training digits and the 540 held-out ones: 70 % and 30 % of each class, always the same.

    EnvironmentLacks when scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError:
        raise EnvironmentLacks(
            "the digits are part of scikit-learn, which is not installed here; pip install scikit-learn adds it"
        ) from None

    data = load_digits()
    grey = np.rint(data.images * (255 / LEVELS)).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=-1)
    labels = data.target.astype(np.int64)
    parts = train_test_split(np.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=SPLIT_SEED)
    train, held_out = (Digits(images[part], labels[part], part) for part in parts)
    return train, held_out


def write_held_out(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Write `count` held-out digits to `folder` as 8x8 greyscale files ``digit-<label>-<index>.png``.

    `seed` chooses which ones. Classes take turns, so that ten files show ten different digits. InputError for
    an impossible `count` or a folder that cannot be written, EnvironmentLacks without scikit-learn.
    """
    held_out = split()[1]
    total = len(held_out.labels)
    if not 1 <= count <= total:
        raise InputError(f"count {count}: there are {total} held-out digits, so choose 1 to {total}")
    # The bit generator's stream is guaranteed by NumPy; its distributions' are not.
    shuffled = np.argsort(np.random.PCG64(seed).random_raw(total))
    labels = held_out.labels[shuffled]
    turn = np.array([np.count_nonzero(labels[:place] == label) for place, label in enumerate(labels)])
    chosen = shuffled[np.lexsort((labels, turn))][:count]

    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place in chosen:
            path = folder / f"digit-{held_out.labels[place]}-{held_out.indices[place]}.png"
            Image.fromarray(held_out.images[place][..., 0]).save(path)
            paths.append(path)
    except OSError as error:
        raise from_os_error(error, f"writing digits to {folder}") from None
    return paths


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rxdeploy.cards.digits_images",
        description="Write handwritten digits that digits_resnext14_8x8d was not trained on, as PNG files.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write them; created when missing")
    parser.add_argument("--count", type=int, default=10, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="chooses which ones (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        paths = write_held_out(args.folder, args.count, args.seed)
    except RxDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{len(paths)} digits written to {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
