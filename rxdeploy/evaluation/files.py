"""The files of an assessment, checked before the work: each is there, or can be written, and none is another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rxdeploy import atomic
from rxdeploy.errors import InputError, from_os_error


def beside_predictions(predictions: Path) -> Path:
    """Where a baseline bundle's predictions go: p.jsonl's to p.baseline.jsonl."""
    return predictions.with_suffix(f".baseline{predictions.suffix}")


def check_files(
    data: Any,
    labels: str | Path | None,
    baseline: str | Path | None,
    predictions: Path | None,
    save_baseline: Path | None,
) -> None:
    """InputError for a path that cannot be used, and for one that would overwrite another."""
    read = {"--baseline": baseline, "--labels": labels, "--data": data if isinstance(data, str | Path) else None}
    for option, path in (*read.items(), ("--predictions", predictions), ("--save-baseline", save_baseline)):
        _check_name(option, path)
    if predictions and predictions.is_dir():
        raise InputError(f"predictions {predictions}: is a folder; give a file name")
    written: list[tuple[str, Path | None]] = [("--predictions", predictions), ("--save-baseline", save_baseline)]
    if predictions and baseline and Path(baseline).is_dir():
        written.insert(1, ("--predictions, for the baseline,", beside_predictions(predictions)))
    _check_distinct(written, list(read.items()))
    if save_baseline:
        _check_writable(save_baseline)


def _check_name(option: str, path: str | Path | None) -> None:
    try:
        if path is not None:
            Path(path).exists()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise from_os_error(error, option) from None


def _check_distinct(written: Sequence[tuple[str, Path | None]], read: Sequence[tuple[str, str | Path | None]]) -> None:
    """What is written is neither read nor written by another name; two that are read may be one."""
    taken: dict[Path, str] = {}
    for option, path in written:
        if path is not None and taken.setdefault(path.resolve(), option) != option:
            raise InputError(f"{option} {path}: the same as {taken[path.resolve()]}; give another file")
    for option, other in read:
        if other is not None and Path(other).resolve() in taken:
            raise InputError(
                f"{taken[Path(other).resolve()]} {other}: the same as {option}, which it would overwrite; give another "
                "file"
            )


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"baseline {path}: is a folder; give a file name")
    try:
        atomic.check_writable(path)
    except OSError as error:
        raise from_os_error(error, f"baseline {path}") from None
