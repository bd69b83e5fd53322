"""Images to pixels and classes: a folder with a folder for each class, or arrays in an .npz."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from rankwise.errors import DataError, OptionError, need

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def read_images(
    path: str | Path, image_size: int | tuple[int, int], channels: int = 3, processor: Any | None = None
) -> tuple[Tensor, Tensor, list[str]]:
    """(pixel_values, labels, class names): float32 N×C×H×W, int64 N, and the name of each label.

    Args:
        path: a folder of class folders (classes by sorted name), or an .npz with ``images`` (N×H×W, N×H×W×C or N×C×H×W;
            uint8 of 0…255, or floats of 0…1) and ``labels`` (N integers or names), and ``classes`` if wanted.
        image_size: side, or (height, width), that images are resized to (bilinear).
        channels: 1 (grey) or 3 (red, green, blue).
        processor: an image processor of transformers, which then does the resizing and scaling; else pixels are scaled
            to −1…1 (mean and deviation ½), as ViT's are.

    Raises:
        DataError: nothing there, an image that cannot be read, arrays that do not fit each other.
        OptionError: channels or sizes that make no image.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if channels not in (1, 3) or len(size) != 2 or min(size) < 1:
        raise OptionError(
            f"Images need channels 1 or 3 and a size of two positive sides; got channels={channels}, image_size={image_size}."
        )
    path = Path(path)
    if path.is_dir():
        images, labels, names = _folder(path, size, channels, processor)
    elif path.suffix.lower() == ".npz" and path.is_file():
        images, labels, names = _arrays(path, channels)
    else:
        raise DataError(f"{path} is neither a folder of class folders nor an .npz with images and labels.")
    pixels = torch.stack([_scaled(i, size) for i in images]) if processor is None else _processed(processor, images)
    if pixels.shape[1] != channels:
        raise DataError(f"The processor makes {pixels.shape[1]} channels, not {channels}; give channels={pixels.shape[1]}.")
    return pixels, torch.tensor(labels, dtype=torch.long), names


def _folder(
    path: Path, size: tuple[int, ...], channels: int, processor: Any | None
) -> tuple[Sequence[np.ndarray], list[int], list[str]]:
    """uint8 H×W×C arrays; resized here already where no processor will, so that large pictures are not held."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise need("PIL", "vision", "Reading a folder of images") from error
    names = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(names) < 2:
        raise DataError(f"{path} holds {len(names)} class folders; classification needs at least 2, one for each class.")
    images, labels, other = [], [], 0
    for label, name in enumerate(names):
        files = sorted(p for p in (path / name).rglob("*") if p.is_file() and not p.name.startswith("."))
        good = [p for p in files if p.suffix.lower() in _SUFFIXES]
        other += len(files) - len(good)
        if not good:
            raise DataError(f"The class folder {path / name} holds no images ({', '.join(_SUFFIXES)}).")
        for file in good:
            try:
                with Image.open(file) as opened:
                    image = opened.convert("L" if channels == 1 else "RGB")
            except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise DataError(f"{file} is not an image that can be read: {error}") from error
            if processor is None:
                image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
            images.append(np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, channels))
            labels.append(label)
    if other:
        warnings.warn(f"{path}: {other} files that are no images were left out.", stacklevel=4)
    return images, labels, names


def _arrays(path: Path, channels: int) -> tuple[Sequence[np.ndarray], list[int], list[str]]:
    try:
        with np.load(path, allow_pickle=False) as held:
            data = {k: held[k] for k in held.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise DataError(f"{path} is not an .npz of plain arrays: {error}") from error
    if not {"images", "labels"} <= data.keys():
        raise DataError(
            f"{path} holds {', '.join(sorted(data)) or 'nothing'}; expected images and labels (and classes, if wanted)."
        )
    images, labels = data["images"], data["labels"]
    if len(images) == 0 or labels.ndim != 1 or len(labels) != len(images):
        raise DataError(f"{path}: images are {images.shape} and labels {labels.shape}; expected N images and N labels, N ≥ 1.")
    if labels.dtype.kind in "US":
        names = sorted({str(x) for x in labels})
        return list(_layout(images, channels, path)), [names.index(str(x)) for x in labels], names
    if labels.dtype.kind not in "iu" or labels.min() < 0:
        raise DataError(f"{path}: labels are {labels.dtype} from {labels.min()}; expected integers from 0, or names.")
    names = [str(c) for c in data.get("classes", range(int(labels.max()) + 1))]
    if int(labels.max()) >= len(names):
        raise DataError(f"{path}: the largest label is {labels.max()}, but classes names {len(names)}.")
    return list(_layout(images, channels, path)), [int(x) for x in labels], names


def _layout(images: np.ndarray, channels: int, path: Path) -> np.ndarray:
    """uint8 N×H×W×C of any of the three layouts."""
    if images.ndim == 3:
        images = images[..., None]
    elif images.ndim == 4 and images.shape[-1] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise DataError(f"{path}: images are {images.shape}; expected N×H×W, N×H×W×C or N×C×H×W with C of 1 or 3.")
    if images.shape[-1] > channels:
        raise DataError(
            f"{path}: images have {images.shape[-1]} channels, but channels={channels}; give channels=3, or make them grey."
        )
    if images.dtype.kind == "f":
        if not np.isfinite(images).all() or images.min() < 0 or images.max() > 1:
            raise DataError(f"{path}: float images go from {images.min():g} to {images.max():g}; expected 0…1 (or uint8 of 0…255).")
        images = np.rint(images * 255).astype(np.uint8)
    elif images.dtype != np.uint8:
        raise DataError(f"{path}: images are {images.dtype}; expected uint8 of 0…255, or floats of 0…1.")
    return np.repeat(images, channels, axis=-1) if images.shape[-1] < channels else images


def _scaled(image: np.ndarray, size: tuple[int, ...]) -> Tensor:
    """float32 C×H×W of −1…1."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    if tuple(x.shape[1:]) != tuple(size):
        x = torch.nn.functional.interpolate(x[None], size=tuple(size), mode="bilinear", antialias=True)[0]
    return x * 2 - 1


def _processed(processor: Any, images: Sequence[np.ndarray]) -> Tensor:
    made = processor(images=[*images], return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    return torch.as_tensor(made).float()
