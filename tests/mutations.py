"""Do the tests see a mistake? One line of the code is changed at a time, and the tests that should
notice are run on a copy:  python tests/mutations.py [only files with this in their name]
"""
import os
import shutil
import signal
import sys
import tempfile
import time

import numpy  # noqa: F401  once, for all runs
import pytest
import torch
import tqdm  # noqa: F401

torch.set_num_threads(1)
sys.path.pop(0)  # this folder: a copy has its own
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LEFT_OUT = shutil.ignore_patterns(".*", "runs", "data", "weights", "results", "__pycache__")

# file: [(what stands there once, what it becomes, test file[/words of pytest -k]), ...]
MUTATIONS = {
    "data.py": [
        ("return weight * (response != PAD)", "return weight", "data"),
        ("text = np.where(trace == EOS, PAD, trace)", "text = trace + 0", "data"),
        ("generator=rng) < answer_share", "generator=rng) > answer_share", "data"),
        ("(pack(split.trace, left=True), answer)", "(split.prompt, answer)", "data"),
        ("valid = ended and not (", "valid = not (", "data"),
        ("max(len(required), len(made), 1)", "max(len(required), 1)", "data"),
        ("varied = rng.random(n) < cfg", "varied = rng.random(n) > cfg", "data")],
    "toy/world.py": [
        ("log_ratio.sum(-1) - slope * place", "log_ratio.sum(-1) + slope * place", "data"),
        ("rho = (TOY_Q + u) / u", "rho = TOY_Q / u", "data")],
    "model.py": [
        ("q.shape[-1] ** -0.5", "q.shape[-1] ** -1.0", "model"),
        ("a * cos - b * sin", "a * cos + b * sin", "model"),
        ("out[..., :EOS] = FORBIDDEN", "out[..., :1] = FORBIDDEN", "model"),
        ("key >= pad[..., None]", "key >= 0 * pad[..., None]", "model"),
        ("return hidden[:, P - 1:]", "return hidden.roll(-1, 1)[:, P - 1:]", "model"),
        ("** 0.5 if writes else 1.0", "** 0.5 if not writes else 1.0", "model"),
        ("tempered = logits / (sampling.temperature or 1.0)", "tempered = logits", "model"),
        ("part.k = self.k[:, kept]", "part.k = self.k[:, :int(kept.sum())]", "sampler")],
    "diffusion.py": [
        ("past = column < start[..., None]", "past = column < start[..., None] + B", "diffusion"),
        ("segment[:, None] == segment", "segment[:, None] >= segment", "diffusion"),
        ("mask[:, :, :P] &= real", "mask[:, :, :P] &= real | True", "diffusion"),
        ("from_left = hidden[:, P - 1:P + R - 1]", "from_left = hidden[:, P:P + R]", "diffusion"),
        ("segments[:, :, :-1]), dim=2", "segments[:, :, 1:]), dim=2", "diffusion"),
        ("start = P + block[..., None] * B", "start = P + 1 + block[..., None] * B", "diffusion"),
        ("masked_fill(is_fill, EOS)", "masked_fill(is_fill, PAD)", "diffusion"),
        ("weight = masked / t[:, None]", "weight = masked * 1.0", "diffusion"),
        ("part = torch.randperm(n, generator=rng)", "part = torch.arange(n)", "diffusion"),
        ("rng) < first_steps", "rng) > first_steps", "diffusion"),
        ("masked[:, 0] = is_first", "masked[:, 0] = False", "diffusion"),
        ("committed >= step[..., None]", "committed > step[..., None]", "diffusion"),
        ("(hidden[scored]) / (temperature or 1.0)", "(hidden[scored])", "diffusion"),
        ("where(decoded.tokens != PAD, decoded", "where(decoded.filled != MASK, decoded",
         "diffusion")],
    "sampler.py": [
        ("confidence > self.tau", "confidence >= self.tau", "sampler"),
        ("(best & none_forced)", "best", "sampler"),
        ("forced[:, 0] = open_[:, 0]", "forced[:, 0] = False", "sampler"),
        ("(tokens == MASK) & ~after_first(tokens, EOS)", "tokens == MASK", "sampler"),
        ("in_block = query >= length", "in_block = query > length", "sampler"),
        ("B = min(block_size, max_len)", "B = block_size", "sampler"),
        ("hidden[:, U - 1:-1]", "hidden[:, U:]", "sampler"),
        ("cache, pad[rows], text", "cache, pad[:len(rows)], text", "sampler"),
        ("decoded.forwards[rows] += 1", "decoded.forwards += 1", "sampler")],
    "ours/commit.py": [
        ("torch.where(forced, 1.0, best_logp)", "torch.where(forced, best_logp, best_logp)",
         "ours"),
        ("(slot < slot[:, None])", "(slot > slot[:, None])", "ours")],
    "ours/misplace.py": [
        ("one_of(is_label & masked)", "one_of(masked)", "ours"),
        ("one_of(is_label & ~masked)", "one_of(~masked)", "ours"),
        ("torch.where(here, left, token)", "token", "ours"),
        ("generator=rng).to(shown.device) < share", "generator=rng).to(shown.device) > share",
         "ours")],
    "ours/exclude.py": [
        ("is_label & ~masked", "~masked", "ours"),
        ("asks = (is_label & masked)", "asks = is_label", "ours")],
    "ours/lossless.py": [
        ("torch.where(swapped, old, draft)", "draft.clone()", "lossless"),
        ("(slot > place) & in_answer(draft)", "(slot > place)", "lossless"),
        ("forwards[rows] += 1", "forwards += 1", "lossless"),
        ("(draft == EOS) & accepted", "(draft == EOS)", "lossless"),
        ("accepted = u * q_x < p_x", "accepted = u * q_x < q_x", "lossless/temperature"),
        ("torch.maximum(p - q, 1e-9 * p)", "p", "lossless/temperature")],
    "ours/wording.py": [
        ("np.where(is_label, at, 0)", "np.where(is_label, 0, at)", "ours"),
        ("decided & has_synonym(trace, n_labels)", "decided", "ours")],
    "trainer.py": [
        ("WEIGHT_DECAY = 0.05", "WEIGHT_DECAY = 0.5", "stages/muon"),
        ('adjust_lr_fn="match_rms_adamw"', 'adjust_lr_fn="original"', "stages/muon"),
        ("rise = min(1.0, (step + 1) / warmup)", "rise = 1.0", "stages/rate"),
        ("betas=(0.9, 0.98)", "betas=(0.9, 0.95)", "stages/muon"),
        ("self.model.parameters(), self.cfg.grad_clip)", "self.model.parameters(), 1e9)",
         "stages/shortened"),
        ('group["lr"] = lr', 'group["lr"] = self.peak_lr', "stages/shortened"),
        ("[cfg.seed, step, RANK,", "[cfg.seed, 0, RANK,", "stages/random_numbers"),
        ("tau = cfg.tau if tau is None else tau", "tau = cfg.tau", "stages/rule"),
        ("torch.from_numpy(as_prompt(trace)).to(prompt.device)",
         "torch.cat((prompt, parts[-1].tokens), 1)", "stages/edits"),
        ("sum(part.forwards for part in parts)", "parts[-1].forwards", "stages/split")],
    "train_ar.py": [
        ("return total / weight.sum()", "return total / real.sum()", "diffusion"),
        ("(cfg.batch_size), cfg.answer_share", "(cfg.batch_size), 1.0", "stages/batch")],
    "train_cft.py": [
        ("token_weight.masked_fill(is_fill, 1.0)", "token_weight.masked_fill(is_fill, 0.0)",
         "diffusion"),
        ("token_weight * ~is_fill", "token_weight", "diffusion"),
        ("cfg.cft_ar_weight * total", "total", "diffusion"),
        ("loss = total / token_weight.sum()", "loss = total / weight.sum()", "diffusion"),
        ("split.incoming).valid", "split.incoming).valid | True", "stages/teacher_wrote")],
    "train_opd.py": [
        ("return kl(log_t, log_s)", "return kl(log_s, log_t)", "stages/divergence"),
        ("(kl(log_t, log_m) + kl(log_s, log_m)) / 2", "kl(log_t, log_m)", "stages/divergence"),
        ("masked_fill(teacher_logits <= FORBIDDEN, FORBIDDEN)", "clone()", "stages/excludes"),
        ("real & (slot0 | masked)", "real & masked", "stages/opd_loss"),
        ("token_weights(tokens, cfg.answer_weight)", "token_weights(tokens, 1.0)",
         "stages/opd_loss"),
        ("if cfg.opd_exclude:", "if False:", "stages/opd_loss"),
        ("causal_hidden(teacher, prompt", "causal_hidden(student, prompt", "stages/opd_loss"),
        ("n_steps = last + 1", "n_steps = last.clamp(min=1)", "stages/occurred"),
        ("rule_of(cfg, cfg.opd_tau)", "rule_of(cfg)", "stages/opd_step"),
        ("1.0 if cfg.opd_group > 1 else 0.0", "1.0", "stages/opd_step"),
        ("prompt.repeat_interleave(cfg.opd_group, dim=0)", "prompt", "stages/opd_step")],
    "train_rl.py": [
        ("world.train.target >= 0", "world.train.target >= -1", "stages/rl_step"),
        ("rule_of(cfg, cfg.rl_tau)", "rule_of(cfg, cfg.tau)", "stages/rl_step"),
        ("signal if signal.any() else ~signal", "torch.ones_like(signal)", "stages/rl_step"),
        ("rise + alpha * bonus, -1.0)", "rise + alpha * bonus, 0.0)", "stages/rewards"),
        ("bonus = (rise > 0) | stayed", "bonus = (rise >= 0) | stayed", "stages/rewards"),
        ("centred / (rewards.std(1, keepdim=True) + 1e-6)", "centred", "stages/rl_step"),
        ("clamp(1 - eps_low, 1 + eps_high)", "clamp(1 - eps_high, 1 + eps_low)", "stages/policy"),
        ("torch.minimum(ratio * A", "torch.maximum(ratio * A", "stages/policy"),
        ("(surrogate * is_token).sum() / is_token.sum()", "(surrogate * is_token).mean()",
         "stages/policy"),
        ("if old_logp is None:", "if True:", "stages/several_updates"),
        ("cfg.rl_alpha, cfg.rl_conditional", "cfg.rl_alpha, True", "settings/reads")],
    "beauty/prerank.py": [
        ("0.125 * value", "0.25 * value", "beauty/loops"),
        ("self.user % FOLDS == fold", "self.user % FOLDS != fold", "beauty/loops or known"),
        ("scores[example, item] = -1", "scores[example, item] += 0", "beauty/loops")],
    "beauty/evidence.py": [
        ("with cut3.without(fold), cut2", "with cut3.without(fold), cut3", "beauty/loops or known"),
        ("(strength > 0).sum(1)", "(strength > 1).sum(1)", "beauty/loops"),
        ("times * RARE >= times.sum()", "times * RARE <= times.sum()", "beauty/rare")],
    "beauty/writer.py": [
        ("return weight * (group != never_seen)", "return weight * (group != -1)", "beauty/writer"),
        ("if lists is train else slice(None)", "if False else slice(None)", "beauty/writer")],
    "beauty/tokens.py": [
        ("np.argsort(-score", "np.argsort(score", "beauty"),
        ("recent = shown[:, HIST - 1::-1]", "recent = shown[:, :HIST]", "beauty/prompts")],
    "plumbing/checkpoint.py": [
        ('"d_model", "trace", "wording"', '"d_model", "wording"', "files"),
        ("if error.errno in (errno.EACCES, errno.EAGAIN)", "if True", "files"),
        ('if not world.startswith("beauty"):', "if True:", "files/code")],
    "experiments/compare.py": [
        ("checksum(student.stages, values, start", "checksum(student.stages, start",
         "experiments/settings"),
        ("key = checksum(weights, settings, code", "key = checksum(weights, code",
         "experiments/settings"),
        ("if curve[at]", "if True or curve[at]", "experiments/operating")],
    "experiments/puma.py": [
        ("is_open & (token != PAD)", "is_open", "experiments/unmasking"),
        ("masked & ~chosen", "masked & chosen", "experiments/unmasking"),
        ("share * others.shape[-1]", "share", "experiments/unmasking")],
    "experiments/induced.py": [
        ("min(int(count), most)", "int(count)", "experiments/turned"),
        ("rewards[len(trace):] - as_it_is[row]", "rewards[len(trace):]", "experiments/turned"),
        ("ndcg * read.valid", "ndcg", "experiments/expects"),
        ("return {count: false[", "return {count: ~false[", "experiments/counted")],
    "experiments/own_world.py": [
        ("with cut[1].without(fold), cut[2]", "with cut[2]", "own_requests/known")],
    "evaluate.py": [
        ('out[f"served {metric}"] * answers.valid', 'out[f"served {metric}"]', "evaluate"),
        ("np.log2(rank + 2)", "np.log2(rank + 1.5)", "evaluate")],
    "report/intervals.py": [
        ("difference = a - b ", "difference = a - b[::-1] ", "evaluate/pairing"),
        ("users = of_user.var(ddof=1) / n", "users = 0.0", "evaluate/seeds"),
        ("of_seed.var(ddof=1) / k - noise", "of_seed.var(ddof=1) / k", "evaluate/seeds"),
        ("if n_differ < MUST_DIFFER:", "if False:", "evaluate/few")],
    "report/table.py": [
        ("not other.on_curve and same_seed", "same_seed", "evaluate/curve"),
        ("same_seed = own.seed == other.seed", "same_seed = True", "evaluate/mean_row")],
    "report/denoise.py": [
        ("n_forwards += int(part.forwards[0])", "n_forwards += 1", "show/counted"),
        ("elif about in seen:", "elif False:", "show/faults")],
    "report/speed.py": [
        ("if round_ > 0:", "if True:", "report/turns"),
        ("ratio = rate[row] /", 'ratio = rate["ar"] /', "report/speed_ups")],
}


def run(tests, folder):
    """Runs tests on the tree in a folder, in a process of its own that need not import torch
    anew -> the exit code of pytest."""
    name, _, part = tests.partition("/")
    child = os.fork()
    if not child:
        signal.alarm(900)
        os.chdir(folder)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        options = ["-x", "-q", "-p", "no:cacheprovider", *(["-k", part] if part else [])]
        os._exit(pytest.main([f"tests/test_{name}.py", *options]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fate(file, old, new, tests):
    """What the tests say to a change, or to none."""
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        path = os.path.join(copy, file)
        with open(path) as f:
            text = f.read()
        if text.count(old) != 1:
            return f"IS THERE {text.count(old)} TIMES"
        with open(path, "w") as f:
            f.write(text.replace(old, new))
        code = run(tests, copy)
    return {0: "SURVIVED", 1: "caught", -signal.SIGALRM: "caught"}.get(code, f"NO TESTS ({code})")


def main():
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    todo = [(file, *each) for file, these in MUTATIONS.items() if only in file for each in these]
    if not todo:
        sys.exit(f"no file with mutations has {only!r} in its name")
    for tests in sorted({each[-1].partition("/")[0] for each in todo}):
        if run(tests, ROOT):
            sys.exit(f"test_{tests}.py fails without any change")
    began, missed = time.time(), 0
    for each in todo:
        found = fate(*each)
        missed += found != "caught"
        print(f"{found:8s}  {each[0]}: {each[1]}  ->  {each[2]}", flush=True)
    print(f"{len(todo) - missed} of {len(todo)} caught, in {time.time() - began:.0f} seconds")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
