"""Each benchmark's rule against worked examples, whose sources are named, and against slow
references."""

import itertools
import math
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torchmetrics.functional.text import bleu_score, perplexity

from owlfuse.evaluation.benchmarks.captions import caption_metrics, tokenized, words
from owlfuse.evaluation.benchmarks.docvqa import anls
from owlfuse.evaluation.benchmarks.gqa import GQA
from owlfuse.evaluation.benchmarks.mmbench import MMBench, letter_among
from owlfuse.evaluation.benchmarks.perplexity import Perplexity
from owlfuse.evaluation.benchmarks.pope import POPE, says_yes, yes_no_metrics
from owlfuse.evaluation.benchmarks.scienceqa import ScienceQA, letter_of
from owlfuse.evaluation.benchmarks.vqa import (
    CONTRACTIONS,
    agreement,
    normalized,
    textvqa_accuracy,
    textvqa_normalized,
    vqa_accuracy,
)

NORMALIZED = {
    "n/a": "n",
    "no one": "no 1",
    "0-9": "0 9",
    "02/12/2011": "02 12 2011",
    "20+": "20",
    "333-3333": "333 3333",
    "6 fifty-five": "6 fifty 5",
    "8 - 2": "8 2",
    "none": "0",
    "": "",
    "a": "",
    "crock-pot": "crock pot",
    "horse, man": "horse man",
    "june 29, 2013": "june 29 2013",
    "streamers_and_fake_records": "streamers and fake records",
    "black/white": "black white",
    "blueberry, strawberry and banana": "blueberry strawberry and banana",
    "hammer time!": "hammer time",
    "???": "",
    "someone": "someone",
}
"""Answers of VQAv2 and what the official code makes of them, after Apple's axlearn,
vision/metrics_vqa_test.py."""

ACCURACIES = [
    ("down", "down,down,at table,stakeboard,down,table,down,down,down,down", 1.0),
    ("a", ",".join("a" * 10), 1.0),
    ("100", "about 100,100,0,0,thousands,1,0,100,many,unknown", 0.6),
    ("3:18", "10:20,10:00,10:20,10 19,10:19,10:20,10 19,3:18,10:20,10:19", 0.3),
    ("maybe", "no,yes,yes,no,yes,maybe,yes,yes,yes,yes", 0.3),
    (
        "don't shoot",
        "don't shoot,don't shoot,shooting,stop,stop,surrender,i surrender,surrender,hands up,gun",
        0.6,
    ),
    (
        "toilet paper",
        (
            "toilet paper,nothing,toilet paper,nothing,paper,handle,toilet bowl "
            "cleaner,valve,toilet "
            "paper,nothing"
        ),
        0.9,
    ),
]
"""Answers, ten people's and the accuracy, from the same file."""


@pytest.mark.parametrize(("answer", "expected"), NORMALIZED.items())
def test_vqa_answers_are_normalized_as_by_the_official_code(answer, expected):
    assert normalized(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("10,000", "10000"),  # a comma in a number takes every mark out, COMMA_STRIP
        ("10,000 t-shirts", "10000 tshirts"),
        ("1.5 dollars.", "1.5 dollars"),  # a period before a digit stays, PERIOD_STRIP
        ("He dont know", "he don't know"),
        ("youre an Owl", "you're owl"),
        ("somebody'd", "somebodyd"),  # the table's own slip
    ],
)
def test_numbers_periods_and_contractions_follow_vqa_eval_py(answer, expected):
    assert normalized(answer) == expected


def test_the_table_of_contractions_has_the_official_entries():
    """vqaEval.py has 120, of which two (let's, she's) change nothing."""
    assert len(CONTRACTIONS) == 118
    assert CONTRACTIONS["yall'd've"] == CONTRACTIONS["y'all'dve"] == "y'all'd've"
    assert CONTRACTIONS["oclock"] == "o'clock"


@pytest.mark.parametrize(("answer", "answers", "expected"), ACCURACIES)
def test_vqa_accuracy_is_the_official_one(answer, answers, expected):
    assert vqa_accuracy(answer, answers.split(",")) == pytest.approx(expected)


def test_the_accuracy_is_the_mean_over_all_nine_of_ten_people():
    """visualqa.org/evaluation: machine accuracies are averaged over all 10 choose 9 sets of
    human annotators."""
    for count, expected in enumerate([0.0, 0.3, 0.6, 0.9, *[1.0] * 7]):
        answers = ["yes"] * count + [f"other {n}" for n in range(10 - count)]
        nine = [
            min(sum(a == "yes" for a in some) / 3, 1) for some in itertools.combinations(answers, 9)
        ]
        assert agreement("yes", answers) == pytest.approx(sum(nine) / 10) == pytest.approx(expected)


def test_vqa_leaves_answers_alone_on_which_all_agree():
    """vqaEval.py normalises neither side where there is but one answer: "Two" is not "2" then."""
    assert vqa_accuracy("two", ["2"] * 10) == 0.0
    assert vqa_accuracy("two", ["2"] * 9 + ["3"]) == 1.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # the example below LLaVA's m4c_evaluator.py
        ("The poster shows a 10% discount.", "poster shows 10% discount"),
        ("Simon's, really?", "simon 's really"),  # word_tokenize sets the possessive apart
        ("1,000", "1000"),
    ],
)
def test_textvqa_answers_are_normalized_as_by_eval_ai(answer, expected):
    assert textvqa_normalized(answer) == expected


def test_textvqa_normalizes_what_all_agree_on_too():
    """TextVQAAccuracyEvaluator scores by processed answers whatever they are: the camera of
    question 34602 of the val set."""
    camera = ["nous les gosses", "clos culombu", *["dakota digital"] * 3, *["dakota"] * 5]
    assert textvqa_accuracy("Dakota", camera) == 1.0
    assert textvqa_accuracy("dakota digital.", camera) == pytest.approx(0.9)
    assert textvqa_accuracy("clos culombu", camera) == pytest.approx(0.3)
    assert textvqa_accuracy("two", ["2"] * 10) == 1.0


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("No.", "no", 1.0),
        ("no, it is not", "no", 0.0),
        ("Woman", "woman", 1.0),
        ("the woman", "woman", 0.0),
    ],
)
def test_gqa_takes_the_exact_word_alone(answer, expected, score):
    """LLaVA's convert_gqa_for_eval.py:

    `text.rstrip('.').lower()`, which GQA's eval.py compares with the answer.
    """
    assert GQA(file="x").score({"answer": answer, "expected": expected}) == score


def edits(a, b):
    """The distance by its definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


@pytest.mark.parametrize(
    ("answer", "answers", "expected"),
    [
        # this and two more: huggingface/evaluate, metrics/anls
        ("Denver Broncos", ["Denver Broncos", "Denver R. Broncos"], 1.0),
        ("12/15/89", ["12/15/88"], 7 / 8),
        ("Dear dr. Lobo", ["Dear Dr. Lobo", "Dr. Lobo"], 1.0),
        ("kitten", ["sitting"], 1 - 3 / 7),  # Levenshtein's textbook pair
        ("abcd", ["ab"], 0.5),  # at the threshold, which is kept
        ("abcde", ["ab"], 0.0),
        ("", ["x"], 0.0),
    ],
)
def test_anls_of_documents(answer, answers, expected):
    assert anls(answer, answers) == pytest.approx(expected)


def test_anls_agrees_with_the_distance_by_its_definition():
    for a, b in [("owl", "howl"), ("1975", "1957"), ("a b", "ab"), ("fuse", "fuss")]:
        similarity = 1 - edits(a, b) / max(len(a), len(b))
        assert anls(a, [b]) == pytest.approx(similarity if similarity >= 0.5 else 0.0)


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes, there is a person.", True),
        ("No, there is no car in the image.", False),
        ("There is not a car", False),
        ("no", False),
        ("NO", True),  # the published script knows `No` and `no` alone
        ("It is a car. There is no dog.", True),  # and looks at the first sentence
        ("", True),
        ("nothing", True),
    ],
)
def test_pope_reads_answers_as_the_published_script(answer, yes):
    """github.com/AoiDragon/POPE, evaluate.py."""
    assert says_yes(answer) == yes


def test_pope_metrics_by_category_and_their_mean():
    """The counts as evaluate.py has them:

    TP 2, FP 1, TN 3, FN 2 gives 5/8, 2/3, 1/2, 4/7 and 3/8 yes.
    """
    answers = [True, True, True, False, False, False, False, False]
    labels = [True, True, False, False, False, False, True, True]
    expected = {
        "accuracy": 5 / 8,
        "precision": 2 / 3,
        "recall": 1 / 2,
        "f1": 4 / 7,
        "yes_share": 3 / 8,
    }
    assert yes_no_metrics(answers, labels) == pytest.approx(expected)
    lines = [
        {"group": group, "answer": "yes" if a else "no", "expected": "yes" if label else "no"}
        for group, right in (("random", False), ("popular", True))
        for a, label in zip(labels if right else answers, labels)
    ]
    metrics = POPE(file="x").metrics(lines)
    assert metrics["f1/random"] == pytest.approx(4 / 7)
    assert metrics["f1/popular"] == 1.0
    assert metrics["f1"] == pytest.approx((4 / 7 + 1) / 2)
    assert metrics["yes_share/popular"] == 0.5


def test_a_thought_that_did_not_end_is_wrong_in_pope():
    lines = [
        {"group": "random", "answer": "", "expected": expected, "thought_unfinished": True}
        for expected in ("yes", "no")
    ]
    pope = POPE(file="x")
    assert [pope.score(line) for line in lines] == [0, 0]
    metrics = pope.metrics(lines)
    assert [metrics[name] for name in ("accuracy", "precision", "recall", "f1")] == [0] * 4


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" B\n", None),  # the line break becomes ". ", and then nothing matches
        ("C. Louisiana", "C"),
        ("C\nLouisiana", "C"),
        ("The answer is D.", "D"),
        ("I think. The answer is A", "A"),
        ("b", None),
        ("Because", None),
        ("F", None),
    ],
)
def test_scienceqa_finds_the_letter_by_llavas_rule(answer, letter):
    """llava/eval/eval_science_qa.py."""
    assert letter_of(answer) == letter


def test_scienceqa_is_told_by_subject_and_context_as_in_its_paper():
    """arXiv 2209.09513, table 3: NAT SOC LAN, and TXT IMG NO, of which a question may have two."""
    cases = [
        ("NAT", ["TXT", "IMG"], 1.0),
        ("NAT", ["IMG"], 0.0),
        ("LAN", ["NO"], 1.0),
        ("LAN", ["NO"], 1.0),
    ]
    lines = [
        {"group": group, "expected": {"context": context}, "score": score}
        for group, context, score in cases
    ]
    expected = {"NAT": 0.5, "LAN": 1.0, "TXT": 1.0, "IMG": 0.5, "NO": 1.0}
    metrics = ScienceQA(file="x", splits="y").metrics(lines)
    assert metrics == {"accuracy": 0.75} | {
        f"accuracy/{name}": score for name, score in expected.items()
    }


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B) a dog.", "B"),
        ("A", "A"),
        ("The answer is B: it barks", "B"),
        ("A or B", None),
        ("there is A dog here", "B"),  # A is an article here, and the option's text decides
        ("It is a dog", "B"),
        ("a cat, not a dog", None),
        ("owl", None),
    ],
)
def test_mmbench_finds_the_option_by_exact_matching(answer, letter):
    """can_infer_option and can_infer_text of MMBench's evaluation script and VLMEvalKit's
    vlmeval/utils/matching_util.py."""
    assert letter_among(answer, {"A": "cat", "B": "dog", "C": "horse"}) == letter


def test_a_model_that_always_says_a_has_nothing_under_circular_evaluation():
    """arXiv 2307.06281, section 4.1: a question is solved where the model is right in all
    rotations."""
    options = ["cat", "dog", "owl", "bee"]
    lines = []
    for unit, (right, always) in enumerate([(0, "A"), (1, "A"), (2, None)]):
        for turn in range(4):
            shown = dict(zip("ABCD", options[turn:] + options[:turn]))
            letter = next(letter for letter, option in shown.items() if option == options[right])
            line = {"id": f"{unit}#{turn}", "group": "x", "answer": always or letter}
            lines.append(line | {"expected": {"letter": letter, "options": shown}})
    task = MMBench(file="x")
    for line in lines:
        line["score"] = task.score(line)
    assert sum(line["score"] for line in lines) == 1 + 1 + 4
    assert task.metrics(lines) == pytest.approx(
        {"accuracy": 1 / 3, "accuracy_once": 2 / 3, "accuracy/x": 1 / 3}
    )


def test_bleu_agrees_with_torchmetrics_and_its_documented_example():
    """torchmetrics' page of BLEUScore: 0.7598."""
    expected = {"1": ["there is a cat on the mat", "a cat is on the mat"]}
    scores, _ = caption_metrics(expected, {"1": ["the cat is on the mat"]})
    assert scores["bleu_4"] == pytest.approx(0.7598, abs=1e-4)
    for n in range(1, 5):
        theirs = bleu_score(["the cat is on the mat"], [expected["1"]], n_gram=n)
        assert scores[f"bleu_{n}"] == pytest.approx(float(theirs), abs=1e-5)


def test_rouge_l_of_lins_example():
    """Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries, section 3.1: 0.75 and 0.5,
    of precision and recall alike, so that COCO's beta of 1.2 does not show."""
    reference = {"1": ["police killed the gunman"]}
    assert caption_metrics(reference, {"1": ["police kill the gunman"]})[0][
        "rouge_l"
    ] == pytest.approx(0.75)
    assert caption_metrics(reference, {"1": ["the gunman kill police"]})[0][
        "rouge_l"
    ] == pytest.approx(0.5)


def cider_d(expected, found, sigma=6.0):
    """CIDEr-D by its formula (arXiv 1411.5726, eq. 1 to 3 and section 7), image by image."""

    def grams(text, n):
        split = text.split()
        return Counter(tuple(split[i : i + n]) for i in range(len(split) - n + 1))

    scores = {}
    for key, [candidate] in found.items():
        total = 0.0
        for n in range(1, 5):
            holding = Counter(
                g for refs in expected.values() for g in set().union(*(grams(r, n) for r in refs))
            )
            weigh = {
                g: math.log(len(expected)) - math.log(max(1, count)) for g, count in holding.items()
            }
            rare = math.log(len(expected))

            def vector(text, n=n, weigh=weigh, rare=rare):
                return {g: count * weigh.get(g, rare) for g, count in grams(text, n).items()}

            mine = vector(candidate)
            for reference in expected[key]:
                other = vector(reference)
                norms = math.sqrt(sum(v * v for v in mine.values())) * math.sqrt(
                    sum(v * v for v in other.values())
                )
                dot = sum(min(v, other.get(g, 0.0)) * other.get(g, 0.0) for g, v in mine.items())
                delta = len(candidate.split()) - len(reference.split())
                total += (
                    (dot / norms if norms else 0.0)
                    * math.exp(-(delta**2) / (2 * sigma**2))
                    / len(expected[key])
                )
        scores[key] = 10 * total / 4
    return scores


def test_cider_agrees_with_its_formula():
    expected = {
        "1": ["a man rides a red bike on the road", "the man on a bike"],
        "2": ["a woman cuts a white cake", "a woman with a cake"],
        "3": ["two dogs run on the grass"],
    }
    found = {
        "1": ["a man on a bike on the road"],
        "2": ["a man cuts the cake"],
        "3": ["two dogs run on the grass"],
    }
    metrics, each = caption_metrics(expected, found)
    reference = cider_d(expected, found)
    assert each == pytest.approx(reference)
    assert metrics["cider"] == pytest.approx(sum(reference.values()) / 3)
    assert each["3"] > each["1"] > 0


def test_a_caption_that_is_its_only_reference_has_a_cider_of_ten():
    """arXiv 1411.5726: a cosine of 1 for each n, times 10."""
    expected = {"1": ["two dogs run here"], "2": ["one old owl sleeps"]}
    assert caption_metrics(expected, expected)[0]["cider"] == pytest.approx(10.0)


CAPTIONS = {
    "A man's dog doesn't bark, it sleeps.": "a man 's dog does n't bark it sleeps",
    "Two fire-trucks - one red; one blue!": "two fire-trucks one red one blue",
    'The "stop" sign at 10:30 (closed)...': "the stop sign at 10:30 -lrb- closed -rrb-",
    "A plate with $5.50 & bread": "a plate with $ 5.50 & bread",
    "A black-and-white photo of a 1950's diner.": "a black-and-white photo of a 1950 's diner",
    "Mr. Smith's car cannot move.": "mr. smith 's car can not move",
    "A street sign that reads 'Main St.'": "a street sign that reads main st.",
    "People at the U.S. Open tennis match.": "people at the u.s. open tennis match",
    "A caf\u00e9 with 3/4 of its tables -- full": "a caf\u00e9 with 3/4 of its tables full",
    "the kids' toys; I'm gonna play": "the kids toys i 'm gon na play",
}
"""Captions and their words by Stanford's tokeniser with coco-caption's punctuation (checked
below where there is Java)."""


@pytest.mark.parametrize(("caption", "expected"), CAPTIONS.items())
def test_captions_are_cut_into_words_as_by_the_penn_treebank(caption, expected):
    assert words(caption) == expected


@pytest.mark.skipif(shutil.which("java") is None, reason="Stanford's tokenizer needs Java")
def test_stanfords_tokenizer_cuts_these_captions_so():
    assert tokenized({"1": list(CAPTIONS)}, "ptb") == {"1": list(CAPTIONS.values())}


def test_perplexity_is_over_all_tokens_and_not_the_mean_of_the_chats():
    """torchmetrics.functional.text.perplexity of all tokens together."""
    logits = [
        torch.randn(length, 11, generator=torch.Generator().manual_seed(length))
        for length in (3, 8)
    ]
    targets = [torch.arange(len(one)) for one in logits]
    losses = [
        float(torch.nn.functional.cross_entropy(x, y, reduction="sum"))
        for x, y in zip(logits, targets)
    ]
    lines = [{"loss": loss, "tokens": len(one)} for loss, one in zip(losses, logits)]
    expected = perplexity(torch.cat(logits)[None], torch.cat(targets)[None])
    metrics = Perplexity(file="x").metrics(lines)
    assert metrics["perplexity"] == pytest.approx(float(expected), rel=1e-5)
    assert metrics["tokens"] == 11


def test_anls_of_texts_that_go_on_beyond_the_expected_one():
    expected = "the american heart association and the national institute of health"
    tail = " of 7272 greenville avenue in dallas and of bethesda maryland"
    distance, longer = len(tail), len(expected + tail)
    assert anls(expected + tail, [expected]) == pytest.approx(1 - distance / longer)


def test_a_caption_is_a_line_whatever_it_holds(monkeypatch):
    """Stanford's tokeniser takes a caption a line, and breaks lines at more than line breaks."""
    given = []

    class Tokenizer:
        def tokenize(self, captions):
            given.append(captions)
            return captions

    module = SimpleNamespace(PTBTokenizer=Tokenizer)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.tokenizer.ptbtokenizer", module)
    tokenized({"1": ["a\rb\x0bc\u2028d\n"]}, "ptb")
    assert given == [{"1": [{"caption": "a b c d"}]}]
