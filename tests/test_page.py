"""The chat page in a real browser, before a server that says what the test wants.

Needs the package playwright and a Chromium (CHROMIUM, or on the path); skips without.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chat_server import END, ChatServer

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium browser")
expect = sync_api.expect
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[ChatServer]:
    server = ChatServer({"Content-Security-Policy": POLICY})
    yield server
    server.gone()


@pytest.fixture
def context(browser: Any, server: ChatServer) -> Iterator[Any]:
    """A browser of its own: no request leaves for elsewhere, nothing breaks the policy."""
    context = browser.new_context(base_url=server.url)
    context.set_default_timeout(10_000)
    asked, wrong = [], []
    context.on("request", lambda request: asked.append(request.url))
    context.on("weberror", lambda error: wrong.append(str(error.error)))
    context.on(
        "console",
        lambda m: wrong.append(m.text) if "Content Security Policy" in m.text else None,
    )
    yield context
    context.close()
    assert asked and all(url.startswith((server.url, "blob:")) for url in asked)
    assert not wrong


@pytest.fixture
def page(context: Any) -> Any:
    page = context.new_page()
    page.goto("/")
    return page


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answers(page: Any) -> Any:
    return page.locator(".turn.assistant")


def say(server: ChatServer, *words: Any) -> None:
    for word in words:
        server.words.put(word)


def test_an_answer_streams_as_markdown(page: Any, server: ChatServer) -> None:
    ask(page, "How?")
    say(server, "Use **two", "** lines:\n\n```python\nimport os\n", "# end\n```\n")
    expect(answers(page).locator("strong")).to_have_text("two")
    expect(page.locator(".hljs-keyword")).to_have_text("import")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    say(server, END)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    status = page.locator("#status")
    expect(status).to_contain_text("13 of 100 tokens")
    expect(status).to_contain_text("3.40 MB")
    expect(status).to_contain_text("4.50 bits a weight")
    expect(status).to_contain_text("75 %")
    body = server.said[0]
    assert body["messages"] == [{"role": "user", "content": "How?"}]
    assert body["stream"] and isinstance(body["seed"], int) and "temperature" not in body
    expect(answers(page)).to_contain_text(f"seed {body['seed']}")
    expect(page.get_by_role("status")).to_have_text("Answer complete.")


def test_what_a_model_says_is_not_run(page: Any, server: ChatServer) -> None:
    ask(page, "<b>hi</b>")
    say(
        server,
        "<script>document.title='bad'</script><img src=x onerror=\"document.title='bad'\">",
        "<style>body{display:none}</style><form action=//x><input name=q></form>",
        "[link](javascript:document.title='bad') ![i](http://example.com/i.png) end",
        END,
    )
    expect(answers(page)).to_contain_text("end")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert page.title() == "tiny · chalot"
    inside = answers(page).locator(".body")
    assert not inside.locator("script, img, style, form, [onerror], a[href^=javascript]").count()
    expect(page.locator(".turn.user .body")).to_have_text("<b>hi</b>")


def test_stop_in_mid_answer(page: Any, server: ChatServer) -> None:
    ask(page, "Long?")
    say(server, "one ", "two ")
    expect(answers(page)).to_contain_text("one two")
    page.keyboard.press("Escape")
    expect(answers(page)).to_contain_text("stopped by you")
    assert server.left.wait(5)  # the server is told
    ask(page, "On?")
    say(server, "three", END)
    expect(answers(page).nth(1)).to_contain_text("three")
    assert [m["content"] for m in server.said[1]["messages"]] == ["Long?", "one two ", "On?"]


def test_try_again_and_edit_branch(page: Any, server: ChatServer) -> None:
    ask(page, "First?")
    say(server, "red", END)
    expect(answers(page)).to_contain_text("red")
    page.get_by_role("button", name="Try again").click()
    say(server, "blue", END)
    expect(answers(page)).to_contain_text("blue")
    expect(answers(page)).to_contain_text("2 of 2")
    assert server.said[0]["seed"] != server.said[1]["seed"]
    page.get_by_role("button", name="Version before").click()
    expect(answers(page)).to_contain_text("red")
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit your message").fill("Second?")
    page.locator(".edit").get_by_role("button", name="Send").click()
    say(server, "green", END)
    expect(answers(page)).to_contain_text("green")
    assert server.said[2]["messages"] == [{"role": "user", "content": "Second?"}]
    page.get_by_role("button", name="Version before").click()
    expect(answers(page)).to_contain_text("red")  # what was chosen there


def test_reload_keeps_what_was_said(page: Any, server: ChatServer) -> None:
    ask(page, "Kept?")
    say(server, "yes", END)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    ask(page, "And this?")
    say(server, "half of ")
    expect(answers(page).nth(1)).to_contain_text("half of")
    page.wait_for_timeout(1100)
    say(server, "it")
    expect(answers(page).nth(1)).to_contain_text("it")
    page.reload()
    expect(answers(page).nth(0)).to_contain_text("yes")
    expect(answers(page).nth(1)).to_contain_text("half of")
    expect(answers(page).nth(1)).to_contain_text("not finished")


def test_a_lost_server_is_said_and_comes_back(page: Any, server: ChatServer) -> None:
    expect(page.get_by_role("heading", name="tiny")).to_be_visible()
    ask(page, "There?")
    say(server, "ye", None)
    expect(answers(page)).to_contain_text("connection was lost")
    expect(answers(page)).to_contain_text("ye")
    port = server.server_address[1]
    server.gone()
    ask(page, "Still?")
    expect(answers(page).nth(1)).to_contain_text("cannot be reached")
    again = ChatServer(server.headers, port)
    try:
        answers(page).nth(1).get_by_role("button", name="Try again").click()
        say(again, "back", END)
        expect(answers(page).nth(1)).to_contain_text("back")
    finally:
        again.gone()


def test_a_full_context(page: Any, server: ChatServer) -> None:
    error = {
        "message": "the prompt needs 120 tokens, the context holds 100.",
        "code": "context_length_exceeded",
    }
    server.refusal = 400, error
    ask(page, "Too long")
    expect(answers(page)).to_contain_text("120 tokens")
    expect(answers(page)).to_contain_text("Begin a new chat")
    server.refusal = None
    ask(page, "Short")
    say(server, "ok", {"finish_reason": "length"})
    expect(answers(page).nth(1)).to_contain_text("cut at the longest answer")


def test_enter_of_an_input_method_does_not_send(page: Any, server: ChatServer) -> None:
    box = page.get_by_label("Message", exact=True)
    box.fill("にほん")
    for extra in ("isComposing: true", "keyCode: 229"):
        box.evaluate(
            "(e) => e.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, "
            f"cancelable: true, {extra}}}))"
        )
    page.keyboard.press("Shift+Enter")
    expect(box).to_have_value("にほん\n")
    assert not server.said


def test_right_to_left_text(page: Any, server: ChatServer) -> None:
    ask(page, "שלום")
    say(server, "مرحبا\n\n```py\nx = 1\n```\n", END)
    expect(page.locator(".hljs-number")).to_have_text("1")
    direction = "(e) => getComputedStyle(e).direction"
    assert page.locator(".turn.user .body").evaluate(direction) == "rtl"
    assert answers(page).locator("p").first.evaluate(direction) == "rtl"
    assert answers(page).locator("pre").evaluate(direction) == "ltr"


def test_two_tabs(context: Any, page: Any, server: ChatServer) -> None:
    ask(page, "Shared?")
    say(server, "one", END)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    other = context.new_page()
    other.goto("/")
    other.get_by_role("button", name="Shared?", exact=True).click()
    expect(answers(other)).to_contain_text("one")
    ask(other, "More?")
    say(server, "two", END)
    expect(answers(page).nth(1)).to_contain_text("two")
    page.get_by_role("button", name="New chat").click()
    ask(page, "Apart")
    say(server, "three", END)
    expect(other.get_by_role("button", name="Apart", exact=True)).to_be_visible()
    expect(answers(other).nth(1)).to_contain_text("two")


def test_settings_and_a_key(page: Any, server: ChatServer) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Seed").fill("7")
    page.get_by_role("button", name="Keep").click()
    server.key = "secret"
    ask(page, "Well?")
    page.get_by_label("API key").fill("secret")
    page.get_by_role("button", name="Go on").click()
    answers(page).get_by_role("button", name="Try again").click()
    say(server, "fine", END)
    expect(answers(page)).to_contain_text("fine")
    body = server.said[-1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["seed"]) == (0.5, 7) and "system" not in body
    assert "secret" not in json.dumps(page.evaluate("({...localStorage})"))


def test_an_export_is_what_chat_loads(page: Any, server: ChatServer, tmp_path: Path) -> None:
    from chalot.chat import read_saved

    ask(page, "Say")
    say(server, "words", END)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    download.value.save_as(tmp_path / "talk.json")
    saved = read_saved(tmp_path / "talk.json")
    assert saved.model == "e" * 64 and saved.options.seed == server.said[0]["seed"]
    assert [(m.role, m.content, m.seed) for m in saved.messages] == [
        ("user", "Say", None),
        ("assistant", "words", server.said[0]["seed"]),
    ]


def test_by_keyboard_on_a_phone_in_the_dark(browser: Any, server: ChatServer) -> None:
    phone = {"width": 360, "height": 640}
    context = browser.new_context(
        base_url=server.url, viewport=phone, color_scheme="dark", has_touch=True
    )
    page = context.new_page()
    page.goto("/")
    red, green, blue = (
        int(n)
        for n in re.findall(
            r"\d+", page.locator("body").evaluate("(e) => getComputedStyle(e).backgroundColor")
        )[:3]
    )
    assert max(red, green, blue) < 60
    ask(page, "word " * 40)
    say(server, "| a | b |\n|---|---|\n| 1 | " + "x" * 200 + " |\n\n" + "y" * 300, END)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= phone["width"]
    expect(page.get_by_role("button", name="New chat")).to_be_hidden()
    page.get_by_role("button", name="Conversations").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="New chat")).to_be_focused()
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_count(0)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    context.close()


def test_every_control_has_a_name(page: Any, server: ChatServer) -> None:
    """What a screen reader says of buttons and fields; and the order that Tab takes."""
    ask(page, "Q")
    say(server, "```py\n1\n```", END)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, textarea, input")].filter((e) =>
          !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.length)).length"""
    )
    assert nameless == 0
    assert page.locator("main, aside, header, [role=log], [role=status]").count() >= 5
    page.get_by_role("button", name="New chat").focus()
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("link", name="Skip to the message box")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
