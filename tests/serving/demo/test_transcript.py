"""What visitors and models say is text, whatever is in it."""

from html.parser import HTMLParser

from owlfuse.serving.demo import transcript
from owlfuse.serving.demo.pictures import Look
from owlfuse.serving.demo.talkers import Talker
from owlfuse.serving.demo.visitors import ANSWERING, DONE, WAITING, Answer, Turn, Visitor

EVIL = (
    "<img src=x onerror=alert(1)> </p><script>alert(2)</script> '\" onload='x' **bold** ${7*7} "
    "&amp;"
)


class Seen(HTMLParser):
    """Tags, attributes and text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attributes]

    def handle_data(self, data):
        self.text += data


def visitor_with(monkeypatch, *turns):
    monkeypatch.setattr("owlfuse.serving.demo.visitors.Conversation", lambda model, processor: None)
    visitor = Visitor([Talker(EVIL, [EVIL], None, None), Talker("b", [], None, None)])
    visitor.turns = list(turns)
    return visitor


def test_nothing_that_was_said_becomes_a_tag_or_an_attribute(monkeypatch):
    answer = Answer(
        DONE,
        EVIL,
        EVIL,
        [Look("data:image/png;base64,AA", 0.5), Look("data:image/png;base64,AA", 0.5)],
    )
    visitor = visitor_with(
        monkeypatch, Turn(EVIL, [], ["data:image/png;base64,AA"], [answer, Answer(DONE)])
    )
    pages = [
        transcript.history(visitor),
        transcript.heads(visitor.talkers),
        transcript.notice(EVIL),
    ]
    seen = Seen("".join(pages))
    assert set(seen.tags) <= {
        "div",
        "p",
        "span",
        "h2",
        "h3",
        "img",
        "section",
        "figure",
        "figcaption",
    }
    assert set(seen.attributes) <= {
        "class",
        "style",
        "role",
        "aria-label",
        "aria-busy",
        "src",
        "alt",
    }
    assert seen.tags.count("img") == 3
    assert seen.text.count(EVIL) == 7  # question, name twice, fact, answer, note, notice


def test_a_turn_is_history_when_it_is_over_and_its_question_before(monkeypatch):
    turn = Turn("Hello", [], [], [Answer(ANSWERING, "so f"), Answer(WAITING)])
    visitor = visitor_with(monkeypatch, turn)
    assert "Hello" in transcript.history(visitor)
    assert "so f" not in transcript.history(visitor)
    assert "so f" in transcript.current(visitor)
    assert "waiting for its turn" in transcript.current(visitor)
    turn.end("stopped")
    assert "so f" in transcript.history(visitor)
    assert transcript.current(visitor) == ""


def test_every_picture_says_what_it_is(monkeypatch):
    answer = Answer(DONE, "red", "", [Look("data:,", 1.0)])
    html = transcript.history(
        visitor_with(monkeypatch, Turn("Hello", [], ["data:,", "data:,"], [answer, Answer(DONE)]))
    )
    assert "alt='picture 2 of 2 shown with this question'" in html
    assert "looked in picture 1, lighter for more'" in html
