"""Outputs of the command: what they write, what training and evaluation read of it, and how they continue."""

import io
import json
import os

import pytest
from PIL import Image

from qformer_captioner.captioning.items import Item
from qformer_captioner.captioning.outputs import OUTPUTS, OutputRow, output_for
from qformer_captioner.captioning.progress import Progress
from qformer_captioner.captioning.rows import CaptionedRow
from qformer_captioner.captioning.run import Wanted
from qformer_captioner.captioning.sidecars import Sidecars
from qformer_captioner.captioning.writer import Writer
from qformer_captioner.common.errors import InputError
from qformer_captioner.data.loading import load_rows

from .test_sources import jpeg

SETTINGS = {"model": "m", "prompt": None}


def output_row(number: int, folder=None, captions=("a dog",), scores=()) -> OutputRow:
    """Return a captioned image."""
    path = None if folder is None else str(folder / f"{number}.jpg")
    item = Item(f"{number}.jpg", f"{number}.jpg", None, path)
    return OutputRow(item, CaptionedRow([f"{text} {number}" for text in captions], list(scores)), jpeg(number))


def write(path, batches, several=False, scores=(), settings=SETTINGS, finish=True):
    """Write batches to an output as a run does."""
    writer = Writer([output_for(str(path), several, scores)], Progress(f"{path}.progress", str(path)))
    try:
        writer.begin(settings, False)
        for batch in batches:
            writer.write(batch)
        if finish:
            writer.finish()
    finally:
        writer.close()


@pytest.mark.parametrize("ending", OUTPUTS)
def test_training_reads_the_captions(tmp_path, ending):
    path = tmp_path / f"captions{ending}"
    write(path, [[output_row(0), output_row(1)], [output_row(2)]])
    if ending == ".json":
        assert [row["caption"] for row in json.loads(path.read_text())] == ["a dog 0", "a dog 1", "a dog 2"]
        return
    (rows,) = load_rows(str(path)).values()
    captions = [text if isinstance(text, str) else text[0] for text in rows["caption"]]
    assert captions == ["a dog 0", "a dog 1", "a dog 2"]
    if ending == ".tar":
        assert [image.size for image in rows["jpg"]] == [Image.open(io.BytesIO(jpeg())).size] * 3


def test_training_reads_the_metadata_of_a_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for number in range(2):
        (tmp_path / "sub" / f"{number}.jpg").write_bytes(jpeg(number))
    write(tmp_path / "metadata.jsonl", [[output_row(number, tmp_path / "sub") for number in range(2)]])
    (rows,) = load_rows(str(tmp_path)).values()
    assert rows["image"] == [str(tmp_path / "sub" / f"{number}.jpg") for number in range(2)]
    assert rows["caption"] == ["a dog 0", "a dog 1"]


@pytest.mark.parametrize("ending", OUTPUTS)
def test_what_a_kill_left_behind_is_undone(tmp_path, ending):
    batches = [[output_row(0), output_row(1)], [output_row(2)], [output_row(3)]]
    write(tmp_path / f"unbroken{ending}", batches)
    path = tmp_path / f"broken{ending}"
    write(path, batches[:2], finish=False)
    torn = path if path.exists() else tmp_path / f"broken{ending}.rows"
    with torn.open("ab") as file:
        file.write(b'{"image_id": "3.jpg", "cap')
    with (tmp_path / f"broken{ending}.progress").open("ab") as file:
        file.write(b'{"done": "AAA')
    write(path, batches[2:])
    assert path.read_bytes() == (tmp_path / f"unbroken{ending}").read_bytes()


def test_several_captions_and_scores_have_columns(tmp_path):
    row = output_row(0, captions=("a dog", "a cat, black"), scores=(-0.5, -1.0))
    write(tmp_path / "a.jsonl", [[row]], several=True)
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {
        "image_id": "0.jpg",
        "caption": ["a dog 0", "a cat, black 0"],
        "score": [-0.5, -1.0],
    }
    write(tmp_path / "a.csv", [[row]], several=True, scores=("score",))
    assert (tmp_path / "a.csv").read_text() == (
        'image_id,caption,score\n0.jpg,a dog 0,-0.5\n0.jpg,"a cat, black 0",-1.0\n'
    )
    with pytest.raises(InputError, match="one caption for each image: use .jsonl"):
        output_for("a.json", several=True)


def test_a_run_with_other_settings_is_refused(tmp_path):
    write(tmp_path / "a.jsonl", [[output_row(0)]])
    with pytest.raises(InputError, match="other options: prompt .prompt was None, now 'a star'.*--overwrite_output"):
        write(tmp_path / "a.jsonl", [[output_row(1)]], settings={**SETTINGS, "prompt": "a star"})


def test_an_output_that_lost_its_end_is_refused(tmp_path):
    write(tmp_path / "a.jsonl", [[output_row(0)]], finish=False)
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(InputError, match="shorter than the run left it"):
        write(tmp_path / "a.jsonl", [])


def test_two_runs_cannot_write_one_output(tmp_path):
    progress = Progress(tmp_path / "a.progress", "a.jsonl")
    with pytest.raises(InputError, match="Another process writes the output 'a.jsonl'"):
        Progress(tmp_path / "a.progress", "a.jsonl")
    progress.close()
    Progress(tmp_path / "a.progress", "a.jsonl").close()


def test_a_file_that_is_not_a_record_is_refused(tmp_path):
    (tmp_path / "a.progress").write_text("notes\n")
    with pytest.raises(InputError, match="is not the record of a run"):
        Progress(tmp_path / "a.progress", "a.jsonl")
    assert (tmp_path / "a.progress").read_text() == "notes\n"


@pytest.mark.parametrize(
    ("existing", "text"),
    [
        ("overwrite", "un café 0\n"),
        ("append", "ein Hund, un café 0\n"),
        ("prepend", "un café 0, ein Hund\n"),
    ],
)
def test_existing_texts_are_replaced_or_kept(tmp_path, existing, text):
    (tmp_path / "0.txt").write_text("ein Hund\n", encoding="utf-8")
    sidecars = Sidecars(".txt", existing, separator=", ")
    row = output_row(0, tmp_path, captions=("un café",))
    row.item = sidecars.named(row.item)
    assert not sidecars.is_captioned(row.item)
    record = json.loads(json.dumps(sidecars.prepare([row])))
    sidecars.apply(record)
    sidecars.apply(record)  # again after a kill
    assert (tmp_path / "0.txt").read_text(encoding="utf-8") == text


def test_a_text_that_is_not_utf_8_keeps_its_bytes(tmp_path):
    (tmp_path / "0.txt").write_bytes(b"caf\xe9\n")
    sidecars = Sidecars(".txt", "append")
    row = output_row(0, tmp_path)
    row.item = sidecars.named(row.item)
    sidecars.apply(sidecars.prepare([row]))
    assert (tmp_path / "0.txt").read_bytes() == b"caf\xe9 a dog 0\n"


def test_images_of_the_same_name_have_texts_of_their_own(tmp_path):
    sidecars = Sidecars(".txt")
    items = [Item(name, name, None, str(tmp_path / name)) for name in ("a.jpg", "a.png")]
    assert [sidecars.named(item).sidecar for item in items] == [str(tmp_path / "a.txt"), str(tmp_path / "a.png.txt")]
    with pytest.raises(InputError, match="'https://example.org/a.jpg' is not one"):
        sidecars.named(Item("https://example.org/a.jpg", "a", None))


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tar", ".json", ".parquet"])
def test_an_output_that_was_edited_is_refused(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    write(path, [[output_row(0)]])
    write(path, [[output_row(1)]])  # as the run left it
    edited = path.read_bytes() + b" "
    path.write_bytes(edited)
    for _ in range(2):
        with pytest.raises(InputError, match="was changed after the run: .*--overwrite_output"):
            write(path, [[output_row(2)]])
        assert path.read_bytes() == edited


def texts_writer(folder) -> Writer:
    """Return a writer of texts beside images."""
    return Writer([Sidecars(".txt", "overwrite")], Progress(folder / ".captions.txt.progress", None))


def named_row(number: int, folder) -> OutputRow:
    """Return a captioned image whose text has a name."""
    row = output_row(number, folder)
    row.item = Sidecars(".txt").named(row.item)
    return row


def test_a_killed_run_of_texts_keeps_edits_and_repeats_deleted_texts(tmp_path):
    rows = [named_row(number, tmp_path) for number in range(4)]
    writer = texts_writer(tmp_path)
    writer.begin(SETTINGS, False)
    writer.write(rows[:3])
    writer.close()
    (tmp_path / "0.txt").write_text("edited")
    (tmp_path / "0.txt.tmp").write_text("left by the kill")
    os.remove(tmp_path / "1.txt")
    writer = texts_writer(tmp_path)
    writer.begin(SETTINGS, False)  # the kill may have come before the text was written
    assert (tmp_path / "1.txt").read_text() == "a dog 1\n"
    os.remove(tmp_path / "1.txt")
    assert [item.key for item in Wanted(iter([row.item for row in rows]), writer)] == ["1.jpg", "3.jpg"]
    assert (tmp_path / "0.txt").read_text() == "edited" and not (tmp_path / "0.txt.tmp").exists()
    writer.close()


def test_the_record_of_texts_ends_with_the_run_also_after_failures(tmp_path):
    writer = texts_writer(tmp_path)
    writer.begin(SETTINGS, False)
    failed = named_row(1, tmp_path)
    failed.row = CaptionedRow(error="broken")
    writer.write([named_row(0, tmp_path), failed])
    writer.finish()
    writer.close()
    assert os.listdir(tmp_path) == ["0.txt"]


def test_the_remedies_for_texts_do_not_name_an_output(tmp_path):
    writer = texts_writer(tmp_path)
    writer.begin(SETTINGS, False)
    with pytest.raises(InputError, match="Another process writes the texts in .*: wait for its end"):
        texts_writer(tmp_path)
    writer.close()
    with pytest.raises(InputError, match=r"give the same ones to continue it, or delete '.*progress'"):
        texts_writer(tmp_path).begin({**SETTINGS, "prompt": "a star"}, False)
