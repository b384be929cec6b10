"""calibration.json: what a calibration found, for people to read and for other builds to use."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from rxdeploy.calibration.equalise import pairs
from rxdeploy.calibration.network import Network
from rxdeploy.calibration.options import METHODS, SchemeName, quantisable
from rxdeploy.calibration.recipe import Recipe, tensors
from rxdeploy.errors import InputError, printable
from rxdeploy.plainfile import read_plain

SCHEMA: Literal[1] = 1
_LARGEST = 1e6  # of a range: its scale has to fit float16
_LINE = 600  # characters: what is known of a tensor


class Data(msgspec.Struct, kw_only=True, frozen=True):
    """The images: which, how many, and what identifies them."""

    source: str
    layout: str
    images: int  # that ranges were found on
    held_out: int  # that methods were chosen on
    seed: int | None  # of the sample; None for an explicit list
    fingerprint: str  # of names, sizes and times: tells cheaply whether anything changed
    content_sha256: str  # of the images' own digests, in order
    skipped: tuple[tuple[str, str], ...] = ()  # names and reasons


class TensorFacts(msgspec.Struct, kw_only=True, frozen=True):
    """A tensor's extremes, and the range that each method gives for each scheme."""

    low: float
    high: float
    ranges: dict[str, dict[str, tuple[float, float]]]  # {scheme: {method: (low, high)}}


class TrialFacts(msgspec.Struct, kw_only=True, frozen=True):
    """Something that was tried: the relative L2 error of the held-out logits, and whether it was taken."""

    what: str
    error: float
    taken: bool


class Record(msgspec.Struct, kw_only=True, frozen=True):
    """The file. `recipes` has one for each target that it was made for."""

    schema: Literal[1] = SCHEMA
    rxdeploy: str
    model: str
    model_sha256: str  # `model_digest`
    data: Data
    tensors: dict[str, TensorFacts]
    recipes: dict[SchemeName, Recipe]
    errors: dict[SchemeName, float]  # of each recipe, on the held-out images
    trials: dict[SchemeName, tuple[TrialFacts, ...]]
    # Of each tensor's values on the images that ranges were found on, the share that the recipe's range cuts off. (Not
    # in files of earlier versions, nor for a recipe that was taken over from another target or method.)
    clipped: dict[SchemeName, dict[str, float]] = {}


def model_digest(network: Network) -> str:
    """sha256 over the folded parameters, as they are before anything is quantised: says which model it is."""
    # What the ranges depend on besides the weights: how images become inputs, and the layers' strides and groups.
    digest = hashlib.sha256(repr((network.card.input, network.shape)).encode())
    for layer, own in network.parameters.items():
        digest.update(layer.encode())
        for tensor in (own.weight, own.bias):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_record(path: Path, network: Network) -> Record:
    """The calibration in a file. InputError when it is none, is damaged or altered, or is of another model."""
    data = read_plain(path, f"calibration {path}")
    try:
        head = msgspec.json.decode(data)
        if isinstance(head, dict) and isinstance(head.get("schema"), int) and head["schema"] > SCHEMA:
            raise InputError(
                f"calibration {path}: it has schema {head['schema']}, this rxdeploy reads up to {SCHEMA}; "
                "install a newer one"
            )
        record = msgspec.convert(head, Record)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"calibration {path}: damaged, or not made by rxdeploy: {error}; calibrate again") from None
    model = network.card.name
    if record.model_sha256 != model_digest(network):
        what = (
            f"of {printable(record.model)}" if record.model != model else f"of other weights or another card of {model}"
        )
        raise InputError(f"calibration {path}: it is {what}, and ranges of one model mean nothing to another")
    if problem := next(_problems(record, network), None):
        raise InputError(f"calibration {path}: {problem}; calibrate again")
    return record


def _problems(record: Record, network: Network) -> Iterator[str]:
    """What no calibration of this model has."""
    schemes: tuple[SchemeName, ...] = get_args(SchemeName)
    for scheme in schemes:
        for name in tensors(network, scheme):
            facts = record.tensors.get(name)
            ranges = facts.ranges.get(scheme, {}) if facts else {}
            if set(ranges) != set(METHODS):
                yield f"the tensor {name} has not every method's range for {scheme}"
            yield from (f"the range of {name} is {ends}" for ends in ranges.values() if not _is_range(ends))
    channels = {conv.name: conv.out_channels for conv in network.shape.convs()}
    for scheme, recipe in record.recipes.items():
        if recipe.scheme != scheme or not 2 <= recipe.weight_bits <= 8:
            yield f"the recipe for {scheme} is for {recipe.scheme}, with {recipe.weight_bits} bits"
        if unknown := set(recipe.keep) - set(quantisable(network.shape, scheme)):
            yield f"it keeps {printable(min(unknown))} in float, which {scheme} does not quantise"
        for name in tensors(network, scheme):
            if name not in recipe.ranges or not _is_range(recipe.ranges[name]):
                yield f"the range of {name} for {scheme} is {recipe.ranges.get(name, 'missing')}"
        for layer, shifts in recipe.bias.items():
            if len(shifts) != channels.get(layer) or not all(map(math.isfinite, shifts)):
                yield f"the bias correction of {printable(layer)} does not fit"
        first = {conv.name for conv, _ in pairs(network)}
        for layer, factors in recipe.equalisation.items():
            if layer not in first or len(factors) != channels[layer] or not all(1e-3 <= f <= 1e3 for f in factors):
                yield f"the equalisation of {printable(layer)} does not fit"
        if not record.errors.get(scheme, 0.0) >= 0:
            yield f"the error for {scheme} is {record.errors[scheme]}"


def _is_range(ends: tuple[float, float]) -> bool:
    return all(map(math.isfinite, ends)) and ends[0] <= 0 <= ends[1] <= _LARGEST and ends[0] >= -_LARGEST


def load_recipe(path: Path, scheme: SchemeName) -> Recipe:
    """The recipe for a target in a file that was read and found right before."""
    return msgspec.json.decode(path.read_bytes(), type=Record).recipes[scheme]


def record_json(record: Record) -> str:
    """The text of the file: a line for each tensor and list, so that it can be read and compared."""
    return _pretty(msgspec.to_builtins(record), 0) + "\n"


def _pretty(value: Any, depth: int) -> str:
    """JSON in which an object has a line for each key unless all of it is short; lists are on one line."""
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict) or not value or (depth > 1 and len(flat) <= _LINE):
        return flat
    pad = "  " * (depth + 1)
    lines = (f"{pad}{json.dumps(key, ensure_ascii=False)}: {_pretty(each, depth + 1)}" for key, each in value.items())
    return "{\n" + ",\n".join(lines) + "\n" + "  " * depth + "}"
