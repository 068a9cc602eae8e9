"""Image data sets. Pixels are in [0, 1] · N images of h x w"""

import gzip
import hashlib
import math
import os
import urllib.request
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from rlamort.errors import UserError

DIGITS_HELD_OUT = 297  # of scikit-learn's 1,797
PARTS = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}  # of MNIST and Fashion-MNIST alike
LARGEST = 8 * 2**30  # bytes of one array
IDX_IMAGES = 0x00000803  # bytes, in three dimensions (LeCun, Cortes and Burges, The MNIST database)
MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist/"
CHECKSUMS = {  # SHA-256 of MNIST's files, as several projects that fetch them publish it
    "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
}


class Images(NamedTuple):
    """Training and held-out images."""

    train: Tensor  # (N, h, w)
    test: Tensor  # (M, h, w)


def load(data: str) -> Images:
    """Load images by name or path.

    Args:
        data: digits, the 8 x 8 ones of scikit-learn; mnist, downloaded once; an .npz file with train_x and test_x, (N, h, w)
            bytes or numbers in [0, 1]; or a folder with the IDX files of MNIST or Fashion-MNIST, gzipped or not.

    Raises:
        UserError: there is no such file, it is damaged, or its images are not in [0, 1] or of one size.
    """
    path = Path(data).expanduser()
    if data == "digits":
        parts = _digits()
    elif data == "mnist":
        parts = _idx(download(MNIST, CHECKSUMS))
    elif path.is_dir():
        parts = _idx(path)
    elif path.suffix == ".npz":
        parts = _npz(path)
    else:
        raise UserError(f"data={data}: digits, mnist, an .npz file, or a folder of IDX files is needed")
    train, test = (_checked(f"data={data}: {name}", part) for name, part in parts.items())
    if train.shape[1:] != test.shape[1:]:
        raise UserError(f"data={data}: train images of {_size(train)}, test images of {_size(test)}; one size is needed")
    return Images(train, test)


def cache() -> Path:
    """The folder of downloads."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlamort"


def download(base: str, checksums: dict[str, str], folder: Path | None = None) -> Path:
    """Download the gzipped files of `base` that are not cached yet; returns their folder.

    Args:
        base: URL prefix of the file names.
        checksums: SHA-256 of each, by name without .gz.
        folder: the destination; None takes one in the user's cache.

    Raises:
        UserError: a download fails, or its checksum differs, in which case it is discarded.
    """
    folder = folder or cache() / "mnist"
    folder.mkdir(parents=True, exist_ok=True)
    for name, expected in checksums.items():
        file = folder / f"{name}.gz"
        if file.exists():
            continue
        url = f"{base}{name}.gz"
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                content = response.read()
        except OSError as error:
            raise UserError(f"{url}: {error}; fetch it by hand and give its folder as data=FOLDER") from error
        found = hashlib.sha256(content).hexdigest()
        if found != expected:
            raise UserError(f"{url}: its SHA-256 is {found}; {expected} is expected, so it is not used")
        part = file.with_suffix(f".{os.getpid()}")
        part.write_bytes(content)
        part.replace(file)  # whole or not at all, also beside another process that fetches it
    return folder


def _digits() -> dict[str, np.ndarray]:
    images = load_digits().images / 16
    order = np.random.default_rng(0).permutation(len(images))  # they are sorted by writer
    return {"train_x": images[order[DIGITS_HELD_OUT:]], "test_x": images[order[:DIGITS_HELD_OUT]]}


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with ZipFile(path) as archive:
            for name in ("train_x", "test_x"):
                _require_size(archive, f"{name}.npy")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:  # np.load leaves a damaged file open
            return {name: arrays[name] for name in ("train_x", "test_x")}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"data={path}: it cannot be read: {error}") from error
    except KeyError as error:
        raise UserError(f"data={path}: {error}; arrays train_x and test_x are needed") from error


def _require_size(archive: ZipFile, name: str) -> None:
    """Raises ValueError if an array exceeds the size limit, or the size of the file that its header is in."""
    size = archive.getinfo(name).file_size  # as declared; reading more than that is an error
    if size > LARGEST:
        raise ValueError(f"{name} would unpack to {size} bytes; {LARGEST} are allowed")
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if header is None:
            raise ValueError(f"{name} has format {version}; 1.0 or 2.0 is needed")
        shape, _, dtype = header(file)
        if math.prod(shape) * dtype.itemsize > size:
            raise ValueError(f"{name} declares shape {shape}, which is more than the {size} bytes that it holds")


def _idx(folder: Path) -> dict[str, np.ndarray]:
    return {f"{name}_x": _read_idx(folder, file) for name, file in PARTS.items()}


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """(N, h, w) bytes."""
    packed, plain = folder / f"{name}.gz", folder / name
    if not packed.exists() and not plain.exists():
        raise UserError(f"data={folder}: neither {plain.name} nor {packed.name} is there")
    try:
        with gzip.open(packed) if packed.exists() else plain.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"it unpacks to more than {LARGEST} bytes")
        header = np.frombuffer(content[:16], dtype=">u4").astype(int)
        if header[0] != IDX_IMAGES:
            raise ValueError("it does not begin as an IDX file of images does")
        return np.frombuffer(content, dtype=np.uint8, offset=16).reshape(header[1:])
    except (OSError, ValueError, EOFError, IndexError) as error:
        raise UserError(f"data={folder}: {name} is damaged: {error}") from error


def _checked(what: str, images: np.ndarray) -> Tensor:
    """(N, h, w) bytes, or numbers in [0, 1] -> numbers in [0, 1]."""
    if images.ndim != 3 or not images.size:
        raise UserError(f"{what} has shape {images.shape}; (N, h, w) with N > 0 is needed")
    if images.dtype.kind not in "uif":
        raise UserError(f"{what} is of {images.dtype}; bytes, or numbers in [0, 1], are needed")
    scaled = torch.from_numpy(images / 255 if images.dtype == np.uint8 else images.astype(np.float64)).float()
    if not ((scaled >= 0) & (scaled <= 1)).all():  # which NaN is not either
        raise UserError(f"{what} holds numbers from {scaled.min():g} to {scaled.max():g}; [0, 1] is needed")
    return scaled


def _size(images: Tensor) -> str:
    return " x ".join(str(length) for length in images.shape[1:])
