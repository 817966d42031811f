"""S3 servers for tests: a real one (`radosgw`) and a mock that also fails as told (`moto`).

Fixtures: `radosgw` and `moto` are servers, `radosgw_store` and `moto_store` an empty `Store` in a
bucket of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import radosgw as radosgw_script
import s3fs

from dagflow_storage import RetryPolicy, Store
from dagflow_storage.faults import Fault, FaultKind

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class S3Server:
    """Where a server is, and who may write."""

    endpoint_url: str
    key: str = radosgw_script.ACCESS_KEY
    secret: str = radosgw_script.SECRET_KEY

    @property
    def options(self) -> dict[str, Any]:
        """What `Store` and s3fs take."""
        return {
            "endpoint_url": self.endpoint_url,
            "key": self.key,
            "secret": self.secret,
            "client_kwargs": {"region_name": "us-east-1"},
            "config_kwargs": {"s3": {"addressing_style": "path"}},
        }

    def new_store(self, retry: RetryPolicy | None = None) -> Store:
        """A store in a bucket of its own."""
        bucket = f"test-{uuid.uuid4().hex}"
        # Not `mkdir`, which would name the region as a constraint; servers know it by another.
        s3fs.S3FileSystem(**self.options).call_s3("create_bucket", Bucket=bucket)
        return Store(f"s3://{bucket}/run", self.options, retry=retry)


@pytest.fixture(scope="module")
def radosgw() -> Iterator[S3Server]:
    """A real S3 server, one for all test processes; skips where there can be none.

    For as long as a module needs it: its daemons compute, idle or not.
    """
    reason = radosgw_script.why_not()
    if reason:
        pytest.skip(reason)
    with radosgw_running(_shared_folder()) as server:
        yield server


@pytest.fixture
def radosgw_store(radosgw: S3Server) -> Store:
    return radosgw.new_store()


@contextlib.contextmanager
def radosgw_running(folder: Path) -> Iterator[S3Server]:
    """A radosgw that all who name the same folder share; the first starts it.

    It stops by itself when its last user has gone, however that one went.
    """
    lock = folder.with_suffix(".lock")
    with _locked(lock):
        if not _is_up(folder):
            _start(folder)
        port = int((folder / "port").read_text())
        mark = folder / "users" / str(os.getpid())
        mark.touch()
    try:
        yield S3Server(f"http://127.0.0.1:{port}")
    finally:
        with _locked(lock):
            mark.unlink(missing_ok=True)
            if not radosgw_script.is_used(folder):
                _wait_until(lambda: not _is_up(folder), "radosgw to stop")
                shutil.rmtree(folder, ignore_errors=True)


def _shared_folder() -> Path:
    # One for all processes of a pytest-xdist run: they share the main one as parent.
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    return Path(tempfile.gettempdir(), f"dagflow-radosgw-{run}")


def _is_up(folder: Path) -> bool:
    try:
        process_id = int((folder / "process").read_text())
    except (FileNotFoundError, ValueError):
        return False
    with contextlib.suppress(ChildProcessError):
        os.waitpid(process_id, os.WNOHANG)  # if it is ours and has ended, this says so
    return radosgw_script.is_running(process_id)


def _start(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "users").mkdir(parents=True)
    # The one who starts it uses it, so that it doesn't stop at once.
    (folder / "users" / str(os.getpid())).touch()
    port = radosgw_script.free_port()
    command = [sys.executable, radosgw_script.__file__, str(folder), str(port)]
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    # It outlives this object: another test process may need it longer.
    process.returncode = 0
    (folder / "process").write_text(str(process.pid))
    (folder / "port").write_text(str(port))
    _wait_until(lambda: (folder / "ready").exists() or not _is_up(folder), "radosgw to start")
    if not (folder / "ready").exists():
        raise RuntimeError(f"radosgw did not start: {(folder / 'log.txt').read_text()}")


def _wait_until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + radosgw_script.START_SECONDS
    while not is_so():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {radosgw_script.START_SECONDS:.0f} s for {what}")
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


_XML = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
_ANSWERS = {
    FaultKind.UNAVAILABLE: ("503 Service Unavailable", "SlowDown", "Reduce your request rate."),
    FaultKind.LOST_ANSWER: ("500 Internal Server Error", "InternalError", "Internal error."),
    FaultKind.FORBIDDEN: ("403 Forbidden", "AccessDenied", "Access Denied"),
    FaultKind.EXPIRED: ("400 Bad Request", "ExpiredToken", "The provided token has expired."),
    FaultKind.NO_BUCKET: ("404 Not Found", "NoSuchBucket", "The bucket does not exist"),
}
_OPERATIONS = {"PUT": "put", "GET": "get", "HEAD": "info", "DELETE": "delete", "POST": "delete"}


@dataclass
class FaultyApp:
    """A WSGI application with faults in front of another: what a client sees is real HTTP.

    Attributes
    ----------
    script
        The faults to come, of the requests from now on; set it with `play`.
    requests
        How many requests there were, by operation.
    """

    app: Any
    script: Sequence[Fault] = ()
    requests: Counter[str] = field(default_factory=Counter)
    _attempts: Counter[int] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closing: threading.Event = field(default_factory=threading.Event)

    def play(self, *script: Fault) -> None:
        """Begin a new script."""
        with self._lock:
            self.script = script
            self._attempts.clear()
            self.requests.clear()

    def close(self) -> None:
        """Let go of requests that hang."""
        self._closing.set()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        kinds = self._meet(environ)
        if FaultKind.RESET in kinds:
            _hang_up(environ)
        for kind in kinds:
            if kind in _ANSWERS and kind is not FaultKind.LOST_ANSWER:
                return _answer(kind, environ, start_response)
        if FaultKind.LOST_ANSWER in kinds:
            list(self.app(environ, lambda *_: None))
            return _answer(FaultKind.LOST_ANSWER, environ, start_response)
        if FaultKind.CONDITION_IGNORED in kinds:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        answer: Iterable[bytes] = self.app(environ, start_response)
        if FaultKind.TRUNCATED in kinds:
            # Fewer bytes than the header promises, and then the end.
            return [b"".join(answer)[:-3]]
        return answer

    def _meet(self, environ: dict[str, Any]) -> set[FaultKind]:
        operation = _OPERATIONS.get(environ["REQUEST_METHOD"], "get")
        met = []
        with self._lock:
            self.requests[operation] += 1
            for index, fault in enumerate(self.script):
                if not fault.matches(operation, environ["PATH_INFO"]):
                    continue
                self._attempts[index] += 1
                if fault.happens_to(self._attempts[index]):
                    met.append(fault)
        for fault in met:
            if fault.kind is FaultKind.HANG:
                self._closing.wait(fault.seconds)
        return {fault.kind for fault in met}


def _answer(kind: FaultKind, environ: dict[str, Any], start_response: Any) -> list[bytes]:
    status, code, message = _ANSWERS[kind]
    body = _XML.format(code=code, message=message).encode()
    start_response(
        status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
    )
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


def _hang_up(environ: dict[str, Any]) -> None:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    # So the server takes it for the client's doing, and says nothing more.
    raise ConnectionResetError("as the script wants it")


@dataclass(frozen=True)
class MotoServer(S3Server):
    """A mock: it knows buckets, objects and conditions, and believes every signature."""

    faults: FaultyApp = field(default_factory=lambda: FaultyApp(None))


@pytest.fixture(scope="session")
def moto_server() -> Iterator[MotoServer]:
    """The mock, in a thread of this process."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    app = FaultyApp(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield MotoServer(f"http://127.0.0.1:{server.port}", faults=app)
    app.close()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def moto(moto_server: MotoServer) -> Iterator[MotoServer]:
    """The mock, without faults until the test plays some."""
    moto_server.faults.play()
    yield moto_server
    moto_server.faults.play()


@pytest.fixture
def moto_store(moto: MotoServer) -> Store:
    return moto.new_store()
