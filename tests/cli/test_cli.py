"""The real command in its own process: what it prints, and how it ends."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT, Featx, bad_images, class_folders, picture, without
from warm import Warm

from featx.store.reader import read_features


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("cli") / "photos", names=("ants", "bees", "wasps"), each=8)


@pytest.fixture(scope="module")
def store(source: Path, featx: Featx) -> Path:
    out = source.parent / "photos.featx"
    ran = featx("extract", source, "--out", out, "--json")
    assert ran.code == 0, ran.err
    summary = ran.json
    assert summary["images"] == summary["embedded"] == 24
    assert (summary["reused"], summary["quarantined"]) == (0, 0)
    assert summary["backbone"] == "efficientnet_lite0"
    assert summary["device"] in ("cpu", "cuda")
    assert summary["precision"] in ("fp32", "bf16", "int8")
    assert summary["engine"] in ("torch", "openvino")
    assert len(summary["fingerprint"]) == 64
    assert summary["seconds"] > 0
    assert summary["images_per_second"] > 0
    return out


@pytest.mark.slow
def test_extract_again_embeds_nothing(source: Path, store: Path, featx: Featx) -> None:
    summary = featx("extract", source, "--out", store, "--json").json
    assert (summary["embedded"], summary["reused"]) == (0, 24)
    ran = featx("extract", source, "--out", store)
    assert ran.out.startswith("24 images: 0 embedded, 24 reused, 0 quarantined")
    assert f"featx sweep {store}" in ran.out


@pytest.mark.slow
def test_info_verify_and_pack(store: Path, tmp_path: Path, featx: Featx) -> None:
    facts = featx("info", store, "--json").json
    assert facts["rows"] == facts["images"] == 24
    assert facts["embedding_dim"] == 1280
    assert facts["layers"] == {"penultimate": 1280}
    assert facts["classes"] == {"ants": 8, "bees": 8, "wasps": 8}
    assert facts["splits"] == {}
    assert (facts["shards"], facts["quarantined"]) == (1, 0)
    assert "ants 8" in featx("info", store).out

    sound = featx("verify", store, "--json").json
    assert sound["sound"] is True
    packed = tmp_path / "photos.h5"
    assert featx("pack", store, packed).code == 0
    assert featx("verify", packed, "--json").json["content_hash"] == sound["content_hash"]
    assert featx("info", packed, "--json").json["classes"] == facts["classes"]
    features = read_features(store)
    with h5py.File(packed) as plain:  # by h5py alone
        assert np.array_equal(plain["embeddings/efficientnet_lite0/penultimate"][()], features.embeddings)
        assert [name.decode() for name in plain["ids"][()]] == features.ids.tolist()
        assert plain["labels"][()].tolist() == features.labels.tolist()
    ran = featx("pack", store, packed)
    assert ran.code == 2
    assert "there is a file of this name already" in ran.err


@pytest.mark.slow
def test_sweep_ranks_heads_and_writes_a_report(store: Path, tmp_path: Path, featx: Featx) -> None:
    arguments = ("sweep", store, "--shots", "1,5", "--episodes", 5, "--out", tmp_path / "report")
    ran = featx(*arguments, "--json", "--n-jobs", 2)
    assert ran.code == 0, ran.err
    found = ran.json
    assert {row["head"] for row in found["results"]} >= {"logreg", "linear_svm", "ridge", "lda", "knn"}
    assert found["winner"] in {row["head"] for row in found["results"]}
    for row in found["results"]:
        assert row["n_shots"] in (1, 5)
        assert row["episodes"] == 5
        assert 0 <= row["accuracy"]["low"] <= row["accuracy"]["mean"] <= row["accuracy"]["high"] <= 1
        assert 0 <= row["balanced_accuracy"] <= 1
        assert row["fit_seconds"] > 0
        assert isinstance(row["params"], dict)
    for pair in found["comparisons"]:
        assert pair["verdict"] in ("better", "worse", "cannot tell")
        assert pair["low"] <= pair["difference"] <= pair["high"]
        assert 0 <= pair["p"] <= 1
    assert found["duplicates"]["exact"] == 0
    files = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"summary.json", "trials.csv", "accuracy_vs_shots.png"} <= files
    saved = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert saved["results"] == found["results"]
    with (tmp_path / "report" / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * len(found["results"])
    other = featx(*arguments[:-3], 4, *arguments[-2:], "--heads", "ridge")
    assert "Note: replaced the report of 2" in other.err and "--out DIR keeps both" in other.err
    assert "replaced the report" not in ran.err
    assert "…" not in featx(*arguments, env={"COLUMNS": "40"}).out  # a terminal may break lines, but no digit is cut
    trials = (tmp_path / "report" / "trials.csv").read_bytes()
    again = featx(*arguments, "--json", "--n-jobs", 1).json
    assert (tmp_path / "report" / "trials.csv").read_bytes() == trials
    with (tmp_path / "report" / "times.csv").open() as file:
        times = list(csv.DictReader(file))
    assert len(times) == len(rows) and all(float(row["fit_seconds"]) >= 0 for row in times)
    strip = [{k: v for k, v in row.items() if k != "fit_seconds"} for row in found["results"]]
    assert strip == [{k: v for k, v in row.items() if k != "fit_seconds"} for row in again["results"]]


@pytest.mark.slow
def test_the_scripts_are_the_commands(source: Path, store: Path, tmp_path: Path) -> None:
    scripts = ROOT / "scripts"
    for script, arguments in (
        ("extract_features.py", [source, "--out", tmp_path / "s.featx"]),
        (
            "sweep_heads.py",
            [store, "--shots", "2", "--heads", "logreg,knn", "--episodes", "3", "--out", tmp_path / "r"],
        ),
    ):
        command = [sys.executable, str(scripts / script), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip()
    assert (tmp_path / "r" / "summary.json").exists()


@pytest.mark.slow
def test_test_images_take_no_part_in_choosing(tmp_path: Path, featx: Featx) -> None:
    class_folders(tmp_path / "photos" / "train", each=6)
    class_folders(tmp_path / "photos" / "val", each=2, first=30)
    class_folders(tmp_path / "photos" / "test", each=6, first=50)
    store = tmp_path / "s.featx"
    assert featx("extract", tmp_path / "photos", "--out", store).code == 0
    assert featx("info", store, "--json").json["splits"] == {"test": 12, "train": 12, "val": 4}
    ran = featx("sweep", store, "--shots", "2", "--heads", "knn", "--episodes", "3", "--json")
    assert "the split test (12 images) is left out" in ran.err
    assert "draws are made from train and val together" in ran.err
    assert ran.json["images"] == 16


@pytest.mark.slow
def test_awkward_images_end_with_exit_code_3(source: Path, tmp_path: Path, featx: Featx) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(source, photos)
    expected = bad_images(photos / "ants")
    store = tmp_path / "s.featx"
    ran = featx("extract", photos, "--out", store, "--json")
    assert ran.code == 3, ran.err
    assert (ran.json["images"], ran.json["embedded"], ran.json["quarantined"]) == (32, 29, 3)
    lines = [json.loads(line) for line in (store / "quarantine.jsonl").read_text().splitlines()]
    assert {line["id"]: line["reason"] for line in lines} == {f"ants/{k}": v for k, v in expected.items()}
    assert all(line["message"] and len(line["digest"]) == 64 for line in lines)
    assert "ants/text.jpg: not_an_image" in ran.err
    again = featx("extract", photos, "--out", store)
    assert again.code == 3 and "Next: featx sweep" in again.out, "a bad photo does not end the way"
    assert featx("extract", photos, "--out", store, "--max-bad", 0).code == 4


@pytest.mark.slow
def test_a_messy_folder_is_told_apart(tmp_path: Path, featx: Featx, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsorted photos, other files, and an iPhone's format, not read here, for more than half of the images."""
    for name, value in without("pillow_heif", tmp_path).items():
        monkeypatch.setenv(name, value)
    photos, store = (
        class_folders(tmp_path / "photos", ("ants", "bees", "unsorted", "_new"), each=3),
        tmp_path / "s.featx",
    )
    for name in ("Thumbs.db", "bees/notes.txt", "list.xlsx", "z.txt"):
        (photos / name).write_text("x")
    for number in range(14):
        (photos / "ants" / f"IMG_{number}.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic%d" % number)
    (photos / "ants" / "bad.jpg").write_text("no image")
    ran = featx("extract", photos, "--out", store, "--json")
    assert ran.code == 3, ran.err
    assert (ran.json["embedded"], ran.json["quarantined"], ran.json["unlabelled"]) == (12, 15, 0)
    assert ran.json["classes"] == {"_new": 3, "ants": 3, "bees": 3, "unsorted": 3}
    notes = "\n".join(ran.json["notes"])
    assert "skipped 4 files that are not images (Thumbs.db, bees/notes.txt, list.xlsx, ...)" in notes
    assert "14 images left out for the format, such as ants/IMG_0.HEIC: HEIC, the iPhone's format" in notes
    assert "'unsorted' is taken for a class" in notes and "--unlabelled _new" in notes
    assert ran.err.count("  refused ") == 1 and "refused ants/bad.jpg: not_an_image" in ran.err
    assert "4 classes: _new 3, ants 3, bees 3, unsorted 3." in ran.err
    lines = [json.loads(line) for line in (store / "quarantine.jsonl").read_text().splitlines()]
    assert sum(line["reason"] == "unsupported_format" for line in lines) == 14
    named = ("--unlabelled", "unsorted", "--unlabelled", "_new")
    ran = featx("extract", photos, "--out", store, *named)
    assert "2 classes: ants 3, bees 3; 6 without a label." in ran.out and "is taken for" not in ran.err
    told = featx("info", store, "--json").json
    assert (told["classes"], told["unlabelled"]) == ({"ants": 3, "bees": 3}, 6)
    mistake(
        featx("extract", photos, "--out", store, "--unlabelled", "Unsorted"), 2, "no class of this name",
        "found Unsorted. Did you mean unsorted?",
    )  # fmt: skip
    mistake(
        featx("extract", photos, "--out", store, *named, "--unlabelled", "ants"), 2, "only one class is left", "bees"
    )
    # The same in parts; the command that finishes them is told with the names.
    parts = tmp_path / "p.featx"
    for part in ("1/2", "2/2"):
        ran = featx("extract", photos, "--out", parts, *named, "--part", part)
        assert ran.code in (0, 3), ran.err
    ran = featx("extract", photos, "--out", parts, *named, "--finish", "--json")
    assert (ran.code, ran.json["unlabelled"]) == (3, 6)
    assert any("14 images left out for the format" in note for note in ran.json["notes"])
    # Another folder in the same store.
    others = class_folders(tmp_path / "others", ("cats", "dogs"), each=2, first=50)
    mistake(
        featx("extract", others, "--out", store), 2, "would replace other labelled images", "6 of 6 labelled images",
        "--replace",
    )  # fmt: skip
    mistake(featx("extract", others, "--out", store, "--finish"), 2, "no parts")
    assert featx("info", store, "--json").json["classes"] == {"ants": 3, "bees": 3}
    assert featx("extract", others, "--out", store, "--replace").code == 0
    assert featx("info", store, "--json").json["classes"] == {"cats": 2, "dogs": 2}


@pytest.mark.slow
def test_a_copy_without_a_label_is_no_wrong_label(tmp_path: Path, featx: Featx) -> None:
    photos, store = class_folders(tmp_path / "photos", ("ants", "bees", "unsorted"), each=6), tmp_path / "s.featx"
    shutil.copy(photos / "ants" / "000.png", photos / "unsorted" / "copy.png")
    assert featx("extract", photos, "--out", store, "--unlabelled", "unsorted").code == 0
    found = featx("duplicates", store, "--json").json
    assert (found["exact"], found["conflicting_labels"]) == (1, 0)
    ran = featx("advise", store, "--minutes", "0.3", "--next", "7", "--json")
    assert ran.code == 0, ran.err
    listed = {each["id"] for each in ran.json["label_next"]}
    assert len(listed) == 6 and "unsorted/copy.png" not in listed
    for jobs in (0, 100_000):
        assert featx("sweep", store, "--n-jobs", jobs).code == 2


def mistake(ran: object, code: int, *words: str) -> None:
    """One sentence on stderr, nothing else, and the exit code."""
    assert getattr(ran, "code") == code, ran  # noqa: B009 - any Ran
    text = getattr(ran, "err")  # noqa: B009
    assert text.startswith("Error: "), text
    assert text.count("\n") == 1, text
    for word in words:
        assert word in text


@pytest.mark.slow
def test_mistakes_end_with_one_sentence_and_exit_code_2(
    source: Path, store: Path, tmp_path: Path, featx: Featx
) -> None:
    out = tmp_path / "new.featx"
    (tmp_path / "empty").mkdir()
    class_folders(tmp_path / "single", names=("ants",))
    mistake(featx("extract", tmp_path / "nowhere", "--out", out), 2, "nowhere: no such folder or file")
    mistake(featx("extract", tmp_path / "empty", "--out", out), 2, "no images in this folder")
    mistake(featx("extract", tmp_path / "single", "--out", out), 2, "only one class folder", "at least two folders")
    mistake(featx("extract", source, "--out", out, "--backbone", "resnet81"), 2, "resnet81", "Did you mean resnet18")
    mistake(featx("extract", source, "--out", source / "s.featx"), 2, "inside the folder of images")
    mistake(featx("extract", store, "--out", out), 2, "this is a store already", f"featx sweep {store}")
    mistake(featx("extract", source, "--out", tmp_path / "empty" / "x" / "s.featx", "--layer", "nolayer"), 2, "nolayer")
    mistake(featx("extract", source, "--out", store, "--weights", "none"), 2, "another weights_sha256")
    mistake(featx("extract", source, "--out", tmp_path), 2, "a folder with other things in it")
    mistake(featx("extract", source, "--out", out, "--device", "cuda"), 2, "no CUDA device")
    (tmp_path / "nowhere.featx").write_text("notes")  # no store, so nothing to suggest
    none = featx("sweep", tmp_path / "nowher.featx")
    mistake(none, 2, "no such store", "featx extract FOLDER --out STORE")
    assert "Did you mean" not in none.err
    mistake(featx("sweep", tmp_path / "nowhere"), 2, "no such store")
    mistake(featx("sweep", store, "--shots", "1,30"), 2, "too few images", "expected at least", "found 8")
    mistake(featx("sweep", store, "--shots", "many"), 2, "--shots cannot be read")
    mistake(featx("sweep", store, "--heads", "logrge"), 2, "logrge", "logreg")
    mistake(featx("sweep", store, "--layer", "penultima"), 2, "no layer 'penultima'", "Did you mean penultimate?")
    mistake(featx("info", source), 2, "not a featx store: it has no manifest.json", f"featx extract {source} --out")
    photo = next(source.rglob("*.png"))
    mistake(featx("search", photo, store), 2, f"{photo}: this file was not made by featx. To make a store")
    mistake(featx("info", Path(__file__)), 2, "test_cli.py")
    mistake(featx("pack", store, tmp_path / "no" / "x.h5"), 2, "no such folder")


@pytest.mark.slow
def test_only_files_of_featx_are_replaced(source: Path, store: Path, tmp_path: Path, featx: Featx) -> None:
    model = tmp_path / "kept.model"
    assert featx("fit", store, "--head", "ridge", "--out", model).code == 0
    mistake(featx("sweep", model), 2, "kept.model: this is a model, not a store.")
    photo = tmp_path / "my photo.png"
    shutil.copy(next(source.rglob("*.png")), photo)
    before = photo.read_bytes()
    commands: dict[str, tuple[object, ...]] = {
        "fit": ("fit", store, "--head", "ridge", "--out"),
        "joblib": ("export", model, "--format", "joblib", "--out"),
        "skops": ("export", model, "--format", "skops", "--out"),
        "onnx": ("export", model, "--format", "onnx", "--out"),
        "alike": ("search", store, photo, "--html"),
        "copies": ("duplicates", store, "--html"),
        "advice": ("advise", store, "--minutes", 0.05, "--out"),
        "tuned": ("finetune", store, source, "--out"),
        "code": ("autoencoder", source, "--epochs", 1, "--size", 16, "--out"),
    }
    for command in commands.values():
        mistake(featx(*command, photo), 2, "there is a file of this name already, and featx did not")
    assert photo.read_bytes() == before
    for name, command in commands.items():
        if name in ("tuned", "copies", "advice"):  # the same kinds of files as those of fit and of search
            continue
        for _ in range(2):  # made, and made again
            ran = featx(*command, tmp_path / f"{name} 1")
            assert ran.code == 0, (name, ran.err)
    assert f"Next: featx predict '{tmp_path / 'fit 1'}' photo.jpg" in featx(*commands["fit"], tmp_path / "fit 1").out
    mistake(featx(*commands["fit"], tmp_path), 2, "a folder is in the way")
    mistake(featx(*commands["fit"], tmp_path / "no" / "x.model"), 2, "no such folder")
    assert featx(*commands["joblib"], tmp_path / "j", "--json").json["format"] == "joblib"


@pytest.mark.slow
def test_a_store_with_one_class_cannot_be_swept(tmp_path: Path, featx: Featx) -> None:
    folder = class_folders(tmp_path / "photos", names=("ants",)) / "ants"
    assert featx("extract", folder, "--out", tmp_path / "s.featx").code == 0  # unlabelled: fine for retrieval
    mistake(featx("sweep", tmp_path / "s.featx"), 2, "class")


def test_mistakes_are_json_too(tmp_path: Path, featx: Featx) -> None:
    for arguments in (
        ("info", tmp_path / "nowhere", "--json"),
        ("verify", tmp_path / "nowhere", "--json"),
        ("extract", "--json"),
        ("backbones", "--json", "--jsn"),
    ):
        ran = featx(*arguments)
        assert ran.code == 2
        assert set(ran.json) == {"error", "exit_code"}


def test_no_permission_to_write(source: Path, tmp_path: Path, featx: Featx) -> None:
    if os.geteuid() == 0:  # root may write anywhere but in the kernel's own folders
        if not Path("/sys/kernel").is_dir():
            pytest.skip("root may write anywhere here")
        out = Path("/sys/kernel/photos.featx")
    else:
        (tmp_path / "locked").mkdir(mode=0o555)
        out = tmp_path / "locked" / "photos.featx"
    mistake(featx("extract", source, "--out", out), 2, "no permission to write", "another folder")


def test_usage_errors_suggest(featx: Featx) -> None:
    ran = featx("sweeep", "x")
    assert ran.code == 2
    assert "Did you mean 'sweep'" in ran.err
    ran = featx("extract", "photos", "--out", "x", "--recipe", "fasst")
    assert "Invalid value for '--recipe': 'fasst' is not one of 'fast'" in ran.err
    assert featx("extract").code == 2
    assert featx("extract", "x", "--out", "y", "--precision", "fp8").code == 2


@pytest.mark.slow
def test_help_is_quick_and_names_every_command(featx: Featx) -> None:
    ran = featx("--help")
    assert ran.code == 0
    for name in ("demo", "labels", "backbones", "extract", "info", "verify", "pack", "sweep"):
        assert name in ran.out
        help_of = featx(name, "--help")
        assert help_of.code == 0
        assert "Example" in help_of.out
    assert featx("--version").out.startswith("featx ")


def test_backbones_lists_the_offline_default(featx: Featx) -> None:
    rows = {row["name"]: row for row in featx("backbones", "--json").json["backbones"]}
    assert rows["efficientnet_lite0"]["offline"] is True
    assert rows["efficientnet_lite0"]["embedding_dim"] == 1280
    assert rows["resnet50"]["embedding_dim"] == 2048
    assert all({"name", "embedding_dim", "parameters", "licence", "offline"} <= set(row) for row in rows.values())
    assert "efficientnet_lite0" in featx("backbones").out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_extraction_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, warm: Warm, featx: Featx
) -> None:
    source = class_folders(tmp_path / "photos", each=150)
    store = tmp_path / "s.featx"
    process = warm.begin(["extract", str(source), "--out", str(store)])
    deadline = time.monotonic() + 60
    while not (store / "manifest.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.4)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Run the same command again to go on" in err
    assert "Traceback" not in err
    assert not list(store.rglob(".tmp-*"))
    done = featx("extract", source, "--out", store, "--json").json
    assert done["embedded"] + done["reused"] == 300


@pytest.mark.slow
def test_a_stopped_sweep_prints_what_is_known(store: Path, tmp_path: Path, warm: Warm) -> None:
    out = tmp_path / "report"
    process = warm.begin(["sweep", str(store), "--episodes", "10000", "--out", str(out), "--n-jobs", "1"])
    deadline = time.monotonic() + 60
    while not (out / "journal.jsonl").exists() or len((out / "journal.jsonl").read_bytes().splitlines()) < 20:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert re.search(r"Provisional: [\d,]+ of [\d,]+ draws are done", " ".join(text.split()))
    assert "provisional: 2 of" in " ".join(err.split())
    assert "finished draws are kept" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_sweep_stops_when_its_time_is_up(store: Path, tmp_path: Path, featx: Featx) -> None:
    out = tmp_path / "report"
    ran = featx("sweep", store, "--episodes", "10000", "--out", out, "--n-jobs", "1", "--seconds", "1", "--json")
    assert sum(ran.json["missing"].values()) > 0
    assert "provisional:" not in ran.err
    assert {row["episodes"] for row in ran.json["results"] if row["n_shots"] == 1} < set(range(2, 10_000))
    assert (out / "journal.jsonl").exists()
    assert json.loads((out / "summary.json").read_bytes())["missing"] == ran.json["missing"]


@pytest.mark.parametrize("word", ["ImportError", "RuntimeError"])
def test_ctrl_c_while_something_is_imported(word: str, tmp_path: Path, featx: Featx) -> None:
    """An extension module makes an error of its own of the KeyboardInterrupt that comes in its initialisation."""
    class_folders(tmp_path / "photos")
    (tmp_path / "own.py").write_text(
        "import os, signal, time\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(9)\n"
        "except KeyboardInterrupt as error:\n"
        f"    raise {word}('initialization failed') from error\n"
    )
    ran = featx("extract", "photos", "--out", "s.featx", "--backbone", "own.py:Net", cwd=tmp_path)
    mistake(ran, 130, "interrupted; run the same command again")


def test_a_crash_in_native_code_says_where(tmp_path: Path, featx: Featx) -> None:
    class_folders(tmp_path / "photos")
    (tmp_path / "own.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    ran = featx("extract", "photos", "--out", "s.featx", "--backbone", "own.py:Net", cwd=tmp_path)
    assert ran.code == -signal.SIGSEGV
    assert re.search(r'^Fatal Python error: Segmentation fault\n.*own\.py", line 2', ran.err, re.DOTALL)


def test_output_into_a_closed_pipe_is_no_error(store: Path) -> None:
    command = f"{sys.executable} -m featx info {store} --json | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 1, 141)  # whoever notices first


@pytest.mark.slow
def test_photos_of_ants_and_bees(photos: Path, tmp_path: Path, featx: Featx) -> None:
    store = tmp_path / "h.featx"
    assert featx("extract", photos / "hymenoptera", "--out", store, "--json").json["embedded"] == 397
    found = featx("sweep", store, "--shots", "5", "--heads", "logreg,linear_svm,knn", "--json").json
    best = next(row for row in found["results"] if row["head"] == found["winner"])
    assert best["accuracy"]["mean"] > 0.90


def test_pictures_are_really_different() -> None:
    assert not np.array_equal(np.asarray(picture(1)), np.asarray(picture(2)))
