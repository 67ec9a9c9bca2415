"""Tiny transformers models of every class that can be routed, made in memory."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers as hf

from tests.support.attention_cases import randn

WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = WIDE | {"intermediate_size": 48}
PATCH = {"image_size": 32, "patch_size": 4}
VIT = SMALL | PATCH
SAM = {"output_channels": 16, "mlp_dim": 32, "window_size": 3, "image_size": 32, "patch_size": 4}


class Case(NamedTuple):
    make: Callable
    size: tuple[int, ...] = (32, 32)  # of the image; with frames in front, of a video
    call: dict = {}  # noqa: RUF012
    patch: tuple[int, ...] | None = (4, 4)  # None: tokens are mixed before the first layer
    before: int = 0  # tokens in front of the map

    def inputs(self, batch: int = 2, size=None, seed: int = 0) -> dict:
        size = size or self.size
        name = "pixel_values_videos" if "VJEPA2" in self.make.__name__ else "pixel_values"
        shape = (batch, size[0], 3, *size[1:]) if len(size) == 3 else (batch, 3, *size)
        return {name: randn(*shape, seed=seed).float(), **self.call}

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(n // p for n, p in zip(self.size, self.patch))

    def spot(self, place: tuple[int, ...]) -> tuple:
        """Where the pixels of a token are in the first sample."""
        spot = tuple(slice(p * n, p * n + p) for p, n in zip(self.patch, place))
        return (0, *spot[:-2], slice(None), *spot[-2:])


def of(model: str, config: str, args: dict, **extra) -> Callable:
    def make():
        return getattr(hf, model)(getattr(hf, config)(**args, **extra))

    make.__name__ = model
    return make


def depth_anything():
    backbone = hf.Dinov2Config(
        **WIDE, **PATCH, out_indices=[1, 2], apply_layernorm=True, reshape_hidden_states=False
    )
    config = hf.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=4,
        reassemble_hidden_size=32,
        reassemble_factors=[2, 1],
        neck_hidden_sizes=[8, 16],
        fusion_hidden_size=8,
        head_in_channels=8,
        head_hidden_size=8,
    )
    return hf.DepthAnythingForDepthEstimation(config)


def clip():
    text = {"vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 2, **SMALL}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=VIT, projection_dim=8))


def sam2():
    return hf.Sam2HieraDetModel(
        hf.Sam2HieraDetConfig(
            hidden_size=16,
            image_size=[128, 96],
            window_positional_embedding_background_size=[7, 7],
            blocks_per_stage=[1, 1, 2, 1],
            embed_dim_per_stage=[16, 32, 64, 128],
            num_attention_heads_per_stage=[1, 2, 4, 8],
            global_attention_blocks=[3],
            window_size_per_stage=[8, 4, 4, 2],
        )
    )


def sam3():
    config = hf.Sam3ViTConfig(
        **SMALL, **PATCH, pretrain_image_size=32, window_size=4, global_attn_indexes=[0, 1]
    )
    return hf.models.sam3.modeling_sam3.Sam3ViTModel(config)


ANY = {"interpolate_pos_encoding": True}
NAFLEX = {
    "pixel_attention_mask": torch.tensor([[1] * 35 + [0] * 5] * 2),
    "spatial_shapes": torch.tensor([[5, 7], [5, 7]]),
}


class NaFlex(Case):
    """Patches of images of 5 x 7, and 5 that only fill up."""

    def inputs(self, batch: int = 2, size=None, seed: int = 0) -> dict:
        return {
            "pixel_values": randn(batch, 40, 48, seed=seed).float(),
            **{name: value[:batch] for name, value in NAFLEX.items()},
        }

    @property
    def grid(self) -> tuple[int, ...]:
        return (5, 7)

    def spot(self, place: tuple[int, ...]) -> tuple:
        return (0, 7 * place[0] + place[1])


DPT = VIT | {"is_hybrid": False, "neck_hidden_sizes": [8, 8, 8, 8], "readout_type": "project"}
CASES = {
    "Dinov2Model": Case(of("Dinov2Model", "Dinov2Config", WIDE | PATCH), (20, 28), before=1),
    "Dinov2ForImageClassification": Case(
        of("Dinov2ForImageClassification", "Dinov2Config", WIDE | PATCH), (20, 28), before=1
    ),
    "Dinov2Backbone": Case(of("Dinov2Backbone", "Dinov2Config", WIDE | PATCH), (20, 28), before=1),
    "Dinov2WithRegistersModel": Case(
        of(
            "Dinov2WithRegistersModel",
            "Dinov2WithRegistersConfig",
            WIDE | PATCH,
            num_register_tokens=3,
        ),
        (20, 28),
        before=4,
    ),
    "DINOv3ViTModel": Case(
        of("DINOv3ViTModel", "DINOv3ViTConfig", VIT, num_register_tokens=2), (20, 28), before=3
    ),
    "SiglipVisionModel": Case(of("SiglipVisionModel", "SiglipVisionConfig", VIT), (20, 28), ANY),
    "SiglipForImageClassification": Case(
        of("SiglipForImageClassification", "SiglipConfig", {"vision_config": VIT})
    ),
    "Siglip2VisionModel": NaFlex(
        of("Siglip2VisionModel", "Siglip2VisionConfig", SMALL, patch_size=4, num_patches=64)
    ),
    "CLIPVisionModel": Case(
        of("CLIPVisionModel", "CLIPVisionConfig", VIT), (20, 28), ANY, before=1
    ),
    **{
        f"{name}VisionModel": Case(
            of(f"{name}VisionModel", f"{name}VisionConfig", VIT), (20, 28), ANY, before=1
        )
        for name in ("AltCLIP", "ChineseCLIP", "CLIPSeg", "MetaClip2")
    },
    "CLIPVisionModelWithProjection": Case(
        of("CLIPVisionModelWithProjection", "CLIPVisionConfig", VIT), before=1
    ),
    "ViTModel": Case(of("ViTModel", "ViTConfig", VIT), (20, 28), ANY, before=1),
    "ViTForImageClassification": Case(of("ViTForImageClassification", "ViTConfig", VIT), before=1),
    "ViTMSNModel": Case(of("ViTMSNModel", "ViTMSNConfig", VIT), (20, 28), ANY, before=1),
    "DeiTModel": Case(of("DeiTModel", "DeiTConfig", VIT), (20, 28), ANY, before=2),
    "IJepaModel": Case(of("IJepaModel", "IJepaConfig", VIT), (20, 28), ANY),
    "BeitModel": Case(
        of("BeitModel", "BeitConfig", VIT, use_relative_position_bias=True), before=1
    ),
    "Data2VecVisionModel": Case(
        of("Data2VecVisionModel", "Data2VecVisionConfig", VIT, use_relative_position_bias=True),
        before=1,
    ),
    "ViTMAEModel": Case(of("ViTMAEModel", "ViTMAEConfig", VIT, mask_ratio=0.0), before=1),
    "DPTModel": Case(of("DPTModel", "DPTConfig", DPT), before=1),
    "Aimv2VisionModel": Case(of("Aimv2VisionModel", "Aimv2VisionConfig", VIT)),
    "InternVLVisionModel": Case(
        of(
            "InternVLVisionModel",
            "InternVLVisionConfig",
            SMALL,
            image_size=[32, 32],
            patch_size=[4, 4],
        ),
        before=1,
    ),
    "MLCDVisionModel": Case(of("MLCDVisionModel", "MLCDVisionConfig", VIT), before=1),
    "Owlv2VisionModel": Case(of("Owlv2VisionModel", "Owlv2VisionConfig", VIT), before=1),
    "OwlViTVisionModel": Case(of("OwlViTVisionModel", "OwlViTVisionConfig", VIT), before=1),
    "YolosModel": Case(
        of(
            "YolosModel",
            "YolosConfig",
            SMALL,
            image_size=[20, 28],
            patch_size=4,
            num_detection_tokens=5,
        ),
        (20, 28),
        before=1,
    ),
    "DepthAnythingForDepthEstimation": Case(depth_anything, (20, 28), before=1),
    "CLIPModel": Case(
        clip,
        call={"input_ids": torch.tensor([[3, 4, 2], [5, 6, 2]])},
        before=1,
    ),
    "SamVisionModel": Case(
        of("SamVisionModel", "SamVisionConfig", WIDE | SAM, global_attn_indexes=[0, 1])
    ),
    "SamHQVisionModel": Case(
        of("SamHQVisionModel", "SamHQVisionConfig", WIDE | SAM, global_attn_indexes=[0, 1])
    ),
    "Sam2HieraDetModel": Case(sam2, (128, 96), patch=None),
    "Sam3ViTModel": Case(sam3),
    "VideoMAEModel": Case(
        of("VideoMAEModel", "VideoMAEConfig", VIT, num_frames=4, tubelet_size=2),
        (4, 32, 32),
        patch=(2, 4, 4),
    ),
    "VivitModel": Case(
        of("VivitModel", "VivitConfig", SMALL, image_size=32, tubelet_size=[2, 4, 4], num_frames=4),
        (4, 32, 32),
        patch=(2, 4, 4),
        before=1,
    ),
    "VJEPA2Model": Case(
        of(
            "VJEPA2Model",
            "VJEPA2Config",
            SMALL,
            patch_size=4,
            crop_size=32,
            frames_per_clip=4,
            pred_hidden_size=16,
            pred_num_attention_heads=2,
            pred_num_hidden_layers=1,
        ),
        (4, 32, 32),
        {"skip_predictor": True},
        patch=(2, 4, 4),
    ),
}


def build(case: Case):
    """The model with random weights at which attention matters."""
    torch.manual_seed(0)
    model = case.make().eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1 and "token" not in name and "embed" not in name:
            value = value * 1.2 * (parameter.numel() / parameter.shape[0]) ** -0.5
        elif parameter.ndim == 1 and name.endswith("weight"):
            value = 1 + 0.2 * value
        else:
            value = value * 0.3
        parameter.data.copy_(value)
    return model


def tensor_of(output) -> torch.Tensor:
    """What the map became, of an output."""
    for name in ("last_hidden_state", "predicted_depth", "logits", "image_embeds"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output.feature_maps[-1] if hasattr(output, "feature_maps") else output[0]


def run(model, inputs) -> torch.Tensor:
    torch.manual_seed(3)  # ViT-MAE draws an order
    with torch.no_grad():
        return tensor_of(model(**inputs))
