"""Chat messages as prompts, through the processor and the pipeline `image-text-to-text`."""

import pytest
from transformers import pipeline

from ..fixtures import tiny


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*content) -> dict:
    return {"role": "user", "content": list(content)}


IMAGE = {"type": "image"}
CHATS = {
    "a string": ([{"role": "user", "content": "a star"}], "a star"),
    "a part": ([user(text("a star"))], "a star"),
    "parts": ([user(text("be kind"), text("a small"))], "be kind a small"),
    "parts with their own space": ([user(text("a blue"), text(" star "), text("above"))], "a blue star above"),
    "parts on lines": ([user(text("one\n"), text("two"))], "one\ntwo"),
    "strings": ([user("a blue", "star")], "a blue star"),
    "an empty part": ([user(text(""), text("a star"))], "a star"),
    "an image before the text": ([user(IMAGE, text("a star"))], "a star"),
    "an image after the text": ([user(text("a star"), IMAGE)], "a star"),
    "an image between parts": ([user(text("a blue"), IMAGE, text("star"))], "a blue star"),
    "an image alone": ([user(IMAGE)], ""),
    "a system turn": ([{"role": "system", "content": "Be brief."}, user(IMAGE, text("What?"))], "Be brief.\nWhat?"),
    "several turns": (
        [user(IMAGE, text("What?")), {"role": "assistant", "content": "A dog."}, user(text("And"), text("where?"))],
        "What?\nA dog.\nAnd where?",
    ),
    "an answer without text": ([user(text("What?")), {"role": "assistant", "content": None}], "What?"),
}


@pytest.mark.parametrize("name", CHATS)
def test_a_conversation_becomes_its_text(name):
    chat, expected = CHATS[name]
    assert tiny.processor().apply_chat_template(chat, add_generation_prompt=True) == expected


def test_conversations_of_a_batch_become_prompts_of_their_images():
    processor = tiny.processor()
    pictures = [tiny.picture(0), tiny.picture(1)]
    chats = [
        [{"role": "system", "content": "two"}, user({"type": "image", "image": pictures[0]}, text("a star"))],
        [user(text("a red"), text("circle"), {"type": "image", "image": pictures[1]})],
    ]
    batch = processor.apply_chat_template(chats, tokenize=True, return_dict=True)
    expected = processor(pictures, ["two\na star", "a red circle"])
    assert batch.keys() == expected.keys()
    assert all((batch[name] == expected[name]).all() for name in expected)


@pytest.mark.parametrize("number", [0, 2])
def test_a_conversation_of_a_batch_needs_exactly_one_image(number):
    """The images of the other conversations would move to its prompt."""
    image = {"type": "image", "image": tiny.picture()}
    chats = [[user(image, text("a star"))], [user(*[image] * number, text("two"))]]
    with pytest.raises(ValueError, match=f"entry 2 of the images has {number}"):
        tiny.processor().apply_chat_template(chats, tokenize=True, return_dict=True)


def test_the_pipeline_continues_the_text_of_a_conversation():
    model, image = tiny.captioner(), {"type": "image", "image": tiny.picture()}
    pipe = pipeline("image-text-to-text", model=model, processor=model.processor)
    options = dict(max_new_tokens=4, return_full_text=False)
    for chat, prompt in [
        ([user(image, text("be kind"), text("a small"))], "be kind a small"),
        ([{"role": "system", "content": "a red circle"}, user(text("a star"), image)], "a red circle\na star"),
        ([user(image), {"role": "assistant", "content": "a red"}], "a red"),
    ]:
        written = pipe(text=chat, **options)[0]["generated_text"].strip()
        assert written == model.caption(tiny.picture(), prompt=prompt, max_new_tokens=4)
