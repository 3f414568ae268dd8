"""Tables of delimited text: every cell is text as written, and what cannot be read is refused by its line."""

import csv

import pytest

from qformer_captioner.common.errors import InputError
from qformer_captioner.data.loading import load_rows
from qformer_captioner.data.text_files import find_delimiter
from qformer_captioner.data.text_rows import read_columns

WRITTEN = [
    "007",
    "42",
    "3.50",
    "True",
    "False",
    "NA",
    "null",
    "None",
    "NaN",
    "1e5",
    "2020-01-01",
    "12:30",
    "0x1F",
]


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file of text or bytes, and returns its name."""

    def write(content: str | bytes, name: str = "rows.csv", encoding: str = "utf-8") -> str:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl"])
def test_text_that_looks_like_another_type_stays_as_written(write, name):
    if name == "rows.jsonl":
        content = "".join(f'{{"image": "a.jpg", "caption": "{text}"}}\n' for text in WRITTEN)
    else:
        separator = "\t" if name == "rows.tsv" else ","
        content = f"image{separator}caption\n" + "".join(f"a.jpg{separator}{text}\n" for text in WRITTEN)
    for streaming in (False, True):
        rows = load_rows(write(content, name), streaming=streaming)["train"]
        assert [row["caption"] for row in rows] == WRITTEN


@pytest.mark.parametrize("alone", ["007", "True", "2020-01-01"])
def test_a_column_of_one_kind_of_text_stays_text(write, alone):
    for name, content in (
        ("rows.csv", f"image,caption\na.jpg,{alone}\n"),
        ("rows.json", f'[{{"image": "a.jpg", "caption": "{alone}"}}]'),
    ):
        assert load_rows(write(content, name))["train"]["caption"] == [alone]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.txt", "ROWS.CSV"])
def test_the_delimiter_is_recognised_whatever_the_suffix(write, delimiter, name):
    content = f"image{delimiter}caption\na.jpg{delimiter}a red shape\n"
    assert read_columns(write(content, name)) == {"image": ["a.jpg"], "caption": ["a red shape"]}


def test_the_delimiter_of_a_line_with_several_is_the_one_that_gives_known_fields():
    assert find_delimiter("image;caption\n") == ";"
    assert find_delimiter("a.jpg,a red; green | shape\n") == ","
    assert find_delimiter("a dog, a cat; grass\thttp://host/1,2.jpg\n") == "\t"


def test_a_spreadsheet_may_declare_its_delimiter(write):
    assert read_columns(write("sep=;\nimage;caption\na.jpg;red, big\n"))["caption"] == ["red, big"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_unicode_encodings_are_recognised(write, encoding, name):
    content = "image,caption\na.jpg,a café\n" if name == "rows.csv" else '{"image": "a.jpg", "caption": "a café"}\n' * 2
    columns = read_columns(write(content, name, encoding))
    assert columns["caption"][0] == "a café" and list(columns) == ["image", "caption"]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_another_encoding_is_named_by_its_first_byte_and_line(write, encoding):
    name = write("image,caption\n" + "a.jpg,a cafe\n" * 9_000 + "b.jpg,a café\n", encoding=encoding)
    for streaming in (False, True):
        with pytest.raises(InputError, match=r"not UTF-8 text \(byte 0xe9 in line 9002\): save it as UTF-8"):
            list(load_rows(name, streaming=streaming)["train"])


def test_quotes_in_a_tsv_are_characters(write):
    content = 'image\tcaption\na.jpg\t"a red\nb.jpg\ta "blue" one\nc.jpg\t"stop"\n'
    assert read_columns(write(content, "rows.tsv"))["caption"] == ['"a red', 'a "blue" one', '"stop"']


def test_quotes_that_a_writer_of_csv_added_in_a_tsv_are_removed(write, tmp_path):
    with (tmp_path / "rows.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["image", "caption"], ["a.jpg", 'a "blue" one']])
    assert read_columns(str(tmp_path / "rows.tsv"))["caption"] == ['a "blue" one']


def test_quoted_fields_of_a_csv_hold_delimiters_quotes_and_line_ends(write):
    content = 'image,caption\r\na.jpg,"red, ""big""\nand round"\r\nb.jpg, "blue, small"\r\n\r\n'
    assert read_columns(write(content))["caption"] == ['red, "big"\nand round', "blue, small"]


def test_a_long_field_is_read(write):
    (cell,) = read_columns(write(f"image,caption\n{'A' * 300_000},red\n"))["image"]
    assert len(cell) == 300_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,caption\na.jpg,red\nb.jpg,red, on grass\n", "Line 3 .* has 3 fields, but the table has 2 columns"),
        ("\n\nimage,caption\n\nb.jpg,red, on grass\n", "Line 5 .* has 3 fields"),
        ('image,caption\na.jpg,"red\nb.jpg,a "blue" one\n', "The row in line 2 .* is not valid CSV"),
        ('image,caption\na.jpg,red\nb.jpg,"blue\n', "The row in line 3 .* is not valid CSV"),
        ("a.jpg,red,on grass\n", "first line .* holds a row instead of names of columns"),
    ],
)
def test_a_line_that_does_not_fit_is_named(write, content, message):
    for streaming in (False, True):
        with pytest.raises(InputError, match=message):
            list(load_rows(write(content), streaming=streaming)["train"])


def test_trailing_empty_fields_are_dropped_and_missing_ones_are_empty(write):
    content = "image,caption\na.jpg,red,,\nb.jpg\n"
    assert read_columns(write(content)) == {"image": ["a.jpg", "b.jpg"], "caption": ["red", None]}


def test_columns_without_a_name_or_with_a_repeated_name_are_kept(write):
    columns = read_columns(write(",image,caption,caption\n0,a.jpg,red,all red\n"))
    assert columns == {"column 1": ["0"], "image": ["a.jpg"], "caption": ["red"], "caption 2": ["all red"]}


def test_a_number_for_a_repeated_name_is_not_that_of_another_column(write):
    columns = read_columns(write("image,text,text,text 2\na.jpg,one,two,three\n"))
    assert list(columns.values()) == [["a.jpg"], ["one"], ["two"], ["three"]]


@pytest.mark.parametrize(
    ("name", "content", "images", "captions"),
    [
        ("Flickr8k.token.txt", "a.jpg#0\tA dog .\na.jpg#1\tA cat#2 .\n", ["a.jpg", "a.jpg"], ["A dog .", "A cat#2 ."]),
        ("results_20130124.token", "1.jpg#0\tTwo men , one tall .\n", ["1.jpg"], ["Two men , one tall ."]),
        ("captions.txt", 'image,caption\na.jpg,"A dog , a cat ."\n', ["a.jpg"], ["A dog , a cat ."]),
        ("cc3m.tsv", "a bus, red\thttp://host/1\n", ["http://host/1"], ["a bus, red"]),
        ("cc12m.tsv", "http://host/1\ta bus, red\n", ["http://host/1"], ["a bus, red"]),
        ("plain.csv", "a.jpg,007\n", ["a.jpg"], ["007"]),
    ],
)
def test_forms_without_a_header_are_recognised(write, name, content, images, captions):
    assert read_columns(write(content, name)) == {"image": images, "caption": captions}


def test_the_row_of_flickr30k_without_its_second_separator_is_repaired(write):
    content = 'image_name| comment_number| comment\n1.jpg| 3| A "man" .\n1.jpg| 4   A dog runs .\n2.jpg| 0| 4 cats .\n'
    columns = read_columns(write(content))
    assert columns["comment"] == ['A "man" .', "A dog runs .", "4 cats ."]
    assert columns["comment_number"] == ["3", "4", "0"]


def test_several_files_and_their_streams_give_the_same_rows(write, tmp_path):
    for number in range(3):
        write(f"image,caption\n{number}.jpg,{number}\n", f"{number}.csv")
    rows, stream = (load_rows(str(tmp_path / "*.csv"), streaming=streaming)["train"] for streaming in (False, True))
    assert list(rows) == list(stream) == [{"image": f"{number}.jpg", "caption": str(number)} for number in range(3)]
    assert stream.num_shards == 3
