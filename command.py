"""How a command begins and ends: its streams, its errors, the lock on its output, its parent.

    run_command(main)               # main(), its errors in one line
    lock("answers.jsonl.lock")      # for this process alone, until unlock_all() or its end
"""
import ctypes
import errno
import fcntl
import os
import shlex
import signal
import sys
import time
from pathlib import Path

# Errors of file systems that have no locks.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_locks = []         # (path, open file) of the locks that this process holds


# --- streams and errors ---------------------------------------------------------------------------

def run_command(main):
    """Runs main() as a whole program. ValueError and OSError are for the user: one line, and exit
    status 1. Any other error is a mistake of ours and shows its traceback."""
    open_streams()
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:       # no mistake: its traceback would tell nothing
        sys.exit(128 + signal.SIGINT)


def open_streams():
    """Makes print safe: a line that cannot be written (the terminal or `tee` is gone, the disk is
    full) is lost, and is no reason to stop; a character that the terminal lacks is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:                  # closed before this process began
            stream = open(os.devnull, "w")
        if isinstance(stream, Stream):
            continue
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Stream(stream))


class Stream:
    """A text stream that cannot fail."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            self.stream.write(text)
        except (OSError, ValueError):       # ValueError: some library closed it
            pass
        return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError):
            pass

    def __getattr__(self, name):
        return getattr(self.stream, name)


# --- locks ----------------------------------------------------------------------------------------

def lock(path):
    """Takes the lock file `path` for this process: until unlock_all(), or until the process dies in
    whatever way. ValueError says who holds it.

    It is flock's, which NFS and most cluster file systems pass on to their servers. Where a file
    system has no locks that is said, and nothing is locked.
    """
    path = Path(path)
    while True:
        try:
            file = open(path, "a+", encoding="utf-8", errors="replace")
        except OSError as e:
            raise OSError(f"{path}: cannot be written ({e})") from e
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(
                f"{path}: {holder} is at work on this output; wait until it has ended, end it, or "
                "name another output") from None
        except OSError as e:
            file.close()
            if e.errno not in NO_LOCKS:
                raise OSError(f"{path}: cannot be locked ({e})") from e
            print(f"note     {path}: this file system has no locks ({e.strerror}); nothing keeps "
                  "a second job from the same output")
            return
        # The holder before may have removed the file between our two calls: then it is no lock to
        # anybody else.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    _locks.append((path, file))
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}, since {since} "
                   f"({shlex.join(sys.argv)[:200]})\n")
        file.flush()
    except OSError:
        pass        # a full disk: the lock holds, only who holds it is not said


def unlock_all():
    """Gives all locks of this process back and removes their files."""
    while _locks:
        path, file = _locks.pop()
        path.unlink(missing_ok=True)
        file.close()


# --- parents --------------------------------------------------------------------------------------

def end_with_parent(number):
    """Has this process get the signal `number` when the one that started it dies. On Linux alone:
    elsewhere it goes on."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(1, number)       # PR_SET_PDEATHSIG
