"""Small tokenizers of the kinds that LLMs have, trained on the spot."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = (
    "What is in the picture? A red dog sits on the grass. How many dogs are there? There are two, "
    "and one cat.\n\n"
    "USER: Tell me more. ASSISTANT: The dog is happy.\n\n\nHuman: [INST] Say it in one word "
    "[/INST] yes"
)
LINES = [WORDS, *WORDS.split("."), "\n\n", "\n\n\n", " \n", "  ", ".\n", "?\n\n"] * 4
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level():
    """Byte-level BPE with GPT-2's pattern, which has tokens of several line breaks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return wrapped(tokenizer)


def unigram():
    """Unigram over words that begin with a space, and bytes for what it does not know, as
    SentencePiece has it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda piece: piece[1])
    vocabulary = [(piece, 0.0 if piece in SPECIAL else -3.0 - 0.01 * i) for piece, i in pieces]
    vocabulary += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, 0, byte_fallback=True))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    return wrapped(tokenizer)


def wrapped(tokenizer):
    """As one of transformers, without a chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
