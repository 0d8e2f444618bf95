#!/usr/bin/env python3
"""How long a served model takes to answer: alone, and when many ask.

    python scripts/bench_serve.py PHOTOS [--featx COMMAND]... [--seconds 10] [--out data/bench/serve]

PHOTOS is a folder of class folders. A model is fitted on them and served on this machine; clients send one photo a
request over connections that they keep. Printed are the median of one client in turns with the bare work (decoding and
the network at one image, in this process), and images per second of 32 clients beside what the network makes of full
batches. --featx names the featx command of another version, to be measured in turn with this one.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from featx._files import publish_bytes
from featx.backbones.speed import rate
from featx.extraction import Embedder
from featx.images.source import ImageSet
from featx.models import open_embedder, read_bundle
from featx.service.batcher import BATCH_SIZES

CLIENTS = (1, 32, 128)


@contextmanager
def served(command: str, model: Path) -> Iterator[int]:
    """The port of a served model."""
    words = [*command.split(), "serve", str(model), "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        found = next(
            (found for line in process.stdout if (found := re.search(r"http://127\.0\.0\.1:(\d+)", line))), None
        )
        if found is None:
            raise SystemExit(f"{command} does not serve")
        threading.Thread(target=process.stdout.read, daemon=True).start()
        port = int(found[1])
        while request(http.client.HTTPConnection("127.0.0.1", port), "GET", "/ready", b"") != 200:
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def request(connection: http.client.HTTPConnection, method: str, route: str, body: bytes) -> int:
    """The status of an answer; 0 where there was none."""
    try:
        connection.request(method, route, body, {"Content-Type": "application/octet-stream"})
        answer = connection.getresponse()
        answer.read()
    except OSError:
        connection.close()
        return 0
    return answer.status


def ask(port: int, clients: int, photos: list[bytes], seconds: float) -> dict[str, float]:
    """Images per second answered, refused requests per second, and milliseconds of the answered ones."""
    took: list[float] = []
    refused = 0
    until = time.perf_counter() + seconds

    def client(number: int) -> None:
        nonlocal refused
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        place = number
        while time.perf_counter() < until:
            place += 1
            started = time.perf_counter()
            if request(connection, "POST", "/predict", photos[place % len(photos)]) == 200:
                took.append(1000 * (time.perf_counter() - started))
            else:
                refused += 1
                time.sleep(0.05)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    p50, p99 = np.percentile(took, (50, 99))
    return {"per_second": len(took) / seconds, "refused": refused / seconds, "p50": float(p50), "p99": float(p99)}


def beside_bare_work(port: int, embedder: Embedder, photos: list[bytes], rounds: int = 20) -> dict[str, float]:
    """Milliseconds of decoding, of the network, and of a lone client's request, in turns; images/s of full batches."""
    decoding, network, asked = [], [], []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for number in range(rounds):
        some = [photos[place % len(photos)] for place in range(20 * number, 20 * number + 20)]
        for data in some:
            started = time.perf_counter()
            seen = embedder.pixels(data)
            decoded = time.perf_counter()
            embedder.embed_pixels([seen])
            decoding.append(decoded - started)
            network.append(time.perf_counter() - decoded)
        for data in some:
            started = time.perf_counter()
            request(connection, "POST", "/predict", data)
            asked.append(time.perf_counter() - started)
    engine = embedder.engine
    full = rate(engine, (engine.batch_size, *embedder.backbone.preprocess.crop, 3), 3.0, "network")
    times = {"decode": decoding, "network": network, "request": asked}
    return {**{name: 1000 * float(np.median(each)) for name, each in times.items()}, "full": full}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("photos", type=Path)
    parser.add_argument("--featx", action="append", default=[], metavar="COMMAND", help="of another version")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=Path("data/bench/serve"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    this = f"{sys.executable} -m featx"
    photos = [ref.path.read_bytes() for ref in ImageSet.from_folder(options.photos).refs]
    result: dict[str, Any] = {"date": date.today().isoformat(), "versions": {}}
    for number, command in enumerate([this, *options.featx]):
        store, model = options.out / f"{number}.featx", options.out / f"{number}.model"
        for words in (["extract", options.photos, "--out", store], ["fit", store, "--out", model]):
            subprocess.run([*command.split(), *map(str, words)], check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = {}
        with served(command, model) as port:
            ask(port, 4, photos, 2.0)  # warm
            if command == this:
                embedder = open_embedder(read_bundle(model), model, batch_sizes=BATCH_SIZES)
                found["bare"] = beside_bare_work(port, embedder, photos)
            for clients in CLIENTS:
                found[str(clients)] = ask(port, clients, photos, options.seconds)
        result["versions"][command] = found
        print(f"\n{command}")
        if "bare" in found:
            work = found["bare"]
            floor = work["decode"] + work["network"]
            print(
                f"  bare work: {work['decode']:.1f} ms decoding and {work['network']:.1f} ms network = {floor:.1f} ms"
            )
            print(f"  full batches: {work['full']:.0f} images/s of the network alone")
            print(f"  one client, in turns with it: {work['request']:.1f} ms, {work['request'] / floor:.2f} times")
        for clients in CLIENTS:
            row = found[str(clients)]
            print(
                f"  {clients:>3} clients: p50 {row['p50']:.1f} ms, p99 {row['p99']:.1f} ms, "
                f"{row['per_second']:.0f} images/s, {row['refused']:.0f} refused/s"
            )
        publish_bytes(options.out / "serve.json", json.dumps(result).encode())


if __name__ == "__main__":
    main()
