"""Translate an S3 server's refusal for the user: retry, free space, or fix something.

Codes are those of the S3 API and of compatible servers (MinIO, Ceph, SeaweedFS, R2).
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
_REMEDIES: Mapping[str, str] = {
    **dict.fromkeys(
        ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"),
        "the session token has expired or is wrong: get new credentials (AWS_SESSION_TOKEN; `aws "
        "sso login`), then run the same command again",
    ),
    **dict.fromkeys(
        ("InvalidAccessKeyId", "SignatureDoesNotMatch"),
        "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the profile), and that no "
        "AWS_SESSION_TOKEN of other credentials is set",
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
        "s3:DeleteObject on its objects; without s3:ListBucket even an absent object is forbidden",
    ),
    **dict.fromkeys(
        ("PermanentRedirect", "301", "AuthorizationHeaderMalformed"),
        "the bucket is in another region: set AWS_DEFAULT_REGION, or AWS_ENDPOINT_URL",
    ),
}
_TRANSIENT = frozenset({408, 409, 425, 429})
_TRANSIENT_CODES = frozenset(  # S3 sends status 400 with some of them
    {
        *("RequestTimeout", "RequestTimeoutException", "IncompleteBody", "BadDigest"),
        *("SlowDown", "Throttling", "ThrottlingException", "TooManyRequests"),
    }
)


def explained(error: BaseException, where: str) -> StorageError | None:
    """Return our error for a server's response about `where`; None if `error` has no response.

    Also None if the response is that an object is absent, or exists already.
    """
    answer = error if isinstance(error, ClientError) else error.__cause__
    if not isinstance(answer, ClientError):
        return None
    code = str(answer.response.get("Error", {}).get("Code", ""))
    status = answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if status in {404, 412} or isinstance(error, FileNotFoundError | FileExistsError):
        return None
    message = answer.response.get("Error", {}).get("Message") or str(answer)
    if code in _FULL or status == 507:
        return OutOfSpaceError(
            f"no space left to write {where}: {code}: {message}; free space or raise the quota, "
            "then run the same command again: it resumes where it stopped"
        )
    if code in _TRANSIENT_CODES:
        return TransientError(f"{where}: {code}: {message}")
    if code in _REMEDIES or (400 <= status < 500 and status not in _TRANSIENT) or status == 501:
        remedy = f"; {_REMEDIES[code]}" if code in _REMEDIES else ""
        return ConfigError(f"cannot use {where}: {code or status}: {message}{remedy}")
    return TransientError(f"{where}: {code or status}: {message}")


def lacks_reason(error: BaseException) -> bool:
    """Return whether a server refused without a reason: a HEAD response has no body, unlike GET."""
    answer = error if isinstance(error, ClientError) else error.__cause__
    return isinstance(answer, ClientError) and str(
        answer.response.get("Error", {}).get("Code", "")
    ) in {"400", "401", "403"}
