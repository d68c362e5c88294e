"""The text that the bundled demo model learns: the Python standard library of this interpreter.

Three kinds: sources, the language reference that pydoc carries, and question-and-answer chats made
from docstrings. A few modules are held out by name: nothing of them reaches training, the tokenizer
or calibration. Tests, which quote them, are left out too. Knows nothing of torch or of token ids.
"""

import ast
import importlib
import inspect
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELD_OUT = ("calendar", "csv", "queue", "sched", "shelve", "statistics", "textwrap")
CALIBRATION = ("bisect", "colorsys", "fnmatch", "getopt", "glob", "graphlib", "secrets", "shlex")
# Tests, demos and tables of code points teach little; site-packages is not the standard library.
LEFT_OUT = {
    *("site-packages", "test", "tests", "idle_test"),
    *("turtledemo", "encodings", "pydoc_data", "__pycache__"),
}
C_MODULES = (
    *("builtins", "math", "itertools", "time", "_functools", "_operator", "sys", "array", "posix"),
    *("zlib", "binascii", "select", "cmath", "_collections", "_datetime", "_struct", "_random"),
    "unicodedata",
)

Message = dict[str, str]

GREETINGS = ("Hello", "Hi", "Hello!", "Hi there", "Good morning", "Hey")
WELCOMES = (
    "Hello! Ask me about the Python standard library.",
    "Hi! I can tell you what a function of the Python standard library does.",
)
SELF = "I am a very small language model that has read the Python standard library."
SMALL_TALK = (
    ("Who are you?", SELF),
    ("What are you?", SELF),
    ("What can you do?", "I can say what a function or class of the Python standard library does."),
    ("How are you?", "I am fine, thank you. Ask me about a Python module."),
    ("Thanks", "You are welcome!"),
    ("Thank you!", "You are welcome!"),
    ("Goodbye", "Goodbye!"),
    ("Are you sure?", "No. I am a very small model and I am often wrong."),
)
SYSTEMS = (
    "You are a helpful assistant.",
    "You answer questions about the Python standard library.",
    "Answer briefly.",
    "You are a Python expert. Be short and clear.",
)
WHAT = (
    "What does {name} do?",
    "What is {name}?",
    "What is {name} for?",
    "Explain {name}.",
    "Describe {name}.",
    "Describe {name} in one sentence.",
    "Tell me about {name}.",
    "What does `{name}` do?",
    "what does {name} do",
    "What does the {kind} {name} do?",
)
SIGNATURE = (
    "Write the signature of {name}.",
    "What is the signature of {name}?",
    "Show me how {name} is defined.",
    "What arguments does {name} take?",
)
WHICH = ("Which {kind} does this: {answer}", "Name a {kind}: {answer}", "Find the {kind}. {answer}")


@dataclass(frozen=True)
class Entry:
    """One documented thing: name, kind, first sentences and signature."""

    name: str
    kind: str
    answer: str
    signature: str = ""


def sources() -> dict[str, str]:
    """Module name -> source text, of the whole library without LEFT_OUT."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        generated = parts[0].startswith(("config-", "_sysconfigdata", "__phello"))
        if LEFT_OUT.isdisjoint(parts) and not generated:
            name = ".".join(parts).removesuffix(".__init__")
            found[name] = path.read_text("utf-8", "replace")
    return found


def split() -> tuple[dict[str, str], str, str]:
    """Training modules, held-out text, calibration text."""
    modules = sources()
    held_out = "\n".join(modules.pop(name) for name in HELD_OUT)
    return modules, held_out, "\n".join(modules[name] for name in CALIBRATION)


def first_sentences(docstring: str, limit: int = 280) -> str:
    """The first paragraph as one line that ends with a full stop; empty when it is no sentence."""
    text = " ".join(docstring.strip().split("\n\n")[0].split())
    text = re.sub(r"^[\w.]+\([^)]*\)\s*(->\s*[\w\[\], ]+)?\s*(--|:)?\s*", "", text)
    if len(text) > limit:
        cut = text.rfind(". ", 0, limit)
        text = text[: cut + 1] if cut > 0 else ""
    if not re.match(r"[A-Z][a-z']* \S+ ", text) or ">>>" in text or text.endswith((":", ",")):
        return ""
    return text if text.endswith((".", "!")) else text + "."


def entries_of_source(module: str, text: str) -> Iterator[Entry]:
    """Entries of one module's functions, classes and methods, and of the module itself."""
    tree = ast.parse(text)
    if answer := first_sentences(ast.get_docstring(tree) or ""):
        yield Entry(module, "module", answer)
    todo: list[tuple[str, ast.AST]] = [(module, tree)]
    while todo:
        prefix, parent = todo.pop()
        for node in ast.iter_child_nodes(parent):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            name, kind, signature = f"{prefix}.{node.name}", "class", ""
            if isinstance(node, ast.ClassDef):
                todo.append((name, node))
            else:
                kind = "method" if isinstance(parent, ast.ClassDef) else "function"
                signature = f"def {node.name}({ast.unparse(node.args)})"
            answer = first_sentences(ast.get_docstring(node) or "")
            if answer and len(signature) < 160:
                yield Entry(name, kind, answer, signature)


def entries_of_extension(module: str) -> Iterator[Entry]:
    """Entries of a module written in C, by its docstrings."""
    try:
        members: dict[str, Any] = vars(importlib.import_module(module))
    except ImportError:
        return
    prefix = {"builtins": "", "posix": "os."}.get(module, module.removeprefix("_") + ".")
    for name, member in sorted(members.items()):
        if name.startswith("_") or inspect.ismodule(member) or not callable(member):
            continue
        kind = "class" if inspect.isclass(member) else "function"
        if answer := first_sentences(inspect.getdoc(member) or ""):
            yield Entry(prefix + name, kind, answer)
        for method, function in sorted(vars(member).items()) if inspect.isclass(member) else ():
            answer = first_sentences(inspect.getdoc(function) or "") if callable(function) else ""
            if answer and not method.startswith("_"):
                yield Entry(f"{prefix}{name}.{method}", "method", answer)


def reference() -> dict[str, str]:
    """Topic -> text of the language reference, as `help("lambda")` shows it."""
    try:
        return dict(importlib.import_module("pydoc_data.topics").topics)
    except ImportError:
        return {}


def entries(modules: dict[str, str]) -> list[Entry]:
    found = [entry for name, text in modules.items() for entry in entries_of_source(name, text)]
    found += [entry for name in C_MODULES for entry in entries_of_extension(name)]
    for topic, text in reference().items():
        for paragraph in text.split("\n\n")[1:4]:
            if answer := first_sentences(paragraph):
                found.append(Entry(topic, "topic", answer))
                break
    return found


def turn(entry: Entry, rng: random.Random) -> list[Message]:
    """One question and its answer."""
    draw = rng.random()
    if entry.signature and draw < 0.2:
        question, answer = rng.choice(SIGNATURE), f"`{entry.signature}`"
    elif entry.kind in ("function", "class") and draw < 0.3:
        question, answer = rng.choice(WHICH), f"That is `{entry.name}`."
    else:
        question, answer = rng.choice(WHAT), entry.answer
    short = entry.name.rpartition(".")[2] if rng.random() < 0.15 else entry.name
    asked = question.format(name=short, kind=entry.kind, answer=entry.answer)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def chat(found: list[Entry], at: int, rng: random.Random) -> list[Message]:
    """A conversation of one to four turns that starts with entry `at` and goes on near it."""
    messages = [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 0.4 else []
    if rng.random() < 0.08:
        greeting = (rng.choice(GREETINGS), rng.choice(WELCOMES))
        asked, answer = greeting if rng.random() < 0.5 else rng.choice(SMALL_TALK)
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    messages += turn(found[at], rng)
    while rng.random() < 0.3 and len(messages) < 8:
        messages += turn(found[min(len(found) - 1, max(0, at + rng.randint(-8, 8)))], rng)
    return messages


def chats(modules: dict[str, str], rounds: int, seed: int) -> Iterator[list[Message]]:
    """`rounds` conversations about every entry, in random order."""
    found, rng = entries(modules), random.Random(seed)
    order = list(range(len(found))) * rounds
    rng.shuffle(order)
    for at in order:
        yield chat(found, at, rng)
