"""The page in a real browser (Debian's chromium, driven by playwright), before a scripted engine.

Breaks for: everyone who opens the server in a browser. Skipped where there is no chromium.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn
from convserve.engine.messages import EngineInfo, EngineStats
from fake_engine import INFO, FakeEngine
from msgspec.structs import replace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
TOKENIZER = Path(__file__).parents[1] / "data" / "tokenizer"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("there is no chromium", allow_module_level=True)
playwright.expect.set_options(timeout=20_000)  # a busy machine may be slow
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PLAIN_INFO = replace(INFO, conv_bytes_per_sequence=0)


class Site:
    """A server in a thread of its own; what it does to its engine, it does there."""

    def __init__(self, serve: Callable[..., Any], engine: FakeEngine, **settings: Any) -> None:
        self._serve, self._settings = serve, settings
        self.engine = engine
        self._port = 0
        self._loop: asyncio.AbstractEventLoop
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/"

    def start(self) -> None:
        """On the port it had before, if it had one."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", self._port))
        self._port = sock.getsockname()[1]
        app = self._serve(self.engine, **self._settings)
        self._server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=1)
        )
        ready = threading.Event()

        async def live() -> None:
            self._loop = asyncio.get_running_loop()
            serving = asyncio.create_task(self._server.serve([sock]))
            while not self._server.started:
                await asyncio.sleep(0.005)
            ready.set()
            await serving

        self._thread = threading.Thread(target=lambda: asyncio.run(live()), daemon=True)
        self._thread.start()
        assert ready.wait(10)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self._loop.call_soon_threadsafe(self.engine.step)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        async def met() -> None:
            async with asyncio.timeout(10):
                while not condition():
                    await asyncio.sleep(0.005)

        asyncio.run_coroutine_threadsafe(met(), self._loop).result(12)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tools:
        running = tools.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def site(serve: Callable[..., Any]) -> Iterator[Callable[..., Site]]:
    """site(engine, **settings) -> a served engine"""
    made: list[Site] = []

    def start(engine: FakeEngine, **settings: Any) -> Site:
        made.append(Site(serve, engine, **settings))
        return made[-1]

    yield start
    for one in made:
        one.stop()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """visit(url, **context options) -> an open page; complaints in its console fail the test"""
    contexts, complaints = [], []

    def go(url: str, **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(url)
        return page

    yield go
    for context in contexts:
        context.close()
    expected = re.compile(r"status of (401|429|503)|ERR_CONNECTION|ERR_INCOMPLETE")
    assert [text for text in complaints if not expected.search(text)] == []


def ask(page: Any, text: str) -> Any:
    """Sends a prompt with the keyboard; returns the reply's article."""
    playwright.expect(page.locator("#status")).to_have_text("ready")
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    return page.locator(".turn:not(.mine)").last


def finished(page: Any) -> None:
    playwright.expect(page.locator("#send")).to_be_visible()


def test_a_conversation_and_the_probabilities_of_its_tokens(
    site: Callable[..., Site], visit: Callable[..., Any]
) -> None:
    said = "<img src=x onerror=alert(1)> é <b>"
    here = site(FakeEngine(said))
    page = visit(here.url)
    reply = ask(page, "Hello <i>there</i>")
    finished(page)
    assert page.locator(".turn.mine .text").inner_text() == "Hello <i>there</i>"
    text = reply.locator(".text")
    assert text.text_content() == said
    assert page.locator("#transcript img, #transcript b:not(footer b), #transcript i").count() == 0
    tokens = text.locator(".t")
    assert tokens.all_text_contents() == list(said)  # the two bytes of é are one piece of text
    footer = reply.locator("footer").inner_text()
    for shown in (
        "tokens/s",
        "to the first",
        f"{len(said.encode()) + 1} tokens",
        "ended by itself",
    ):
        assert shown in footer
    tokens.nth(1).hover()
    tip = page.locator("#tip")
    assert tip.locator("tr").count() == 5
    assert tip.locator(".chosen").inner_text().split() == ["i", "60.7", "%"]
    page.mouse.move(1, 1)
    playwright.expect(tip).to_be_hidden()
    text.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    assert "60.7" in tip.inner_text()
    assert text.locator(".here").inner_text() == "b"
    page.keyboard.press("Escape")
    playwright.expect(tip).to_be_hidden()

    ask(page, "And?")
    finished(page)
    prompts = [bytes(request.prompt).decode() for request in here.engine.submitted]
    assert prompts[1] == f"user: Hello <i>there</i>\nassistant: {said}\nuser: And?\nassistant: "
    page.get_by_role("button", name="Again").click()
    finished(page)
    here.wait_until(lambda: len(here.engine.submitted) == 3)
    assert here.engine.submitted[2].prompt == here.engine.submitted[1].prompt
    page.get_by_role("button", name="New").click()
    assert page.locator(".turn").count() == 0


def test_a_text_goes_on_with_the_sampling_that_was_set(
    site: Callable[..., Site], visit: Callable[..., Any]
) -> None:
    here = site(FakeEngine("upon a time."))
    page = visit(here.url)
    page.get_by_text("Complete").click()
    page.fill("#temperature", "0.3")
    page.get_by_label("Top p, slider").fill("0.5")
    page.fill("#seed", "7")
    page.fill("#stops", "time")
    page.get_by_label("Ask for probabilities").uncheck()
    reply = ask(page, "Once ")
    finished(page)
    assert reply.locator(".text").text_content() == "Once upon a "
    assert reply.locator(".t").count() == 0
    [request] = here.engine.submitted
    assert bytes(request.prompt) == b"Once "
    params = request.params
    assert (params.temperature, params.top_p, params.seed) == (0.3, 0.5, 7)
    assert (params.max_tokens, params.logprobs) == (128, None)
    page.get_by_role("button", name="Back to the model's defaults").click()
    assert page.input_value("#temperature") == page.input_value("#top_p") == "1"
    assert page.input_value("#seed") == ""


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_it_can_be_stopped(site: Callable[..., Site], visit: Callable[..., Any], how: str) -> None:
    here = site(FakeEngine("hello", auto=False))
    page = visit(here.url)
    reply = ask(page, "a")
    here.wait_until(lambda: here.engine.live == 1)
    here.step(2)
    playwright.expect(reply.locator(".text")).to_have_text("he")
    playwright.expect(page.locator("#send")).to_be_hidden()
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    finished(page)
    here.wait_until(lambda: here.engine.live == 0)
    assert "stopped" in reply.locator("footer").inner_text()
    assert reply.locator(".text").text_content() == "he"


def test_a_server_that_wants_a_key(site: Callable[..., Site], visit: Callable[..., Any]) -> None:
    page = visit(site(FakeEngine(), api_keys=("right",)).url)
    notice = page.locator("#notice-text")
    playwright.expect(notice).to_have_text("This server wants an API key.")
    playwright.expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    playwright.expect(notice).to_have_text("The server does not know that key.")
    page.get_by_label("API key").fill("right")
    page.get_by_role("button", name="Use key").click()
    playwright.expect(notice).to_be_hidden()
    reply = ask(page, "a")
    finished(page)
    assert reply.locator(".text").text_content() == "hello world"
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    page.reload()
    playwright.expect(page.locator("#status")).to_have_text("ready")
    other = visit(page.url)
    playwright.expect(other.locator("#notice")).to_be_visible()


def test_a_server_that_goes_away_and_comes_back(
    site: Callable[..., Site], visit: Callable[..., Any]
) -> None:
    here = site(FakeEngine("hello", auto=False))
    page = visit(here.url)
    page.fill("#temperature", "0.25")
    reply = ask(page, "a")
    here.wait_until(lambda: here.engine.live == 1)
    here.step()
    playwright.expect(reply.locator(".text")).to_have_text("h")
    here.stop()
    playwright.expect(page.locator("#status")).to_have_text("unreachable")
    assert "cannot be reached" in page.locator("#notice-text").inner_text()
    finished(page)
    assert reply.locator(".failure").count() == 1
    here.engine = FakeEngine("back")
    here.start()
    playwright.expect(page.locator("#status")).to_have_text("ready")
    playwright.expect(page.locator("#notice")).to_be_hidden()
    assert page.input_value("#temperature") == "0.25"
    page.get_by_role("button", name="Try again").click()
    finished(page)
    assert page.locator(".turn:not(.mine) .text").inner_text() == "back"


def test_what_was_set_before_the_model_is_known_stays(
    site: Callable[..., Site], visit: Callable[..., Any], tmp_path: Path
) -> None:
    """A quick hand beats a slow server: the model's defaults must not undo what was typed."""
    shutil.copytree(TOKENIZER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7, "top_p": 0.9}')
    # with a key wanted, nothing is known of the model until it is given
    here = site(FakeEngine("hello"), folder=tmp_path, api_keys=("right",))
    page = visit(here.url)
    page.fill("#temperature", "0.25")
    page.fill("#system", "Be brief.")
    page.get_by_label("API key").fill("right")
    page.get_by_role("button", name="Use key").click()
    playwright.expect(page.locator("#status")).to_have_text("ready")
    assert page.input_value("#top_p") == "0.9"
    assert page.input_value("#temperature") == "0.25"
    assert page.get_by_label("Temperature, slider").input_value() == "0.25"
    assert page.input_value("#system") == "Be brief."
    page.get_by_role("button", name="Back to the model's defaults").click()
    assert page.input_value("#temperature") == "0.7"


def test_a_refusal_is_told_in_the_servers_words(
    site: Callable[..., Site], visit: Callable[..., Any]
) -> None:
    here = site(FakeEngine(auto=False), max_queue=0)
    page = visit(here.url)
    for _ in range(4):
        page.evaluate(
            "headers => { fetch('v1/completions', {method: 'POST', headers,"
            """ body: '{"prompt": "a"}'}).catch(() => {}) }""",
            {"Content-Type": "application/json"},
        )
    here.wait_until(lambda: here.engine.live == 4)
    reply = ask(page, "b")
    finished(page)
    assert "too many requests are waiting" in reply.locator(".failure").inner_text()
    assert re.search(r"Try again in \d+ s\.", reply.locator(".failure").inner_text())


@pytest.mark.parametrize("info", [PLAIN_INFO, INFO], ids=["plain", "conv"])
def test_the_engine_is_drawn(
    site: Callable[..., Site], visit: Callable[..., Any], info: EngineInfo
) -> None:
    engine = FakeEngine()
    engine.info = info
    engine.totals = EngineStats(
        running=3, waiting=2, pages_total=64, pages_used=16, pages_kept=8, slots_total=4,
        slots_used=3, tails_total=9, tails_stored=5, prefix_queries=50, prefix_hits=20,
    )  # fmt: skip
    here = site(engine)
    page = visit(here.url)
    playwright.expect(page.locator("#status")).to_have_text("writing")
    engine.totals = replace(engine.totals, steps=10, step_seconds_total=0.05, step_tokens=7)
    tile = "figure:has(figcaption:text-matches('^{}')) output"
    for name, shown in {
        "Step time": "5.0 ms",
        "Rows a step": "7",
        "Sequences": "3 running2 waiting",
        "KV pages": "16 of 648 kept",
        "Prompt from cache": "40.0 %",
    }.items():
        playwright.expect(page.locator(tile.format(name))).to_have_text(shown)
    for name, shown in {"Conv slots": "3 of 4", "Conv tails": "5 of 9"}.items():
        place = page.locator(tile.format(name))
        if info is PLAIN_INFO:
            playwright.expect(place).to_be_hidden()
        else:
            playwright.expect(place).to_have_text(shown)
    assert all(page.locator("figure svg").evaluate_all("all => all.map(s => s.ariaLabel)"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_every_control_has_a_name(
    site: Callable[..., Site], visit: Callable[..., Any], scheme: str
) -> None:
    here = site(FakeEngine("a-very-long-word" * 7))
    size = {"width": 360, "height": 640}
    page = visit(here.url, viewport=size, color_scheme=scheme, has_touch=True, is_mobile=True)
    panel = page.locator("#panel")
    playwright.expect(panel).to_be_hidden()
    ask(page, "a" * 80)
    finished(page)
    wide = "document.documentElement.scrollWidth"
    assert page.evaluate(wide) == 360
    page.get_by_role("button", name="Panel").click()
    playwright.expect(panel).to_be_visible()
    assert page.evaluate(wide) == 360
    page.keyboard.press("Escape")
    playwright.expect(panel).to_be_hidden()
    page.locator(".t").first.tap()
    playwright.expect(page.locator("#tip")).to_be_visible()
    box = page.locator("#tip").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    controls = "button, input, textarea, select, summary"
    nameless = page.locator(controls).evaluate_all(
        "all => all.filter(c => !(c.labels?.length || c.ariaLabel || c.textContent.trim()))"
        ".map(c => c.outerHTML)"
    )
    assert nameless == []
    tells = "e => getComputedStyle(document.body)[e]"
    dark = scheme == "dark"
    paper = [int(part) for part in re.findall(r"\d+", page.evaluate(tells, "backgroundColor"))]
    assert (sum(paper[:3]) < 128 * 3) == dark
