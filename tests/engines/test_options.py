"""What --batch accepts and refuses, and the facts that options leave in manifests and cache keys."""

from __future__ import annotations

import dataclasses
import json

import pytest

from rxdeploy.engines.options import DEFAULT_PROFILES, MAX_BATCH, EngineOptions, Profile
from rxdeploy.errors import InputError


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1", (1, 1, 1)),
        ("8", (8, 8, 8)),
        ("4096", (4096, 4096, 4096)),
        ("1,8,32", (1, 8, 32)),
        ("1,1,1", (1, 1, 1)),
        ("1,1,2", (1, 1, 2)),
        ("1,2,2", (1, 2, 2)),
        ("1,4096,4096", (1, 4096, 4096)),
        ("01,008,0032", (1, 8, 32)),
    ],
)
def test_good_profiles(text: str, sizes: tuple[int, int, int]) -> None:
    assert dataclasses.astuple(Profile.parse(text)) == sizes


FORM = "expected MIN,OPT,MAX"
ORDER = "must satisfy 1 <= MIN <= OPT <= MAX <= 4096"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", FORM),
        (",", FORM),
        ("1,", FORM),
        ("1,8", FORM),
        ("1,8,32,64", FORM),
        ("1,,32", FORM),
        ("a", FORM),
        ("1,b,32", FORM),
        ("1 8 32", FORM),
        ("1, 8, 32", FORM),
        (" 8", FORM),
        ("8\n", FORM),
        ("-1", FORM),
        ("+1", FORM),
        ("1.0", FORM),
        ("1e3", FORM),
        ("0x10", FORM),
        ("1_000", FORM),
        ("1;8;32", FORM),
        ("0", ORDER),
        ("0,8,32", ORDER),
        ("0,0,0", ORDER),
        ("8,1,32", ORDER),
        ("1,32,8", ORDER),
        ("32,8,1", ORDER),
        ("4097", ORDER),
        ("1,8,4097", ORDER),
        ("1,8,99999999999999999999", FORM),
        pytest.param("9" * 5000, FORM, id="5000 digits"),
    ],
)
def test_bad_profiles_are_input_errors_that_repeat_the_text(text: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        Profile.parse(text)
    assert str(caught.value).startswith(f"--batch {text}: ")
    assert reason in str(caught.value)
    assert MAX_BATCH == 4096


@pytest.mark.parametrize("text", ["1", "8", "1,8,32", "2,2,4", "1,4,4"])
def test_the_text_form_reads_back(text: str) -> None:
    assert str(Profile.parse(text)) == text


def test_the_text_form_of_one_size_is_short() -> None:
    assert str(Profile.parse("8,8,8")) == "8"


def test_default_profile() -> None:
    assert [str(profile) for profile in DEFAULT_PROFILES] == ["1,8,32"]
    assert EngineOptions().profiles == DEFAULT_PROFILES


def test_facts_are_json_and_tell_every_option_apart() -> None:
    options = [
        EngineOptions(),
        EngineOptions(profiles=(Profile(1, 8, 16),)),
        EngineOptions(profiles=(Profile(1, 8, 32), Profile(1, 1, 1))),
        EngineOptions(workspace_mib=64),
        EngineOptions(optimization_level=0),
        EngineOptions(version_compatible=True),
        EngineOptions(hardware_compatible=True),
        EngineOptions(refit=True),
        EngineOptions(strip_plan=True),
        EngineOptions(compute_capabilities=("8.6",)),
        EngineOptions(compute_capabilities=("8.6", "8.9")),
    ]
    texts = {json.dumps(option.as_facts()) for option in options}
    assert len(texts) == len(options)
    changed = {field for option in options for field, value in vars(option).items() if value != vars(options[0])[field]}
    assert changed == {field.name for field in dataclasses.fields(EngineOptions)}, "an option this test does not know"
    assert json.loads(json.dumps(EngineOptions().as_facts()))["profiles"] == [{"min": 1, "opt": 8, "max": 32}]
