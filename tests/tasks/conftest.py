"""A tiny random model in an exported folder, and the benchmarks' files."""

import pytest
import torch
from benchmarks import BENCHMARKS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers import llm_fields, model_node
from owlfuse.data.chat import ChatEncoder
from owlfuse.hub.export import Trained, export
from owlfuse.model import build_model

TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def small_tokenizer(image=None):
    """Byte-level, 300 tokens; `image` is its token 4."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>", *([image] if image else [])]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["What is in the image? Answer the question using a single word or phrase."] * 3, trainer)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **tokens)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """make_model(fusion) -> an exported folder, made once; the model's answers differ by picture and question."""
    made = {}

    def make(fusion):
        if fusion not in made:
            torch.manual_seed(1)
            tokenizer = ChatEncoder(small_tokenizer(), 1).tokenizer
            model = build_model(model_node(fusion, llm=llm_fields()), len(tokenizer))[0].eval()
            made[fusion] = export(Trained(model, tokenizer, None), tmp_path_factory.mktemp("model") / "out")
        return made[fusion]

    return make


@pytest.fixture(scope="session")
def model(make_model):
    """An exported model with hyperattention."""
    return make_model("hyperattention-adaptive")


@pytest.fixture
def files(tmp_path):
    """files(task) -> the words of the command line that name its files."""

    def make(task):
        folder = tmp_path / f"{task} files"
        folder.mkdir(exist_ok=True)
        return [f"task.{key}='{path}'" for key, path in BENCHMARKS[task](folder).items()]

    return make
