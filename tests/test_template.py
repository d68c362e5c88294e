"""Laws of chat templates: rendered as jinja2 does, and stopped in time whatever they try."""

import resource
import time
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from chalot.errors import TokenizerError
from chalot.text.template import MAX_SOURCE, ChatTemplate
from conversations import CONVERSATIONS, NOW, TEMPLATES, TOOLS, reference

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "n": 3}]


def render(source: str, **variables: Any) -> str:
    return ChatTemplate(source).render({"messages": MESSAGES, **variables}, NOW)


def expected(source: str, **variables: Any) -> str | Exception:
    """What jinja2 renders, or the error that it raises."""
    try:
        return reference().from_string(source).render(messages=MESSAGES, **variables)
    except Exception as error:  # whatever a template may provoke in jinja2
        return error


def assert_same(source: str, **variables: Any) -> None:
    wanted = expected(source, **variables)
    if isinstance(wanted, str):
        assert render(source, **variables) == wanted
    else:
        with pytest.raises(TokenizerError):
            render(source, **variables)


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_renders_as_jinja2(template: str, tools: Any) -> None:
    rendered, ours = 0, ChatTemplate(TEMPLATES[template])
    theirs = reference().from_string(TEMPLATES[template])
    for messages in CONVERSATIONS.values():
        for prompt in (True, False):
            names = {"bos_token": "<s>", "eos_token": "</s>", "documents": None, "tools": tools}
            variables = {**names, "messages": messages, "add_generation_prompt": prompt}
            wanted = None
            try:
                wanted = theirs.render(**variables)
                rendered += 1
            except Exception:
                with pytest.raises(TokenizerError):
                    ours.render(variables, NOW)
            if wanted is not None:
                assert ours.render(variables, NOW) == wanted
    assert rendered >= 4


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1e20 }} {{ 0.1 + 0.2 }} {{ 10 / 5 }} {{ 1e16 }} {{ 1 / 3 }} {{ -1 ** 2 }} {{ 7 % -3 }}",
        "{{ [1, [2, [none, true, 'é', \"'\"]]] }} {{ {'a': (1,)} }} {{ () }} {{ {} }}",
        "{{ '%s-%5.1f|%%|%x' % ('a', 2.25, 255) }} {{ '%(k)s' % {'k': 1} }} {{ '{:>4}|{{}}'.format(7) }}",
        "{{ 'x' is sequence }} {{ {} is mapping }} {{ true is number }} {{ 1 is integer }} {{ x is none }}",
        "{{ 'a b c'.split(' ', 1) }} {{ 'a'.ljust(3) }}| {{ 'ab'.partition('b') }} {{ 'a\\tb'.expandtabs() }}",
        "{{ 'abc'[::-1] }} {{ 'abc'[5] }} {{ [1, 2, 3][-10:2] }} {{ 'abc'[-1] }} {{ [1, 2][1:] }}",
        "{% for a, b in {'x': 1, 'y': 2}.items() %}{{ loop.index }}{{ a }}{{ b }}{{ loop.revindex0 }}{% endfor %}",
        "{% for a in [3, 4, 5] if a > 3 %}{{ a }}{{ loop.length }}{% else %}none{% endfor %}",
        "{% for a in missing %}{{ a }}{% else %}nothing{% endfor %}",
        "{% set x = 1 %}{% for i in [1, 2] %}{{ x }}{% set x = 5 %}{{ x }}{% endfor %}{{ x }}",
        "{% if true %}{% set y = 2 %}{% endif %}{{ y }}{% set ns = namespace(a=1) %}{% set ns.a = 3 %}{{ ns.a }}",
        "{% macro m(a, b=a ~ 1, c) %}[{{ a }}{{ b }}{{ c }}]{% endmacro %}{{ m(1) }}{{ m(1, c=2) }}{{ m(b=3, a=4) }}",
        "{% macro f(n) %}{% if n %}{{ n }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(4) }}{{ z }}",
        "{% macro late() %}{{ after }}{% endmacro %}{% set after = 'seen' %}{{ late() }}",
        "{% for m in messages %}{{ m.role }}{{ loop.previtem.role if loop.previtem }}{{ m.n is defined }}{% endfor %}",
        "{{ messages | map(attribute='role') | join('+') }} {{ messages | selectattr('n') | list | length }}",
        "{{ messages | map('length') | list }} {{ [1, 2, 3] | select('odd') | list }} {{ [0, 1] | reject | list }}",
        "{{ [3, 1, 2] | sort }} {{ ['b', 'A'] | sort }} {{ ['b', 'A'] | sort(case_sensitive=true) | first }}",
        "{{ [1, 2, 2] | unique | list }} {{ [1, 2] | max }} {{ messages | sum(attribute='n', start=1) }}",
        "{{ 'a,b' | replace(',', ';', 1) }} {{ ' x ' | trim }} {{ 'hello world' | title | upper | lower }}",
        "{{ {'b': 1, 'a': 2} | dictsort }} {{ {'b': 1, 'a': 2} | items | list }} {{ none | default('d', true) }}",
        "{{ 'l1\\nl2' | indent(2, true) }} {{ '<b>' | e }} {{ 'é' | tojson }} {{ 3.567 | round(1) }} {{ '7' | int }}",
        "{{ [1, {'k': '</s>\\u0007'}] | tojson(indent=2) }} {{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}",
        "{{ 1 < 2 < 3 }} {{ 1 in [1, 2] }} {{ 'a' not in 'abc' }} {{ 1 == 1.0 == true }} {{ [1] == (1,) }}",
        "{{ 'a' if false }}|{{ missing }}|{{ missing is defined }}|{{ missing or 'or' }}|{{ not none }}",
        "{%- for i in range(9) -%}{%- if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}{% break %}{% endif -%}{{ i }}{% endfor %}",
        "  {%- if true %} \n  a\n {% endif %}\n\n  b  \n{# c #}\n",
        "a\r\nb\r\n{{ 'c' }}\r\n\n",
        "{{ {'items': 5}['items'] }} {{ messages[0]['content'] }} {{ messages[-1].content }} {{ dict(a=1).a }}",
        "{{ strftime_now('%d %b %Y') }} {{ range(2, 8, 3) | list }} {{ [1, 2] * 2 }} {{ 'ab' * 3 }}",
        "{% raw %}{{ x }}{% endraw %}{% set t %}[{{ 1 }}]{% endset %}{{ t }}{% set u | upper | trim %} q {% endset %}{{ u }}",
        "{{ missing.a }}", "{{ none + 1 }}", "{{ 'a' + 1 }}", "{{ 'a' < 1 }}", "{{ 1 / 0 }}", "{{ x.y.z }}",
        "{{ messages.append(1) }}", "{{ {[]: 1} }}", "{{ none.foo.bar }}", "{{ ''.__class__.mro() }}",
        "{{ missing | tojson }}", "{{ raise_exception('no') }}", "{{ nothing() }}", "{{ 1() }}", "{% if %}",
    ],
)  # fmt: skip
def test_expressions_as_jinja2(source: str) -> None:
    assert_same(source)


# ------------------------------------------------------------------- random templates, jinja2 as oracle

LITERALS = [
    "1",
    "0",
    "-2",
    "2.5",
    "true",
    "none",
    "'ab c'",
    "' x'",
    "''",
    "'É<'",
    "[]",
    "[1, 'b', 2]",
]
LITERALS += [
    "['b', 'a']",
    "{'a': 1, 'b': [2]}",
    "messages",
    "messages[0]",
    "missing",
    "n",
    "s",
    "(1, 'b')",
]
OPERATORS = ["+", "-", "*", "/", "//", "%", "~", "==", "!=", "<", ">=", "in", "not in", "and", "or"]
POSTFIXES = [
    "[0]",
    "[-1]",
    "[1:]",
    "[::-1]",
    ".a",
    "['b']",
    ".items() | list",
    ".keys() | list",
    ".strip()",
]
POSTFIXES += [
    ".upper()",
    ".split()",
    ".split('b')",
    ".startswith('a')",
    ".replace('b', 'xx')",
    ".get('a', 7)",
]
POSTFIXES += [
    ".count('b')",
    " | length",
    " | trim",
    " | upper",
    " | list",
    " | first",
    " | last",
    " | tojson",
]
POSTFIXES += [
    " | string",
    " | join(',')",
    " | default('d')",
    " | sort",
    " | unique | list",
    " | reverse | list",
]
POSTFIXES += [
    " | int",
    " | abs",
    " | map('string') | list",
    " | title",
    " | select('string') | list",
    " | sum",
]
POSTFIXES += [
    " | items | list",
    " | max",
    " | indent(2)",
    " | capitalize",
    " | float",
    " is defined",
]
POSTFIXES += [
    " is string",
    " is none",
    " is mapping",
    " is iterable",
    " is sequence",
    " is number",
    " is odd",
]
POSTFIXES += [" is eq(1)", " is in 'ab'"]


def random_expression(random: Random, depth: int) -> str:
    def part() -> str:
        return random_expression(random, depth - 1)

    match random.randrange(7) if depth else 0:
        case 0:
            return random.choice(LITERALS)
        case 1 | 2:
            return f"({part()} {random.choice(OPERATORS)} {part()})"
        case 3 | 4:
            return f"(({part()}){random.choice(POSTFIXES)})"
        case 5:
            return f"({part()} if {part()} else {part()})"
        case _:
            return random.choice(["(not {})", "[{}, 1]", "{{'a': {}}}"]).format(part())


def random_body(random: Random, depth: int) -> str:
    """Statements, with the white space that trim_blocks and lstrip_blocks care for."""

    def body() -> str:
        return random_body(random, depth - 1)

    def value() -> str:
        return random_expression(random, 2)

    kinds: list[Callable[[], str]] = [
        lambda: random.choice(
            ["a\n", "  ", "\n", "{{ x }}", "{{- n -}}", "{# c #}", "{{ loop.index }}"]
        ),
        lambda: f"{{% set x = {value()} %}}\n",
        lambda: f"{{% set ns.v = {value()} %}}{{{{ ns.v }}}}",
        lambda: f"{{% if {value()} %}}{body()}{{% else %}}{body()}{{%- endif %}}",
        lambda: f"  {{% for x in {value()} %}}\n{body()}{{% else %}}{body()}{{% endfor %}}\n",
        lambda: (
            f"{{% for y in 'ab' %}}{body()}{{% if y == x %}}{{% break %}}{{% endif %}}{{% endfor %}}"
        ),
        lambda: f"{{% macro m(x) %}}{body()}{{% endmacro %}}{{{{ m({value()}) }}}}",
        lambda: f"{{% set x %}}{body()}{{% endset %}}",
    ]
    return "".join(
        random.choice(kinds if depth else kinds[:3])() for _ in range(random.randrange(4))
    )


@pytest.mark.parametrize("seed", range(4))
def test_random_templates_as_jinja2(seed: int) -> None:
    random, compared = Random(seed), 0
    for number in range(150):
        if number % 3:
            source = "{{ " + random_expression(random, 3) + " }}"
        else:
            source = "{% set ns = namespace(v=0) %}" + random_body(random, 3)
        wanted = expected(source, n=3, s="ab b")
        if isinstance(wanted, str) and "object at" not in wanted:
            assert render(source, n=3, s="ab b") == wanted, source
            compared += 1
        elif not isinstance(wanted, (str, TypeError, SyntaxError)):
            # A list here stands for a generator or a view of jinja2, and can do more: a TypeError less.
            with pytest.raises(TokenizerError):
                render(source, n=3, s="ab b")
    assert compared > 50


# --------------------------------------------------------------------------------- hostile templates

GROW = "{% set ns = namespace(x='xxxxxxxx', l=[1], t=(1,)) %}{% for i in range(60) %}"
NESTED = GROW + "{% set ns.t = (ns.t, ns.t) %}{% endfor %}"
HOSTILE = {
    "repeat": "{{ ('x' * 1000000000) | length }}",
    "repeat list": "{{ ([1] * 1000000000) | length }}",
    "repeat empty": "{% for i in range(99999) %}{% set a = [] * 999999999 %}{% endfor %}",
    "range": "{{ range(1000000000) | length }}",
    "double": GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "double by plus": GROW + "{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "double by join": GROW + "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "double by block": GROW + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "double by replace": GROW + "{% set ns.x = ns.x.replace('x', 'xx') %}{% endfor %}",
    "double by percent": GROW + "{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "double by format": GROW + "{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}",
    "double by macro": GROW + "{% macro m(a) %}{{ a }}{{ a }}{% endmacro %}{% set ns.x = m(ns.x) %}{% endfor %}",
    "double in a line": "{% set x = 'xxxxxxxx' %}" + "{% set x = x ~ x %}" * 60,
    "big integers": GROW + "{% set ns.l = 2 ** 4000 * 2 ** 4000 %}{% endfor %}",
    "power": "{{ 10 ** 999 ** 999 }}",
    "indent": "{{ 'a\\nb' | indent(1000000000) }}",
    "center": "{{ 'a'.center(1000000000) }}",
    "tabs": "{{ '\\t'.expandtabs(tabsize=1000000000) }}",
    "width": "{{ '%0999999999d' % 1 }}{{ '%*d' % (999999999, 1) }}",
    "precision": "{{ '%.999999999f' % 1 }}",
    "format width": "{{ '{:>999999999}'.format(1) }}",
    "format width by value": "{{ '{:{w}}'.format(1, w=999999999) }}",
    "round": "{{ 1.5 | round(999999999) }}",
    "json indent": "{{ [[1]] | tojson(indent=1000000000) }}",
    "date width": "{{ strftime_now('%999999999d') }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(0) }}",
    "shared print": NESTED + "{{ ns.t }}",
    "shared json": NESTED + "{{ ns.t | tojson }}",
    "shared equal": "{% set a = namespace(x=[1], y=[1]) %}{% for i in range(60) %}"
    "{% set a.x = [a.x, a.x] %}{% set a.y = [a.y, a.y] %}{% endfor %}{{ a.x == a.y }}",
    "shared in": "{% set a = namespace(x=(1,), y=(1,)) %}{% for i in range(60) %}"
    "{% set a.x = (a.x, a.x) %}{% set a.y = (a.y, a.y) %}{% endfor %}{{ a.x in [2, a.y] }}",
    "shared key": NESTED + "{{ {ns.t: 1} }}",
    "shared lookup": NESTED + "{{ {1: 1}[ns.t] }}{{ {1: 1}.get(ns.t) }}{{ ns.t in {1: 1} }}",
    "shared dict": NESTED + "{{ dict([[ns.t, 1]]) }}{{ namespace([[ns.t, 1]]) }}",
    "shared sort": NESTED + "{{ [ns.t, ns.t] | sort }}",
    "shared filter": NESTED + "{{ ns.t | lower }}",
    "shared test": NESTED + "{{ ns.t is upper }}",
    "shared error": NESTED + "{{ raise_exception(ns.t) }}",
    "shared index": NESTED + "{{ [1].index(ns.t) }}",
    "deep print": GROW[:-1].replace("60", "9999") + "}{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l }}",
    "parentheses": "{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}",
    "unary": "{{ " + "-" * 100000 + "1 }}",
    "sum": "{{ " + "1+" * 50000 + "1 }}",
    "filters": "{{ 'a'" + "|trim" * 40000 + " }}",
    "ifs": "{% if 1 %}" * 12000 + "{% endif %}" * 12000,
    "number": "{{ " + "1" * 5000 + " }}",
    "length": "x" * (MAX_SOURCE + 1),
    "class": "{{ ''.__class__.__mro__ }}",
    "class by item": "{{ ''['__class__']['__mro__'] }}",
    "class by format": "{{ '{0.__class__.__init__.__globals__}'.format('') }}",
    "class by filter": "{{ '' | attr('__class__') }}",
    "class by map": "{{ [''] | map(attribute='__class__.__mro__') | list | tojson }}",
    "inside a function": "{{ raise_exception.function.__globals__ }}",
    "inside a macro": "{% macro m() %}{% endmacro %}{{ m.evaluator.budget.left + 1 }}",
    "inside a loop": "{% for a in [1] %}{{ loop.items.x }}{% endfor %}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "extends": "{% extends 'x' %}",
    "break outside": "{% if true %}{% break %}{% endif %}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_an_error(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KB
    start = time.monotonic()
    with pytest.raises(TokenizerError, match="chat template"):
        render(HOSTILE[name])
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_an_error_names_the_line() -> None:
    with pytest.raises(TokenizerError, match=r"line 3: 'missing' is undefined"):
        render("a\nb\n{{ missing.a }}\n")
    with pytest.raises(TokenizerError, match=r"line 2: Unexpected end of template"):
        render("a\n{% if x %}\n\n")


def test_a_refusal_says_what_the_template_says() -> None:
    with pytest.raises(TokenizerError, match="refuses these messages: No system turns"):
        render("{{ raise_exception('No system turns') }}")


def test_allowance_grows_with_the_messages() -> None:
    text = "word " * 200_000
    source = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content | trim + '</s>' }}{% endfor %}"
    )
    found = ChatTemplate(source).render({"messages": [{"role": "user", "content": text}] * 3})
    assert found == ("<user>" + text.strip() + "</s>") * 3


def test_looking_for_a_long_message_costs_little() -> None:
    messages = [{"role": "user", "content": "short"}] * 300
    messages.append({"role": "user", "content": "long " * 50_000})
    source = (
        "{% for m in messages %}{% if m == messages[-1] %}{{ loop.index }}{% endif %}{% endfor %}"
    )
    assert ChatTemplate(source).render({"messages": messages}) == "301"


@pytest.mark.parametrize("value", [object(), b"x", {1, 2}, [[object()]], print])
def test_only_plain_data_reaches_a_template(value: Any) -> None:
    with pytest.raises(TokenizerError, match="messages: found a"):
        render("{{ x }}", x=value)


def test_nesting_of_messages_is_bounded() -> None:
    value: Any = 1
    for _ in range(100_000):
        value = [value]
    with pytest.raises(TokenizerError, match="nested more than"):
        render("{{ x }}", x=value)
