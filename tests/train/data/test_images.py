"""Pixels and classes of folders and arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankwise.errors import DataError, OptionError
from rankwise.train.data import read_images

G = np.random.default_rng(0)
RGB = G.integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path / "x.npz", **arrays)
    return path / "x.npz"


def test_layouts_of_arrays_agree(tmp_path: Path) -> None:
    y = [0, 2, 1, 0, 2]
    x, labels, names = read_images(npz(tmp_path, images=RGB, labels=y), (8, 6))
    assert x.shape == (5, 3, 8, 6) and x.dtype == torch.float32 and labels.tolist() == y and names == ["0", "1", "2"]
    assert torch.allclose(x, torch.from_numpy(RGB).permute(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)
    for other in (RGB.transpose(0, 3, 1, 2), (RGB / 255).astype(np.float32)):
        assert torch.equal(read_images(npz(tmp_path, images=other, labels=y), (8, 6))[0], x)
    grey, _, _ = read_images(npz(tmp_path, images=RGB[..., 0], labels=y), (8, 6))
    assert grey.shape[1] == 3 and torch.equal(grey[:, 0], grey[:, 2]) and torch.equal(grey[:, 0], x[:, 0])
    _, labels, names = read_images(npz(tmp_path, images=RGB, labels=["cat", "ant", "cat", "dog", "ant"]), 4)
    assert names == ["ant", "cat", "dog"] and labels.tolist() == [1, 0, 1, 2, 0]


def test_a_folder_and_its_order(tmp_path: Path) -> None:
    from PIL import Image

    for i, (name, file) in enumerate([("dog", "b.png"), ("cat", "z.png"), ("dog", "a.png")]):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.fromarray(RGB[i]).save(tmp_path / name / file)
    x, labels, names = read_images(tmp_path, (8, 6))
    assert names == ["cat", "dog"] and labels.tolist() == [0, 1, 1]
    assert torch.allclose(x, torch.from_numpy(RGB[[1, 2, 0]]).permute(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)
    assert read_images(tmp_path, 5, channels=1)[0].shape == (3, 1, 5, 5)
    (tmp_path / "dog" / "c.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"dog/c\.png is not an image"):
        read_images(tmp_path, 8)
    (tmp_path / "dog" / "c.png").rename(tmp_path / "dog" / "notes.txt")
    with pytest.warns(UserWarning, match="1 files that are no images"):
        read_images(tmp_path, 8)
    (tmp_path / "bird").mkdir()
    with pytest.raises(DataError, match="bird holds no images"):
        read_images(tmp_path, 8)


def test_a_processor_of_transformers(tmp_path: Path) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil as Processor

    x, _, _ = read_images(npz(tmp_path, images=RGB, labels=[0] * 5), 8, processor=Processor(size={"height": 8, "width": 8}))
    assert x.shape == (5, 3, 8, 8) and x.dtype == torch.float32 and -1 <= x.min() < 0 < x.max() <= 1


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"images": RGB}, "expected images and labels"),
        ({"images": RGB, "labels": [0, 1]}, "expected N images and N labels"),
        ({"images": RGB[:0], "labels": []}, "N ≥ 1"),
        ({"images": RGB, "labels": [0, 1, -1, 0, 0]}, "integers from 0"),
        ({"images": RGB, "labels": [0, 1, 4, 0, 0], "classes": ["a", "b"]}, "largest label is 4, but classes names 2"),
        ({"images": RGB.astype(np.float32), "labels": [0] * 5}, "expected 0…1"),
        ({"images": RGB.astype(np.int64), "labels": [0] * 5}, "images are int64"),
        ({"images": RGB[..., :2], "labels": [0] * 5}, "expected N×H×W"),
        ({"images": np.array([{}] * 5), "labels": [0] * 5}, "not an .npz of plain arrays"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_images(npz(tmp_path, **arrays), 8)


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give channels=3"):
        read_images(npz(tmp_path, images=RGB, labels=[0] * 5), 8, channels=1)
    with pytest.raises(OptionError, match="channels"):
        read_images(tmp_path, 8, channels=4)
    with pytest.raises(DataError, match="neither a folder"):
        read_images(tmp_path / "none", 8)
    with pytest.raises(DataError, match="0 class folders"):
        read_images(tmp_path, 8)
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(DataError, match="not an .npz"):
        read_images(tmp_path / "bad.npz", 8)
