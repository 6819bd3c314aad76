"""What the operating system offers for writing large files, with a plain fallback for each.

Linux: O_DIRECT, fallocate, FICLONE, copy_file_range, renameat2. Everywhere else the same functions write, copy
and rename in the ordinary way; only speed differs.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BLOCK_BYTES = 4096
_SEEK_LOCK = threading.Lock()
_LINUX = sys.platform == "linux"
_FICLONE = 0x40049409
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_UNSUPPORTED = {
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EXDEV,
    errno.ENOSYS,
    errno.ENOTTY,
    errno.EPERM,
}


def aligned_buffer(size: int) -> mmap.mmap:
    """Return `size` bytes of zeroed memory that start on a page, in huge pages where the system gives them.

    A direct write has to look up and to hold each page of it.
    """
    size = max(BLOCK_BYTES, _round_up(size))
    if not _LINUX:
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next use, instead of giving it back and touching new pages.

    Tensors of a few MiB come and go for each tile. All threads share one arena, so that those that compute use what
    those that write have freed. For a process that only merges: it holds for as long as that lives.
    Source: mallopt(3) of glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if _LINUX else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        mallopt(_M_ARENA_MAX, 1)


def open_for_writing(path: Path, size: int, *, direct: bool = True) -> int:
    """Open or create `path` with `size` bytes reserved on disk; return a descriptor, direct where possible and wanted.

    Raises:
        OSError: among others ENOSPC, before anything is written.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        _reserve(descriptor, size)
    except BaseException:
        os.close(descriptor)
        raise
    if direct and hasattr(os, "O_DIRECT"):
        try:
            unbuffered = os.open(path, os.O_RDWR | os.O_DIRECT)
        except OSError:
            return descriptor  # the file system has no direct writes (tmpfs before Linux 6.6, some FUSE)
        os.close(descriptor)
        return unbuffered
    return descriptor


def write_at(descriptor: int, buffer: memoryview, offset: int, count: int) -> None:
    """Write the first `count` bytes of `buffer` at `offset`.

    A direct descriptor needs an aligned buffer and an offset that is a multiple of the block size; then a last
    partial block is written whole, and `finish` cuts the file to its size.

    Raises:
        ValueError: a direct write would begin within a block, which the one before it has filled up with zeros.
    """
    direct = hasattr(os, "O_DIRECT") and _is_direct(descriptor)
    if direct and offset % BLOCK_BYTES:
        raise ValueError(f"a direct write at {offset}, expected a multiple of {BLOCK_BYTES}")
    end = min(_round_up(count), len(buffer)) if direct else count
    if end > count:
        buffer[count:end] = bytes(end - count)
    done = 0
    while done < end:
        done += _write_some(descriptor, buffer[done:end], offset + done)


def finish(descriptor: int, size: int) -> None:
    """Cut the file to `size` bytes and make it durable."""
    os.ftruncate(descriptor, size)
    os.fsync(descriptor)


def make_durable(descriptor: int) -> None:
    """Return when all that was written to the file would survive a power loss."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
    else:
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, where the system lets folders be opened."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a file durably: as a reflink, else in the kernel, else by hand.

    The copy has the mode of a new file (0666 & ~umask), not the source's.
    """
    with source.open("rb") as reading, target.open("wb") as writing:
        if not (_LINUX and _clone(reading.fileno(), writing.fileno())):
            _copy_range(reading.fileno(), writing.fileno(), os.fstat(reading.fileno()).st_size)
        os.fsync(writing.fileno())


def clone_file(source: Path, target: Path) -> bool:
    """Make `target` a file that shares all blocks with `source` until either is written; False where that cannot be."""
    if not _LINUX:
        return False
    with source.open("rb") as reading, target.open("wb") as writing:
        cloned = _clone(reading.fileno(), writing.fileno())
        if cloned:
            os.fsync(writing.fileno())
    if not cloned:
        target.unlink()
    return cloned


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders atomically; return False where the system cannot."""
    if not _LINUX:
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(done == 0)


@contextmanager
def file_lock(path: Path, *, shared: bool = False) -> Iterator[bool]:
    """Hold an advisory lock on `path`; yields False if another process has it. It dies with the process.

    `shared`: others may hold it too that ask for it so.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # the holder before us removed the folder in this moment
        locked = _lock(descriptor, shared=shared)
        if not locked or _is_still(path, descriptor):
            break
        os.close(descriptor)  # the holder before us removed the file: what we locked has no name any more
    try:
        yield locked
    finally:
        os.close(descriptor)


def _round_up(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _reserve(descriptor: int, size: int) -> None:
    if os.fstat(descriptor).st_size > size:
        os.ftruncate(descriptor, size)
    if not _LINUX or size == 0:
        os.ftruncate(descriptor, size)
        return
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    # Not os.posix_fallocate: where the file system cannot reserve, it writes every block instead.
    if fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        code = ctypes.get_errno()
        if code not in _UNSUPPORTED:
            raise OSError(code, os.strerror(code))
        os.ftruncate(descriptor, size)


def _is_direct(descriptor: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def _write_some(descriptor: int, data: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, offset)
    with _SEEK_LOCK:  # Windows has no positioned write
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, data)


def _clone(source: int, target: int) -> bool:
    import fcntl

    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def _copy_range(source: int, target: int, size: int) -> None:
    done = 0
    while done < size and hasattr(os, "copy_file_range"):
        try:
            count = os.copy_file_range(source, target, size - done, done, done)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            break
        if count == 0:
            break
        done += count
    os.lseek(source, done, os.SEEK_SET)
    os.lseek(target, done, os.SEEK_SET)
    with os.fdopen(os.dup(source), "rb") as reading, os.fdopen(os.dup(target), "wb") as writing:
        shutil.copyfileobj(reading, writing, 1 << 20)


def _lock(descriptor: int, *, shared: bool) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
