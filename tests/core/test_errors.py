"""Messages of errors."""

from owlfuse.core.errors import error_summary, first_line


def test_an_error_without_a_message_is_named_by_its_class():
    assert first_line(AssertionError()) == "AssertionError"
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert error_summary(KeyError("a")) == "KeyError: 'a'"
