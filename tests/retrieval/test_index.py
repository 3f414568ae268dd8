"""The index of a folder holds its images as they are now, and computes only what it lacks."""

import shutil

import pytest
import torch

from qformer_captioner.common.errors import InputError
from qformer_captioner.retrieval.index import ImageIndex
from qformer_captioner.retrieval.report import write_search_page

from ..fixtures.captioned_files import COLOURS, write_pictures
from .stub import ColourModel

WEIGHTS = {"outputs/stage1": "commit"}


@pytest.fixture
def photos(tmp_path):
    """Return a folder of pictures, some of them in a subfolder."""
    pictures = write_pictures(tmp_path) / "pictures"
    (pictures / "more").mkdir()
    (pictures / "red.png").rename(pictures / "more" / "red.png")
    return pictures


@pytest.fixture
def index(photos, tmp_path):
    """Return a function that opens the index with a new model, and brings it up to date."""

    def build(weights=WEIGHTS, batch_size=2):
        index = ImageIndex(photos, ColourModel(), weights, tmp_path / "index")
        index.refresh(batch_size)
        return index

    return build


def test_the_image_that_a_text_describes_is_first(index):
    assert [index().search([f"all {colour}"], 1)[0][0].path for colour in ("lime", "red")] == [
        "lime.png",
        "more/red.png",
    ]


def test_matching_ranks_again_and_gives_probabilities(index):
    ((first, *others),) = index().search(["all blue"], top_k=3, rerank_top_k=4)
    assert first.path == "blue.png" and len(others) == 2
    assert 1 > first.score > others[0].score > 0
    assert first.score == pytest.approx(torch.tensor([0.0, 1.0]).softmax(dim=0)[1].item())


def test_a_second_search_encodes_nothing(index):
    first, second = index(), index()
    assert (first.model.images, second.model.images) == (6, 0)
    assert first.search(["all red"]) == second.search(["all red"])


def test_only_new_and_changed_files_are_encoded(index, photos):
    index()
    shutil.copy(photos / "lime.png", photos / "new.png")
    shutil.copy(photos / "black.png", photos / "blue.png")
    (photos / "yellow.png").unlink()
    changed = index()
    assert changed.model.images == 2
    kept = [f"{colour}.png" for colour in COLOURS if colour not in ("red", "yellow")]
    assert changed.paths == sorted([*kept, "more/red.png", "new.png"])
    assert {found.path for found in changed.search(["all black"], 2)[0]} == {"black.png", "blue.png"}


def test_batches_of_files_that_are_gone_are_deleted(index, photos, tmp_path):
    index()
    for path in ("black.png", "blue.png"):  # the first batch
        (photos / path).unlink()
    index()
    assert sorted(path.name for path in (tmp_path / "index").glob("*.safetensors")) == [
        "00001.safetensors",
        "00002.safetensors",
    ]


def test_a_damaged_batch_and_an_unfinished_file_are_replaced(index, tmp_path):
    expected = index().search(["all red"])
    (tmp_path / "index" / "00001.safetensors").write_bytes(b"cut off")
    (tmp_path / "index" / "00007.safetensors.1.tmp").write_bytes(b"half")
    repaired = index()
    assert repaired.model.images == 2
    assert repaired.search(["all red"]) == expected
    assert not list((tmp_path / "index").glob("*.tmp"))


def test_other_weights_encode_all_images_again(index, tmp_path):
    index()
    assert index({"outputs/stage1": "another commit"}).model.images == 6
    assert len(list((tmp_path / "index").glob("*.safetensors"))) == 3


def test_broken_images_are_named_and_not_tried_again(index, photos):
    (photos / "lime.png").write_bytes(b"no image")
    for broken in (index(), index()):
        assert list(broken.unreadable) == ["lime.png"] and "lime.png" in broken.unreadable["lime.png"]
        assert "lime.png" not in broken.paths
    assert broken.model.images == 0


def test_input_that_is_not_valid_is_refused_in_one_sentence(index, photos, tmp_path):
    with pytest.raises(InputError, match="There is no folder 'nowhere'"):
        ImageIndex("nowhere", ColourModel(), WEIGHTS)
    with pytest.raises(InputError, match=r"not empty and holds no index: name another --index\.$"):
        ImageIndex(photos, ColourModel(), WEIGHTS, photos)
    with pytest.raises(InputError, match=r"has 10 tokens, and the model reads at most 8: shorten it\.$"):
        index().search(["a red wall that is much too long"])
    with pytest.raises(InputError, match="A text is empty"):
        index().search([" "])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="There are no images in"):
        ImageIndex(tmp_path / "empty", ColourModel(), WEIGHTS, tmp_path / "other").refresh()
    (tmp_path / "empty" / "a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="None of the 1 images can be read; the first is 'a.png'"):
        ImageIndex(tmp_path / "empty", ColourModel(), WEIGHTS, tmp_path / "other").refresh()


def test_the_page_shows_each_image_and_escapes_texts(index, tmp_path):
    built = index()
    found = {"<b>all red</b>": built.search(["all red"], 2)[0]}
    write_search_page(tmp_path / "page.html", found, built.open, {"model": "outputs/stage1"})
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2
    assert "more/red.png" in page and "&lt;b&gt;all red" in page and "<b>all red" not in page
