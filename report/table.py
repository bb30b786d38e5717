"""A report as text: the tables of report.md, and the one that evaluate.py prints."""

# Columns of the tables: title -> where a row has the value, as keys after one another; format.
STAGES_SHOWN = {
    "stage": ("stage", ""),
    "R@1": ("strict recall@1", ".3f"),
    "N@10": ("strict ndcg@10", ".3f"),
    "MRR": ("strict mrr", ".3f"),
    "N@10 − AR": ("diff_to_ar ndcg@10", ""),
    "share of gain": ("ar_gain_share", ".1%"),
    "valid": ("valid", ".2%"),
    "faithful": ("faithful", ".1%"),
    "identity": ("identity", ".1%"),
    "forwards": ("forwards", ".1f"),
    "tok/fwd": ("tokens_per_forward", ".2f"),
    "ms": ("latency_ms", ".0f"),
    "× AR, batch 1": ("speedup_b1", ".2f"),
    "× AR, batch 64": ("speedup_batch", ".2f")}
MORE = {
    "stage": ("stage", ""),
    "duplicated": ("duplicated", ".2%"),
    "dropped": ("dropped", ".2%"),
    "out of set": ("out_of_set", ".2%"),
    "trace tokens": ("trace_tokens", ".1f"),
    "R@3": ("strict recall@3", ".3f"),
    "R@5": ("strict recall@5", ".3f"),
    "N@3": ("strict ndcg@3", ".3f"),
    "N@5": ("strict ndcg@5", ".3f"),
    "± N@10, users": ("se ndcg@10", ".4f"),
    "± N@10, seeds": ("seed_se ndcg@10", ".4f"),
    "training s": ("train_seconds", ".0f")}
CURVE = {
    "stage": ("stage", ""),
    "tau": ("tau", ""),
    "users": ("n_users", ""),
    "N@10": ("strict ndcg@10", ".3f"),
    "± users": ("se ndcg@10", ".3f"),
    "valid": ("valid", ".2%"),
    "faithful": ("faithful", ".1%"),
    "forwards": ("forwards", ".1f"),
    "tok/fwd": ("tokens_per_forward", ".2f")}
# For a terminal: the columns above that it shows, two lines of title, format, width.
PRINTED = [
    ("stage", "stage", "", "", 14),
    ("R@1", "R@1", "", ".3f", 6),
    ("N@10", "N@10", "", ".3f", 7),
    ("share of gain", "share", "of gain", ".1%", 9),
    ("valid", "valid", "", ".1%", 8),
    ("faithful", "faith-", "ful", ".1%", 8),
    ("identity", "as the", "input", ".1%", 8),
    ("forwards", "for-", "wards", ".1f", 7),
    ("tok/fwd", "tokens", "a fwd", ".2f", 7),
    ("× AR, batch 1", "× AR", "b 1", ".2f", 6)]
NOTHING = "–"


def value_at(row, keys):
    """row["a"]["b"] for the keys "a b"; None where there is none."""
    for key in keys.split():
        if row is None:
            return None
        row = row.get(key)
    return row


def difference(row, keys):
    """A difference and its interval; without one, how many users differ."""
    low, mean, high = value_at(row, keys)
    differ = value_at(row, keys.replace("diff_to", "differ_from"))
    if mean == 0 and not differ:  # of AR from itself
        return NOTHING
    if low is not None:
        return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
    return f"{mean:+.4f} ({'few' if differ is None else differ} differ)"


def cell(row, keys, form):
    """What a row has there, as text."""
    value = value_at(row, keys)
    if value is None:
        return NOTHING
    if isinstance(value, list):
        return difference(row, keys)
    return format(value, form)


def table(columns, rows):
    """A markdown table."""
    lines = [list(columns)]
    for row in rows:
        line = [cell(row, keys, form) for keys, form in columns.values()]
        lines.append([text.replace("|", "\\|") for text in line])  # a name is no markup
    text = ["| " + " | ".join(line) + " |" for line in lines]
    text.insert(1, "|---" * len(columns) + "|")
    return "\n".join(text)


def mean_rows(report):
    return [row for row in report["rows"] if row["seed"] == "mean"]


def fewer_seeds(report):
    """A sentence on rows that are the mean of fewer seeds than there are; or nothing."""
    fewer = []
    for row in mean_rows(report):
        seeds = row.get("seeds") or report["seeds"]
        if row["reported"] and len(seeds) < len(report["seeds"]):
            fewer.append(f"{row['stage']} (of {', '.join(map(str, seeds))})")
    if not fewer:
        return ""
    return (f" Rows of fewer seeds: {', '.join(fewer)}; a difference is always between the same "
            "seeds.")


def markdown(report):
    """report.md: the stages at the operating point, what else there is, the curve around it."""
    point = report["operating_point"]
    stages = [row for row in mean_rows(report) if row["reported"]]
    curve = [row for row in mean_rows(report) if row["tau"] is not None and not row["reported"]]
    return "\n\n".join([
        f"# {report['dataset']} ({report['config']}): {report['n_users']} {report['split']} "
        f"users, seeds {report['seeds']}, {report['device']}",
        f"Data: {report['source']}. Operating point: block size {point['block_size']}, "
        f"{point['commit']} {point['tau']}. Scores are strict (an invalid answer counts 0), "
        "averaged over seeds. N@10 − AR has its paired 95 % interval over users and, of several "
        "seeds, over seeds; where fewer than 50 users differ there is none. The share is that of "
        f"AR's gain in N@10 over the incoming order.{fewer_seeds(report)}",
        table(STAGES_SHOWN, stages),
        "What is wrong with invalid answers (shares of all answers; they may overlap), more "
        "metrics, and standard errors:",
        table(MORE, stages),
        "The curve around the operating point, on the first users:",
        table(CURVE, curve)]) + "\n"


def summary(report):
    """The stage table for a terminal of 80 columns: what to look at first."""
    point = report["operating_point"]
    lines = [[column[1] for column in PRINTED], [column[2] for column in PRINTED]]
    for row in mean_rows(report):
        if row["reported"]:
            lines.append([cell(row, STAGES_SHOWN[name][0], form)
                          for name, _, _, form, _ in PRINTED])
    text = [f"{report['dataset']}: {report['n_users']} {report['split']} users, seeds "
            f"{report['seeds']}, block size {point['block_size']}, {point['commit']} "
            f"{point['tau']}; strict scores", ""]
    for stage, *numbers in lines:
        line = f"{stage:14}"
        for number, column in zip(numbers, PRINTED[1:]):
            line += f"{number:>{column[4]}}"
        text.append(line)
    return "\n".join(text + [""])
