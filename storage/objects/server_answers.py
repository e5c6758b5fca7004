"""What an S3 server's refusal means for a person: try again, make room, or mend something.

Codes are those of the S3 API and of servers that speak it (MinIO, Ceph, SeaweedFS, R2).
"""

from collections.abc import Mapping

from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from storage.errors import ConfigError, OutOfSpaceError, StorageError, TransientError

_FULL = frozenset(
    {
        *("QuotaExceeded", "ServiceQuotaExceeded", "XMinioStorageFull", "InsufficientStorage"),
        *("XMinioAdminBucketQuotaExceeded", "StorageQuotaExceeded", "507"),
    }
)
_CURES: Mapping[str, str] = {
    **dict.fromkeys(
        ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"),
        "the session token has expired or is wrong: get new credentials (AWS_SESSION_TOKEN; `aws "
        "sso login`), then run the same command again",
    ),
    **dict.fromkeys(
        ("InvalidAccessKeyId", "SignatureDoesNotMatch"),
        "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the profile), and that no "
        "AWS_SESSION_TOKEN of others is set beside them",
    ),
    "RequestTimeTooSkewed": "the clock of this machine is wrong: set it (chronyc makestep)",
    **dict.fromkeys(
        ("XAmzContentSHA256Mismatch", "InvalidChecksum", "MissingContentLength"),
        "this server does not understand the checksums that newer clients send: set "
        "AWS_REQUEST_CHECKSUM_CALCULATION=when_required and "
        "AWS_RESPONSE_CHECKSUM_VALIDATION=when_required",
    ),
    **dict.fromkeys(
        ("AccessDenied", "403", "AllAccessDisabled"),
        "the policy must allow s3:ListBucket on the bucket, and s3:GetObject, s3:PutObject and "
        "s3:DeleteObject on its objects; without the first even an absent object is forbidden",
    ),
    **dict.fromkeys(
        ("PermanentRedirect", "301", "AuthorizationHeaderMalformed"),
        "the bucket is in another region: set AWS_DEFAULT_REGION, or AWS_ENDPOINT_URL",
    ),
}
_MAY_PASS = frozenset({408, 409, 425, 429})
_MAY_PASS_BY_CODE = frozenset(  # S3 says 400 with some of them
    {
        *("RequestTimeout", "RequestTimeoutException", "IncompleteBody", "BadDigest"),
        *("SlowDown", "Throttling", "ThrottlingException", "TooManyRequests"),
    }
)


def explained(error: BaseException, where: str) -> StorageError | None:
    """Return our error for a server's answer about `where`; None if `error` is of no such answer.

    An answer that something is absent, or there already, is none either.
    """
    answer = error if isinstance(error, ClientError) else error.__cause__
    if not isinstance(answer, ClientError):
        return None
    code = str(answer.response.get("Error", {}).get("Code", ""))
    status = answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if status in {404, 412} or isinstance(error, FileNotFoundError | FileExistsError):
        return None
    said = answer.response.get("Error", {}).get("Message") or str(answer)
    if code in _FULL or status == 507:
        return OutOfSpaceError(
            f"no space left to write {where}: {code}: {said}; free space or raise the quota, then "
            "run the same command again: it goes on where it stopped"
        )
    if code in _MAY_PASS_BY_CODE:
        return TransientError(f"{where}: {code}: {said}")
    if code in _CURES or (400 <= status < 500 and status not in _MAY_PASS) or status == 501:
        cure = f"; {_CURES[code]}" if code in _CURES else ""
        return ConfigError(f"cannot use {where}: {code or status}: {said}{cure}")
    return TransientError(f"{where}: {code or status}: {said}")


def lacks_reason(error: BaseException) -> bool:
    """Tell whether a server refused without a reason: HEAD's answer has no body, GET's has one."""
    answer = error if isinstance(error, ClientError) else error.__cause__
    return isinstance(answer, ClientError) and str(
        answer.response.get("Error", {}).get("Code", "")
    ) in {"400", "401", "403"}
