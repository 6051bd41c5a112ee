"""Draws the CSV of the simulated scale as SVG: benches/scale/plot.py scale.csv scale.svg

Needs Python 3 alone. Left: the 95th percentile of the latency against the load, by number of replicas, behind
the router that counts requests. Right: the same of eight replicas, by router.
"""

import csv
import sys

WIDTH, HEIGHT = 860, 380
COLOURS = ["#1b6ca8", "#d1495b", "#2e8540", "#8a5a00", "#6a3d9a", "#444444"]
LEFT, RIGHT = (60, 380), (500, 820)
TOP, BOTTOM = 50, 250


def panel(title, span, lines, loads, top):
    """A panel of lines: (name, {load: seconds})."""
    begin, end = span

    def at(load, value):
        x = begin + (load - loads[0]) / (loads[-1] - loads[0]) * (end - begin)
        return x, BOTTOM - min(value, top) / top * (BOTTOM - TOP)

    parts = [f'<text x="{begin}" y="{TOP - 22}" font-weight="bold">{title}</text>']
    for part in range(5):
        value = top * part / 4
        _, y = at(loads[0], value)
        parts.append(f'<line x1="{begin}" y1="{y:.1f}" x2="{end}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{begin - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.0f} s</text>')
    for load in loads:
        x, _ = at(load, 0)
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 18}" text-anchor="middle">{load:.0%}</text>')
    for index, (name, values) in enumerate(lines):
        colour = COLOURS[index % len(COLOURS)]
        points = [at(load, values[load]) for load in loads]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        y = BOTTOM + 42 + 16 * index
        parts.append(f'<rect x="{begin}" y="{y - 9}" width="18" height="4" fill="{colour}"/>')
        told = ", ".join(f"{values[load]:.1f}" for load in loads)
        parts.append(f'<text x="{begin + 26}" y="{y}">{name}: {told} s</text>')
    return parts


def main(source, target):
    with open(source, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    loads = sorted({float(row["load"]) for row in rows})

    def line(name, router, replicas):
        chosen = [row for row in rows if row["router"] == router and row["replicas"] == replicas]
        return name, {float(row["load"]): float(row["p95_s"]) for row in chosen}

    numbers = {"1": "1 replica", "8": "8 replicas", "64": "64 replicas"}
    by_number = [line(name, "least requests", number) for number, name in numbers.items()]
    routers = list(dict.fromkeys(row["router"] for row in rows if row["replicas"] == "8"))
    by_router = [line(router, router, "8") for router in routers]
    values = [value for _, line in by_number + by_router for value in line.values()]
    top = 20 * (int(max(values) / 20) + 1)
    parts = panel("p95 latency against load, simulated", LEFT, by_number, loads, top)
    parts += panel("Eight replicas, by router", RIGHT, by_router, loads, top)
    with open(target, "w", encoding="utf-8") as file:
        file.write(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'font-family="sans-serif" font-size="12" role="img">\n'
            "<title>Simulated latency of one, eight and 64 replicas</title>\n"
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n'
        )
        file.write("\n".join(parts))
        file.write("\n</svg>\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
