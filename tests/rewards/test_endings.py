"""Captions that break off are told from those that end."""

import pytest

from qformer_captioner.rewards import bad_ending


@pytest.mark.parametrize(
    "caption", ["a man with a", "a dog on the.", "a cat and", "Two boys sit ON", "a plate of , ", "a man who is", "the"]
)
def test_articles_prepositions_and_conjunctions_are_bad_endings(caption):
    assert bad_ending(caption)


@pytest.mark.parametrize(
    "caption",
    ["a man with a hat", "a dog.", "", "...", "a sign for exit 4", "cars drive by", "a cup with tea inside", "top"],
)
def test_other_captions_end_well(caption):
    assert not bad_ending(caption)
