"""Maps of regimes, tables and pictures, from the curves that regimes.py has left.

    python experiments/regime_figures.py --config toy_few --map responses
    python experiments/regime_figures.py --config toy --trace free --map wording
    python experiments/regime_figures.py --config toy_paper --map paper

responses: what a response of the teacher is worth, with OPD and without: the regimes few_<n> of
--numbers. wording: what doubt in the text costs a parallel decoder: the regime `wording` in the
folders <run_dir>/token, statement, trace. paper: the stages of the paper's recipe at its
"quality-preserving" threshold, 0.9. In the first a student is shown at the threshold that is best
on the validation users. Writes <map>.md, and <map>.png, into the run's folder.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from plumbing.script import script  # noqa: E402  first: it sets how threads wait

import dataclasses  # noqa: E402
from dataclasses import dataclass  # noqa: E402

import numpy as np  # noqa: E402

from analyse import interval, table  # noqa: E402
from config import folder  # noqa: E402
from evaluate import paired_interval  # noqa: E402
from ours.wording import entropy_bits  # noqa: E402
from plumbing.checkpoint import load_tensors  # noqa: E402
from plumbing.settings import OneOf, Text, UserError  # noqa: E402
from regimes import MEASURED, TAUS, best, means, points_path, regime_of, settings  # noqa: E402
from report.figures import COLOURS, pyplot, save  # noqa: E402
from report.options import finished_seeds  # noqa: E402
from report.rows import write_text  # noqa: E402
from trainer import load_world  # noqa: E402

NDCG = "strict ndcg@10"
WORDINGS = ("token", "statement", "trace")
SHOWN = {"AR": "ar", "CFT drawn text": "cft", "CFT greedy text": "opd", "OPD jsd": "rl"}  # colours


@dataclass(frozen=True)
class Options:
    map: OneOf("responses", "wording", "paper") = "responses"  # which
    numbers: Text() = "100,300,1000,3000,10000,40000"  # of responses, with commas
    seeds: Text() = "0,1,2"  # with commas


def curve(cfg, regime, name, seeds):
    """{"val", "test": (seeds, taus, len(MEASURED), N)} of a student, as regimes.py has left it."""
    students, _ = regime_of(cfg, regime)
    found = {"val": [], "test": []}
    for seed in seeds:
        own = settings(dataclasses.replace(cfg, seed=seed), regime, students, name)
        path = points_path(own, students[name])
        if not os.path.exists(path):
            raise UserError(f"no {path}: first run `python experiments/regimes.py --config "
                            f"{cfg.config} --regime {regime}` for {name}, seed {seed}")
        saved = load_tensors(path)
        for split, rows in found.items():
            rows.append(np.stack([saved[f"{split} {tau}"].numpy() for tau in TAUS]))
    return {split: np.stack(rows) for split, rows in found.items()}


def at_best(of):
    """A student where it is best on validation users: its N@10 on the test users (seeds, N), the
    forwards it takes, and its mean N@10 on validation users."""
    i = best(of)
    ndcg = of["test"][:, i, MEASURED.index(NDCG)]
    return ndcg, means(of["test"], "forwards")[i], means(of["val"], NDCG)[i]


# --- Responses of the teacher -----------------------------------------------------------------

def responses(cfg, options, seeds):
    """The table and the picture of the regimes few_<n>."""
    try:
        numbers = [int(n) for n in options.numbers.split(",")]
    except ValueError:
        raise UserError("--numbers must be whole numbers with commas between them")
    rows, heights = [], []
    for n in numbers:
        of = {name: at_best(curve(cfg, f"few_{n}", name, seeds))
              for name in ("AR", "CFT", "more CFT", "OPD")}
        text = max("CFT", "more CFT", key=lambda name: of[name][2])
        gain = paired_interval(of["OPD"][0] - of[text][0])[0]
        cells = [f"{of[name][0].mean():.3f} ({of[name][1]:.1f})"
                 for name in ("CFT", "more CFT", "OPD")]
        rows.append([f"{n:,}", *cells, interval(gain)])
        heights.append([of[name][0].mean(1) for name in (text, "OPD", "AR")])
    head = ["responses", "CFT", "more CFT", "OPD", "OPD − the better CFT"]
    return head, rows, responses_figure(numbers, np.array(heights))


def responses_figure(numbers, ndcg):
    """ndcg (numbers, 3, seeds): of the better CFT, OPD and AR."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(5.6, 3.6))
    for k, (stage, label) in enumerate((("cft", "CFT, the better of two lengths"),
                                        ("opd", "then OPD on fresh prompts"), ("ar", "AR"))):
        mean, colour = ndcg[:, k].mean(1), COLOURS[stage]
        ax.plot(numbers, mean, "--" if stage == "ar" else "o-", color=colour, label=label)
        if stage != "ar":
            ax.fill_between(numbers, ndcg[:, k].min(1), ndcg[:, k].max(1), color=colour, alpha=0.2,
                            linewidth=0)
    ax.set(xscale="log", xlabel="responses of the teacher", ylabel="N@10, strict")
    ax.legend(loc="lower right")
    return fig


# --- Free wording -----------------------------------------------------------------------------

def wordings(cfg, options, seeds):
    """The table and the picture of the three kinds of wording."""
    rows, curves = [], {}
    for kind in WORDINGS:
        own = dataclasses.replace(cfg, wording=kind, run_dir=os.path.join(cfg.run_dir, kind))
        bits = entropy_bits(load_world(own), kind)
        for name in ("AR", "CFT drawn text", "CFT greedy text", "OPD forward", "OPD jsd"):
            of = curve(own, "wording", name, seeds)
            forwards, ndcg, kept = (means(of["test"], score)
                                    for score in ("forwards", NDCG, "one wording"))
            curves[kind, name] = forwards, kept
            cells = [f"{f:.1f}: {v:.3f}, {100 * k:.0f} %"
                     for f, v, k in zip(forwards, ndcg, kept)]
            rows.append([kind, f"{bits:.0f}", name, *cells])
    head = ["a coin for each", "bits", "student", *(f"τ = {tau}" for tau in TAUS)]
    return head, rows, wording_figure(curves)


def wording_figure(curves):
    """What keeps to one wording, against forwards: {(kind, student): (forwards, share)}."""
    plt = pyplot()
    kinds = WORDINGS[1:]  # coins of their own cannot be mixed
    fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.4), sharey=True)
    for ax, kind in zip(axes, kinds):
        for name, colour in SHOWN.items():
            forwards, kept = curves[kind, name]
            if name == "AR":
                ax.axhline(kept[0], linestyle="--", color=COLOURS[colour], label=name)
            else:
                ax.plot(forwards, kept, "o-", color=COLOURS[colour], label=name)
        ax.set(title=f"one coin a {kind}", xlabel="forwards a response", ylim=(-0.02, 1.02))
    axes[0].set_ylabel("keeps to one wording")
    axes[0].legend(loc="lower right", fontsize=8)
    return fig


# --- The paper's recipe -----------------------------------------------------------------------

def paper(cfg, options, seeds):
    """The table of the regime `paper`; no picture."""
    shown = {"forwards": "{:.1f}", "valid": "{:.1%}", NDCG: "{:.3f}", "served ndcg@10": "{:.3f}",
             "strict recall@1": "{:.3f}", "faithful": "{:.1%}"}
    rows = []
    for name in regime_of(cfg, "paper")[0]:
        of = curve(cfg, "paper", name, seeds)["test"]
        rows.append([name] + [form.format(means(of, score)[TAUS.index(0.9)])
                              for score, form in shown.items()])
    return ["stage", "forwards", "valid", "N@10", "as served", "R@1", "faithful"], rows, None


def main(cfg, options):
    draw = {"responses": responses, "wording": wordings, "paper": paper}[options.map]
    head, rows, figure = draw(cfg, options, finished_seeds(cfg, options.seeds))
    text = table(head, rows) + "\n"
    write_text(folder(cfg, f"{options.map}.md"), text)
    if figure:
        save(cfg, figure, f"{options.map}.png")
    print(text)


if __name__ == "__main__":
    script(main, __doc__, also=Options)
