"""One form for each purpose: the provider in use, and its fallbacks in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied, ValidationError
from django.forms import BaseFormSet, formset_factory
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.safestring import SafeString
from unfold.widgets import UnfoldAdminSelectWidget, UnfoldAdminTextInputWidget

from audit.admin import AuditedAdmin, overwritten, row_version, write
from providers.active import MAX_TARGETS, Target, clear_active, set_active
from providers.admin.badges import health_badge
from providers.models import ActiveProvider, ApiKey, Provider, Purpose, UpstreamModel

SPARE_ROWS = 2
EXPLAINED = {
    Purpose.CHAT: "Requests to /v1/chat/completions that name no model, or the model “auto”, go here.",
    Purpose.EMBEDDINGS: "Requests to /v1/embeddings that name no model, or the model “auto”, go here.",
    Purpose.RERANKING: "Requests to /v1/rerank that name no model, or the model “auto”, go here.",
}


class KeySelect(UnfoldAdminSelectWidget):  # type: ignore[misc]  # unfold carries no types
    """Keys say whose they are, so that the page offers only those of the chosen provider."""

    owners: dict[str, int]

    def create_option(self, name: str, value: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        option: dict[str, Any] = super().create_option(name, value, *args, **kwargs)
        if (owner := getattr(self, "owners", {}).get(str(value))) is not None:
            option["attrs"]["data-provider"] = owner
        return option


class TargetForm(forms.Form):
    """One row: a provider, one of its keys, a model. An empty row is no target."""

    provider = forms.ModelChoiceField(
        Provider.objects.none(), required=False, empty_label="-", widget=UnfoldAdminSelectWidget
    )
    api_key = forms.ModelChoiceField(
        ApiKey.objects.none(),
        required=False,
        empty_label="all its keys",
        label="Only this key",
        widget=KeySelect,
    )
    model = forms.CharField(required=False, max_length=255, widget=UnfoldAdminTextInputWidget)

    def __init__(self, *args: Any, providers: Any, keys: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["provider"].queryset = providers  # type: ignore[attr-defined]  # a ModelChoiceField
        self.fields["api_key"].queryset = keys  # type: ignore[attr-defined]  # as above
        self.fields["api_key"].widget.owners = {str(key.pk): key.provider_id for key in keys}
        self.fields["model"].widget.attrs.update(
            {
                "placeholder": "the one asked for, else its first",
                "list": "known-models",
                "autocomplete": "off",
            }
        )

    def clean(self) -> dict[str, Any]:
        provider, key = self.cleaned_data.get("provider"), self.cleaned_data.get("api_key")
        if provider is None and (key is not None or self.cleaned_data.get("model")):
            self.add_error("provider", "Choose the provider for this row, or empty it.")
        if provider is not None and key is not None and key.provider_id != provider.pk:
            self.add_error("api_key", "This key belongs to another provider.")
        return self.cleaned_data


TargetFormSet = formset_factory(TargetForm, extra=SPARE_ROWS, max_num=MAX_TARGETS)


@dataclass(frozen=True, slots=True)
class Card:
    """A purpose as the list shows it."""

    purpose: str
    label: str
    explained: str
    targets: list[tuple[Any, SafeString]]


@admin.register(ActiveProvider)
class ActiveProviderAdmin(AuditedAdmin):
    """The three purposes always exist; a row is made when one is first given a provider."""

    fields = ("purpose",)
    search_fields = ("purpose",)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def get_urls(self) -> list[URLPattern]:
        clear = path(
            "<str:purpose>/clear/",
            self.admin_site.admin_view(self.clear_view),
            name="providers_activeprovider_clear",
        )
        return [clear, *super().get_urls()]

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        if not self.has_view_or_change_permission(request):
            raise PermissionDenied
        stored = {
            row.purpose: row for row in ActiveProvider.objects.prefetch_related("targets__provider__health")
        }
        cards = [
            Card(
                purpose=purpose,
                label=purpose.label,
                explained=EXPLAINED[purpose],
                targets=[
                    (target, health_badge(target.provider))
                    for target in (stored[purpose].targets.all() if purpose in stored else ())
                ],
            )
            for purpose in Purpose
        ]
        context = {
            "title": "Active provider",
            "cards": cards,
            "has_change": self.has_change_permission(request),
        }
        return self._page(request, "admin/providers/active_list.html", context)

    def changeform_view(
        self,
        request: HttpRequest,
        object_id: str | None = None,
        form_url: str = "",
        extra_context: Any = None,
    ) -> Any:
        """object_id: the purpose, or the row's number."""
        row, purpose = self._find(request, object_id)
        may_change = self.has_change_permission(request, row)
        if not (may_change or (request.method != "POST" and self.has_view_permission(request, row))):
            raise PermissionDenied
        if request.method == "POST":
            return write(request, lambda: self._save(request, purpose))
        return self._form_page(request, purpose, row, self._formset(purpose, row), can_change=may_change)

    def clear_view(self, request: HttpRequest, purpose: str) -> HttpResponseBase:
        if request.method != "POST" or not self.has_change_permission(request):
            raise PermissionDenied
        _, known = self._find(request, purpose)
        return write(request, lambda: self._cleared(request, known))

    def _cleared(self, request: HttpRequest, purpose: Purpose) -> HttpResponse:
        if clear_active(purpose):
            messages.success(request, f"{purpose.label} has no active provider any more.")
        return HttpResponseRedirect(reverse("admin:providers_activeprovider_changelist"))

    def _save(self, request: HttpRequest, purpose: Purpose) -> HttpResponseBase:
        row = ActiveProvider.objects.filter(purpose=purpose).first()
        formset = self._formset(purpose, row, request.POST)
        problems = self._problems(request, purpose, row, formset)
        if problems:
            return self._form_page(request, purpose, row, formset, problems=problems)
        messages.success(request, f"{purpose.label} now goes to {self._targets(formset)[0].provider.name}.")
        return HttpResponseRedirect(reverse("admin:providers_activeprovider_changelist"))

    def _problems(
        self,
        request: HttpRequest,
        purpose: Purpose,
        row: ActiveProvider | None,
        formset: BaseFormSet[TargetForm],
    ) -> list[str]:
        """Save, and answer why that was not possible."""
        opened = request.POST.get("row_version")
        if opened is not None and opened != self._version(row):
            return [overwritten(row or ActiveProvider(purpose=purpose))]
        if not formset.is_valid():
            return [*map(str, formset.non_form_errors()), "Please correct the rows marked below."]
        targets = self._targets(formset)
        if not targets:
            return ["Choose a provider in the first row, or clear this purpose instead."]
        try:
            set_active(purpose, targets, created_by=request.user.get_username())
        except ValidationError as error:
            return list(error.messages)
        return []

    def _targets(self, formset: BaseFormSet[TargetForm]) -> list[Target]:
        return [
            Target(row["provider"], row["api_key"], row["model"].strip())
            for row in (form.cleaned_data for form in formset.forms)
            if row.get("provider")
        ]

    def _formset(self, purpose: str, row: ActiveProvider | None, data: Any = None) -> BaseFormSet[TargetForm]:
        stored = list(row.targets.select_related("provider", "api_key")) if row is not None else []
        taken = [target.provider_id for target in stored]
        usable = Provider.objects.filter(**{f"use_for_{purpose}": True, "enabled": True})
        providers = (usable | Provider.objects.filter(pk__in=taken)).order_by("priority", "id")
        keys = ApiKey.objects.filter(provider__in=providers).select_related("provider")
        initial = [
            {"provider": target.provider_id, "api_key": target.api_key_id, "model": target.model}
            for target in stored
        ]
        return TargetFormSet(
            data,
            initial=initial,
            prefix="targets",
            form_kwargs={"providers": providers, "keys": list_of(keys)},
        )

    def _form_page(
        self,
        request: HttpRequest,
        purpose: Purpose,
        row: ActiveProvider | None,
        formset: BaseFormSet[TargetForm],
        *,
        problems: list[str] | None = None,
        can_change: bool = True,
    ) -> HttpResponse:
        providers = formset.form_kwargs["providers"]
        known = UpstreamModel.objects.filter(provider__in=providers, enabled=True).select_related("provider")
        context = {
            "title": f"Active provider for {purpose.label.lower()}",
            "purpose": purpose,
            "explained": EXPLAINED[purpose],
            "formset": formset,
            "nobody": not providers.exists(),
            "row": row,
            "row_version": request.POST.get("row_version", self._version(row)),
            "problems": problems,
            "known_models": known[:2000],
            "can_change": can_change,
        }
        return self._page(request, "admin/providers/active_form.html", context)

    def _page(self, request: HttpRequest, template: str, context: dict[str, Any]) -> HttpResponse:
        base = {**self.admin_site.each_context(request), "opts": self.opts}
        return TemplateResponse(request, template, {**base, **context})

    def _version(self, row: ActiveProvider | None) -> str:
        return "" if row is None else row_version(row)

    def _find(self, request: HttpRequest, object_id: str | None) -> tuple[ActiveProvider | None, Purpose]:
        if object_id in Purpose.values:
            return ActiveProvider.objects.filter(purpose=object_id).first(), Purpose(object_id)
        row = self.get_object(request, object_id or "")
        if row is None:
            raise Http404
        return row, Purpose(row.purpose)


def list_of(keys: Any) -> Any:
    """The keys, asked for once: each row's choice reads them again otherwise."""
    len(keys)
    return keys
