"""Every setting of the recipe: its range, its value on the toy world, what it means; the presets.

    python train_cft.py --config small --cft_lr 0.0005 --seed 1

Settings marked "ours" belong to what the paper does not have (the folder ours/). At the values in
brackets, which PAPER collects, they are off, and the paper's recipe is left.
"""
import dataclasses
import os
import sys
from dataclasses import dataclass

import torch

from plumbing.settings import OneOf, Real, Switch, Text, UserError, Whole, make, parse

MANY = 10 ** 9  # a bound that only keeps slips of the keyboard out


@dataclass(frozen=True)
class Config:
    config: OneOf("toy", "small", "full") = "toy"  # preset: see PRESETS
    seed: Whole(0, 2 ** 63 - 1) = 0  # every draw of a step depends on (seed, stage, step) alone
    teacher: Text() = ""         # checkpoint of an AR teacher, instead of this run's own
    init: Text() = ""            # checkpoint to start from, instead of the stage before
    run_dir: Text() = "runs"     # results: <run_dir>/<config>/, weights: .../seed<seed>/<stage>/
    threads: Whole(1, 256) = 2   # CPU threads; bit-identical runs need the same number
    device: OneOf("auto", "cpu", "cuda") = "auto"  # auto: the GPU, if there is one
    fast: Switch() = True        # the quick twins of fast/, tested equal; false: the plain code

    # The world: what a prompt is made of. Label words: 2 n_candidates, so answers can be wrong.
    world: OneOf("toy", "toy_random_labels", "beauty", "beauty_hybrid") = "toy"
    #   toy: label L3 is the third of the list; toy_random_labels: labels are dealt out at random
    #   beauty_hybrid: the pre-ranker also scores brand and category
    data_dir: Text() = "data/beauty"  # Amazon Beauty: sequences.txt and items.tsv
    n_candidates: Whole(2, 63) = 8    # K, the length of all lists but some in training
    vary_lists: Real(0, 1) = 0.4      # share of training lists with a length from K / 2 to K
    trace: Switch() = True            # false: answers without reasoning, a baseline
    n_train: Whole(1, 10 ** 7) = 40000  # training examples (on Beauty: at most)
    n_val: Whole(1, 10 ** 7) = 500      # validation users (on Beauty: at most)
    n_test: Whole(1, 10 ** 7) = 2000    # test users (on Beauty: at most)

    # The model, the same for teacher and student
    n_layer: Whole(1, 1000) = 4
    n_head: Whole(1, 1000) = 2   # few and wide: equal items are found by dot products
    d_model: Whole(1, 100000) = 96

    # Training, the same for all stages
    batch_size: Whole(1, 10 ** 6) = 32
    grad_clip: Real(above=0) = 1.0    # longer gradients are shortened to this norm
    bfloat16: Switch() = True         # training forwards in bfloat16, where the hardware can
    warmup: Whole(1, MANY) = 50       # steps of rising rate, at most a tenth of a stage
    answer_weight: Real(above=0) = 4.0  # loss weight of an answer token; a trace token has 1
    every: Whole(1, MANY) = 100       # save, and show the valid rate, after so many steps

    # AR: the teacher
    ar_steps: Whole(0, MANY) = 2500
    ar_lr: Real(0, 1) = 2e-3
    ar_misplace: Real(0, 0.6) = 0.31  # ours [0]: as cft_misplace; it grows from 0 to this

    # The sampler: how students decode, chosen on validation users
    block_size: Whole(1, 1024) = 16  # B, tokens denoised in parallel, in training too
    tau: Real(above=0, high=1) = 0.5  # commit what is surer; can be changed after training
    commit: OneOf("independent", "threshold") = "independent"  # ours [threshold]: rule of commits
    clash: Real(0, 1) = 0.4        # ours: unsure slots go together if P(same token) <= this

    # CFT: conversion fine-tuning
    cft_steps: Whole(0, MANY) = 3400
    cft_lr: Real(0, 1) = 1e-3
    cft_gold: Switch() = True      # train on the reference orders; false: on the teacher's own
    cft_prompts: Whole(1, MANY) = 10 ** 6  # training prompts used, at most
    cft_pairs: Switch() = True     # ours [false]: a second copy masks what the first one shows
    cft_first_step: Real(0, 1) = 0.3  # ours [0]: share of blocks all masked, as decoding begins
    cft_answer_states: Whole(0, 64) = 2  # ours [0]: further noised copies of the answer's blocks
    cft_misplace: Real(0, 0.6) = 0.31  # ours [0]: share of full lists shown out of order
    cft_penalty: Real(0) = 0.0     # ours [0]: price on labels that the answer shows already

    # OPD: on-policy distillation
    opd_steps: Whole(0, MANY) = 100
    opd_lr: Real(0, 1) = 2e-4
    opd_divergence: OneOf("forward", "reverse", "jsd") = "jsd"  # KL(T||S), KL(S||T), or between
    opd_prompts: Whole(1, MANY) = 10 ** 6  # training prompts of the roll-outs, at most
    opd_tau: Real(above=0, high=1) = 0.7  # tau of the roll-outs
    opd_anchor: Real(0) = 1.0      # ours [0]: weight of the CFT loss in the mix
    opd_answer_states: Whole(0, 64) = 4  # ours [0]: further states of the answer's blocks; all
    #   states of a block then weigh alike, however few slots are open
    opd_exclude: Switch() = True   # ours [false]: labels that a state shows are no target

    # RL: GRPO with DAPO's corrections
    rl_steps: Whole(0, MANY) = 30  # roll-outs
    rl_lr: Real(0, 1) = 2e-4
    rl_prompts: Whole(1, 10 ** 6) = 8  # prompts a roll-out
    rl_group: Whole(2, 10 ** 6) = 8  # samples a prompt; an advantage compares two or more
    rl_epochs: Whole(1, MANY) = 2  # updates a roll-out; with one the clip never acts
    rl_tau: Real(above=0, high=1) = 0.9  # tau of the roll-outs
    rl_eps_low: Real(0, 1) = 0.2   # ratios are clipped to 1 - eps_low ...
    rl_eps_high: Real(0) = 0.28    # ... and 1 + eps_high
    rl_alpha: Real(0) = 0.1        # format reward
    rl_conditional: Switch() = True  # format reward only if the target rose, or stayed first
    rl_anchor: Real(0) = 1.0       # ours [0]: weight of the CFT loss in the mix

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

PRESETS = {
    # Synthetic users, 2 CPU cores: the values above.
    "toy": {},
    # Amazon Beauty on a laptop.
    "small": dict(
        **BEAUTY,
        d_model=128,
        warmup=100,
        tau=0.4,
        clash=0.1,
        ar_steps=12000,
        cft_steps=5000,
        cft_pairs=False,
        cft_answer_states=3,
        cft_misplace=0.558,
        cft_penalty=10.0,
        rl_steps=200),
    # Amazon Beauty on a GPU. Not only larger: it trains on the teacher's own outputs, with pairs
    # of masks instead of 1/t, no penalty, and fewer misplaced labels.
    "full": dict(
        **BEAUTY,
        n_layer=8,
        n_head=8,
        d_model=512,
        batch_size=128,
        warmup=200,
        tau=0.98,
        clash=0.1,
        ar_steps=4000,
        ar_lr=8e-4,
        cft_steps=1200,
        cft_lr=4e-4,
        cft_gold=False,
        cft_prompts=20000,
        opd_prompts=20000,
        opd_steps=60,
        rl_steps=60,
        rl_lr=1e-4,
        rl_prompts=16),
}
PAPER = dict(
    ar_misplace=0,
    commit="threshold",
    cft_pairs=False,
    cft_first_step=0,
    cft_answer_states=0,
    cft_misplace=0,
    cft_penalty=0,
    opd_anchor=0,
    opd_answer_states=0,
    opd_exclude=False,
    rl_anchor=0)

STAGES = ("ar", "cft", "opd", "rl")  # each starts from the weights of the one before
# Settings that change no weight. (teacher and init name files: what counts is what is in them.)
RUNTIME = {"run_dir", "threads", "device", "fast", "data_dir", "every", "n_val", "n_test",
           "tau", "commit", "clash", "teacher", "init"}


def parse_args(doc, argv=None, also=None):
    """The Config of a command line: `--config` picks a preset, other settings override it.

    also: a dataclass of a script's own options, whose PRESETS, if it has any, hold the values
    that differ by preset. Then returns (Config, also). Raises UserError for what cannot work."""
    classes = [Config] + ([also] if also else [])
    given = parse(doc, sys.argv[1:] if argv is None else argv, *classes)
    preset = given.get("config", "toy")
    values = {**PRESETS[preset], **getattr(also, "PRESETS", {}).get(preset, {}), **given}
    cfg = check(make(Config, values))
    return (cfg, make(also, values)) if also else cfg


def check(cfg):
    """Refuses settings that do not go together, before anything is written; returns cfg."""
    if cfg.d_model % (2 * cfg.n_head):
        raise UserError(f"--d_model must be a multiple of 2 x n_head = {2 * cfg.n_head} (rotary "
                        f"positions turn pairs), not {cfg.d_model}")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda asks for a GPU, and torch sees none: use --device cpu")
    return cfg


def settings_of(cfg, stage):
    """The settings that a stage's result depends on: the shared ones, and its own and those of
    the stages before it. {name: value}"""
    later = [name + "_" for name in STAGES[STAGES.index(stage) + 1:]]
    if stage == "ar":
        later.append("block_size")
    return {name: value for name, value in dataclasses.asdict(cfg).items()
            if name not in RUNTIME and not name.startswith(tuple(later))}


def folder(cfg, *parts):
    return os.path.join(cfg.run_dir, cfg.config, *parts)
