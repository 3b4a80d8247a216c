"""An endpoint that answers, and the credentials it is asked with."""

from __future__ import annotations

import uuid
from typing import Any, ClassVar

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator, RegexValidator
from django.db import models
from django.utils.text import slugify

from audit.changes import Identity
from providers import destination, wire
from providers.adapters import KINDS, SELF_HOSTED
from providers.errors import DestinationNotAllowed
from providers.fields import SealedField, raw
from providers.models.checks import check_ca, check_headers, check_metadata
from providers.models.limited import Limited
from providers.own_addresses import own_places

SLUG = RegexValidator(
    r"^[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?$", "Use lower-case letters, digits, '-', '_' and '.'."
)
MOST_SECONDS = 86400
"""Of a timeout or an interval; the settings have the same bound."""
SECONDS: dict[str, Any] = {
    "null": True,
    "blank": True,
    "validators": [MinValueValidator(0.01), MaxValueValidator(MOST_SECONDS)],
}


def kind_choices() -> list[tuple[str, str]]:
    return [(kind.name, kind.label) for kind in KINDS.values()]


class Versioned(models.Model):
    """A row whose `version` (its ETag) grows with every save of its own, and with nothing else."""

    version = models.PositiveIntegerField(default=0, editable=False)
    created_by = models.CharField(max_length=150, blank=True, editable=False)
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        abstract = True

    def save(self, *args: Any, **kwargs: Any) -> None:
        self.version += 1
        if (fields := kwargs.get("update_fields")) is not None:
            kwargs["update_fields"] = {*fields, "version", "updated_at"}
        super().save(*args, **kwargs)


class Managed(models.Model):
    """A row that may belong to a configuration file: `managed_by` is the name that the file gives itself, or empty."""

    managed_by = models.CharField(max_length=100, blank=True, editable=False)

    class Meta:
        abstract = True


class Provider(Managed, Versioned):
    """A vendor, or a server of our own: where it is, how it is dialled and what it is used for."""

    uid = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    slug = models.CharField(max_length=63, unique=True, validators=[SLUG], blank=True)
    name = models.CharField(max_length=100)
    kind = models.CharField(max_length=32, choices=kind_choices, default="openai-compatible")
    base_url = models.CharField("base URL", max_length=500)
    custom_headers = models.JSONField(default=dict, blank=True, validators=[check_headers])
    enabled = models.BooleanField(default=True)
    priority = models.IntegerField(
        default=100, help_text="Lower is tried first when several have the same model."
    )
    use_for_chat = models.BooleanField("chat", default=True)
    use_for_embeddings = models.BooleanField("embeddings", default=False)
    use_for_reranking = models.BooleanField("reranking", default=False)
    model_path = models.CharField(
        max_length=500, blank=True, help_text="A note: where the server's model files are."
    )
    allow_private = models.BooleanField(
        "allow private addresses", default=False, help_text="Lets a vendor's address be on a private network."
    )
    ca_pem = models.TextField(
        "CA certificate",
        blank=True,
        validators=[check_ca],
        help_text="PEM of a private certificate authority.",
    )
    connect_timeout_seconds = models.FloatField(**SECONDS)
    first_token_timeout_seconds = models.FloatField(**SECONDS)
    idle_timeout_seconds = models.FloatField(**SECONDS)
    request_timeout_seconds = models.FloatField(**SECONDS)
    probe_interval_seconds = models.FloatField(
        null=True,
        blank=True,
        validators=[MinValueValidator(1), MaxValueValidator(MOST_SECONDS)],
        help_text="Empty: the general interval.",
    )
    metadata = models.JSONField(default=dict, blank=True, validators=[check_metadata])

    class Meta:
        ordering: ClassVar = ["priority", "id"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["name"], name="provider_name_is_unique"),
            models.CheckConstraint(
                condition=models.Q(base_url__startswith="http://")
                | models.Q(base_url__startswith="https://"),
                name="provider_base_url_is_http",
            ),
            models.CheckConstraint(condition=~models.Q(slug=""), name="provider_has_a_slug"),
        ]

    def __str__(self) -> str:
        return self.name

    def save(self, *args: Any, **kwargs: Any) -> None:
        self._normalize()
        super().save(*args, **kwargs)

    def _normalize(self) -> None:
        self.slug = self.slug or free_slug(self.name, self.kind)
        self.base_url = self.base_url.strip().rstrip("/")

    def clean(self) -> None:
        self._normalize()
        try:
            destination.check_url(
                self.base_url,
                allow_private=self.allow_private or self.self_hosted,
                private_networks=settings.PRIVATE_NETWORKS,
                own=own_places(),
            )
        except DestinationNotAllowed as error:
            raise ValidationError({"base_url": error.detail or error.text}) from error

    @property
    def self_hosted(self) -> bool:
        return self.kind in SELF_HOSTED

    @property
    def origin(self) -> str:
        return wire.origin_of(self.base_url)

    def audit_identity(self) -> Identity:
        if self.self_hosted:
            return Identity("ai_server", str(self.pk), self.name, "server")
        return Identity("provider", str(self.pk), self.name, "provider")

    def endpoint(self) -> wire.Endpoint:
        """The row as adapters and the one who dials need it."""
        return wire.Endpoint(
            provider_id=self.pk or 0,
            uid=str(self.uid),
            slug=self.slug,
            name=self.name,
            kind=self.kind,
            base_url=self.base_url,
            headers=self._headers(),
            allow_private=self.allow_private or self.self_hosted,
            ca_pem=self.ca_pem,
            timeouts=self._timeouts(),
        )

    def _headers(self) -> wire.Headers:
        """A row may have been written past the forms; headers that are no object are none that could be sent (R27)."""
        if not isinstance(self.custom_headers, dict):
            return (("", ""),)
        return tuple(sorted(self.custom_headers.items()))

    def _timeouts(self) -> wire.Timeouts:
        return wire.Timeouts(
            connect=self.connect_timeout_seconds or settings.CONNECT_TIMEOUT_SECONDS,
            first_token=self.first_token_timeout_seconds or settings.FIRST_TOKEN_TIMEOUT_SECONDS,
            idle=self.idle_timeout_seconds or settings.IDLE_TIMEOUT_SECONDS,
            stream=settings.STREAM_TIMEOUT_SECONDS,
            request=self.request_timeout_seconds or settings.REQUEST_TIMEOUT_SECONDS,
        )


def free_slug(name: str, kind: str) -> str:
    """A slug made of the name that no provider has yet."""
    base = slugify(name)[:55] or slugify(kind)
    taken = set(Provider.objects.filter(slug__startswith=base).values_list("slug", flat=True))
    return next(
        slug for slug in (base, *(f"{base}-{n}" for n in range(2, len(taken) + 3))) if slug not in taken
    )


class ServerManager(models.Manager["Server"]):
    def get_queryset(self) -> models.QuerySet[Server]:
        return super().get_queryset().filter(kind__in=SELF_HOSTED)


class Server(Provider):
    """A provider that we run ourselves: vLLM, Ollama, llama.cpp or anything OpenAI-compatible."""

    objects: ClassVar[ServerManager] = ServerManager()

    class Meta:
        proxy = True

    def __str__(self) -> str:
        return self.name


class ApiKey(Limited, Managed, Versioned):
    """A credential of a provider. Its limits are ours, to stay below those that the vendor has.

    secret: always sealed for this row and the provider's origin; what is sealed is the key itself or a reference to
    where it is kept (`env://NAME`), so that neither can be pointed at another host behind our back.
    reference: the reference in clear, for people; it is never the one that is followed.
    """

    uid = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    provider = models.ForeignKey(Provider, on_delete=models.CASCADE, related_name="keys")
    name = models.CharField("key name", max_length=100)
    secret = SealedField(editable=False)
    reference = models.CharField(max_length=500, blank=True, editable=False)
    last4 = models.CharField(max_length=4, blank=True, editable=False)
    fingerprint = models.CharField(max_length=24, blank=True, editable=False)
    enabled = models.BooleanField(default=True)
    is_default = models.BooleanField("default", default=False)
    weight = models.PositiveIntegerField(
        default=1, validators=[MinValueValidator(1)], help_text="Its share of the provider's requests."
    )
    metadata = models.JSONField(default=dict, blank=True, validators=[check_metadata])

    class Meta:
        verbose_name = "API key"
        ordering: ClassVar = ["provider", "-is_default", "name"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["provider", "name"], name="api_key_name_is_unique_per_provider"),
            models.UniqueConstraint(
                fields=["provider"],
                condition=models.Q(is_default=True),
                name="api_key_one_default_per_provider",
            ),
            models.CheckConstraint(condition=models.Q(weight__gte=1), name="api_key_weight_is_positive"),
            models.CheckConstraint(
                condition=models.Q(last4="") | ~models.Q(secret=""), name="api_key_has_a_secret"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.provider.name} / {self.name}"

    @property
    def masked_key(self) -> str:
        """What may be shown: the reference, or dots and the last four characters."""
        return self.reference or f"****{self.last4}"

    def audit_identity(self) -> Identity:
        return Identity("api_key", str(self.pk), str(self), "key")

    def credential(self) -> wire.Credential:
        return wire.Credential(
            key_id=self.pk or 0,
            uid=str(self.uid),
            name=self.name,
            stored=raw(self.secret),
            weight=self.weight,
            quota=self.quota(),
        )


class UpstreamModel(Managed, Versioned):
    """A model that a provider can serve: found by asking it, or written by hand."""

    class Source(models.TextChoices):
        DISCOVERED = "discovered", "Discovered"
        MANUAL = "manual", "Written by hand"

    provider = models.ForeignKey(Provider, on_delete=models.CASCADE, related_name="upstream_models")
    name = models.CharField(max_length=255)
    purposes = models.JSONField(default=list, blank=True)
    context_window = models.PositiveIntegerField(null=True, blank=True, help_text="Tokens.")
    dimensions = models.PositiveIntegerField(null=True, blank=True, help_text="Of an embedding.")
    capabilities = models.JSONField(default=list, blank=True)
    enabled = models.BooleanField(default=True)
    source = models.CharField(max_length=16, choices=Source, default=Source.MANUAL, editable=False)

    class Meta:
        ordering: ClassVar = ["provider", "name"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["provider", "name"], name="model_name_is_unique_per_provider"),
            models.CheckConstraint(condition=~models.Q(name=""), name="model_has_a_name"),
        ]

    def __str__(self) -> str:
        return self.name

    def save(self, *args: Any, **kwargs: Any) -> None:
        super().save(*args, **kwargs)
        self._changes_its_provider()

    def delete(self, *args: Any, **kwargs: Any) -> Any:
        self._changes_its_provider()
        return super().delete(*args, **kwargs)

    def _changes_its_provider(self) -> None:
        """A provider is shown and sent back with its models, so who has not seen this one must not overwrite it."""
        Provider.objects.filter(pk=self.provider_id).update(version=models.F("version") + 1)

    def take_over(self) -> None:
        """A person wrote down what it can do, so what the provider tells of it no longer counts. Does not save."""
        self.source = self.Source.MANUAL

    def audit_identity(self) -> Identity:
        return Identity("model", str(self.pk), f"{self.provider.slug}/{self.name}", "model")
