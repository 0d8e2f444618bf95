"""The Label Studio that a backend belongs to, as the backend asks it: for images, labels, and the order of tasks.

Whoever may write tasks there chooses the addresses of images. So an image is fetched from that one host only, below the
paths where it keeps images, and from hosts that were named when the backend began; a redirect is looked at like any
other address. The token goes to that one host, and never along with a redirect to another.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, unquote_to_bytes, urljoin, urlsplit

from featx.errors import UsageError

MAX_IMAGE = 20 * 2**20
"""Bytes of an image."""

MAX_ANSWER = 256 * 2**20
"""Bytes of another answer: the labels of a whole project."""

CONNECT_SECONDS = 5.0
"""Without a byte, before the other side counts as gone."""

SECONDS = 20.0
"""For an image, from the first byte asked for to the last one received."""

LONG_SECONDS = 120.0
"""For what Label Studio works on: the labels of a project, suggestions for a hundred tasks."""

PAGE = 100
"""Tasks that suggestions are fetched for at a time: Label Studio waits for 100 seconds."""

_REDIRECTS = 3
_IMAGES = re.compile(r"/(data|storage-data|static)/|/(tasks|projects)/\d+/(resolve|presign)/")
"""What Label Studio keeps images below."""

_DEFAULT_PORTS = {"http": 80, "https": 443}
_SAFE = "/%:@!$&'()*+,;=~?-._[]"
_EARLY = 30.0
"""Seconds before its end at which a token is taken to have expired."""


class NotFetched(Exception):
    """What was asked for did not come; the message is a clause that says why."""


@dataclass(frozen=True)
class _Place:
    """An address, and whether it is of Label Studio itself."""

    url: str
    own: bool


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class LabelStudioHost:
    """One Label Studio; every method may be called from any thread, and takes as long as the other side does.

    Parameters
    ----------
    url : its address, such as ``http://127.0.0.1:8080``.
    token : of one of its users: a personal access token, or a legacy one; "" for none.
    allowed : other hosts that images may be on, as ``HOST`` or ``HOST:PORT``.

    Raises
    ------
    UsageError
        This is not an address.
    """

    def __init__(self, url: str, token: str = "", allowed: Iterable[str] = ()) -> None:
        try:
            self._origin, parts = _origin(url), urlsplit(url)
        except ValueError as error:
            raise UsageError(
                "not the address of Label Studio", where="--url", expected="http://HOST:PORT", found=url
            ) from error
        self.url = f"{parts.scheme.lower()}://{parts.netloc}{parts.path.rstrip('/')}"
        self._base = parts.path.rstrip("/")
        self._allowed = frozenset(each.lower() for each in allowed)
        self._token = token
        self._access, self._until = "", 0.0
        self._lock = threading.Lock()
        # No proxy: what is on this machine must not be asked for elsewhere, and nothing else is to be asked at all.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect).open

    @property
    def has_token(self) -> bool:
        """Whether it can be asked for what only its users see."""
        return bool(self._token)

    # --- images -----------------------------------------------------------------------------------------------------

    def image(self, url: str) -> bytes:
        """The file of an image, as a task names it.

        Raises
        ------
        NotFetched
            It is at no place that images are fetched from, or did not come.
        """
        if url[:5].lower() == "data:":
            return _inline(url)
        place = self._place(url)
        for _ in range(_REDIRECTS + 1):
            found = self._get(place)
            if isinstance(found, bytes):
                return found
            try:
                place = self._place(urljoin(place.url, found))
            except NotFetched as error:
                raise NotFetched(f"it is redirected, and {error}") from error
        raise NotFetched("it is redirected again and again")

    def _place(self, url: str) -> _Place:
        if not url.isprintable() or "\\" in url:
            raise NotFetched("its address has characters that an address cannot have")
        try:
            parts = urlsplit(url)
            own = not parts.scheme and not parts.netloc and parts.path.startswith("/")
            if not own:
                scheme, host, port = _origin(url)
        except ValueError as error:
            raise NotFetched(f"its address is none that images are fetched from ({error})") from error
        if not own and (scheme, host, port) != self._origin:
            named = f"{host}:{port}"
            if named not in self._allowed and not (host in self._allowed and port == _DEFAULT_PORTS[scheme]):
                raise NotFetched(f"it is on {named}, and neither --url nor --allow-host names this host")
            return _Place(quote(url.partition("#")[0], safe=_SAFE), own=False)
        path = parts.path
        if self._base and path.startswith(f"{self._base}/"):
            path = path[len(self._base) :]
        if not _IMAGES.match(path) or ".." in unquote(unquote(path)).split("/"):
            raise NotFetched("it is below no path where Label Studio keeps images (is the token right?)")
        query = f"?{parts.query}" if parts.query else ""
        return _Place(self.url + quote(path + query, safe=_SAFE), own=True)

    def _get(self, place: _Place) -> bytes | str:
        """What is there, or where it is said to be."""
        status, headers, body = self._ask("GET", place.url, own=place.own, most=MAX_IMAGE, seconds=SECONDS)
        if status in (301, 302, 303, 307, 308) and headers.get("Location"):
            return str(headers["Location"])
        if status != 200:
            raise NotFetched(f"the answer was {status}" + (" (is the token right?)" if status in (401, 403) else ""))
        return body

    # --- the rest ---------------------------------------------------------------------------------------------------

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Ask its API; what it answers, read from JSON.

        Raises
        ------
        NotFetched
            It does not answer, or refuses.
        """
        data = None if body is None else json.dumps(body).encode()
        status, _, raw = self._ask(
            method, self.url + path, own=True, most=MAX_ANSWER, seconds=LONG_SECONDS, data=data, patience=LONG_SECONDS
        )
        if not 200 <= status < 300:
            raise NotFetched(f"{method} {path.partition('?')[0]} was answered with {status}")
        try:
            return json.loads(raw) if raw else None
        except (ValueError, RecursionError) as error:
            raise NotFetched(f"{method} {path.partition('?')[0]} was not answered in JSON") from error

    def annotated(self, project: int) -> list[dict[str, Any]]:
        """The tasks of a project that have annotations, with these."""
        found = self.call("GET", f"/api/projects/{project}/export?exportType=JSON&download_all_tasks=false")
        if not isinstance(found, list):
            raise NotFetched("the labels of the project did not come as a list")
        return [each for each in found if isinstance(each, dict)]

    def order(self, project: int, version: str, is_ours: re.Pattern[str]) -> bool:
        """Fetch suggestions of a version for all tasks of a project, and let it order its tasks by them.

        A project orders by the predictions of the version that its settings name. Where they name something else than a
        version of featx or its backend, somebody wants them to, and they stay.

        Parameters
        ----------
        is_ours : what versions of featx are called.

        Returns
        -------
        Whether the project has a backend of featx.
        """
        try:
            backends = self.call("GET", f"/api/ml/?project={project}")
            titles = {each["title"] for each in backends if is_ours.fullmatch(str(each.get("model_version")))}
            if not titles:
                return False
            for ids in self._pages(project):
                chosen = {"selectedItems": {"all": False, "included": ids}}
                self.call("POST", f"/api/dm/actions?id=retrieve_tasks_predictions&project={project}", chosen)
            now = self.call("GET", f"/api/projects/{project}").get("model_version") or ""
            if now != version and (not now or now in titles or is_ours.fullmatch(now)):
                self.call("PATCH", f"/api/projects/{project}", {"model_version": version})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise NotFetched(f"Label Studio answers as no version that featx knows ({error!r})") from error
        return True

    def _pages(self, project: int) -> Iterator[list[int]]:
        page, seen, total = 1, 0, 1
        while seen < total:
            found = self.call("GET", f"/api/tasks?project={project}&page={page}&page_size={PAGE}&fields=task_only")
            ids = [int(each["id"]) for each in found["tasks"]]
            page, seen, total = page + 1, seen + len(ids), int(found["total"])
            if not ids:
                return
            yield ids

    def _ask(
        self, method: str, url: str, *, own: bool, most: int, seconds: float, data: bytes | None = None,
        patience: float = CONNECT_SECONDS,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:  # fmt: skip
        until = time.monotonic() + seconds
        for again in (True, False):
            shown = self._authorization(fresh=not again) if own and self._token else {}
            kind = {"Content-Type": "application/json"} if data is not None else {}
            request = urllib.request.Request(url, data=data, method=method, headers={**shown, **kind})
            answer = _answer(self._open, request, patience, until, most)
            if answer[0] != 401 or not again or not shown.get("Authorization", "").startswith("Bearer"):
                break
        return answer

    def _authorization(self, *, fresh: bool) -> dict[str, str]:
        """The header that shows the token. A personal one is exchanged for another that is good for some minutes."""
        if self._token.count(".") != 2:
            return {"Authorization": f"Token {self._token}"}
        if _claims(self._token).get("token_type") != "refresh":
            return {"Authorization": f"Bearer {self._token}"}
        with self._lock:
            if fresh or time.time() >= self._until - _EARLY:
                data = json.dumps({"refresh": self._token}).encode()
                request = urllib.request.Request(
                    f"{self.url}/api/token/refresh/", data=data, headers={"Content-Type": "application/json"}
                )
                status, _, raw = _answer(
                    self._open, request, CONNECT_SECONDS, time.monotonic() + SECONDS, MAX_IMAGE
                )  # fmt: skip
                if status != 200:
                    raise NotFetched(f"Label Studio does not accept the token ({status})")
                try:
                    self._access = str(json.loads(raw)["access"])
                    self._until = float(_claims(self._access).get("exp", 0))
                except (KeyError, TypeError, ValueError) as error:
                    raise NotFetched("Label Studio does not exchange the token as featx knows it") from error
            return {"Authorization": f"Bearer {self._access}"}


def _answer(
    opened: Any, request: urllib.request.Request, patience: float, until: float, most: int
) -> tuple[int, http.client.HTTPMessage, bytes]:
    try:
        try:
            answer = opened(request, timeout=patience)
        except urllib.error.HTTPError as error:
            answer = error
        with contextlib.closing(answer):
            body = bytearray()
            while block := answer.read1(2**16):
                body += block
                if len(body) > most:
                    raise NotFetched(f"it has more than {most:,} bytes")
                if time.monotonic() > until:
                    raise NotFetched("it takes too long")
            return answer.status, answer.headers, bytes(body)
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: an address that http refuses
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise NotFetched(f"it cannot be fetched ({reason})") from error


def _origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port; ValueError where it is no address of HTTP, or one with a name and a password."""
    parts = urlsplit(url)
    scheme, host = parts.scheme.lower(), (parts.hostname or "").lower()
    if scheme not in _DEFAULT_PORTS:
        raise ValueError(f"it begins with {scheme}:" if scheme else "it does not begin with http:")
    if not host or "@" in parts.netloc:
        raise ValueError("it names no host, or a user")
    # Of the loopback address these two are the same, and people write one for the other.
    return scheme, "127.0.0.1" if host == "localhost" else host, parts.port or _DEFAULT_PORTS[scheme]


def _inline(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or len(url) > MAX_IMAGE:
        raise NotFetched("its data: address has no data, or too many")
    try:
        raw = unquote_to_bytes(data)
        return base64.b64decode(raw, validate=True) if head.lower().endswith(";base64") else raw
    except (binascii.Error, ValueError) as error:
        raise NotFetched("its data: address is not in base64") from error


def _claims(token: str) -> dict[str, Any]:
    """What a JWT says of itself; whether it is true is for Label Studio to find out."""
    try:
        middle = token.split(".")[1]
        found = json.loads(base64.urlsafe_b64decode(middle + "=" * (-len(middle) % 4)))
    except (ValueError, IndexError):
        return {}
    return found if isinstance(found, dict) else {}
