"""Single sign-on with OpenID Connect (Keycloak and others): who somebody is and which roles he has is told by the issuer.

allauth walks the authorization code flow, with state and PKCE. Added here: a nonce, a token whose signature, issuer and audience
are always checked, claims from the token and the userinfo of the same subject only, and roles that follow the claims with
every login. Requests go through the same checked client as those to providers. See docs/guide.md.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import httpx
import jwt
import requests
from allauth.account.decorators import reauthentication_required
from allauth.account.utils import get_next_redirect_url
from allauth.core.exceptions import ImmediateHttpResponse
from allauth.socialaccount.adapter import DefaultSocialAccountAdapter
from allauth.socialaccount.providers.oauth2.client import OAuth2Error
from allauth.socialaccount.providers.oauth2.views import OAuth2CallbackView
from allauth.socialaccount.providers.openid_connect.provider import OpenIDConnectProvider
from allauth.socialaccount.providers.openid_connect.views import OpenIDConnectOAuth2Adapter
from asgiref.sync import async_to_sync
from django.conf import settings
from django.contrib import messages
from django.contrib.auth.models import Group
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import render
from django.urls import reverse
from django.utils.crypto import constant_time_compare, get_random_string
from django.views.decorators.http import require_POST

from audit.access.records import note, recorded
from audit.access.signing_in import refused
from audit.roles import Role
from providers.client import control_plane_client
from providers.destination import Policy
from providers.errors import ProviderError

logger = logging.getLogger(__name__)

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Signatures with a key pair. Never HS256: its secret is known on both sides."""
LEEWAY = 60
"""Seconds that the clocks may differ."""
TIMEOUT = 10.0
MAX_ANSWER = 1024 * 1024
NONSENSE = (ValueError, KeyError, TypeError, AttributeError)
"""What comes of reading an answer that is JSON of another shape than it should have, or none."""
KEPT = ("sub", "preferred_username", "email", "name", "given_name", "family_name")
"""What is stored of the claims."""
FAILED = (
    "The identity provider did not confirm who you are. Try again; if it stays like this, the log tells why."
)
NO_ROLE = (
    "You are known to the identity provider, but none of your groups or roles there has a role here. "
    "Ask an administrator for access."
)


# -- requests to the issuer --------------------------------------------------------------------------------------------


class IssuerSession:
    """What allauth needs of a `requests` session, on the checked client: no redirects, no environment, bounded answers."""

    def __enter__(self) -> IssuerSession:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def get(self, url: str, headers: Mapping[str, str] | None = None) -> httpx.Response:
        response = self.request("GET", url, headers=headers)
        if response.status_code != 200:
            raise requests.HTTPError(f"{url} answered {response.status_code}")
        return response

    def request(self, method: str, url: str, **options: Any) -> httpx.Response:
        """Raises requests.RequestException, as allauth expects it, whatever goes wrong."""
        auth = options.pop("auth", None)
        if auth is not None:
            options["auth"] = (auth.username, auth.password)
        try:
            return async_to_sync(_ask)(method, url, options)
        except (httpx.HTTPError, httpx.InvalidURL, ProviderError, TimeoutError) as error:
            raise requests.ConnectionError(f"{url}: {type(error).__name__}") from error


async def _ask(method: str, url: str, options: dict[str, Any]) -> httpx.Response:
    policy = Policy(True, tuple(settings.PRIVATE_NETWORKS), plain=url.startswith("http:"))
    async with (
        asyncio.timeout(TIMEOUT),
        control_plane_client(policy) as client,
        client.stream(method, url, **options) as answer,
    ):
        body = bytearray()
        async for part in answer.aiter_bytes():
            body += part
            if len(body) > MAX_ANSWER:
                raise httpx.ReadError("the answer is too large")
        return httpx.Response(
            answer.status_code, headers=answer.headers, content=bytes(body), request=answer.request
        )


# -- the flow ----------------------------------------------------------------------------------------------------------


class Issuer(OpenIDConnectOAuth2Adapter):  # type: ignore[misc]  # allauth carries no types
    """The endpoints of OIDC_ISSUER, and what is believed of its answers."""

    nonce = ""

    def get_provider(self) -> Any:
        app = SignOn(self.request).get_app(self.request, provider=self.provider_id)
        return Client(self.request, app=app)

    @property
    def openid_config(self) -> dict[str, Any]:
        """As discovered; OAuth2Error when it speaks of another issuer (OpenID Connect Discovery, 4.3)."""
        known = hasattr(self, "_openid_config")
        config: dict[str, Any] = super().openid_config
        if not known and str(config.get("issuer", "")).rstrip("/") != settings.OIDC_ISSUER:
            raise OAuth2Error("the discovered issuer is not OIDC_ISSUER")
        return config

    def get_callback_url(self, request: HttpRequest, app: Any) -> str:
        """The one address that is registered with the issuer."""
        return f"{settings.PUBLIC_URL}{reverse('sso_callback')}"

    def complete_login(self, request: HttpRequest, app: Any, token: Any, **kwargs: Any) -> Any:
        """The claims of the ID token, and of the userinfo what it does not say."""
        signed = self.verified(app, str(kwargs["response"].get("id_token") or ""))
        told: Any = {}
        if "userinfo_endpoint" in self.openid_config:
            told = self._fetch_user_info(token.token)
            if not isinstance(told, dict) or told.get("sub") != signed["sub"]:
                raise OAuth2Error("userinfo speaks of another subject than the ID token")
        return self.get_provider().sociallogin_from_response(request, {"id_token": {**told, **signed}})

    def verified(self, app: Any, id_token: str) -> dict[str, Any]:
        """The claims of an ID token (OpenID Connect Core, 3.1.3.7). OAuth2Error for one that is not for us, now."""
        with IssuerSession() as session:
            keys = session.get(self.openid_config["jwks_uri"]).json()
        try:
            kid = jwt.get_unverified_header(id_token).get("kid")
            usable = [key for key in jwt.PyJWKSet.from_dict(keys).keys if key.public_key_use in (None, "sig")]
            found = [key for key in usable if key.key_id == kid] if kid else usable
            if len(found) != 1:
                raise OAuth2Error("the ID token is signed with a key that the issuer does not publish")
            claims: dict[str, Any] = jwt.decode(
                id_token,
                found[0],
                algorithms=list(ALGORITHMS),
                issuer=self.openid_config["issuer"],
                audience=app.client_id,
                leeway=LEEWAY,
                options={"require": ["exp", "iat", "iss", "aud", "sub"]},
            )
        except (jwt.PyJWTError, *NONSENSE) as error:
            raise OAuth2Error(f"the ID token is not valid: {type(error).__name__}") from error
        if isinstance(claims["aud"], list) and len(claims["aud"]) > 1 and claims.get("azp") != app.client_id:
            raise OAuth2Error("the ID token was made for another client")
        if not self.nonce or not constant_time_compare(str(claims.get("nonce", "")), self.nonce):
            raise OAuth2Error("the ID token answers another login")
        return claims


class Client(OpenIDConnectProvider):  # type: ignore[misc]  # allauth carries no types
    """We, as the issuer knows us."""

    oauth2_adapter_class = Issuer

    def extract_extra_data(self, data: dict[str, Any]) -> dict[str, Any]:
        return {"id_token": {name: data["id_token"][name] for name in KEPT if name in data["id_token"]}}

    def sociallogin_from_response(self, request: HttpRequest, response: dict[str, Any]) -> Any:
        login = super().sociallogin_from_response(request, response)
        # Only for this login: what is stored afterwards are the roles that come of them.
        login.claims = response["id_token"]
        return login


class Callback(OAuth2CallbackView):  # type: ignore[misc]  # allauth carries no types
    def _get_state(self, request: HttpRequest, provider: Any) -> Any:
        state, response = super()._get_state(request, provider)
        self.adapter.nonce = (state or {}).get("nonce", "")
        return state, response


@require_POST
def start(request: HttpRequest) -> HttpResponse:
    """From the login page to the issuer."""
    return _leave(request, "login", get_next_redirect_url(request))


@require_POST
@reauthentication_required(app="allauth.mfa")  # type: ignore[untyped-decorator]  # allauth carries no types
def link(request: HttpRequest) -> HttpResponse:
    """The same, to let somebody who is logged in here use his account there from now on."""
    return _leave(request, "connect", reverse("mfa_index"))


def _leave(request: HttpRequest, process: str, next_url: str | None) -> HttpResponse:
    if not settings.OIDC_ISSUER:
        raise Http404
    nonce = get_random_string(32)
    try:
        provider = Issuer(request, settings.OIDC_ISSUER).get_provider()
        redirect = provider.redirect(request, process, next_url, auth_params={"nonce": nonce}, nonce=nonce)
    except (OAuth2Error, requests.RequestException, *NONSENSE) as error:
        logger.warning("single sign-on failed: %s", error)
        return refused(request, "The identity provider cannot be reached. Try again later.", 502)
    # A page of ours that leads on, since the content security policy lets no form lead to another site.
    return render(request, "admin/access/leave.html", {"url": redirect.url})


def callback(request: HttpRequest) -> HttpResponse:
    """From the issuer back to us, logged in or told why not."""
    if not settings.OIDC_ISSUER:
        raise Http404
    try:
        view = Callback.adapter_view(Issuer(request, settings.OIDC_ISSUER))
        answer: HttpResponse = view(request)
    except NONSENSE as error:
        logger.warning("single sign-on failed: %s", type(error).__name__)
        return refused(request, FAILED)
    return answer


# -- who may in, and as what -------------------------------------------------------------------------------------------


class SignOn(DefaultSocialAccountAdapter):  # type: ignore[misc]  # allauth carries no types
    """What allauth asks about an account of the issuer."""

    def get_requests_session(self) -> IssuerSession:
        return IssuerSession()

    def is_open_for_signup(self, request: HttpRequest, sociallogin: Any) -> bool:
        """Whoever has no role was turned away in `pre_social_login`."""
        return True

    def authenticate_by_email(self, sociallogin: Any) -> None:
        """An address of mail makes nobody somebody else, whoever verified it."""

    def pre_social_login(self, request: HttpRequest, sociallogin: Any) -> None:
        """Turn away who has no role, with what he had taken from him; else give him the roles he has now."""
        if sociallogin.state.get("process") == "connect":
            raise ImmediateHttpResponse(_linked(request, sociallogin))
        wanted = groups_of(sociallogin.claims)
        if sociallogin.is_existing:
            with recorded(request, actor=sociallogin.user):
                give(sociallogin.user, wanted)
        if not wanted:
            logger.warning("single sign-on refused somebody without a role")
            raise ImmediateHttpResponse(refused(request, NO_ROLE))

    def save_user(self, request: HttpRequest, sociallogin: Any, form: Any = None) -> Any:
        """A new person, recorded with his roles, or none at all."""
        with recorded(request):
            user = super().save_user(request, sociallogin, form)
            note(user, "add_user", {"single sign-on": [None, settings.OIDC_ISSUER]})
            give(user, groups_of(sociallogin.claims))
        return user

    def on_authentication_error(self, request: HttpRequest, provider: Any, **kwargs: Any) -> None:
        logger.warning(
            "single sign-on failed: %s",
            kwargs.get("exception") or request.GET.get("error", "")[:64] or "no such state",
        )
        raise ImmediateHttpResponse(refused(request, FAILED))


def _linked(request: HttpRequest, sociallogin: Any) -> HttpResponse:
    if sociallogin.is_existing:
        messages.error(request, "That account is linked with another one here already.")
    elif not request.user.is_authenticated:
        return refused(request, FAILED)
    else:
        with recorded(request):
            sociallogin.connect(request, request.user)
            note(request.user, "link_user", {"single sign-on": [None, settings.OIDC_ISSUER]})
        messages.success(request, "Linked. You can now log in with single sign-on.")
    return HttpResponseRedirect(reverse("mfa_index"))


def claim_values(claims: Any, path: str) -> frozenset[str]:
    """The texts at a dotted path ("realm_access.roles"); a name with dots in it (a URL) is found, too."""
    if path in claims:
        found = claims[path]
    else:
        found = claims
        for name in path.split("."):
            found = found.get(name) if isinstance(found, dict) else None
    if isinstance(found, str):
        return frozenset(found.split())
    return (
        frozenset(value for value in found if isinstance(value, str))
        if isinstance(found, list)
        else frozenset()
    )


def groups_of(claims: Any) -> frozenset[str]:
    """The names of the groups, roles and teams, that OIDC_ROLE_MAP makes of the claims."""
    values = claim_values(claims, settings.OIDC_ROLE_CLAIM)
    return frozenset(group for value, group in settings.OIDC_ROLE_MAP if value in values)


def give(user: Any, wanted: Iterable[str]) -> None:
    """Make the user's roles and mapped teams exactly these; other teams are his own business. Inside `audit.changes`."""
    wanted = set(wanted)
    ours = {*Role, *(group for _, group in settings.OIDC_ROLE_MAP)}
    has = set(user.groups.filter(name__in=ours).values_list("name", flat=True))
    if lost := has - wanted:
        user.groups.remove(*Group.objects.filter(name__in=lost))
    if gained := wanted - has:
        user.groups.add(*(Group.objects.get_or_create(name=name)[0] for name in sorted(gained)))
