"""Which statements of a trace moved the first place, with --trace bound.

    trace    <profile> x2 y2 z3  L1 x3:1 y4:0 z4:0  ...  L4 x2:3 y4:0 z3:3    first: L4
    edited   <profile> x2 y2 z3  L1 x3:1 y4:0 z4:0  ...  L4 x2:0 y4:0 z3:0    first: L1

Each candidate's statement in turn is replaced by one without evidence, and the answer is written
anew. It sees the edited trace and nothing else, so that statement is what moved the first place.

The profile stays: there is no empty one. A student that reads a trace without it is out of its
depth, so what it then answers would not tell what the profile did.
"""
import numpy as np
import torch

from data import ANSWER, EOS, LABEL, PAD, parse_answers
from model import ar_decode
from ours.bound import answer_length, for_answer, what_is_read
from plumbing.checkpoint import device_of
from report.denoise import placed
from sampler import block_decode
from trainer import rule_of


def answer_to(cfg, stage, model, trace):
    """Answers that a stage writes to traces (n, T), without their prompts -> tokens (n, R)."""
    own, read = for_answer(cfg), what_is_read(trace)
    if stage == "ar":
        return ar_decode(model, read, answer_length(cfg))[0]
    return block_decode(model, read, answer_length(cfg), own.block_size, rule_of(own)).tokens


def without_evidence(world):
    """What each token (V,) becomes where there is no evidence: x3:2 -> x3:0; on Beauty, rounded
    as training shows it, co:4,3,6 -> co:0,1,1. Labels stay."""
    token_of = {word: token for token, word in enumerate(world.words)}
    zero = {name: ",".join(map(str, values[:, 0])) for name, values in world.nearest.items()}
    names = [word.split(":")[0] for word in world.words]
    return np.array([token_of.get(f"{name}:{zero.get(name, 0)}", token)
                     for token, name in enumerate(names)])


def emptied(world, trace):
    """A trace (T,) -> the candidates that it has statements about, label tokens (S,), and for
    each statement the trace without its evidence (S, T), as lists."""
    empty, about, traces = without_evidence(world), [], []
    for places in placed(trace, world.n_labels):
        if LABEL <= trace[places[0]] < LABEL + world.n_labels:
            about.append(int(trace[places[0]]))
            traces.append(trace.copy())
            traces[-1][places] = empty[trace[places]]
    return about, traces


def decisive(cfg, world, student, written, incoming):
    """What decided the first place of a response (R,) to a list (K,), by student, (stage, model):
    {label token: the one that is first without the statement about it}, where that is another."""
    end = np.append(np.isin(written, (PAD, ANSWER, EOS)), True).argmax()
    trace = written[:max(1, end)]  # of an empty trace a [PAD] is read
    about, traces = emptied(world, trace)
    traces = torch.from_numpy(np.stack([trace, *traces])).to(device_of(cfg))
    tokens = answer_to(cfg, *student, traces).cpu().numpy()
    order = parse_answers(tokens, np.repeat(incoming[None], len(tokens), axis=0)).order
    first = (LABEL + order[:, 0]).tolist()
    return {label: new for label, new in zip(about, first[1:]) if new != first[0]}
