#!/usr/bin/env python
"""`featx label-studio` with the real Label Studio, from end to end: what is promised, what was seen.

Makes an environment of its own in a temporary folder, installs label-studio there from the package index, and starts it
on the loopback address, with everything that it would tell others switched off. Two projects are made, one with a
model of five photos a class and one with a store and no model; what a person would do is done through the API.

usage: scripts/try_label_studio.py FOLDER [--studio VENV/bin/label-studio] [--keep]

FOLDER has class folders of photos. Prints a line for each thing it saw; exit code 1 with the first that is not so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

SEED, POOL = 5, 35
"""Photos of each class that the model is fitted on, and that are tasks."""

EVERY = 20
QUIET = {
    "SENTRY_DSN": "", "FRONTEND_SENTRY_DSN": "", "COLLECT_ANALYTICS": "false", "LATEST_VERSION_CHECK": "false",
    # Label Studio asks nobody on this machine, unless told that it may.
    "ML_BLOCK_LOCAL_IP": "false", "SSRF_PROTECTION_ENABLED": "false",
}  # fmt: skip

T = TypeVar("T")
FEATX = [sys.executable, "-m", "featx"]


class Different(Exception):
    """What was seen is not what is promised."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--studio", type=Path, help="one that is installed already")
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = Path(tempfile.mkdtemp(prefix="featx-label-studio-"))
        if not options.keep:
            stack.callback(shutil.rmtree, work)
        try:
            run(options.folder, options.studio or install(work), work, stack)
        except Different as error:
            print(f"DIFFERENT: {error}")
            for log in sorted(work.glob("*.log")):
                print(f"--- the end of {log.name}", *log.read_text().splitlines()[-15:], sep="\n")
            raise SystemExit(1) from None
    print("All as promised.")


def run(folder: Path, studio: Path, work: Path, stack: contextlib.ExitStack) -> None:
    photos = choose(folder)
    names = list(photos)
    seed, pool = ({name: each[part] for name, each in photos.items()} for part in (slice(SEED), slice(SEED, None)))
    link(seed, work / "seed")
    link(photos, work / "all")
    for name in ("seed", "all"):
        featx("extract", work / name, "--out", work / f"{name}.featx")
    featx("fit", work / "seed.featx", "--out", work / "seed.model")
    api = stack.enter_context(label_studio(studio, work))
    version = api.call("GET", "/api/version")["label-studio-os-package"]["version"]
    see(True, f"Label Studio {version} at {api.url}")
    token = api.call("POST", "/api/token/", {})["token"]
    api.call("POST", "/api/jwt/settings", {"legacy_api_tokens_enabled": True, "api_tokens_enabled": True})

    print("\nA model of five photos a class:")
    project = Project(api, "with a model", names)
    project.bring(pool)
    command = [work / "seed.model", "--store", work / "seed.featx", "--every", EVERY, "--feedback", work / "labels"]
    with backend(work, command, api.url, token) as (url, key):
        project.connect(url, key)
        first = project.wait_for_order()
        scores = project.predictions(first)
        see(
            len(scores) == len(project.tasks),
            f"{len(scores)} of {len(project.tasks)} tasks have a suggestion of {first}",
        )
        right = sum(scores[number][0] == project.truth[number] for number in scores)
        see(right > 0.7 * len(scores), f"{right} of them are right")
        rising = sorted(scores, key=lambda number: scores[number][1])
        listed = project.by_score()
        see(
            [scores[number][1] for number in listed] == [scores[number][1] for number in rising],
            f"the list by prediction score begins with the most uncertain ({scores[listed[0]][1]:.3f})",
        )
        following = api.call("GET", f"/api/projects/{project.number}/next")["id"]
        least = scores[rising[0]][1]
        see(scores[following][1] == least, f"uncertainty sampling begins with the most uncertain ({least:.3f})")
        shown = {"ordering": ["tasks:predictions_score"], "selectedItems": {"all": True, "excluded": []}}
        following = api.call("POST", f"/api/dm/actions?id=next_task&project={project.number}", shown)["id"]
        see(scores[following][1] == least, "so does labelling the tasks as displayed")
        journal = work / "labels" / "journal.jsonl"
        changed, doomed = rising[0], rising[1]
        number = project.annotate(changed, other(names, project.truth[changed]))
        see(last(journal)["label"] == other(names, project.truth[changed]), "a submitted annotation is in the journal")
        project.change(number, project.truth[changed])
        see(last(journal)["label"] == project.truth[changed], "changed there, it is changed in the journal")
        number = project.annotate(doomed, project.truth[doomed])
        api.call("DELETE", f"/api/annotations/{number}/")
        see(last(journal).get("withdrawn", False), "deleted there, it is taken back in the journal")
        waiting = [number for number in spread(rising) if number != changed]
        second = ""
        while not second and waiting:
            for number in waiting[:EVERY]:
                project.annotate(number, project.truth[number])
            del waiting[:EVERY]
            second = project.new_version(work / "labels", first)
        see(bool(second), f"after {len(lines(journal))} records a refit was promoted: {second}")
        see(project.wait_for_order(first) == second, "Label Studio orders by its suggestions now")
        project.judge(second, "the refit")
    off = [number for number in project.tasks if number not in project.annotated]
    lone = off[0] if off else project.tasks[0]
    project.annotate(lone, project.truth[lone])
    before = len(lines(journal))
    with backend(work, [work / "seed.model", "--feedback", work / "labels"], api.url, token, url.rpartition(":")[2]):
        api.call("POST", f"/api/ml/{project.backend}/train", {})
        see(len(lines(journal)) == before + 1, "a label that was given while featx was off came with Start training")

    print("\nA store and no model:")
    project = Project(api, "without a model", names)
    project.bring(pool)
    with backend(work, [work / "all.featx", "--feedback", work / "fresh"], api.url, token) as (url, key):
        project.connect(url, key)
        project.annotate(project.tasks[0], project.truth[project.tasks[0]])
        time.sleep(2)
        see(not api.call("GET", f"/api/predictions?project={project.number}"), "one class is no suggestion")
        strange = next(number for number in project.tasks if project.truth[number] != project.truth[project.tasks[0]])
        project.annotate(strange, project.truth[strange])
        first = project.wait_for_order()
        project.judge(first, "two labels")
        rest = [number for number in project.by_score() if number not in project.annotated]
        for number in rest[:10]:
            project.annotate(number, project.truth[number])
        second = project.wait_for_order(first)
        project.judge(second, "twelve labels")
    listed_csv = work / "labels.csv"
    featx("feedback", work / "fresh", "--csv", listed_csv)
    see(len(lines(listed_csv)) == 13, "featx feedback --csv lists the twelve photos, for featx extract")


# --- what is seen ---------------------------------------------------------------------------------------------------


def see(so: bool, what: str) -> None:
    """Print what was seen, or end."""
    if not so:
        raise Different(what)
    print(f"  {what}", flush=True)


def wait(what: str, ready: Callable[[], T | None], seconds: float = 300.0) -> T:
    """What ``ready`` gives, once it gives anything."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = ready()
        if found:
            return found
        time.sleep(0.3)
    raise Different(f"{what} did not come within {seconds:g} s")


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def last(path: Path) -> dict[str, Any]:
    """The last record of a journal."""
    found: dict[str, Any] = json.loads(lines(path)[-1])
    return found


def other(names: Sequence[str], name: str) -> str:
    return next(each for each in names if each != name)


def spread(tasks: Sequence[int]) -> list[int]:
    """The tasks in turn from all over the order: labels of uncertain ones alone are no fair sample."""
    return [number for start in range(5) for number in tasks[start::5]]


# --- the photos -----------------------------------------------------------------------------------------------------


def choose(folder: Path) -> dict[str, list[Path]]:
    """Photos of each class, with the class's name: those of all folders of this name."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            found.setdefault(path.parent.name, []).append(path)
    return {name: paths[: SEED + POOL] for name, paths in found.items()}


def link(photos: dict[str, list[Path]], folder: Path) -> None:
    """Class folders with these photos."""
    for name, paths in photos.items():
        (folder / name).mkdir(parents=True)
        for path in paths:
            (folder / name / path.name).symlink_to(path.resolve())


# --- Label Studio ---------------------------------------------------------------------------------------------------


def install(work: Path) -> Path:
    """Label Studio in an environment of its own."""
    print("Installing label-studio (minutes) ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", work / "venv"], check=True)
    python = str(work / "venv" / "bin" / "python")
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "label-studio"]
    with (work / "install.log").open("w") as log:
        if subprocess.run(command, stdout=log, stderr=log).returncode:
            raise Different("label-studio could be installed")
    return work / "venv" / "bin" / "label-studio"


class Api:
    """The API of one Label Studio."""

    def __init__(self, url: str, token: str) -> None:
        self.url, self._token = url, token

    def call(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
        """What it answers."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Token {self._token}", "Content-Type": kind}
        request = urllib.request.Request(self.url + path, data=data, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                raw = answer.read()
        except urllib.error.HTTPError as error:
            raise Different(f"{method} {path} is answered: {error.code} {error.read()[:500]!r}") from error
        return json.loads(raw) if raw else None


@contextlib.contextmanager
def label_studio(program: Path, work: Path) -> Iterator[Api]:
    """A Label Studio that runs."""
    token, port = secrets.token_hex(20), free_port()
    own = {
        "LABEL_STUDIO_BASE_DATA_DIR": str(work / "data"), "LABEL_STUDIO_USERNAME": "somebody@example.com",
        "LABEL_STUDIO_PASSWORD": secrets.token_hex(12), "LABEL_STUDIO_USER_TOKEN": token,
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
    }  # fmt: skip
    (work / "data").mkdir()
    command = [program, "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", port]
    with running(command, work / "label-studio.log", {**QUIET, **own}):
        api = Api(f"http://127.0.0.1:{port}", token)

        def up() -> bool:
            try:
                return bool(api.call("GET", "/api/version"))
            except OSError:
                return False

        wait("Label Studio", up, 600)
        yield api


class Project:
    """A project, and what a person does in it."""

    def __init__(self, api: Api, title: str, names: Sequence[str]) -> None:
        choices = "".join(f'<Choice value="{name}"/>' for name in names)
        config = (
            '<View><Image name="image" value="$image"/>'
            f'<Choices name="kind" toName="image" choice="single">{choices}</Choices></View>'
        )
        self.api = api
        made = api.call(
            "POST", "/api/projects/", {"title": title, "label_config": config, "sampling": "Uncertainty sampling"}
        )
        self.number, self.backend = made["id"], 0
        self.tasks: list[int] = []
        self.truth: dict[int, str] = {}
        self.annotated: set[int] = set()

    def bring(self, photos: dict[str, list[Path]]) -> None:
        """Upload photos, which become tasks."""
        mark = secrets.token_hex(12)
        body = bytearray()
        for name, paths in photos.items():
            for place, path in enumerate(paths):
                head = (
                    f'--{mark}\r\nContent-Disposition: form-data; name="{name}{place}"; '
                    f'filename="{name}--{place}{path.suffix}"\r\nContent-Type: image/jpeg\r\n\r\n'
                )
                body += head.encode() + path.read_bytes() + b"\r\n"
        body += f"--{mark}--\r\n".encode()
        self.api.call(
            "POST", f"/api/projects/{self.number}/import", bytes(body), f"multipart/form-data; boundary={mark}"
        )
        found = self.api.call("GET", f"/api/tasks?project={self.number}&page_size=1000&fields=task_only")["tasks"]
        for task in found:
            parts = re.fullmatch(r".*/[0-9a-f]+-(.+)--\d+\.\w+", task["data"]["image"])
            if parts is None:
                raise Different(f"an image is called as it was uploaded: {task['data']['image']}")
            self.tasks.append(task["id"])
            self.truth[task["id"]] = parts[1]

    def connect(self, url: str, key: str) -> None:
        """Connect a backend, with its key, and give the webhook that Label Studio makes for it the key, too."""
        shown = {"auth_method": "BASIC_AUTH", "basic_auth_user": "featx", "basic_auth_pass": key}
        made = self.api.call("POST", "/api/ml/", {"url": url, "project": self.number, "title": "featx", **shown})
        see(made["readable_state"] == "Connected", f"connected, with the key as a password: {made['model_version']}")
        self.backend = made["id"]
        (hook,) = self.api.call("GET", f"/api/webhooks/?project={self.number}")
        self.api.call("PATCH", f"/api/webhooks/{hook['id']}/", {"url": hook["url"], "headers": {"X-API-Key": key}})

    def wait_for_order(self, before: str = "") -> str:
        """The version by which it orders its tasks, once it is another."""

        def ordered() -> str:
            found = str(self.api.call("GET", f"/api/projects/{self.number}")["model_version"])
            return found if re.fullmatch("featx-[0-9a-f]{8}", found) and found != before else ""

        return wait("an order by a version of featx", ordered)

    def predictions(self, version: str) -> dict[int, tuple[str, float]]:
        """Of each task the label that a version suggests, and its score."""
        found = self.api.call("GET", f"/api/predictions?project={self.number}")
        return {
            each["task"]: (each["result"][0]["value"]["choices"][0], each["score"])
            for each in found
            if each["model_version"] == version
        }

    def judge(self, version: str, by: str) -> None:
        """See what suggestions are worth."""
        found = self.predictions(version)
        right = sum(found[number][0] == self.truth[number] for number in found)
        see(len(found) == len(self.tasks), f"by {by}, {right} of {len(found)} suggestions are right ({version})")

    def by_score(self) -> list[int]:
        """Its tasks as the list shows them by prediction score, rising."""
        view = {"project": self.number, "data": {"title": "by score", "ordering": ["tasks:predictions_score"]}}
        number = self.api.call("POST", "/api/dm/views/", view)["id"]
        return [each["id"] for each in self.api.call("GET", f"/api/tasks?view={number}&page_size=1000")["tasks"]]

    def annotate(self, task: int, label: str) -> int:
        """Submit an annotation."""
        self.annotated.add(task)
        return int(self.api.call("POST", f"/api/tasks/{task}/annotations/", {"result": chosen(label)})["id"])

    def change(self, annotation: int, label: str) -> None:
        """Submit another label for it."""
        self.api.call("PATCH", f"/api/annotations/{annotation}/", {"result": chosen(label)})

    def new_version(self, folder: Path, before: str) -> str:
        """The version that a refit promoted; "" where it ended otherwise."""
        audit = folder / "audit.jsonl"
        count = len(lines(audit))
        wait("the end of a refit", lambda: len(lines(audit)) > count)
        record = last(audit)
        print(f"  a refit ended: {record['what']}", flush=True)
        found = f"featx-{record['version']}" if record["what"] == "promoted" else ""
        return found if found != before else ""


def chosen(label: str) -> list[dict[str, Any]]:
    """The result of an annotation."""
    return [{"from_name": "kind", "to_name": "image", "type": "choices", "value": {"choices": [label]}}]


# --- processes ------------------------------------------------------------------------------------------------------


def featx(*command: object) -> None:
    subprocess.run([*FEATX, *map(str, command)], check=True, capture_output=True)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@contextlib.contextmanager
def running(command: Sequence[object], log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended in the end."""
    with log.open("ab") as sink:
        process = subprocess.Popen([*map(str, command)], stdout=sink, stderr=sink, env={**os.environ, **env})
        try:
            yield process
        finally:
            process.terminate()
            process.wait(timeout=60)


@contextlib.contextmanager
def backend(
    work: Path, arguments: Sequence[object], studio: str, token: str, port: str = "0"
) -> Iterator[tuple[str, str]]:
    """`featx label-studio` that runs: its address, and the key that it wants."""
    key_file, log = work / "key", work / f"featx-{time.monotonic_ns()}.log"
    if not key_file.exists():
        key_file.write_text(secrets.token_urlsafe(16))
    command = [*FEATX, "label-studio", *arguments, "--url", studio, "--port", port, "--api-key-file", key_file]
    with running(command, log, {"FEATX_LABEL_STUDIO_TOKEN": token}) as process:

        def address() -> str:
            if process.poll() is not None:
                raise Different(f"featx label-studio runs; it ended with {process.returncode}")
            found = re.search(r"suggestions at (http://\S+) ", log.read_text())
            return found[1] if found else ""

        yield wait("featx label-studio", address), key_file.read_text()


if __name__ == "__main__":
    main()
