"""What the environment says about the clouds, under the names that GDAL, obstore and the SDKs use.

Credentials themselves are found by each cloud's own library; here are the wishes it knows no name for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from online_patching.errors import StoreError

_YES = frozenset({"yes", "true", "1", "on", "requester"})
_DEV_ACCOUNT = "devstoreaccount1"
_DEV_KEY = (  # published by Microsoft, the same for every emulator
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


@dataclass(frozen=True)
class S3Options:
    """S3 beyond what botocore reads: anonymous access, and requests the requester pays for."""

    anonymous: bool = False
    requester_pays: bool = False

    @classmethod
    def read(cls, env: Mapping[str, str] = os.environ) -> S3Options:
        """From AWS_NO_SIGN_REQUEST or AWS_SKIP_SIGNATURE, and AWS_REQUEST_PAYER."""
        return cls(
            _yes(env, "AWS_NO_SIGN_REQUEST", "AWS_SKIP_SIGNATURE"), _yes(env, "AWS_REQUEST_PAYER")
        )


@dataclass(frozen=True)
class GcsOptions:
    """GCS beyond what google-auth reads: `billed` is the project that pays, '' for the bucket's owner."""

    anonymous: bool = False
    endpoint: str = "https://storage.googleapis.com"
    billed: str = ""

    @classmethod
    def read(cls, env: Mapping[str, str] = os.environ) -> GcsOptions:
        """From GS_NO_SIGN_REQUEST or GOOGLE_SKIP_SIGNATURE, GS_USER_PROJECT, and the endpoints below.

        STORAGE_EMULATOR_HOST is asked without credentials, as Google's own clients do;
        CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE with them.
        """
        emulator = env.get("STORAGE_EMULATOR_HOST", "")
        if emulator and "://" not in emulator:
            emulator = f"http://{emulator}"
        own = env.get("CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE", "")
        return cls(
            bool(emulator) or _yes(env, "GS_NO_SIGN_REQUEST", "GOOGLE_SKIP_SIGNATURE"),
            endpoint_of(emulator or own or cls.endpoint),
            env.get("GS_USER_PROJECT", ""),
        )


@dataclass(frozen=True)
class AzureOptions:
    """An Azure account and its key or SAS; without either, azure-identity is asked."""

    anonymous: bool = False
    account: str = ""
    endpoint: str = ""
    key: str = field(default="", repr=False)
    sas: str = field(default="", repr=False)

    @classmethod
    def read(cls, env: Mapping[str, str] = os.environ) -> AzureOptions:
        """From AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME, _ACCOUNT_KEY and others."""
        told = _connection(env.get("AZURE_STORAGE_CONNECTION_STRING", ""))
        account = told.get("accountname", "") or _first(
            env, "AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"
        )
        suffix = told.get("endpointsuffix", "core.windows.net")
        protocol = told.get("defaultendpointsprotocol", "https")
        named = told.get("blobendpoint", "") or env.get("AZURE_STORAGE_ENDPOINT", "")
        return cls(
            _yes(env, "AZURE_NO_SIGN_REQUEST", "AZURE_SKIP_SIGNATURE"),
            account,
            (named or (f"{protocol}://{account}.blob.{suffix}" if account else "")).rstrip("/"),
            told.get("accountkey", "")
            or _first(
                env,
                "AZURE_STORAGE_ACCOUNT_KEY",
                "AZURE_STORAGE_ACCESS_KEY",
                "AZURE_STORAGE_KEY",
            ),
            (
                told.get("sharedaccesssignature", "") or env.get("AZURE_STORAGE_SAS_TOKEN", "")
            ).lstrip("?"),
        )


def endpoint_of(text: str) -> str:
    """scheme://host[:port] of an endpoint; StoreError when it is none."""
    parts = urlsplit(text)
    try:
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        port, parts = "", urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise StoreError("an endpoint", "in the environment is not http(s)://host[:port].")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{port}"


def _yes(env: Mapping[str, str], *names: str) -> bool:
    return _first(env, *names).strip().lower() in _YES


def _first(env: Mapping[str, str], *names: str) -> str:
    return next((env[name] for name in names if env.get(name)), "")


def _connection(text: str) -> dict[str, str]:
    """A connection string's parts, by lower-case name."""
    pairs = (part.partition("=") for part in text.split(";") if part.strip())
    told = {name.strip().lower(): value.strip() for name, _, value in pairs}
    if told.get("usedevelopmentstorage", "").lower() == "true":
        endpoint = f"http://127.0.0.1:10000/{_DEV_ACCOUNT}"
        return {"accountname": _DEV_ACCOUNT, "accountkey": _DEV_KEY, "blobendpoint": endpoint}
    return told
