"""Pictures whose salient objects are known pixel by pixel: photographs cut out and pasted on other photographs.

One to four cut-outs (Tux Paint's stamps that are photographs: animals, plants, food, things) lie on a crop of a desktop
background (MATE's and KDE's), 224 pixels square. No cut-out and no background is in two splits. The originals come from
Debian's archive; any number of pictures can be made of them, the same ones for the same split and number.
"""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tokmerge.data import debian
from tokmerge.data.image_sets import SPLITS, DataError, Example, ImageSet
from tokmerge.io import store

# Of Debian 12.
PACKAGES = {
    "t/tuxpaint-stamps/tuxpaint-stamps-default_2022.06.04-1_all.deb":
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    "m/mate-backgrounds/mate-backgrounds_1.26.0-1_all.deb":
        "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
    "p/plasma-workspace-wallpapers/plasma-workspace-wallpapers_5.27.5-2_all.deb":
        "32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b",
}  # fmt: skip
_NAMES = ", ".join(place.split("/")[2].split("_")[0] for place in PACKAGES)
STAMPS, DESKTOPS = "usr/share/tuxpaint/stamps", ("usr/share/backgrounds/mate/nature", "usr/share/wallpapers")
KINDS, NO_PHOTOGRAPHS = ("animals", "food", "household", "plants", "sports", "vehicles"), ("cartoon", "plastic", "toys")
BACKGROUNDS = {
    "train": ("DarkestHour", "ColdRipple", "FallenLeaf"),
    "search": ("GreenMeadow", "Dune", "Grey", "summer_1am"),
    "select": ("RainDrops", "Path", "BytheWater", "Storm"),
    "test": ("Wood", "OneStandsOut", "Blinds", "EveningGlow", "ColorfulCups"),
}
CUT_OUT_SHARES = {"train": 0.2, "search": 0.2, "select": 0.25, "test": 0.35}  # of the cut-outs
PICTURES = {"train": 4000, "search": 1000, "select": 2000, "test": 4000}
_SIDE, LONGEST, SHORTEST = 224, 160, 448  # pixels: a picture; cut-outs and short sides as kept
COUNTS = ("one object", "two objects", "three objects", "four objects")
# Of the names and bytes of all that is used.
ORIGINALS_SHA256 = "313f0eb8dde83e411e7658add4a7c837398cb039b3d61846ad6240295b3bbd92"


def load_photos(split: str, path: str | Path | None = None, data_dir: str | Path = "data") -> ImageSet:
    """The pictures of a split, with masks; a label says how many objects there are (`COUNTS`).

    Args:
        split: one of `tokmerge.data.image_sets.SPLITS`.
        path: root below which the packages lie unpacked (usr/share/...); without it they are looked for in
            ``data_dir``, or fetched from Debian's archive.
        data_dir: folder that holds or gets what is used of them, in small.

    Raises:
        DataError: no such split, or the packages cannot be had, or are of another version.
    """
    if split not in SPLITS:
        raise DataError(f"photos have no split {split!r}: use one of {', '.join(SPLITS)}")
    folder = Path(data_dir) / "photos"
    if not (folder / "names.json").is_file():
        _make(folder, path)
    names = store.load_json(folder / "names.json")
    cut_outs = [_open(folder / "cut-outs" / f"{number:03d}.png", "RGBA") for number in _share(split, names["cut-outs"])]
    backgrounds = {name: _open(folder / "backgrounds" / f"{name}.png", "RGB") for name in BACKGROUNDS[split]}
    drawn = [_draw(split, number, len(cut_outs)) for number in range(PICTURES[split])]
    ids = [f"{split}-{number:05d} on {background}" for number, (background, _) in enumerate(drawn)]
    labels = np.array([len(objects) - 1 for _, objects in drawn])

    def at(position: int) -> Example:
        background, objects = drawn[position]
        rng = np.random.default_rng([SPLITS.index(split), position, 1])
        picture, mask = compose([cut_outs[number] for number in objects], backgrounds[background], rng)
        return Example(ids[position], picture, int(labels[position]), mask)

    return ImageSet("photos", split, COUNTS, ids, labels, at=at)


def compose(
    objects: Sequence[Image.Image], background: Image.Image, rng: np.random.Generator
) -> tuple[Image.Image, np.ndarray]:
    """A picture of RGBA objects on a crop of an RGB background, and the (224, 224) bool mask of what is an object.

    Sizes, places and directions are drawn; later objects may hide a part of earlier ones.
    """
    width, height = background.size
    side = int(rng.integers(_SIDE, min(width, height) + 1))
    left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
    picture = background.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    picture = picture.convert("RGBA")
    mask = np.zeros((_SIDE, _SIDE), bool)
    for whole in objects:
        one = _shrink(whole, int(rng.integers(60, 141)))
        one = one.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else one
        at = int(rng.integers(_SIDE - one.width + 1)), int(rng.integers(_SIDE - one.height + 1))
        picture.alpha_composite(one, at)
        mask[at[1] : at[1] + one.height, at[0] : at[0] + one.width] |= np.asarray(one)[:, :, 3] > 127
    return picture.convert("RGB"), mask


def _draw(split: str, number: int, n_cut_outs: int) -> tuple[str, list[int]]:
    """Background and cut-outs of a picture."""
    rng = np.random.default_rng([SPLITS.index(split), number, 0])
    background = BACKGROUNDS[split][rng.integers(len(BACKGROUNDS[split]))]
    return background, rng.permutation(n_cut_outs)[: 1 + rng.integers(len(COUNTS))].tolist()


def _share(split: str, names: Sequence[str]) -> list[int]:
    """Which cut-outs are a split's: in the order of a digest of their names, which is no order of kinds."""
    order = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    ends = np.round(np.cumsum([0.0, *CUT_OUT_SHARES.values()]) * len(names)).astype(int)
    place = list(CUT_OUT_SHARES).index(split)
    return sorted(order[ends[place] : ends[place + 1]])


def _shrink(image: Image.Image, longest: int) -> Image.Image:
    """An RGBA image whose longer side is so many pixels; colours are weighed by how opaque they are."""
    scale = longest / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def _open(file: Path, mode: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert(mode)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error}): delete {file.parents[1]} and run again") from error


def _make(folder: Path, path: str | Path | None) -> None:
    """Find or fetch the packages, and keep in small what is used of them: all or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".photos-") as temporary:
        try:
            root = Path(path) if path else debian.unpack(PACKAGES, Path(temporary))
        except DataError as error:
            raise DataError(
                f"the pictures' originals: {error}\nGive a path below which Debian's packages {_NAMES} lie unpacked."
            ) from error
        new = Path(temporary, "photos")
        _keep(root, new)
        if not folder.exists():
            os.replace(new, folder)


def _keep(root: Path, folder: Path) -> None:
    """What is used of unpacked packages, in small; DataError if it is not what it was."""
    names: list[str] = []
    digest = hashlib.sha256()
    for part in ("cut-outs", "backgrounds"):
        (folder / part).mkdir(parents=True)
    for file in sorted((root / STAMPS).rglob("*.png")):
        name = file.relative_to(root / STAMPS).as_posix()
        if not name.startswith(KINDS) or any(word in name for word in NO_PHOTOGRAPHS):
            continue
        with Image.open(file) as image:
            picture = image.convert("RGBA") if image.mode in ("RGBA", "LA", "P") else None
        if picture is not None and _is_photograph(picture):
            _shrink(picture, LONGEST).save(folder / "cut-outs" / f"{len(names):03d}.png")
            names.append(name)
            digest.update(name.encode() + file.read_bytes())
    for name in sorted(sum(BACKGROUNDS.values(), ())):
        files = [file for part in DESKTOPS for file in sorted((root / part).rglob("*.[jp][pn]g")) if name in file.parts
                 or file.stem == name]  # fmt: skip
        if not files:
            raise DataError(f"{root} does not hold the background {name} of {_NAMES}")
        file = max(files, key=lambda file: (file.stat().st_size, file))
        with Image.open(file) as image:
            scale = SHORTEST / min(image.size)
            size = round(image.width * scale), round(image.height * scale)
            small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        small.save(folder / "backgrounds" / f"{name}.png")
        digest.update(name.encode() + file.read_bytes())
    if digest.hexdigest() != ORIGINALS_SHA256:
        raise DataError(
            f"{len(names)} cut-outs and the backgrounds in {root} are not those of Debian 12's "
            f"{_NAMES} (sha256 differs): pictures made of others would be other data"
        )
    store.save_json({"cut-outs": names}, folder / "names.json")


def _is_photograph(picture: Image.Image) -> bool:
    """Large enough, and of many colours: drawings have few."""
    pixels = np.asarray(picture)
    opaque = pixels[:, :, 3] > 127
    if min(picture.size) < 80 or opaque.sum() < 1000:
        return False
    steps = (pixels[opaque][:, :3] // 8).astype(int) @ [1024, 32, 1]
    return len(np.unique(steps)) > 400
