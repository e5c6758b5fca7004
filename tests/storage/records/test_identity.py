"""Equal identities mix, others never, and the message says why."""

import pickle

import pytest

from storage.errors import ConfigError, CorruptError, MismatchError
from storage.objects.sealed_json import seal, unseal
from storage.records.identity import StoreIdentity
from tests.storage.synthetic import make_identity


def test_json_round_trip() -> None:
    identity = make_identity()
    assert StoreIdentity.from_json(identity.to_json()) == identity
    assert make_identity().identity_id == identity.identity_id


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"target_fields": {"revision": "xyz", "dtype": "bfloat16"}},
            "target revision: found 'xyz'",
        ),
        ({"target_fields": {"revision": "abc"}}, "target dtype: found None, expected 'bfloat16'"),
        ({"template_fingerprint": "new"}, "template_fingerprint: found 'new'"),
        ({"aux_layers": (2, 5, 8)}, r"aux_layers: found \(2, 5, 8\), expected \(1, 5, 8\)"),
        ({"hidden_size": 128}, "hidden_size: found 128, expected 64"),
    ],
)
def test_mismatch_names_the_field(changes: dict[str, object], named: str) -> None:
    with pytest.raises(MismatchError, match=named) as caught:
        make_identity(**changes).require_equal(make_identity(), where="the store")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301


def test_unknown_format_version_is_refused() -> None:
    document = unseal(make_identity().to_json(), what="store.json")
    with pytest.raises(MismatchError, match="eyas-store version 99"):
        StoreIdentity.from_json(seal({**document, "format_version": 99}))


def test_every_flipped_bit_of_the_document_is_noticed() -> None:
    data = make_identity().to_json()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1
        with pytest.raises((CorruptError, MismatchError)):
            StoreIdentity.from_json(bytes(damaged))


def test_refuses_what_no_store_can_be() -> None:
    with pytest.raises(ConfigError, match="unknown profile 'zip'"):
        make_identity(profile="zip")
    with pytest.raises(ConfigError, match="norm convention"):
        make_identity(norm_convention="pre_norm")
