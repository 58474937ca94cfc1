"""The page in a browser: type, upload, stream, stop, ask again, rate; wide and narrow.

Screenshots go to the test's temporary folder: `pytest --basetemp FOLDER` keeps them where they can be looked at.
"""

import csv
import shutil
import time
from dataclasses import replace

import pytest
from serving_double import slow_down, wait_until


pytestmark = pytest.mark.slow
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
WIDE, NARROW = (1200, 1000), (390, 844)


@pytest.fixture
def browser():
    selenium = pytest.importorskip("selenium", reason="selenium is not installed")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    assert selenium
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1000"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


def answer_briefly(server):
    server.app.state.chat.settings = replace(server.app.state.chat.settings, new_tokens=6)


class Page:
    """The page as a visitor sees it."""

    def __init__(self, driver, folder):
        self.driver = driver
        self.folder = folder

    def all(self, css):
        return self.driver.find_elements("css selector", css)

    def one(self, css):
        wait_until(lambda: self.all(css), 60)
        return self.all(css)[-1]

    def click(self, css):
        # the page moves while an answer grows
        self.driver.execute_script("arguments[0].click()", self.one(css))

    def answers(self):
        # in one go: the page replaces its elements while an answer grows
        return self.driver.execute_script(
            "return [...document.querySelectorAll('.message.bot')].map(e => e.innerText)"
        )

    def last_answer(self):
        return (self.answers() or [""])[-1]

    def attach(self, path):
        files = [
            element for element in self.all("input[type=file]") if "image" in (element.get_attribute("accept") or "")
        ]
        files[-1].send_keys(str(path))
        self.one(".thumbnails img, .thumbnail-item")

    def say(self, text):
        box = self.one("textarea[data-testid=textbox]")
        box.clear()
        box.send_keys(text)
        self.click("button[aria-label=Submit]")

    def shot(self, name):
        self.driver.save_screenshot(str(self.folder / f"{name}.png"))


@pytest.fixture
def page(server, browser, tmp_path):
    from otter_hf.demo.page import EXAMPLES, THEME, build_page

    slow_down(server.model_of(), 0.05)
    blocks = build_page(server.client(), tmp_path / "flags")
    _, url, _ = blocks.launch(theme=THEME, prevent_thread_lock=True, quiet=True, footer_links=[])
    browser.get(url)
    page = Page(browser, tmp_path)
    page.examples = EXAMPLES
    page.one("textarea[data-testid=textbox]")
    yield page
    blocks.close()


def test_a_visit(page, server, tmp_path):
    page.shot("1_empty")
    # a picture and a question; the answer grows
    page.attach(page.examples / "circle.png")
    page.say("what is in the picture?")
    wait_until(lambda: page.last_answer(), 60)
    early = page.last_answer()
    wait_until(lambda: len(page.last_answer()) > len(early))
    page.shot("2_streaming")
    # stop: the page rests and the server is free
    page.click("button.stop-button")
    wait_until(lambda: server.gate.admitted == 0)
    stopped = page.last_answer()
    time.sleep(0.5)
    assert page.last_answer() == stopped
    # a second question goes on about the same picture
    answer_briefly(server)
    page.say("and why?")
    wait_until(lambda: len(page.answers()) == 2 and server.gate.admitted == 0)
    page.shot("3_two_turns")
    # ask again, then rate
    page.click("button[aria-label=Retry]")
    wait_until(lambda: server.gate.admitted == 1, 10)
    wait_until(lambda: len(page.answers()) == 2 and server.gate.admitted == 0)
    page.click("button[aria-label=Like]")
    log = tmp_path / "flags" / "log.csv"
    wait_until(log.is_file)
    rows = list(csv.DictReader(log.open(encoding="utf-8")))
    assert rows[0]["value"] is not None and "and why?" in rows[0]["conversation"]
    # nothing of the conversation remains after it is cleared
    page.click("button[aria-label=Clear]")
    wait_until(lambda: not page.answers())


def test_examples_fill_the_boxes(page, server):
    answer_briefly(server)
    labels = [button.text for button in page.all("button.gallery-item")]
    number = labels.index("A picture after two worked examples")
    page.driver.execute_script("arguments[0].click()", page.all("button.gallery-item")[number])
    wait_until(lambda: page.one("textarea[data-testid=textbox]").get_attribute("value") == "What shape is it?")
    page.click("button.label-wrap")  # parameters
    page.driver.execute_script("arguments[0].click()", page.all("button.label-wrap")[0])  # worked examples
    wait_until(lambda: any(box.get_attribute("value") == "A green triangle." for box in page.all("textarea, input")))
    page.shot("4_worked_examples")
    page.click("button[aria-label=Submit]")
    wait_until(lambda: page.last_answer() and server.gate.admitted == 0, 60)
    page.shot("5_answered")


def test_a_narrow_screen(page, server):
    """Nothing sticks out of a telephone's screen, and everything can be reached."""
    answer_briefly(server)
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": NARROW[0], "height": NARROW[1], "deviceScaleFactor": 2, "mobile": True},
    )
    page.attach(page.examples / "square.png")
    page.say("what is in the picture?")
    wait_until(lambda: page.last_answer() and server.gate.admitted == 0, 60)
    for button in page.all("button.label-wrap"):
        page.driver.execute_script("arguments[0].click()", button)
    time.sleep(0.5)
    page.shot("6_narrow")
    width = page.driver.execute_script("return document.documentElement.scrollWidth")
    assert width <= NARROW[0]
    box = page.one("textarea[data-testid=textbox]").rect
    assert 0 <= box["x"] and box["x"] + box["width"] <= NARROW[0] and box["width"] > 150


def test_a_refusal_is_shown(page, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    page.attach(bad)
    page.say("what?")
    wait_until(lambda: any("cannot be read as an image" in toast.text for toast in page.all(".toast-body")), 30)
    page.shot("7_refused")
