#!/usr/bin/env python3
"""Extraction, side by side with what one would write by hand, in one run.

python scripts/bench_extract.py                                   # generated 500-pixel JPEGs, four backbones
python scripts/bench_extract.py --photos FOLDER --backbones efficientnet_lite0
python scripts/bench_extract.py --large 24                        # 12-megapixel photos, full and scaled decoding
python scripts/bench_extract.py --linear 1000,5000,20000          # does an image's time depend on how many there are?

For each backbone: the plain torch DataLoader loop with the weights' own transforms; featx from files to published
shards; decoding and the network alone; and the bound that these two give. Writes data/bench/extract.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from featx import ImageSet, extract_features, load_backbone, make_engine
from featx.backbones import Backbone
from featx.decoders import DecoderPool
from featx.engines import available_cpus

BACKBONES = ("efficientnet_lite0", "mobilenet_v2", "resnet18", "resnet50")


def make_jpegs(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Pictures with structure and grain: about 70 kB at 500x375 and 3 MB at 12 megapixels, as photos have."""
    random = np.random.default_rng(0)
    width, height = size
    for number in range(count):
        target = folder / f"class{number % 2}" / f"{number:06d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        # A large photo is not sharp to the pixel: its grain is spread over several.
        fine = max(1, width // 1300)
        grain = random.normal(0, 12, (-(-height // fine), -(-width // fine), 1)).astype(np.float32)
        grain = grain.repeat(fine, 0).repeat(fine, 1)[:height, :width]
        pixels = np.clip(np.asarray(coarse, dtype=np.float32) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(target, quality=85)


def dataloader_loop(paths: list[Path], backbone: Backbone, workers: int) -> float:
    """Images per second of the loop that everyone writes: DataLoader, transforms, eval, no_grad, to numpy."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Files(Dataset[Any]):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, row: int) -> Any:
            with Image.open(paths[row]) as image:
                return transform(image.convert("RGB"))

    transform = own_transform(backbone)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = backbone.network().to(device)
    loader: DataLoader[Any] = DataLoader(Files(), batch_size=32, num_workers=workers, pin_memory=device == "cuda")
    started = time.perf_counter()
    out = []
    with torch.no_grad():
        for batch in loader:
            out.append(network(batch.to(device))[0].cpu().numpy())
    assert len(np.concatenate(out)) == len(paths)
    return len(paths) / (time.perf_counter() - started)


def own_transform(backbone: Backbone) -> Callable[[Image.Image], Any]:
    """The transform that the publisher of the weights gives."""
    if backbone.name == "efficientnet_lite0":
        import timm

        model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        config = timm.data.resolve_data_config({}, model=model)  # type: ignore[attr-defined, no-untyped-call]
        return timm.data.create_transform(**config)  # type: ignore[attr-defined, no-any-return]
    from torchvision.models import get_model_weights

    return get_model_weights(backbone.name).DEFAULT.transforms()  # type: ignore[no-any-return]


def extract_rate(source: Path, backbone: Backbone, *, decode: str = "full", **options: Any) -> float:
    """Images per second from files to published shards."""
    store = Path(tempfile.mkdtemp()) / "bench.featx"
    try:
        images = ImageSet.from_folder(source)
        engine = make_engine(backbone, **options)
        started = time.perf_counter()
        extract_features(images, backbone, store, engine=engine, decode=decode)
        return len(images) / (time.perf_counter() - started)
    finally:
        shutil.rmtree(store.parent)


def decode_rate(paths: list[Path], backbone: Backbone, workers: int) -> float:
    """Images per second of reading, hashing, decoding and resizing alone."""
    with DecoderPool(backbone.preprocess, workers=workers) as pool:
        list(pool.run(paths[: 2 * workers], lambda digest: False, ahead=64))  # the processes have started
        started = time.perf_counter()
        count = sum(1 for _ in pool.run(paths, lambda digest: False, ahead=64))
        return count / (time.perf_counter() - started)


def network_rate(backbone: Backbone, count: int, **options: Any) -> float:
    """Images per second of the network alone, on pixels that are there."""
    engine = make_engine(backbone, **options)
    size = engine.batch_size
    batch = np.random.default_rng(0).integers(0, 256, (size, *backbone.preprocess.crop, 3), dtype=np.uint8)
    rounds = max(4, count // size)
    list(engine.embed([batch] * 2))
    started = time.perf_counter()
    for _ in engine.embed([batch] * rounds):
        pass
    return rounds * size / (time.perf_counter() - started)


def compare(source: Path, name: str, precisions: list[str], workers: int, rounds: int) -> dict[str, Any]:
    """One backbone: every contender in turn, ``rounds`` times, and the best of each (the machine may be shared)."""
    backbone = load_backbone(name, weights="default" if name == "efficientnet_lite0" else "none")
    paths = [ref.path for ref in ImageSet.from_folder(source).refs]
    row: dict[str, Any] = {"backbone": name, "images": len(paths)}
    for _ in range(rounds):
        measured = {"loop": dataloader_loop(paths[: min(len(paths), 320)], backbone, workers)}
        measured["decode"] = decode_rate(paths, backbone, workers)
        for precision in precisions:
            measured[f"network {precision}"] = network_rate(backbone, len(paths), precision=precision)
            measured[f"featx {precision}"] = extract_rate(source, backbone, precision=precision)
        row.update({key: max(value, row.get(key, 0.0)) for key, value in measured.items()})
    for precision in precisions:
        row[f"ratio {precision}"] = row[f"featx {precision}"] / row["loop"]
        bound = 1 / (1 / row["decode"] + 1 / row[f"network {precision}"])
        row[f"of bound {precision}"] = row[f"featx {precision}"] / bound
    return row


def large(source: Path, workers: int, rounds: int) -> dict[str, Any]:
    """Photos of 12 megapixels: the plain loop, featx, and featx decoding only what the resize needs."""
    backbone = load_backbone("efficientnet_lite0")
    paths = [ref.path for ref in ImageSet.from_folder(source).refs]
    row: dict[str, Any] = {"photos of 12 megapixels": len(paths)}
    for _ in range(rounds):
        measured = {
            "loop": dataloader_loop(paths, backbone, workers),
            "featx": extract_rate(source, backbone),
            "featx scaled": extract_rate(source, backbone, decode="scaled"),
        }
        row.update({key: max(value, row.get(key, 0.0)) for key, value in measured.items()})
    return {**row, "ratio": row["featx"] / row["loop"], "ratio scaled": row["featx scaled"] / row["loop"]}


def linear(counts: list[int], folder: Path) -> list[dict[str, float]]:
    """Time and memory of an image for growing numbers of small images."""
    import resource

    backbone = load_backbone("efficientnet_lite0")
    rows = []
    for count in counts:
        source = folder / f"n{count}"
        make_jpegs(source, count, (64, 64))
        rate = extract_rate(source, backbone)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append({"images": count, "ms per image": 1000 / rate, "peak MiB": peak})
        shutil.rmtree(source)
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of equal keys as a table."""
    table = Table(*rows[0], title=title, box=None)
    for row in rows:
        table.add_row(
            *(
                f"{v:.2f}" if isinstance(v, float) and v < 20 else f"{v:.0f}" if isinstance(v, float) else str(v)
                for v in row.values()
            )
        )
    Console(width=200).print(table)


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="class folders to use instead of generated JPEGs")
    parser.add_argument("--backbones", default=",".join(BACKBONES))
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--large", type=int, default=0, metavar="N")
    parser.add_argument("--linear", default="", metavar="N,N,...")
    parser.add_argument("--out", type=Path, default=Path("data/bench/extract.json"))
    given = parser.parse_args()
    machine = {
        "date": date.today().isoformat(),
        "cpus": available_cpus(),
        "processor": processor(),
        "python": platform.python_version(),
    }
    found: dict[str, Any] = {"machine": machine}
    Console().print(machine)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if given.linear:
            found["linear"] = linear([int(n) for n in given.linear.split(",")], folder)
            show("time of an image", found["linear"])
        elif given.large:
            make_jpegs(folder / "large", given.large, (4000, 3000))
            found["large"] = [large(folder / "large", available_cpus(), given.rounds)]
            show("images per second; ratio: featx to the loop", found["large"])
        else:
            source = given.photos or folder / "photos"
            if given.photos is None:
                make_jpegs(source, given.images, (500, 375))
            found["rows"] = []
            for name in given.backbones.split(","):
                row = compare(source, name, given.precisions.split(","), available_cpus(), given.rounds)
                found["rows"].append(row)
                show("images per second; ratio: featx to the loop; of bound: featx to decoding plus network", [row])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    Console().print(f"written: {given.out}")


def processor() -> str:
    """The processor's name, where the system tells."""
    path = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in path.read_text().splitlines() if line.startswith("model name")]
        if path.exists()
        else []
    )
    flags = path.read_text() if path.exists() else ""
    return (
        (names[0] if names else platform.processor())
        + (" (amx)" if "amx_tile" in flags else "")
        + f" {os.uname().machine}"
    )


if __name__ == "__main__":
    main()
