"""Finding a card: built-in name, alias, or a path to a user's own file."""

from __future__ import annotations

import difflib
import functools
from pathlib import Path

from rxdeploy.cards.card import ModelCard, load_card
from rxdeploy.errors import InputError

BUILTIN = Path(__file__).parent / "builtin"


@functools.cache
def builtin_cards() -> tuple[ModelCard, ...]:
    """Every card that ships with rxdeploy, in the order of their names."""
    return tuple(load_card(path) for path in sorted(BUILTIN.glob("*.toml")))


def find_card(model: str) -> ModelCard:
    """The card for MODEL: a name or alias of a built-in card, or a path to a card file.

    Whatever looks like a path (a separator, or the ending ``.toml``) is one. InputError for an unknown
    name, with the nearest known one.
    """
    if model.endswith(".toml") or "/" in model or "\\" in model:
        return load_card(Path(model))
    by_name = {name: card for card in builtin_cards() for name in (card.name, *card.aliases)}
    if model in by_name:
        return by_name[model]
    nearest = difflib.get_close_matches(model, by_name, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    raise InputError(
        f"no model named {model!r}; {hint}`rxdeploy models` lists the built-in ones, and a path to a card file "
        "(.toml) works too"
    )
