"""Files out of an archive that may be hostile: encrypted by easy-dataset-share, or a plain zip.

Nothing is ever extracted under a name that the archive gives: the members that are wanted are read, in bounded pieces,
into files that the caller names. An archive that holds anything odd is refused as a whole.
"""

from __future__ import annotations

import base64
import binascii
import errno
import mmap
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from emtool.core.disk import format_bytes
from emtool.core.errors import DataError, MissingDependencyError

_MACOS_FOLDER = "__MACOSX"
_MAGIC = b"PK\x03\x04"
_DIRECTORY_MARK = b"PK\x01\x02"
_CHUNK_BYTES = 1 << 20
#: An encrypted archive is a salt and a Fernet token: version, time, start vector, blocks, signature. Source: the Fernet
#: specification, and easy_dataset_share.zipping.
_SALT_BYTES, _TOKEN_OVERHEAD_BYTES, _BLOCK_BYTES = 16, 1 + 8 + 16 + 32, 16
_ENCRYPTED_FLAG = 0x1


@dataclass(frozen=True, kw_only=True)
class ArchiveLimits:
    """What an archive may take.

    Attributes:
        max_members: Members in it, folders included.
        max_bytes: Bytes of the archive, and of each member once it is read.
        max_ratio: Bytes of a member for each byte that it takes in the archive.
    """

    max_members: int = 1_000
    max_bytes: int = 256 << 20
    max_ratio: int = 200


def check_can_decrypt() -> None:
    """Refuse to begin without the package that decrypts.

    Raises:
        MissingDependencyError: If it is not installed; holds the install command.
    """
    import importlib.util

    if importlib.util.find_spec("easy_dataset_share") is None:
        raise MissingDependencyError(
            "published datasets are decrypted with the package easy-dataset-share: pip install 'emtool[data]'"
        )


def open_archive(path: Path, *, label: str, password: str, scratch: Path, limits: ArchiveLimits) -> Path:
    """Return an archive as a plain zip file: the file itself, or its decrypted copy in the scratch folder.

    Args:
        path: The archive.
        label: What it is called in messages.
        password: What it is encrypted with.
        scratch: A folder that only this process uses.
        limits: What it may take.

    Raises:
        DataError: If it is too large, cut short, or the password is wrong.
        MissingDependencyError: If the package that decrypts is not installed.
    """
    num_bytes = path.stat().st_size
    if num_bytes > limits.max_bytes:
        raise DataError(
            f"{label} has {format_bytes(num_bytes)}; an archive has at most {format_bytes(limits.max_bytes)}"
        )
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) == _MAGIC:
            return path
    check_can_decrypt()
    from easy_dataset_share.zipping import decrypt_file

    if not _is_whole_token(path):
        raise DataError(f"{label} is cut short, or is not an archive of easy-dataset-share or a zip file")
    copy = scratch / "archive"
    shutil.copyfile(path, copy)
    try:
        decrypt_file(str(copy), password)
    except ValueError as error:
        raise DataError(
            f"{label} cannot be decrypted: the password is wrong (--password takes another), or the file is damaged"
        ) from error
    finally:
        copy.unlink()
    return copy.with_name(f"{copy.name}.dec")


def extract_members(archive: Path, targets: Mapping[str, Path], *, label: str, limits: ArchiveLimits) -> None:
    """Write the members of the wanted names into files; a name that is nowhere in the archive is passed over.

    Args:
        archive: A zip file.
        targets: File of each wanted member, by its base name in the archive; the files must not exist.
        label: What the archive is called in messages.
        limits: What it may take.

    Raises:
        DataError: If the archive is damaged, hostile or too large, or has a wanted name twice.
    """
    _check_member_count(archive, label, limits)
    try:
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
            for member in members:
                _check_member(member, label)
            for name, target in targets.items():
                if (found := _only(members, name, label)) is not None:
                    with opened.open(found) as source, target.open("xb") as file:
                        _copy(source, file, found, f"{label}: {found.filename}", limits)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise DataError(f"{label} is cut short or damaged: {reason}") from error
    except OSError as error:
        # A place before the beginning, which a damaged directory names; anything else is the disk's.
        if error.errno != errno.EINVAL:
            raise
        raise DataError(f"{label} is cut short or damaged: its directory names a place that is not there") from error


def row_files(archive: Path) -> list[str]:
    """Return the names of the JSON Lines files in an archive that was read before."""
    with zipfile.ZipFile(archive) as opened:
        return sorted({PurePosixPath(name).name for name in opened.namelist() if name.endswith(".jsonl")})


def _is_whole_token(path: Path) -> bool:
    """Return whether a file can be what the encryption wrote: a cut shows in its length, a damage within does not."""
    with path.open("rb") as file:
        file.seek(_SALT_BYTES)
        token = file.read()
    try:
        num_bytes = len(base64.urlsafe_b64decode(token))
    except (binascii.Error, ValueError):
        return False
    return num_bytes > _TOKEN_OVERHEAD_BYTES and (num_bytes - _TOKEN_OVERHEAD_BYTES) % _BLOCK_BYTES == 0


def _check_member_count(archive: Path, label: str, limits: ArchiveLimits) -> None:
    """Count directory entries by their mark, before a library makes an object of each."""
    if not archive.stat().st_size:
        raise DataError(f"{label} is empty")
    with archive.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        count, position = 0, content.find(_DIRECTORY_MARK)
        while position >= 0:
            count += 1
            if count > limits.max_members:
                raise DataError(f"{label} has more than {limits.max_members:,} members; refused")
            position = content.find(_DIRECTORY_MARK, position + 1)


def _check_member(member: zipfile.ZipInfo, label: str) -> None:
    """Refuse what an archive of datasets does not hold."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{label} has a member of an unusual compression, {member.filename!r}; refused")
    path = PurePosixPath(member.orig_filename)
    if path.is_absolute() or ".." in path.parts or any(c in member.orig_filename for c in "\\:\0"):
        raise DataError(f"{label} has a member that points outside of it, {member.orig_filename!r}; refused")
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise DataError(f"{label} has a member that is a link or a device, {member.filename!r}; refused")
    if member.flag_bits & _ENCRYPTED_FLAG:
        raise DataError(f"{label} is a zip file with a password of its own, which is not read; decrypt it first")


def _only(members: Iterable[zipfile.ZipInfo], name: str, label: str) -> zipfile.ZipInfo | None:
    paths = [(PurePosixPath(member.filename), member) for member in members if not member.is_dir()]
    found = [member for path, member in paths if path.name == name and _MACOS_FOLDER not in path.parts]
    if len(found) > 1:
        raise DataError(f"{label} has {name} {len(found)} times: {', '.join(m.filename for m in found[:3])}; refused")
    return found[0] if found else None


def _copy(source: IO[bytes], target: IO[bytes], member: zipfile.ZipInfo, label: str, limits: ArchiveLimits) -> None:
    """Copy a member; what is counted is what comes out, whatever the archive says about it."""
    allowed = min(limits.max_bytes, limits.max_ratio * member.compress_size + _CHUNK_BYTES)
    count = 0
    while chunk := source.read(_CHUNK_BYTES):
        count += len(chunk)
        if count > allowed:
            packed = format_bytes(member.compress_size)
            raise DataError(f"{label} unpacks to more than {format_bytes(allowed)} from {packed}; refused")
        target.write(chunk)
