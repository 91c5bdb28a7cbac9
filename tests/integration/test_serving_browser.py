"""The page at / in a real browser, on a phone and a desk: a user is picked, titles and contributions are shown."""

import time

import pytest
from test_report_browser import browser, show  # noqa: F401
from test_serving import serving

pytestmark = pytest.mark.integration

SMALL = "[...document.querySelectorAll('button, input, select')].filter(e => e.offsetParent && e.offsetHeight < 40)"


class At:
    """An address where ``show`` takes a page's path."""

    def __init__(self, address):
        self.as_uri = lambda: address


def wait_for(browser, script, seconds=60):  # noqa: F811
    deadline = time.monotonic() + seconds
    while not (found := browser.execute_script(f"return {script}")):
        assert time.monotonic() < deadline, browser.execute_script("return document.body.innerText")
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("width", [390, 1440])
def test_a_user_is_picked_and_the_ranking_explained(world, browser, width):  # noqa: F811
    with serving(world) as (address, service):
        show(browser, At(f"{address}/"), width, "light")
        wait_for(browser, "document.querySelectorAll('#users option').length")
        user, request = next((u, r) for u, r in service._read_users().items() if len(r.history) > 3 and r.taken)
        take = "const u = document.getElementById('user'); u.value = arguments[0]; u.dispatchEvent(new Event('change'))"
        browser.execute_script(take, user)
        wait_for(browser, "document.getElementById('history').value")
        browser.find_element("id", "go").click()
        wait_for(browser, "document.querySelectorAll('#ranking details').length == 10")
        names = browser.execute_script("return [...document.querySelectorAll('#ranking .name')].map(n => n.innerText)")
        assert len(set(names)) == 10
        assert not set(names) & request.left_out
        details = "[...document.querySelectorAll('#ranking details')]"
        titles = f"return {details}.map(d => [...d.querySelectorAll('li > :first-child')].map(t => t.textContent))"
        assert browser.execute_script(titles) == [list(request.history)] * 10
        assert browser.execute_script("return document.documentElement.scrollWidth") == width
        small = (
            "[...document.querySelectorAll('button, input, select')].filter(e => e.offsetParent && e.offsetHeight < 40)"
        )
        assert browser.execute_script(f"return {small}.length") == 0, "a finger's width"
        browser.find_element("id", "history").clear()
        browser.find_element("id", "history").send_keys("No such <b>title</b>")
        browser.find_element("id", "go").click()
        message = wait_for(browser, "document.getElementById('message').innerText")
        assert "'No such <b>title</b>' is neither a title nor an item id" in message
        assert [entry for entry in browser.get_log("browser") if "422" not in entry["message"]] == []
