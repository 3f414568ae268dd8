"""Scores of a run: the tokenizer that they count words with."""

import json

import pytest
import yaml

from qformer_captioner import train_hf
from qformer_captioner.common.errors import InputError
from qformer_captioner.metrics import References
from qformer_captioner.training.scores import CAPTION_SCORES, CaptionScorer, scorer_for

from ..fixtures import tiny
from .test_train import TINY

CHINESE = [["一只狗在草地上奔跑", "草地上的狗"], ["一只猫在沙发上睡觉"]]
CAPTIONS = ["一只狗在草地上", "猫在睡觉"]


class Rows:
    """Rows with given captions, in the place of a `CaptionDataset`."""

    def __init__(self, captions: list[list[str]]):
        self.captions = captions

    def references(self) -> list[list[str]]:
        return self.captions


def test_captions_without_spaces_are_scored_on_characters(log):
    scores = CaptionScorer()(CAPTIONS, Rows(CHINESE))
    expected = References(CHINESE, tokenize="characters").score(CAPTIONS)
    assert scores == {name: expected[name] for name in CAPTION_SCORES}
    assert scores["cider"] > 1
    assert "the scores count characters. --tokenize names another tokenizer" in log.text


def test_a_tokenizer_that_does_not_exist_is_refused_before_training():
    with pytest.raises(InputError, match="choose ptb, characters"):
        scorer_for(False, "/no/such/tokenizer", Rows(CHINESE))


def test_the_tokenizer_of_a_run_is_in_its_card(tmp_path, log):
    for number in range(4):
        tiny.picture(number).save(tmp_path / f"{number}.png")
    rows = [f"{number}.png,一只狗在草地上奔跑{number}" for number in range(4)]
    (tmp_path / "rows.csv").write_text("\n".join(["image,caption", *rows]) + "\n", encoding="utf-8")
    options = {name: value for name, value in TINY.items() if not name.startswith(("max_", "metric_"))}
    options |= {"dataset_name": str(tmp_path / "rows.csv"), "train_val_split": 0.5, "max_steps": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**options, "output_dir": str(tmp_path / "run")}))
    train_hf.train(["--recipe", str(tmp_path / "recipe.yaml")])
    facts = json.loads((tmp_path / "run" / "card.json").read_text())
    assert facts["evaluation"]["tokenizer"] == "characters, without white space"
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| tokens of the scores | characters, without white space |" in card
    assert "tokenizer: characters, without white space" in card  # the protocol in the metadata
