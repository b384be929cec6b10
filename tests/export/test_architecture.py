"""The list of layers against numbers from paper and against the PyTorch module, which is written without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rxdeploy.cards import ModelCard, find_card
from rxdeploy.errors import InputError
from rxdeploy.export.architecture import count_multiply_adds, count_parameters, resnext
from rxdeploy.export.module import ResNeXt
from rxdeploy.export.weights import check_parameters

# name: parameters, multiply-adds at 224 x 224. torchvision documents the same architectures with 25028904 and
# 83455272 parameters and 4.23 and 15.46 G multiply-adds.
PAPER = {
    "gluon_resnext50_32x4d": (25_028_904, 4_230_479_872),
    "gluon_resnext101_32x4d": (44_177_704, 7_969_996_800),
    "gluon_resnext101_64x4d": (83_455_272, 15_460_270_080),
}

ODD: dict[str, dict[str, Any]] = {
    "default": {},
    "one group": {"cardinality": 1, "base_width": 4},
    "one stage": {"layers": [3], "channels": [16]},
    "a group a channel": {"cardinality": 16, "base_width": 4, "channels": [16, 16, 16]},
    "stem as wide as the first output": {"stem_width": 64},  # the first block needs no shortcut convolution
    "five stages, odd size": {"layers": [1] * 5, "channels": [16, 16, 32, 32, 48], "image_size": 50},
    "one class": {"num_classes": 1, "image_size": 33},
}


@pytest.fixture(params=ODD)
def odd_card(request: pytest.FixtureRequest, make_card: Callable[..., ModelCard]) -> ModelCard:
    return make_card(**ODD[request.param])


@pytest.mark.parametrize("name", PAPER)
def test_counts_of_the_published_models(name: str) -> None:
    network = resnext(find_card(name))
    assert (count_parameters(network), count_multiply_adds(network)) == PAPER[name]


def test_first_stage_of_resnext50_by_hand() -> None:
    first, second = resnext(find_card("gluon_resnext50_32x4d")).blocks[:2]
    assert [conv.weight_shape for conv in first.convs] == [(128, 64, 1, 1), (128, 4, 3, 3), (256, 128, 1, 1)]
    assert first.downsample is not None and first.downsample.weight_shape == (256, 64, 1, 1)
    assert [conv.weight_shape for conv in second.convs] == [(128, 256, 1, 1), (128, 4, 3, 3), (256, 128, 1, 1)]
    assert second.downsample is None


def test_strides_and_groups_of_resnext50() -> None:
    network = resnext(find_card("gluon_resnext50_32x4d"))
    assert (network.stem.kernel, network.stem.stride, network.stem.groups) == (7, 2, 1)
    for block in network.blocks:
        stride = 2 if block.name in ("layer2.0", "layer3.0", "layer4.0") else 1
        assert [conv.stride for conv in block.convs] == [1, stride, 1], block.name
        assert [conv.groups for conv in block.convs] == [1, 32, 1], block.name
        assert (block.downsample is not None) == block.name.endswith(".0"), block.name
        assert block.downsample is None or block.downsample.stride == stride, block.name


def state_of(card: ModelCard) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = ResNeXt(card).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("name", PAPER)
def test_state_of_the_published_models_is_the_modules(name: str) -> None:
    card = find_card(name)
    assert resnext(card).state_shapes() == state_of(card)


def test_state_of_own_cards_is_the_modules(odd_card: ModelCard) -> None:
    assert resnext(odd_card).state_shapes() == state_of(odd_card)


def test_parameters_are_the_modules(odd_card: ModelCard) -> None:
    assert count_parameters(resnext(odd_card)) == sum(p.numel() for p in ResNeXt(odd_card).parameters())


def on_paper(card: ModelCard, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network as Xie et al. 2016 and timm's gluon_resnet.py have it, a formula a line."""

    def conv(x: Tensor, name: str, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
        return nn.functional.conv2d(x, state[f"{name}.weight"], None, stride, padding, 1, groups)

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias, mean, var = (
            state[f"{name}.{part}"][:, None, None] for part in ("weight", "bias", "running_mean", "running_var")
        )
        return weight * (x - mean) / (var + 1e-5) ** 0.5 + bias

    x = norm(conv(x, "conv1", stride=2, padding=3), "bn1").clamp(min=0)
    x = nn.functional.max_pool2d(x, 3, stride=2, padding=1)
    for stage, depth in enumerate(card.architecture.layers, 1):
        for name in (f"layer{stage}.{index}" for index in range(depth)):
            stride = 2 if stage > 1 and name.endswith(".0") else 1
            y = norm(conv(x, f"{name}.conv1"), f"{name}.bn1").clamp(min=0)
            y = conv(y, f"{name}.conv2", stride, 1, card.architecture.cardinality)
            y = norm(y, f"{name}.bn2").clamp(min=0)
            y = norm(conv(y, f"{name}.conv3"), f"{name}.bn3")
            if f"{name}.downsample.0.weight" in state:
                x = norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            x = (x + y).clamp(min=0)
    return x.flatten(2).mean(2) @ state["fc.weight"].T + state["fc.bias"]


def test_module_computes_what_is_on_paper(odd_card: ModelCard, random_weights: Callable[..., Any]) -> None:
    state = {name: torch.from_numpy(array).double() for name, array in random_weights(odd_card).items()}
    module = ResNeXt(odd_card).double().eval()
    module.load_state_dict(state, strict=False)
    size = odd_card.input.image_size
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(module(x), on_paper(odd_card, state, x), rtol=1e-9, atol=1e-9)


def count_by_hooks(card: ModelCard) -> int:
    """Multiply-adds as they happen: every output value of a convolution or linear layer takes one per weight."""
    total = 0

    def hook(module: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        total += output.numel() * module.weight[0].numel()

    module = ResNeXt(card).eval()
    for child in module.modules():
        if isinstance(child, nn.Conv2d | nn.Linear):
            child.register_forward_hook(hook)
    with torch.inference_mode():
        module(torch.zeros(1, 3, card.input.image_size, card.input.image_size))
    return total


@pytest.mark.parametrize("name", PAPER)
def test_multiply_adds_of_the_published_modules(name: str) -> None:
    with torch.device("meta"):  # shapes without arithmetic
        assert count_by_hooks(find_card(name)) == PAPER[name][1]


def test_multiply_adds_are_those_of_the_module_running(odd_card: ModelCard) -> None:
    assert count_multiply_adds(resnext(odd_card)) == count_by_hooks(odd_card)


@pytest.mark.parametrize("claimed", [25_028_904, 25_028_900, 25_029_000, 25_030_000, 25_000_000, 30_000_000])
def test_a_rounded_parameter_figure_is_accepted(claimed: int, make_card: Callable[..., ModelCard]) -> None:
    check_parameters(resnext50(make_card, claimed))


@pytest.mark.parametrize(
    "claimed", [25_028_903, 25_028_800, 25_028_000, 25_040_000, 25_020_000, 24_000_000, 44_180_000]
)
def test_a_wrong_parameter_figure_is_refused(claimed: int, make_card: Callable[..., ModelCard]) -> None:
    with pytest.raises(InputError) as caught:
        check_parameters(resnext50(make_card, claimed))
    assert "card r50: figures.parameters" in str(caught.value)
    assert f"{claimed:,}" in str(caught.value) and "25,028,904" in str(caught.value)


def resnext50(make_card: Callable[..., ModelCard], claimed: int) -> ModelCard:
    return make_card(
        "r50",
        layers=[3, 4, 6, 3],
        channels=[64, 128, 256, 512],
        cardinality=32,
        base_width=4,
        stem_width=64,
        num_classes=1000,
        figures={"parameters": claimed},
    )


def test_figures_of_the_builtin_cards_are_accepted() -> None:
    for name in PAPER:
        check_parameters(find_card(name))


def test_a_card_without_the_figure_is_accepted(make_card: Callable[..., ModelCard]) -> None:
    check_parameters(make_card())
