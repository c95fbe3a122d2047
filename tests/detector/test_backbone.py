"""Backbones: what they are built of, what is frozen, and where their weights come from."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.models import get_model_weights, resnet18

from detector.config import ConfigError, ModelConfig
from detector.model import weights as weights_module
from detector.model.backbone import _build_resnet, build_backbone
from detector.model.weights import pretrained_weights


def model_config(**changes) -> ModelConfig:
    return replace(ModelConfig(backbone="resnet18"), **changes)


@pytest.mark.parametrize(
    ("name", "parameters", "grouped"),
    [
        ("resnet50", 25_557_032, (64, 64, 3, 3)),
        ("resnet101", 44_549_160, (64, 64, 3, 3)),
        ("resnext101_32x4d", 44_177_704, (128, 4, 3, 3)),  # Xie et al. 2017: 44.2 million
        ("resnext101_32x8d", 88_791_336, (256, 8, 3, 3)),
        ("resnext101_64x4d", 83_455_272, (256, 4, 3, 3)),
    ],
)
def test_network_has_the_published_size(name, parameters, grouped):
    with torch.device("meta"):
        resnet = _build_resnet(name, nn.BatchNorm2d)
    assert sum(value.numel() for value in resnet.parameters()) == parameters
    assert tuple(resnet.layer1[1].conv2.weight.shape) == grouped
    assert [len(stage) for stage in (resnet.layer1, resnet.layer2, resnet.layer4)] == [3, 4, 3]


def test_frozen_stages_are_the_first_ones():
    backbone = build_backbone(model_config(weights="none", norm="gn", trainable_stages=2))
    frozen = {key.split(".")[1] for key, value in backbone.named_parameters() if not value.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1", "layer2"}


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_weights_from_a_file_are_loaded_and_checked(tmp_path, wrapper):
    source, file = resnet18(), tmp_path / "resnet18.pt"
    state = source.state_dict()
    torch.save({wrapper: state, "epoch": 90} if wrapper else state, file)
    backbone = build_backbone(model_config(weights=str(file)))
    assert torch.equal(backbone.body.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    assert torch.equal(backbone.body.bn1.running_var, source.bn1.running_var)
    with pytest.raises(ValueError, match=r"resnet18.pt does not fit"):
        build_backbone(replace(model_config(weights=str(file)), backbone="resnet50"))


def test_files_that_are_no_weights_are_named(tmp_path):
    (tmp_path / "text.pt").write_text("not a checkpoint", encoding="utf-8")
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    for name, message in (("text.pt", "cannot be read as weights"), ("epoch.pt", "holds no state dict")):
        with pytest.raises(ConfigError, match=message) as raised:
            build_backbone(model_config(weights=str(tmp_path / name)))
        assert str(tmp_path / name) in str(raised.value)


def test_names_that_mean_no_weights_are_refused_with_those_that_do():
    with pytest.raises(ConfigError, match=r"'IMAGENET1K_V3' is no file.*imagenet, IMAGENET1K_V1, IMAGE"):
        pretrained_weights("resnet50", "IMAGENET1K_V3")
    with pytest.raises(ConfigError, match="publishes no weights for resnext101_32x4d"):
        pretrained_weights("resnext101_32x4d", "imagenet")


class Published:
    """Stands for torchvision's weights of resnet18, at an address of ours."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get_state_dict(self, **arguments):
        return torch.hub.load_state_dict_from_url(self.url, **arguments)


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """Where downloads go; no proxy stands between, and nobody waits for long."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for key in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(weights_module, "ANSWER_TIMEOUT_S", 0.5)
    monkeypatch.setattr(weights_module, "DOWNLOAD_TIMEOUT_S", 0.5)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    """Answers GET with the first half of a file and then nothing; `silent` for not even HEAD."""
    state = SimpleNamespace(silent=False, questions=0, released=threading.Event())

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            state.questions += 1
            if state.silent:
                state.released.wait(20)
            self.send_response(200)
            self.end_headers()

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(bytes(500_000))
            state.released.wait(20)

        def log_message(self, *arguments) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{listening.server_port}/resnet18-f37072fd.pth"
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield state
    state.released.set()
    listening.shutdown()
    listening.server_close()


@pytest.mark.parametrize("silent", [True, False])
def test_a_server_that_falls_silent_ends_in_a_message_not_a_hang(monkeypatch, cache, server, silent):
    server.silent = silent
    monkeypatch.setattr(
        weights_module, "_published", lambda backbone: {"IMAGENET1K_V1": Published(server.url)}
    )
    start = time.monotonic()
    with pytest.raises(ConfigError, match="cannot get the ImageNet weights of resnet18") as raised:
        build_backbone(model_config())
    assert time.monotonic() - start < 10
    for help_ in (server.url, str(cache / "resnet18-f37072fd.pth"), "model.weights=none"):
        assert help_ in str(raised.value)
    assert ("no answer within 0.5 s" in str(raised.value)) is silent


def test_a_name_lookup_that_never_ends_is_not_waited_for(monkeypatch, cache):
    never = threading.Event()

    def look_up(*arguments, **options):
        never.wait(20)
        raise OSError("the test is over")

    monkeypatch.setattr(urllib.request, "urlopen", look_up)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"no answer within 0\.5 s"):
        pretrained_weights("resnet50", "IMAGENET1K_V2")
    assert time.monotonic() - start < 10
    never.set()


def test_a_file_in_the_cache_is_taken_without_asking(monkeypatch, cache):
    source = resnet18()
    name = Path(get_model_weights("resnet18")["IMAGENET1K_V1"].url).name
    torch.save(source.state_dict(), cache / name)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *arguments, **options: pytest.fail("asked"))
    backbone = build_backbone(model_config())
    assert torch.equal(backbone.body.layer3[0].conv1.weight, source.layer3[0].conv1.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "none", "norm": "frozen_bn"}, "cannot learn"),
        ({"weights": "imagenet", "norm": "gn"}, "no pretrained weights"),
    ],
)
def test_norms_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_backbone(model_config(**changes))
