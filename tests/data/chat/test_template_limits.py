"""A chat template from elsewhere cannot loop for hours or fill the memory: it is refused in one
line."""

import pytest

from owlfuse.core.errors import DataError
from owlfuse.data.chat.tokenizer import (
    apply,
    counting_steps,
    own_beginning,
    parse_template,
    prepare,
    read_template,
    render,
    template_names,
)
from small_tokenizers import byte_level

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if "
    "add_generation_prompt %}<assistant>{% endif %}"
)
NUMBERS = "range(100000)"
LOOP = f"{{% for j in {NUMBERS} %}}{{% endfor %}}"
TEXT = "(range(100000) | join)"
BOMBS = {
    "one range": ("{% for i in range(1000000) %}{% endfor %}", "Range too big"),
    "a range that no number counts": ("{% for i in range(10 ** 30) %}{% endfor %}", "a power"),
    "powers": ("{{ 9 ** (9 ** 9) }}", "line 1: it has a power; write it otherwise"),
    "lipsum": ("{{ lipsum(n=1000000) }}", "lipsum"),
    "a width": ("{{ 'x' | center(10000000000) }}", "center by another width"),
    "a format": ("{{ '%90000000d' % 1 }}", "a format with a width"),
    "a format in a block": ("{% set f %}%9000000d{% endset %}{{ f % 1 }}", "a text with %"),
    "a format of a filter": ("{{ ('%s' | urlencode) % 1 }}", "a text with %"),
    "a star": ("{{ '%*d' % (90000000, 1) }}", "a format with a width|a constant over"),
    "a method": ("{{ '{:>90000000}'.format(1) }}", "format, of a text"),
    "a width in a variable": ("{% set n = 99 %}{{ 'x'.rjust(n) }}", "rjust by another width"),
    "a replacement": ("{{ 'x' | replace('x', 'y' | center(999)) }}", "replace by another text"),
    "a separator's method": ("{{ ('x' | center(999)).join(m) }}", "join by another text"),
    "a separator": ("{{ range(3000) | join('x' | center(999)) }}", "join by another text"),
    "a product": ("{{ 'x' * 1000000 }}", "a product"),
    "products": ("{{ 'x' * 100 * 100 * 100 * 100 * 100 }}", "a product"),
    "a product of variables": ("{% set n = 9 %}{{ n * n }}", "a product"),
    "doubled": (
        "{% set n = namespace(t='x') %}" + 36 * "{% set n.t = n.t ~ n.t %}",
        "n.t is over the limit of 67,108,864",
    ),
    "doubled blocks": (
        "{% set t %}x{% endset %}" + 36 * "{% set t -%}{{ t }}{{ t }}{%- endset %}",
        "t is over the limit of 67,108,864",
    ),
    "doubled lists": (
        "{% set a, b = [1], [2] %}" + 36 * "{% set (a, b) = (b, a + b + a) %}",
        "over the limit of 67,108,864",
    ),
    "a number that grows": (
        "{% set n = 100 %}" + 9 * "{% set n = n * 100 %}" + "{{ 'x' * n }}",
        "n is over the limit of 67,108,864",
    ),
    "nested": (f"{{% for i in {NUMBERS} %}}{LOOP}{{% endfor %}}", "more than 200,000 steps"),
    "kept": (
        f"{{% set r = {NUMBERS} %}}{{% for i in r %}}{{% for j in r %}}x{{% endfor %}}{{% endfor %}}",
        "200,000 steps",
    ),
    "characters": (
        f"{{% for i in {TEXT} %}}{{% for j in {TEXT} -%}} x {{%- endfor %}}{{% endfor %}}",
        "200,000 steps",
    ),
    "in a macro": (
        f"{{% macro f() %}}{LOOP}{{% endmacro %}}{{% for i in {NUMBERS} %}}{{{{ f() }}}}{{% endfor %}}",
        "more than 200,000 steps",
    ),
    "macros alone": (
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ "
            "f(60) "
            "}}"
        ),
        "more than 200,000 steps",
    ),
    "a macro of itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "much text": (2 * f"{{{{ {TEXT} * 100 }}}}", "writes 97,.* characters"),
}


def with_template(template):
    tokenizer = byte_level()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("when", ["always", "in long chats"])
def test_a_template_that_would_not_end_is_refused(bomb, when):
    text, message = BOMBS[bomb]
    hidden = text if when == "always" else f"{{% if messages | length > 4 %}}{text}{{% endif %}}"
    turns = [{"role": ("user", "assistant")[number % 2], "content": "a"} for number in range(6)]
    with pytest.raises(DataError, match=message) as error:
        render(prepare(with_template(PLAIN + hidden)), turns)
    assert "\n" not in str(error.value)


def test_a_template_may_use_range_as_it_is():
    template = PLAIN.replace(
        "for m in messages", "for i in range(messages | length) if i in range(0, 9, 1)"
    )
    template = template.replace("{{ m.role }}", "{% set m = messages[range(9)[i]] %}{{ m.role }}")
    asked = [{"role": "user", "content": "a"}]
    assert render(prepare(with_template(template)), asked, True) == render(
        prepare(with_template(PLAIN)), asked, True
    )


def test_a_template_may_indent_by_a_depth_and_set_what_it_likes():
    before = (
        "{% set a, b = '=', 2 %}{% set n = namespace(d=b) %}{%- set n.d = n.d * 2 -%}"
        "{% set c | upper %}{{ a }}{{ '  ' * n.d }}x{% endset %}{% set u = unknown %}{{- c -}}"
    )
    text = render(prepare(with_template(before + PLAIN)), [{"role": "user", "content": "a"}])
    assert text == "=        X<user>a</s>"


@pytest.mark.parametrize("name", template_names())
@pytest.mark.parametrize(
    "edit",
    [
        str,
        lambda text: "\n  " + text,
        lambda text: text.replace("-%}", "%}").replace("%}", "-%}"),
        lambda text: text + "\n",
    ],
)
def test_counting_changes_no_character_of_what_a_template_writes(name, edit):
    template = edit(read_template(name))
    turns = [
        {"role": ("user", "assistant")[number % 2], "content": f" a\n{number} "}
        for number in range(4)
    ]
    tokenizer = byte_level()
    counted = apply(tokenizer, turns, template)
    assert counted == tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)


@pytest.mark.parametrize(
    "expression",
    [
        "loop.index0 % 2 == 0 and '100%'",
        "(messages | length) % 2 ~ '%'",
        "'%s: %s' % (m.role, m.content)",
        "'%s' | format(m.role)",
        "'{}: {}'.format(m.role, m.content)",
        "m.content | replace('<image>', '') | trim",
        "m.content.replace('\\n', ' ')",
        "['a', 'b'] | join(', ')",
        "', '.join(m.keys())",
        "m | tojson(indent=4) | indent(4)",
    ],
)
def test_what_templates_usually_write_is_taken(expression):
    text = f"{{% for m in messages %}}{{{{ {expression} }}}}{{% endfor %}}"
    parse_template(text, "a template")


@pytest.mark.parametrize("breaks", [True, False])
def test_the_own_beginning_alone_is_rendered_as_it_is(breaks):
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    prepared = prepare(tokenizer, '<i"m>', breaks).chat_template
    beginning = own_beginning(prepared)
    assert beginning
    assert counting_steps(prepared).startswith(beginning)
    # what is changed in it is somebody else's
    forged = prepared.replace("joined.text[:1]", "joined.text[:2]").replace("IMAGE", "I")
    forged = forged.replace("joined.messages +", "joined.messages + joined.messages +")
    assert own_beginning(forged) == ""
    assert not counting_steps(forged).startswith(beginning)
