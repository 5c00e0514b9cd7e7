"""The tokenizer of a chat model: loaded by name, with the special tokens and the one chat
template that everything uses."""

from __future__ import annotations

import json
import logging
import re
import secrets
import struct
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from jinja2 import Environment, TemplateError, TemplateSyntaxError, nodes
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from owlfuse.core.errors import FILE_ERRORS, DataError, first_line
from owlfuse.core.files import read_text
from owlfuse.core.hub_access import check_hub_has
from owlfuse.core.packages import MissingPackage, check_not_missing, missing, packaged
from owlfuse.core.types import IMAGE, Message

log = logging.getLogger(__name__)
# The date that templates write, so that a chat has the same tokens on every day: Llama 3.2's
# default.
DATE = "26 Jul 2024"
# Bytes of a template's file, and characters of a template; the longest have 20 KB.
MAX_TEMPLATE = 2**20
# Steps of all loops and macros of a template while one chat is rendered; templates loop over a
# chat's turns.
MAX_STEPS = 200_000
# Characters of a rendered chat, and of each variable of a template; a record has 16 MiB.
MAX_TEXT = 2**26
# A constant by which a template may multiply, a depth of indentation for instance.
MAX_FACTOR = 100
# Any other number in a template, the width of a filter for instance.
MAX_NUMBER = 1_000_000
# Characters that a filter may fill up to.
MAX_WIDTH = 1000
# The beginning of a template that `prepare_template` has made.
PREPARED = "{#- prepared by owlfuse -#}"

# Templates take a message's content as a text, those of vision-language models as parts. Either way
# an image or a video is the text <image> here, where it stands among the texts.
JOIN_PARTS = (
    "{%- set joined = namespace(messages=[], text='', pictures='') -%}"
    "{%- for message in messages -%}"
    "{%- set joined.text = message.content if message.content is string else '' -%}"
    "{%- if message.content is not string -%}{%- for part in message.content or [] -%}"
    "{%- if part.type in ('image', 'image_url', 'video') -%}{%- set joined.text = joined.text + "
    "IMAGE_TOKEN -%}"
    "{%- elif part.type == 'text' -%}{%- set joined.text = joined.text + part.text -%}"
    "{%- else -%}{{- raise_exception('a part of the type ' ~ part.type ~ ', expected text, image "
    "or video') -}}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}"
    "LINE_BREAK"
    "{%- set joined.messages = joined.messages + [dict(message, content=CONTENT)] -%}"
    "{%- endfor -%}"
    "{%- set messages = joined.messages -%}"
)
# Puts a text behind the pictures that a turn begins with on a line of its own.
LINE_BREAK = (
    "{%- set joined.pictures = '' -%}"
    "{%- for _ in joined.text.split(IMAGE_TOKEN)[1:] -%}{%- if "
    "joined.text.startswith(IMAGE_TOKEN) -%}"
    "{%- set joined.pictures = joined.pictures + IMAGE_TOKEN -%}"
    "{%- set joined.text = joined.text[IMAGE_TOKEN | length:] -%}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if joined.pictures and joined.text[:1] | trim -%}{%- set joined.text = '\\n' + "
    "joined.text -%}{%- endif -%}"
    "{%- set joined.text = joined.pictures + joined.text -%}"
)
CONTENTS = {"text": "joined.text", "parts": "[{'type': 'text', 'text': joined.text}]"}
# transformers' own tag, which plain jinja2 does not know.
GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def chat_tokenizer(
    name: str, chat_template: str | None = None, break_behind_images: bool = True
) -> PreTrainedTokenizerBase:
    """Return the tokenizer `name` as every part of owlfuse uses it: see `load_tokenizer`,
    `use_template` and `prepare`.

    Raises:
        DataError: there is none, or it cannot serve chats.
        ModuleNotFoundError: it is a file of a package that is not installed.
    """
    tokenizer = use_template(load_tokenizer(name), chat_template)
    return prepare(tokenizer, break_behind_images=break_behind_images)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer from a folder, a hub name or a GGUF file; `package:` names are those of
    installed packages' files.

    Raises:
        DataError: there is none.
        ModuleNotFoundError: a package that is not installed.
    """
    path = name
    try:
        path = packaged(name)
        check_not_missing(path)
        if path.endswith(".gguf"):
            return gguf_tokenizer(Path(path).expanduser())
        check_hub_has(
            path, "name a folder with tokenizer.json, or set HF_HOME to a cache that has it"
        )
        return as_its_file(from_pretrained(path), path)
    except DataError as error:
        raise DataError(f"tokenizer: {str(error).removeprefix('tokenizer: ')}") from error
    except MissingPackage:
        raise
    except Exception as error:
        # tokenizers raises a plain Exception for a file that is none of its own
        if type(error) is not Exception and not isinstance(error, FILE_ERRORS):
            raise
        folder = Path(path)
        is_sentencepiece = (folder / "tokenizer.model").exists()
        has_table = (folder / "tokenizer.json").exists()
        # transformers would ask for tiktoken instead, which cannot read it
        if is_sentencepiece and not has_table and find_spec("sentencepiece") is None:
            raise missing("sentencepiece", f"tokenizer: {name}") from error
        reason = first_line(error)
        if not isinstance(error, OSError | ValueError):
            reason = f"its files make no tokenizer: {type(error).__name__}: {reason}"
        raise DataError(f"tokenizer: {name}: {reason}") from error


FILE = "tokenizer.json"
# Digits, spaces, an apostrophe, a bracket and a letter of two characters, which classes of
# transformers split by rules of their own.
PROBE = "In 2024,  it's\n\n 12.50 [INST] don't cafe\u0301"


def from_pretrained(path: str) -> PreTrainedTokenizerBase:
    """Return what transformers makes of a tokenizer's files: of Mistral's by tokenizer.json, whose
    template and offsets chats need, and with their own pattern, which older files have wrong."""
    options = {}
    # Mistral's library would read a file of its own.
    if find_spec("mistral_common"):
        options["mistral_format"] = False
    # Explicitly no remote code, since transformers asks on a terminal otherwise.
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
    # False: transformers takes the pattern for wrong, and leaves it unless it is asked.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if getattr(backend, "fix_mistral_regex", None) is not False:
        return tokenizer
    log.warning(
        "%s: transformers takes the pattern of its tokenizer.json for a mistake of Mistral's "
        "models, whose own is followed",
        path,
    )
    return PreTrainedTokenizerFast.from_pretrained(path, fix_mistral_regex=True)


def as_its_file(tokenizer: PreTrainedTokenizerBase, path: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer that splits texts as its tokenizer.json says: transformers builds some
    classes from the vocabulary alone, and drops the file's other rules."""
    folder = Path(path)
    # of a name of the hub it is in the cache by now
    file = folder / FILE if folder.is_dir() else try_to_load_from_cache(path, FILE)
    is_file = isinstance(file, str | Path) and Path(file).is_file()
    # this class is made of the file itself
    if not is_file or not tokenizer.is_fast or type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    plain = Tokenizer.from_file(str(file))
    plain.no_padding()
    plain.no_truncation()
    # Behind an added token some classes leave out the space that the file puts there.
    added = [token.content for token in plain.get_added_tokens_decoder().values()]
    probe = PROBE + "".join(f"{token}[INST] A" for token in added)
    expected = plain.encode(probe, add_special_tokens=False).ids
    if tokenizer(probe, add_special_tokens=False).input_ids == expected:
        return tokenizer
    faithful = PreTrainedTokenizerFast.from_pretrained(path)
    if faithful(probe, add_special_tokens=False).input_ids != expected:
        return tokenizer
    log.warning(
        "%s: transformers' %s splits texts otherwise than its tokenizer.json, which is followed",
        path,
        type(tokenizer).__name__,
    )
    return faithful


def prepare(
    tokenizer: PreTrainedTokenizerBase, image_token: str = IMAGE, break_behind_images: bool = True
) -> PreTrainedTokenizerBase:
    """Give a tokenizer what it lacks for chats, in place, and returns it; a tokenizer that has all
    of it stays as it is.

    The padding token falls back to the end of sequence, `image_token` becomes one token, and the
    chat template is made the one that training, evaluation, chat and exports render (see
    `prepare_template`).

    Args:
        break_behind_images: a text that stands right behind the pictures that its turn begins with
            goes on a line of its own, as LLaVA's data have it: for training and for whoever gives
            pictures and a question. False for data that have it otherwise.

    Raises:
        DataError: a tokenizer without a chat template, an end of sequence or offsets; a template
            that cannot be supervised.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template, which decides a chat's "
            "text; name one: "
            f"chat_template={'|'.join(template_names())}|<path of a .jinja file>"
        )
    # Supervision maps characters to tokens, and only fast tokenizers have offsets.
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path} is not a fast one, which character offsets "
            "need"
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path} has no end-of-sequence token, which ends an "
            "answer"
        )
    keep_spaces_in_offsets(tokenizer)
    if tokenizer.pad_token_id is None:
        # Padding is masked, so that any id serves.
        tokenizer.pad_token = tokenizer.eos_token
    if image_token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False
        )
    prepared = partial(
        prepare_template,
        tokenizer,
        image_token=image_token,
        break_behind_images=break_behind_images,
    )
    templates = tokenizer.chat_template
    # Of several, by name, transformers takes `default` or `tool_use`.
    if isinstance(templates, dict):
        by_name = {}
        for name, text in templates.items():
            # Others loop over tools and documents, which transformers gives as None by default.
            options: dict[str, Any] = {}
            if name != "default":
                options = {"tools": [], "documents": []}
            try:
                by_name[name] = prepared(text, options=options)
            except DataError as error:
                raise DataError(f"{error} (template {name})") from error
        tokenizer.chat_template = by_name
    else:
        tokenizer.chat_template = prepared(templates, options={})
    return tokenizer


def keep_spaces_in_offsets(tokenizer: Any) -> None:
    """Have the offsets of tokens cover the spaces that they stand for, in place.

    The post-processors of GPT-2 and RoBERTa leave them out by default, and then a token with a
    space seems to begin behind it, where an answer begins. The tokens themselves do not change.
    """
    processor = tokenizer.backend_tokenizer.post_processor
    if processor is None:
        return
    state = processor.__getstate__()
    kept = re.sub(rb'"trim_offsets":\s*true', b'"trim_offsets":false', state)
    if kept != state:
        processor.__setstate__(kept)
        tokenizer.backend_tokenizer.post_processor = processor


def prepare_template(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    image_token: str,
    break_behind_images: bool,
    options: Mapping[str, Any],
) -> str:
    """Return a chat template that renders the same text wherever it is used, for training and for
    generation.

    To the template's own text it adds, only where that is needed: contents as texts or parts,
    whichever it takes; a fixed date for `strftime_now`; and behind the generation prompt what the
    template itself writes before an answer (the empty thought of Qwen3), since a model need not
    write what the template writes.

    Args:
        options: further variables of the template, with which it is tried.

    Raises:
        DataError: a template that is too long, is no Jinja template, does not write what the user
            says, or takes a date in a form that is not a constant.
    """
    where = f"the chat template of the tokenizer {tokenizer.name_or_path}"
    # First: a template from elsewhere may begin as one that was prepared.
    tree = parse_template(template, where)
    if template.startswith(PREPARED):
        return template
    # Jinja drops one line break at a template's end itself.
    body = fixed_date(tree) + template.removesuffix("\n")
    for content in CONTENTS.values():
        beginning = prepared_beginning(json.dumps(image_token), break_behind_images, content)
        prepared = beginning + body
        if writes_question(tokenizer, prepared, options):
            return prepared + written_before_answers(tokenizer, prepared, options)
    raise DataError(
        f"{where} does not write what the user says, neither of a text nor of a list of parts: "
        + rendering_error(tokenizer, prepared, options)
    )


def prepared_beginning(image_token: str, break_behind_images: bool, content: str) -> str:
    """Return what stands before the template's own text.

    Args:
        image_token: as JSON.
        content: one of CONTENTS.
    """
    join_parts = JOIN_PARTS.replace("LINE_BREAK", LINE_BREAK if break_behind_images else "")
    join_parts = join_parts.replace("IMAGE_TOKEN", image_token).replace("CONTENT", content)
    # An empty output behind it: a block would take the body's first line break.
    return PREPARED + join_parts + "{{- '' }}"


TOKEN_IN_TEMPLATE = re.compile(r'joined\.text \+ ("(?:[^"\\]|\\.)*")')


def own_beginning(template: str) -> str:
    """Return what `prepare_template` has put before a template's own text, empty for a template
    that was not prepared, to the character."""
    token = TOKEN_IN_TEMPLATE.search(template)
    if token is None:
        return ""
    for breaks in (True, False):
        for content in CONTENTS.values():
            beginning = prepared_beginning(token[1], breaks, content)
            if template.startswith(beginning):
                return beginning
    return ""


def parse_template(text: str, where: str) -> nodes.Template:
    """Return the syntax tree of a chat template.

    Raises DataError that begins with `where` for a text that is too long or no Jinja template.
    """
    if len(text) > MAX_TEMPLATE:
        raise DataError(
            f"{where}: a chat template of {len(text):,} characters, over the limit of "
            f"{MAX_TEMPLATE:,}"
        )
    try:
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        tree = environment.parse(GENERATION_TAG.sub("", text))
        check_operations(tree, where)
        return tree
    except (TemplateSyntaxError, RecursionError) as error:
        reason = "nested too deep"
        if isinstance(error, TemplateSyntaxError):
            reason = f"line {error.lineno}: {error.message}"
        raise DataError(f"{where}: no Jinja template: {reason}") from None


def check_operations(tree: nodes.Template, where: str) -> None:
    """Raise DataError that begins with `where` for an expression that makes a huge text or number
    at once; jinja2 computes those of constants before it renders anything."""
    kinds = (nodes.Pow, nodes.Mul, nodes.Mod, nodes.Name, nodes.Const, nodes.Filter, nodes.Call)
    formats = has_formats(tree)
    for node in tree.find_all(kinds):
        problem = ""
        if isinstance(node, nodes.Pow):
            problem = "a power"
        elif isinstance(node, nodes.Name) and node.name == "lipsum":
            problem = "lipsum, which writes any amount of text"
        elif isinstance(node, nodes.Const) and not is_small(node, MAX_NUMBER):
            problem = f"a constant over {MAX_NUMBER:,}"
        elif isinstance(node, nodes.Mul):
            # A text may be one of them: indentation by a depth.
            factors = (node.left, node.right)
            constants = [factor for factor in factors if isinstance(factor, nodes.Const)]
            is_bounded = constants and all(is_small(constant, MAX_FACTOR) for constant in constants)
            if not is_bounded or next(node.find_all(nodes.Mul), None) is not None:
                problem = f"a product, of which one factor is no constant up to {MAX_FACTOR}"
        elif isinstance(node, nodes.Mod):
            if isinstance(node.left, nodes.Const):
                problem = "a format with a width" if has_width(node.left) else ""
            elif formats and not is_number(node.left):
                problem = "a text with % that may be a format, and the operator %"
        elif isinstance(node, nodes.Filter | nodes.Call):
            problem = growth_of(node)
        if problem:
            raise DataError(f"{where}: line {node.lineno}: it has {problem}; write it otherwise")


# A number or a star in a format, which may be a width of any size.
WIDTH = re.compile(r"%[^%a-zA-Z]*[\d*]|\{[^{}]*:[^{}]*[\d{]")
# Filters and methods that write as many characters as they are told.
PADDED = ("center", "ljust", "rjust", "zfill", "indent", "expandtabs")
# Those that write a text again at many places.
REPEATED = ("replace", "join")


def has_formats(tree: nodes.Template) -> bool:
    """Whether a template has a text from which `%` could make another, outside of the dates that
    it asks for."""
    dates = set()
    for call in tree.find_all(nodes.Call):
        if getattr(call.node, "name", None) == "strftime_now":
            dates |= {id(argument) for argument in call.args}
    if any(node.name == "urlencode" for node in tree.find_all(nodes.Filter)):
        return True
    if any("%" in node.data for node in tree.find_all(nodes.TemplateData)):
        return True
    for constant in tree.find_all(nodes.Const):
        sign = "%%" if id(constant) in dates else "%"
        if isinstance(constant.value, str) and sign in constant.value:
            return True
    return False


def is_number(node: nodes.Expr) -> bool:
    """Whether an expression is a count by its form: loop.index0, messages | length."""
    if isinstance(node, nodes.Getattr):
        return getattr(node.node, "name", None) == "loop"
    return isinstance(node, nodes.Filter) and node.name in ("length", "count", "int", "abs")


def has_width(constant: nodes.Const) -> bool:
    """Whether a constant text is a format with a width."""
    return WIDTH.search(str(constant.value)) is not None


def growth_of(node: nodes.Filter | nodes.Call) -> str:
    """Return what of a filter or a call of a method could write a huge text at once, "" where
    nothing could."""
    if isinstance(node, nodes.Filter):
        name, text = node.name, node.node
    elif isinstance(node.node, nodes.Getattr):
        name, text = node.node.attr, node.node.node
    else:
        return ""
    arguments = [*node.args, *(keyword.value for keyword in node.kwargs)]
    if name in ("format", "format_map"):
        is_plain = isinstance(text, nodes.Const) and not has_width(text)
        return "" if is_plain else "format, of a text that is no constant without widths"
    if name in PADDED:
        for argument in arguments:
            if not isinstance(argument, nodes.Const) or not is_small(argument, MAX_WIDTH):
                return f"{name} by another width than a constant up to {MAX_WIDTH:,}"
    if name in REPEATED:
        # Of the method, the text is what stands between.
        inserted: list[nodes.Expr | None] = [*arguments]
        if name == "join" and isinstance(node, nodes.Call):
            inserted = [text]
        for piece in inserted:
            if not isinstance(piece, nodes.Const) or not is_small(piece, MAX_FACTOR):
                return f"{name} by another text than a constant of up to {MAX_FACTOR} characters"
    return ""


def is_small(constant: nodes.Const, limit: int) -> bool:
    """Whether a number is not over a limit, or a text not longer."""
    value = constant.value
    size = len(value) if isinstance(value, str) else value
    return not isinstance(size, int | float) or size <= limit


def fixed_date(tree: nodes.Template) -> str:
    """Return a macro that stands for the clock that a template reads, empty for one that reads
    none. Raises DataError."""
    day = datetime.strptime(DATE, "%d %b %Y")
    dates = {}
    for call in tree.find_all(nodes.Call):
        if getattr(call.node, "name", None) != "strftime_now":
            continue
        if len(call.args) != 1 or not isinstance(call.args[0], nodes.Const):
            raise DataError(
                f"the chat template asks for the date in line {call.lineno} by a format that is "
                "no constant text"
            )
        dates[call.args[0].value] = day.strftime(call.args[0].value)
    if not dates:
        return ""
    table = json.dumps(dates)
    return f"{{%- macro strftime_now(format) -%}}{{{{- {table}[format] -}}}}{{%- endmacro -%}}"


def writes_question(
    tokenizer: PreTrainedTokenizerBase, template: str, options: Mapping[str, Any]
) -> bool:
    """Whether a template writes a user's text, once."""
    question = [{"role": "user", "content": "\ue000"}]
    try:
        text = apply(tokenizer, question, template, add_generation_prompt=True, **options)
    except DataError:
        return False
    return text.count("\ue000") == 1


def rendering_error(
    tokenizer: PreTrainedTokenizerBase, template: str, options: Mapping[str, Any]
) -> str:
    """Return what a template makes of a single question, or objects to it, for a message."""
    question = [{"role": "user", "content": "Hello"}]
    try:
        text = apply(tokenizer, question, template, add_generation_prompt=True, **options)
    except DataError as error:
        return str(error)
    return f"of the question Hello it makes {text[:80]!r}"


def written_before_answers(
    tokenizer: PreTrainedTokenizerBase, template: str, options: Mapping[str, Any]
) -> str:
    """Return the end of a template that writes, behind the generation prompt, what the template
    puts before an answer.

    White space alone is left to the model, and so are spaces at the end: tokens of words begin with
    them. A caller who says `enable_thinking`, or asks for the prompt as it was (`without_lead`),
    gets it as it was.
    """
    question = {"role": "user", "content": "\ue001"}
    answer = {"role": "assistant", "content": "\ue000"}
    try:
        prompt = apply(tokenizer, [question], template, add_generation_prompt=True, **options)
        chat = apply(tokenizer, [question, answer], template, **options)
    except DataError:
        return ""  # whoever encodes a chat gets the error
    if not chat.startswith(prompt) or chat.count("\ue000") != 1:
        return ""
    lead = chat[len(prompt) : chat.index("\ue000")].rstrip(" ")
    if not lead.strip():
        return ""
    condition = (
        "add_generation_prompt and without_lead is not defined and enable_thinking is not defined "
        "and thinking is not defined"
    )
    return f"{{% if {condition} %}}{{{{- {json.dumps(lead)} }}}}{{% endif %}}"


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    add_generation_prompt: bool = False,
    thinking: bool = False,
    **options: Any,
) -> str:
    """Return a chat as text: the one place where owlfuse renders the tokenizer's chat template.

    Args:
        thinking: the model is to write its thoughts before its answer, where the template knows of
            thoughts.
        options: other variables of the template, `tools` for instance.

    Raises:
        DataError: what the template objects to, a system message for instance.
    """
    if thinking:
        # Granite and DeepSeek call it `thinking`.
        options |= {"enable_thinking": True, "thinking": True}
    return apply(tokenizer, messages, None, add_generation_prompt=add_generation_prompt, **options)


def apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    template: str | None,
    **options: Any,
) -> str:
    """Return what a template, by default the tokenizer's own, makes of messages.

    Raises DataError.
    """
    try:
        counting = counting_steps(tokenizer.get_chat_template(template, options.get("tools")))
        text = str(
            tokenizer.apply_chat_template(
                messages, chat_template=counting, tokenize=False, **options
            )
        )
    # A template is a program: jinja2 passes on whatever its expressions raise.
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise DataError(f"the chat template refuses it: {error}") from error
    except MemoryError:
        raise DataError(
            "the chat template refuses it: it writes more than the memory holds"
        ) from None
    if len(text) > MAX_TEXT:
        raise DataError(
            f"the chat template writes {len(text):,} characters, over the limit of {MAX_TEXT:,}"
        )
    return text


# Start and end of each token, in characters of the text.
Offsets = list[tuple[int, int]]


def encode(tokenizer: Any, text: str, **options: Any) -> tuple[list[int], Offsets]:
    """Return ids and the characters that each stands for.

    Args:
        options: the tokenizer's.
    """
    encoding = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False, **options
    )
    return list(encoding["input_ids"]), [tuple(pair) for pair in encoding["offset_mapping"]]


# A variable whose name no template can guess.
COUNTER = f"steps_{secrets.token_hex(8)}"
# A tag without its end. The counter is read once: jinja2's sandbox checks every attribute, which
# takes most of the time of rendering.
COUNT_STEP = (
    f"{{% set {COUNTER}.left = {COUNTER}.left - 1 or "
    f"raise_exception('its loops and macros take more than {MAX_STEPS:,} steps') "
)


def check_sizes(targets: str) -> str:
    """Return tags, the last without its end, that check variables of a template once they are set:
    what doubles with every step would take all memory within a few."""
    conditions = []
    for name in targets.strip("()").split(","):
        conditions.append(f"{name} is sequence and {name} | length > {MAX_TEXT}")
        conditions.append(f"{name} is number and {name} > {MAX_TEXT}")
    return (
        f"{{% if {' or '.join(conditions)} %}}{{{{ raise_exception('{targets} is over the limit of "
        f"{MAX_TEXT:,}') }}}}{{% endif "
    )


@lru_cache(maxsize=64)
def counting_steps(template: str) -> str:
    """Return a template that writes the same, counts the steps of its loops and macros, and checks
    the size of what it sets.

    So one from elsewhere cannot go on for hours, or take all memory: jinja2's sandbox limits each
    `range` alone, and loops inside of loops multiply.

    Raises:
        TemplateSyntaxError: it is none.
    """
    beginning = own_beginning(template)
    # Ours takes a step for each part, and its texts are the messages'.
    pieces = [beginning, f"{{%- set {COUNTER} = namespace(left={MAX_STEPS + 1}) %}}\n"]
    words: list[str] = []
    # Of `set` around a block, which sets it at its end.
    block_targets = []
    for _, kind, value in Environment().lex(template.removeprefix(beginning)):
        if kind == "block_begin":
            words = []
        elif kind == "block_end":
            statement = words[0] if words else ""
            tags = COUNT_STEP if statement in ("for", "macro") else ""
            targets = re.split(r"[=|]", "".join(words[1:]))[0]
            if statement == "set" and "=" not in words:
                block_targets.append(targets)
            elif statement == "set":
                tags = check_sizes(targets)
            elif statement == "endset" and block_targets:
                tags = check_sizes(block_targets.pop())
            if tags:
                # the last tag has the sign for the white space behind it
                value = f"%}}{tags}{value}"
        elif kind != "whitespace":
            words.append(value)
        pieces.append(value)
    return "".join(pieces)


FOLDER = Path(__file__).parent / "templates"

# The control tokens of templates. The last one ends a turn, and so becomes the tokenizer's end of
# sequence; other templates end a turn with the end of sequence that the tokenizer has.
CONTROL_TOKENS = {
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "chatml": ["<|im_start|>", "<|im_end|>"],
}


def template_names() -> list[str]:
    """Return the names of the templates of owlfuse."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def use_template(tokenizer: Any, chat_template: str | None) -> Any:
    """Return the tokenizer with a chat template, given by its name or as the path of a .jinja file;
    with None the template stays.

    The control tokens of a named template are added where the tokenizer lacks them, so that each is
    one token.

    Raises:
        DataError: no such name or file, a file that is no Jinja template, a tokenizer without what
            the template needs.
    """
    if chat_template is None:
        return tokenizer
    tokenizer.chat_template = read_template(chat_template)
    control = CONTROL_TOKENS.get(chat_template, [])
    new_tokens = [token for token in control if token not in tokenizer.get_vocab()]
    if new_tokens:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": new_tokens}, replace_extra_special_tokens=False
        )
    if control:
        tokenizer.add_special_tokens({"eos_token": control[-1]})
    if chat_template == "chatml" and begins_with_bos(tokenizer):
        tokenizer.chat_template = "{{- bos_token -}}" + tokenizer.chat_template
    if tokenizer.eos_token is None:
        raise DataError(
            f"chat_template: {chat_template}: the tokenizer {tokenizer.name_or_path} has no "
            "end-of-sequence token to end a turn"
        )
    return tokenizer


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer begins every text with its token for that, as those of Llama and Gemma:
    their LLMs have never read a text without it."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def read_template(chat_template: str) -> str:
    """Return the text of a template, by its name or path. Raises DataError, see `use_template`."""
    is_named = chat_template in template_names()
    path = FOLDER / f"{chat_template}.jinja" if is_named else Path(chat_template).expanduser()
    if not is_named and path.suffix != ".jinja":
        raise DataError(
            f"chat_template: {chat_template} is none of {', '.join(template_names())}, nor the "
            "path of a .jinja file"
        )
    try:
        # Windows ends lines with two characters, and templates write their line breaks.
        text = read_text(path, MAX_TEMPLATE).replace("\r\n", "\n").removesuffix("\n")
        parse_template(text, str(path))
    except DataError as error:
        raise DataError(f"chat_template: {error}") from None
    if not text.strip():
        raise DataError(f"chat_template: {path} is empty")
    return text


# Names of byte-level tokenizers (`tokenizer.ggml.pre`) that take each digit by itself before
# anything else.
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
# The type of a control token (`tokenizer.ggml.token_type`).
GGUF_CONTROL = 3


def control_ids(fields: Mapping[str, Any]) -> list[int]:
    """Return the ids of the control tokens that the fields of a GGUF file name, in order.

    Newer versions of transformers mark these tokens themselves.
    """
    types = fields.get("tokenizer.ggml.token_type")
    if types is None:
        return []
    return [number for number, kind in enumerate(types.contents()) if kind == GGUF_CONTROL]


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a GGUF file.

    transformers leaves out that digits are split first, where the kind of tokenizer does so (else
    several spaces or line breaks before a number become other tokens), and which tokens are control
    tokens.

    Raises:
        DataError: no such file, or none with a tokenizer.
        ModuleNotFoundError: the package gguf is not installed.
    """
    if not file.is_file():
        raise DataError(f"tokenizer: {file}: no such file")
    try:
        from gguf import GGUFReader

        tokenizer = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )
        fields = GGUFReader(file).fields
    except ImportError as error:
        raise missing("gguf", f"tokenizer: {file.name}") from error
    except (KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise DataError(
            f"tokenizer: {file} is no GGUF file with a tokenizer: {type(error).__name__} {error}"
        ) from error
    tokenizer.add_special_tokens(
        {"additional_special_tokens": tokenizer.convert_ids_to_tokens(control_ids(fields))},
        replace_extra_special_tokens=False,
    )
    pre = fields.get("tokenizer.ggml.pre")
    if pre is not None and pre.contents() in SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer
