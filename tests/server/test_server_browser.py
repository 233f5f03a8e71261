"""The page in a browser: a chat with the built-in model, and what it shows when things go wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import browser
import pytest
from browser import Page
from dialect_texts import WRITERS
from server_fakes import EOS, FakeEngine, RunningServer, running_server, tokenizer, wait_until
from server_scripted import WEATHER, scripted

from miniserve.server.config import ServerConfig

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")

ANSWERS = "document.querySelectorAll('.assistant')"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser.browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page
        assert page.errors == []


def words(text: str) -> list[int]:
    return [*tokenizer().encode(text), EOS]


def connected(page: Page, server: RunningServer, width: int = 1280, dark: bool = False) -> None:
    page.open(f"{server.root}/", width, dark=dark)
    page.wait("document.getElementById('state').textContent === 'connected'")


def say(page: Page, text: str) -> None:
    page.run("document.getElementById('prompt').focus()")
    page.type(text)
    page.press("Enter")


def texts(page: Page, selector: str) -> list[str]:
    found: list[str] = page.run(f"[...document.querySelectorAll({selector!r})].map(each => each.innerText.trim())")
    return found


def click(page: Page, words: str) -> None:
    """The last button with these words; a user finds it by name, too."""
    script = f"[...document.querySelectorAll('button')].filter(each => each.textContent === {words!r}).at(-1).click()"
    page.run(script)


def answered(page: Page, count: int) -> None:
    page.wait(f"{ANSWERS}.length === {count} && {ANSWERS}[{count - 1}].querySelector('.actions')")


def test_a_conversation_with_reasoning_parameters_retry_and_edit(page: Page) -> None:
    engine = FakeEngine(script=words("<think>\nA bear.\n</think>\n\nHello <b>Zoë</b>\n```\ncode\n```"))
    with running_server(engine, reasoning_parser="qwen3") as server:
        connected(page, server)
        page.run("document.querySelector('[name=temperature]').value = '0.25'")
        page.run("document.querySelector('[name=stop]').value = 'END'")
        page.run("document.querySelector('[name=system]').value = 'Be kind.'")
        say(page, "Who is there?")
        answered(page, 1)
        assert page.run("document.querySelector('.assistant > .text').textContent") == "Hello <b>Zoë</b>\ncode\n"
        assert texts(page, ".assistant pre") == ["code"]
        assert page.run("document.querySelector('.reasoning').open") is False
        assert page.run("document.querySelector('.reasoning .text').textContent") == "A bear."
        (note,) = texts(page, ".assistant .note")
        assert " in, " in note and " out · first after " in note
        prompt, params = engine.seen[0]
        assert params.temperature == 0.25 and params.stop == ("END",)
        asked = tokenizer().decode(prompt, False)
        assert "Be kind." in asked and "Who is there?" in asked
        click(page, "Retry")
        page.wait(f"{ANSWERS}.length === 1 && {ANSWERS}[0].querySelector('.actions button:not(:disabled)')")
        assert len(engine.seen) == 2 and engine.seen[1][0] == prompt
        click(page, "Edit")
        page.run("document.activeElement.select()")
        page.type("Who else?")
        page.press("Enter")
        page.wait(f"{ANSWERS}.length === 1 && {ANSWERS}[0].querySelector('.actions button:not(:disabled)')")
        assert texts(page, ".user .text") == ["Who else?"] and len(engine.seen) == 3
        assert "Who is there?" not in tokenizer().decode(engine.seen[2][0], False)
        say(page, "And now?")
        answered(page, 2)
        history = tokenizer().decode(engine.seen[3][0], False)
        assert "Who else?" in history and "Zoë" in history and "And now?" in history
        page.run("document.querySelector('[name=top_p]').value = '7'")
        say(page, "Too much")
        assert page.run("document.getElementById('parameters').open") and len(engine.seen) == 4
        page.run("document.querySelector('[name=top_p]').value = ''")
        page.run("document.querySelector('[name=max_tokens]').value = '100000'")
        page.run("document.getElementById('prompt').focus()")
        page.press("Enter")
        answered(page, 3)
        assert "maximum context length" in texts(page, ".assistant .error")[0]  # the server's own words


def test_an_answer_is_stopped_by_keyboard(page: Page) -> None:
    with running_server(FakeEngine(hold_at=3)) as server:
        connected(page, server)
        say(page, "Go on and on")
        page.wait("document.querySelector('.assistant .text').textContent")
        assert page.run("!document.getElementById('stop').hidden && document.getElementById('send').hidden")
        page.press("Escape")
        page.wait("document.querySelector('.assistant .note')")
        assert texts(page, ".assistant .note") == ["stopped"]
        wait_until(lambda: server.engine.aborted == 1)
        page.wait("!document.getElementById('send').hidden")
        # What has the focus and vanishes hands it on, so that the next Tab does not start at the top.
        page.run("[...document.querySelectorAll('button')].find(each => each.textContent === 'Retry').focus()")
        page.press("Enter")
        page.wait("!document.getElementById('stop').hidden")
        assert page.run("document.activeElement.id") == "messages"
        page.run("document.getElementById('stop').focus()")
        page.press("Enter")
        page.wait("!document.getElementById('send').hidden")
        assert page.run("document.activeElement.id") == "send"


def test_a_new_chat_ends_the_answer_that_runs(page: Page) -> None:
    with running_server(FakeEngine(hold_at=3)) as server:
        connected(page, server)
        say(page, "Go on and on")
        page.wait("document.querySelector('.assistant .text').textContent")
        click(page, "New chat")
        wait_until(lambda: server.engine.aborted == 1)
        assert page.run("!document.getElementById('send').hidden && document.getElementById('stop').hidden")
        assert page.run("document.querySelectorAll('article').length") == 0
        server.call(server.engine.gate.set)
        say(page, "Something else")
        answered(page, 1)
        assert texts(page, ".user .text") == ["Something else"]


def test_a_growing_answer_leaves_alone_what_it_has_said(page: Page) -> None:
    script = words("<think>\nHm.\n</think>\n\nOne <img src=x onerror=alert(1)>\n\nTwo\n```\ncode\n```\n**Three** `4`")
    with running_server(FakeEngine(script=script, hold_at=len(script) - 8), reasoning_parser="qwen3") as server:
        connected(page, server)
        say(page, "Count")
        page.wait("document.querySelector('.assistant > .text')?.textContent.includes('Two')")
        page.run("document.querySelector('.reasoning summary').focus()")
        page.press("Enter")
        page.run("getSelection().selectAllChildren(document.querySelector('.assistant > .text > div'))")
        server.call(server.engine.gate.set)
        answered(page, 1)
        assert page.run("document.querySelector('.assistant > .text').textContent").endswith("\ncode\n**Three** `4`")
        assert texts(page, ".text strong, .text div > code") == ["**Three**", "`4`"]  # in weight, and as it was written
        assert texts(page, ".assistant .note")[0].endswith(" tokens/s")
        assert page.run("getSelection().toString().trim()") == "One <img src=x onerror=alert(1)>"
        assert page.run("document.activeElement.textContent") == "Reasoning"
        assert page.run("document.querySelector('.reasoning').open")


def test_a_call_is_shown_and_its_result_goes_back(page: Page, tmp_path: Path) -> None:
    with contextmanager(scripted)("hermes", tmp_path / "model") as model:
        connected(page, model.server)
        page.run("document.querySelector('[name=tools]').value = 'no JSON'")
        say(page, "Weather in Bern?")
        assert page.run("document.querySelector('[name=tools]').matches(':invalid')")
        page.run(f"document.querySelector('[name=tools]').value = {json.dumps(json.dumps([WEATHER]))}")
        model.says(WRITERS["hermes"]([("get_weather", {"city": "Bern"})]))
        page.run("document.getElementById('prompt').focus()")
        page.press("Enter")
        answered(page, 1)
        assert texts(page, ".call p") == ["calls get_weather"]
        assert texts(page, ".call pre") == ['{\n  "city": "Bern"\n}']
        model.says("It snows.")
        page.run("document.querySelector('.call textarea').focus()")
        page.type("snow, -3 °C")
        click(page, "Send results")
        answered(page, 2)
        assert "snow, -3 °C" in model.prompt and '"Bern"' in model.prompt
        assert texts(page, ".assistant > .text")[1] == "It snows."
        # A call that was cut asks for no result, and the conversation goes on without it.
        model.says(WRITERS["hermes"]([("get_weather", {"city": "Chur"})]).partition("ur")[0])
        say(page, "And in Chur?")
        answered(page, 3)
        assert texts(page, ".assistant:last-child pre") == ['{"city": "Ch']
        assert texts(page, ".assistant:last-child .actions button") == ["Retry"]
        model.says("It rains.")
        say(page, "Well?")
        answered(page, 4)
        assert texts(page, ".assistant > .text")[3] == "It rains." and '"Ch' not in model.prompt


def test_a_key_is_asked_for_kept_in_the_tab_and_used(page: Page) -> None:
    with running_server(FakeEngine(script=words("Hi.")), api_keys=("sesame",)) as server:
        page.open(f"{server.root}/", 1280)
        page.wait("document.getElementById('key-dialog').open")
        page.type("wrong")
        page.press("Enter")
        page.wait("document.getElementById('key-dialog').open && !document.getElementById('key-wrong').hidden")
        page.press("Escape")
        page.wait("!document.getElementById('lost').hidden")  # who declined is not asked again by what merely looks
        assert texts(page, "#lost-why") == ["The server asks for an API key. Trying again."]
        say(page, "Hello")
        page.wait("document.getElementById('key-dialog').open")
        page.press("Escape")
        answered(page, 1)
        assert texts(page, ".assistant .error") == ["The server asks for an API key."]
        click(page, "Retry")
        page.wait("document.getElementById('key-dialog').open")
        page.type("sesame")
        page.press("Enter")
        page.wait("document.getElementById('state').textContent === 'connected'")
        page.wait(f"{ANSWERS}[0].querySelector('.note')?.textContent")
        assert texts(page, ".assistant > .text") == ["Hi."]
        connected(page, server)  # loaded again, without a question
        assert page.run("sessionStorage.getItem('miniserve-api-key')") == "sesame"
        assert page.run("localStorage.length") == 0 and page.run("document.cookie") == ""


def test_a_lost_server_is_shown_and_found_again(page: Page) -> None:
    lost = "!document.getElementById('lost').hidden"
    with running_server(FakeEngine(hold_at=2)) as server:
        connected(page, server)
        say(page, "Hello")
        page.wait("document.querySelector('.assistant .text').textContent")
        server.call(server.engine.kill, "The engine died: killed by signal 9.")
        page.wait(lost)
        assert "killed by signal 9" in texts(page, ".assistant .error")[0]
        server.stop()
        page.wait("document.getElementById('lost-why').textContent.startsWith('The server does not answer.')")
        again = RunningServer(FakeEngine(script=words("Back.")), ServerConfig(), server.port)
        try:
            page.wait("document.getElementById('state').textContent === 'connected'")
            assert page.run("document.getElementById('lost').hidden")
            click(page, "Retry")
            page.wait(f"{ANSWERS}[0].querySelector('.note')")
            assert texts(page, ".assistant > .text") == ["Back."]
        finally:
            again.stop()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_engine_is_seen_at_every_width(page: Page, width: int, dark: bool, tmp_path: Path) -> None:
    with running_server() as server:
        connected(page, server, width, dark)
        narrow = width == 390
        assert page.run("document.getElementById('engine').hidden") is narrow
        if narrow:
            assert server.engine.num_looks == 0  # who does not watch does not ask
            page.run("document.getElementById('show-engine').focus()")
            page.press("Enter")
        page.wait("document.getElementById('running').textContent === '0 of 256'")
        assert "of 64 blocks of 16 tokens are held" in texts(page, "#pool-text")[0]
        assert texts(page, "#rows li") == ["0: 44", "1: 60"]
        assert page.run("document.documentElement.scrollWidth") <= width
        # The grid: squares of 10 pixels every 12, shared ones with a hole.
        pixel = "[...document.getElementById('pool').getContext('2d').getImageData({}, 5, 1, 1).data].join()"
        hole, shared, own, other, kept, free = (
            page.run(pixel.format(place)) for place in (5, 1, *(5 + 12 * index for index in (2, 3, 5, 20)))
        )
        assert hole == "0,0,0,0" and len({hole, shared, own, other, kept, free}) == 6
        shot = tmp_path / "page.png"
        page.screenshot(shot)
        assert shot.stat().st_size > 5000
