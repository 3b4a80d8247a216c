"""`make run`: what the launcher writes, refuses, starts, repairs and leaves behind."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from config import envfile
from config.env import key_from_text
from config.follow import LogFile, readable
from config.greeting import Address, curl_line, greeting
from config.processes import NoPrivateFolder, private_dir, valkey_binary
from tests.support.ports import free_port
from tests.support.processes import REPOSITORY, Process, descendants

pytestmark = pytest.mark.no_database

NAMES = {"SECRET_KEY", "PENSTOCK_ENCRYPTION_KEY", "PENSTOCK_PEPPERS", "JWT_SIGNING_KEY"}
ADDRESS = Address("127.0.0.1", 8000, "http://127.0.0.1:8000")


@pytest.fixture
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment without settings, and an empty data directory."""
    for name in [*NAMES, *(f"{name}_FILE" for name in NAMES), "DATABASE_URL"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    return tmp_path / ".env"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- .env ------------------------------------------------------------------------------------------------------------


def test_the_first_start_writes_fresh_private_secrets(nothing_set: Path) -> None:
    assert set(envfile.write_missing_secrets(nothing_set)) == NAMES
    assert mode(nothing_set) == 0o600
    values = envfile.read(nothing_set)
    assert len(key_from_text(values["PENSTOCK_ENCRYPTION_KEY"])) == 32
    assert len(key_from_text(values["PENSTOCK_PEPPERS"].removeprefix("1:"))) == 48
    assert min(len(values["SECRET_KEY"]), len(values["JWT_SIGNING_KEY"])) >= 50
    assert len(set(values.values())) == len(NAMES)


def test_r60_two_installations_share_no_secret(nothing_set: Path) -> None:
    other = nothing_set.with_name("other")
    envfile.write_missing_secrets(nothing_set)
    envfile.write_missing_secrets(other)
    assert not set(envfile.read(nothing_set).values()) & set(envfile.read(other).values())


def test_a_second_start_changes_no_secret(nothing_set: Path) -> None:
    envfile.write_missing_secrets(nothing_set)
    before = nothing_set.read_bytes()
    assert envfile.write_missing_secrets(nothing_set) == []
    assert nothing_set.read_bytes() == before


def test_what_a_person_has_set_is_kept(nothing_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_set.write_text("PORT=9000\nSECRET_KEY=mine\n")
    monkeypatch.setenv("JWT_SIGNING_KEY", "from the environment")
    monkeypatch.setenv("PENSTOCK_PEPPERS_FILE", "/run/secrets/peppers")
    assert envfile.write_missing_secrets(nothing_set) == ["PENSTOCK_ENCRYPTION_KEY"]
    values = envfile.read(nothing_set)
    assert (values["PORT"], values["SECRET_KEY"]) == ("9000", "mine")
    assert not {"JWT_SIGNING_KEY", "PENSTOCK_PEPPERS"} & set(values)


def sqlite_keyring(nothing_set: Path, *, rows: int) -> None:
    path = nothing_set.parent / "data" / envfile.DATABASE_NAME
    connection = sqlite3.connect(path)
    connection.execute(f"CREATE TABLE {envfile.KEYRING_TABLE} (id)")
    connection.executemany(f"INSERT INTO {envfile.KEYRING_TABLE} VALUES (?)", [(n,) for n in range(rows)])
    connection.commit()
    connection.close()


def test_r04_no_new_encryption_key_is_written_beside_a_keyring(nothing_set: Path) -> None:
    sqlite_keyring(nothing_set, rows=1)
    with pytest.raises(envfile.KeyringExists, match="PENSTOCK_ENCRYPTION_KEY") as raised:
        envfile.write_missing_secrets(nothing_set)
    assert "\n" not in str(raised.value)
    assert not nothing_set.exists()


def test_a_database_without_a_keyring_gets_a_key(nothing_set: Path) -> None:
    sqlite_keyring(nothing_set, rows=0)
    assert "PENSTOCK_ENCRYPTION_KEY" in envfile.write_missing_secrets(nothing_set)


def test_no_key_is_written_when_the_database_cannot_be_asked(
    nothing_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"postgresql://app:hidden@127.0.0.1:{free_port()}/gateway")
    with pytest.raises(envfile.DatabaseUnreadable) as raised:
        envfile.write_missing_secrets(nothing_set)
    assert "hidden" not in str(raised.value)
    (nothing_set.parent / "data" / envfile.DATABASE_NAME).write_bytes(b"no database" * 100)
    monkeypatch.delenv("DATABASE_URL")
    with pytest.raises(envfile.DatabaseUnreadable):
        envfile.write_missing_secrets(nothing_set)
    assert not nothing_set.exists()


def test_containers_are_prepared_with_a_bare_python(nothing_set: Path) -> None:
    """`make docker-up` has no packages: -I -S leaves only the standard library."""
    program = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from config.envfile import main; main(sys.argv[1:])"
    subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, "--containers", str(nothing_set)],
        check=True,
        capture_output=True,
        env={"DATA_DIR": os.environ["DATA_DIR"]},
    )
    assert set(envfile.read(nothing_set)) == NAMES | {"POSTGRES_PASSWORD"}


# -- what is shown ---------------------------------------------------------------------------------------------------


def test_secrets_are_shown_when_they_are_new_and_never_again() -> None:
    fresh = {"username": "admin", "password": "p4ssw0rd", "gateway_key": "pen_live_x", "created": []}
    text = greeting(ADDRESS, fresh, ready=True)
    assert "p4ssw0rd" in text
    assert "Bearer pen_live_x" in text
    later = greeting(ADDRESS, {**fresh, "password": None, "gateway_key": None}, ready=True)
    assert "Password" not in later
    assert 'Bearer $PENSTOCK_GATEWAY_KEY"' in later
    assert "manage.py issue_key" in later


def test_the_line_to_paste_is_one_line_that_a_shell_reads_as_meant() -> None:
    line = curl_line("http://127.0.0.1:8000", "pen_live_x")
    words = subprocess.run(
        ["/bin/sh", "-c", line.replace("curl", "printf '%s\\n'", 1)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert words[:2] == ["-N", "http://127.0.0.1:8000/v1/chat/completions"]
    assert "Authorization: Bearer pen_live_x" in words
    body = json.loads(words[-1])
    assert (body["model"], body["stream"]) == ("echo/echo", True)


def test_json_lines_are_shown_readable_and_cannot_steer_the_terminal() -> None:
    event = {"timestamp": "2026-01-02T03:04:05Z", "level": "info", "message": "up\x1b[2J", "port": 80}
    assert readable(json.dumps(event)) == "03:04:05 info up?[2J port=80"
    assert readable("plain \x07 line") == "plain ? line"


def test_everyday_lines_of_the_queue_stay_in_the_file_and_its_troubles_are_shown() -> None:
    event = {"logger": "celery.worker.consumer", "level": "info", "message": "ready"}
    assert readable(json.dumps(event)) == ""
    assert readable(json.dumps({**event, "level": "warning"})) == "warning ready"
    assert readable(json.dumps({**event, "logger": "providers.health"})) == "info ready"


def test_one_event_is_one_line_unless_it_is_an_error() -> None:
    event = {"level": "warning", "message": "lost\nand much advice\n"}
    assert readable(json.dumps(event)) == "warning lost"
    assert readable(json.dumps({**event, "level": "error"})) == "error lost\nand much advice"


def test_logs_are_followed_through_rotation_without_losing_or_repeating_a_line(tmp_path: Path) -> None:
    path = tmp_path / "web.log"
    path.write_text("before the start\n")
    with closing(LogFile(path)) as log:
        with path.open("a") as file:
            file.write("one\ntw")
        assert list(log.lines()) == ["web      one"]
        with path.open("a") as file:
            file.write("o\n")
        path.rename(tmp_path / "web.log.1")
        path.write_text("three\n")
        assert list(log.lines()) == ["web      two", "web      three"]
        assert list(log.lines()) == []


def test_a_log_that_appears_later_is_shown_from_its_start(tmp_path: Path) -> None:
    with closing(LogFile(tmp_path / "web.log", wanted=(" WARN ",))) as log:
        assert list(log.lines()) == []
        (tmp_path / "web.log").write_text("now INFO quiet\nnow WARN exited\n")
        assert list(log.lines()) == ["web      now WARN exited"]


# -- sockets ---------------------------------------------------------------------------------------------------------


def test_sockets_live_in_a_private_folder_with_a_short_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("deep" * 40)
    path = private_dir(deep)
    try:
        assert mode(path) == 0o700
        assert len(os.fsencode(path / "supervisord.sock")) <= 107
        assert private_dir(deep) == path
        assert private_dir(tmp_path / "other") != path
    finally:
        path.rmdir()
        private_dir(tmp_path / "other").rmdir()


def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    path = private_dir(tmp_path)
    path.chmod(0o755)
    try:
        with pytest.raises(NoPrivateFolder, match="0700"):
            private_dir(tmp_path)
    finally:
        path.rmdir()


# -- the whole -------------------------------------------------------------------------------------------------------


class Launched:
    """`python -m config.launch` on a data directory of its own.

    folder: where `.env` and the data are; a second one on the same folder continues the first.
    """

    arguments: tuple[str, ...] = ()

    def __init__(self, folder: Path, *, port: int, **environment: str) -> None:
        self.folder = folder
        self.port = port
        outside = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        self.environment = {
            **outside,
            "ENV_FILE": str(folder / ".env"),
            "DATA_DIR": str(folder / "data"),
            "PORT": str(port),
            **environment,
        }
        self.process = self.again()

    def again(self) -> Process:
        """One more launcher on the same folder."""
        return Process(
            [sys.executable, "-m", "config.launch", *self.arguments],
            name="launcher",
            env=self.environment,
            cwd=REPOSITORY,
        )

    @property
    def output(self) -> str:
        return self.process.logs()

    def wait_for(self, text: str, *, timeout: float = 60.0) -> None:
        self.process.wait_until(lambda: text in self.output, timeout=timeout)

    def program(self, words: str) -> int:
        """The process id of the one program whose command line holds `words`; 0 while there is none."""
        supervisors = children_with(self.process.pid, "supervisor.supervisord")
        found = [pid for each in supervisors for pid in children_with(each, words)]
        return found[0] if found else 0

    def curl(self) -> list[str]:
        """The line to paste, as words."""
        line = next(line for line in self.output.splitlines() if line.startswith("curl -N"))
        printed = subprocess.run(
            ["/bin/sh", "-c", line.replace("curl", "printf '%s\\n'", 1)],
            capture_output=True,
            text=True,
            check=True,
        )
        return printed.stdout.splitlines()


class LaunchedForDevelopment(Launched):
    """As `make dev` starts it."""

    arguments = ("--dev",)


def children_with(pid: int, words: str) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if words in command_line(int(child))]


def ended(pid: int) -> bool:
    """Whether the process is dead and nobody has reaped it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def eventually(true: Callable[[], bool], *, timeout: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def answers(port: int, path: str = "/readyz") -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    """A gateway started as `make run` starts it, for tests that leave it running."""
    launched = Launched(tmp_path_factory.mktemp("launched"), port=free_port())
    try:
        launched.wait_for("Penstock is ready.", timeout=90)
        yield launched
    finally:
        launched.process.stop(number=signal.SIGINT, timeout=90)


# Launched as a newcomer does, which is on SQLite: once is enough when the suite runs twice.
whole = [
    pytest.mark.xdist_group("launch"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.skipif(
        os.environ.get("PENSTOCK_TEST_DATABASE") == "postgresql", reason="runs with the SQLite suite"
    ),
]


class TestRunning:
    pytestmark = whole

    def test_the_printed_line_streams_an_answer_from_echo(self, running: Launched) -> None:
        words = running.curl()
        url = urlsplit(words[1])
        headers = dict(word.split(": ", 1) for word in words if re.match(r"[A-Z][\w-]+: ", word))
        connection = http.client.HTTPConnection(str(url.hostname), url.port, timeout=20)
        connection.request("POST", url.path, words[-1], headers)
        response = connection.getresponse()
        body = response.read().decode()
        connection.close()
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "Hello" in body
        assert body.rstrip().endswith("data: [DONE]")

    def test_a_second_start_says_where_the_first_one_listens(self, running: Launched) -> None:
        second = running.again()
        second.wait(20)
        assert second.returncode == 0
        assert f"already running at http://127.0.0.1:{running.port}" in second.logs()
        assert running.process.alive

    def test_data_and_secrets_are_private(self, running: Launched) -> None:
        data = running.folder / "data"
        assert mode(running.folder / ".env") == 0o600
        assert mode(data) == 0o700
        assert (data / envfile.DATABASE_NAME).exists()
        assert [path for path in data.rglob("*") if path.is_file() and mode(path) & 0o077] == []

    def test_no_secret_is_on_a_command_line(self, running: Launched) -> None:
        values = list(envfile.read(running.folder / ".env").values())
        lines = [command_line(pid) for pid in descendants(running.process.pid)]
        assert len(lines) >= 6
        assert not [line for line in lines if any(value in line for value in values)]

    @pytest.mark.parametrize(
        "words",
        ["manage.py serve", "drain_usage", "config.celery worker", "config.celery beat", "valkey-server"],
    )
    def test_a_killed_process_is_replaced_and_the_gateway_is_ready_again(
        self, running: Launched, words: str
    ) -> None:
        before = running.program(words)
        assert before, running.output
        os.kill(before, signal.SIGKILL)
        assert eventually(lambda: running.program(words) not in {0, before})
        assert eventually(lambda: answers(running.port)), running.output
        assert eventually(lambda: not [pid for pid in children_with(running.process.pid, "") if ended(pid)])

    def test_the_terminal_is_calm(self, running: Launched) -> None:
        """Nothing but our own lines: no packages that warn, no tracebacks, whatever was killed before."""
        words = ("Warning", "Traceback", "superuser privileges", "audit head", "celery@")
        assert not [line for line in running.output.splitlines() if any(word in line for word in words)]


class TestStarting:
    pytestmark = whole

    def test_ctrl_c_stops_everything_and_the_next_start_keeps_all_data(self, tmp_path: Path) -> None:
        port = free_port()
        first = Launched(tmp_path, port=port)
        first.wait_for("Penstock is ready.", timeout=90)
        secrets = (tmp_path / ".env").read_bytes()
        assert stopped_by(first, signal.SIGINT)
        second = Launched(tmp_path, port=port)
        second.wait_for("Penstock is ready.", timeout=90)
        assert "Password" not in second.output
        assert "$PENSTOCK_GATEWAY_KEY" in second.output
        assert (tmp_path / ".env").read_bytes() == secrets
        assert stopped_by(second, signal.SIGTERM)

    def test_a_malformed_first_gateway_key_is_refused_before_there_is_a_database(
        self, tmp_path: Path
    ) -> None:
        wrong = "pen_live_" + "0" * 42 + "_000000"
        launched = Launched(tmp_path, port=free_port(), PENSTOCK_GATEWAY_KEY=wrong)
        assert launched.process.wait(60) == 1
        (line,) = [each for each in launched.output.splitlines() if "wrong setting" in each]
        assert "PENSTOCK_GATEWAY_KEY" in line and wrong not in launched.output
        assert not list((tmp_path / "data").glob("*.sqlite3*"))

    def test_development_starts_the_gateway_too_and_says_everything_once(self, tmp_path: Path) -> None:
        launched = LaunchedForDevelopment(tmp_path, port=free_port())
        launched.wait_for("Penstock is ready.", timeout=90)
        assert answers(launched.port, "/api/health")
        launched.wait_for("HTTP GET /api/health 200")
        assert launched.output.count("HTTP GET /api/health 200") == 1
        assert "/readyz" not in launched.output
        assert "Warning" not in launched.output
        assert stopped_by(launched, signal.SIGINT)

    def test_a_killed_launcher_takes_its_processes_with_it(self, tmp_path: Path) -> None:
        launched = Launched(tmp_path, port=free_port())
        launched.wait_for("Penstock is ready.", timeout=90)
        family = descendants(launched.process.pid)
        os.kill(launched.process.pid, signal.SIGKILL)
        launched.process.wait(10)
        assert eventually(lambda: not [pid for pid in family if command_line(pid)], timeout=90)

    def test_a_killed_supervisord_is_replaced_and_leaves_no_second_set_of_processes(
        self, tmp_path: Path
    ) -> None:
        launched = Launched(tmp_path, port=free_port())
        launched.wait_for("Penstock is ready.", timeout=90)
        # A supervisord that dies at once is not started again and again.
        (before,) = children_with(launched.process.pid, "supervisor.supervisord")
        assert eventually(lambda: seconds_since_start(before) > 15)
        family = descendants(before)
        os.kill(before, signal.SIGKILL)
        assert eventually(lambda: not [pid for pid in family if command_line(pid)], timeout=90)
        assert eventually(lambda: answers(launched.port), timeout=60), launched.output
        assert launched.process.stop(timeout=90) == 0


def stopped_by(launched: Launched, number: signal.Signals) -> bool:
    """Whether the signal ends the launcher with 0, and no process of its family is left."""
    family = descendants(launched.process.pid)
    assert len(family) >= 6
    code = launched.process.stop(number=number, timeout=90)
    return code == 0 and not [pid for pid in family if command_line(pid)]


def seconds_since_start(pid: int) -> float:
    started = float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def launch_to_end(folder: Path, **environment: str) -> Process:
    launched = Launched(folder, port=int(environment.pop("PORT", free_port())), **environment)
    launched.process.wait(60)
    return launched.process


def test_a_port_in_use_is_said_in_one_line(tmp_path: Path) -> None:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        process = launch_to_end(tmp_path, PORT=str(port))
    assert process.returncode == 1
    assert process.logs().splitlines()[-1].startswith(f"penstock: port {port} on 127.0.0.1 is in use")
    assert "Traceback" not in process.logs()


def test_r04_a_wrong_setting_stops_the_start_with_its_name(tmp_path: Path) -> None:
    process = launch_to_end(tmp_path, PENSTOCK_ENCRYPTION_KEY="short")
    assert process.returncode == 1
    assert "PENSTOCK_ENCRYPTION_KEY" in process.logs()
    assert "Traceback" not in process.logs()
    assert not (tmp_path / "data" / envfile.DATABASE_NAME).exists()


def test_the_embedded_valkey_runs_here() -> None:
    """The suite promises a real Valkey: if it cannot run, that is to be known, not to be passed over."""
    assert valkey_binary() is not None
