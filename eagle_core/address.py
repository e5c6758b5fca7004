"""Addresses in a configuration: they are recorded, reported and shown, so they hold no secret."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

_SIGNED = (
    *("x-amz-signature", "x-amz-credential", "x-amz-security-token", "awsaccesskeyid"),
    *("signature", "sig", "token", "access_token", "api_key", "apikey"),
)


def _in_any_case(name: str) -> str:
    return "".join(f"[{c.upper()}{c}]" if c.isalpha() else c for c in name)


_SECRET = "|".join(
    (
        r"://[^/?#@\s]*:[^/?#@\s]*@",  # a password
        rf"^{_in_any_case('http')}[sS]?://[^/?#\s]*@",  # a token in place of a user
        f"[?&]({'|'.join(map(_in_any_case, _SIGNED))})=",
    )
)


def _without_secret(address: str) -> str:
    if re.search(_SECRET, address):
        raise PydanticCustomError(
            "secret",
            "the address carries a password, a token or a signature, which would end in manifests, "
            "reports and the Prefect database: take it out. Give credentials where the client "
            "looks for them (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, HF_TOKEN), or download "
            "the file and name its path",
        )
    return address


Address = Annotated[
    str,
    AfterValidator(_without_secret),
    # The server refuses it by this, before a run is recorded with it.
    Field(json_schema_extra={"pattern": f"^(?!.*({_SECRET}))"}),
]
"""A path or URL without a secret."""
