"""Images and texts are encoded once, matched once, and kept over kills."""

import pytest
import torch

from qformer_captioner.common.errors import InputError
from qformer_captioner.evaluation.captioning_run import load_images
from qformer_captioner.retrieval.arguments import RetrievalArguments
from qformer_captioner.retrieval.blocks import Block, BlockFolder, compute_blocks
from qformer_captioner.retrieval.encoding import encode_corpus, encode_texts, similarity_of
from qformer_captioner.retrieval.matching import match_pairs

from ..fixtures.captioned_files import COLOURS, rows_with_paths, write_jsonl, write_pictures
from .stub import ColourModel


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a picture of each colour and two captions of each."""
    write_jsonl(write_pictures(tmp_path) / "rows.jsonl", rows_with_paths())
    return tmp_path


def evaluation_set(folder):
    return load_images(RetrievalArguments(dataset_name=str(folder / "rows.jsonl")), None)[1]


def encode(model, folder):
    return encode_corpus(model, evaluation_set(folder), folder / "run", batch_size=4)


def test_the_vectors_of_a_corpus_are_those_of_its_images_and_texts(folder):
    model = ColourModel()
    corpus = encode(model, folder)
    images = evaluation_set(folder)
    opened = [images.open(image) for image in corpus.images]
    assert torch.equal(corpus.image_vectors, model.encode_images(opened).vectors)
    assert torch.equal(corpus.text_vectors, model.encode_texts(corpus.texts))
    assert corpus.texts[2:4] == ["all lime", "a lime wall"]
    assert corpus.image_of_text.tolist() == [place for place in range(len(COLOURS)) for _ in range(2)]


def test_texts_are_returned_in_order_although_batches_are_sorted_by_length(folder):
    texts = ["a red wall of bricks", "red", "a blue wall", "all lime", "white or yellow"]
    assert torch.equal(encode_texts(ColourModel(), texts, batch_size=2), ColourModel().encode_texts(texts))


def test_what_is_on_disk_is_not_computed_again(folder):
    first = encode(ColourModel(), folder)
    model = ColourModel()
    second = encode(model, folder)
    assert (model.images, model.texts) == (0, 0)
    assert torch.equal(first.image_vectors, second.image_vectors)
    (folder / "run" / "images" / "00001.safetensors").write_bytes(b"cut off")
    third = encode(model, folder)
    assert (model.images, model.texts) == (2, 0)
    assert torch.equal(first.image_vectors, third.image_vectors)


def test_an_image_that_was_replaced_is_encoded_again(folder):
    encode(ColourModel(), folder)
    (folder / "pictures" / "red.png").write_bytes((folder / "pictures" / "black.png").read_bytes())
    model = ColourModel()
    corpus = encode(model, folder)
    assert model.images == 4  # the whole batch
    assert torch.equal(corpus.image_vectors[0], corpus.image_vectors[5])


def test_an_image_that_cannot_be_read_is_left_out_with_its_texts(folder):
    (folder / "pictures" / "lime.png").write_bytes(b"no image")
    corpus = encode(ColourModel(), folder)
    assert list(corpus.unreadable) == [1] and "lime.png" in corpus.unreadable[1]
    assert corpus.images == [0, 2, 3, 4, 5]
    assert len(corpus.image_vectors) == 5 and len(corpus.texts) == 10
    assert corpus.texts[2] == "all blue" and corpus.image_of_text[2] == 1


def test_images_of_which_none_can_be_read_are_refused(folder):
    for colour in COLOURS:
        (folder / "pictures" / f"{colour}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"No image can be read; the first of 6: .*red.png"):
        encode(ColourModel(), folder)


def test_similarity_is_that_of_the_nearest_query():
    images = torch.nn.functional.normalize(torch.randn(7, 3, 5), dim=-1)
    texts = torch.nn.functional.normalize(torch.randn(4, 5), dim=-1)
    expected = [[max(float(query @ text) for query in image) for text in texts] for image in images]
    torch.testing.assert_close(similarity_of(images, texts, torch.device("cpu")), torch.tensor(expected))


@pytest.mark.parametrize("pairs_per_block", [1, 7, 1000])
def test_each_pair_is_matched_once_with_its_own_image_and_text(folder, monkeypatch, pairs_per_block):
    monkeypatch.setattr("qformer_captioner.retrieval.matching.PAIRS_PER_BLOCK", pairs_per_block)
    model = ColourModel()
    corpus, images = encode(model, folder), evaluation_set(folder)
    wanted = torch.rand(6, 12, generator=torch.Generator().manual_seed(1)) < 0.4
    logits = match_pairs(model, corpus, wanted.nonzero(), images, folder / "pairs", batch_size=3)
    assert model.pairs == wanted.sum()
    everything = model.encode_images([images.open(image) for image in corpus.images])
    rows, columns = wanted.nonzero(as_tuple=True)
    expected = model.match(everything.features, None, rows, [corpus.texts[column] for column in columns])
    assert torch.equal(logits[wanted], expected)
    assert logits[~wanted].isnan().all()
    again = ColourModel()
    repeated = match_pairs(again, corpus, wanted.nonzero(), images, folder / "pairs", batch_size=3)
    assert again.pairs == 0 and torch.equal(repeated[wanted], expected)


def test_blocks_of_other_inputs_are_computed_again(tmp_path):
    folder = BlockFolder(tmp_path / "blocks")
    computed = []

    def compute(numbers):
        for number in numbers:
            computed.append(number)
            yield Block({"values": torch.tensor([number])}, number)

    for keys, expected in ((["a", "b", "c"], [0, 1, 2]), (["a", "x", "c"], [1]), (["a", "x", "c"], [])):
        computed.clear()
        blocks = list(compute_blocks(folder, keys, [1, 1, 1], compute, "blocks"))
        assert computed == expected
        assert [block.notes for block in blocks] == [int(block.tensors["values"]) for block in blocks] == [0, 1, 2]


def test_files_that_a_kill_left_unfinished_are_deleted(tmp_path):
    folder = BlockFolder(tmp_path / "blocks")
    (folder.folder / "00000.safetensors.1.tmp").write_bytes(b"half")
    list(compute_blocks(folder, ["a"], [1], lambda numbers: [Block({})], "blocks"))
    assert [path.name for path in folder.folder.iterdir()] == ["00000.safetensors"]
