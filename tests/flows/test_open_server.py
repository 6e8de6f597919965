"""`regrow up` for a network: whoever has no password gets nothing, and whoever has it uses the dashboard from another
address than the machine's own."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

from tests.flows import browser
from tests.flows.raised import Raised, free_port

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]

PASSWORD = "admin:open-sesame"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, prepared_home: Callable[[Path], Path]) -> Iterator[Raised]:
    """A server for everybody who has the password."""
    passwords = dict.fromkeys(("PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"), PASSWORD)
    raised = Raised(prepared_home(tmp_path_factory.mktemp("open") / "regrow" / "prefect"), free_port(), passwords)
    try:
        raised.regrow("up", "--home", str(raised.home), "--port", str(raised.port), "--host", "0.0.0.0")
        yield raised
    finally:
        raised.regrow("down", "--home", str(raised.home))


@pytest.fixture(scope="module")
def address() -> str:
    """This machine's, as others see it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("203.0.113.1", 9))  # sends nothing
        except OSError:
            pytest.skip("needs a network")
        return str(probe.getsockname()[0])


def test_nobody_gets_anything_without_the_password(opened: Raised) -> None:
    url = f"{opened.url}/flow_runs/filter"
    wrong = httpx.BasicAuth("admin", "please")
    assert [httpx.post(url, json={}).status_code, httpx.post(url, json={}, auth=wrong).status_code] == [401, 401]
    assert httpx.post(url, json={}, auth=httpx.BasicAuth(*PASSWORD.split(":"))).status_code == 200


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_the_dashboard_works_from_another_address(opened: Raised, address: str) -> None:
    with browser.opened() as page:
        page.goto(f"http://{address}:{opened.port}/v2/deployments?page=1&sort=NAME_ASC&limit=50")
        page.get_by_placeholder("admin:pass").fill(PASSWORD)
        page.get_by_role("button", name="Login").click()
        expect(page.get_by_role("link", name="rollback", exact=False).first).to_be_visible()
        browser.open_form(page, f"http://{address}:{opened.port}", "train")
