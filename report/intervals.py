"""Is a difference more than chance? Intervals of paired differences, over users and over seeds."""
import functools

import numpy as np

MUST_DIFFER = 50  # where fewer users differ, an interval would be too narrow


def interval_text(interval, as_text="{:+.4f}".format):
    """[low, mean, high] as a table has it: "+0.0016 [+0.0001, +0.0033]"; without low and high the
    mean alone. as_text: a number -> its text."""
    low, mean, high = interval
    if low is None:
        return as_text(mean)
    return f"{as_text(mean)} [{as_text(low)}, {as_text(high)}]"


@functools.lru_cache(maxsize=2)  # all comparisons of n users use the same draws, which cost most
def resampled(n, n_draws=2000):
    """How often each of n users is in each bootstrap sample of n users: (n_draws, n)."""
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=n_draws)
    return counts.astype(np.float32)


def paired_bootstrap(a, b):
    """The 95 % interval of mean(a - b), scores (N,) of the same users: [low, mean, high].

    Users are drawn with replacement, and the mean is taken anew each time. a and b are paired:
    what makes a user hard for both cancels."""
    difference = a - b                                            # (N,)
    counts = resampled(len(difference))                           # (n_draws, N)
    means = counts @ difference.astype(np.float32) / len(difference)  # (n_draws,)
    low, high = np.quantile(means, [0.025, 0.975])
    return [float(low), float(difference.mean()), float(high)]


@functools.cache
def t_quantile(df):
    """The t for which a variable T of Student's distribution with df degrees of freedom lies in
    [-t, t] with probability .95.

    With T = sqrt(df) tan(angle), the density of the angle is proportional to
    cos(angle)^(df - 1). So the angle can be read off its cumulative sum."""
    angle = np.linspace(0, np.pi / 2, 100001)
    middle = (angle[1:] + angle[:-1]) / 2
    density = np.cos(middle) ** (df - 1)
    up_to = np.append(0, np.cumsum(density)) / density.sum()      # P(|T| <= sqrt(df) tan(angle))
    return float(df ** 0.5 * np.tan(np.interp(0.95, up_to, angle)))


def paired_interval(difference):
    """The 95 % interval of a mean difference, differences (seeds, N) of the same N users ->
    [low, mean, high], and how many users differ on some seed. Where fewer than 50 do, low and
    high are None.

    One seed: the bootstrap over users. k seeds: other users and other seeds would both give
    another mean, so its variance has two parts. Each is known from so few values that it gets the
    quantile of Student's t for its own degrees of freedom; two seeds have 12.7 instead of 1.96.

        users   variance over users of the mean over seeds, / n
        seeds   variance over seeds of the mean over users, / k, less what noise adds to it
        side    sqrt(t(n - 1)^2 users + t(k - 1)^2 seeds)

    How often this holds the true value is simulated in tests/test_evaluate.py."""
    k, n = difference.shape
    n_differ = int((difference != 0).any(0).sum())
    mean = float(difference.mean())
    if n_differ < MUST_DIFFER:
        return [None, mean, None], n_differ
    if k == 1:
        return paired_bootstrap(difference[0], 0.0), n_differ
    of_user = difference.mean(0)                                  # (N,)
    of_seed = difference.mean(1)                                  # (k,)
    rest = difference - of_user - of_seed[:, None] + mean         # what neither explains
    noise = (rest ** 2).sum() / ((k - 1) * (n - 1)) / (k * n)     # its variance in the mean
    users = of_user.var(ddof=1) / n
    seeds = max(0.0, of_seed.var(ddof=1) / k - noise)
    side = float(t_quantile(n - 1) ** 2 * users + t_quantile(k - 1) ** 2 * seeds) ** 0.5
    return [mean - side, mean, mean + side], n_differ
