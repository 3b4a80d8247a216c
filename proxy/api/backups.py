"""Backups of the configuration: taken out, made on the machine, restored."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from django.conf import settings
from django.http import HttpResponse
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from audit.api_errors import RETRY_SECONDS, Conflict, Problem, ip_of, know, request_id_of
from audit.api_views import Door
from proxy.configuration import differing, document, exporting, files, foreign, reading
from proxy.configuration.restoring import Refused, restore

TRUE = frozenset({"true", "1"})
FLAG: dict[str, Any] = {"type": OpenApiTypes.BOOL, "required": False}


class BackupSerializer(serializers.Serializer[Any]):
    """A backup that was written on the machine that answers."""

    file = serializers.CharField(help_text="Its name in the folder of BACKUP_FILE.")
    created_at = serializers.DateTimeField()
    version = serializers.IntegerField(help_text="The audit entry up to which it has everything.")
    bytes = serializers.IntegerField()
    sha256 = serializers.CharField()


class RestoredChangeSerializer(serializers.Serializer[Any]):
    action = serializers.CharField()
    entity_type = serializers.CharField()
    entity_name = serializers.CharField()
    changes = serializers.DictField(help_text='{"field": [before, after]}; secrets are dots.')


class RestoredSerializer(serializers.Serializer[Any]):
    """What a restore changed, or would change."""

    dry_run = serializers.BooleanField()
    changed = serializers.IntegerField()
    changes = RestoredChangeSerializer(many=True)
    notes = serializers.ListField(child=serializers.CharField())


class Backups(Door):
    """The whole configuration as one JSON document; sealed secrets stay sealed."""

    resource = "backups"
    words: ClassVar = {"download": "read", "make": "add", "restore": "restore"}
    pagination_class = None
    filter_backends: list[Any] = []
    serializer_class = BackupSerializer

    @extend_schema(operation_id="backup_download", responses={(200, "application/json"): OpenApiTypes.OBJECT})
    def download(self, request: Request, *args: Any, **kwargs: Any) -> HttpResponse:
        """The configuration as it is now. Without the encryption key nothing in it opens; each download is recorded."""
        made = exporting.taken_out(
            actor=request.user, via="api", ip=ip_of(request), request_id=request_id_of(request)
        )
        return attachment(made)

    @extend_schema(operation_id="backup_make", request=None, responses={201: BackupSerializer})
    def make(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Write the backup on the machine now, as it is also written after every change."""
        made = files.write()
        answer = {
            "file": made.path.name,
            "created_at": made.at,
            "version": made.version,
            "bytes": made.bytes,
            "sha256": made.sha256,
        }
        return Response(BackupSerializer(answer).data, status=201)

    @extend_schema(
        operation_id="backup_restore",
        request=OpenApiTypes.OBJECT,
        responses={
            200: RestoredSerializer,
            409: OpenApiResponse(description="There is no backup on the machine."),
        },
        parameters=[
            OpenApiParameter(
                "dry_run", **FLAG, description="true: say what would change, and change nothing."
            ),
            OpenApiParameter(
                "prune", **FLAG, description="true: also delete what the document does not name."
            ),
        ],
    )
    def restore(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Restore the document in the body, else the backup on the machine: all of it or nothing. 400 names all that is wrong."""
        dry_run, prune = (request.query_params.get(name, "").lower() in TRUE for name in ("dry_run", "prune"))
        outcome = restore(
            self._source(request.data),
            actor=request.user,
            prune=prune,
            dry_run=dry_run,
            ip=ip_of(request),
            request_id=request_id_of(request),
        )
        return Response(differing.as_values(outcome, dry_run=dry_run))

    def _source(self, data: Any) -> foreign.Source:
        if data:
            return foreign.source_of(reading.Text(data))
        try:
            body = Path(settings.BACKUP_FILE).read_bytes()
        except FileNotFoundError as error:
            raise Conflict("There is no backup on this machine yet; send one in the body.") from error
        return foreign.source_of(reading.read(body, counted=False))


def attachment(made: document.Document) -> HttpResponse:
    """A backup as a file to keep."""
    name = f"penstock-{made['made']['at'][:19].replace(':', '').replace('-', '')}Z.json"
    return HttpResponse(
        document.as_json(made),
        content_type="application/json",
        headers={"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store"},
    )


def _of_refused(error: Refused) -> Problem:
    details: dict[str, list[str]] = {}
    for problem in error.problems:
        name = ".".join(word for word in (problem.place, problem.field) if word) or "non_field_errors"
        details.setdefault(name, []).append(problem.message)
    return Problem(400, f"{error.total} problems, so nothing was changed.", details)


def _of_unreadable(error: reading.Unreadable) -> Problem:
    return Problem(400, str(error), {"non_field_errors": [str(error)]})


def _of_disk(error: files.NotWritten) -> Problem:
    return Problem(503, f"The backup was not made: {error}.", retry_after=RETRY_SECONDS)


know(Refused, _of_refused)
know(reading.Unreadable, _of_unreadable)
know(files.NotWritten, _of_disk)
