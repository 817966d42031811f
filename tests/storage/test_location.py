import errno
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from dagflow_storage import NotFound, Store, StoreNotWritable, StoreUnreachable
from dagflow_storage.place import backends as backends


def test_relative_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store("runs/a").url == str(tmp_path / "runs" / "a")
    assert Store(tmp_path).url == str(tmp_path)


def test_a_file_url_and_its_path_are_the_same_store(tmp_path: Path) -> None:
    assert Store(f"file://{tmp_path}") == Store(str(tmp_path) + "/")
    assert hash(Store(f"file://{tmp_path}")) == hash(Store(str(tmp_path)))


def test_stores_differ_by_their_options() -> None:
    plain, other = Store("s3://bucket/a"), Store("s3://bucket/a", {"anon": True})
    assert plain != other
    assert len({plain, other, Store("s3://bucket/a/")}) == 2


def test_a_store_survives_pickling_with_its_options() -> None:
    before = Store("s3://bucket/a", {"key": "k", "client_kwargs": {"endpoint_url": "http://x"}})
    assert pickle.loads(pickle.dumps(before)) == before
    assert pickle.loads(pickle.dumps(before.child("b"))) == before.child("b")


def test_repr_shows_no_secret() -> None:
    shown = repr(Store("ftp://me:hunter2@host/a?token=abc", {"password": "hunter2"}))
    assert "ftp://***@host/a" in shown
    assert "hunter2" not in shown
    assert "abc" not in shown


def test_making_a_store_opens_nothing() -> None:
    code = (
        "import sys; from dagflow_storage import Store; Store('s3://bucket/a').child('b');"
        "sys.exit('s3fs' in sys.modules or 'torch' in sys.modules or 'dask' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_a_url_that_lacks_a_slash_is_not_taken_for_a_path() -> None:
    with pytest.raises(ValueError, match="neither a path nor a URL"):
        Store("s3:/bucket/a")


def test_unknown_protocols_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        Store("nonsense://a")


@pytest.mark.parametrize("path", ["../a", "a/../../b", ".."])
def test_no_path_leads_out_of_a_store(store: Store, path: str) -> None:
    with pytest.raises(ValueError, match=r"\.\."):
        store.write_bytes(path, b"x")
    with pytest.raises(ValueError, match=r"\.\."):
        store.child(path)


def test_a_store_does_not_delete_itself(store: Store) -> None:
    with pytest.raises(ValueError, match="inside"):
        store.delete("")


def test_below_a_bare_protocol_there_is_one_slash_less() -> None:
    assert Store("memory://").child("a").url == "memory://a"
    assert Store("/").child("a").url == "/a"


def test_only_memory_is_process_local(folder: Store, memory: Store) -> None:
    assert memory.is_process_local
    assert not folder.is_process_local
    assert not Store("s3://bucket/a").is_process_local


def test_memory_is_shared_with_fsspec(memory: Store) -> None:
    memory.write_bytes("a", b"x")
    assert fsspec.open(f"{memory.url}/a").open().read() == b"x"


def test_memory_may_be_listed_while_another_thread_deletes(
    memory: Store,
) -> None:
    ended = threading.Event()
    others = [f"{number:03}" for number in range(200)]
    for name in others:
        memory.write_bytes(f"there/{name}", b"x")

    def put_and_delete() -> None:
        while not ended.is_set():
            memory.write_bytes("there/a", b"x")
            memory.delete("there/a")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(1) as pool:
            changing = pool.submit(put_and_delete)
            try:
                listed = {tuple(memory.list("there")) for _ in range(300)}
            finally:
                ended.set()
            changing.result()
    finally:
        sys.setswitchinterval(interval)
    assert listed <= {(*others,), (*others, "a")}


def test_probe_refuses_a_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StoreNotWritable, match=r"tried to put.*file/run.*Not a directory|exists"):
        Store(str(tmp_path / "file" / "run")).probe()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_probe_says_what_the_system_said(
    folder: Store, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(backends, "_write_synced", refuse)
    with pytest.raises(StoreNotWritable, match=os.strerror(code)):
        folder.probe()


def test_a_store_that_does_not_answer_is_worth_a_retry(
    memory: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang_up(*_: object, **__: object) -> None:
        raise ConnectionResetError("peer went away")

    filesystem: Any = type(fsspec.filesystem("memory"))
    for name in ("pipe_file", "cat_file", "info"):
        monkeypatch.setattr(filesystem, name, hang_up)
    with pytest.raises(StoreUnreachable, match="peer went away"):
        memory.probe()
    with pytest.raises(StoreUnreachable):
        memory.read_bytes("a")
    with pytest.raises(StoreUnreachable):
        memory.exists("a")


def test_an_object_store_that_forgets_is_not_writable(
    memory: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem: Any = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(filesystem, "cat_file", lambda *_, **__: b"something else")
    with pytest.raises(StoreNotWritable, match="something else"):
        memory.probe()


def test_a_missing_bucket_is_not_writable(memory: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_bucket(*_: object, **__: object) -> None:
        raise FileNotFoundError("The specified bucket does not exist")

    filesystem: Any = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(filesystem, "pipe_file", no_such_bucket)
    with pytest.raises(StoreNotWritable, match="bucket does not exist"):
        memory.write_bytes("a", b"x")


def test_a_failed_write_keeps_what_was_there(
    folder: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_bytes("a", b"before")

    def crash(*_: object) -> None:
        raise OSError(errno.EIO, "disk gone")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(StoreUnreachable, match="disk gone"):
        folder.write_bytes("a", b"after")
    assert folder.read_bytes("a") == b"before"
    assert os.listdir(folder.url) == ["a"]


def test_unfinished_files_are_not_listed(folder: Store) -> None:
    folder.write_bytes("a", b"x")
    (Path(folder.url) / f".b.123{backends._UNFINISHED_SUFFIX}").write_bytes(b"half")
    assert folder.list() == ["a"]


def test_create_works_without_hard_links(folder: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert folder.create_bytes("a", b"first")
    assert not folder.create_bytes("a", b"second")
    assert folder.read_bytes("a") == b"first"
    assert os.listdir(folder.url) == ["a"]


def test_a_server_that_says_precondition_failed_in_its_own_words_is_a_lost_race(
    memory: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem: Any = type(fsspec.filesystem("memory"))
    put = filesystem.pipe_file

    def someone_was_faster(self: Any, path: str, data: bytes, mode: str = "overwrite") -> None:
        put(self, path, b"theirs")
        raise OSError(errno.EINVAL, "At least one of the preconditions did not hold")

    monkeypatch.setattr(filesystem, "pipe_file", someone_was_faster)
    assert not memory.create_bytes("a", b"mine")
    assert memory.read_bytes("a") == b"theirs"


def test_a_read_only_view_of_what_is_absent_is_not_found(store: Store) -> None:
    with pytest.raises(NotFound):
        store.read_bytes("z/zarr.json")
