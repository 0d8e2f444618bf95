"""The studio over HTTP: a small JSON API, events, pictures and the page itself.

Routes are under ``/api``; ``featx/guide/studio.md`` lists them. Whoever has the token of the address may do everything,
so it is asked for at once and kept in a cookie that only this address gets.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import shlex
import struct
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import parse_qs, quote

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from pydantic import BaseModel, Field

from featx.errors import FeatxError, ImageError, SourceError, StoreBusy, UsageError
from featx.images import ImageRef
from featx.service import LOOPBACK_NAMES, SAFE_HEADERS, Refusal, answer_errors
from featx.studio.events import Events
from featx.studio.journal import Change, Journal
from featx.studio.project import Project, folders, make_source
from featx.studio.session import Session, Setup

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "featx-studio"
"""Its name begins so, and ends with the port: a browser sends a machine's cookies to all its ports."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

MOST_JSON = 16 * 2**20
MOST_PHOTO = 100 * 2**20
"""Bytes of a photo that comes through the page."""

_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_UPLOADS = ("/api/try", "/api/drop")
_NAMED = 6
"""Class folders that are named."""


class Studio:
    """The page's server side: at most one session at a time; the first may have a ``folder`` that is elsewhere."""

    def __init__(self, setup: Setup, folder: Path | None = None) -> None:
        self.setup, self.folder = setup, folder
        self.events = Events()
        self.session: Session | None = None

    def open(self, source: Path, *, empty: bool = False) -> None:
        """Open a folder or a list of photos in place of what is open.

        Raises
        ------
        SourceError, StoreBusy, UsageError
            As of :class:`featx.studio.project.Project`; what was open stays open then.
        """
        before = self.session
        if before is not None and before.project.source == source.absolute():
            return
        folder, self.folder = self.folder, None
        self.session = Session(source, folder, self.setup, self.events, empty=empty)
        if before is not None:
            before.close()

    def close(self) -> None:
        """Close what is open."""
        session, self.session = self.session, None
        if session is not None:
            session.close()

    @property
    def now(self) -> Session:
        """The open session; Refusal where there is none."""
        if self.session is None:
            raise Refusal(409, "no_folder_open", "Choose a folder of photos first.")
        return self.session


def create_app(studio: Studio, token: str) -> ASGIApp:
    """The application behind its gate.

    Parameters
    ----------
    studio : what answers.
    token : of the address.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(studio.close)

    app = FastAPI(title="featx studio", version=version("featx"), lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_page(app)
    _add_reading(app, studio)
    _add_labels(app, studio)
    _add_work(app, studio)
    return Gate(app, token)


# --- who may come in ----------------------------------------------------------------------------------------------


class Gate:
    """ASGI middleware: this machine's names only, the token, and limits on what is sent."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        query = parse_qs(scope["query_string"].decode("latin-1"))
        token = query.get("token", [""])[0] if scope["path"] == "/" else ""
        limit = MOST_PHOTO if scope["path"] in _UPLOADS else MOST_JSON
        app: ASGIApp = self.app
        try:
            self._check(headers, token, limit)
            if token:
                app = self._greeting(scope)
        except Refusal as refusal:
            app = _error(refusal)
        await app(scope, _limited(receive, limit), _with_headers(send))

    def _check(self, headers: dict[str, str], token: str, limit: int) -> None:
        """Refusal for who may not come in."""
        host = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
        if host not in LOOPBACK_NAMES:
            raise Refusal(403, "host", "This address is for this machine only.")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != headers.get("host"):
            raise Refusal(403, "origin", "Another page asked; only the studio's own may.")
        if not any(map(self._is_token, [token, *_cookies(headers.get("cookie", ""))])):
            raise Refusal(401, "token", "This window is not signed in: open the address that featx studio printed.")
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdecimal() or int(length) > limit:
            raise _too_large(limit)

    def _greeting(self, scope: Scope) -> Response:
        answer = RedirectResponse("/", 303)
        answer.set_cookie(f"{COOKIE}-{scope['server'][1]}", self.token, httponly=True, samesite="strict")
        return answer

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self.token.encode())


def _cookies(text: str) -> list[str]:
    parts = (part.strip().partition("=") for part in text.split(";"))
    return [value for name, _, value in parts if name.startswith(COOKIE)]


def _limited(receive: Receive, limit: int) -> Receive:
    taken = 0

    async def limited() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > limit:
            raise _too_large(limit)
        return message

    return limited


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            policy = (b"content-security-policy", POLICY.encode())
            message["headers"] = [*message.get("headers", []), policy, *SAFE_HEADERS]
        await send(message)

    return sending


def _too_large(limit: int) -> Refusal:
    return Refusal(413, "too_large", f"At most {limit / 2**20:.0f} MB can be sent at a time.")


def _error(refusal: Refusal) -> Response:
    return JSONResponse({"error": {"reason": refusal.reason, "message": refusal.message}}, refusal.status)


def _add_errors(app: FastAPI) -> None:
    async def usage(request: Request, error: Exception) -> Response:
        assert isinstance(error, FeatxError)
        status = {StoreBusy: (409, "busy"), SourceError: (404, "no_folder")}.get(type(error), (422, "usage"))
        return _error(Refusal(*status, str(error)))

    async def picture(request: Request, error: Exception) -> Response:
        assert isinstance(error, ImageError)
        return _error(Refusal(422, error.reason, f"This photo cannot be read: {error.what}."))

    answer_errors(app, _error)
    app.add_exception_handler(ImageError, picture)
    app.add_exception_handler(FeatxError, usage)


# --- the page -----------------------------------------------------------------------------------------------------


def _add_page(app: FastAPI) -> None:
    static = files("featx.studio").joinpath("static")

    @functools.cache
    def content(name: str) -> bytes:
        return static.joinpath(name).read_bytes()

    def page_file(name: str) -> Response:
        suffix = Path(name).suffix
        if suffix not in _KINDS or name not in {each.name for each in static.iterdir()}:
            raise Refusal(404, "no_route", "There is no such file.")
        return Response(content(name), media_type=_KINDS[suffix], headers={"cache-control": "no-cache"})

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return page_file("index.html")

    @app.get("/static/{name}", include_in_schema=False)
    async def static_file(name: str) -> Response:
        return page_file(name)


# --- reading ------------------------------------------------------------------------------------------------------


def _state(studio: Studio) -> dict[str, Any]:
    """What is open, and how far everything is."""
    session = studio.session
    if session is None:
        return {"open": False, "version": version("featx"), "root": _short(studio.setup.root)}
    project, told = session.project, session.tell_labels()
    named = {} if told["begun"] else Counter(project.folder_labels.values())
    return {
        "open": True, "name": project.name, "folder": _short(project.source), "source": str(project.source),
        "project": _short(project.folder),
        "version": version("featx"), "photos": len(project.photos),
        **{name: told[name] for name in ("seq", "labelled", "undo", "redo", "begun")},
        "folder_classes": len(named), "folder_names": {_shown(name): n for name, n in sorted(named.items())[:_NAMED]},
        "list": project.source.is_file(),
        "embedding": session.embedding,
        "suggestions": {
            "version": session.versions["suggestions"], "ready": not session.suggestions.reason,
            "reason": session.suggestions.reason,
        },
        "map": {"version": session.versions["map"], "status": session.map["status"], "message": session.map["message"]},
        "quality": {
            "version": session.versions["quality"], "status": session.quality["status"],
            "message": session.quality.get("reason", ""),
        },
        "jobs": [job.to_json() for job in session.taking.jobs.values()],
    }  # fmt: skip


def _short(folder: Path) -> str:
    """A folder as people know it, from their home."""
    home = Path.home()
    return f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) and folder != home else str(folder)


def _add_reading(app: FastAPI, studio: Studio) -> None:
    @app.get("/api/state")
    def state() -> Response:
        """What is open, and how far everything is."""
        return JSONResponse(_state(studio))

    @app.get("/api/folders")
    def get_folders(path: str = "") -> Response:
        """The folders in a folder, to choose one."""
        return JSONResponse(folders(_inside(studio, path), studio.setup.root))

    @app.get("/api/photos")
    def photos() -> Response:
        """The names of all photos, and which are embedded or refused."""
        session = studio.now
        listed = list(session.project.photos)
        embedded = np.zeros(len(listed), int)
        if session.embedded is not None:
            embedded[session.embedded.photos] = 1
        names = {photo.name: row for row, photo in enumerate(listed)}
        return JSONResponse(
            {
                "ids": [_shown(photo.name) for photo in listed],
                "times": [photo.ref.mtime_ns // 10**9 for photo in listed],
                "splits": [photo.split for photo in listed] if any(photo.split for photo in listed) else [],
                "embedded": embedded.tolist(),
                "refused": [names[each["id"]] for each in session.refused() if each["id"] in names],
            }
        )

    @app.get("/api/labels")
    def labels() -> Response:
        """What every photo is called."""
        session = studio.now
        found = session.tell_labels()
        return JSONResponse({**found, "labels": session.codes().tolist()})

    @app.get("/api/suggestions")
    def suggestions() -> Response:
        """What photos without a label probably show, and which to label next."""
        session = studio.now
        found = session.suggestions
        return JSONResponse(
            {
                "version": session.versions["suggestions"], "seq": session.suggested,
                "ready": not found.reason, "reason": found.reason,
                "suggested": found.suggested.tolist(),
                "probability": np.floor(100 * found.probability).astype(int).tolist(),
                "unknown": session.unlike.astype(int).tolist(), "worth": list(found.worth),
                "batches": [batch.to_json() for batch in found.batches],
            }
        )  # fmt: skip

    @app.get("/api/similar/{row}")
    def similar(row: int) -> Response:
        """All photos, from the most similar to one."""
        return JSONResponse({"rows": studio.now.similar(row)})

    @app.get("/api/refused")
    def refused() -> Response:
        """Photos that cannot be read, and why."""
        return JSONResponse({"refused": [{**each, "id": _shown(each["id"])} for each in studio.now.refused()]})

    @app.get("/api/duplicates")
    def duplicates() -> Response:
        """Photos that show the same."""
        session = studio.now
        return JSONResponse({"ready": session.embedded is not None, "groups": session.copies()})

    @app.get("/api/map")
    def get_map() -> Response:
        """All photos in two dimensions."""
        session = studio.now
        found = session.map
        places = found["places"]
        if places is not None and len(places) < len(session.project.photos):
            places = np.vstack([places, np.full((len(session.project.photos) - len(places), 2), np.nan)])
        x, y = (
            ([], [])
            if places is None
            else ([None if np.isnan(each) else round(float(each), 4) for each in column] for column in places.T)
        )
        return JSONResponse(
            {"status": found["status"], "version": session.versions["map"], "method": found["method"], "x": x, "y": y}
        )

    @app.get("/api/quality")
    def get_quality() -> Response:
        """How good a model of the labels would be."""
        session = studio.now
        return JSONResponse({"version": session.versions["quality"], **session.quality})

    @app.get("/thumbs")
    def thumbs(rows: Annotated[str, Query(max_length=10_000, pattern=r"^\d+(,\d+)*$")]) -> Response:
        """Small pictures of many photos: of each its row and length, 4 bytes each, the lowest first, then a JPEG.

        Those come first that were made before; of what cannot be read the length is 0.
        """
        session = studio.now
        photos, pictures = session.project.photos, session.pictures
        wanted = {row: photos[row].ref for row in map(int, rows.split(",")) if row < len(photos)}

        def frame(row: int, picture: bytes | ImageError) -> bytes:
            data = b"" if isinstance(picture, ImageError) else picture
            return struct.pack("<II", row, len(data)) + data

        def frames() -> Iterator[bytes]:
            kept = {row: pictures.kept(ref) for row, ref in wanted.items()}
            yield b"".join(frame(row, picture) for row, picture in kept.items() if picture is not None)
            missing = [row for row, picture in kept.items() if picture is None]
            for row, made in zip(missing, pictures.make([wanted[row] for row in missing]), strict=True):
                yield frame(row, made)

        return StreamingResponse(frames(), media_type="application/octet-stream", headers={"cache-control": "no-store"})

    @app.get("/thumb/{row}")
    def thumb(row: int) -> Response:
        """A small picture of a photo."""
        ref, pictures = _ref(studio, row), studio.now.pictures
        return _picture(ref, pictures.kept(ref) or next(pictures.make([ref])))

    @app.get("/photo/{row}")
    def photo(row: int) -> Response:
        """A photo, made smaller where it is large."""
        ref = _ref(studio, row)
        return _picture(ref, studio.now.pictures.whole(ref))

    @app.get("/tried/{name}")
    def tried(name: str) -> Response:
        """A photo that was tried, where the browser cannot show the file itself."""
        session = studio.now
        found = session.pictures.sent(session.taking.tried(name))
        if isinstance(found, ImageError):
            raise Refusal(404, found.reason, f"This photo cannot be shown: {found.what}.") from found
        return Response(found, media_type="image/jpeg", headers={"cache-control": "no-store"})

    @app.get("/api/commands")
    def commands() -> Response:
        """What does the same on the command line."""
        session = studio.now
        return JSONResponse(
            {
                "commands": [shlex.join(each) for each in session.taking.commands()],
                "files": {
                    "labels": str(session.project.labels),
                    "store": str(session.project.store),
                    "models": str(session.taking.folder),
                },
            }
        )

    @app.get("/api/events")
    async def events() -> Response:
        """What happens, as server-sent events."""
        return StreamingResponse(
            studio.events.listen(), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )


def _ref(studio: Studio, row: int) -> ImageRef:
    photos = studio.now.project.photos
    if not 0 <= row < len(photos):
        raise Refusal(404, "no_photo", "There is no such photo.")
    return photos[row].ref


def _picture(ref: ImageRef, found: bytes | ImageError) -> Response:
    if isinstance(found, ImageError):
        raise Refusal(404, found.reason, f"This photo cannot be shown: {found.what}.") from found
    age = "private, max-age=31536000, immutable" if ref.stamp >= 0 else "no-store"
    return Response(found, media_type="image/jpeg", headers={"cache-control": age})


def _shown(name: str) -> str:
    """A file's name as text that JSON can carry."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _inside(studio: Studio, path: str) -> Path:
    """A path below the root, with all links followed; Refusal for any other."""
    root = studio.setup.root
    try:
        found = (root / path).resolve() if path else root
    except (OSError, RuntimeError, ValueError) as error:
        raise Refusal(422, "path", "This is not a path.") from error
    if not found.is_relative_to(root):
        raise Refusal(
            403, "outside_root", f"Only folders below {root} can be opened; featx studio --root names another."
        )
    return found


# --- acting -------------------------------------------------------------------------------------------------------


class Open(BaseModel):
    """A folder to open."""

    path: str
    make: bool = False


class Label(BaseModel):
    """What photos are to be called: the number of a class or a mark, or the name of a class."""

    rows: Annotated[list[int], Field(max_length=1_000_000)]
    label: int | None = None
    name: str | None = None
    how: Annotated[str, Field(alias="from", max_length=20)] = "key"


class Classes(BaseModel):
    """A change of the classes."""

    op: Literal["add", "rename", "merge", "remove"]
    number: Annotated[int | None, Field(alias="class")] = None
    name: str | None = None
    into: int | None = None


class Take(BaseModel):
    """A file to make."""

    what: str


class Op(BaseModel):
    """Start or stop."""

    op: Literal["start", "stop"]


class Yes(BaseModel):
    """Take the names of folders, or not."""

    take: bool


class Add(BaseModel):
    """A photo that was tried, with its label."""

    id: str
    name: str


def _add_labels(app: FastAPI, studio: Studio) -> None:
    def answer(told: dict[str, Any] | None) -> Response:
        if told is None:
            raise Refusal(409, "nothing", "There is nothing more of that.")
        return JSONResponse(told)

    @app.post("/api/label")
    def label(asked: Label) -> Response:
        """Call photos something."""
        session = studio.now
        photos = session.project.photos
        if not all(0 <= row < len(photos) for row in asked.rows):
            raise Refusal(404, "no_photo", "There is no such photo.")
        if (asked.label is None) == (asked.name is None):
            raise Refusal(422, "parameter", "Send either label, a number, or name.")
        code = asked.label if asked.name is None else asked.name
        assert code is not None
        ids = [photos[row].ref.id for row in dict.fromkeys(asked.rows)]
        by = f"{session.journal.by}, accepting a suggestion" if asked.how == "batch" else ""
        return answer(session.act(lambda journal: journal.label(ids, code, how=asked.how, by=by)))

    @app.post("/api/classes")
    def classes(asked: Classes) -> Response:
        """Make, rename, join or remove a class."""
        number, name = asked.number, asked.name

        def change(journal: Journal) -> Change:
            if asked.op in ("add", "rename"):
                if name is None or (asked.op == "rename" and number is None):
                    raise UsageError("a name is missing")
                if journal.number(name.strip()) is not None:
                    raise Refusal(409, "exists", f"There is a class {name.strip()} already.")
                return journal.add_class(name) if number is None else journal.rename_class(number, name)
            if number is None or (asked.op == "merge" and asked.into is None):
                raise UsageError("a class is missing")
            return journal.remove_class(number, asked.into if asked.op == "merge" else None)

        return answer(studio.now.act(change))

    @app.post("/api/folder-classes")
    def folder_classes(asked: Yes) -> Response:
        """Take the names of the class folders for labels, or not."""
        session = studio.now
        labels = session.project.folder_labels
        how = "the list" if session.project.source.is_file() else "the folders"
        told = session.act(
            lambda journal: journal.label_each(labels, how=how, by=how) if asked.take else journal.decline(how)
        )
        return answer(told)

    @app.post("/api/undo")
    def undo() -> Response:
        """Take back the last action."""
        return answer(studio.now.act(lambda journal: journal.undo()))

    @app.post("/api/redo")
    def redo() -> Response:
        """Do it again."""
        return answer(studio.now.act(lambda journal: journal.redo()))


def _add_work(app: FastAPI, studio: Studio) -> None:
    async def file_of(request: Request) -> bytes:
        data = await request.body()
        if not data:
            raise Refusal(422, "empty", "This file is empty.")
        return data

    @app.post("/api/open")
    def open_folder(asked: Open) -> Response:
        """Open a folder, or a list, of photos."""
        path = _inside(studio, asked.path)
        if asked.make:
            try:
                make_source(path)
            except UsageError as error:
                raise Refusal(409, "exists", str(error)) from error
        Project.check(path)
        studio.open(path, empty=asked.make)
        return JSONResponse(_state(studio))

    @app.post("/api/embedding")
    def embedding(asked: Op) -> Response:
        """Go on with the embedding, or stop it."""
        session = studio.now
        if asked.op == "start":
            session.start_embedding()
        else:
            session.stop_embedding()
        return JSONResponse(session.embedding)

    @app.post("/api/measure")
    def measure() -> Response:
        """Measure now how good it is."""
        studio.now.measuring.ask()
        return JSONResponse({})

    @app.post("/api/try")
    async def try_photo(request: Request) -> Response:
        """What a model of the labels says of a photo."""
        taking = studio.now.taking
        data = await file_of(request)
        try:
            return JSONResponse(await asyncio.to_thread(taking.try_photo, data))
        except UsageError as error:
            raise Refusal(409, "not_ready", str(error)) from error

    @app.post("/api/try/add")
    def try_add(asked: Add) -> Response:
        """Add a photo that was tried to the project, with its label."""
        session = studio.now
        row = session.add("tried.jpg", session.taking.tried(asked.id))
        id = session.project.photos[row].ref.id
        told = session.act(lambda journal: journal.label([id], asked.name, how="try"))
        return JSONResponse({**(told or {}), "row": row})

    @app.post("/api/drop")
    async def drop(request: Request, name: Annotated[str, Query(max_length=1000)] = "photo.jpg") -> Response:
        """Add a photo to the project."""
        session = studio.now
        return JSONResponse({"row": await asyncio.to_thread(session.add, name, await file_of(request))})

    @app.post("/api/take")
    def take(asked: Take) -> Response:
        """Begin to make a file to take along."""
        return JSONResponse(studio.now.taking.take(asked.what).to_json())

    @app.get("/api/take/{file}")
    def taken(file: str) -> Response:
        """A file that was made."""
        path = studio.now.taking.path(file)
        headers = {"content-disposition": f"attachment; filename*=UTF-8''{quote(file)}"}
        return FileResponse(path, media_type="application/octet-stream", headers=headers)
