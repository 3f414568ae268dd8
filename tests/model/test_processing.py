"""Processor: images, prompts and captions become inputs of the model. Each test states one property."""

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from qformer_captioner import QFormerCaptionerProcessor

from ..fixtures import tiny

CAPTION = "a red circle above a blue star"


def beginning_with_bos():
    """Return a tokenizer that puts a token in front of every text, as Llama's does."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    begin = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begin
    return tokenizer


@pytest.fixture(scope="module")
def make(request):
    """Return a function that makes a processor: `make("gpt2")`, `make("t5", prompt="...")`."""
    real = {}  # read once

    def make(name: str, prompt: str = "") -> QFormerCaptionerProcessor:
        if name in ("t5", "gpt2"):
            if name not in real:
                folder = request.getfixturevalue("shared") / "tokenizers" / name
                real[name] = AutoTokenizer.from_pretrained(folder)
            tokenizer = real[name]
        else:
            tokenizer = beginning_with_bos() if name == "bos" else tiny.tokenizer()
        encoder_decoder = name in ("t5", "words, encoder-decoder")
        return QFormerCaptionerProcessor(tiny.image_processor(), tokenizer, None, prompt, encoder_decoder)

    return make


TOKENIZERS = ["words", "words, encoder-decoder", "bos", "gpt2", "t5"]
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)

# --- Captions ---------------------------------------------------------------------------------------------------------


@every_tokenizer
def test_a_caption_ends_with_one_end_of_sequence_and_decodes_to_itself(make, name):
    processor = make(name)
    ids = processor.encode_caption(CAPTION)
    end = processor.tokenizer.eos_token_id
    assert ids[-1] == end and ids.count(end) == 1
    assert processor.decode(ids[:-1], skip_special_tokens=False).strip() == CAPTION


@pytest.mark.parametrize("name", ["words", "bos", "gpt2"])
@pytest.mark.parametrize("prompt", [None, "a star:"])
def test_captions_of_decoder_only_models_have_no_special_token_but_the_last(make, name, prompt):
    """A special token would be in the middle of the text."""
    processor = make(name)
    special = set(processor.tokenizer.all_special_ids)
    assert not special & set(processor.encode_caption("a star", prompt)[:-1])


@every_tokenizer
@pytest.mark.parametrize("prompt", ["A photo of", "A photo of "])
def test_a_caption_continues_the_prompt(make, name, prompt):
    """A decoder-only model gets one space in between. For an encoder-decoder the caption is a separate text."""
    processor = make(name)
    ids = processor.encode_caption(CAPTION, prompt)
    if processor.is_encoder_decoder:
        assert ids == processor.encode_caption(CAPTION)
    else:
        whole = processor.decode(processor.tokenizer(prompt, add_special_tokens=False).input_ids + ids[:-1])
        expected = f"{prompt.strip()} {CAPTION}"
        if name != "gpt2":  # the words of the prompt are not in the vocabulary of the word-level tokenizers
            whole, expected = whole[-len(CAPTION) - 1 :], " " + CAPTION
        assert whole == expected


def test_gpt2_gets_the_tokens_of_running_text(make):
    processor = make("gpt2")
    caption = processor.encode_caption(CAPTION, "A photo of")[:-1]
    prompt = processor(text="A photo of").input_ids[0].tolist()
    assert prompt + caption == processor.tokenizer(f"A photo of {CAPTION}").input_ids
    assert processor.encode_caption(CAPTION)[:-1] == processor.tokenizer(CAPTION).input_ids


def test_the_prompt_of_the_processor_is_the_default(make):
    own, without = make("gpt2", prompt="A photo of"), make("gpt2")
    assert own.encode_caption(CAPTION) == without.encode_caption(CAPTION, "A photo of")
    assert own.encode_caption(CAPTION) != without.encode_caption(CAPTION)


@every_tokenizer
def test_truncation_keeps_the_beginning_and_the_end_of_sequence(make, name):
    processor = make(name)
    whole = processor.encode_caption(CAPTION)
    end = processor.tokenizer.eos_token_id
    assert processor.encode_caption(CAPTION, max_length=3) == [*whole[:2], end]
    assert processor.encode_caption(CAPTION, max_length=1) == [end]
    assert processor.encode_caption(CAPTION, max_length=len(whole)) == whole
    assert processor.encode_caption(CAPTION, max_length=len(whole) - 1) == [*whole[:-2], end]


def test_a_language_token_after_the_end_of_sequence_is_removed():
    """mBART encodes "a dog </s> en_XX"."""
    processor = tiny.processor(is_encoder_decoder=True)
    expected = processor.encode_caption("a red circle")
    special = [("</s>", processor.tokenizer.eos_token_id), ("en_XX", 5)]
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A </s> en_XX", special_tokens=special)
    assert processor.tokenizer("a red circle")["input_ids"][-1] == 5
    assert processor.encode_caption("a red circle") == expected


@every_tokenizer
def test_space_around_a_caption_does_not_matter(make, name):
    processor = make(name)
    assert processor.encode_caption(f" {CAPTION}\n") == processor.encode_caption(CAPTION)


@pytest.mark.parametrize("caption", ["", "  ", "\n\t"])
@pytest.mark.parametrize("name", ["words", "t5"])
def test_an_empty_caption_is_refused(make, name, caption):
    with pytest.raises(ValueError, match="empty"):
        make(name).encode_caption(caption, "A photo of")


# --- Prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["words", "gpt2"])
@pytest.mark.parametrize("text, rows", [("", 1), (["", ""], 2)])
def test_an_empty_prompt_is_an_integer_tensor_of_width_zero(make, name, text, rows):
    batch = make(name)(text=text)
    for key in ("input_ids", "attention_mask"):
        assert batch[key].shape == (rows, 0)
        assert batch[key].dtype == torch.long


@pytest.mark.parametrize("name, token", [("bos", "bos_token_id"), ("t5", "eos_token_id")])
def test_an_empty_prompt_keeps_the_special_tokens_of_the_tokenizer(make, name, token):
    processor = make(name)
    assert processor(text="").input_ids.tolist() == [[getattr(processor.tokenizer, token)]]


@every_tokenizer
def test_prompts_are_padded_on_the_side_that_the_language_model_needs(make, name):
    """On the left for a decoder-only model, which continues at the end; on the right for an encoder."""
    processor = make(name)
    texts = ["a star", "a red circle above a blue star"]
    batch = processor(text=texts)
    assert batch.input_ids.shape == batch.attention_mask.shape
    for row, mask, text in zip(batch.input_ids, batch.attention_mask, texts, strict=True):
        assert row[mask.bool()].tolist() == processor.tokenizer(text).input_ids
    short = batch.attention_mask[0].tolist()
    assert 0 in short and short == sorted(short, reverse=processor.is_encoder_decoder)
    assert batch.attention_mask[1].all()


def test_an_empty_prompt_among_others_is_padding(make):
    batch = make("words")(text=["", "a star"])
    assert batch.attention_mask.tolist() == [[0, 0], [1, 1]]


def test_a_tokenizer_without_padding_token_pads_with_its_end_of_sequence(make):
    tokenizer = make("gpt2").tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None


def test_one_prompt_applies_to_all_images(make):
    processor = make("words")
    pictures = [tiny.picture(0), tiny.picture(1), tiny.picture(2)]
    one, three = processor(pictures, "a star"), processor(pictures, ["a star"] * 3)
    assert torch.equal(one.input_ids, three.input_ids)
    assert one.input_ids.shape[0] == one.pixel_values.shape[0] == 3


@pytest.mark.parametrize("text", [None, "", ["", ""]])
def test_the_prompt_of_the_processor_replaces_an_empty_one(make, text):
    processor = make("words", prompt="a blue star")
    batch = processor([tiny.picture(0), tiny.picture(1)], text)
    assert batch.input_ids.tolist() == [processor.tokenizer("a blue star").input_ids] * 2


@pytest.mark.parametrize("images, prompts", [(3, 2), (1, 2)])
def test_a_wrong_number_of_prompts_is_refused(make, images, prompts):
    with pytest.raises(ValueError, match=f"{images} inputs.*{prompts} prompts"):
        make("words")([tiny.picture()] * images, ["a star"] * prompts)


def test_a_conversation_becomes_plain_text(make):
    message = [{"type": "image"}, {"type": "text", "text": "a blue"}, {"type": "text", "text": " star"}]
    assert make("words").apply_chat_template([{"role": "user", "content": message}]) == "a blue star"


# --- Images -----------------------------------------------------------------------------------------------------------


def test_images_of_unequal_size_make_a_batch(make):
    sizes = [(40, 50), (300, 7), (1, 1)]
    pixels = make("words")([tiny.picture(size=size) for size in sizes]).pixel_values
    assert pixels.shape == (3, 3, tiny.SIDE, tiny.SIDE)


def test_images_may_be_nested(make):
    """Pipelines pass one list for each chat message."""
    pictures = [tiny.picture(0), tiny.picture(1)]
    nested = make("words")([[pictures[0]], [pictures[1]]]).pixel_values
    assert torch.equal(nested, make("words")(pictures).pixel_values)


def test_without_images_there_are_no_pixels(make):
    assert set(make("words")(text="a star")) == {"input_ids", "attention_mask"}


def test_options_reach_the_image_processor(make):
    pixels = make("words")(tiny.picture(size=(40, 50)), do_resize=False).pixel_values
    assert pixels.shape == (1, 3, 50, 40)


# --- Saving -----------------------------------------------------------------------------------------------------------


@every_tokenizer
def test_a_saved_processor_gives_equal_inputs(make, name, tmp_path):
    processor = make(name, prompt="a blue star on")
    processor.save_pretrained(tmp_path)
    loaded = QFormerCaptionerProcessor.from_pretrained(tmp_path)
    assert (loaded.prompt, loaded.is_encoder_decoder) == ("a blue star on", processor.is_encoder_decoder)
    assert loaded.encode_caption(CAPTION) == processor.encode_caption(CAPTION)
    inputs = dict(images=[tiny.picture(0), tiny.picture(1)], text=["a star", ""])
    before, after = processor(**inputs), loaded(**inputs)
    assert before.keys() == after.keys()
    for key in before:
        assert torch.equal(after[key], before[key]), key
    message = [{"role": "user", "content": [{"type": "text", "text": "a star"}]}]
    assert loaded.apply_chat_template(message) == "a star"


def test_a_processor_is_loaded_if_the_folder_has_one(make, tmp_path):
    assert QFormerCaptionerProcessor.from_folder_if_any(tmp_path) is None
    make("words", prompt="a star").save_pretrained(tmp_path)
    assert QFormerCaptionerProcessor.from_folder_if_any(tmp_path).prompt == "a star"


def test_from_backbones_joins_image_processor_and_tokenizer(tmp_path):
    tiny.image_processor(side=16).save_pretrained(tmp_path / "vision")
    tiny.tokenizer().save_pretrained(tmp_path / "language")
    processor = QFormerCaptionerProcessor.from_backbones(tmp_path / "vision", tmp_path / "language", prompt="a star")
    batch = processor(tiny.picture())
    assert batch.pixel_values.shape == (1, 3, 16, 16)
    assert batch.input_ids.tolist() == [tiny.tokenizer()("a star").input_ids]


def test_the_chat_template_of_the_language_model_survives_saving(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<user>{{ message['content'] }}{% endfor %}<assistant>"
    processor = QFormerCaptionerProcessor(tiny.image_processor(), tokenizer)
    assert processor.as_chat("What is this?") == "<user>What is this?<assistant>"
    processor.save_pretrained(tmp_path)
    again = QFormerCaptionerProcessor.from_pretrained(tmp_path)
    assert again.as_chat("What is this?") == "<user>What is this?<assistant>"


def test_a_tokenizer_without_a_chat_template_is_refused():
    with pytest.raises(ValueError, match="has no chat template: leave out --use_chat_template"):
        tiny.processor().as_chat("What is this?")


OPTIONS = {  # options of the tokenizer, and the expected lengths of the first two captions, of 7 and 3 tokens
    "max_length and truncation": (dict(max_length=4, truncation=True), [4, 3]),
    "padding to a length": (dict(padding="max_length", max_length=9), [7, 3]),
    "in text_kwargs": (dict(text_kwargs=dict(max_length=2, truncation=True)), [2, 2]),
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("reader", ["language model", "qformer"])
def test_prompts_follow_the_options_of_the_tokenizer(case, reader):
    options, lengths = OPTIONS[case]
    processor = tiny.processor()
    processor.qformer_tokenizer = tiny.tokenizer()
    batch = processor(text=tiny.CAPTIONS[:2], **options)
    mask = batch["attention_mask" if reader == "language model" else "qformer_attention_mask"]
    assert mask.sum(dim=1).tolist() == lengths
    assert mask.shape[1] == (9 if options.get("padding") else max(lengths))
    assert mask[1, 0 if reader == "language model" else -1] == (lengths[0] == lengths[1])  # the side of the padding


def test_the_caller_chooses_the_side_of_the_padding():
    batch = tiny.processor()(text=tiny.CAPTIONS[:2], padding_side="right")
    assert batch["attention_mask"][1].tolist() == [1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(("kind", "expected"), [("pt", torch.Tensor), ("np", np.ndarray), (None, list)])
def test_the_batch_has_the_type_that_was_asked_for(kind, expected):
    batch = tiny.processor()(images=tiny.picture(), text="a red star", return_tensors=kind)
    assert {type(value) for value in batch.values()} == {expected}
    assert batch["input_ids"][0] is not None and np.asarray(batch["input_ids"]).shape == (1, 3)


def test_what_the_tokenizer_was_asked_for_is_returned():
    batch = tiny.processor()(text="a red star", return_offsets_mapping=True)
    assert batch["offset_mapping"].tolist() == [[[0, 1], [1, 5], [5, 10]]]


def test_a_call_without_images_and_text_is_refused():
    with pytest.raises(ValueError, match="nothing to process: pass `images` or `image_embeds`, `text` or both"):
        tiny.processor("a photo of")()
