"""Which layers stay in float16, and what each layer pays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import numpy as np
import pytest

from rxdeploy.calibration.choose import Judge, all_ranges, choose
from rxdeploy.calibration.gather import gather
from rxdeploy.calibration.linear import predicted_errors
from rxdeploy.calibration.mixed import keep_until, sqnr
from rxdeploy.calibration.network import FC, Network, Steps
from rxdeploy.calibration.options import METHODS
from rxdeploy.calibration.ranges import Range, Units, units
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


def spoilt(ranges: Mapping[str, Range], names: Iterable[str], factor: float) -> dict[str, Range]:
    return {**ranges, **{name: Range(factor * ranges[name].low, factor * ranges[name].high) for name in names}}


def test_a_method_is_what_it_says(digits: Any, network: Network, ranges: Any) -> None:
    judge = Judge(network, digits.held_out[:16])
    for method in METHODS:
        recipe, none = choose(judge, ranges["tensorrt"], "tensorrt", 8, method, {}, quiet)
        assert none == [] and recipe.method == method
        assert recipe.ranges == ranges_as_data(ranges["tensorrt"][method])


@pytest.mark.parametrize("best", METHODS)
def test_auto_takes_another_method_where_that_is_clearly_better(
    digits: Any, network: Network, ranges: Any, best: Any
) -> None:
    """All the others have ranges that are too large everywhere."""
    judge = Judge(network, digits.held_out[:16])
    every = {method: each if method == best else spoilt(each, each, 8.0) for method, each in ranges["tensorrt"].items()}
    found, trials = choose(judge, every, "tensorrt", 8, "auto", {}, quiet)
    assert found.method == best and not found.methods
    assert {trial.what for trial in trials if trial.taken} == {"mse", best}
    for trial in trials:
        if trial.what in METHODS:
            recipe, _ = choose(judge, every, "tensorrt", 8, trial.what, {}, quiet)  # type: ignore[arg-type]
            assert trial.error == pytest.approx(judge.error(recipe, judge.halves()[0]))


def test_single_tensors_may_take_another_method(digits: Any, network: Network, ranges: Any) -> None:
    """Where the best method overall is bad for some."""
    judge = Judge(network, digits.held_out[:16])
    bad = ("layer1.0", "layer2.0.conv2.relu")
    every = {
        method: spoilt(each, bad, 20.0)
        if method != "percentile"
        else spoilt(each, [n for n in each if n not in bad], 8.0)
        for method, each in ranges["tensorrt"].items()
    }
    recipe, trials = choose(judge, every, "tensorrt", 8, "auto", {}, quiet)
    assert recipe.methods == dict.fromkeys(bad, "percentile") and trials[-1].taken
    for name, found in every["mse"].items():
        of = every["percentile"][name] if name in bad else found
        assert recipe.ranges[name] == (of.low, of.high)
    plain, _ = choose(judge, every, "tensorrt", 8, "mse", {}, quiet)
    assert judge.error(recipe) < 0.9 * judge.error(plain)


class OneRounded(Steps):
    """Rounds one tensor, and nothing else."""

    def __init__(self, name: str, to: Units) -> None:
        self._name, self._to = name, to

    def tensor(self, name: str, value: Any) -> Any:
        if name != self._name:
            return value
        integers = (value / self._to.scale).round() + self._to.zero_point
        return (integers.clamp(self._to.least, self._to.most) - self._to.zero_point) * self._to.scale


@pytest.mark.parametrize("scheme", ["tensorrt", "onnxruntime"])
def test_predicted_errors_are_those_of_single_tensors(digits: Any, network: Network, ranges: Any, scheme: Any) -> None:
    """Against runs in which only that tensor is rounded, with good ranges and ones that clip or are too coarse."""
    images, symmetric = digits.held_out[:12], scheme == "tensorrt"
    mse = ranges[scheme]["mse"]
    every = {"mse": mse, "minmax": spoilt(mse, mse, 4.0), "percentile": spoilt(mse, mse, 0.5)}
    predicted = predicted_errors(network, network.parameters, images, every, symmetric)
    exact = logits(network, Steps(), images)
    for method, each in every.items():
        ratios = []
        for name in (
            "input",
            "maxpool",
            "layer1.0.conv1.relu",
            "layer2.0.conv2.relu",
            "layer2.0.downsample.1",
            "layer3.0",
        ):
            found = logits(network, OneRounded(name, units(each[name], symmetric)), images)
            by_image = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)
            ratios.append(predicted[method][name] / float(np.mean(by_image**2)))
        assert 0.6 < np.exp(np.mean(np.log(ratios))) < 1.7
        assert min(ratios) > 0.3 and max(ratios) < 3.5


def test_sqnr() -> None:
    assert sqnr(0.1) == pytest.approx(20)
    assert sqnr(0) == np.inf
