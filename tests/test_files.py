"""The prepared files, the raw files and their download, on tiny files."""
import gzip
import http.server
import json
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest

from beauty import amazon
from plumbing.settings import UserError

REVIEWS, META = amazon.RAW_LIMITS
ITEMS = "item_id\tasin\tbrand\tcategories\n" \
        "1\tA1\tOPI\tMakeup > Nails\n2\tA2\t\tSkin Care\n3\tA3\tOPI\tSkin Care > Face\n4\tA4\t\tX\n"
SEQUENCES = "1 1 2 3\n2 4 3 2 1\n3 1 4\n"


def prepared(folder, items=ITEMS, sequences=SEQUENCES):
    folder.mkdir(exist_ok=True)
    for name, text in (("items.tsv", items), ("sequences.txt", sequences)):
        if text is not None:
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder)


def review(user, asin, time):
    return json.dumps({"reviewerID": user, "asin": asin, "reviewText": "ünï\ttext",
                       "unixReviewTime": time})


def raw(folder, reviews, metas):
    folder.mkdir(exist_ok=True)
    for name, lines in ((REVIEWS, reviews), (META, metas)):
        with gzip.open(folder / name, "wt", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
    return str(folder)


def small_raw(folder, extra=()):
    """5 users with 5 items, file sorted by item as the real one; 5 brands Big, one Rare."""
    reviews = [review(f"U{u}", f"A{i}", 100 - i) for i in range(5) for u in range(5)]
    metas = []
    for i in range(5):
        path = ["Beauty", "Makeup", "Odd" if i == 2 else "Lips & Co", "Deep"]
        metas.append(repr({"asin": f"A{i}", "brand": "Rare" if i == 4 else "Big",
                           "related": {"also_bought": ["A0"]}, "categories": [path]}))
    metas += [repr({"asin": "NOT", "brand": "Big", "categories": [["Beauty", "Odd"]] * 9})]
    return raw(folder, reviews, metas + list(extra))


def read(folder, name):
    return (folder / name).read_text(encoding="utf-8")


def error_of(function, *args):
    with pytest.raises(UserError) as info:
        function(*args)
    assert "\n" not in str(info.value) and len(str(info.value)) < 600
    return str(info.value)


# --- prepared files

def test_read(tmp_path):
    sequences, items, source, n_skipped, names = amazon.read_beauty(prepared(tmp_path))
    assert source == "prepared files" and n_skipped == 1 and len(items) == 4
    assert all(s.dtype == np.int64 for s in sequences)
    named = sorted([items[i] for i in s] for s in sequences)
    a, b = ("OPI", ("Makeup", "Nails")), ("", ("Skin Care",))
    c, d = ("OPI", ("Skin Care", "Face")), ("", ("X",))
    assert named == sorted([[a, b, c], [d, c, b, a]])
    assert names.keys() == {"1", "2", "3", "4", "A1", "A2", "A3", "A4"}
    assert all(names[i] == names["A" + i] for i in "1234")
    assert [items[names[i]] for i in "1234"] == [a, b, c, d]
    again = amazon.read_beauty(str(tmp_path))
    assert again[1] == items and all(np.array_equal(x, y) for x, y in zip(again[0], sequences))
    own = prepared(tmp_path / "own", ITEMS.replace("\tA3\t", "\t3\t"))  # an asin may be its own id
    assert amazon.read_beauty(own)[4].keys() == {"1", "2", "3", "4", "A1", "A2", "A4"}
    (tmp_path / "source.txt").write_text("converted from X\n")
    assert amazon.read_beauty(str(tmp_path))[2] == "converted from X"


def test_read_hides_the_id_order(tmp_path):
    n = 300
    items = "".join(f"{i}\tA{i}\tB{i}\tC\n" for i in range(1, n + 1))
    sequences = "".join(f"{u} {u} {u + 1} {u + 2}\n" for u in range(1, n - 1))
    items = "\t".join(amazon.HEADER) + "\n" + items
    sequences, items, *_ = amazon.read_beauty(prepared(tmp_path, items, sequences))
    old = np.array([int(brand[1:]) for brand, _ in items])
    assert sorted(old) == list(range(1, n + 1))
    first = np.array([old[s[0]] for s in sequences])
    assert abs(np.corrcoef(old, np.arange(n))[0, 1]) < 0.2
    assert abs(np.corrcoef(first, np.arange(n - 2))[0, 1]) < 0.2
    assert all(old[s].tolist() == [u, u + 1, u + 2] for s, u in zip(sequences, first))


@pytest.mark.parametrize("items, sequences, expected", [
    (None, SEQUENCES, "items.tsv is missing"),
    (ITEMS, None, "sequences.txt is missing"),
    ("", SEQUENCES, "items.tsv is empty"),
    (ITEMS, "", "sequences.txt is empty"),
    (ITEMS[ITEMS.index("\n") + 1:], SEQUENCES, "items.tsv, line 1: expected the header"),
    (ITEMS + "5\tA5\t", SEQUENCES, "items.tsv, line 6: expected 4 tab-separated"),
    (ITEMS + "5\tA5\t\t", SEQUENCES, "items.tsv, line 6: expected 4 tab-separated"),
    (ITEMS + "5\tA5\t\tA >  > B\n", SEQUENCES, "items.tsv, line 6: expected 4 tab-separated"),
    (ITEMS + "-5\tA5\t\tA\n", SEQUENCES, "items.tsv, line 6: expected 4 tab-separated"),
    (ITEMS + "2\tA5\t\tA\n", SEQUENCES, "items.tsv, line 6: item id 2 is there twice"),
    (ITEMS + "5\tA2\t\tA\n", SEQUENCES, "items.tsv, line 6: asin A2 is there twice"),
    (ITEMS + "5\t A2 \t\tA\n", SEQUENCES, "items.tsv, line 6: asin A2 is there twice"),
    (ITEMS + "5\t3\t\tA\n", SEQUENCES, "3 is the id of one item and the asin of another"),
    (ITEMS.encode() + b"5\tA5\t\xff\tA\n", SEQUENCES, "items.tsv, line 6: the text is not UTF-8"),
    (ITEMS, SEQUENCES + "4 1 9 3\n", "sequences.txt, line 4: items.tsv lacks item 9"),
    (ITEMS, SEQUENCES + "4", "sequences.txt, line 4: expected a user id and its item ids"),
    (ITEMS, SEQUENCES + "\n", "sequences.txt, line 4: expected a user id and its item ids"),
    (ITEMS, SEQUENCES + "4 1 x 3\n", "sequences.txt, line 4: expected a user id and its item ids"),
    (ITEMS, SEQUENCES + "4 1 ٢ 3\n", "sequences.txt, line 4: expected a user id and its item ids"),
    (ITEMS, SEQUENCES + "u4 1 2 3\n", "sequences.txt, line 4: expected a user id and its item ids"),
    (ITEMS, SEQUENCES + "4 " + "z" * 5000, "zzz'…"),
    (ITEMS, SEQUENCES + "2 1 2 3\n", "sequences.txt, line 4: user id 2 is there twice"),
    (ITEMS, SEQUENCES + "4 " + "1 " * 2**20, "sequences.txt, line 4: over 1048576 bytes a line"),
    (ITEMS, SEQUENCES.encode() + b"\xff 1 2 3\n", "sequences.txt, line 4: the text is not UTF-8"),
    (ITEMS, "1 1 2\n", "sequences.txt has no user with 3 or more items"),
])
def test_bad_prepared_files_are_named(tmp_path, items, sequences, expected):
    assert expected in error_of(amazon.read_beauty, prepared(tmp_path / "d", items, sequences))


def test_missing_folder(tmp_path):
    message = error_of(amazon.read_beauty, str(tmp_path / "none"))
    assert "there is no folder" in message and "--data_dir" in message and "--download" in message


# --- raw files

def test_convert(tmp_path):
    amazon.convert_raw(small_raw(tmp_path / "raw"), str(tmp_path / "out"))
    # Users read A4 first (time 96), so it is item 1. Its brand and the part Odd are rare, and rare
    # parts are left out.
    expected = "".join(f"{u} 1 2 3 4 5\n" for u in range(1, 6))
    assert read(tmp_path / "out", "sequences.txt") == expected
    lines = read(tmp_path / "out", "items.tsv").splitlines()
    assert lines[0] == "item_id\tasin\tbrand\tcategories" and lines[1] == "1\tA4\t\tMakeup > Deep"
    assert read(tmp_path / "out", "source.txt") == f"converted from {REVIEWS} and {META}\n"
    assert sorted(os.listdir(tmp_path / "out")) == ["items.tsv", "sequences.txt", "source.txt"]
    sequences, items, source, n_skipped, _ = amazon.read_beauty(str(tmp_path / "out"))
    assert len(sequences) == 5 and len(items) == 5 and n_skipped == 0
    assert source.startswith("converted from")


def test_convert_keeps_ties_in_file_order_and_users_by_appearance(tmp_path):
    reviews = [review("Z", "C", 5), review("A", "D", 1), review("Z", "B", 5), review("Z", "A", 1),
               review("A", "B", 1)]
    amazon.convert_raw(raw(tmp_path / "raw", reviews, ["{'asin': 'Q'}"]), str(tmp_path))
    # User Z: A, then C before B as in the file; then user A.
    assert read(tmp_path, "sequences.txt") == "1 1 2 3\n2 4 3\n"
    expected = [f"{i}\t{a}\t\tUnknown" for i, a in enumerate("ACBD", 1)]
    assert read(tmp_path, "items.tsv").splitlines()[1:] == expected


def test_convert_attributes(tmp_path):
    asins = [f"A{i}" for i in range(6)]
    two = [["Beauty", "Tools", "Bags"], ["Clothing", "Luggage"]]
    metas = [{"asin": a, "brand": " Dolce &amp;\tGab\nbana ", "categories": two} for a in asins[:5]]
    # The name of this brand is common as a category.
    metas += [{"asin": "A5", "brand": "Luggage", "categories": [["Beauty"]]}]
    out, reviews = tmp_path / "out", [review("U", a, 1) for a in asins]
    amazon.convert_raw(raw(tmp_path / "raw", reviews, map(repr, metas)), str(out))
    rows = [line.split("\t") for line in read(out, "items.tsv").splitlines()[1:]]
    assert rows[0] == ["1", "A0", "Dolce & Gab bana", "Tools > Bags > Luggage"]
    assert rows[5] == ["6", "A5", "Luggage", "Unknown"]


def test_convert_drops_what_is_seen_4_times(tmp_path):
    asins = [f"A{i}" for i in range(4)]
    metas = [repr({"asin": a, "brand": "B", "categories": [["Beauty", "M"]]}) for a in asins]
    reviews = [review("U", a, 1) for a in asins]
    amazon.convert_raw(raw(tmp_path / "raw", reviews, metas), str(tmp_path))
    lines = read(tmp_path, "items.tsv").splitlines()[1:]
    assert len(lines) == 4 and all(line.endswith("\t\tUnknown") for line in lines)


EVIL = "__import__('os').system('touch {}')"


@pytest.mark.parametrize("line", [
    EVIL, "{{'asin': 'A1', 'brand': " + EVIL + "}}", "{{'asin': 'A1'", "('asin': 'A1')",
    "{{'asin': 'A1', 'categories': [['Beauty', 3]]}}", "{{'asin': 'A1', 'categories': ['Beauty']}}",
    "{{'asin': 'A1', 'brand': 7}}", "['A1']", "", "-" * 10**5 + "1", "1" + "+1" * 10**5])
def test_bad_meta_line_is_named_and_never_run(tmp_path, line):
    proof = tmp_path / "proof"
    prepared(tmp_path / "out")
    folder = small_raw(tmp_path / "raw", [line.format(proof)])
    message = error_of(amazon.convert_raw, folder, str(tmp_path / "out"))
    assert f"{META}, line 7: expected a Python literal" in message and not proof.exists()
    assert read(tmp_path / "out", "items.tsv") == ITEMS and len(os.listdir(tmp_path / "out")) == 2


@pytest.mark.parametrize("line", [
    "{", "[]", "7", "", '{"reviewerID": "U", "asin": "A1"}', review("U", "A\t1", 3),
    review("U 1", "A1", 3), review("U", "A1", "3"), review("U", None, 3), "[" * 10**5])
def test_bad_review_line_is_named(tmp_path, line):
    folder = raw(tmp_path, [review("U", "A1", 1), line], [])
    message = error_of(amazon.convert_raw, folder, str(tmp_path / "out"))
    assert f"{REVIEWS}, line 2: expected a JSON object" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [REVIEWS, META])
def test_damaged_gzip(tmp_path, name, monkeypatch):
    folder, out = small_raw(tmp_path / "raw"), prepared(tmp_path / "out")
    path = tmp_path / "raw" / name
    whole = path.read_bytes()
    for content, expected in (
            (whole[:-12], "cut off"),
            (b"not gzip", "line 1: the file is cut off or unreadable"),
            (whole[:30] + b"\xff" * 20 + whole[50:], "cut off"),
            (b"", "is empty"),
            (None, "is missing")):
        path.unlink() if content is None else path.write_bytes(content)
        message = error_of(amazon.convert_raw, folder, out)
        assert name in message and expected in message and "--convert" in message
    path.write_bytes(whole)
    monkeypatch.setattr(amazon, "MAX_BYTES", 100)
    assert re.search(f"{REVIEWS}, line 2: over", error_of(amazon.convert_raw, folder, out))
    assert read(tmp_path / "out", "items.tsv") == ITEMS


def test_a_failed_check_or_write_leaves_the_old_files(tmp_path, monkeypatch):
    folder, out = small_raw(tmp_path / "raw"), prepared(tmp_path / "out")
    message = error_of(amazon.convert_raw, folder, out, amazon.check_counts)
    assert "(5, 25, 5)" in message and "(22363, 198502, 12101)" in message

    def disk_full(*_):
        raise OSError("disk full")
    monkeypatch.setattr(amazon.os, "replace", disk_full)
    assert "disk full" in error_of(amazon.convert_raw, folder, out)
    assert sorted(os.listdir(out)) == ["items.tsv", "sequences.txt"]
    assert read(tmp_path / "out", "items.tsv") == ITEMS


def test_check_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(amazon, "COUNTS", (2, 7, 4))
    amazon.check_counts(prepared(tmp_path, sequences=SEQUENCES[:-6]))


# --- download

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, content = self.server, self.server.content
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        server.requests.append(start)
        if server.ranges and start >= len(content) and start:
            self.send_error(416)
            return
        if server.ranges and start:
            self.send_response(206)
            size = len(content)
            self.send_header("Content-Range", f"bytes {start + server.shift}-{size - 1}/{size}")
        else:
            self.send_response(200)
            start = 0
        if server.length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        self.wfile.write(body[:server.cut] if server.cut else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.requests = os.urandom(300_000), []
    server.ranges, server.length = True, True
    server.shift, server.cut = 0, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(amazon, "BASE_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(amazon, "RAW_LIMITS", {REVIEWS: 400_000})
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("length", [True, False])
def test_download(tmp_path, server, length):
    server.length = length
    amazon.download_raw(str(tmp_path / "new"))
    amazon.download_raw(str(tmp_path / "new"))  # there already: no request
    assert (tmp_path / "new" / REVIEWS).read_bytes() == server.content and server.requests == [0]
    assert os.listdir(tmp_path / "new") == [REVIEWS]


@pytest.mark.parametrize("ranges", [True, False])
def test_download_goes_on_after_a_cut(tmp_path, server, ranges):
    server.ranges, server.cut = ranges, 100_000
    message = error_of(amazon.download_raw, str(tmp_path))
    assert "100000 of 300000" in message and "by hand" in message and "--convert" in message
    assert amazon.BASE_URL in message
    assert os.listdir(tmp_path) == [REVIEWS + ".part"]
    server.cut = 0
    amazon.download_raw(str(tmp_path))
    assert (tmp_path / REVIEWS).read_bytes() == server.content and server.requests == [0, 100_000]


def test_download_with_a_part_that_is_too_long_starts_again(tmp_path, server):
    (tmp_path / (REVIEWS + ".part")).write_bytes(b"x" * 300_000)
    amazon.download_raw(str(tmp_path))
    assert (tmp_path / REVIEWS).read_bytes() == server.content and server.requests == [300_000, 0]


def test_download_refuses_another_range(tmp_path, server):
    (tmp_path / (REVIEWS + ".part")).write_bytes(server.content[:10])
    server.shift = 5
    assert "unexpected answer 206" in error_of(amazon.download_raw, str(tmp_path))


@pytest.mark.parametrize("length", [True, False])
def test_download_size_limit(tmp_path, server, monkeypatch, length):
    server.length = length
    monkeypatch.setattr(amazon, "RAW_LIMITS", {REVIEWS: 200_000})
    assert "larger than the 200000 bytes" in error_of(amazon.download_raw, str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_download_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(amazon, "BASE_URL", "http://127.0.0.1:9/")
    assert "by hand" in error_of(amazon.download_raw, str(tmp_path), 2)


# --- command line

def test_main(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["amazon.py", "--data_dir", prepared(tmp_path)])
    amazon.main()
    assert "2 users, 7 interactions, 4 items; 1 users" in capsys.readouterr().out
    command = [sys.executable, amazon.__file__, "--data_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0 and "2 users, 7 interactions, 4 items; 1 users" in done.stdout
    monkeypatch.setattr(sys, "argv", ["amazon.py", "--data_dir", str(tmp_path), "--convert"])
    with pytest.raises(SystemExit) as info:
        amazon.main()
    assert info.value.code == 2 and REVIEWS in capsys.readouterr().err


def test_ctrl_c_is_one_line(tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(amazon, "download_raw", stopped)
    monkeypatch.setattr(sys, "argv", ["amazon.py", "--data_dir", str(tmp_path), "--download"])
    with pytest.raises(SystemExit) as info:
        amazon.main()
    assert info.value.code == 130 and capsys.readouterr().err.count("\n") == 1


def test_main_convert(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(amazon, "COUNTS", (5, 25, 5))
    monkeypatch.setattr(sys, "argv", ["amazon.py", "--data_dir", small_raw(tmp_path), "--convert"])
    amazon.main()
    assert "5 users, 25 interactions, 5 items" in capsys.readouterr().out
