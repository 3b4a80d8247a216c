"""Tokens for people: JSON web tokens for a user name and a password, renewed and revoked."""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

from axes.helpers import get_cool_off
from django.conf import settings
from django.contrib.auth import authenticate, get_user_model
from drf_spectacular.utils import extend_schema
from rest_framework import exceptions, serializers
from rest_framework.permissions import AllowAny
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView
from rest_framework_simplejwt.exceptions import TokenError
from rest_framework_simplejwt.serializers import TokenRefreshSerializer
from rest_framework_simplejwt.tokens import RefreshToken

from audit.api_views import KnownFields, OnlyJSON

WRONG = "The user name or the password is wrong."


class Login(KnownFields):
    username = serializers.CharField(max_length=150)
    password = serializers.CharField(max_length=4096, trim_whitespace=False)
    otp = serializers.CharField(
        required=False, allow_blank=True, help_text="Required when a second factor is enrolled."
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
        """Tokens for a user name and a password; too many wrong ones are answered with 429 for a while."""
        values = self.read(request)
        # The wrapped request keeps the mark of a lockout to itself, so that the answer has this API's shape.
        user = authenticate(request=request, username=values["username"], password=values["password"])
        if getattr(request, "axes_locked_out", False):
            cool_off = get_cool_off(request)
            raise exceptions.Throttled(wait=cool_off.total_seconds() if cool_off else None)
        if user is None:
            raise exceptions.AuthenticationFailed(WRONG)
        return answer(RefreshToken.for_user(user))


class RefreshTokenView(TokenView):
    @extend_schema(request=Refresh, responses=Tokens, tags=["auth"])
    def post(self, request: Request) -> Response:
        """A new pair; the refresh token that was sent is spent."""
        form = TokenRefreshSerializer(data=self.read(request))
        try:
            form.is_valid(raise_exception=True)
        except (TokenError, get_user_model().DoesNotExist) as error:
            raise exceptions.AuthenticationFailed("The refresh token is not valid, or no longer.") from error
        return Response({**form.validated_data, "expires_in": settings.JWT_ACCESS_SECONDS})


class RevokeToken(TokenView):
    @extend_schema(request=Refresh, responses={204: None}, tags=["auth"])
    def post(self, request: Request) -> Response:
        """Spend a refresh token, so that nobody can use it again. One that is spent already is fine."""
        values = self.read(request)
        with contextlib.suppress(TokenError):
            RefreshToken(values["refresh"]).blacklist()
        return Response(status=204)


def answer(token: RefreshToken) -> Response:
    return Response(
        {"access": str(token.access_token), "refresh": str(token), "expires_in": settings.JWT_ACCESS_SECONDS}
    )
