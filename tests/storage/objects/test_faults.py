"""A server that fails for a while costs time and nothing else; one that fails for good is an error.

The faults are real: a proxy in front of the S3 server answers in its place or cuts the connection.
"""

from collections.abc import Callable, Iterator
from itertools import count

import pytest
import s3fs

from storage.errors import ConfigError, OutOfSpaceError, TransientError
from storage.maintenance.verify import verify_store
from storage.objects.object_store import ObjectStore
from storage.objects.retry import PAUSES_SECONDS, retried
from storage.store import Store
from tests.storage.seaweed import HALF_WAY, HANG_UP, SLOW_DOWN, Answer, FaultyProxy, S3Server
from tests.storage.seaweed import faulty_proxy as faulty_proxy_to
from tests.storage.synthetic import fill, make_identity, make_samples, tree_digests

pytestmark = pytest.mark.s3

INTERNAL_ERROR = Answer(status=500, code="InternalError")


@pytest.fixture
def proxy(
    s3_server: S3Server, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultyProxy]:
    """Return a way to the S3 server that fails on demand; `s3_root` leads through it."""
    assert s3_root
    with faulty_proxy_to(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again as often as ever, but soon."""
    assert retried.__kwdefaults__ == {"pauses_seconds": PAUSES_SECONDS}
    soon = [0.001] * len(PAUSES_SECONDS)
    monkeypatch.setitem(retried.__kwdefaults__, "pauses_seconds", soon)


def every_seventh(answer: Answer) -> Callable[[str, str], Answer | None]:
    """Return a fault that meets every seventh request."""
    asked = count()
    return lambda method, path: answer if next(asked) % 7 == 0 else None  # noqa: ARG005


@pytest.mark.parametrize(
    "answer",
    [SLOW_DOWN, INTERNAL_ERROR, Answer(status=400, code="RequestTimeout"), HANG_UP, HALF_WAY],
    ids=["503", "500", "400 RequestTimeout", "cut", "cut half-way"],
)
def test_what_fails_for_a_while_succeeds(proxy: FaultyProxy, s3_root: str, answer: Answer) -> None:
    proxy.fault = every_seventh(answer)
    store = Store.create(s3_root, make_identity())
    samples = make_samples(2)
    fill(store, samples, shard_tokens=10**6)
    snapshot = store.publish([sample.sample_id for sample in samples])
    assert store.reader(snapshot).fetch(1).sample_id in {s.sample_id for s in samples}
    proxy.fault = lambda method, path: None  # noqa: ARG005
    assert verify_store(store, deep=True) == []
    quiet = Store.create(f"{s3_root}-quiet", make_identity())
    fill(quiet, samples, shard_tokens=10**6)
    quiet.publish([sample.sample_id for sample in samples])
    assert tree_digests(quiet) == tree_digests(store)


def test_what_fails_for_good_is_an_error_after_a_bounded_number_of_requests(
    proxy: FaultyProxy, s3_root: str
) -> None:
    directory = ObjectStore.at(s3_root)
    directory.write("read", b"x")
    directory.write("exists", b"x")
    operations: dict[str, Callable[[], object]] = {
        "read": lambda: directory.read("read"),
        "write": lambda: directory.write("write", b"x"),
        "sizes": lambda: directory.sizes("sizes"),
        "delete": lambda: directory.delete("delete"),
        "exists": lambda: directory.exists("exists"),
        "publish": lambda: directory.create("publish", b"x"),
    }
    proxy.fault = lambda method, path: SLOW_DOWN  # noqa: ARG005
    for name, operation in operations.items():
        proxy.seen.clear()
        with pytest.raises(TransientError, match=f"{s3_root[5:]}/{name}: "):
            operation()
        assert len(proxy.seen) == 1 + len(PAUSES_SECONDS)


def test_whole_objects_are_read_with_one_request_each(proxy: FaultyProxy, s3_root: str) -> None:
    directory = ObjectStore.at(s3_root)
    for key in ("one", "two"):
        directory.write(key, key.encode())
    proxy.seen.clear()
    assert directory.read("one") == b"one"
    assert directory.read_many(["one", "two"]) == {"one": b"one", "two": b"two"}
    path = s3_root.removeprefix("s3:/")
    assert sorted(proxy.seen) == [f"GET {path}/{key}" for key in ("one", "one", "two")]


def test_a_shard_is_two_objects_and_two_round_trips(proxy: FaultyProxy, s3_root: str) -> None:
    """Its record and its data, whatever the profile: opening files is what servers charge for."""
    for profile in ("raw", "lossless", "int8"):
        store = Store.create(f"{s3_root}/{profile}", make_identity(profile=profile))
        samples = make_samples(4)
        fill(store, samples, shard_tokens=10**6)
        snapshot = store.publish([sample.sample_id for sample in samples])
        (shard_id,) = snapshot.shard_ids
        kept = [key for key in store.root.sizes("") if shard_id in key]
        assert len(kept) == 2
        reader = store.reader(snapshot)
        proxy.seen.clear()
        for index in range(len(reader)):
            reader.fetch(index)
        assert len(proxy.seen) == 2, proxy.seen


def test_what_no_retry_helps_is_not_tried_again(proxy: FaultyProxy, s3_root: str) -> None:
    directory = ObjectStore.at(s3_root)
    directory.exists("warm")
    proxy.seen.clear()
    proxy.fault = lambda method, path: Answer(status=403, code="AccessDenied")  # noqa: ARG005
    with pytest.raises(ConfigError, match="cannot use"):
        directory.write("key", b"x")
    assert len(proxy.seen) == 1


@pytest.mark.parametrize(
    ("status", "code", "error", "cure"),
    [
        (400, "XAmzContentSHA256Mismatch", ConfigError, "CHECKSUM_CALCULATION=when_required"),
        (400, "ExpiredToken", ConfigError, "session token has expired"),
        (403, "RequestTimeTooSkewed", ConfigError, "clock of this machine"),
        (403, "AccessDenied", ConfigError, "s3:ListBucket"),
        (400, "InvalidArgument", ConfigError, "cannot use"),
        (507, "XMinioStorageFull", OutOfSpaceError, "raise the quota"),
        (403, "QuotaExceeded", OutOfSpaceError, "raise the quota"),
    ],
)
def test_a_refusal_has_its_reason_and_cure_at_once(
    proxy: FaultyProxy,
    s3_root: str,
    status: int,
    code: str,
    error: type[Exception],
    cure: str,
) -> None:
    """Also where the client asks with HEAD, whose answer has no reason in it."""
    directory = ObjectStore.at(s3_root)
    directory.exists("warm")
    proxy.fault = lambda method, path: Answer(status=status, code=code)  # noqa: ARG005
    for operation in (
        lambda: directory.write("key", b"x"),
        lambda: directory.read("key"),
        lambda: directory.sizes("commits"),
        lambda: directory.exists("key"),
    ):
        proxy.seen.clear()
        with pytest.raises(error, match=rf"{s3_root}.*({code}|507).*{cure}|{cure} {s3_root}"):
            operation()
        assert len(proxy.seen) <= 3  # HEAD of key and bucket, then GET


def test_a_missing_bucket_is_a_clear_error(proxy: FaultyProxy, s3_root: str) -> None:
    proxy.fault = lambda method, path: Answer(status=404, code="NoSuchBucket")  # noqa: ARG005
    with pytest.raises(ConfigError, match="create the bucket, or correct the path"):
        Store.create(s3_root, make_identity())
    with pytest.raises(ConfigError, match="there is no store at"):
        Store.open(s3_root)


def test_a_server_without_conditional_writes_will_do(proxy: FaultyProxy, s3_root: str) -> None:
    asked = 0

    def fault(method: str, path: str) -> Answer | None:
        nonlocal asked
        if method != "PUT" or not path.endswith("/store.json"):
            return None
        asked += 1
        return Answer(status=501, code="NotImplemented") if asked == 1 else None

    proxy.fault = fault
    assert Store.create(s3_root, make_identity()).identity == make_identity()
    assert asked == 2
