"""All settings, from the environment (see docs/settings.md). Nothing else in Penstock reads the environment."""

from __future__ import annotations

import os
import secrets
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import environ
from csp.constants import NONCE, NONE, SELF

from config import logs, theme
from config.env import Reader, key_from_text
from proxy.keys import parse as parse_gateway_key

VERSION = "0.1.0"
BASE_DIR = Path(__file__).resolve().parent.parent

env = Reader(Path(os.environ.get("ENV_FILE", BASE_DIR / ".env")))

# -- where things are ------------------------------------------------------------------------------------------------

HOST = env.text("HOST", "127.0.0.1")
PORT = env.whole("PORT", 8000, least=1, most=65535)
PUBLIC_URL = env.text("PUBLIC_URL", f"http://{HOST}:{PORT}").rstrip("/")
_public = urlsplit(PUBLIC_URL)
HTTPS = _public.scheme == "https"
_LOOPBACK = HOST in {"127.0.0.1", "::1", "localhost"}
ALLOW_INSECURE_HTTP = env.flag("ALLOW_INSECURE_HTTP", False)
DATA_DIR = Path(env.text("DATA_DIR", str(BASE_DIR / "var"))).absolute()
_log_dir = env.text("LOG_DIR")
LOG_DIR = Path(_log_dir or DATA_DIR / "logs").absolute()
# Under `make run` supervisord keeps what the programs write; without a folder that was asked for, nobody does.
_kept_elsewhere = not _log_dir or "PENSTOCK_RUN_LOGS" in os.environ
SPOOL_DIR = DATA_DIR / "spool"
BACKUP_FILE = Path(env.text("BACKUP_FILE", str(DATA_DIR / "backups" / "config_backup.json"))).absolute()
BACKUP_KEEP = env.whole("BACKUP_KEEP", 14, least=0, most=10_000)
WEB_CONCURRENCY = env.whole("WEB_CONCURRENCY", 1, least=1, most=64)
DEBUG = env.flag("DEBUG", False)

if _public.scheme not in {"http", "https"} or not _public.hostname:
    env.wrong("PUBLIC_URL", "write the address people use, like https://llm.example.com")
if not HTTPS and not _LOOPBACK and not ALLOW_INSECURE_HTTP:
    env.wrong(
        "HOST",
        "plain http beyond loopback sends keys in clear; set PUBLIC_URL to https or ALLOW_INSECURE_HTTP=true",
    )
if DEBUG and not _LOOPBACK:
    env.wrong("DEBUG", "write false: debug pages must not be reachable from other machines")

# -- secrets ---------------------------------------------------------------------------------------------------------


def _signing_key(name: str) -> str:
    """Text of at least 50 characters; a throw-away key stands in for a missing one, and the problem is named."""
    value = env.text(name)
    if len(value) >= 50 and len(set(value)) >= 5 and not value.startswith("django-insecure-"):
        return value
    env.wrong(
        name,
        "write at least 50 random characters" if value else "is missing; write at least 50 random characters",
    )
    return secrets.token_urlsafe(64)


def _gateway_key(text: str) -> str:
    """ValueError when it is not well-formed; then nothing is done yet, not even a migration."""
    if parse_gateway_key(text) is None:
        raise ValueError
    return text


SECRET_KEY = _signing_key("SECRET_KEY")
JWT_SIGNING_KEY = _signing_key("JWT_SIGNING_KEY")
PENSTOCK_ENCRYPTION_KEY = env.key("PENSTOCK_ENCRYPTION_KEY")
PENSTOCK_NEW_ENCRYPTION_KEY = env.read(
    "PENSTOCK_NEW_ENCRYPTION_KEY",
    b"",
    key_from_text,
    "write base64url of at least 32 random bytes, or leave it out",
)
PENSTOCK_PEPPERS = env.peppers("PENSTOCK_PEPPERS")
PENSTOCK_GATEWAY_KEY = env.read(
    "PENSTOCK_GATEWAY_KEY",
    "",
    _gateway_key,
    "write a whole key, pen_live_ and its checksum included, or leave it out and one is made",
)
OPENROUTER_API_KEY = env.text("OPENROUTER_API_KEY")
DJANGO_SUPERUSER_USERNAME = env.text("DJANGO_SUPERUSER_USERNAME")
DJANGO_SUPERUSER_PASSWORD = env.text("DJANGO_SUPERUSER_PASSWORD")
DJANGO_SUPERUSER_EMAIL = env.text("DJANGO_SUPERUSER_EMAIL")

# -- applications ----------------------------------------------------------------------------------------------------

INSTALLED_APPS = [
    "config",  # first, so that its commands win over Django's of the same name
    # Its `runserver` is the one of `make dev`; Twisted would be a sixth of everybody else's start.
    *(["daphne"] if sys.argv[1:2] == ["runserver"] else []),
    "unfold",
    "unfold.contrib.filters",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "whitenoise.runserver_nostatic",
    "django.contrib.staticfiles",
    "django.contrib.humanize",
    "corsheaders",
    "csp",
    "axes",
    "allauth",
    "allauth.account",
    "allauth.mfa",
    "allauth.socialaccount",
    "allauth.socialaccount.providers.openid_connect",
    "channels",
    "rest_framework",
    "rest_framework_simplejwt.token_blacklist",
    "django_filters",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "audit",
    "providers",
    "proxy",
]

MIDDLEWARE = [
    "audit.middleware.RequestIdMiddleware",
    "config.request_counts.RequestCounts",
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "config.csp.ContentSecurityPolicy",
    # Before whoever may answer in the view's place: a page of another origin is to see that answer, too.
    "corsheaders.middleware.CorsMiddleware",
    "audit.middleware.DatabaseAwayMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "allauth.account.middleware.AccountMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "axes.middleware.AxesMiddleware",
]

UNFOLD = theme.UNFOLD
ROOT_URLCONF = "config.urls"
ASGI_APPLICATION = "config.asgi.application"
APPEND_SLASH = False
TEMPLATES: list[dict[str, Any]] = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
STATIC_URL = "/static/"
STATIC_ROOT = DATA_DIR / "static"
STATICFILES_DIRS = [BASE_DIR / "static"]
WHITENOISE_USE_FINDERS = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
LANGUAGE_CODE = "en"
TIME_ZONE = "UTC"
USE_TZ = True

# -- database --------------------------------------------------------------------------------------------------------

DATABASE_POOL_MIN = env.whole("DATABASE_POOL_MIN", 2, most=100)
DATABASE_POOL_MAX = env.whole("DATABASE_POOL_MAX", 10, least=1, most=1000)


def _database(url: str) -> dict[str, Any]:
    """Django's description of the database at `url`: SQLite in WAL mode or PostgreSQL through a pool."""
    config: dict[str, Any] = dict(environ.Env.db_url_config(url))
    options = config.setdefault("OPTIONS", {})
    if config["ENGINE"] == "django.db.backends.sqlite3":
        options.update(
            transaction_mode="IMMEDIATE",
            timeout=5,
            init_command="PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
        )
    elif config["ENGINE"] == "django.db.backends.postgresql":
        from audit import postgres

        # One stuck lock or query must never hold a worker (F25); a vanished machine is noticed by TCP, a stopped
        # server by `audit.postgres` (F22).
        options.setdefault("options", "-c lock_timeout=3000 -c statement_timeout=15000")
        options.update(connect_timeout=3, tcp_user_timeout=10_000)
        options.update(keepalives=1, keepalives_idle=5, keepalives_interval=2, keepalives_count=3)
        options["pool"] = {
            "min_size": min(DATABASE_POOL_MIN, DATABASE_POOL_MAX),
            "max_size": DATABASE_POOL_MAX,
            # Whoever waits longer is told 503 instead, within two seconds all in all (F22). It is also how long the pool goes
            # on trying its other connections once the first has not answered.
            "timeout": 1.2,
            # The pool would try less and less often; ours is asked twice a second and begins anew each time.
            "reconnect_timeout": 2,
            "connection_class": postgres.Connection,
        }
        # A connection that a restart has broken is replaced before it is used (F23).
        config["CONN_HEALTH_CHECKS"] = True
    else:
        raise ValueError
    return config


_sqlite = f"sqlite:///{DATA_DIR / 'penstock.sqlite3'}"
DATABASES = {
    "default": env.read(
        "DATABASE_URL",
        _database(_sqlite),
        _database,
        "write sqlite:///PATH or postgresql://USER:PASSWORD@HOST:PORT/NAME",
    )
}
ATOMIC_REQUESTS = False

# -- Redis, Celery ---------------------------------------------------------------------------------------------------

REDIS_URL = env.text("REDIS_URL")
"""Empty: limits live in the process, and Celery uses its filesystem broker (`make run` fills it in when it can)."""

if REDIS_URL and urlsplit(REDIS_URL).scheme not in {"redis", "rediss", "unix"}:
    env.wrong("REDIS_URL", "write redis://HOST:PORT/0, rediss://... or unix:///path/to/socket")
    REDIS_URL = ""

# kombu wants redis+socket:// where redis-py wants unix://
CELERY_BROKER_URL = REDIS_URL.replace("unix://", "redis+socket://", 1) if REDIS_URL else "filesystem://"
_queue = str(DATA_DIR / "queue")
CELERY_BROKER_TRANSPORT_OPTIONS: dict[str, Any] = (
    # Longer than the hard time limit, so that a message is only handed out again when its worker is dead.
    {"visibility_timeout": 120, "socket_timeout": 10, "socket_connect_timeout": 3, "socket_keepalive": True}
    if REDIS_URL
    else {
        "data_folder_in": _queue,
        "data_folder_out": _queue,
        "control_folder": _queue,
        "polling_interval": 0.1,
    }
)
CELERY_TASK_ACKS_LATE = True
CELERY_TASK_REJECT_ON_WORKER_LOST = True
CELERY_TASK_TIME_LIMIT = 60
CELERY_TASK_SOFT_TIME_LIMIT = 50
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_SERIALIZER = "json"
CELERY_ACCEPT_CONTENT = ["json"]
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BEAT_SCHEDULE_FILENAME = str(DATA_DIR / "beat-schedule")
CELERY_BEAT_SCHEDULE = {
    "probe-due": {"task": "providers.tasks.probe_due", "schedule": 1.0, "options": {"expires": 30}},
    "purge-history": {
        "task": "providers.tasks.purge_history",
        "schedule": 3600.0,
        "options": {"expires": 1800},
    },
    "purge-texts": {"task": "proxy.tasks.purge_texts", "schedule": 3600.0, "options": {"expires": 1800}},
    # Every hour, since beat may be down when the day begins; only the first tick of a day does something.
    "forget-logins": {
        "task": "config.tasks.forget_logins",
        "schedule": 3600.0,
        "options": {"expires": 1800},
    },
    # Once a day is enough; every five minutes, because a new installation should not be without prices for long.
    "refresh-prices": {
        "task": "proxy.tasks.refresh_prices",
        "schedule": 300.0,
        "options": {"expires": 250},
    },
    # Most ticks find nothing: records grow too old at midnight. A large backlog takes several.
    "forget-usage": {"task": "proxy.tasks.forget_usage", "schedule": 300.0, "options": {"expires": 240}},
    "backup-config": {"task": "config.tasks.backup_config", "schedule": 5.0, "options": {"expires": 30}},
    "anchor-head": {"task": "audit.tasks.anchor_head", "schedule": 60.0, "options": {"expires": 50}},
}

# -- web security ----------------------------------------------------------------------------------------------------

ALLOWED_HOSTS = env.names_list("ALLOWED_HOSTS") or sorted(
    {_public.hostname or "localhost", "localhost", "127.0.0.1", "[::1]"}
)
ALLOWED_ORIGINS = env.origins("ALLOWED_ORIGINS")
CORS_ALLOWED_ORIGINS = ALLOWED_ORIGINS
CORS_ALLOW_CREDENTIALS = bool(ALLOWED_ORIGINS)
CORS_URLS_REGEX = r"^/(api|ping)"
CORS_ALLOW_HEADERS = ["authorization", "content-type", "if-match", "x-csrftoken", "x-request-id"]
CORS_EXPOSE_HEADERS = ["etag", "x-request-id", "retry-after"]
CSRF_TRUSTED_ORIGINS = env.origins("CSRF_TRUSTED_ORIGINS") or ([PUBLIC_URL] if HTTPS else [])
TRUSTED_PROXIES = env.networks("TRUSTED_PROXIES")

SESSION_ENGINE = "audit.access.sessions"
SESSION_COOKIE_AGE = 12 * 3600
SESSION_IDLE_SECONDS = 30 * 60
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = "Lax"
SESSION_COOKIE_SECURE = HTTPS
SESSION_COOKIE_NAME = "__Host-session" if HTTPS else "penstock_session"
CSRF_COOKIE_SECURE = HTTPS
CSRF_COOKIE_SAMESITE = "Lax"
CSRF_COOKIE_NAME = "__Host-csrftoken" if HTTPS else "csrftoken"
SECURE_SSL_REDIRECT = HTTPS
SECURE_REDIRECT_EXEMPT = [r"^livez$", r"^readyz$"]
# The server already believes X-Forwarded-Proto from TRUSTED_PROXIES, and from nobody else; Django must not ask again.
SECURE_PROXY_SSL_HEADER = None
SECURE_HSTS_SECONDS = 31536000 if HTTPS else 0
SECURE_HSTS_INCLUDE_SUBDOMAINS = HTTPS
SECURE_HSTS_PRELOAD = False
SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_REFERRER_POLICY = "same-origin"
SECURE_CROSS_ORIGIN_OPENER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"
# Preloading a domain into browsers is the owner's decision about the whole domain, not a gateway's.
SILENCED_SYSTEM_CHECKS = ["security.W021"]
CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": [SELF],
        # config.csp adds 'unsafe-eval' for the admin, whose theme evaluates expressions, and for nothing else.
        "script-src": (SELF, NONCE),
        "style-src": [SELF, "'unsafe-inline'"],
        "img-src": [SELF, "data:"],
        "connect-src": [SELF],
        "object-src": [NONE],
        "base-uri": [NONE],
        "form-action": [SELF],
        "frame-ancestors": [NONE],
    }
}
DATA_UPLOAD_MAX_MEMORY_SIZE = 2_621_440
DATA_UPLOAD_MAX_NUMBER_FIELDS = 2000

AUTHENTICATION_BACKENDS = ["axes.backends.AxesStandaloneBackend", "django.contrib.auth.backends.ModelBackend"]
PASSWORD_HASHERS = [
    "django.contrib.auth.hashers.PBKDF2PasswordHasher",
    "django.contrib.auth.hashers.ScryptPasswordHasher",
]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}", "OPTIONS": options}
    for name, options in (
        ("UserAttributeSimilarityValidator", {}),
        ("MinimumLengthValidator", {"min_length": 12}),
        ("CommonPasswordValidator", {}),
        ("NumericPasswordValidator", {}),
    )
]
LOGIN_URL = "/admin/login/"
LOGIN_REDIRECT_URL = "/admin/"
AXES_FAILURE_LIMIT = 10
AXES_COOLOFF_TIME = timedelta(minutes=5)
AXES_LOCKOUT_PARAMETERS = ["username", "ip_address"]
# A good login takes nothing back: else whoever has an account could guess nine times, log in, and guess again.
AXES_RESET_ON_SUCCESS = False
# Nor does a try during the lock, or anybody could keep an administrator out for ever.
AXES_RESET_COOL_OFF_ON_FAILURE_DURING_LOCKOUT = False
AXES_LOCKOUT_CALLABLE = "audit.access.signing_in.locked_page"
AXES_USERNAME_CALLABLE = "audit.access.signing_in.counted_name"
# axes keeps what was sent with a wrong guess, but for these; a form that asks for a password by another name has it here.
AXES_SENSITIVE_PARAMETERS = [
    "username",
    "ip_address",
    "code",
    "credential",
    "old_password",
    "new_password1",
    "new_password2",
]
AXES_DISABLE_ACCESS_LOG = True
AXES_HTTP_RESPONSE_CODE = 429
AXES_ENABLE_ADMIN = False
AXES_VERBOSE = False
AXES_IPWARE_META_PRECEDENCE_ORDER = ["REMOTE_ADDR"]

# The second factor, and the steps of a login. Guessing is axes' business, which counts in the database for all processes.
ACCOUNT_ADAPTER = "audit.access.signing_in.Accounts"
ACCOUNT_LOGIN_METHODS = {"username"}
ACCOUNT_SIGNUP_FIELDS = ["username*", "password1*", "password2*"]
ACCOUNT_EMAIL_VERIFICATION = "none"
ACCOUNT_UNIQUE_EMAIL = False
ACCOUNT_RATE_LIMITS = False
ACCOUNT_REAUTHENTICATION_TIMEOUT = 900
MFA_ADAPTER = "audit.access.second_factor.Sealed"
MFA_FORMS = {
    "authenticate": "audit.access.second_factor.CodeForm",
    "reauthenticate": "audit.access.second_factor.CodeAgainForm",
}
MFA_SUPPORTED_TYPES = ["totp", "webauthn", "recovery_codes"]
MFA_RATE_LIMITS = False
MFA_TOTP_ISSUER = "Penstock"
MFA_TOTP_TOLERANCE = 1
MFA_RECOVERY_CODES_SHOW_ONCE = True
MFA_ALLOW_UNVERIFIED_EMAIL = True

# -- single sign-on --------------------------------------------------------------------------------------------------

OIDC_ISSUER = env.text("OIDC_ISSUER").rstrip("/")
OIDC_CLIENT_ID = env.text("OIDC_CLIENT_ID")
OIDC_CLIENT_SECRET = env.text("OIDC_CLIENT_SECRET")
OIDC_ROLE_CLAIM = env.text("OIDC_ROLE_CLAIM", "groups")
OIDC_ROLE_MAP = env.role_map("OIDC_ROLE_MAP")

if OIDC_ISSUER:
    env.wrong_sign_on(OIDC_ISSUER, client=OIDC_CLIENT_ID, secret=OIDC_CLIENT_SECRET, roles=OIDC_ROLE_MAP)
elif OIDC_CLIENT_ID or OIDC_CLIENT_SECRET or OIDC_ROLE_MAP:
    env.wrong("OIDC_ISSUER", "is missing; without it the other OIDC settings do nothing")

SOCIALACCOUNT_ADAPTER = "config.sso.SignOn"
SOCIALACCOUNT_EMAIL_VERIFICATION = "none"
# Nobody becomes somebody else by an address of mail, verified or not.
SOCIALACCOUNT_EMAIL_AUTHENTICATION = False
SOCIALACCOUNT_STORE_TOKENS = False
SOCIALACCOUNT_PROVIDERS: dict[str, Any] = {
    "openid_connect": {
        "APPS": [
            {
                # Whom an account belongs to is told by issuer and subject together (OpenID Connect Core, 5.7).
                "provider_id": OIDC_ISSUER,
                "name": "single sign-on",
                "client_id": OIDC_CLIENT_ID,
                "secret": OIDC_CLIENT_SECRET,
                "settings": {"server_url": OIDC_ISSUER, "oauth_pkce_enabled": True},
            }
        ]
        if OIDC_ISSUER
        else []
    }
}

# -- API -------------------------------------------------------------------------------------------------------------

RATE_LIMIT_REQUESTS = env.whole("RATE_LIMIT_REQUESTS", 100, least=1)
RATE_LIMIT_REQUESTS_BY_ROLE = env.role_limits("RATE_LIMIT_REQUESTS_BY_ROLE")
RATE_LIMIT_WINDOW_SECONDS = env.whole("RATE_LIMIT_WINDOW_SECONDS", 60, least=1, most=86400)
REST_FRAMEWORK: dict[str, Any] = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "audit.api.BearerAuthentication",
        "rest_framework.authentication.SessionAuthentication",
    ],
    "DEFAULT_PERMISSION_CLASSES": ["audit.api.DenyAll"],
    "DEFAULT_PAGINATION_CLASS": "audit.api.Pages",
    "DEFAULT_FILTER_BACKENDS": [
        "audit.api_filters.KnownParameters",
        "django_filters.rest_framework.DjangoFilterBackend",
        "rest_framework.filters.SearchFilter",
        "audit.api_filters.KnownOrdering",
    ],
    "DEFAULT_PARSER_CLASSES": ["audit.api.StrictJSONParser"],
    "DEFAULT_RENDERER_CLASSES": ["audit.api.UTF8Renderer"],
    "DEFAULT_THROTTLE_CLASSES": ["audit.api.CallerThrottle"],
    "DEFAULT_SCHEMA_CLASS": "config.openapi.NamedSchema",
    "EXCEPTION_HANDLER": "audit.api.error_response",
    "TEST_REQUEST_DEFAULT_FORMAT": "json",
    "NUM_PROXIES": 0,
}
JWT_ACCESS_SECONDS = env.whole("JWT_ACCESS_SECONDS", 900, least=30, most=86400)
SIMPLE_JWT = {
    "ACCESS_TOKEN_LIFETIME": timedelta(seconds=JWT_ACCESS_SECONDS),
    "REFRESH_TOKEN_LIFETIME": timedelta(days=7),
    "ROTATE_REFRESH_TOKENS": True,
    "BLACKLIST_AFTER_ROTATION": True,
    "SIGNING_KEY": JWT_SIGNING_KEY,
    "ALGORITHM": "HS256",
    "CHECK_REVOKE_TOKEN": True,
    "UPDATE_LAST_LOGIN": False,
}
SPECTACULAR_SETTINGS = {
    "TITLE": "Penstock",
    "VERSION": VERSION,
    "OAS_VERSION": "3.1.1",
    "DESCRIPTION": "Manage LLM providers and stream from all of them through one OpenAI-compatible address.",
    "SERVE_INCLUDE_SCHEMA": False,
    "SERVE_PERMISSIONS": ["rest_framework.permissions.IsAuthenticated"],
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    "REDOC_DIST": "SIDECAR",
    "COMPONENT_SPLIT_REQUEST": True,
    "SCHEMA_PATH_PREFIX": r"/api/v1",
    "PREPROCESSING_HOOKS": ["config.openapi.only_v1"],
    "POSTPROCESSING_HOOKS": [
        "drf_spectacular.hooks.postprocess_schema_enums",
        "config.openapi.with_errors",
        "config.openapi.with_data_plane",
        "config.openapi.with_types_once",
        "config.examples.with_examples",
    ],
    "ENUM_NAME_OVERRIDES": {
        "ProbeStatus": "providers.models.health.Status",
        "Verdict": "providers.models.health.Verdict",
        "Purpose": "providers.models.active.Purpose",
        "Window": "proxy.models.budgets.Window",
        "Kind": "providers.api.serializers.ALL_KINDS",
        "ServerKind": "providers.api.serializers.SERVER_KINDS",
    },
}

# -- the data plane --------------------------------------------------------------------------------------------------

DEFAULT_MAX_CONCURRENCY = env.whole("DEFAULT_MAX_CONCURRENCY", 50)
TEXT_RETENTION_DAYS = env.whole("TEXT_RETENTION_DAYS", 30, least=1, most=3650)
MAX_REQUEST_BYTES = env.whole("MAX_REQUEST_BYTES", 10 * 1024 * 1024, least=1024, most=1024**3)
MAX_RUNNING_REQUESTS = env.whole("MAX_RUNNING_REQUESTS", 2000, least=1, most=1_000_000)
MEMORY_LIMIT_BYTES = env.whole("MEMORY_LIMIT_BYTES", 0, least=0, most=2**50)
TEST_TIMEOUT_SECONDS = env.seconds("TEST_TIMEOUT_SECONDS", 10)
CONNECT_TIMEOUT_SECONDS = env.seconds("CONNECT_TIMEOUT_SECONDS", 5)
FIRST_TOKEN_TIMEOUT_SECONDS = env.seconds("FIRST_TOKEN_TIMEOUT_SECONDS", 60)
IDLE_TIMEOUT_SECONDS = env.seconds("IDLE_TIMEOUT_SECONDS", 120)
STREAM_TIMEOUT_SECONDS = env.seconds("STREAM_TIMEOUT_SECONDS", 1800)
REQUEST_TIMEOUT_SECONDS = env.seconds("REQUEST_TIMEOUT_SECONDS", 600)
PRIVATE_NETWORKS = env.networks(
    "PRIVATE_NETWORKS", "127.0.0.0/8, ::1/128, 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16, fc00::/7"
)
USAGE_RETENTION_DAYS = env.whole("USAGE_RETENTION_DAYS", 0, most=36_500)
METRICS_ALLOWED_NETWORKS = env.networks("METRICS_ALLOWED_NETWORKS", "127.0.0.0/8, ::1/128")
METRICS_TOKEN = env.text("METRICS_TOKEN")

# -- health ----------------------------------------------------------------------------------------------------------

HEALTH_CHECK_ENABLED = env.flag("HEALTH_CHECK_ENABLED", True)
HEALTH_CHECK_INTERVAL_SECONDS = env.seconds("HEALTH_CHECK_INTERVAL_SECONDS", 60, least=1)
HEALTH_CHECK_TIMEOUT_SECONDS = env.seconds("HEALTH_CHECK_TIMEOUT_SECONDS", 5)
HEALTH_CHECK_FAILURE_THRESHOLD = env.whole("HEALTH_CHECK_FAILURE_THRESHOLD", 3, least=1, most=100)

# -- audit -----------------------------------------------------------------------------------------------------------

AUDIT_WATCH = [
    "auth.User",
    "auth.Group",
    "providers.Keyring",
    "providers.Provider",
    "providers.ApiKey",
    "providers.UpstreamModel",
    "providers.ActiveProvider",
    "providers.ActiveTarget",
    "proxy.GatewayKey",
    "proxy.ModelRoute",
    "proxy.OwnerLimits",
    "proxy.RouteNode",
    "proxy.Budget",
    "proxy.ModelPrice",
]
AUDIT_ANCHOR_FILE = DATA_DIR / "audit-head.log"

# -- logs ------------------------------------------------------------------------------------------------------------

LOG_LEVEL = env.choice("LOG_LEVEL", "INFO", "DEBUG", "INFO", "WARNING", "ERROR")
LOG_FORMAT = env.choice("LOG_FORMAT", "auto", "auto", "json", "console")
LOGGING = logs.configuration(
    level=LOG_LEVEL,
    style=("console" if sys.stderr.isatty() else "json") if LOG_FORMAT == "auto" else LOG_FORMAT,
    file="" if _kept_elsewhere else str(LOG_DIR / "penstock.log"),
)
DEFAULT_EXCEPTION_REPORTER_FILTER = "django.views.debug.SafeExceptionReporterFilter"

SETTINGS_NAMES = tuple(env.names)
SETTINGS_PROBLEMS = tuple(env.problems)
