"""A real browser on the real server. Without the system's chromium these tests are skipped, and say so."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Dialog, Page, Response, sync_playwright

from tests.support.gateway import Gateway

CHROMIUM = shutil.which("chromium")
NAME, PASSWORD = "ada", "a rather long passphrase"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
Visit = Callable[..., Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CHROMIUM is None:
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents:
                item.add_marker(
                    pytest.mark.skip(reason="chromium is not installed (apt-get install chromium)")
                )


@contextmanager
def installed() -> Iterator[Gateway]:
    """A new installation after its first run."""
    wishes = {"DJANGO_SUPERUSER_USERNAME": NAME, "DJANGO_SUPERUSER_PASSWORD": PASSWORD}
    with Gateway(env=wishes) as running:
        running.manage("first_run", "--json")
        yield running


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    """An installation that the tests of a module share."""
    with installed() as running:
        yield running


@pytest.fixture
def fresh_gateway() -> Iterator[Gateway]:
    """An installation that nobody has used yet."""
    with installed() as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGUMENTS)
        yield chromium
        chromium.close()


class Trouble(list[str]):
    """What a page complained about: console errors (blocked scripts among them), dialogs, failed requests."""

    def watch(self, page: Page) -> None:
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.append(f"{page.url}: {error}"))
        page.on("dialog", self._dialog)
        page.on("response", self._response)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.append(f"{message.type}: {message.text}")

    def _dialog(self, dialog: Dialog) -> None:
        self.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _response(self, response: Response) -> None:
        if response.status >= 400:
            self.append(f"{response.status} {response.url}")


@pytest.fixture
def visit(browser: Browser) -> Visit:
    """`with visit(gateway, width=390, dark=True) as (page, trouble)`: somebody who has just logged in."""

    @contextmanager
    def logged_in(
        gateway: Gateway, *, width: int = 1280, dark: bool = False
    ) -> Iterator[tuple[Page, Trouble]]:
        context = browser.new_context(
            base_url=gateway.url,
            viewport={"width": width, "height": 844},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
        )
        page, trouble = context.new_page(), Trouble()
        trouble.watch(page)
        page.goto("/admin/login/")
        page.fill("[name=username]", NAME)
        page.fill("[name=password]", PASSWORD)
        page.click("#login-form button[type=submit]")
        page.wait_for_url("**/admin/")
        yield page, trouble
        context.close()

    return logged_in
