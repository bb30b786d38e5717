"""Amazon Beauty on synthetic files: counts, candidates, evidence and prompts against plain loops,
and interventions: what a user takes later changes nothing that was written before."""
import gzip
import itertools
import math
import re
import runpy
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from beauty import convert, writer
from beauty.amazon import read_beauty
from beauty.evidence import FIELDS, HIST, RARE, STATED, merge_rare, prepare, rare
from beauty.prerank import FOLDS, K, MOST_ITEMS, check_size
from beauty.tokens import BRAND_MATCH, beauty_words, tokenize
from beauty.world import FRESH, beauty_world
from config import PRESETS, Config
from conftest import refusal
from data import PAD, faithfulness, parse_answers
from make_beauty import make_beauty

SPLITS = ("train", "val", "test")
N_ITEMS = 150


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Sequences, items and Lists; many histories are longer than the 8 items shown."""
    folder = tmp_path_factory.mktemp("beauty")
    make_beauty(folder, n_users=240, n_items=N_ITEMS, per_user=16)
    sequences, items, *_ = read_beauty(str(folder))
    return SimpleNamespace(sequences=sequences, items=items, lists=split(prepare(sequences, items)))


def split(lists):
    return dict(zip(SPLITS, lists))


def merged(made):
    """Copies of the Lists, with rare combinations rounded."""
    lists = [made.lists[name].take(slice(None)) for name in SPLITS]
    nearest = rare(lists[0])
    for part in lists:
        merge_rare(part, nearest)
    return lists


# --- The same as plain loops ------------------------------------------------------------------

def plain_counts(sequences, cut, left_out):
    """T, C and popularity, of the sequences without their last items, and without one fold."""
    T, C = np.zeros((2, N_ITEMS, N_ITEMS))
    cnt = np.zeros(N_ITEMS)
    for user, items in enumerate(sequences):
        part = [] if user % FOLDS == left_out else items[:-cut]
        for a, i in enumerate(part):
            cnt[i] += 1
            for b, j in enumerate(part[a + 1:], a + 1):
                value = len(part) ** -0.25 * (b - a) ** -0.75
                T[i, j] += round(value * 65536) / 65536
                T[j, i] += round(value / 8 * 65536) / 65536
                C[i, j] += 1
                C[j, i] += 1
    return T, C, cnt


def plain_scores(counts, history):
    T, _, cnt = counts
    score = cnt * 1e-12
    for k, item in enumerate(reversed(history), 1):
        if k <= 50:
            score = score + k ** -1.5 * (cnt[item] + 10) ** -0.3 * T[item]
    return score


def plain_candidates(counts, history):
    score, cnt, rank = plain_scores(counts, history), counts[2], []
    for item in range(len(score)):
        if item not in history:
            rank.append((-round(4096 * math.log2(max(score[item], 1e-9))), -cnt[item], item))
    return [item for _, _, item in sorted(rank)[:K]]


def plain_evidence(counts, history, candidates):
    """The evidence that counts give, a list of dicts. link is not rounded."""
    T, C, cnt = counts
    score = plain_scores(counts, history)[candidates]
    recent, out = history[::-1][:HIST], []
    for place, item in enumerate(candidates):
        part = [k ** -1.5 * (cnt[h] + 10) ** -0.3 * T[h, item] for k, h in enumerate(recent, 1)]
        out.append(dict(
            pos=place + 1,
            pop=min(7, int(math.log2(cnt[item] + 1))),
            link=2 * math.log2(max(score[place], 1e-9) / max(score)) + 7,
            via=part.index(max(part)) + 1 if max(part) > 0 else 0,
            co=min(7, int(math.log2(C[history[-1], item] + 1))),
            links=min(3, sum(T[h, item] > 0 for h in recent))))
    return out


def prefixes(sequences, name):
    """(user, history, target) of each list that a split could have."""
    for fold in range(FOLDS):
        for user in range(fold, len(sequences), FOLDS):
            items = sequences[user].tolist()
            n = len(items)
            for end in {"train": range(1, n - 2), "val": [n - 2], "test": [n - 1]}[name]:
                yield user, items[:end], items[end]


def test_candidates_and_evidence_are_those_of_the_loops(made):
    for name, *cuts in (("train", 3, 2), ("val", 2, 1), ("test", 2, 1)):
        lists, row = made.lists[name], {}
        for n, user in enumerate(lists.user.tolist()):
            row.setdefault(user, []).append(n)
        fold = None
        for user, history, target in prefixes(made.sequences, name):
            if fold != user % FOLDS:
                fold = user % FOLDS
                older = plain_counts(made.sequences, cuts[0], fold if name == "train" else None)
                newer = plain_counts(made.sequences, cuts[1], fold if name != "test" else None)
            cands = plain_candidates(older, history)
            place = cands.index(target) if target in cands else -1
            if name != "train" and place < 0:
                assert user not in row
                continue
            n = row[user].pop(0)
            assert lists.hist[n].tolist() == (history[::-1] + [-1] * HIST)[:HIST]
            assert lists.cands[n].tolist() == cands and lists.target[n] == place
            assert np.allclose(lists.score[n], plain_scores(newer, history)[cands], atol=1e-6)
            for c, expected in enumerate(plain_evidence(newer, history, cands)):
                level = min(7, max(0, expected.pop("link")))
                assert abs(int(lists.evidence["link"][n, c]) - level) <= 0.501
                assert all(lists.evidence[f][n, c] == value for f, value in expected.items())
        assert not any(row.values())


# --- Interventions: a later item changes nothing before it ------------------------------------

def same_prompts(before, after, rows=slice(None)):
    before, after = before.take(rows), after.take(rows)
    return ((before.hist == after.hist).all() and (before.cands == after.cands).all()
            and all((before.evidence[f] == after.evidence[f]).all() for f in FIELDS))


def after(made, changes):
    """The Lists after users took other items: changes {user: (place in the sequence, item)}."""
    sequences = list(made.sequences)
    for user, (place, item) in changes.items():
        sequences[user] = sequences[user].copy()
        sequences[user][place] = item
    return split(prepare(sequences, made.items))


def other_targets(lists, place, rows):
    """Another candidate of the list is the target: changes of the users of some rows."""
    changes = {}
    for row in np.flatnonzero(rows):
        other = (lists.target[row] + 1 + row % (K - 1)) % K
        changes[lists.user[row]] = place, lists.cands[row, other]
    return changes


def test_no_target_is_known_to_a_prompt_before_it(made):
    train, val, test = (made.lists[name] for name in SPLITS)
    new = after(made, other_targets(test, -1, test.user >= 0))
    assert all(same_prompts(made.lists[name], new[name]) for name in SPLITS)
    assert (new["test"].target != test.target).all()

    length = [len(history) for _, history, _ in prefixes(made.sequences, "train")]
    for fold in (0, 7, 19):  # users of one fold: others may count the new items
        own = val.user % FOLDS == fold
        new = after(made, other_targets(val, -2, own))
        assert same_prompts(train, new["train"]) and same_prompts(val, new["val"], own)
        assert (new["val"].target != val.target)[own].all() and own.sum() > 2
        assert not same_prompts(val, new["val"])

        changes = {}
        for user in range(fold, len(made.sequences), FOLDS):
            items = made.sequences[user]
            place = len(items) - 3 - user // FOLDS % 2
            changes[user] = place, next(i for i in range(7 * user % 100, 150) if i not in items)
        new = after(made, changes)["train"]
        before = [n <= changes.get(u, (0,))[0] for u, n in zip(train.user.tolist(), length)]
        assert sum(before) > 20 and same_prompts(train, new, np.array(before))
        assert not same_prompts(train, new)


def test_the_writer_learns_but_never_a_target_of_the_users_that_it_writes_for(made, monkeypatch):
    monkeypatch.setattr(writer, "EPOCHS", 4)
    train, val, test = merged(made)
    changed = train.take(slice(None))
    own = train.user % writer.GROUPS == 3
    changed.target = np.where(own & (train.target >= 0), (train.target + 1) % K, train.target)
    writer.write_scores(train, val, test)
    writer.write_scores(changed)
    assert (changed.score[own] == train.score[own]).all()
    assert (changed.score[~own] != train.score[~own]).any(1).mean() > 0.9
    for lists in (train.take(train.target >= 0), val, test):
        of_target = np.take_along_axis(lists.score, lists.target[:, None], 1)
        place = (lists.score > of_target).sum(1)
        assert place.mean() < lists.target.mean()  # better than the incoming order
    assert "too small to learn from" in refusal(writer.fit_writer, train.take(own))


# --- Prompts and traces -----------------------------------------------------------------------

def test_rare_combinations_become_their_nearest_frequent_ones(made):
    for name, fields in STATED.items():
        def pairs(lists):
            return list(zip(*(lists.evidence[f].ravel().tolist() for f in fields)))

        seen = Counter(pairs(made.lists["train"]))
        frequent = [pair for pair, n in seen.items() if n * RARE >= seen.total()]
        for before, rounded in zip(made.lists.values(), merged(made)):
            for old, new in set(zip(pairs(before), pairs(rounded))):
                far = {pair: sum(abs(x - y) for x, y in zip(old, pair)) for pair in frequent}
                assert far[new] == min(far.values())


def told(prompt):
    """The trace that follows from the words of a prompt, by plain rules."""
    at = prompt.index("<candidates>")
    words = [word for word in prompt[1:at] if word != "<last>"][::-1]  # most recent first
    paths, categories, brands = words[0::3], words[1::3], words[2::3]
    trace = ["<profile>", max(brands, key=brands.count), max(categories, key=categories.count)]
    for i in range(at + 1, len(prompt), 6):
        label, brand, category, path, *copied = prompt[i:i + 6]
        if label == "<none>":
            trace += prompt[i:i + 6]
            continue
        n = min(3, brands.count(brand))
        match = f"{n}{'+' * (n == 3)}{',last' * (brand == brands[0])}"
        depth = sum((category.split()[1] == categories[0].split()[1],  # Top 1 > Mid 2
                     category == categories[0], path == paths[0]))
        trace += [label, f"brand:{'unknown' if brand == 'b?' else match}", f"depth:{depth}",
                  f"leaf:{min(3, paths.count(path))}", *copied]
    return trace


def test_prompts_show_the_evidence_and_traces_follow_from_prompts(made):
    words, said = beauty_words(made.items, 20), set()
    assert len(set(words)) == len(words)
    rng = np.random.default_rng(1)
    for width, lists in itertools.product((K, 7), merged(made)):
        n = len(lists.user)
        lists.score = rng.integers(4, size=(n, K)).astype(float)
        length = rng.integers(width // 2, width + 1, n)
        tokens = tokenize(lists, made.items, words, length, width)
        for row in range(0, n, 3):
            prompt = [words[t] for t in tokens.prompt[row] if t != PAD]
            trace = [words[t] for t in tokens.trace[row] if t != PAD]
            assert trace == told(prompt)
            said.update(trace)
            at = prompt.index("<candidates>")
            history = [item for item in lists.hist[row, ::-1] if item >= 0]
            items = history + lists.cands[row, :length[row]].tolist()
            categories = [word for word in prompt if word.startswith("Top")]
            assert categories == [" > ".join(made.items[item][1][:2]) for item in items]
            for c in range(length[row]):
                e = {name: values[row, c] for name, values in lists.evidence.items()}
                assert prompt[at + 6 * c + 1] == f"L{c + 1}"
                assert prompt[at + 6 * c + 5] == f"link:{e['link']},{e['via']}"
                assert prompt[at + 6 * c + 6] == f"co:{e['co']},{e['links']},{e['pop']}"
            rest = [-1] * (width - length[row])
            best = sorted(range(length[row]), key=lambda c: -lists.score[row, c])
            assert tokens.order[row].tolist() == best + rest
            assert tokens.incoming[row].tolist() == sorted(best) + rest
            target = lists.target[row]
            assert tokens.target[row] == (target if target < length[row] else -1)
    # That the rules have met what they are to tell apart.
    assert {f"brand:{x}" for x in ("unknown", "0", "1", "1,last", "2", "3+,last")} <= said
    assert {f"leaf:{i}" for i in range(4)} | {"depth:0", "depth:2", "depth:3"} <= said


# --- The world --------------------------------------------------------------------------------

def world_of(folder, **settings):
    return beauty_world(Config(**{**PRESETS["small"], "config": "small", "data_dir": str(folder),
                                  "run_dir": str(folder / "runs"), **settings}))


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values()))


def same_world(a, b):
    return (a.words == b.words and a.notes == b.notes and a.checksum == b.checksum
            and np.array_equal(a.references[FRESH], b.references[FRESH])
            and all((a.nearest[name] == b.nearest[name]).all() for name in STATED)
            and all(equal(getattr(a, name), getattr(b, name)) for name in SPLITS))


def test_the_world_is_kept_and_refused_when_a_setting_or_the_data_changes(tmp_path, monkeypatch):
    make_beauty(tmp_path, n_users=120)
    first = world_of(tmp_path)
    assert len(first.references[FRESH]) == len(first.test) > 5
    for part in (first.train, first.val, first.test):
        assert parse_answers(part.response, part.incoming).valid.all()
        assert (faithfulness(part.response, part.trace, first.n_labels) == 1).all()
    with monkeypatch.context() as patch:
        patch.setattr("beauty.world.make_world", None)  # it is not needed again
        assert same_world(world_of(tmp_path), first)
    kept = tmp_path / "runs" / "small" / "world.pt"
    content = kept.read_bytes()
    for settings in (
            dict(n_train=50), dict(n_val=2), dict(n_test=3), dict(n_candidates=8),
            dict(vary_lists=0.0), dict(world="beauty_expert"), dict(world="beauty_target")):
        kept.write_bytes(content)
        other = world_of(tmp_path, **settings)
        assert not same_world(other, first) and other.checksum == first.checksum
        if "n_train" in settings:  # the hits come before the others
            assert len(other.train) == 50 < first.notes["train_hits"]
            assert (other.train.target >= 0)[other.train.list_length == K].all()
    for name, old, new in (("sequences.txt", "\n7 ", "\n7 1 "), ("items.tsv", "Brand 3\t", "Z\t")):
        path = tmp_path / name
        text = path.read_text()
        path.write_text(text.replace(old, new))
        kept.write_bytes(content)
        assert world_of(tmp_path).checksum != first.checksum
        path.write_text(text)
    assert same_world(world_of(tmp_path), first)


def test_other_ids_give_the_same_world_and_numbers_are_shuffled(tmp_path):
    make_beauty(tmp_path, n_users=60)
    first = world_of(tmp_path)
    *_, names = read_beauty(str(tmp_path))
    ids = [int(name) for name in names if name.isdigit()]
    assert abs(np.corrcoef(ids, [names[str(i)] for i in ids])[0, 1]) < 0.2
    lines = (tmp_path / "sequences.txt").read_text().splitlines()
    other = [" ".join(f"x{1009 - int(i)}" for i in line.split()) for line in lines]
    (tmp_path / "sequences.txt").write_text("\n".join(other) + "\n")
    table = (tmp_path / "items.tsv").read_text()
    table = re.sub(r"(?m)^(\d+)\tA(\d+)", lambda m: f"x{1009 - int(m[1])}\tB{m[2]}", table)
    (tmp_path / "items.tsv").write_text(table)
    assert same_world(world_of(tmp_path, run_dir=str(tmp_path / "other")), first)


def test_an_expert_gives_points_by_hand_and_the_target_comes_first_where_it_is_told(tmp_path):
    make_beauty(tmp_path, n_users=120)
    expert, target = (world_of(tmp_path, world=f"beauty_{name}") for name in ("expert", "target"))
    for a, b in ((expert.train, target.train), (expert.test, target.test)):
        for n in range(len(a)):
            words = [expert.words[token] for token in a.trace[n][3:]]
            points = {}
            for label in range(a.list_length[n]):
                brand, depth, _, link = words[6 * label + 1:6 * label + 5]
                link = link.removeprefix("link:").split(",")[0]
                points[label] = BRAND_MATCH.index(brand) + int(depth[-1]) + int(link)
            order = sorted(points, key=lambda label: (-points[label], label))
            assert a.order[n][:len(order)].tolist() == order
            if b.target[n] >= 0:
                order.sort(key=lambda label: label != b.target[n])
            assert b.order[n][:len(order)].tolist() == order


# --- Files ------------------------------------------------------------------------------------

HEADER, ITEM = "item_id\tasin\tbrand\tcategories", "1\tA1\tOPI\tNails > Polish"


@np.errstate(all="raise")
def test_bad_files_are_refused_in_one_sentence(tmp_path):
    items, sequences = f"{HEADER}\n{ITEM}\n2\tA2\t\tB\n", "7 1 2 1\n"

    def read(items, sequences):
        for name, content in (("items.tsv", items), ("sequences.txt", sequences)):
            (tmp_path / name).write_bytes(content.encode("latin-1"))
        return read_beauty(str(tmp_path))

    assert "items.tsv (No such file" in refusal(read_beauty, str(tmp_path / "none"))
    for bad, expected in (
            ("", "items.tsv is empty"),
            (f"{ITEM}\n", "items.tsv, line 1: expected the header"),
            (f"{HEADER}\n1\tA1\tOPI\n", "line 2: expected item_id <tab> asin"),
            (f"{HEADER}\n\tA1\tOPI\tB\n", "line 2: expected item_id"),
            (f"{HEADER}\n{ITEM}\n1\tA2\t\tB\n", "line 3: 1 is there twice"),
            (f"{HEADER}\n{ITEM}\n2\tA1\t\tB\n", "line 3: A1 is there twice"),
            (f"{HEADER}\n{ITEM}\n2\t1\t\tB\n", "line 3: 1 is there twice"),
            (f"{HEADER}\n{ITEM}\xe9\n", "is no UTF-8 text")):
        assert expected in refusal(read, bad, sequences)
    for bad, expected in (
            ("", "sequences.txt is empty"),
            ("7 1 2\n8\n", "line 2: expected a user id"),
            ("7 1 2\n8 1 3\n", "line 2: items.tsv lacks the item '3'"),
            ("7 1 2\n7 1 2\n", "line 2: the user 7 is there twice"),
            ("7 1 2\n", "has no user with 3 or more items")):
        assert expected in refusal(read, items, bad)
    found, known, n_skipped, names = read(items, sequences + "8 1\n9 2 1 1\n")
    assert sorted(known) == [("", ("B",)), ("OPI", ("Nails", "Polish"))] and n_skipped == 1
    assert names["1"] == names["A1"] == 1 - names["2"]
    expected = [[names[i] for i in ids] for ids in ("121", "211")]
    assert sorted(map(list, found)) == sorted(expected)


@np.errstate(all="raise")
def test_data_that_does_not_fit_is_refused_in_one_sentence(tmp_path):
    for data in (dict(n_items=39, n_groups=3), dict(n_users=19), dict(per_user=3),
                 dict(n_users=20, per_user=4)):
        make_beauty(tmp_path, **{"n_users": 60, **data})
        assert "too small" in refusal(world_of, tmp_path)
    assert "--n_candidates can be at most 10" in refusal(world_of, tmp_path, n_candidates=12)
    assert "too large" in refusal(check_size, [np.arange(5)] * FOLDS, MOST_ITEMS + 1)
    for name in ("b1", "L20", "[PAD]", "depth:0"):
        assert "that prompts use otherwise" in refusal(beauty_words, [("", (name,))], 20)
    many = [("", (f"A{i}", "B")) for i in range(40_000)]
    assert "use coarser categories" in refusal(beauty_words, many, 20)


def test_raw_files_are_converted(tmp_path, monkeypatch):
    def raw(name, lines):
        with gzip.open(tmp_path / name, "wt", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)

    reviews = [("U", "Q", 2), ("V", "P", 1), ("U", "P", 1), ("U", "R", 2)]
    raw("reviews_Beauty_5.json.gz", [
        f'{{"reviewerID": "{user}", "asin": "{asin}", "unixReviewTime": {day}}}'
        for user, asin, day in reviews])
    metas = [{"asin": asin, "brand": "O&amp;I" if asin < "S" else "rare",
              "categories": [["Beauty", "Skin\tCare"], ["Beauty", f"Only {asin}"]]}
             for asin in "PQTUVW"]
    raw("meta_Beauty.json.gz", map(repr, metas))
    monkeypatch.setattr(convert, "MIN_SEEN", 2)
    convert.main(str(tmp_path))
    # By day; reviews of one day stay as they are in the file.
    assert (tmp_path / "sequences.txt").read_text() == "1 1 2 3\n2 1\n"
    assert (tmp_path / "items.tsv").read_text().splitlines() == [
        HEADER, "1\tP\tO&I\tSkin Care", "2\tQ\tO&I\tSkin Care", "3\tR\t\tUnknown"]
    whole = (tmp_path / "meta_Beauty.json.gz").read_bytes()
    for damaged in (whole[:60], whole[:40] + b"x" * 40 + whole[80:], b"text"):
        (tmp_path / "meta_Beauty.json.gz").write_bytes(damaged)
        monkeypatch.setattr("sys.argv", ["convert.py", str(tmp_path)])
        with pytest.raises(SystemExit, match=r"^error: the raw files in .*: download both again$"):
            runpy.run_path(convert.__file__, run_name="__main__")
        assert (tmp_path / "sequences.txt").read_text() == "1 1 2 3\n2 1\n"  # nothing is lost
