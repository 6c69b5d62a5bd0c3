"""The tables and the figure of what gradient_snr.py has found."""

from pathlib import Path

from matplotlib import pyplot as plt


BATCH = 64  # trajectories
COMPARED = {
    "Flow-GRPO": "outcome | group | group | step",
    "Flow-GRPO, batch scale": "outcome | group | batch | step",
    "TP-GRPO as published": "consistent | group | group | step",
    "gain over a share of R_j": "gain over a share of R_j | group | none | step",
    "own gain; completion baseline, batch scale, joint": "incremental | completion | batch | joint",
}
"""The rules by which settings are compared."""


def report(found: dict) -> str:
    """The rules, best progress first, in Markdown."""
    lines = [
        f"**{found['setting']}**, {found['num_batches']} batches of {BATCH} trajectories",
        "",
        "| credit, baseline, scale, scope | reward noise | NFE | signal / noise, times 1000 | cosine "
        "| progress, times 1000 | progress / outcome's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(found["rows"], key=lambda row: (row["reward_noise"], -row["progress"])):
        snr, cosine, progress, ratio = (
            f"{scale * row[name]:.2f} \u00b1 {1.96 * scale * row[f'{name}_error']:.2f}"
            for name, scale in (("snr", 1000), ("cosine", 1), ("progress", 1000), ("progress_ratio", 1))
        )
        if row["snr"] <= max(1.96 * row["snr_error"], 1e-9):
            cosine = progress = ratio = "-"  # of a direction that cannot be told from noise
        rule = row["rule"].replace(" | ", ", ")
        columns = (rule, row["reward_noise"], f"{row['evaluations']:.0f}", snr, cosine, progress, ratio)
        lines.append(f"| {' | '.join(map(str, columns))} |")
    if "explained" in found:  # what was run before has none
        shares = (
            f"{name} {' '.join(f'{value:.2f}' for value in values)}" for name, values in found["explained"].items()
        )
        lines += ["", f"Variance of final rewards within groups that is explained, by step: {'; '.join(shares)}."]
    if "profile" in found:
        lines += ["", *report_profile(found["profile"])]
    return "\n".join(lines) + "\n"


def report_profile(found: dict[str, list[float]]) -> list[str]:
    """The share of the signal that each step has, in Markdown."""
    lines = ["| step alone | squared norm of the policy gradient | share | share from here on |", "|---|---|---|---|"]
    for place, step in enumerate(found["step"]):
        cells = [
            f"{found[name][place]:{form}} \u00b1 {1.96 * found[f'{name}_error'][place]:{form}}"
            for name, form in (("signal", ".2e"), ("share", ".2f"), ("from_here", ".2f"))
        ]
        lines.append(f"| {step:.0f} | {' | '.join(cells)} |")
    return lines


def overview(found: list[dict]) -> str:
    """Signal to noise for a million function evaluations by setting, in Markdown."""
    lines = [f"| setting | batches | {' | '.join(COMPARED)} |", f"|---|---|{'---|' * len(COMPARED)}"]
    for one in found:
        cells = [f"{value:.1f} \u00b1 {width:.1f}" for value, width in map(per_million, compared(one))]
        lines.append(f"| {one['setting']} | {one['num_batches']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def compared(found: dict) -> list[dict]:
    """The rows of the rules that settings are compared by."""
    rows = {row["rule"]: row for row in found["rows"] if row["reward_noise"] == 0}
    return [rows[rule] for rule in COMPARED.values()]


def per_million(row: dict) -> tuple[float, float]:
    """Signal to noise for a million function evaluations, and the half width of its 95% interval."""
    return 1e6 * row["snr"] / row["evaluations"], 1.96e6 * row["snr_error"] / row["evaluations"]


def draw(found: list[dict], path: Path) -> None:
    """Signal to noise for a million function evaluations, every setting under the rules that are compared."""
    figure, axis = plt.subplots(figsize=(9, 1.6 + 0.5 * len(found)))
    for place, name in enumerate(COMPARED):
        points = [per_million(compared(one)[place]) for one in found]
        heights = [number + 0.15 * (place - (len(COMPARED) - 1) / 2) for number in range(len(found))]
        values, widths = zip(*points, strict=True)
        axis.errorbar(values, heights, xerr=widths, fmt="o", markersize=4, capsize=2, label=name)
    axis.set_yticks(range(len(found)), [one["setting"] for one in found])
    axis.invert_yaxis()
    axis.axvline(per_million(compared(found[0])[0])[0], color="grey", linewidth=0.8)
    axis.set(xlabel="signal / noise for a million function evaluations", xlim=(0, None))
    axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, ncols=2, loc="lower center")
    figure.tight_layout(rect=(0, 0.9 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=110)
