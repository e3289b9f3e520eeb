"""The page as people have it: Chromium, two engines, the bundled task; and nothing from anywhere else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
import uvicorn

from burnish.serve.compare_samples import samples
from burnish.serve.keys import KeyRing
from burnish.serve.page_access import PageAccess
from burnish.serve.server import bind, url_of

pytestmark = [pytest.mark.browser, pytest.mark.slow]
SAMPLE = samples()[56]
PATIENCE_MS = 180_000


def _chromium() -> str:
    found = shutil.which("chromium")
    missing = "chromium is not installed" if found is None else None
    try:
        import playwright  # noqa: F401
    except ModuleNotFoundError:
        missing = "playwright is not installed"
    if missing is not None:
        if os.environ.get("BURNISH_REQUIRE_SERVICES") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    return str(found)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that has learned one answer by heart."""
    import burnish

    folder = tmp_path_factory.mktemp("tuned")
    row = {"question": SAMPLE.question, "context": SAMPLE.context, "answer": SAMPLE.answer}
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4, encoding="utf-8")
    burnish.tune(
        "burnish-sql-base",
        data=burnish.DataConfig(source=str(folder / "rows.jsonl")),
        out=folder / "by-heart",
        config=burnish.TrainConfig(steps=16, micro_batch_size=4, learning_rate=2e-3, warmup=0),
        source=burnish.Source(threads=1),
    )
    return folder / "by-heart"


@pytest.fixture(scope="module")
def url(tuned: Path) -> Iterator[str]:
    """`burnish compare`, which has to end in order and say nothing but what it should."""
    if shutil.which("chromium") is None:
        _chromium()
    command = [sys.executable, "-m", "burnish", "compare", "burnish-sql-base", str(tuned), "--port", "0", "--json"]
    process = subprocess.Popen(
        [*command, "--threads", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("}"):
            break
    try:
        assert lines, process.communicate(timeout=60)[1]
        record = json.loads("".join(lines))
        assert len({model["weights"] for model in record["models"]}) == 2
        yield record["url"]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            _, said = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == 0, said
    assert [line for line in said.splitlines() if not line.startswith("SIGTERM: ")] == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = _chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Watched:
    """A tab, and whatever it asked for or complained of."""

    def __init__(self, browser: Any, url: str, *, width: int = 1280) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900})
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.asked: list[str] = []
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.faults.append(dialog.message), dialog.dismiss()))
        self.page.on("console", lambda said: self.faults.append(said.text) if said.type == "error" else None)
        self.page.goto(url)
        self.page.wait_for_selector(".bn-column")

    def until_over(self, *statuses: str) -> None:
        self.page.wait_for_function(
            "wanted => [...document.querySelectorAll('.bn-column')].map(each => each.dataset.status).join() == wanted",
            arg=",".join(statuses),
        )
        self.page.wait_for_selector("#bn-go:not([disabled])")

    def check(self) -> None:
        host = urlsplit(self.page.url).netloc
        elsewhere = [each for each in self.asked if each.startswith("http") and urlsplit(each).netloc != host]
        assert not elsewhere
        assert not self.faults
        wide, window = self.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= window
        beyond = "all => all.filter(each => each.getBoundingClientRect().right > innerWidth + 1).length"
        assert self.page.eval_on_selector_all("article, #bn-ask, #bn-actions, .bn-history", beyond) == 0
        self.context.close()


def held(url: str) -> int:
    return httpx.get(url.replace("/ui/", "/health"), timeout=60).json()["held"]


@pytest.mark.parametrize("width", [1280, 390])
def test_two_models_answer_side_by_side(browser: Any, url: str, width: int) -> None:
    tab = Watched(browser, url, width=width)
    page = tab.page
    page.click('[data-example="98"]')
    page.wait_for_selector('[data-example="98"][aria-pressed="true"]')
    page.click('[data-example="56"]')
    page.wait_for_selector('[data-example="56"][aria-pressed="true"]')
    assert page.input_value("#bn-question textarea") == SAMPLE.question
    page.evaluate(
        """() => {
          window.lengths = new Set();
          const note = () => window.lengths.add(document.querySelector('.bn-answer').textContent.length);
          new MutationObserver(note).observe(document.body, {subtree: true, childList: true, characterData: true});
        }"""
    )
    page.click("#bn-go")
    tab.until_over("done", "done")
    assert page.evaluate("window.lengths.size") > 2, "the first answer did not come in pieces"
    base, adapted = page.query_selector_all(".bn-column")
    prints = [column.query_selector(".bn-print code").inner_text() for column in (base, adapted)]
    assert len(set(prints)) == 2
    assert adapted.query_selector(".bn-answer").inner_text().startswith(SAMPLE.answer)
    assert adapted.query_selector_all("table tbody tr")
    assert "right rows" in adapted.inner_text()
    for column in (base, adapted):
        text = column.inner_text()
        assert "weights " in text
        assert "KV free " in text
        assert " ms\nTTFT" in text
        assert column.query_selector(".bn-bar .bn-weights").bounding_box()["width"] > 5
    boxes = [column.bounding_box() for column in (base, adapted)]
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 1000)
    assert parse_qs(urlsplit(page.url).query) == {"example": ["56"]}
    # The history brings it back after a new start of the page.
    page.goto(url)
    page.wait_for_selector(".bn-history button")
    page.click('[data-entry="0"]')
    page.wait_for_selector(".bn-note")
    assert SAMPLE.answer in page.query_selector_all(".bn-column")[1].inner_text()
    tab.check()


def test_what_is_written_is_shown_and_never_run(browser: Any, url: str) -> None:
    nasty = "<script>alert(1)</script> ${alert(2)} {{value}} <img src=x onerror=alert(3)>"
    tab = Watched(browser, f"{url}?tokens=4&temperature=hot")
    page = tab.page
    assert "temperature is no number" in page.inner_text(".bn-notice")
    page.fill("#bn-question textarea", nasty)
    page.press("#bn-question textarea", "Enter")
    tab.until_over("done", "done")
    page.wait_for_selector(".bn-history")
    assert nasty in page.inner_text(".bn-history")
    assert nasty in page.inner_text(".bn-note")
    linked = page.url
    page.goto(linked)
    page.wait_for_selector(".bn-column")
    assert page.input_value("#bn-question textarea") == nasty
    before = page.evaluate("document.body.classList.contains('dark')")
    page.click("[data-theme-switch]")
    assert page.evaluate("document.body.classList.contains('dark')") != before
    tab.check()


def test_the_form_for_the_key_opens_the_page(browser: Any) -> None:
    async def page(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"it is open"})

    app = PageAccess(page, prefix="/ui", keys=KeyRing(["a-good-long-key"]), on_refused=lambda reason: None)
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="error"))
    listener = bind("127.0.0.1", 0)
    serving = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    serving.start()
    try:
        tab = browser.new_page()
        tab.set_default_timeout(PATIENCE_MS)
        tab.goto(url_of(listener).removesuffix("/v1") + "/ui/")
        for key, said in (("a-wrong-long-key", "does not open"), ("a-good-long-key", "it is open")):
            tab.fill("input", key)
            tab.click("button")
            tab.wait_for_function("said => document.body.innerText.includes(said)", arg=said)
        tab.close()
    finally:
        server.should_exit = True
        serving.join()
        listener.close()


@pytest.mark.parametrize("how", ["stop", "close"])
def test_what_is_stopped_or_closed_frees_its_request(browser: Any, url: str, how: str) -> None:
    tab = Watched(browser, f"{url}?example=56&tokens=900&in_turn=1")
    tab.page.click("#bn-go")
    tab.page.wait_for_selector('.bn-column[data-status="answering"]')
    if how == "stop":
        tab.page.click("#bn-stop")
        tab.until_over("stopped", "stopped")
        assert held(url) == 0
        tab.check()
    else:
        tab.context.close()
        until_s = time.monotonic() + 60
        while held(url):
            assert time.monotonic() < until_s
            time.sleep(0.05)
