"""Files that survive a kill."""

import pytest

from qformer_captioner.common.errors import one_line
from qformer_captioner.common.files import read_json_lines, write_atomically


def test_an_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    for text in ("old", "naïve"):
        write_atomically(tmp_path / "record.json", text)
    assert (tmp_path / "record.json").read_text(encoding="utf-8") == "naïve"
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_an_atomic_write_that_fails_keeps_the_old_file(tmp_path):
    write_atomically(tmp_path / "record.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "record.json", "\ud800")  # a lone surrogate has no UTF-8 encoding
    assert (tmp_path / "record.json").read_text() == "old"


def test_lines_that_are_cut_off_are_skipped(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"row": 1}\n\n{"row": 2, "rea\n[' + b"[" * 100_000 + b'\n\x80\n{"row": 3}')
    assert [row["row"] for row in read_json_lines(tmp_path / "rows.jsonl")] == [1, 3]


def test_an_error_is_one_line_of_limited_length():
    assert one_line(ValueError("one\n two\tthree"), max_length=7) == "one ..."
