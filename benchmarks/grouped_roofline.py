"""What the grouped 3x3 convolutions must cost on a GPU, by arithmetic: no GPU is needed, and none was used.

For each distinct shape: multiply-adds, bytes, and the roofline (S. Williams et al. 2009) by the datasheets' peaks; how
far tensor cores' tiles are filled by groups of a width; what packing to wider groups makes of it; and how far above
the roofline a measured time must be before a kernel of one's own can pay. Prints the tables of docs/grouped.md.

Bytes are those that must pass the memory: input, output and weights once each, in float16 or int8. What stays in a
cache from one layer to the next would go below. Every tile is taken to be one of `mma.sync`'s, m16n8k16 in float16 and
m16n8k32 in int8 (NVIDIA, "Parallel Thread Execution ISA", Warp Level Matrix Instructions): 16 pixels by 8 output
channels, and 16 or 32 products summed. A convolution is taken to go tap by tap, so that of the sum's length only a
group's input channels are of use; kernels that gather several taps fill it better.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import click

from rxdeploy.bench.datasheet import DATASHEETS, Datasheet
from rxdeploy.cards import find_card
from rxdeploy.export.architecture import Conv, ResNeXt, multiply_adds, resnext

MODELS = ("gluon_resnext50_32x4d", "gluon_resnext101_32x4d", "gluon_resnext101_64x4d")
GPUS = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA L4", "Tesla T4")
BATCHES = (1, 32, 128)
WIDTHS = (4, 8, 16, 32, 64)
OWN = (4, 8, 16, 32)  # of the four stages, in every one of the models
WORTH_IT = 0.05  # of the whole model's time
KERNEL = 1.3  # times its roofline that a good kernel takes: an assumption, three quarters of the bandwidth
Number = Literal["fp16", "int8"]
NUMBERS: tuple[Number, ...] = ("fp16", "int8")
BYTES = {"fp16": 2, "int8": 1}
TILE_CHANNELS = 8  # n of the tile: output channels
TILE_SUM = {"fp16": 16, "int8": 32}  # k of the tile
PACKED_TO = TILE_SUM  # the least width that fills a tile both ways


@dataclass(frozen=True)
class Layer:
    """A convolution, or the classifier, of one image: `size` pixels squared in, `out` out.

    `added` says that it also reads the block's shortcut, which the engine adds in the same kernel.
    """

    conv: Conv
    size: int
    out: int
    multiply_adds: int
    added: bool = False

    @property
    def width(self) -> int:
        """Input channels a group."""
        return self.conv.in_channels // self.conv.groups

    def at(self, width: int) -> int:
        """The width that packing to `width` gives: never less than its own, never more than all channels."""
        return min(max(width, self.width), self.conv.in_channels)

    def operations(self, batch: int, width: int = 0) -> int:
        """Two for each multiply-add; with groups packed to `width`, the zeros' too."""
        return 2 * batch * self.multiply_adds * self.at(width) // self.width

    def tile_operations(self, batch: int, number: Number, width: int = 0) -> float:
        """What tensor cores compute for that, empty parts of tiles included."""
        return self.operations(batch, width) / fill(self.at(width), number)

    def bytes(self, batch: int, number: Number, width: int = 0) -> int:
        conv = self.conv
        weights = conv.out_channels * self.at(width) * conv.kernel**2
        read = conv.in_channels * self.size**2
        written = conv.out_channels * self.out**2 * (2 if self.added else 1)
        return BYTES[number] * (weights + batch * (read + written))

    def seconds(self, batch: int, number: Number, gpu: Datasheet, width: int = 0) -> float:
        """The roofline, with tiles as full as groups of `width` channels make them."""
        compute = self.tile_operations(batch, number, width) / gpu.peak(number)
        return max(compute, self.bytes(batch, number, width) / gpu.bandwidth)

    def in_memory(self, batch: int, number: Number, gpu: Datasheet, width: int = 0) -> bool:
        """Whether it is the bytes that take longer."""
        compute = self.tile_operations(batch, number, width) / gpu.peak(number)
        return compute <= self.bytes(batch, number, width) / gpu.bandwidth


def fill(width: int, number: Number) -> float:
    """The share of a tile's multiply-adds that a group of `width` channels in and out has use for."""
    return _share(width, TILE_CHANNELS) * _share(width, TILE_SUM[number])


def _share(width: int, side: int) -> float:
    return width / (side * -(-width // side))


def layers(network: ResNeXt) -> Iterator[Layer]:
    """Every convolution and the classifier, in order."""
    counts = multiply_adds(network)
    size = network.stem.output_size(network.image_size)
    yield Layer(network.stem, network.image_size, size, counts[network.stem.name])
    size = (size + 2 - 3) // 2 + 1  # max-pool 3x3, stride 2, padding 1
    for block in network.blocks:
        if block.downsample:
            out = block.downsample.output_size(size)
            yield Layer(block.downsample, size, out, counts[block.downsample.name])
        for conv in block.convs:
            out = conv.output_size(size)
            yield Layer(conv, size, out, counts[conv.name], added=conv is block.convs[-1])
            size = out
    classifier = Conv("fc", "", network.features, network.num_classes, kernel=1)
    yield Layer(classifier, 1, 1, network.features * network.num_classes)


def is_grouped(layer: Layer) -> bool:
    return layer.conv.groups > 1


def shapes() -> list[tuple[Layer, Counter[str]]]:
    """The distinct grouped layers of 32 groups, and how often each model has one of its kind.

    A model of 64 groups has the same ones, twice as many channels in each: everything doubles but the intensity.
    """
    found: dict[tuple[int, ...], tuple[Layer, Counter[str]]] = {}
    for model in MODELS:
        for layer in filter(is_grouped, layers(resnext(find_card(model)))):
            first, models = found.setdefault((layer.width, layer.size, layer.out), (layer, Counter()))
            assert layer.multiply_adds * first.conv.groups == first.multiply_adds * layer.conv.groups
            models[model] += 1
    return list(found.values())


def named(layer: Layer) -> str:
    conv = layer.conv
    stride = f", stride {conv.stride}" if conv.stride > 1 else ""
    return f"{conv.groups} x {layer.width} channels, {layer.size}²{stride}"


# Tables


def shape_table() -> str:
    """Each distinct layer: how many there are, multiply-adds, bytes and intensity."""
    head = ["layer", "in " + ", ".join(model.removeprefix("gluon_resnext") for model in MODELS)]
    head += ["10⁶ multiply-adds an image", "MB an image; of weights (fp16)"]
    head += [f"operations/byte {number}" for number in NUMBERS]
    rows = []
    for layer, models in shapes():
        weights = layer.bytes(0, "fp16")
        counts = ", ".join(str(models[model]) for model in MODELS)
        moved = f"{(layer.bytes(1, 'fp16') - weights) / 1e6:.2f}; {weights / 1e6:.3f}"
        intensities = [
            _list(f"{layer.operations(batch) / layer.bytes(batch, number):.0f}" for batch in BATCHES)
            for number in NUMBERS
        ]
        rows.append([named(layer), counts, f"{layer.multiply_adds / 1e6:.1f}", moved, *intensities])
    return markdown(head, rows)


def ridge_table(gpus: Sequence[str]) -> str:
    """The intensity from which on each GPU's arithmetic is the limit, not its memory."""
    rows = []
    for name in gpus:
        gpu = DATASHEETS[name]
        peaks = [f"{gpu.peak(number) / gpu.bandwidth:.0f}" for number in NUMBERS]
        rows.append([name, f"{gpu.bandwidth / 1e9:.0f}", *peaks, f"{gpu.fp32 / gpu.bandwidth:.0f}"])
    return markdown(["operations/byte", "GB/s", "tensor cores fp16", "int8", "CUDA cores, float32"], rows)


def tile_table() -> str:
    """How full tiles are by width, and what tensor cores compute for a layer that was packed to it."""
    head = ["packed to", "tile full, fp16", "int8", "zeros for each weight of 4, 8, 16, 32 channels"]
    head += [f"computed for each multiply-add of the model, {number}" for number in NUMBERS]
    rows = []
    for width in WIDTHS:
        costs = [
            " / ".join(f"{max(width, own) / own / fill(max(width, own), number):.3g}" for own in OWN)
            for number in NUMBERS
        ]
        fills = [f"{100 * fill(width, number):.3g} %" for number in NUMBERS]
        zeros = _list(max(width, own) // own - 1 for own in OWN)
        rows.append([str(width), *fills, zeros, *costs])
    return markdown(head, rows)


def layer_table(number: Number, gpus: Sequence[str], width: int = 0) -> str:
    """Microseconds of each layer at each batch; a star where tensor cores are the limit and not the memory."""
    rows = []
    for layer, _ in shapes():
        cells = []
        for gpu in map(DATASHEETS.__getitem__, gpus):
            stars = ["" if layer.in_memory(batch, number, gpu, width) else "*" for batch in BATCHES]
            times = [f"{1e6 * layer.seconds(batch, number, gpu, width):.2g}" for batch in (1,)]
            times += [f"{1e6 * layer.seconds(batch, number, gpu, width):.0f}" for batch in BATCHES[1:]]
            cells.append(_list(map("".join, zip(times, stars, strict=True))))
        rows.append([named(layer), *cells])
    packed = f", packed to {width}" if width else ""
    return markdown([f"{number}{packed}, µs at batch {_list(BATCHES)}", *gpus], rows)


def width_table(gpus: Sequence[str], batch: int) -> str:
    """A model's grouped layers together by width; in brackets how many of them are not bound by memory."""
    rows = []
    for model in MODELS:
        grouped = list(filter(is_grouped, layers(resnext(find_card(model)))))
        for number in NUMBERS:
            for name in gpus:
                gpu = DATASHEETS[name]
                cells = []
                for width in WIDTHS:
                    beyond = sum(not layer.in_memory(batch, number, gpu, width) for layer in grouped)
                    total = 1e6 * sum(layer.seconds(batch, number, gpu, width) for layer in grouped)
                    cells.append(f"{total:.0f}" + (f" ({beyond} of {len(grouped)})" if beyond else ""))
                rows.append(
                    [f"{model}, {number}", name, *cells, f"{1e6 * _on_cuda_cores(grouped, batch, number, gpu):.0f}"]
                )
    widths = [str(width) if width > WIDTHS[0] else "as they are" for width in WIDTHS]
    return markdown([f"µs at batch {batch}, packed to", "", *widths, "CUDA cores"], rows)


def _on_cuda_cores(grouped: Sequence[Layer], batch: int, number: Number, gpu: Datasheet) -> float:
    """Seconds without tensor cores, at the float32 rate, which is the only one of theirs that datasheets.py has."""
    return sum(max(layer.operations(batch) / gpu.fp32, layer.bytes(batch, number) / gpu.bandwidth) for layer in grouped)


def decision_table(gpus: Sequence[str]) -> str:
    """The grouped layers' share of the model's roofline, and from where on a kernel saves WORTH_IT of all."""
    rows = []
    for model in MODELS:
        network = list(layers(resnext(find_card(model))))
        for name in gpus:
            cells = []
            for number in NUMBERS:
                for batch in BATCHES[1:]:
                    grouped, others = (_roofline(network, batch, number, name, which) for which in (True, False))
                    least, most = (threshold(grouped, others * slower) for slower in (1, 2))
                    cells.append(f"{100 * grouped / (grouped + others):.0f} %; {least:.1f} to {most:.1f}")
            rows.append([model, name, *cells])
    return markdown(["", "", *(f"{number}, batch {batch}" for number in NUMBERS for batch in BATCHES[1:])], rows)


def _roofline(network: Sequence[Layer], batch: int, number: Number, gpu: str, grouped: bool) -> float:
    """Seconds of the grouped layers, packed so that tiles are full, or of all the others."""
    width = PACKED_TO[number] if grouped else 0
    return sum(
        layer.seconds(batch, number, DATASHEETS[gpu], width) for layer in network if is_grouped(layer) == grouped
    )


def threshold(grouped: float, others: float, kernel: float = KERNEL, saved: float = WORTH_IT) -> float:
    """How many times their roofline grouped layers must take for a kernel of one's own to save that share of all.

    `grouped` is their roofline, `others` the time of the rest of the model, and the kernel takes `kernel` times its
    roofline: (r - kernel) grouped = saved (r grouped + others), solved for r.
    """
    return (kernel * grouped + saved * others) / (grouped * (1 - saved))


def _list(values: Iterable[object]) -> str:
    return " / ".join(map(str, values))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@click.command()
@click.option("--gpu", "gpus", multiple=True, type=click.Choice(list(DATASHEETS)), default=GPUS)
@click.option("--packed", type=int, default=0, help="Channels a group, in the table of layers; 0: as they are.")
@click.option("--batch", "batches", multiple=True, type=int, default=(32,), help="Of the table of widths.")
def main(gpus: tuple[str, ...], packed: int, batches: tuple[int, ...]) -> None:
    """Print every table."""
    found = [shape_table(), ridge_table(gpus), *(layer_table(number, gpus, packed) for number in NUMBERS)]
    found += [tile_table(), *(width_table(gpus, batch) for batch in batches), decision_table(gpus)]
    click.echo("\n\n".join(found))


if __name__ == "__main__":
    main()
