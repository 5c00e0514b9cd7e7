"""Rows of CSV and TSV files by number."""

import pytest

from owlfuse.core.errors import DataError
from owlfuse.data.readers.text_table import TextTable

LINE_ENDS = "one\u2028two\x0bthree\x85four"
"""Characters inside a field at which Python ends lines, and a table none."""


@pytest.mark.parametrize(("delimiter", "quoted"), [(",", True), ("\t", True), ("\t", False)])
def test_a_row_ends_at_a_line_feed_alone(tmp_path, delimiter, quoted):
    file = tmp_path / "table"
    rows = [("image", "caption"), ("a.png", LINE_ENDS), ("b.png", "five")]
    file.write_text("".join(delimiter.join(row) + "\n" for row in rows), encoding="utf-8")
    table = TextTable(file, delimiter, quoted)
    assert [row["caption"] for row in table] == [LINE_ENDS, "five"]


def test_a_quoted_field_may_hold_delimiters_and_line_feeds_and_a_row_of_another_width_is_told(
    tmp_path,
):
    file = tmp_path / "table.csv"
    file.write_text('image,caption\na.png,"two\nlines, ""quoted"""\nb.png\n', encoding="utf-8")
    table = TextTable(file)
    assert table[0] == {"image": "a.png", "caption": 'two\nlines, "quoted"'}
    with pytest.raises(DataError, match=r"line 4, which begins 'b.png', has 1 fields, the .* 2"):
        table[1]


def test_a_quoted_field_may_be_a_picture_in_base64(tmp_path):
    file = tmp_path / "table.csv"
    picture = "data:image/png;base64," + "A" * 200_000
    file.write_text(f'image,caption\n"{picture}",red\n', encoding="utf-8")
    assert TextTable(file)[0] == {"image": picture, "caption": "red"}


@pytest.mark.parametrize(("delimiter", "quoted"), [(",", True), ("\t", False)])
def test_a_header_with_a_column_twice_is_refused(tmp_path, delimiter, quoted):
    file = tmp_path / "table"
    file.write_text(delimiter.join(["image", "caption", "caption"]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="table has 2 columns 'caption', expected one of each"):
        TextTable(file, delimiter, quoted)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (
            ['a.jpg\t"line1', 'line2"'],
            "line 2 ends in an open double quote, and the next line has 1",
        ),
        (['a.jpg\t5" wide', "b.jpg\tx"], None),
        (['a.jpg\t"open', "b.jpg\tx"], None),
        (["a.jpg\tx", 'b.jpg\t"open'], None),
    ],
)
def test_a_line_break_inside_of_a_quoted_tsv_field_is_told(tmp_path, lines, told):
    (tmp_path / "a.tsv").write_text("\n".join(["image\tcaption", *lines]) + "\n")
    table = TextTable(tmp_path / "a.tsv", "\t", quoted=False)
    if told:
        with pytest.raises(DataError, match=told):
            table[0]
    else:
        assert [len(table[number]) for number in range(len(table))] == [2] * len(table)
