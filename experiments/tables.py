"""What experiments/compare.py writes: the tables, the picture and the JSON of a comparison."""
import os

from matplotlib.figure import Figure

from plumbing.checkpoint import made_by
from report.figures import forwards_axis, save_figure
from report.intervals import interval_text
from report.table import write_json, write_text


def table(head, rows):
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def share(x):
    return f"{100 * x:.2f} %"


def described(student):
    """What a student is: "cft after AR, cft_first_steps=0.0"."""
    words = " and ".join(student["stages"]) or "decoded"
    words += f" after {student['start']}" if student["start"] else ""
    return ", ".join([words, *(f"{k}={v}" for k, v in student["differs"].items())])


def students_table(students):
    """A row for each student: means over its seeds, and the tau of each seed."""
    rows = []
    for name, student in students.items():
        seeds = student["seeds"].values()

        def mean(score):
            return sum(at[score] for at in seeds) / len(seeds)
        worded = "one wording" in next(iter(seeds))
        rows.append([
            name, described(student), ", ".join(student["seeds"]), f"{mean('forwards'):.2f}",
            share(mean("valid")), f"{mean('strict ndcg@10'):.4f}", share(mean("faithful")),
            share(mean("copied")), share(mean("one wording")) if worded else "-",
            ", ".join(str(at["tau"] or "-") for at in seeds), f"{mean('seconds') / 60:.1f}"])
    return table(["student", "what it is", "seeds", "forwards", "valid", "N@10", "faithful",
                  "copied", "one wording", "tau", "minutes"], rows)


def claims_table(claims):
    def interval(found, as_text):
        text = interval_text(found["interval"], as_text)
        if found["interval"][0] is None:
            return f"{text} (only {found['users that differ']} users differ)"
        return text

    rows = [[f"{claim['student']} − {claim['control']}", ", ".join(map(str, claim["seeds"])),
             interval(claim["strict ndcg@10"], lambda x: f"{x:+.4f}"),
             interval(claim["valid"], lambda x: f"{100 * x:+.2f}")] for claim in claims]
    return table(["student − control", "seeds", "N@10", "valid, points"], rows)


def mean_curve(student):
    """[(tau, forwards, valid, N@10)] on the validation users, means over seeds."""
    curves = [at["curve"] for at in student["seeds"].values()]
    return [(points[0]["tau"], *(sum(p[name] for p in points) / len(points)
                                 for name in ("forwards", "valid", "strict ndcg@10")))
            for points in zip(*curves)]


def curve_table(students):
    rows = [[name, tau or "-", f"{forwards:.2f}", share(valid), f"{ndcg:.4f}"]
            for name, student in students.items()
            for tau, forwards, valid, ndcg in mean_curve(student)]
    return table(["student", "tau", "forwards", "valid", "N@10"], rows)


def page_of(result, picture):
    """The page of a comparison, Markdown."""
    allowed = result["forwards allowed"]
    chosen = "at the tau of its settings" if allowed is None else (
        "at the tau with the best N@10 on the validation users, among those with at most "
        f"{allowed} forwards, or at the fastest")
    common = {"config": result["config"], **result["settings"]}
    return "\n\n".join([
        f"# {result['entry']}",
        result["question"],
        f"    {result['made_by']['command']}",
        f"Common settings: {', '.join(f'{k}={v}' for k, v in common.items())}. {result['users']} "
        f"test users. Each seed has a teacher of its own. A student is decoded {chosen}. N@10 is "
        "strict: an invalid answer counts 0. *copied*: valid answers in the order of the list. "
        "*minutes*: of training, with the students that it goes on from.",
        students_table(result["students"]),
        "Claims, with 95 % intervals over users and seeds:",
        claims_table(result["claims"]),
        "The curve, on the validation users:",
        curve_table(result["students"]),
        f"![forwards against N@10 and valid answers]({picture})"]) + "\n"


def draw_curves(students, path):
    """Forwards against N@10 and against valid answers, on the validation users."""
    figure = Figure(figsize=(11, 4.2))
    axes = figure.subplots(1, 2)
    for n, (name, student) in enumerate(students.items()):
        _, forwards, valid, ndcg = zip(*mean_curve(student))
        style = dict(marker="o", ms=4, lw=1.2, ls="-" if n < 10 else "--", label=name)  # 10 colours
        axes[0].plot(forwards, ndcg, **style)
        axes[1].plot(forwards, [100 * x for x in valid], **style)
    for ax, of in zip(axes, ("N@10, strict", "valid answers, %")):
        forwards_axis(ax)
        ax.set_ylabel(of)
        ax.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    save_figure(path, figure)


def write_result(cfg, name, entry, students, claims):
    """Writes the three files, and prints the tables."""
    one = next(iter(students.values()))
    result = {
        "entry": name, "question": entry.question, "config": cfg.config,
        "settings": entry.settings, "forwards allowed": entry.forwards, "users": one["users"],
        "made_by": made_by(cfg), "claims": claims, "students": students}
    path = os.path.join(cfg.run_dir, "compare", name)
    page = page_of(result, f"{name}.png")
    write_json(f"{path}.json", result)
    write_text(f"{path}.md", page)
    draw_curves(students, f"{path}.png")
    print(f"\n{page}\nwritten: {path}.json, .md and .png")
