"""What speed.py measured, as tables and as a figure."""


def table(head, rows):
    """Markdown: head and rows are lists of cells; numbers get two digits."""
    def cell(value):
        if value is None:
            return "–"
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    def line(cells):
        return "| " + " | ".join(map(cell, cells)) + " |"
    return "\n".join((line(head), "|---" * len(head) + "|", *map(line, rows), ""))


def percent(value):
    return f"{100 * value:.1f} %"


def agreement(found):
    """Two cells: how many responses are identical, and how many differ, by round-off."""
    by_round_off = found.get("ties", found.get("equal_in_float64"))
    return f"{percent(found['identical'])} of {found['n']}", f"{found['differ']}, {by_round_off}"


def peers_rows(run):
    """Ours, a peer, how many times as fast ours is, agreement."""
    rows, ar = [], run["ar_vs_transformers"]
    for n in (1, 64) if ar else ():
        peer = f"transformers {ar['version']} generate, {ar[f'cache_b{n}']} cache, batch {n}"
        rows.append(("AR", peer, ar[f"ratio_b{n}"], *agreement(ar[f"agreement_b{n}"])))
    for name, found in (run["sampler_vs_peers"] or {}).items():
        ours, theirs = found["forwards"]["ours"], found["forwards"]["theirs"]
        rows.append((f"student, threshold {found['tau']}, {ours:.1f} forwards",
                     f"{name}, batch 1, {theirs:.1f} forwards", found["ratio_b1"],
                     *agreement(found)))
    for name, found in run["vs_prompt_lookup"]["of"].items():
        same, differ = agreement(found)
        over = f"{found['speedup_over_ar']:.2f} × AR"
        rows.append(("student", f"prompt lookup of AR, batch 1: {name} ({over})", found["ratio"],
                     f"AR's: {same}", differ))
    return rows


def cost_sentences(run):
    cost = run["cost"]
    rows = cost["rows"]
    below = ["–" if cost[name] is None else f"{cost[name]:.0f}" for name in (
        "crossover_batch", "crossover_batch_model", "crossover_batch_model_rows")]
    return (f"Random weights, {run['tokens_per_forward']:.2f} tokens a forward. Model: "
            f"{cost['a_ms']:.3f} ms + {cost['b_us']:.2f} µs × width × batch, "
            f"median error {percent(cost['median_error'])}; with rows, {rows['a_ms']:.3f} ms + "
            f"{rows['b_us']:.2f} µs × width × batch + {rows['c_us']:.2f} µs × batch, "
            f"median error {percent(rows['median_error'])}. The speed-up falls below 1 at batch "
            f"{below[0]} (model: {below[1]}; with rows: {below[2]}).\n")


def training_rows(run):
    rows, ar = [], run["training"]["ar"]["step"]
    for stage, found in run["training"].items():
        step = found["step"]
        dearest = list(found["parts"].items())[:3]
        rows.append((stage, f"{step:.3f}", step / ar,
                     *(f"{name}, {percent(s / step)}" for name, s in dearest)))
    return rows


def measured_tables(run):
    """The real student: against AR and its peers."""
    point = run["operating_point"]
    return (
        f"## {run['config']}, {run['device']}\n",
        f"{run['stage']}, block size {point['block_size']}, {point['commit']} {point['tau']}, "
        f"clash {point['clash']}; {run['n_users']} users; torch {run['torch']}, commit "
        f"{(run['commit'] or 'none')[:10]}. × AR: tokens/s over AR's, the median of alternating "
        "rounds.\n",
        table(("tokens a forward", "evidence tokens a forward", "forwards", "valid",
               "× AR, batch 1", "batch 8", "batch 64", "efficiency, batch 1"),
              [(run["tokens_per_forward"], run["evidence_tokens_per_forward"],
                run["forwards_per_response"], percent(run["valid"]),
                *(run[f"speedup_b{n}"] for n in (1, 8, 64)), run["efficiency_b1"])]),
        f"A forward of the student costs {run['cost_ratio']:.2f} of AR's at batch 1 (one block "
        f"wide to one token wide: {run['cost_ratio_block_to_1']:.2f}). The forwards alone of a "
        f"response: AR {run['bare_ms']['ar']:.1f} ms, student {run['bare_ms']['student']:.1f} "
        "ms.\n",
        table(("ms a response, batch 1", "p50", "p95"),
              [(name, t["p50"], t["p95"]) for name, t in run["latency_ms"].items()]),
        table(("ours", "peer", "ours is × as fast", "identical responses",
               "differ, by round-off"), peers_rows(run)),
        *(f"Not measured: {reason}.\n" for reason in run["missing"]))


def markdown(run, lines):
    """One run as tables. run, lines: a run of speed.json and its curves."""
    growing = [line for line in lines if "model" in line]
    student = [line for line in lines if "valid" in line]
    shown = ("against", "batch", "length", "speedup", "model", "model_rows")
    return "\n".join((
        *measured_tables(run),
        cost_sentences(run),
        table(("against", "batch", "length", "× AR", "model", "with rows"),
              [[line[name] for name in shown] for line in growing]),
        f"The real student, batch 1; counts of the first {student[-1]['n_users']} users.\n",
        table(("block size", "tau", "× AR", "tokens a forward", "valid"),
              [(line["block_size"], str(line["tau"]), line["speedup"],
                line["tokens_per_forward"], percent(line["valid"])) for line in student]),
        "Training: seconds of a step, and its three largest costs.\n",
        table(("stage", "s a step", "× an AR step", "largest", "second", "third"),
              training_rows(run))))


# --- The figure -------------------------------------------------------------------------------

def draw_growing(ax, run, lines, against, label):
    """Speed-up against batch or length: measured, and by the cost models."""
    found = [line for line in lines if line["against"] == against]
    x = [line[against] for line in found]
    for key, style, name in (("speedup", "o-", "random weights, measured"),
                             ("model", "k--", "cost model: a + b × width × batch"),
                             ("model_rows", "k:", "… + c × batch")):
        ax.plot(x, [line[key] for line in found], style, label=name)
    ax.set(xscale="log", xlabel=label, ylabel="× AR",
           title=f"speed-up at {run['tokens_per_forward']:.1f} tokens a forward")
    ax.set_xticks(x, x)
    ax.minorticks_off()


def draw_student(ax, run, lines):
    """What the real student's block size and tau make of tokens a forward and speed-up."""
    point = run["operating_point"]
    student = [line for line in lines if "valid" in line]
    for name in ("block_size", "tau"):
        found = []
        for line in student:
            here = all(line[key] == point[key] for key in ("block_size", "tau"))
            if line["against"] == name or here:
                found.append((line[name], line["tokens_per_forward"], line["speedup"]))
        found.sort()
        ax.plot([x for _, x, _ in found], [y for _, _, y in found], "o-",
                label=name.replace("_", " "))
        for value, x, y in found:
            ax.annotate(f"{value:g}", (x, y), textcoords="offset points", xytext=(4, 4),
                        fontsize=8)
    ax.set(xlabel="tokens a forward", ylabel="× AR, batch 1", title="the real student")


def figure(run, lines, path):
    """cost.png: the speed-up against batch, length, and the real student's settings."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 3, figsize=(15, 4.2))
    draw_growing(axes[0], run, lines, "batch", "batch")
    draw_growing(axes[1], run, lines, "length", "output length (tokens), batch 1")
    batches = (1, 8, 64)
    axes[0].plot(batches, [run[f"speedup_b{n}"] for n in batches], "s",
                 label="the student, measured")
    axes[0].axhline(1, color="#999999", lw=0.8)
    draw_student(axes[2], run, lines)
    for ax in axes:
        ax.set_ylim(0)
        ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=130, facecolor="white", format="png")
    plt.close(fig)
