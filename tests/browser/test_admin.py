"""The admin as a person meets it: the way from the first login to the first answer, on a phone, and with hostile names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from playwright.sync_api import Page

from tests.support.gateway import Gateway
from tests.support.upstream import Upstream

pytestmark = pytest.mark.no_database

Visit = Callable[..., Any]

RECORD = "01990000-0000-7000-8000-000000000001"
PAGES = (
    "/admin/",
    "/admin/providers/server/",
    "/admin/providers/server/add/",
    "/admin/providers/provider/",
    "/admin/providers/provider/add/",
    "/admin/providers/provider/1/change/",
    "/admin/providers/apikey/",
    "/admin/providers/apikey/add/",
    "/admin/providers/upstreammodel/",
    "/admin/providers/upstreammodel/add/",
    "/admin/providers/activeprovider/",
    "/admin/providers/activeprovider/chat/change/",
    "/admin/proxy/modelroute/",
    "/admin/proxy/modelprice/",
    "/admin/proxy/modelprice/add/",
    "/admin/proxy/modelprice/1/change/",
    "/admin/proxy/modelroute/add/",
    "/admin/proxy/modelroute/1/change/",
    "/admin/proxy/modelroute/1/dry-run/",
    "/admin/proxy/modelroute/1/delete/",
    "/admin/proxy/gatewaykey/",
    "/admin/proxy/gatewaykey/add/",
    "/admin/proxy/gatewaykey/1/change/",
    "/admin/proxy/gatewaykey/1/rotate/",
    "/admin/proxy/gatewaykey/1/revoke/",
    "/admin/proxy/gatewaykey/1/delete/",
    "/admin/proxy/ownerlimits/",
    "/admin/proxy/ownerlimits/add/",
    "/admin/backup/",
    "/admin/proxy/usagerecord/",
    f"/admin/proxy/usagerecord/{RECORD}/change/",
    "/admin/proxy/usagerecord/report/",
    "/admin/proxy/usagerecord/report/?period=365d&group=model",
    "/admin/providers/healthcheck/",
    "/admin/audit/entry/",
    "/admin/audit/entry/1/change/",
    "/admin/auth/user/",
    "/admin/auth/user/add/",
    "/admin/auth/user/1/change/",
    "/admin/auth/user/1/password/",
    "/admin/auth/group/",
    "/admin/auth/group/1/change/",
    "/admin/password_change/",
)

A_LONG_WAY = f"""
from django.utils import timezone
from proxy.models import UsageRecord
name = 'box/org-' + 'long-name-' * 12
times = dict.fromkeys(('queue', 'connect', 'first_token', 'total'), 1800000)
attempt = {{'to': name, 'key': 'k' * 100, 'outcome': 'upstream_protocol_error', **times}}
trace = {{'candidates': [name + ': down (' + 'x' * 80 + ')', name + ': taken'], 'attempts': [attempt] * 3}}
row = {{'created_at': timezone.now(), 'status': 'error', 'attempt': 3, 'request_id': 'r-1', 'trace': trace}}
UsageRecord.objects.get_or_create(id='{RECORD}', defaults=row)
"""
"""A usage record whose trace has the longest things that a trace may have."""

MUCH = """
import uuid
from django.utils import timezone
from proxy.models import UsageHour
much = dict.fromkeys(('requests', 'attempts', 'prompt_tokens', 'completion_tokens', 'unpriced', 'estimated'), 10**12)
sums = {**much, 'attempts': 2 * 10**12, 'cost_nanodollars': 10**17}
hour = timezone.now().replace(minute=0, second=0, microsecond=0)
for number, model in enumerate(['org/' + 'long-name-' * 12, 'x' * 255, 'tiny']):
    UsageHour.objects.get_or_create(id=uuid.UUID(int=number), defaults={'hour': hour, 'model': model, 'status': 'success', **sums})
"""
"""Sums as large and names as long as there will be."""

HOSTILE = (
    "\"><img src=x onerror=alert(1)>' {{7*7}}${7*7}javascript:alert(3)",
    "</script><script>alert(2)</script> ' x-init='alert(4)' \u202eabc",
)


def test_from_the_first_login_to_the_first_answer(fresh_gateway: Gateway, visit: Visit) -> None:
    gateway = fresh_gateway
    with Upstream() as upstream, visit(gateway) as (page, trouble):
        page.click("text=Add a server")
        page.fill("[name=name]", "My box")
        page.select_option("[name=kind]", "openai-compatible")
        page.fill("[name=base_url]", f"{upstream.url}/v1")
        page.click("button[name=_continue]")
        page.click("button:has-text('Test')")
        page.wait_for_selector("text=It answers")
        page.click("button:has-text('Save these models')")
        page.wait_for_selector("text=healthy, ")
        page.goto("/admin/")
        page.click("a:has-text('Choose')")
        page.select_option("[name=targets-0-provider]", label="My box")
        page.click("#active-form button[type=submit]")
        page.wait_for_selector("text=Chat now goes to My box")
        whole = issue_key(page, "laptop")
        page.goto("/admin/")
        assert page.locator(".ps-step-done").count() == 4
        assert trouble == []
        gateway.wait_for_key(whole)
        with gateway.client(whole) as client:
            body = {"model": "auto", "messages": [{"role": "user", "content": "Hello"}]}
            answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200
        assert answer.headers["x-penstock-provider"] == "my-box"


def issue_key(page: Page, name: str) -> str:
    page.goto("/admin/proxy/gatewaykey/add/")
    page.fill("[name=name]", name)
    page.click("button[name=_save]")
    whole = page.text_content("#ps-key") or ""
    assert re.fullmatch(r"pen_live_\w{42}_\w{6}", whole)
    return whole


def test_a_key_is_copied_with_one_click(gateway: Gateway, visit: Visit) -> None:
    with visit(gateway) as (page, trouble):
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        whole = issue_key(page, "copied")
        page.click("[data-copy=ps-key]")
        page.wait_for_selector("text=Copied")
        assert page.evaluate("navigator.clipboard.readText()") == whole
        assert trouble == []


def test_fallbacks_are_moved_up_and_emptied(gateway: Gateway, visit: Visit) -> None:
    gateway.shell(
        "from audit.changes import changes; from providers.models import Server\n"
        "with changes(actor=None, via='system'):\n"
        "    Server.objects.create(name='Spare', kind='vllm', base_url='http://localhost:8000', use_for_embeddings=True)\n"
        "    Server.objects.create(name='Main', kind='vllm', base_url='http://localhost:8001', use_for_embeddings=True)\n"
    )
    with visit(gateway) as (page, trouble):
        page.goto("/admin/providers/activeprovider/embeddings/change/")
        page.select_option("[name=targets-0-provider]", label="Spare")
        page.select_option("[name=targets-1-provider]", label="Main")
        page.fill("[name=targets-1-model]", "bge")
        page.click("[data-up] >> visible=true")
        assert page.input_value("[name=targets-0-model]") == "bge"
        page.click("#active-form button[type=submit]")
        page.wait_for_selector("text=Embeddings now goes to Main")
        page.goto("/admin/providers/activeprovider/embeddings/change/")
        page.locator("[data-empty]").nth(1).click()
        page.click("#active-form button[type=submit]")
        page.wait_for_selector("text=Embeddings now goes to Main")
        assert "Spare" not in page.inner_text("#ps-embeddings >> xpath=../..")
        assert trouble == []


@pytest.fixture(scope="module")
def full(gateway: Gateway) -> Gateway:
    """The shared installation, with names as long and sums as large as there will be."""
    gateway.shell(
        "from audit.changes import changes; from providers.models import Provider\n"
        "from proxy.models import ModelRoute, RouteNode\n"
        "with changes(actor=None, via='system'):\n"
        "    route, made = ModelRoute.objects.get_or_create(name='fast', mode='specific')\n"
        "    echo = Provider.objects.get(slug='echo')\n"
        "    RouteNode.objects.get_or_create(route=route, position=0, provider=echo, models=['org/' + 'long-name-' * 12])\n"
        f"{A_LONG_WAY}{MUCH}"
    )
    return gateway


def test_no_page_is_wider_than_a_phone_or_complains(full: Gateway, visit: Visit) -> None:
    with visit(full, width=390, dark=True) as (page, trouble):
        assert too_wide(page, 390, PAGES) == []
        assert trouble == []


def test_r45_hostile_names_are_only_text_and_no_page_is_wider_than_a_screen(
    full: Gateway, visit: Visit
) -> None:
    full.shell(f"from tests.browser.hostile import fill; fill({HOSTILE!r})")
    with visit(full) as (page, trouble):
        assert too_wide(page, 1280, (*PAGES, *hostile_pages(page))) == []
        page.goto("/admin/providers/server/")
        assert page.get_by_text(HOSTILE[0], exact=False).count() >= 1
        assert [line for line in trouble if "dialog" in line or "Content Security Policy" in line] == []
        assert trouble == []


def too_wide(page: Page, width: int, addresses: Sequence[str]) -> list[str]:
    wide = []
    for address in addresses:
        page.goto(address)
        if page.evaluate("document.documentElement.scrollWidth") > width:
            wide.append(address)
    return wide


def hostile_pages(page: Page) -> list[str]:
    """The pages of the rows that `fill` made, as the lists link to them."""
    found = []
    for address in (
        "providers/server",
        "providers/upstreammodel",
        "proxy/gatewaykey",
        "proxy/modelroute",
        "proxy/modelprice",
        "proxy/usagerecord",
        "audit/entry",
    ):
        page.goto(f"/admin/{address}/")
        links = page.locator("#result_list a[href*='/change/']")
        found += [str(link.get_attribute("href")) for link in links.all()][:6]
    return list(dict.fromkeys(found))
