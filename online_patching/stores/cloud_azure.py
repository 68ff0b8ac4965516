"""Azure Blob Storage: an account key or SAS from the environment, else whatever azure-identity finds."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from azure.core.exceptions import AzureError, ClientAuthenticationError, ServiceRequestError
from azure.identity import CredentialUnavailableError, DefaultAzureCredential
from azure.storage.blob import ContainerSasPermissions, generate_container_sas

from online_patching.errors import StoreError
from online_patching.stores.cloud import Grant, Headers, Place, Query, in_thread, may_carry_token
from online_patching.stores.cloud_options import AzureOptions
from online_patching.stores.retry import TransientError
from online_patching.stores.sigv4 import quoted_query

_VERSION: Headers = (("x-ms-version", "2021-12-02"),)  # bearer tokens and quoted ETags need one
_SCOPE = "https://storage.azure.com/.default"
_LASTS_S, _FRESH_S = 3600, 600.0
_ACCOUNT_HOST = re.compile(  # a token is sent nowhere else, whatever a table of slides names
    r"([a-z0-9]{3,24})\.(?:dfs|blob)\.(core\.windows\.net|core\.chinacloudapi\.cn|core\.usgovcloudapi\.net)"
)


class Azure:
    """Grants for containers: one signature serves all objects of one."""

    def __init__(self) -> None:
        self._identity: Any = None

    async def grant(self, place: Place) -> Grant:
        """Fresh for ten minutes or until shortly before its token ends."""
        options = AzureOptions.read()
        uri = f"az://{place.bucket}"
        account, endpoint = _account(place, options, uri)
        mine = account == options.account
        sas, fresh_s = "", _FRESH_S
        headers = _VERSION
        if options.anonymous:
            pass
        elif mine and options.sas:
            sas = options.sas
        elif mine and options.key:
            sas = _signed(uri, account, place.bucket, options.key)
        elif may_carry_token(endpoint):
            token, fresh_s = await in_thread("looking for Azure credentials", self._token, uri)
            headers += (("Authorization", f"Bearer {token}"),) if token else ()

        def sign(path: str, query: Query) -> tuple[str, Headers]:
            return "&".join(part for part in (quoted_query(query), sas) if part), headers

        host, _, base = endpoint.partition("://")[2].partition("/")
        path = f"/{base}/{place.bucket}" if base else f"/{place.bucket}"
        where = f"{endpoint.partition('://')[0]}://{host}"
        anonymous = not sas and headers is _VERSION
        return Grant(where, path, sign, time.monotonic() + fresh_s, anonymous=anonymous)

    def _token(self, uri: str) -> tuple[str, float]:
        """A token and how long to use it; '' when azure-identity finds none."""
        try:
            if self._identity is None:
                self._identity = DefaultAzureCredential()
            found = self._identity.get_token(_SCOPE)
        except (CredentialUnavailableError, ClientAuthenticationError):
            return "", _FRESH_S
        except ServiceRequestError as error:
            raise TransientError(type(error).__name__) from None
        except (AzureError, ValueError) as error:
            raise StoreError(
                uri, f"Azure's credentials are not accepted ({type(error).__name__}).", "access"
            ) from None
        return found.token, max(10.0, min(_FRESH_S, found.expires_on - time.time() - 60))


def _account(place: Place, options: AzureOptions, uri: str) -> tuple[str, str]:
    """The account a container lies in, and the URL of its blobs."""
    if not place.host:
        if not options.endpoint:
            raise StoreError(
                uri,
                "does not say in which account it lies. Set AZURE_STORAGE_ACCOUNT_NAME or "
                "AZURE_STORAGE_CONNECTION_STRING, or write abfss://container@account.dfs.core.windows.net/name.",
            )
        return options.account, options.endpoint
    match = _ACCOUNT_HOST.fullmatch(place.host)
    if match is None:
        raise StoreError(uri, f"{place.host[:80]} is not the host of an Azure account.")
    if match[1] == options.account and options.endpoint:
        return match[1], options.endpoint
    return match[1], f"https://{match[1]}.blob.{match[2]}"


def _signed(uri: str, account: str, container: str, key: str) -> str:
    """A SAS that lets one read and list a container for an hour."""
    try:
        return generate_container_sas(
            account,
            container,
            account_key=key,
            permission=ContainerSasPermissions(read=True, list=True),
            expiry=datetime.now(UTC) + timedelta(seconds=_LASTS_S),
        )
    except ValueError:  # a key that is not base64
        raise StoreError(uri, "the account's key is not one.", "access") from None
