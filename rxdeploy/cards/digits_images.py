"""The UCI handwritten digits that come with scikit-learn, as images: the data set of the card
digits_resnext14_8x8d, and real image files for a demonstration without a download.

They are the 1797 test digits of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998,
UCI Machine Learning Repository). The writers are mixed here, so the held-out part tells how the model does on new
digits of these 13 people, not on new people.

``python -m rxdeploy.cards.digits_images DIR --count 10`` writes digits that the model has not been trained on;
``--set hard --folders`` a harder version of them for `rxdeploy evaluate`, which the model gets wrong often enough to
show what a change of it costs, and ``--set train --folders`` images to calibrate with.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rxdeploy.atomic import write_bytes
from rxdeploy.cards.registry import find_card
from rxdeploy.errors import EnvironmentLacks, InputError, RxDeployError, from_os_error

CARD = "digits_resnext14_8x8d"
SPLIT_SEED = 0  # fixed before the first training; another seed would put training images into the held-out part
HELD_OUT = 0.3
# The harder version: where fp32 gets 89 % right, by trial. A digit fills the 8x8 pixels, so a shift cuts it.
ANGLE = 30  # degrees, either way
SHIFT = 1  # pixels, either way, along each axis
NOISE = 40  # 256ths of the sum of eight bytes: a standard deviation of 33 grey levels
VARIANTS = 10
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


def hard(count: int = 540 * VARIANTS, seed: int = 0) -> Digits:
    """The held-out digits turned, shifted and noisy: `count` images, all 540 of them before any comes again.

    The same on every machine, as only integers are computed with; a smaller `count` gives the first of a larger one.
    InputError for a `count` below 1, EnvironmentLacks without scikit-learn.
    """
    if count < 1:
        raise InputError(f"count {count}: choose at least 1 digit")
    held_out = split()[1]
    place = np.arange(count) % len(held_out.labels)
    # The bit generator's stream is guaranteed by NumPy; its distributions' are not.
    words = np.random.PCG64(seed).random_raw(count * (3 + 64)).reshape(count, 3 + 64)
    moved = _moved(held_out.images[place][..., 0], words[:, :3])
    grain = words[:, 3:].astype("<u8").view(np.uint8).reshape(count, 8, 8, 8).sum(-1, dtype=np.int64) - 8 * 255 // 2
    grey = np.clip(moved + (grain * NOISE + 128 >> 8), 0, 255).astype(np.uint8)
    return Digits(np.repeat(grey[..., None], 3, axis=-1), held_out.labels[place], held_out.indices[place])


def _moved(grey: NDArray[np.uint8], words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Images (n, 8, 8) turned and shifted as the random `words` (n, 3) say, black beyond; bilinear, 0..255.

    In units of 2^-13 pixels, since rounding a float may differ between machines; only the sine and cosine are floats,
    and rounded to 12 bits.
    """
    limits = np.array([ANGLE * 1000, SHIFT * 2**13, SHIFT * 2**13])
    angle, right, down = (((words >> 40).astype(np.int64) * (2 * limits + 1) >> 24) - limits).T[..., None, None]
    turn = np.deg2rad(angle / 1000)
    cos, sin = (np.rint(2**12 * f(turn)).astype(np.int64) for f in (np.cos, np.sin))
    half = 2 * np.arange(8) - 7  # half pixels from the centre
    x = cos * half - sin * half[:, None] + right + 7 * 2**12
    y = sin * half + cos * half[:, None] + down + 7 * 2**12

    source = np.pad(grey.astype(np.int64), ((0, 0), (2, 2), (2, 2)))
    column, row = (np.clip((axis >> 13) + 2, 0, 10) for axis in (x, y))  # the black edge is met beyond
    image, part_x, part_y = np.arange(len(grey))[:, None, None], x & 2**13 - 1, y & 2**13 - 1

    def along(row: NDArray[np.int64]) -> NDArray[np.int64]:
        return source[image, row, column] * (2**13 - part_x) + source[image, row, column + 1] * part_x

    return along(row) * (2**13 - part_y) + along(row + 1) * part_y + 2**25 >> 26


def choose(digits: Digits, count: int, seed: int = 0) -> Digits:
    """`count` of the digits, chosen by `seed`; classes take turns. InputError when there are not so many."""
    total = len(digits.labels)
    if not 1 <= count <= total:
        raise InputError(f"count {count}: there are {total} of these digits, so choose 1 to {total}")
    shuffled = np.argsort(np.random.PCG64(seed).random_raw(total))  # see hard()
    labels = digits.labels[shuffled]
    turn = np.array([np.count_nonzero(labels[:place] == label) for place, label in enumerate(labels)])
    chosen = shuffled[np.lexsort((labels, turn))][:count]
    return Digits(digits.images[chosen], digits.labels[chosen], digits.indices[chosen])


def write_held_out(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Write `count` held-out digits to `folder` as 8x8 greyscale files ``digit-<label>-<index>.png``.

    `seed` chooses which ones. Classes take turns, so that ten files show ten different digits. InputError for
    an impossible `count` or a folder that cannot be written, EnvironmentLacks without scikit-learn.
    """
    return write_files(choose(split()[1], count, seed), folder)


def write_files(digits: Digits, folder: Path, by_class: bool = False) -> list[Path]:
    """Write greyscale files ``digit-<label>-<index>.png`` to `folder`, or `by_class` to ``zero`` .. ``nine`` in it.

    Where a digit comes again, ``-1``, ``-2`` ... is added to its name. InputError when they cannot be written.
    """
    classes = find_card(CARD).class_names() or () if by_class else ()
    seen: Counter[int] = Counter()
    paths = []
    try:
        for image, label, index in zip(*digits, strict=True):
            again = f"-{seen[index]}" if seen[index] else ""
            seen[index] += 1
            path = folder.joinpath(*classes[label : label + 1], f"digit-{label}-{index}{again}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(path)
            paths.append(path)
    except OSError as error:
        raise from_os_error(error, f"writing digits to {folder}") from None
    return paths


def write_npz(digits: Digits, path: Path) -> None:
    """Write arrays `images` and `labels` to an .npz file. InputError when it cannot be written."""
    content = io.BytesIO()
    np.savez_compressed(content, images=digits.images, labels=digits.labels)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content.getvalue())
    except OSError as error:
        raise from_os_error(error, f"writing digits to {path}") from None


def _digits(name: str, count: int | None, seed: int) -> Digits:
    if name == "hard":
        return hard(seed=seed) if count is None else hard(count, seed)
    train, held_out = split()
    if name == "train":
        return choose(train, len(train.labels) if count is None else count, seed)
    return choose(held_out, 10 if count is None else count, seed)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rxdeploy.cards.digits_images",
        description=f"Write handwritten digits for {CARD} as PNG files, or as an .npz file of images and labels.",
    )
    parser.add_argument("to", type=Path, metavar="DIR|FILE.npz", help="where to write them; created when missing")
    parser.add_argument(
        "--set",
        choices=("held-out", "hard", "train"),
        default="held-out",
        help="those it was not trained on, these turned, shifted and noisy, or its training data (default: held-out)",
    )
    parser.add_argument("--count", type=int, metavar="N", help="how many (default: 10 held-out, 5400 hard, all train)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="chooses or distorts (default: %(default)s)")
    parser.add_argument("--folders", action="store_true", help="a folder for each class, as `rxdeploy evaluate` reads")
    args = parser.parse_args(argv)
    try:
        digits = _digits(args.set, args.count, args.seed)
        if args.to.suffix == ".npz":
            write_npz(digits, args.to)
        else:
            write_files(digits, args.to, by_class=args.folders)
    except RxDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{len(digits.labels)} digits written to {args.to}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
