"""Files of records: reading them in every usual form, and writing files whole.

    for source, record in read_records(["pairs.jsonl", "more.json.gz"]): ...
    run = read_json("run.json")
    write_whole("scores.json", text)

A file of records is JSON Lines, one JSON array, either of them gzipped, or parquet (which needs
pyarrow, imported here alone). Its first bytes tell which, not its name. A record's source is its
place: "file:line", or "file: item N" of an array or of parquet. Text is UTF-8, with or without a
byte-order mark. What is no file of records (another encoding, another archive, objects that are
indented over several lines) is refused with its name and a command that converts it.

A bad line (no JSON object, or one that its reader refuses) does not end the reading. The error at
the end names the first ten and counts the others, so that a file can be put right in one go; or
bad lines are dropped and counted.
"""
import gzip
import io
import itertools
import json
import mmap
import multiprocessing
import os
import signal
import sys
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path

from command import end_with_parent

BAD_LINES_SHOWN = 10        # in the error; the others are counted
MAX_DEPTH = 100             # of objects and lists in each other; Python's own limits vary
LINES_PER_TASK = 256        # of a worker
TASKS_PER_WORKER = 4        # handed out and not yet done; this bounds the memory

HEAD = 1 << 20              # bytes that are looked at to tell what a file is
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NOT_RECORDS = {             # first bytes of a file: what it is
    b"\xff\xfe\x00\x00": "UTF-32 text",     # before UTF-16, whose mark is the same two bytes
    b"\x00\x00\xfe\xff": "UTF-32 text",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow stream",
}


class Dropped(Exception):
    """A record that is well-formed but not used; the message is the reason that is counted."""


# --- records --------------------------------------------------------------------------------------

def read_records(files, use=None, dropped=None, skip_bad_lines=None, workers=1):
    """Yields (source, use(record, source)) of the records of files, in their order.

    use: called with (record, source); None yields the records themselves. It may raise Dropped,
    which is counted in the Counter `dropped` by its reason, or ValueError, which makes a bad line.
    skip_bad_lines: True counts bad lines in `dropped`. Otherwise a ValueError at the end names the
    first ten, and advises the flag --skip_bad_lines unless this is None (the caller has no such
    flag).
    workers > 1: records are parsed and used in as many forked processes.
    A file that is no file of records is a ValueError at once.
    """
    if use is None:
        use = _as_it_is
    if dropped is None:
        dropped = Counter()

    # All items of all files one after the other, each with what became of it.
    items = itertools.chain.from_iterable(read_items(file) for file in files)
    if workers > 1:
        outcomes = _outcomes_of_workers(use, items, workers)
    else:
        outcomes = ((source, _outcome(use, source, item)) for source, item in items)

    # Records go out as they come; bad lines wait for the end.
    shown = []
    n_bad = 0
    for source, outcome in outcomes:
        if isinstance(outcome, Dropped):
            dropped[str(outcome)] += 1
        elif isinstance(outcome, ValueError):
            n_bad += 1
            if n_bad <= BAD_LINES_SHOWN:
                shown.append(str(outcome))
        else:
            yield source, outcome

    # The generator ends: tell or count the bad lines.
    if n_bad and skip_bad_lines:
        dropped[f"bad lines, the first {shown[0]}"] += n_bad
    elif n_bad:
        raise ValueError(_bad_lines(shown, n_bad, skip_bad_lines is not None))


def _as_it_is(record, source):
    return record


def _bad_lines(shown, n_bad, may_skip):
    """The message about n_bad bad lines, of which some are shown."""
    # A single one is told on one line, as any other error.
    if n_bad == 1:
        advice = "; put it right, or drop and count such lines with --skip_bad_lines"
        return shown[0] + (advice if may_skip else "")
    lines = [f"{n_bad} bad lines:", *shown]
    if n_bad > len(shown):
        lines.append(f"and {n_bad - len(shown)} others")
    advice = "\nput them right, or drop and count them with --skip_bad_lines"
    return "\n  ".join(lines) + (advice if may_skip else "")


def _outcome(use, source, item):
    """use(record, source), or the Dropped or the ValueError that says why there is none."""
    try:
        return use(parse_item(item), source)
    except Dropped as reason:
        return reason
    except ValueError as e:
        return ValueError(f"{source}: {e}")
    except (KeyboardInterrupt, SystemExit):
        raise
    # A mistake of ours, or a panic in a library (of Rust), which is no Exception: name the record.
    except BaseException as e:
        raise RuntimeError(f"{source}: {type(e).__name__}: {e}") from e


def read_jsonl(path):
    """Yields (source, record) of one file. ValueError names the bad lines."""
    return read_records([path])


def read_json(path):
    """The object that a JSON file holds. ValueError and OSError name the file and the field."""
    return parse_line(path, read_bytes(path))


def parse_line(source, line):
    """The record of a line (bytes). ValueError names the source."""
    try:
        return parse_item(line)
    except ValueError as e:
        raise ValueError(f"{source}: {e}") from None


def parse_item(item):
    """The record of a line (bytes), or of an item that is parsed already. ValueError unless it is
    an object of whole characters and finite numbers, with each name once."""
    # Items of arrays and of parquet are objects already.
    try:
        record = parse_json(item.decode()) if isinstance(item, bytes) else item
        if not isinstance(record, dict):
            raise TypeError(f"expected a JSON object, found {record!r:.60}")
        _check_values(record, "")
    except UnicodeDecodeError as e:
        # Told in the words of a text editor: bytes are counted from 1.
        raise ValueError(
            f"cannot be read as UTF-8 text (byte {e.object[e.start]:#x} at byte {e.start + 1} of "
            "the line); if it is Latin-1 or Windows-1252, convert the file: "
            "iconv -f WINDOWS-1252 -t UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deep to be read") from None
    except TypeError as e:
        raise ValueError(str(e)) from None
    return record


def parse_json(text):
    """What a JSON text holds. ValueError if it is not valid, or an object has a name twice:
    Python's json would drop all but the last."""
    try:
        return json.loads(text, object_pairs_hook=_named_once)
    except json.JSONDecodeError as e:
        raise ValueError(f"not valid JSON ({e})") from None
    except RecursionError:
        raise ValueError("nested too deep to be read") from None


def _named_once(items):
    found = dict(items)
    if len(found) < len(items):
        (name, _), *_ = (Counter(name for name, _ in items)).most_common(1)
        raise ValueError(f"has {name!r:.60} twice in one object; expected each name once")
    return found


def is_finite_number(value):
    """Whether a value of a file is a finite number, that a float can hold. True and False are
    none."""
    # type() and not isinstance(): True and False are ints too.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _check_values(value, field, depth=0):
    """ValueError that names the field of a record which holds half a surrogate pair, or a number
    that is not finite. Python's json reads both, but neither UTF-8 nor JSON has them."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep to be read")
    if isinstance(value, str):
        if not value.isascii():     # which is fast, and mostly so
            try:
                value.encode()
            except UnicodeEncodeError as e:
                raise ValueError(
                    f"{field} holds half a surrogate pair ({value[e.start]!a} at character "
                    f"{e.start + 1}); expected whole characters (was it cut in the middle of an "
                    "emoji?)") from None
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if not is_finite_number(value):
            found = json.dumps(value) if isinstance(value, float) else "a whole number over 1e308"
            raise ValueError(f"{field} is {found}, which JSON does not have; expected text, a "
                             "finite number or null")
    # Containers: the field is spelled as in jq, a.b[0].
    elif isinstance(value, dict):
        for name, inner in value.items():
            _check_values(name, f"a name in {field or 'the row'}")
            _check_values(inner, f"{field}.{name}" if field else name, depth + 1)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _check_values(inner, f"{field}[{i}]", depth + 1)


# --- files ----------------------------------------------------------------------------------------

def read_items(path):
    """Yields ("file:line", bytes) of the lines of JSON Lines that are not empty, or
    ("file: item N", object) of an array or of parquet. ValueError if the file is none of them."""
    try:
        with _unpacked(path) as f:
            # 1. What it is, by its first bytes.
            head = f.peek(HEAD)
            _refuse_other_kinds(path, head)
            start = head.removeprefix(BYTE_ORDER_MARK).lstrip()

            # 2. Its items. JSON Lines are told by elimination: anything is a line, if a bad one.
            if head.startswith(b"PAR1"):
                yield from _read_parquet(path)
            elif start.startswith(b"["):
                yield from _read_array(path, f.read())
            elif _is_indented(start):
                raise ValueError(
                    f"{path}: JSON objects that are indented over several lines; expected an "
                    f"object a line (JSON Lines) or one array. Convert it: jq -c . {path} > NEW")
            else:
                # A line of Windows ends with \r\n: to JSON, both are white space.
                for number, line in enumerate(f, 1):
                    if number == 1:
                        line = line.removeprefix(BYTE_ORDER_MARK)
                    if line.strip():
                        yield f"{path}:{number}", line
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise ValueError(f"{path}: a damaged gzip archive ({e}); fetch or make it again") from None
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e})") from None


def read_bytes(path):
    """What a file holds. OSError names it."""
    try:
        with open(path, "rb", opener=_without_waiting) as f:
            return f.read()
    except OSError as e:
        raise OSError(f"{path}: cannot be read ({e})") from e


def _without_waiting(path, flags):
    """Opens a file. A pipe that nobody writes to would be waited for without end: it is empty."""
    fd = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(fd, True)
    return fd


def _unpacked(path):
    """A file opened past its compression, whose first HEAD bytes can be looked at."""
    # The buffer is what peek() looks into.
    f = open(path, "rb", buffering=HEAD, opener=_without_waiting)
    if f.peek(2).startswith(b"\x1f\x8b"):       # gzip
        return io.BufferedReader(gzip.open(f), HEAD)
    return f


def _refuse_other_kinds(path, head):
    """ValueError if the first bytes of a file are of another kind than records have."""
    expected = "expected JSON Lines or a JSON array in UTF-8, gzipped or not, or parquet"
    for first, kind in NOT_RECORDS.items():
        if head.startswith(first):
            advice = "Unpack or convert it"
            if "text" in kind:
                advice = f"Convert it: iconv -f {kind.split()[0]} -t UTF-8 {path} > NEW"
            raise ValueError(f"{path}: {kind}; {expected}. {advice}")
    # A bracket or a brace of UTF-16 has a zero byte beside it.
    if b"\x00" in head[:4]:
        raise ValueError(f"{path}: UTF-16 or UTF-32 text without a byte-order mark, or no text at "
                         f"all; {expected}. Convert it: iconv -f UTF-16LE -t UTF-8 {path} > NEW")


def _is_indented(start):
    """Whether the text begins with an object that only ends on a later line."""
    text = start.decode(errors="replace")
    try:
        found, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False        # a bad first line, or an object longer than HEAD
    return isinstance(found, dict) and "\n" in text[:end]


def _read_array(path, content):
    """Yields (source, item) of a JSON array, which can only be read whole."""
    try:
        records = parse_json(content.decode("utf-8-sig"))       # -sig: past a byte-order mark
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({e})") from None
    except ValueError as e:
        raise ValueError(f"{path}: not a valid JSON array: {e}") from None
    for number, record in enumerate(records, 1):
        yield f"{path}: item {number}", record


def _read_parquet(path):
    """Yields (source, record) of a parquet file, with the values that records have as JSON."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: a parquet file, which only pyarrow can read; pip install "
                         "pyarrow, or save the rows as JSON Lines") from None

    def as_text(value):
        if isinstance(value, bytes):
            raise ValueError(f"{path}: item {number} has a column of bytes, {value!r:.40}; "
                             "expected text: cast the column to string")
        return str(value)       # dates and the like

    def rows():
        # pyarrow's errors are of many kinds, and few of them name the file.
        try:
            file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise ValueError(f"two columns of one name among {names!r:.80}")
            for batch in file.iter_batches():
                yield from batch.to_pylist()
        except Exception as e:
            raise ValueError(
                f"{path}: cannot be read as parquet ({e}); fetch or make it again") from e

    # Through JSON and back: a record is what it would be in a file of JSON Lines.
    for number, record in enumerate(rows(), 1):
        yield f"{path}: item {number}", json.loads(json.dumps(record, default=as_text))


# --- forked workers -------------------------------------------------------------------------------

def _outcomes_of_workers(use, items, workers):
    """Yields (source, outcome) of items in their order, from forked processes.

    `use` reaches them in the memory that they are forked with: it is never pickled.
    ChildProcessError if one of them dies.
    """
    # For each task in hand the line at which its worker is, -1 for none. The memory is shared with
    # the workers, so that it tells the line even of one that was killed.
    at_work = memoryview(mmap.mmap(-1, 8 * workers * TASKS_PER_WORKER)).cast("q")
    running = deque()           # (lines, slot of at_work, future) of tasks, the oldest first
    fork = multiprocessing.get_context("fork")      # not every Python's default
    with ProcessPoolExecutor(workers, fork, _begin_worker, (use, at_work, os.getpid())) as pool:
        try:
            for number in itertools.count():
                # Lines are read in this process; a free worker gets a task of them.
                lines = list(itertools.islice(items, LINES_PER_TASK))
                if not lines:
                    break
                # Every slot is taken: wait for the oldest task, which has the next slot.
                if len(running) == len(at_work):
                    yield from _oldest_outcomes(running)
                slot = number % len(at_work)
                at_work[slot] = -1
                running.append((lines, slot, pool.submit(_work, lines, slot)))
            while running:
                yield from _oldest_outcomes(running)
        except BrokenProcessPool:
            # One of the lines that workers had in hand killed its worker.
            places = [lines[at_work[slot]][0] for lines, slot, _ in running if at_work[slot] >= 0]
            raise ChildProcessError(
                f"a worker process died at {' or '.join(places) or 'its start'}: killed, perhaps "
                "for want of memory, or by a crash in a library; try fewer processes (taskset), or "
                "that line alone") from None


def _oldest_outcomes(running):
    """(source, outcome) of each line of the oldest task, which is waited for."""
    lines, _, future = running[0]
    outcomes = future.result()
    # Only now: if the worker dies, the task is among those that may have killed it.
    running.popleft()
    sources = [source for source, _ in lines]
    return zip(sources, outcomes)


def _begin_worker(use, at_work, parent):
    """Runs first in each worker."""
    # What _work needs, as globals of this process.
    global _use, _at_work
    _use = use
    _at_work = at_work

    # Ctrl-C reaches all processes: the parent ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A parent that is killed leaves no workers behind.
    end_with_parent(signal.SIGKILL)
    # The parent may have died before that.
    if os.getppid() != parent:
        os._exit(1)


def _work(lines, slot):
    """The outcomes of a task's lines, in a worker."""
    outcomes = []
    for i, (source, item) in enumerate(lines):
        _at_work[slot] = i
        outcomes.append(_outcome(_use, source, item))
    _at_work[slot] = -1
    return outcomes


# --- writing --------------------------------------------------------------------------------------

def check_output(path, *inputs):
    """Before long work: ValueError or OSError unless a file can be written at `path`, which is none
    of the inputs under any name. Says so if it would replace one."""
    for file in inputs:
        if os.path.isfile(path) and os.path.exists(file) and os.path.samefile(path, file):
            raise ValueError(f"{path}: input and output are one file; expected two")
    # What is there stays as it is: only the temporary file is tried.
    with _temporary_file(path) as temporary:
        if temporary != Path(path):
            open(temporary, "wb").close()
    if os.path.isfile(path):
        print(f"output   replaces {path}")


@contextmanager
def written_whole(path):
    """Gives a temporary name beside `path` to write to. What was written gets its own name at the
    end; after an error there is nothing of it. So a file is whole or absent under its name,
    whenever the process is killed. OSError names the file."""
    with _temporary_file(path) as temporary:
        yield temporary
        if temporary != Path(path):
            # A link stays a link: what it points to is replaced.
            temporary.replace(os.path.realpath(path))


@contextmanager
def _temporary_file(path):
    """Gives the name that stands for `path` while it is written, and removes that file at the end.
    It is `path` itself if that is a device or a pipe (/dev/stdout), which cannot be replaced."""
    temporary = None
    try:
        if os.path.isdir(path):
            raise IsADirectoryError("a folder; expected the name of a file")
        if os.path.exists(path) and not os.path.isfile(path):
            yield Path(path)
        else:
            real = Path(os.path.realpath(path))
            temporary = real.with_name(f"{real.stem}.{os.getpid()}.tmp{real.suffix}")
            yield temporary
    except OSError as e:
        raise OSError(f"{path}: cannot be written ({e})") from e
    finally:
        if temporary:
            with suppress(OSError):
                temporary.unlink()


def write_whole(path, text):
    """Writes a text file so that it is never seen half-written."""
    # Half a surrogate (in the name of a folder that is not UTF-8) becomes its escape in JSON.
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def append_whole(path, text):
    """Appends text to a file: all of it, or nothing and an OSError that names the file."""
    size = os.path.getsize(path) if os.path.exists(path) else 0
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(text)
    except OSError as e:
        # Half a line would be joined to the next one.
        with suppress(OSError):
            os.truncate(path, size)
        raise OSError(f"{path}: cannot be written ({e})") from e


def write_records(path, records):
    """Writes records as JSON Lines, whole."""
    with written_whole(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        # Text stays readable: no \u escapes for other alphabets.
        for record in records:
            print(json.dumps(record, ensure_ascii=False), file=f)
