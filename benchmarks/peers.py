"""rxdeploy beside other engines on a CPU: the same images, threads and minutes. Writes results/peers.json in pieces.

``speed``: every contender of contenders.py in its turn, round after round. A figure is the median over the rounds of
the ratio of two contenders in the same round, so that what else runs on the machine meets both. The turns go forwards
in one round and backwards in the next.

Each contender has a process of its own, which the system holds (SIGSTOP) while it is another's turn, and a call that
is not timed begins each turn. In one process they would not be alone: the threads of ONNX Runtime, OpenMP and TBB spin
for a while after a call, on the cores that the next one is timed on. Matrix products take turns too: what share of the
fastest one's rate a model reaches is a ratio within a round as well.

``layers``: where our time goes, and how far each kind of layer is from the machine's limit. ``accuracy``: that group
packing changes no answer.

    python benchmarks/peers.py speed --models gluon_resnext50_32x4d --precisions int8 --batches 8 --work DIR
    python benchmarks/peers.py --table

One piece keeps the others that the file has. `--rounds 0` only makes the files in DIR, where the next piece finds
them; delete DIR when rxdeploy has changed.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import numpy as np
from contenders import (
    IMAGES,
    LARGEST,
    OURS,
    REFERENCE,
    UNSIGNED,
    Contender,
    build_ours,
    contenders,
    prepare,
    products,
)
from machine import RESULTS, save
from numpy.typing import NDArray

import rxdeploy
from rxdeploy.bench import machine
from rxdeploy.bench.measure import fastest, timer
from rxdeploy.cards import find_card
from rxdeploy.engines.bundle import Precision
from rxdeploy.export.architecture import count_multiply_adds, resnext
from rxdeploy.pipeline import versions

MODELS = ("gluon_resnext50_32x4d", "gluon_resnext101_32x4d", "gluon_resnext101_64x4d")
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
BATCHES = (1, 8)
PARTS = ("speed", "layers", "accuracy")
DIGITS = "digits_resnext14_8x8d"
FEWEST_CALLS = 1  # of a turn
PROFILED_SECONDS = 5.0
LEVEL = 0.02  # ratios of one engine with one file were 0.99 to 1.02
SGEMM_SHARE, OVER_ONNX_RUNTIME, OVER_OPENVINO = 0.95, 1.5, 1.1  # the targets
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl

Piece = dict[str, Any]


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(PARTS))
@click.option("--models", default=",".join(MODELS), show_default=True)
@click.option("--precisions", default=",".join(PRECISIONS), show_default=True)
@click.option("--batches", default=",".join(map(str, BATCHES)), show_default=True)
@click.option("--rounds", default=11, show_default=True, help="Of the speeds; 0 only prepares.")
@click.option("--seconds", default=0.3, show_default=True, help="Of a turn, and one call at least.")
@click.option("--work", type=click.Path(path_type=Path), help="Where models are made and kept; else a temporary one.")
@click.option("--table", is_flag=True, help="Print the tables of what was measured before.")
def main(
    parts: tuple[str, ...],
    models: str,
    precisions: str,
    batches: str,
    rounds: int,
    seconds: float,
    work: Path | None,
    table: bool,
) -> None:
    """Measure PARTS, all of them by default; of the others the file keeps what it has."""
    path = RESULTS / "peers.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    if table:
        click.echo(tables(result))
        return
    _check_machine(result.pop("machine", None))
    with ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for part in parts or PARTS:
            for model, precision in _pairs(part, models.split(","), precisions.split(",")):
                name = f"{model} {precision}"
                if part == "speed":
                    _in_new_process(prepare, model, precision, folder / model)
                    for batch in map(int, batches.split(",")) if rounds else ():
                        piece = speed(model, precision, batch, folder / model, rounds, seconds)
                        _keep(result, part, f"{name} batch {batch}", piece)
                else:
                    measure = layers if part == "layers" else accuracy
                    _keep(result, part, name, _in_new_process(measure, model, precision, folder / model))
    for target in targets(result):
        click.echo(_line(target))


def _pairs(part: str, models: Sequence[str], precisions: Sequence[str]) -> Iterator[tuple[str, Precision]]:
    for model in (*models, DIGITS) if part == "accuracy" else models:
        for precision in PRECISIONS:
            if precision in precisions:
                yield model, precision


def _check_machine(facts: dict[str, Any] | None) -> None:
    here = machine.facts()
    for fact in ("processor", "instruction_sets", "cores"):
        if facts and facts[fact] != here[fact]:
            raise click.UsageError(f"results/peers.json is of another machine ({fact}): move it away to begin anew")


def _keep(result: dict[str, Any], part: str, name: str, piece: Piece) -> None:
    piece |= {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_average_1_min": os.getloadavg()[0],
        "versions": versions("torch", "onnxruntime", "openvino"),
    }
    result.setdefault(part, {})[name] = piece
    result["targets"] = targets(result)
    click.echo(f"{part}, {name}: {json.dumps(piece, indent=1)}")
    click.echo(save("peers", result))


def _in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns; its memory goes with the process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


# Turns


class Player:
    """A contender in its process, held while it is not its turn. `problem` says why it cannot take part."""

    def __init__(self, contender: Contender, model: str, folder: Path, batch: int) -> None:
        self.contender = contender
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_play, args=(theirs, contender, model, folder, batch), daemon=True)
        self._process.start()
        theirs.close()
        self.problem, self.opening_seconds, self.logits = self._answer()
        self._signal(signal.SIGSTOP)

    def turn(self, seconds: float) -> list[float]:
        """Seconds of each call."""
        self._signal(signal.SIGCONT)
        self._pipe.send(seconds)
        durations = self._answer()
        self._signal(signal.SIGSTOP)
        return durations

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.join()

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise click.ClickException(f"{self.contender.name}: its process ended") from None

    def _signal(self, number: signal.Signals) -> None:
        if self._process.is_alive():
            assert self._process.pid
            os.kill(self._process.pid, number)


def _play(pipe: Connection, contender: Contender, model: str, folder: Path, batch: int) -> None:
    """The contender's process: opens it, then times a turn for every number of seconds that comes."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)  # a held process would stay for good
    images = np.ascontiguousarray(np.load(folder / IMAGES)[:batch])
    begin = time.perf_counter()
    try:
        run = contender.open(model, folder, batch)
        logits = np.asarray(run(images))
    except Exception as error:  # whatever the engine raises
        traceback.print_exc()
        pipe.send((f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}", 0.0, None))
        return
    pipe.send((None, time.perf_counter() - begin, None if contender.operations else logits))
    while True:
        seconds = pipe.recv()
        run(images)
        durations: list[float] = []
        while len(durations) < FEWEST_CALLS or sum(durations) < seconds:
            begin = time.perf_counter()
            run(images)
            durations.append(time.perf_counter() - begin)
        pipe.send(durations)


@contextmanager
def _players(precision: Precision, model: str, folder: Path, batch: int) -> Iterator[list[Player]]:
    """One after the other, so that none is opened while another works."""
    players: list[Player] = []
    try:
        for contender in contenders(precision, batch):
            players.append(Player(contender, model, folder, batch))
        yield players
    finally:
        for player in players:
            player.close()


def speed(model: str, precision: Precision, batch: int, folder: Path, rounds: int, seconds: float) -> Piece:
    """Every contender's times, over ours, and the share of the machine's rate it reaches."""
    with _players(precision, model, folder, batch) as players:
        playing = [player for player in players if not player.problem]
        turns: dict[str, list[list[float]]] = {player.contender.name: [] for player in playing}
        for round_ in range(rounds):
            for player in playing if round_ % 2 else reversed(playing):
                turns[player.contender.name].append(player.turn(seconds))
        times = {name: [statistics.median(turn) for turn in each] for name, each in turns.items()}
        # A product's best: a rate is the machine's when nothing else ran.
        own = {
            p.contender.name: [p.contender.operations / min(turn) for turn in turns[p.contender.name]]
            for p in playing
            if p.contender.operations
        }
        rates = [max(each) for each in zip(*own.values(), strict=True)]
        operations = 2 * count_multiply_adds(resnext(find_card(model))) * batch
        reference = np.load(folder / REFERENCE)[:batch]
        return {
            "rounds": rounds,
            "threads": machine.cores(),
            "product_flop_per_s": statistics.median(rates),
            "products": {name: statistics.median(each) for name, each in own.items()},
            "contenders": {
                player.contender.name: _facts(player, times, rates, operations, reference)
                for player in playing
                if not player.contender.operations
            },
            "problems": {player.contender.name: player.problem for player in players if player.problem},
        }


def _facts(
    player: Player, times: dict[str, list[float]], rates: list[float], operations: int, reference: NDArray[np.float32]
) -> Piece:
    own = times[player.contender.name]
    over = [a / b for a, b in zip(own, times[OURS], strict=True)]
    shares = [operations / duration / rate for duration, rate in zip(own, rates, strict=True)]
    difference = np.linalg.norm(player.logits - reference) / np.linalg.norm(reference)
    return {
        "peer": player.contender.peer,
        "median_ms": 1e3 * statistics.median(own),
        "lowest_ms": 1e3 * min(own),
        "time_over_ours": statistics.median(over),
        "lowest_and_highest": [min(over), max(over)],
        "share_of_product": statistics.median(shares),
        "logits_differ": float(difference),
        "opening_seconds": player.opening_seconds,
    }


# Layers


def layers(model: str, precision: Precision, folder: Path) -> Piece:
    """Milliseconds of each kind of layer of ours, and how many times its multiply-adds' time at the machine's rate."""
    from rxdeploy.bench.counts import count
    from rxdeploy.bench.layers import layer_times
    from rxdeploy.engines.bundle import MODEL

    rates = [rate(precision)]
    with rxdeploy.load(build_ours(model, precision, folder), "cpu") as session:
        times = layer_times(session, 0, count(session.bundle.file(MODEL)), LARGEST, PROFILED_SECONDS)
    peak = max(*rates, rate(precision))
    rows = {}
    for kind, found in times.rows().items():
        seconds, multiply_adds = sum(each.seconds for each in found), sum(each.multiply_adds for each in found)
        rows[kind] = {
            "layers": len(found),
            "ms": 1e3 * seconds,
            "share_of_time": seconds / times.total,
            "multiply_adds": multiply_adds,
            "over_limit": seconds * peak / (2 * multiply_adds) if multiply_adds else None,
        }
    return {
        "batch": LARGEST,
        "ms": 1e3 * times.total,
        "limit_op_per_s": peak,
        "method": times.method,
        "kinds": rows,
    }


def rate(precision: Precision) -> float:
    """Operations a second of the machine's fastest matrix product."""
    found = []
    for product in products(precision):
        run = product.open("", Path(), 0)
        found.append(product.operations / fastest(timer(partial(run, np.empty(0, np.uint8)))))
    return max(found)


# Accuracy


def accuracy(model: str, precision: Precision, folder: Path) -> Piece:
    """Whether a pass, on or off, changes an answer: the digits model on its test images, the others on photographs."""
    from rxdeploy.export.passes import PASSES
    from rxdeploy.export.passes.groups import pack, unpack

    bundle = build_ours(model, precision, folder)
    changes: dict[str, Callable[[Any], Any]] = {
        "packing off": unpack,
        "packed to 32 channels": partial(pack, channels=32),
    }
    changes |= {f"{name} on": run for name, run in PASSES.items()}
    others = {what: changed(bundle, change, folder / f"changed-{precision}") for what, change in changes.items()}
    return {
        "checks": {
            f"{change}, {what}": same_answers(bundle, other, images)
            for change, other in others.items()
            for what, images in evaluation_images(model).items()
        }
    }


def evaluation_images(model: str) -> dict[str, NDArray[np.uint8]]:
    from int8 import as_input
    from PIL import Image

    from rxdeploy.cards.digits_images import hard, split
    from rxdeploy.export.samples import photographs

    card = find_card(model)
    if model != DIGITS:
        return {"photographs": photographs(card)}
    sets = {"held-out digits": split()[1].images, "hard digits": hard().images}
    return {
        what: np.stack([as_input(card, Image.fromarray(image)) for image in images]) for what, images in sets.items()
    }


def changed(bundle: Path, change: Callable[[Any], Any], output: Path) -> Path:
    """A bundle of the same model after a graph pass."""
    import onnx_ir as ir

    from rxdeploy.engines.bundle import MODEL, open_bundle, write_bundle
    from rxdeploy.export.graph import serialise

    opened = open_bundle(bundle)
    files: dict[str, Path | bytes] = {name: opened.file(name) for name in opened.manifest.files}
    files[MODEL] = serialise(change(ir.load(opened.file(MODEL))))
    return write_bundle(output, opened.manifest, files, overwrite=True).path


def same_answers(bundle: Path, other: Path, images: NDArray[np.uint8]) -> Piece:
    """How many images two bundles agree on, and how far their logits are apart."""
    with rxdeploy.load(bundle, "cpu") as session, rxdeploy.load(other, "cpu") as another:
        first, second = session.run(images), another.run(images)
    return {
        "images": len(images),
        "same_top1": int((first.argmax(1) == second.argmax(1)).sum()),
        "same_bits": bool((first.view(np.uint32) == second.view(np.uint32)).all()),
        "largest_difference": float(np.abs(first - second).max()),
    }


# Targets


def targets(result: dict[str, Any]) -> list[Piece]:
    """What the issue asked for, and what was measured; of pieces that were not, nothing."""
    found = []
    for name, piece in result.get("speed", {}).items():
        own, peers = (
            piece["contenders"][OURS],
            {n: f for n, f in piece["contenders"].items() if n != OURS and f["peer"]},
        )
        large = name.endswith(f"batch {LARGEST}")
        if " fp32 " in name:
            found.append(_over_fastest(name, peers, 1.0))
            if large:
                what = "share of the matrix product's rate"
                found.append(_target(name, what, SGEMM_SHARE, own["share_of_product"]))
        elif large:
            # Of OpenVINO the faster way with that file, one call or streams.
            for engine, aim in (("ONNX Runtime", OVER_ONNX_RUNTIME), ("OpenVINO", OVER_OPENVINO)):
                file = {n: f for n, f in peers.items() if n.startswith(engine) and n.endswith(f", {UNSIGNED}")}
                found.append(_over_fastest(name, file, aim))
    for name, piece in result.get("accuracy", {}).items():
        for what, facts in piece["checks"].items():
            found.append(_target(name, f"same top-1, {what}", facts["images"], facts["same_top1"]))
    return found


def _over_fastest(where: str, peers: dict[str, Piece], aim: float) -> Piece:
    fastest_ = min(peers, key=lambda peer: peers[peer]["time_over_ours"])
    return _target(where, f"time over ours, {fastest_}", aim, peers[fastest_]["time_over_ours"], LEVEL)


def _target(where: str, what: str, aim: float, measured: float, level: float = 0.0) -> Piece:
    outcome = "met" if measured >= aim else "level" if measured >= aim * (1 - level) else "missed"
    return {"where": where, "what": what, "aim": aim, "measured": measured, "outcome": outcome}


def _line(target: Piece) -> str:
    return f"{target['outcome']}: {target['where']}, {target['what']}: {target['measured']:.4g}, aim {target['aim']:g}"


# Tables


def tables(result: dict[str, Any]) -> str:
    """Markdown for the README: speeds, kinds of layers, targets, and what machine it was."""
    parts = [_speeds(result, precision) for precision in PRECISIONS]
    parts += [_kinds(result, precision) for precision in PRECISIONS]
    parts.append(
        _markdown(
            ["target", "where", "aim", "measured", ""],
            [[t["what"], t["where"], f"{t['aim']:g}", f"{t['measured']:.4g}", t["outcome"]] for t in targets(result)],
        )
    )
    facts = result.get("machine", {})
    if facts:
        sets = ", ".join(facts["instruction_sets"])
        parts.append(f"({facts['cores']} cores of {facts['processor']} with {sets}; {facts['date'][:10]}.)")
    return "\n\n".join(part for part in parts if part)


def _speeds(result: dict[str, Any], precision: Precision) -> str:
    """A row a model and batch: our time, and the others' over it."""
    pieces = {name: piece for name, piece in result.get("speed", {}).items() if f" {precision} " in name}
    peers = list(dict.fromkeys(peer for piece in pieces.values() for peer in piece["contenders"] if peer != OURS))
    rows = []
    for name, piece in sorted(pieces.items()):
        own = piece["contenders"][OURS]
        cells = [
            f"{piece['contenders'][peer]['time_over_ours']:.2f}" if peer in piece["contenders"] else "-"
            for peer in peers
        ]
        model, batch = name.split(f" {precision} ")
        rows.append([model, batch, f"{own['median_ms']:.1f}", *cells, f"{own['share_of_product']:.2f}"])
    return _markdown([precision, "", "rxdeploy, ms", *peers, "share of product"], rows)


def _kinds(result: dict[str, Any], precision: Precision) -> str:
    """A row a kind of layer: milliseconds, and times its limit, of each model."""
    pieces = {name: piece for name, piece in result.get("layers", {}).items() if name.endswith(f" {precision}")}
    kinds = dict.fromkeys(kind for piece in pieces.values() for kind in piece["kinds"])
    rows = []
    for kind in kinds:
        cells = []
        for piece in pieces.values():
            facts = piece["kinds"].get(kind)
            over = f", {facts['over_limit']:.2f}" if facts and facts["over_limit"] else ""
            cells.append(f"{facts['ms']:.2f}{over}" if facts else "-")
        rows.append([kind, *cells])
    return _markdown(
        [f"layers, {precision}, batch {LARGEST}: ms, times the limit", *(name.split()[0] for name in pieces)], rows
    )


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
