from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from sparsekit.errors import FileError, ModelError
from sparsekit.training.models import check_arguments, create_model, input_config, trained_classes


def test_the_callers_seed_decides_the_weights() -> None:
    torch.manual_seed(3)
    first = create_model("resnet10t", num_classes=4, image_size=32)
    torch.manual_seed(3)
    second = create_model("resnet10t", num_classes=4)
    # A refused img_size must leave no trace in the random state.
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "test_efficientnet"])
@pytest.mark.parametrize("channels", [1, 3])
def test_image_size_and_channels_reach_the_model(name: str, channels: int) -> None:
    model = create_model(name, num_classes=5, in_chans=channels, image_size=32).eval()
    config = input_config(model, image_size=32)
    assert config.input_size == (channels, 32, 32)
    assert len(config.mean) == len(config.std) == channels
    assert model(torch.zeros(1, *config.input_size)).shape == (1, 5)


def test_arguments_reach_the_architecture() -> None:
    model = create_model("resnet10t", num_classes=3, args={"stem_width": 8})
    assert model.conv1[0].out_channels == 3 * 8 // 4


@pytest.mark.parametrize("name", ["resnt18", "ResNet18", "resnet18x.a1_in1k"])
def test_unknown_name_offers_the_nearest(name: str) -> None:
    with pytest.raises(ModelError, match=r"unknown model .*resnet18"):
        create_model(name, num_classes=2)


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(
        ModelError, match=r"resnet10t has no argument no_such_argument that shapes it; it has "
    ):
        create_model("resnet10t", num_classes=2, args={"no_such_argument": 1})
    with pytest.raises(ModelError, match=r"no argument stem_widht .*did you mean stem_width\?"):
        create_model("resnet10t", num_classes=2, args={"stem_widht": 8})
    with pytest.raises(ModelError, match=r"'resnet10t' cannot be built with stem_type='deep', layers=1"):
        create_model("resnet10t", num_classes=2, args={"stem_type": "deep", "layers": 1})


OF_CREATION = sorted({*inspect.signature(timm.create_model).parameters} - {"kwargs"})


@pytest.mark.parametrize("key", [*OF_CREATION, "pretrained_cfg", "features_only", "url", "device"])
@pytest.mark.parametrize("name", ["resnet10t", "hf-hub:someone/something"])
def test_only_what_shapes_an_architecture_reaches_timm(
    name: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm was called"))
    with pytest.raises(ModelError, match=f"has no argument {key} that shapes it"):
        create_model(name, num_classes=2, args={key: "evil.pth"})


def test_what_people_set_of_an_architecture_is_allowed() -> None:
    for name, keys in {
        "resnet18": "drop_path_rate drop_rate global_pool stem_width act_layer output_stride",
        "vit_tiny_patch16_224": "depth embed_dim patch_size init_values class_token no_embed_class",
        "efficientnet_b0": "drop_path_rate bn_eps bn_momentum act_layer pad_type",
        "swin_tiny_patch4_window7_224": "window_size depths embed_dim",
        "convnext_atto": "depths dims ls_init_value conv_mlp",
        "swinv2_cr_tiny_224": "window_size window_ratio",
    }.items():
        check_arguments(name, keys.split())


def test_pretrained_weights_that_do_not_exist() -> None:
    with pytest.raises(ModelError, match=r"pretrained weights of 'resnet10t.nonsense' .*checkpoint"):
        create_model("resnet10t.nonsense", num_classes=2, pretrained=True)


def checkpoint(tmp_path: Path, **arguments: int) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file(create_model("resnet10t", **{"num_classes": 4, **arguments}).state_dict(), path)
    return path


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    first = create_model("resnet10t", num_classes=4, checkpoint=path, pretrained=True)
    second = create_model("resnet10t", num_classes=4, checkpoint=path)
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_finished_model_says_how_many_classes_it_knows(tmp_path: Path) -> None:
    def known(name: str, file: Path | None = None) -> int:
        return trained_classes(name, checkpoint=file, image_size=None, args=None)

    file, before = checkpoint(tmp_path), torch.get_rng_state()
    assert known("resnet10t") == 1000
    assert known("resnet10t", file) == 4
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(FileError, match=r"does not say how many classes it knows: it has no head.weight"):
        known("test_vit", file)
    with pytest.raises(
        ModelError, match=r"vit_small_patch14_dinov2 has no classifier, so its answers cannot"
    ):
        known("vit_small_patch14_dinov2")


def test_checkpoint_with_other_classes(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"weights.safetensors was trained for 4 classes .* has 10"):
        create_model("resnet10t", num_classes=10, checkpoint=checkpoint(tmp_path))


def test_checkpoint_with_other_channels(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"1 of another shape: conv1.0.weight \(file \[24, 1,"):
        create_model("resnet10t", num_classes=4, checkpoint=checkpoint(tmp_path, in_chans=1))


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(
        FileError, match=r"does not fit the model: \d+ missing: .* and \d+ more; \d+ unexpected"
    ):
        create_model("test_efficientnet", num_classes=4, checkpoint=checkpoint(tmp_path))


def test_pickled_missing_and_damaged_checkpoints(tmp_path: Path) -> None:
    pickled = tmp_path / "model.pth"
    torch.save({"w": torch.ones(1)}, pickled)
    with pytest.raises(FileError, match="weights_only=True"):
        create_model("resnet10t", num_classes=4, checkpoint=pickled)
    with pytest.raises(FileError, match="does not exist"):
        create_model("resnet10t", num_classes=4, checkpoint=tmp_path / "none.safetensors")
    damaged = checkpoint(tmp_path)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(FileError, match="damaged"):
        create_model("resnet10t", num_classes=4, checkpoint=damaged)


def test_a_header_whose_length_begins_like_a_pickle_is_no_pickle(tmp_path: Path) -> None:
    state = create_model("resnet10t", num_classes=4).state_dict()
    path = tmp_path / "model.safetensors"
    for padding in range(256):
        save_file(state, path, metadata={"note": "x" * padding})
        with path.open("rb") as file:
            if file.read(1) == b"\x80":
                break
    else:
        pytest.fail("no header of such a length")
    create_model("resnet10t", num_classes=4, checkpoint=path)


def test_the_conversion_the_message_offers_works(tmp_path: Path) -> None:
    import shlex
    import subprocess
    import sys

    pickled = tmp_path / "model.pth"
    torch.save({"state_dict": create_model("resnet10t", num_classes=4).state_dict()}, pickled)
    with pytest.raises(FileError) as caught:
        create_model("resnet10t", num_classes=4, checkpoint=pickled)
    command = shlex.split(str(caught.value).split("Convert it once: ", 1)[1])
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    create_model("resnet10t", num_classes=4, checkpoint=pickled.with_suffix(".safetensors"))


def test_input_config_takes_what_is_given() -> None:
    model = create_model("resnet10t", num_classes=2, in_chans=1)
    config = input_config(
        model, image_size=40, mean=[0.5], std=[0.25], interpolation="bilinear", crop_pct=1.0
    )
    assert config.input_size == (1, 40, 40)
    assert (config.mean, config.std) == ((0.5,), (0.25,))
    assert (config.interpolation, config.crop_pct) == ("bilinear", 1.0)
    with pytest.raises(ModelError, match="mean must have one number for each of the 3"):
        input_config(create_model("resnet10t", num_classes=2), mean=[0.5, 0.5])


def test_input_config_of_a_model_that_is_not_timms() -> None:
    config = input_config(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)), image_size=16)
    assert config.input_size == (1, 16, 16)
