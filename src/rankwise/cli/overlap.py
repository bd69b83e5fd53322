"""``rankwise inspect A B …``: what adapters share before they are merged, as tables, JSON and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankwise.cli.common import emit_json, load_model, out, table
from rankwise.errors import OptionError, need

#: pairs that get rows of their own by role, and lines in the picture: the most alike
SHOWN = 6
#: sign conflict of two unrelated changes (independent normal entries): 1 − 1/√2
UNRELATED = 1 - 2**-0.5
_KEYS = ("cosine", "shared_left", "shared_right", "chance", "matched_a", "matched_b", "conflict")
_HEADS = ("cosine", "columns shared", "rows shared", "(by chance)", "matched of 1st", "matched of 2nd", "sign conflict")


def compare(
    folders: Sequence[str], model: str | None, picture: str | None, source_rank: int | None, match: float, json: bool
) -> None:
    """Read, compare, show.

    Args:
        folders: of the adapters.
        model: of their base; None: the folders must be plain LoRA of one base.
        picture: file to draw to, or None.
        source_rank: cut each adapter to this rank first.
        match: |cos| from which two components count as one.
        json: print JSON in place of tables.
    """
    from rankwise.merge.judge.overlap import compare_states

    if model is None:
        from rankwise.merge.engine.folders import open_folders

        if source_rank is not None:
            raise OptionError("--source-rank cuts what is read with its model; give --model.")
        sources: list[Any] = list(open_folders(folders))
    else:
        from rankwise.merge.engine.files import read_state

        net, _ = load_model(model)
        sources = [read_state(net, f, rank=source_rank) for f in folders]
    found = compare_states(sources, match=match)
    names = labels(folders)
    if picture:
        draw(found, names, picture)
    if json:
        emit_json(_json(found, folders))
        return
    _tables(found, names)
    if picture:
        out.print(f"\nwrote {picture}", highlight=False)


def labels(folders: Sequence[str]) -> list[str]:
    """The parts of the paths that differ; with a number where that leaves two alike."""
    parts = [Path(f).resolve().parts for f in folders]
    while all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    short = [p[-1] for p in parts]
    return [n if short.count(n) == 1 else f"{n} ({i + 1})" for i, n in enumerate(short)]


def _role(site: str) -> str:
    from rankwise.sites.roles import role_of

    return site[site.index("[") + 1 : -1] if site.endswith("]") else role_of(site, "linear")


def _roles(found: Any) -> dict[str, list[str]]:
    """role → sites, in the order of the first of each."""
    by: dict[str, list[str]] = {}
    for name in found.sites:
        by.setdefault(_role(name), []).append(name)
    return by


def _shown(rows: dict[tuple[int, int], Any]) -> list[tuple[int, int]]:
    return sorted(sorted(rows, key=lambda p: -abs(rows[p]["cosine"]))[:SHOWN])


def _tables(found: Any, names: Sequence[str]) -> None:
    ranks = [[s.ranks[t] for s in found.sites.values() if s.ranks[t]] for t in range(found.sources)]
    rows = [
        (n, len(r), "–".join(map(str, sorted({min(r), max(r)}))) if r else "", e**0.5)
        for n, r, e in zip(names, ranks, found.energy(), strict=True)
    ]
    table("adapters", ["adapter", "places", "rank", "‖ΔW‖"], rows, right=["places", "rank", "‖ΔW‖"])
    whole = found.over()
    shown = _shown(whole)
    lines = [(_pair(names, p), "all", *(f"{r[k]:z.2f}" for k in _KEYS)) for p, r in whole.items()]
    for role, sites in _roles(found).items():
        rows_ = found.over(sites).items()
        lines += [(_pair(names, p), role, *(f"{r[k]:z.2f}" for k in _KEYS)) for p, r in rows_ if p in shown]
    order = {p: i for i, p in enumerate(dict.fromkeys(line[0] for line in lines))}
    out.print()
    ordered, last = [], ""
    for line in sorted(lines, key=lambda line: order[line[0]]):
        ordered.append(line if line[0] != last else ("", *line[1:]))  # a pair is named once
        last = line[0]
    table("pairs", ["pair", "role", *_HEADS], ordered, right=_HEADS)
    if len(whole) > len(shown):
        out.print(f"by role: the {len(shown)} pairs most alike; --json has all", highlight=False)
    out.print(
        f"\ncolumns, rows shared: mean squared cosine of the principal angles; unrelated spaces share what is said by chance.\n"
        f"sign conflict: the weight of entries that pull apart; unrelated changes have {UNRELATED:.2f}, opposite ones 1.",
        style="dim",
        highlight=False,
    )


def _pair(names: Sequence[str], pair: tuple[int, int]) -> str:
    return " · ".join(names[t] for t in pair)


def _json(found: Any, folders: Sequence[str]) -> dict[str, Any]:
    def rows(over: dict[tuple[int, int], dict[str, float]]) -> list[dict[str, Any]]:
        return [{"pair": list(p), **r} for p, r in over.items()]

    sites = [
        {
            "site": n,
            "role": _role(n),
            "ranks": s.ranks,
            "energies": s.energies,
            "conflict": s.conflicts,
            "pairs": [
                {
                    "pair": list(k),
                    "cosine": p.cosine,
                    "left": p.left,
                    "right": p.right,
                    "matched": [p.matched_a, p.matched_b],
                    "chance": p.chance,
                    "conflict": s.conflict[k],
                }
                for k, p in s.pairs.items()
            ],
        }
        for n, s in found.sites.items()
    ]
    roles = {role: rows(found.over(names)) for role, names in _roles(found).items()}
    return {"adapters": list(folders), "energy": found.energy(), "overall": rows(found.over()), "roles": roles, "sites": sites}


# --- picture ---------------------------------------------------------------------------------------------------
def draw(found: Any, names: Sequence[str], path: str) -> None:
    """Heat-map of cosines; cosines of principal angles, the median place; sign conflicts by role."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise need("matplotlib", "plots", "A picture") from error
    whole = found.over()
    shown = _shown(whole)
    fig, axes = plt.subplots(1, 3, figsize=(15.5, 4.6), constrained_layout=True, width_ratios=[1, 1.15, 1.35])
    _heat(fig, axes[0], found, names)
    _angles(axes[1], found, names, shown)
    _bars(axes[2], found, names, shown)
    for ax in axes[1:]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.25)
    if len(whole) > len(shown):
        fig.suptitle(f"middle and right: the {len(shown)} of {len(whole)} pairs most alike", fontsize=9)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _heat(fig: Any, ax: Any, found: Any, names: Sequence[str]) -> None:
    cosines = found.cosines().numpy()
    image = ax.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1)
    ticks = range(len(names))
    ax.set_xticks(ticks, names, rotation=30 if len(names) < 7 else 90, ha="right" if len(names) < 7 else "center", fontsize=9)
    ax.set_yticks(ticks, names, fontsize=9)
    if len(names) <= 12:
        for i in ticks:
            for j in ticks:
                v = cosines[i, j]
                ax.text(j, i, f"{v:z.2f}", ha="center", va="center", fontsize=9, color="white" if abs(v) > 0.6 else "black")
    ax.set_title("cosine of the changes", fontsize=11)
    fig.colorbar(image, ax=ax, shrink=0.8)


def _angles(ax: Any, found: Any, names: Sequence[str], shown: Sequence[tuple[int, int]]) -> None:
    import statistics

    for c, pair in enumerate(shown):
        here = [s.pairs[pair] for s in found.sites.values() if pair in s.pairs]
        for side, style in (("left", "-"), ("right", "--")):
            spectra = [getattr(p, side) for p in here]
            y = [statistics.median(s[i] for s in spectra if len(s) > i) for i in range(max(map(len, spectra)))]
            label = _pair(names, pair) if side == "left" else None
            ax.plot(range(1, len(y) + 1), y, style, marker="o", ms=3, lw=1.4, color=f"C{c}", label=label)
    here = [p for s in found.sites.values() for p in s.pairs.values()]
    chance = statistics.median(c**0.5 for p in here for c in p.chance)
    ax.axhline(chance, color="0.35", lw=1, ls=":")
    most = max(max(len(p.left), len(p.right)) for p in here)
    ax.set_xticks(range(1, most + 1, 1 + most // 12))
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
    ax.text(most, chance + 0.015, "by chance (r.m.s.)", fontsize=8, color="0.35", ha="right", va="bottom", bbox=box, zorder=4)
    ax.plot([], [], "-", color="0.35", label="columns (B)")
    ax.plot([], [], "--", color="0.35", label="rows (A)")
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("principal angle, smallest first")
    ax.set_ylabel("its cosine, the median place")
    ax.set_title("shared subspaces", fontsize=11)
    ax.legend(fontsize=8, frameon=False)


def _bars(ax: Any, found: Any, names: Sequence[str], shown: Sequence[tuple[int, int]]) -> None:
    roles = _roles(found)
    groups = {"all": found.over()} | {role: found.over(sites) for role, sites in roles.items()}
    width = 0.8 / len(shown)
    for c, pair in enumerate(shown):
        at = [(i, rows[pair]["conflict"]) for i, rows in enumerate(groups.values()) if pair in rows]
        x = [i + (c - (len(shown) - 1) / 2) * width for i, _ in at]
        ax.bar(x, [v for _, v in at], width * 0.92, color=f"C{c}", label=_pair(names, pair))
    ax.axhline(UNRELATED, color="0.35", lw=1, ls=":")
    ax.text(len(groups) - 0.5, UNRELATED, "unrelated", fontsize=8, color="0.35", ha="right", va="bottom")
    ax.set_xticks(range(len(groups)), list(groups), fontsize=9, rotation=0 if len(groups) < 10 else 45)
    top = max(max(r[p]["conflict"] for p in shown if p in r) for r in groups.values() if any(p in r for p in shown))
    ax.set_ylim(0, min(1.0, max(top, UNRELATED) * 1.3 + 0.02))
    ax.set_ylabel("weight of entries of opposite sign")
    ax.set_title("sign conflict", fontsize=11)
    ax.legend(fontsize=8, frameon=False, loc="upper right", ncols=2 if len(shown) > 3 else 1)
