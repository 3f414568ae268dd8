"""Options: groups of the help, `null`, checks, and what a mistyped or former name is answered with."""

import argparse
from dataclasses import dataclass
from enum import Enum

import pytest

from qformer_captioner.common.arguments import (
    FORMER_NAMES,
    CommandParser,
    check_at_least,
    check_one_of,
    option,
)
from qformer_captioner.common.errors import InputError
from qformer_captioner.common.option_parser import OptionParser, asks_for_help
from qformer_captioner.common.recipes import load_recipe


class Schedule(Enum):
    LINEAR = "linear"
    COSINE = "cosine"


@dataclass
class Options:
    dataset_name: list[str] | None = option(None, "Data sets.", "data")
    random_resized_crop_scale: float | None = option(None, "Smallest share of the area.", "augmentation")
    lora_r: int | None = option(None, "Rank.", "model")
    prompt: str | None = option(None, "Prompt.", "model")
    bf16: bool | None = option(None, "Compute in bfloat16.", "run")
    lora_alpha: int = option(32, "Scale.", "model")
    train_split: str = option("train", "Split.", "data")
    freeze: bool = option(True, "Freeze.", "model")
    schedule: Schedule = option("linear", "Schedule.")


PARSER = OptionParser((Options,), "Train.\n\n    python train_hf.py --lora_r 8")


def parse(*words: str) -> Options:
    return PARSER.parse(words)[0]


# --- Help -------------------------------------------------------------------------------------------------------------


def test_help_shows_options_in_the_order_of_the_groups():
    text = PARSER.format_help()
    titles = ["\nmodel:\n", "\ndata:\n", "\naugmentation:\n", "\nrun:\n", "\ntransformers' Trainer:\n"]
    assert [text.index(title) for title in titles] == sorted(text.index(title) for title in titles)
    assert text.index("--lora_r") < text.index("--dataset_name") < text.index("--bf16") < text.index("--schedule")


def test_help_shows_one_spelling_and_only_defaults_that_say_something():
    text = PARSER.format_help()
    assert "--lora_r INT " in text and "--lora-r" not in text and "--no_freeze" not in text
    assert "Scale. (default: 32)" in text and "None" not in text


def test_a_group_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'modle' is not a group of options"):
        option(None, "Rank.", "modle")


def test_help_is_asked_for_anywhere_in_a_command_line():
    assert asks_for_help(["--lora_r", "8", "--help"]) and asks_for_help(["-h"])
    assert not asks_for_help(["--help_all"])


def test_help_all_is_an_option_that_shows_the_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        OptionParser((Options,), "Train.", help_all=True).parse(["--help_all"])
    assert "--lora_r" in capsys.readouterr().out


# --- Null -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("null", ["null", "Null", "NULL", "none", "None"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("random_resized_crop_scale", ["0.5"]),
        ("lora_r", ["8"]),
        ("prompt", ["a photo of"]),
        ("dataset_name", ["a", "b"]),
        ("bf16", ["true"]),
    ],
)
def test_null_unsets_an_option_that_was_given_before(name, values, null):
    assert getattr(parse(f"--{name}", *values), name) is not None
    for unset in ([f"--{name}", null], [f"--{name}={null}"], [f"--{name.replace('_', '-')}", null]):
        assert getattr(parse(f"--{name}", *values, "--train_split", "dev", *unset), name) is None
        assert parse(f"--{name}", *values, "--train_split", "dev", *unset).train_split == "dev"


def test_a_value_after_null_counts():
    assert parse("--lora_r", "8", "--lora_r", "null", "--lora_r", "4").lora_r == 4


def test_null_is_an_ordinary_word_for_an_option_with_a_default():
    assert parse("--train_split", "null").train_split == "null"
    with pytest.raises(InputError, match="--lora_alpha.*invalid int value: 'null'"):
        parse("--lora_alpha", "null")


def test_an_option_that_is_unset_is_not_a_changed_option():
    words = ["--lora_r", "8", "--prompt", "a", "--lora_r", "null", "--lora_alpha", "32"]
    assert PARSER.changed_options(words) == {"prompt": "a"}


# --- Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora_rr", "8"], r"Unknown option '--lora_rr'. Did you mean '--lora_r'\?"),
        (["--lora-alhpa=8"], r"Unknown option '--lora-alhpa'. Did you mean '--lora_alpha'\?"),
        (["--xyz", "hf_secret"], "Unknown option '--xyz'. See --help."),
        (["--smallest_crop", "0.5"], "Unknown option '--smallest_crop': it is now called --random_resized_crop_scale."),
        (
            ["--schedule", "cosin"],
            r"--schedule: 'cosin' is not linear or cosine. Did you mean 'cosine'\?",
        ),
        (["--lora_r", "many"], "--lora_r: invalid int value: 'many'."),
        (["train"], "Unexpected argument 'train'. See --help."),
    ],
)
def test_a_mistake_is_answered_with_one_sentence_that_helps(words, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        parse(*words)


def test_a_former_name_in_a_recipe_is_answered_with_the_present_one(tmp_path):
    (tmp_path / "own.yaml").write_text("smallest_crop: 0.5\n")
    with pytest.raises(InputError, match="unknown field 'smallest_crop': it is now called random_resized_crop_scale.$"):
        load_recipe(tmp_path / "own.yaml", PARSER)


def test_a_command_without_recipes_answers_mistakes_in_the_same_way():
    parser = CommandParser()
    parser.add_argument("--metrics", nargs="+", choices=["bleu", "cider"])
    parser.add_argument("--private", action="store_true")
    assert parser.parse_args(["--metrics", "cider", "bleu"]).metrics == ["cider", "bleu"]
    with pytest.raises(InputError, match="'--privat'. Did you mean '--private'"):
        parser.parse_args(["--privat"])
    with pytest.raises(InputError, match="'ciderr' is not bleu or cider. Did you mean 'cider'"):
        parser.parse_args(["--metrics", "ciderr"])


def test_no_former_name_is_a_present_one():
    assert not set(FORMER_NAMES) & set(FORMER_NAMES.values())


# --- Checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, 0.5, float("nan"), float("inf")])
def test_a_number_below_the_minimum_or_not_finite_is_refused(value):
    with pytest.raises(InputError, match=f"^--batch_size must be at least 1, not {value}.$"):
        check_at_least(argparse.Namespace(batch_size=value), 1, "batch_size")


def test_an_option_that_is_not_given_passes_all_checks():
    options = argparse.Namespace(batch_size=1, num_beams=None, dtype=None)
    check_at_least(options, 1, "batch_size", "num_beams")
    check_one_of(options, ("auto", "float32"), "dtype")


def test_a_value_that_is_not_a_choice_is_answered_with_the_nearest_choice():
    options = argparse.Namespace(include_backbones="ture", metrics=["cider", "spicy"])
    with pytest.raises(InputError, match="^--include_backbones must be auto, true or false, not 'ture'. .*'true'"):
        check_one_of(options, ("auto", "true", "false"), "include_backbones")
    with pytest.raises(InputError, match="^--metrics must be cider or spice, not 'spicy'. Did you mean 'spice'"):
        check_one_of(options, ("cider", "spice"), "metrics")
