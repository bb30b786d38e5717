"""A peer: what does re-ranking with a trace add to a sequential recommender? (Amazon Beauty)

    python experiments/peer_sasrec.py --config small --seeds 0,1,2

The peer is SASRec with cross-entropy over all items. Its network is that of RecTools, which this
project does not require: `pip install rectools==0.19.0 pytorch-lightning`. For the table the peers
learn from all that the evidence knows at test time (cut 1 in docs/beauty.md). They read the 50
latest items of a user, as the pre-ranker does. AR and CFT must have finished. The tables go into
results/beauty_catalogue.md and .json.

`--validate true` shows how dropout and epochs were chosen: a peer learns from the training part
(cut 2), and its N@10 on the validation items, among all items, is printed after each epoch.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from beauty.amazon import read_beauty
from beauty.prerank import REACH, Counts, Histories, top_candidates
from data import joined
from evaluate import decoder_of, ranking_metrics, score, score_order
from plumbing.checkpoint import load_stage, made_by
from plumbing.script import script
from plumbing.settings import Real, Switch, Text, UserError, Whole
from report.intervals import interval_text, paired_interval
from report.table import chosen_seeds, write_json, write_text
from tables import table
from trainer import decode_split, load_world

D, HEADS, LAYERS, LR, BATCH = 64, 1, 2, 2e-3, 128
# The logits of a batch are computed in bfloat16 and in parts, each small enough for a cache.
IN_PARTS = torch.nn.LinearCrossEntropyOptions(
    acc_policy="accurate", chunking_method=None, batch_chunk_size=128)
METRICS = {"R@1": "recall@1", "N@10": "ndcg@10", "MRR": "mrr"}


@dataclass(frozen=True)
class Options:
    seeds: Text() = ""               # such as 0,1,2; empty: that of --seed
    dropout: Real(0, 0.9) = 0.5      # tried on validation: .2, .35, .5, .65
    epochs: Whole(1, 1000) = 19      # then N@10 on validation is the best
    validate: Switch() = False       # choose these two: no table
    into: Text() = "results"         # where the tables go


def network(n_items, dropout):
    """SASRec of RecTools, with random weights. Item i is token i + 1; 0 is padding."""
    try:
        from rectools.models.nn.item_net import IdEmbeddingsItemNet, SumOfEmbeddingsConstructor
        from rectools.models.nn.transformers import net_blocks, sasrec, similarity, torch_backbone
    except ImportError as error:
        raise UserError(f"{error}: pip install rectools==0.19.0 pytorch-lightning")
    items = IdEmbeddingsItemNet(D, n_items + 1, dropout)
    net = torch_backbone.TransformerTorchBackbone(
        HEADS, dropout, SumOfEmbeddingsConstructor(n_items + 1, [items]),
        net_blocks.LearnableInversePositionalEncoding(True, REACH, D, True),
        sasrec.SASRecTransformerLayers(LAYERS, D, HEADS, dropout),
        similarity.DistanceSimilarityModule(), use_key_padding_mask=True)
    for p in net.parameters():  # as RecTools begins
        if p.dim() > 1:
            torch.nn.init.xavier_normal_(p)
    return net


def read(net, parts):
    """Reads histories, arrays of items -> tokens (N, L), padded on the left, states (N, L, D), and
    the vectors (I, D) of all items."""
    tokens = np.zeros((len(parts), max(map(len, parts))), np.int64)
    for row, part in zip(tokens, parts):
        row[len(row) - len(part):] = part + 1
    tokens, vectors = torch.from_numpy(tokens), net.item_model.get_all_embeddings()  # (I + 1, D)
    return tokens, net.encode_sessions({"x": tokens}, vectors), vectors[1:]


def train_epoch(net, optimizer, sequences, rng):
    """Next-item prediction at every place of the sequences, each of two items or more. The
    sequences of a batch are about equally long, so that few places are padding."""
    net.train()
    order = sorted(rng.permutation(len(sequences)), key=lambda n: len(sequences[n]))
    batches = np.array_split(order, len(order) // BATCH + 1)
    for i in rng.permutation(len(batches)):
        parts = [sequences[n][-REACH - 1:] for n in batches[i]]
        tokens, states, vectors = read(net, [part[:-1] for part in parts])
        wanted = torch.from_numpy(np.concatenate([part[1:] for part in parts]))  # (places,)
        loss = F.linear_cross_entropy(
            states[tokens > 0].bfloat16(), vectors.bfloat16(), wanted, options=IN_PARTS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def scored(net, histories, items):
    """The scores (N, n) of items (N, n) after histories, and how many of all items that the user
    does not have score higher than the first of these (N,)."""
    net.eval()
    found = []
    for first in range(0, len(histories), 1024):
        parts = histories[first:first + 1024]
        _, states, vectors = read(net, [part[-REACH:] for part in parts])
        scores = states[:, -1] @ vectors.T                        # (B, I)
        for row, part in zip(scores, parts):
            row[torch.from_numpy(part)] = -torch.inf
        chosen = scores.gather(1, torch.from_numpy(items[first:first + 1024]))  # (B, n)
        found.append((chosen, (scores > chosen[:, :1]).sum(1)))
    return [torch.cat(part).numpy() for part in zip(*found)]


def train_peer(options, sequences, n_items, seed):
    """A network that has learned from all but the last item of each user. To validate: from all
    but the last two, and the second last is what it is asked for after each epoch."""
    cut = 2 if options.validate else 1
    torch.manual_seed(seed)
    net, rng = network(n_items, options.dropout), np.random.default_rng(seed)
    optimizer = torch.optim.Adam(net.parameters(), LR, betas=(0.9, 0.98))
    known = [own[:-cut] for own in sequences]
    following = np.array([own[-cut] for own in sequences])[:, None]  # (users, 1)
    for epoch in range(options.epochs):
        train_epoch(net, optimizer, [own for own in known if len(own) > 1], rng)
        print(f"seed {seed}: epoch {epoch + 1} of {options.epochs}", flush=True)
        if options.validate:
            rank = scored(net, known, following)[1]
            print(f"N@10 on validation {ranking_metrics(rank)['ndcg@10'].mean():.4f}", flush=True)
    return net


def lists_of_ten(sequences, n_items):
    """The pre-ranker's candidates (users, 10), and the test items (users, 1)."""
    length = np.array([len(own) for own in sequences])
    histories = Histories(np.concatenate(sequences), np.cumsum(length) - length, length - 1)
    return (top_candidates(Counts(sequences, n_items, 2), histories),
            histories.next_item()[:, None])


def write_tables(cfg, options, seeds, same_ten, catalogue):
    """same_ten: {row: {metric: scores (seeds, N) of the test users}}; catalogue: {row: {metric:
    mean over all users}}."""
    ten = {row: {name: float(scores[name].mean()) for name in METRICS}
           for row, scores in same_ten.items()}
    claims = {f"{row} − {control}": {
        name: paired_interval(same_ten[row][name] - same_ten[control][name])[0]
        for name in METRICS}
        for row, control in (("ar", "SASRec"), ("cft", "SASRec"), ("SASRec", "prerank"))}
    write_json(Path(options.into, "beauty_catalogue.json"), {
        "made_by": made_by(cfg), "seeds": seeds, "catalogue": catalogue, "same_ten": ten,
        "claims": claims})

    def rows(of, names, text="{:.4f}".format):
        return [[row, *(text(found[name]) for name in names)] for row, found in of.items()]
    page = "\n\n".join([
        f"# Amazon Beauty beside a SASRec, seeds {seeds}",
        "All users and all items; who re-ranks ten cannot move R@10:",
        table(["row", "R@10", "N@10", "R@1"], rows(catalogue, ("R@10", "N@10", "R@1"))),
        "The same ten candidates of the test users; an invalid answer scores 0:",
        table(["row", *METRICS], rows(ten, METRICS)),
        "Differences, with their 95 % intervals over users and seeds:",
        table(["difference", *METRICS], rows(claims, METRICS, interval_text))])
    write_text(Path(options.into, "beauty_catalogue.md"), page + "\n")
    print(page)


def main(cfg, options):
    if not cfg.world.startswith("beauty"):
        raise UserError("the peer recommends items of Amazon Beauty: use --config small or full")
    seeds = chosen_seeds(cfg, options.seeds)
    sequences, items, *_ = read_beauty(cfg.data_dir)
    if options.validate:
        train_peer(options, sequences, len(items), seeds[0])
        return
    candidates, taken = lists_of_ten(sequences, len(items))
    hit = (candidates == taken).any(1)                            # (users,)
    world = load_world(cfg)
    if not np.array_equal((candidates == taken)[hit].argmax(1), world.test.target):
        raise UserError("the tables are of all test users and lists of ten: leave --n_test and "
                        "--n_candidates as the preset has them")
    found = {"prerank": [], "ar": [], "cft": [], "SASRec": []}  # scores of each seed
    ranks = []                                                    # of the test item, by SASRec
    for seed in seeds:
        net = train_peer(options, sequences, len(items), seed)
        of_seed = dataclasses.replace(cfg, seed=seed)
        found["prerank"].append(score_order(world.test, world.test.incoming))
        for stage in ("ar", "cft"):
            decoder = decoder_of(of_seed, stage, load_stage(of_seed, stage, world)[0])
            written, _ = decode_split(of_seed, world, world.test, decoder)
            found[stage].append(score(world, world.test, joined(written)))
        scores, rank = scored(net, [own[:-1] for own in sequences], np.hstack((taken, candidates)))
        order = np.argsort(-scores[hit, 1:], axis=1, kind="stable")
        found["SASRec"].append(score_order(world.test, order))
        ranks.append(rank)
    same_ten = {row: {name: np.stack([scores[f"strict {metric}"] for scores in of_seeds])
                      for name, metric in METRICS.items()}
                for row, of_seeds in found.items()}
    # A user whose item is not in the list counts 0.
    catalogue = {row: {"R@10": hit.mean(), "N@10": scores["N@10"].mean() * hit.mean(),
                       "R@1": scores["R@1"].mean() * hit.mean()}
                 for row, scores in same_ten.items() if row != "SASRec"}
    ranks = np.concatenate(ranks)
    metrics = ranking_metrics(ranks)
    catalogue["SASRec"] = {"R@10": (ranks < 10).mean(), "N@10": metrics["ndcg@10"].mean(),
                           "R@1": metrics["recall@1"].mean()}
    write_tables(cfg, options, seeds, same_ten, catalogue)


if __name__ == "__main__":
    script(main, __doc__, Options)
