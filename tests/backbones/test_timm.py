"""timm's models: their own embedding and preprocessing, and the hub that their weights come from."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from PIL import Image

from featx.backbones import hub, timm as timm_models
from featx.backbones.backbone import load_backbone
from featx.errors import UsageError, WeightsError
from featx.images.pixels import Preprocess

pytestmark = pytest.mark.usefixtures("one_thread")


# timm


def test_timm_models_have_timms_own_embedding() -> None:
    backbone = load_backbone("timm:resnet10t", weights="none", layers=["penultimate", "layer2"])
    network = backbone.network()
    images = torch.randn(2, 3, 176, 176)
    pooled, second = network(images)
    body: Any = network.body
    torch.testing.assert_close(pooled, body.forward_head(body.forward_features(images), pre_logits=True))
    assert (pooled.shape, second.shape) == ((2, 512), (2, 128))
    assert backbone.preprocess == Preprocess(201, (176, 176), "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_timm_own_weights_file_is_loaded_in_timms_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    model: Any = timm.create_model("resnet10t", num_classes=1000)
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    monkeypatch.setattr(timm_models, "in_hub_cache", lambda *args: path)
    backbone = load_backbone("timm:resnet10t")
    assert backbone.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    images = torch.randn(1, 3, 176, 176)
    with torch.no_grad():
        logits = model.eval()(images)
        torch.testing.assert_close(model.get_classifier()(backbone.network()(images)[0]), logits)


@pytest.mark.parametrize(
    "name", ["resnet10t", "eva02_base_patch14_448.mim_in22k_ft_in22k_in1k", "vit_base_patch16_224"]
)
def test_timm_preprocessing_is_timms_own(name: str) -> None:
    # Against the transform that timm builds, on an image whose sides differ.
    import timm.data

    from featx.images.pixels import resize_crop

    data: Any = timm.data
    model = timm_models.find(f"timm:{name}")
    transform = data.create_transform(**data.resolve_data_config(pretrained_cfg=dict(model.config)))
    noise = torch.randint(0, 256, (9, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.numpy()).resize((700, 500), Image.Resampling.BICUBIC)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.preprocess.mean, model.preprocess.std))
    ours = (torch.from_numpy(resize_crop(image, model.preprocess).copy()).permute(2, 0, 1) / 255 - mean) / std
    difference = (ours - transform(image)).abs()
    assert difference.max() < 3 / 255 / 0.2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"crop_mode": "border"}, "found border"),
        ({"interpolation": "hamming"}, "hamming"),
        ({"input_size": (3, 128, 256)}, "found center 128x256"),
    ],
)
def test_timm_preprocessing_that_featx_does_not_have(changes: dict[str, Any], says: str) -> None:
    data = {"input_size": (3, 224, 224), "crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic"}
    with pytest.raises(UsageError, match=says):
        timm_models.preprocess({**data, "mean": (0.5,) * 3, "std": (0.5,) * 3, **changes}, "timm:x")


def test_timm_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"timm:resnet10t: the weights are not on this machine .*--weights FILE"):
        load_backbone("timm:resnet10t")
    with pytest.raises(WeightsError, match="no pretrained weights"):
        load_backbone("timm:efficientnet_b8")


class Hub(BaseHTTPRequestHandler):
    """A hub that has one of the two files that timm looks for."""

    content = b"not looked at here"

    def do_HEAD(self) -> None:
        there = self.path == "/timm/resnet10t.c3_in1k/resolve/main/pytorch_model.bin"
        self.send_response(200 if there else 404)
        if there:
            self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(self.content) if there else 0))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def use_hub(monkeypatch: pytest.MonkeyPatch, port: int, cache: Path) -> None:
    endpoint = f"http://127.0.0.1:{port}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the hub's own client keeps its connections
def test_timm_weights_are_fetched_once_by_the_name_that_the_hub_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            use_hub(monkeypatch, server.server_port, tmp_path)
            said: list[str] = []
            steps: list[tuple[int, int, str]] = []
            timm_models.find("timm:resnet10t").fetch(advance=lambda *step: steps.append(step))
            (tmp_path / "models--timm--resnet10t.c3_in1k").rename(tmp_path / "before")
            backbone = load_backbone("timm:resnet10t", progress=said.append)
        finally:
            server.shutdown()
            thread.join()
    assert backbone.weights_sha256 == hashlib.sha256(Hub.content).hexdigest()
    assert said == ["downloading timm/resnet10t.c3_in1k from the Hugging Face hub"]
    assert steps[-1] == (len(Hub.content), len(Hub.content), "timm:resnet10t")
    assert load_backbone("timm:resnet10t", progress=said.append) == backbone  # from the cache: the hub is gone
    assert len(said) == 1


@pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
def test_a_hub_that_is_not_there_is_not_waited_for(
    silent: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hub, "HUB_SECONDS", 0.3)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if silent:
            listener.listen()
        use_hub(monkeypatch, listener.getsockname()[1], tmp_path)
        started = time.perf_counter()
        with pytest.raises(WeightsError, match=r"cannot be downloaded \(.*(refused|timed out).*\).*--weights FILE"):
            load_backbone("timm:resnet10t")
        assert time.perf_counter() - started < 5  # huggingface_hub alone takes 25 seconds
