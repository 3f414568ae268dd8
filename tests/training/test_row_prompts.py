"""Training, evaluation and captioning with a prompt for each row."""

import json
from types import SimpleNamespace

import datasets
import pytest
import torch

from qformer_captioner.common.errors import InputError
from qformer_captioner.data.augmentation import Augmentation
from qformer_captioner.data.collator import CaptionCollator
from qformer_captioner.data.dataset import CaptionDataset, CaptionSource
from qformer_captioner.data.skipped_rows import SkippedRows
from qformer_captioner.evaluation.arguments import CaptioningArguments
from qformer_captioner.evaluation.benchmarks import load_evaluation_set
from qformer_captioner.evaluation.captioning_run import load_images
from qformer_captioner.evaluation.inference import caption_images
from qformer_captioner.train_hf import parse_options
from qformer_captioner.training.arguments import ModelArguments
from qformer_captioner.training.captioner_setup import set_prompts
from qformer_captioner.training.data_setup import load_datasets, training_specs
from qformer_captioner.training.run_facts import columns_of
from qformer_captioner.training.scores import CaptionScorer
from qformer_captioner.training.trainer import CaptionTrainer
from qformer_captioner.training.training_arguments import QFormerTrainingArguments

from ..fixtures import tiny
from ..fixtures.read_rows import colour_of

PROMPTS = ["a red circle above", "", "two"]
PICTURES = [tiny.picture(seed) for seed in range(3)]


@pytest.fixture
def rows(tmp_path):
    """Three rows with captions, of which two have a prompt."""
    for number, picture in enumerate(PICTURES):
        picture.save(tmp_path / f"{number}.png")
    images = [str(tmp_path / f"{number}.png") for number in range(3)]
    return datasets.Dataset.from_dict({"image": images, "question": PROMPTS, "caption": tiny.CAPTIONS})


def expected_captions(model, **options) -> list[str]:
    return [model.caption(image, prompt=prompt, **options) for image, prompt in zip(PICTURES, PROMPTS, strict=True)]


def make_trainer(rows, folder, **options) -> CaptionTrainer:
    data = CaptionDataset(CaptionSource("train", rows, prompt_column="question"), SkippedRows())
    model = tiny.captioner()
    args = dict(output_dir=str(folder), use_cpu=True, eval_strategy="no", save_strategy="no", report_to="none")
    args |= dict(load_best_model_at_end=False, generation_num_beams=1, generation_max_length=5, disable_tqdm=True)
    return CaptionTrainer(
        model=model,
        args=QFormerTrainingArguments(**args, **options),
        train_dataset=data,
        eval_dataset=data,
        data_collator=CaptionCollator(model.processor),
        score=CaptionScorer("ptb"),
    )


def test_an_evaluation_captions_each_row_after_its_own_prompt(rows, tmp_path):
    trainer = make_trainer(rows, tmp_path / "run")
    (tmp_path / "run").mkdir(exist_ok=True)
    scored = []
    trainer.score = lambda captions, rows: scored.append(captions) or {"cider": 0.0}
    trainer.evaluate()
    expected = expected_captions(trainer.model, num_beams=1, max_new_tokens=5)
    lines = [json.loads(line) for line in (tmp_path / "run" / "captions.jsonl").read_text().splitlines()]
    assert [line["caption"] for line in lines] == scored[0] == expected
    assert [line.get("prompt", "") for line in lines] == PROMPTS
    # The captions for shuffled images continue the prompt of the row, not that of the image.
    images = [0, 0, 0]
    for row, image in trainer_shuffle(trainer).items():
        images[row] = image
    assert scored[1] == [
        trainer.model.caption(PICTURES[image], prompt=prompt, num_beams=1, max_new_tokens=5)
        for image, prompt in zip(images, PROMPTS, strict=True)
    ]


def trainer_shuffle(trainer) -> dict[int, int]:
    from qformer_captioner.data.dataset import ShuffledImages

    return ShuffledImages(trainer.eval_dataset).image_of


def test_training_goes_with_row_prompts(rows, tmp_path):
    trainer = make_trainer(
        rows, tmp_path, max_steps=2, per_device_train_batch_size=3, bag_of_words_loss_weight=0.1, ema_decay=0.9
    )
    before = trainer.model.qformer.query_tokens.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.model.qformer.query_tokens, before)


def test_the_words_of_the_bag_of_words_loss_are_those_of_the_labels(rows, tmp_path):
    trainer = make_trainer(rows, tmp_path, bag_of_words_loss_weight=0.1)
    encoded = []
    processor = trainer.data_collator.processor
    original = type(processor).encode_caption
    processor.encode_caption = lambda *args, **kwargs: encoded.append(original(processor, *args, **kwargs)) or [1]
    make = type(trainer)
    make(
        model=trainer.model,
        args=trainer.args,
        train_dataset=trainer.train_dataset,
        data_collator=trainer.data_collator,
        score=trainer.score,
    )
    del processor.encode_caption
    labels = trainer.data_collator([trainer.train_dataset[row] for row in range(3)])["labels"][:, 0]
    assert encoded == [[token for token in row if token != -100] for row in labels.tolist()]


# --- Evaluation sets --------------------------------------------------------------------------------------------------


def test_images_are_captioned_after_their_own_prompts(rows, tmp_path):
    model = tiny.captioner()
    images = load_evaluation_set(CaptionSource("test", rows, prompt_column="question"))
    captions, unreadable = caption_images(model, images, tmp_path, batch_size=2, num_beams=1, max_new_tokens=5)
    assert list(captions.values()) == expected_captions(model, num_beams=1, max_new_tokens=5)
    assert not unreadable
    changed = load_evaluation_set(CaptionSource("test", rows))
    assert [images.fingerprints()[row] == changed.fingerprints()[row] for row in range(3)] == [False, True, False]


def test_an_image_with_two_prompts_is_captioned_twice():
    columns = {"image": ["a.png", "a.png", "a.png", "b.png"], "q": ["What?", "Where?", "What?", "What?"]}
    rows = datasets.Dataset.from_dict(columns | {"caption": ["one", "two", "three", "four"], "image_id": [5, 5, 5, 6]})
    found = load_evaluation_set(CaptionSource("test", rows, prompt_column="q"))
    assert found.references.captions == {0: ["one", "three"], 1: ["two"], 3: ["four"]}
    assert found.prompts == {0: "What?", 1: "Where?", 3: "What?"}
    with pytest.raises(InputError, match="image 5 has several prompts: leave out --image_id_column"):
        load_evaluation_set(CaptionSource("test", rows, image_id_column="image_id", prompt_column="q"))


# --- Options ----------------------------------------------------------------------------------------------------------


def test_llava_conversations_are_trained_and_evaluated_with_their_prompts(shared):
    name = str(shared / "specimens" / "K3_structure" / "llava.json")
    data, _ = load_datasets(parse_options(["--dataset_name", name])[1], None, SkippedRows(), Augmentation())
    read = [(colour_of(row["image"]), row["prompt"], row["captions"]) for row in map(data.__getitem__, range(3))]
    assert read == [(colour, "Describe it.", [f"a {colour} shape"]) for colour in ("red", "green", "blue")]
    _, images = load_images(CaptioningArguments(dataset_name=name), None)
    assert images.prompts == dict.fromkeys(range(3), "Describe it.")
    assert list(images.references.captions.values()) == [captions for _, _, captions in read]


def test_each_data_set_has_its_own_columns():
    names = ["--dataset_name", "a.csv", "b.csv", "--caption_column", "short,long", "text"]
    args = parse_options([*names, "--prompt_column", "question"])[1]
    assert [(spec.caption_column, spec.prompt_column) for spec in training_specs(args)] == [
        ("short,long", "question"),
        ("text", "question"),
    ]


def run_with(processor, **options):
    run = SimpleNamespace(model_args=ModelArguments(**options), augmentation=Augmentation())
    set_prompts(processor, run)
    return run


def test_the_chat_template_is_a_property_of_the_captioner():
    processor = tiny.processor()
    processor.language_chat_template = "red {{ messages[0]['content'] }} yellow"
    run = run_with(processor, prompt=["a star", "two"], use_chat_template=True)
    assert (processor.prompt, processor.use_chat_template) == ("a star", True)
    assert list(run.augmentation.prompts) == ["a star", "two"]
    assert processor(text="two").input_ids.tolist() == [processor.tokenizer("red two yellow").input_ids]
    run_with(processor, model_name_or_path="mine")  # an existing captioner keeps it
    assert processor.use_chat_template


def test_a_captioner_without_a_chat_template_needs_its_prompt_again():
    with pytest.raises(InputError, match="'mine' was trained without --use_chat_template: give its --prompt again"):
        run_with(tiny.processor(prompt="a star"), model_name_or_path="mine", use_chat_template=True)
    with pytest.raises(ValueError, match="has no chat template"):
        run_with(tiny.processor(), use_chat_template=True)


def test_the_model_card_names_the_columns_that_are_read(rows):
    source = CaptionSource("train", rows, caption_column="caption,question", prompt_column="question")
    assert columns_of(source) == ["image", "caption", "question", "question"]
    conversations = rows.remove_columns("caption").rename_column("question", "messages")
    assert columns_of(CaptionSource("train", conversations)) == ["image", "messages"]
