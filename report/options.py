"""The options that evaluate.py has beside the settings of the recipe."""
import dataclasses
import glob
import os
import re
from dataclasses import dataclass

from config import folder
from plumbing.settings import Numbers, OneOf, Real, Text, UserError, Whole

SEED = Whole(0, 2 ** 63 - 1)


@dataclass(frozen=True)
class Options:
    show: Whole(0, 10 ** 6) = 0     # print so many test users and what the last student wrote
    eval_split: OneOf("test", "val") = "test"  # val, to choose settings: writes report_val.json
    eval_taus: Numbers(above=0, high=1) = (0.3, 0.7, 0.9, 1.0)  # the curve beside tau itself
    eval_curve_users: Whole(1, 10 ** 9) = 400  # users on the curve; the table has all
    eval_speed_seconds: Real(0, 3600) = 4.0    # spent on each measurement of speed
    seeds: Text() = "all"           # seeds in the report, with commas; all: those that finished
    beside: Text() = ""             # rows of other reports: name=folder:stage, with commas

    PRESETS = {"small": dict(eval_curve_users=300, eval_taus=(0.2, 0.7, 0.9, 1.0)),
               "full": dict(eval_curve_users=1000, eval_taus=(0.9, 0.95, 1.0))}


def chosen_split(world, options):
    """The world with the users to score as its test users, and the name of their report."""
    if options.eval_split == "val":
        return dataclasses.replace(world, test=world.val, references={}), "report_val"
    return world, "report"


def finished_seeds(cfg, seeds="all"):
    """The seeds to report, a list: those of the text `seeds`, or all that have a checkpoint."""
    if seeds != "all":
        try:
            return sorted({SEED.read(seed) for seed in seeds.split(",")})
        except ValueError:
            raise UserError("--seeds must be all, or whole numbers from 0 with commas between "
                            f"them, not '{seeds}'")
    trained = set()
    for path in glob.glob(os.path.join(glob.escape(folder(cfg)), "seed*", "*", "checkpoint.pt")):
        name = os.path.basename(os.path.dirname(os.path.dirname(path)))
        if re.fullmatch(r"seed\d+", name):
            trained.add(int(name[4:]))
    if not trained and cfg.teacher:
        trained.add(cfg.seed)  # the teacher alone, which lies elsewhere
    if not trained:
        raise UserError(f"no checkpoint under {folder(cfg)}: first run `python train_ar.py "
                        f"--config {cfg.config}`")
    return sorted(trained)
