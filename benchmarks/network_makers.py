"""How the networks of `networks.py` are made, with an example each: those written by hand, small ones of libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import written_networks as written

Made = tuple[Any, Any]  # a model, and an example of its inputs
LIBRARIES = {
    "tv": "torchvision",
    "hf": "transformers",
    "smp": "segmentation_models_pytorch",
    "monai": "monai",
    "yolo": "ultralytics",
}


def _written() -> dict[str, Callable[[], Made]]:
    import torch

    image, small = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 16, 16)
    examples: dict[type[Any], Any] = {
        written.LeNet: image,
        written.CifarResNet: image,
        written.UNet: image,
        written.Edsr: small,
        written.Generator: torch.randn(2, 32),
        written.CycleGenerator: small,
        written.Crnn: torch.randn(1, 1, 32, 48),
        written.GruHead: torch.randn(1, 4, 48),
        written.GroupNormNet: small,
        written.DiffusionUNet: (small, torch.tensor([7])),
        written.Siamese: (image, torch.randn(1, 3, 32, 32)),
        written.SpatialTransformer: image,
        written.SegNet: image,
        written.Cbam: image,
        written.TwoHeads: image,
        written.HandSwish: image,
        written.WrittenAttention: image,
        written.CnnTransformer: image,
        written.Captions: {
            "pixel_values": image,
            "input_ids": torch.tensor([[4, 9, 1, 0]]),
            "attention_mask": torch.tensor([[True, True, True, False]]),
        },
        written.Volume: torch.randn(1, 1, 8, 8, 8),
        written.SpectralDiscriminator: image,
    }
    return {kind.__name__: lambda kind=kind, x=x: (kind(), x) for kind, x in examples.items()}  # type: ignore[misc]


def _torchvision() -> dict[str, Callable[[], Made]]:
    import torch
    from torchvision import models

    def image(side: int) -> Any:
        return torch.randn(1, 3, side, side)

    plain = {
        "alexnet": 64, "vgg11_bn": 32, "resnet18": 64, "resnext50_32x4d": 64, "wide_resnet50_2": 64, "densenet121": 64,
        "mobilenet_v2": 64, "mobilenet_v3_small": 64, "efficientnet_b0": 64, "efficientnet_v2_s": 64,
        "mnasnet0_5": 64, "shufflenet_v2_x0_5": 64, "squeezenet1_1": 64, "regnet_y_400mf": 64, "convnext_tiny": 64,
    }  # fmt: skip
    found: dict[str, Callable[[], Made]] = {
        name: lambda name=name, side=side: (models.get_model(name, weights=None, num_classes=10), image(side))  # type: ignore[misc]
        for name, side in plain.items()
    }
    found["googlenet"] = lambda: (
        models.googlenet(weights=None, num_classes=10, init_weights=False, aux_logits=True),
        image(64),
    )
    found["vit"] = lambda: (
        models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
        ),
        image(32),
    )
    found["swin"] = lambda: (
        models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10),
        image(32),
    )
    found["maxvit"] = lambda: (
        models.MaxVit((32, 32), 16, 2, [16, 32], [1, 1], 8, 0.0, num_classes=10),
        image(32),
    )
    return found | _torchvision_of_other_tasks()


def _torchvision_of_other_tasks() -> dict[str, Callable[[], Made]]:
    import torch
    from torchvision import models

    def image(side: int) -> Any:
        return torch.randn(1, 3, side, side)

    found: dict[str, Callable[[], Made]] = {}
    found["fcn_resnet50"] = lambda: (
        models.segmentation.fcn_resnet50(None, weights_backbone=None, num_classes=3),
        image(64),
    )
    found["deeplabv3_mobilenet"] = lambda: (
        models.segmentation.deeplabv3_mobilenet_v3_large(None, weights_backbone=None, num_classes=3),
        image(64),
    )
    found["lraspp"] = lambda: (
        models.segmentation.lraspp_mobilenet_v3_large(None, weights_backbone=None, num_classes=3),
        image(64),
    )
    detect = models.detection
    small = {"weights": None, "weights_backbone": None, "num_classes": 5}
    found["ssdlite"] = lambda: (detect.ssdlite320_mobilenet_v3_large(**small), [image(96)[0]])
    for name in ("fcos_resnet50_fpn", "retinanet_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn"):
        found[name] = lambda name=name: (  # type: ignore[misc]
            getattr(detect, name)(**small, min_size=96, max_size=128),
            [image(96)[0]],
        )
    found["r3d_18"] = lambda: (
        models.video.r3d_18(weights=None, num_classes=5),
        torch.randn(1, 3, 8, 32, 32),
    )
    found["raft_small"] = lambda: (
        models.optical_flow.raft_small(weights=None),
        (image(128), image(128), 2),
    )
    return found


# Small models of Hugging Face: the name of their kind, and what their configuration is told.
TOKENS = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
HF_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", TOKENS),
    "deit": ("DeiT", TOKENS),
    "beit": ("Beit", {**TOKENS, "use_relative_position_bias": True}),
    "dinov2": ("Dinov2", {**TOKENS, "mlp_ratio": 2}),
    "swin": (
        "Swin",
        {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4],
         "window_size": 4},
    ),
    "convnext": ("ConvNext", {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2}),
    "resnet": (
        "ResNet",
        {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "layer_type": "bottleneck"},
    ),
    "regnet": (
        "RegNet",
        {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 2], "groups_width": 16},
    ),
    "mobilenet_v2": ("MobileNetV2", {"image_size": 32, "depth_multiplier": 0.35}),
    "segformer": (
        "Segformer",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
         "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]},
    ),
    "poolformer": (
        "PoolFormer",
        {"hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1]},
    ),
    "levit": (
        "Levit",
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1],
         "key_dim": [8, 8, 8]},
    ),
    "mobilevit": (
        "MobileViT",
        {"image_size": 64, "hidden_sizes": [24, 32, 48], "neck_hidden_sizes": [8, 16, 16, 24, 32, 48, 64],
         "num_attention_heads": 2},
    ),
    "bit": ("Bit", {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1]}),
}  # fmt: skip


def _hugging_face() -> dict[str, Callable[[], Made]]:
    import torch
    import transformers as hf

    image = torch.randn(1, 3, 32, 32)

    def made(kind: str, keys: dict[str, Any]) -> Made:
        config = getattr(hf, f"{kind}Config")(**keys, num_labels=5)
        side = keys.get("image_size", 32)
        model = getattr(hf, f"{kind}ForImageClassification")(config)
        return model, {"pixel_values": image if side == 32 else torch.randn(1, 3, side, side)}

    found: dict[str, Callable[[], Made]] = {
        name: lambda kind=kind, keys=keys: made(kind, keys)  # type: ignore[misc]
        for name, (kind, keys) in HF_CONFIGS.items()
    }
    found["clip_vision"] = lambda: (
        hf.CLIPVisionModel(hf.CLIPVisionConfig(**TOKENS, projection_dim=24)),
        {"pixel_values": image},
    )
    found["yolos"] = lambda: (
        hf.YolosForObjectDetection(
            hf.YolosConfig(**{**TOKENS, "image_size": [32, 32]}, num_detection_tokens=5, num_labels=3)
        ),
        {"pixel_values": image},
    )
    return found


def _segmentation_models() -> dict[str, Callable[[], Made]]:
    import segmentation_models_pytorch as smp
    import torch

    kinds = ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3Plus")
    return {
        kind: lambda kind=kind: (  # type: ignore[misc]
            getattr(smp, kind)("resnet18", encoder_weights=None, classes=2),
            torch.randn(1, 3, 64, 64),
        )
        for kind in kinds
    }


def _monai() -> dict[str, Callable[[], Made]]:
    import torch
    from monai.networks import nets

    volume = torch.randn(1, 1, 16, 16, 16)
    return {
        "UNet": lambda: (nets.UNet(3, 1, 2, (8, 16, 32), (2, 2), num_res_units=2), volume),
        "BasicUNet": lambda: (nets.BasicUNet(3, 1, 2, (8, 8, 16, 16, 32, 8)), torch.randn(1, 1, 32, 32, 32)),
        "SegResNet": lambda: (nets.SegResNet(3, 8, 1, 2, norm=("GROUP", {"num_groups": 4})), volume),
        "DynUNet": lambda: (nets.DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 32]), volume),
        "AttentionUnet": lambda: (nets.AttentionUnet(3, 1, 2, (8, 16, 32), (2, 2)), volume),
        "VNet": lambda: (nets.VNet(3, 1, 2), torch.randn(1, 1, 32, 32, 32)),
    }


def _yolo() -> dict[str, Callable[[], Made]]:
    import torch
    from ultralytics.nn.tasks import DetectionModel

    return {
        name: lambda name=name: (DetectionModel(f"{name}.yaml", verbose=False), torch.randn(1, 3, 64, 64))  # type: ignore[misc]
        for name in ("yolov5n", "yolov8n", "yolov9t", "yolov10n", "yolo11n")
    }


MAKERS: dict[str, Callable[[], dict[str, Callable[[], Made]]]] = {
    "": _written,
    "tv": _torchvision,
    "hf": _hugging_face,
    "smp": _segmentation_models,
    "monai": _monai,
    "yolo": _yolo,
}


def makers_of(prefix: str) -> dict[str, Callable[[], Made]]:
    """How each network of a library is made, by its full name. Raises ImportError where the library is missing."""
    return {f"{prefix}_{name}" if prefix else name: make for name, make in MAKERS[prefix]().items()}


def maker_of(name: str) -> Callable[[], Made]:
    """How this network is made; no other library is imported."""
    prefix = name.partition("_")[0]
    return makers_of(prefix if prefix in LIBRARIES else "")[name]


def all_names() -> tuple[list[str], list[str]]:
    """The names of all networks, and the libraries that are not installed."""
    found: list[str] = []
    missing = []
    for prefix in MAKERS:
        try:
            found += makers_of(prefix)
        except ImportError as error:
            missing.append(f"{LIBRARIES[prefix]} ({error})")
    return found, missing
