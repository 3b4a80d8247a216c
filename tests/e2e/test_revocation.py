"""R15: however a gateway key ends, it ends everywhere: on every worker, for new requests, open streams and sockets."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.support import answers
from tests.support.gateway import Gateway
from tests.support.upstream import Upstream
from tests.support.valkey import Valkey

pytestmark = pytest.mark.no_database

WAYS = {
    "revoked": "revoke(key)",
    "disabled": "key.enabled = False; key.save()",
    "deleted": "key.delete()",
    "expired": "key.expires_at = timezone.now(); key.save()",
    "owner disabled": "key.owner.is_active = False; key.owner.save()",
    "owner deleted": "key.owner.delete()",
    "team deleted": "key.team.delete()",
}
ISSUE = f"""
import json
from audit.changes import changes
from django.contrib.auth.models import Group, User
from proxy.keys import give_secret
from proxy.models import GatewayKey
wholes = {{}}
with changes(actor=None, via='command'):
    for way in [*{list(WAYS)!r}, 'runs out', 'goes on']:
        key = GatewayKey(name=way)
        if way.startswith('owner'):
            key.owner = User.objects.create(username=way.replace(' ', '-'))
        if way.startswith('team'):
            key.team = Group.objects.create(name='ml')
        wholes[way] = give_secret(key)
        key.save()
print(json.dumps(wholes))
"""
RUNS_OUT_AFTER = 2.0
END = f"""
import time
from datetime import timedelta
from audit.changes import changes
from django.utils import timezone
from proxy.keys import revoke
from proxy.models import GatewayKey
with changes(actor=None, via='command'):
    for way, code in {WAYS!r}.items():
        key = GatewayKey.objects.get(name=way)
        exec(code)
    key = GatewayKey.objects.get(name='runs out')
    key.expires_at = timezone.now() + timedelta(seconds={RUNS_OUT_AFTER})
    key.save()
print(time.time())
"""


def last_event(gateway: Gateway, key: str) -> tuple[float, str]:
    """When a stream ended, and the code of the error it ended with."""
    body = {"messages": [{"role": "user", "content": "hello"}], "stream": True}
    text = ""
    with gateway.client(key) as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        for part in response.iter_text():
            text += part
    return time.time(), json.loads(text.rstrip().rsplit("data: ", 1)[1])["error"]["code"]


def socket_of(gateway: Gateway, key: str) -> ClientConnection:
    address = gateway.url.replace("http", "ws", 1) + "/ws/chat"
    return connect(address, additional_headers={"Authorization": f"Bearer {key}"}, proxy=None)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("redis", ["without Redis", "Redis hangs"])
def test_r15_a_key_that_ends_stops_within_a_second_on_every_worker_stream_and_socket(redis: str) -> None:
    slow = answers.ok(chunks=1500, delay=0.02)
    with ExitStack() as stack:
        upstream = stack.enter_context(Upstream(slow))
        valkey = stack.enter_context(Valkey()) if redis == "Redis hangs" else None
        gateway = stack.enter_context(Gateway(env={"WEB_CONCURRENCY": "2"}, redis=valkey))
        gateway.wait_for_key(gateway.provide(f"{upstream.url}/v1"))
        wholes = json.loads(gateway.shell(ISSUE).splitlines()[-1])
        gateway.wait_for_key(wholes["goes on"])
        ending = {way: whole for way, whole in wholes.items() if way != "goes on"}

        pool = stack.enter_context(ThreadPoolExecutor(2 * len(ending)))
        stack.callback(upstream.drop_connections)  # a test that fails does not wait for its streams
        running: dict[str, list[Future[tuple[float, str]]]] = {
            way: [pool.submit(last_event, gateway, whole) for _ in range(2)] for way, whole in ending.items()
        }
        sockets = {way: stack.enter_context(socket_of(gateway, whole)) for way, whole in ending.items()}
        upstream.ledger.wait_for(lambda ledger: len(ledger.asked) == 2 * len(ending), 20)
        if valkey is not None:
            valkey.pause()
        ended = float(gateway.shell(END).splitlines()[-1])

        for way, streams in running.items():
            allowed = 1.0 + (RUNS_OUT_AFTER if way == "runs out" else 0)
            for each in streams:
                at, code = each.result()
                assert code == "key_revoked", way
                assert at - ended < allowed + 0.5, (
                    way
                )  # half a second for a machine that does other things as well
        for way, socket in sockets.items():
            assert json.loads(socket.recv(timeout=5))["error"]["code"] == "key_revoked", way
            with pytest.raises(ConnectionClosed) as closed:
                socket.recv(timeout=5)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 4401, way
        for way, whole in ending.items():
            for _ in range(8):
                answer = httpx.get(f"{gateway.url}/v1/models", headers={"x-api-key": whole})
                assert answer.status_code == 401, way
            with pytest.raises(InvalidStatus) as refused:
                socket_of(gateway, whole)
            assert refused.value.response.status_code == 401, way
        with gateway.client(wholes["goes on"]) as client:
            assert client.get("/v1/models").status_code == 200
        if valkey is not None:
            valkey.resume()
