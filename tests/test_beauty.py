"""Amazon Beauty on synthetic files: counts, candidates, evidence and prompts against plain loops,
and interventions: what a user takes later changes nothing that was written before."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import beauty.world
from beauty import writer
from beauty.amazon import read_beauty
from beauty.evidence import FIELDS, HIST, STATED, Lists, merge_rare, prepare, rare
from beauty.prerank import (FOLDS, K, Counts, Histories, check_size, link_pairs, scores_among,
                            top_candidates)
from beauty.tokens import beauty_words, tokenize
from beauty.world import FRESH, beauty_world, written_lists
from config import Config
from data import PAD
from make_beauty import make_beauty
from plumbing.arguments import parse_args
from plumbing.settings import UserError

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Sequences, items, Lists of the three splits; histories are longer than the 8 items shown."""
    folder = tmp_path_factory.mktemp("beauty")
    make_beauty(folder, n_users=240, n_items=150, per_user=16)
    sequences, items, *_ = read_beauty(str(folder))
    *lists, fresh = prepare(sequences, items)
    return SimpleNamespace(folder=folder, sequences=sequences, items=items, fresh=fresh,
                           lists=dict(zip(SPLITS, lists)))


# --- The same as plain loops ------------------------------------------------------------------

class Plain:
    """Counts of the sequences without their last `cut` items, of each fold by itself."""

    def __init__(self, sequences, n_items, cut):
        self.T, self.C = np.zeros((2, FOLDS, n_items, n_items))
        self.cnt = np.zeros((FOLDS, n_items))
        for user, items in enumerate(sequences):
            fold, part = user % FOLDS, items[:len(items) - cut]
            for a in range(len(part)):
                self.cnt[fold, part[a]] += 1
                for b in range(a + 1, len(part)):
                    value = len(part) ** -0.25 * (b - a) ** -0.75
                    self.T[fold, part[a], part[b]] += round(value * 65536) / 65536
                    self.T[fold, part[b], part[a]] += round(value / 8 * 65536) / 65536
                    self.C[fold, part[a], part[b]] += 1
                    self.C[fold, part[b], part[a]] += 1

    def known(self, left_out=None):
        """T, C, popularity of all folds but one."""
        kept = [fold for fold in range(FOLDS) if fold != left_out]
        return self.T[kept].sum(0), self.C[kept].sum(0), self.cnt[kept].sum(0)


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


def plain_evidence(counts, history, candidates, items):
    """-> a dict a candidate."""
    T, C, cnt = counts
    score = plain_scores(counts, history)[candidates]
    recent, out = history[::-1][:HIST], []
    for place, item in enumerate(candidates):
        part = [k ** -1.5 * (cnt[h] + 10) ** -0.3 * T[h, item] for k, h in enumerate(recent, 1)]
        brand, path = items[item]
        of_brand = [h for h in recent if items[h][0] == brand]
        last_path = items[history[-1]][1]
        shared = 0
        while shared < min(3, len(path), len(last_path)) and path[shared] == last_path[shared]:
            shared += 1
        depth = min(shared, 2)
        if path == last_path:
            depth = 3
        match = 1
        if of_brand:
            match = 2 * min(3, len(of_brand)) + (items[history[-1]][0] == brand)
        out.append(dict(
            pos=place + 1, pop=min(7, int(math.log2(cnt[item] + 1))),
            link=2 * math.log2(max(score[place], 1e-9) / max(score)) + 7,  # not rounded
            via=part.index(max(part)) + 1 if max(part) > 0 else 0,
            co=min(7, int(math.log2(C[history[-1], item] + 1))),
            links=min(3, sum(T[h, item] > 0 for h in recent)),
            brand=match if brand else 0, depth=depth,
            leaf=min(3, sum(items[h][1] == path for h in recent))))
    return out


def histories(lists, sequences, split):
    """(history, target, user) of each list."""
    times = {}
    for user in lists.user.tolist():
        times[user] = times.get(user, 0) + 1  # training has a user's prefixes in order
        items = sequences[user].tolist()
        end = {"train": times[user], "val": len(items) - 2, "test": len(items) - 1}[split]
        yield items[:end], items[end], user


# --- Counts and candidates --------------------------------------------------------------------

def test_counts_are_those_of_the_loops_with_and_without_a_fold(made):
    for cut in (1, 3):
        counts = Counts(made.sequences, len(made.items), cut)
        plain = Plain(made.sequences, len(made.items), cut)

        def check(*left_out):
            T, C, cnt = plain.known(*left_out)
            assert (counts.T.numpy() == T).all() and (counts.C.numpy() == C).all()
            assert (counts.cnt == cnt).all()

        check()
        for fold in (0, FOLDS - 1):
            with counts.without(fold):
                check(fold)
        check()  # and back again


def test_links_of_an_empty_training_part_are_none():
    i, j, value, user = link_pairs([np.array([], int), np.array([3, 5])])
    assert (i.tolist(), j.tolist(), user.tolist()) == ([3, 5], [5, 3], [1, 1])
    assert np.isfinite(value).all()


def test_ties_go_to_the_popular_item_then_to_the_smaller_number():
    n = 60
    counts = SimpleNamespace(T=torch.zeros(n, n), cnt=np.full(n, 2))
    counts.T[0, 10:26] = 1.0
    counts.T[0, 40] = 1.0 + 1e-6    # equal up to rounding: a tie
    counts.T[0, 50] = 1.5
    counts.cnt[[20, 22]], counts.cnt[21] = 7, 9
    one = Histories(np.array([0]), np.array([0]), np.array([1]))
    assert top_candidates(counts, one)[0].tolist() == [50, 21, 20, 22, 10, 11, 12, 13, 14, 15]
    counts.cnt[40] = 8
    assert top_candidates(counts, one)[0].tolist() == [50, 21, 40, 20, 22, 10, 11, 12, 13, 14]
    counts.T[:] = 0                 # no link at all
    counts.cnt[:] = np.arange(n)
    assert top_candidates(counts, one)[0].tolist() == list(range(n - 1, n - 11, -1))


@pytest.mark.parametrize("split, older, newer", [("train", 3, 2), ("val", 2, 1), ("test", 2, 1)])
def test_candidates_and_evidence_are_those_of_the_loops(made, split, older, newer):
    lists, n_items = made.lists[split], len(made.items)
    older, newer = (Plain(made.sequences, n_items, cut) for cut in (older, newer))
    counts = {fold: (older.known(fold if split == "train" else None),
                     newer.known(fold if split != "test" else None)) for fold in range(FOLDS)}
    seen, fields = set(), set()
    for n, (history, target, user) in enumerate(histories(lists, made.sequences, split)):
        first, second = counts[user % FOLDS]
        cands = plain_candidates(first, history)
        assert lists.hist[n].tolist() == (history[::-1] + [-1] * HIST)[:HIST]
        assert lists.cands[n].tolist() == cands
        assert lists.target[n] == (cands.index(target) if target in cands else -1)
        for place, expected in enumerate(plain_evidence(second, history, cands, made.items)):
            found = {name: int(values[n, place]) for name, values in lists.evidence.items()}
            link, level = found.pop("link"), expected.pop("link")
            assert abs(link - min(7, max(0, level))) <= 0.501 and found == expected
            fields |= set(expected.items())
        seen.add((user, len(history)))
    wanted = {"train": [(u, n) for u, s in enumerate(made.sequences) for n in range(1, len(s) - 2)],
              "val": [(u, len(s) - 2) for u, s in enumerate(made.sequences)],
              "test": [(u, len(s) - 1) for u, s in enumerate(made.sequences)]}[split]
    if split == "train":
        assert seen == set(wanted) and len(seen) == len(lists.user)
        # That the loops have met what they are to tell apart.
        assert {("via", v) for v in (1, 2, 5)} | {("leaf", v) for v in range(4)} <= fields
        assert {("brand", v) for v in range(8)} | {("depth", v) for v in (0, 2, 3)} <= fields
    else:  # only the users whose target is among the candidates, and all of these
        assert (lists.target >= 0).all() and seen <= set(wanted) and len(seen) == len(lists.user)
        for user, length in set(wanted) - seen:
            items = made.sequences[user].tolist()
            assert items[length] not in plain_candidates(counts[user % FOLDS][0], items[:length])


def test_the_fresh_order_is_that_of_the_newer_counts(made):
    counts = Plain(made.sequences, len(made.items), 1).known()
    lists = made.lists["test"]
    for n, (history, *_) in enumerate(histories(lists, made.sequences, "test")):
        score = plain_scores(counts, history)[lists.cands[n]][made.fresh[n]]
        assert sorted(made.fresh[n]) == list(range(K)) and (np.diff(score) <= 1e-6).all()


def test_the_hybrid_rewards_equal_brands_and_categories():
    """score x (1 + .3 share of the path) (1 + .3 of level 2) (1 + share of the brand)"""
    counts = SimpleNamespace(T=torch.zeros(6, 6), cnt=np.zeros(6, int))
    counts.T[:2] = 1.0
    #                 brand, levels: those of items 0 and 1, the history, come first
    attr = np.array([[1, 0, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0], [1, 0, 2, 2], [0, 0, 1, 3],
                     [2, 0, 0, 4]])
    history = Histories(np.array([0, 1]), np.array([0]), np.array([2]))
    base = (1 + 2 ** -1.5) * 10 ** -0.3
    of_last, of_first = 2 / 3, 1 / 3  # recency: 1 and 1/2
    expected = [base * (1 + .3 * of_first) ** 2 * (1 + of_first), base * (1 + of_first),
                base * (1 + .3 * of_last), base * (1 + .3 * of_first)]
    found = scores_among(counts, history, np.array([[2, 3, 4, 5]]), attr)[0]
    assert np.allclose(found, expected)


# --- Interventions: a later item changes nothing before it ------------------------------------

def replaced(sequences, position):
    """The sequences with another item at position[user], one that the user does not have."""
    out = list(sequences)
    for user, at in position.items():
        items = sequences[user].tolist()
        new = items[at]
        while new in items:
            new = (new + 1) % 150  # the number of items
        items[at] = new
        out[user] = np.array(items)
    return out


def same_prompts(before, after, rows=slice(None)):
    before, after = before.take(rows), after.take(rows)
    return ((before.hist == after.hist).all() and (before.cands == after.cands).all()
            and all((before.evidence[f] == after.evidence[f]).all() for f in FIELDS))


def in_list(made, split, fold=None):
    """user -> another candidate of the user's list in validation or test."""
    lists = made.lists[split]
    users = {}
    for user, cands, target in zip(lists.user.tolist(), lists.cands, lists.target):
        if fold in (None, user % FOLDS):
            users[user] = cands[(target + 1 + user % (K - 1)) % K]
    return users


def test_a_test_target_changes_no_prompt(made):
    changed = list(made.sequences)
    for user, item in in_list(made, "test").items():
        changed[user] = np.append(changed[user][:-1], item)
    after = dict(zip(SPLITS, prepare(changed, made.items)))
    assert all(same_prompts(made.lists[split], after[split]) for split in SPLITS)
    assert (made.lists["test"].target != after["test"].target).all()


@pytest.mark.parametrize("fold", [1, 12])
def test_a_validation_target_changes_no_prompt_of_training_and_not_the_users_own(made, fold):
    changed = list(made.sequences)
    users = in_list(made, "val", fold)
    for user, item in users.items():
        changed[user] = changed[user].copy()
        changed[user][-2] = item
    after = dict(zip(SPLITS, prepare(changed, made.items)))
    assert len(users) > 2 and same_prompts(made.lists["train"], after["train"])
    own = np.isin(made.lists["val"].user, list(users))
    assert same_prompts(made.lists["val"], after["val"], own)
    assert (made.lists["val"].target != after["val"].target)[own].all()
    assert not same_prompts(made.lists["val"], after["val"])  # others' may: they count it


@pytest.mark.parametrize("fold", [0, 7, 19])
def test_a_training_target_changes_no_prompt_before_it(made, fold):
    users = range(fold, len(made.sequences), FOLDS)
    last = {user: len(made.sequences[user]) - 3 for user in users}
    some = {user: 1 + user // FOLDS % at for user, at in last.items()}
    train = made.lists["train"]
    length = np.array([len(h) for h, *_ in histories(train, made.sequences, "train")])
    for position in (last, some):
        after = prepare(replaced(made.sequences, position), made.items)[0]
        before = np.array([n <= position.get(user, 0) for user, n in zip(train.user, length)])
        assert before.sum() > 20 and same_prompts(train, after, before)
        assert not same_prompts(train, after)  # it is counted for the others


def test_the_writer_never_learns_a_target_of_the_users_that_it_writes_for(made, monkeypatch):
    monkeypatch.setattr(writer, "EPOCHS", 2)
    train = merged(made)[0]
    scores = train.take(slice(None))
    writer.write_scores(scores)
    for group in (0, 3):
        own = train.user % writer.GROUPS == group
        changed = train.take(slice(None))
        changed.target = np.where(own & (train.target >= 0), (train.target + 1) % K, train.target)
        writer.write_scores(changed)
        assert (changed.score[own] == scores.score[own]).all()
        assert (changed.score[~own] != scores.score[~own]).any(1).mean() > 0.9


def test_all_networks_write_for_validation_and_test_and_the_writer_has_learned(made):
    train, val, test = merged(made)
    writer.write_scores(train, val, test)
    networks = writer.fit_writer(train)
    with torch.no_grad():
        for lists in (val, test):
            scores = networks.score(writer.one_hot(lists.evidence, slice(None))).mean(0).numpy()
            assert np.allclose(lists.score, scores, atol=1e-5)
    for lists in (train.take(train.target >= 0), val, test):
        place = (lists.score > np.take_along_axis(lists.score, lists.target[:, None], 1)).sum(1)
        assert place.mean() < lists.target.mean()  # better than the incoming order


def test_a_network_without_examples_in_a_batch_learns_nothing_from_it(made, monkeypatch):
    """Whole batches are of one group: 0 / 0 must not spread."""
    monkeypatch.setattr(writer, "BATCH", 16)
    train = merged(made)[0]
    rows = np.flatnonzero((train.target >= 0) & (train.user % writer.GROUPS < 2))
    one = rows[train.user[rows] % writer.GROUPS == 1][:1]
    few = train.take(np.concatenate((rows[train.user[rows] % writer.GROUPS == 0][:500], one)))
    writer.write_scores(few)
    assert np.isfinite(few.score).all()
    with pytest.raises(UserError, match="too small to learn from"):
        writer.fit_writer(few.take(slice(-1)))


# --- Rare combinations, tokens ----------------------------------------------------------------

def merged(made):
    """Copies of the three Lists, with rare combinations rounded as for training."""
    lists = [made.lists[split].take(slice(None)) for split in SPLITS]
    nearest = rare(lists[0])
    for part in lists:
        merge_rare(part, nearest)
    return lists


def test_rare_combinations_become_their_nearest_frequent_neighbours():
    rng = np.random.default_rng(0)

    def lists(n):
        evidence = {f: rng.integers(0, size, (n, K)).astype(np.uint8) for f, size in FIELDS.items()}
        return Lists(None, None, None, None, evidence)

    train, other = lists(3000), lists(50)
    for name, value in (("link", 6), ("via", 1)):  # all but a few statements agree
        train.evidence[name][20:] = value
    train.evidence["link"][:20], train.evidence["via"][:20] = 0, 5
    train.evidence["link"][0, 0], train.evidence["via"][0, 0] = 7, 2  # once: rare
    before = {f: v.copy() for f, v in train.evidence.items()}
    nearest = rare(train)
    for part in (train, other):
        merge_rare(part, nearest)
    pairs = set(zip(train.evidence["link"].ravel(), train.evidence["via"].ravel()))
    assert pairs == {(6, 1), (0, 5)}
    assert (train.evidence["link"][0, 0], train.evidence["via"][0, 0]) == (6, 1)
    pairs = np.stack((other.evidence["link"], other.evidence["via"])).reshape(2, -1)
    assert set(map(tuple, pairs.T.tolist())) <= {(6, 1), (0, 5)}
    shared = {f for fields in STATED.values() if len(fields) > 1 for f in fields}
    assert all((train.evidence[f] == before[f]).all() for f in FIELDS if f not in shared)


BRAND = ["unknown", "0", "1", "1,last", "2", "2,last", "3+", "3+,last"]


def plain_text(history, candidates, evidence, items, width):
    """Prompt and trace in words. history: the items shown, oldest first; evidence: a dict a
    candidate."""
    brands, paths = {}, {}

    def show(item):
        brand, path = items[item]
        number = f"b{brands.setdefault(brand, len(brands) + 1)}" if brand else "b?"
        return [number, " > ".join(path[:2]), f"p{paths.setdefault(path, len(paths) + 1)}"]

    shown = [show(item) for item in history]
    prompt = ["<history>", *sum(shown[:-1], []), "<last>", *shown[-1], "<candidates>"]
    trace = ["<profile>"]
    for column in (0, 1):  # the most frequent; of several the one shown last
        seen = [item[column] for item in shown][::-1]
        trace.append(max(seen, key=seen.count))
    for n, (item, e) in enumerate(zip(candidates, evidence), 1):
        copied = [f"link:{e['link']},{e['via']}", f"co:{e['co']},{e['links']},{e['pop']}"]
        prompt += [f"L{n}", *show(item), *copied]
        trace += [f"L{n}", f"brand:{BRAND[e['brand']]}", f"depth:{e['depth']}", f"leaf:{e['leaf']}",
                  *copied]
    empty = ["<none>"] * 6 * (width - len(candidates))
    return prompt + empty, trace + empty


@pytest.mark.parametrize("width", [K, 7])
def test_prompts_and_traces_are_what_one_would_write_by_hand(made, width):
    words = beauty_words(made.items, 20)
    assert len(set(words)) == len(words)
    several = short = 0  # profiles that a tie decides, histories shorter than 8
    for split, lists in zip(SPLITS, merged(made)):
        n = len(lists.user)
        lists.score = np.random.default_rng(1).integers(4, size=(n, K)).astype(float)
        length = np.random.default_rng(2).integers(width // 2, width + 1, n)
        tokens = tokenize(lists, made.items, words, length, width)
        assert (tokens.list_length == length).all()
        for row in range(n):
            history = [item for item in lists.hist[row, ::-1].tolist() if item >= 0]
            evidence = [{f: int(v[row, c]) for f, v in lists.evidence.items()}
                        for c in range(length[row])]
            cands = lists.cands[row, :length[row]].tolist()
            prompt, trace = plain_text(history, cands, evidence, made.items, width)
            assert [words[t] for t in tokens.prompt[row] if t != PAD] == prompt
            assert [words[t] for t in tokens.trace[row] if t != PAD] == trace
            score = lists.score[row]
            best = sorted(range(length[row]), key=lambda c: -score[c])
            assert tokens.order[row].tolist() == best + [-1] * (width - length[row])
            target = lists.target[row]
            assert tokens.target[row] == (target if target < length[row] else -1)
            there = [c if c < length[row] else -1 for c in range(width)]
            assert tokens.incoming[row].tolist() == there
            seen = [made.items[item][0] for item in history]
            most = max(map(seen.count, seen))
            several += len({b for b in seen if seen.count(b) == most}) > 1
            short += len(history) < HIST
    assert several > 100 and short > 100


# --- The world --------------------------------------------------------------------------------

def settings(folder, *options):
    return parse_args("", ["--config", "small", "--data_dir", str(folder), "--run_dir",
                           str(folder / "runs"), *options])


def equal(a, b):
    return all((getattr(a, f) == getattr(b, f)).all() for f in a.__dataclass_fields__)


def test_the_world_is_kept_and_its_checksum_is_that_of_the_data(tmp_path, monkeypatch):
    make_beauty(tmp_path, n_users=120)
    first = beauty_world(settings(tmp_path))
    monkeypatch.setattr(beauty.world, "prepare", None)  # not needed again
    again = beauty_world(settings(tmp_path))
    assert all(equal(getattr(first, split), getattr(again, split)) for split in SPLITS)
    assert first.words == again.words and first.notes == again.notes
    assert (first.references[FRESH] == again.references[FRESH]).all()
    assert len(first.references[FRESH]) == len(first.test) and first.source == "prepared files"
    assert all((first.nearest[name] == again.nearest[name]).all() for name in STATED)
    monkeypatch.undo()

    fewer = beauty_world(settings(tmp_path, "--n_test", "3", "--n_val", "2", "--n_train", "50"))
    assert (len(fewer.test), len(fewer.val), len(fewer.train)) == (3, 2, 50)
    width = fewer.test.prompt.shape[1]  # fewer rows may need fewer columns
    assert (fewer.test.prompt == first.test.prompt[:3, -width:]).all()
    assert (fewer.val.order == first.val.order[:2]).all()
    assert fewer.checksum == first.checksum == again.checksum

    text = (tmp_path / "sequences.txt").read_text()
    lines = text.splitlines()
    user, *items = lines[5].split()
    lines[5] = " ".join([user, *items[::-1]])
    (tmp_path / "sequences.txt").write_text("\n".join(lines) + "\n")
    other = beauty_world(settings(tmp_path))
    assert other.checksum != first.checksum and not equal(other.train, first.train)
    (tmp_path / "sequences.txt").write_text(text)
    table = (tmp_path / "items.tsv").read_text()
    (tmp_path / "items.tsv").write_text(table.replace("Brand 3\t", "Brand Z\t"))
    assert beauty_world(settings(tmp_path)).checksum not in (first.checksum, other.checksum)


def rows_of(split):
    """Each user of a Split as one value that can be compared."""
    for n in range(len(split)):
        words = [t for t in split.prompt[n].tolist() if t != PAD]
        yield (words, split.trace[n].tolist(), split.order[n].tolist(), int(split.target[n]))


def test_the_world_is_made_of_these_parts(tmp_path):
    make_beauty(tmp_path, n_users=120)
    world = beauty_world(settings(tmp_path, "--vary_lists", "0"))
    sequences, items, *_ = read_beauty(str(tmp_path))
    made = SimpleNamespace(lists=dict(zip(SPLITS, prepare(sequences, items))))
    parts = merged(made)
    writer.write_scores(*parts)
    for split, lists in zip(SPLITS, parts):
        length = np.full(len(lists.user), K)
        expected = list(rows_of(tokenize(lists, items, world.words, length, K)))
        found = list(rows_of(getattr(world, split)))
        if split == "train":  # shuffled
            expected.sort(), found.sort()
        assert found == expected


def test_training_has_all_hits_before_others(tmp_path):
    make_beauty(tmp_path, n_users=120)
    world = beauty_world(settings(tmp_path))
    n_hits, n = world.notes["train_hits"], world.notes["train_examples"]
    assert 20 < n_hits < n == len(world.train) and world.notes["test_hits"] == len(world.test)
    few = beauty_world(settings(tmp_path, "--n_train", str(n_hits), "--vary_lists", "0"))
    assert len(few.train) == n_hits and (few.train.target >= 0).all()


def test_the_hybrid_is_another_world(tmp_path):
    make_beauty(tmp_path, n_users=120)
    plain = beauty_world(settings(tmp_path))
    hybrid = beauty_world(settings(tmp_path, "--world", "beauty_hybrid"))
    assert hybrid.notes != plain.notes and hybrid.words == plain.words


@pytest.mark.parametrize("data, expected", [
    (dict(n_items=39, n_groups=3), "too small: of its 39 items a user has up to 8"),
    (dict(n_items=47, n_groups=3), "too small: of its 47 items a user has up to 8"),
    (dict(n_users=19), "too small: 19 users with 3 or more items"),
    (dict(per_user=3), "too small: no list of train has its target"),
    (dict(n_users=20, per_user=4), "too small"),
])
def test_data_smaller_than_our_constants_is_refused(tmp_path, data, expected):
    make_beauty(tmp_path, **{"n_users": 60, **data})
    with np.errstate(all="raise"), pytest.raises(UserError, match=expected) as found:
        beauty_world(settings(tmp_path))
    assert "\n" not in str(found.value) and "--data_dir" in str(found.value)


def test_the_smallest_data_that_is_not_refused_makes_a_world(tmp_path):
    make_beauty(tmp_path, n_users=60, n_items=48, n_groups=3)
    assert len(beauty_world(settings(tmp_path)).test) > 0


def test_data_larger_than_the_memory_is_refused():
    with pytest.raises(UserError, match=r"1000000 items take 16000.0 GB, and this machine has"):
        check_size([np.arange(5)] * FOLDS, 10 ** 6)


def test_categories_that_cannot_be_words_are_refused():
    for name in ("b1", "L20", "[PAD]", "depth:0"):
        with pytest.raises(UserError, match="is a word that prompts use otherwise"):
            beauty_words([("", ("Nails",)), ("", (name,))], 20)
    items = [("", (f"A{i}", "B")) for i in range(40_000)]
    with pytest.raises(UserError, match="use coarser categories"):
        beauty_words(items, 20)


def test_lists_longer_than_ten_are_refused(tmp_path):
    make_beauty(tmp_path, n_users=60)
    with pytest.raises(UserError, match="--n_candidates can be at most 10, not 12"):
        beauty_world(settings(tmp_path, "--n_candidates", "12"))


def test_an_expert_gives_points_by_hand_and_the_target_comes_first_where_it_is_told(made):
    expert, told = (written_lists(made.sequences, made.items, Config(world=f"beauty_{kind}"))[:3]
                    for kind in ("expert", "target"))
    for lists, best in zip(expert, told):
        for n in range(0, len(lists.user), 7):
            e, k = lists.evidence, lists.score[n]
            points = [int(e["link"][n, c]) + int(e["brand"][n, c]) + int(e["depth"][n, c])
                      for c in range(K)]
            order = sorted(range(K), key=lambda c: (-points[c], c))
            assert np.argsort(-k, kind="stable").tolist() == order
            target = best.target[n]
            if target >= 0:
                order = [target] + [c for c in order if c != target]
            assert np.argsort(-best.score[n], kind="stable").tolist() == order
        assert (best.target >= 0).any()
