"""The outbound policy: what may be saved as a base URL, and what may be dialled."""

from __future__ import annotations

import contextlib
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.destination import Policy, check_address, check_url
from providers.errors import DestinationNotAllowed

pytestmark = pytest.mark.no_database

EVERYTHING = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))
LOOSEST = Policy(allow_private=True, private_networks=EVERYTHING)
STRICT = Policy()
SELF_HOSTED = Policy(allow_private=True)

WIDE = "169.254.169.254".translate({code: code + 0xFEE0 for code in range(0x2E, 0x3A)})
"""An address in full-width digits and dots."""
NEVER = [
    "169.254.169.254", "169.254.170.2", "169.254.170.23", "100.100.100.200", "168.63.129.16", "192.0.0.192", "0.0.0.0",
    "0.1.2.3", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "fe80::1", "fe80::1%eth0", "ff02::1", "fd00:ec2::254",
    "fd20:ce::254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe", "64:ff9b:1:a9fe:a9:fe00::",
    "2002:a9fe:a9fe::", "2001:0:a9fe:a9fe::1", "2001:0:808:808::5601:5601", "::a9fe:a9fe", "::ffff:0.0.0.0",
    "64:ff9b::6464:64c8",
]  # fmt: skip
PRIVATE = [
    "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "::1", "fd12:3456::1", "::ffff:10.0.0.1",
    "::ffff:127.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::",
]  # fmt: skip
RESERVED = [
    "100.64.0.1",
    "198.18.0.1",
    "192.0.0.1",
    "192.0.2.1",
    "198.51.100.1",
    "203.0.113.1",
    "fec0::1",
    "2001:db8::1",
]
PUBLIC = ["1.1.1.1", "8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"]


@pytest.mark.parametrize("address", NEVER)
def test_r19_r22_metadata_and_link_local_are_refused_whatever_is_allowed(address: str) -> None:
    with pytest.raises(DestinationNotAllowed):
        check_address(address, 443, policy=LOOSEST)


@pytest.mark.parametrize("address", PRIVATE + RESERVED)
def test_r20_a_vendor_may_not_dial_a_private_address(address: str) -> None:
    with pytest.raises(DestinationNotAllowed):
        check_address(address, 443, policy=STRICT)


@pytest.mark.parametrize("address", PRIVATE[:9])
def test_r20_a_self_hosted_kind_may_dial_the_private_networks(address: str) -> None:
    check_address(address, 11434, policy=SELF_HOSTED)


@pytest.mark.parametrize("address", RESERVED)
def test_r20_only_the_private_networks_are_opened_by_allow_private(address: str) -> None:
    with pytest.raises(DestinationNotAllowed, match="PRIVATE_NETWORKS"):
        check_address(address, 443, policy=SELF_HOSTED)
    check_address(address, 443, policy=LOOSEST)


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_dialled_over_tls_only(address: str) -> None:
    check_address(address, 443, policy=STRICT)
    with pytest.raises(DestinationNotAllowed, match="https"):
        check_address(address, 80, policy=Policy(allow_private=True, plain=True))


def test_plain_http_is_for_private_addresses() -> None:
    check_address("127.0.0.1", 11434, policy=Policy(allow_private=True, plain=True))


@pytest.mark.parametrize("address", ["127.0.0.1", "::ffff:127.0.0.1"])
def test_r20_our_own_database_redis_and_listener_are_refused_by_address_and_port(address: str) -> None:
    policy = Policy(allow_private=True, own=frozenset({("127.0.0.1", 5432)}))
    with pytest.raises(DestinationNotAllowed, match="itself"):
        check_address(address, 5432, policy=policy)
    check_address(address, 11434, policy=policy)


def test_r20_a_listener_on_every_address_is_refused_on_loopback() -> None:
    policy = Policy(allow_private=True, own=frozenset({("0.0.0.0", 8000)}))
    for address in ("127.0.0.1", "127.0.0.2", "::1"):
        with pytest.raises(DestinationNotAllowed):
            check_address(address, 8000, policy=policy)


@pytest.mark.parametrize(
    "host",
    [
        "0", "0.0.0.0", "127.1", "2852039166", "0xa9fea9fe", "0XA9FEA9FE", "0251.0376.0251.0376", "169.254.43518",
        "169.254.169.254", "169.254.169.254.", "169.254.169.254..", "[::ffff:169.254.169.254]", "[64:ff9b::a9fe:a9fe]",
        "[2002:a9fe:a9fe::]", "[fe80::1%25eth0]", "[fe80::1%eth0]", "①⑥⑨。②⑤④。①⑥⑨。②⑤④", WIDE,
        "①②⑦.①", "metadata", "metadata.google.internal", "METADATA.google.internal.", "instance-data", "ok@169.254.169.254",
        "user:word@10.0.0.1", "0x7f.0.0.1", "127.0.0.0x1", "1.2.3.4.5", "[::]", "169.254.169.254:80", "0177.0.0.1",
        "%31%36%39.254.169.254", "", ":80", "ex ample.com", "example.com\\@169.254.169.254",
    ],
)  # fmt: skip
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_r22_every_spelling_of_a_forbidden_host_is_refused_when_saved(scheme: str, host: str) -> None:
    with pytest.raises(DestinationNotAllowed):
        check_url(f"{scheme}://{host}/v1", allow_private=True, private_networks=EVERYTHING)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "gopher://127.0.0.1:6379/_x", "unix:/run/x.sock", "ftp://example.com", "//example.com", "example.com",
        "https://example.com/#x", "https://example.com/v1?key=1", "https://example.com:0/", "https://example.com:99999/",
        "https://example.com/\r\nX: y", "https://exa\tmple.com", "https://[::1", "https://example.com:80:80/", "javascript:alert(1)",
        "https://example.com/" + "a" * 3000,
    ],
)  # fmt: skip
def test_r22_what_is_no_http_base_url_is_refused(url: str) -> None:
    with pytest.raises(DestinationNotAllowed):
        check_url(url, allow_private=True)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:11434", "http://127.0.0.1:8000/v1", "http://[::1]:8080", "http://10.1.2.3", "http://192.168.0.7/v1/",
        "http://[fd00::7]/", "http://vllm:8000/v1", "https://gpu.example.com/v1",
    ],
)  # fmt: skip
def test_r20_a_self_hosted_server_on_a_private_network_can_be_saved(url: str) -> None:
    check_url(url, allow_private=True)


@pytest.mark.parametrize(
    "url",
    ["http://localhost:11434", "https://10.0.0.1", "https://api.localhost", "http://api.example.com/v1"],
)
def test_a_vendor_needs_a_public_address_and_https(url: str) -> None:
    with pytest.raises(DestinationNotAllowed):
        check_url(url, allow_private=False)


@pytest.mark.parametrize(
    "url",
    [
        "https://api.openai.com/v1",
        "https://8.8.8.8/v1",
        "https://bücher.example/v1",
        "https://API.example.com:8443/",
    ],
)
def test_a_vendors_public_address_can_be_saved(url: str) -> None:
    check_url(url, allow_private=False)


def test_our_own_listener_cannot_be_saved() -> None:
    with pytest.raises(DestinationNotAllowed):
        check_url("http://127.0.0.1:8000", allow_private=True, own=[("127.0.0.1", 8000)])


@given(address=st.ip_addresses(v=4), port=st.integers(1, 65535))
def test_an_ipv4_address_is_judged_alike_in_every_ipv6_clothing(
    address: ipaddress.IPv4Address, port: int
) -> None:
    bits = int(address)
    dressed = [
        ipaddress.IPv6Address(0xFFFF << 32 | bits),
        ipaddress.IPv6Address((0x64FF9B << 96) | bits),
        ipaddress.IPv6Address((0x2002 << 112) | bits << 80),
        ipaddress.IPv6Address((0x20010000 << 96) | bits << 64 | 0xF7F7F7F7),
    ]
    for policy in (STRICT, SELF_HOSTED, LOOSEST):
        if allowed(str(address), port, policy):
            continue
        assert not any(allowed(str(each), port, policy) for each in dressed)


@given(address=st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_the_strict_policy_never_dials_what_python_knows_to_be_private(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    if allowed(str(address), 443, STRICT):
        assert not any((address.is_private, address.is_loopback, address.is_link_local, address.is_multicast))


@given(text=st.text(max_size=40))
def test_no_text_breaks_the_check_of_urls(text: str) -> None:
    for url in (text, f"https://{text}", f"http://{text}/v1"):
        with contextlib.suppress(DestinationNotAllowed):
            check_url(url, allow_private=True)


def allowed(address: str, port: int, policy: Policy) -> bool:
    try:
        check_address(address, port, policy=policy)
    except DestinationNotAllowed:
        return False
    return True
