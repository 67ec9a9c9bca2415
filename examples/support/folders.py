"""Images of one's own: a folder for each class. Broken files are named, or left out and counted."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from tqdm.auto import tqdm

from .command_line import UserError

Samples = list[tuple[str, int]]


def read_image(path: str) -> Image.Image:
    """The picture in RGB, the right way up."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:  # UnidentifiedImageError is an OSError
        raise UserError(
            f"--data: cannot read image {path} ({error}); --skip-broken leaves such files out"
        ) from error


class _Listing(ImageFolder):
    """torchvision's layout. Folders such as .ipynb_checkpoints are no classes."""

    def find_classes(self, directory):
        names = [entry.name for entry in Path(directory).iterdir() if entry.is_dir()]
        names = sorted(name for name in names if not name.startswith("."))
        if not names:
            raise UserError(f"--data: {directory} holds no class folders")
        return names, {name: index for index, name in enumerate(names)}


def find_images(root: Path) -> tuple[Samples, list[str]]:
    """(file, class) of all images below ``root``, and the names of the classes."""
    try:
        listing = _Listing(str(root))
    except FileNotFoundError as error:
        raise UserError(f"--data: {str(error).partition(' Supported')[0]}") from error
    return listing.samples, listing.classes


def without_broken(samples: Samples) -> Samples:
    """The images that can be read; reads all of them."""
    whole = []
    for path, label in tqdm(samples, desc="reading all images", leave=False):
        try:
            read_image(path)
        except UserError:
            continue
        whole.append((path, label))
    print(f"{len(samples) - len(whole)} of {len(samples)} files are broken and left out")
    return whole


class ClassFolders(Dataset):
    """Images (3, size, size), normalised, and their classes.

    Args:
        samples: files, each with the number of its class.
        classes: their names.
        size: side in pixels.
        train: random crops and flips, in place of the middle of the image.
        mean, std: to normalise with, of each channel.
    """

    def __init__(
        self,
        samples: Samples,
        classes: Sequence[str],
        size: int,
        train: bool,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        self.samples, self.classes = samples, tuple(classes)
        crop = [transforms.RandomResizedCrop(size, (0.5, 1.0)), transforms.RandomHorizontalFlip()]
        middle = [transforms.Resize(size), transforms.CenterCrop(size)]
        steps = [*(crop if train else middle), transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[index]
        return self.transform(read_image(path)), label


def open_folder(
    root: Path, size: int, mean, std, seed: int, limit: int | None, skip_broken: bool
) -> tuple[ClassFolders, ClassFolders]:
    """Training and held-out images: of ``train`` and ``val`` if there are such folders, else four
    fifths and one, at random.

    Args:
        limit: use only so many of each.
        skip_broken: read all files first, and leave out those that cannot be read.
    """
    if not root.is_dir():
        raise UserError(f"--data: no such folder: {root}")
    order = np.random.default_rng(seed).permutation
    parts = [root / "train", root / "val"]
    if all(part.is_dir() for part in parts):
        (train, classes), (val, others) = (find_images(part) for part in parts)
        if classes != others:
            raise UserError(f"--data: train and val hold other classes: {classes} and {others}")
        if skip_broken:
            train, val = without_broken(train), without_broken(val)
        train = [train[i] for i in order(len(train))]
    else:
        samples, classes = find_images(root)
        if skip_broken:
            samples = without_broken(samples)
        samples = [samples[i] for i in order(len(samples))]
        held_out = max(1, len(samples) // 5)
        train, val = samples[held_out:], samples[:held_out]
    if not train or not val:
        raise UserError(f"--data: expected at least 2 images in {root}, found {len(train + val)}")
    made = [ClassFolders(train[:limit], classes, size, True, mean, std)]
    made += [ClassFolders(val[:limit], classes, size, False, mean, std)]
    return made[0], made[1]
