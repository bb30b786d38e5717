"""Every setting of the recipe: its range, its value on the toy world, what it means; the presets.

    python train_cft.py --config toy --cft_lr 0.001 --from runs/toy/seed0 --run_dir runs/slower

A setting's annotation is the range that is allowed: Real(0, 1) a number from 0 to 1, OneOf(...) one
of these words (plumbing/settings.py). Settings marked "ours" belong to our additions to the paper.
The value in brackets switches an addition off; PAPER collects these values.
"""
import os
from dataclasses import dataclass

from plumbing.settings import OneOf, Real, Switch, Text, Whole

MANY = 10 ** 9  # a bound that only keeps slips of the keyboard out


@dataclass(frozen=True)
class Config:
    config: OneOf("toy", "toy_few", "toy_paper", "small", "small_few", "small_paper",
                  "full") = "toy"  # preset: see PRESETS
    seed: Whole(0, 2 ** 63 - 1) = 0  # training draws depend on (seed, stage, step, process) alone
    from_: Text() = ""           # --from: folder of another run, or of one of its stages, for the
    #   stages that this run does not have itself
    again: Switch() = False      # train a finished stage anew
    run_dir: Text() = "runs"     # results: <run_dir>/<config>/, weights: .../seed<seed>/<stage>/
    threads: Whole(1, 256) = 2   # CPU threads; bit-identical runs need the same number
    device: OneOf("auto", "cpu", "cuda") = "auto"  # auto: the GPU, if there is one

    # The world: what a prompt is made of. There are 2 K label words, so an answer can name one that
    # is not listed.
    world: OneOf("toy", "toy_expert", "toy_target",
                 "beauty", "beauty_expert", "beauty_target") = "toy"
    #   *_expert: the training text ranks as an expert who errs; *_target: the same, but the item
    #   that the user took comes first
    data_dir: Text() = "data/beauty"  # Amazon Beauty: sequences.txt and items.tsv
    n_candidates: Whole(2, 63) = 8    # K, the length of all lists but some in training
    vary_lists: Real(0, 1) = 0.4      # share of training lists with a length from K / 2 to K
    trace: OneOf("free", "bound") = "bound"  # ours [free]: the answer sees the trace alone; with
    #   free it sees the prompt as well
    answer_share: Real(0, 1) = 0.75   # with bound traces: share of the steps that train answers
    wording: OneOf("fixed", "token", "statement", "trace") = "fixed"  # ours [fixed]: synonyms in
    #   traces, drawn for each token, for each statement or for the whole trace
    n_train: Whole(1, 10 ** 7) = 40000  # training examples (on Beauty: at most)
    n_val: Whole(1, 10 ** 7) = 500      # validation users (on Beauty: at most)
    n_test: Whole(1, 10 ** 7) = 2000    # test users (on Beauty: at most)

    # The model, the same for teacher and student
    n_layer: Whole(1, 1000) = 4
    n_head: Whole(1, 1000) = 2   # few heads, so that each is wide enough to compare two items
    d_model: Whole(1, 100000) = 96

    # Training, the same for all stages
    batch_size: Whole(1, 10 ** 6) = 32
    grad_clip: Real(above=0) = 1.0    # longer gradients are shortened to this norm
    bfloat16: Switch() = True         # training forwards in bfloat16: any GPU, or a CPU that has it
    warmup: Whole(1, MANY) = 50       # steps of rising rate, at most a tenth of a stage
    answer_weight: Real(above=0) = 4.0  # loss weight of an answer token; a trace token has 1
    every: Whole(1, MANY) = 100       # save, and show the valid rate, after so many steps

    # AR: the teacher
    ar_steps: Whole(0, MANY) = 1500
    ar_lr: Real(0, 1) = 4e-3

    # The sampler: how students decode, chosen on validation users
    block_size: Whole(1, 1024) = 19  # B, tokens denoised in parallel; two blocks hold a trace
    tau: Real(above=0, high=1) = 0.3  # commit slots surer than this; can be changed after training
    commit: OneOf("apart", "threshold") = "apart"  # ours [threshold]: slots that want the same
    #   label are not committed together

    # CFT: conversion fine-tuning
    cft_steps: Whole(0, MANY) = 2000
    cft_lr: Real(0, 1) = 2e-3
    cft_gold: Switch() = True      # true (gold): train on the reference traces and answers; false:
    #   on the teacher's own responses
    cft_prompts: Whole(1, MANY) = 10 ** 6  # training prompts used, at most
    cft_first_steps: Real(0, 1) = 0.3  # ours [0]: share of blocks that are masked completely, as in
    #   the first step of decoding
    cft_misplace: Real(0, 1) = 0.2  # ours [0]: share of an answer's states with a shown label in
    #   a wrong place, among those that show a label and mask another
    cft_ar_weight: Real(0) = 1.0   # ours [0]: weight of the AR loss in the mix

    # OPD: on-policy distillation
    opd_steps: Whole(0, MANY) = 50
    opd_lr: Real(0, 1) = 5e-5
    opd_divergence: OneOf("forward", "reverse", "jsd") = "jsd"  # KL(T||S), KL(S||T), or the
    #   Jensen-Shannon divergence; T: teacher, S: student
    opd_prompts: Whole(1, MANY) = 10 ** 6  # training prompts that the student answers, at most
    opd_group: Whole(1, 10 ** 6) = 1  # roll-outs a prompt: one is greedy, several are drawn
    opd_tau: Real(above=0, high=1) = 0.7  # tau of the roll-outs, the responses written in training
    opd_exclude: Switch() = True   # ours [false]: labels that a state shows are removed from the
    #   teacher's distribution

    # RL: GRPO with DAPO's corrections
    rl_steps: Whole(0, MANY) = 30  # rounds: sample, reward, update
    rl_lr: Real(0, 1) = 3e-5
    rl_prompts: Whole(1, 10 ** 6) = 8  # prompts of a round
    rl_group: Whole(2, 10 ** 6) = 8  # samples a prompt; an advantage compares two or more
    rl_epochs: Whole(1, MANY) = 2  # updates of a round; with one the clip never acts
    rl_tau: Real(above=0, high=1) = 0.9  # tau of the roll-outs
    rl_eps_low: Real(0, 1) = 0.2   # ratios are clipped to 1 - eps_low ...
    rl_eps_high: Real(0) = 0.28    # ... and 1 + eps_high
    rl_alpha: Real(0) = 0.1        # format reward
    rl_conditional: Switch() = True  # format reward only if the target rose, or stayed first

    @property
    def n_labels(self):
        return 2 * self.n_candidates

    @property
    def min_list(self):
        """The shortest training list."""
        return self.n_candidates // 2


BEAUTY = dict(
    world="beauty",
    n_candidates=10,
    n_train=131413,  # every prefix of a training sequence
    n_val=2500,
    n_test=10 ** 6)

SMALL = dict(
    **BEAUTY,
    d_model=128,
    warmup=100,
    answer_share=0.6,
    block_size=64,  # a whole trace, with its [EOS]
    ar_steps=4000,
    cft_steps=3500)
# The teacher has written only 300 responses, so CFT has little text to learn from.
FEW = dict(
    trace="free",
    block_size=16,
    cft_gold=False,
    cft_prompts=300,
    cft_steps=200,
    cft_lr=1e-3,
    opd_steps=400,
    opd_lr=1e-3,
    opd_divergence="forward",
    opd_tau=0.5)
PAPER = dict(  # our additions, switched off
    trace="free",
    wording="fixed",
    commit="threshold",
    cft_first_steps=0.0,
    cft_misplace=0.0,
    cft_ar_weight=0.0,
    opd_exclude=False)
# The paper's recipe as it is written, at our size. (Its teacher is trained by AR, then by RL: see
# `make paper`.)
RECIPE = dict(
    **PAPER,
    block_size=32,
    tau=0.9,
    opd_divergence="forward",
    opd_group=4,
    opd_tau=0.9,
    rl_eps_high=0.2,
    rl_alpha=0.2)

PRESETS = {
    # Synthetic users, 2 CPU cores: the values above.
    "toy": {},
    "toy_few": {**FEW, "ar_steps": 1000},
    "toy_paper": {**RECIPE, "ar_steps": 1000, "opd_steps": 100},
    # Amazon Beauty on a laptop.
    "small": SMALL,
    "small_few": {**SMALL, **FEW, "ar_steps": 4000, "opd_steps": 100, "rl_steps": 20},
    "small_paper": {**SMALL, **RECIPE},
    # Amazon Beauty on a GPU.
    "full": dict(
        **BEAUTY,
        n_layer=8,
        n_head=8,
        d_model=512,
        batch_size=128,
        block_size=64,
        tau=0.2,
        answer_share=0.67,
        ar_steps=2500,
        ar_lr=1e-3,
        cft_steps=1500,
        cft_lr=1e-3,
        opd_steps=40,
        rl_steps=30,
        rl_prompts=16),
}

STAGES = ("ar", "cft", "opd", "rl")  # each starts from the latest one before it that has finished


def folder(cfg, *parts):
    return os.path.join(cfg.run_dir, cfg.config, *parts)
