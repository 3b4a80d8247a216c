"""The paths below /admin/account/: of allauth's pages those that we use, under the names by which it looks for them."""

from __future__ import annotations

from allauth.account import views as account
from allauth.mfa.base import views as base
from allauth.mfa.recovery_codes import views as recovery
from allauth.mfa.totp import views as totp
from allauth.mfa.webauthn import views as passkeys
from django.urls import path

from audit.access.pages import EnrolPage, dressed, log_out, own, own_change, to_login

urlpatterns = [
    path("login/", to_login, name="account_login"),
    path("logout/", log_out, name="account_logout"),
    path("code/", dressed(base.authenticate), name="mfa_authenticate"),
    path("again/", own(account.reauthenticate), name="account_reauthenticate"),
    path("again/code/", own(base.reauthenticate), name="mfa_reauthenticate"),
    path("again/passkey/", own(passkeys.reauthenticate_webauthn), name="mfa_reauthenticate_webauthn"),
    path("", own(base.index), name="mfa_index"),
    path("app/add/", own_change(EnrolPage.as_view()), name="mfa_activate_totp"),
    path("app/remove/", own_change(totp.deactivate_totp), name="mfa_deactivate_totp"),
    path("passkeys/", own(passkeys.list_webauthn), name="mfa_list_webauthn"),
    path("passkeys/add/", own_change(passkeys.add_webauthn), name="mfa_add_webauthn"),
    path("passkeys/<int:pk>/", own_change(passkeys.edit_webauthn), name="mfa_edit_webauthn"),
    path("passkeys/<int:pk>/remove/", own_change(passkeys.remove_webauthn), name="mfa_remove_webauthn"),
    path("recovery-codes/", own(recovery.view_recovery_codes), name="mfa_view_recovery_codes"),
    path(
        "recovery-codes/new/",
        own_change(recovery.generate_recovery_codes),
        name="mfa_generate_recovery_codes",
    ),
    path(
        "recovery-codes/download/", own(recovery.download_recovery_codes), name="mfa_download_recovery_codes"
    ),
]
