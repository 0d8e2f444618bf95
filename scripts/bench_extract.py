#!/usr/bin/env python3
"""Extraction, side by side with what one would write by hand, in one run.

python scripts/bench_extract.py                                   # generated 500-pixel JPEGs, four backbones
python scripts/bench_extract.py --photos FOLDER --backbones efficientnet_lite0
python scripts/bench_extract.py --large 24                        # 12-megapixel photos, full and scaled decoding
python scripts/bench_extract.py --linear 1000,5000,20000          # does an image's time depend on how many there are?
python scripts/bench_extract.py --together efficientnet_lite0,efficientnet_lite1,efficientnet_lite2
python scripts/bench_extract.py --photos FOLDER --quality         # are the embeddings those of plain torch?

For each backbone: the plain torch DataLoader loop with the weights' own transforms; timm's own loader and model;
thingsvision, where --thingsvision names the Python of an environment that has it (it pins an old torch); featx from
files to published shards; decoding and the network alone; and the bound that these two give.
Writes data/bench/extract.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from machine import processor
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from featx import ImageSet, extract_features, load_backbone, make_engine, read_features
from featx._system import available_cpus
from featx.backbones.backbone import Backbone
from featx.evaluation.sweep import sweep_heads
from featx.images.pixels import Preprocess
from featx.images.pool import DecoderPool
from featx.images.views import Looks
from featx.store.reader import FeatureSet

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


def dataloader_loop(paths: list[Path], backbone: Backbone, workers: int) -> tuple[float, NDArray[np.float32]]:
    """The loop that everyone writes (DataLoader, transforms, eval, no_grad, to numpy): images/s, and embeddings."""
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
    return len(paths) / (time.perf_counter() - started), np.concatenate(out)


def timm_rate(source: Path, name: str, workers: int) -> float:
    """Images per second of timm's way: its model without a classifier, its transform, its loader."""
    import timm
    import torch

    names = {"efficientnet_lite0": "tf_efficientnet_lite0", "mobilenet_v2": "mobilenetv2_100"}
    model = timm.create_model(names.get(name, name), pretrained=False, num_classes=0).eval()
    config = timm.data.resolve_data_config({}, model=model)  # type: ignore[attr-defined, no-untyped-call]
    dataset = timm.data.ImageDataset(str(source))  # type: ignore[attr-defined, no-untyped-call]
    loader = timm.data.create_loader(  # type: ignore[attr-defined]
        dataset,
        input_size=config["input_size"],
        batch_size=32,
        use_prefetcher=False,
        num_workers=workers,
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        mean=config["mean"],
        std=config["std"],
    )
    started = time.perf_counter()
    with torch.no_grad():
        count = sum(len(model(batch).numpy()) for batch, _ in loader)
    assert count == len(dataset)
    return count / (time.perf_counter() - started)


THINGSVISION = """
import sys, tempfile, time
from thingsvision import get_extractor
from thingsvision.utils.data import DataLoader, ImageDataset
root, name = sys.argv[1:]
extractor = get_extractor(model_name=name, source="torchvision", device="cpu", pretrained=False)
module = {"mobilenet_v2": "features"}.get(name, "avgpool")
transform = extractor.get_transformations(resize_dim=256, crop_dim=224)
started = time.perf_counter()
dataset = ImageDataset(root=root, out_path=tempfile.mkdtemp(), backend=extractor.get_backend(), transforms=transform)
batches = DataLoader(dataset=dataset, batch_size=32, backend=extractor.get_backend())
found = extractor.extract_features(batches=batches, module_name=module, flatten_acts=False)
print(len(found) / (time.perf_counter() - started))
"""


def thingsvision_rate(source: Path, name: str, python: str) -> float:
    """Images per second of thingsvision, run by a Python that has it."""
    found = subprocess.run(
        [python, "-W", "ignore", "-c", THINGSVISION, str(source), name], capture_output=True, text=True, check=True
    )
    return float(found.stdout.split()[-1])


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


def decode_rate(paths: list[Path], backbone: Backbone, workers: int, *others: Backbone) -> float:
    """Images per second of reading, hashing, decoding and resizing alone; for ``others``, they are resized again."""
    looks = [Looks(each.preprocess) for each in others]
    with DecoderPool(backbone.preprocess, workers=workers, others=looks) as pool:
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


def quality(source: Path, name: str, precisions: list[str], workers: int) -> list[dict[str, Any]]:
    """Embeddings and head accuracy of featx against plain torch with the weights' own transforms, on every photo.

    The photos at hand have 256 pixels, fewer than scaled decoding can save anything on; it is judged at half the
    network's input size, where the JPEG decoder does leave out detail, against full decoding at the same size.
    """
    backbone = load_backbone(name)
    small = replace(backbone, preprocess=halved(backbone.preprocess))
    images = ImageSet.from_folder(source)
    rows: list[dict[str, Any]] = []

    def extracted(of: Backbone, **options: Any) -> FeatureSet:
        with tempfile.TemporaryDirectory() as folder:
            decode = options.pop("decode", "full")
            extract_features(images, of, Path(folder) / "q.featx", engine=make_engine(of, **options), decode=decode)
            return read_features(Path(folder) / "q.featx")

    def judged(what: str, reference: FeatureSet, other: FeatureSet) -> None:
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (reference.embeddings, other.embeddings))
        cosine = np.einsum("nd,nd->n", a, b, dtype=np.float64)
        scores = [
            sweep_heads(
                rows.embeddings, rows.labels, class_names=rows.class_names, heads=("auto",), shots=(5,), n_jobs=workers
            )
            for rows in (reference, other)
        ]
        means = [100 * float(np.mean([trial.accuracy for trial in score.trials])) for score in scores]
        rows.append(
            {
                "photos": source.name,
                "n": len(cosine),
                "what": what,
                "lowest cosine": f"{cosine.min():.6f}",
                "median": f"{np.median(cosine):.6f}",
                "auto, 5 shots, %": f"{means[1]:.2f}",
                "reference": f"{means[0]:.2f}",
            }
        )

    plain = extracted(backbone, precision=precisions[0])
    order = {ref.id: source / ref.id for ref in images.refs}
    _, embeddings = dataloader_loop([order[name] for name in plain.ids.tolist()], backbone, workers)
    reference = replace(plain, embeddings=embeddings)
    for precision in precisions:
        found = plain if precision == precisions[0] else extracted(backbone, precision=precision)
        judged(f"{precision} against torch", reference, found)
    judged("scaled against full decoding", extracted(small), extracted(small, decode="scaled"))
    return rows


def halved(preprocess: Preprocess) -> Preprocess:
    """The same at half the size."""
    assert isinstance(preprocess.resize, int)
    height, width = preprocess.crop
    return replace(preprocess, resize=preprocess.resize // 2, crop=(height // 2, width // 2))


def compare(
    source: Path, name: str, precisions: list[str], workers: int, rounds: int, thingsvision: str
) -> dict[str, Any]:
    """One backbone: every contender in turn, ``rounds`` times, and the best of each (the machine may be shared)."""
    backbone = load_backbone(name, weights="default" if name == "efficientnet_lite0" else "none")
    paths = [source / ref.id for ref in ImageSet.from_folder(source).refs]
    row: dict[str, Any] = {"backbone": name, "images": len(paths)}
    for _ in range(rounds):
        few = paths[: min(len(paths), 320)]
        measured = {"loop": dataloader_loop(few, backbone, workers)[0], "timm": timm_rate(source, name, workers)}
        if thingsvision and name != "efficientnet_lite0":  # which torchvision does not have
            measured["thingsvision"] = thingsvision_rate(source, name, thingsvision)
        measured["decode"] = decode_rate(paths, backbone, workers)
        for precision in precisions:
            measured[f"network {precision}"] = network_rate(backbone, len(paths), precision=precision)
            measured[f"featx {precision}"] = extract_rate(source, backbone, precision=precision)
        row.update({key: max(value, row.get(key, 0.0)) for key, value in measured.items()})
    for precision in precisions:
        bound = 1 / (1 / row["decode"] + 1 / row[f"network {precision}"])
        row[f"ratio {precision}"] = row[f"featx {precision}"] / row["loop"]
        row[f"bound {precision}"] = bound
        row[f"of bound {precision}"] = row[f"featx {precision}"] / bound
    return row


def large(source: Path, workers: int, rounds: int) -> dict[str, Any]:
    """Photos of 12 megapixels: the plain loop, featx, and featx decoding only what the resize needs."""
    backbone = load_backbone("efficientnet_lite0")
    paths = [source / ref.id for ref in ImageSet.from_folder(source).refs]
    row: dict[str, Any] = {"photos of 12 megapixels": len(paths)}
    for _ in range(rounds):
        measured = {
            "loop": dataloader_loop(paths, backbone, workers)[0],
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


def together(source: Path, names: list[str], precisions: list[str], workers: int, rounds: int) -> list[dict[str, Any]]:
    """Several backbones in one extraction, against the sum of their network times and one decoding, in turns."""
    backbones = [load_backbone(name) for name in names]
    images = ImageSet.from_folder(source)
    paths = [source / ref.id for ref in images.refs]
    rows = []
    for precision in precisions:
        engines = {each.name: make_engine(each, precision=precision) for each in backbones}
        times = []
        for _ in range(rounds):
            networks = sum(len(paths) / network_rate(each, len(paths), precision=precision) for each in backbones)
            decoding = len(paths) / decode_rate(paths, backbones[0], workers)
            resizing = len(paths) / decode_rate(paths, backbones[0], workers, *backbones[1:]) - decoding
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                extract_features(images, backbones, Path(folder) / "t.featx", engine=partial(_made, engines))
                times.append((networks, decoding, resizing, time.perf_counter() - started))
        networks, decoding, resizing, taken = np.median(times, axis=0)
        rows.append(
            {
                "backbones": len(names),
                "precision": precision,
                "images": len(paths),
                "networks": networks,
                "one decoding": decoding,
                "further resizes": resizing,
                "extraction": taken,
                "to networks and decoding": taken / (networks + decoding),
                "and resizes": taken / (networks + decoding + resizing),
            }
        )
    return rows


def _made(engines: dict[str, Any], backbone: Backbone) -> Any:
    return engines[backbone.name]


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
    parser.add_argument("--together", default="", metavar="NAME,NAME,...", help="several backbones in one extraction")
    parser.add_argument("--quality", action="store_true", help="with --photos: compare embeddings and accuracy")
    parser.add_argument("--thingsvision", default="", metavar="PYTHON", help="a Python that can import thingsvision")
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
        elif given.quality:
            if given.photos is None:
                parser.error("--quality needs --photos")
            found["quality"] = quality(
                given.photos, given.backbones.split(",")[0], given.precisions.split(","), available_cpus()
            )
            show("lowest cosine of any photo, and accuracy by its embeddings", found["quality"])
        elif given.large:
            make_jpegs(folder / "large", given.large, (4000, 3000))
            found["large"] = [large(folder / "large", available_cpus(), given.rounds)]
            show("images per second; ratio: featx to the loop", found["large"])
        else:
            source = given.photos or folder / "photos"
            if given.photos is None:
                make_jpegs(source, given.images, (500, 375))
            found["rows"] = []
            if given.together:
                names, precisions = given.together.split(","), given.precisions.split(",")
                found["together"] = together(source, names, precisions, available_cpus(), given.rounds)
                show("seconds of several backbones in one extraction, and of its parts", found["together"])
            for name in [] if given.together else given.backbones.split(","):
                row = compare(
                    source, name, given.precisions.split(","), available_cpus(), given.rounds, given.thingsvision
                )
                found["rows"].append(row)
                show("images per second; ratio: featx to the loop; of bound: featx to decoding plus network", [row])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    Console().print(f"written: {given.out}")


if __name__ == "__main__":
    main()
