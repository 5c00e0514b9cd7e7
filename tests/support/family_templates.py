"""Chat templates as families of LLMs ship them, in small, and tokenizers that fit: none of them
has <image> or a pad token."""

import copy

from small_tokenizers import byte_level, unigram

GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (  # thoughts of earlier turns are dropped, and an empty one stands before the last answer
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% set c = m.content %}"
    "{% set r = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{% if not r and '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1] %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{% if loop.last %}{{ '<think>\n' + r.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ "
    "c.lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% "
    "endif %}{% endif %}"
)
PHI = (  # the last answer has the end of sequence behind its end mark
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() "
    "+ ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
DATED = (  # as Llama 3.2's: the day stands in the system message
    "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '.<|im_end|>\n' }}" + CHATML
)
PARTS = (  # of a vision-language model: contents are lists of parts
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for p in m.content %}"
    "{% if p.type == 'image' %}{{ '<image>' }}{% else %}{{ p.text }}{% endif %}{% endfor %}{{ "
    "'<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS_ONLY = (  # no control token but the end of sequence, and no generation prompt
    "{% for m in messages %}{{ ('USER: ' if m.role == 'user' else 'ASSISTANT: ') + m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
)
TEXT_MARK = (  # an end mark of several ordinary tokens
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n###\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
TWO_BREAKS = (  # a generation prompt that ends with two line breaks, as Llama 3's
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' + m.content + '<|im_end|>' }}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)

IM = ("<|im_start|>", "<|im_end|>")
# template, control tokens, eos_token, the answer's end mark, and whether control tokens take the
# white space behind them
FAMILIES = {
    "llama2": (LLAMA2, (), "</s>", "</s>", False),
    "gpt2": (WORDS_ONLY, (), "</s>", "</s>", False),
    "qwen": (CHATML, IM, "<|im_end|>", "<|im_end|>", False),
    "qwen_base": (CHATML, (*IM, "<|endoftext|>"), "<|endoftext|>", "<|im_end|>", False),
    "qwen3": (QWEN3, IM, "<|im_end|>", "<|im_end|>", False),
    "gemma": (
        GEMMA,
        ("<start_of_turn>", "<end_of_turn>", "<eos>"),
        "<eos>",
        "<end_of_turn>",
        False,
    ),
    "phi": (
        PHI,
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"),
        "<|endoftext|>",
        "<|end|>",
        True,
    ),
    "dated": (DATED, IM, "<|im_end|>", "<|im_end|>", False),
    "parts": (PARTS, IM, "<|im_end|>", "<|im_end|>", False),
    "text_mark": (TEXT_MARK, (), "</s>", "###", False),
    "two_breaks": (TWO_BREAKS, IM, "<|im_end|>", "<|im_end|>", False),
}


def family_tokenizer(family, kind="byte_level"):
    """A tokenizer of a family, without <image> and without a padding token."""
    from tokenizers import AddedToken

    template, control, eos, _, strips = FAMILIES[family]
    tokenizer = copy.deepcopy({"byte_level": byte_level, "unigram": unigram}[kind]())
    added = [AddedToken(token, special=True, normalized=False, rstrip=strips) for token in control]
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    tokenizer.eos_token, tokenizer.chat_template = eos, template
    return tokenizer
