"""Addresses in a configuration: recorded, reported and displayed, so they contain no secret."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

_SIGNED = (
    *("x-amz-signature", "x-amz-credential", "x-amz-security-token", "awsaccesskeyid"),
    *("signature", "sig", "token", "access_token", "api_key", "apikey"),
)


def _case_insensitive(name: str) -> str:
    return "".join(f"[{c.upper()}{c}]" if c.isalpha() else c for c in name)


_SECRET = "|".join(
    (
        r"://[^/?#@\s]*:[^/?#@\s]*@",  # a password
        rf"^{_case_insensitive('http')}[sS]?://[^/?#\s]*@",  # a token in place of a user
        f"[?&]({'|'.join(map(_case_insensitive, _SIGNED))})=",
    )
)


def _refuse_secret(address: str) -> str:
    if re.search(_SECRET, address):
        raise PydanticCustomError(
            "secret",
            "the address contains a password, a token or a signature, which would end up in "
            "manifests, reports and the Prefect database; remove it. Set credentials where the "
            "client looks for them (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, HF_TOKEN), or "
            "download the file and give its path",
        )
    return address


Address = Annotated[
    str,
    AfterValidator(_refuse_secret),
    # With this pattern, the server refuses the secret before it records a run.
    Field(json_schema_extra={"pattern": f"^(?!.*({_SECRET}))"}),
]
"""A path or URL without a secret."""
