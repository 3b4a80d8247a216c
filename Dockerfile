# Two stages: the first has pip and the wheels, the second only what runs.
FROM python:3.13-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements.lock .
RUN python -m venv /venv \
    && /venv/bin/python -m pip install --require-hashes --only-binary :all: --requirement requirements.lock \
    && /venv/bin/python -m pip uninstall --yes pip

FROM python:3.13-slim
# A number, so that an orchestrator can see that it is not root.
RUN useradd --uid 10001 --user-group --home-dir /data --shell /usr/sbin/nologin penstock \
    && install --directory --owner penstock --group penstock --mode 0700 /data
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONWARNINGS=ignore \
    DATA_DIR=/data \
    HOST=0.0.0.0 \
    PORT=8000 \
    LOG_FORMAT=json
WORKDIR /app
COPY --from=build /venv /venv
COPY . .
# Proves that every static file is in the image. They are served from the packages: a copy in the data volume would be of the
# version that first filled the volume.
RUN DATA_DIR=/tmp/collected python manage.py collectstatic --no-input --verbosity 0 && rm -rf /tmp/collected
USER 10001:10001
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/livez', timeout=2)"]
CMD ["python", "manage.py", "serve"]
