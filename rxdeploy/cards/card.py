"""ModelCard: everything rxdeploy knows about one model before it sees the weights.

A card is one TOML file. It is read strictly: an unknown key, a missing one, a wrong type or an absurd
value is an error that names the file, the place and the reason.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from rxdeploy.errors import InputError, printable
from rxdeploy.plainfile import read_plain

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MOST_BYTES = 1 << 20  # of a card: the longest here has 1 KB
EXPANSION = 4  # a bottleneck's output has four times its `channels` (Xie et al. 2016, table 1)

Positive = Annotated[int, msgspec.Meta(ge=1)]
Percent = Annotated[float, msgspec.Meta(ge=0, le=100)]
Stages = Annotated[tuple[Positive, ...], msgspec.Meta(min_length=1, max_length=8)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z", max_length=100)]
Rgb = tuple[float, float, float]


class _Strict(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A part of a card: no unknown keys, no changes after loading."""


class Architecture(_Strict, kw_only=True, frozen=True):
    """A ResNeXt of bottleneck blocks.

    Block width is ``channels * base_width / 64 * cardinality`` and output width ``4 * channels``, stage by
    stage, as in Xie et al. 2016 and in the timm and torchvision implementations.
    """

    layers: Stages  # blocks a stage
    channels: Stages = (64, 128, 256, 512)
    cardinality: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    base_width: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    stem_width: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64
    num_classes: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.channels):
            raise ValueError(
                f"`layers` has {len(self.layers)} stages and `channels` has {len(self.channels)}; "
                "they must have the same number"
            )
        if max(self.layers) > 200 or max(self.channels) > 16384:
            raise ValueError("more than 200 blocks or 16384 channels in a stage is no ResNeXt we can build")
        for channels in self.channels:
            if channels * self.base_width % 64:
                raise ValueError(
                    f"channels {channels} x base_width {self.base_width} is not a multiple of 64, so a block's "
                    "width is not a whole number"
                )

    def width(self, stage: int) -> int:
        """Channels of the grouped 3x3 convolution in `stage` (0-based)."""
        return self.channels[stage] * self.base_width // 64 * self.cardinality


class Input(_Strict, kw_only=True, frozen=True):
    """The evaluation transform: what an image becomes before the model sees it."""

    image_size: Annotated[int, msgspec.Meta(ge=32, le=4096)]  # pixels, height = width
    crop_pct: Annotated[float, msgspec.Meta(ge=0.1, le=1)]  # image_size over the resized shorter side
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos"]
    mean: Rgb  # RGB, of values scaled to 0..1
    std: Rgb

    def __post_init__(self) -> None:
        if not all(0 <= value <= 1 for value in self.mean):
            raise ValueError("`mean` must lie in 0..1 (of RGB values scaled to 0..1)")
        if not all(0 < value <= 10 for value in self.std):
            raise ValueError("`std` must be above 0 (of RGB values scaled to 0..1)")


class Weights(_Strict, kw_only=True, frozen=True):
    """Where the published weights are: a `url` to fetch, or a `file` beside the card."""

    url: Annotated[str, msgspec.Meta(pattern=r"^https?://")] | None = None
    file: str | None = None
    file_size: Positive | None = None  # bytes
    sha256_prefix: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{8,64}\Z")] | None = None
    licence: str | None = None

    def __post_init__(self) -> None:
        if self.url and self.file:
            raise ValueError("give `url` or `file`, not both")
        if self.url and not self.sha256_prefix:
            raise ValueError("a `url` needs a `sha256_prefix` (8 to 64 hexadecimal digits) to check the download")


class Figures(_Strict, kw_only=True, frozen=True):
    """The card's published figures, as published: rounded parameters, FLOPs in the card's own unit."""

    parameters: Positive | None = None
    flops: Positive | None = None


class Accuracy(_Strict, kw_only=True, frozen=True):
    """Published accuracy on the evaluation set, in percent."""

    dataset: str
    top1: Percent
    top5: Percent | None = None

    def __post_init__(self) -> None:
        if self.top5 is not None and self.top5 < self.top1:
            raise ValueError(f"top5 {self.top5} is below top1 {self.top1}")


class Source(_Strict, kw_only=True, frozen=True):
    """Where model and paper come from."""

    collection: str | None = None
    paper: str | None = None
    paper_url: str | None = None
    code: str | None = None
    training_data: tuple[str, ...] = ()


class ModelCard(_Strict, kw_only=True, frozen=True):
    """One deployable model; see `load_card` for reading one from a file."""

    schema: Literal[1]
    name: Name
    aliases: tuple[Name, ...] = ()
    description: str = ""
    architecture: Architecture
    input: Input
    weights: Weights = msgspec.field(default_factory=Weights)
    labels: str | None = None  # file beside the card, one class a line
    figures: Figures = msgspec.field(default_factory=Figures)
    accuracy: Accuracy | None = None
    source: Source = msgspec.field(default_factory=Source)

    # Set by load_card, never read from the file.
    path: Path | None = None

    @property
    def digest(self) -> str:
        """sha256 of the card's content: two cards with the same facts have the same digest."""
        return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(self, path=None))).hexdigest()

    def beside(self, name: str) -> Path:
        """A file the card names, relative to the card's own folder."""
        assert self.path is not None, "only a card read from a file can name files beside it"
        return self.path.parent / name

    def class_names(self) -> tuple[str, ...] | None:
        """The class names in the order of the logits, or None when the card has no labels."""
        return read_labels(self.beside(self.labels), self.architecture.num_classes) if self.labels else None


def load_card(path: Path) -> ModelCard:
    """Read and validate the card at `path`; InputError names the file, the place and the reason."""
    data = read_plain(path, f"card {path}", _MOST_BYTES)
    try:
        table = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError(f"card {path}: not a TOML file: {printable(str(error))}") from None
    if "path" in table:
        raise InputError(f"card {path}: Object contains unknown field `path`")
    try:
        card = msgspec.convert(table, ModelCard)
    except msgspec.ValidationError as error:
        where = re.sub(r"\$\.?", "", str(error)).replace(" - at ``", "")
        raise InputError(
            f"card {path}: {printable(where)}; the built-in cards in rxdeploy/cards/builtin show the format"
        ) from None
    return msgspec.structs.replace(card, path=path.resolve())


def read_labels(path: Path, num_classes: int) -> tuple[str, ...]:
    """Class names from a text file, one class a line, in the order of the logits.

    A line may be ``name`` or ``identifier<TAB>name`` (as in imagenet1k.tsv, where the identifier is the
    WordNet synset). InputError when the number of lines is not `num_classes`.
    """
    data = read_plain(path, f"labels file {path}")
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"labels file {path}: cannot be read as UTF-8 text: {error}") from None
    while lines and not lines[-1].strip():
        lines.pop()
    if len(lines) != num_classes:
        raise InputError(f"labels file {path}: {len(lines)} lines, but the model has {num_classes} classes")
    return tuple(line.rpartition("\t")[2].strip() for line in lines)
