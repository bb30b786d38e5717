"""A page that shows how responses are written, forward by forward, with what every slot thought.

    python report/html.py --config toy
    python report/html.py --config toy --user 7 --users 1 --taus 0.5,1.0

Writes <run_dir>/<config>/decode.html: one file, for any browser, without a network. It holds a
saved decode of the AR teacher and of its students: the teacher's weights themselves (naive), CFT,
and the last stage that has finished, each at several thresholds.
"""
import dataclasses
import json
import os
import sys
from dataclasses import dataclass

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
# As a script, this file would stand in for Python's own module html: its folder has to go.
sys.path[:] = [ROOT] + [path for path in sys.path if os.path.abspath(path) != HERE]

from plumbing.script import script  # noqa: E402  before torch: see there

from config import folder  # noqa: E402
from data import (CANDIDATES, HISTORY, LABEL, LAST, PAD, parse_answers,  # noqa: E402
                  tensors)
from ours.bound import joined, write  # noqa: E402
from plumbing.checkpoint import (device_of, finished_stages, last_student,  # noqa: E402
                                 save_atomically)
from plumbing.settings import Numbers, UserError, Whole  # noqa: E402
from report.denoise import (ar_writes, checked, forward_of, opened, student_writes,  # noqa: E402
                            unsaid, user_of, wrong_labels)
from report.speed import device_name  # noqa: E402
from sampler import block_decode  # noqa: E402
from trainer import load_world, rule_of  # noqa: E402

MARK = "@DATA@"  # where the JSON goes in page.html
MOST = 5         # tokens of a slot that the page can show
ITEM = 3         # tokens of an item in a history, in both worlds


@dataclass(frozen=True)
class Options:
    user: Whole(1, 10 ** 9) = 1  # the first test user on the page
    users: Whole(1, 10) = 3      # how many
    taus: Numbers(above=0, high=1) = (0.3, 0.9)  # thresholds beside tau itself


class Recorder:
    """A commit rule that keeps what each forward thought of its open slots, and asks another."""

    def __init__(self, rule):
        self.rule = rule
        self.forwards = []  # {slot of the block: [(token, probability)]}, the best first

    def choose(self, logp, open_, forced):
        """As sampler.Threshold.choose: logp (1, B, V), open_ and forced (1, B) -> (1, B)."""
        p, token = logp[0].exp().topk(MOST)                       # (B, 5)
        slots = open_[0].nonzero()[:, 0].tolist()
        self.forwards.append({slot: list(zip(token[slot].tolist(), p[slot].tolist()))
                              for slot in slots})
        return self.rule.choose(logp, open_, forced)


class Vocabulary(dict):
    """token -> its number among those that the page uses."""

    def __missing__(self, token):
        self[token] = len(self)
        return self[token]

    def of(self, tokens):
        return [self[int(token)] for token in tokens]


# --- What the page holds ----------------------------------------------------------------------

def response_data(user, written, vocabulary):
    """A response, when it was written, and what is wrong with it."""
    tokens = written.tokens
    answers = parse_answers(tokens[None], user.incoming[None])
    order = answers.order[0][answers.order[0] >= 0]
    statements = checked(user, tokens)
    true = sum(fault is None for _, fault in statements)
    return {
        "tokens": vocabulary.of(tokens),
        "step": written.step.tolist(),
        "forward": written.forward.tolist(),
        "ends": [round(float(end), 2) for end in written.ends],
        "untrue": [[places, fault] for places, fault in statements if fault],
        "unsaid": [user.words[about] for about in unsaid(user, tokens)],
        "wrong": [[place, other] for place, other in wrong_labels(user, tokens).items()],
        "true": [true, max(len(user.required), len(statements))],
        "valid": bool(answers.valid[0]),
        "order": vocabulary.of(order + LABEL)}


def thoughts(cfg, model, prompt, max_len, tau):
    """What a student thinks while it writes: for each forward {slot: [(token, probability)]}.
    prompt (1, P); the slots are those of Written that were open."""
    recorder, B = Recorder(rule_of(cfg, tau)), cfg.block_size

    def decoder(own, read, max_len, _):
        return block_decode(model, read, max_len, own.block_size, recorder)
    decoded = joined(write(cfg, decoder, prompt, max_len))
    forward = forward_of(opened(decoded, B)[1], B)
    out = []
    for number, slots in enumerate(recorder.forwards):
        begin = int((forward == number).argmax()) // B * B
        out.append({begin + slot: best for slot, best in slots.items()})
    return out


def student_data(user, written, thought, vocabulary):
    """response_data of a student, and what it thought at each forward: of each open slot
    [slot, token, thousandths, token, thousandths, ...], the best first."""
    # Cut, not rounded: so they never sum to more than 1.
    top = [[[slot, *(x for token, p in best for x in (vocabulary[token], int(1000 * p)))]
            for slot, best in slots.items()] for slots in thought]
    return {**response_data(user, written, vocabulary), "top": top,
            "slots": written.slots}


def history_of(user, vocabulary):
    """The items of the history, oldest first, as lists of words."""
    prompt = [int(token) for token in user.prompt if token != PAD]
    tokens = [token for token in prompt[:prompt.index(CANDIDATES)] if token not in (HISTORY, LAST)]
    return [vocabulary.of(tokens[i:i + ITEM]) for i in range(0, len(tokens), ITEM)]


def page_data(cfg, options, world, models):
    """All that the page holds. models {stage: GPT}: AR's, then the students'."""
    vocabulary, users = Vocabulary(), []
    taus = sorted({cfg.tau, *options.taus})
    students = {"naive": models["ar"], **models}
    del students["ar"]

    def run(user, name, prompt, tau):
        how = students[name], prompt, world.max_response, tau
        written = student_writes(cfg, name, *how)
        return student_data(user, written, thoughts(cfg, *how), vocabulary)

    for n in range(options.user - 1, min(len(world.test), options.user - 1 + options.users)):
        user = user_of(world, n)
        prompt, _ = tensors(world.test, range(n, n + 1), device_of(cfg))
        ar = ar_writes(cfg, models["ar"], prompt, world.max_response)
        runs = {name: {tau: run(user, name, prompt, tau) for tau in taus} for name in students}
        candidates = [vocabulary.of(part) for part in user.candidates.values()]
        target = vocabulary[user.taken] if user.taken is not None else None
        users.append({
            "number": n + 1, "history": history_of(user, vocabulary), "candidates": candidates,
            "target": target, "ar": response_data(user, ar, vocabulary), "students": runs})
    return {
        "title": f"{cfg.config}, seed {cfg.seed}", "device": device_name(cfg),
        "blockSize": cfg.block_size, "tau": cfg.tau, "taus": taus, "stages": list(students),
        "users": users, "words": [user.words[token] for token in vocabulary]}


def page_of(data):
    """The page, with its data as JSON in the one place for it."""
    with open(os.path.join(HERE, "page.html"), encoding="utf-8") as file:
        before, after = file.read().split(MARK)
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return before + text.replace("<", "\\u003c") + after  # no word of the data ends the script


def main(cfg, options):
    if device_of(cfg).type == "cuda":  # its twins replay graphs, in which no rule can record
        cfg = dataclasses.replace(cfg, fast=False)
    world = load_world(cfg)
    if options.user > len(world.test):
        raise UserError(f"--user {options.user}: there are {len(world.test)} test users")
    last, _ = last_student(cfg, world)
    models = {stage: model for stage, (model, _) in finished_stages(cfg, world).items()
              if stage in ("ar", "cft", last)}
    text = page_of(page_data(cfg, options, world, models))

    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
    path = folder(cfg, "decode.html")
    save_atomically(path, write)
    print(f"{path}: {', '.join(models)}; {len(text.encode()) / 1000:.0f} kB")


if __name__ == "__main__":
    script(main, __doc__, Options)
