"""Google Cloud Storage: google-auth finds credentials and keeps a bearer token fresh."""

from __future__ import annotations

import time
import warnings
from datetime import UTC, datetime
from typing import Any

import google.auth
import google.auth.exceptions
import google.auth.transport.requests

from online_patching.errors import StoreError
from online_patching.stores.cloud import Grant, Headers, Place, Query, in_thread, may_carry_token
from online_patching.stores.cloud_options import GcsOptions
from online_patching.stores.retry import TransientError
from online_patching.stores.sigv4 import quoted_query

_SCOPES = ["https://www.googleapis.com/auth/devstorage.read_only"]
_FRESH_S = 600.0


class Gcs:
    """Grants for buckets, with Application Default Credentials."""

    def __init__(self) -> None:
        self._credentials: Any = None

    async def grant(self, place: Place) -> Grant:
        """Fresh for ten minutes or until shortly before the token ends."""
        options, uri = GcsOptions.read(), f"gs://{place.bucket}"
        token, fresh_s = "", _FRESH_S
        if not options.anonymous:
            if not may_carry_token(options.endpoint):
                raise StoreError(
                    uri, "its endpoint is not https: no token is sent there.", "access"
                )
            try:
                token, fresh_s = await in_thread("looking for Google credentials", self._token)
            except google.auth.exceptions.TransportError as error:
                raise TransientError(type(error).__name__) from None
            except google.auth.exceptions.GoogleAuthError as error:
                raise StoreError(
                    uri,
                    f"Google's credentials are not accepted ({type(error).__name__}). Sign in again: "
                    "gcloud auth application-default login.",
                    "access",
                ) from None
        headers: Headers = (("Authorization", f"Bearer {token}"),) if token else ()
        if options.billed:
            headers += (("x-goog-user-project", options.billed),)

        def sign(path: str, query: Query) -> tuple[str, Headers]:
            return quoted_query(query), headers

        until = time.monotonic() + fresh_s
        return Grant(options.endpoint, f"/{place.bucket}", sign, until, anonymous=not token)

    def _token(self) -> tuple[str, float]:
        """A token and how long to use it; '' when there are no credentials."""
        if self._credentials is None:
            try:
                with warnings.catch_warnings():  # of quota projects, which reading does not need
                    warnings.simplefilter("ignore")
                    self._credentials, _ = google.auth.default(scopes=_SCOPES)
            except google.auth.exceptions.DefaultCredentialsError:
                return "", _FRESH_S
        credentials = self._credentials
        if not credentials.valid or _left_s(credentials) < _FRESH_S:
            credentials.refresh(google.auth.transport.requests.Request())
        return str(credentials.token), max(10.0, min(_FRESH_S, _left_s(credentials) - 60))


def _left_s(credentials: Any) -> float:
    """Seconds until a token ends."""
    if credentials.expiry is None:
        return 2 * _FRESH_S
    return float((credentials.expiry.replace(tzinfo=UTC) - datetime.now(UTC)).total_seconds())
