"""Settings of every stage, the presets, and the command line that overrides them.

    python train_cft.py --config toy --cft_lr 0.001 --seed 1
"""
import dataclasses
import difflib
import inspect
import os
import sys
from dataclasses import dataclass

import torch


class UserError(Exception):
    """Something only the user can mend: one sentence that says what to do. Scripts print it and exit with code 2."""


@dataclass(frozen=True)
class Config:
    config: str = "toy"          # preset: toy (synthetic), small (Amazon Beauty, laptop), full (Amazon Beauty, GPU)
    seed: int = 0                # every random draw of a step comes from (seed, stage, step)
    teacher: str = ""            # checkpoint of the AR teacher, where it is not the one of this run_dir and seed
    init: str = ""               # checkpoint whose weights a stage starts from, where it is not the stage before
    run_dir: str = "runs"        # checkpoints go to <run_dir>/<config>/seed<seed>/<stage>/, the report to <run_dir>/<config>/
    threads: int = 2             # CPU threads; bit-equal reruns need the same number
    device: str = "auto"         # auto (GPU if there is one), cpu, cuda

    # the world: what a prompt is made of
    world: str = "toy"           # toy | beauty
    data_dir: str = "data/beauty"  # folder with sequences.txt and items.tsv (beauty only)
    hybrid: bool = False         # beauty: a pre-ranker that also scores brand and category
    n_candidates: int = 8        # K, the length of every list in validation and test, the longest in training
    n_labels: int = 16           # label tokens; more than K, so that an answer can be out of set
    min_list: int = 4            # shortest training list
    random_labels: bool = False  # toy: labels dealt out at random; else the label is the position in the incoming list
    vary_lists: float = 0.4      # share of training lists whose length is drawn from min_list .. K; the others have K
    trace: bool = True           # false: the answer alone, without reasoning (a baseline)
    n_train: int = 40000         # training examples (toy: generated; beauty: at most, drawn from all prefixes)
    n_val: int = 500             # validation users (at most)
    n_test: int = 2000           # test users (at most)

    # the model, shared by teacher and student
    n_layer: int = 4
    n_head: int = 2              # few and wide: equal items are found by the dot products of 48 or 64 dimensions, not 24
    d_model: int = 96

    # optimisation, shared by the stages
    batch_size: int = 32
    weight_decay: float = 0.05
    grad_clip: float = 1.0
    bfloat16: bool = True        # training forwards in bfloat16 autocast where the hardware has it, else in float32
    compile: bool = False        # torch.compile the forwards of AR training, on a GPU
    warmup: int = 50             # steps of linear warm-up, at most a tenth of a stage; then cosine decay to zero
    answer_weight: float = 4.0   # loss weight of answer tokens; trace tokens have 1
    max_steps: int = 0           # cap every stage at this many steps (0 = no cap), for a quick look
    save_every: int = 100        # steps between checkpoints
    valid_every: int = 100       # steps between the valid rates shown in the bar (and after 1, 2, 4, 8, ...)

    # AR: the teacher
    ar_steps: int = 2500
    ar_lr: float = 2e-3
    ar_misplace: float = 0.5     # share of training answers that show labels in wrong places: it grows from 0 to this

    # block diffusion: the operating point, one rule for trace and answer, chosen on validation
    block_size: int = 16         # B, tokens denoised in parallel, in training as in decoding
    commit: str = "independent"  # independent | threshold | factor | steps: see sampler.choose
    clash: float = 0.4           # independent: of unsure slots, two that would collide with a higher probability do not go together
    tau: float = 0.5             # a slot is committed when its confidence exceeds this (steps: steps a block); free after training

    # CFT: conversion fine-tuning
    cft_steps: int = 3400
    cft_lr: float = 1e-3
    cft_noise: str = "complementary"  # complementary (each token masked once a pair) | uniform (1/t) | clipped (t in [.3, .8])
    cft_first_step: float = 0.3  # share of blocks shown as the sampler's first step: all [MASK], first slot included
    cft_answer_states: int = 2   # extra noise draws of the answer's blocks in every step: the answer is the hard part
    cft_misplace: float = 0.5    # share of training answers that show labels in wrong places
    cft_penalty: float = 0.0     # weight of -log(1 - P(labels that the answer shows already))
    cft_gold: bool = True        # train on the reference orders; else on the teacher's own outputs
    cft_prompts: int = 1000000   # training prompts used, at most (without cft_gold the teacher answers them first, once)

    # OPD: on-policy distillation
    opd_steps: int = 100
    opd_lr: float = 2e-4
    opd_divergence: str = "jsd"  # forward KL(T||S) | reverse KL(S||T) | jsd
    opd_anchor: float = 1.0      # weight of the CFT loss in the mix
    opd_tau: float = 0.7         # tau of the roll-outs
    opd_source: str = "student"  # whose text: the student's own decode | teacher (off-policy: its outputs, random masks)
    opd_states: str = "masked"   # tokens scored in a state: all masked there | committed there | next (leftmost masked)
    opd_answer_states: int = 4   # extra states of the answer's blocks
    opd_rollout_temperature: float = 1.0  # of the student's draws: greedy text is too good to teach how to get out of mistakes
    opd_temperature: float = 1.0  # of the teacher's target; above 1 it is softer
    opd_exclude: bool = True     # labels that a state shows are taken out of the target: the teacher cannot see to its right
    opd_cut: bool = False        # nothing counts behind the first repeated label: there the teacher is out of its depth

    # RL: GRPO / DAPO
    rl_steps: int = 30           # roll-outs
    rl_lr: float = 2e-4
    rl_anchor: float = 1.0       # weight of the CFT loss in the mix
    rl_prompts: int = 8          # prompts a roll-out
    rl_group: int = 8            # samples a prompt
    rl_epochs: int = 2           # updates a roll-out; with one the ratio is 1 and the clip never acts
    rl_temperature: float = 1.0
    rl_tau: float = 0.9          # tau of the roll-outs
    rl_eps_low: float = 0.2      # clip [1 - eps_low, 1 + eps_high]
    rl_eps_high: float = 0.28
    rl_alpha: float = 0.1        # format reward
    rl_conditional: bool = True  # format reward only if the target rose, or stood first and still does

    # evaluation
    eval_split: str = "test"     # test | val: settings (tau, steps, ...) are chosen on val, in report_val.json
    eval_batch: int = 256
    eval_taus: str = "0.3,0.7,0.9,1.0"  # the curve around the operating point
    eval_curve_users: int = 400  # users on the curve (the operating point has all)
    eval_speed_seconds: float = 4.0  # time spent on each throughput measurement
    show: int = 0                # evaluate: print what the last student wrote for so many test users, instead of the report
    seeds: str = "all"           # evaluate: seeds in the report, comma-separated, or all that finished
    ablate: str = "cft"          # ablations: whose choices, cft or opd
    requests: str = ""           # rerank: file with a request a line, - for the standard input
    lines: str = "all"           # ablations: names of the lines to run, comma-separated; else all
    beside: str = ""             # evaluate: rows of other reports beside ours: name=folder:stage, comma-separated


PRESETS = {
    "toy": {},
    "small": dict(
        world="beauty", n_candidates=10, n_labels=20, min_list=5, n_train=131413, n_val=2500, n_test=10 ** 6,
        d_model=128, batch_size=32, warmup=100, tau=0.4, clash=0.1, eval_curve_users=300, eval_taus="0.2,0.7,0.9,1.0",
        ar_steps=12000, ar_lr=2e-3,
        cft_steps=5000, cft_lr=1e-3, cft_noise="uniform", cft_answer_states=3, cft_misplace=0.9, cft_penalty=10.0,
        rl_steps=200, rl_prompts=8),
    "full": dict(
        world="beauty", n_candidates=10, n_labels=20, min_list=5, n_train=131413, n_val=2500, n_test=10 ** 6,
        n_layer=8, n_head=8, d_model=512, batch_size=128, warmup=200, compile=True, tau=0.98, clash=0.1,
        eval_batch=512, eval_curve_users=1000, eval_taus="0.9,0.95,1.0",
        ar_steps=4000, ar_lr=8e-4,
        cft_steps=1200, cft_lr=4e-4, cft_gold=False, cft_prompts=20000,
        opd_steps=60,
        rl_steps=60, rl_lr=1e-4, rl_prompts=16),
}
STAGES = ("ar", "cft", "opd", "rl")  # each starts from the checkpoint of the one before
RUNTIME = {  # these change no weight; of teacher and init, which name files, the weights are compared (common.Run)
    "run_dir", "threads", "device", "data_dir", "seeds", "show", "requests", "beside", "ablate", "lines", "save_every", "valid_every",
    "compile", "n_val", "n_test", "tau", "commit", "clash", "teacher", "init"}


def parse_args(doc, argv=None):
    """Config from the command line: `--config NAME` picks the preset, every other `--name value` overrides a field.

    Raises UserError for an unknown preset or option (naming the nearest) and for a value of the wrong type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        print(doc.strip(), "\n\nSettings (any of them as --name value), shown with the toy preset's values:\n")
        print(inspect.getsource(Config).split("\n", 2)[2])
        raise SystemExit(0)
    fields = {f.name: f for f in dataclasses.fields(Config)}
    given = {}
    while argv:
        name, equals, value = argv.pop(0).partition("=")
        if not name.startswith("--") or name[2:] not in fields:
            near = difflib.get_close_matches(name.lstrip("-"), fields, n=3, cutoff=0.4)
            raise UserError(f"unknown option {name}: did you mean {' or '.join('--' + n for n in near)}?" if near else
                            f"unknown option {name}: see --help for the list")
        name = name[2:]
        if not equals:
            if not argv:
                raise UserError(f"--{name} needs a value, for example --{name} {fields[name].default}")
            value = argv.pop(0)
        kind = fields[name].type
        try:
            given[name] = {"true": True, "1": True, "false": False, "0": False}[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise UserError(f"--{name} must be {'true or false' if kind is bool else 'of type ' + kind.__name__}, not '{value}'")
    preset = given.get("config", "toy")
    if preset not in PRESETS:
        raise UserError(f"unknown config '{preset}': choose one of {', '.join(PRESETS)}")
    return check(Config(**{**PRESETS[preset], **given}))


def check(cfg):
    """Refuse settings that cannot work, before anything is written; returns cfg."""
    choices = dict(world=("toy", "beauty"), commit=("independent", "threshold", "factor", "steps"), device=("auto", "cpu", "cuda"),
                   eval_split=("test", "val"), cft_noise=("complementary", "uniform", "clipped"), opd_divergence=("forward", "reverse", "jsd"),
                   opd_source=("student", "teacher"), opd_states=("masked", "committed", "next"), ablate=("cft", "opd"))
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            raise UserError(f"--{name} must be one of {', '.join(allowed)}, not '{getattr(cfg, name)}'")
    for name in ("block_size", "batch_size", "n_layer", "n_head", "threads", "n_candidates", "min_list", "rl_epochs",
                 "rl_prompts", "eval_batch", "save_every", "valid_every", "n_train", "n_val", "n_test", "cft_prompts"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(cfg, name)}")
    if cfg.d_model % (2 * cfg.n_head):
        raise UserError(f"--d_model must be a multiple of 2 x n_head = {2 * cfg.n_head}, not {cfg.d_model}")
    if not cfg.min_list <= cfg.n_candidates <= cfg.n_labels:
        raise UserError("list lengths must satisfy min_list <= n_candidates <= n_labels, not "
                        f"{cfg.min_list} <= {cfg.n_candidates} <= {cfg.n_labels}")
    if cfg.show < 0:
        raise UserError(f"--show takes a number of users, not {cfg.show}")
    if cfg.tau <= 0:
        raise UserError(f"--tau must be above 0, not {cfg.tau}")
    try:
        [float(tau) for tau in cfg.eval_taus.split(",")]
    except ValueError:
        raise UserError(f"--eval_taus must be numbers with commas, not '{cfg.eval_taus}'")
    if cfg.rl_group < 2:
        raise UserError(f"--rl_group must be at least 2 (an advantage compares samples of one prompt), not {cfg.rl_group}")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda asks for a GPU, and torch sees none: use --device cpu")
    return cfg


def settings_of(cfg, stage):
    """The settings that a stage's result depends on: the shared ones and those of every stage up to it."""
    later = STAGES[STAGES.index(stage) + 1:] + ("eval",)
    later = tuple(s + "_" for s in later) + (("block_size",) if stage == "ar" else ())
    return {k: v for k, v in dataclasses.asdict(cfg).items() if k not in RUNTIME and not k.startswith(later)}


def folder(cfg, *parts):
    return os.path.join(cfg.run_dir, cfg.config, *parts)
