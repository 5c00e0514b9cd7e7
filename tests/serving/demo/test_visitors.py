"""One question to every model: answers, stopping, beginning anew, waiting, and failures of one
model."""

import threading
from itertools import pairwise

import pytest
from PIL import Image

from owlfuse.core.errors import DataError
from owlfuse.serving.chat import Conversation
from owlfuse.serving.demo import limits, visitors
from owlfuse.serving.demo.pictures import data_uri, fitted
from owlfuse.serving.demo.visitors import Visitor, Visitors, generate_options


@pytest.fixture
def models(loaded):
    """Both models."""
    return loaded[0]


def ask(visitor, text, *paths, tokens=8, look=False):
    """The turn, when it is answered."""
    visitor.begin(text, [str(path) for path in paths], 0)
    for _ in visitor.answers(0.0, tokens, look):
        pass
    return visitor.turns[-1]


def test_every_model_answers_as_it_does_alone_and_remembers(models, exported):
    visitor = Visitor(models)
    turns = [
        ask(visitor, "What is it?", exported / "red.png"),
        ask(visitor, "And now?", exported / "blue.png"),
    ]
    for number, model in enumerate(models):
        alone = Conversation(model.model, model.processor, max_new_tokens=8, do_sample=False)
        for turn, color in zip(turns, ("red", "blue")):
            alone.show(str(exported / f"{color}.png"))
            assert turn.answers[number].text == alone.ask(turn.question, lambda text: None)
            assert turn.answers[number].note.startswith("8 tokens in ")
            assert "tokens/s" in turn.answers[number].note
    assert visitor.conversations[0].messages[-1]["content"][0]["text"] == turns[1].answers[0].text


def test_an_answer_comes_in_pieces_one_model_after_the_other(models):
    visitor = Visitor(models)
    visitor.begin("Hello", [], 0)
    seen = [[], []]
    order = []
    for number in visitor.answers(0.0, 60, False):
        order.append(number)
        seen[number].append(visitor.turns[0].answers[number].text)
    assert order == sorted(order)
    for texts in seen:
        assert len(set(texts)) >= 3
        assert all(after.startswith(before) for before, after in pairwise(texts))


def test_stop_keeps_what_was_said_and_the_next_question_is_answered(models):
    visitor = Visitor(models)
    visitor.begin("Hello", [], 0)
    for _ in visitor.answers(0.0, 350, False):
        if visitor.turns[0].answers[0].text:
            visitor.halt()
    first, second = visitor.turns[0].answers
    assert first.text
    assert first.note.endswith("stopped")
    assert int(first.note.split()[0]) < 340
    assert (second.text, second.note) == (
        "",
        "stopped before its turn came; the model has not read the question",
    )
    assert visitor.conversations[0].messages[-1]["content"][0]["text"] == first.text
    assert visitor.conversations[1].messages == []
    assert all(answer.text for answer in ask(visitor, "And now?").answers)
    assert "answer" not in [thread.name for thread in threading.enumerate()]


def test_a_question_that_is_stopped_while_it_waits_is_not_answered_later(models):
    visitor = Visitor(models)
    visitor.begin("Hello", [], 0)
    visitor.halt()
    assert list(visitor.answers(0.0, 8, False)) == []
    assert not visitor.pending
    assert [answer.text for answer in visitor.turns[0].answers] == ["", ""]


def test_a_new_conversation_ends_the_answer_and_forgets(models, exported):
    visitor = Visitor(models)
    ask(visitor, "What is it?", exported / "red.png")
    visitor.begin("Hello", [], 0)
    running = visitor.answers(0.0, 350, False)
    next(running)
    next(running)
    visitor.restart()
    for _ in running:
        pass
    assert visitor.turns == []
    fresh = Visitor(models)
    assert [a.text for a in ask(visitor, "Hello").answers] == [
        a.text for a in ask(fresh, "Hello").answers
    ]


def test_where_it_looked_is_drawn_for_every_picture_of_the_conversation(models, exported):
    visitor = Visitor(models)
    turn = ask(visitor, "What is it?", exported / "red.png", look=True)
    turn = ask(visitor, "And this?", exported / "blue.png", look=True)
    for answer in turn.answers:
        assert len(answer.attention) == 2
        assert sum(look.share for look in answer.attention) == pytest.approx(1, abs=1e-4)
        assert all(look.uri.startswith("data:image/") for look in answer.attention)
    assert all(
        answer.attention == []
        for answer in ask(Visitor(models), "What?", exported / "red.png").answers
    )


def test_a_conversation_too_long_for_a_model_is_told_and_the_others_go_on(models):
    visitor = Visitor(models)
    visitor.conversations[0].max_positions = 12
    turn = ask(visitor, "What is in the picture that was shown before?")
    assert turn.answers[0].text == ""
    assert "tokens and the model knows 12; begin a new one" in turn.answers[0].note
    assert turn.answers[1].text
    visitor.conversations[1].max_positions = 60
    assert "the model's longest text is reached" in ask(visitor, "Hi", tokens=100).answers[1].note


def test_a_fault_of_one_model_is_told_without_a_stack_and_the_others_go_on(
    models, monkeypatch, capsys
):
    visitor = Visitor(models)

    def fails(*args, **kwargs):
        raise RuntimeError("CUDA out of memory\nand a long tale")

    monkeypatch.setattr(visitor.conversations[0], "ask", fails)
    turn = ask(visitor, "Hello")
    assert (
        turn.answers[0].note
        == "the model failed, RuntimeError: CUDA out of memory; the terminal tells more"
    )
    assert turn.answers[1].text
    assert "Traceback" in capsys.readouterr().err


def test_a_refused_question_changes_nothing(models, exported):
    visitor = Visitor(models)
    for text, paths, waiting, why in [
        ("", [], 0, "there is no question yet"),
        ("a <image>", [], 0, "stands for a picture"),
        ("Hello", [], limits.MAX_WAITING, "8 questions of others are waiting already"),
        (
            "Hello",
            [str(exported / "concat" / "out" / "config.json")],
            0,
            r"config\.json cannot be read",
        ),
    ]:
        with pytest.raises(DataError, match=why):
            visitor.begin(text, paths, waiting)
    assert visitor.turns == []
    visitor.begin("Hello", [], 0)
    with pytest.raises(DataError, match="still being answered; wait for it, or press Stop"):
        visitor.begin("Hello?", [], 0)


def test_settings_beyond_the_sliders_are_brought_inside():
    assert generate_options(0, 10**9) == {
        "max_new_tokens": limits.MAX_NEW_TOKENS,
        "do_sample": False,
    }
    assert generate_options(99, -5) == {"max_new_tokens": 1, "do_sample": True, "temperature": 2.0}


def test_visitors_do_not_hear_each_other_and_are_forgotten_when_they_leave(models, monkeypatch):
    here = Visitors(models)
    one = here.begin("one", "Hello", [])
    assert here.of("two").turns == []
    assert here.of("one") is one
    monkeypatch.setattr(limits, "MAX_WAITING", 1)
    running = here.answers("one", 0.0, 8, False)
    next(running)
    with pytest.raises(DataError, match="waiting already"):
        here.begin("two", "Hello", [])
    here.leave("one")
    assert one.turns[0].stop.is_set()
    assert here.of("one") is not one
    here.begin("two", "Hello", [])


def test_beyond_the_limit_the_visitor_who_was_silent_longest_is_forgotten_and_no_one_who_waits(
    models, monkeypatch
):
    monkeypatch.setattr(limits, "MAX_VISITORS", 3)
    ticks = iter(range(1000))
    monkeypatch.setattr(visitors.time, "monotonic", lambda: next(ticks))
    here = Visitors(models)
    waits = here.begin("waits", "Hello", [])
    for key in ("a", "b", "c"):
        here.of(key)
    assert set(here.by_key) == {"waits", "b", "c"}
    assert here.of("waits") is waits


def test_pictures_in_the_page_are_small_and_their_pixels_stay_seen():
    assert fitted(Image.new("RGB", (4000, 10))).size == (320, 1)
    assert fitted(Image.new("RGB", (64, 32))).size == (128, 64)
    assert fitted(Image.new("RGB", (200, 300))).size == (200, 300)
    assert len(data_uri(fitted(Image.effect_noise((3000, 2000), 90).convert("RGB")))) < 120_000


def test_questions_whose_answers_nobody_asks_for_keep_nobody_waiting(models):
    """A program may send questions without ever asking for their answers, as no page does."""
    here = Visitors(models)
    for number in range(3 * limits.MAX_WAITING):
        here.begin(f"silent {number}", "Hello", [])
    visitor = here.begin("honest", "Hello", [])
    for _ in here.answers("honest", 0.0, 4, False):
        pass
    assert [answer.text != "" for answer in visitor.turns[0].answers] == [True, True]


def test_a_question_whose_answers_nobody_asks_for_is_over_after_a_while(models, monkeypatch):
    here = Visitors(models)
    silent = here.begin("silent", "Hello", [])
    with pytest.raises(DataError, match="still being answered"):
        here.begin("silent", "Hello again", [])
    monkeypatch.setattr(limits, "UNASKED_SECONDS", 0.0)
    monkeypatch.setattr(limits, "MAX_VISITORS", 1)
    here.begin("silent", "Hello again", [])
    assert [turn.done for turn in silent.turns] == [True, False]
    here.of("next")
    assert set(here.by_key) == {"next"}


def test_more_questions_than_may_wait_are_told_so(models, monkeypatch):
    monkeypatch.setattr(limits, "MAX_WAITING", 2)
    here = Visitors(models)
    for key in ("one", "two", "three"):
        here.begin(key, "Hello", [])
    running = [here.answers(key, 0.0, 4, False) for key in ("one", "two")]
    for each in running:
        next(each)
    assert list(here.answers("three", 0.0, 4, False)) == []
    assert "2 questions of others are waiting already" in here.of("three").turns[0].answers[0].note
    for each in running:
        each.close()
    assert here.waiting() == 0


def test_a_page_that_is_gone_gives_its_place_to_the_next(models):
    here = Visitors(models)
    for key in ("gone", "left", "waits"):
        here.begin(key, "Hello", [])
    gone, left, waits = (here.answers(key, 0.0, 4, False) for key in ("gone", "left", "waits"))
    next(gone)
    next(left)
    next(waits)
    gone.close()  # the connection was closed, and with it the generator
    here.leave("left")  # the page was closed, and nobody reads its generator any more
    for _ in waits:
        pass
    assert all(answer.text for answer in here.of("waits").turns[0].answers)


def test_an_answer_that_takes_too_long_ends_and_says_so(models, monkeypatch):
    monkeypatch.setattr(limits, "ANSWER_SECONDS", 0.0)
    turn = ask(Visitor(models), "Hello", tokens=50)
    for answer in turn.answers:
        assert answer.note.endswith("0 s are over, the most for one answer")
        assert int(answer.note.split()[0]) < 50
