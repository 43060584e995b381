"""What goes wrong with storage: which failures pass by themselves, and what to tell the user of the others."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    SSLError,
)
from botocore.exceptions import ConnectionError as NoConnection
from botocore.parsers import ResponseParserError

from ctrsink.errors import InputError, RunError, StorageUnavailable
from ctrsink.storage.places import bucket_and_key, is_remote

_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "RequestExpired", "TokenRefreshRequired"}
_REFUSED = {"AccessDenied", "AllAccessDisabled", "InvalidAccessKeyId", "SignatureDoesNotMatch", "Forbidden", "403"}
_MISSING = {"NoSuchKey", "NotFound", "404"}
# Answers below 500 after which the same request may succeed: overload, and bodies damaged on their way to the server.
_PASSING = {
    "BadDigest", "BandwidthLimitExceeded", "ConditionalRequestConflict", "IncompleteBody", "OperationAborted",
    "PriorRequestNotComplete", "RequestLimitExceeded", "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException",
    "TooManyRequests", "XAmzContentSHA256Mismatch",
}  # fmt: skip
_OVERLOADED = {"InternalError", "ServiceUnavailable", "SlowDown"}
_FULL = "free some space, or choose another place"
_DISK = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "raise the limit on the size of files, or choose another place",
    errno.EROFS: "choose another place, or mount it to be written",
    errno.EIO: "check the disk and the system's log",
    errno.ESTALE: "check the network disk, and mount it anew",
}


class ShortBody(Exception):
    """Fewer bytes came than were asked for."""


_NO_CONNECTION = (NoConnection, HTTPClientError, aiohttp.ClientError, ConnectionError, TimeoutError)
_DAMAGED = (IncompleteReadError, FlexibleChecksumError, ShortBody, aiohttp.ClientPayloadError)


def is_transient(error: BaseException) -> bool:
    """Whether repeating the request may help."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return code_of(error) in _PASSING or status == 429 or (status >= 500 and status != 501)
    if isinstance(error, SSLError):  # a certificate does not change between two attempts
        return False
    return isinstance(error, (*_NO_CONNECTION, *_DAMAGED, ResponseParserError))


def of_one_key(failure: dict[str, str], method: str) -> ClientError:
    """The failure of one key in a bulk request, which itself succeeded, as if it had been the answer."""
    status = 503 if failure.get("Code") in _OVERLOADED else 403
    return ClientError({"Error": failure, "ResponseMetadata": {"HTTPStatusCode": status}}, method)  # pyright: ignore[reportArgumentType]


def code_of(error: ClientError) -> str:
    """The server's word for a failure; what does not look like one is not repeated to the user."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    return code if re.fullmatch(r"[A-Za-z0-9.]{1,60}", code) else "unknown"


def describe(error: BaseException) -> tuple[str, str]:
    """What happened, and what to do about it. The error's own message is left out: it may hold an address with a signature."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return f"S3 answered {code_of(error)} (HTTP {status})", "try again later, or ask who runs the server"
    if isinstance(error, _DAMAGED):
        return f"the content arrived cut or damaged ({type(error).__name__})", "check the network and the proxies on the way"
    return f"cannot reach the S3 endpoint ({type(error).__name__})", "check AWS_ENDPOINT_URL and the network"


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn what the user can act on into an InputError or a RunError of one line; no secret and no key id appears in it."""
    try:
        yield
    except ClientError as error:
        raise _of_answer(uri, error) from None
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "no such file", uri) from None
    except (NoCredentialsError, PartialCredentialsError):
        hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run where an instance role gives them"
        raise StorageUnavailable(f"{uri}: no S3 credentials: {hint}") from None
    except CredentialRetrievalError as error:  # its message may quote what a helper program printed
        raise StorageUnavailable(f"{uri}: S3 credentials cannot be had ({type(error).__name__}): renew or correct them") from None
    except ParamValidationError:
        hint = "it is s3://bucket/key, the bucket in lower-case letters, digits, - and ."
        raise InputError(f"{uri}: not a valid bucket and key: {hint}") from None
    except NoConnection as error:
        raise StorageUnavailable(f"{uri}: {': '.join(describe(error))}") from None
    except BotoCoreError as error:
        raise InputError(f"{uri}: S3 cannot use this ({' '.join(str(error).split())})") from None
    except PermissionError as error:
        hint = "choose another place or change its rights"
        raise StorageUnavailable(f"{error.filename or uri}: permission denied: {hint}") from None
    except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        raise InputError(f"{error.filename or uri}: {(error.strerror or 'not a file').lower()}: choose another path") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(
                f"{str(error.filename or uri)[:80]}...: the name is too long for a file system: shorten it"
            ) from None
        if error.errno not in _DISK:
            raise
        raise RunError(f"{error.filename or uri}: {os.strerror(error.errno).lower()}: {_DISK[error.errno]}") from None


def _of_answer(uri: str, error: ClientError) -> Exception:
    code, bucket = code_of(error), bucket_and_key(uri)[0] if is_remote(uri) else ""
    if code in _MISSING:
        return FileNotFoundError(errno.ENOENT, "no such file", uri)
    if code == "NoSuchBucket":
        return InputError(f"{uri}: the bucket {bucket} does not exist: create it, or correct the name")
    if code in _EXPIRED:
        return StorageUnavailable(f"{uri}: the S3 credentials have expired ({code}): renew them and start again")
    if code in _REFUSED:
        hint = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and their rights to this bucket"
        return StorageUnavailable(f"{uri}: S3 refused access: {hint}")
    if code == "PreconditionFailed":
        return InputError(f"{uri}: it was replaced while it was being read: start again once nobody writes there")
    if code == "RequestTimeTooSkewed":
        return StorageUnavailable(f"{uri}: S3 refused the time of the request: set this machine's clock")
    if code in {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}:
        return InputError(f"{uri}: the bucket {bucket} is in another region: set AWS_DEFAULT_REGION")
    what, _ = describe(error)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    kind = StorageUnavailable if status in (401, 403) or status >= 500 else InputError
    return kind(f"{uri}: {what}: check the address and the rights to this bucket")
