"""What providers can serve: discovered, or written by hand."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest

from audit.admin import AuditedAdmin
from providers.admin.forms import ModelForm
from providers.catalog import FACTS
from providers.models import UpstreamModel


@admin.register(UpstreamModel)
class UpstreamModelAdmin(AuditedAdmin):
    form = ModelForm
    list_display = ("name", "provider", "served_for", "context_window", "enabled", "source")
    list_filter = ("enabled", "source", "provider")
    list_select_related = ("provider",)
    search_fields = ("name", "provider__name")
    fields = ("provider", "name", "enabled", "purposes", "context_window", "dimensions", "capabilities")

    @admin.display(description="Used for")
    def served_for(self, model: UpstreamModel) -> str:
        return ", ".join(model.purposes) or "-"

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        if set(form.changed_data) & set(FACTS):
            obj.take_over()
        super().save_model(request, obj, form, change)

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        return ("provider", "name") if obj is not None else ()
