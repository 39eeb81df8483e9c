"""The chat page in a real Chromium, as somebody uses it."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.server import Running, make_home, running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")

# Stops an answer when its first words are shown: a click of Playwright's may come after its last.
CLICKS_STOP = """log => new MutationObserver(() => {
  const stop = document.getElementById("stop");
  if (!stop.hidden && log.querySelector(".writing")?.textContent) stop.click();
}).observe(log, { childList: true, subtree: true })"""

HOSTILE = (
    "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">\n\n"
    "[link](javascript:document.title='run') ![i](http://203.0.113.7/i.png) "
    "<svg onload=\"document.title='run'\"> \x1b[2J \u202eevil\n\n"
    "<style>body{display:none}</style> [good](https://example.org/) `<b>` \n\n```\n<i>\n```"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(make_home(tmp_path_factory.mktemp("home"))) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as made:
        found = made.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Seen:
    """A tab, with what it asked for and what went wrong in it."""

    def __init__(self, context: Any, url: str):
        self.page = context.new_page()
        self.page.set_default_timeout(45_000)
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on(
            "console",
            lambda m: self.problems.append(m.text) if m.type == "error" else None,
        )
        self.url = url
        self.page.goto(url)
        self.page.locator("#model option").first.wait_for(state="attached")

    def send(self, text: str) -> None:
        self.page.locator("#send").wait_for()  # nothing is being written
        self.page.fill("#question", text)
        self.page.press("#question", "Enter")

    def answered(self, count: int) -> None:
        """Waits until this many answers are there, and nothing comes any more."""
        self.page.locator(".assistant .about", has_text="tokens/s").nth(count - 1).wait_for()
        self.page.locator("#send").wait_for()

    def check(self) -> None:
        assert self.problems == []
        assert all(r.startswith((self.url, "data:", "blob:")) for r in self.requests)


@pytest.fixture
def tab(server: Running, browser: Any) -> Iterator[Seen]:
    context = browser.new_context()
    seen = Seen(context, f"{server.url}/")
    seen.page.click("#open-settings")
    seen.page.fill("#number-max_tokens", "8")
    seen.page.click("#open-settings")
    yield seen
    seen.check()
    context.close()


def texts(tab: Seen, of: str) -> list[str]:
    return [text.strip() for text in tab.page.locator(f"{of} .said").all_inner_texts()]


def test_talk_reload_and_go_on(tab: Seen, server: Running) -> None:
    tab.send("why?")
    tab.answered(1)
    tab.send("yes <b>bold</b>")
    tab.answered(2)
    before = texts(tab, ".turn")
    assert before[0] == "why?" and before[2] == "yes <b>bold</b>"
    assert "from the cache" in tab.page.locator(".about").last.inner_text()
    tab.page.reload()
    tab.answered(2)
    assert texts(tab, ".turn") == before
    tab.send("sea")
    tab.answered(3)
    tab.page.fill("#search", "sea")
    tab.page.locator("#conversations button", has_text="why?").first.wait_for()
    tab.page.fill("#search", "nothing like it")
    tab.page.locator("#conversations button").first.wait_for(state="detached")
    tab.page.fill("#search", "")


def test_edit_regenerate_and_branches(tab: Seen) -> None:
    tab.send("why?")
    tab.answered(1)
    tab.page.locator(".user .about button", has_text="Edit").click()
    tab.page.fill(".edit", "sea?")
    tab.page.press(".edit", "Enter")
    tab.page.locator(".user .branch", has_text="2/2").wait_for()
    tab.answered(1)
    assert texts(tab, ".user") == ["sea?"]
    tab.page.locator(".user .about button", has_text="‹").click()
    tab.page.locator(".user .branch", has_text="1/2").wait_for()
    assert texts(tab, ".user") == ["why?"]
    tab.page.locator(".assistant .about button", has_text="Again").click()
    tab.page.locator(".assistant .branch", has_text="2/2").wait_for()
    tab.answered(1)


# Once an answer is asked for, the conversation reaches the page again when `release` is called.
HOLDS = r"""() => {
  const real = window.fetch;
  const held = new Promise((done) => { window.release = done; });
  window.fetch = async (path, options) => {
    if (options?.method === "POST" && /answers$/.test(path)) window.asked = true;
    const isConversation = options?.method === "GET" && /conversations\/\w+$/.test(path);
    const isHeld = isConversation && window.asked;
    const answer = await real(path, options);
    if (isHeld) {
      window.holding = true;
      await held;
    }
    return answer;
  };
}"""


def test_a_branch_that_is_chosen_while_the_page_looks_again_stays(tab: Seen) -> None:
    tab.send("why?")
    tab.answered(1)
    tab.page.evaluate(HOLDS)
    tab.page.locator(".assistant .about button", has_text="Again").click()
    tab.page.wait_for_function("() => window.holding")
    tab.page.locator(".assistant .about button", has_text="‹").click()
    tab.page.locator(".assistant .branch", has_text="1/2").wait_for()
    with tab.page.expect_response(lambda it: "search=" in it.url):  # of the list, by the choice
        tab.page.evaluate("() => window.release()")
    tab.answered(1)
    tab.page.wait_for_timeout(300)
    assert tab.page.locator(".branch").all_inner_texts() == ["1/2"]


def test_stop_keeps_what_came(tab: Seen, server: Running) -> None:
    tab.page.click("#open-settings")
    tab.page.fill("#number-max_tokens", "100")
    tab.page.click("#open-settings")
    engine = server.models["tuned"].engine
    tab.page.locator("#log").evaluate(CLICKS_STOP)
    tab.send("why?")
    tab.page.locator("#send").wait_for()
    tab.page.locator(".about button", has_text=re.compile("Again|Answer")).first.wait_for()
    assert engine.counts().running <= 1


def test_the_settings_begin_with_those_of_the_server(tab: Seen) -> None:
    tab.page.reload()
    for name, value in (("temperature", "0.8"), ("top_k", "50"), ("max_tokens", "512")):
        playwright.expect(tab.page.locator(f"#number-{name}")).to_have_value(value)


@pytest.mark.long
def test_a_question_that_was_not_answered_can_be(tab: Seen) -> None:
    """A question was refused, as it is too long; another question takes its place."""
    tab.page.on("console", lambda _: tab.problems.clear())  # the browser tells of the refusal
    tab.send("yes " * 200)
    tab.page.locator("[role=alert]", has_text="shorten it").wait_for()
    tab.page.locator(".user button", has_text="Answer").click()
    tab.page.locator("[role=alert]", has_text="shorten it").first.wait_for()
    tab.send("why?")
    tab.answered(1)
    assert texts(tab, ".user") == ["why?"]
    tab.problems.clear()


@pytest.mark.long
def test_an_answer_that_was_cut_off_goes_on(tab: Seen) -> None:
    """Without chance, an answer in two parts is the answer at once, ids included."""
    found = []
    for parts in ([6, 12], [18]):
        tab.page.click("#new")
        for part, most in enumerate(parts):
            tab.page.click("#open-settings")
            tab.page.fill("#number-temperature", "0")
            tab.page.fill("#number-max_tokens", str(most))
            tab.page.click("#open-settings")
            if part:
                tab.page.locator(".assistant button", has_text="Go on").click()
                tab.page.locator(".assistant .about", has_text="of 128").wait_for()
            else:
                tab.send("why?")
            tab.answered(1)
        tab.page.reload()
        tab.answered(1)
        number = tab.page.evaluate("Number(sessionStorage.getItem('manta-open'))")
        reply = tab.page.request.get(f"{tab.url}api/conversations/{number}").json()
        (answer,) = [turn for turn in reply["turns"] if turn["role"] == "assistant"]
        assert len(answer["ids"]) == len(answer["tokens"])
        found.append((answer["text"], answer["ids"], texts(tab, ".assistant")))
    assert found[0] == found[1]


def test_a_long_conversation_is_drawn_where_it_changes(tab: Seen, server: Running) -> None:
    """Turns that did not change keep their elements and the focus, however many there are."""
    one, parent = server.kept.new(title="a long one"), None
    for n in range(150):
        question = server.kept.ask(one, parent, f"question {n}")
        parent = server.kept.answer(one, question, "base", {})
        server.kept.write(parent, f"answer {n}", "complete", ids=(1,))
    tab.page.locator("#conversations button", has_text="a long one").first.click()
    tab.page.locator(".user .said", has_text="question 149").wait_for()
    tab.page.evaluate("for (const e of document.querySelectorAll('.turn')) e.wasHere = true")
    tab.page.locator(".user button", has_text="Edit").nth(148).focus()
    tab.send("why?")
    tab.page.locator(".assistant .about", has_text="tokens/s").last.wait_for()
    tab.page.locator("#send").wait_for()
    kept = "[...document.querySelectorAll('.turn')].filter(e => e.wasHere).length"
    assert tab.page.evaluate(kept) == 300
    assert tab.page.locator(".turn").count() == 302


def test_only_what_was_purified_becomes_elements(tab: Seen) -> None:
    """The browser itself refuses text as elements, whatever the page's modules do."""
    refused = "try { document.body.innerHTML = '<b>x</b>'; '' } catch (e) { e.name }"
    assert tab.page.evaluate(refused) == "TypeError"
    tab.problems.clear()  # the browser tells of it


def test_what_the_model_saw(tab: Seen) -> None:
    tab.send("why?")
    tab.answered(1)
    tab.page.check("#show-tokens")
    tab.page.locator(".tokens span").first.hover()
    tab.page.locator("#inspector tr").nth(4).wait_for()
    assert "(this one)" in tab.page.locator("#inspector").inner_text()
    tab.page.uncheck("#show-tokens")


def test_turns_that_are_left_out_are_marked(tab: Seen) -> None:
    for n in range(6):
        tab.send(f"question {n} yes yes yes yes")
        tab.answered(n + 1)
    mark = tab.page.locator(".mark").last.inner_text()
    assert "left out of what the model saw" in mark and "context of 128 tokens is full" in mark


def test_side_by_side(tab: Seen) -> None:
    tab.page.select_option("#second", "base")
    tab.send("why?")
    tab.page.locator(".side-by-side .about", has_text="tokens/s").nth(1).wait_for()
    tab.page.locator("#send").wait_for()
    assert tab.page.locator(".side-by-side section").count() == 2
    tab.page.locator("button", has_text="Continue with this one").click()
    tab.page.select_option("#second", "")
    tab.send("and?")
    tab.answered(3)


def test_two_tabs_see_each_other(tab: Seen, browser: Any) -> None:
    other = Seen(tab.page.context, tab.url)
    tab.send("ray sea ray")
    tab.answered(1)
    found = other.page.locator("#conversations button", has_text="ray sea ray").first
    found.click()
    other.answered(1)
    tab.send("yes")
    tab.answered(2)
    other.answered(2)
    other.check()


def test_a_hostile_answer_is_text(tab: Seen, server: Running) -> None:
    """Scripts, handlers, addresses and controls in answers, questions and titles do nothing."""
    kept = server.kept
    one = kept.new(title="<img src=x onerror=\"document.title='run'\">")
    question = kept.ask(one, None, HOSTILE)
    answer = kept.answer(one, question, "tuned", {})
    tokens = [["<script>x</script>", -1.0, [["<img src=x>", -2.0]]]]
    kept.write(answer, HOSTILE, "complete", tokens=tokens)
    tab.page.locator("#conversations button", has_text="<img src=x").first.click()
    tab.page.locator(".assistant a", has_text="good").wait_for()
    assert tab.page.title() != "run"
    said = tab.page.locator(".assistant .said")
    assert said.locator("script, img, svg, style, [onerror], [onload]").count() == 0
    links = said.locator("a").evaluate_all("all => all.map(a => [a.href, a.rel, a.target])")
    image, good = "http://203.0.113.7/i.png", "https://example.org/"  # `check`: not asked for
    assert links == [[at, "noopener noreferrer", "_blank"] for at in (image, good)]
    shown = tab.page.locator("#log").inner_text()
    assert "\x1b" not in shown and "\u202e" not in shown and "\\u001b" in shown
    tab.page.check("#show-tokens")
    assert tab.page.locator(".tokens").inner_text() == "<script>x</script>"
    tab.page.locator(".tokens span").focus()
    tab.page.locator("#inspector td", has_text="<img src=x>").wait_for()
    tab.page.uncheck("#show-tokens")


def test_deleted_and_back_and_exported(tab: Seen, tmp_path: Path) -> None:
    tab.send("ray yes sea")
    tab.answered(1)
    tab.page.click("#open-settings")
    with tab.page.expect_download() as download:
        tab.page.click("#export")
    download.value.save_as(tmp_path / "one.jsonl")
    (row,) = map(json.loads, (tmp_path / "one.jsonl").read_text().splitlines())
    assert row["messages"][0] == {"role": "user", "content": "ray yes sea"}
    tab.page.once("dialog", lambda dialog: dialog.accept())
    tab.page.click("#delete")
    tab.page.locator("#undo").wait_for()
    tab.page.locator(".welcome").wait_for()
    tab.page.click("#undo-delete")
    tab.page.locator(".user .said", has_text="ray yes sea").wait_for()


def test_on_a_phone_and_in_the_dark(server: Running, browser: Any) -> None:
    context = browser.new_context(
        viewport={"width": 390, "height": 780}, color_scheme="dark", has_touch=True
    )
    seen = Seen(context, f"{server.url}/")
    background = "getComputedStyle(document.body).backgroundColor"
    assert seen.page.locator("body").evaluate(f"() => {background}") == "rgb(25, 25, 24)"
    assert not seen.page.locator("#search").is_visible()
    seen.page.click("#open-sidebar")
    seen.page.locator("#search").wait_for()
    seen.page.keyboard.press("Escape")
    seen.page.locator("#search").wait_for(state="hidden")
    width = seen.page.locator("html").evaluate("html => html.scrollWidth")
    assert width <= 390
    seen.check()
    context.close()


def test_every_control_has_a_name(tab: Seen) -> None:
    """What a screen reader says of each button and field is not empty."""
    tab.send("why?")
    tab.answered(1)
    tab.page.click("#open-settings")
    for role in ("button", "textbox", "combobox", "spinbutton", "searchbox", "checkbox"):
        for control in tab.page.get_by_role(role).all():
            snapshot = control.aria_snapshot()
            assert '"' in snapshot, snapshot


def test_the_server_goes_away_and_comes_back(tmp_path: Path, browser: Any) -> None:
    home = make_home(tmp_path)
    context = browser.new_context()
    with running(home) as first:
        port = int(first.url.rpartition(":")[2])
        seen = Seen(context, f"{first.url}/")
        seen.send("why?")
        seen.answered(1)
    seen.page.locator("#away").wait_for()
    with running(home, port=port):
        seen.page.locator("#away").wait_for(state="hidden")
        seen.send("yes?")
        seen.answered(2)
    context.close()
