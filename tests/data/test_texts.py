"""Prompts and captions of rows: prompt columns, several caption columns, and conversations."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from qformer_captioner.common.errors import InputError
from qformer_captioner.data.augmentation import Augmentation
from qformer_captioner.data.collator import CaptionCollator
from qformer_captioner.data.conversations import is_conversation, rounds_of
from qformer_captioner.data.dataset import CaptionDataset, CaptionSource, ShuffledImages
from qformer_captioner.data.feature_shards import FeatureBatch, SplitLayout
from qformer_captioner.data.features import SplitFeatures
from qformer_captioner.data.skipped_rows import SkippedRows
from qformer_captioner.data.streaming import CaptionStream
from qformer_captioner.training.data_setup import hold_out

from ..fixtures import tiny
from ..fixtures.read_rows import colour_of

COLOURS = ["red", "green", "blue"]
ASKED = ["Describe it.", "", "What colour?"]


@pytest.fixture
def images(tmp_path):
    """Return the paths of three one-colour pictures."""
    for colour in COLOURS:
        Image.new("RGB", (20, 10), colour).save(tmp_path / f"{colour}.png")
    return [str(tmp_path / f"{colour}.png") for colour in COLOURS]


def rows_with_prompts(images):
    columns = {"image": images, "question": ASKED, "caption": [f"all {colour}" for colour in COLOURS]}
    return datasets.Dataset.from_dict(columns | {"long": [["a wall", f"a {colour} wall"] for colour in COLOURS]})


def read(rows, augmentation=None, **columns):
    return CaptionDataset(CaptionSource("train", rows, **columns), SkippedRows(), augmentation)


def texts(rows):
    """Return the colour of the image, the prompt and the captions of each row."""
    return [(colour_of(row["image"]), row.get("prompt"), row["captions"]) for row in rows]


def llava(*rounds, system=None):
    """Return a conversation of questions and answers, as LLaVA stores it."""
    turns = [{"from": "system", "value": system}] if system else []
    for question, answer in rounds:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return turns


# --- Columns ----------------------------------------------------------------------------------------------------------


def test_each_row_has_the_prompt_of_its_prompt_column(images):
    data = read(rows_with_prompts(images), prompt_column="question")
    assert texts(data[index] for index in range(3)) == [
        ("red", "Describe it.", ["all red"]),
        ("green", None, ["all green"]),
        ("blue", "What colour?", ["all blue"]),
    ]
    assert data.row_prompts() == ASKED


def test_a_row_without_a_prompt_gets_one_of_several_prompts(images):
    augmentation = Augmentation(prompts=["a star", "two"])
    data = read(rows_with_prompts(images), augmentation, prompt_column="question")
    assert [data[index]["prompt"] for index in (0, 2)] == ["Describe it.", "What colour?"]
    assert data[1]["prompt"] in ("a star", "two")


def test_the_captions_of_several_columns_are_used(images):
    data = read(rows_with_prompts(images), caption_column="caption, long")
    assert data[0]["captions"] == ["all red", "a wall", "a red wall"]


def test_a_column_whose_name_has_a_comma_is_one_column(images):
    rows = rows_with_prompts(images).rename_column("caption", "short,en")
    assert read(rows, caption_column="short,en")[0]["captions"] == ["all red"]


@pytest.mark.parametrize("columns", [{"prompt_column": "query"}, {"caption_column": "long,query"}])
def test_a_missing_column_is_named(images, columns):
    option = next(iter(columns))
    with pytest.raises(InputError, match=f"no column 'query'; its columns are .*--{option}"):
        read(rows_with_prompts(images), **columns)
    stream = rows_with_prompts(images).to_iterable_dataset()
    with pytest.raises(InputError, match=f"no column 'query'; its columns are .*--{option}"):
        CaptionStream([CaptionSource("train", stream, **columns)], SkippedRows())


def test_rows_of_an_image_are_merged_if_they_have_one_prompt(images):
    rows = datasets.Dataset.from_dict(
        {
            "image": [images[0]] * 4,
            "image_id": [7] * 4,
            "question": ["What?", "Where?", "What?", "Where?"],
            "caption": ["a wall", "here", "a red wall", "there"],
        }
    )
    data = read(rows, image_id_column="image_id", prompt_column="question")
    assert texts(data[index] for index in range(len(data))) == [
        ("red", "What?", ["a wall", "a red wall"]),
        ("red", "Where?", ["here", "there"]),
    ]


def test_shuffled_images_keep_prompt_and_captions_together(images):
    data = read(rows_with_prompts(images), prompt_column="question")
    for index, row in enumerate(ShuffledImages(data)[index] for index in range(3)):
        assert (row.get("prompt", ""), row["captions"]) == (ASKED[index], [f"all {COLOURS[index]}"])
        assert colour_of(row["image"]) != COLOURS[index]


def test_a_stream_has_the_rows_of_the_data_set(images):
    columns = dict(prompt_column="question", caption_column="long,caption")
    rows = rows_with_prompts(images).cast_column("image", datasets.Image(decode=False))
    source = CaptionSource("train", rows.to_iterable_dataset(), **columns)
    stream = CaptionStream([source], SkippedRows(), shuffle_buffer=0)
    data = read(rows, **columns)
    assert texts(row for row, _ in zip(stream, range(3), strict=False)) == texts(data[index] for index in range(3))
    assert (list(stream.row_prompts()), list(stream.references())) == (data.row_prompts(), data.references())


# --- Conversations ----------------------------------------------------------------------------------------------------

WHAT, WHERE = ("<image>\nWhat is it?", "a wall"), ("Where?", "at home")
CONVERSATIONS = {
    "one round": (llava(WHAT), [("What is it?", ["a wall"])]),
    "image token behind": (llava(("What is it?\n<image>", "a wall")), [("What is it?", ["a wall"])]),
    "image token alone": (llava(("<image>", "a wall")), [("", ["a wall"])]),
    "two rounds": (llava(WHAT, WHERE), [("What is it?", ["a wall"]), ("Where?", ["at home"])]),
    "system turn": (
        llava(WHAT, WHERE, system="Be brief."),
        [("Be brief.\nWhat is it?", ["a wall"]), ("Be brief.\nWhere?", ["at home"])],
    ),
    "no answer": (llava(WHAT)[:1], [("What is it?", [])]),
    "no question": (llava(WHAT)[1:], [("", ["a wall"])]),
    "two answers": (
        [*llava(WHAT), {"from": "gpt", "value": "a red wall"}],
        [("What is it?", ["a wall", "a red wall"])],
    ),
    "roles": (
        [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "a wall"}],
        [("What is it?", ["a wall"])],
    ),
    "parts": (
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a wall"}]},
        ],
        [("What is it?", ["a wall"])],
    ),
    "a dict of lists": ({"from": ["human", "gpt"], "value": ["What is it?", "a wall"]}, [("What is it?", ["a wall"])]),
    "JSON": (json.dumps(llava(WHAT)), [("What is it?", ["a wall"])]),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_each_round_of_a_conversation_is_a_prompt_with_its_answer(name):
    conversation, expected = CONVERSATIONS[name]
    assert is_conversation(conversation)
    assert list(rounds_of(conversation)) == expected


@pytest.mark.parametrize("cell", [None, "", "a dog", "[sic]", ["a dog"], [{"raw": "a dog"}], [], {"caption": "a dog"}])
def test_other_cells_are_not_conversations(cell):
    assert not is_conversation(cell)


@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_conversations_are_read_where_there_is_no_caption(images, column):
    chats = [llava(WHAT, WHERE), llava(("Describe it.", "all green")), llava(WHAT)[:1]]
    data = read(datasets.Dataset.from_dict({"image": images, column: chats}))
    assert texts(data[index] for index in range(len(data))) == [
        ("red", "What is it?", ["a wall"]),
        ("red", "Where?", ["at home"]),
        ("green", "Describe it.", ["all green"]),
    ]
    assert [(entry["row"], entry["reason"]) for entry in data.skipped.pending] == [
        (2, "no caption: a prompt of the conversation has no answer")
    ]
    assert data.column(column)[1] == chats[0]


def test_a_stream_of_conversations_has_a_row_for_each_round(images):
    rows = datasets.Dataset.from_dict({"image": images[:1], "conversations": [llava(WHAT, WHERE)]})
    rows = rows.cast_column("image", datasets.Image(decode=False)).to_iterable_dataset()
    stream = CaptionStream([CaptionSource("train", rows)], SkippedRows(), shuffle_buffer=0)
    assert texts(row for row, _ in zip(stream, range(2), strict=False)) == [
        ("red", "What is it?", ["a wall"]),
        ("red", "Where?", ["at home"]),
    ]


def test_the_rounds_of_a_conversation_share_the_features_of_their_image(images, tmp_path):
    layout = SplitLayout(tmp_path / "train", rows=2, rows_per_shard=2, views=1, shape=(3, 4), dtype="float32")
    layout.write(0, [FeatureBatch(np.ones((6, 4), np.float32), np.full((2, 1), 3), [])])
    rows = datasets.Dataset.from_dict({"image": images[:2], "conversations": [llava(WHAT, WHERE), llava(WHAT)]})
    data = CaptionDataset(CaptionSource("train", rows), SkippedRows(), features=SplitFeatures(layout, {}))
    read = [data[index] for index in range(3)]
    assert [(row["image_embeds"].row, row["prompt"]) for row in read] == [
        (0, "What is it?"),
        (0, "Where?"),
        (1, "What is it?"),
    ]


def test_the_rounds_of_a_conversation_are_held_out_together(images):
    chats = [llava(WHAT), llava(WHAT), llava(WHAT, WHERE)]
    data = read(datasets.Dataset.from_dict({"image": images, "conversations": chats}))
    assert hold_out(data, 0.25, None).references() == [["a wall"], ["at home"]]
    assert data.references() == [["a wall"], ["a wall"]]


# --- Batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["llama", "t5"])
@pytest.mark.parametrize("use_chat_template", [False, True])
def test_a_batch_with_different_prompts_has_the_losses_of_its_rows_alone(images, language, use_chat_template):
    model = tiny.captioner("clip", language)
    model.processor.language_chat_template = "{% for turn in messages %}red {{ turn['content'] }} yellow{% endfor %}"
    model.processor.use_chat_template = use_chat_template
    rows = rows_with_prompts(images).remove_columns("question").add_column("question", ["a star", "", "two small"])
    data = read(rows, prompt_column="question", caption_column="caption,long")
    collate = CaptionCollator(model.processor)
    batch = collate([data[index] for index in range(3)])
    alone = [model(**collate([data[index]])).losses[0] for index in range(3)]
    torch.testing.assert_close(model(**batch).losses, torch.stack(alone), rtol=1e-4, atol=1e-4)
    prompt = "red a star yellow" if use_chat_template else "a star"
    mask = batch["attention_mask"][0].bool()
    assert batch["input_ids"][0][mask].tolist() == model.processor.tokenizer(prompt).input_ids


def test_a_processor_keeps_its_use_of_the_chat_template(tmp_path):
    processor = tiny.processor()
    processor.language_chat_template = "red {{ messages[0]['content'] }} yellow"
    processor.use_chat_template = True
    processor.save_pretrained(tmp_path)
    loaded = type(processor).from_pretrained(tmp_path)
    assert loaded(text="a star").input_ids.tolist() == [processor.tokenizer("red a star yellow").input_ids]
