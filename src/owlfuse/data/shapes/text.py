"""The text half of *shapes*: four kinds of closed tasks in Alpaca's format, and the tokenizer of
the whole set."""

import itertools
import zlib
from collections.abc import Iterator
from itertools import cycle
from random import Random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT_KINDS = ("arithmetic", "comparison", "spelling", "instruction")

_WORDS = (
    "cat dog sun hat map pen cup box bed bag bus car key leg arm ball bird book boat cake "
    "fish moon rain tree"
)
_OPPOSITES = (
    "big small, hot cold, up down, old new, day night, fast slow, wet dry, high low, open closed, "
    "hard soft, "
    "full empty, early late"
)
_PLURALS = (
    "cat cats, dog dogs, hat hats, map maps, pen pens, cup cups, box boxes, bus buses, car cars, "
    "key keys, leg legs, "
    "leaf leaves, ball balls, bird birds, book books, fish fish, man men, foot feet, child "
    "children, mouse mice"
)
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_NAMES = (
    "Anna Ben Carl Dora Emma Finn Gina Hugo Iris Jack Kate Leo Mia Nora Otto Paul Rosa Sam "
    "Tina Vera"
)

# Each task has four wordings, (instruction, input): two name the subject in the instruction and two
# in the input, so that with one wording kept for validation, training still shows every fact both
# ways.
_PLUS = (
    ("What is {a} + {b}?", ""),
    ("Add {b} to {a}.", ""),
    ("Add the numbers.", "{a} + {b}"),
    ("What is the sum?", "{a} + {b}"),
)
_MINUS = (
    ("What is {a} - {b}?", ""),
    ("Take {b} from {a}.", ""),
    ("Subtract the numbers.", "{a} - {b}"),
    ("What is the difference?", "{a} - {b}"),
)
_COMPARE = (
    ("Which is {which}, {a} or {b}?", ""),
    ("Say the {which} of {a} and {b}.", ""),
    ("Which number is {which}?", "{a} or {b}"),
    ("Say the {which} number.", "{a} and {b}"),
)
_SPELL = (
    ("Spell {a}.", ""),
    ("How do you spell {a}?", ""),
    ("Spell the word.", "{a}"),
    ("How is it spelled?", "{a}"),
)
_FIRST_LETTER = (
    ("What is the first letter of {a}?", ""),
    ("Say the first letter of {a}.", ""),
    ("What is the first letter?", "{a}"),
    ("Say the first letter.", "{a}"),
)
_LAST_LETTER = tuple(
    (instruction.replace("first", "last"), text) for instruction, text in _FIRST_LETTER
)
_OPPOSITE = (
    ("What is the opposite of {a}?", ""),
    ("Say the opposite of {a}.", ""),
    ("What is the opposite?", "{a}"),
    ("Say the opposite.", "{a}"),
)
_PLURAL = tuple(
    (instruction.replace("opposite", "plural"), text) for instruction, text in _OPPOSITE
)
_DAY_AFTER = (
    ("What day is after {a}?", ""),
    ("Say the day after {a}.", ""),
    ("What day is after this day?", "{a}"),
    ("Say the day after.", "{a}"),
)
_DAY_BEFORE = tuple(
    (instruction.replace("after", "before"), text) for instruction, text in _DAY_AFTER
)
_TWICE = (
    ("Say {a} twice.", ""),
    ("Repeat {a} twice.", ""),
    ("Say the word twice.", "{a}"),
    ("Repeat it twice.", "{a}"),
)
_HELLO = (
    ("Say hello to {a}.", ""),
    ("Can you say hello to {a}?", ""),
    ("Say hello to this person.", "{a}"),
    ("Can you say hello?", "{a}"),
)

# One token a turn names the speaker, and an answer has an end mark: short chats train fast.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message.role + '|>' }}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}"
    "{% elif part.type == 'image' %}{{ '<image>' }}"
    "{% else %}{{ raise_exception('a part has type ' + part.type + ', expected text or image') "
    "}}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<image>", "<|system|>", "<|user|>", "<|assistant|>")


def _facts(kind: str) -> Iterator[tuple[tuple, dict, str]]:
    """Yield all (wordings, fields, answer) of a closed kind; comparison has no such list."""
    if kind == "arithmetic":
        pairs = list(itertools.product(range(10), range(10)))
        for a, b in pairs:
            yield _PLUS, {"a": a, "b": b}, str(a + b)
        for a, b in pairs:
            if a >= b:
                yield _MINUS, {"a": a, "b": b}, str(a - b)
    elif kind == "spelling":
        for word in _WORDS.split():
            yield _SPELL, {"a": word}, " ".join(word)
            yield _FIRST_LETTER, {"a": word}, word[0]
            yield _LAST_LETTER, {"a": word}, word[-1]
    else:
        for pair in _OPPOSITES.split(", "):
            word, opposite = pair.split()
            yield _OPPOSITE, {"a": word}, opposite
            yield _OPPOSITE, {"a": opposite}, word
        days = _DAYS.split()
        for day, following in zip(days, days[1:] + days[:1], strict=True):
            yield _DAY_AFTER, {"a": day}, following
            yield _DAY_BEFORE, {"a": following}, day
        for pair in _PLURALS.split(", "):
            singular, plural = pair.split()
            yield _PLURAL, {"a": singular}, plural
        for word in _WORDS.split()[:24]:
            yield _TWICE, {"a": word}, f"{word} {word}"
        for name in _NAMES.split():
            yield _HELLO, {"a": name}, f"hello {name}"


def _say(wording: tuple[str, str], fields: dict, answer: str) -> dict:
    instruction, extra = (text.format(**fields) for text in wording)
    return {"instruction": instruction, "input": extra, "output": answer}


def _comparisons(rng: Random, for_val: bool) -> Iterator[dict]:
    """Yield comparisons of two numbers below 30 without end.

    A ninth of all pairs, in either order, is asked in val only.
    """
    while True:
        a, b = rng.sample(range(30), 2)
        is_for_val = zlib.crc32(f"{min(a, b)} {max(a, b)}".encode()) % 9 == 0
        if is_for_val == for_val:
            which = rng.choice(("larger", "smaller"))
            answer = max(a, b) if which == "larger" else min(a, b)
            fields = {"which": which, "a": a, "b": b}
            yield _say(rng.choice(_COMPARE), fields, str(answer))


def _closed(kind: str, rng: Random, train_count: int) -> tuple[Iterator[dict], Iterator[dict]]:
    """Return endless train and val samples of a closed kind.

    Each fact keeps one wording for val, and training goes round the facts, one of the other
    wordings at a time. Val asks only for facts that `train_count` samples have reached.
    """
    facts = list(_facts(kind))
    orders = [rng.sample(wordings, len(wordings)) for wordings, _, _ in facts]
    visits = rng.sample(range(len(facts)), len(facts))
    train, val = [], []
    for turn in range(1, len(_PLUS)):
        for i in visits:
            _, fields, answer = facts[i]
            train.append(_say(orders[i][turn], fields, answer))
    for i in visits[:train_count]:
        _, fields, answer = facts[i]
        val.append(_say(orders[i][0], fields, answer))
    return cycle(train), cycle(val)


def make_texts(seed: int, train: int, val: int) -> tuple[list[dict], list[dict]]:
    """Return the samples of text_train.json and text_val.json, in Alpaca's format plus an id and a
    kind.

    No instruction of val (with its input) is in train. Its fact is, in other words; a comparison is
    of an unseen pair.

    Raises:
        ValueError: `train` is too small for a sample of each kind.
    """
    if train < len(TEXT_KINDS):
        raise ValueError(
            f"text_train is {train}, expected {len(TEXT_KINDS)} or more, so that each kind has a "
            "sample"
        )
    sources = {}
    for kind in TEXT_KINDS:
        # One for each kind, so that how much is drawn of a kind changes no other.
        rng = Random(f"text {seed} {kind}")
        if kind == "comparison":
            sources[kind] = (
                _comparisons(rng, False),
                _comparisons(Random(f"text {seed} {kind} val"), True),
            )
        else:
            sources[kind] = _closed(kind, rng, train // len(TEXT_KINDS))
    splits = []
    for split, (name, count) in enumerate({"train": train, "val": val}.items()):
        kinds = [TEXT_KINDS[i % len(TEXT_KINDS)] for i in range(count)]
        # so that any kind may come first in a chat of several
        Random(f"text {seed} {name} order").shuffle(kinds)
        samples = []
        for i, kind in enumerate(kinds):
            task = next(sources[kind][split])
            samples.append({"id": f"text-{name}-{i:06d}", **task, "kind": kind})
        splits.append(samples)
    return splits[0], splits[1]


def train_tokenizer(records: list[dict], texts: list[dict]) -> PreTrainedTokenizerFast:
    """Return a fast byte-level BPE tokenizer with a chat template, trained on the texts of
    train.json and text_train.json."""
    lines = []
    for record in records:
        for turn in record["conversations"]:
            # a special token, which is no text to be learned
            lines.append(turn["value"].removeprefix("<image>"))
    for sample in texts:
        lines += [f"{sample['instruction']}\n{sample['input']}", sample["output"]]
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(_SPECIAL_TOKENS),
        # All bytes, so that there are tokens for any text.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens={"image_token": "<image>"},
        # Decoding gives a text back as it was encoded.
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )
