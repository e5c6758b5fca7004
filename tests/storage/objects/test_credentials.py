"""Credentials come from the usual places and go nowhere else."""

import json
import logging
import pickle
import re

import pytest
import s3fs

from storage.errors import ConfigError
from storage.maintenance.verify import verify_store
from storage.objects.object_store import ObjectStore
from storage.store import Store
from tests.storage.seaweed import S3Server
from tests.storage.synthetic import fill, make_identity, make_samples


@pytest.mark.s3
@pytest.mark.parametrize("source", ["AWS", "FSSPEC_S3"])
def test_they_are_nowhere_but_in_their_place(
    s3_root: str,
    s3_server: S3Server,
    source: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if source == "FSSPEC_S3":  # fsspec makes options of them, which it pickles and prints
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        conf = {"key": s3_server.access_key, "secret": s3_server.secret_key}
        monkeypatch.setitem(fsspec_conf(), "s3", conf)
        s3fs.S3FileSystem.clear_instance_cache()
    caplog.set_level(logging.DEBUG)
    store = Store.create(s3_root, make_identity())
    samples = make_samples(2)
    fill(store, samples)
    reader = store.reader(store.publish([sample.sample_id for sample in samples]))
    copies = [pickle.loads(pickle.dumps(one)) for one in (store, store.root, reader)]  # noqa: S301
    assert verify_store(copies[0], deep=True) == []
    assert copies[1].exists("store.json")
    assert copies[2].fetch(0).sample_id == reader.fetch(0).sample_id
    shown = [
        *(pickle.dumps(one).decode("latin-1") for one in (store, store.root, reader)),
        *(repr(one) for one in (store, store.root, reader, copies[1].file_system)),
        *(store.root.read(key).decode("latin-1") for key in store.root.sizes("")),
        caplog.text,
    ]
    assert "s3fs" in caplog.text, "the log was listened to"
    for text in shown:
        assert s3_server.secret_key not in text
        if text is not caplog.text:  # botocore's own log at DEBUG shows the headers it signs
            assert s3_server.access_key not in text


def fsspec_conf() -> dict:
    from fsspec.config import conf

    return conf


@pytest.mark.s3
def test_wrong_ones_are_a_clear_error(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ConfigError, match="cannot use") as caught:
        Store.create(s3_root, make_identity())
    assert "not-the-secret" not in str(caught.value)
    s3fs.S3FileSystem.clear_instance_cache()


def test_missing_ones_are_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ConfigError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        Store.create("s3://eyas/none", make_identity())
    s3fs.S3FileSystem.clear_instance_cache()


def test_urls_that_carry_them_are_refused_without_a_word_of_them() -> None:
    with pytest.raises(ConfigError, match="contains credentials") as caught:
        ObjectStore.at("s3://AKIAEXAMPLE:hunter2@bucket/store")
    assert not re.search("AKIA|hunter2", json.dumps(str(caught.value)))
    assert ObjectStore.at("/data/run@home/store").root == "/data/run@home/store"
    assert ObjectStore.at("memory://store/run@home").root == "/store/run@home"
