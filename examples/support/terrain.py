"""A real trained diffusion network without a model hub: a one-step consistency UNet of terrain, out
of a wheel from PyPI.

The weights (10 M parameters, 28 attention layers, MIT) lie as ONNX in
``adaptive-terrain-diffusion==0.4.2`` and load into diffusers' ``UNet2DModel``: noise in, a height
map out, at any size that is a multiple of 16 pixels.
"""

import zipfile
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from .wheels import fetch

WHEEL = "adaptive_terrain_diffusion-0.4.2-py3-none-any.whl"
SHA256 = "dd803be2c98d764e4e64db18c631eef46c210282b398c4dd080f4cda3fa7c84d"
GRAPH = "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"
SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5
LEVELS, LAYERS = (
    5,
    4,
)  # resolutions of the UNet and residual blocks in each; the three lowest have attention
# our names of the parts of a residual block, and the graph's
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}


class TerrainNet(nn.Module):
    """The network with the scalings that its training gave it.

    Attributes:
        unet: ``diffusers.UNet2DModel``.
        label: embeds the difficulty of the terrain.

    Source: Karras et al. 2022 (arXiv 2206.00364), consistency models (arXiv 2303.01469).
    """

    def __init__(self):
        super().__init__()
        attention, plain = "Attn{}Block2D", "Resnet{}sampleBlock2D"
        self.unet = UNet2DModel(
            sample_size=128,
            in_channels=1,
            out_channels=1,
            layers_per_block=LAYERS,
            block_out_channels=(32, 32, 64, 96, 128),
            down_block_types=(plain.format("Down"),) * 2 + (attention.format("Down"),) * 3,
            up_block_types=(attention.format("Up"),) * 3 + (plain.format("Up"),) * 2,
            resnet_time_scale_shift="scale_shift",
            attention_head_dim=32,
            norm_num_groups=32,
            attn_norm_num_groups=32,
            norm_eps=1e-5,
            downsample_type="resnet",
            upsample_type="resnet",
            flip_sin_to_cos=True,
            freq_shift=0,
            class_embed_type="identity",
        )
        self.label = nn.Sequential(nn.Linear(1, 128), nn.SiLU(), nn.Linear(128, 128))

    def inputs(self, noisy: Tensor, sigma: float, difficulty: float = 0.5) -> dict[str, Tensor]:
        """What the UNet takes for a noisy height map (B, 1, H, W)."""
        batch = noisy.shape[0]
        sigmas = torch.full((batch,), sigma, dtype=noisy.dtype, device=noisy.device)
        return {
            "sample": noisy / (sigma**2 + SIGMA_DATA**2) ** 0.5,
            "timestep": 250 * sigmas.log(),
            "class_labels": self.label(torch.full_like(sigmas, difficulty)[:, None]),
        }

    def forward(self, noisy: Tensor, sigma: float, difficulty: float = 0.5) -> Tensor:
        """Height map (B, 1, H, W) in [-1, 1] from a map with noise of standard deviation
        ``sigma``."""
        out = self.unet(**self.inputs(noisy, sigma, difficulty)).sample
        beyond = sigma - SIGMA_MIN
        kept = SIGMA_DATA**2 / (beyond**2 + SIGMA_DATA**2)
        made = beyond * SIGMA_DATA / (sigma**2 + SIGMA_DATA**2) ** 0.5
        return (made * out + kept * noisy).clamp(-1, 1)


def noise(size: int, seed: int = 0, batch: int = 1) -> Tensor:
    """(B, 1, size, size), what the network turns into terrain at ``SIGMA_MAX``."""
    return SIGMA_MAX * torch.randn(
        batch, 1, size, size, generator=torch.Generator().manual_seed(seed)
    )


def _tensors(wheel: Path) -> dict[str, Tensor]:
    """The network's weights by the graph's names.

    The exporter folded the scale and shift of every group norm into nameless (C, 1, 1) factors:
    they belong to the convolution that follows them.
    """
    import onnx
    from onnx import numpy_helper

    # what the graph names
    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_model_from_string(archive.read(GRAPH)).graph
    named = {
        part.name: torch.from_numpy(numpy_helper.to_array(part).copy())
        for part in graph.initializer
    }
    weights = {
        name.removeprefix("network."): value
        for name, value in named.items()
        if name.startswith("network.")
    }

    # the rest are norms, each before a convolution
    norm_of = {
        "in_layers.2": "in_layers.0",
        "out_layers.3": "out_layers.0",
        "qkv": "norm",
        "out.2": "out.0",
    }
    affine = {}  # of the latest norm
    for node in graph.node:
        constant = named.get(node.input[1]) if len(node.input) > 1 else None
        if node.op_type in ("Mul", "Add") and constant is not None and constant.ndim == 3:
            affine[node.op_type] = constant.flatten()
        elif node.op_type == "Conv":
            conv = node.input[1].removeprefix("network.").removesuffix(".weight")
            for end, norm in norm_of.items():
                if conv.endswith(end):
                    prefix = conv.removesuffix(end) + norm
                    weights[f"{prefix}.weight"] = affine.pop("Mul")
                    weights[f"{prefix}.bias"] = affine.pop("Add")
    return weights


def _sources() -> dict[str, str]:
    """Residual blocks, attentions and samplers of the UNet, and the graph's names for them."""
    names = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    names["mid_block.attentions.0"] = "middle_block.1"

    # going down; the graph counts residual blocks and samplers alike
    place = 0
    for level in range(LEVELS):
        for layer in range(LAYERS):
            place += 1
            names[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{place}.0"
            if level >= LEVELS - 3:
                names[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{place}.1"
        if level < LEVELS - 1:
            place += 1
            names[f"down_blocks.{level}.downsamplers.0"] = f"input_blocks.{place}.0"

    # going up; a sampler is the last part of its residual block
    place = -1
    for level in range(LEVELS):
        for layer in range(LAYERS + 1):
            place += 1
            names[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{place}.0"
            if level < 3:
                names[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{place}.1"
        if level < LEVELS - 1:
            names[f"up_blocks.{level}.upsamplers.0"] = (
                f"output_blocks.{place}.{2 if level < 3 else 1}"
            )
    return names


def _unet_state(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of diffusers' ``UNet2DModel``."""
    state = {}

    def copy(target: str, source: str) -> None:
        for part in ("weight", "bias"):
            state[f"{target}.{part}"] = weights[f"{source}.{part}"]

    # levels: 1 x 1 convolutions in the graph are Linears of an attention
    for target, source in _sources().items():
        if ".attentions." in target:
            copy(f"{target}.group_norm", f"{source}.norm")
            for part in ("weight", "bias"):
                dims = 1 if part == "weight" else 0
                split = weights[f"{source}.qkv.{part}"].flatten(dims).chunk(3)
                for name, value in zip("qkv", split, strict=True):
                    state[f"{target}.to_{name}.{part}"] = value
                out = weights[f"{source}.proj_out.{part}"]
                state[f"{target}.to_out.0.{part}"] = out.flatten(dims)
        else:
            for name, part in RESNET.items():
                copy(f"{target}.{name}", f"{source}.{part}")
            if f"{source}.skip_connection.weight" in weights:
                copy(f"{target}.conv_shortcut", f"{source}.skip_connection")

    # around them
    for layer, part in (("linear_1", 0), ("linear_2", 2)):
        copy(f"time_embedding.{layer}", f"time_embed.{part}")
    copy("conv_in", "input_blocks.0.0")
    copy("conv_norm_out", "out.0")
    copy("conv_out", "out.2")
    return state


def load(cache: Path) -> TerrainNet:
    """The trained network, in evaluation mode; its wheel is kept in ``cache``."""
    weights = _tensors(fetch(cache, "adaptive-terrain-diffusion==0.4.2", WHEEL, SHA256))
    net = TerrainNet()
    net.unet.load_state_dict(_unet_state(weights))
    prefix = "label_emb."
    net.label.load_state_dict(
        {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    )
    return net.eval()
