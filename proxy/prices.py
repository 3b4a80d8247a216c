"""The table of prices: filled from the package's list, overridden by people, read into a snapshot."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.core.exceptions import ValidationError
from django.db.models import BooleanField, Case, Exists, Min, OuterRef, Q, QuerySet, Value, When
from django.utils import timezone

from audit.changes import Change, Identity, Via, changes
from providers.models import Provider
from proxy import price_source
from proxy.models.prices import BEGINNING, NEVER_HELD, RATES, ModelPrice, PriceList, PriceSource, price_of
from proxy.models.usage import UsageRecord
from proxy.price_book import FOREVER, Dated, Listed, Override, PriceBook, check_match
from proxy.price_source import PACKAGE, Offer, PriceSourceBroken

logger = logging.getLogger(__name__)

BATCH = 500
LATENESS = timedelta(minutes=1)
"""How far in the past an override may begin: clocks differ, and requests take their time."""
FREE = {"prompt": 0, "completion": 0}

# -- from the package's list -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Refreshed:
    """added: new rows. problem: why the list could not be used, in which case nothing was changed."""

    added: int = 0
    package_version: str = ""
    problem: str = ""


def refresh(*, via: Via) -> Refreshed:
    """Add rows for what the installed package's list says otherwise than the table, as one audit entry. Idempotent.

    No row is changed or deleted: a price that is new holds from now on. A list that cannot be used changes nothing, which is
    logged, audited and shown until it can be used again.
    """
    try:
        package_version, models = price_source.read()
    except PriceSourceBroken as error:
        logger.error("the price list of %s cannot be used, so prices stay as they are: %s", PACKAGE, error)
        with changes(actor=None, via=via) as change:
            _note(change, problem=str(error))
        return Refreshed(problem=str(error))
    with changes(actor=None, via=via) as change:
        rows = [*_self_hosted(), *_missing(models, timezone.now())]
        known = ModelPrice.objects.count()
        ModelPrice.objects.bulk_create(rows, batch_size=BATCH)
        before = _note(change, package_version=package_version)
        if rows:
            change.add(
                verb="add",
                identity=Identity("price_list", "1", f"{PACKAGE} {package_version}", "prices"),
                changes={
                    "rows": [known, known + len(rows)],
                    "package_version": [before or None, package_version],
                },
            )
    return Refreshed(len(rows), package_version)


def refresh_if_new(*, via: Via) -> Refreshed:
    """The same, unless the installed version's list has been taken over already: reading it takes a second."""
    known = PriceList.objects.filter(problem="").exclude(package_version="")
    version = known.values_list("package_version", flat=True).first()
    if version is not None and version == price_source.installed():
        return Refreshed(package_version=version)
    return refresh(via=via)


def _note(change: Change, *, package_version: str = "", problem: str = "") -> str:
    """Keep how the list was found; its version before. A new problem, or its end, is a change that everybody sees."""
    stored, _ = PriceList.objects.get_or_create(pk=1)
    version, trouble = stored.package_version, stored.problem
    stored.package_version, stored.problem = package_version or version, problem
    stored.checked_at = timezone.now()
    stored.save()
    if problem != trouble:
        identity = Identity("price_list", "1", PACKAGE, "price_list", verb="broken" if problem else "mended")
        change.add(verb="update", identity=identity, changes={"problem": [trouble, problem]})
    return version


def _self_hosted() -> Iterator[ModelPrice]:
    """What we run ourselves costs nothing, which is a price and not the lack of one."""
    known = set(ModelPrice.objects.filter(source=PriceSource.SELF_HOSTED).values_list("vendor", flat=True))
    for kind in sorted(price_source.FREE_KINDS - known):
        yield ModelPrice(
            source=PriceSource.SELF_HOSTED, vendor=kind, model="*", effective_from=BEGINNING, **FREE
        )


def _missing(models: Sequence[price_source.Model], now: datetime) -> Iterator[ModelPrice]:
    stored: defaultdict[tuple[str, str], list[ModelPrice]] = defaultdict(list)
    for row in ModelPrice.objects.filter(source=PriceSource.PACKAGE).order_by("effective_from", "id"):
        stored[row.vendor, row.model].append(row)
    for model in models:
        for offer in _new_offers(model, stored[model.vendor, model.name], now):
            yield ModelPrice(
                source=PriceSource.PACKAGE,
                vendor=model.vendor,
                model=model.name,
                match=model.match,
                effective_from=offer.since,
                **offer.rates,
            )


def _new_offers(model: price_source.Model, rows: Sequence[ModelPrice], now: datetime) -> Iterator[Offer]:
    """Of a new model all that is known; of another one what holds from now on, or will."""
    if not rows:
        yield from model.offers
        return
    present = next((row for row in reversed(rows) if row.effective_from <= now), None)
    current = next((offer for offer in reversed(model.offers) if offer.since <= now), None)
    if current is not None and (present is None or not _says(present, model, current)):
        yield Offer(now, current.rates)
    for offer in model.offers:
        known = any(row.effective_from == offer.since and _says(row, model, offer) for row in rows)
        if offer.since > now and not known:
            yield offer


def _says(row: ModelPrice, model: price_source.Model, offer: Offer) -> bool:
    return row.match == model.match and all(getattr(row, name) == offer.rates[name] for name in RATES)


# -- what people say -----------------------------------------------------------------------------------------------------


def check_override(row: ModelPrice, provider: Provider) -> None:
    """Make `row` an override of models of `provider`. Raises ValidationError when it cannot be one; saves nothing."""
    row.source, row.vendor, row.match = PriceSource.OVERRIDE, "", None
    row.provider_id, row.provider = provider.pk, provider.slug
    now = timezone.now()
    if row.effective_from < now - LATENESS:
        raise ValidationError(
            {"effective_from": "It cannot begin in the past: what was used has been billed already."}
        )
    if row.effective_until is not None and row.effective_until <= row.effective_from:
        raise ValidationError({"effective_until": "It must end after it begins."})
    row.full_clean()


def add_override(row: ModelPrice, provider: Provider) -> None:
    """Save what `row` says of models of `provider`; an override of the same name ends where this one begins.

    If this one has an end, what the other says of the time behind it is a row of its own. If it has none, what is to begin later
    stays, and this one ends there. Inside `changes()`. Raises ValidationError.
    """
    check_override(row, provider)
    others = ModelPrice.objects.exclude(NEVER_HELD).filter(
        Q(effective_until=None) | Q(effective_until__gt=row.effective_from),
        source=PriceSource.OVERRIDE,
        provider_id=provider.pk,
        model=row.model,
    )
    end = row.effective_until
    if end is None:
        later = others.filter(effective_from__gt=row.effective_from)
        row.effective_until = later.aggregate(at=Min("effective_from"))["at"]
    if row.effective_until is not None:
        others = others.filter(effective_from__lt=row.effective_until)
    for each in others:
        if end is not None and (each.effective_until is None or each.effective_until > end):
            _go_on(each, end)
        _end(each, row.effective_from)
    row.save()


def _go_on(row: ModelPrice, since: datetime) -> None:
    """Let what a row says hold from then on as well."""
    rest = copy(row)
    rest.pk, rest._state.adding, rest.effective_from = None, True, since
    rest.save()


def end_override(row: ModelPrice) -> None:
    """From now on the list's price holds again. Inside `changes()`. Raises ValidationError for what cannot be ended."""
    now = timezone.now()
    if row.source != PriceSource.OVERRIDE:
        raise ValidationError("Only an override can be ended; make one to replace this price.")
    if row.effective_until is not None and row.effective_until <= now:
        raise ValidationError("It has ended already.")
    _end(row, now)


def _end(row: ModelPrice, moment: datetime) -> None:
    row.effective_until = max(moment, row.effective_from)
    row.save(update_fields=["effective_until"])


def with_state(rows: QuerySet[ModelPrice]) -> QuerySet[ModelPrice]:
    """Rows with `is_current`: whether theirs is the price that holds now."""
    now = timezone.now()
    newer = ModelPrice.objects.filter(
        Q(effective_from__gt=OuterRef("effective_from"))
        | Q(effective_from=OuterRef("effective_from"), id__gt=OuterRef("id")),
        source=PriceSource.PACKAGE,
        vendor=OuterRef("vendor"),
        model=OuterRef("model"),
        effective_from__lte=now,
    )
    begun = Q(effective_from__lte=now) & (Q(effective_until=None) | Q(effective_until__gt=now))
    return rows.annotate(
        is_current=Case(
            When(~begun, then=Value(False)),
            When(Q(source=PriceSource.PACKAGE) & Exists(newer), then=Value(False)),
            default=Value(True),
            output_field=BooleanField(),
        )
    )


# -- for requests --------------------------------------------------------------------------------------------------------

COLUMNS = (
    "id", "source", "vendor", "provider_id", "model", "match", "effective_from", "effective_until", *RATES,
)  # fmt: skip


def book(vendors: Collection[str], providers: Collection[int]) -> PriceBook:
    """The prices of these vendors' models and providers, as far as they hold now or will. A row that makes no sense is
    left out, so that it cannot keep every later change from everybody."""
    now = timezone.now()
    rows = (
        ModelPrice.objects.filter(Q(vendor__in=vendors) | Q(provider_id__in=providers))
        .filter(Q(effective_until=None) | Q(effective_until__gt=now))
        .order_by("vendor", "model", "-effective_from", "-id")
        .values_list(*COLUMNS)
    )
    lists: defaultdict[str, dict[str, Listed]] = defaultdict(dict)
    overrides: defaultdict[int, list[Override]] = defaultdict(list)
    for values in rows.iterator(chunk_size=2000):
        row = dict(zip(COLUMNS, values, strict=True))
        try:
            dated = _dated(row)
            check_match(row["match"])
        except (ValueError, TypeError, AttributeError, KeyError):
            logger.warning("left out the price %s, which makes no sense", row["id"])
            continue
        if row["source"] == PriceSource.OVERRIDE:
            overrides[row["provider_id"]].append(Override(row["model"], dated))
            continue
        newer = lists[row["vendor"]].get(row["model"])
        if newer is None:
            lists[row["vendor"]][row["model"]] = Listed(row["match"], row["model"], (dated,))
        elif newer.prices[-1].since > now.timestamp():
            # What the newer ones will replace holds until then; what they have replaced already is history.
            lists[row["vendor"]][row["model"]] = newer._replace(prices=(*newer.prices, dated))
    return PriceBook({vendor: list(each.values()) for vendor, each in lists.items()}, overrides)


def _dated(row: dict[str, Any]) -> Dated:
    until = row["effective_until"]
    return Dated(
        row["effective_from"].timestamp(),
        FOREVER if until is None else until.timestamp(),
        price_of(row["id"], row),
        tuple((each["from"], each["until"], price_of(row["id"], each)) for each in row["hours"]),
    )


# -- what has none -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Unpriced:
    """Attempts that a provider answered and nobody knows the price of, and of how many models."""

    requests: int
    models: int


def unpriced(since: datetime) -> Unpriced:
    """Of the records from `since` on."""
    rows = UsageRecord.objects.filter(UsageRecord.UNPRICED, created_at__gte=since)
    return Unpriced(rows.count(), rows.order_by().values("provider_id", "model").distinct().count())
