"""What experiments/compare.py can compare: entries of a few lines each.

An entry names students and says which of them should be better than which control. A student is

    student("opd", "CFT", opd_anchor=0.0)

the stages that it trains ("": none, it is only decoded in another way), the student that it goes
on from ("": none), and the settings in which it differs from that one. A teacher is a student
that trains "ar". Settings that an entry does not name are those of its preset.

A control has to cost what the student costs. The comments say in which currency. The measured
seconds of training are in the table of every comparison.
"""
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Student:
    stages: tuple   # to train, in this order
    start: str      # name of the student that it goes on from, or ""
    settings: dict  # in which it differs from that one, or from the entry


@dataclass(frozen=True)
class Entry:
    question: str
    students: dict      # name -> Student; each comes after the one that it goes on from
    claims: tuple       # (student, control): is the student better?
    config: str = "toy"                             # preset
    settings: dict = field(default_factory=dict)    # of all students, where they differ from it
    taus: tuple = (0.3, 0.5, 0.7, 0.9)              # the curve
    forwards: float | None = None  # how many a response may take on average. tau is the best of
    #   those that keep to it, on validation users; None: tau is that of the settings


def student(stages, start="", **settings):
    return Student(tuple(stages.split()), start, settings)


def against(control, *students):
    """The claims that each of the students is better than one control."""
    return tuple((name, control) for name in students)


# --- What each part of CFT is worth -------------------------------------------------------------
# Equal cost: as many steps, and as many forwards at decoding.

CFT = Entry(
    "What is each of our parts of CFT worth, and what does a free trace cost?",
    students={
        "AR": student("ar"),
        "CFT": student("cft", "AR"),
        "no first steps": student("cft", "AR", cft_first_steps=0.0),
        "threshold rule": student("", "CFT", commit="threshold"),
        "AR weight 0": student("cft", "AR", cft_ar_weight=0.0),
        "AR weight 0.3": student("cft", "AR", cft_ar_weight=0.3),
        "AR weight 3": student("cft", "AR", cft_ar_weight=3.0),
        "nothing of ours": student(
            "cft", "AR", cft_first_steps=0.0, cft_ar_weight=0.0, commit="threshold"),
        "free trace": student("ar cft", trace="free"),
    },
    claims=against("CFT", "no first steps", "threshold rule", "AR weight 0", "AR weight 0.3",
                   "AR weight 3", "nothing of ours", "free trace"),
    forwards=4.0)

CFT_BEAUTY = Entry(
    "What is each of our parts of CFT worth on Amazon Beauty?",
    config="small",
    students={
        "AR": student("ar"),
        "CFT": student("cft", "AR"),
        "no first steps": student("cft", "AR", cft_first_steps=0.0),
        "threshold rule": student("", "CFT", commit="threshold"),
        "AR weight 0": student("cft", "AR", cft_ar_weight=0.0),
        "nothing of ours": student(
            "cft", "AR", cft_first_steps=0.0, cft_ar_weight=0.0, commit="threshold"),
    },
    claims=against("CFT", "no first steps", "threshold rule", "AR weight 0", "nothing of ours"),
    taus=(0.2, 0.3, 0.5, 0.7),
    forwards=3.3)


# --- OPD ------------------------------------------------------------------------------------------
# A step of OPD without an anchor takes the FLOPs of 1.5 steps of CFT (a roll-out, the teacher, the
# student), so CFT's control for 400 of them has 600 steps more. The teacher reads each roll-out in
# one forward. In the 12,800 forwards of 400 steps it could have written 278 responses more, of 46
# tokens each. So that control learns from 578; as more steps can be worse where responses are
# learned by heart, it also comes with as many epochs as CFT. RL: 30 roll-outs take the time of 300
# steps of OPD.

FEW_300 = Entry(
    "The teacher has written 300 responses: does OPD pay, and then RL?",
    config="toy_few",
    students={
        "AR": student("ar"),
        "CFT": student("cft", "AR"),
        "OPD": student("opd", "CFT"),
        "OPD, same prompts": student("opd", "CFT", opd_prompts=300),
        "more CFT": student("cft", "AR", cft_steps=800),
        "CFT, as many forwards": student("cft", "AR", cft_prompts=578, cft_steps=385),
        "CFT, as many forwards, longer": student("cft", "AR", cft_prompts=578, cft_steps=800),
        "RL": student("rl", "OPD"),
        "more OPD": student("opd", "CFT", opd_steps=700),
    },
    claims=(
        ("OPD", "CFT"), ("OPD", "OPD, same prompts"), ("OPD", "more CFT"),
        ("OPD", "CFT, as many forwards"), ("OPD", "CFT, as many forwards, longer"),
        ("RL", "OPD"), ("RL", "more OPD")),
    taus=(0.3, 0.5, 0.9),
    forwards=7.0)

# 200 steps with the anchor take the time of 500 steps of CFT (2.5 each: also a step of CFT), those
# without it of 300. The best opponent is CFT for as long as the dearest of them.
OPD = Entry(
    "After CFT on all text: which divergence, and do our parts of OPD pay?",
    settings=dict(opd_steps=200, opd_lr=2e-4),
    students={
        "AR": student("ar"),
        "CFT": student("cft", "AR"),
        "more CFT": student("cft", "AR", cft_steps=1500),
        "JSD": student("opd", "CFT"),
        "forward KL": student("opd", "CFT", opd_divergence="forward"),
        "reverse KL": student("opd", "CFT", opd_divergence="reverse"),
        "nothing excluded": student("opd", "CFT", opd_exclude=False),
        "no anchor": student("opd", "CFT", opd_anchor=0.0),
    },
    claims=(
        *against("more CFT", "JSD", "forward KL", "reverse KL", "nothing excluded", "no anchor"),
        *against("JSD", "forward KL", "reverse KL", "nothing excluded", "no anchor")),
    forwards=4.0)


# --- RL -------------------------------------------------------------------------------------------
# 100 roll-outs of 256 answers take the time of 500 steps of CFT, or of 350 of OPD without its
# anchor. Three blocks take three forwards at least.

PARALLEL = Entry(
    "Hardly more than a forward a block, by the paper's rule: does RL fit the slots together?",
    settings=dict(commit="threshold"),
    students={
        "AR": student("ar"),
        "CFT": student("cft", "AR"),
        "more CFT": student("cft", "AR", cft_steps=1500),
        "OPD": student("opd", "CFT", opd_steps=350, opd_lr=5e-4, opd_tau=0.2, opd_anchor=0.0),
        "RL": student("rl", "CFT", rl_steps=100, rl_lr=3e-4, rl_tau=0.2, rl_prompts=16,
                      rl_group=16),
    },
    claims=(("RL", "CFT"), ("RL", "more CFT"), ("RL", "OPD"),
            ("OPD", "CFT"), ("OPD", "more CFT")),
    taus=(0.2, 0.3, 0.5, 0.9),
    forwards=3.6)

# RL of the teacher itself, a token a forward. Its control learns the expert's text for as many
# FLOPs, 5 steps for each roll-out. "AR told" is a bound and no control: for each training list it
# is told what the user took. CFT converts both teachers on their own responses.
EXPERT = Entry(
    "The text ranks as an expert who errs: does RL learn what the users took instead?",
    settings=dict(world="toy_expert"),
    students={
        "AR": student("ar"),
        "more AR": student("ar", ar_steps=1300),
        "AR told": student("ar", world="toy_target"),
        "RL": student("rl", "AR", block_size=1, rl_steps=100, rl_lr=3e-4, rl_prompts=16,
                      rl_group=16),
        "CFT of AR": student("cft", "AR", cft_gold=False, cft_prompts=3000),
        "CFT of RL": student("cft", "RL", block_size=19, cft_gold=False, cft_prompts=3000),
    },
    claims=(("RL", "AR"), ("RL", "more AR"), ("RL", "AR told"), ("CFT of RL", "CFT of AR")))

# All four runs of RL cost the same. Their control is CFT for the time of 40 roll-outs of 64.
HACKING = Entry(
    "A format bonus that is always paid: does it teach a weak student to copy the list?",
    students={
        "AR": student("ar"),
        "weak": student("cft", "AR", cft_steps=150, warmup=10),
        "more CFT": student("cft", "AR", cft_steps=230, warmup=10),
        "if it rose": student("rl", "weak", rl_steps=40, rl_conditional=True),
        "always": student("rl", "weak", rl_steps=40, rl_conditional=False),
        "if it rose, large": student("rl", "weak", rl_steps=40, rl_conditional=True, rl_alpha=0.5),
        "always, large": student("rl", "weak", rl_steps=40, rl_conditional=False, rl_alpha=0.5),
    },
    claims=(("always", "if it rose"), ("always, large", "if it rose, large"),
            *against("more CFT", "if it rose", "always")))


# --- Text of free wording ---------------------------------------------------------------------------
# All have as many steps, but for OPD, whose 200 steps take the FLOPs of 300 of CFT. The teacher's
# greedy text is a function of the prompt again: what else than OPD makes text easy to convert?

WORDING = Entry(
    "How much chance in the wording of a trace does a student bear that draws slots apart?",
    students={
        "AR fixed": student("ar"),
        "fixed": student("cft", "AR fixed"),
        "AR token": student("ar", wording="token"),
        "token": student("cft", "AR token"),
        "AR statement": student("ar", wording="statement"),
        "statement": student("cft", "AR statement"),
        "statement, greedy text": student("cft", "AR statement", cft_gold=False,
                                          cft_prompts=10000),
        "statement, more CFT": student("cft", "AR statement", cft_steps=1300),
        "statement, OPD": student("opd", "statement", opd_steps=200, opd_lr=1e-3, opd_anchor=0.0,
                                  opd_divergence="reverse"),
        "AR trace": student("ar", wording="trace"),
        "trace": student("cft", "AR trace"),
    },
    claims=(
        *against("fixed", "token", "statement", "trace"),
        *against("statement, more CFT", "statement, greedy text", "statement, OPD")),
    forwards=8.0)


ENTRIES = {
    "cft": CFT,
    "cft_beauty": CFT_BEAUTY,
    "few_300": FEW_300,
    "opd": OPD,
    "parallel": PARALLEL,
    "expert": EXPERT,
    "hacking": HACKING,
    "wording": WORDING,
}
