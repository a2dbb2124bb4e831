"""Tests of the playground in a real browser: Chromium without a window, driven through Selenium."""

import importlib.util
import json
import shutil
import time

import pytest
from models import build, randomize
from text import tokenizer

from fused_steer import SteerConfig, patch_model
from fused_steer.playground.page import build_page, launch

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = [name for name in ("gradio", "selenium") if not importlib.util.find_spec(name)]
MISSING += [name for name, path in (("chromium", CHROMIUM), ("chromedriver", DRIVER)) if not path]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

SWITCHES = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync")
_PATIENCE = 120  # seconds; a busy machine takes long to show a page


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Serve the page of a tiny model with two linear adapters. Return its address and the directory for exports."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = patch_model(build(), SteerConfig(rank=2, activation="identity", scale=0.5), adapter_name="polite")
    model.steering.add("terse", SteerConfig("vector"))
    for seed, name in enumerate(model.steering.names):
        model.steering.use(name)
        randomize(model, name, seed=seed + 1)
    out = tmp_path_factory.mktemp("exported")
    blocks = build_page(model, tokenizer(), "base/model", out)
    launch(blocks, "127.0.0.1", port, wait=False)
    yield f"http://127.0.0.1:{port}", out
    blocks.close()


@pytest.fixture(scope="module")
def browser(served, tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (*SWITCHES, "--window-size=1400,1100", f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    driver.get(served[0])
    yield driver
    driver.quit()


def wait(browser, ready, what):
    """Wait until `ready()` returns something that is true, and return it."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        try:
            if found := ready():
                return found
        except WebDriverException:
            pass  # an element that is not there yet, or was just replaced
        time.sleep(0.1)
    raise AssertionError(f"the page did not show {what}; it shows: {browser.page_source[-3000:]}")


def find(browser, selector):
    return wait(browser, lambda: browser.find_elements("css selector", selector), selector)


def content(browser, selector):
    return find(browser, selector)[0].get_attribute("textContent")


def fill(element, text):
    from selenium.webdriver.common.keys import Keys

    element.send_keys(Keys.CONTROL, "a")
    element.send_keys(text, Keys.TAB)


def answer(browser):
    """Press the button and return the finished columns."""
    browser.execute_script("document.querySelector('#columns .fs-columns')?.remove()")
    find(browser, "#answer")[0].click()

    def finished():
        columns = browser.find_elements("css selector", "#columns .fs-column")
        return columns if columns and not any("▍" in column.text for column in columns) else None

    return wait(browser, finished, "finished answers")


def test_browser_shows_base_adapters_and_their_sum(browser, served):
    fill(find(browser, "#prompt textarea")[0], "a steered model")
    columns = answer(browser)
    assert [column.find_element("css selector", "h4").text for column in columns] == [
        "base",
        "polite",
        "terse",
        "together",
    ]
    assert "no steering" in columns[0].text and "0.5 × polite + 1 × terse" in columns[3].text
    tinted = [len(column.find_elements("css selector", "span[style*='rgba']")) for column in columns]
    assert tinted[0] == 0 and min(tinted[1:]) > len("a steered model")
    texts = [column.find_element("css selector", ".fs-text").text for column in columns]
    assert len(set(texts)) > 1


def test_browser_a_slider_changes_the_column(browser, served):
    fill(find(browser, "#strength-polite input[type=number]")[0], "0")
    columns = answer(browser)
    assert [column.find_element("css selector", "h4").text for column in columns] == ["base", "terse"]
    fill(find(browser, "#strength-polite input[type=number]")[0], "1.5")
    assert "1.5 × polite" in answer(browser)[1].text


def test_browser_exports_the_sum_and_a_body(browser, served):
    fill(find(browser, "#strength-polite input[type=number]")[0], "1.5")
    find(browser, "#export button")[0].click()
    fill(find(browser, "#name input, #name textarea")[0], "found")
    wait(browser, lambda: find(browser, "#save")[0].is_displayed(), "the export")
    find(browser, "#save")[0].click()
    wait(browser, lambda: "saved; " in content(browser, "#said"), "that the adapter is saved")
    config = patch_model(build(), served[1] / "found").steering.config()
    assert (config.rank, config.activation, config.up_bias) == (2, "identity", True)
    find(browser, "#make")[0].click()
    wait(browser, lambda: '"model": "together"' in content(browser, "#body .cm-content"), "the body")


def test_browser_asks_no_other_machine(browser, served):
    """The page loads everything from its own server: no fonts, scripts or statistics from elsewhere."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert len(sent) > 10
    local = (served[0], served[0].replace("127.0.0.1", "localhost"), "data:", "blob:", "chrome")
    assert [url for url in sent if not url.startswith(local)] == []
