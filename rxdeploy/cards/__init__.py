"""What can be deployed: model cards, built in or a user's own."""

from rxdeploy.cards.card import ModelCard, load_card, read_labels
from rxdeploy.cards.registry import builtin_cards, find_card

__all__ = ["ModelCard", "builtin_cards", "find_card", "load_card", "read_labels"]
