"""Which of 25 photographs a crop comes from; the crops to validate with come from other places than those to train on.

The photographs are those of two Debian packages:

    sudo apt-get install --no-install-recommends mate-backgrounds lomiri-wallpapers-16.04

or, without root, `apt-get download` them, unpack each with `dpkg-deb -x`, and let the environment variable PHOTOGRAPHS
name the folder usr/share/backgrounds that comes out.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.study.data import Data

NAMES = """
mate/nature/Aqua mate/nature/Blinds mate/nature/Dune mate/nature/FreshFlower mate/nature/Garden mate/nature/GreenMeadow
mate/nature/LadyBird mate/nature/RainDrops mate/nature/Storm mate/nature/TwoWings mate/nature/Wood
mate/nature/YellowFlower Bridge_by_Sander_Klootwijk Dragonfly_by_Bolly Picture_0B_by_freespace Picture_1A_by_freespace
Wine_by_Jakkub_Mede aitzgorri_by_Aitzol_Berasategi free_by_Peter_Nerlich friends_by_Aitzol_Berasategi
greentock_by_Peter_Nerlich life_by_Aitzol_Berasategi picosdeeuropa_by_Aitzol_Berasategi
seeding_by_Clements_Engelhardt sunset_by_Aitzol_Berasategi
""".split()
SHORT_SIDE = 512  # pixels, to which each photograph is scaled
CELL, CROP = 128, 64  # pixels; a crop lies within a cell of the grid
TRAIN, VALIDATION = 164, 40  # crops of each photograph; about three quarters of its cells are for training


@functools.cache
def photographs() -> Data:
    """Crops of three channels, standardized by mean and deviation of those to train on, and their photographs' numbers.

    Raises:
        FileNotFoundError: a photograph is not there; the module says where they come from.
    """
    folder = Path(os.environ.get("PHOTOGRAPHS", "/usr/share/backgrounds"))
    return crops([_scaled(folder / f"{name}.jpg") for name in NAMES], TRAIN, VALIDATION)


def crops(images: Sequence[Tensor], train: int, validation: int) -> Data:
    """Cut so many crops of random places out of each image of (3, height, width)."""
    places = torch.Generator().manual_seed(0)
    cells = [_cells(image) for image in images]
    x, validation_x = (
        torch.cat([_cut(each[kind], number, places) for each in cells])
        for kind, number in ((0, train), (1, validation))
    )
    mean, deviation = x.mean(), x.std()
    y, validation_y = (torch.arange(len(images)).repeat_interleave(number) for number in (train, validation))
    return Data((x - mean) / deviation, y, (validation_x - mean) / deviation, validation_y)


def _scaled(path: Path) -> Tensor:
    with Image.open(path) as image:
        factor = SHORT_SIDE / min(image.size)
        size = round(image.width * factor), round(image.height * factor)
        pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _cells(image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The cells to train on, and those to validate with: every fourth of a row, one further in the row below."""
    rows = [row.split(CELL, 2) for row in image.split(CELL, 1)]
    found: tuple[list[Tensor], list[Tensor]] = [], []
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            if cell.shape[1:] == (CELL, CELL):
                found[(i + j) % 4 == 0].append(cell)
    return found


def _cut(cells: list[Tensor], number: int, places: torch.Generator) -> Tensor:
    chosen = torch.randint(len(cells), (number,), generator=places).tolist()
    corners = torch.randint(CELL - CROP + 1, (number, 2), generator=places).tolist()
    return torch.stack([cells[i][:, y : y + CROP, x : x + CROP] for i, (y, x) in zip(chosen, corners, strict=True)])
