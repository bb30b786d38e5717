"""A page that plays how responses are written, forward by forward: AR beside a student.

    python -m report.html --config toy

Writes runs/<config>/decode.html, one file for any browser, without a network; and denoising.gif,
how the last student writes the first test user. The page has what the AR teacher wrote to three
test users, and its students at several thresholds: the teacher's weights in the block sampler
(naive), CFT, and the last stage that has finished.
"""
import json
import os

import numpy as np

from config import folder
from data import HISTORY, LABEL, LAST, PAD
from plumbing.checkpoint import finished_stages
from plumbing.processes import RANK
from plumbing.script import script
from report.denoise import (checked, missing, truth, user_of, verdict, write, wrong_labels)
from report.figures import write_gif
from report.table import device_name, write_text
from trainer import ar_decoder, block_decoder, load_world

TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "page.html")
MARK = "@DATA@"  # where the data go in page.html
ITEM = 3         # tokens of an item in a history, in both worlds
USERS = 3        # the first test users
TAUS = 0.3, 0.9  # thresholds, beside tau itself


def response_data(user, written):
    """A response (denoise.Written) as the page knows it. A slot without a token has null."""
    n_true, n_statements = truth(user, written)
    valid, order = verdict(user, written)
    return {
        "tokens": [user.words[token] if token != PAD else None for token in written.tokens],
        "block": written.block.tolist(),
        "forward": written.forward.tolist(),
        "probability": np.round(written.probability, 3).tolist(),
        "ends": np.round(written.ends, 2).tolist(),
        "untrue": [[slots, fault] for slots, fault in checked(user, written) if fault],
        "missing": [user.words[about] for about in missing(user, written)],
        "wrong": list(map(list, wrong_labels(user, written).items())),
        "true": [n_true, n_statements],
        "valid": valid,
        "order": [user.words[label] for label in order]}


def user_data(user, number, ar, students):
    """A user as the page knows them. ar: Written; students: {name: {tau: Written}}."""
    history = [token for token in user.history if token not in (HISTORY, LAST)]
    return {
        "number": number,
        "history": [user.text(history[i:i + ITEM]) for i in range(0, len(history), ITEM)],
        "candidates": [[user.words[about], user.text(shown[1:])]
                       for about, shown in user.candidates.items()],
        "target": user.words[user.target] if user.target is not None else None,
        "before": [user.words[LABEL + label] for label in user.incoming if label >= 0],
        "ar": response_data(user, ar),
        "students": {name: {str(tau): response_data(user, written)
                            for tau, written in at_tau.items()}
                     for name, at_tau in students.items()}}


def decodes(cfg, world, models, n, taus):
    """What is written to test user n: AR's Written, and {student: {tau: Written}}."""
    ar = write(cfg, world, "ar", models["ar"], ar_decoder(models["ar"]), n)
    students = {}
    for name, model in {"naive": models["ar"], **models}.items():
        if name != "ar":
            students[name] = {
                tau: write(cfg, world, name, model, block_decoder(cfg, model, tau), n)
                for tau in taus}
    return ar, students


def page_of(data):
    """The page: the template with the data as JSON in its one place for them."""
    with open(TEMPLATE, encoding="utf-8") as file:
        before, after = file.read().split(MARK)
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return before + text.replace("<", "\\u003c") + after  # no word of the data ends the script


def main(cfg):
    if RANK:  # of several processes one decodes
        return
    world = load_world(cfg)
    stages = {stage: model for stage, (model, _) in finished_stages(cfg, world).items()}
    last = list(stages)[-1]
    models = {stage: model for stage, model in stages.items() if stage in ("ar", "cft", last)}
    taus = sorted({cfg.tau, *TAUS})

    users = []
    for n in range(min(USERS, len(world.test))):
        user = user_of(world, n)
        ar, students = decodes(cfg, world, models, n, taus)
        users.append(user_data(user, n + 1, ar, students))
        if n == 0:
            shown = students["naive" if last == "ar" else last][cfg.tau]
            write_gif(folder(cfg, "denoising.gif"), user, shown)
    data = {"title": f"{cfg.config}, seed {cfg.seed}", "device": device_name(cfg),
            "blockSize": cfg.block_size, "tau": cfg.tau, "users": users}
    write_text(folder(cfg, "decode.html"), page_of(data))
    print(f"written: {folder(cfg, 'decode.html')} and denoising.gif")


if __name__ == "__main__":
    script(main, __doc__)
