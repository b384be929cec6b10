"""Which layers stay in float16, and what each layer pays."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from rxdeploy.calibration.choose import Judge, all_ranges, choose, kinds
from rxdeploy.calibration.gather import gather
from rxdeploy.calibration.mixed import keep_until, sqnr
from rxdeploy.calibration.network import FC, Network, Steps
from rxdeploy.calibration.options import METHODS
from rxdeploy.calibration.recipe import Quantised, Recipe, logits, ranges_as_data, tensors
from rxdeploy.calibration.sensitivity import Sensitivity, layers, sensitivities
from rxdeploy.datasets import Stream, from_arrays
from rxdeploy.errors import CheckFailed
from rxdeploy.export.architecture import multiply_adds
from rxdeploy.export.validate import relative_l2


@pytest.fixture(scope="module")
def network(digits: Any) -> Network:
    return Network(digits.card, digits.weights)


@pytest.fixture(scope="module")
def ranges(digits: Any, network: Network) -> Any:
    data = from_arrays(digits.train[:64], None)
    found = gather(network, Stream(data, data.items, 8, digits.card.input))
    return {
        scheme: {
            method: {name: each[name] for name in tensors(network, scheme)}  # type: ignore[arg-type]
            for method, each in all_ranges(found.histograms, scheme == "tensorrt").items()
        }
        for scheme in ("tensorrt", "onnxruntime")
    }


@pytest.fixture(scope="module")
def recipe(ranges: Any) -> Recipe:
    return Recipe(scheme="tensorrt", method="mse", ranges=ranges_as_data(ranges["tensorrt"]["mse"]))


def quiet(*_: object) -> None:
    pass


def ranked(network: Network, damage: dict[str, float]) -> list[Sensitivity]:
    names = [layer for layer in network.inputs() if layer != FC]
    return [Sensitivity(name, "", 1, damage.get(name, 0.001), 0, 1) for name in names]


def test_as_few_layers_as_can_be(network: Network, recipe: Recipe) -> None:
    """Of a made-up quality that needs exactly three layers, two of which are the most damaging."""
    needed = {"layer1.0.conv2", "layer3.0.conv1", "layer4.0"}
    damage = {"layer1.0.conv2": 0.5, "layer3.0.conv1": 0.4, "conv1": 0.3, "layer2.0": 0.25, "layer4.0": 0.2}
    tried = []

    def measure(each: Recipe) -> float:
        tried.append(each.keep)
        return len(needed & set(each.keep))

    found, mixed = keep_until(network, recipe, lambda: ranked(network, damage), measure, 3, "three", quiet)
    assert set(found.keep) == set(mixed.layers) == needed
    assert (mixed.before, mixed.after) == (0, 3)
    assert len(tried) < 20
    counts = multiply_adds(network.shape)
    share = (counts["layer1.0.conv2"] + counts["layer3.0.conv1"]) / sum(counts.values())
    assert mixed.float16_share == pytest.approx(share)
    kept = msgspec.structs.replace(recipe, keep=("conv1",))
    found, _ = keep_until(network, kept, lambda: ranked(network, damage), measure, 3, "three", quiet)
    assert set(found.keep) == needed | {"conv1"}


def test_a_target_that_holds_or_never_will(network: Network, recipe: Recipe) -> None:
    found, mixed = keep_until(network, recipe, list, lambda each: 5, 5, "five", quiet)
    assert (found, mixed.layers, mixed.float16_share) == (recipe, (), 0)
    with pytest.raises(CheckFailed, match="six cannot be reached: with no layer in int8 it is 5"):
        keep_until(network, recipe, lambda: ranked(network, {}), lambda each: 5, 6, "six", quiet)


def test_a_target_that_leaves_nothing_in_int8(network: Network, recipe: Recipe) -> None:
    layers = {layer for layer in network.inputs() if layer != FC}
    with pytest.raises(CheckFailed, match="all leaves no layer in int8; build with --fp16"):
        keep_until(
            network, recipe, lambda: ranked(network, {}), lambda each: len(layers & set(each.keep)), 21, "all", quiet
        )


def test_a_real_target(digits: Any, network: Network, recipe: Recipe) -> None:
    judge = Judge(network, digits.held_out[:16])
    order = sensitivities(network, recipe, digits.held_out[:16], quiet)
    least = sqnr(judge.error(recipe)) + 3
    found, mixed = keep_until(
        network, recipe, lambda: order, lambda each: sqnr(judge.error(each)), least, "3 dB", quiet
    )
    assert mixed.after >= least and 0 < len(found.keep) < 12
    assert sqnr(judge.error(found)) == mixed.after


@pytest.mark.parametrize("scheme", ["tensorrt", "onnxruntime"])
def test_sensitivity_is_what_two_whole_runs_give(digits: Any, network: Network, ranges: Any, scheme: Any) -> None:
    recipe = Recipe(scheme=scheme, method="mse", ranges=ranges_as_data(ranges[scheme]["mse"]))
    images = digits.held_out[:10]  # more than a batch
    found = {each.layer: each for each in sensitivities(network, recipe, images, quiet)}
    assert list(found) == layers(network, recipe)
    assert (FC in found) == (scheme == "onnxruntime")
    exact = logits(network, Steps(), images)
    for layer in ("conv1", "layer2.0.conv2", "layer3.0.downsample.0", "layer4.0"):
        if scheme == "onnxruntime" and layer == "layer4.0":
            assert layer not in found  # its sum is rounded for others anyway
            continue
        only = relative_l2(logits(network, Quantised(network, recipe, only=(layer,)), images), exact)
        without = msgspec.structs.replace(recipe, keep=(layer,))
        assert found[layer].only == pytest.approx(only, rel=0.02)
        expected = relative_l2(logits(network, Quantised(network, without), images), exact)
        assert found[layer].without == pytest.approx(expected, rel=0.02)
        assert found[layer].only < found[layer].all
    assert found["layer2.0.conv2"].kind == "grouped 3x3"
    assert found["layer3.0.downsample.0"].kind == "downsample"


def test_a_damaged_layer_stands_out(digits: Any, network: Network, recipe: Recipe) -> None:
    low, high = recipe.ranges["layer2.0.conv1.relu"]
    damaged = msgspec.structs.replace(recipe, ranges=recipe.ranges | {"layer2.0.conv1.relu": (low * 8, high * 8)})
    found = sensitivities(network, damaged, digits.held_out[:8], quiet)
    assert max(found, key=lambda each: each.only).layer == "layer2.0.conv2"
    assert min(found, key=lambda each: each.without).layer == "layer2.0.conv2"


def test_auto_takes_what_leaves_the_smallest_error(digits: Any, network: Network, ranges: Any) -> None:
    judge = Judge(network, digits.held_out[:16])
    found, trials = choose(judge, ranges["tensorrt"], "tensorrt", 8, "auto", {}, quiet)
    errors = {trial.what: trial.error for trial in trials if trial.what in METHODS}
    for method in METHODS:
        recipe, none = choose(judge, ranges["tensorrt"], "tensorrt", 8, method, {}, quiet)
        assert none == [] and recipe.method == method
        half, _ = judge.halves()
        assert judge.error(recipe, half) == pytest.approx(errors[method])
        assert judge.error(found, half) <= judge.error(recipe, half)
    assert found.method == min(errors, key=errors.__getitem__)


def test_one_kind_may_take_another_method(digits: Any, network: Network, ranges: Any) -> None:
    """Where the best method overall is bad for one kind of tensor."""
    judge = Judge(network, digits.held_out[:16])
    spoilt = {method: dict(each) for method, each in ranges["tensorrt"].items()}
    for method in ("mse", "minmax", "entropy"):
        for name in kinds(spoilt[method])["the blocks' outputs"]:
            low, high = (20 * end for end in (spoilt[method][name].low, spoilt[method][name].high))
            spoilt[method][name] = type(spoilt[method][name])(low, high)
    for name in kinds(spoilt["percentile"])["the last convolutions' inputs"]:
        found = spoilt["percentile"][name]
        spoilt["percentile"][name] = type(found)(60 * found.low, 60 * found.high)
    recipe, trials = choose(judge, spoilt, "tensorrt", 8, "auto", {}, quiet)
    assert recipe.methods and any(" for " in trial.what and trial.taken for trial in trials)
    for name, method in recipe.methods.items():
        assert recipe.ranges[name] == (spoilt[method][name].low, spoilt[method][name].high)
    plain, _ = choose(judge, spoilt, "tensorrt", 8, recipe.method, {}, quiet)
    assert judge.error(recipe) < 0.9 * judge.error(plain)


def test_kinds() -> None:
    found = kinds(["input", "layer1.0.conv1.relu", "layer1.0.downsample.1", "layer1.0", "maxpool"])
    assert len(found) == 4
    assert found["the stem and the head"] == ["input", "maxpool"]
    assert found["what is added"] == ["layer1.0.downsample.1"]


def test_sqnr() -> None:
    assert sqnr(0.1) == pytest.approx(20)
    assert sqnr(0) == np.inf
