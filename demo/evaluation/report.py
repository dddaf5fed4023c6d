"""Tables and curves from the rows that `measure` gives. Every number says of how many films it is."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, median, stdev

from demo.evaluation.measure import AFTER, TIMES
from demo.evaluation.plan import ARMS, DRAWN, MAIN, PROMPT, TIMELINE
from demo.judge import ATTRIBUTES, COUNT
from demo.world import BLEND, CATEGORIES, FPS

ALL = "all"
CUT = 1.5  # times the largest change elsewhere


def read_parts(folder: Path) -> dict[str, list[dict]]:
    """The rows of each arm, main first, in order."""
    rows = defaultdict(dict)
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime):
        for row in json.loads(path.read_text("utf-8")):
            rows[row["arm"]][row["name"]] = row
    return {arm: [rows[arm][name] for name in sorted(rows[arm])] for arm in ARMS if arm in rows}


def of_kind(rows: Iterable[dict], kind: str, names: set[str] | None = None) -> list[dict]:
    return [row for row in rows if row["kind"] == kind and (names is None or row["name"] in names)]


def truth(row: dict, frame: int) -> dict[str, int]:
    """What frame number `frame` of a film should show."""
    scene = sum(start <= frame for start in row["starts"]) - 1
    return dict(zip(CATEGORIES, row["scenes"][scene], strict=True)) | {COUNT: 1}


def right_at(row: dict, window: int) -> dict[str, bool]:
    """Which attributes a window of a film shows right, and whether all."""
    wanted = truth(row, row["ends"][window] - 1)
    right = {name: row["read"][name][window] == wanted[name] for name in ATTRIBUTES}
    return right | {ALL: all(right.values())}


def adherence(rows: Sequence[dict]) -> dict:
    """Share of films that show each attribute right in the window that ends at each time; and that have no subject, or
    two, in any window of the whole film."""
    result = {"films": len(rows), "right": {}, "by second": {}}
    for end in rows[0]["ends"] if rows else []:
        with_it = [row for row in rows if end in row["ends"]]
        right = [right_at(row, row["ends"].index(end)) for row in with_it]
        result["by second"][f"{end / FPS:g}"] = {name: mean(r[name] for r in right) for name in (*ATTRIBUTES, ALL)}
    for seconds in TIMES:
        if f"{seconds}" in result["by second"]:
            result["right"][str(seconds)] = result["by second"][f"{seconds}"]
    if rows:
        every = [right_at(row, window) for row in rows for window in range(len(row["ends"]))]
        result["windows right"] = {name: mean(right[name] for right in every) for name in (*ATTRIBUTES, ALL)}
    result["ever lost"] = mean(0 in row["read"][COUNT] for row in rows)
    result["ever doubled"] = mean(2 in row["read"][COUNT] for row in rows)
    result["windows lost"] = mean(count == 0 for row in rows for count in row["read"][COUNT])
    result["windows doubled"] = mean(count == 2 for row in rows for count in row["read"][COUNT])
    return result


def outcome_of(row: dict, switch: dict) -> dict[str, bool]:
    """Whether one switch of a timeline shows all that is new; leaves all else as it was read before, and right; both
    right."""
    wanted, before, after = truth(row, switch["frame"]), switch["before"], switch["after"]
    others = [name for name in ATTRIBUTES if name not in switch["changed"]]
    return {"new shown": all(after[name] == wanted[name] for name in switch["changed"]),
            "others same": all(after[name] == before[name] for name in others),
            "others right": all(after[name] == wanted[name] for name in others), "all right": after == wanted}


def switching(rows: Sequence[dict]) -> dict:
    """What became of all switches of timelines. `others same`: each attribute that should not change is read as it was
    before; `others right`: as it should be. `delay`: median seconds, and the share that came within AFTER at all."""
    new, same, right = defaultdict(list), defaultdict(list), defaultdict(list)
    delays, total, switches = defaultdict(list), [], 0
    for row in rows:
        for switch in row["switches"]:
            switches += 1
            wanted = truth(row, switch["frame"])
            for name in ATTRIBUTES:
                is_right = switch["after"][name] == wanted[name]
                if name in switch["changed"]:
                    new[name].append(is_right)
                else:
                    same[name].append(switch["after"][name] == switch["before"][name])
                    right[name].append(is_right)
            outcome = outcome_of(row, switch)
            for shares, what in ((new, "new shown"), (same, "others same"), (right, "others right")):
                shares[ALL].append(outcome[what])
            total.append(outcome["all right"])
            for name, seconds in switch["delay"].items():
                delays[name].append(seconds)
    return {
        "films": len(rows), "switches": switches, "new shown": _means(new), "others same": _means(same),
        "others right": _means(right), "all right": mean(total) if total else None,
        "delay": {name: {"median": median(told) if (told := [s for s in values if s is not None]) else None,
                         "in time": mean(s is not None and s <= AFTER for s in values)}
                  for name, values in delays.items()},
        "cuts": cuts(rows, {"setting"}), "cuts beside fades": cuts(rows, {"setting", "light"}),
    }


def difference(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float]:
    """How much larger the share of True is in `second` than in `first`, of the same films, and its 95 % confidence
    interval: adjusted Wald for paired data (Bonett & Price 2012, doi.org/10.3102/1076998611411915)."""
    found = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    count = len(first) + 2
    p, q = (found + 1) / count, (lost + 1) / count
    half = 1.96 * sqrt((p + q - (p - q) ** 2) / count)
    return {"difference": (found - lost) / len(first), "low": p - q - half, "high": p - q + half}


def mean_difference(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """How much larger the mean share is in `second` than in `first`, of the same films, and its 95 % confidence
    interval by the normal distribution."""
    each = [b - a for a, b in zip(first, second, strict=True)]
    half = 1.96 * stdev(each) / sqrt(len(each)) if len(each) > 1 else 1.0  # shares can't differ by more
    return {"difference": mean(each), "low": mean(each) - half, "high": mean(each) + half}


def differences(kind: str, first: Sequence[dict], second: Sequence[dict]) -> dict[str, dict[str, dict]]:
    """`difference` of the same films made in two ways, row by row. Of prompts at each time: of each attribute; under
    "all": of the share of a film's windows that show it right. Of timelines under "switches": of what became of one."""
    if kind == TIMELINE:
        outcomes = {"switches": [[outcome_of(row, switch) for row in rows for switch in row["switches"]]
                                 for rows in (first, second)]}
    else:
        ends = {str(seconds): seconds * FPS for seconds in TIMES if seconds * FPS in first[0]["ends"]}
        outcomes = {when: [[right_at(row, row["ends"].index(end)) for row in rows] for rows in (first, second)]
                    for when, end in ends.items()}
    result = {when: {name: difference([r[name] for r in one], [r[name] for r in other]) for name in one[0]}
              for when, (one, other) in outcomes.items()}
    if kind == PROMPT:
        shares = [[adherence([row])["windows right"] for row in rows] for rows in (first, second)]
        result[ALL] = {name: mean_difference(*([share[name] for share in of_films] for of_films in shares))
                       for name in (*ATTRIBUTES, ALL)}
    return result


def cuts(rows: Sequence[dict], fades: set[str], reference: Sequence[dict] | None = None) -> dict | None:
    """How large the largest change from one frame to the next is at switches that leave `fades` alone, in units of the
    largest one elsewhere in the same film; or, with a reference, of that at the same switch of its film."""
    ratios = []
    others = {row["name"]: row for row in reference or ()}
    for row in rows:
        for k, switch in enumerate(row["switches"]):
            unit = row["elsewhere"]
            if reference is not None:
                unit = others[row["name"]]["switches"][k]["change"] if row["name"] in others else 0
            if unit > 0 and not fades & set(switch["changed"]):
                ratios.append(switch["change"] / unit)
    if not ratios:
        return None
    return {"switches": len(ratios), "no cut": mean(r <= CUT for r in ratios), "median": median(ratios),
            "largest": max(ratios)}


def _means(values: dict[str, list[bool]]) -> dict[str, float]:
    return {name: mean(told) for name, told in values.items() if told}


def drift(rows: Sequence[dict]) -> dict:
    """Mean of each statistic at each time, and of its change from the first time on, film by film, in shares of the
    first: `change` with its sign, `size` without."""
    result = {}
    times = sorted({int(end) for row in rows for end in row["statistics"]})
    for end in times:
        both = [(row["statistics"][str(times[0])], row["statistics"][str(end)]) for row in rows
                if str(end) in row["statistics"] and str(times[0]) in row["statistics"]]
        result[f"{end / FPS:g}"] = {
            name: {"value": mean(now[name] for _, now in both),
                   "change": mean(now[name] / max(was[name], 1e-6) - 1 for was, now in both),
                   "size": mean(abs(now[name] / max(was[name], 1e-6) - 1) for was, now in both)}
            for name in both[0][0]}
    return result


def summary(rows: dict[str, list[dict]]) -> dict:
    """All numbers: of each arm, and of the main arm for just the films that the others made too."""
    result = {"arms": {}, "ablations": {}}
    for arm, every in rows.items():
        prompts, timelines = of_kind(every, PROMPT), of_kind(every, TIMELINE)
        result["arms"][arm] = {
            **({"prompts": adherence(prompts), "drift": drift(prompts)} if prompts else {}),
            **({"timelines": switching(timelines), "timeline films": adherence(timelines)} if timelines else {}),
        }
        if timelines and DRAWN in rows:
            against = cuts(timelines, set(), of_kind(rows[DRAWN], TIMELINE))
            result["arms"][arm]["timelines"]["cuts against drawn"] = against
    for arm in rows:
        if arm in (MAIN, DRAWN) or MAIN not in rows:
            continue
        pair = {}
        for kind, of in ((PROMPT, lambda r: {"adherence": adherence(r), "drift": drift(r)}), (TIMELINE, switching)):
            names = {r["name"] for r in of_kind(rows[arm], kind)} & {r["name"] for r in of_kind(rows[MAIN], kind)}
            if names:
                both = {who: of_kind(rows[who], kind, names) for who in (MAIN, arm)}
                pair[kind] = {who: of(told) for who, told in both.items()}
                pair[f"{kind} differences"] = differences(kind, both[MAIN], both[arm])
        result["ablations"][arm] = pair
    return result


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|",
                      *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def markdown(told: dict) -> str:
    """The summary as text with tables."""
    parts = ["\n".join(["## Ways to make a film\n", *(f"- **{arm}**: {ARMS[arm].about}" for arm in told["arms"]), ""])]
    for arm, numbers in told["arms"].items():
        if arm in (MAIN, DRAWN) and "prompts" in numbers:
            parts.append(_adherence_text(f"Held-out prompts: {arm}", numbers["prompts"]))
    both = {arm: n["timelines"] for arm, n in told["arms"].items() if "timelines" in n}
    if both:
        parts.append(_switch_text(both))
    for arm, pair in told["ablations"].items():
        if PROMPT in pair:
            parts.append(_ablation_text(arm, pair[PROMPT]))
        parts.append(_difference_text(arm, pair))
    drifts = {arm: n["drift"] for arm, n in told["arms"].items() if "drift" in n}
    if drifts:
        parts.append(_drift_text(drifts))
    return "\n".join(parts)


def _adherence_text(title: str, numbers: dict) -> str:
    times = list(numbers["right"])
    lines = [[name, *(percent(numbers["right"][t][name]) for t in times), percent(numbers["windows right"][name])]
             for name in (*ATTRIBUTES, ALL)]
    return (f"## {title} ({numbers['films']} films)\n\nRight in the 2.5 s that end at this time, and in all of such "
            f"windows, in %.\n\n" + _table(["", *(f"{t} s" for t in times), "all windows"], lines)
            + f"\nSubject ever lost in {percent(numbers['ever lost'])} % of films "
              f"({percent(numbers['windows lost'])} % of windows), ever doubled in "
              f"{percent(numbers['ever doubled'])} % ({percent(numbers['windows doubled'])} %).\n")


def _switch_text(arms: dict[str, dict]) -> str:
    first = next(iter(arms.values()))

    def line(title: str, get: Callable[[dict], float | None]) -> list[str]:
        return [title, *(percent(get(numbers)) for numbers in arms.values())]

    lines = [line("new shown: all", lambda n: n["new shown"].get(ALL))]
    lines += [line(f"new shown: {name}", lambda n, name=name: n["new shown"].get(name)) for name in CATEGORIES]
    lines += [line("others as before: all", lambda n: n["others same"].get(ALL)),
              line("others right: all", lambda n: n["others right"].get(ALL)),
              line("one subject", lambda n: n["others right"].get(COUNT)),
              line("everything right", lambda n: n["all right"])]
    for key, title in (("cuts", "setting stays"), ("cuts beside fades", "setting and light stay"),
                       ("cuts against drawn", "against the drawn film")):
        told = [numbers.get(key) for numbers in arms.values()]
        lines.append([f"no cut (≤ {CUT}×), {title}", *(percent(t and t["no cut"]) for t in told)])
        lines.append(["its ratio, median / largest",
                      *(f"{t['median']:.2f} / {t['largest']:.2f}" if t else "–" for t in told)])
    for name in (n for n in BLEND if n in first["delay"]):
        told = [n["delay"].get(name) for n in arms.values()]
        lines.append([f"seconds until {name} shows", *("–" if not d or d["median"] is None else f"{d['median']:.2f}"
                                                       for d in told)])
    films = ", ".join(f"{arm} {n['films']} films with {n['switches']} switches" for arm, n in arms.items())
    return (f"## Switches\n\n{films}. In the 2.5 s that begin {AFTER:g} s after a switch, in %. Cuts: the "
            f"largest change from one frame to the next within {AFTER:g} s, in units of the largest elsewhere in the "
            f"film, or of that at the same switch of the drawn film.\n\n" + _table(["", *arms], lines))


def _ablation_text(arm: str, pair: dict) -> str:
    times = list(pair[arm]["adherence"]["right"])
    lines = []
    for who, numbers in pair.items():
        told = numbers["adherence"]
        lines.append([who, *(percent(told["right"][t][ALL]) for t in times), percent(told["ever lost"]),
                      percent(told["ever doubled"])])
    films = pair[arm]["adherence"]["films"]
    return (f"## {arm} ({films} films, same seeds)\n\nEverything right, in %.\n\n"
            + _table(["", *(f"{t} s" for t in times), "ever lost", "ever doubled"], lines))


def _difference_text(arm: str, pair: dict) -> str:
    parts = []
    for kind in (PROMPT, TIMELINE):
        if told := pair.get(f"{kind} differences"):
            cells = {when: {name: f"{100 * d['difference']:+.1f} ({100 * d['low']:+.1f} … {100 * d['high']:+.1f})"
                            for name, d in values.items()} for when, values in told.items()}
            heads = ["", *(f"{when} s" if when.isdigit() else "all windows" if when == ALL else when for when in cells)]
            names = next(iter(cells.values()))
            parts.append(_table(heads, [[name, *(values[name] for values in cells.values())] for name in names]))
    return (f"## {arm}, less {MAIN}\n\nDifference of the same films, in percentage points, with its 95 % confidence "
            f"interval.\n\n" + "\n".join(parts))


def _drift_text(drifts: dict[str, dict]) -> str:
    lines = []
    for arm, times in drifts.items():
        for seconds, told in times.items():
            cells = (f"{s['value']:.1f} ({100 * s['change']:+.1f} %)" for s in told.values())
            lines.append([arm, f"{seconds} s", *cells])
    names = list(next(iter(next(iter(drifts.values())).values())))
    return ("## Sharpness and drift\n\nMean over films, 0 … 255, and the mean change from the first time on.\n\n"
            + _table(["", "", *names], lines))


def curves(told: dict, path: Path) -> None:
    """Adherence over time as a picture: each attribute of the main arm, and everything right of every arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4), sharey=True)
    for arm, numbers in told["arms"].items():
        if "prompts" not in numbers:
            continue
        by_second = numbers["prompts"]["by second"]
        seconds = [float(s) for s in by_second]
        right.plot(seconds, [100 * v[ALL] for v in by_second.values()], label=arm)
        if arm == MAIN:
            for name in (*ATTRIBUTES, ALL):
                left.plot(seconds, [100 * v[name] for v in by_second.values()], label=name,
                          color="black" if name == ALL else None)
    for axes, title in ((left, "Held-out prompts: each attribute"), (right, "Everything right")):
        axes.set(title=title, xlabel="seconds", ylabel="right, %", ylim=(0, 101))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
