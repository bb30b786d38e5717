"""When does a stage pay? Each in the regime that it was made for, held against controls.

    python experiments/regimes.py --config toy_few --regime few_300 --seeds 0,1,2
    python experiments/regimes.py --config toy_paper --regime paper
    python experiments/regimes.py --config toy --world toy_expert --regime expert
    python experiments/regimes.py --config toy --commit threshold --regime parallel
    python experiments/regimes.py --config toy --trace free --wording statement --regime wording

A regime is a few students: a stage script, the student that it goes on from, options. Each is
decoded on the validation and on the test users at several thresholds. A claim holds a stage
against controls of equal cost:

    ndcg@10 strict              the stage at the threshold that is best on the validation users; a
                                control at the best of those that take no more forwards (5 % more)
    valid                       there, too
    forwards at equal quality   the stage at its fastest threshold that is as good, on the
                                validation users, as the control at its best

Only then are the test users looked at. Every seed has a teacher of its own (--seed), unless
--teacher names one for all. Stopped runs go on. Writes regime_<name>_<rule>.json (claims) and
.md (all curves) into the run's folder.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from plumbing.script import script  # noqa: E402  first: it sets how threads wait

import dataclasses  # noqa: E402
import json  # noqa: E402
import shlex  # noqa: E402
import shutil  # noqa: E402
from dataclasses import dataclass  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

from ablations import arguments, overrides, train  # noqa: E402
from config import folder  # noqa: E402
from evaluate import paired_interval, score  # noqa: E402
from ours.wording import consistency  # noqa: E402
from plumbing.checkpoint import (checkpoint_path, load_stage, load_tensors,  # noqa: E402
                                 save_tensors)
from plumbing.decoding import decode_split  # noqa: E402
from plumbing.settings import Text, UserError  # noqa: E402
from report.options import finished_seeds  # noqa: E402
from report.rows import write_json, write_text  # noqa: E402
from trainer import decode, load_world  # noqa: E402

TAUS = (0.3, 0.5, 0.9)
FINER = (0.2, 0.3, 0.5, 0.9)  # where few forwards are the point
MEASURED = ("valid", "strict ndcg@10", "strict recall@1", "served ndcg@10", "faithful",
            "one wording", "tokens", "forwards")
MORE_CFT = 1.5  # steps of CFT that take the FLOPs of a step of OPD, without anchors
MORE_OPD = 10   # steps of OPD that take the time of a roll-out of RL
MORE_AR = 5     # steps of AR that take the FLOPs of a roll-out of RL, of 256 answers
FORWARDS = {"toy": 46, "beauty": 75}  # that a response takes the teacher, one after the other
MOST = 3.6      # forwards that the regime "parallel" allows for 3 blocks
PARALLEL_CFT, PARALLEL_OPD = 500, 350  # steps that take the time of its 100 roll-outs of RL
MORE = 1.05  # forwards that a control may take, as a multiple of the stage's


@dataclass(frozen=True)
class Options:
    regime: Text() = "few_300"  # see REGIMES; few_<n>: CFT on n responses of the teacher
    seeds: Text() = "0,1,2"     # numbers with commas
    only: Text() = ""           # names of students with commas: these, and the claims among them
    into: Text() = ""           # a file of claims: these take the place of its older ones


@dataclass(frozen=True)
class Student:
    """One run of a stage script: which stage, after which student ("": the AR teacher), options;
    whose weights teach it ("": the AR teacher's); options of opd_variants.py."""
    stage: str
    after: str
    options: dict
    teacher: str = ""
    variant: dict = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A student that should be better than its controls, all of equal cost; where only so many
    forwards are allowed, if `most` says so."""
    student: str
    controls: tuple
    most: float = np.inf


# --- The regimes ------------------------------------------------------------------------------

def cft(after="", **options):
    return Student("cft", after, options)


def opd(after, **options):
    return Student("opd", after, options)


def rl(after, **options):
    return Student("rl", after, options)


def ar(block_size):
    """The AR teacher: decoded as such at block size 1, else the naive conversion."""
    return Student("ar", "", dict(block_size=block_size))


def from_text(after="", **options):
    """A model trained as the teacher is, in a folder of its own."""
    return Student("ar", after, dict(block_size=1, **options))


def few(cfg, n):
    """CFT on n responses of the teacher; then OPD on fresh prompts; then RL: presets *_few.

    Controls of OPD, all of its FLOPs: CFT for longer; OPD on the prompts of the responses; CFT with
    as many further responses as the teacher could write in its forwards for OPD, one a prompt. As
    longer is worse where responses are learned by heart, that one also for as many epochs as CFT
    takes. "CFT as many prompts" has a response for each prompt of OPD: a bound, not a control, as
    it takes the teacher many times as many forwards. Control of RL: OPD for as long."""
    prompts = cfg.opd_steps * cfg.batch_size
    more = int(MORE_CFT * cfg.opd_steps)
    longer = cfg.cft_steps + more
    written = n + prompts // FORWARDS[cfg.world.split("_")[0]]
    on_n = dict(cft_prompts=n)
    students = {
        "AR": ar(1),
        "CFT": cft(**on_n),
        "OPD": opd("CFT", **on_n),
        "more CFT": cft("CFT", **on_n, cft_steps=more),
        "more CFT misplaced": cft("CFT", **on_n, cft_steps=more, cft_misplace=0.31),
        "OPD same prompts": opd("CFT", **on_n, opd_prompts=n),
        "CFT as many forwards": cft(cft_prompts=written,
                                    cft_steps=min(longer, cfg.cft_steps * written // n)),
        "CFT as many forwards longer": cft(cft_prompts=written, cft_steps=longer),
        "CFT as many prompts": cft(cft_prompts=n + prompts, cft_steps=longer),
        "RL": rl("OPD", **on_n),
        "more OPD": opd("OPD", **on_n, opd_steps=int(MORE_OPD * cfg.rl_steps))}
    claims = [
        Claim("OPD", ("CFT", "more CFT", "more CFT misplaced", "OPD same prompts",
                      "CFT as many forwards", "CFT as many forwards longer",
                      "CFT as many prompts")),
        Claim("RL", ("OPD", "more OPD"))]
    return students, claims


def paper(cfg):
    """The paper's recipe as written: run it with a preset *_paper. The teacher is SFT, then RL."""
    taught = dict(teacher="AR then RL")
    students = {
        "AR": ar(1),
        "AR then RL": rl("AR", block_size=1),
        "naive": ar(cfg.block_size),
        "CFT": Student("cft", "AR then RL", {}, **taught),
        "OPD": Student("opd", "CFT", {}, **taught),
        "more CFT": Student("cft", "CFT", dict(cft_steps=3 * cfg.opd_steps, cft_lr=cfg.opd_lr),
                            **taught),
        "RL": Student("rl", "OPD", {}, **taught)}
    return students, [Claim("OPD", ("CFT", "more CFT")), Claim("RL", ("OPD",))]


def wording(cfg):
    """Text of free wording: run it with --wording, and a --run_dir of its own.

    The teacher's greedy text is a function of the prompt again (sequence-level distillation)."""
    from_drawn = dict(opd_lr=1e-3, opd_anchor=0.0, opd_tau=cfg.tau, opd_steps=200)
    students = {
        "AR": ar(1),
        "CFT drawn text": cft(cft_steps=800),
        "CFT greedy text": cft(cft_steps=800, cft_gold=False, cft_prompts=10000)}
    for kind in ("forward", "jsd", "reverse"):
        students[f"OPD {kind}"] = opd("CFT drawn text", opd_divergence=kind, **from_drawn)
    students["more CFT"] = cft("CFT drawn text", cft_steps=int(200 * MORE_CFT))
    return students, [Claim(f"OPD {kind}", ("CFT drawn text", "more CFT"))
                      for kind in ("forward", "jsd", "reverse")]


def parallel(cfg):
    """Decoding more parallel than training: hardly more than a forward a block, by the paper's
    rule. Run it with --commit threshold.

    Marginals may be right and the answer wrong: slots that are drawn at once collide, whatever
    the text they learned from. Controls of RL, as long as it takes: CFT; OPD, whose roll-outs are
    as fast."""
    group = dict(rl_prompts=16, rl_group=16, rl_steps=100, rl_lr=3e-4, rl_anchor=0.0, rl_tau=0.2)
    corrected = dict(opd_anchor=0.0, opd_lr=5e-4, opd_steps=PARALLEL_OPD)
    students = {
        "AR": ar(1),
        "CFT": cft(),
        "RL": rl("CFT", **group),
        "more CFT": cft("CFT", cft_steps=PARALLEL_CFT),
        "OPD": opd("CFT", **corrected, opd_tau=0.2),
        # Slow roll-outs: their later states know what the fast decoder does not.
        "own later states": Student("opd", "CFT", dict(**corrected, opd_tau=0.9),
                                    variant=dict(target="later"))}
    return students, [Claim("RL", ("CFT", "more CFT", "OPD"), MOST),
                      Claim("OPD", ("CFT", "more CFT"), MOST),
                      Claim("own later states", ("CFT", "more CFT", "OPD"), MOST)]


def expert(cfg):
    """A teacher that has learned from an expert who errs, and RL on what the users took. Run it
    with --world toy_expert or beauty_expert.

    Control of RL, of its FLOPs: the expert's text for longer. "AR targets" is a bound, no control:
    it is told for every training list what the user took. CFT converts teachers on their own
    responses: does the gain survive?"""
    group = dict(rl_prompts=16, rl_group=16, rl_steps=100, rl_lr=3e-4, rl_anchor=0.0)
    own = dict(cft_gold=False, cft_prompts=3000)
    students = {
        "AR": ar(1),
        "RL": rl("AR", block_size=1, **group),
        "more AR": from_text("AR", ar_steps=MORE_AR * group["rl_steps"], ar_lr=1e-3),
        "AR targets": from_text(world=cfg.world.replace("expert", "target")),
        "CFT of AR": cft(**own),
        "CFT of RL": Student("cft", "RL", own, teacher="RL")}
    return students, [Claim("RL", ("AR", "more AR", "AR targets")),
                      Claim("CFT of RL", ("CFT of AR",))]


REGIMES = {"paper": paper, "wording": wording, "parallel": parallel, "expert": expert}


# --- Training and decoding --------------------------------------------------------------------

def is_teacher(student):
    """Whether it is the run's own teacher, decoded in some way."""
    return student.stage == "ar" and not student.after and list(student.options) == ["block_size"]


def settings(cfg, regime, students, name):
    """The settings of a student, all of them: a Config."""
    student = students[name]
    if is_teacher(student):
        return dataclasses.replace(cfg, **student.options)

    def checkpoint(name):
        own = settings(cfg, regime, students, name)
        return checkpoint_path(own, students[name].stage)

    place = "".join(c if c.isalnum() else "_" for c in name)
    return dataclasses.replace(
        cfg, **student.options,
        init=checkpoint(student.after) if student.after else "",
        teacher="" if student.stage == "ar" else checkpoint(student.teacher or "AR"),
        run_dir=folder(cfg, "regimes", regime, place))


def trained(cfg, regime, students, name):
    """Trains a student, after those before it, unless it has finished -> its settings."""
    student = students[name]
    for other in (student.after, student.teacher):
        if other:
            trained(cfg, regime, students, other)
    own = settings(cfg, regime, students, name)
    finished = os.path.exists(points_path(own, student))
    if is_teacher(student):
        path = checkpoint_path(own, "ar")
        finished = finished or os.path.exists(path) and load_tensors(path)["finished"]
    if not finished:
        share_world(cfg, own)
        changed = {"config": cfg.config, "seed": cfg.seed, **overrides(own), "init": own.init,
                   "teacher": own.teacher, "run_dir": own.run_dir}
        script = "experiments/opd_variants.py" if student.variant else f"train_{student.stage}.py"
        train(script, changed | student.variant)
    return own


def share_world(cfg, own):
    """Gives a run the prepared World of another folder (Beauty): it takes a minute to prepare."""
    there, here = folder(cfg, "world.pt"), folder(own, "world.pt")
    if os.path.exists(there) and not os.path.exists(here):
        os.makedirs(os.path.dirname(here), exist_ok=True)
        shutil.copy(there, here)


def points_path(cfg, student):
    where = os.path.dirname(checkpoint_path(cfg, student.stage))
    return os.path.join(where, f"points_{cfg.block_size}_{cfg.commit}.pt")


def decoded_at(cfg, world, split, model, tau):
    """Scores of a split at a threshold: (len(MEASURED), N)."""
    def decoder(prompt, rows):
        decoded = decode(cfg, model, prompt, world.max_response, tau)
        return decoded.tokens, decoded.forwards

    tokens, forwards = decode_split(cfg, split, decoder, f"tau {tau}")
    scores = score(world, split, tokens, forwards)
    scores["one wording"] = np.ones(len(tokens))
    if cfg.wording != "fixed":  # a response with nothing to mix has kept to one wording
        scores["one wording"] = np.nan_to_num(consistency(world, tokens, cfg.wording), nan=1.0)
    return np.stack([scores[name] for name in MEASURED])


def points(cfg, world, student, taus=TAUS):
    """What a finished student reaches: {"val", "test": (taus, len(MEASURED), N)}."""
    path = points_path(cfg, student)
    found = load_tensors(path) if os.path.exists(path) else {}
    missing = [tau for tau in taus if f"test {tau}" not in found]
    if missing:
        model, _ = load_stage(cfg, student.stage, world)
    for tau in missing:
        for name in ("val", "test"):
            same = found.get(f"{name} {taus[0]}") if cfg.block_size == 1 else None
            if same is None:  # at block size 1 all thresholds are the same
                scores = decoded_at(cfg, world, getattr(world, name), model, tau)
                same = torch.from_numpy(scores)
            found[f"{name} {tau}"] = same
    if missing:
        save_tensors(path, found)
    return {name: np.stack([found[f"{name} {tau}"].numpy() for tau in taus])
            for name in ("val", "test")}


# --- Claims -----------------------------------------------------------------------------------

def means(curve, name):
    """Mean over seeds and users of a score at each threshold: curve (seeds, taus, scores, N)."""
    return curve[:, :, MEASURED.index(name)].mean((0, 2))


def best(curve, most=np.inf):
    """The threshold (its number) with the best N@10 on validation users, of those with at most
    so many forwards; the fastest if none has."""
    forwards = means(curve["val"], "forwards")
    ndcg = np.where(forwards <= most, means(curve["val"], "strict ndcg@10"), -1.0)
    return int(ndcg.argmax()) if (ndcg >= 0).any() else int(forwards.argmin())


def as_good(curve, goal):
    """The fastest threshold whose N@10 on validation users reaches a goal, or None."""
    forwards = means(curve["val"], "forwards")
    reached = means(curve["val"], "strict ndcg@10") >= goal
    return int(np.where(reached, forwards, np.inf).argmin()) if reached.any() else None


def difference(ours, i, other, j, name):
    """[low, mean, high] of a score on the test users, at threshold i less the other's at j."""
    row = MEASURED.index(name)
    return paired_interval(ours["test"][:, i, row] - other["test"][:, j, row])[0]


def points_compared(ours, other, most=np.inf):
    """{metric: (threshold of the stage, of the control, score)}, chosen on validation users."""
    best_ours, best_other = best(ours, most), best(other, most)
    within = best(other, MORE * means(ours["val"], "forwards")[best_ours])
    found = {
        "ndcg@10 strict": (best_ours, within, "strict ndcg@10"),
        "valid": (best_ours, within, "valid")}
    fast = as_good(ours, means(other["val"], "strict ndcg@10")[best_other])
    if fast is not None:
        found["forwards at equal quality"] = (fast, best_other, "forwards")
    return found


def at(curve, number):
    """The scores of a student at a threshold, means over seeds and test users."""
    scores = {name: round(float(means(curve["test"], name)[number]), 4) for name in MEASURED}
    return {"tau": curve["taus"][number], **scores}


def regime_name(cfg, options):
    """"few_300", or "wording_token": what the regime's text is like is part of its name."""
    return options.regime + ("" if cfg.wording == "fixed" else f"_{cfg.wording}")


def claims_of(cfg, options, claim, curves):
    """The claims of one student, a control and metric each, as results/regimes.json has them."""
    ours, out = curves[claim.student], []
    for name in claim.controls:
        if name not in curves:  # see --only
            continue
        other = curves[name]
        for metric, (i, j, score_name) in points_compared(ours, other, claim.most).items():
            stage_at = at(ours, i)
            out.append({
                "regime": regime_name(cfg, options), "config": cfg.config, "stage": claim.student,
                "control": name, "metric": metric, "forwards": stage_at["forwards"],
                "seeds": len(ours["test"]), "users": ours["test"].shape[-1],
                "difference": difference(ours, i, other, j, score_name),
                "stage_at": stage_at, "control_at": at(other, j),
                "command": command(options, cfg)})
    return out


def command(options, cfg):
    """What to type, with the project's own paths."""
    elsewhere = ("data_dir", "threads")
    changed = {name: value for name, value in overrides(cfg).items() if name not in elsewhere}
    words = ["python", "experiments/regimes.py", "--config", cfg.config, *arguments(changed),
             "--regime", options.regime, "--seeds", options.seeds]
    if options.only:
        words += ["--only", options.only]
    if cfg.teacher:  # runs/small/seed0/ar/checkpoint.pt
        words += ["--teacher", os.path.join("runs", *cfg.teacher.split(os.sep)[-4:])]
    return shlex.join(words)


def table(curves):
    """All curves, means over seeds of the test users, as Markdown."""
    taus = next(iter(curves.values()))["taus"]
    lines = ["| student | " + " | ".join(f"τ = {tau}" for tau in taus) + " |",
             "|---" * (1 + len(taus)) + "|"]
    for name, curve in curves.items():
        shown = zip(*(means(curve["test"], score)
                      for score in ("forwards", "valid", "strict ndcg@10")))
        cells = [f"{f:.1f}: {100 * v:.1f} %, {ndcg:.3f}" for f, v, ndcg in shown]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def merge(path, found):
    """Puts claims in a file in the place of those of the same regimes and presets."""
    kept = []
    if os.path.exists(path):
        with open(path) as file:
            kept = json.load(file)
    new = {(claim["regime"], claim["config"]) for claim in found}
    kept = [claim for claim in kept if (claim["regime"], claim["config"]) not in new]
    write_json(path, kept + found)


# --- The run ----------------------------------------------------------------------------------

def regime_of(cfg, name):
    """The students and claims of a regime. Raises UserError if there is none of this name."""
    kind, _, n = name.partition("_")
    if kind == "few" and n.isdigit() and int(n):
        return few(cfg, int(n))
    if name in REGIMES:
        return REGIMES[name](cfg)
    raise UserError(f"--regime: there is no {name}; there are few_<n>, {', '.join(REGIMES)}")


def main(cfg, options):
    students, claims = regime_of(cfg, options.regime)
    chosen = [name.strip() for name in options.only.split(",")] if options.only else list(students)
    unknown = [name for name in chosen if name not in students]
    if unknown:
        raise UserError(f"--only: no student is called {', '.join(unknown)}; there are: "
                        f"{', '.join(students)}")
    seeds = finished_seeds(cfg, options.seeds)
    world = load_world(cfg)
    taus = FINER if options.regime == "parallel" else TAUS
    curves = {}
    for seed in seeds:
        of_seed = dataclasses.replace(cfg, seed=seed)
        for name in chosen:
            own = trained(of_seed, options.regime, students, name)
            curves.setdefault(name, []).append(points(own, world, students[name], taus))
            print(f"seed {seed}, {name}: done", flush=True)
    curves = {name: {"taus": taus} | {split: np.stack([curve[split] for curve in of_name])
                                      for split in ("val", "test")}
              for name, of_name in curves.items()}
    found = [line for claim in claims if claim.student in curves
             for line in claims_of(cfg, options, claim, curves)]
    name = f"{regime_name(cfg, options)}_{cfg.commit}"
    write_json(folder(cfg, f"regime_{name}.json"), found)
    write_text(folder(cfg, f"regime_{name}.md"), table(curves))
    if options.into:
        merge(options.into, found)
    for line in found:
        print(line["stage"], "-", line["control"], line["metric"], line["difference"])
    print(table(curves))


if __name__ == "__main__":
    script(main, __doc__, also=Options)
