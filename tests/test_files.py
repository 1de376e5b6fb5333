"""Files of rows in every form, what is refused as what it is, bad lines, and files that are whole
or absent.

    pytest tests/test_files.py
"""
import bz2
import gzip
import json
import os
import resource
import sys
import time
from collections import Counter
from types import ModuleType, SimpleNamespace

import pytest

from data.files import (Dropped, check_output, read_json, read_jsonl, read_records, write_records, write_whole,
                        written_whole)

ROWS = [{"prompt": "naïve 👋", "n": 1}, {"prompt": "b", "n": 2.5},
        {"prompt": "c", "deep": [{"x": None}]}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS).encode()
INDENTED_ARRAY = json.dumps(ROWS, indent=1).encode()
BOM = b"\xef\xbb\xbf"

FORMS = {
    "lines": LINES, "lines with a byte-order mark": BOM + LINES,
    "lines of Windows": LINES.replace(b"\n", b"\r\n"),
    "lines without a last newline": LINES[:-1],
    "empty lines between": LINES.replace(b"\n", b"\n \n\n"),
    "gzipped lines": gzip.compress(LINES),
    "gzipped lines with a byte-order mark": gzip.compress(BOM + LINES),
    "an array on one line": ARRAY, "an indented array": INDENTED_ARRAY,
    "an array with a byte-order mark": BOM + ARRAY,
    "a gzipped array": gzip.compress(INDENTED_ARRAY)}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_file_holds_the_same_rows_whatever_its_name(form, tmp_path):
    path = tmp_path / "rows.dat"
    path.write_bytes(FORMS[form])
    found = list(read_records([path]))
    assert [row for _, row in found] == ROWS
    step = 3 if "between" in form else 1
    places = [f"{path}: item {i}" if "array" in form else f"{path}:{1 + step * (i - 1)}"
              for i in (1, 2, 3)]
    assert [source for source, _ in found] == places


def test_parquet_is_read_where_pyarrow_is_and_asked_for_where_not(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and the rest")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = "rows.parquet: a parquet file, which only pyarrow can read; pip install pyarrow"
    with pytest.raises(ValueError, match=message):
        list(read_records([path]))

    class ParquetFile:
        schema_arrow = SimpleNamespace(names=["prompt", "n"])

        def __init__(self, file, **settings):
            assert file == path

        def iter_batches(self):
            return [self, self]

        def to_pylist(self):
            return ROWS[:2]
    pyarrow, pyarrow.parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    pyarrow.parquet.ParquetFile = ParquetFile
    monkeypatch.setitem(sys.modules, "pyarrow", pyarrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", pyarrow.parquet)
    assert list(read_records([path]))[3] == (f"{path}: item 4", ROWS[1])


@pytest.mark.parametrize("names, failure, message", [
    (["a", "b"], OSError("Corrupt snappy compressed data."), "cannot be read as parquet .Corrupt snappy"),
    (["a", "b"], NotImplementedError("no such codec"), "cannot be read as parquet .no such codec"),
    (["a", "a"], None, "cannot be read as parquet .two columns of one name")], ids=range(3))
def test_parquet_that_is_damaged_is_named(names, failure, message, tmp_path, monkeypatch):
    class ParquetFile:
        schema_arrow = SimpleNamespace(names=names)

        def __init__(self, file, **settings):
            pass

        def iter_batches(self):
            if failure:
                raise failure
            return []
    pyarrow, pyarrow.parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    pyarrow.parquet.ParquetFile = ParquetFile
    monkeypatch.setitem(sys.modules, "pyarrow", pyarrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", pyarrow.parquet)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and the rest")
    with pytest.raises(ValueError, match=f"rows.parquet: {message}"):
        list(read_records([tmp_path / "rows.parquet"]))


def test_what_is_no_regular_file_is_read_as_empty_or_named_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert list(read_records([tmp_path / "pipe"])) == [] == list(read_records(["/dev/null"]))
    with pytest.raises(ValueError, match=f"{tmp_path}: cannot be read .*Is a directory"):
        list(read_records([tmp_path]))
    for path, message in ((tmp_path, "Is a directory"), (tmp_path / "absent", "No such file")):
        with pytest.raises(OSError, match=f"{path}: cannot be read .*{message}"):
            read_json(path)
    with pytest.raises(ValueError, match="pipe: not valid JSON"):
        read_json(tmp_path / "pipe")


def test_a_pipe_that_is_written_to_is_read_to_its_end(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read_end = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_end = os.open(tmp_path / "pipe", os.O_WRONLY)
    os.write(write_end, LINES[:20])

    # The rest comes later, from a process of its own.
    writer = os.fork()
    if writer == 0:
        time.sleep(0.3)
        os.write(write_end, LINES[20:])
        os._exit(0)
    os.close(write_end)
    assert [row for _, row in read_records([tmp_path / "pipe"])] == ROWS
    os.waitpid(writer, 0)
    os.close(read_end)


OBJECTS = "\n".join(json.dumps(row, indent=1) for row in ROWS)


@pytest.mark.parametrize("content, message", [
    (LINES.decode().encode("utf-16"), "UTF-16 text; expected .* UTF-8.* iconv -f UTF-16 -t UTF-8"),
    (LINES.decode().encode("utf-16-le"), "UTF-16 or UTF-32 text without a byte-order mark"),
    (LINES.decode().encode("utf-32"), "UTF-32 text; expected"),
    (b"PK\x03\x04...", "a zip archive; expected"),
    (bz2.compress(LINES), "a bzip2 archive"), (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (gzip.compress(LINES)[:-9], "a damaged gzip archive"),
    (b"\x1f\x8b and no more", "a damaged gzip archive"),
    (OBJECTS.encode(),
     "JSON objects that are indented over several lines; expected an object a line"),
    (BOM + OBJECTS.encode(), "JSON objects that are indented"),
    (ARRAY[:-1], "not a valid JSON array"),
    (gzip.compress(LINES.decode().encode("utf-16")), "UTF-16 text"),
    ("[\"é\"]".encode("latin-1"), "cannot be read as UTF-8 text")], ids=range(13))
@pytest.mark.parametrize("skip", [False, True])
def test_what_is_no_file_of_rows_is_refused_as_what_it_is(content, message, skip, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"rows.jsonl: {message}"):
        list(read_records([tmp_path / "rows.jsonl"], skip_bad_lines=skip))


# --- bad lines ------------------------------------------------------------------------------------

@pytest.mark.parametrize("line, message", [
    (b'{"a": "cut \\ud83d"}',
     r"a holds half a surrogate pair \('\\ud83d' at character 5\); expected whole characters"),
    (b'{"a": [{"b": ["x", "\\udc4b"]}]}', r"a\[0\].b\[1\] holds half"),
    (b'{"a": {"\\ud83d": 1}}', "a name in a holds half"), (b'{"\\ud83d": 1}', "a name in the row holds half"),
    (b'{"a": 1, "a": 2}', "has 'a' twice in one object; expected each name once"),
    (b'{"a": ' + b"9" * 400 + b"}", "a is a whole number over 1e308"), (b'{"a": "\x00"}', "not valid JSON"),
    (b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}", "nested too deep"), (BOM + b'{"a": 1}', "not valid JSON .*BOM"),
    (b'{"a": NaN}', "a is NaN, which JSON does not have; expected text"),
    (b'{"a": [1, -Infinity]}', r"a\[1\] is -Infinity"),
    (b'{"a": 1e999}', "a is Infinity"),
    (b'{"a": "\xe9"}', "cannot be read as UTF-8 text .byte 0xe9 at byte 8"),
    (b'["a"]', r"expected a JSON object, found \['a'\]"), (b'{"a": 1', "not valid JSON"),
    (b"{} {}", "not valid JSON"),
    (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
    (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit .* for integer string conversion")],
    ids=range(18))
def test_a_line_that_is_no_row_is_named_with_field_and_cause(line, message, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": "fine \\ud83d\\udc4b"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"rows.jsonl:2: {message}"):
        list(read_jsonl(tmp_path / "rows.jsonl"))


def halves(row, source):
    if row["n"] % 3 == 0:
        raise ValueError(f"n is {row['n']}; expected no multiple of 3")
    if row["n"] % 5 == 0:
        raise Dropped("a multiple of 5")
    return row["n"] / 2


@pytest.mark.parametrize("workers", [1, 3])
def test_all_bad_lines_are_told_at_once_or_dropped_and_counted(workers, tmp_path):
    write_records(tmp_path / "rows.jsonl", ({"n": n} for n in range(1, 1001)))
    with pytest.raises(ValueError) as error:
        list(read_records([tmp_path / "rows.jsonl"], halves, skip_bad_lines=False, workers=workers))
    told = str(error.value).splitlines()
    assert told[0] == "333 bad lines:" and len(told) == 13
    assert told[1] == f"  {tmp_path}/rows.jsonl:3: n is 3; expected no multiple of 3"
    assert "rows.jsonl:30: " in told[10]
    assert told[11] == "  and 323 others" and told[12].endswith("--skip_bad_lines")

    dropped = Counter()
    found = list(read_records([tmp_path / "rows.jsonl"], halves, dropped, skip_bad_lines=True,
                           workers=workers))
    assert [value * 2 for _, value in found] == [n for n in range(1, 1001) if n % 3 and n % 5]
    assert found[-1] == (f"{tmp_path}/rows.jsonl:998", 499)
    first = f"{tmp_path}/rows.jsonl:3: n is 3; expected no multiple of 3"
    assert dropped == {"a multiple of 5": 134, f"bad lines, the first {first}": 333}


def test_a_mistake_of_ours_names_the_row_and_is_no_bad_line(tmp_path):
    write_records(tmp_path / "rows.jsonl", ROWS)

    def mistaken(row, source):
        return row["n"]
    for workers in (1, 2):
        with pytest.raises(RuntimeError, match="rows.jsonl:3: KeyError: 'n'"):
            list(read_records([tmp_path / "rows.jsonl"], mistaken, skip_bad_lines=True,
                           workers=workers))


def test_what_workers_use_is_never_pickled(tmp_path):
    write_records(tmp_path / "rows.jsonl", ({"n": n} for n in range(600)))
    secret = iter("a generator cannot be pickled")

    def use(row, source):
        return row["n"], str(type(secret))
    found = list(read_records([tmp_path / "rows.jsonl"], use, workers=2))
    assert [n for _, (n, _) in found] == list(range(600))


# --- writing --------------------------------------------------------------------------------------

def test_a_file_is_whole_or_absent_under_its_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write_records(path, (row if i < 2 else raised() for i, row in enumerate(ROWS)))
    assert not list(tmp_path.iterdir())
    write_records(path, ROWS)
    before = path.read_bytes()
    assert before == LINES
    with pytest.raises(KeyboardInterrupt):
        write_records(path, (row if i < 2 else raised() for i, row in enumerate(ROWS)))
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def raised():
    raise KeyboardInterrupt


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match="absent/a.txt: cannot be written .*No such file"):
        write_whole(tmp_path / "absent" / "a.txt", "text")


def test_what_cannot_be_written_is_known_before_the_work_and_leaves_no_trace(tmp_path, capsys):
    (tmp_path / "file").write_text("{}\n")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "hard").hardlink_to(tmp_path / "file")
    before = sorted(tmp_path.iterdir())
    for output, message in ((tmp_path, "a folder; expected the name of a file"),
                            (tmp_path / "absent/a", "No such file or directory"),
                            (tmp_path / "file/a", "Not a directory"), ("/proc/a", "")):
        with pytest.raises(OSError, match=f"^{output}: cannot be written .*{message}"):
            check_output(output)
        with pytest.raises(OSError, match=f"^{output}: cannot be written "):
            write_records(output, ROWS)
    for name in ("link", "hard", "file", f"../{tmp_path.name}/file"):
        with pytest.raises(ValueError, match="input and output are one file; expected two"):
            check_output(tmp_path / name, "absent", tmp_path / "file")
    assert capsys.readouterr().out == ""

    check_output(tmp_path / "link")
    assert capsys.readouterr().out == f"output   replaces {tmp_path}/link\n"
    check_output(tmp_path / "new", tmp_path / "file")
    check_output("/dev/null")
    assert capsys.readouterr().out == ""
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "file").read_text() == "{}\n"


def test_a_full_disk_is_told_with_the_name_of_the_file_that_stays_as_it_was(tmp_path):
    write_records(tmp_path / "rows.jsonl", ROWS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))        # what a full disk looks like
    try:
        with pytest.raises(OSError, match="rows.jsonl: cannot be written"):
            write_records(tmp_path / "rows.jsonl", ROWS * 1000)
        with pytest.raises(OSError, match="rows.jsonl: cannot be written"):
            write_whole(tmp_path / "rows.jsonl", "text" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "rows.jsonl").read_bytes() == LINES and len([*tmp_path.iterdir()]) == 1
    # A device is written to as it is, and named too.
    with pytest.raises(OSError, match="/dev/full: cannot be written .*No space left on device"):
        write_records("/dev/full", ROWS)


def test_the_name_of_a_folder_that_is_no_utf_8_does_not_lose_a_whole_file(tmp_path):
    name = os.fsdecode(b"mod\xe8le")
    write_whole(tmp_path / "a.json", json.dumps({"generator": name}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text()) == {"generator": name}


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "there" / "a.txt")
    write_whole(tmp_path / "link.txt", "text")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "there" / "a.txt").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    with written_whole(tmp_path / "pipe") as path:
        assert path == tmp_path / "pipe"
