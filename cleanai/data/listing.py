"""Which pictures an image folder holds: its classes, their files, and what is left out."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from cleanai import UserError
from cleanai.runtime.files import one_line, printable

ENDINGS = (*IMG_EXTENSIONS, ".jfif", ".jpe", ".gif")
SHOWN = 8  # names or kinds of files in a line
# What systems, network drives and programs leave in folders, besides names that begin with a dot or ~$.
_LEFT_BY_SYSTEMS = {
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "picasa.ini", "zbthumbnail.info"),
    *("__macosx", "$recycle.bin", "recycler", "system volume information", "lost+found", "found.000", "__pycache__"),
    *("#recycle", "#snapshot", "network trash folder", "temporary items", "thevolumesettingsfolder"),
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot"),
}


class ImageFile(NamedTuple):
    """One picture: its path, the index of its class, and by what a change of the file shows."""

    path: str
    label: int
    size: int  # bytes
    changed_ns: int


def list_image_folder(folder: Path) -> tuple[list[str], list[ImageFile], list[ImageFile]]:
    """The classes in the order of their names, and the pictures of `folder/train` and `folder/test` by class and path.

    Files that systems leave are skipped. One line counts all others that are no pictures. Names of classes are in NFC.
    Raises UserError when the folders are not as docs/own-scenario.md says.
    """
    skipped: Counter[str] = Counter()
    try:
        skipped.update(
            f"folder {printable(x.name)}"
            for x in _entries(folder)
            if x.is_dir() and os.path.normcase(x.name) not in ("train", "test")
        )
        train, test = (_pictures_by_class(folder / part, skipped) for part in ("train", "test"))
        _require_same_classes(folder, train, test)
        classes = sorted(train)
        files = [
            [_image_file(path, label) for label, name in enumerate(classes) for path in part[name]]
            for part in (train, test)
        ]
    except OSError as error:
        raise UserError(
            f"{folder} must hold images in {{train,test}}/<class>/, all of them readable: {one_line(error)}"
        ) from error
    if skipped:
        print(f"Left out of {folder}: {_counts(skipped)}")
    return classes, files[0], files[1]


def list_pictures(folder: Path) -> list[ImageFile]:
    """The pictures in `folder`, all of label 0, or those of its class folders, by class and path.

    One line counts the files that are no pictures. Raises UserError when it holds neither, or both.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}")
    skipped: Counter[str] = Counter()
    try:
        entries = _entries(folder)
        folders = [entry.name for entry in entries if entry.is_dir()]
        direct = [entry for entry in entries if not entry.is_dir()]
        pictures = [entry.path for entry in direct if entry.name.lower().endswith(ENDINGS)]
        if not folders:  # otherwise they are counted with those of the classes
            skipped.update(_kind(entry.name) for entry in direct if entry.path not in pictures)
        if not pictures + folders:
            raise UserError(f"{folder} holds no pictures ({', '.join(ENDINGS)})")
        if pictures and folders:
            raise UserError(f"{folder} holds both pictures and folders, such as {folders[0]}: give one of the folders")
        if {name.lower() for name in folders} & {"train", "test", "val", "valid", "validation"}:
            one = "train" if "train" in folders else folders[0]
            raise UserError(f"{folder} holds {_names(folders)}, not classes: give {folder / one} itself")
        classes = _pictures_by_class(folder, skipped) if folders else {"": pictures}
        if len(folders) == 1:
            raise UserError(
                f"{folder} holds one folder of pictures only, {folders[0]}: give {folder / folders[0]} itself"
            )
        files = [_image_file(path, label) for label, name in enumerate(sorted(classes)) for path in classes[name]]
    except OSError as error:
        raise UserError(f"{folder} cannot be read as a folder of pictures: {one_line(error)}") from error
    if skipped:
        print(f"Left out of {folder}: {_counts(skipped)}")
    return files


def _pictures_by_class(part: Path, skipped: Counter[str]) -> dict[str, list[str]]:
    """The paths of the pictures of each class. Counts in `skipped` what else there is."""
    found: dict[str, list[str]] = {}
    for entry in _entries(part):
        if not entry.is_dir():
            skipped[f"{_kind(entry.name)} outside of class folders"] += 1
            continue
        name = unicodedata.normalize("NFC", entry.name)
        if printable(name) != name:
            raise UserError(f"The name of the class folder {entry.path} cannot be printed: rename it")
        if name in found:
            raise UserError(f"{part} has two folders {name}, in two Unicode forms (NFC and NFD): merge them into one")
        others: Counter[str] = Counter()
        found[name] = _pictures(entry.path, os.path.realpath(part), others)
        skipped.update(others)
        if not found[name]:
            holds = f" (there are {_counts(others)})" if others else ""
            raise UserError(f"{entry.path} holds no pictures{holds}: put some there, or remove the folder")
    if not found:
        raise UserError(f"{part} holds no class folders: put the pictures of each class into a folder of its own")
    (name, *more) = found
    inner = [entry.name for entry in _entries(part / name) if entry.is_dir()] if not more else []
    if len(inner) > 1:
        raise UserError(
            f"{part} holds one folder, {name}, and the classes seem to be the folders in it ({_names(inner)}): "
            f"move them up into {part}"
        )
    return found


def _require_same_classes(folder: Path, train: dict[str, list[str]], test: dict[str, list[str]]) -> None:
    only = {"train": sorted({*train} - {*test}), "test": sorted({*test} - {*train})}
    if any(only.values()):
        alike = [[name.casefold().strip() for name in names] for names in only.values()]
        raise UserError(
            f"{folder}: train and test must have the same class folders; "
            + " and ".join(f"only {part} has {_names(names)}" for part, names in only.items() if names)
            + (". They differ only in capitals or spaces: rename them" if alike[0] == alike[1] else "")
        )
    if len(train) == 1:
        raise UserError(f"{folder} has only one class, {', '.join(train)}: a classifier needs two or more")


def _pictures(folder: str, part: str, skipped: Counter[str]) -> list[str]:
    """The paths of the pictures in a class folder and the folders in it, in the order of folder and name."""
    found, waiting = [], [(folder, frozenset([part]))]
    while waiting:
        place, above = waiting.pop()
        real = os.path.realpath(place)
        if real in above:
            raise UserError(f"{place} is a link to a folder that holds it: remove the link")
        for entry in _entries(place):
            if entry.is_dir():
                waiting.append((entry.path, above | {real}))
            elif entry.name.lower().endswith(ENDINGS) and (entry.is_file() or entry.is_symlink()):  # no pipes
                found.append(entry.path)
            else:
                skipped[_kind(entry.name)] += 1
    return sorted(found, key=os.path.split)


def _entries(folder: Path | str) -> list[os.DirEntry]:
    """What a folder holds, in the order of names, without what systems leave there."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not _left_by_system(entry)), key=lambda entry: entry.name)


def _left_by_system(entry: os.DirEntry) -> bool:
    name = entry.name.lower()
    return name.startswith((".", "~$")) or name in _LEFT_BY_SYSTEMS


def _image_file(path: str, label: int) -> ImageFile:
    status = Path(path).stat()
    return ImageFile(path, label, status.st_size, status.st_mtime_ns)


def _kind(name: str) -> str:
    return printable(Path(name).suffix.lower()) or "without ending"


def _counts(kinds: Counter[str]) -> str:
    shown = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(SHOWN))
    return f"{shown} and {len(kinds) - SHOWN:,} other kinds" if len(kinds) > SHOWN else shown


def _names(names: list[str]) -> str:
    shown = ", ".join(f'"{name}"' for name in names[:SHOWN])
    return f"{shown} and {len(names) - SHOWN:,} more" if len(names) > SHOWN else shown
