"""What experiments/compare.py can compare: entries of a few lines each.

An entry names students and says which of them should be better than which control. A student is

    student("opd", "CFT", opd_exclude=False)

the stages that it trains ("": none, it is only decoded in another way), the student that it goes
on from, and the settings in which it differs from that one; "+500" is 500 more than there. What
an entry does not name is as in its preset.

A control costs what the student costs. The comments say in which currency, and every comparison
has the measured minutes of training in its table.
"""
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Student:
    stages: tuple   # to train, in this order
    start: str      # name of the student that it goes on from; "": it trains a teacher of its own
    settings: dict  # in which it differs from that one
    script: str     # that trains it, if it is not the stage's own


@dataclass(frozen=True)
class Entry:
    question: str
    students: dict    # name -> Student; each comes after the one that it goes on from
    claims: tuple     # (student, control): is the student better?
    config: str = "toy"                           # preset
    settings: dict = field(default_factory=dict)  # of all students, where they differ from it
    taus: tuple = (0.3, 0.5, 0.7, 0.9)            # of the curve
    forwards: float | None = None  # that a response may take on average: tau is then the best on
    #   the validation users of those that keep to it. None: tau is that of the settings


def student(stages, start="", script="", **settings):
    return Student(tuple(stages.split()), start, settings, script)


def against(control, *students):
    """The claims that each of the students is better than one control."""
    return tuple((name, control) for name in students)


NOTHING = dict(cft_first_steps=0.0, cft_misplace=0.0, cft_ar_weight=0.0, commit="threshold")

# What each of our parts of CFT is worth: taken from all of them, and added to none. Equal cost: as
# many steps.
PARTS = {
    "AR": student("ar"),
    "CFT": student("cft", "AR"),
    "no first steps": student("cft", "AR", cft_first_steps=0.0),
    "no misplaced labels": student("cft", "AR", cft_misplace=0.0),
    "no AR loss": student("cft", "AR", cft_ar_weight=0.0),
    "threshold rule": student("", "CFT", commit="threshold"),
    "nothing of ours": student("cft", "AR", **NOTHING),
    "first steps alone": student("cft", "AR", **{**NOTHING, "cft_first_steps": 0.3}),
    "misplaced labels alone": student("cft", "AR", **{**NOTHING, "cft_misplace": 0.2}),
    "AR loss alone": student("cft", "AR", **{**NOTHING, "cft_ar_weight": 1.0}),
    "apart alone": student("", "nothing of ours", commit="apart"),
    "own AR": student("", "CFT", block_size=1),
    "own AR without AR loss": student("", "no AR loss", block_size=1)}
WORTH = (("CFT", "no first steps"), ("CFT", "no misplaced labels"), ("CFT", "no AR loss"),
         ("CFT", "threshold rule"), ("own AR", "own AR without AR loss"),
         *against("nothing of ours", "CFT", "first steps alone", "misplaced labels alone",
                  "AR loss alone", "apart alone"))

# The paper's recipe, whose teacher is trained by AR, then by RL. Our commit rule costs nothing.
PAPER = {
    "AR": student("ar"),
    "GR2": student("rl", "AR", block_size=1),
    "CFT": student("cft", "GR2", block_size=32),
    "more CFT": student("cft", "GR2", block_size=32, cft_steps="+800"),
    "CFT apart": student("", "CFT", commit="apart"),
    "OPD": student("opd", "CFT"),
    "RL": student("rl", "OPD")}
PAPER_CLAIMS = (("GR2", "AR"), ("CFT", "GR2"),
                ("OPD", "CFT"), ("OPD", "more CFT"), ("OPD", "CFT apart"),
                ("RL", "OPD"), ("RL", "CFT apart"))
PAPER_TAUS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)

# CFT in the sampler's states. A step has one more forward than one of CFT.
PUMA = "experiments/puma.py"

# Rounds of RL with 1,600 lists in all; supervised training on as many lists with their targets; CFT
# on the teacher's own responses.
ROUNDS = dict(rl_steps=100, rl_lr=3e-4, rl_prompts=16, rl_group=16)
TOLD = dict(world="toy_target", cft_prompts=1600)
OWN_TEXT = dict(cft_gold=False, cft_prompts=3000)

ENTRIES = {
    # Three forwards are the least.
    "cft": Entry(
        "What is each of our parts of CFT worth, after half of the preset's steps?",
        settings=dict(cft_steps=1000),
        students={**PARTS, "AR weight 3": student("cft", "AR", cft_ar_weight=3.0)},
        claims=(*WORTH, ("CFT", "AR weight 3")),
        forwards=5.0),
    "cft_beauty": Entry(
        "What is each of our parts of CFT worth on Amazon Beauty, after a third of the steps?",
        config="small",
        settings=dict(cft_steps=1200, n_val=1000),
        students=PARTS,
        claims=WORTH,
        taus=(0.2, 0.3, 0.5),
        forwards=3.3),

    # A hundred steps of OPD, with four roll-outs a prompt, take about as long as 800 steps of CFT.
    # On Beauty 50 of them take somewhat longer than 400. There RL's 30 rounds take 1.6 times as
    # long as the 50 steps of OPD; more OPD has 90 steps more.
    "paper": Entry(
        "The paper's recipe as it is written: what does each stage add?",
        config="toy_paper",
        students={**PAPER,
                  "PUMA": student("cft", "GR2", PUMA, block_size=32, cft_steps="+800")},
        claims=(*PAPER_CLAIMS, ("PUMA", "GR2"), ("PUMA", "more CFT"),
                ("OPD", "PUMA"), ("RL", "PUMA")),
        taus=PAPER_TAUS,
        forwards=8.5),
    "paper_beauty": Entry(
        "The paper's recipe on Amazon Beauty, with fewer steps of CFT: what does each stage add?",
        config="small_paper",
        settings=dict(cft_steps=1000, n_val=500),
        students={**PAPER, "more CFT": student("cft", "GR2", block_size=32, cft_steps="+400"),
                  "more OPD": student("opd", "CFT", opd_steps="+90")},
        claims=(*PAPER_CLAIMS, ("RL", "more OPD")),
        taus=PAPER_TAUS,
        forwards=13.0),

    # A step of OPD takes the FLOPs of 1.5 steps of CFT. In its 400 steps the teacher reads 12,800
    # roll-outs, each in one forward. In so many forwards it could have written 278 responses of 46
    # tokens: the control that learns from 578. It comes with as many epochs as CFT, and with as
    # many steps as more CFT. RL's 30 roll-outs take the time of about 260 steps of OPD; its
    # control has 300 more.
    "few_300": Entry(
        "The teacher has written 300 responses: does OPD pay, and then RL?",
        config="toy_few",
        students={
            "AR": student("ar"),
            "CFT": student("cft", "AR"),
            "OPD": student("opd", "CFT"),
            "OPD same prompts": student("opd", "CFT", opd_prompts=300),
            "more CFT": student("cft", "AR", cft_steps="+600"),
            "PUMA": student("cft", "AR", PUMA, cft_steps="+600"),
            "CFT as many forwards": student("cft", "AR", cft_prompts=578, cft_steps=385),
            "CFT as many forwards longer": student("cft", "AR", cft_prompts=578,
                                                   cft_steps="+600"),
            "RL": student("rl", "OPD"),
            "more OPD": student("opd", "CFT", opd_steps="+300")},
        claims=(("PUMA", "more CFT"), ("OPD", "CFT"), ("OPD", "more CFT"), ("OPD", "PUMA"),
                ("OPD", "OPD same prompts"), ("OPD", "CFT as many forwards"),
                ("OPD", "CFT as many forwards longer"), ("RL", "OPD"), ("RL", "more OPD")),
        taus=(0.3, 0.5, 0.7, 0.8, 0.9),
        forwards=7.0),

    # As many steps each. There is no control of more CFT, since OPD is not better than CFT.
    "opd": Entry(
        "After CFT on all text: which divergence, and do our parts of OPD pay?",
        settings=dict(opd_steps=200, opd_lr=2e-4),
        students={
            "AR": student("ar"),
            "CFT": student("cft", "AR"),
            "JSD": student("opd", "CFT"),
            "forward KL": student("opd", "CFT", opd_divergence="forward"),
            "reverse KL": student("opd", "CFT", opd_divergence="reverse"),
            "nothing excluded": student("opd", "CFT", opd_exclude=False)},
        claims=(("JSD", "CFT"),
                *against("JSD", "forward KL", "reverse KL", "nothing excluded")),
        forwards=4.0),

    # RL of the teacher, token by token, and of the student, in blocks. It draws 256 responses in
    # each round. Controls of the teacher: 5 more steps for each round, which are as many FLOPs, and
    # supervised training that is told what the users of 1,600 lists took (CFT with blocks of one
    # token is AR training). "AR told" is a bound and no control: it is told for all lists. The
    # supervised steps and rate are the best of six on the validation users of seed 0, RL's rate is
    # the best of three. On those of seed 1 the steps and the rate of "CFT told 1600" are the best
    # of four. With roll-outs at tau .9 RL in blocks does no better there at a higher rate, nor at
    # tau .5.
    "expert": Entry(
        "The text ranks as an expert who errs: does RL learn what the users took instead?",
        settings=dict(world="toy_expert"),
        students={
            "AR": student("ar"),
            "more AR": student("ar", ar_steps="+500"),
            "AR told": student("ar", world="toy_target"),
            "AR told 1600": student("cft", "AR", **TOLD, **NOTHING, block_size=1, cft_steps=500,
                                    cft_lr=5e-4),
            "RL": student("rl", "AR", block_size=1, **ROUNDS),
            "CFT of AR": student("cft", "AR", **OWN_TEXT),
            "CFT of RL": student("cft", "RL", **OWN_TEXT, block_size=19),
            "RL in blocks": student("rl", "CFT of AR", **ROUNDS, rl_tau=1.0),
            "RL in blocks at .9": student("rl", "CFT of AR", **ROUNDS),
            "CFT told 1600": student("cft", "AR", **TOLD)},
        claims=(("RL", "AR"), ("AR told 1600", "AR"),
                ("RL", "more AR"), ("RL", "AR told 1600"), ("RL", "AR told"),
                *against("CFT of AR", "CFT of RL", "RL in blocks", "RL in blocks at .9"),
                ("RL in blocks", "RL in blocks at .9"), ("RL in blocks", "CFT told 1600"))),

    # All runs of RL cost the same; 40 roll-outs of 64 answers take more time than 250 steps of CFT.
    "hacking": Entry(
        "A format bonus that is always paid: does it teach a weak student to copy the list?",
        settings=dict(rl_steps=40),
        students={
            "AR": student("ar"),
            "weak": student("cft", "AR", cft_steps=150, warmup=10),
            "more CFT": student("cft", "AR", cft_steps=400, warmup=10),
            "if it rose": student("rl", "weak"),
            "always": student("rl", "weak", rl_conditional=False),
            "if it rose, large": student("rl", "weak", rl_alpha=0.5),
            "always, large": student("rl", "weak", rl_alpha=0.5, rl_conditional=False)},
        claims=(("always", "if it rose"), ("always, large", "if it rose, large"),
                ("if it rose", "more CFT"), ("always", "more CFT"))),

    # As many steps each, but for OPD: its 200 take the FLOPs of 300 of CFT. The teacher's greedy
    # text is a function of the prompt again.
    "wording": Entry(
        "How much chance in the wording does a student bear that draws slots apart?",
        students={
            "AR fixed": student("ar"),
            "fixed": student("cft", "AR fixed"),
            "AR token": student("ar", wording="token"),
            "token": student("cft", "AR token"),
            "AR statement": student("ar", wording="statement"),
            "statement": student("cft", "AR statement"),
            "greedy text": student("cft", "AR statement", cft_gold=False, cft_prompts=10000),
            "more CFT": student("cft", "AR statement", cft_steps="+300"),
            "OPD": student("opd", "statement", opd_steps=200, opd_lr=2e-4,
                           opd_divergence="reverse"),
            "AR trace": student("ar", wording="trace"),
            "trace": student("cft", "AR trace")},
        claims=(*against("fixed", "token", "statement", "trace"),
                *against("more CFT", "greedy text", "OPD")),
        forwards=8.0)}
