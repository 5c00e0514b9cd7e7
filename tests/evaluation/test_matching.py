"""An answer is right that holds an accepted one as whole words and whole numbers."""

import pytest

from owlfuse.evaluation.matching import holds_answer


@pytest.mark.parametrize(
    ("text", "accepted", "right"),
    [
        ("The capital of France is Paris.", "Paris", True),
        ("It is PARIS", "paris", True),
        ("Parisian", "Paris", False),
        ("New   York City", "new york", True),
        ("", "2", False),
        ("", "", True),
        ("cat", "", False),
        ("a+b is c++", "c++", True),
        ("axb", "a.b", False),
        ("snake_case", "case", False),
        ("aaab aab", "aab", True),
        # numbers
        ("There are 12.", "2", False),
        ("There are 12.", "12", True),
        ("12, I think", "12", True),
        ("The share is 0.5", "5", False),
        ("The share is 0.5", "0", False),
        ("The share is 0.5", "0.5", True),
        ("0.5 or 5", "5", True),
        ("1,500 people", "500", False),
        ("1,500 people", "1,500", True),
        ("12.5%", "12", False),
        ("12.5%", "12.5", True),
        ("12.5%", "12.5%", True),
        ("it is -5", "5", False),
        ("it is -5", "-5", True),
        ("pages 5-6", "6", True),
        ("costs .5", "5", False),
        ("$5", "5", True),
        # scripts without spaces, and vowel signs
        ("这是一只猫。", "猫", True),
        ("这是一只猫。", "狗", False),
        ("3只猫", "3", True),
        ("13只猫", "3", False),
        ("これは猫です", "猫", True),
        ("นี่คือแมว", "แมว", True),
        ("यह काला है", "काल", False),
        ("यह काला है", "काला", True),
        ("cafe\u0301", "cafe", False),
        # decomposed letters, which many tokenizers compose
        ("caf\u00e9", "cafe\u0301", True),
        ("cafe\u0301", "caf\u00e9", True),
        ("это кот", "кот", True),
        ("это котик", "кот", False),
    ],
)
def test_accepted_answers_are_found_as_wholes(text, accepted, right):
    assert holds_answer(text, [accepted]) is right


def test_any_of_several_will_do():
    assert holds_answer("12 or twelve", ["2", "twelve"])
    assert not holds_answer("12 or twelve", ["2", "eleven"])
