"""Does a code appear in the traces if RL may change them, and rewards the ranking alone?

    python experiments/induced.py --config toy --seeds 0,1,2 --threads 1

Here a trace says too little. It has no profile, and of each value of a candidate it says only
whether the history has it (x3:1) or not (x3:0), never how often:

    L1 x3:1 y4:0 z4:0   L2 x4:0 y1:1 z2:0   L3 x3:1 y1:1 z4:0   L4 x2:1 y4:0 z3:1 [EOS]

The teacher has first learned to write how often, then to leave that out. So it knows more than a
trace may say, and with --trace bound the answer is written from the trace alone. A false statement
that tells the reader more than the true one then raises the reward. Four students of this teacher
(*before*) are trained by RL, in equally many rounds:

    answers      the policy is the answers to the traces of the rule, as in train_rl.py
    traces       the policy is traces and answers: the model ranks from what it wrote itself
    anchored     the same, and the AR loss on the text of the rule is added
    anchored10   the same, and the AR loss weighs ten times as much

The reward is the N@10 that an answer is expected to have, by the chances of the oracle. Whole
traces that are sampled teach very little here: a sure model hardly ever lies. So a trace is
compared with itself after one statement has been turned (0 to 1, or 1 to 0), for every statement
in it. The advantage of a turned statement is what it adds to the reward.

SETTINGS below hold whatever the command says. Writes induced.json and induced.md to
runs/<config>/. All users are test users.

    faithful       share of true statements about a candidate, three values each
    never, once, more often
                   of the values that the history has so often: share that is stated falsely
    capacity_bits  as in experiments/traces.py
    gain           N@10 less that of *before*, [low, mean, high]
    by traces      N@10 less that of the same model if it reads the traces of the rule
    cross_reader   N@10 if *before* of the next seed reads the traces, less that of the model;
                   None with one seed
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dataclasses
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import train_ar
import train_cft
from config import folder
from data import as_prompt, draw_examples, draw_rows, examples_of, joined, parse_answers, tensors
from evaluate import score
from model import ar_decode, causal_hidden
from plumbing.checkpoint import load_stage, made_by, start_from
from plumbing.script import script
from plumbing.settings import Text, UserError
from report.intervals import interval_text, paired_interval
from report.table import chosen_seeds, plain, write_json, write_text
from tables import share, table
from toy.world import TOY_ATTRIBUTES
from traces import answers, capacity_bits, oracle_scores, toy_items
from train_rl import advantages, policy_loss
from trainer import Run, ar_decoder, autocast, decode_split, load_world, rng_for, sampling_on

# After AR, 300 more steps in which traces say less (CFT with blocks of one token is AR training).
SETTINGS = dict(
    device="cpu", trace="bound", wording="fixed", block_size=1, commit="threshold",
    cft_first_steps=0.0, cft_misplace=0.0, cft_ar_weight=0.0, cft_steps=300, cft_lr=1e-3,
    rl_steps=150, rl_lr=3e-4, rl_prompts=32)
# What RL trains, and the weight of the AR loss.
ARMS = {"answers": 0.0, "traces": 0.0, "anchored": 1.0, "anchored10": 10.0}
COUNTS = {"never": [":0"], "once": [":1"], "more often": [":2", ":3"]}  # how a statement ends
SHARES = ("valid", "faithful", *COUNTS)
DIFFERENCES = ("gain", "by traces", "cross_reader")


@dataclass(frozen=True)
class Options:
    seeds: Text() = ""  # such as 0,1,2; empty: that of --seed


def that_says(world, most):
    """The World whose traces have no profile and count to `most`."""
    number = {word: token for token, word in enumerate(world.words)}
    says = np.arange(len(world.words), dtype=np.int16)            # (V,) token -> what is written
    for word, token in number.items():
        value, _, count = word.partition(":")
        if count:
            says[token] = number[f"{value}:{min(int(count), most)}"]
    splits = {}
    for name in ("train", "val", "test"):
        split = getattr(world, name)
        evidence = split.trace[:, 1 + TOY_ATTRIBUTES:]            # without the profile
        splits[name] = dataclasses.replace(split, trace=says[evidence])
    # The words and the users stay the same, so a model may go on from one such World to another.
    return dataclasses.replace(world, checksum=f"{world.checksum}, no profile", **splits)


def turned(words):
    """(V,) the opposite of each statement x3:0 or x3:1; 0 for all other tokens."""
    number = {word: token for token, word in enumerate(words)}
    opposite = {":0": ":1", ":1": ":0"}
    return torch.tensor([number[word[:-2] + opposite[word[-2:]]] if word[-2:] in opposite else 0
                         for word in words])


def chances(split, n_labels):
    """P(target = c | prompt) of every candidate, by the oracle: (N, K)."""
    odds = np.exp(oracle_scores(*toy_items(split, n_labels), split.list_length))
    return odds / odds.sum(1, keepdims=True)


def expected_ndcg(answer, incoming, chance):
    """The N@10 that is expected of answers (N, R), tokens; 0 if an answer is invalid: (N,).

    incoming (N, K) labels, chance (N, K) of each of them to be the target."""
    read = parse_answers(answer.numpy(), incoming)
    of_place = np.take_along_axis(chance, read.order.clip(0), 1)  # (N, K)
    discount = np.log2(np.arange(incoming.shape[1]) + 2)          # (K,)
    ndcg = np.where(read.order >= 0, of_place / discount, 0).sum(1)
    return torch.from_numpy(ndcg * read.valid).float()


def read_as(trace):
    """Traces (N, R) as prompts of answers."""
    return torch.from_numpy(as_prompt(trace.numpy()))


def turn_each(model, trace, opposite, worth, max_len):
    """What it would add to the reward to turn one statement of a trace, for each statement, row by
    row: (n,). And the rewards (N,) of the traces as they are.

    trace (N, R); opposite (N, R), 0 where there is no statement; worth(answer, row) rewards the
    answers to traces of these rows."""
    row, slot = opposite.nonzero(as_tuple=True)                   # (n,) a turned statement each
    other = trace[row]
    other[torch.arange(len(row)), slot] = opposite[row, slot]     # (n, R)
    rows = torch.cat((torch.arange(len(trace)), row))             # (N + n,)
    answer, _, _ = ar_decode(model, read_as(torch.cat((trace, other))), max_len)
    rewards = worth(answer, rows.numpy())                         # (N + n,)
    as_it_is = rewards[:len(trace)]
    return rewards[len(trace):] - as_it_is[row], as_it_is


def logp_of(model, prompt, response, token):
    """Log-probabilities (N, R) of tokens (N, R), after the response (N, R) before each of them."""
    logits = model.logits(causal_hidden(model, prompt, response))  # (N, R, V)
    return F.log_softmax(logits.float(), -1).gather(-1, token[..., None])[..., 0]


def train(cfg, world, arm):
    """RL of one arm, from the teacher that cfg names in --from."""
    model = start_from(cfg, world, "rl")
    run = Run(cfg, "rl", model, world)
    kinds = examples_of(world.train, "bound")
    chance = chances(world.train, world.n_labels)                 # (N, K)
    opposite_of = turned(world.words)                             # (V,)
    trace_len, answer_len = world.longest["bound"]
    for step in run.steps():
        rng = rng_for(cfg, "induced", step)
        rows = draw_rows(len(world.train), cfg.rl_prompts, rng)   # (N,)
        prompt, trace = tensors(kinds[0], rows, "cpu")            # (N, P), (N, R)

        def worth(answer, which):
            users = rows[which]
            return expected_ndcg(answer, world.train.incoming[users], chance[users])

        # 1. Traces, and what each of their statements is worth.
        log = {}
        if arm != "answers":
            trace, _, _ = ar_decode(model, prompt, trace_len)     # (N, R)
            opposite = opposite_of[trace]                         # (N, R)
            is_statement = opposite > 0
            if is_statement.sum() < 2:
                raise UserError("the teacher writes no statements yet: use more --ar_steps")
            added, as_it_is = turn_each(model, trace, opposite, worth, answer_len)
            advantage = added / (added.std() + 1e-6)              # (n,)
            log["reward"] = as_it_is.mean().item()

        # 2. A group of answers to every trace.
        which = np.repeat(np.arange(len(rows)), cfg.rl_group)     # (G,)
        read = read_as(trace[which])
        answer, _, _ = ar_decode(model, read, answer_len, sampling_on(prompt.device, 1.0, rng))
        rewards = worth(answer, which).view(-1, cfg.rl_group)     # (N, group)
        log["sampled_reward"] = rewards.mean().item()
        of_answer = advantages(rewards)[0].flatten()              # (G,)

        # 3. Updates of both, and the anchor.
        old = old_answer = None
        for _ in range(cfg.rl_epochs):
            with autocast(cfg, prompt.device):
                logp = logp_of(model, read, answer, answer)       # (G, R)
            old_answer = logp.detach() if old_answer is None else old_answer
            loss, _ = policy_loss(logp, old_answer, of_answer, answer > 0,
                                  cfg.rl_eps_low, cfg.rl_eps_high)
            if arm != "answers":
                with autocast(cfg, prompt.device):
                    logp = logp_of(model, prompt, trace, opposite)[is_statement]  # (n,)
                old = logp.detach() if old is None else old
                # Every turned statement is a response of one token.
                of_traces, _ = policy_loss(
                    logp[:, None], old[:, None], advantage, torch.ones_like(logp[:, None]),
                    cfg.rl_eps_low, cfg.rl_eps_high)
                loss = loss + of_traces
            if ARMS[arm]:
                examples, some = draw_examples(kinds, cfg.batch_size, cfg.answer_share, rng)
                text = tensors(examples, some, "cpu")
                loss = loss + ARMS[arm] * train_ar.ar_loss(cfg, model, *text)
            log |= run.update(loss)
        run.log(**log)


def trained(cfg, full, short):
    """{name: model} of a seed: *before*, and the arms. Trains what has not finished."""
    before = dataclasses.replace(cfg, run_dir=f"{cfg.run_dir}/induced/before")
    for stage, world in ((train_ar, full), (train_cft, short)):
        with mock.patch.object(stage, "load_world", return_value=world):
            stage.main(before)
    models = {"before": load_stage(before, "cft", short)[0]}
    for arm in ARMS:
        of_arm = dataclasses.replace(
            cfg, run_dir=f"{cfg.run_dir}/induced/{arm}", from_=folder(before, f"seed{cfg.seed}"))
        train(of_arm, short, arm)
        models[arm] = load_stage(of_arm, "rl", short)[0]
    return models


def false_shares(full, short, trace):
    """{count of COUNTS: share of false statements} in traces (N, R) of the test users.

    full, short: the Worlds whose traces count, and do not."""
    rule = short.test.trace                                       # (N, T)
    false = trace[:, :rule.shape[1]] != rule                      # (N, T)
    ending = np.array([word[-2:] for word in full.words])[full.test.trace]  # (N, T)
    return {count: false[np.isin(ending, ends)].mean() for count, ends in COUNTS.items()}


def measures(cfg, full, world, models, other):
    """{name: {measure: a number, or (N,) for the test users}} of a seed. other: *before* of the
    next seed, or None."""
    split, out = world.test, {}

    def ndcg(answer):
        return score(world, split, answer)["strict ndcg@10"]      # (N,)
    for name, model in models.items():
        (trace, own), _ = decode_split(cfg, world, split, ar_decoder(model))
        scores = score(world, split, joined([trace, own]))
        served = scores["strict ndcg@10"]                         # (N,)
        of_rule = answers(cfg, world, ar_decoder(model), split.prompt, split.trace)
        out[name] = {
            "ndcg@10": served.mean(),
            "valid": scores["valid"].mean(),
            "faithful": scores["faithful"].mean(),
            **false_shares(full, world, trace),
            "capacity_bits": capacity_bits(world, trace, "fixed"),
            "by traces": served - ndcg(of_rule),
            "served": served}
        if name != "before":
            out[name]["gain"] = served - out["before"]["served"]
        if other:
            read = answers(cfg, world, ar_decoder(other), split.prompt, trace)
            out[name]["cross_reader"] = ndcg(read) - served
    return out


def line_of(name, found):
    """What induced.json says of a student, from the measures of its seeds, a list."""
    line = {"student": name}
    for measure in ("ndcg@10", *SHARES, "capacity_bits"):
        of_seeds = [x[measure] for x in found]
        line |= {measure: np.mean(of_seeds), f"{measure} of each seed": of_seeds}
    for measure in DIFFERENCES:
        line[measure] = None
        if measure in found[0]:
            differences = np.array([x[measure] for x in found])   # (seeds, N)
            line[measure] = paired_interval(differences)[0]
            line[f"{measure} of each seed"] = list(differences.mean(1))
    return plain(line)


def row_of(line):
    return [line["student"], f"{line['ndcg@10']:.4f}", *(share(line[name]) for name in SHARES),
            f"{line['capacity_bits']:.1f}",
            *("-" if line[name] is None else interval_text(line[name]) for name in DIFFERENCES)]


def main(cfg, options):
    if cfg.world != "toy":
        raise UserError("this leaves out what the toy world's traces say: use --config toy")
    seeds = chosen_seeds(cfg, options.seeds)
    cfg = dataclasses.replace(cfg, **SETTINGS)
    world = load_world(cfg)
    full, short = (that_says(world, most) for most in (3, 1))
    models = {seed: trained(dataclasses.replace(cfg, seed=seed), full, short) for seed in seeds}
    found = []
    for seed, following in zip(seeds, seeds[1:] + seeds[:1]):
        other = models[following]["before"] if len(seeds) > 1 else None
        found.append(measures(cfg, full, short, models[seed], other))
        print(f"seed {seed}: done", flush=True)
    lines = [line_of(name, [x[name] for x in found]) for name in ("before", *ARMS)]
    head = ["student", "N@10", *SHARES, "capacity_bits", *DIFFERENCES]
    text = table(head, [row_of(line) for line in lines])
    result = {"config": cfg.config, "made_by": made_by(cfg), "seeds": seeds, "students": lines}
    write_json(folder(cfg, "induced.json"), result)
    write_text(folder(cfg, "induced.md"), f"{text}\n")
    print(text)


if __name__ == "__main__":
    script(main, __doc__, Options)
