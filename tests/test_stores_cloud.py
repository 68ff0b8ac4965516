"""s3, gs and az against servers that misbehave, and the signatures and wishes that reach them."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest

from online_patching import errors
from online_patching.stores import HttpStore, RetryPolicy, Stores, cloud, cloud_addresses, cloud_s3
from online_patching.stores.cloud_listing import list_place
from online_patching.stores.sigv4 import Keys, presigned_query, quoted_path
from tests.cloud_servers import CloudServer
from tests.servers import Faults, FaultServer

SECRET = "s3cret/Of+Tests"
QUICK = RetryPolicy(attempts=3, first_delay_s=0.01)
TIGHT = RetryPolicy(
    attempts=3, first_delay_s=0.01, timeout_s=0.6, connect_timeout_s=0.5, first_byte_timeout_s=0.4
)
DATA = bytes(range(256)) * 400


def slow(kind: str) -> object:
    return pytest.param(kind, marks=pytest.mark.slow)


@pytest.fixture
def s3_fault(
    fault_server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[FaultServer, Stores]]:
    """The misbehaving server as an S3 endpoint with a bucket `b` and an object `deep/a.bin`."""
    env = {
        "AWS_ACCESS_KEY_ID": "AKIAME",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "eu-west-1",
    }
    CloudServer("s3", "", env, lambda *_: None, lambda _: None).enter(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", fault_server.url)
    (fault_server.root / "b" / "deep").mkdir(parents=True)
    (fault_server.root / "b" / "deep" / "a.bin").write_bytes(DATA)
    stores = Stores(QUICK)
    yield fault_server, stores
    stores.close()


KEY = "s3://b/deep/a.bin"


# --- signatures --------------------------------------------------------------------------------


def test_the_signature_is_that_of_aws_own_example() -> None:
    """Signature calculation for a presigned URL, from the S3 API reference."""
    keys = Keys("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
    query = presigned_query(
        keys,
        "us-east-1",
        "examplebucket.s3.amazonaws.com",
        "/test.txt",
        at=datetime(2013, 5, 24, tzinfo=UTC),
        seconds=86400,
    )
    assert query.endswith("=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404")


@pytest.mark.parametrize("session", ["", "session/token+of=tests"])
@pytest.mark.parametrize("payer", [(), (("x-amz-request-payer", "requester"),)])
@pytest.mark.parametrize("name", ["a.svs", "x/µ m+%41~#?&=.svs", "..//a b", "(1)!*'$@:,;"])
def test_the_signature_is_botocore_s(name: str, payer: tuple, session: str, monkeypatch) -> None:
    from botocore import auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import ReadOnlyCredentials

    at = datetime(2026, 11, 23, 7, 8, 9, tzinfo=UTC)
    host, path = "b.s3.eu-west-1.amazonaws.com", "/" + quoted_path(name)
    monkeypatch.setattr(auth, "get_current_datetime", lambda *_, **__: at.replace(tzinfo=None))
    signer = auth.S3SigV4QueryAuth(
        ReadOnlyCredentials("AKIAME", SECRET, session or None), "s3", "eu-west-1", expires=3600
    )
    request = AWSRequest("GET", f"https://{host}{path}", headers=dict(payer))
    signer.add_auth(request)
    theirs = parse_qs(urlsplit(request.url).query)
    ours = presigned_query(
        Keys("AKIAME", SECRET, session), "eu-west-1", host, path, at=at, seconds=3600, headers=payer
    )
    assert parse_qs(ours) == theirs


def test_a_bucket_is_asked_in_its_own_region(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {
        "AWS_ACCESS_KEY_ID": "AKIAME",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "eu-west-1",
    }
    CloudServer("s3", "", env, lambda *_: None, lambda _: None).enter(monkeypatch)
    asked = []

    async def header(key: str, url: str, name: str) -> str:
        asked.append((url, name))
        return "eu-central-1"

    place = cloud.place_of("s3://slides/a.svs")
    grant = asyncio.run(cloud_s3.S3(header).grant(place))
    assert asked == [("https://slides.s3.eu-west-1.amazonaws.com/", "x-amz-bucket-region")]
    address = grant.address("a b.svs")
    assert address.url.startswith("https://slides.s3.eu-central-1.amazonaws.com/a%20b.svs?")
    assert "%2Feu-central-1%2Fs3%2F" in address.url
    assert SECRET not in repr(grant)
    assert "Signature" not in repr(address) + repr(grant)


def test_one_signature_serves_all_ranges_of_an_object_until_it_is_old(
    s3_fault, monkeypatch
) -> None:
    _, stores = s3_fault
    signed = []
    real = presigned_query

    def counted(*args, **more):
        signed.append(args)
        return real(*args, **more)

    monkeypatch.setattr(cloud_s3, "presigned_query", counted)
    for start in range(0, 1000, 100):
        assert stores.read(KEY, start, start + 50) == DATA[start : start + 50]
    assert len(signed) == 1
    for address, grant in stores.http().addresses._kept.values():
        assert address.target is not None
        object.__setattr__(grant, "until", time.monotonic() - 1)  # ten minutes later
    assert stores.read(KEY, 0, 50) == DATA[:50]
    assert len(signed) == 2


# --- what servers do ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["500", "502", "503", "504", "429", "reset", "reset-mid", "truncate"]
)
def test_what_may_pass_is_tried_again_and_then_right(s3_fault, kind: str) -> None:
    server, stores = s3_fault
    server.faults = Faults(kind, count=2)
    assert stores.read(KEY, 100, 50_000) == DATA[100:50_000]
    assert server.seen[kind] == 2
    assert stores.retries == 2


@pytest.mark.parametrize("kind", ["hang", "500", slow("drip"), slow("reset")])
def test_what_does_not_pass_ends_within_its_deadlines(s3_fault, kind: str) -> None:
    server, stores = s3_fault
    stores.policy = TIGHT
    server.faults = Faults(kind, only_data=True)
    began = time.monotonic()
    with pytest.raises(errors.StoreUnavailableError, match="failed 3 times") as caught:
        stores.read(KEY, 0, 90_000)
    assert time.monotonic() - began < 15
    assert no_secret(caught.value)


@pytest.mark.parametrize(
    ("kind", "error", "code"),
    [
        ("403", errors.StoreError, "access"),
        ("401", errors.StoreError, "access"),
        ("404", errors.ObjectNotFoundError, "missing"),
        ("412", errors.ObjectChangedError, "changed"),
        ("416", errors.ShortReadError, "truncated"),
        ("wrong-range", errors.RangeIgnoredError, "no_ranges"),
        ("ignore-range", errors.RangeIgnoredError, "no_ranges"),
        ("flood", errors.RangeIgnoredError, "no_ranges"),
    ],
)
def test_what_will_not_pass_is_asked_once(
    s3_fault, kind: str, error: type[errors.PatchingError], code: str
) -> None:
    server, stores = s3_fault
    server.faults = Faults(kind)
    with pytest.raises(error) as caught:
        stores.read(KEY, 100, 5000)
    assert caught.value.code == code
    assert server.seen[kind] == 1
    assert stores.retries == 0
    assert KEY in str(caught.value)
    assert no_secret(caught.value)


def test_another_etag_is_another_object(s3_fault) -> None:
    server, stores = s3_fault
    _, token = stores.version(KEY)
    server.etag, server.heeds_if_match = '"two"', False
    with pytest.raises(errors.ObjectChangedError):
        stores.read(KEY, 0, 100, token)


@pytest.mark.parametrize("kind", ["403", "400", "401"])
def test_an_expired_signature_is_renewed_once(s3_fault, kind: str, monkeypatch) -> None:
    server, stores = s3_fault
    monkeypatch.setattr(cloud_addresses, "_SETTLED_S", 0.0)  # as if the signature were minutes old
    stores.read(KEY, 0, 1)
    before = stores.http().addresses.at_once(KEY)
    server.faults = Faults(kind, count=1)
    assert stores.read(KEY, 100, 5000) == DATA[100:5000]
    assert stores.http().addresses.at_once(KEY) is not before
    server.faults = Faults(kind)
    server.seen.clear()
    with pytest.raises(errors.StoreError, match=f"HTTP {kind}") as caught:
        stores.read(KEY, 100, 5000)
    assert server.seen[kind] == 2
    assert "docs/stores.md" in str(caught.value)
    assert no_secret(caught.value)
    server.seen.clear()
    with pytest.raises(errors.StoreError, match=f"HTTP {kind}"):
        stores.version(KEY)
    assert server.seen[kind] == 2


def test_many_refused_reads_renew_once_together(s3_fault, monkeypatch) -> None:
    server, stores = s3_fault
    stores.read(KEY, 0, 1)
    (grant,) = stores.http().addresses._grants.values()
    object.__setattr__(grant, "made_at", time.monotonic() - 60)
    made = []
    real = cloud_s3.S3.grant

    async def counted(self, place):
        made.append(place)
        return await real(self, place)

    monkeypatch.setattr(cloud_s3.S3, "grant", counted)
    s3 = stores.http().addresses._providers["s3"]
    s3._made_at -= 100
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIANEW")
    server.refuses = "AKIAME"
    bodies = stores.read_many([(KEY, i, i + 100, "") for i in range(20)])
    assert bodies == [DATA[i : i + 100] for i in range(20)]
    assert len(made) == 1


def test_credentials_that_fail_are_asked_for_once_by_all_who_wait(s3_fault, monkeypatch) -> None:
    _, stores = s3_fault
    asked = []

    async def refused(self, place):
        asked.append(place)
        await asyncio.sleep(0.1)
        raise errors.StoreError("s3://b", "no credentials", "access")

    monkeypatch.setattr(cloud_s3.S3, "grant", refused)
    answers = stores.read_many([(f"s3://b/{i}", 0, 4, "") for i in range(20)])
    assert {getattr(answer, "code", None) for answer in answers} == {"access"}
    assert len(asked) == 1
    with pytest.raises(errors.StoreError, match="no credentials"):  # a later one tries anew
        stores.read("s3://b/1", 0, 4)
    assert len(asked) == 2


@pytest.mark.parametrize("told", ["1", slow("date")])
def test_a_server_that_says_when_to_come_back_is_heeded(s3_fault, told: str) -> None:
    server, stores = s3_fault
    at = datetime.fromtimestamp(time.time() + 2, UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    server.more = {"Retry-After": at if told == "date" else told}
    server.faults = Faults("503", count=1)
    began = time.monotonic()
    assert stores.read(KEY, 0, 100) == DATA[:100]
    assert 0.9 < time.monotonic() - began < 4


def test_a_wait_that_a_server_asks_for_is_bounded() -> None:
    policy = RetryPolicy(first_delay_s=0.2, longest_wait_s=7.0)
    assert policy.delay_s(1, 1e9) == 7.0
    assert policy.delay_s(1, 3.0) == 3.0
    assert 0.1 <= policy.delay_s(1) <= 0.2


def test_nothing_signed_reaches_a_log(s3_fault, caplog) -> None:
    server, stores = s3_fault
    with caplog.at_level(logging.DEBUG):
        stores.read(KEY, 0, 100)
        stores.version(KEY)
        server.faults = Faults("500", count=1)
        stores.read(KEY, 0, 100)
    assert SECRET not in caplog.text
    assert "Signature=" not in caplog.text


def test_a_signed_request_is_not_redirected(s3_fault) -> None:
    server, stores = s3_fault
    server.more = {"Location": "http://127.0.0.1:1/elsewhere"}
    server.faults = Faults("307", count=4)
    for ask in (lambda: stores.read(KEY, 0, 9), lambda: stores.version(KEY)):
        with pytest.raises(errors.StoreError, match="is redirected"):
            ask()


def test_a_feed_reads_a_cloud_as_it_reads_http(s3_fault) -> None:
    """What the loader uses: answers that call back, without a task each."""
    _, stores = s3_fault
    got, done = [], threading.Event()

    def answered(body: bytes | None, error: Exception | None) -> None:
        got.append((body, error))
        done.set()

    store = stores.http()
    stores.loop.call(lambda: store.start(KEY, 3, 90, "", answered))
    assert done.wait(5)
    assert got == [(DATA[3:90], None)]


# --- who asks, and how -------------------------------------------------------------------------


def test_requests_may_be_anonymous_or_paid_by_the_requester(s3_fault, monkeypatch) -> None:
    server, stores = s3_fault
    stores.read(KEY, 0, 9)
    assert "X-Amz-Credential=AKIAME" in server.paths[-1]
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    payer = Stores(QUICK)
    payer.read(KEY, 0, 9)
    assert server.headers[-1]["x-amz-request-payer"] == "requester"
    assert "X-Amz-SignedHeaders=host%3Bx-amz-request-payer" in server.paths[-1]
    payer.close()
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    anonymous = Stores(QUICK)
    anonymous.read(KEY, 0, 9)
    assert server.paths[-1] == "/b/deep/a.bin"
    server.faults = Faults("403")
    with pytest.raises(errors.StoreError, match="without credentials") as caught:
        anonymous.read(KEY, 0, 9)
    assert caught.value.code == "access"
    assert server.seen["403"] == 1
    anonymous.close()


def test_a_profile_and_a_session_token_are_found_where_aws_keeps_them(
    s3_fault, monkeypatch, tmp_path
) -> None:
    server, stores = s3_fault
    (tmp_path / "credentials").write_text(
        f"[lab]\naws_access_key_id = AKIALAB\naws_secret_access_key = {SECRET}\naws_session_token = tok\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    stores.read(KEY, 0, 9)
    asked = parse_qs(urlsplit(server.paths[-1]).query)
    assert asked["X-Amz-Credential"][0].startswith("AKIALAB/")
    assert asked["X-Amz-Security-Token"] == ["tok"]
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    other = Stores(QUICK)
    with pytest.raises(errors.StoreError, match="ProfileNotFound") as caught:
        other.read(KEY, 0, 9)
    assert caught.value.code == "access"
    other.close()


class Tokens(BaseHTTPRequestHandler):
    """A token endpoint as Google's: a new token each time."""

    given: ClassVar[list[str]]

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).given.append(f"token-{len(self.given)}")
        body = json.dumps({"access_token": self.given[-1], "expires_in": 3600}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_gcs_is_asked_with_a_token_of_the_application_s_credentials(
    fault_server, monkeypatch, tmp_path
) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    class Mine(Tokens):
        given: ClassVar[list[str]] = []

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()
    with ThreadingHTTPServer(("127.0.0.1", 0), Mine) as tokens:
        threading.Thread(target=tokens.serve_forever, args=(0.02,), daemon=True).start()
        account = {
            "type": "service_account",
            "client_email": "me@p.iam.gserviceaccount.com",
            "private_key": pem,
            "token_uri": f"http://127.0.0.1:{tokens.server_address[1]}/token",
        }
        (tmp_path / "account.json").write_text(json.dumps(account))
        env = {
            "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "account.json"),
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE": fault_server.url,
            "GS_USER_PROJECT": "billed-project",
        }
        CloudServer("gs", "", env, lambda *_: None, lambda _: None).enter(monkeypatch)
        (fault_server.root / "b").mkdir()
        (fault_server.root / "b" / "a b.bin").write_bytes(DATA)
        stores = Stores(QUICK)
        assert stores.read("gs://b/a b.bin", 5, 50) == DATA[5:50]
        assert fault_server.headers[-1]["Authorization"] == "Bearer token-0"
        assert fault_server.headers[-1]["x-goog-user-project"] == "billed-project"
        monkeypatch.setattr(cloud_addresses, "_SETTLED_S", 0.0)
        fault_server.faults = Faults("401", count=1)
        assert stores.read("gcs://b/a b.bin", 5, 50) == DATA[5:50]
        fault_server.faults = Faults("401")
        with pytest.raises(errors.StoreError, match="HTTP 401") as caught:
            stores.read("gs://b/a b.bin", 5, 50)
        assert "token-" not in str(caught.value)
        stores.close()
        tokens.shutdown()


def test_a_token_is_not_sent_in_the_clear(monkeypatch) -> None:
    env = {"CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE": "http://storage.example"}
    CloudServer("gs", "", env, lambda *_: None, lambda _: None).enter(monkeypatch)
    stores = Stores(QUICK)
    with pytest.raises(errors.StoreError, match="not https"):
        stores.read("gs://b/a.bin", 0, 9)
    stores.close()


def test_azure_takes_a_sas_an_identity_or_nothing(fault_server, monkeypatch) -> None:
    from online_patching.stores import cloud_azure

    class Identity:
        def get_token(self, scope: str) -> object:
            assert scope == "https://storage.azure.com/.default"
            return type("T", (), {"token": "azure-token", "expires_on": time.time() + 3600})()

    monkeypatch.setattr(cloud_azure, "DefaultAzureCredential", Identity)
    env = {"AZURE_STORAGE_ACCOUNT_NAME": "lab", "AZURE_STORAGE_ENDPOINT": fault_server.url}
    CloudServer("az", "", env, lambda *_: None, lambda _: None).enter(monkeypatch)
    (fault_server.root / "c").mkdir()
    (fault_server.root / "c" / "a.bin").write_bytes(DATA)

    def ask(uri: str) -> tuple[str, dict[str, str]]:
        stores = Stores(QUICK)
        assert stores.read(uri, 5, 50) == DATA[5:50]
        stores.close()
        return fault_server.paths[-1], fault_server.headers[-1]

    path, headers = ask("az://c/a.bin")
    assert (path, headers["Authorization"]) == ("/c/a.bin", "Bearer azure-token")
    assert headers["x-ms-version"] >= "2017-11-09"
    path, headers = ask("abfss://c@lab.dfs.core.windows.net/a.bin")
    assert (path, headers["Authorization"]) == ("/c/a.bin", "Bearer azure-token")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "?sv=2021&sig=abc%3D")
    path, headers = ask("abfs://c/a.bin")
    assert path == "/c/a.bin?sv=2021&sig=abc%3D"
    assert "Authorization" not in headers
    monkeypatch.setenv("AZURE_NO_SIGN_REQUEST", "YES")
    path, headers = ask("az://c/a.bin")
    assert path == "/c/a.bin"
    assert "Authorization" not in headers


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("az://c/a.bin", "in which account it lies"),
        ("abfss://c@evil.example/a.bin", "not the host of an Azure account"),
        ("abfss://c@lab.dfs.core.windows.net.evil.example/a", "not the host of an Azure account"),
        ("s3:///a.bin", "names no bucket"),
        ("gs://", "names no bucket"),
        ("s3://key:secret@b/a.bin", "names no bucket"),
        ("gs://b\r\nX-Injected: 1\r\nY: /a.bin", "names no bucket"),
        ("az://b c/a.bin", "names no bucket"),
        ("gs://b%2f?x=/a.bin", "names no bucket"),
        ("gs://../b/a.bin", "names no bucket"),
        ("gs://bücher/a.bin", "names no bucket"),
        ("s3://b/\udc80.bin", "no text"),
    ],
)
def test_a_uri_that_names_no_place_is_refused(uri: str, words: str, monkeypatch) -> None:
    CloudServer("", "", {}, lambda *_: None, lambda _: None).enter(monkeypatch)
    stores = Stores(QUICK)
    for ask in (stores.version, lambda uri: stores.read(uri, 0, 4), stores.list):
        with pytest.raises(errors.StoreError, match=words) as caught:
            ask(uri)
        assert "secret" not in str(caught.value)
        assert str(caught.value).isprintable()
    stores.close()


@pytest.mark.parametrize(
    ("uri", "package", "extra"),
    [
        ("s3://b/a.svs", "botocore", "s3"),
        ("gs://b/a.svs", "google.auth", "gcs"),
        ("az://b/a.svs", "azure.identity", "azure"),
    ],
)
def test_a_cloud_without_its_package_names_the_pip_install(
    uri: str, package: str, extra: str, monkeypatch
) -> None:
    module = {"s3": "cloud_s3", "gcs": "cloud_gcs", "azure": "cloud_azure"}[extra]
    monkeypatch.delitem(sys.modules, f"online_patching.stores.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    stores = Stores(QUICK)
    with pytest.raises(errors.StoreError, match=re.escape(f"pip install 'pathfm[{extra}]'")):
        stores.version(uri)
    stores.close()


def test_the_container_of_an_azure_uri_is_no_password() -> None:
    uri = "abfss://slides@lab.dfs.core.windows.net/a.svs"
    assert errors.redact(uri) == uri
    assert errors.redact("abfss://me:secret@lab.dfs.core.windows.net/a") == (
        "abfss://lab.dfs.core.windows.net/a"
    )


# --- listings ----------------------------------------------------------------------------------


def s3_page(names: list[str], marker: str = "") -> bytes:
    items = "".join(
        f"<Contents><Key>{n}</Key><ETag>&quot;e&quot;</ETag><Size>7</Size></Contents>"
        for n in names
    )
    more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{marker}</NextContinuationToken>"
    space = "http://s3.amazonaws.com/doc/2006-03-01/"
    return f'<ListBucketResult xmlns="{space}">{items}{more if marker else ""}</ListBucketResult>'.encode()


def listed(pages: dict[str, bytes], uri: str = "s3://b/x", most: int = 100) -> list[str]:
    """What list_place makes of pages, by the marker that asks for each."""

    async def ask(query: list[tuple[str, str]]) -> bytes:
        told = dict(query)
        return pages[told.get("continuation-token", told.get("marker", ""))]

    place = cloud.place_of(uri)
    assert place is not None
    return [item.uri for item in asyncio.run(list_place(uri, place, most, ask))]


def test_a_listing_s_names_are_those_that_s3_means() -> None:
    page = s3_page(["x/a+b%2Bc%20%C3%B6"]).replace(
        b"<Contents>", b"<EncodingType>url</EncodingType><Contents>", 1
    )
    assert listed({"": page}) == ["s3://b/x/a b+c ö"]
    assert listed({"": s3_page(["x/a+b%2Bc"])}) == ["s3://b/x/a+b%2Bc"]  # not encoded


def test_a_listing_goes_through_all_pages() -> None:
    pages = {
        "": s3_page(["x/1", "x/2"], "m"),
        "m": s3_page(["x/3", "x/sub/"], "n"),
        "n": s3_page([]),
    }
    assert listed(pages) == ["s3://b/x/1", "s3://b/x/2", "s3://b/x/3"]
    with pytest.raises(errors.StoreError, match="more than 2 objects"):
        listed(pages, most=2)
    azure = (
        b"<EnumerationResults><Blobs><Blob><Name>x/a</Name><Properties><Etag>0x1</Etag>"
        b"<Content-Length>3</Content-Length></Properties></Blob><Blob><Name>x/dir</Name><Properties>"
        b"<ResourceType>directory</ResourceType></Properties></Blob><Blob><Name Encoded='true'>x/%EF%BF%BE"
        b"</Name><Properties><Content-Length>3</Content-Length></Properties></Blob></Blobs>"
        b"<NextMarker /></EnumerationResults>"
    )
    uri = "abfss://c@lab.dfs.core.windows.net/x/"
    root = "abfss://c@lab.dfs.core.windows.net/x"
    assert listed({"": azure}, uri) == [f"{root}/a", f"{root}/\ufffe"]


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"<html>Welcome to the hotel</html>",
        b"<ListBucketResult><Contents>",
        b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>",
        b"<ListBucketResult><Contents><Key>x/1</Key><Size>-1</Size></Contents></ListBucketResult>",
        b'<!DOCTYPE a [<!ENTITY b "c">]><ListBucketResult>&b;</ListBucketResult>',
    ],
)
def test_a_listing_that_is_none_is_one_error(page: bytes) -> None:
    with pytest.raises(errors.StoreError, match="its listing is not one"):
        listed({"": page})


def test_a_listing_that_leads_back_to_itself_ends() -> None:
    with pytest.raises(errors.StoreError, match="leads back to itself"):
        listed({"": s3_page(["x/1"], "m"), "m": s3_page([], "m")})


def no_secret(error: Exception) -> bool:
    text = str(error) + repr(error.__dict__) + repr(error.__cause__) + repr(error.__context__)
    return not any(word in text for word in (SECRET, "Signature", "X-Amz", "AKIAME"))


def test_a_cloud_s_store_is_made_for_one_loop_and_closed(tmp_path: Path, s3_fault) -> None:
    async def twice() -> bytes:
        store = HttpStore(QUICK)
        body = await store.read(KEY, 0, 9)
        await store.close()
        return body

    assert asyncio.run(twice()) == asyncio.run(twice()) == DATA[:9]
