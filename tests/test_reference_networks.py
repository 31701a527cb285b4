"""Networks that generated images are scored with: the network of FID, features of classifiers, and the CLIP score."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fieldguide
import pictures
from fieldguide.automl.callbacks import NullCallback
from fieldguide.checkpoints import weights
from fieldguide.core.card import OPENAI
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.convolutional.inception_v3 import Config, InceptionV3
from fieldguide.models.registry import create
from fieldguide.tasks.vision.reference_networks import CaptionScorer, FeatureNetwork
from test_task_captions import folder
from test_zero_shot import clip_folder
from tv import torchvision, transformers

inception = torchvision.models.inception


class FidNetwork(nn.Module):
    """torchvision's network with the pooling of TensorFlow's network of 2015: averages do not count padding, and the last block
    takes maxima."""

    def __init__(self, peer: nn.Module):
        super().__init__()
        self.peer, self.is_last = peer, False
        peer.Mixed_7c.register_forward_pre_hook(lambda *_: setattr(self, "is_last", True))

    def pool(self, x, kernel_size, stride, padding):
        if self.is_last:
            return F.max_pool2d(x, kernel_size, stride, padding)
        return F.avg_pool2d(x, kernel_size, stride, padding, count_include_pad=False)

    def forward(self, x):
        self.is_last = False
        functions = SimpleNamespace(avg_pool2d=self.pool, max_pool2d=F.max_pool2d, relu=F.relu)
        with mock.patch.object(inception, "F", functions):
            return self.peer(x)


def test_pooling_of_the_network_of_fid():
    torch.manual_seed(0)
    mine = InceptionV3(Config(shrink=16, tensorflow=True, num_classes=7, dropout=0.0)).double().eval()
    theirs = pictures.torchvision_inception_v3(mine).double().eval()
    for layer in theirs.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.2)
            layer.running_var.uniform_(0.5, 2)
    assert weights.load(mine, theirs.state_dict(), "torchvision") == []
    x = torch.randn(2, 3, 139, 107, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mine(x), FidNetwork(theirs)(x), rtol=1e-10, atol=1e-12)
        assert not torch.allclose(mine(x), theirs(x), rtol=1e-4)  # the difference is seen


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Return the folder of a small ResNet that reads images of 24 pixels."""
    path = tmp_path_factory.mktemp("resnet")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=5, downsample_in_first_stage=False
    )
    torch.manual_seed(1)
    transformers.ResNetForImageClassification(config).save_pretrained(path)
    transformers.ConvNextImageProcessor(size={"shortest_edge": 24}, crop_pct=1.0).save_pretrained(path)
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_features_equal_those_of_transformers(classifier, channels):
    made = torch.rand(5, channels, 24, 24) * 2 - 1
    pixels = ((made + 1) * 127.5).round().byte().expand(-1, 3, -1, -1)
    processor = transformers.ConvNextImageProcessor.from_pretrained(classifier)
    peer = transformers.ResNetForImageClassification.from_pretrained(classifier).eval()
    with torch.no_grad():
        want = peer.resnet(processor(list(pixels), return_tensors="pt")["pixel_values"]).pooler_output.flatten(1)
    found = FeatureNetwork.load(str(classifier)).extract(made)
    np.testing.assert_allclose(found, want.double().numpy(), rtol=1e-4, atol=1e-5)


def test_images_are_enlarged_for_the_network(classifier):
    network, small = FeatureNetwork.load(str(classifier)), torch.rand(2, 3, 12, 12) * 2 - 1
    assert network.extract(small).shape == (2, 12)
    flat = torch.full((1, 3, 6, 6), 0.25)
    np.testing.assert_allclose(network.extract(flat), network.extract(torch.full((1, 3, 24, 24), 0.25)), rtol=1e-5)


def test_a_run_keeps_its_preprocessing(digits_run):
    network, own = FeatureNetwork.load(str(digits_run.path)), digits_run.task.pictures
    assert network.transform.side == own.side and network.transform.mean == pytest.approx(own.mean, rel=1e-4)
    with pytest.raises(SettingsError, match="no linear head"):
        network.extract(torch.zeros(1, 1, own.side, own.side))


def test_clip_score_equals_transformers(tmp_path):
    path = tmp_path / "clip"
    clip_folder(path)
    scorer = CaptionScorer.load(str(path))
    side = scorer.task.pictures.side
    made, said = torch.rand(4, 3, side, side) * 2 - 1, ["a cat", "two dogs on a sofa", "a cat", "red"]
    peer, words = (
        transformers.CLIPModel.from_pretrained(path).eval(),
        transformers.PreTrainedTokenizerFast.from_pretrained(path),
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in OPENAI)
    pixels = (((made + 1) * 127.5).round() / 255 - mean) / std
    with torch.no_grad():
        out = peer(**words(said, return_tensors="pt", padding=True), pixel_values=pixels)
    want = 100 * (out.image_embeds * out.text_embeds).sum(1).clamp(min=0)
    np.testing.assert_allclose(scorer.score(made, said), want.numpy(), rtol=1e-3, atol=1e-3)


def test_sources_that_cannot_score(classifier, tmp_path):
    with pytest.raises(SettingsError, match="'inception-v9' is no size"):
        FeatureNetwork.load("inception-v9=weights.pth")
    with pytest.raises(WeightsError, match="does not exist"):
        FeatureNetwork.load(str(tmp_path / "nothing.pth"))
    with pytest.raises(WeightsError, match="embeds images and texts is needed"):
        CaptionScorer.load(str(classifier))
    weights.save(create("bert-test"), tmp_path / "bert.safetensors", format="fieldguide")
    with pytest.raises(SettingsError, match="bert is no image classifier"):
        FeatureNetwork.load(f"bert-test={tmp_path / 'bert.safetensors'}")


@pytest.mark.slow
def test_fit_scores_with_named_networks(classifier, tmp_path):
    clip_folder(tmp_path / "clip")
    settings = {"steps": 2, "batch": 16, "precision": "float32", "model.dim": 8, "model.words": 8}
    named = {"task.features": str(classifier), "task.clip": str(tmp_path / "clip")}
    data = folder(tmp_path / "data", 2)
    with pytest.raises(WeightsError, match="gone"):  # before anything is trained
        options = {"task": "image-generation", "out": tmp_path / "none", "callback": NullCallback()}
        fieldguide.fit(data, settings={**settings, "task.features": str(tmp_path / "gone")}, **options)
    run = fieldguide.fit(
        data, task="image-generation", out=tmp_path / "run", callback=NullCallback(), settings={**settings, **named}
    )
    found = run.record["scores"]
    for name in ("reference_distance", "clip_score"):
        low, high = found["intervals"][name]
        assert low <= run.scores[name] <= high and np.isfinite(run.scores[name])
    copies = {b["name"]: b["scores"] for b in found["baselines"]}["training images"]
    assert copies["reference_distance"] < run.scores["reference_distance"]
    again = fieldguide.open_run(run.path).evaluate(data)["scores"]
    assert again["reference_distance"] == pytest.approx(run.scores["reference_distance"], rel=1e-3)
