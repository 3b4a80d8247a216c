"""One's own second factors in a real browser: an app, passkeys (Chromium's virtual authenticator), on a phone's width."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests.browser.conftest import NAME, PASSWORD, Trouble
from tests.support.codes import code_of
from tests.support.gateway import Gateway

pytestmark = pytest.mark.no_database

Visit = Callable[..., Any]


@contextmanager
def phone(browser: Browser, gateway: Gateway) -> Iterator[tuple[Page, Trouble]]:
    """A browser that knows nobody, at the name for which browsers allow passkeys without https."""
    context = browser.new_context(
        base_url=f"http://localhost:{gateway.port}", viewport={"width": 390, "height": 844}
    )
    page, trouble = context.new_page(), Trouble()
    trouble.watch(page)
    yield page, trouble
    context.close()


def log_in(page: Page) -> None:
    page.goto("/admin/login/")
    page.fill("[name=username]", NAME)
    page.fill("[name=password]", PASSWORD)
    page.click("#login-form button[type=submit]")


def confirm(page: Page) -> None:
    """Before anything is changed, the password is asked for again."""
    page.wait_for_url("**/admin/account/again/**")
    assert_fits(page)
    page.fill("[name=password]", PASSWORD)
    page.click("button:has-text('Confirm')")


def assert_fits(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, page.url


def keep_codes(page: Page) -> list[str]:
    """The recovery codes; one may only leave their page after saying that they are saved."""
    page.wait_for_url("**/recovery-codes/")
    assert_fits(page)
    codes = page.input_value("#recovery_codes").split()
    page.check("#codes_saved")
    return codes


def with_authenticator(page: Page) -> None:
    session = page.context.new_cdp_session(page)
    session.send("WebAuthn.enable")
    options = {
        "protocol": "ctap2",
        "transport": "internal",
        "hasUserVerification": True,
        "isUserVerified": True,
    }
    session.send(
        "WebAuthn.addVirtualAuthenticator",
        {"options": {**options, "hasResidentKey": True, "automaticPresenceSimulation": True}},
    )


def test_an_app_and_recovery_codes(fresh_gateway: Gateway, browser: Browser) -> None:
    with phone(browser, fresh_gateway) as (page, trouble):
        log_in(page)
        page.wait_for_url("**/admin/")
        page.goto("/admin/account/")
        assert_fits(page)
        page.click("text=Set up an app")
        confirm(page)
        page.wait_for_url("**/admin/account/app/add/")
        assert_fits(page)
        secret = page.input_value("#authenticator_secret")
        assert page.evaluate("document.querySelector('img.ps-code').naturalWidth") > 0
        page.fill("[name=code]", "000000")
        page.click("button:has-text('Activate')")
        page.wait_for_selector(".ps-problem")
        page.fill("[name=code]", code_of(secret))
        page.click("button:has-text('Activate')")
        codes = keep_codes(page)
        assert len(codes) == 10
        page.goto("/admin/account/")
        page.wait_for_selector("text=10 left")

        assert page.request.get("/admin/account/recovery-codes/").text().count(codes[0]) == 0
        assert [each for each in trouble if "favicon" not in each] == []

    with phone(browser, fresh_gateway) as (page, trouble):
        log_in(page)
        page.wait_for_url("**/admin/account/code/")
        assert_fits(page)
        page.fill("[name=code]", codes[3])
        page.click("button:has-text('Sign In')")
        page.wait_for_url("**/admin/")
        page.goto("/admin/account/")
        page.wait_for_selector("text=9 left")
        assert trouble == []


def test_a_passkey(fresh_gateway: Gateway, browser: Browser) -> None:
    with phone(browser, fresh_gateway) as (page, trouble):
        with_authenticator(page)
        log_in(page)
        page.wait_for_url("**/admin/")
        page.goto("/admin/account/")
        page.click("text=Add a passkey")
        confirm(page)
        page.wait_for_url("**/passkeys/add/")
        assert_fits(page)
        assert page.input_value("[name=name]") == "Passkey 1"
        page.click("#mfa_webauthn_add")
        keep_codes(page)
        page.goto("/admin/account/passkeys/")
        assert_fits(page)
        page.wait_for_selector("text=Passkey 1")

        page.goto("/admin/")
        page.evaluate("document.getElementById('logout-form').submit()")
        page.wait_for_url("**/admin/logout/")
        log_in(page)
        page.wait_for_url("**/admin/account/code/")
        page.click("#mfa_webauthn_authenticate")
        page.wait_for_url("**/admin/")

        page.goto("/admin/account/passkeys/")
        page.click("text=Remove")
        confirm(page)
        page.wait_for_url(re.compile("/passkeys/[0-9]+/remove/$"))
        assert_fits(page)
        page.click("button.ps-button-danger")
        page.goto("/admin/account/")
        page.wait_for_selector("text=Add a passkey")
        assert page.locator("text=Recovery codes").count() == 0
        assert trouble == []

    log = fresh_gateway.shell(
        "from audit.models import Entry\n"
        "for each in Entry.objects.filter(action='change_second_factor'): print(sorted(each.changes))\n"
        "for each in Entry.objects.filter(action='start_session'): print(each.changes['by'][1])"
    )
    assert log.count("['recovery_codes', 'webauthn']") == 2
    assert "password, webauthn" in log


def test_somebody_without_the_passkey_stays_outside(fresh_gateway: Gateway, browser: Browser) -> None:
    with phone(browser, fresh_gateway) as (page, _):
        with_authenticator(page)
        log_in(page)
        page.goto("/admin/account/passkeys/add/")
        confirm(page)
        page.wait_for_url("**/passkeys/add/")
        page.click("#mfa_webauthn_add")
        keep_codes(page)

    with phone(browser, fresh_gateway) as (page, _):
        with_authenticator(page)
        log_in(page)
        page.wait_for_url("**/admin/account/code/")
        page.evaluate(
            'document.getElementById(\'webauthn_form\').credential.value = \'{"id": "AAAA", "type": "public-key"}\''
        )
        page.evaluate("document.getElementById('webauthn_form').submit()")
        page.wait_for_load_state()
        assert page.request.get("/admin/", max_redirects=0).status == 302
