"""Tokens for people: JSON web tokens for a user name and a password, renewed and revoked."""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar
from uuid import uuid4

from django.conf import settings
from django.contrib.auth import get_user_model
from django.db import transaction
from django.db.models import Q
from drf_spectacular.utils import extend_schema
from rest_framework import exceptions, serializers
from rest_framework.permissions import AllowAny
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView
from rest_framework_simplejwt.exceptions import TokenError
from rest_framework_simplejwt.settings import api_settings
from rest_framework_simplejwt.token_blacklist.models import BlacklistedToken, OutstandingToken
from rest_framework_simplejwt.tokens import RefreshToken
from rest_framework_simplejwt.utils import get_md5_hash_password

from audit.access import second_factor, signing_in
from audit.access.records import note, recorded
from audit.api_errors import CodeNeeded
from audit.api_views import KnownFields, OnlyJSON

WRONG = "The user name or the password is wrong."
STALE = "The refresh token is not valid, or no longer."


class FamilyToken(RefreshToken):
    """A refresh token that knows its family: all that come of one login, each renewed from the one before.

    Its id is `<family>.<own>`, so a family is found by its beginning; the token itself is not kept, so that a dump of the
    database is worth nothing.
    """

    def set_jti(self) -> None:
        family = str(self.payload.get("jti", "")).partition(".")[0] or uuid4().hex
        self.payload["jti"] = f"{family}.{uuid4().hex}"

    @classmethod
    def for_user(cls, user: Any) -> FamilyToken:
        token: Any = super().for_user(user)
        token.forget_text()
        made: FamilyToken = token
        return made

    def outstand(self) -> Any:
        made = super().outstand()
        self.forget_text()
        return made

    def forget_text(self) -> None:
        OutstandingToken.objects.filter(jti=self.payload["jti"]).update(token="")

    @property
    def family(self) -> Any:
        start = str(self.payload["jti"]).partition(".")[0]
        return OutstandingToken.objects.filter(Q(jti=start) | Q(jti__startswith=f"{start}."))

    def spend(self) -> bool:
        """Whether this was its first use; of several at the same time, one is."""
        answer: Any = super().blacklist()
        return bool(answer[1])

    @property
    def owner(self) -> Any:
        """Raises User.DoesNotExist for somebody who is gone, or switched off."""
        key: Any = self.payload.get(api_settings.USER_ID_CLAIM)
        return get_user_model().objects.get(pk=key, is_active=True)

    def lock_owner(self) -> None:
        """Have whoever renews or ends something of the same person wait until this transaction ends.

        Else a renewal on its way would spend the old token before, and bring the new one after its family was ended.
        """
        key: Any = self.payload.get(api_settings.USER_ID_CLAIM)
        get_user_model().objects.select_for_update(no_key=True).filter(pk=key).first()

    def end_family(self) -> None:
        """Nobody can renew anything of this login again. Inside a transaction."""
        self.lock_owner()
        BlacklistedToken.objects.bulk_create(
            [BlacklistedToken(token=each) for each in self.family.filter(blacklistedtoken=None)],
            ignore_conflicts=True,
        )


class Unspent(FamilyToken):
    """The signature and the dates of one that may be spent."""

    def check_blacklist(self) -> None:
        return None


class Login(KnownFields):
    username = serializers.CharField(max_length=150)
    password = serializers.CharField(max_length=4096, trim_whitespace=False)
    otp = serializers.CharField(
        required=False,
        allow_blank=True,
        max_length=64,
        help_text="Required when a second factor is enrolled.",
    )


class Refresh(KnownFields):
    refresh = serializers.CharField(max_length=4096)


class Tokens(serializers.Serializer[Any]):
    access = serializers.CharField()
    refresh = serializers.CharField()
    expires_in = serializers.IntegerField(help_text="Seconds until `access` expires.")


class TokenView(APIView):
    """Open to everybody, since it is here that one becomes somebody; cookies do not count."""

    authentication_classes: list[Any] = []
    permission_classes = [AllowAny]
    content_negotiation_class = OnlyJSON
    form: ClassVar[type[KnownFields]] = Refresh

    def get_authenticate_header(self, request: Request) -> str:
        return 'Bearer realm="api"'

    def read(self, request: Request) -> dict[str, Any]:
        form = self.form(data=request.data)
        form.is_valid(raise_exception=True)
        values: dict[str, Any] = form.validated_data
        return values


class ObtainToken(TokenView):
    form = Login

    @extend_schema(request=Login, responses=Tokens, tags=["auth"])
    def post(self, request: Request) -> Response:
        """Tokens for a user name, a password and, where one is enrolled, the code of a second factor.

        401 `OTP_REQUIRED` and `OTP_INVALID` come only after a right password. Too many wrong guesses: 429 for a while.
        """
        values = self.read(request)
        try:
            user = signed_in(request, **values)
        except signing_in.Locked:
            raise exceptions.Throttled(wait=signing_in.lock_seconds(request)) from None
        with recorded(request, actor=user):
            token = FamilyToken.for_user(user)
            note(user, "issue_token")
        return answer(token)


def signed_in(request: Request, *, username: str, password: str, otp: str = "") -> Any:
    """The user. Raises AuthenticationFailed, CodeNeeded, or signing_in.Locked.

    The wrapped request keeps the mark of a lock to itself, so that the answer has this API's shape.
    """
    user = signing_in.check_password(request, username=username, password=password)
    if user is None:
        raise exceptions.AuthenticationFailed(WRONG)
    if second_factor.is_enrolled(user):
        if not otp:
            raise CodeNeeded(wrong=False)
        if second_factor.accept_code(request, user, otp) is None:
            raise CodeNeeded(wrong=True)
    return user


class RefreshTokenView(TokenView):
    @extend_schema(request=Refresh, responses=Tokens, tags=["auth"])
    def post(self, request: Request) -> Response:
        """A new pair; the refresh token that was sent is spent. One that was spent before ends all that came of its login."""
        values = self.read(request)
        try:
            return answer(renewed(request, values["refresh"]))
        except (TokenError, get_user_model().DoesNotExist) as error:
            raise exceptions.AuthenticationFailed(STALE) from error


def renewed(request: Request, text: Any) -> FamilyToken:
    """The next token of the family. Raises TokenError or User.DoesNotExist.

    When a spent one comes back, two hold it and one of them stole it, so nobody may go on.
    """
    token = Unspent(text)
    with transaction.atomic():
        token.lock_owner()
        user = token.owner
        if token.payload.get(api_settings.REVOKE_TOKEN_CLAIM) != get_md5_hash_password(user.password):
            raise TokenError("the password has changed")
        if token.spend():
            token.set_jti()
            token.set_exp()
            token.set_iat()
            token.outstand()
            return token
    if token.family.filter(blacklistedtoken=None).exists():
        with recorded(request, actor=user):
            token.end_family()
            note(user, "revoke_token", {"why": [None, "a spent token was used again"]})
    raise TokenError("the token is spent")


class RevokeToken(TokenView):
    @extend_schema(request=Refresh, responses={204: None}, tags=["auth"])
    def post(self, request: Request) -> Response:
        """End the login that a refresh token came of, so that nobody can renew it. One that is spent already is fine."""
        values = self.read(request)
        with contextlib.suppress(TokenError, get_user_model().DoesNotExist):
            token = Unspent(values["refresh"])
            user = token.owner
            with recorded(request, actor=user):
                token.end_family()
                note(user, "revoke_token")
        return Response(status=204)


def answer(token: RefreshToken) -> Response:
    return Response(
        {"access": str(token.access_token), "refresh": str(token), "expires_in": settings.JWT_ACCESS_SECONDS}
    )
