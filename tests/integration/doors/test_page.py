"""The chat page in headless Chromium, against the real server: send, stream, stop, reload, and what it looks like."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement

from integration.doors.browser import needs_browser, open_browser
from server import MODEL_NAME, Server, until

pytestmark = needs_browser


class Page:
    """The page as a user sees and touches it."""

    def __init__(self, driver: WebDriver, url: str) -> None:
        self.driver = driver
        driver.get(url)
        until(lambda: self.text("#health") == "ready", within_s=20, what="the page is up")

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """Return the text in one step: what streams is drawn anew all the time."""
        return str(self.driver.execute_script("return document.querySelector(arguments[0])?.textContent", selector))

    def send(self, text: str) -> None:
        self.one("#prompt").send_keys(text, Keys.ENTER)

    def answer(self) -> str:
        """Wait for the end of the answer; return its text."""
        until(lambda: self.one("#send").is_displayed() and not self.all(".streaming"), within_s=60, what="the answer")
        return self.text(".message:last-child .body")

    def set(self, **settings: object) -> None:
        self.one("#prompt").send_keys(Keys.ALT + "s")
        for name, value in settings.items():
            field = self.one(f"#{name}")
            field.clear()
            field.send_keys(str(value))
        self.one("#prompt").send_keys(Keys.ALT + "s")

    def problems(self) -> list[dict[str, Any]]:
        """Return what the browser's console complains of; a policy that is broken is among it."""
        driver: Any = self.driver  # a method of Chromium's driver alone
        return list(driver.get_log("browser"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    with open_browser(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


@pytest.fixture
def page(browser: WebDriver, server: Server) -> Page:
    browser.get(f"{server.url}/version")  # of the same origin, and no page that writes while it is left
    browser.execute_script("localStorage.clear()")
    return Page(browser, server.url)


def test_send_stream_and_reload(page: Page, server: Server) -> None:
    page.set(temperature=0)
    page.send("What is the capital of France?")
    assert page.answer() == "The capital of France is Paris."
    speed = page.text(".message:last-child .speed")
    assert "TTFT" in speed
    assert "tok/s" in speed
    assert "8 tokens" in speed
    page.send("And of Germany?")
    second = page.answer()
    page.driver.refresh()
    until(lambda: page.text("#health") == "ready", within_s=20, what="the page is up again")
    bodies = [body.text for body in page.all(".message .body")]
    assert bodies[0] == "What is the capital of France?"
    assert bodies[2] == "And of Germany?"
    assert len(bodies) == 4
    assert page.text(".message:last-child .body") == second
    assert page.one("#temperature").get_attribute("value") == "0"
    assert page.one("#model").get_attribute("value") == MODEL_NAME
    assert page.problems() == []


def test_stop_keeps_what_came_and_ends_the_request(page: Page, server: Server) -> None:
    page.set(temperature=0, max_tokens=1500)
    page.send("Write a very long story about the sea.")
    until(lambda: len(page.text(".message.assistant .body")) > 30, within_s=30, what="text streams")
    assert not page.one("#send").is_displayed()
    page.one("#prompt").send_keys(Keys.ESCAPE)
    stopped = page.answer()
    assert len(stopped) > 30
    assert page.text(".message:last-child .speed").endswith("stopped")
    until(lambda: server.metric("num_requests_running") == 0, within_s=20, what="the request ends on the server")
    page.set(max_tokens=5)
    page.one(".regenerate").click()
    assert stopped.startswith(page.answer())
    assert len(page.all(".message")) == 2


def test_refusals_are_shown_and_nothing_is_lost(page: Page) -> None:
    page.set(max_tokens=1000000)
    page.send("Hello")
    until(lambda: page.all(".error"), within_s=20, what="the error")
    assert "max_tokens" in page.text(".error")
    assert page.text(".message.user .body") == "Hello"
    page.set(max_tokens=4, system="Be brief.")
    page.one("#prompt").send_keys(Keys.ALT + "r")
    assert page.answer()
    assert not page.all(".error")


def test_conversations_are_kept_apart(page: Page) -> None:
    page.set(max_tokens=4)
    for text in ("first one", "second one"):
        page.one("#prompt").send_keys(Keys.ALT + "n")
        page.send(text)
        page.answer()
    assert [row.text for row in page.all(".chat-row .open")] == ["second one", "first one"]
    page.all(".chat-row .open")[1].click()
    assert page.text(".message.user .body") == "first one"
    page.driver.execute_script("document.querySelector('.chat-row.current .remove').click()")
    assert [row.text for row in page.all(".chat-row .open")] == ["second one"]


MARKDOWN = """# Title

A **bold**, *slanted* and `coded` word, ~~gone~~, [a link](https://example.org/a) and [a trap](javascript:alert(1)).

1. one
   - inner
2. two

| a | b |
|---|---|
| 1 | 2 |

> said

```js
if (a < b) { c *= 2; }
```

<img src=x onerror="document.title='broken'"> <script>document.title='broken'</script>
"""
HTML = (
    "<h1>Title</h1><p>A <strong>bold</strong>, <em>slanted</em> and <code>coded</code> word, <del>gone</del>, "
    '<a href="https://example.org/a" target="_blank" rel="noopener noreferrer">a link</a> and '
    "[a trap](javascript:alert(1)).</p><ol><li>one<ul><li>inner</li></ul></li><li>two</li></ol>"
    "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table>"
    '<blockquote><p>said</p></blockquote><div class="code-block"><div class="bar"><span>js</span>'
    '<button type="button">Copy</button></div><pre><code>if (a &lt; b) { c *= 2; }</code></pre></div>'
    "<p>&lt;img src=x onerror=\"document.title='broken'\"&gt; "
    "&lt;script&gt;document.title='broken'&lt;/script&gt;</p>"
)


def test_markdown_is_rendered_and_html_is_only_text(page: Page) -> None:
    script = """
        const [text, done] = arguments;
        import("/page/markdown.js").then(({ render }) => {
            const node = document.createElement("div");
            node.append(...render(text));
            document.body.append(node);
            const shown = node.innerHTML;
            node.remove();
            done(shown);
        });
    """
    assert page.driver.execute_async_script(script, MARKDOWN) == HTML
    # Every beginning of it renders too: that is what streaming shows.
    for end in range(0, len(MARKDOWN), 7):
        page.driver.execute_async_script(script, MARKDOWN[:end])
    assert page.driver.title == "tpserve"


@pytest.mark.parametrize(("width", "theme"), [(1200, "light"), (390, "dark")])
def test_it_fits_wide_and_narrow_light_and_dark(page: Page, width: int, theme: str, tmp_path: Path) -> None:
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    driver: Any = page.driver
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    try:
        page.set(max_tokens=12, temperature=0)
        page.send("A" * 300 + " what is this?")
        page.answer()
        assert driver.execute_script("return document.documentElement.scrollWidth") == width  # nothing sticks out
        shade = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert shade == ("rgb(255, 255, 255)" if theme == "light" else "rgb(22, 22, 26)")
        sidebar = page.one("#sidebar").is_displayed()
        assert sidebar == (width > 720)
        page.one("#theme").click()
        assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") != shade
        assert driver.save_screenshot(str(tmp_path / f"{theme}-{width}.png"))
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
