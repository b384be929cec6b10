"""Cards: the built-in ones against the figures published for them, and strict reading of everybody's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rxdeploy.cards import ModelCard, builtin_cards, find_card, load_card, read_labels
from rxdeploy.errors import InputError

# From the model index at the end of the published card (Hugging Face and timm docs: gluon-resnext).
RELEASES = "https://github.com/rwightman/pytorch-pretrained-gluonresnet/releases/download/v0.1/"
CODE = (
    "https://github.com/rwightman/pytorch-image-models/blob/"
    "d8e69206be253892b2956341fea09fdebfaae4e3/timm/models/gluon_resnet.py#L"
)
# name: parameters, FLOPs, file size, weights file, line of the code, top-1, top-5
PUBLISHED = {
    "gluon_resnext50_32x4d": (
        (25_030_000, 5_472_648_192, 100_441_719),
        "gluon_resnext50_32x4d-e6a097c1.pth",
        185,
        (79.35, 94.42),
    ),
    "gluon_resnext101_32x4d": (
        (44_180_000, 10_298_145_792, 177_367_414),
        "gluon_resnext101_32x4d-b253c8c4.pth",
        193,
        (80.33, 94.91),
    ),
    "gluon_resnext101_64x4d": (
        (83_460_000, 19_954_172_928, 334_737_852),
        "gluon_resnext101_64x4d-f9a8e184.pth",
        201,
        (80.63, 95.0),
    ),
}
# Xie et al. 2016, table 1 and section 5: blocks a stage, cardinality, bottleneck width.
PAPER = {
    "gluon_resnext50_32x4d": ((3, 4, 6, 3), 32, 4),
    "gluon_resnext101_32x4d": ((3, 4, 23, 3), 32, 4),
    "gluon_resnext101_64x4d": ((3, 4, 23, 3), 64, 4),
}

OWN = """\
schema = 1
name = "mushrooms"
labels = "mushrooms.txt"
aliases = ["fungi"]

[architecture]
layers = [2, 1]
channels = [24, 40]
cardinality = 2
base_width = 16
stem_width = 20
num_classes = 3

[input]
image_size = 96
crop_pct = 0.9
interpolation = "bilinear"
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]

[weights]
url = "https://example.org/mushrooms.pth"
sha256_prefix = "0123abcd"

[accuracy]
dataset = "mushrooms"
top1 = 90
top5 = 99.5
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "mushrooms.toml"
    path.write_text(OWN, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_builtin_card_carries_the_published_facts(name: str) -> None:
    card = find_card(name)
    (parameters, flops, file_size), file, line, (top1, top5) = PUBLISHED[name]
    assert (card.figures.parameters, card.figures.flops) == (parameters, flops)
    assert card.weights.url == RELEASES + file
    assert card.weights.file_size == file_size
    assert card.weights.sha256_prefix == file.removesuffix(".pth").rpartition("-")[2]
    assert (card.input.image_size, card.input.crop_pct, card.input.interpolation) == (224, 0.875, "bicubic")
    assert card.input.mean == (0.485, 0.456, 0.406)
    assert card.input.std == (0.229, 0.224, 0.225)
    assert card.accuracy is not None
    assert (card.accuracy.dataset, card.accuracy.top1, card.accuracy.top5) == ("ImageNet", top1, top5)
    assert card.source.code == f"{CODE}{line}"
    assert card.source.collection == "Gluon ResNeXt"
    assert card.source.training_data == ("ImageNet",)


@pytest.mark.parametrize("name", PAPER)
def test_builtin_card_has_the_architecture_of_the_paper(name: str) -> None:
    layers, cardinality, base_width = PAPER[name]
    architecture = find_card(name).architecture
    assert (architecture.layers, architecture.cardinality, architecture.base_width) == (layers, cardinality, base_width)
    assert architecture.channels == (64, 128, 256, 512)
    assert (architecture.stem_width, architecture.num_classes) == (64, 1000)
    assert [architecture.width(stage) for stage in range(4)] == [cardinality * 4 * 2**stage for stage in range(4)]


def test_every_published_card_and_its_labels_ship() -> None:
    cards = {card.name: card for card in builtin_cards()}
    assert set(PUBLISHED) <= set(cards)
    for card in cards.values():
        names = card.class_names()
        assert names is not None and len(names) == card.architecture.num_classes, card.name
        assert all(names), card.name
    imagenet = cards["gluon_resnext50_32x4d"].class_names()
    assert imagenet is not None
    # The ILSVRC 2012 order every ImageNet checkpoint uses.
    for index, name in {0: "tench", 1: "goldfish", 207: "golden retriever", 281: "tabby", 999: "toilet tissue"}.items():
        assert imagenet[index].split(", ")[0] == name


def test_own_card(own: Path) -> None:
    card = load_card(own)
    architecture = card.architecture
    assert (architecture.layers, architecture.channels) == ((2, 1), (24, 40))
    assert (architecture.cardinality, architecture.base_width, architecture.stem_width) == (2, 16, 20)
    assert [architecture.width(stage) for stage in (0, 1)] == [24 * 16 // 64 * 2, 40 * 16 // 64 * 2]
    assert (architecture.num_classes, card.input.image_size, card.input.crop_pct) == (3, 96, 0.9)
    assert card.path == own.resolve()
    assert card.beside("x.pth") == own.resolve().parent / "x.pth"
    own.with_suffix(".txt").write_text("fly agaric\ncep\nmorel\n")
    assert card.class_names() == ("fly agaric", "cep", "morel")


def test_what_a_card_may_leave_out(tmp_path: Path, make_card: Callable[..., ModelCard]) -> None:
    card = make_card()
    assert (card.labels, card.class_names(), card.accuracy, card.aliases) == (None, None, None, ())
    assert (card.weights.url, card.weights.file, card.figures.parameters) == (None, None, None)
    text = (tmp_path / "small.toml").read_text()
    short = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(("channels", "stem")))
    path = tmp_path / "short.toml"
    path.write_text(short.replace("[1, 2, 1]", "[1, 2, 1, 1]"))
    assert load_card(path).architecture.channels == (64, 128, 256, 512)
    assert load_card(path).architecture.stem_width == 64


def test_digest_is_of_the_facts(own: Path, tmp_path: Path) -> None:
    moved, changed = tmp_path / "moved.toml", tmp_path / "changed.toml"
    moved.write_text("# a comment\n" + OWN.replace("num_classes = 3", "num_classes   = 3  # three"))
    changed.write_text(OWN.replace("crop_pct = 0.9", "crop_pct = 0.95"))
    assert load_card(moved).digest == load_card(own).digest
    assert load_card(changed).digest != load_card(own).digest


BROKEN = {
    # what: (text of the card, its replacement, what the error must name)
    "missing key": ("cardinality = 2\n", "", ("cardinality", "architecture")),
    "missing table": (
        OWN[OWN.index("[input]") : OWN.index("[weights]")],
        "",
        ("missing", "input"),
    ),
    "missing schema": ("schema = 1\n", "", ("missing", "schema")),
    "unknown key": ("stem_width", "stemwidth", ("unknown", "stemwidth", "architecture")),
    "unknown key at the top": ('labels = "mushrooms.txt"', 'label = "mushrooms.txt"', ("unknown", "label")),
    "unknown table": ("[accuracy]", "[accurracy]", ("unknown", "accurracy")),
    "key path": ("schema = 1", 'schema = 1\npath = "/etc/passwd"', ("unknown", "path")),
    "later schema": ("schema = 1", "schema = 2", ("schema", "2")),
    "text for a number": ("num_classes = 3", 'num_classes = "3"', ("architecture.num_classes", "int", "str")),
    "fraction for a whole number": ("num_classes = 3", "num_classes = 3.5", ("architecture.num_classes", "int")),
    "true for a number": ("num_classes = 3", "num_classes = true", ("architecture.num_classes", "int", "bool")),
    "number for text": ('name = "mushrooms"', "name = 5", ("`name`", "str", "int")),
    "text for a list": ("layers = [2, 1]", 'layers = "2, 1"', ("architecture.layers", "array", "str")),
    "text for a table": ('aliases = ["fungi"]', 'source = "web"', ("`source`", "object", "str")),
    "name of no file": ('name = "mushrooms"', 'name = "my/mushrooms"', ("`name`",)),
    "no classes": ("num_classes = 3", "num_classes = 0", ("architecture.num_classes", "1")),
    "no groups": ("cardinality = 2", "cardinality = 0", ("architecture.cardinality", "1")),
    "negative groups": ("cardinality = 2", "cardinality = -2", ("architecture.cardinality", "1")),
    "no blocks": ("layers = [2, 1]", "layers = [2, 0]", ("architecture.layers", "1")),
    "no stages": ("layers = [2, 1]", "layers = []", ("architecture.layers", "1")),
    "absurdly many blocks": ("layers = [2, 1]", "layers = [2, 100000]", ("architecture", "200 blocks")),
    "more stages than channels": ("layers = [2, 1]", "layers = [2, 1, 1]", ("architecture", "`layers` has 3", "2")),
    "width not whole": ("channels = [24, 40]", "channels = [24, 41]", ("architecture", "41", "64")),
    "tiny image": ("image_size = 96", "image_size = 8", ("input.image_size", "32")),
    "huge image": ("image_size = 96", "image_size = 96000", ("input.image_size", "4096")),
    "no crop": ("crop_pct = 0.9", "crop_pct = 0", ("input.crop_pct", "0")),
    "crop of next to nothing": ("crop_pct = 0.9", "crop_pct = 0.01", ("input.crop_pct", "0.1")),
    "crop beyond the image": ("crop_pct = 0.9", "crop_pct = 1.5", ("input.crop_pct", "1")),
    "crop nan": ("crop_pct = 0.9", "crop_pct = nan", ("input.crop_pct",)),
    "unknown interpolation": ('"bilinear"', '"cubic"', ("input.interpolation", "cubic")),
    "zero std": ("std = [0.25, 0.25, 0.25]", "std = [0.25, 0, 0.25]", ("input", "`std`", "above 0")),
    "infinite std": ("std = [0.25, 0.25, 0.25]", "std = [0.25, inf, 0.25]", ("input", "`std`")),
    "std of one channel": ("std = [0.25, 0.25, 0.25]", "std = [0.25]", ("input.std", "length 3")),
    "mean of 0..255": ("mean = [0.5, 0.5, 0.5]", "mean = [0.5, 2, 0.5]", ("input", "`mean`", "0..1")),
    "mean nan": ("mean = [0.5, 0.5, 0.5]", "mean = [0.5, nan, 0.5]", ("input", "`mean`", "0..1")),
    "url without checksum": ('sha256_prefix = "0123abcd"', "", ("weights", "`url`", "sha256_prefix")),
    "url and file": ("sha256_prefix", 'file = "x.pth"\nsha256_prefix', ("weights", "`url` or `file`")),
    "url of no web server": ("https://example.org/", "ftp://example.org/", ("weights.url",)),
    "checksum too short": ('"0123abcd"', '"0123abc"', ("weights.sha256_prefix",)),
    "checksum of no hexadecimal digits": ('"0123abcd"', '"0123abcx"', ("weights.sha256_prefix",)),
    "more than all right": ("top1 = 90", "top1 = 100.5", ("accuracy.top1", "100")),
    "top5 below top1": ("top5 = 99.5", "top5 = 89.5", ("accuracy", "top5 89.5", "top1 90")),
    "top5 nan": ("top5 = 99.5", "top5 = nan", ("accuracy.top5",)),
    "no TOML": ("schema = 1", "schema: 1", ("TOML", "line 1")),
    "key twice": ("schema = 1", "schema = 1\nschema = 1", ("TOML", "line 2")),
}


def complaint(path: Path) -> str:
    """The one message that load_card has about the card at `path`."""
    with pytest.raises(InputError) as caught:
        load_card(path)
    error = caught.value
    assert error.__suppress_context__ or error.__context__ is None, "no traceback of what lies below"
    text = str(error)
    assert str(path) in text
    assert "\n" not in text.strip()
    assert "$" not in text, "msgspec's way to write a place, not the user's"
    return text


@pytest.mark.parametrize("what", BROKEN)
def test_broken_card(what: str, own: Path) -> None:
    before, after, named = BROKEN[what]
    assert OWN.count(before) >= 1
    own.write_text(OWN.replace(before, after, 1), encoding="utf-8")
    text = complaint(own)
    for word in named:
        assert word in text


def test_name_ends_with_the_line(own: Path) -> None:
    own.write_text(OWN.replace('"mushrooms"', '"mushrooms\\n"'), encoding="utf-8")
    assert "`name`" in complaint(own)


@pytest.mark.parametrize("value", ["[" * 3000 + "]" * 3000, "1" * 5000], ids=["deep", "long number"])
def test_toml_beyond_its_reader(value: str, own: Path) -> None:
    own.write_text(f"x = {value}\n{OWN}", encoding="utf-8")
    assert "TOML" in complaint(own)


def test_no_card_at_all(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(bytes(range(256)))
    (tmp_path / "empty.toml").write_bytes(b"")
    (tmp_path / "folder.toml").mkdir()
    assert "not a TOML file" in complaint(tmp_path / "binary.toml")
    assert "missing" in complaint(tmp_path / "empty.toml")
    assert "not a plain file" in complaint(tmp_path / "folder.toml")
    assert "no such file" in complaint(tmp_path / "nowhere.toml")


def test_find_card_by_name_alias_and_path(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_card("gluon_resnext101_32x4d").name == "gluon_resnext101_32x4d"
    assert find_card("resnext101_64x4d.gluon_in1k").name == "gluon_resnext101_64x4d"
    assert find_card("resnext50_32x4d.gluon_in1k").name == "gluon_resnext50_32x4d"
    assert find_card(str(own)).name == "mushrooms"
    monkeypatch.chdir(own.parent)
    assert find_card("mushrooms.toml").name == "mushrooms"
    own.rename(own.with_suffix(""))
    assert find_card("./mushrooms").name == "mushrooms"


def test_names_and_aliases_are_unambiguous() -> None:
    names = [name for card in builtin_cards() for name in (card.name, *card.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("gluon_resnext50_32x4", "gluon_resnext50_32x4d"),
        ("gluon_resnext101_64x4", "gluon_resnext101_64x4d"),
        ("resnext101_32x4d", "gluon_resnext101_32x4d"),
    ],
)
def test_find_card_suggests_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(InputError, match=f"{typed!r}; did you mean {meant}\\? `rxdeploy models`"):
        find_card(typed)


def test_find_card_suggests_nothing_far_off() -> None:
    with pytest.raises(InputError) as caught:
        find_card("vgg")
    assert "did you mean" not in str(caught.value)
    with pytest.raises(InputError, match=r"nowhere\.toml: no such file"):
        find_card("nowhere.toml")


def test_labels(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("a\nb, with a comma\n c \n", encoding="utf-8")
    assert read_labels(path, 3) == ("a", "b, with a comma", "c")
    path.write_bytes("n01\tZürich\r\nn02\ttwo words\r\n\r\n".encode())
    assert read_labels(path, 2) == ("Zürich", "two words")


def test_labels_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("a\nb\nc\n")
    for classes in (2, 4):
        with pytest.raises(InputError, match=f"labels file {path}: 3 lines, but the model has {classes} classes"):
            read_labels(path, classes)
    with pytest.raises(InputError, match=r"labels file .*nowhere\.txt: no such file"):
        read_labels(tmp_path / "nowhere.txt", 3)
    with pytest.raises(InputError, match=r"labels file .*: not a plain file"):
        read_labels(tmp_path, 3)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"labels file .*: cannot be read as UTF-8"):
        read_labels(path, 1)


def test_missing_labels_of_a_card(own: Path) -> None:
    with pytest.raises(InputError, match=r"labels file .*mushrooms\.txt: no such file"):
        load_card(own).class_names()
