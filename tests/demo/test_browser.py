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
        self.driver.execute_script("arguments[0].value = ''", files[-1])  # the browser's driver adds to it
        files[-1].send_keys(str(path))
        self.one(".thumbnails img, .thumbnail-item")

    def rest(self):
        """Wait until the page can be asked: its arrow is there, and the button that stops is not."""
        wait_until(lambda: self.all("button.submit-button") and not self.all("button.stop-button"), 60)

    def say(self, text):
        box = self.one("textarea[data-testid=textbox]")
        box.clear()
        box.send_keys(text)
        self.click("button.submit-button")

    def box(self):
        return self.one("textarea[data-testid=textbox]").get_attribute("value")

    def shot(self, name):
        self.driver.save_screenshot(str(self.folder / f"{name}.png"))


@pytest.fixture
def page(server, browser, tmp_path):
    from otter_hf.demo.page import CSS, EXAMPLES, THEME, build_page

    slow_down(server.model_of(), 0.05)
    blocks = build_page(server.client(), tmp_path / "flags")
    _, url, _ = blocks.launch(theme=THEME, css=CSS, prevent_thread_lock=True, quiet=True, footer_links=[])
    browser.get(url)
    page = Page(browser, tmp_path)
    page.examples = EXAMPLES
    page.one("textarea[data-testid=textbox]")
    yield page
    page.shot("end")  # what there was if the test has failed
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


def choose_example(page, label):
    page.one("button.example")
    page.driver.execute_script(
        "[...document.querySelectorAll('button.example')].find(e => e.innerText.trim() == arguments[0]).click()", label
    )


def test_examples_fill_the_boxes(page, server):
    answer_briefly(server)
    assert len(page.all("button.example img, button.example video")) == 5  # their thumbnails
    choose_example(page, "A picture after two worked examples")
    wait_until(lambda: page.box() == "What shape is it?")
    for button in page.all("button.label-wrap"):  # parameters and worked examples
        page.driver.execute_script("arguments[0].click()", button)
    wait_until(lambda: any(box.get_attribute("value") == "A green triangle." for box in page.all("textarea, input")))
    page.shot("4_worked_examples")
    page.click("button[aria-label=Submit]")
    wait_until(lambda: page.last_answer() and server.gate.admitted == 0, 60)
    page.shot("5_answered")


def test_a_narrow_dark_screen(page, server):
    """Nothing sticks out of a telephone's screen, and everything can be reached."""
    answer_briefly(server)
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": NARROW[0], "height": NARROW[1], "deviceScaleFactor": 2, "mobile": True},
    )
    page.driver.get(page.driver.current_url + "?__theme=dark")
    page.one("button.example")
    time.sleep(0.5)
    page.shot("6_narrow_empty")
    page.attach(page.examples / "square.png")
    page.say("what is in the picture?")
    wait_until(lambda: page.last_answer() and server.gate.admitted == 0, 60)
    page.shot("7_narrow_answered")
    for button in page.all("button.label-wrap"):
        page.driver.execute_script("arguments[0].click()", button)
    time.sleep(0.5)
    page.shot("8_narrow_open")
    width = page.driver.execute_script("return document.documentElement.scrollWidth")
    assert width <= NARROW[0]
    box = page.one("textarea[data-testid=textbox]").rect
    assert 0 <= box["x"] and box["x"] + box["width"] <= NARROW[0] and box["width"] > 150


def test_the_page_goes_on_after_errors(page, server, tmp_path):
    answer_briefly(server)
    for number, name in enumerate(("bad.png", "bad.mp4")):
        (tmp_path / name).write_bytes(b"nothing")
        page.attach(tmp_path / name)
        page.say("what?")
        wait_until(lambda number=number: len(page.answers()) > number, 60)
        wait_until(lambda name=name: f"{name} cannot be read" in page.last_answer(), 60)
        page.rest()
    page.shot("9_refused")
    assert not [button for button in page.all("button[aria-label=Share]") if button.is_displayed()]
    # a picture of a worked example, which Gradio itself reads
    page.driver.execute_script("arguments[0].click()", page.all("button.label-wrap")[0])
    page.one("input[type=file][data-testid=file-upload]")
    page.all("input[type=file][data-testid=file-upload]")[0].send_keys(str(tmp_path / "bad.png"))
    wait_until(lambda: any("cannot be read as a picture" in toast.text for toast in page.all(".toast-body")))
    page.shot("10_toast")
    page.say("and now?")
    wait_until(lambda: len(page.answers()) == 3 and "No answer" not in page.last_answer() and page.last_answer(), 60)
    page.shot("11_goes_on")


def test_again_edited_and_taken_back_with_a_picture(page, server, monkeypatch):
    from otter_hf.demo import page as module

    answer_briefly(server)
    asked = []
    to_messages = module.to_messages

    def listen(*arguments):
        messages = to_messages(*arguments)
        asked.append([[*(part["type"] for part in m["content"]), m["content"][-1].get("text")] for m in messages])
        return messages

    monkeypatch.setattr(module, "to_messages", listen)

    def wait_for(number):
        wait_until(lambda: len(asked) == number and page.last_answer() and server.gate.admitted == 0, 60)
        page.rest()
        return asked[-1]

    page.attach(page.examples / "circle.png")
    page.say("what is it?")
    first = wait_for(1)
    assert first == [["image_url", "text", "what is it?"]]
    page.click("button[aria-label=Retry]")
    assert wait_for(2) == first
    page.shot("12_again")
    page.click("button[aria-label=Edit]")
    box = page.one(".message.user textarea")
    box.clear()
    box.send_keys("what color?")
    page.shot("13_editing")
    page.click("button.icon-button[aria-label=Submit]")
    assert wait_for(3) == [["image_url", "text", "what color?"]]
    page.shot("14_edited")
    page.click("button[aria-label=Undo]")
    wait_until(lambda: page.box() == "what color?")
    assert page.all(".thumbnails img, .thumbnail-item") and not page.answers()
    page.shot("15_taken_back")
